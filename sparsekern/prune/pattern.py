"""Which weights may stay. A pattern turns scores into masks; a format stores what they leave.

A convolution's weight [N, C, R, S] is a matrix W[N, K] in one of two orders of K: "crs" is the flattened
(c, r, s), as `weight.flatten(1)` has it; "rsc" has the channels innermost, so that a group of four lies along
C at a fixed tap. The two agree for 1x1 kernels only, so a pattern always says which one it means, and the
mask that it makes remembers it.

Patterns that remove whole units (a weight, a block, a vector) differ only in what a unit is: `units` scores
them, `spread` turns the choice back into a mask, and one selection serves every scope. Channels, attention
heads and layers are units too, but of several layers at once: `structure.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from .. import patterns
from . import score

ORDERS = patterns.order_names(4)
SCOPES = ("row", "layer", "global")
AXES = {"in": 1, "out": 0, 1: 1, 0: 0}
Sparsity = float | Sequence[float] | None


def _matrix(weight: Tensor, order: str = "crs") -> Tensor:
    """A weight [N, C, ...] as W[N, K]; a matrix has one order only and is returned as it is."""
    return weight if weight.dim() == 2 else patterns.as_matrix(weight, order)


def _weight(matrix: Tensor, shape: tuple[int, ...], order: str = "crs") -> Tensor:
    return matrix if len(shape) == 2 else patterns.as_weight(matrix, shape, order)


@dataclass(frozen=True)
class Pattern:
    """What may stay of one weight, or of several under a common budget."""

    def masks(
        self,
        scores: Sequence[Tensor],
        sparsity: Sparsity = None,
        *,
        p: float = 1.0,
        alive: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """bool masks, shaped like the scores: True where the weight stays.

        sparsity: the share to remove, for all or one per weight; p: how scores join to a unit's (sum, or
        the largest for p = inf); alive: what is left of each weight, of which nothing removed comes back.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no masks of single weights")

    def mask(self, scores: Tensor, sparsity: float | None = None, p: float = 1.0) -> Tensor:
        """The mask of one weight: `masks` for a single one."""
        return self.masks([scores], sparsity, p=p)[0]


@dataclass(frozen=True)
class NM(Pattern):
    """Keep the `keep` best of each `group` consecutive weights along K (axis "in") or N (axis "out").

    A ragged last group keeps `keep` of what it has. Ties keep the lower index. 2:4 is NM(keep=2, group=4).
    Mishra et al. 2021 (arXiv 2104.08378).
    """

    keep: int = 2
    group: int = 4
    axis: int | str = "in"
    order: str = "crs"

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.group or self.group < 1:
            raise ValueError(f"N:M needs 0 <= keep <= group, got keep={self.keep}, group={self.group}")
        _check_axis(self.axis)
        _check_order(self.order)

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.group

    def masks(
        self,
        scores: Sequence[Tensor],
        sparsity: Sparsity = None,
        *,
        p: float = 1.0,
        alive: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        _check_fixed(self, sparsity, len(scores))
        return [self._one(s) for s in _lowered(scores, alive)]

    def _one(self, scores: Tensor) -> Tensor:
        matrix = _matrix(scores, self.order)
        rows = matrix if AXES[self.axis] else matrix.t()
        k = rows.shape[1]
        # Padding scores below every weight, so that a ragged group keeps real entries.
        groups = torch.nn.functional.pad(rows, (0, -k % self.group), value=-math.inf).unflatten(1, (-1, self.group))
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)[:, :k]
        kept = kept if AXES[self.axis] else kept.t()
        return _weight(kept, scores.shape, self.order) & (scores > -math.inf)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class Transposable(Pattern):
    """2:4 along K and along N at once: two of every row and of every column of each 4 x 4 tile.

    mask = argmax over the 90 such tiles P of sum(P * scores), exactly, so that W and its transpose are both
    2:4 and the backward product runs sparse as well. Hubara et al. 2021 (arXiv 2102.08124); the exhaustive
    search over 90 is that of Hu et al. 2024 (arXiv 2404.01847). Ragged tiles keep at most two.
    """

    order: str = "crs"

    def __post_init__(self) -> None:
        _check_order(self.order)

    @property
    def sparsity(self) -> float:
        return 0.5

    def masks(
        self,
        scores: Sequence[Tensor],
        sparsity: Sparsity = None,
        *,
        p: float = 1.0,
        alive: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        _check_fixed(self, sparsity, len(scores))
        left = [None] * len(scores) if alive is None else alive
        return [self._one(s, a) for s, a in zip(scores, left, strict=True)]

    def _one(self, scores: Tensor, alive: Tensor | None) -> Tensor:
        if alive is not None:
            scores = scores.where(alive, 0)
        matrix = _matrix(scores, self.order)
        n, k = matrix.shape
        padded = torch.nn.functional.pad(matrix, (0, -k % 4, 0, -n % 4))
        tiles = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2)
        flat = tiles.reshape(-1, 16)
        table = tiles_24().to(flat.device)
        weights = table.to(flat.dtype).t()
        choice = torch.cat([(part @ weights).argmax(1) for part in flat.split(1 << 16)])
        kept = table[choice].reshape(tiles.shape).transpose(1, 2).reshape(padded.shape)[:n, :k]
        mask = _weight(kept, scores.shape, self.order)
        return mask if alive is None else mask & alive

    def __str__(self) -> str:
        return "2:4 transposable"


