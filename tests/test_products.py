"""The three products of every format, on every backend, against float64 from the dense weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import ALL, FLOATS, FOUR, HALVES, QUANTISED, Case, param
from conftest import ON_CARD, Backend
from torch import Tensor

import sparsekern as sk
from sparsekern import testing
from sparsekern.layout import Layout
from sparsekern.ref import ACTIVATIONS
from sparsekern.testing import (
    assert_close,
    guarded,
    guarded_layout,
    poisoned,
    random_dense,
    reference_mm,
    reference_mm_t,
    reference_sddmm,
)

# (M, N, K): ones, primes, one more and one less than vector and tile widths, long and flat, wide and short.
SHAPES = (
    (1, 1, 1), (1, 1, 4), (2, 3, 5), (1, 17, 8), (5, 16, 12), (7, 64, 64), (33, 65, 127), (16, 128, 256),
    (3, 1, 300), (9, 300, 1), (64, 31, 33), (129, 96, 160), (31, 40, 2100), (18, 2100, 40), (260, 24, 48),
    (1, 260, 1030), (17, 66, 515),
)  # fmt: skip
EMPTY = ((0, 8, 8), (3, 0, 8), (3, 8, 0), (0, 0, 0), (0, 0, 8), (1, 0, 0), (0, 8, 0))


def products(
    backend: Backend, case: Case, dense: Tensor, layout: Layout, x: Tensor, dy: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Those of the three products that the backend runs: (name, what it computed, what is right)."""
    if backend.runs("mm", layout, x):
        yield "mm", backend.mm(layout, x), reference_mm(dense, x)
    if backend.runs("mm_t", layout, dy):
        yield "mm_t", backend.mm_t(layout, dy), reference_mm_t(dense, dy)
    if backend.runs("sddmm", layout, x):
        gradient = backend.sddmm(layout, dy, x)
        assert gradient.shape == layout.values.shape
        if gradient.dtype != torch.int8:
            layout.with_values(gradient.nan_to_num(nan=1.0)).check()  # zero where the layout pads
        right = reference_sddmm(dy, x)
        yield "sddmm", layout.with_values(gradient).unpack(), torch.where(stored(layout), right, 0.0)


def stored(layout: Layout) -> Tensor:
    """bool [N, K]: the positions that the layout stores, zeros among the values included."""
    return layout.with_values(torch.ones_like(layout.values)).unpack() != 0


