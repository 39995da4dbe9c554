"""What pruning gained: counts, theoretical speed-up, stored bytes, measured latency and its gap to theory.

The definitions are ShrinkBench's (Blalock et al. 2020, "What is the State of Neural Network Pruning?", arXiv
2003.03033): compression = parameters / nonzero parameters, theoretical speed-up = multiply-adds / those with a
nonzero weight. Added to them are what decides in practice: bytes with their indices, and the clock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layout import FLOATS
from ..patterns import analyse, suggest
from ..testing import Timing, measure
from .calibrate import evaluating, feed
from .layers import is_conv1d
from .mask import finalize_

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Size:
    """How large a model is, and how large without its zeros. Masked weights count as zeros.

    `multiply_adds` are those of Linears and convolutions for the sample, `effective_multiply_adds` those of
    them whose weight is not zero (padding counted as ordinary input); both 0 without a sample. `dense_bytes`
    are those of all parameters and buffers, `stored_bytes` those with each weight in the format that suits
    its zeros (values, indices and pointers; see `patterns.suggest`) and the rest as it is.
    """

    parameters: int
    nonzeros: int
    multiply_adds: int
    effective_multiply_adds: int
    dense_bytes: int
    stored_bytes: int

    @property
    def compression(self) -> float:
        """parameters / nonzeros."""
        return self.parameters / self.nonzeros if self.nonzeros else float("inf")

    @property
    def theoretical_speedup(self) -> float | None:
        """multiply_adds / effective_multiply_adds; None without a sample."""
        if not self.multiply_adds:
            return None
        return self.multiply_adds / self.effective_multiply_adds if self.effective_multiply_adds else float("inf")


def size_of(model: nn.Module, sample: Any = None) -> Size:
    """Counts a dense or masked model; `sample`: what it is called with (tensor, tuple, dict)."""
    tensors = _tensors(model)
    parameters = [(t, spread) for t, spread, trained in tensors if trained]
    work = _work(model, sample) if sample is not None else (0, 0)
    return Size(
        parameters=sum(t.numel() for t, _ in parameters),
        nonzeros=sum(int(torch.count_nonzero(t)) for t, _ in parameters),
        multiply_adds=work[0],
        effective_multiply_adds=work[1],
        dense_bytes=sum(t.numel() * t.element_size() for t, _, _ in tensors),
        stored_bytes=sum(_stored(t) if wide else t.numel() * t.element_size() for t, wide, _ in tensors),
    )


def _tensors(model: nn.Module) -> list[tuple[Tensor, bool, bool]]:
    """(tensor, whether it is the weight of a layer that a format can store, whether it is a parameter), once each.

    Of a masked parameter the masked value; masks themselves do not count, finalize_ removes them.
    """
    found, seen = [], set()
    for module in model.modules():
        if isinstance(module, (parametrize.ParametrizationList,)) or _is_mask(module):
            continue
        names = dict.fromkeys((*module._parameters, *module._buffers))
        if parametrize.is_parametrized(module):
            names.update(dict.fromkeys(module.parametrizations))  # type: ignore[arg-type]
        for name in names:
            original = _source(module, name)
            if original is None or id(original) in seen or (name in module._buffers and _volatile(module, name)):
                continue
            seen.add(id(original))
            wide = name == "weight" and (isinstance(module, (nn.Linear, *_CONVS)) or is_conv1d(module))
            found.append((getattr(module, name).detach(), wide, isinstance(original, nn.Parameter)))
    return found


def _is_mask(module: nn.Module) -> bool:
    from .mask import Mask

    return isinstance(module, Mask)


def _source(module: Any, name: str) -> Any:
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original
    return getattr(module, name)


def _volatile(module: nn.Module, name: str) -> bool:
    return name in module._non_persistent_buffers_set


def _stored(weight: Tensor) -> int:
    """Bytes of a weight in the format that suits its zeros; dense where that is smaller."""
    dense = weight.numel() * weight.element_size()
    if weight.dtype not in FLOATS or not weight.numel():
        return dense
    found = analyse(weight)
    choice = suggest(found)
    if choice.format is None:
        return dense
    return min(dense, found.nbytes(choice.format, choice.block or 32, choice.order))


@torch.no_grad()
def _work(model: nn.Module, sample: Any) -> tuple[int, int]:
    """(multiply-adds, those with a nonzero weight) of all Linears and convolutions."""
    total = [0, 0]

    def hook(module: Any, args: tuple[Any, ...], out: Any) -> None:
        weight = module.weight.detach()
        if isinstance(module, nn.Linear) or is_conv1d(module):
            uses = out.numel() // max(1, out.shape[-1])
        else:
            uses = out.numel() // max(1, module.out_channels)  # batch times positions: each weight once at each
        total[0] += uses * weight.numel()
        total[1] += uses * int(torch.count_nonzero(weight))

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *_CONVS)) or is_conv1d(m)]
    handles = [m.register_forward_hook(hook) for m in layers]
    try:
        with evaluating(model):
            feed(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return total[0], total[1]


@dataclass(frozen=True)
class Speed:
    """Measured, interleaved in one process: seconds of the dense model, the pruned one as it is, converted.

    `gap` is theoretical over measured speed-up: 1 where the clock shows all that the zeros promise.
    """

    dense: Timing
    converted: Timing
    theoretical: float | None
    layers_converted: int

    @property
    def speedup(self) -> float:
        """Median time of the dense model / that of the converted one."""
        return self.dense.median / self.converted.median

    @property
    def gap(self) -> float | None:
        return None if self.theoretical is None else self.theoretical / self.speedup

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in milliseconds."""
        times = {
            name: {"ms": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3, "n": t.n}
            for name, t in (("dense", self.dense), ("converted", self.converted))
        }
        return {**times, "speedup": self.speedup, "theoretical_speedup": self.theoretical, "gap": self.gap,
                "layers_converted": self.layers_converted}  # fmt: skip


