"""2:4 convolution on sparse tensor cores, emulated: geometries, kernels and roads against torch in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsekern.bsr import pack as pack_bsr
from sparsekern.conv import Geometry, library, matrix_of, padding_of, weight_of
from sparsekern.conv import sp24_cuda as convolution
from sparsekern.functional import conv2d
from sparsekern.nn import SparseConv2d
from sparsekern.sp24 import config, cuda
from sparsekern.sp24 import pack as pack24
from sparsekern.sp24.layout import Sp24
from sparsekern.testing import TOLERANCE, assert_close, poisoned, random_dense

HALVES = (torch.bfloat16, torch.float16)
LAST = torch.channels_last

GEOMETRIES = [
    # kernel, channels in, out, groups, stride, padding, dilation, height, width, what can bring it
    ((3, 3), 64, 40, 1, 1, 1, 1, 7, 6, "tma"),
    ((3, 3), 64, 130, 1, 2, 1, 1, 9, 8, "tma"),
    ((3, 2), 128, 64, 1, (1, 2), (2, 0), (2, 1), 8, 7, "tma"),
    ((1, 1), 64, 72, 1, 2, 0, 1, 5, 6, "tma"),
    ((2, 4), 64, 24, 1, 1, "same", 1, 5, 6, "tma"),
    ((2, 2), 64, 16, 1, 1, 4, 1, 2, 3, "tma"),
    ((3, 1), 128, 128, 2, 1, (1, 0), 1, 5, 6, "tma"),
    ((2, 2), 64, 16, 1, 9, 0, 1, 12, 11, "16 bytes"),
    ((3, 3), 24, 40, 1, 1, 1, 1, 6, 5, "16 bytes"),
    ((3, 3), 32, 128, 2, 2, 1, 1, 6, 5, "16 bytes"),
    ((3, 3), 12, 16, 1, (1, 2), 1, 1, 6, 7, "8 bytes"),
    ((5, 5), 2, 16, 1, 2, 2, 1, 11, 12, "4 bytes"),
    ((1, 1), 33, 24, 1, 1, 0, 1, 4, 5, "product"),
]
geometries = pytest.mark.parametrize(
    "case", GEOMETRIES, ids=lambda c: "k{}x{}c{}o{}g{}s{}p{}d{}i{}x{}".format(*c[0], *c[1:9])
)


def weight(case: tuple, dtype: torch.dtype, order: str = "rsc") -> tuple[Tensor, Sp24]:
    """A weight [O, C, kh, kw] that is 2:4 in this order of K, and its layout."""
    kernel, channels, outs, groups = case[:4]
    k = channels // groups * kernel[0] * kernel[1]
    layout = pack24(random_dense(outs, k, seed=3).to(dtype), prune=True)
    return weight_of(layout.unpack(), kernel, order), layout


def steps(case: tuple) -> dict[str, Any]:
    return {"groups": case[3], "stride": case[4], "padding": case[5], "dilation": case[6]}


def geometry(case: tuple) -> Geometry:
    stride, dilation = (v if isinstance(v, tuple) else (v, v) for v in (case[4], case[6]))
    return Geometry(*case[0], *stride, *dilation, *padding_of(case[5], case[0], stride, dilation), case[3], 1)


def images(case: tuple, count: int, dtype: torch.dtype, place: int = 128) -> Tensor:
    """Images channels innermost between bands of NaN, `place` elements into their memory."""
    made = random_dense(count, *case[7:9], case[1], seed=5).to(dtype)
    memory = torch.full((made.numel() + place + 128,), float("nan"), dtype=dtype)
    inside = memory[place : place + made.numel()].view(made.shape)
    return inside.copy_(made).permute(0, 3, 1, 2)


def right(x: Tensor, w: Tensor, bias: Tensor | None, case: tuple) -> Tensor:
    return functional.conv2d(
        x.cpu().double(), w.cpu().double(), None if bias is None else bias.cpu().double(), **steps(case)
    )


def forced(number: int, m: int, n: int, workers: int, streamed: int) -> config.Choice:
    kernel = cuda.kernels(1)[number]
    tiles = -(-n // kernel.rows) * -(-m // kernel.tokens)
    return config.Choice(number, workers, min(streamed, tiles), tiles, 0.0)


MM = range(8)  # the numbers of the kernels that take images


def test_which_kernels_take_images(emulated_once: ModuleType) -> None:
    families = [kernel.family for kernel in cuda.kernels(1)]
    assert [i for i, family in enumerate(families) if family in config.FAMILIES["mm"] and family != "decode"] == list(
        MM
    )


@geometries
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_geometries(emulated: ModuleType, case: tuple, last: bool) -> None:
    """Through the public call, batches of 1 and 3; bias and activation; both orders of memory."""
    for count, dtype in zip((1, 3), HALVES, strict=True):
        w, layout = weight(case, dtype)
        x = images(case, count, dtype)
        x = x if last else x.contiguous()
        bias = random_dense(case[2], seed=9).to(dtype if count == 1 else torch.float32)
        call = {"kernel_size": case[0], "order": "rsc", "backend": "cuda", **steps(case)}
        want = right(x, w, bias, case)
        with torch.no_grad(), poisoned():
            y = conv2d(x, layout, bias, **call)
            relu = conv2d(x, layout, bias, activation="relu", **call)
        assert_close(y, want, dtype)
        assert_close(relu, want.relu(), dtype)
        assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)


@geometries
def test_who_brings_the_windows(emulated: ModuleType, case: tuple) -> None:
    """What the table says of each geometry: the TMA where it can, and the answer does not depend on it."""
    g, x = geometry(case), images(case, 2, torch.float16)
    w, layout = weight(case, torch.float16)
    want, size = right(x, w, None, case), g.out_size(*x.shape[2:])
    assert convolution._tma_reads(x, g, size) == (case[9] == "tma")
    rows = case[2] // case[3]
    pixels = 2 * size[0] * size[1]
    for number in {"tma": (3, 5, 7), "product": (5, 7)}.get(case[9], (6, 7)):
        how = forced(number, pixels, rows, 2, 1)
        with poisoned():
            assert_close(convolution.conv2d(layout, x, None, g, "none", how), want)


@pytest.mark.parametrize("number", MM)
def test_every_kernel(emulated: ModuleType, number: int) -> None:
    """More rows and pixels than a tile has; tiles whole and cut along K, images that begin inside of a tile."""
    kernel = cuda.kernels(1)[number]
    for dtype, streamed in zip(HALVES, (0, 3), strict=True):
        side = {64: 7, 128: 9, 256: 12}[kernel.tokens]
        case = ((2, 2), 64, kernel.rows + 37, 1, 1, (0, 1), (2, 1), side, side - 3)
        g, x = geometry(case), images(case, 3, dtype)
        w, layout = weight(case, dtype)
        want = right(x, w, None, case)
        pixels = want.numel() // want.shape[1]
        assert kernel.tokens < pixels
        how = forced(number, pixels, case[2], 3 if streamed else 2, streamed)
        with poisoned():
            y = convolution.conv2d(layout, x, None, g, "none", how)
        assert_close(y, want, dtype)


@pytest.mark.parametrize("place", [128, 132, 130, 129])
def test_images_that_lie_anywhere(emulated_once: ModuleType, place: int) -> None:
    """At multiples of 16, 8, 4 and 2 bytes; what is left and right of them is NaN."""
    case = ((3, 3), 64, 40, 1, 1, 1, 1, 5, 6)
    w, layout = weight(case, torch.bfloat16)
    x = images(case, 2, torch.bfloat16, place)
    assert_close(conv2d(x, layout, padding=1, order="rsc", backend="cuda"), right(x, w, None, case))
    assert convolution._tma_reads(x, geometry(case), (5, 6)) == (place == 128)


@geometries
@pytest.mark.parametrize("order", ["rsc", "crs"])
def test_gradients(emulated_once: ModuleType, case: tuple, order: str) -> None:
    """Of images, weight and bias. Those of order crs, whose forward is the oracle's, have the same road."""
    for dtype, last in zip(HALVES, (True, False), strict=True):
        w, layout = weight(case, dtype, order)
        x = images(case, 2, dtype).clone(memory_format=LAST if last else torch.contiguous_format)
        leaf64, w64 = x.double().cpu().requires_grad_(), w.double().cpu().requires_grad_()
        want = functional.conv2d(leaf64, w64, **steps(case))
        dy = random_dense(*want.shape, seed=7).to(dtype)
        dy = dy.to(memory_format=LAST) if last else dy
        want.backward(dy.cpu().double())
        g = geometry(case)._replace(order=int(order == "rsc"))
        with poisoned():
            dx = library.conv2d_input(layout, dy, g, *x.shape[2:], "cuda", True)
            dw = library.conv2d_weight(layout, dy, x, g, "cuda", True)
        loose = 4 * TOLERANCE[dtype]
        assert_close(dx, leaf64.grad, dtype, tol=loose)
        assert dx.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
        assert_close(dw.cpu(), layout.to(device="cpu").sample(matrix_of(w64.grad, order)), dtype, tol=loose)


