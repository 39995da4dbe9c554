"""csr on NVIDIA GPUs: every product in the emulator under every schedule, plans, and results that no split changes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from conftest import LAUNCHES, running_on_device
from torch import Tensor

from sparsekern import _rows_cuda
from sparsekern.csr import Csr, cuda, pack
from sparsekern.ref import ACTIVATIONS
from sparsekern.testing import TOLERANCE, poisoned, random_dense, random_weight, skewed_weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """What no kernel writes is NaN, and bands around every output are checked."""
    with poisoned():
        yield


@pytest.fixture(params=[2, 40], ids=["2 processors", "40 processors"])
def processors(request: pytest.FixtureRequest) -> Iterator[int]:
    """Few processors make long work items and the kernels of many rows, many cut the work along K."""
    with mock.patch.object(_rows_cuda, "multiprocessors", return_value=request.param):
        yield request.param


def weight(n: int, k: int, sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    w = random_weight("csr", n, k, dtype, 1 - sparsity, seed=n + k)
    w[n // 2 : n // 2 + 2] = 0  # empty rows
    return w


def view(m: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows that are longer than `columns` and do not begin at the allocation, with NaN around them."""
    wide = torch.full((m, columns + 8), float("nan"), dtype=dtype)
    wide[:, 3 : columns + 3] = random_dense(m, columns, dtype=dtype, seed=seed)
    return wide[:, 3 : columns + 3]


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    # The sum may cancel where there are few terms: measured against the root of their number.
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-2 * max(1, want.numel()) ** 0.5)
    assert error < TOLERANCE[got.dtype], error


def check_products(w: Tensor, m: int, bias: bool = True, activation: str = "none") -> None:
    layout, dense, dtype = pack(w), w.double(), w.dtype
    n, k = w.shape
    x, dy = view(m, k, dtype, 1), view(m, n, dtype, 2)
    b = random_dense(n, dtype=dtype, seed=3) if bias else None
    want = x.double() @ dense.t() + (b.double() if b is not None else 0)
    assert_near(cuda.mm(layout, x, b, activation), ACTIVATIONS[activation](want))
    assert_near(cuda.mm_t(layout, dy), dy.double() @ dense)
    assert_near(cuda.sddmm(layout, dy, x), (dy.double().t() @ x.double())[w != 0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 7, 70])
def test_products(emulated: ModuleType, processors: int, m: int, dtype: torch.dtype) -> None:
    check_products(weight(77, 601, 0.8, dtype), m, activation="silu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Two groups of 512 rows, sparse enough for the kernel of many rows."""
    check_products(weight(600, 530, 0.985, dtype), 5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 0), (0, 5), (1, 1500), (200, 9), (33, 513)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_shapes(emulated: ModuleType, shape: tuple[int, int], sparsity: float, m: int) -> None:
    check_products(weight(*shape, sparsity), m, bias=m != 5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", range(131))
def test_every_token_count(emulated_once: ModuleType, m: int, dtype: torch.dtype) -> None:
    check_products(weight(20, 90, 0.7, dtype), m)


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(emulated_once: ModuleType, activation: str, m: int) -> None:
    check_products(weight(35, 100, 0.6, torch.bfloat16), m, activation=activation)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 4, 9])
def test_a_scaled_residual(emulated_once: ModuleType, m: int, dtype: torch.dtype) -> None:
    w, residual = weight(35, 100, 0.6, dtype), view(m, 35, torch.float32, 4)
    x, words = view(m, 100, dtype, 1), {"out_dtype": torch.float32, "beta": -0.5}
    got = cuda.mm(pack(w), x, None, "relu", residual=residual, **words)
    assert_near(got, (x.double() @ w.double().t()).relu() - 0.5 * residual.double())


@pytest.mark.parametrize("m", [2, 40])
def test_skewed_rows(emulated: ModuleType, processors: int, m: int) -> None:
    """One full row among nearly empty ones, and rows whose lengths fall as a power law."""
    w = weight(70, 1600, 0.995)
    w[3] = random_dense(1600)
    check_products(w, m)
    check_products(skewed_weight(70, 1100, density=0.05), m)


def test_long_rows_are_split_among_subwarps(emulated: ModuleType) -> None:
    """A row of several parts of csr_mv, beside short ones; more columns than 16 bits count."""
    w = torch.zeros(5, 66000)
    w[1], w[3, ::7], w[4, -1] = random_dense(66000), 1.0, 2.0
    layout, x = pack(w), random_dense(3, 66000, seed=1)
    for near in (False, True):
        units = _rows_cuda._units(layout, near)
        assert units.splits.tolist() == [[0, 17], [17, 3]]
        assert sorted(units.units[:, 4].tolist()).count(0) == 17
        with mock.patch.object(_rows_cuda, "_DISTANCES", 0.0 if near else 1.0):
            for m in (1, 3):
                assert_near(cuda.mm(layout, x[:m], None, "none"), x[:m].double() @ w.double().t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 1.0])