@param(ALL)
@param(FLOATS, "dtype")
def test_shapes(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        for density in (0.5, 0.1) if m == 33 else (0.4,):
            dense = case.dense(n, k, dtype, density, seed=m)
            layout = case.pack(dense)
            x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
            with poisoned():
                for name, out, right in products(backend, case, dense, layout, x, dy):
                    try:
                        assert_close(out, right, dtype)
                    except AssertionError as error:
                        raise AssertionError(f"{name} M={m} N={n} K={k} density={density}: {error}") from None


@param((*FOUR, Case("bsr", (16, 16)), Case("bsr", (32, 32))))
@param(FLOATS, "dtype")
@pytest.mark.unemulated  # test_csr_cuda.py and its like have every M
def test_every_m(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Every number of tokens from 1 to 130. Rows of Y are independent, so one reference serves all."""
    most, n, k = 130, 67, 91
    dense = case.dense(n, k, dtype)
    layout = case.pack(dense)
    x, dy = random_dense(most, k, dtype=dtype, seed=1), random_dense(most, n, dtype=dtype, seed=2)
    y, dx = reference_mm(dense, x), reference_mm_t(dense, dy)
    mask = stored(layout)
    dw = torch.zeros(n, k, dtype=torch.float64)
    runs = {op: backend.runs(op, layout, t) for op, t in (("mm", x), ("mm_t", dy), ("sddmm", x))}
    for m in range(1, most + 1):
        dw = dw + torch.outer(dy[m - 1].double(), x[m - 1].double())
        with poisoned():
            if runs["mm"]:
                assert_close(backend.mm(layout, x[:m]), y[:m], dtype)
            if runs["mm_t"]:
                assert_close(backend.mm_t(layout, dy[:m]), dx[:m], dtype)
            if runs["sddmm"] and (m < 40 or m % 7 == 0):
                gradient = backend.sddmm(layout, dy[:m], x[:m])
                assert_close(layout.with_values(gradient).unpack(), torch.where(mask, dw, 0.0), dtype)


@param(FOUR)
@param(FLOATS, "dtype")
def test_empty(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    for m, n, k in EMPTY:
        dense = case.dense(n, k, dtype)
        layout = case.pack(dense).check()
        x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
        with poisoned():
            for name, out, right in products(backend, case, dense, layout, x, dy):
                assert out.shape == right.shape, f"{name} M={m} N={n} K={k}"
                assert_close(out, right, dtype)
        bias = random_dense(n, dtype=dtype, seed=3)
        if backend.runs("mm", layout, x):
            with poisoned():
                assert_close(backend.mm(layout, x, bias, "relu"), reference_mm(dense, x, bias, "relu"), dtype)


@param(FOUR)
@param(FLOATS, "dtype")
def test_nothing_stored(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """A weight without a nonzero gives act(bias), and zeros in both gradients' shapes."""
    n, k = 37, 53
    dense = torch.zeros(n, k, dtype=dtype)
    layout = case.pack(dense)
    for m in (1, 5, 64):
        x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
        bias = random_dense(n, dtype=dtype, seed=3)
        with poisoned():
            for _, out, right in products(backend, case, dense, layout, x, dy):
                assert_close(out, right, dtype)
            if backend.runs("mm", layout, x):
                assert_close(backend.mm(layout, x, bias, "silu"), reference_mm(dense, x, bias, "silu"), dtype)


@param((*FOUR, Case("bsr", (16, 16))))
@param(FLOATS, "dtype")
def test_rows_of_all_lengths(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Empty rows, full rows and a power law between them; empty columns, too."""
    n, k = 133, 260
    if case.format == "sp24":
        dense = testing.with_empty_rows(case.dense(n, k, dtype))
    else:
        dense = testing.with_empty_rows(testing.skewed_weight(n, k, dtype, 0.15))
    dense[:, 40:80] = 0
    if case.format != "sp24":
        dense[7] = random_dense(k, dtype=dtype, seed=9)
    layout = case.pack(dense)
    for m in (1, 2, 19, 70):
        x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
        bias = random_dense(n, dtype=dtype, seed=3)
        with poisoned():
            for _, out, right in products(backend, case, dense, layout, x, dy):
                assert_close(out, right, dtype)
            if backend.runs("mm", layout, x):
                assert_close(backend.mm(layout, x, bias), reference_mm(dense, x, bias), dtype)


@param(FOUR)
@param((torch.float32, torch.bfloat16), "dtype")
def test_wide(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """More columns (and, the other way round, rows) than 16 bits can count."""
    emulated = backend.name == "cuda" and not ON_CARD  # where this takes minutes
    if emulated and (case.format == "bitmap" or dtype == torch.float32):
        pytest.skip("on a GPU only")
    for n, k in ((3, 66_000), (66_000, 3))[: 1 if emulated else 2]:
        dense = case.dense(n, k, dtype, 0.05)
        layout = case.pack(dense)
        for m in (1,) if emulated else (1, 5):
            x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
            with poisoned():
                for name, out, right in products(backend, case, dense, layout, x, dy):
                    assert_close(out, right, dtype, tol=1e-5 if dtype == torch.float32 else None), name


def views(m: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same shape with every kind of strides that a user can make."""
    whole = random_dense(3 * m + 2, 2 * width + 6, dtype=dtype, seed=4)
    return {
        "column slice": whole[:m, 3 : 3 + width],
        "every other column": whole[:m, : 2 * width : 2],
        "every third row": whole[2 : 2 + 3 * m : 3, :width][:m],
        "transposed": random_dense(width, m, dtype=dtype, seed=5).t(),
        "one row repeated": random_dense(1, width, dtype=dtype, seed=6).expand(m, width),
        "one column repeated": random_dense(m, 1, dtype=dtype, seed=7).expand(m, width),
        "odd offset": whole.flatten()[1 : 1 + m * width].view(m, width),
    }


@param((*FOUR, Case("bsr", (16, 16))))
@param(FLOATS, "dtype")
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.interpreted
def test_strides(backend: Backend, case: Case, dtype: torch.dtype, m: int) -> None:
    n, k = 45, 75
    dense = case.dense(n, k, dtype)
    layout = case.pack(dense)
    straight_x, straight_dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
    for name, x in views(m, k, dtype).items():
        for which, out, right in products(backend, case, dense, layout, x, straight_dy):
            try:
                assert_close(out, right, dtype)
            except AssertionError as error:
                raise AssertionError(f"x {name}, {which}: {error}") from None
    for name, dy in views(m, n, dtype).items():
        for which, out, right in products(backend, case, dense, layout, straight_x, dy):
            try:
                assert_close(out, right, dtype)
            except AssertionError as error:
                raise AssertionError(f"dy {name}, {which}: {error}") from None


@param((*FOUR, Case("bsr", (16, 16))))
@param(FLOATS, "dtype")
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.interpreted
def test_epilogue(backend: Backend, case: Case, dtype: torch.dtype, activation: str) -> None:
    """Bias and activation, also where they saturate; a bias of float32 beside halves."""
    n, k = 71, 50
    dense = case.dense(n, k, dtype, 0.3)
    layout = case.pack(dense)
    for m in (1, 4, 37):
        for size in (1.0, 30.0):
            x = random_dense(m, k, dtype=dtype, seed=m) * size
            bias = random_dense(n, dtype=torch.float32, seed=3) * size
            if not backend.runs("mm", layout, x):
                return
            for b in (None, bias.to(dtype), bias):
                with poisoned():
                    out = backend.mm(layout, x, b, activation)
                assert_close(out, reference_mm(dense, x, b, activation), dtype)


@param((*FOUR, Case("bsr", (3, 5)), Case("bsr", (32, 32))))
@param(FLOATS, "dtype")
@pytest.mark.interpreted
def test_guard_bands(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Poison around and between the rows of every input and output: not read into a result, not written."""
    for m, n, k in ((1, 35, 77), (6, 35, 77), (37, 130, 93), (16, 64, 64)):
        dense = case.dense(n, k, dtype, 0.4)
        packed, check_layout = guarded_layout(case.pack(dense))
        x = guarded(random_dense(m, k, dtype=dtype, seed=1), gap=5)
        dy = guarded(random_dense(m, n, dtype=dtype, seed=2), gap=3)
        bias = guarded(random_dense(n, dtype=dtype, seed=3))
        with poisoned():
            for _, out, right in products(backend, case, dense, packed, x.tensor, dy.tensor):
                assert_close(out, right, dtype)
            if backend.runs("mm", packed, x.tensor):
                out = backend.mm(packed, x.tensor, bias.tensor, "relu")
                assert_close(out, reference_mm(dense, x.tensor, bias.tensor, "relu"), dtype)
        check_layout()
        for guard in (x, dy, bias):
            guard.check()


@param(FOUR)
@param(FLOATS, "dtype")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(backend: Backend, case: Case, dtype: torch.dtype, bad: float) -> None:
    """A NaN or an infinity spoils what a stored weight joins it to, and no other row or column.

    What an unstored zero makes of it (nothing, or NaN as dense arithmetic does) is left to the kernel.
    """
    n, k, row = 33, 40, 3
    dense = case.dense(n, k, dtype)
    column = int(dense[row].nonzero()[0])
    layout = case.pack(dense)
    mask = stored(layout)
    for m in (1, 5, 34):
        at = m // 2
        for where in ("weight", "x", "dy"):
            w = dense.clone()
            x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
            free_y, free_dx = torch.zeros(m, n, dtype=torch.bool), torch.zeros(m, k, dtype=torch.bool)
            if where == "weight":
                w[row, column] = bad
            elif where == "x":
                x[at, column] = bad
                free_y[at] = ~mask[:, column]
            else:
                dy[at, row] = bad
                free_dx[at] = ~mask[row]
            packed = layout.with_values(layout.sample(w))
            if backend.runs("mm", packed, x):
                terms = torch.where(mask, x.double()[:, None] * w.double(), 0.0)
                out = backend.mm(packed, x).masked_fill(free_y, 0.0)
                assert_close(out, terms.sum(2).masked_fill(free_y, 0.0), dtype)
            if backend.runs("mm_t", packed, dy):
                terms = torch.where(mask, dy.double()[:, :, None] * w.double(), 0.0)
                out = backend.mm_t(packed, dy).masked_fill(free_dx, 0.0)
                assert_close(out, terms.sum(1).masked_fill(free_dx, 0.0), dtype)
            if backend.runs("sddmm", packed, x):
                out = layout.with_values(backend.sddmm(packed, dy, x)).unpack()
                assert_close(out, torch.where(mask, reference_sddmm(dy, x), 0.0), dtype)


@param(FOUR)
@param(FLOATS, "dtype")
def test_activations_at_the_ends(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """NaN stays NaN through every activation; nothing between -6e4 and 6e4 becomes NaN or infinite."""
    nan, inf = float("nan"), float("inf")
    ends = [nan, -6e4, -1e3, -100, -88.5, -30, -10, -4, -0.1, -0.0, 0, 0.1, 10, 30, 88.5, 100, 6e4, inf]
    bias = torch.tensor(ends, dtype=dtype)
    layout = case.pack(torch.zeros(len(ends), 9, dtype=dtype))
    for m in (1, 2, 18):
        x = random_dense(m, 9, dtype=dtype, seed=1)
        if not backend.runs("mm", layout, x):
            return
        for name, function in ACTIVATIONS.items():
            right = function(bias.double())
            for out in backend.mm(layout, x, bias, name):
                # In the left tails only the distance to zero counts: 1 + erf(z / sqrt(2)) cancels there.
                allowed = testing.TOLERANCE[dtype] * right.abs() + 1e-6
                off = ((out.double() - right).abs() > allowed)[1:-1].nonzero()
                assert not len(off), f"{name}({ends[1 + int(off[0])]}) = {out[1 + int(off[0])]}"
                assert out[0].isnan(), f"{name}(NaN) = {out[0]}"
                if not name.startswith("gelu"):  # torch's own gelu(inf) is NaN
                    assert out[-1] == right[-1], f"{name}(inf) = {out[-1]}"


@param(QUANTISED)
@param((torch.int8, *FLOATS), "activations")
def test_int8(backend: Backend, case: Case, activations: torch.dtype) -> None:
    """int8 weights with a scale per row: float activations, or int8 ones with a float32 result."""
    for m, n, k in ((1, 1, 1), (1, 70, 133), (3, 33, 64), (16, 64, 128), (33, 65, 127), (70, 130, 515)):
        dense = case.dense(n, k, torch.int8, 0.4)
        scale = testing.random_scale(n)
        layout = case.pack(dense, scale).check()
        wide = dense.double() * scale.double()[:, None]
        x, dy = random_dense(m, k, dtype=activations, seed=1), random_dense(m, n, dtype=activations, seed=2)
        bias = random_dense(n, seed=3)
        result = torch.float32 if activations == torch.int8 else activations
        if backend.runs("mm", layout, x):
            with poisoned():
                assert_close(backend.mm(layout, x), reference_mm(wide, x), result)
                out = backend.mm(layout, x, bias, "gelu_tanh")
            assert_close(out, reference_mm(wide, x, bias, "gelu_tanh"), result)
        if activations != torch.int8 and backend.runs("mm_t", layout, dy):
            with poisoned():
                assert_close(backend.mm_t(layout, dy), reference_mm_t(wide, dy), result)


def test_int8_extremes(backend: Backend) -> None:
    """-128 and 127 in every place: no step on the way may saturate."""
    for case in (Case("sp24"), Case("bsr", (4, 4)), Case("bsr", (16, 16)), Case("bsr", (16, 64))):
        for w_value in (-128, 127):
            for x_value in (-128, 127):
                n, k, m = 33, 256, 18
                dense = torch.where(case.dense(n, k, density=0.5) != 0, w_value, 0).to(torch.int8)
                layout = case.pack(dense, torch.ones(n))
                x = torch.full((m, k), x_value, dtype=torch.int8)
                if backend.runs("mm", layout, x):
                    assert_close(backend.mm(layout, x), reference_mm(dense, x), torch.float32, tol=1e-7)


@param(ALL)
def test_float64(backend: Backend, case: Case) -> None:
    for m, n, k in ((1, 1, 1), (5, 33, 46), (17, 64, 128)):
        dense = case.dense(n, k, torch.float64)
        layout = case.pack(dense)
        x, dy = (
            random_dense(m, k, dtype=torch.float64, seed=1),
            random_dense(m, n, dtype=torch.float64, seed=2),
        )
        for _, out, right in products(backend, case, dense, layout, x, dy):
            assert_close(out, right, torch.float64)


@param(ALL)
@param(FLOATS, "dtype")
def test_large_sums_do_not_lose_bits(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Halves accumulate in float32; otherwise equal terms stop growing at 256 (bf16) or 2048 (f16) of them."""
    n, k, m = 16, 4096, 5
    dense = torch.where(case.dense(n, k) != 0, 0.0625, 0.0).to(dtype)
    layout = case.pack(dense)
    x, dy = torch.ones(m, k, dtype=dtype), torch.ones(m, n, dtype=dtype)
    for _, out, right in products(backend, case, dense, layout, x, dy):
        assert_close(out, right, dtype)


@param(ALL)
def test_one_layout_many_instruction_sets(case: Case) -> None:
    """What one kernel derives from a layout and keeps must not meet another instruction set."""
    from conftest import BACKENDS

    for dtype in FLOATS:
        dense = case.dense(70, 134, dtype)
        layout = case.pack(dense)
        compiled = [b for b in BACKENDS if b.device == "cpu" and not b.simulated]
        for backend in (*compiled, *reversed(compiled)):
            with testing.host_isa(backend.isa):
                for m in (1, 20):
                    x, dy = (
                        random_dense(m, 134, dtype=dtype, seed=1),
                        random_dense(m, 70, dtype=dtype, seed=2),
                    )
                    for _, out, right in products(backend, case, dense, layout, x, dy):
                        assert_close(out, right, dtype)


@param(ALL)
@param((torch.float32, torch.bfloat16), "dtype")
def test_values_changed_in_place(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """An optimizer steps the values: whatever a kernel packed from them before must not be used again."""
    dense = case.dense(66, 130, dtype)
    layout = case.pack(dense)
    for turn in range(3):
        for m in (1, 24):
            x, dy = random_dense(m, 130, dtype=dtype, seed=1), random_dense(m, 66, dtype=dtype, seed=2)
            for _, out, right in products(backend, case, dense * (-2.0) ** turn, layout, x, dy):
                assert_close(out, right, dtype)
        layout.values.mul_(-2.0)


@param(FOUR)
@param((*HALVES, torch.float32), "dtype")
def test_linear_and_matmul_shapes(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Leading dimensions of every kind, zero tokens, and matmul from both sides."""
    n, k = 23, 38
    dense = case.dense(n, k, dtype)
    w = sk.SparseTensor(case.pack(dense))
    bias = random_dense(n, dtype=dtype, seed=3)
    if not (backend.runs("mm", w.packed, bias[:1, None].expand(1, k)) and backend.runs("mm_t", w.packed, bias[None])):
        return
    for lead in ((), (1,), (5,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)):
        x = random_dense(*lead, k, dtype=dtype, seed=1)
        right = reference_mm(dense, x, bias, "relu")
        assert_close(sk.linear(x, w, bias, "relu", backend=backend.name), right, dtype)
        assert_close(sk.matmul(x, w.t(), backend=backend.name), reference_mm(dense, x), dtype)
        dy = random_dense(*lead, n, dtype=dtype, seed=2)
        assert_close(sk.matmul(dy, w, backend=backend.name), reference_mm_t(dense, dy), dtype)
        if lead:
            columns = x.transpose(-1, -2) if len(lead) > 1 else x.t()
            assert_close(sk.matmul(w, columns, backend=backend.name), dense.double() @ columns.double(), dtype)
            columns = dy.transpose(-1, -2)
            right = dense.double().t() @ columns.double()
            assert_close(sk.matmul(w.t(), columns, backend=backend.name), right, dtype)
        else:
            assert_close(sk.matmul(w, x, backend=backend.name), dense.double() @ x.double(), dtype)
            assert_close(sk.matmul(w.t(), dy, backend=backend.name), dense.double().t() @ dy.double(), dtype)


@param(FOUR)
def test_permuted_leading_dimensions(backend: Backend, case: Case) -> None:
    n, k = 23, 38
    dense = case.dense(n, k)
    layout = case.pack(dense)
    x = random_dense(3, k, 4, 2, seed=1).permute(2, 0, 3, 1)
    if backend.runs("mm", layout, x.reshape(-1, k)):
        assert_close(sk.linear(x, layout, backend=backend.name), reference_mm(dense, x), torch.float32)


def test_bad_calls() -> None:
    """Everything that does not fit is a ValueError or TypeError that says what was expected and what came."""
    w = sk.SparseTensor(Case("csr").pack(Case("csr").dense(6, 8)))
    x = random_dense(3, 8)
    for error, message, call in (
        (ValueError, r"\[\.\.\., K = 8\].*\(3, 6\)", lambda: sk.linear(x[:, :6], w)),
        (ValueError, r"N = 6", lambda: sk.matmul(x, w)),
        (ValueError, r"float64.*float32", lambda: sk.linear(x.double(), w)),
        (ValueError, r"bias must have shape \[N = 6\], got \(8,\)", lambda: sk.linear(x, w, torch.zeros(8))),
        (ValueError, r"bias must be a floating", lambda: sk.linear(x, w, torch.zeros(6, dtype=torch.int32))),
        (ValueError, r"one of none, relu.*'tanh'", lambda: sk.linear(x, w, activation="tanh")),
        (ValueError, r"is on meta", lambda: sk.linear(x.to("meta"), w)),
        (ValueError, r"bias is on meta", lambda: sk.linear(x, w, torch.zeros(6, device="meta"))),
        (ValueError, r"transposed", lambda: sk.linear(x, w.t())),
        (ValueError, r"strided.*spconv", lambda: sk.linear(x.to_sparse(), w)),
        (ValueError, r"x must have shape", lambda: sk.linear(torch.tensor(1.0), w)),
        (TypeError, r"x must be a dense torch.Tensor, got list", lambda: sk.linear([1.0], w)),
        (TypeError, r"w must be a SparseTensor.*got Tensor", lambda: sk.linear(x, torch.zeros(6, 8))),
        (TypeError, r"exactly one SparseTensor", lambda: sk.matmul(x, x)),
        (TypeError, r"exactly one SparseTensor", lambda: sk.matmul(w, w)),
        (NotImplementedError, r"no backend of this name", lambda: sk.linear(x, w, backend="quantum")),
        (NotImplementedError, r"no such backend on cpu", lambda: sk.linear(x, w, backend="cuda")),
    ):
        with pytest.raises(error, match=message):
            call()