@torch.no_grad()
def speed_of(
    pruned: nn.Module, dense: nn.Module, sample: Any, *, seconds: float = 1.0, convert: dict[str, Any] | None = None
) -> Speed:
    """Converts a copy of the pruned model (`convert_`, with options) and times it against the dense one.

    Both models are called with `sample` in evaluation mode; neither is changed. The converted model's
    output is compared with the pruned one's first: RuntimeError where they differ by more than 1e-3 of the
    norm (times are not reported of what was not checked).
    """
    from ..nn import convert_
    from ..testing import relative_error

    work = size_of(pruned, sample).effective_multiply_adds, size_of(dense, sample).multiply_adds
    twin = finalize_(copy.deepcopy(pruned))
    with evaluating(twin), evaluating(dense):
        expected = _first_tensor(feed(twin, sample))
        report = convert_(twin, sample=_as_sample(sample), progress=False, **(convert or {}))
        ready = report.model
        error = relative_error(_first_tensor(feed(ready, sample)), expected)
        if not error <= 1e-3:
            raise RuntimeError(f"the converted model differs from the pruned one by {error:.3g} of the norm")
        calls = {"dense": lambda: feed(dense, sample), "converted": lambda: feed(ready, sample)}
        times = measure(calls, repeats=500, seconds=seconds, device=expected.device)
    theory = work[1] / work[0] if work[0] else None
    return Speed(times["dense"], times["converted"], theory, len(report.converted))


def _as_sample(sample: Any) -> Any:
    return tuple(sample) if isinstance(sample, list) else sample


def _first_tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    values: Iterable[Any] = out.values() if isinstance(out, dict) else out
    return next(v for v in values if isinstance(v, Tensor))


@dataclass(frozen=True)
class Result:
    """One pruned model: how it was pruned, what that cost and what it gained."""

    method: str
    pattern: str
    sparsity: float
    accuracy_dense: float
    accuracy_pruned: float
    accuracy_recovered: float | None
    size: Size
    speed: Speed | None = None

    @property
    def accuracy(self) -> float:
        """After recovery, where there was one."""
        return self.accuracy_pruned if self.accuracy_recovered is None else self.accuracy_recovered

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the ratios worked out."""
        size = asdict(self.size) | {
            "compression": self.size.compression,
            "theoretical_speedup": self.size.theoretical_speedup,
        }
        own = {k: getattr(self, k) for k in ("method", "pattern", "sparsity", "accuracy_dense", "accuracy_pruned",
                                             "accuracy_recovered")}  # fmt: skip
        return {**own, "size": size, "speed": None if self.speed is None else self.speed.to_dict()}


def evaluate_pruned(
    model: nn.Module,
    dense: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    method: str,
    pattern: str,
    recover: Callable[[nn.Module], Any] | None = None,
    sample: Any = None,
    timed: bool = True,
    baseline: float | None = None,
    seconds: float = 1.0,
) -> Result:
    """Measures a pruned model against the dense one: accuracy, recovery (`recover(model)`, in place), size, speed.

    evaluate(model) -> larger is better; `baseline`: its value for the dense model where it is known. The
    speed is measured where there is a sample and `timed`.
    """
    before = evaluate(dense) if baseline is None else baseline
    pruned = evaluate(model)
    recovered = None
    if recover is not None:
        recover(model)
        recovered = evaluate(model)
    size = size_of(model, sample)
    speed = speed_of(model, dense, sample, seconds=seconds) if timed and sample is not None else None
    weights = [t for t, wide, _ in _tensors(model) if wide]
    total = sum(t.numel() for t, wide, _ in _tensors(dense) if wide)  # a shrunk model has fewer to begin with
    share = 1 - sum(int(torch.count_nonzero(t)) for t in weights) / total if total else 0.0
    return Result(method, pattern, share, before, pruned, recovered, size, speed)
