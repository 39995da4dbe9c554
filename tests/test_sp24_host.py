"""The compiled sp24 kernels: every token count, type, tail and instruction set against float64."""

from __future__ import annotations

import pytest
import torch

from sparsekern import _ext, sp24
from sparsekern.sp24 import Sp24
from sparsekern.sp24.layout import LEGAL_NIBBLES, padded
from sparsekern.testing import (
    assert_close,
    guarded_layout,
    host_isa,
    poisoned,
    random_dense,
    random_scale,
    random_weight,
    reference_mm,
    reference_mm_t,
    reference_sddmm,
)

pytestmark = pytest.mark.skipif(_ext.why_not_host() is not None, reason="the host module is not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def isas() -> list[str]:
    if _ext.why_not_host() is not None:
        return []
    return [name for name in _ext.host().built_isas() if name in _ext.host().supported_isas()]


def host_mm(layout, x, bias=None, activation="none"):  # type: ignore[no-untyped-def]
    from sparsekern.sp24 import host

    assert host.why_not("mm", layout, x) is None
    guarded, check = guarded_layout(layout)
    with poisoned():
        y = host.mm(guarded, x, bias, activation)
    check()
    return y


def weight(n, k, dtype, density):  # type: ignore[no-untyped-def]
    return random_weight("sp24", max(n, 1), max(k, 1), dtype, density=density)[:n, :k].contiguous()


@pytest.fixture(params=isas())
def isa(request):  # type: ignore[no-untyped-def]
    with host_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_token_count(isa, dtype):  # type: ignore[no-untyped-def]
    w = random_weight("sp24", 37, 107, dtype)
    layout, x, bias = sp24.pack(w), random_dense(130, 107, dtype=dtype, seed=1), random_dense(37, dtype=dtype)
    ref = reference_mm(w, x, bias)
    for m in range(131):
        assert_close(host_mm(layout, x[:m], bias), ref[:m], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "k"), [(0, 8), (8, 0), (1, 1), (3, 4), (17, 24), (5, 520), (70, 1032), (33, 64), (130, 8)]
)
def test_shapes(isa, dtype, n, k):  # type: ignore[no-untyped-def]
    w = weight(n, k, dtype, density=0.4)
    for m in (0, 1, 2, 3, 6, 33):
        x = random_dense(m, k + 3, dtype=dtype, seed=m)[:, :k]
        assert_close(host_mm(sp24.pack(w), x), reference_mm(w, x), dtype)


@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.int8])
def test_int8(isa, x_dtype):  # type: ignore[no-untyped-def]
    w, scale = random_weight("sp24", 37, 1100, torch.int8), random_scale(37)
    layout, bias = sp24.pack(w, scale=scale), random_dense(37)
    for m in (1, 2, 5, 16, 40):
        x = random_dense(m, 1100, dtype=x_dtype, seed=m)
        y = host_mm(layout, x, bias, "relu")
        expected = torch.float32 if x_dtype == torch.int8 else x_dtype
        assert_close(y, reference_mm(w.double() * scale.double()[:, None], x, bias, "relu"), expected)


def test_int8_sums_are_exact(isa):  # type: ignore[no-untyped-def]
    n, k = 3, 70_000
    w = torch.full((n, k), 127, dtype=torch.int8) * random_weight("sp24", n, k).ne(0)
    x = torch.full((2, k), -128, dtype=torch.int8)
    y = host_mm(sp24.pack(w, scale=torch.ones(n)), x)
    assert torch.equal(y, (x.long() @ w.long().t()).float())


def test_each_nibble(isa):  # type: ignore[no-untyped-def]
    metadata = torch.tensor([low | high << 4 for low in LEGAL_NIBBLES for high in LEGAL_NIBBLES], dtype=torch.uint8)
    values = random_dense(1, 4 * len(metadata))
    layout = Sp24(values=values, metadata=metadata[None], shape=(1, 8 * len(metadata)))
    x = random_dense(3, 8 * len(metadata), seed=1)
    assert_close(host_mm(layout, x), reference_mm(layout.unpack(), x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (1, 1), (17, 24), (70, 1032), (37, 107)])
def test_gradients(isa, dtype, n, k):  # type: ignore[no-untyped-def]
    from sparsekern.sp24 import host

    w = weight(n, k, dtype, density=0.4)
    layout = sp24.pack(w)
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
    layout, x = sp24.pack(w), random_dense(40, 64, dtype=dtype, seed=1)
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
    w, x, bias = random_weight("sp24", 19, 40), random_dense(7, 40, seed=1), random_dense(19, seed=2)
    assert_close(host_mm(sp24.pack(w), x, bias, activation), reference_mm(w, x, bias, activation))


def test_threads_agree(isa):  # type: ignore[no-untyped-def]
    w = random_weight("sp24", 1030, 1040)
    x = random_dense(5, 1040)
    from sparsekern.testing import threads

    with threads(1):
        one = host_mm(sp24.pack(w), x)
    with threads(3):
        three = host_mm(sp24.pack(w), x)
    assert torch.equal(one, three)


