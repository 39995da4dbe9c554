"""The gradients of 2:4 products on the CUDA backend, in the emulator: mm_t, sddmm, dynamic training."""

from __future__ import annotations

import pytest
import torch

from sparsekern import testing
from sparsekern._library import MM_T, SDDMM
from sparsekern.nn import DynamicSparseLinear
from sparsekern.sp24 import config, cuda, dynamic, fragments, pack, repack
from sparsekern.sp24.pack import prune_mask, transposable_mask
from sparsekern.testing import assert_close, random_dense, reference_mm_t, reference_sddmm

WIDE = (torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (72, 136), (20, 36), (1, 8))
pytestmark = pytest.mark.usefixtures("emulated")
types = pytest.mark.parametrize("dtype", WIDE, ids=str)


@pytest.fixture(params=["hopper", "other cards"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of Hopper, or what other cards do."""
    if request.param != "hopper":
        monkeypatch.setattr(cuda, "_gradient", lambda *_: None)
    return request.param


def weight(n: int, k: int, dtype: torch.dtype, mask: str) -> torch.Tensor:
    w = random_dense(n, k, dtype=dtype, seed=1)
    return w.where(kept_by(mask, w), 0)


def kept_by(mask: str, w: torch.Tensor) -> torch.Tensor:
    """What the mask keeps, found on the CPU: of ties a card may keep any."""
    found = prune_mask(w.cpu()) if mask == "top2" else transposable_mask(w.cpu())
    return found.to(w.device)


@types
@pytest.mark.parametrize("mask", dynamic.MASKS)
def test_mm_t(dtype: torch.dtype, mask: str, card: str) -> None:
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
def test_sddmm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, card: str) -> None:
    """On other cards than Hopper's gathered from slices of 64 rows: no more of the dense gradient is ever there."""
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
@pytest.mark.parametrize("processors", [1, 5])
def test_gradients_of_hopper(dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel, on tiles that are ragged on all sides and cut between workers; rows that lie anywhere."""
    monkeypatch.setattr(cuda, "transposable", lambda _: False)
    n, k, m = 200, 300, 150
    dense = weight(n, k, dtype, "top2")
    layout = pack(dense)
    wide = torch.full((m, 512), float("nan"), dtype=dtype)
    dy, x = wide[:, 8 : 8 + n], wide[:, 208 : 208 + k]
    dy.copy_(random_dense(m, n, dtype=dtype, seed=2))
    x.copy_(random_dense(m, k, dtype=dtype, seed=3))
    for number, kernel in enumerate(cuda.kernels(cuda.CUDA_DTYPES[dtype])):
        op = kernel.family.removesuffix("_sm90")
        if op not in ("mm_t", "sddmm"):
            continue
        rows, columns, depth = (k, m, n) if op == "mm_t" else (n, k, m)
        tiles = -(-rows // kernel.rows) * -(-columns // kernel.tokens)
        workers = max(1, min(processors // kernel.cluster, tiles * -(-depth // 64)))
        for streamed in {0, tiles} if workers <= tiles else {tiles}:
            how = config.Choice(number, workers, streamed, tiles, 0.0)
            monkeypatch.setattr(cuda, "_gradient", lambda *_, how=how: how)
            with testing.poisoned():
                if op == "mm_t":
                    assert_close(cuda.mm_t(layout, dy), reference_mm_t(dense, dy.contiguous()), dtype)
                else:
                    want = layout.sample(reference_sddmm(dy.contiguous(), x.contiguous()))
                    assert_close(cuda.sddmm(layout, dy, x), want, dtype)


@types
def test_every_number_of_tokens_has_gradients(dtype: torch.dtype) -> None:
    layout = pack(weight(40, 72, dtype, "top2"))
    dense = layout.unpack()
    for m in (*range(1, 20), 63, 64, 65, 127, 128, 129):
        dy, x = random_dense(m, 40, dtype=dtype, seed=2), random_dense(m, 72, dtype=dtype, seed=3)
        with testing.poisoned():
            assert_close(cuda.mm_t(layout, dy), reference_mm_t(dense, dy), dtype)
            assert_close(cuda.sddmm(layout, dy, x), layout.sample(reference_sddmm(dy, x)), dtype)


@types
def test_gradients_of_sums(dtype: torch.dtype) -> None:
    """The gradient of y.sum() is one number everywhere, that of y.sum(0) one row: copied before TMA reads them."""
    layout = pack(weight(40, 72, dtype, "top2"))
    x = random_dense(9, 72, dtype=dtype, seed=3)
    for dy in (torch.ones(1, 1, dtype=dtype).expand(9, 40), random_dense(1, 40, dtype=dtype, seed=2).expand(9, 40)):
        assert_close(cuda.mm_t(layout, dy), reference_mm_t(layout.unpack(), dy.contiguous()), dtype)
        assert_close(cuda.sddmm(layout, dy, x), layout.sample(reference_sddmm(dy.contiguous(), x)), dtype)


def test_choices_of_gradients() -> None:
    """On Hopper alone, where its code was built; all work is dealt out, to clusters that are there at once."""
    for dtype in (1, 2):
        kernels = cuda.kernels(dtype)
        for op in ("mm_t", "sddmm"):
            for m, n, k_blocks in ((1, 1, 1), (64, 4096, 64), (2048, 14336, 64), (4096, 4096, 216)):
                for processors in (1, 132):
                    given = {"capability": 90, "processors": processors, "aligned": True, "op": op}
                    found = config.candidates(kernels, m, n, k_blocks, **given)
                    assert found
                    for choice in found:
                        kernel = kernels[choice.kernel]
                        assert kernel.family == f"{op}_sm90"
                        assert choice.workers <= config.resident_clusters(processors, kernel.cluster)
                        assert choice.tiles * kernel.rows * kernel.tokens >= n * m
                    assert not config.candidates(kernels, m, n, k_blocks, **given | {"capability": 100})
                    assert not config.candidates(kernels, m, n, k_blocks, **given, code=80)


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
