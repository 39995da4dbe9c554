"""csr on the CPU: every product on every instruction set against float64, packing, streams and threads."""

from __future__ import annotations

import pytest
import torch

from sparsekern._ext import DTYPES, host, why_not_host
from sparsekern.csr import Csr, pack

if why_not_host() is not None:
    pytest.skip("the compiled CPU module is missing", allow_module_level=True)

from sparsekern.csr import host as csr

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
ISAS = [name for name in host().built_isas() if name in host().supported_isas()]
ACTIVATIONS = {
    "none": lambda t: t,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.fixture(params=ISAS)
def isa(request):
    before = host().active_isa()
    host().set_active_isa(request.param)
    yield request.param
    host().set_active_isa(before)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """new_empty hands out NaN, so that an element that no kernel writes is seen."""
    real = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        made = real(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def weight(n, k, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) >= sparsity)
    w[n // 2 : n // 2 + 2] = 0  # empty rows
    return w.to(dtype)


def strided(m, k, dtype, seed):
    """Rows that are longer than k and do not begin at the allocation."""
    return torch.randn(m, k + 5, generator=torch.Generator().manual_seed(seed))[:, 2 : k + 2].to(dtype)


def view(m, k, dtype, seed):
    wide = torch.empty(m, k + 5, dtype=dtype)
    wide[:, 2 : k + 2] = strided(m, k, dtype, seed)
    return wide[:, 2 : k + 2]


def error(got, want):
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check_products(w, m, bias=True, activation="none", uses=1):
    layout, dense, dtype = pack(w), w.double(), w.dtype
    n, k = w.shape
    x, dy = view(m, k, dtype, 1), view(m, n, dtype, 2)
    b = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if bias else None
    want = x.double() @ dense.t() + (b.double() if bias else 0)
    for _ in range(uses):
        y = csr.mm(layout, x, b, activation)
        assert error(y, ACTIVATIONS[activation](want)) < TOLERANCE[dtype]
    assert error(csr.mm_t(layout, dy), dy.double() @ dense) < TOLERANCE[dtype]
    assert error(csr.sddmm(layout, dy, x), (dy.double().t() @ x.double())[w != 0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", [*range(0, 131), 257, 300])
def test_every_token_count(m):
    check_products(weight(75, 333, 0.7), m)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 17, 40, 130])
def test_every_instruction_set(isa, m, dtype):
    check_products(weight(67, 401, 0.8, dtype), m, activation="silu", uses=3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 0), (0, 5), (1, 3000), (700, 9), (33, 257), (600, 300)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_shapes(isa, shape, sparsity):
    w = torch.randn(shape) * (torch.rand(shape) >= sparsity)
    for m in (0, 1, 2, 5, 90):
        check_products(w, m, bias=m != 5, uses=2)


@pytest.mark.parametrize("m", [1, 2, 9, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, activation, m):
    check_products(weight(70, 300, 0.6), m, activation=activation)


def test_activation_tails(isa):
    """The epilogue far out, where 1 + erf and 1 + tanh cancel; infinities and NaN as torch has them."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e30, float("inf"), float("-inf"), float("nan")])])
    layout = pack(torch.ones(1, 1))
    for name, function in ACTIVATIONS.items():
        got = csr.mm(layout, x[:, None], None, name)[:, 0]
        with torch.no_grad():
            want = function(x.double())
        torch.testing.assert_close(got[4001:].double(), want[4001:], equal_nan=True)
        exact = want[:4001]
        if name == "gelu":  # torch's own 1 + erf has lost everything out here
            exact = x[:4001].double() * torch.special.erfc(-x[:4001].double() / 2**0.5) / 2
        if name == "gelu_tanh":
            u = (2 / torch.pi) ** 0.5 * (x[:4001].double() + 0.044715 * x[:4001].double() ** 3)
            exact = x[:4001].double() * torch.sigmoid(2 * u)
        torch.testing.assert_close(got[:4001].double(), exact, rtol=2e-5, atol=1e-37)


def test_dense_rows_and_columns(isa):
    """Skew: one full row, one full column, whole tiles empty."""
    w = torch.zeros(300, 700)
    w[7], w[:, 413] = torch.randn(700), torch.randn(300)
    w[100:140, 500:540] = torch.randn(40, 40)
    for m in (1, 3, 64, 129):
        check_products(w, m, uses=2)


@pytest.mark.parametrize("m", [1, 2, 16, 64, 256])
def test_threads_agree(m):
    """The same bits on any number of threads, above the serial threshold."""
    w = weight(1500, 1100, 0.5)
    x, dy = torch.randn(m, 1100), torch.randn(m, 1500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            layout = pack(w)
            results.append((csr.mm(layout, x, None, "none"), csr.mm_t(layout, dy), csr.sddmm(layout, dy, x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    assert error(results[0][0], x.double() @ w.double().t()) < 2e-6


def test_optimizer_step_is_seen():
    """The copy of the values in walking order is made on second use and follows the values' version."""
    w = weight(256, 1024, 0.5)
    layout, x = pack(w), torch.randn(128, 1024)
    for step in range(3):
        for _ in range(3):
            assert error(csr.mm(layout, x, None, "none"), x.double() @ (w.double() * 2**step).t()) < 2e-6
        layout.values.mul_(2)


def test_topology_change_is_seen():
    layout, x = pack(weight(64, 1024, 0.5)), torch.randn(128, 1024)
    csr.mm(layout, x, None, "none"), csr.mm(layout, x, None, "none")
    layout.col.copy_(1023 - layout.col.flip(0))
    layout.crow.copy_(layout.crow[-1] - layout.crow.flip(0))
    for _ in range(3):
        assert error(csr.mm(layout, x, None, "none"), x.double() @ layout.unpack().double().t()) < 2e-6


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (1, 1), (37, 91), (128, 515)])
def test_pack(isa, dtype, shape):
    n, k = shape
    w = (torch.randn(n, k) * 50 * (torch.rand(n, k) > 0.6)).to(dtype)
    wide = torch.zeros(n, k + 3, dtype=dtype)
    wide[:, 1 : k + 1] = w
    if dtype != torch.int8 and k > 3:
        wide[0, 1], wide[0, 2], wide[0, 3] = -0.0, float("nan"), float("inf")
    dense = wide[:, 1 : k + 1]
    layout = pack(dense)
    mask = dense != 0
    assert torch.equal(layout.crow, torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int())
    assert torch.equal(layout.col, mask.nonzero()[:, 1].int())
    assert torch.equal(layout.values.nan_to_num(7), dense[mask].nan_to_num(7))
    back = layout.to_dense()
    assert torch.equal(back.nan_to_num(7), torch.where(mask, dense, 0).nan_to_num(7))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("m", [1, 4, 100])
def test_int8_values_for_other_formats(isa, m, scale):
    """The entry that formats with row-major int8 values call: scale per row, bias of another type, no plan given."""
    n, k = 50, 300
    w = (torch.randn(n, k) * 40 * (torch.rand(n, k) > 0.5)).to(torch.int8)
    layout, x, y = pack(w), torch.randn(m, k), torch.full((m, n), float("nan"))
    scales, bias = torch.rand(n) if scale else None, torch.randn(n).bfloat16()
    host().csr_mm(
        *(
            layout.values.data_ptr(),
            DTYPES[torch.int8],
            layout.crow.data_ptr(),
            layout.col.data_ptr(),
            n,
            k,
            0,
            0,
            0,
        ),
        *(x.data_ptr(), 0, m, k, y.data_ptr(), 0, n),
        *(0 if scales is None else scales.data_ptr(), bias.data_ptr(), DTYPES[torch.bfloat16], 0, 2),
    )
    want = x.double() @ w.double().t() * (1 if scales is None else scales.double()) + bias.double()
    assert error(y, want) < 2e-6


def test_why_not():
    w, x = weight(8, 16, 0.5), torch.randn(2, 16)
    layout = pack(w)
    assert csr.why_not("mm", layout, x) is None
    assert "float64" in csr.why_not("mm", layout, x.double())
    assert "must agree" in csr.why_not("mm", layout, x.half())
    assert isinstance(layout, Csr)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0.5, 0.05])