@cache
def tiles_24() -> Tensor:
    """bool [90, 16]: every 4 x 4 tile with exactly two True in each row and each column."""
    rows = [tuple(i in pair for i in range(4)) for pair in combinations(range(4), 2)]
    tiles = [t for t in product(rows, repeat=4) if all(sum(column) == 2 for column in zip(*t, strict=True))]
    return torch.tensor(tiles).reshape(len(tiles), 16)


class _Units(Pattern):
    """Patterns that keep or remove whole units, in the scope `per`, at least `min_keep` of every layer."""

    per: str
    min_keep: float

    def units(self, scores: Tensor, p: float = 1.0) -> Tensor:
        """The score of every unit, [rows, units of a row]."""
        raise NotImplementedError

    def spread(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mask of a weight of this shape from the units that are kept."""
        raise NotImplementedError

    def masks(
        self,
        scores: Sequence[Tensor],
        sparsity: Sparsity = None,
        *,
        p: float = 1.0,
        alive: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        shares = _shares(sparsity, len(scores))
        lifes = [None] * len(scores) if alive is None else list(alive)
        found = [self._scored(s, a, p) for s, a in zip(scores, lifes, strict=True)]
        kept = select([u for u, _ in found], shares, self.per, self.min_keep, [s for _, s in found])
        masks = [self.spread(k, tuple(s.shape)) for k, s in zip(kept, scores, strict=True)]
        return [m if a is None else m & a for m, a in zip(masks, lifes, strict=True)]

    def _scored(self, scores: Tensor, alive: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
        """The units' scores, -inf where nothing is left of one, and how many weights each has."""
        sizes = self.units(torch.ones_like(scores))
        if alive is None:
            return self.units(scores, p), sizes
        best = self.units(scores.where(alive, 0), p)
        return best.masked_fill(self.units(alive.to(scores.dtype)) == 0, -math.inf), sizes


@dataclass(frozen=True)
class Unstructured(_Units):
    """Keep the best weights, wherever they are.

    `per` "layer" compares inside one weight, "row" inside each output row (as Wanda does), "global" across
    all weights of a call: one threshold. `min_keep` is what every layer keeps at least, a share (float) or a
    number of weights (int): the minimum threshold that prevents the collapse of a layer. Gupta et al. 2022,
    "Global Magnitude Pruning With Minimum Threshold Is All We Need" (arXiv 2209.14624).
    """

    per: str = "layer"
    min_keep: float = 0.0

    def __post_init__(self) -> None:
        _check_scope(self.per, self.min_keep)

    def units(self, scores: Tensor, p: float = 1.0) -> Tensor:
        return _matrix(scores)

    def spread(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _weight(kept, shape)

    def __str__(self) -> str:
        return "unstructured"


class _Blocks(_Units):
    """Units that are rectangles of W[N, K]."""

    order: str

    def _block(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of a unit of W[n, k]."""
        raise NotImplementedError

    def units(self, scores: Tensor, p: float = 1.0) -> Tensor:
        matrix = _matrix(scores, self.order)
        return score.blocks(matrix, self._block(*matrix.shape), p)

    def spread(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        n, k = shape[0], math.prod(shape[1:])
        r, c = self._block(n, k)
        whole = kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
        return _weight(whole, shape, self.order)


@dataclass(frozen=True)
class Block(_Blocks):
    """Keep the best R x C blocks of W[N, K] whole; `size` is an int or (R, C). Edge blocks may be smaller.

    A block's score is the sum of its weights' (p = inf: the largest); across layers (`per="global"`) the
    mean, so that edge blocks are not at a disadvantage. `per="row"` compares inside each row of blocks.
    Group-norm blocks: Narang et al. 2017, "Block-Sparse Recurrent Neural Networks" (arXiv 1711.02782).
    """

    size: int | tuple[int, int] = 32
    order: str = "crs"
    per: str = "layer"
    min_keep: float = 0.0

    def __post_init__(self) -> None:
        if len(self.block) != 2 or not all(isinstance(b, int) and b >= 1 for b in self.block):
            raise ValueError(f"size must be a positive integer or a pair of them, got {self.size}")
        _check_order(self.order)
        _check_scope(self.per, self.min_keep)

    @property
    def block(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _block(self, n: int, k: int) -> tuple[int, int]:
        return self.block

    def __str__(self) -> str:
        return "x".join(str(b) for b in self.block)


@dataclass(frozen=True)
class Vector(_Blocks):
    """Keep the best vectors: `length` weights along N (axis "out") or K (axis "in") of W[N, K].

    length None is a whole column (axis "out": an input feature) or row (axis "in": an output feature); the
    layer keeps its shape, `Channels` makes it smaller. Vectors along N are BSR blocks of length x 1: Chen et
    al. 2021, "Efficient Tensor Core-Based GPU Kernels for Structured Sparsity under Reduced Precision".
    """

    length: int | None = 8
    axis: int | str = "out"
    order: str = "crs"
    per: str = "layer"
    min_keep: float = 0.0

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be positive or None, got {self.length}")
        _check_axis(self.axis)
        _check_order(self.order)
        _check_scope(self.per, self.min_keep)

    def _block(self, n: int, k: int) -> tuple[int, int]:
        length = self.length or max(1, k if AXES[self.axis] else n)
        return (1, length) if AXES[self.axis] else (length, 1)

    def __str__(self) -> str:
        if self.length is None:
            return "rows" if AXES[self.axis] else "columns"
        return f"vectors of {self.length} along {'K' if AXES[self.axis] else 'N'}"


@dataclass(frozen=True)
class Channels(Pattern):
    """Remove whole output channels (filters, neurons) and with them everything that reads or shifts them.

    A unit is a channel of a group of coupled layers (residual branches, batch norms, consumers), found by
    torch.fx; its score is the sum over the rows that produce it, with `over="group"` also over the columns
    that read it (Li et al. 2017, arXiv 1608.08710; coupling as in Fang et al. 2023, DepGraph, arXiv
    2301.12900). Sparsity is the share of channels. `per` "layer" compares inside each group; "global"
    compares the mean score per weight across groups. `min_keep` channels (int) or share (float) stay of each
    group; the number kept is a multiple of `round_to`, rounded up. `shrink_` then makes the layers smaller.
    """

    per: str = "layer"
    min_keep: float = 1
    round_to: int = 1
    over: str = "producers"

    def __post_init__(self) -> None:
        _check_scope(self.per, self.min_keep, ("layer", "global"))
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")
        if self.over not in ("producers", "group"):
            raise ValueError(f"over must be 'producers' or 'group', got {self.over!r}")

    def __str__(self) -> str:
        return "channels"


@dataclass(frozen=True)
class Heads(Pattern):
    """Remove whole attention heads: their rows of the projections q, k, v and their columns of the output.

    A head's score is the sum over all of these. `per` "layer" or "global"; at least `min_keep` heads (or
    share) of each attention stay. Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv
    1905.10650), whose sensitivity is the Taylor criterion summed over a head.
    """

    per: str = "layer"
    min_keep: float = 1

    def __post_init__(self) -> None:
        _check_scope(self.per, self.min_keep, ("layer", "global"))

    def __str__(self) -> str:
        return "heads"


@dataclass(frozen=True)
class Layers(Pattern):
    """Remove whole layers: elements of a container whose output has the shape of their input.

    A layer's score is the mean of its weights' scores, or with criterion "influence" how much it turns its
    input, 1 - cos(x, layer(x)) over the data (Men et al. 2024, ShortGPT, arXiv 2403.03853). Sparsity is
    the share of layers; at least `min_keep` stay. `container` names the Sequential or ModuleList (default:
    the one with the most elements).
    """

    container: str | None = None
    min_keep: int = 1

    def __str__(self) -> str:
        return "layers"


STRUCTURAL = (Channels, Heads, Layers)


def pattern_of(pattern: Pattern | str) -> Pattern:
    """A pattern from itself or from its name.

    "2:4" and other halves such as "4:8"; "transposable"; "unstructured", "row", "global"; "block" (32 x 32),
    "block:16", "block:16x32"; "vector:8"; "channels", "heads", "layers". Of N:M only halves have a name: the
    field does not agree on whether N is kept or pruned, so others are written NM(keep=..., group=...).
    """
    if isinstance(pattern, Pattern):
        return pattern
    known: dict[str, Pattern] = {
        "2:4": NM(),
        "transposable": Transposable(),
        "unstructured": Unstructured(),
        "global": Unstructured(per="global"),
        "row": Unstructured(per="row"),
        "block": Block(),
        "channels": Channels(),
        "heads": Heads(),
        "layers": Layers(),
    }
    if pattern in known:
        return known[pattern]
    half = re.fullmatch(r"(\d+):(\d+)", pattern)
    if half and 2 * int(half[1]) == int(half[2]) > 0:
        return NM(int(half[1]), int(half[2]))
    block = re.fullmatch(r"block:(\d+)(?:x(\d+))?", pattern)
    if block:
        return Block((int(block[1]), int(block[2] or block[1])))
    vector = re.fullmatch(r"vector:(\d+)", pattern)
    if vector:
        return Vector(length=int(vector[1]))
    raise ValueError(
        f"pattern must be one of {', '.join(known)}, block:RxC, vector:L, or a Pattern such as "
        f"NM(keep=1, group=4) or Block((16, 32)); got {pattern!r}"
    )


def select(
    units: Sequence[Tensor],
    shares: Sequence[float],
    per: str,
    min_keep: float = 0.0,
    sizes: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """bool, shaped like each of `units` [rows, units]: the best ones, of each row, layer, or of all.

    Exactly round((1 - share) * count) in a row or layer, at least min_keep of a layer. Globally, units of
    one size alike; of several `sizes`, the best by score / size until (1 - share) of all weights are kept.
    """
    if per == "global":
        return _select_global(units, shares, min_keep, sizes)
    kept = []
    for scores, share in zip(units, shares, strict=True):
        rows = scores if per == "row" else scores.reshape(1, -1)
        least = math.ceil(min_of(min_keep, scores.numel()) / max(1, rows.shape[0]))
        keep = min(rows.shape[1], max(round((1 - share) * rows.shape[1]), least))
        kept.append(best(rows, keep).reshape(scores.shape))
    return kept


def min_of(min_keep: float, count: int) -> int:
    """How many of `count` units stay at least: an int is a number, a float a share."""
    return min(count, min_keep if isinstance(min_keep, int) else math.ceil(min_keep * count))


def best(rows: Tensor, keep: int) -> Tensor:
    """bool: exactly `keep` of the largest entries of every row; of equal ones, any."""
    kept = torch.zeros_like(rows, dtype=torch.bool)
    return kept.scatter_(-1, rows.topk(keep, dim=-1, sorted=False).indices, True)


def _select_global(
    units: Sequence[Tensor], shares: Sequence[float], min_keep: float, sizes: Sequence[Tensor] | None
) -> list[Tensor]:
    if not units:
        return []
    if len(set(shares)) > 1:
        raise ValueError("a global scope has one sparsity for all layers, not one per layer")
    weights = [torch.ones_like(u) for u in units] if sizes is None else list(sizes)
    size = torch.cat([w.reshape(-1).cpu() for w in weights]).double()
    parts = []
    for scores, weight in zip(units, weights, strict=True):
        flat = (scores / weight).reshape(-1).clone()
        least = min_of(min_keep, flat.numel())
        if least:
            flat[flat.topk(least, sorted=False).indices] = math.inf
        parts.append(flat.cpu())
    ranked, share = torch.cat(parts), shares[0]
    if bool((size == size[0]).all()):
        kept = best(ranked[None], round((1 - share) * ranked.numel()))[0]
    else:
        order = ranked.argsort(descending=True, stable=True)
        used = size[order].cumsum(0) - size[order] / 2
        kept = torch.zeros_like(ranked, dtype=torch.bool)
        kept[order[used < (1 - share) * size.sum()]] = True
    kept |= ranked == math.inf
    pieces = kept.split([u.numel() for u in units])
    return [piece.reshape(u.shape).to(u.device) for piece, u in zip(pieces, units, strict=True)]


def _lowered(scores: Sequence[Tensor], alive: Sequence[Tensor] | None) -> list[Tensor]:
    if alive is None:
        return list(scores)
    return [s.masked_fill(~a, -math.inf) for s, a in zip(scores, alive, strict=True)]


def _shares(sparsity: Sparsity, count: int) -> list[float]:
    if sparsity is None:
        raise ValueError("this pattern needs a sparsity: the share of weights to remove, in [0, 1]")
    shares = [float(sparsity)] * count if isinstance(sparsity, (int, float)) else [float(s) for s in sparsity]
    if len(shares) != count:
        raise ValueError(f"{len(shares)} sparsities for {count} weights")
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"sparsity is the share of weights to remove, in [0, 1]; got {share}")
    return shares


def _check_fixed(pattern: NM | Transposable, sparsity: Sparsity, count: int) -> None:
    for share in [] if sparsity is None else _shares(sparsity, count):
        if abs(share - pattern.sparsity) > 1e-6:
            raise ValueError(f"{pattern} has sparsity {pattern.sparsity:g}, not {share:g}")


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


def _check_axis(axis: int | str) -> None:
    if axis not in AXES:
        raise ValueError(f"axis must be 'in' (or 1: along K) or 'out' (or 0: along N), got {axis!r}")


def _check_scope(per: str, min_keep: float, scopes: tuple[str, ...] = SCOPES) -> None:
    if per not in scopes:
        raise ValueError(f"per must be {', '.join(map(repr, scopes[:-1]))} or {scopes[-1]!r}, got {per!r}")
    if min_keep < 0 or (isinstance(min_keep, float) and min_keep > 1):
        raise ValueError(f"min_keep is a share in [0, 1] or a number of units, got {min_keep}")
