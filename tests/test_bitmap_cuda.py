"""bitmap on NVIDIA GPUs: fragment order, decoding and expansion in the emulator under every schedule."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from sparsekern import _plan
from sparsekern._plan import plans
from sparsekern.bitmap import Bitmap, cuda, fragments, pack
from sparsekern.ref import ACTIVATIONS
from sparsekern.testing import TOLERANCE, poisoned, random_dense, random_weight

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
ORDERS = tuple(fragments.ORDERS.values())


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """What no kernel writes is NaN, and bands around every output are checked."""
    with poisoned():
        yield


@pytest.fixture(params=sorted(fragments.ORDERS))
def order(request: pytest.FixtureRequest) -> Iterator[fragments.Order]:
    """The kernels of one order alone."""
    with mock.patch.object(cuda, "_orders", return_value=(request.param,)):
        yield fragments.ORDERS[request.param]


def weight(n: int, k: int, sparsity: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    w = random_weight("bitmap", n, k, dtype, 1 - sparsity, seed=n + k)
    w[n // 2 : n // 2 + 2] = 0  # empty rows
    return w


def view(m: int, columns: int, dtype: torch.dtype, seed: int, left: int = 3) -> Tensor:
    """Rows that are longer than `columns` and do not begin at the allocation, with NaN around them.

    For our own kernels only: torch's bfloat16 product on CPU multiplies what lies around a strided operand by zeros.
    """
    wide = torch.full((m, columns + 8), float("nan"), dtype=dtype)
    wide[:, left : columns + left] = random_dense(m, columns, dtype=dtype, seed=seed)
    return wide[:, left : columns + left]


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-2 * max(1, want.numel()) ** 0.5)
    assert error < 2 * TOLERANCE[got.dtype], error  # many tokens: rounded once more before the activation


def check_products(w: Tensor, m: int, bias: bool = True, activation: str = "none", left: int = 3) -> None:
    """`mm` of a view where a kernel of ours reads x, the dense products of contiguous operands."""
    layout, dense, dtype = pack(w), w.double(), w.dtype
    n, k = w.shape
    x, dy = view(m, k, dtype, 1, left), view(m, n, dtype, 2).contiguous()
    ours = dtype in HALVES and m <= cuda.DECODE and min(m, n, k) > 0 and cuda._choice(layout, m, x.device) is not None
    decoded = ours or (min(m, n, k) > 0 and cuda.by_rows(layout, m))
    b = random_dense(n, dtype=dtype, seed=3) if bias else None
    want = x.double() @ dense.t() + (b.double() if b is not None else 0)
    assert_near(cuda.mm(layout, x if decoded else x.contiguous(), b, activation), ACTIVATIONS[activation](want))
    assert_near(cuda.mm_t(layout, dy), dy.double() @ dense)
    assert_near(cuda.sddmm(layout, dy, x.contiguous()), (dy.double().t() @ x.double())[w != 0])


@pytest.mark.parametrize("shape", [(64, 32), (1, 1), (70, 100), (130, 257), (5, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fragments_are_lossless(
    shape: tuple[int, int], sparsity: float, order: fragments.Order, dtype: torch.dtype
) -> None:
    w = weight(*shape, sparsity, dtype)
    layout = pack(w)
    made = fragments.pack(layout, order)
    assert torch.equal(fragments.unpack(made, order, shape, dtype), w)
    assert made.records.numel() * 2 == int(made.offsets[-1]) * fragments.UNIT
    assert made.longest == max(made.offsets.diff().tolist(), default=0) * fragments.UNIT
    at = fragments.places(layout, made, order)
    assert torch.equal(made.records[at].view(dtype), layout.values)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (9, 3), (37, 30), (63, 31), (16, 17), (50, 60)])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_a_record_bit_by_bit(order: fragments.Order, row: int, column: int) -> None:
    """One weight in a tile: its bit in its lane's word, its value first, and what comes before the bits."""
    column %= order.columns
    w = torch.zeros(order.rows, order.columns, dtype=torch.bfloat16)
    w[row, column] = 3.0
    record = fragments.pack(pack(w), order).records
    h, t, e = column % 16 // 8, column % 8 // 2, column % 2
    r, g = row % 16 // 8, row % 8
    i, step = (row // 16, column // 16) if order.name == "sm80" else (column // 16, row // 16)
    head, bits = order.head, order.steps * 64
    expected = torch.zeros(order.steps * 32, dtype=torch.int64)
    expected[32 * step + 4 * g + t] = 1 << (16 * h + 8 * e + 2 * i + r)
    assert torch.equal(record[head : head + bits].view(torch.int32).long() & 0xFFFFFFFF, expected)
    assert record[head + bits :].view(torch.bfloat16).tolist() == [3.0] + [0.0] * 7
    if head:
        first = 2 * (head + bits)
        assert record[:head].tolist() == [first + 2 * (s > step) for s in range(4)] + [0] * 4


def test_stored_zeros_and_odd_values_keep_their_bits() -> None:
    """NaN, infinities, -0.0 and zeros that are stored (in training) are values like others."""
    layout = pack(torch.ones(3, 40, dtype=torch.bfloat16))
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16)
    layout = layout.with_values(odd.repeat(30))
    for order in ORDERS:
        back = fragments.unpack(fragments.pack(layout, order), order, (3, 40), torch.bfloat16)
        assert torch.equal(back.view(torch.int16), odd.repeat(30).view(3, 40).view(torch.int16))
        with pytest.raises(ValueError, match="16-bit"):
            fragments.pack(pack(torch.ones(2, 2)), order)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 15, 30, 64, 65])
