"""SparseConv2d: nn.Conv2d with a sparse weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..conv.geometry import ORDERS, Geometry, matrix_of, order_number, padding_of, pair, weight_of
from ..functional import _check_images, conv2d_geometry
from ..layout import Layout
from .base import SparseModule, random_topology
from .linear import _pack

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SparseConv2d(SparseModule):
    """y = act(conv2d(x, W) + bias) with sparse *weights* and dense activations.

    Constructor, forward and state_dict habits of nn.Conv2d: images [B, C, H, W] or [C, H, W], contiguous or
    channels_last (the output keeps the memory format), stride, padding (also "same" and "valid"),
    padding_mode, dilation, groups. `order` is the K order in which the weight [O, C / groups, kh, kw] is
    flattened and stored: "crs" (torch's own) or "rsc" (channels innermost, as 2:4 pruning along channels).

    spconv, MinkowskiEngine and TorchSparse have modules of nearly the same name for something else: sparse
    *activations* (point clouds) with dense weights. Their inputs are refused here with a message that says
    so; `WeightSparseConv2d` is the same class under a name that cannot be mistaken.
    """

    own_buffers = ("order_rsc",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "csr",
        density: float = 0.5,
        block_size: int | tuple[int, int] = 16,
        order: str = "crs",
        activation: str | None = None,
    ) -> None:
        dense = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        matrix = random_topology(matrix_of(dense.weight.detach(), order), format, density, block_size)
        super().__init__(
            _pack(matrix, format, block_size), None if dense.bias is None else dense.bias.detach(), activation
        )
        self._set_geometry(dense, order)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        *,
        format: str = "csr",
        block_size: int | tuple[int, int] = 16,
        order: str = "auto",
        prune: bool = False,
    ) -> SparseConv2d:
        """The sparse twin of a pruned nn.Conv2d: same outputs, same bias parameter, same training mode.

        order "auto": for sp24 the K order along which the weight is 2:4 ("crs" where both are), for bsr the
        one with fewer stored blocks, else "crs". prune=True (sp24 only) prunes by magnitude, along channels
        where they come in fours. A weight that is 2:4 in neither order raises a ValueError that names the
        first bad group.
        """
        weight = conv.weight.detach()
        module = cls.__new__(cls)
        packed, order = _pack_order(weight, format, block_size, order, prune)
        SparseModule.__init__(module, packed, None)
        module._set_geometry(conv, order)
        module.bias = cast("nn.Parameter | None", conv.bias)
        module.values.requires_grad_(conv.weight.requires_grad)
        return module.train(conv.training)

    def _set_geometry(self, conv: nn.Conv2d, order: str) -> None:
        if conv.padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {conv.padding_mode!r}")
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = pair(conv.kernel_size, "kernel_size", 1)
        self.stride, self.dilation = pair(conv.stride, "stride", 1), pair(conv.dilation, "dilation", 1)
        self.padding, self.padding_mode, self.groups = conv.padding, conv.padding_mode, conv.groups
        self.register_buffer("order_rsc", torch.tensor(order_number(order) == 1, device=self.values.device))
        self._order(order)

    def _order(self, order: str) -> None:
        self.order = order
        edges = padding_of(self.padding, self.kernel_size, self.stride, self.dilation)
        self._edges = (*edges[2:], *edges[:2])  # as torch.nn.functional.pad takes them
        zeros = self.padding_mode == "zeros"
        self.geometry = Geometry(
            *self.kernel_size, *self.stride, *self.dilation, *(edges if zeros else (0, 0, 0, 0)), self.groups,
            order_number(order),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        packed, x = self.packed, input
        if self.padding_mode != "zeros":
            _check_images(packed, x)
            images = x if x.dim() == 4 else x.unsqueeze(0)  # circular padding wants a batch
            padded = nn.functional.pad(images, self._edges, mode=self.padding_mode)
            x = padded if x.dim() == 4 else padded.squeeze(0)
        return conv2d_geometry(packed, x, self._parameters["bias"], self.geometry, self.activation, self.backend)

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d with the same weight, zeros filled in."""
        weight = self.dense_weight().detach()
        padding: Any = self.padding
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def dense_weight(self) -> Tensor:
        return weight_of(self.packed.to_dense(), self.kernel_size, self.order)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _matrix(self, weight: Tensor) -> Tensor:
        return matrix_of(weight, self.order)

    def _packed_from(self, state_dict: dict[str, Any], prefix: str, names: tuple[str, ...]) -> Layout | None:
        """Parts of a checkpoint say in which order they were flattened; this module follows them."""
        packed = super()._packed_from(state_dict, prefix, names)
        saved = state_dict.get(prefix + "order_rsc")
        if packed is not None and prefix + "values" in state_dict and saved is not None:
            self.order_rsc = saved.detach().clone().to(self.values.device)
            self._order(ORDERS[int(saved)])
        return packed

    def extra_repr(self) -> str:
        shown = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        for name, usual in (
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
        ):
            value = getattr(self, name)
            if value != usual and value != 0:
                shown.append(f"{name}={value!r}")
        return f"{', '.join(shown)}, order={self.order!r}, {self._describe()}"


WeightSparseConv2d = SparseConv2d


def _pack_order(
    weight: Tensor, format: str, block_size: int | tuple[int, int], order: str, prune: bool
) -> tuple[Layout, str]:
    """The packed weight and the K order that it was packed in."""
    if order != "auto":
        return _pack(matrix_of(weight, order), format, block_size, prune), order
    if format == "sp24" and prune:
        order = "rsc" if weight.shape[1] % 4 == 0 else "crs"
        return _pack(matrix_of(weight, order), format, block_size, True), order
    if format == "bsr":
        both = [(_pack(matrix_of(weight, name), format, block_size), name) for name in ORDERS]
        return min(both, key=lambda made: made[0].values.shape[0])
    if format == "sp24":
        try:
            return _pack(matrix_of(weight, "crs"), format, block_size), "crs"
        except ValueError as error:
            try:
                return _pack(matrix_of(weight, "rsc"), format, block_size), "rsc"
            except ValueError as other:
                raise ValueError(f"in K order crs: {error}; in K order rsc: {other}") from None
    return _pack(matrix_of(weight, "crs"), format, block_size, prune), "crs"