def test_changes_through_data_are_seen(isa, dtype, density):
    """A change behind the version counter, of any one value or of the order of two, after the copy was made."""
    layout, x = pack(weight(133, 1027, density).to(dtype)), torch.randn(97, 1027).to(dtype)
    values, last = layout.values.data, layout.values.shape[0] - 1

    def swap(i, j):
        values[[i, j]] = values[[j, i]]

    changes = [lambda: values.mul_(-1), lambda: values.neg_(), lambda: swap(0, last), lambda: swap(1, 17)]
    changes += [lambda i=i: values[i].add_(8) for i in (0, 7, last // 2, last - 1, last)]
    for change in changes:
        for _ in range(3):
            csr.mm(layout, x, None, "none")
        change()
        for _ in range(3):
            got = csr.mm(layout, x, None, "none")
            want = x.double() @ layout.unpack().double().t()
            assert error(got, want) < {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


def test_inference_tensors_are_copied_too():
    with torch.inference_mode():
        layout, x = pack(weight(64, 1024, 0.5)), torch.randn(128, 1024)
        for _ in range(3):
            csr.mm(layout, x, None, "none")
        layout.values[7] = 50.0
        for _ in range(3):
            assert error(csr.mm(layout, x, None, "none"), x.double() @ layout.unpack().double().t()) < 2e-6
