"""Each instruction of csrc/device alone, against its dense definition in the PTX ISA, under every schedule."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from conftest import ON_CARD, runs_fp8_mma_sp
from emulator.build import build, build_probes
from torch import Tensor

from sparsekern._ext import CUDA_DTYPES, FP8
from sparsekern._sources import find_nvcc
from sparsekern.sp24 import fragments
from sparsekern.sp24 import pack as pack24
from sparsekern.sp24.layout import Sp24
from sparsekern.testing import random_dense

OPERANDS = (torch.bfloat16, torch.float16, torch.int8, FP8)
WIDE = (torch.bfloat16, torch.float16)


def operand(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small whole numbers: exact in every type, and so are the sums."""
    return (random_dense(rows, columns, seed=seed) * 2).round().clamp(-4, 4).float().to(dtype)


def sparse_operand(rows: int, columns: int, dtype: torch.dtype) -> tuple[Sp24, Tensor]:
    """A 2:4 weight with all six patterns and groups of fewer nonzeros, and its dense form in float64."""
    packed = pack24(operand(rows, columns, torch.float32, 1), prune=True)
    dense = packed.unpack().double()
    return Sp24(values=packed.values.to(dtype), metadata=packed.metadata, shape=packed.shape, scale=None), dense


def accumulators(dtype: torch.dtype, *shape: int) -> Tensor:
    kind = torch.int32 if dtype == torch.int8 else torch.float32
    return (random_dense(*shape, seed=7) * 5).round().to(kind)


