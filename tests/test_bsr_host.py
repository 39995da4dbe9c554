"""The compiled block-sparse kernels against a float64 oracle, on every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch

from sparsekern import _ext, bsr
from sparsekern.bsr import host
from sparsekern.bsr.layout import Bsr

if _ext.why_not_host():
    pytest.skip(_ext.why_not_host(), allow_module_level=True)
_host = _ext.host()
ISAS = [isa for isa in _host.built_isas() if isa in _host.supported_isas()]
BLOCKS = [(16, 16), (32, 32), (64, 64), (4, 1), (1, 8), (16, 32), (5, 7), (8, 48), (24, 20), (1, 1)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.fixture(params=ISAS)
def isa(request):
    before = _host.active_isa()
    _host.set_active_isa(request.param)
    yield request.param
    _host.set_active_isa(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output begins as NaN (int8: 77), so that an element that is not written shows."""
    real = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def make(n, k, block, density=0.4, dtype=torch.float32, seed=0, empty_rows=()):
    g = torch.Generator().manual_seed(seed)
    (r, c), nb, kb = block, -(-n // block[0]), -(-k // block[1])
    mask = torch.rand(nb, kb, generator=g) < density
    mask[list(empty_rows)] = False
    if dtype == torch.int8:
        dense = torch.randint(-128, 128, (nb * r, kb * c), generator=g).to(torch.int8)
    else:
        dense = torch.randn(nb * r, kb * c, generator=g).to(dtype)
    dense[n:] = 0
    dense[:, k:] = 0
    blocks = dense.reshape(nb, r, kb, c).transpose(1, 2)
    crow = torch.zeros(nb + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    scale = torch.rand(n, generator=g) * 0.01 if dtype == torch.int8 else None
    return Bsr(
        values=blocks[mask].contiguous(),
        crow=crow,
        col=mask.nonzero()[:, 1].to(torch.int32),
        shape=(n, k),
        block=block,
        scale=scale,
    ).check()


def dense64(w):
    d = w.unpack().double()
    return d if w.scale is None else d * w.scale.double()[:, None]


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(out, ref):
    assert out.shape == ref.shape
    if ref.numel() == 0:
        return 0.0
    return ((out.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()


def check(out, ref, dtype):
    """Norm-wise, and no element far off (a missed element would drown in the norm of a large result)."""
    assert error(out, ref) < TOLERANCE[dtype]
    if ref.numel():
        assert (out.double() - ref).abs().max() <= 40 * TOLERANCE[dtype] * ref.abs().max() + 1e-30


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_products(isa, block, dtype):
    for n, k, m in ((67, 131, 19), (128, 192, 33), (64, 64, 3), (96, 160, 1), (130, 70, 70)):
        w = make(n, k, block, dtype=dtype, empty_rows=(0,) if m == 33 else ())
        x, dy, bias = (
            normal(m, k, dtype=dtype),
            normal(m, n, dtype=dtype, seed=2),
            normal(n, dtype=dtype, seed=3),
        )
        d = dense64(w)
        check(host.mm(w, x, bias, "none"), x.double() @ d.t() + bias.double(), dtype)
        check(host.mm_t(w, dy), dy.double() @ d, dtype)
        got = host.sddmm(w, dy, x)
        assert got.dtype == dtype
        check(got, w.sample(dy.double().t() @ x.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(16, 16), (5, 7)], ids=str)
def test_every_token_count(isa, block, dtype):
    n, k = 83, 77
    w = make(n, k, block, dtype=dtype)
    x, dy, d = normal(130, k, dtype=dtype), normal(130, n, dtype=dtype, seed=2), dense64(w)
    y, dx = x.double() @ d.t(), dy.double() @ d
    for m in range(131):
        check(host.mm(w, x[:m], None, "none"), y[:m], dtype)
        check(host.mm_t(w, dy[:m]), dx[:m], dtype)
        if m < 40 or m % 9 == 0:
            check(host.sddmm(w, dy[:m], x[:m]), w.sample(dy[:m].double().t() @ x[:m].double()), dtype)


@pytest.mark.parametrize("block", [(32, 32), (16, 16), (5, 7), (4, 12), (8, 6)], ids=str)
def test_int8(isa, block):
    for n, k, m in ((67, 131, 1), (96, 160, 5), (128, 128, 40)):
        w = make(n, k, block, dtype=torch.int8)
        d, bias = dense64(w), normal(n)
        x8 = torch.randint(-128, 128, (m, k), generator=torch.Generator().manual_seed(5)).to(torch.int8)
        y = host.mm(w, x8, bias, "none")
        assert y.dtype == torch.float32
        whole = (x8.double() @ w.unpack().double().t()).float()  # the int32 sums are exact
        assert torch.allclose(y, whole * w.scale + bias, rtol=3e-7, atol=1e-6)
        for dtype in TOLERANCE:
            x, dy = normal(m, k, dtype=dtype), normal(m, n, dtype=dtype, seed=2)
            check(host.mm(w, x, bias.to(dtype), "none"), x.double() @ d.t() + bias.to(dtype).double(), dtype)
            check(host.mm_t(w, dy), dy.double() @ d, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_epilogue(isa, activation, dtype):
    w = make(72, 96, (32, 32), dtype=dtype, empty_rows=(1,))
    for m in (1, 4, 18, 50):
        x, bias = normal(m, 96, dtype=dtype), normal(72, dtype=dtype)
        for b in (bias, None):
            y = x.double() @ dense64(w).t()
            y = ACTIVATIONS[activation](y if b is None else y + b.double())
            check(host.mm(w, x, b, activation), y, dtype)


def test_empty(isa):
    for n, k, m in ((0, 8, 3), (8, 0, 3), (8, 8, 0), (33, 17, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            w = make(n, k, (16, 16), density=0.0, dtype=dtype)
            bias = normal(n, dtype=dtype)
            x, dy = normal(m, k, dtype=dtype), normal(m, n, dtype=dtype)
            assert torch.equal(host.mm(w, x, bias, "relu"), torch.relu(bias).expand(m, n))
            assert torch.equal(host.mm(w, x, None, "none"), torch.zeros(m, n, dtype=dtype))
            assert torch.equal(host.mm_t(w, dy), torch.zeros(m, k, dtype=dtype))
            assert host.sddmm(w, dy, x).shape == w.values.shape
    w = make(40, 40, (16, 16), density=1.0)
    assert torch.equal(host.sddmm(w, torch.zeros(0, 40), torch.zeros(0, 40)), torch.zeros_like(w.values))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strides(isa, dtype):
    """Row strides are taken as they are; what lies between rows is never used."""
    w = make(96, 80, (16, 16), dtype=dtype)
    d = dense64(w)
    wide, wide_dy = normal(20, 200, dtype=dtype), normal(20, 200, dtype=dtype, seed=2)
    wide[:, 80:] = float("nan")
    wide_dy[:, 96:] = float("nan")
    x, dy = wide[:, :80], wide_dy[:, :96]
    assert not x.is_contiguous()
    check(host.mm(w, x, None, "none"), x.double() @ d.t(), dtype)
    check(host.mm_t(w, dy), dy.double() @ d, dtype)
    check(host.sddmm(w, dy, x), w.sample(dy.double().t() @ x.double()), dtype)
    flipped = x.t().contiguous().t()
    check(host.mm(w, flipped, None, "none"), x.double() @ d.t(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_do_not_change_a_bit(isa, dtype):
    w = make(512, 512, (32, 32), dtype=dtype, density=0.5)
    x, dy = normal(80, 512, dtype=dtype), normal(80, 512, dtype=dtype, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((host.mm(w, x, None, "none"), host.mm_t(w, dy), host.sddmm(w, dy, x)))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_not_finite(isa):
    """NaN and infinity in the activations reach exactly the outputs that they meet."""
    for dtype in TOLERANCE:
        w = make(64, 64, (16, 16), dtype=dtype, density=0.5)
        x = normal(20, 64, dtype=dtype)
        x[3, 7] = float("nan")
        x[5, 40] = float("inf")
        ref = x.double() @ dense64(w).t()
        bad = ~host.mm(w, x, None, "none").isfinite()
        touched = torch.zeros(20, 64, dtype=torch.bool)
        rows = w.block_rows()
        touched[3] = torch.zeros(4, dtype=torch.bool).index_fill(0, rows[w.col == 0], True).repeat_interleave(16)
        touched[5] = torch.zeros(4, dtype=torch.bool).index_fill(0, rows[w.col == 2], True).repeat_interleave(16)
        assert torch.equal(bad, touched), (isa, dtype)
        assert torch.equal(ref[~touched].isfinite(), torch.ones_like(ref[~touched], dtype=torch.bool))


def test_transpose_index():
    w = make(100, 90, (8, 16), density=0.3)
    crow_t, row_t, gather_t = host.transpose_index(w)
    order = torch.argsort(w.col.long(), stable=True)
    assert torch.equal(gather_t.long(), order)
    assert torch.equal(row_t.long(), w.block_rows()[order])
    assert torch.equal(crow_t.long(), torch.cat([torch.zeros(1).long(), w.col.long().bincount(minlength=6).cumsum(0)]))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.int8])
def test_pack(isa, block, dtype):
    n, k = 70, 93
    w = make(n, k, block, dtype=dtype, density=0.3)
    dense = w.unpack()
    stored = w.sample(torch.ones(n, k)).flatten(1).any(1)
    wide = torch.full((n, k + 9), 1).to(dtype)
    wide[:, :k] = dense
    if dtype != torch.int8:
        wide[0, 0], wide[1, 1] = float("nan"), -0.0
    packed = bsr.pack(wide[:, :k], block, scale=w.scale).check()
    assert stored.all()
    scaled = wide[:, :k] if w.scale is None else wide[:, :k] * w.scale[:, None]
    assert torch.equal(packed.to_dense().nan_to_num(5), scaled.nan_to_num(5))
    zero = -torch.zeros(n, k).to(dtype)
    assert bsr.pack(zero, block, scale=w.scale).values.shape == (0, *block)
