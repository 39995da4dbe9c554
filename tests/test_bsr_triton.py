"""The Triton kernels of bsr: on a GPU where there is one, else in Triton's interpreter, against float64.

The interpreter reads beyond a tensor without a word, so inputs lie between bands of NaN; it cannot multiply bfloat16,
so that type is compiled (test_codegen_triton.py) and runs on a GPU only.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import sparsekern as sk
from sparsekern import _ext, tune
from sparsekern.bsr import triton as launcher
from sparsekern.bsr import update_topology, work
from sparsekern.bsr.config import Config, candidates, config, why_illegal
from sparsekern.bsr.layout import Bsr
from sparsekern.conv import matrix_of, weight_of
from sparsekern.functional import conv2d
from sparsekern.ref import ACTIVATIONS
from sparsekern.testing import (
    TOLERANCE,
    assert_close,
    generator,
    guarded,
    guarded_layout,
    pack,
    poisoned,
    random_dense,
    random_scale,
    random_weight,
    reference_mm,
    reference_mm_t,
    reference_sddmm,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not _ext.interpreting() else "cpu")
MISSING = _ext.why_not_triton(DEVICE)
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.on_triton]
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# As the heuristic says; rows cut at every block and tokens in shares; tensor maps; a program a tile.
WAYS = {"plain": {}, "cut": {"most": 1, "parts": 3}, "maps": {"tma": True}, "tiles": {"resident": 0, "group": 1}}


def weight(n: int, k: int, block: tuple[int, int], dtype: torch.dtype, density: float = 0.4, seed: int = 0) -> tuple:
    """(dense on the CPU, layout on the device)."""
    dense = random_weight("bsr", n, k, dtype, density, block, seed)
    return dense, pack("bsr", dense, block).to(device=DEVICE)


def matrix(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return random_dense(*shape, dtype=dtype, seed=seed).to(DEVICE)


def how(op: str, layout: Bsr, x: Tensor, **changes: object) -> Config:
    """The heuristic's configuration with changes."""
    return replace(launcher.chosen(op, layout, x, x.shape[0]), **changes)


def at_stored(layout: Bsr, dense: Tensor) -> Tensor:
    return layout.to(device="cpu").sample(dense.cpu())


def check(layout: Bsr, dense: Tensor, x: Tensor, dy: Tensor, **changes: object) -> None:
    """The three products, between guard bands, against float64."""
    dtype = x.dtype
    banded, unharmed = guarded_layout(layout)
    gx, gdy = guarded(x, gap=8), guarded(dy, gap=8)
    x, dy, host_x, host_dy = gx.tensor, gdy.tensor, x.cpu(), dy.cpu()
    with poisoned():
        y = launcher.mm(banded, x, None, "none", how=how("mm", banded, x, **changes))
        dx = launcher.mm_t(banded, dy, how=how("mm_t", banded, dy, **changes))
        dw = launcher.sddmm(banded, dy, x, how=how("sddmm", banded, x, **changes))
    assert_close(y, reference_mm(dense, host_x), dtype)
    assert_close(dx, reference_mm_t(dense, host_dy), dtype)
    assert_close(dw, at_stored(layout, reference_sddmm(host_dy, host_x)), dtype)
    for guard in (gx, gdy):
        guard.check()
    unharmed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [(16, 16), (16, 64), (64, 32), (32, 128)], ids=str)
def test_products(block: tuple[int, int], way: str, dtype: torch.dtype) -> None:
    """Odd sizes: every edge is ragged."""
    r, c = block
    for m, n, k in ((1, r + 1, c - 3), (35, 2 * r + 5, 2 * c + 7)):
        dense, layout = weight(n, k, block, dtype, 0.6, seed=m)
        check(layout, dense, matrix(m, k, dtype=dtype), matrix(m, n, dtype=dtype, seed=2), **WAYS[way])