def d_matrix(d: Tensor, rows: int) -> Tensor:
    """Registers [threads, N / 2] of D as a matrix [rows, N]: rows g and g + 8 of each warp's 16, columns 2t, 2t + 1."""
    warps, count = len(d) // 32, d.shape[1]
    split = d.view(warps, 8, 4, count // 4, 2, 2)  # warp, g, t, column tile, row half, column
    return split.permute(0, 4, 1, 3, 2, 5).reshape(rows, 2 * count)


def b_registers(x: Tensor) -> Tensor:
    """x [8 tokens, K] as B's registers [32 lanes, K bytes / 16]: word t of every 16 bytes of token g."""
    words = x.contiguous().view(torch.int32)  # [8, K bytes / 4]
    return words.view(8, -1, 4).permute(0, 2, 1).reshape(32, -1).contiguous()


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_mma_sp(probed: ModuleType, dtype: torch.dtype) -> None:
    if dtype == FP8 and not runs_fp8_mma_sp():
        pytest.skip("this card has no mma.sp of e4m3")
    layout, dense = sparse_operand(64, fragments.block_k(dtype), dtype)
    block = fragments.pack(layout)[0, 0]
    half = fragments.block_k(dtype) // 2
    for step in (0, 1):
        for warp in (0, 3):
            a = block[step * 2048 + warp * 512 :][:512].clone()
            at = 4096 + (0 if dtype in WIDE else step * 512) + warp * 128
            meta = block[at : at + 128].clone()
            x = operand(8, half, dtype, 2)
            b, d = b_registers(x), accumulators(dtype, 32, 4)
            want = d_matrix(d, 16).double() + dense[16 * warp :][:16, step * half :][:, :half] @ x.double().t()
            selector = step if dtype in WIDE else 0
            probed.probe_mma_sp(CUDA_DTYPES[dtype], selector, a.data_ptr(), b.data_ptr(), meta.data_ptr(), d.data_ptr())
            assert torch.equal(d_matrix(d, 16).double(), want)


@pytest.mark.parametrize("position", range(16))
def test_mma_sp_position_by_position(probed: ModuleType, position: int) -> None:
    """A single one in A against the identity-like columns of B: a wrong place is named by its position."""
    dense = torch.zeros(64, 64)
    dense[5, 2 * position] = 1
    block = fragments.pack(pack24(dense.to(torch.bfloat16)))[0, 0]
    for token_block in range(4):
        x = torch.zeros(8, 32)
        x[torch.arange(8), torch.arange(8) + 8 * token_block] = 1
        b, d = b_registers(x.to(torch.bfloat16)), torch.zeros(32, 4)
        a, meta = block[:512].clone(), block[4096:4224].clone()
        probed.probe_mma_sp(1, 0, a.data_ptr(), b.data_ptr(), meta.data_ptr(), d.data_ptr())
        want = dense[:16, 8 * token_block : 8 * token_block + 8]
        wrong = (d_matrix(d, 16) != want).nonzero().tolist()
        assert not wrong, f"weight [5, {2 * position}] differs at [row, column - {8 * token_block}] of {wrong}"


def test_metadata_words_written_by_hand() -> None:
    """The PTX ISA's figure for mma.sp.m16n8k32: lane 4 g + t holds row g in its low and row g + 8 in its high half."""
    dense = torch.zeros(64, 64, dtype=torch.bfloat16)
    dense[0, [0, 1]] = 1  # row 0, group 0: 0x4
    dense[0, [6, 7]] = 1  # row 0, group 1: 0xE
    dense[8, [0, 3]] = 1  # row 8, group 0: 0xC
    dense[1, [17, 18]] = 1  # row 1, group 4 (k 16..19): 0x9, in the upper lane of the pair
    dense[9, [33, 35]] = 1  # row 9, group 8 (second step): 0xD
    words = fragments.pack(pack24(dense))[0, 0, 4096:].view(torch.int32).tolist()
    empty = 0xEEEE
    assert words[0] & 0xFFFFFFFF == (0xEEEC << 16 | 0xEEE4)
    assert words[1] & 0xFFFFFFFF == (empty << 16 | empty)
    assert words[4 + 1] & 0xFFFFFFFF == (empty << 16 | 0xEEE9)
    assert words[4 + 2] & 0xFFFFFFFF == (0xEEED << 16 | empty)


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_mma(probed: ModuleType, dtype: torch.dtype) -> None:
    k = 32 // dtype.itemsize
    w, x = operand(16, k, dtype, 1), operand(8, k, dtype, 2)
    words = w.view(torch.int32).view(2, 8, 2, 4)  # row half, g, half of K, t
    a = words.permute(1, 3, 2, 0).reshape(32, 4).contiguous()
    b, d = b_registers(x), accumulators(dtype, 32, 4)
    want = d_matrix(d, 16).double() + w.double() @ x.double().t()
    probed.probe_mma(CUDA_DTYPES[dtype], a.data_ptr(), b.data_ptr(), d.data_ptr())
    assert torch.equal(d_matrix(d, 16).double(), want)


def swizzled(rows: Tensor) -> Tensor:
    """Rows of 128 bytes as the 128-byte swizzle puts them: 16-byte chunk c of row r lies at c ^ r % 8."""
    chunks = rows.contiguous().view(torch.uint8).view(len(rows), 8, 16)
    place = torch.arange(8)[None] ^ (torch.arange(len(rows)) % 8)[:, None]
    return torch.zeros_like(chunks).scatter_(1, place[..., None].expand(-1, -1, 16), chunks)


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_product(probed: ModuleType, dtype: torch.dtype, n: int) -> None:
    layout, dense = sparse_operand(64, fragments.block_k(dtype), dtype)
    block = fragments.pack(layout)[0, 0]
    a, meta = block[:4096].clone(), block[4096:].clone()
    meta = torch.cat((meta, meta)) if dtype in WIDE else meta  # one word serves both steps, by the selector
    x = operand(n, fragments.block_k(dtype), dtype, 2)
    d = torch.full((128, n // 2), 99, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    b = swizzled(x)
    probed.probe_product(CUDA_DTYPES[dtype], n, a.data_ptr(), meta.data_ptr(), b.data_ptr(), d.data_ptr())
    assert torch.equal(d_matrix(d, 64).double(), dense @ x.double().t())


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_product_of_shared_memory_alone(probed: ModuleType, dtype: torch.dtype, n: int) -> None:
    """The same with A's rows in shared memory, 64 bytes of values each in two steps of 32."""
    layout, dense = sparse_operand(64, fragments.block_k(dtype), dtype)
    meta = fragments.pack(layout)[0, 0, 4096:].clone()
    meta = torch.cat((meta, meta)) if dtype in WIDE else meta
    x = operand(n, fragments.block_k(dtype), dtype, 2)
    d = torch.full((128, n // 2), 99, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    rows = torch.nn.functional.pad(layout.values.contiguous().view(torch.uint8), (0, 64))
    a, b = swizzled(rows), swizzled(x)
    probed.probe_product_shared(CUDA_DTYPES[dtype], n, a.data_ptr(), meta.data_ptr(), b.data_ptr(), d.data_ptr())
    assert torch.equal(d_matrix(d, 64).double(), dense @ x.double().t())


@pytest.mark.parametrize("n", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_dense_product(probed: ModuleType, dtype: torch.dtype, n: int) -> None:
    """Dense A from registers, two groups towards accumulators of their own, waited for one by one."""
    w, x = operand(64, 64, dtype, 1), operand(n, 64, dtype, 2)
    # Row 16 w + 8 r + g, column 16 s + 8 h + 2 t + e is element e of register 2 h + r.
    words = w.view(4, 2, 8, 4, 2, 4, 2).permute(3, 0, 2, 5, 4, 1, 6).contiguous()
    d, b = torch.full((2, 128, n // 2), 99.0), swizzled(x)
    probed.probe_dense_product(CUDA_DTYPES[dtype], n, words.data_ptr(), b.data_ptr(), d.data_ptr())
    for half in range(2):
        columns = slice(32 * half, 32 * half + 32)
        want = w[:, columns].double() @ x[:, columns].double().t()
        assert torch.equal(d_matrix(d[half], 64).double(), want)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_product_of_columns(probed: ModuleType, dtype: torch.dtype) -> None:
    """Both operands with K as rows in shared memory, boxes of 64 columns: dY^T X of 32 tokens."""
    dy, x = operand(32, 64, dtype, 1), operand(32, 256, dtype, 2)
    boxes = torch.cat([swizzled(x[:, 64 * i : 64 * i + 64].contiguous()) for i in range(4)])
    a, d = swizzled(dy), torch.full((128, 128), 99.0)
    probed.probe_product_columns(CUDA_DTYPES[dtype], a.data_ptr(), boxes.data_ptr(), d.data_ptr())
    assert torch.equal(d_matrix(d, 64).double(), dy.double().t() @ x.double())


@pytest.mark.parametrize("position", range(0, 64, 3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_product_position_by_position(probed: ModuleType, dtype: torch.dtype, position: int) -> None:
    """A single one in A against an identity: the one place of Y that is not zero names the weight's place."""
    k = fragments.block_k(dtype)
    row, column = position * 37 % 64, position * 2 % k + position % 2
    dense = torch.zeros(64, k)
    dense[row, column] = 1
    packed = pack24(dense)
    layout = Sp24(values=packed.values.to(dtype), metadata=packed.metadata, shape=packed.shape, scale=None)
    block = fragments.pack(layout)[0, 0]
    a, meta = block[:4096].clone(), block[4096:].clone()
    meta = torch.cat((meta, meta)) if dtype in WIDE else meta
    x = torch.eye(k).to(dtype)
    n = 64
    for first in range(0, k, n):
        d = torch.full((128, n // 2), 99, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
        b = swizzled(x[first : first + n])
        probed.probe_product(CUDA_DTYPES[dtype], n, a.data_ptr(), meta.data_ptr(), b.data_ptr(), d.data_ptr())
        wrong = (d_matrix(d, 64) != dense[:, first : first + n]).nonzero().tolist()
        assert not wrong, f"weight [{row}, {column}] differs at [row, column - {first}] of {wrong[:4]}"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_rate_probe(probed: ModuleType, dtype: torch.dtype, shared: bool) -> None:
    """What the bench times runs, and leaves the zeros of its operands."""
    out = torch.full((1, 256, 128), 9, dtype=torch.int32)
    probed.probe_rate(CUDA_DTYPES[dtype], shared, 1, 2, out.data_ptr(), 0)
    assert not out.any()


def test_metadata_words_of_bytes_by_hand() -> None:
    """The figure for mma.sp.m16n8k64: every lane holds 8 groups; lane 4 g + t has row g (t even) or g + 8 (t odd), the
    first 32 columns where t < 2."""
    dense = torch.zeros(64, 128)
    dense[0, [0, 1]] = 1  # row 0, group 0: 0x4
    dense[8, [0, 3]] = 1  # row 8, group 0: 0xC
    dense[0, [33, 34]] = 1  # row 0, group 8: 0x9, in lane 2
    dense[8, [61, 63]] = 1  # row 8, group 15: 0xD, highest of lane 3
    dense[17, [64, 66]] = 1  # row 17, group 16 (second step): 0x8
    packed = pack24(dense)
    layout = Sp24(values=packed.values.to(torch.int8), metadata=packed.metadata, shape=packed.shape, scale=None)
    words = fragments.pack(layout)[0, 0, 4096:].view(torch.int32).view(2, 4, 32) & 0xFFFFFFFF  # step, warp, lane
    words = (words.long() & 0xFFFFFFFF).tolist()
    assert words[0][0][0] == 0xEEEEEEE4
    assert words[0][0][1] == 0xEEEEEEEC
    assert words[0][0][2] == 0xEEEEEEE9
    assert words[0][0][3] == 0xDEEEEEEE
    assert words[1][1][4] == 0xEEEEEEE8
    assert sum(word != 0xEEEEEEEE for step in words for warp in step for word in warp) == 5


def test_matrices(probed: ModuleType) -> None:
    given = torch.arange(32 * 4 * 2, dtype=torch.int16).view(torch.int32).view(32, 4)
    stored, loaded, moved = (torch.zeros(32, 4, dtype=torch.int32) for _ in range(3))
    probed.probe_matrices(*(t.data_ptr() for t in (given, stored, loaded, moved)))
    halves = given.view(torch.int16).view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8)  # matrix, row, column
    assert torch.equal(stored.view(torch.int16).view(4, 8, 8), halves.transpose(1, 2))
    again = loaded.view(torch.int16).view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8)
    assert torch.equal(again, halves.transpose(1, 2))
    assert torch.equal(moved, loaded)


def test_warp(probed: ModuleType) -> None:
    value = random_dense(32, seed=3).view(torch.int32)
    out = torch.zeros(6, 32, dtype=torch.int32)
    probed.probe_warp(value.data_ptr(), out.data_ptr())
    lane = torch.arange(32)
    assert torch.equal(out[0], value[lane ^ 5])
    assert torch.equal(out[1], value[(lane * 7 + 3) % 32])
    ballot = sum(int(v & 1) << i for i, v in enumerate(value.tolist()))
    assert (out[2] & 0xFFFFFFFF).tolist() == [ballot - (1 << 32 if ballot >> 31 else 0)] * 32
    assert out[3].tolist() == [bin(v & 0xFFFFFFFF).count("1") for v in value.tolist()]
    pairs = torch.stack((value, value.flip(0)), dim=1).view(torch.float32)
    assert torch.equal(out[4], pairs.to(torch.bfloat16).view(torch.int32).flatten())
    assert torch.equal(out[5], pairs.to(torch.float16).view(torch.int32).flatten())


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copy(probed: ModuleType, size: int) -> None:
    given = torch.randint(1, 256, (32, size), dtype=torch.uint8)
    out = torch.zeros(32, size, dtype=torch.uint8)
    probed.probe_copy(size, given.data_ptr(), out.data_ptr())
    assert torch.equal(out[::2], given[::2])
    assert not out[1::2].any()


@pytest.mark.parametrize(("column", "row"), [(0, 0), (64, 8), (96, 20), (0, -3), (192, 0)])
def test_box(probed: ModuleType, column: int, row: int) -> None:
    """A multicast box of a [30, 120] matrix, swizzled, with zeros where it lies outside."""
    given = torch.randn(30, 120).to(torch.bfloat16)
    out = torch.full((2, 16, 64), 9, dtype=torch.bfloat16)
    probed.probe_box(1, given.data_ptr(), 120, 30, 120, column, row, out.data_ptr())
    whole = torch.nn.functional.pad(given, (0, 200, 10, 40))
    want = swizzled(whole[10 + row : 26 + row, column : column + 64])
    for block in out:
        assert torch.equal(block.view(torch.uint8).view(16, 8, 16), want)


WINDOWS = [
    # height, width, kernel, stride, padding, dilation
    (5, 6, (3, 3), (1, 1), (1, 1), (1, 1)),
    (6, 5, (3, 2), (2, 1), (1, 0), (1, 2)),
    (7, 9, (2, 3), (3, 2), (0, 2), (2, 1)),
    (2, 3, (3, 3), (1, 1), (4, 3), (1, 1)),
    (4, 4, (1, 1), (2, 2), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("case", WINDOWS, ids=lambda c: "{}x{}k{}s{}p{}d{}".format(*c))
def test_pixels(probed: ModuleType, case: tuple) -> None:
    """Boxes of pixels of [3, height, width, 120] images, the same tap of 16 windows, against the padded images."""
    height, width, kernel, stride, padding, dilation = case
    given = random_dense(3, height, width, 120).to(torch.bfloat16)
    ends = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in
            zip((height, width), padding, dilation, kernel, stride, strict=True)]  # fmt: skip
    fields = [height, width, 120, *ends, kernel[1], *stride, *dilation, *padding]
    wide = torch.nn.functional.pad(given, (0, 80, padding[1], padding[1], padding[0], padding[0]))
    total = 3 * ends[0] * ends[1]
    for begin in (0, 1, ends[1], total // 2, total - 9):
        for tap, channel in (((0, 0), 0), ((kernel[0] - 1, kernel[1] - 1), 64), ((0, kernel[1] - 1), 96)):
            down, right = tap[0] * dilation[0], tap[1] * dilation[1]
            boxes: list[int] = []
            for window in (begin, begin + 8):
                image, inside = divmod(window, ends[0] * ends[1])
                i, j = divmod(inside, ends[1])
                boxes += [channel, j * stride[1] - padding[1], i * stride[0] - padding[0], image, right, down]
            out, alone = torch.full((2, 16, 64), 9.0).bfloat16(), torch.full((8, 64), 9.0).bfloat16()
            probed.probe_pixels(
                1, given.data_ptr(), fields, 3, 120, boxes, out.data_ptr(), alone.data_ptr()
            )  # fmt: skip
            seen = wide[:, down :: stride[0], right :: stride[1], channel : channel + 64][:, : ends[0], : ends[1]]
            rows = torch.cat((seen.reshape(total, 64), torch.zeros(16, 64, dtype=seen.dtype)))
            want = swizzled(rows[begin : begin + 16])
            for block in out:
                assert torch.equal(block.view(torch.uint8).view(16, 8, 16), want)
            assert torch.equal(alone.view(torch.uint8).view(8, 8, 16), want[:8])


@pytest.mark.parametrize("by", [1, 2, 3, 7, 9, 63, 64, 65, 1000, 65537, 2**30 + 1, 2**31 - 1])
def test_divide(probed: ModuleType, by: int) -> None:
    edges = {n for q in (0, 1, 2, 5, (2**31 - 1) // by) for n in (q * by - 1, q * by, q * by + 1)}
    numbers = sorted(n for n in edges if 0 <= n < 2**31)
    numbers = torch.tensor([*numbers, *[2**31 - 1] * (32 - len(numbers))], dtype=torch.int32)
    out = torch.zeros(32, dtype=torch.int32)
    probed.probe_divide(by, numbers.data_ptr(), out.data_ptr())
    assert torch.equal(out.long(), numbers.long() // by)


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_nvcc_builds_the_probes() -> None:
    """For sm_90a, here as on a card: what a card's tests need first of all."""
    built = {name for name in dir(build_probes()) if name.startswith("probe_")}
    assert built == {name for name in dir(build()) if name.startswith("probe_")}


only_emulated = pytest.mark.skipif(ON_CARD, reason="the hardware refuses nothing")


@only_emulated
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, r"deadlock: block \(0, 0\) threads 0-127 wait at an mbarrier"),
        (6, r"deadlock: block \((0|1), 0\) threads 0, 3, 6, .* wait at an mbarrier; block .* threads 1-2, 4-5, .*"),
        (1, "threads of one group diverge"),
        (2, "more arrivals at an mbarrier than it expects"),
        (4, "beyond the end of shared memory"),
    ],
)
def test_mistakes_are_found(probed: ModuleType, which: int, message: str) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        probed.probe_mistake(which, out.data_ptr())


@only_emulated
def test_what_is_read_too_early_is_poison(probes: ModuleType) -> None:
    """Under the ascending schedule copies land, and products are performed, no earlier than their wait."""
    probes.set_schedule("ascending", 0)
    out = torch.full((128,), 5, dtype=torch.int32)
    probes.probe_mistake(3, out.data_ptr())
    assert (out == -1).all()  # shared memory begins as 0xFF bytes
    probes.probe_mistake(5, out.data_ptr())
    assert out.view(torch.float32).isnan().all()