# Packing ----------------------------------------------------------------------------------------------------


def host_pack(dense, top2=False):  # type: ignore[no-untyped-def]
    n, k = dense.shape
    values = dense.new_empty(n, padded(k) // 2)
    metadata = torch.empty(n, padded(k) // 8, dtype=torch.uint8)
    entry = _ext.host().sp24_pack_top2 if top2 else _ext.host().sp24_pack
    bad = entry(
        dense.data_ptr(),
        _ext.DTYPES[dense.dtype],
        n,
        k,
        dense.stride(0),
        values.data_ptr(),
        metadata.data_ptr(),
        2,
    )
    return values, metadata, bad


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 8), (3, 0), (1, 1), (5, 13), (7, 24), (300, 500)])
def test_pack_is_the_oracles(isa, dtype, n, k):  # type: ignore[no-untyped-def]
    w = weight(n, k, dtype, density=0.35)
    expected = Sp24(
        values=w.new_zeros(n, padded(k) // 2),
        metadata=torch.zeros(n, padded(k) // 8, dtype=torch.uint8),
        shape=(n, k),
    )
    with poisoned():
        values, metadata, bad = host_pack(w)
    assert bad in (-1, None)
    packed = Sp24(
        values=values, metadata=metadata, shape=(n, k), scale=random_scale(n) if dtype == torch.int8 else None
    ).check()
    assert torch.equal(packed.unpack(), w)
    assert expected.shape == packed.shape
    dense = torch.empty_like(w)
    _ext.host().sp24_unpack(values.data_ptr(), metadata.data_ptr(), _ext.DTYPES[dtype], n, k, dense.data_ptr(), 2)
    assert torch.equal(dense, w)
    col = torch.empty(n, padded(k) // 2, dtype=torch.int32)
    _ext.host().sp24_columns(metadata.data_ptr(), n, k, col.data_ptr(), 2)
    assert torch.equal(col.long(), packed.columns())


def test_pack_specials(isa):  # type: ignore[no-untyped-def]
    nan, inf = float("nan"), float("inf")
    rows = [
        [-0.0, 1, -0.0, 2],
        [nan, 0, 0, inf],
        [0, 0, 0, 0],
        [1e-45, 0, -1e-45, 0],
        [0, 0, 3, 0],
        [4, 0, 0, 0],
    ]
    w = torch.tensor(rows).repeat(1, 5)
    values, metadata, bad = host_pack(w)
    assert bad == -1
    assert [int(b) & 15 for b in metadata[:, 0]] == [0xD, 0xC, 0xE, 0x8, 0xE, 0xC]
    assert torch.equal(
        Sp24(values=values, metadata=metadata, shape=tuple(w.shape)).unpack().nan_to_num(7), w.nan_to_num(7)
    )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_pack_names_the_first_violation(isa, dtype):  # type: ignore[no-untyped-def]
    for row, group, k in ((0, 0, 64), (5, 7, 64), (299, 15, 64), (17, 10, 43)):
        w = random_weight("sp24", 300, k, dtype)
        for r, g in ((row, group), (299, 15 if k == 64 else 10)):
            w[r, 4 * g : 4 * g + 3] = 1
        assert host_pack(w)[2] == row * (padded(k) // 4) + group


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_top2(isa, dtype):  # type: ignore[no-untyped-def]
    w = (random_dense(67, 101, seed=3) * 2).round().to(dtype)  # many ties
    w[0, :8] = torch.tensor([-128, 127, 127, -127, 0, 0, 0, 0]).to(dtype)
    values, metadata, _ = host_pack(w, top2=True)
    wide = w.float()
    order = torch.nn.functional.pad(wide, (0, 3)).reshape(67, -1, 4).abs().argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros(67, 26, 4).scatter_(-1, order[..., :2], 1).reshape(67, -1)[:, :101]
    scale = random_scale(67) if dtype == torch.int8 else None
    assert torch.equal(
        Sp24(values=values, metadata=metadata, shape=(67, 101), scale=scale).check().unpack().float(), wide * keep
    )


def test_check_finds_the_first_illegal_nibble(isa):  # type: ignore[no-untyped-def]
    check = _ext.host().sp24_check
    good = torch.full((200,), 0xE4, dtype=torch.uint8)
    assert check(good.data_ptr(), 200) == -1
    assert check(0, 0) == -1
    for place in (0, 1, 63, 64, 131, 398, 399):
        for nibble in set(range(16)) - set(LEGAL_NIBBLES):
            bad = good.clone()
            bad[place // 2] = 0xE0 | nibble if place % 2 == 0 else nibble << 4 | 0x4
            bad[199] = bad[199] if place >= 398 else 0
            assert check(bad.data_ptr(), 200) == place
