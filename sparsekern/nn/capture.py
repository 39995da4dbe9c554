"""What the layers of a model are really called with: shapes, types and values, seen through forward hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_TOKENS = (1, 128)  # decode and prefill
DEFAULT_SIDE = 28  # pixels a side of the image that a convolution is timed with
MAX_KEPT = 1 << 30  # bytes of real activations that are kept; beyond, random ones of the same shape are used


@dataclass
class Seen:
    """A kind of call: the shape, type and memory order of x, the autocast type, how often, and one such x."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device
    autocast: torch.dtype | None = None
    count: int = 1
    x: Tensor | None = None

    def tokens(self, conv: bool) -> int:
        """Rows of the matrix product: all but the last dimension, of a convolution all but the channels."""
        last = self.shape[-1] if not conv else self.shape[-3]
        total = torch.Size(self.shape).numel()
        return total // last if last else 0

    def input(self) -> Tensor:
        """The activations that were seen, or random ones like them."""
        if self.x is not None:
            return self.x
        x = torch.randn(self.shape, dtype=torch.float32, device=self.device).to(self.dtype)
        if len(self.shape) == 4 and self.stride[1] == 1 and self.shape[1] > 1:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def context(self) -> Any:
        """The autocast under which the call was made."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def default_calls(layer: nn.Module, tokens: Sequence[int]) -> list[Seen]:
    """What a layer is timed with without a sample: `tokens` rows; a convolution one 28 x 28 image."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Conv2d):
        reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        h, w = (max(DEFAULT_SIDE, r) for r in reach)
        shapes: list[tuple[int, ...]] = [(1, layer.in_channels, h, w)]
    else:
        shapes = [(m, weight.shape[1]) for m in tokens]
    return [Seen(s, weight.dtype, _strides(s), weight.device) for s in shapes]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def run(model: nn.Module, sample: Any) -> None:
    """Calls the model with a sample: a tensor, tuple, dict of inputs, callable(model), or a list of these."""
    if isinstance(sample, Tensor):
        model(sample)
    elif isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, tuple):
        model(*sample)
    elif isinstance(sample, list):
        if not sample:
            raise ValueError("sample is an empty list")
        for one in sample:
            run(model, one)
    elif callable(sample):
        sample(model)
    else:
        raise TypeError(
            "sample must be a tensor, a tuple or dict of inputs, a callable(model), or a list of these; "
            f"got {type(sample).__name__}"
        )


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, nothing compiled or fused: every layer's hooks are called."""
    training = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for m, mode in training:
                m.training = mode


def capture(model: nn.Module, sample: Any, layers: Sequence[nn.Module]) -> dict[int, list[Seen]]:
    """Runs the sample; returns, by id(layer), the kinds of calls that it got (none: an absent key)."""
    seen: dict[int, dict[Any, Seen]] = {}
    kept = 0

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal kept
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.numel() == 0:
            return
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (tuple(x.shape), x.dtype, x.stride(), x.device, autocast)
        calls = seen.setdefault(id(layer), {})
        if key in calls:
            calls[key].count += 1
            return
        size = x.numel() * x.element_size()
        copy = x.detach() if kept + size <= MAX_KEPT else None
        kept += size if copy is not None else 0
        calls[key] = Seen(tuple(x.shape), x.dtype, x.stride(), x.device, autocast, x=copy)

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        with inference(model):
            run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    if layers and not seen:
        warnings.warn("the sample reached none of the model's Linear and Conv2d layers", stacklevel=3)
    return {layer: list(calls.values()) for layer, calls in seen.items()}
