"""Convolution of csr and bitmap on NVIDIA GPUs: the direct kernel under every schedule, the dense road, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import LAUNCHES, running_on_device
from torch import Tensor
from torch.nn import functional

import sparsekern as sk
from sparsekern import tune
from sparsekern.conv import Geometry, library, matrix_of, padding_of, rows_cuda, weight_of
from sparsekern.conv.geometry import pair
from sparsekern.formats import FORMATS
from sparsekern.functional import conv2d
from sparsekern.nn import SparseConv2d
from sparsekern.testing import (
    TOLERANCE,
    assert_close,
    guarded,
    guarded_layout,
    poisoned,
    random_dense,
    random_weight,
)

LAST = torch.channels_last
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """The dense road is cuDNN's: without TF32 it is as exact as the tests want it."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def direct() -> Iterator[None]:
    """The direct kernel, whatever is faster, and no other; outputs are poisoned, between guard bands."""
    dense = mock.Mock(side_effect=AssertionError("the weight was written out densely"))
    with mock.patch.multiple(rows_cuda, worth_it=lambda *_: True, _weight=dense), poisoned():
        yield


@pytest.fixture
def dense_road() -> Iterator[None]:
    with mock.patch.object(rows_cuda, "worth_it", return_value=False):
        yield


def pruned(*shape: int, dtype: torch.dtype = torch.float32, density: float = 0.3) -> Tensor:
    """A weight [O, C, kh, kw]; an output channel of it and an input channel are empty."""
    o, c, kh, kw = shape
    w = random_weight("csr", o, c * kh * kw, dtype, density, seed=sum(shape)).view(shape).clone()
    w[o // 2], w[:, c // 3] = 0, 0
    return w


def images(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 5) -> Tensor:
    x = random_dense(*shape, dtype=dtype, seed=seed)
    return x.to(memory_format=LAST) if last else x


def check(w: Tensor, x: Tensor, format: str = "csr", order: str = "crs", activation: str = "none", **how: Any) -> None:
    """Forward and all gradients of a convolution against torch's dense one in float64."""
    dtype, kernel, o = x.dtype, (w.shape[2], w.shape[3]), w.shape[0]
    packed = FORMATS[format].pack(matrix_of(w, order))
    b = random_dense(o, dtype=dtype, seed=9)
    x64, w64, b64 = (t.double().requires_grad_() for t in (x, w, b))
    want = functional.conv2d(x64, w64, b64, **how)
    call = {"backend": "cuda", "kernel_size": kernel, "order": order, **how}
    with torch.no_grad():
        y = conv2d(x, packed, b, activation=activation, **call)
    assert_close(y, sk.ref.ACTIVATIONS[activation](want), dtype)
    if x.is_contiguous(memory_format=LAST) and not x.is_contiguous():
        assert y.is_contiguous(memory_format=LAST)
    else:
        assert y.is_contiguous()
    dy = random_dense(*want.shape, dtype=dtype, seed=7)
    dy = dy.to(memory_format=LAST) if x.is_contiguous(memory_format=LAST) else dy
    grads = torch.autograd.grad(want, (x64, w64, b64), dy.double())
    values, leaf, bias = (t.detach().clone().requires_grad_() for t in (packed.values, x, b))
    conv2d(leaf, packed.with_values(values), bias, **call).backward(dy)
    loose = 4 * TOLERANCE[dtype]
    assert_close(leaf.grad, grads[0], dtype, tol=loose)
    assert_close(values.grad, packed.sample(matrix_of(grads[1], order)), dtype, tol=loose)
    assert_close(bias.grad, grads[2], dtype, tol=loose)


GEOMETRIES = [
    # kernel, channels in, out, groups, stride, padding, dilation, height, width
    ((1, 1), 16, 24, 1, 1, 0, 1, 14, 16),
    ((1, 1), 7, 9, 1, 2, 0, 1, 13, 9),
    ((1, 1), 6, 8, 2, 1, 1, 1, 5, 5),
    ((3, 3), 16, 24, 1, 1, 1, 1, 14, 14),
    ((3, 3), 5, 33, 1, 1, 0, 1, 8, 31),
    ((3, 3), 8, 12, 4, 1, 1, 1, 9, 17),
    ((3, 3), 8, 8, 1, 2, 1, 1, 15, 15),
    ((3, 3), 8, 8, 1, 1, 2, 2, 12, 12),
    ((3, 3), 4, 4, 1, 1, (9, 8), (9, 8), 7, 6),
    ((3, 3), 8, 8, 1, (2, 3), (3, 0), (2, 1), 17, 19),
    ((5, 5), 4, 4, 2, 2, 4, 1, 7, 6),
    ((1, 3), 8, 8, 1, 1, (0, 1), 1, 6, 40),
    ((3, 1), 8, 8, 1, (1, 2), (1, 0), 1, 40, 6),
    ((7, 7), 3, 16, 1, 2, 3, 1, 31, 33),
    ((4, 4), 3, 16, 1, 4, 0, 1, 16, 20),
    ((2, 2), 4, 4, 1, 3, 0, 1, 10, 11),
    ((3, 3), 4, 8, 1, 1, 1, 1, 1, 1),
    ((3, 3), 2, 4, 1, 1, 5, 1, 3, 2),
    ((3, 3), 3, 4, 1, 1, 1, 1, 4, 300),
    ((1, 1), 2, 3, 1, 1, 0, 1, 1, 1),
]


def of_case(case: tuple, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    kernel, c, o, groups, stride, padding, dilation, h, w = case
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return pruned(o, c // groups, *kernel, dtype=dtype), images(3, c, h, w, dtype=dtype, last=last), how


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda c: "k{}x{}c{}o{}g{}s{}p{}d{}i{}x{}".format(*c[0], *c[1:]))
def test_geometries(emulated_once: ModuleType, direct: None, case: tuple, dtype: torch.dtype, last: bool) -> None:
    w, x, how = of_case(case, dtype, last)
    check(w, x, order="rsc" if last else "crs", **how)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("processors", [1, 40])
def test_schedules(emulated: ModuleType, direct: None, dtype: torch.dtype, processors: int) -> None:
    """Many rows to a block, and blocks cut along their channels; slices of few channels of wide images."""
    with mock.patch.object(rows_cuda, "multiprocessors", return_value=processors):
        check(pruned(140, 40, 3, 3, dtype=dtype, density=0.1), images(1, 40, 9, 30, dtype=dtype), padding=1)
        check(pruned(12, 11, 3, 3, dtype=dtype), images(1, 11, 5, 400, dtype=dtype, last=True), "csr", "rsc", stride=2)


@pytest.mark.parametrize("activation", list(sk.ref.ACTIVATIONS))
@pytest.mark.parametrize("format", ["csr", "bitmap"])
@pytest.mark.parametrize("order", ["crs", "rsc"])
def test_formats_orders_activations(
    emulated_once: ModuleType, direct: None, format: str, order: str, activation: str
) -> None:
    check(pruned(10, 6, 3, 3), images(2, 6, 7, 8, last=order == "rsc"), format, order, activation, padding=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", GEOMETRIES[4:12:2], ids=str)
def test_dense_road(emulated_once: ModuleType, dense_road: None, case: tuple, last: bool, dtype: torch.dtype) -> None:
    w, x, how = of_case(case, dtype, last)
    check(w, x, order="rsc" if last else "crs", **how)
    check(w, x, "bitmap", **how)


@pytest.mark.parametrize("density", [0.0, 0.001, 1.0])
def test_densities(emulated: ModuleType, direct: None, density: float) -> None:
    check(pruned(20, 12, 3, 3, density=density), images(2, 12, 6, 6), padding=1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uneven_padding(emulated_once: ModuleType, dtype: torch.dtype) -> None:
    """padding="same" of an even kernel: one zero more below and to the right, on both roads."""
    w, x = pruned(5, 4, 2, 4, dtype=dtype), images(2, 4, 6, 9, dtype=dtype)
    for answer in (True, False):
        with mock.patch.object(rows_cuda, "worth_it", return_value=answer), poisoned():
            check(w, x, padding="same")


def test_planes_in_place(emulated: ModuleType, direct: None) -> None:
    """A 1x1 convolution of images in torch's order reads them where they are; small or odd ones are copied."""
    for dtype, height, copied in (
        (torch.float32, 16, False),
        (torch.bfloat16, 16, False),
        (torch.float32, 3, True),
        (torch.float16, 17, True),
    ):
        w, x = pruned(20, 6, 1, 1, dtype=dtype), images(3, 6, height, 15, dtype=dtype)
        tiling = rows_cuda._tiling(x, rows_cuda._forward_grid(Geometry(1, 1), height, 15, 4 // x.element_size()))
        assert tiling.in_place is not copied
        check(w, x)


def test_reads_and_writes_nothing_outside(emulated_once: ModuleType, direct: None) -> None:
    """X, W and the bias between bands of NaN, at addresses that only their own size divides."""
    for dtype in FLOATS:
        for kernel, size in ((1, (12, 16)), (3, (11, 13))):
            w = pruned(10, 6, kernel, kernel, dtype=dtype)
            layout, check_layout = guarded_layout(sk.to_csr(w.flatten(1)).packed)
            x, b = guarded(images(2, 6, *size, dtype=dtype)), guarded(random_dense(10, dtype=dtype))
            y = conv2d(x.tensor, layout, b.tensor, padding=kernel // 2, kernel_size=kernel, backend="cuda")
            want = functional.conv2d(x.tensor.double(), w.double(), b.tensor.double(), padding=kernel // 2)
            assert_close(y, want, dtype)
            x.check(), b.check(), check_layout()


def test_infinities_meet_only_their_own_weights(emulated: ModuleType, direct: None) -> None:
    """Neither padding entries of vectors nor positions between lines bring an infinity where it does not belong."""
    w, x = torch.zeros(12, 3, 3, 3), images(2, 3, 6, 6)
    for row in range(12):
        w[row, row % 3].view(-1)[row % 9] = 1.0
    x[0, 1, 2, 3] = float("inf")
    for dtype in FLOATS:
        got = conv2d(x.to(dtype), sk.to_csr(w.flatten(1).to(dtype)), kernel_size=3, padding=1, backend="cuda")
        meets = functional.conv2d(torch.isinf(x).float(), w, padding=1) > 0
        assert torch.equal(torch.isfinite(got), ~meets)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 3, 3)], ids=str)
def test_no_images(emulated_once: ModuleType, direct: None, shape: tuple[int, ...]) -> None:
    w, x = pruned(6, 4, 3, 3), images(*shape)
    check(w, x)


def test_same_bits_under_every_schedule(device_module: ModuleType) -> None:
    """Parts of a sum are added in their order."""
    results = []
    for schedule in LAUNCHES:
        with (
            running_on_device(device_module, schedule),
            mock.patch.object(rows_cuda, "worth_it", return_value=True),
            mock.patch.object(rows_cuda, "multiprocessors", return_value=60),
        ):
            w = sk.to_csr(pruned(20, 70, 3, 3).flatten(1))
            results.append(conv2d(images(1, 70, 8, 30), w, kernel_size=3, padding=1, backend="cuda").cpu())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_plans_are_made_once(emulated_once: ModuleType, direct: None) -> None:
    """Nothing is derived on a warm call; new values are seen."""
    w, x = pruned(10, 6, 3, 3), images(2, 6, 7, 8)
    layout, dy = sk.to_csr(matrix_of(w, "rsc")).packed, images(2, 10, 7, 8)
    g = Geometry(3, 3, top=1, bottom=1, left=1, right=1, order=1)

    def call() -> tuple[Tensor, ...]:
        y = rows_cuda.conv2d(layout, x, None, g, "none")
        return y, rows_cuda.conv2d_input(layout, dy, g, 7, 8), rows_cuda.conv2d_weight(layout, dy, x, g)

    first = call()
    layout.values.mul_(2)
    forbidden = mock.Mock(side_effect=AssertionError("a plan was derived"))
    with mock.patch.multiple(torch.Tensor, argsort=forbidden, cpu=forbidden, item=forbidden, cumsum=forbidden):
        again = call()
    assert_close(again[0], 2 * first[0].double())
    assert_close(again[1], 2 * first[1].double())
    assert_close(again[2], first[2].double())


@pytest.mark.parametrize("per", [1, 2])
def test_every_grid_fits_together(per: int) -> None:
    """Planes as plain indexing: every tap of every output finds its pixel or a zero, for X and for dX."""
    for kernel, *_, stride, padding, dilation, height, width in GEOMETRIES:
        steps, dilations = pair(stride, "", 1), pair(dilation, "", 1)
        g = Geometry(*kernel, *steps, *dilations, *padding_of(padding, kernel, steps, dilations))
        out = g.out_size(height, width)
        for grid, size in (
            (rows_cuda._forward_grid(g, height, width, per), (height, width)),
            (rows_cuda._input_grid(g, height, width, *out, per), out),
        ):
            assert grid.lines >= grid.size[0]
            assert grid.pitch >= grid.size[1]
            assert all(first % 4 == words % 4 == base % 4 == 0 for _, first, words, base in grid.pieces)
            tile = 256 // per
            for word in grid.taps:
                piece = next(p for p in grid.pieces if p[3] <= word < p[3] + p[2])
                assert word + tile <= piece[3] + piece[2]
            assert len(grid.taps) == g.taps
            assert size[0] > 0
            assert min(window[1] - window[0] for window in grid.windows) >= 0


def test_worth_it() -> None:
    """At 80 % sparsity against fp32 units, never at half of the weights; against tensor cores where they are slow."""
    for arch in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        assert rows_cuda.worth_it(torch.float32, 0.2, arch, False)
        assert not rows_cuda.worth_it(torch.float32, 0.6, arch, False)
        for dtype in FLOATS:
            assert rows_cuda.worth_it(dtype, 0.0, arch, True)
            assert not rows_cuda.worth_it(dtype, 0.5, arch, True)
    assert rows_cuda.worth_it(torch.bfloat16, 0.03, 90, True)
    assert not rows_cuda.worth_it(torch.bfloat16, 0.1, 90, True)
    assert rows_cuda.worth_it(torch.bfloat16, 0.2, 89, True)


def test_why_not(emulated_once: ModuleType) -> None:
    w, x = sk.to_csr(pruned(8, 4, 3, 3).flatten(1)).packed, images(1, 4, 5, 5)
    g = Geometry(3, 3)
    assert library.why_not("cuda", "conv2d", w, x, g) is None
    assert "must agree" in str(library.why_not("cuda", "conv2d", w, x.bfloat16(), g))
    assert "float64" in str(library.why_not("cuda", "conv2d", w.to(dtype=torch.float64), x.double(), g))
    depthwise = sk.to_csr(pruned(4, 1, 3, 3).flatten(1)).packed
    assert "depthwise" in str(library.why_not("cuda", "conv2d", depthwise, x, g._replace(groups=4)))
    with pytest.raises(NotImplementedError, match=r"'cuda' cannot run csr_conv2d.*depthwise"):
        conv2d(x, depthwise, groups=4, kernel_size=3, backend="cuda")


def test_taps_that_reach_too_far(emulated_once: ModuleType) -> None:
    """A kernel whose taps on one channel fill more than a slice is run on the dense road."""
    w, x = pruned(2, 1, 7, 7), images(1, 1, 1570, 1572)
    grid = rows_cuda._forward_grid(Geometry(7, 7, 1, 1, 260, 261), 1570, 1572, 1)
    assert not rows_cuda._runs(x, grid)
    with mock.patch.object(rows_cuda, "worth_it", return_value=True):
        check(w, x, dilation=(260, 261))


def test_module(emulated_once: ModuleType, direct: None) -> None:
    conv = torch.nn.Conv2d(8, 12, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(pruned(12, 8, 3, 3))
    sparse, x = SparseConv2d.from_dense(conv, format="csr"), images(2, 8, 9, 9)
    sparse.backend = "cuda"
    assert_close(sparse(x).detach(), conv.double()(x.double()).detach(), torch.float32)
    assert torch.equal(weight_of(sparse.packed.unpack(), (3, 3), sparse.order).double(), conv.weight.detach())


def test_walks_of_many_widths(emulated_once: ModuleType) -> None:
    """Images of ever new sizes leave few walks behind; those that a captured graph may read stay."""
    layout = sk.to_csr(pruned(4, 4, 3, 3).flatten(1)).packed
    made: list[int] = []

    def walk(width: int) -> Any:
        return rows_cuda._recent(layout.col, width, lambda: made.append(width) or (width,))

    for width in (*range(20), *range(12, 20)):
        assert walk(width) == (width,)
    assert made == list(range(20))  # the last eight were remembered
    with mock.patch.object(rows_cuda, "_capturing", return_value=True):
        walk(12), walk(3)
    for width in range(30, 50):
        walk(width)
    made.clear()
    walk(3), walk(12), walk(49)
    assert not made
    layout.col.add_(0)  # another topology: nothing of the old one is left
    walk(3)
    assert made == [3]
    x = images(1, 4, 5, 40)
    with mock.patch.object(rows_cuda, "worth_it", return_value=True):
        for width in range(5, 30):
            conv2d(x[..., :width], layout, kernel_size=3, padding=1, backend="cuda")
    walks = rows_cuda.plan(layout.col, "conv2d.walks", lambda: None)
    assert len(walks.recent) == rows_cuda.WALKS


def test_measured_roads(emulated_once: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The faster road of a call is taken once both were measured, whatever arithmetic says; asked once."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    tune.forget()
    layout, x = sk.to_csr(pruned(8, 8, 3, 3).flatten(1)).packed, images(1, 8, 6, 6)
    g = Geometry(3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
    direct, right = mock.Mock(wraps=rows_cuda._run), conv2d(x, layout, kernel_size=3, padding=1, backend="ref")
    monkeypatch.setattr(rows_cuda, "_run", direct)

    def ran() -> bool:
        before = direct.call_count
        assert_close(conv2d(x, layout, kernel_size=3, padding=1, backend="cuda"), right.double())
        return direct.call_count > before

    for expected in (False, True):
        with mock.patch.object(rows_cuda, "worth_it", return_value=expected):
            assert ran() is expected
            for faster in ("direct", "dense"):
                times = iter((1.0, 2.0) if faster == "direct" else (2.0, 1.0))

                def timer(call: Any, times: Any = times) -> float:
                    call()
                    return next(times)

                rows_cuda.tune_forward(layout, x, g, timer)
                rows_cuda.tune_forward(layout, x, g, timer)  # nothing is left to measure
                assert ran() is (faster == "direct")
                with tune.disabled():
                    assert ran() is expected
                tune.clear()
            assert ran() is expected
    tune.forget()
