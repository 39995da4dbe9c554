"""Dense <-> packed, to the bit: hand-written words, every group, torch's own 2:4 metadata, and hypothesis."""

from __future__ import annotations

import itertools

import pytest
import scipy.sparse
import torch
from cases import ALL, FLOATS, FOUR, Case, param
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsekern as sk
from sparsekern import bsr, sp24, testing
from sparsekern.layout import Layout
from sparsekern.sp24.layout import LEGAL_NIBBLES

NIBBLES = {(0, 1): 0x4, (0, 2): 0x8, (1, 2): 0x9, (0, 3): 0xC, (1, 3): 0xD, (2, 3): 0xE}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, types and bits; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.isnan(), b.isnan()) and not bool(((a.view(words) != b.view(words)) & ~a.isnan()).any())


# sp24, by hand ----------------------------


def test_legal_nibbles_are_the_six_pairs() -> None:
    assert sorted(LEGAL_NIBBLES) == sorted(NIBBLES.values())
    for (first, second), nibble in NIBBLES.items():
        assert nibble == first | second << 2


@pytest.mark.parametrize("pair", list(NIBBLES))
@pytest.mark.parametrize("group", range(5))
def test_every_pair_in_every_place(pair: tuple[int, int], group: int) -> None:
    """Two nonzeros have one encoding only: the nibble, in the low half of a byte for even groups."""
    dense = torch.zeros(3, 20)
    dense[1, 4 * group + pair[0]], dense[1, 4 * group + pair[1]] = 3.0, -5.0
    packed = sp24.pack(dense).check()
    byte = int(packed.metadata[1, group // 2])
    assert (byte >> 4 if group % 2 else byte & 15) == NIBBLES[pair]
    assert packed.values[1, 2 * group : 2 * group + 2].tolist() == [3.0, -5.0]
    assert (packed.values != 0).sum() == 2
    assert torch.equal(packed.unpack(), dense)


@pytest.mark.parametrize("mask", range(16))
def test_every_group(mask: int) -> None:
    """All 16 patterns of nonzeros: eleven pack and come back, five raise."""
    dense = torch.zeros(2, 8)
    dense[0, 4:] = torch.tensor([float(i + 1) if mask >> i & 1 else 0.0 for i in range(4)])
    count = bin(mask).count("1")
    if count > 2:
        with pytest.raises(ValueError, match=r"not 2:4: row 0, group 1 \(columns 4\.\.7\) holds"):
            sp24.pack(dense)
        return
    packed = sp24.pack(dense).check()
    assert torch.equal(packed.unpack(), dense)
    nibble = int(packed.metadata[0, 0]) >> 4
    assert nibble in LEGAL_NIBBLES
    places = {nibble & 3, nibble >> 2}
    assert {i for i in range(4) if mask >> i & 1} <= places


def test_hand_written_words() -> None:
    dense = torch.tensor(
        [
            [0, 1, 2, 0, 3, 0, 0, 4, 0, 0, 0, 0, 5, 6, 0, 0],
            [7, 0, 8, 0, 0, 9, 0, 10, 0, 0, 11, 12, 0, 0, 0, 13],
        ]
    )
    packed = sp24.pack(dense.float())
    assert packed.values.tolist() == [[1, 2, 3, 4, 0, 0, 5, 6], [7, 8, 9, 10, 11, 12, 0, 13]]
    assert [f"{int(b):#04x}" for b in packed.metadata.flatten()] == ["0xc9", "0x4e", "0xd8", "0xee"]


def test_ragged_k() -> None:
    """K = 1 .. 17: the last bytes are padded with legal nibbles and zero values."""
    for k in range(1, 18):
        dense = testing.random_weight("sp24", 5, k, seed=k)
        packed = sp24.pack(dense).check()
        assert packed.values.shape == (5, (k + 7) // 8 * 4)
        assert packed.metadata.shape == (5, (k + 7) // 8)
        assert torch.equal(packed.unpack(), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_against_torch_semi_structured(dtype: torch.dtype) -> None:
    """The same values in the same order as torch's own converter makes, and its unpacker agrees with ours."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    rows, columns = 64, 128
    dense = testing.random_weight("sp24", rows, columns, dtype, density=0.5)
    values, metadata = sparse_semi_structured_from_dense_cutlass(dense)
    packed = sp24.pack(dense, scale=torch.ones(rows) if dtype == torch.int8 else None)
    assert same_bits(packed.values, values)
    assert same_bits(sparse_semi_structured_to_dense_cutlass(packed.values, metadata), packed.unpack())
    # Its metadata words, put back into row order, are our nibbles.
    assert sorted(torch_nibbles(metadata).tolist()) == sorted(our_nibbles(packed).flatten().tolist())


def our_nibbles(packed: sk.Sp24) -> Tensor:
    return torch.stack((packed.metadata & 15, packed.metadata >> 4), -1).flatten(1).long()


def torch_nibbles(metadata: Tensor) -> Tensor:
    words = metadata.flatten().view(torch.uint8).long()
    return torch.stack((words & 15, words >> 4), -1).flatten()


def test_not_24_names_row_group_and_values() -> None:
    dense = testing.random_weight("sp24", 40, 64)
    dense[17, 20:24] = torch.tensor([1.5, 0, -2, 3])
    dense[18, 0:4] = 1
    with pytest.raises(ValueError, match=r"row 17, group 5 \(columns 20\.\.23\) holds \[1\.5, 0, -2, 3\]"):
        sk.to_sparse_semi_structured(dense)


def test_prune_keeps_the_two_largest() -> None:
    dense = testing.random_dense(9, 30)
    pruned = sk.to_sparse_semi_structured(dense, prune=True).to_dense()
    for row, pruned_row in zip(dense.tolist(), pruned.tolist(), strict=True):
        for start in range(0, 30, 4):
            group, kept = row[start : start + 4], pruned_row[start : start + 4]
            largest = sorted(group, key=abs)[-2:]
            assert kept == [v if v in largest else 0.0 for v in group]
    ties = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    assert sk.to_sparse_semi_structured(ties, prune=True).to_dense().tolist() == [[1.0, -1.0, 0.0, 0.0]]
    with_nan = torch.tensor([[1.0, 2.0, float("nan"), 3.0]])
    kept = sk.to_sparse_semi_structured(with_nan, prune=True).to_dense()[0]
    assert kept[2].isnan()
    assert kept.tolist()[:2] + kept.tolist()[3:] == [0.0, 0.0, 3.0], "a pruned NaN would hide a broken weight"
    with_inf = torch.tensor([[1.0, 2.0, float("inf"), 3.0]])
    assert sk.to_sparse_semi_structured(with_inf, prune=True).to_dense().tolist() == [[0, 0, float("inf"), 3.0]]


# Every format ----------------------------


@param(ALL)
@param((*FLOATS, torch.float64), "dtype")
def test_round_trip(case: Case, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (7, 13), (32, 64), (33, 65), (64, 31), (0, 5), (5, 0), (0, 0), (1, 200), (200, 1)):
        dense = case.dense(n, k, dtype, 0.4)
        packed = case.pack(dense)
        packed.check()
        assert packed.shape == (n, k)
        assert packed.dtype == dtype
        assert same_bits(packed.unpack(), dense)
        assert same_bits(packed.sample(dense), packed.values)


def special(dtype: torch.dtype) -> list[float]:
    """Values that a packer could lose: the smallest and largest, subnormals, infinities, NaN."""
    info = torch.finfo(dtype)
    return [
        info.tiny,
        -info.tiny,
        info.smallest_normal / 4,
        info.max,
        -info.max,
        float("inf"),
        float("-inf"),
        float("nan"),
        1.0,
    ]


@param(FOUR)
@param((*FLOATS, torch.float64), "dtype")
def test_special_values(case: Case, dtype: torch.dtype) -> None:
    """Subnormals and infinities are stored to the bit, NaN as NaN; -0.0 counts as zero."""
    values = special(dtype)
    dense = torch.zeros(len(values), 12, dtype=dtype)
    for i, value in enumerate(values):
        dense[i, (5 * i) % 12] = value
    packed = case.pack(dense)
    packed.check()
    assert same_bits(packed.unpack(), dense)
    assert packed.values.count_nonzero() == len(values)
    zeros = torch.full((6, 12), -0.0, dtype=dtype)
    zeros[2, 3] = 1.0
    packed = case.pack(zeros)
    packed.check()
    assert packed.values.count_nonzero() == 1
    if case.format in ("csr", "bitmap"):
        assert packed.values.numel() == 1
    if case.format == "sp24":
        assert int(packed.metadata[2, 0]) & 15 == 0xE, "-0.0 must not take a place among the kept"
    assert torch.equal(packed.unpack(), zeros)


@st.composite
def weights(draw: st.DrawFn, format: str) -> tuple[Tensor, tuple[int, int]]:
    """A dense weight with the format's pattern and a block; special values among the entries."""
    n, k = draw(st.integers(0, 40)), draw(st.integers(0, 70))
    dtype = draw(st.sampled_from((*FLOATS, torch.float64)))
    block = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    density = draw(st.sampled_from((0.0, 0.02, 0.2, 0.5, 1.0)))
    w = testing.random_weight(format, n, k, dtype, density, block, seed=draw(st.integers(0, 10**6)))
    if w.numel():
        entries = [*special(dtype), -0.0]
        spots = st.tuples(st.integers(0, n - 1), st.integers(0, k - 1), st.sampled_from(entries))
        for i, j, value in draw(st.lists(spots, max_size=6)):
            if w[i, j] != 0 or value == 0:
                w[i, j] = value
    return w, block


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
@given(data=st.data())
def test_fuzz(format: str, data: st.DataObject) -> None:
    """unpack(pack(w)) is w (with -0.0 as 0.0 where dropped), pack(unpack(p)) is p, sample undoes unpack."""
    dense, block = data.draw(weights(format))
    packed = testing.pack(format, dense, block)
    packed.check()
    back = packed.unpack()
    assert torch.equal(back.nan_to_num(nan=12345.0), dense.nan_to_num(nan=12345.0))
    assert torch.equal(back.isnan(), dense.isnan())
    again = testing.pack(format, back, block)
    for name, t in packed.tensors().items():
        ours, theirs = (t, again.tensors()[name])
        if name == "values":
            ours, theirs = ours.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0)
        assert torch.equal(ours, theirs), name
    assert same_bits(packed.sample(back), packed.values)
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors().values())


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
@given(data=st.data())
def test_fuzz_unpack_of_random_values(format: str, data: st.DataObject) -> None:
    """Any values at a legal topology: sample(anything) then unpack is that thing, masked."""
    dense, block = data.draw(weights(format))
    packed = testing.pack(format, dense, block)
    full = testing.random_dense(*dense.shape, dtype=dense.dtype, seed=3)
    mask = packed.with_values(torch.ones_like(packed.values)).unpack() != 0
    assert bool(mask[dense != 0].all())
    out = packed.with_values(packed.sample(full))
    out.check()
    assert same_bits(out.unpack(), torch.where(mask, full, torch.zeros_like(full)))


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 4), (16, 16), (7, 64), (100, 100)])
def test_block_edges(block: tuple[int, int]) -> None:
    """Ragged edges are padded with zeros; empty blocks are not stored, full ones once."""
    for n, k in itertools.product((1, 15, 16, 33), repeat=2):
        dense = torch.zeros(n, k)
        dense[-1, -1] = 2.0
        packed = bsr.pack(dense, block).check()
        assert packed.values.shape == (1, *block)
        assert packed.values.count_nonzero() == 1
        assert torch.equal(packed.unpack(), dense)
        full = bsr.pack(torch.ones(n, k), block).check()
        assert full.values.shape[0] == -(-n // block[0]) * -(-k // block[1])
        assert full.values.sum() == n * k
    with pytest.raises(ValueError, match="block_size must be"):
        sk.to_block_sparse(torch.ones(4, 4), (0, 4))
    with pytest.raises(ValueError, match="block_size must be"):
        sk.to_block_sparse(torch.ones(4, 4), (4, 4, 4))


@param(FOUR)
def test_strides_of_a_dense_weight(case: Case) -> None:
    """Transposed, sliced and requires-grad weights pack as their contiguous copies do."""
    dense = case.dense(24, 36)
    wide = torch.zeros(30, 50)
    wide[3:27, 7:43] = dense
    for w in (dense.t().contiguous().t(), wide[3:27, 7:43], torch.nn.Parameter(dense)):
        packed = case.pack(w)
        packed.check()
        assert not packed.values.requires_grad
        for name, t in packed.tensors().items():
            assert torch.equal(t, case.pack(dense).tensors()[name])


# Inputs of other kinds ----------------------------


def converters() -> dict[str, object]:
    return {
        "sp24": sk.to_sparse_semi_structured,
        "bsr": lambda w: sk.to_block_sparse(w, (4, 4)),
        "csr": sk.to_csr,
        "bitmap": sk.to_bitmap,
    }


def other_forms(dense: Tensor) -> dict[str, object]:
    array = dense.numpy()
    forms: dict[str, object] = {
        "torch coo": dense.to_sparse_coo(),
        "torch csr": dense.to_sparse_csr(),
        "torch csc": dense.to_sparse_csc(),
        "torch bsr": dense.to_sparse_bsr((4, 4)),
        "torch bsc": dense.to_sparse_bsc((4, 4)),
    }
    for kind in ("csr", "csc", "coo", "bsr", "lil", "dok", "dia"):
        forms[f"scipy {kind} matrix"] = getattr(scipy.sparse, f"{kind}_matrix")(array)
        forms[f"scipy {kind} array"] = getattr(scipy.sparse, f"{kind}_array")(array)
    return forms


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
def test_sparse_inputs(format: str) -> None:
    dense = testing.random_weight("sp24", 16, 24, density=0.3)
    convert = converters()[format]
    right: Layout = convert(dense).packed  # type: ignore[operator]
    for name, form in other_forms(dense).items():
        packed = convert(form).check().packed  # type: ignore[operator]
        for field, t in right.tensors().items():
            assert same_bits(packed.tensors()[field], t), f"{name}: {field}"


def test_sparse_inputs_that_are_not_canonical() -> None:
    """Duplicates add up, explicit zeros vanish, columns out of order are sorted, a batch is refused."""
    coo = torch.sparse_coo_tensor([[0, 0, 1, 2], [3, 3, 0, 1]], [1.0, 2.0, 0.0, 4.0], (3, 5))
    right = torch.tensor([[0.0, 0, 0, 3, 0], [0, 0, 0, 0, 0], [0, 4, 0, 0, 0]])
    assert torch.equal(sk.to_csr(coo).to_dense(), right)
    assert sk.to_csr(coo).packed.values.numel() == 2
    unsorted = scipy.sparse.csr_matrix(([1.0, 2.0], [3, 1], [0, 2, 2]), shape=(2, 5))
    packed = sk.to_csr(unsorted).check().packed
    assert packed.col.tolist() == [1, 3]
    assert packed.values.tolist() == [2.0, 1.0]
    assert packed.dtype == torch.float64
    with pytest.raises(ValueError, match="must be a matrix"):
        sk.to_csr(torch.zeros(2, 3, 4).to_sparse_coo())


def test_inputs_that_are_refused() -> None:
    for convert in converters().values():
        for error, bad, message in (
            (TypeError, [[1.0]], "must be a torch.Tensor"),
            (TypeError, None, "must be a torch.Tensor"),
            (ValueError, torch.zeros(3), "must be a matrix"),
            (ValueError, torch.zeros(2, 3, 4), "must be a matrix"),
            (ValueError, torch.zeros(4, 4, dtype=torch.int32), "must be one of float32"),
            (ValueError, torch.zeros(4, 4, dtype=torch.complex64), "must be one of float32"),
            (ValueError, torch.zeros(4, 4, dtype=torch.bool), "must be one of float32"),
        ):
            with pytest.raises(error, match=message):
                convert(bad)  # type: ignore[operator]


def test_format_to_format() -> None:
    """A SparseTensor is an input like any other."""
    dense = testing.random_weight("sp24", 24, 20, density=0.2)
    for first, second in itertools.permutations(converters().values(), 2):
        assert torch.equal(second(first(dense)).to_dense(), dense)  # type: ignore[operator]
        transposed = second(first(dense.t().contiguous().t()).t()) if second is not converters()["sp24"] else None
        if transposed is not None and first is sk.to_csr and second is sk.to_bitmap:
            assert torch.equal(transposed.to_dense(), dense.t())


def test_packing_is_quick() -> None:
    """4096 x 4096 within 30 ms on two quiet cores; here only that nothing is quadratic or in Python."""
    dense = testing.random_weight("sp24", 1024, 1024)
    times = testing.measure({name: (lambda c=c: c(dense)) for name, c in converters().items()}, repeats=3, warmup=1)
    for name, t in times.items():
        print(f"{name}: 1024 x 1024 packed in {t}")
        assert t.median < 1.0


def test_row_starts_do_not_wrap() -> None:
    """2^31 nonzeros are refused by the packer of GPUs as by the compiled one, without a matrix of that size."""
    from sparsekern.csr.pack import row_starts

    fits, many = torch.tensor([2**31 - 11, 10]), torch.tensor([2**31 - 10, 10])
    assert row_starts(fits, 2**31).tolist() == [0, 2**31 - 11, 2**31 - 1]
    assert row_starts(fits, 2**31).dtype == torch.int32
    with pytest.raises(ValueError, match=r"W\[2, 2147483648\] has 2\^31 nonzeros or more"):
        row_starts(many, 2**31)
