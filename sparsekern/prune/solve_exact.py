"""The exact optima: OBS, which removes one weight at a time, and the least-squares refit of a given mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .pattern import NM, Pattern, Unstructured
from .solve import Solved, check_local, group_along_k, grouped, inverse_factor, relative_output_error


def refit(weight: Tensor, hessian: Tensor, mask: Tensor, *, damp: float = 0.0) -> Solved:
    """The optimum for a given mask, row by row: W'_S = (H_SS)^-1 (H W)_S on the kept columns S, zero elsewhere.

    The same minimum that OBS reaches by its last removal. W [N, K], bool mask [N, K]; |S|^3 / 3 operations a row, in
    float64. Raises ValueError where H_SS is singular (raise damp, a share of H's mean diagonal).
    """
    w, h = grouped(weight.detach().double(), hessian.double())
    m = grouped(mask, hessian)[0]
    rows = [_refit_rows(*part, damp) for part in zip(w, h, m, strict=True)]
    made = torch.cat(rows)
    return Solved(made.to(weight.dtype), mask, relative_output_error(made, weight, hessian), damp)


def _refit_rows(w: Tensor, h: Tensor, mask: Tensor, damp: float) -> Tensor:
    h = _damped(h, damp)
    out = torch.zeros_like(w)
    most = max(1, int(mask.sum(1).max())) if mask.numel() else 1
    for rows in torch.arange(len(w), device=w.device).split(max(1, (1 << 25) // most**2)):
        kept, width = mask[rows], max(1, int(mask[rows].sum(1).max()))
        # The kept columns of every row first, padded with others to one width; those count as the identity.
        columns = kept.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        real = kept.gather(1, columns)
        system = h[columns[:, :, None], columns[:, None, :]]
        system = torch.where(real[:, :, None] & real[:, None, :], system, 0) + torch.diag_embed((~real).to(h.dtype))
        lower, info = torch.linalg.cholesky_ex(system)
        if bool((info != 0).any()):
            raise ValueError("the Hessian of the kept columns is singular: use more calibration data, or raise damp")
        target = (w[rows] @ h).gather(1, columns) * real
        out[rows] = out[rows].scatter(1, columns, torch.cholesky_solve(target[..., None], lower)[..., 0] * real)
    return out


def obs(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    sparsity: float | None = None,
    *,
    within: Tensor | None = None,
    damp: float = 0.01,
    max_columns: int = 1024,
) -> Solved:
    """One weight at a time, the rest of its row updated exactly. Optimal brain surgeon, Hassibi and Stork 1993.

    q = argmin w_q^2 / (2 [H^-1]_qq), dw = -(w_q / [H^-1]_qq) H^-1 e_q, then q leaves H^-1 by one step of Gaussian
    elimination (row-wise form: Frantar and Alistarh, OBC, 2208.11580). N:M along K takes its weights from groups that
    still hold too many; "layer" shares one count between rows by the losses, "row" gives each row the same.

    For small layers: a row takes K^3 operations. Raises ValueError for K above max_columns and for other patterns (a
    mask from elsewhere: use `refit`, which is where OBS would end).
    """
    w, h = grouped(weight.detach().double(), hessian.double())
    if h.shape[-1] > max_columns:
        raise ValueError(f"obs is for small layers: K = {h.shape[-1]} > max_columns = {max_columns}; use sparsegpt")
    if group_along_k(pattern) is None and not isinstance(pattern, Unstructured):
        raise ValueError(f"obs removes single weights: N:M along K or Unstructured, not {pattern!r}")
    check_local(pattern)
    bounds = torch.ones_like(w, dtype=torch.bool) if within is None else grouped(within, hessian)[0]
    parts = [_obs_group(*part, pattern, sparsity, damp) for part in zip(w, h, bounds, strict=True)]
    made, mask = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return Solved(made.to(weight.dtype), mask, relative_output_error(made, weight, hessian), damp)


def _obs_group(
    w: Tensor, h: Tensor, within: Tensor, pattern: Pattern, sparsity: float | None, damp: float
) -> tuple[Tensor, Tensor]:
    n, k = w.shape
    upper, _ = inverse_factor(h, damp)
    inverse = upper.t() @ upper
    chunk = max(1, (1 << 25) // k**2)
    pieces = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]

    def removed(rows: slice, counts: Tensor, allowed: Callable[[Tensor], Tensor] | None = None) -> _Removal:
        return _Removal(w[rows], inverse, within[rows]).run(counts, allowed)

    if isinstance(pattern, NM):
        groups = torch.arange(k, device=w.device) // pattern.group
        allowed = _crowded(groups, pattern.keep)
        sizes = groups.bincount()
        counts = torch.full((n,), int((sizes - pattern.keep).clamp_min(0).sum()), device=w.device)
        done = [removed(p, counts[p], allowed) for p in pieces]
    else:
        assert isinstance(pattern, Unstructured)
        if sparsity is None:
            raise ValueError("obs needs a sparsity for an unstructured pattern")
        if pattern.per == "row":
            counts = torch.full((n,), k - round((1 - sparsity) * k), device=w.device)
        else:
            losses = torch.cat([removed(p, torch.full((n,), k, device=w.device)[p]).losses for p in pieces])
            counts = _shared_count(losses, n * k - round((1 - sparsity) * n * k))
        done = [removed(p, counts[p]) for p in pieces]
    return torch.cat([d.w for d in done]), torch.cat([d.kept for d in done])


def _crowded(groups: Tensor, keep: int) -> Callable[[Tensor], Tensor]:
    """From what is kept [n, K]: the columns whose group still holds more than `keep`."""

    def allowed(kept: Tensor) -> Tensor:
        held = torch.zeros(kept.shape[0], int(groups[-1]) + 1, dtype=torch.long, device=kept.device)
        held.index_add_(1, groups, kept.long())
        return held[:, groups] > keep

    return allowed


def _shared_count(losses: Tensor, total: int) -> Tensor:
    """How many each row loses when, `total` times, the row whose next weight costs least goes on."""
    n, k = losses.shape
    # A row's costs in the order of removal: its next one counts at least as much as those before it had to.
    worst = losses.cummax(1).values.reshape(-1)
    first = worst.argsort(stable=True)[:total]
    return (first // k).bincount(minlength=n)


class _Removal:
    """Rows that lose one weight a step; each has its own inverse Hessian, which shrinks with it."""

    def __init__(self, w: Tensor, inverse: Tensor, within: Tensor) -> None:
        self.w = w.clone()
        self.inverse = inverse.expand(len(w), -1, -1).clone()
        self.kept = torch.ones_like(within)
        self.losses = torch.full_like(w, math.inf)
        self.rows = torch.arange(len(w), device=w.device)
        gone = (~within).sum(1)
        for step in range(int(gone.max()) if len(gone) else 0):  # what an earlier mask took, in any order
            self._remove((~within & self.kept).int().argmax(1), step < gone, step)

    def run(self, counts: Tensor, allowed: Callable[[Tensor], Tensor] | None) -> _Removal:
        for _ in range(int(counts.max()) if len(counts) else 0):
            step = (~self.kept).sum(1)
            diagonal = self.inverse.diagonal(dim1=1, dim2=2)
            cost = self.w.square() / (2 * diagonal)
            free = self.kept if allowed is None else self.kept & allowed(self.kept)
            cost = torch.where(free, cost, math.inf)
            self._remove(cost.argmin(1), (step < counts) & free.any(1), step)
        return self

    def _remove(self, q: Tensor, active: Tensor, step: Tensor | int) -> None:
        r = self.rows[active]
        q = q[active]
        if not len(r):
            return
        pivot = self.inverse[r, q, q]
        column = self.inverse[r, :, q]  # [rows, K]
        ratio = self.w[r, q] / pivot
        place = step[active] if isinstance(step, Tensor) else torch.full_like(q, step)
        self.losses[r, place] = self.w[r, q].square() / (2 * pivot)
        self.w[r] -= ratio[:, None] * column
        if len(r) == len(self.rows):
            self.inverse.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1)
        else:
            self.inverse[r] -= (column / pivot[:, None])[:, :, None] * column[:, None, :]
        self.kept[r, q] = False
        self.w *= self.kept
        self.inverse[r, q, q] = 1.0  # no zero to divide by; a removed column is never chosen again


def _damped(hessian: Tensor, damp: float) -> Tensor:
    h = hessian.clone()
    h.diagonal()[h.diagonal() == 0] = 1
    h.diagonal().add_(damp * h.diagonal().mean())
    return h
