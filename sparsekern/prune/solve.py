"""Prune a layer and update the weights that stay, so that its output changes least: SparseGPT.

The solvers (this one and the exact ones, `solve_exact`) work on one matrix W[N, K] and the Hessian H = (2 / T) X^T X of
its inputs X[T, K], and minimise tr((W' - W) H (W' - W)^T), the squared error of the layer's output on those inputs. H
is [K, K], or [G, K, K] for the rows of G groups (grouped convolutions). `solve_model` runs them over a model.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .pattern import NM, Block, Pattern, Unstructured
from .quantise import RowQuantiser


@dataclass(frozen=True)
class Solved:
    """W' [N, K], the mask of what stays, and the relative output error tr(D H D^T) / tr(W H W^T), D = W' - W.

    `damp` is the dampening that was used; `scale` [N] is there where the weights were quantised as well.
    """

    weight: Tensor
    mask: Tensor
    error: float
    damp: float
    scale: Tensor | None = None


def output_error(change: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D [N, K] and H [K, K] or [G, K, K]: the squared error of the output, summed over its features."""
    d, h = grouped(change.detach().double(), hessian.double())
    return float(((d @ h) * d).sum())


def relative_output_error(weight: Tensor, original: Tensor, hessian: Tensor) -> float:
    """output_error of the change over that of taking every weight away; 0 for a layer without output."""
    whole = output_error(original, hessian)
    return output_error(weight.double() - original.double(), hessian) / whole if whole > 0 else 0.0


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern | None,
    sparsity: float | None = None,
    *,
    mask: Tensor | None = None,
    within: Tensor | None = None,
    damp: float = 0.1,
    block: int = 128,
    quantiser: RowQuantiser | None = None,
) -> Solved:
    """Columns left to right: those that go are paid for by the columns to the right. SparseGPT, 2301.00774.

    With U the upper Cholesky factor of (H + damp mean(diag H) I)^-1, column j loses e = (w_j - w'_j) / U_jj and every
    later column k gains -e U_jk; later blocks of `block` columns get theirs at the end of a block (lazy). What goes is
    chosen from w_j^2 / U_jj^2 by the pattern: N:M group by group along K, others block by block, so that a block sees
    what the ones before it did. Or a mask says what stays, then only the update is computed. `within` [N, K] bool: what
    is not in it is gone already. A pattern that spans all of K (whole rows) is chosen once, before the first update.

    quantiser: the kept weights are then rounded in a second sweep under the mask of the first, which pays for what goes
    and for the rounding together (GPTQ, 2210.17323); the scale of a row is that of its solution in the first.

    Raises ValueError for a pattern over several layers without a mask.
    """
    if (pattern is None) == (mask is None):
        raise ValueError("sparsegpt needs a pattern or a mask, not both")
    w, h = grouped(weight.detach(), hessian)
    masks = [None] * len(w) if mask is None else list(grouped(mask, hessian)[0])
    bounds = [None] * len(w) if within is None else list(grouped(within, hessian)[0])
    parts = []
    for part, own, m, b in zip(w, h, masks, bounds, strict=True):
        solved = _Sweep(part, own, pattern, sparsity, m, b, damp, block).run()
        if quantiser is not None:
            solved = _Sweep(part, own, None, None, solved.mask, None, damp, block).run(quantiser, solved.weight)
        parts.append(solved)
    made = torch.cat([p.weight for p in parts])
    return Solved(
        weight=made.to(weight.dtype),
        mask=torch.cat([p.mask for p in parts]),
        error=relative_output_error(made, weight, hessian),
        damp=max(p.damp for p in parts),
        scale=None if quantiser is None else torch.cat([s for p in parts if (s := p.scale) is not None]),
    )