def test_distances_of_columns(emulated: ModuleType, density: float, dtype: torch.dtype) -> None:
    """8 bits from column to column, whatever the density: where they do not do, a row has several parts."""
    w = weight(40, 2000, 1 - density, dtype)
    w[2], w[3, 5:], w[4, :-1] = 0, 0, 0
    w[5], w[6] = 0, 0
    w[5, ::255], w[6, ::256] = 1.0, 2.0
    layout, x = pack(w), view(4, 2000, dtype, 1)
    for kind in (0.0, 2.0):
        with mock.patch.object(_rows_cuda, "_DISTANCES", kind):
            for m in (1, 4):
                assert_near(cuda.mm(layout, x[:m], None, "none"), x[:m].double() @ w.double().t())


def test_parts_of_distances() -> None:
    """Every nonzero is in one part, no distance in a part exceeds 8 bits, empty rows have a part, too."""
    for density in (0.001, 0.01, 0.3):
        layout = pack(weight(50, 3000, 1 - density))
        rows = _rows_cuda._units(layout, True).units.tolist()
        distances, col = _rows_cuda._distances(layout.col).tolist(), layout.col.tolist()
        places = []
        for row, begin, end, column, *_ in rows:
            assert layout.crow[row] <= begin <= end <= layout.crow[row + 1]
            if begin < end:
                assert column == col[begin]
            for place in range(begin + 1, end):
                column += distances[place]
                assert column == col[place]
            places += range(begin, end)
        assert sorted(places) == list(range(len(col)))
        assert {row for row, *_ in rows} == set(range(50))


def test_infinities_meet_only_their_own_weights(emulated: ModuleType) -> None:
    """A vector of nonzeros reaches into the rows beside its own: what they would meet must not become 0 * inf."""
    w, x = torch.zeros(12, 64), random_dense(9, 64)
    for row in range(12):
        w[row, row * 5 : row * 5 + row % 4 + 1] = 1.0
    x[:, 30] = float("inf")
    for m in (1, 4, 9):
        got = cuda.mm(pack(w), x[:m], None, "none")
        assert torch.equal(torch.isfinite(got).all(0), w[:, 30] == 0)


def test_plans_are_made_once(emulated_once: ModuleType) -> None:
    """No plan is derived on a warm call, whatever the values are by then; new values are seen."""
    w = weight(40, 700, 0.8)
    layout, x, dy = pack(w), random_dense(9, 700), random_dense(9, 40, seed=1)
    for m in (1, 9):
        cuda.mm(layout, x[:m], None, "none")
    cuda.mm_t(layout, dy), cuda.sddmm(layout, dy, x)
    layout.values.mul_(2)
    forbidden = mock.Mock(side_effect=AssertionError("a plan was derived"))
    with mock.patch.multiple(torch.Tensor, argsort=forbidden, cpu=forbidden, item=forbidden, cumsum=forbidden):
        for m in (1, 9):
            assert_near(cuda.mm(layout, x[:m], None, "none"), x[:m].double() @ (2 * w).double().t())
        assert_near(cuda.mm_t(layout, dy), dy.double() @ (2 * w).double())
        assert_near(cuda.sddmm(layout, dy, x), (dy.t().double() @ x.double())[w != 0])


def test_work_lists(emulated_once: ModuleType) -> None:
    """Every slice of every group is in one item, the longest first, and parts of a group are numbered in order."""
    cost = torch.tensor([[0, 5000, 3000, 0], [0, 0, 0, 0], [90000, 4000, 5000, 30000]])
    items = _rows_cuda.cut(cost, 40000.0, cost.device)
    rows = items.items.tolist()
    assert [(r[0], r[1], r[2]) for r in sorted(rows)] == [(0, 1, 3), (1, 0, 0), (2, 0, 1), (2, 1, 2), (2, 2, 4)]
    assert [int(cost[r[0], r[1] : r[2]].sum()) for r in rows] == [90000, 35000, 8000, 4000, 0]
    assert [(r[3], r[4]) for r in sorted(rows)] == [(0, 1), (0, 1), (0, 3), (1, 3), (2, 3)]
    assert (items.slots, items.counters) == (3, 1)
    order = _rows_cuda._order(pack(weight(70, 40, 0.5)), 2, 8)
    assert sorted(order.flatten().tolist()) == [-1] * 58 + list(range(70))


def test_splits_do_not_change_with_the_schedule(device_module: ModuleType) -> None:
    """Bit for bit the same under every order of blocks: parts are added in their order."""
    w, x, dy = weight(70, 1600, 0.9), random_dense(40, 1600), random_dense(40, 70, seed=1)
    layout, results = pack(w), []
    with mock.patch.object(_rows_cuda, "multiprocessors", return_value=40):
        for schedule in LAUNCHES:
            with running_on_device(device_module, schedule):
                where = torch.get_default_device()
                on = layout.map(lambda t, where=where: t.to(where))
                results.append((cuda.mm(on, x.to(where), None, "none"), cuda.sddmm(on, dy.to(where), x.to(where))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_why_not(emulated_once: ModuleType) -> None:
    layout = pack(weight(4, 4, 0.5))
    assert cuda.why_not("mm", layout, torch.ones(1, 4)) is None
    assert "must agree" in str(cuda.why_not("mm", layout, torch.ones(1, 4).bfloat16()))
    double = Csr(values=layout.values.double(), crow=layout.crow, col=layout.col, shape=layout.shape)
    assert "float64" in str(cuda.why_not("mm", double, torch.ones(1, 4).double()))