def test_a_module_trains(emulated_once: ModuleType) -> None:
    """SparseConv2d on this backend and on the oracle: outputs and all gradients."""
    dense = nn.Conv2d(64, 24, 3, padding=1, stride=2, dtype=torch.bfloat16)
    layer = SparseConv2d.from_dense(dense, format="sp24", prune=True)
    assert layer.order == "rsc"
    x = random_dense(2, 64, 6, 7, seed=1).bfloat16()
    seen: dict[str, list[Tensor]] = {}
    for backend in ("cuda", "ref"):
        given = x.clone().requires_grad_()
        layer.backend = backend
        layer.zero_grad()
        y = layer(given)
        y.float().square().sum().backward()
        seen[backend] = [y.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())]
    assert len(seen["cuda"]) == 4
    for got, want in zip(seen["cuda"], seen["ref"], strict=True):
        assert_close(got, want, tol=3 * TOLERANCE[torch.bfloat16])


def test_no_images(emulated_once: ModuleType) -> None:
    case = GEOMETRIES[0]
    _, layout = weight(case, torch.float16)
    x = images(case, 1, torch.float16)[:0]
    y = conv2d(x, layout, padding=1, order="rsc", backend="cuda")
    assert y.shape == (0, 40, 7, 6)
    g = geometry(case)
    assert convolution.conv2d_input(layout, y, g, 7, 6).shape == (0, 64, 7, 6)
    assert not convolution.conv2d_weight(layout, y, x, g).any()