def test_products(emulated: ModuleType, order: fragments.Order, m: int, dtype: torch.dtype) -> None:
    check_products(weight(70, 300, 0.5, dtype), m, activation="silu")


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("processors", [1, 3, 40])
def test_streams(emulated: ModuleType, order: fragments.Order, sparsity: float, processors: int) -> None:
    """Full and empty tiles; workers that begin and end inside of rows of tiles."""
    with mock.patch.object(cuda, "multiprocessors", return_value=processors):
        check_products(weight(200, 1000, sparsity), 3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 0), (0, 5), (1, 1500), (200, 9), (65, 33)], ids=str)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_shapes(emulated: ModuleType, order: fragments.Order, shape: tuple[int, int], m: int) -> None:
    check_products(weight(*shape, 0.5), m, bias=m != 5)


@pytest.mark.parametrize("left", range(8))
@pytest.mark.parametrize("k", [63, 64, 66, 68])
def test_alignments(emulated_once: ModuleType, order: fragments.Order, k: int, left: int) -> None:
    check_products(weight(30, k, 0.5), 4, left=left)


@pytest.mark.parametrize("m", range(0, 67))
def test_every_token_count(emulated_once: ModuleType, order: fragments.Order, m: int) -> None:
    check_products(weight(40, 70, 0.6), m)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [2, 70])
def test_activations(emulated_once: ModuleType, order: fragments.Order, activation: str, m: int) -> None:
    check_products(weight(35, 100, 0.6), m, activation=activation)


@pytest.mark.parametrize("m", [1, 4, 6])
def test_fp32(emulated: ModuleType, m: int) -> None:
    """No tensor core is exact enough: rows for a token or four, the dense product otherwise."""
    check_products(weight(70, 300, 0.5, torch.float32), m)


@pytest.mark.parametrize("m", [1, 2, 4, 5])
@pytest.mark.parametrize("sparsity", [0.85, 0.9])
def test_few_weights(emulated: ModuleType, m: int, sparsity: float) -> None:
    """Rows below a density, bits above it."""
    w = weight(70, 700, sparsity)
    layout = pack(w)
    assert cuda.by_rows(layout, m) == (m <= 4 and (m == 1 or sparsity == 0.9))
    with mock.patch.object(cuda, "_decode" if cuda.by_rows(layout, m) else "rows_of", side_effect=AssertionError):
        check_products(w, m)


def test_every_kernel(emulated_once: ModuleType) -> None:
    """Each of the list on a weight with one full tile among sparse ones."""
    w = weight(130, 200, 0.7)
    w[:64, 32:64] = 1.5
    layout, x = pack(w), view(64, 200, torch.bfloat16, 5)
    want = x.double() @ w.double().t()
    assert {kernel.order for kernel in cuda.kernels(1)} == set(fragments.ORDERS)
    for number, kernel in enumerate(cuda.kernels(1)):
        m = kernel.tokens
        with mock.patch.object(cuda, "_choice", return_value=(number, kernel, 3)):
            assert_near(cuda.mm(layout, x[:m], None, "none"), want[:m])


def test_new_values_are_seen(emulated_once: ModuleType, order: fragments.Order) -> None:
    """The records follow the values' version, in the memory that a captured graph knows, and the bits' version."""
    w = weight(70, 100, 0.5)
    layout, x = pack(w), view(3, 100, torch.bfloat16, 1)
    cuda.mm(layout, x, None, "none")
    before = cuda._packed(layout, order).fragments.records.data_ptr()
    layout.values.mul_(2)
    with mock.patch.object(fragments, "pack", side_effect=AssertionError("packed again")):
        assert_near(cuda.mm(layout, x, None, "none"), x.double() @ (2 * w).double().t())
        layout.values.mul_(0.5)
        with mock.patch.object(fragments, "places", side_effect=AssertionError("looked for again")):
            assert_near(cuda.mm(layout, x, None, "none"), x.double() @ w.double().t())
    assert cuda._packed(layout, order).fragments.records.data_ptr() == before
    kept = len(plans(layout.values))
    for _ in range(3):
        layout.bits.copy_(pack(w.flip(0)).bits)
        layout.offsets.copy_(pack(w.flip(0)).offsets)
        layout.values.copy_(pack(w.flip(0)).values)
        w = w.flip(0)
        assert_near(cuda.mm(layout, x, None, "none"), x.double() @ w.double().t())
    assert len(plans(layout.values)) == kept


