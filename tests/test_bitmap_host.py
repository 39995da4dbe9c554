"""The compiled bitmap kernels: every token count, type, tail and instruction set against float64."""

from __future__ import annotations

import pytest
import torch

from sparsekern import _ext, bitmap
from sparsekern.testing import (
    assert_close,
    guarded_layout,
    host_isa,
    poisoned,
    random_dense,
    random_weight,
    reference_mm,
    reference_mm_t,
    reference_sddmm,
    skewed_weight,
    threads,
    with_empty_rows,
)

pytestmark = pytest.mark.skipif(_ext.why_not_host() is not None, reason="the host module is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def isas() -> list[str]:
    if _ext.why_not_host() is not None:
        return []
    return [name for name in _ext.host().built_isas() if name in _ext.host().supported_isas()]


def host_mm(layout, x, bias=None, activation="none"):  # type: ignore[no-untyped-def]
    from sparsekern.bitmap import host

    assert host.why_not("mm", layout, x) is None
    guarded, check = guarded_layout(layout)
    with poisoned():
        y = host.mm(guarded, x, bias, activation)
    check()
    return y


def weight(n, k, dtype, density):  # type: ignore[no-untyped-def]
    return random_weight("bitmap", max(n, 1), max(k, 1), dtype, density=density)[:n, :k].contiguous()


@pytest.fixture(params=isas())
def isa(request):  # type: ignore[no-untyped-def]
    with host_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_token_count(isa, dtype):  # type: ignore[no-untyped-def]
    w = random_weight("bitmap", 37, 107, dtype)
    layout, x, bias = (
        bitmap.pack(w),
        random_dense(130, 107, dtype=dtype, seed=1),
        random_dense(37, dtype=dtype),
    )
    ref = reference_mm(w, x, bias)
    for m in range(131):
        assert_close(host_mm(layout, x[:m], bias), ref[:m], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (1, 1), (3, 4), (17, 24), (5, 520), (70, 1032), (33, 64)])
def test_shapes(isa, dtype, density, n, k):  # type: ignore[no-untyped-def]
    w = with_empty_rows(weight(n, k, dtype, density=density), 0.2)
    for m in (0, 1, 2, 3, 6, 33):
        x = random_dense(m, k + 3, dtype=dtype, seed=m)[:, :k]
        assert_close(host_mm(bitmap.pack(w), x), reference_mm(w, x), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (1, 1), (17, 24), (70, 1032), (37, 107)])
def test_gradients(isa, dtype, n, k):  # type: ignore[no-untyped-def]
    from sparsekern.bitmap import host

    w = weight(n, k, dtype, density=0.4)
    layout = bitmap.pack(w)
    for m in (0, 1, 3, 33, 130):
        dy, x = (
            random_dense(m, n + 1, dtype=dtype, seed=m)[:, :n],
            random_dense(m, k, dtype=dtype, seed=m + 1),
        )
        assert host.why_not("mm_t", layout, dy) is None
        assert host.why_not("sddmm", layout, x) is None
        with poisoned():
            dx, dvalues = host.mm_t(layout, dy), host.sddmm(layout, dy, x)
        assert_close(dx, reference_mm_t(w, dy), dtype)
        assert_close(dvalues, layout.sample(reference_sddmm(dy, x)), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_extremes(isa, dtype):  # type: ignore[no-untyped-def]
    """Values that do not split into planes of bf16 take another kernel; results stay what floats give."""
    w = weight(40, 64, dtype, density=0.4)
    layout, x = bitmap.pack(w), random_dense(40, 64, dtype=dtype, seed=1)
    x[3], x[5, 7], x[9, 1] = torch.finfo(dtype).max / 1e4, float("inf"), float("nan")
    out, ref = host_mm(layout, x), x.float() @ w.float().t()
    fine = [i for i in range(40) if i not in (5, 9)]
    assert_close(out[fine], reference_mm(w, x)[fine], dtype)
    hit = w[:, 7] != 0
    assert not torch.isfinite(out[5, hit]).any()
    assert torch.isnan(out[9, w[:, 1] != 0]).all()
    assert torch.isnan(ref[9]).all()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_epilogue(isa, activation):  # type: ignore[no-untyped-def]
    w, x, bias = random_weight("bitmap", 19, 40), random_dense(7, 40, seed=1), random_dense(19, seed=2)
    assert_close(host_mm(bitmap.pack(w), x, bias, activation), reference_mm(w, x, bias, activation))


def test_threads_agree(isa):  # type: ignore[no-untyped-def]
    w, x = skewed_weight(1030, 1040, density=0.3), random_dense(5, 1040)
    with threads(1):
        one = host_mm(bitmap.pack(w), x)
    with threads(3):
        three = host_mm(bitmap.pack(w), x)
    assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 8), (3, 0), (1, 1), (5, 13), (7, 24), (300, 500)])
def test_pack(isa, dtype, n, k):  # type: ignore[no-untyped-def]
    w = weight(n, k, dtype, density=0.4)
    if n * k > 4 and dtype.is_floating_point:
        w.view(-1)[:3] = torch.tensor([-0.0, float("nan"), 0.0]).to(dtype)
    code, host = _ext.DTYPES[dtype], _ext.host()
    bits, offsets = torch.empty(n, (k + 7) // 8, dtype=torch.uint8), torch.empty(n + 1, dtype=torch.int64)
    host.bitmap_count(w.data_ptr(), code, n, k, k, bits.data_ptr(), offsets.data_ptr(), 2)
    with poisoned():
        values = w.new_empty(int(offsets[-1]))
        host.bitmap_fill(w.data_ptr(), code, n, k, k, bits.data_ptr(), offsets.data_ptr(), values.data_ptr(), 2)
    expected = bitmap.pack(w)
    assert torch.equal(bits, expected.bits)
    assert torch.equal(offsets, expected.offsets)
    assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))
    with poisoned():
        dense = torch.empty_like(w)
        col = torch.empty(len(values), dtype=torch.int32)
        host.bitmap_unpack(values.data_ptr(), bits.data_ptr(), offsets.data_ptr(), code, n, k, dense.data_ptr(), 2)
        host.bitmap_columns(bits.data_ptr(), offsets.data_ptr(), n, k, col.data_ptr(), 2)
    assert torch.equal(
        dense.nan_to_num(7) if dtype.is_floating_point else dense,
        expected.unpack().nan_to_num(7) if dtype.is_floating_point else w,
    )
    assert torch.equal(col.long(), (w != 0).nonzero()[:, 1])