def test_weights_that_change(emulated_once: ModuleType) -> None:
    """An optimizer's step is seen by the next convolution."""
    case = GEOMETRIES[0]
    _, layout = weight(case, torch.bfloat16)
    x, g = images(case, 1, torch.bfloat16), geometry(case)
    before = convolution.conv2d(layout, x, None, g, "none")
    layout.values.mul_(2)
    assert torch.equal(convolution.conv2d(layout, x, None, g, "none"), before * 2)


REFUSED = [
    # kernel, channels, outs, groups, order, message
    ((3, 3), 64, 64, 1, "crs", r"K must run \(r, s, c\), order 'rsc'"),
    ((3, 3), 7, 64, 1, "rsc", "must be even, these are 7"),
    ((3, 3), 64, 96, 2, "rsc", "whole blocks of 64 output channels, these have 48"),
    ((3, 3), 64, 64, 64, "rsc", "depthwise convolution has nothing to skip"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c[5])
def test_refusals(emulated_once: ModuleType, case: tuple) -> None:
    kernel, channels, _, groups, order, message = case
    _, layout = weight(case, torch.float16, order)
    x = random_dense(1, channels, 5, 5).half()
    how = {"kernel_size": kernel, "groups": groups, "padding": 1, "order": order}
    with pytest.raises(NotImplementedError, match=message):
        conv2d(x, layout, backend="cuda", **how)


def test_types_and_formats_that_are_refused(emulated_once: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = GEOMETRIES[0]
    _, layout = weight(case, torch.float32)
    x, g = random_dense(1, 64, 7, 6), geometry(case)
    assert "not torch.float32" in str(library.why_not("cuda", "conv2d", layout, x, g))
    quantised = pack24(random_dense(40, 576, dtype=torch.int8), prune=True, scale=torch.ones(40))
    assert "int8 convolution weights are not" in str(library.why_not("cuda", "conv2d", quantised, x, g))
    blocks = pack_bsr(torch.eye(40, 576), (8, 8))
    assert "with bsr has no such backend" in str(library.why_not("cuda", "conv2d", blocks, x, g))
    monkeypatch.setattr(convolution, "MOST_PIXELS", 42)
    half = layout.to(dtype=torch.float16)
    assert "42 pixels or more" in str(library.why_not("cuda", "conv2d", half, x.half(), g))
    assert library.why_not("cuda", "conv2d_input", half, x.half(), g) is None


@pytest.mark.parametrize("card", [80, 90, 120])
def test_a_choice_for_images(device_module: ModuleType, card: int) -> None:
    kernels = [config.Kernel(*row) for row in device_module.sp24_kernels(1)]
    for m in (1, 30, 6272, 25088):
        for tma in (True, False):
            options = {"capability": card, "processors": 132, "aligned": tma, "images": True}
            found = config.candidates(kernels, m, 256, 36, **options)
            assert found
            families = {kernels[choice.kernel].family for choice in found}
            assert families <= ({"mm_sm90", "mm_sm80"} if card == 90 and tma else {"mm_sm80"})