def test_captured_graphs(emulated_once: ModuleType, order: fragments.Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's replays see values that change later; the first packing, which waits for the GPU, cannot be in it."""
    w = weight(70, 100, 0.5)
    layout, x = pack(w), view(3, 100, torch.bfloat16, 1)
    layout.values.requires_grad_()
    with torch.no_grad():
        cuda.mm(layout, x, None, "none")
        monkeypatch.setattr(_plan, "capturing", lambda _: True)
        monkeypatch.setattr(cuda, "capturing", lambda _: True)
        renewed = []
        real = cuda._Packed.renew
        monkeypatch.setattr(cuda._Packed, "renew", lambda *given: renewed.append(1) or real(*given))
        monkeypatch.setattr(fragments, "places", None)  # found before: a graph cannot wait
        assert_near(cuda.mm(layout, x, None, "none"), x.double() @ w.double().t())
        assert renewed  # packing is a part of every replay
        with pytest.raises(RuntimeError, match="once before a CUDA graph"):
            cuda.mm(pack(w.flip(0)), x, None, "none")


@pytest.mark.parametrize("m", [3, 40, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_endings(emulated_once: ModuleType, m: int, dtype: torch.dtype) -> None:
    """Scales of tokens, residuals, wider outputs: in the kernel where few tokens are decoded, else after it."""
    w = weight(70, 200, 0.6, dtype)
    layout, x = pack(w), view(m, 200, dtype, 1).contiguous()
    bias, scale = random_dense(70, seed=3), random_dense(m, seed=4).abs()
    for out in (None, torch.float32, torch.bfloat16):
        residual = random_dense(m, 70, dtype=out or dtype, seed=5)
        y = cuda.mm(layout, x, bias, "silu", x_scale=scale, residual=residual, beta=-0.5, out_dtype=out)
        assert y.dtype == (out or dtype)
        want = ACTIVATIONS["silu"](x.double() @ w.double().t() * scale[:, None].double() + bias.double())
        assert_near(y, want - 0.5 * residual.double())
    with mock.patch.object(cuda, "_dense", side_effect=AssertionError("written out")):
        if dtype in HALVES and m <= cuda.DECODE:
            cuda.mm(layout, x, None, "none", x_scale=scale)


@pytest.mark.parametrize(("card", "most"), [(80, 64), (86, 64), (87, 64), (89, 64), (120, 64)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_every_card_decodes_every_number_of_tokens(
    emulated_once: ModuleType, card: int, most: int, sparsity: float
) -> None:
    """Also those with 99 KB of shared memory for a block, and weights with a full tile."""
    layout = pack(weight(70, 100, sparsity))
    with (
        mock.patch.object(cuda, "_card", return_value=card),
        mock.patch.object(cuda, "_orders", return_value=("sm80",)),
    ):
        for m in range(1, most + 1):
            found = cuda._choice(layout, m, layout.device)
            assert found is not None
            longest = cuda._packed(layout, fragments.SM80).fragments.longest
            assert found[1].shared(longest) <= cuda.SHARED[card] * 1024
        check_products(weight(70, 100, sparsity), 20)


def test_hopper_without_its_kernels(emulated_once: ModuleType) -> None:
    """A card that runs another architecture's code takes the kernels that are there."""
    for card, code, orders in ((90, 80, ("sm80",)), (90, 90, ("sm90", "sm80")), (120, 90, ("sm80",))):
        with mock.patch.object(cuda, "_card", return_value=card), mock.patch.object(cuda, "code_on", return_value=code):
            assert cuda._orders(torch.device("cpu")) == orders


@pytest.mark.parametrize("rows", ["expanded", "overlapping"])
def test_rows_that_overlap(emulated_once: ModuleType, rows: str) -> None:
    """Copied before a tensor map would have to describe them."""
    w, flat = weight(70, 64, 0.5), random_dense(1, 512, dtype=torch.bfloat16, seed=1)
    x = flat[:, :64].expand(5, 64) if rows == "expanded" else flat[0].as_strided((5, 64), (8, 1))
    assert_near(cuda.mm(pack(w), x, None, "none"), x.double() @ w.double().t())


def test_why_not(emulated_once: ModuleType) -> None:
    layout = pack(weight(4, 4, 0.5))
    assert cuda.why_not("mm", layout, torch.ones(1, 4).bfloat16()) is None
    assert "must agree" in str(cuda.why_not("mm", layout, torch.ones(1, 4)))
    double = Bitmap(values=layout.values.double(), bits=layout.bits, offsets=layout.offsets, shape=layout.shape)
    assert "float64" in str(cuda.why_not("mm", double, torch.ones(1, 4).double()))
