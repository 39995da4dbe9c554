"""The gradients of 2:4 products on the CUDA backend, in the emulator: mm_t, sddmm, dynamic training."""

from __future__ import annotations

import pytest
import torch

from sparsekern import testing
from sparsekern._library import MM_T, SDDMM
from sparsekern.nn import DynamicSparseLinear
from sparsekern.sp24 import cuda, dynamic, fragments, pack, repack
from sparsekern.sp24.pack import prune_mask, transposable_mask
from sparsekern.testing import assert_close, random_dense, reference_mm_t, reference_sddmm

WIDE = (torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (72, 136), (20, 36), (1, 8))
pytestmark = pytest.mark.usefixtures("emulated")
types = pytest.mark.parametrize("dtype", WIDE, ids=str)


def weight(n: int, k: int, dtype: torch.dtype, mask: str) -> torch.Tensor:
    w = random_dense(n, k, dtype=dtype, seed=1)
    return w.where(kept_by(mask, w), 0)


def kept_by(mask: str, w: torch.Tensor) -> torch.Tensor:
    """What the mask keeps, found on the CPU: of ties a card may keep any."""
    found = prune_mask(w.cpu()) if mask == "top2" else transposable_mask(w.cpu())
    return found.to(w.device)


@types
@pytest.mark.parametrize("mask", dynamic.MASKS)
def test_mm_t(dtype: torch.dtype, mask: str) -> None:
    for n, k in SHAPES:
        dense = weight(n, k, dtype, mask)
        layout = pack(dense)
        assert cuda.transposable(layout) == (mask == "transposable" or n == 1)
        for m in (1, 7):
            dy = random_dense(m, n, dtype=dtype, seed=2)
            assert_close(MM_T["sp24"](*layout.parts, dy, "cuda"), reference_mm_t(dense, dy), dtype)


@types
def test_w_t_follows_the_values(dtype: torch.dtype) -> None:
    """The second packing is made once for each state of the values, in the same memory."""
    layout = pack(weight(64, 72, dtype, "transposable"))
    first = cuda.packed_t(layout)
    assert cuda.packed_t(layout) is first
    with torch.no_grad():
        layout.values.mul_(-2)
    assert cuda.packed_t(layout) is first
    assert torch.equal(first.cpu(), fragments.pack(pack(layout.unpack().t().cpu())))


@types
def test_sddmm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered from slices of 64 rows: no more of the dense gradient is ever there."""
    for n, k in (*SHAPES, (200, 40), (7, 13)):
        monkeypatch.setattr(cuda, "SLICE", 64 * k * 2)
        assert cuda.slice_rows(k, 2) == 64
        layout = pack(random_dense(n, k, dtype=dtype, seed=3), prune=True)
        for m in (0, 1, 9):
            dy, x = random_dense(m, n, dtype=dtype, seed=4), random_dense(m, k, dtype=dtype, seed=5)
            with testing.poisoned():
                out = SDDMM["sp24"](*layout.parts, dy, x, "cuda")
            assert_close(out, layout.sample(reference_sddmm(dy, x)), dtype)


@types
@pytest.mark.parametrize("mask", dynamic.MASKS)
def test_pruned_in_one_pass(dtype: torch.dtype, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed on the device is what the host packs, and the products find their fragments ready."""
    w = random_dense(68, 100, dtype=dtype, seed=6)
    layout = dynamic.prune(w, mask, "cuda")
    assert torch.equal(layout.unpack().cpu(), dynamic.prune(w.cpu(), mask).unpack())
    for name in ("to_fragments", "transpose"):
        monkeypatch.setattr(repack, name, None)  # not needed any more
    assert torch.equal(cuda.packed(layout), fragments.pack(layout))
    assert cuda.transposable(layout) == (mask == "transposable")
    if mask == "transposable":
        assert torch.equal(cuda.packed_t(layout).cpu(), fragments.pack(pack(layout.unpack().t().cpu())))


@types
@pytest.mark.parametrize("mask", dynamic.MASKS)
def test_dynamic_training(dtype: torch.dtype, mask: str) -> None:
    """Two steps of DynamicSparseLinear on the kernels: outputs and gradients in closed form."""
    layer = DynamicSparseLinear(72, 64, dtype=dtype, mask=mask, decay=0.25)
    layer.backend = "cuda"
    for step in range(2):
        with torch.no_grad():
            layer.weight.copy_(random_dense(64, 72, dtype=dtype, seed=7 + step))
        x, dy = random_dense(9, 72, dtype=dtype, seed=9).requires_grad_(), random_dense(9, 64, dtype=dtype, seed=10)
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        w = layer.weight.detach()
        kept = w.where(kept_by(mask, w), 0).double()
        assert_close(y, x.detach().double() @ kept.t() + layer.bias.detach().double(), dtype)
        assert_close(x.grad, dy.double() @ kept, dtype)
        expected = dy.double().t() @ x.detach().double() + 0.25 * (w.double() - kept)
        assert_close(layer.weight.grad, expected, dtype, tol=2 * testing.TOLERANCE[dtype])


def test_a_layout_of_eight_bits_is_not_transposed() -> None:
    layout = pack(testing.random_weight("sp24", 16, 32, torch.int8), scale=testing.random_scale(16))
    assert not cuda.transposable(layout)