class _Sweep:
    """SparseGPT on the rows of one Hessian. Everything is held transposed, [K, N]: a column is then contiguous."""

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        pattern: Pattern | None,
        sparsity: float | None,
        mask: Tensor | None,
        within: Tensor | None,
        damp: float,
        block: int,
    ) -> None:
        w = weight.t().clone(memory_format=torch.contiguous_format)
        self.w = w if w.dtype == torch.float64 else w.float()
        h = hessian.double()
        dead = h.diagonal() == 0  # no input ever: nothing is lost
        self.w[dead] = 0
        if within is not None:
            self.w *= within.t()
        self.upper, self.damp = inverse_factor(h, damp)
        self.upper = self.upper.to(self.w)
        self.pattern, self.sparsity, self.within = pattern, sparsity, within
        self.kept = torch.zeros_like(self.w, dtype=torch.bool)
        self.chosen = 0  # kept so far, to hit the sparsity exactly in spite of rounding block by block
        self.width, self.block = self._widths(block)
        if mask is not None:
            self.kept = mask.t().contiguous()
            self.pattern = None
        elif not isinstance(pattern, (NM, Unstructured, Block)):
            assert pattern is not None
            self.kept = pattern.mask(self._scores(0, self.w.shape[0], self.w).t(), sparsity).t().contiguous()
            self.pattern = None
        if within is not None:
            self.kept &= within.t()

    def _widths(self, block: int) -> tuple[int, int]:
        """How many columns a mask is chosen for at a time, and how many make a lazy block."""
        check_local(self.pattern)
        group = group_along_k(self.pattern)
        unit = group or (self.pattern.block[1] if isinstance(self.pattern, Block) else 1)
        block = math.ceil(block / unit) * unit
        return group or block, block

    def _scores(self, start: int, stop: int, w: Tensor) -> Tensor:
        return w.square() / self.upper.diagonal()[start:stop, None].square()

    def _choose(self, start: int, stop: int, w: Tensor) -> None:
        """The mask of columns start to stop, from their weights as they are now."""
        assert self.pattern is not None
        share = self.sparsity
        scores = self._scores(start, stop, w)
        if share is not None and not isinstance(self.pattern, NM):
            target = round((1 - share) * stop * w.shape[1])
            share = min(1.0, max(0.0, 1 - (target - self.chosen) / w.numel()))
        kept = self.pattern.mask(scores.t(), share).t()
        self.chosen += int(kept.sum())
        self.kept[start:stop] = kept if self.within is None else kept & self.within.t()[start:stop]

    def run(self, quantiser: RowQuantiser | None = None, like: Tensor | None = None) -> Solved:
        """The sweep; with a quantiser every column is rounded, with the scales of the weights `like` [N, K]."""
        k = self.w.shape[0]
        scale = None if quantiser is None or like is None else quantiser.scale(like)
        out = torch.empty_like(self.w)
        for start in range(0, k, self.block):
            stop = min(start + self.block, k)
            panel, upper = self.w[start:stop], self.upper[start:stop, start:stop]
            errors = torch.empty_like(panel)
            for i in range(stop - start):
                if self.pattern is not None and i % self.width == 0:
                    end = min(i + self.width, stop - start)
                    self._choose(start + i, start + end, panel[i:end])
                column = panel[i]
                rounded = torch.where(self.kept[start + i], column, 0)
                if quantiser is not None:
                    rounded = quantiser.round(rounded, scale)
                out[start + i] = rounded
                torch.div(column - rounded, upper[i, i], out=errors[i])
                panel[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
            self.w[stop:].addmm_(self.upper[start:stop, stop:].t(), errors, alpha=-1)
        return Solved(out.t(), self.kept.t(), 0.0, self.damp, scale)


def check_local(pattern: Pattern | None) -> None:
    """Raises ValueError for a pattern that compares across layers."""
    if getattr(pattern, "per", None) == "global":
        raise ValueError("a solver prunes layer by layer: give a sparsity for each layer, or masks, not 'global'")


def group_along_k(pattern: Pattern | None) -> int | None:
    """M of an N:M pattern whose groups lie along K; None for any other."""
    return pattern.group if isinstance(pattern, NM) and pattern.axis in (1, "in") else None


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper U with U^T U = (H + damp mean(diag H) I)^-1, in float64, and the damp that was used.

    Inputs that are always zero get a diagonal of 1. Where the damped H is not positive definite, damp grows tenfold
    (with a warning), at most to 10.
    """
    if not damp >= 0:
        raise ValueError(f"damp is a share of the mean diagonal, at least 0; got {damp}")
    h = hessian.double().clone()
    h.diagonal()[h.diagonal() == 0] = 1
    mean, used = h.diagonal().mean(), damp
    while True:
        damped = h.clone()
        damped.diagonal().add_(used * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return upper, used
        if used >= 10:
            raise ValueError("the Hessian is not positive definite even with damp=10: does the data hold NaN?")
        used = max(1e-6, 10 * used)
        warnings.warn(f"the Hessian is singular with damp={damp:g}; using {used:g}", stacklevel=3)


def grouped(rows: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """[G, N / G, K] and [G, K, K]. Raises ValueError where they do not belong together."""
    h = hessian if hessian.dim() == 3 else hessian[None]
    n, k = rows.shape
    if h.shape[1:] != (k, k) or n % len(h):
        raise ValueError(f"a weight [{n}, {k}] needs a Hessian [{k}, {k}], got {tuple(hessian.shape)}")
    return rows.unflatten(0, (len(h), -1)), h