def test_every_m() -> None:
    """Every number of tokens from 1 to 130. Rows of Y are independent, so one reference serves all."""
    most, n, k, dtype = 130, 40, 70, torch.float16
    dense, layout = weight(n, k, (32, 32), dtype, 0.6)
    x, dy = matrix(most, k, dtype=dtype), matrix(most, n, dtype=dtype, seed=2)
    y, dx = reference_mm(dense, x.cpu()), reference_mm_t(dense, dy.cpu())
    for m in range(1, most + 1):
        gx, gdy = guarded(x[:m]).tensor, guarded(dy[:m]).tensor
        with poisoned():
            assert_close(launcher.mm(layout, gx, None, "none"), y[:m], dtype)
            assert_close(launcher.mm_t(layout, gdy), dx[:m], dtype)
            if m < 40 or m % 9 == 0:
                right = reference_sddmm(dy[:m].cpu(), x[:m].cpu())
                assert_close(launcher.sddmm(layout, gdy, gx), at_stored(layout, right), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_rows_columns_and_nothing(dtype: torch.dtype) -> None:
    dense, _ = weight(96, 112, (16, 16), dtype, 0.5)
    dense[16:48] = 0
    dense[:, 96:] = 0
    bias = matrix(96, dtype=dtype, seed=3)
    for stored in (dense, torch.zeros_like(dense)):
        layout = pack("bsr", stored, (16, 16)).to(device=DEVICE)
        for m in (0, 1, 20):
            x, dy = matrix(m, 112, dtype=dtype), matrix(m, 96, dtype=dtype, seed=2)
            check(layout, stored, x, dy)
            with poisoned():
                y = launcher.mm(layout, x, bias, "silu")
            assert_close(y, reference_mm(stored, x.cpu(), bias.cpu(), "silu"), dtype)
    for n, k in ((0, 32), (32, 0)):
        layout = pack("bsr", torch.zeros(n, k, dtype=dtype), (16, 16)).to(device=DEVICE)
        assert launcher.mm(layout, matrix(3, k, dtype=dtype), None, "none").shape == (3, n)
        assert not launcher.mm_t(layout, matrix(3, n, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_endings(dtype: torch.dtype) -> None:
    """bias, every activation, residual; on whole rows and on rows that were cut."""
    m, n, k = 18, 40, 64
    dense, layout = weight(n, k, (16, 32), dtype, 0.7)
    x, bias, residual = (matrix(*s, dtype=dtype, seed=i) for i, s in enumerate(((m, k), (n,), (m, n))))
    wide = guarded(residual, gap=5)
    for activation, most in itertools.product(ACTIVATIONS, (0, 1)):
        with poisoned():
            y = launcher.mm(layout, x, bias, activation, residual=wide.tensor, how=how("mm", layout, x, most=most))
        right = reference_mm(dense, x.cpu(), bias.cpu(), activation) + residual.cpu().double()
        assert_close(y, right, dtype)
    dx = launcher.mm_t(layout, residual, x)
    assert_close(dx, reference_mm_t(dense, residual.cpu()) + x.cpu().double(), dtype)


@pytest.mark.parametrize("most", [0, 1], ids=["whole", "cut"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16], ids=str)
def test_one_kernel_does_it_all(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int) -> None:
    """Scales of rows and tokens, bias, activation, residual, output type from the public call; nothing of torch's."""
    m, n, k, small = 70, 150, 96, dtype.itemsize == 1
    if ON_GPU and dtype == torch.float8_e4m3fn and _ext.capability(DEVICE) < 89:
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    dense = random_weight("bsr", n, k, torch.float32, 0.6, (128, 32))
    layout = pack("bsr", dense.to(dtype), (128, 32)).to(device=DEVICE)
    if small:
        q = sk.prune.quantised(dense, dtype)
        layout = pack("bsr", q.values, (128, 32), q.scale).to(device=DEVICE)
    x, x_scale = (20 * random_dense(m, k, seed=1)).to(dtype).to(DEVICE), matrix(m, dtype=torch.float32, seed=2).abs()
    bias, calls, real = matrix(n, dtype=torch.float32, seed=3), [], launcher.mm
    monkeypatch.setattr(launcher, "mm", lambda *given, **more: calls.append(more) or real(*given, **more))
    monkeypatch.setattr(
        launcher.tuning, "chosen", lambda *call: replace(config(*SMALL, call[2].dtype, 0.6, 80), tokens=64, most=most)
    )
    for scaled, plus, out in (
        (True, False, None), (False, True, None), (False, False, torch.float32), (True, True, torch.bfloat16),
        (True, True, torch.float16),
    ):  # fmt: skip
        residual = matrix(m, n, dtype=out or (torch.float32 if small else dtype), seed=4) if plus else None
        words = {"x_scale": x_scale if scaled else None, "residual": residual, "out_dtype": out}
        y = sk.linear(x, layout, bias, "relu", "triton", **words)
        right = x.cpu().double() @ layout.to(device="cpu").to_dense().double().t()
        right = right * x_scale.cpu().double()[:, None] if scaled else right
        right = (right + bias.cpu().double()).relu()
        right = right if residual is None else right + residual.cpu().double()
        assert y.dtype == (out or (torch.float32 if small else dtype))
        assert_close(y, right, tol=2 * TOLERANCE[y.dtype])
        assert set(calls.pop()) == {name for name, word in words.items() if word is not None}


SMALL = ("mm", 70, 150, 96, (128, 32))  # its tiles of 64 tokens are large enough to be ended in two halves


@pytest.mark.parametrize("activations", [torch.int8, *DTYPES], ids=str)
def test_int8(activations: torch.dtype) -> None:
    for m, n, k in ((1, 33, 70), (20, 64, 96)):
        dense = random_weight("bsr", n, k, torch.int8, 0.6, (16, 32))
        scale = random_scale(n)
        layout = pack("bsr", dense, (16, 32), scale).to(device=DEVICE)
        wide, result = (
            dense.double() * scale.double()[:, None],
            torch.float32 if activations == torch.int8 else activations,
        )
        x, bias = matrix(m, k, dtype=activations), matrix(n, dtype=torch.float32, seed=3)
        for most in (0, 1):
            with poisoned():
                y = launcher.mm(layout, x, bias, "relu", how=how("mm", layout, x, most=most))
            assert_close(y, reference_mm(wide, x.cpu(), bias.cpu(), "relu"), result)
        if activations != torch.int8:
            dy = matrix(m, n, dtype=activations, seed=2)
            assert_close(launcher.mm_t(layout, dy), reference_mm_t(wide, dy.cpu()), result)


def test_fp8() -> None:
    """float8_e4m3fn values with a scale per row; activations of their own type (float32 out) and float ones."""
    n, k, m = 40, 96, 20
    kind = torch.float8_e4m3fn
    dense = random_weight("bsr", n, k, torch.float32, 0.6, (16, 32)).to(kind)
    scale = random_scale(n)
    packed = pack("bsr", dense.float(), (16, 32))
    layout = replace(packed, values=packed.values.to(kind), scale=scale).check().to(device=DEVICE)
    wide = dense.double() * scale.double()[:, None]
    assert torch.equal(layout.to_dense().cpu().double(), (dense.float() * scale[:, None]).double())
    if ON_GPU and _ext.capability(DEVICE) < 89:
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    for given, out in ((kind, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        x = random_dense(m, k, seed=1).to(given).to(DEVICE)
        y = sk.linear(x, sk.SparseTensor(layout), backend="triton")
        assert_close(y, reference_mm(wide, x.cpu()), out, tol=2e-3 if given == kind and ON_GPU else None)
        if given != kind:
            dy = matrix(m, n, dtype=given, seed=2)
            assert_close(launcher.mm_t(layout, dy), reference_mm_t(wide, dy.cpu()), out, tol=2 * TOLERANCE[out])


def test_skewed_rows_and_the_same_bits() -> None:
    """One full row among short ones, cut in pieces: the same bits every time, and at any number of programs."""
    n = k = 128
    block, dtype = (16, 16), torch.float32
    dense, _ = weight(n, k, block, dtype, 0.15)
    dense[32:48] = random_dense(16, k, seed=7)
    layout = pack("bsr", dense, block).to(device=DEVICE)
    x, dy = matrix(33, k, dtype=dtype), matrix(33, n, dtype=dtype, seed=2)
    check(layout, dense, x, dy, most=2, parts=2)
    results = [
        (
            launcher.mm(layout, x, None, "none", how=how("mm", layout, x, most=2, resident=resident)),
            launcher.mm_t(layout, dy, how=how("mm_t", layout, dy, most=2, resident=resident)),
            launcher.sddmm(layout, dy, x, how=how("sddmm", layout, x, parts=2)),
        )
        for resident in (1, 1, 0, 3)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_grids_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch on one axis, which goes to 2^31 - 1: the others end at 65535, 2 M tokens in chunks of 32."""
    from sparsekern.conv import Geometry
    from sparsekern.conv import triton as convolution

    grids: dict[str, tuple[int, ...]] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            class Kernel:
                def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                    grids[name] = grid
                    return lambda *given, **more: None

            return Kernel()

    for module in (launcher, convolution):
        monkeypatch.setattr(module, "_kernels", Recorder)
    _, layout = weight(128, 144, (128, 16), torch.float16, 1.0)
    m, pixels = 3_000_000, (30, 320, 330)
    x = matrix(1, 144, dtype=torch.float16).expand(m, 144)
    made = replace(config("mm", 64, 128, 144, (128, 16), torch.float16, 1.0, 80), most=2)
    launcher.mm(layout, x, None, "none", how=made)
    images = matrix(1, 16, 1, 1, dtype=torch.float16).to(memory_format=torch.channels_last)
    images = images.expand(pixels[0], 16, *pixels[1:])
    monkeypatch.setattr(Tensor, "contiguous", lambda self, memory_format=None: self)
    convolution.conv2d(layout, images, None, Geometry(3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1), "none", made)
    assert set(grids) == {"bsr_mm", "bsr_mm_join", "bsr_conv", "bsr_conv_join"}
    assert grids["bsr_mm_join"] == (-(-m // 32),)
    for grid in grids.values():
        assert grid[0] < 2**31
        assert all(size <= 65535 for size in grid[1:])


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 100])
def test_work_lists(most: int) -> None:
    """Every stored block in exactly one item, longest first, partial sums numbered without gaps."""
    for density in (0.0, 0.05, 0.4, 1.0):
        _, layout = weight(200, 150, (16, 16), torch.float32, density)
        nnzb = layout.values.shape[0]
        for starts in (layout.crow, work.by_columns(layout).starts):
            items, splits, slots, _ = work.cut(starts, nnzb, most)
            used = [item for item in items.tolist() if item[0] >= 0]
            lengths = [end - begin for _, begin, end, _ in used]
            assert lengths == sorted(lengths, reverse=True)
            assert not most or max(lengths, default=0) <= most
            seen = sorted(b for row, begin, end, _ in used for b in range(begin, end))
            assert seen == list(range(nnzb))
            assert {item[0] for item in used} == set(range(len(starts) - 1))
            for row, begin, end, _ in used:
                assert int(starts[row]) <= begin <= end <= int(starts[row + 1])
            pieces = {item[0]: [i[3] for i in used if i[0] == item[0]] for item in used}
            cut_rows = {row: sorted(s) for row, s in pieces.items() if len(s) > 1}
            assert all(s == [-1] for s in pieces.values() if len(s) == 1)
            named = {row: list(range(first, first + count)) for row, first, count in splits.tolist() if row >= 0}
            assert named == cut_rows
            taken = sorted(s for places in cut_rows.values() for s in places)
            assert taken == list(range(len(taken)))
            assert len(taken) <= slots


def test_work_lists_die_with_the_weight() -> None:
    _, layout = weight(64, 64, (16, 16), torch.float32)
    launcher.mm_t(layout, matrix(2, 64, dtype=torch.float32))
    launcher.mm(layout, matrix(2, 64, dtype=torch.float32), None, "none")
    alive = weakref.ref(work.by_columns(layout).gather)
    assert alive() is not None
    del layout
    gc.collect()
    assert alive() is None


def test_update_topology() -> None:
    """Blocks that stay keep their values, new ones are zero; products and lists follow in place."""
    n, k, block = 90, 120, (16, 16)
    _, layout = weight(n, k, block, torch.float32)
    (nb, kb), nnzb = layout.grid, layout.values.shape[0]
    x, dy = matrix(9, k, dtype=torch.float32), matrix(9, n, dtype=torch.float32, seed=2)
    launcher.mm(layout, x, None, "none")
    launcher.mm_t(layout, dy)
    lists = work.work_list(layout, True, 1).items
    tensors = [t.data_ptr() for t in layout.tensors().values()]
    for turn in range(3):
        mask = torch.zeros(nb * kb, dtype=torch.bool)
        mask[torch.randperm(nb * kb, generator=generator(turn))[: nnzb - 2 * turn]] = True
        mask = mask.reshape(nb, kb)
        before = layout.to(device="cpu").unpack()
        assert update_topology(layout, mask.to(DEVICE)) is layout
        dense = before * mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :k]
        assert torch.equal(layout.to(device="cpu").check().unpack(), dense)
        assert work.work_list(layout, True, 1).items is lists
        check(layout, dense, x, dy)
        layout.values.copy_(layout.sample(random_dense(n, k, seed=turn).to(DEVICE)))
        check(layout, layout.to(device="cpu").unpack(), x, dy, most=1)
    assert [t.data_ptr() for t in layout.tensors().values()] == tensors
    for bad in (torch.ones(nb, kb), torch.ones(nb, kb + 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be bool of shape"):
            update_topology(layout, bad.to(DEVICE))
    if not ON_GPU:
        with pytest.raises(RuntimeError, match="more blocks than"):
            update_topology(layout, torch.ones(nb, kb, dtype=torch.bool))


def test_update_topology_of_a_convolution() -> None:
    """What captured graphs of a convolution read holds the new topology at once, in the same memory."""
    from sparsekern.conv import Geometry
    from sparsekern.conv import triton as convolution

    dense, layout = weight(32, 288, (16, 16), torch.float32, 0.5)
    g = Geometry(3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    x, dy = matrix(2, 32, 6, 5, dtype=torch.float32), matrix(2, 32, 3, 5, dtype=torch.float32, seed=2)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        y = convolution.conv2d(layout, x, None, g, "none")
        return y, convolution.conv2d_input(layout, dy, g, 6, 5), convolution.conv2d_weight(layout, dy, x, g)

    def read() -> list[Tensor]:
        """Everything that is kept for the kernels of this layout; a look brings it up to date."""
        walks = [convolution._backward(layout, g, (row, 0), 2) for row in range(2)]
        values = (convolution._forward(layout, g, 2), walks, work.rows_of(layout))
        return [t for t in tree_leaves(values) if isinstance(t, Tensor)]

    results()
    kept = read()
    (nb, kb), nnzb = layout.grid, layout.values.shape[0]
    mask = torch.zeros(nb * kb, dtype=torch.bool)
    mask[torch.randperm(nb * kb, generator=generator(5))[:nnzb]] = True
    before, pointers = [t.clone() for t in kept], [t.data_ptr() for t in kept]
    update_topology(layout, mask.view(nb, kb).to(DEVICE))
    assert sum(not torch.equal(a, b) for a, b in zip(before, kept, strict=True)) >= 5
    fresh = layout.with_values(random_dense(*layout.values.shape, seed=3).to(DEVICE))
    fresh = replace(fresh, crow=layout.crow.clone(), col=layout.col.clone())
    old, layout = layout.with_values(fresh.values), fresh
    right = results()
    now = read()
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))  # before any call with the old one
    layout = old
    assert all(torch.equal(a, b) for a, b in zip(results(), right, strict=True))
    assert [t.data_ptr() for t in read()] == pointers
    dense = layout.to(device="cpu").unpack()
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight_of(dense, (3, 3), "rsc"))]
    y = functional.conv2d(*leaves, stride=(2, 1), padding=1)
    y.backward(dy.cpu().double())
    for got, want in zip(right[:2], (y, leaves[0].grad), strict=True):
        assert_close(got, want)
    assert_close(right[2], at_stored(layout, matrix_of(leaves[1].grad, "rsc")))


# The grid of torch's own tests of its BSR kernels (test_sparse_csr.py, TestSparseCompressedTritonKernels):
# bsr_dense_mm, bsr_dense_addmm with beta * input + alpha * (bsr @ dense), row scales (left_alpha), sampled_addmm.
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [(16, 16), (16, 32), (32, 32), (64, 64)], ids=str)
def test_grid_of_torch(block: tuple[int, int], sparsity: float, dtype: torch.dtype) -> None:
    """op x block x sparsity x type x bias x alpha, beta x row scale x strange strides, forward and sampled product.

    alpha is a scale for every token, beta is multiplied into the residual; a row scale belongs to quantised weights.
    """
    ints = dtype == torch.int8
    if ints and block[1] < 32:
        pytest.skip("int8 products need blocks of at least 32 columns")
    (r, c), m, out = block, 19, torch.float32 if ints else dtype
    n, k = 2 * r, 2 * c
    dense = random_weight("bsr", n, k, dtype, 1 - sparsity, block)
    scale = random_scale(n) if ints else None
    layout = pack("bsr", dense, block, scale).to(device=DEVICE)
    dense = dense.double() * (1 if scale is None else scale.double()[:, None])
    whole = random_dense(2 * k + 3, 2 * k + 2 * m + 3, seed=1)
    whole = ((20 * whole).round().clamp(-127, 127) if ints else whole).to(dtype).to(DEVICE)
    given = (whole[:m, :k], whole[:k, : 2 * m : 2].t(), whole[: 2 * m : 2, 3 : k + 3])
    for x, (with_bias, alpha, beta) in itertools.product(given, ((False, 1, 0), (True, 1, 0), (True, 0.7, 1.5))):
        bias = matrix(n, dtype=out, seed=3) if with_bias else None
        added = beta * matrix(n, m, dtype=out, seed=4).t() if beta else None
        x_scale = torch.full((m,), alpha, device=DEVICE) if alpha != 1 else None
        y = launcher.mm(layout, x, bias, "none", x_scale=x_scale, residual=added)
        right = alpha * (x.cpu().double() @ dense.t())
        right = right if bias is None else right + bias.cpu().double()
        assert_close(y, right if added is None else right + added.cpu().double(), out)
    if not ints:
        dy = matrix(n, m, dtype=dtype, seed=5).t()
        dw = launcher.sddmm(layout, dy, given[0])
        assert_close(dw, at_stored(layout, reference_sddmm(dy.cpu(), given[0].cpu())), dtype)


@pytest.mark.parametrize("size", [(0, 32, 32), (5, 0, 32), (5, 32, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_size_zero(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """No tokens, no rows, no columns: torch's kernels are asked about them as well."""
    m, n, k = size
    ints = dtype == torch.int8
    scale = torch.ones(n) if ints else None
    layout = pack("bsr", torch.zeros(n, k, dtype=dtype), (32, 32), scale).to(device=DEVICE)
    x, bias = torch.zeros(m, k, dtype=dtype, device=DEVICE), matrix(n, dtype=torch.float32, seed=3)
    added = matrix(m, n, dtype=torch.float32, seed=4)
    for residual in (None, added):
        y = launcher.mm(layout, x, bias, "relu", residual=residual, out_dtype=torch.float32)
        right = bias.relu().expand(m, n) if residual is None else bias.relu() + residual
        assert torch.equal(y, right)
    if not ints:
        dy = torch.ones(m, n, dtype=dtype, device=DEVICE)
        assert torch.equal(launcher.mm_t(layout, dy), torch.zeros(m, k, dtype=dtype, device=DEVICE))
        assert launcher.sddmm(layout, dy, x).shape == layout.values.shape


# The sizes of stk's tests (stk/ops/linear_ops_test.py), blocks of 128 as blocks of 16.
STK = [
    (128, 128, 128, 0.0), (256, 256, 256, 0.5), (2048, 1024, 512, 0.8), (512, 128, 128, 0.0), (128, 128, 512, 0.0),
    (1024, 512, 512, 0.0), (1024, 512, 512, 0.5), (1024, 512, 512, 0.75), (512, 512, 1024, 0.0),
    (512, 512, 1024, 0.5), (512, 512, 1024, 0.75), (1024, 1024, 1024, 0.0), (1024, 1024, 1024, 0.5),
    (1024, 1024, 1024, 0.75),
]  # fmt: skip


@pytest.mark.parametrize("ragged", [0, 5], ids=["whole", "ragged"])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("size", STK, ids=str)
def test_grid_of_stk(size: tuple[int, int, int, float], transposed: tuple[bool, bool], ragged: int) -> None:
    """sparse @ dense with either one transposed: the product and both gradients (dsd, dds and sdd of stk).

    On a GPU with stk's own sizes and blocks, in bfloat16 as well; interpreted an eighth of them, in one type a case.
    ragged: sizes that no block divides, which stk does not have.
    """
    part, block = (1, (128, 128)) if ON_GPU else (8, (16, 16))
    m, k, n = (s // part - ragged for s in size[:3])
    if not ON_GPU and ragged and size[3] == 0.0:
        pytest.skip("on a GPU only")
    few = transposed == (True, True) and m * k * n < 128**3
    for dtype in DTYPES if ON_GPU else (torch.float32,) if few else (torch.float16,):
        _stk(m, k, n, size[3], transposed, block, dtype)


def _stk(
    m: int, k: int, n: int, sparsity: float, transposed: tuple[bool, bool], block: tuple[int, int], dtype: torch.dtype
) -> None:
    flip_w, flip_x = transposed
    dense, layout = weight(*((k, m) if flip_w else (m, k)), block, dtype, 1 - sparsity)
    x = matrix(*((n, k) if flip_x else (k, n)), dtype=dtype).requires_grad_()
    w = sk.SparseTensor(layout, requires_grad=True)
    y = sk.matmul(w.t() if flip_w else w, x.t() if flip_x else x, backend="triton")
    dy = matrix(m, n, dtype=dtype, seed=2)
    y.backward(dy)
    w64, x64 = dense.double().requires_grad_(), x.detach().cpu().double().requires_grad_()
    right = (w64.t() if flip_w else w64) @ (x64.t() if flip_x else x64)
    right.backward(dy.cpu().double())
    assert_close(y, right, dtype)
    assert_close(x.grad, x64.grad, dtype)
    assert_close(w.grad.packed.values, at_stored(layout, w64.grad), dtype)


CONVOLUTIONS = [
    # kernel, channels, outputs, groups, stride, padding, dilation, height, width, block
    ((3, 3), 32, 40, 1, 1, 1, 1, 7, 6, (16, 32)),
    ((3, 2), 32, 64, 2, (2, 1), (1, 0), (1, 2), 7, 5, (32, 16)),
    ((1, 1), 32, 32, 1, 2, 0, 1, 5, 6, (16, 16)),
    ((1, 1), 32, 24, 1, 1, 0, 1, 5, 6, (16, 32)),
    ((2, 2), 16, 16, 1, 3, 0, 1, 7, 8, (16, 16)),
    ((3, 3), 16, 16, 1, 1, 4, 1, 3, 2, (16, 16)),
]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: "k{}x{}c{}o{}g{}s{}p{}d{}i{}x{}".format(*c[0], *c[1:9]))
def test_convolution(case: tuple, last: bool) -> None:
    """Forward and the three gradients of a block-sparse convolution against torch's dense one in float64."""
    kernel, c, o, groups, stride, padding, dilation, height, width, block = case
    dtype = torch.float32 if last else torch.float16
    order = torch.channels_last if last else torch.contiguous_format
    dense, layout = weight(o, c // groups * kernel[0] * kernel[1], block, dtype, 0.4)
    x = matrix(2, c, height, width, dtype=dtype).to(memory_format=order)
    bias = matrix(o, dtype=dtype, seed=3)
    steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    call = {"backend": "triton", "kernel_size": kernel, "order": "rsc", **steps}
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight_of(dense, kernel, "rsc"), bias)]
    right = functional.conv2d(*leaves, **steps)
    dy = matrix(*right.shape, dtype=dtype, seed=2).to(memory_format=order)
    right.backward(dy.cpu().double())
    banded, unharmed = guarded_layout(layout)
    gx = guarded(x.permute(0, 2, 3, 1)).tensor.permute(0, 3, 1, 2) if last else guarded(x).tensor
    with torch.no_grad(), poisoned():
        y = conv2d(gx, banded, bias, activation="relu", **call)
    assert_close(y, right.relu(), dtype)
    assert y.is_contiguous(memory_format=order)
    unharmed()
    mine = [t.detach().clone().requires_grad_() for t in (x, layout.values, bias)]
    with poisoned():
        conv2d(mine[0], layout.with_values(mine[1]), mine[2], **call).backward(dy)
    loose = 4 * TOLERANCE[dtype]
    assert_close(mine[0].grad, leaves[0].grad, dtype, tol=loose)
    assert_close(mine[1].grad, at_stored(layout, matrix_of(leaves[1].grad, "rsc")), dtype, tol=loose)
    assert_close(mine[2].grad, leaves[2].grad, dtype, tol=loose)


def test_convolution_cut_and_shared() -> None:
    """Rows cut at every block, pixels in shares: the second passes of a convolution."""
    from sparsekern.conv import Geometry
    from sparsekern.conv import triton as convolution

    dense, layout = weight(32, 144, (16, 16), torch.float32, 0.5)
    x, g = matrix(2, 16, 6, 5, dtype=torch.float32), Geometry(3, 3, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1)
    w = weight_of(dense, (3, 3), "rsc").double().requires_grad_()
    x64 = x.cpu().double().requires_grad_()
    right = functional.conv2d(x64, w, stride=(1, 2), padding=1)
    dy = matrix(*right.shape, dtype=torch.float32, seed=2)
    right.backward(dy.cpu().double())
    made = convolution._config("mm", layout, x, 30)
    with poisoned():
        y = convolution.conv2d(layout, x, None, g, "none", replace(made, most=1, tokens=16))
        dx = convolution.conv2d_input(layout, dy, g, 6, 5, replace(made, most=1, tokens=16))
        dw = convolution.conv2d_weight(layout, dy, x, g, replace(made, tokens=16, parts=2))
    assert_close(y, right)
    assert_close(dx, x64.grad)
    assert_close(dw, at_stored(layout, matrix_of(w.grad, "rsc")))


@pytest.mark.parametrize("cc", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_configurations_are_legal(dtype: torch.dtype, cc: int) -> None:
    """The heuristic and every candidate of tuning, over a grid of calls."""
    sides = (16, 32, 64, 128)
    for block, m, density in itertools.product(
        itertools.product(sides, sides), (0, 1, 17, 64, 700, 65536), (0.0, 0.1, 1.0)
    ):
        if dtype == torch.int8 and block[1] < 32:
            continue
        for op in ("mm",) if dtype == torch.int8 else ("mm", "mm_t", "sddmm"):
            for precision in ("ieee", "tf32x3") if dtype == torch.float32 else ("ieee",):
                call = (op, m, 1000, 4096, block, dtype, density, cc, 132, precision)
                made = config(*call)
                assert why_illegal(op, made, block, dtype, cc) is None, (call, made)
                assert made.most >= 0
                assert made.parts >= 1
    tried = list(candidates("mm", 4096, 4096, 4096, (64, 64), dtype, 0.25, cc))
    assert tried[0] == config("mm", 4096, 4096, 4096, (64, 64), dtype, 0.25, cc)
    assert len(tried) == len(set(tried)) > 3
    assert all(why_illegal("mm", made, (64, 64), dtype, cc) is None for made in tried)
    with pytest.raises(ValueError, match="op must be"):
        config("mv", 1, 64, 64, (16, 16), dtype, 0.5, cc)


def test_illegal_configurations_say_why() -> None:
    good = config("mm", 4096, 4096, 4096, (64, 64), torch.bfloat16, 0.5, 90)
    for changes, cc, why in (
        ({"tokens": 48}, 90, "powers of two"),
        ({"depth": 128}, 90, "does not divide"),
        ({"tokens": 512}, 90, "out of range"),
        ({"tma": True}, 80, "tensor maps"),
        ({"stages": 8, "tokens": 256, "warps": 8}, 90, "shared memory"),
        ({"warps": 1}, 90, "registers"),
    ):
        assert why in str(why_illegal("mm", replace(good, **changes), (64, 64), torch.bfloat16, cc))


def test_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fastest configuration that was measured is taken, as long as it is known; the rest is the heuristic's."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSEKERN_TUNE", raising=False)
    _, layout = weight(64, 64, (32, 32), torch.float16)
    x = matrix(20, 64, dtype=torch.float16)
    own = launcher.chosen("mm", layout, x, 20)
    right, calls = launcher.mm(layout, x, None, "none"), itertools.count()

    def timer(call: Callable[[], Tensor]) -> float:
        assert_close(call(), right.cpu().double(), tol=1e-3)
        turn = next(calls)
        if turn == 2:
            raise RuntimeError("out of resources")
        return 1.0 + abs(turn - 3)

    times = launcher.tune("mm", layout, x, timer)
    best = next(iter(times))
    assert times[best] == 1.0
    assert own in times
    assert best != own
    if ON_GPU:
        assert launcher.chosen("mm", layout, x, 20) == best
        tune.clear()
    assert launcher.chosen("mm", layout, x, 20) == own
    with pytest.raises(ValueError, match="needs dy"):
        launcher.tune("sddmm", layout, x, timer)
    tune.clear()
    calls = itertools.count(10)
    few = launcher.tune("mm", layout, x, timer, few=4)
    assert len(few) == 4
    assert max(launcher.tuning.differences(own, tried) for tried in few) == 1
    assert launcher.tuning.is_known("mm", layout, x, "ieee")
    assert not launcher.tuning.is_known("mm", layout, x[:1], "ieee")
    if ON_GPU:  # what a conversion asks for: once
        tune.clear()
        for known in (False, True):
            before = next(calls)
            launcher.tune_forward(layout, x, timer)
            assert (next(calls) > before + 1) is not known


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(op: str, block: tuple[int, int], dtype: torch.dtype, given: torch.dtype | None = None) -> str:
        scale = random_scale(64) if dtype == torch.int8 else None
        layout = pack("bsr", random_weight("bsr", 64, 64, dtype, 0.5, block), block, scale).to(device=DEVICE)
        return str(launcher.why_not(op, layout, matrix(2, 64, dtype=given or dtype)))

    assert "sides of 16, 32, 64 or 128" in why("mm", (4, 4), torch.float32)
    assert "sides of 16, 32, 64 or 128" in why("mm", (48, 16), torch.float32)
    assert "float64 is not supported" in why("mm", (16, 16), torch.float64)
    assert "at least 32 columns" in why("mm", (32, 16), torch.int8)
    assert "mm only" in why("mm_t", (32, 32), torch.int8)
    assert "no gradient" in why("sddmm", (32, 32), torch.int8, torch.float32)
    assert "must agree" in why("mm", (32, 32), torch.float16, torch.float32)
    if not ON_GPU:
        assert "bfloat16 wrongly" in why("mm", (32, 32), torch.bfloat16)
    monkeypatch.setenv("SPARSEKERN_FP32", "fp16")
    with pytest.raises(ValueError, match="SPARSEKERN_FP32 must be one of"):
        launcher.fp32_precision()
    for named in ("ieee", "tf32", "tf32x3"):
        monkeypatch.setenv("SPARSEKERN_FP32", named)
        assert launcher.fp32_precision() == named
    monkeypatch.delenv("SPARSEKERN_FP32")
    assert launcher.fp32_precision() == "tf32x3"


def test_convolutions_that_cannot_be_run() -> None:
    x = matrix(1, 24, 5, 5, dtype=torch.float32)
    for shape, block, kernel, order, groups, message in (
        ((32, 216), (16, 16), 3, "rsc", 1, "16 columns do not divide the 24 channels"),
        ((32, 216), (16, 16), 3, "crs", 1, "order 'rsc'"),
        ((48, 108), (32, 16), 3, "rsc", 2, "inside one"),
    ):
        layout = pack("bsr", random_weight("bsr", *shape, block=block), block).to(device=DEVICE)
        with pytest.raises(NotImplementedError, match=message):
            conv2d(x, layout, kernel_size=kernel, order=order, groups=groups, backend="triton")
    depthwise = pack("bsr", random_weight("bsr", 32, 9, block=(16, 16)), (16, 16)).to(device=DEVICE)
    with pytest.raises(NotImplementedError, match="it is depthwise: of the 9 weights of a channel"):
        conv2d(matrix(1, 32, 5, 5, dtype=torch.float32), depthwise, kernel_size=3, groups=32, backend="triton")
    with pytest.raises(NotImplementedError, match="this weight is csr"):
        conv2d(x, pack("csr", torch.ones(8, 216)).to(device=DEVICE), order="rsc", backend="triton")


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_warm_call_neither_waits_nor_allocates_indices() -> None:
    """No synchronisation after the first call, and a captured graph gives the same bits on new inputs."""
    _, layout = weight(256, 256, (64, 64), torch.bfloat16)
    x = matrix(32, 256, dtype=torch.bfloat16)
    right = launcher.mm(layout, x, None, "none")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launcher.mm(layout, x, None, "none")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launcher.mm(layout, x, None, "none")
    y.zero_()
    graph.replay()
    assert torch.equal(y, right)
