"""Channel permutation for N:M: another order of the inputs, in which the pattern keeps more.

`search` finds the order of one weight; `permute_` gives it to a model's layers, folded into the layers that
produce those channels where torch.fx finds them, else applied as an index on the input. Pool & Yu 2021,
"Channel Permutations for N:M Sparsity" (NeurIPS): the search is theirs over pairs of stripes, bounded by
rounds in which every pair meets once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from . import score
from .apply import weight_parameter
from .groups import Record, trace
from .layers import Filter, layers, weight_of
from .mask import mask_of
from .pattern import NM


def kept(scores: Tensor, pattern: NM | None = None) -> float:
    """sum of the scores that N:M keeps along K of scores [N, K]: what a permutation raises."""
    rule = pattern or NM()
    groups = _padded(scores, rule.group).unflatten(1, (-1, rule.group))
    return float(groups.topk(rule.keep, dim=2).values.double().sum())


@cache
def _splits(group: int) -> Tensor:
    """[S, 2 * group]: the ways to deal 2 * group columns to two groups, the present one first."""
    columns = range(2 * group)
    found = []
    for rest in combinations(columns[1:], group - 1):  # column 0 stays, or every way would come twice
        first = (0, *rest)
        found.append((*first, *(c for c in columns if c not in first)))
    return torch.tensor(found)


def _padded(scores: Tensor, group: int) -> Tensor:
    return nn.functional.pad(scores, (0, -scores.shape[1] % group))


@torch.no_grad()
def search(scores: Tensor, pattern: NM | None = None, *, sweeps: int = 10, memory: int = 1 << 18) -> Tensor:
    """int64 [K]: an order of the columns of scores [N, K] in which N:M keeps at least as much as now.

    Greedy over pairs of stripes (groups of `group` columns): each of the ways to deal the columns of two
    stripes to them is tried (35 for groups of 4) and the best one taken. A sweep lets every pair meet once;
    it ends after a sweep without a gain (then no pair of stripes can be improved) or after `sweeps`.
    Columns of a ragged last group stay in place. Never worse than the identity. A sweep is
    O(K^2 N): about 5 s on one core for 512 x 512.
    Raises ValueError for groups larger than 5 columns (126 ways to deal 10).
    """
    rule = pattern or NM()
    if rule.group > 5:
        raise ValueError(
            f"the search deals two groups' columns in every way; of {rule.group} columns there are too many"
        )
    whole = scores.shape[1] // rule.group * rule.group
    stripes = whole // rule.group
    order = torch.arange(whole, device=scores.device).reshape(stripes, rule.group)
    splits = _splits(rule.group).to(scores.device)
    per = max(1, memory // max(1, scores.shape[0] * splits.numel()))
    table = scores.detach().float().t().contiguous()  # columns are gathered: rows here
    for _ in range(sweeps):
        gained = False
        for a, b in _rounds(stripes):
            for i in range(0, len(a), per):
                gained |= _deal(table, order, a[i : i + per], b[i : i + per], splits, rule)
        if not gained:
            break
    tail = torch.arange(whole, scores.shape[1], device=scores.device)
    return torch.cat((order.flatten(), tail))


def _rounds(count: int) -> list[tuple[Tensor, Tensor]]:
    """Rounds of disjoint pairs of stripes in which every pair meets once (a round-robin tournament)."""
    players = list(range(count + count % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [(x, y) for x, y in zip(players[:half], players[: half - 1 : -1], strict=True) if max(x, y) < count]
        if pairs:
            rounds.append((torch.tensor([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _deal(table: Tensor, order: Tensor, a: Tensor, b: Tensor, splits: Tensor, rule: NM) -> bool:
    """Takes the best way to deal for these disjoint pairs; whether any gained."""
    columns = torch.cat((order[a], order[b]), 1)  # [P, 2 g]
    values = table[columns]  # [P, 2 g, N]
    ways = values[:, splits].unflatten(2, (2, rule.group))  # [P, S, 2, g, N]
    totals = _best_sum(ways, rule.keep).double().sum((2, 3))  # [P, S]
    best, way = totals.max(1)
    better = best > totals[:, 0] * (1 + 1e-9) + 1e-12
    if not bool(better.any()):
        return False
    dealt = columns.gather(1, splits[way])
    order[a[better]] = dealt[better, : rule.group]
    order[b[better]] = dealt[better, rule.group :]
    return True


def _best_sum(ways: Tensor, keep: int) -> Tensor:
    """The sum of the `keep` largest along dimension 3 of [P, S, 2, g, N]."""
    if keep == 2 and ways.shape[3] == 4:
        a, b, c, d = ways.unbind(3)
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        high2, low2 = torch.maximum(c, d), torch.minimum(c, d)
        return torch.maximum(high + high2, torch.maximum(high + low, high2 + low2))
    return ways.topk(keep, dim=3).values.sum(3)


@dataclass(frozen=True)
class Permutation:
    """What `permute_` did for layers that read the same channels.

    `before` and `after` are the scores that the pattern keeps, `best` what a free choice in each row would;
    `how` is "folded" (into `producers`) or "indexed" (on the input).
    """

    layers: tuple[str, ...]
    producers: tuple[str, ...]
    how: str
    before: float
    after: float
    best: float
    order: Tensor

    @property
    def efficacy(self) -> float:
        """The share of the way from `before` to `best`."""
        lost = self.best - self.before
        return (self.after - self.before) / lost if lost else 0.0


class Permuted(nn.Module):
    """x -> layer(x[..., order]): a layer whose input channels stand in another order.

    `order` is an int64 buffer, so it is saved with the model; `layer` is the Linear or Conv2d (channels are
    its dimension 1), which `convert_` makes sparse as any other.
    """

    order: Tensor

    def __init__(self, layer: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.index_select(-3 if isinstance(self.layer, nn.Conv2d) else -1, self.order))


@torch.no_grad()
def permute_(
    model: nn.Module,
    sample: Any = None,
    pattern: NM | None = None,
    *,
    scores: Callable[[nn.Module, str], Tensor] | None = None,
    filter_fn: Filter | None = None,
    index: bool = True,
    sweeps: int = 10,
) -> list[Permutation]:
    """Reorders input channels so that N:M keeps more, in place; the model computes what it did before.

    sample: inputs on which torch.fx follows the channels to the layers that make them, whose rows (and batch
    norms) are then reordered with them: no cost at run time. Where that is not possible (the model's own
    inputs, channels that code addresses by number) and index is true, the layer becomes a `Permuted`.
    Convolutions are permuted along channels: prune them with NM(order="rsc"). Prune after permuting:
    `prune_(model, NM(...))`. scores(module, name) replaces |w|. Returns what was done, where it gained.
    """
    rule = pattern or NM()
    chosen = {
        name: module
        for name, module in layers(model, filter_fn)
        if getattr(module, "groups", 1) == 1 and isinstance(module, (nn.Linear, nn.Conv2d))
    }
    score_of = scores or (lambda module, name: score.magnitude(weight_of(module)))
    done: list[Permutation] = []
    folded: set[str] = set()
    for records in _foldable(model, sample) if sample is not None else []:
        readers = [r for r in records if r.role == "in"]
        named = [r for r in readers if r.layer in chosen]
        if not named:
            continue
        folded.update(r.layer for r in readers)
        matrix = torch.cat([_by_channel(score_of(r.module, r.layer), r) for r in named])
        made = _searched(matrix, rule, sweeps)
        if made is not None:
            for r in records:
                _reorder(r, made[0])
            producers = tuple(dict.fromkeys(r.layer for r in records if r.role == "out"))
            done.append(Permutation(tuple(r.layer for r in named), producers, "folded", *made[1:], made[0]))
    for name, module in chosen.items() if index else []:
        if name and name not in folded and mask_of(module) is None:
            made = _searched(_rows(score_of(module, name)), rule, sweeps)
            if made is not None:
                _permute_input(module, made[0])
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, Permuted(module, made[0]))
                done.append(Permutation((name,), (), "indexed", *made[1:], made[0]))
    return done


def _searched(matrix: Tensor, rule: NM, sweeps: int) -> tuple[Tensor, float, float, float] | None:
    """(order, kept before, kept after, kept by a free choice in each row) where there is a gain."""
    order = search(matrix, rule, sweeps=sweeps)
    before, after = kept(matrix, rule), kept(matrix[:, order], rule)
    if after <= before:
        return None
    rows = matrix.topk(round(matrix.shape[1] * rule.keep / rule.group), dim=1).values
    return order, before, after, float(rows.double().sum())


def _rows(scores: Tensor) -> Tensor:
    """Scores [N, C, R, S] as [N R S, C]: groups lie along the channels at every tap."""
    return scores.movedim(1, -1).reshape(-1, scores.shape[1])


def _by_channel(scores: Tensor, r: Record) -> Tensor:
    """[rows, channels]: of a Linear after a flatten, the positions of each channel as rows of their own."""
    count, width = len(r.labels.unique()), scores.shape[1]
    if width == count:
        return _rows(scores)
    return scores.reshape(-1, count, width // count).movedim(1, 2).reshape(-1, count)


def _permute_input(module: Any, order: Tensor) -> None:
    weight = weight_parameter(module)
    assert weight is not None
    weight.copy_(weight.index_select(1, order).clone())


def _foldable(model: nn.Module, sample: Any) -> list[list[Record]]:
    """Sets of records through which the same channels run in the same order, all of them free to move."""
    records = list(trace(model, sample).records)
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    owner: dict[int, int] = {}
    for i, r in enumerate(records):
        for label in r.labels.unique().tolist():
            if label:
                j = owner.setdefault(label, i)
                parent[root(i)] = root(j)
    sets: dict[int, list[Record]] = {}
    for i, r in enumerate(records):
        sets.setdefault(root(i), []).append(r)
    return [found for found in sets.values() if _free(found)]


def _free(records: Sequence[Record]) -> bool:
    """Whether all see one and the same sequence of channels (each one repeated, after a flatten)."""
    roles = {r.role for r in records}
    if not {"in", "out"} <= roles or any(not r.labels.all() for r in records):
        return False
    sequence = next(r for r in records if r.role == "out").labels
    if len(sequence.unique()) != len(sequence):
        return False  # channels that stand or fall together, as in grouped convolutions
    for r in records:
        size = getattr(r.module, r.parameter).shape[r.dim]
        if len(r.labels) % len(sequence) or len(r.labels) != size:
            return False
        if not torch.equal(r.labels, sequence.repeat_interleave(len(r.labels) // len(sequence))):
            return False
        if mask_of(r.module, r.parameter) is not None:
            return False
    return True


def _reorder(r: Record, order: Tensor) -> None:
    value = getattr(r.module, r.parameter)
    times = value.shape[r.dim] // len(order)
    index = (order[:, None] * times + torch.arange(times, device=order.device)).flatten()
    value.copy_(value.index_select(r.dim, index.to(value.device)).clone())
