"""What a pruned weight looks like: which formats could store it, and what stands in the way.

A weight has one or more K orders, the ways in which it is read as a matrix W[N, K]:
- matrix [N, K]: "k" (as it is) and "n" (transposed: transformers' Conv1D keeps [in, out], pruned on dim 0);
- convolution [O, C, R, S]: "crs" (memory order: what pruning the flattened weight meets) and "rsc" (channels
  innermost: what hardware and ASP mean). They agree for 1x1 kernels only.

`analyse` looks at the zeros alone and copies no values: about 0.1 s for a float32 4096 x 4096.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import FLOATS

BLOCKS = (16, 32, 64)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Crowded:
    """A group of four with more than two nonzeros: W[row, 4 * group : 4 * group + 4] in one K order."""

    row: int
    group: int
    values: tuple[float, ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{v:g}" for v in self.values)
        return f"row {self.row}, group {self.group} (columns {4 * self.group}..{4 * self.group + 3}): [{shown}]"


@dataclass(frozen=True)
class Order:
    """One K order of a weight: its matrix, its groups of four, its blocks."""

    name: str
    shape: tuple[int, int]
    groups: int
    violations: int
    first: Crowded | None  # the first group with more than two nonzeros
    blocks: dict[int, float]  # block size -> share of the square blocks that hold a nonzero

    @property
    def is_24(self) -> bool:
        """True where no group of four has more than two nonzeros: sp24 stores this order exactly."""
        return self.violations == 0

    @property
    def violation(self) -> float:
        """Share of the groups that stand in the way of 2:4."""
        return self.violations / self.groups if self.groups else 0.0


@dataclass(frozen=True)
class Patterns:
    """What `analyse` found. `orders` begins with the weight's own order ("k" or "crs")."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nonzeros: int
    negative_zeros: int
    nonfinite: int
    empty_rows: int  # output features (channels) that are zero throughout
    orders: tuple[Order, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def density(self) -> float:
        """Share of the weights that are not zero (-0.0 is zero)."""
        return self.nonzeros / self.size if self.size else 0.0

    @property
    def sp24_orders(self) -> tuple[str, ...]:
        """The K orders along which the weight is exactly 2:4."""
        return tuple(o.name for o in self.orders if o.is_24)

    def order(self, name: str | None = None) -> Order:
        """The K order of this name; None: the weight's own."""
        for o in self.orders:
            if name in (None, o.name):
                return o
        raise ValueError(f"order must be one of {', '.join(o.name for o in self.orders)}, got {name!r}")

    @property
    def nearest_24(self) -> Order:
        """The K order with the fewest violating groups, the weight's own first."""
        return min(self.orders, key=lambda o: o.violation)

    def nbytes(self, format: str, block: int = 32, order: str | None = None) -> int:
        """Bytes of this weight in "dense", "sp24", "bsr", "csr" or "bitmap", indices included.

        bsr knows the block sizes that were counted. sp24 is what the format takes, also of a weight not 2:4.
        """
        chosen, item = self.order(order), self.dtype.itemsize
        n, k = chosen.shape
        if format == "dense":
            return self.size * item
        if format == "sp24":
            kp = -(-k // 8) * 8
            return n * (kp // 2 * item + kp // 8)
        if format == "csr":
            return self.nonzeros * (item + 4) + 4 * (n + 1)
        if format == "bitmap":
            return self.nonzeros * item + n * -(-k // 8) + 8 * (n + 1)
        if format == "bsr":
            if block not in chosen.blocks:
                raise ValueError(f"block must be one of {', '.join(map(str, chosen.blocks))}, got {block}")
            rows, total = -(-n // block), -(-n // block) * -(-k // block)
            return round(chosen.blocks[block] * total) * (block * block * item + 4) + 4 * (rows + 1)
        raise ValueError(f"format must be dense, sp24, bsr, csr or bitmap, got {format!r}")


def order_names(dim: int) -> tuple[str, ...]:
    """The K orders of a weight of this many dimensions, its own first."""
    return ("k", "n") if dim == 2 else ("crs", "rsc")


def as_matrix(weight: Tensor, order: str) -> Tensor:
    """The weight as W[N, K] in one of its K orders (a view where strides allow)."""
    _check_order(weight.dim(), order)
    if order == "n":
        return weight.t()
    return (weight.movedim(1, -1) if order == "rsc" else weight).flatten(1)


def as_weight(matrix: Tensor, shape: tuple[int, ...], order: str) -> Tensor:
    """The weight of the given shape from its matrix in a K order: undoes `as_matrix`."""
    _check_order(len(shape), order)
    if order == "n":
        return matrix.t()
    if order == "rsc":
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return matrix.reshape(shape)


def analyse(weight: Tensor, blocks: tuple[int, ...] = BLOCKS) -> Patterns:
    """The patterns of a weight of two dimensions (matrix) or three to five (convolution), of any real type.

    blocks: block sizes to count, each a multiple of the one before. Raises ValueError for any other weight.
    """
    if weight.layout != torch.strided or not 2 <= weight.dim() <= 5:
        raise ValueError(
            f"the weight must be a dense tensor of 2 to 5 dimensions, got {weight.layout} {weight.dim()}-D"
        )
    if weight.dtype.is_complex:
        raise ValueError(f"the weight must be real, got {weight.dtype}")
    weight = weight.detach().contiguous()
    mask = nonzero_mask(weight)
    return Patterns(
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        nonzeros=int(mask.count_nonzero()),
        negative_zeros=_negative_zeros(weight),
        nonfinite=_nonfinite(weight),
        empty_rows=int((~mask.flatten(1).any(1)).sum()) if weight.numel() else weight.shape[0],
        orders=tuple(_order(weight, mask, name, blocks) for name in order_names(weight.dim())),
    )


def nonzero_mask(weight: Tensor) -> Tensor:
    """bool: which entries are neither 0.0 nor -0.0; NaN counts as a nonzero. 8-bit floats included."""
    if weight.is_floating_point() and weight.itemsize == 1:
        bits = weight.view(torch.uint8)
        # The fnuz types have no -0.0: 0x80 is their NaN.
        return bits != 0 if "fnuz" in str(weight.dtype) else (bits & 0x7F) != 0
    return weight != 0


def _check_order(dim: int, order: str) -> None:
    if order not in order_names(dim):
        raise ValueError(f"order must be {' or '.join(order_names(dim))} for a {dim}-D weight, got {order!r}")


def _order(weight: Tensor, mask: Tensor, name: str, blocks: tuple[int, ...]) -> Order:
    matrix = as_matrix(mask, name)
    n, k = matrix.shape
    crowded = _crowded(matrix)
    violations = int(crowded.count_nonzero())
    first = None
    if violations:
        row, group = divmod(int(crowded.reshape(-1).to(torch.uint8).argmax()), crowded.shape[1])
        values = as_matrix(weight, name)[row, 4 * group : 4 * group + 4].to(torch.float64)
        first = Crowded(row, group, tuple(values.tolist()))
    return Order(name, (n, k), n * -(-k // 4), violations, first, _block_shares(matrix, blocks))


def _crowded(matrix: Tensor) -> Tensor:
    """bool [N, ceil(K / 4)]: the groups of four with more than two nonzeros."""
    n, k = matrix.shape
    if k == 0 or n == 0:
        return matrix.new_zeros(n, -(-k // 4))
    if matrix.stride(0) == 1 and n > 1:  # transposed: add four rows of the memory
        whole = torch.nn.functional.pad(matrix.t().view(torch.uint8), (0, 0, 0, -k % 4))
        return ((whole[0::4] + whole[1::4] + whole[2::4] + whole[3::4]) > 2).t().contiguous()
    if k % 4:
        matrix = torch.nn.functional.pad(matrix, (0, -k % 4))
    # Four bytes of 0 or 1 in one word: the product's top byte is their sum.
    return (matrix.contiguous().view(torch.int32) * 0x01010101) >= 3 << 24


def _block_shares(matrix: Tensor, blocks: tuple[int, ...]) -> dict[int, float]:
    shares: dict[int, float] = {}
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:
        matrix = matrix.t()  # square blocks: the transpose holds the same ones
    grid, unit = matrix, 1
    for block in blocks:
        if block % unit:
            raise ValueError(f"blocks must ascend, each a multiple of the one before, got {blocks}")
        n, k, step = *grid.shape, block // unit
        if n == 0 or k == 0:
            shares[block] = 0.0
            continue
        bytes_ = torch.nn.functional.pad(grid, (0, -k % step, 0, -n % step)).view(torch.uint8)
        rows = bytes_.reshape(-1, step, bytes_.shape[1]).amax(1)
        grid = rows.reshape(rows.shape[0], -1, step).amax(2).view(torch.bool)
        shares[block], unit = int(grid.count_nonzero()) / grid.numel(), block
    return shares


def _negative_zeros(weight: Tensor) -> int:
    if not weight.is_floating_point() or "fnuz" in str(weight.dtype):
        return 0
    integer = _INTEGERS[weight.itemsize]
    sign = 0x80 if integer == torch.uint8 else torch.iinfo(integer).min
    return int((weight.view(integer) == sign).count_nonzero())


def _nonfinite(weight: Tensor) -> int:
    if not weight.is_floating_point():
        return 0
    if weight.itemsize == 1:
        return int((~torch.isfinite(weight.to(torch.float32))).count_nonzero())
    if bool(torch.isfinite(weight.sum(dtype=torch.float64 if weight.itemsize == 8 else torch.float32))):
        return 0  # a NaN or an infinity would have reached the sum
    return int((~torch.isfinite(weight)).count_nonzero())


# Which format suits

CSR_BELOW = 0.2  # density under which a column index a nonzero is cheaper to run than a bit a weight
BLOCK_WASTE = 1.34  # stored / nonzero up to which whole blocks are worth their zeros


@dataclass(frozen=True)
class Suggestion:
    """The format that suits a weight's zeros, or None and the reason why it had better stay dense."""

    format: str | None
    order: str
    block: int | None
    reason: str


def suggest(found: Patterns, min_sparsity: float = 0.4) -> Suggestion:
    """The format for a weight by its zeros alone; what is fastest on a machine only a measurement can say.

    Blocks where they hold few zeros, else 2:4 where it is exact, else bitmap, or csr below a density of 0.2;
    dense where fewer than `min_sparsity` of the weights are zero or the format would take more bytes.
    """
    own = found.orders[0].name
    if found.dtype not in FLOATS:
        return Suggestion(None, own, None, f"no format stores {str(found.dtype).removeprefix('torch.')}")
    if not found.nonzeros:
        return Suggestion(None, own, None, "all of it is zero" if found.size else "it is empty")
    if 1 - found.density < min_sparsity and not any(o.is_24 for o in _along_k(found)):
        return Suggestion(None, own, None, _too_dense(found, min_sparsity))
    chosen = _choose(found, min_sparsity)
    if chosen.format is not None:
        size, dense = found.nbytes(chosen.format, chosen.block or 32, chosen.order), found.nbytes("dense")
        if size >= dense:
            reason = f"{chosen.format} would take {size} bytes, dense takes {dense}"
            return Suggestion(None, own, None, reason)
    return chosen


def _along_k(found: Patterns) -> tuple[Order, ...]:
    """The orders that a product can run along; a matrix that is 2:4 along N only is none."""
    return tuple(o for o in found.orders if o.name != "n")


def _choose(found: Patterns, min_sparsity: float) -> Suggestion:
    orders = _along_k(found)
    for block in sorted(orders[0].blocks, reverse=True):
        best = min(orders, key=lambda o: o.blocks[block])
        share = best.blocks[block]
        if share <= BLOCK_WASTE * found.density and share <= 1 - min_sparsity:
            return Suggestion("bsr", best.name, block, f"{share:.0%} of the {block}x{block} blocks hold a nonzero")
    exact = next((o.name for o in orders if o.is_24), None)
    if exact is not None and found.density >= CSR_BELOW:
        return Suggestion("sp24", exact, None, f"exactly 2:4 along {exact}")
    format = "bitmap" if found.density >= CSR_BELOW else "csr"
    return Suggestion(format, orders[0].name, None, f"unstructured, {1 - found.density:.0%} zeros")


def _too_dense(found: Patterns, min_sparsity: float) -> str:
    zeros = 1 - found.density
    reason = f"{zeros:.1%} zeros, fewer than {min_sparsity:.0%}" if zeros else "no zeros"
    transposed = next((o for o in found.orders if o.name == "n" and o.is_24), None)
    return f"{reason}; 2:4 along dim 0 only" if transposed is not None and found.density <= 0.5 else reason
