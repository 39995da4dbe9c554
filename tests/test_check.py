"""check(): a layout that is broken in any way is a ValueError that names format and place, never a crash."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import FOUR, Case, param
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsekern as sk
from sparsekern import testing
from sparsekern.layout import Layout
from sparsekern.tensor import SparseTensor, _rebuild

NAN, INF = float("nan"), float("inf")


def sp24(n: int = 6, k: int = 21, dtype: torch.dtype = torch.float32) -> sk.Sp24:
    scale = testing.random_scale(n) if dtype == torch.int8 else None
    return testing.pack("sp24", testing.random_weight("sp24", n, k, dtype), scale=scale)  # type: ignore[return-value]


def bsr(n: int = 11, k: int = 22, dtype: torch.dtype = torch.float32) -> sk.Bsr:
    scale = testing.random_scale(n) if dtype == torch.int8 else None
    return testing.pack("bsr", testing.random_weight("bsr", n, k, dtype, 0.6), 4, scale)  # type: ignore[return-value]


def csr(n: int = 7, k: int = 19) -> sk.Csr:
    return testing.pack("csr", testing.random_weight("csr", n, k))  # type: ignore[return-value]


def bitmap(n: int = 7, k: int = 19) -> sk.Bitmap:
    return testing.pack("bitmap", testing.random_weight("bitmap", n, k))  # type: ignore[return-value]


def put(t: Tensor, at: int | tuple[int, ...], value: float) -> Tensor:
    """A copy of t with one entry changed."""
    t = t.clone()
    t[at] = value
    return t


def values_nan(packed: Layout) -> Layout:
    return packed.with_values(torch.full_like(packed.values, NAN))


MAKE = {"sp24": sp24, "bsr": bsr, "csr": csr, "bitmap": bitmap}

# (name, the broken layout, what the message must say)
BROKEN: list[tuple[str, Callable[[], Layout], str]] = [
    (
        "values too short",
        lambda: replace(sp24(), values=sp24().values[:, :-1].contiguous()),
        r"values must have shape \(6, 12\), got \(6, 11\)",
    ),
    ("values flat", lambda: replace(sp24(), values=sp24().values.flatten()), "values must have shape"),
    (
        "metadata truncated",
        lambda: replace(sp24(), metadata=sp24().metadata[:-1]),
        r"metadata must have shape \(6, 3\), got \(5, 3\)",
    ),
    (
        "metadata of int16",
        lambda: replace(sp24(), metadata=sp24().metadata.short()),
        "metadata must be uint8, got int16",
    ),
    (
        "illegal low nibble",
        lambda: replace(sp24(), metadata=put(sp24().metadata, (4, 2), 0xE5)),
        "row 4, group 4: 0x5 is no legal",
    ),
    (
        "illegal high nibble",
        lambda: replace(sp24(), metadata=put(sp24().metadata, (3, 1), 0x0E)),
        "row 3, group 3: 0x0 is no legal",
    ),
    ("value beyond K", lambda: replace(sp24(6, 18), values=sp24(6, 18).values + 1), "beyond column 17"),
    ("NaN beyond K", lambda: values_nan(sp24(6, 18)), "beyond column 17"),
    ("int8 without scale", lambda: replace(sp24(dtype=torch.int8), scale=None), "need a scale"),
    (
        "NaN scale",
        lambda: replace(sp24(dtype=torch.int8), scale=put(torch.ones(6), 2, NAN)),
        "scale of row 2 is nan",
    ),
    (
        "inf scale",
        lambda: replace(bsr(dtype=torch.int8), scale=put(torch.ones(11), 9, INF)),
        "scale of row 9 is inf",
    ),
    (
        "scale too short",
        lambda: replace(sp24(dtype=torch.int8), scale=torch.ones(5)),
        r"scale must have shape \(6,\)",
    ),
    (
        "scale of float64",
        lambda: replace(sp24(dtype=torch.int8), scale=torch.ones(6).double()),
        "scale must be float32",
    ),
    ("scale with floats", lambda: replace(sp24(), scale=torch.ones(6)), "scale belongs to int8"),
    ("values of int16", lambda: replace(sp24(), values=sp24().values.short()), "values must be float32 or"),
    ("crow[0] not 0", lambda: replace(csr(), crow=put(csr().crow, 0, 1)), r"crow\[0\] is 1, must be 0"),
    ("crow falls", lambda: replace(csr(), crow=put(csr().crow, 3, 10**6)), "crow decreases at row 3"),
    ("crow negative", lambda: replace(csr(), crow=put(csr().crow, 1, -5)), "crow decreases at row 0"),
    (
        "crow ends early",
        lambda: replace(
            csr(),
            values=torch.cat((csr().values, torch.ones(1))),
            col=torch.cat((csr().col, torch.zeros(1, dtype=torch.int32))),
        ),
        r"crow\[-1\] is",
    ),
    ("crow too short", lambda: replace(csr(), crow=csr().crow[:-1]), r"crow must have shape \(8,\)"),
    ("crow of int64", lambda: replace(csr(), crow=csr().crow.long()), "crow must be int32, got int64"),
    (
        "col out of range",
        lambda: replace(csr(), col=put(csr().col, 5, 19)),
        r"col\[5\] .* is 19, must be in \[0, 19\)",
    ),
    ("col negative", lambda: replace(csr(), col=put(csr().col, 0, -1)), r"col\[0\] .* is -1"),
    (
        "col repeats",
        lambda: replace(csr(), col=put(csr().col, 1, int(csr().col[0]))),
        "col must ascend inside in row 0",
    ),
    ("col truncated", lambda: replace(csr(), col=csr().col[:-1]), "col must have shape"),
    ("col a matrix", lambda: replace(csr(), col=csr().col[None]), "col must have shape"),
    ("int8 csr", lambda: replace(csr(), values=csr().values.to(torch.int8)), "values must be"),
    ("block of zero", lambda: replace(bsr(), block=(0, 4)), "block must be two positive integers"),
    ("block of three", lambda: replace(bsr(), block=(4, 4, 4)), "block must be two positive integers"),
    ("block of floats", lambda: replace(bsr(), block=(4.0, 4.0)), "block must be two positive integers"),
    ("block of another size", lambda: replace(bsr(), block=(2, 8)), "values must have shape"),
    (
        "block column out of range",
        lambda: replace(bsr(), col=put(bsr().col, 2, 6)),
        r"col\[2\] .* is 6, must be in \[0, 6\)",
    ),
    ("block row falls", lambda: replace(bsr(), crow=put(bsr().crow, 1, 10**6)), "crow decreases at row 1"),
    ("blocks without dimensions", lambda: replace(bsr(), values=torch.tensor(1.0)), "values must have shape"),
    ("value beyond N", lambda: replace(bsr(), values=bsr().values + 1), "beyond the last row"),
    (
        "value beyond K in a block",
        lambda: replace(bsr(12, 22), values=bsr(12, 22).values + 1),
        "beyond the last column",
    ),
    (
        "bits beyond K",
        lambda: replace(bitmap(), bits=bitmap().bits | 0x80),
        "row 0 has a bit set beyond column 18",
    ),
    (
        "bits flipped",
        lambda: replace(bitmap(), bits=put(bitmap().bits, (2, 1), int(bitmap().bits[2, 1]) ^ 4)),
        r"row 2 has \d+ bits set but \d+ values",
    ),
    (
        "bits truncated",
        lambda: replace(bitmap(), bits=bitmap().bits[:, :-1].contiguous()),
        r"bits must have shape \(7, 3\)",
    ),
    ("bits of int64", lambda: replace(bitmap(), bits=bitmap().bits.long()), "bits must be uint8"),
    (
        "offsets fall",
        lambda: replace(bitmap(), offsets=put(bitmap().offsets, 4, 0)),
        "offsets decreases at row 3",
    ),
    ("offsets of int32", lambda: replace(bitmap(), offsets=bitmap().offsets.int()), "offsets must be int64"),
    (
        "offsets too long",
        lambda: replace(bitmap(), offsets=torch.cat((bitmap().offsets, bitmap().offsets[-1:]))),
        r"offsets must have shape \(8,\)",
    ),
    ("values truncated", lambda: replace(bitmap(), values=bitmap().values[:-1]), r"offsets\[-1\] is"),
]


@pytest.mark.parametrize(("make", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken(make: Callable[[], Layout], message: str) -> None:
    packed = make()
    with pytest.raises(ValueError, match=message) as caught:
        packed.check()
    assert str(caught.value).startswith(f"{packed.format} layout of shape {packed.shape}: ")
    with pytest.raises(ValueError, match=message):
        SparseTensor(packed)


@param(FOUR)
def test_broken_in_ways_that_all_formats_share(case: Case) -> None:
    packed = case.pack(case.dense(9, 24))
    for name, t in packed.tensors().items():
        broken: list[tuple[object, str]] = [
            (t.to("meta"), "is on"),
            (t[:0], "must have shape|values are stored|entries are stored"),
            (None, f"{name} must be a tensor, got NoneType"),
            ([1, 2], f"{name} must be a tensor, got list"),
            (t.to(torch.complex64), f"{name} must be .*, got complex64"),
            (torch.stack((t, t), -1)[..., 0], f"{name} must be contiguous"),
        ]
        if t.dim() == 2:
            broken += [
                (t.t().contiguous().t(), f"{name} must be contiguous"),
                (t.to_sparse(), f"{name} must be a plain"),
            ]
        for bad, message in broken:
            with pytest.raises(ValueError, match=message) as caught:
                replace(packed, **{name: bad}).check()
            assert str(caught.value).startswith(f"{case.format} layout of shape (9, 24): "), (name, bad)
    for shape in (
        (9,),
        (9, 24, 1),
        (-9, 24),
        (9.0, 24.0),
        (24, 9),
        (8, 24),
        (9, 3),
        (2**40, 2**40),
        "ab",
        None,
        (None, 3),
    ):
        with pytest.raises(ValueError, match=r"shape|columns|offsets|beyond|bits"):
            replace(packed, shape=shape).check()


@param(FOUR)
def test_right_ones_pass(case: Case) -> None:
    """What check refuses must not be refused too often: NaN and inf values, empties, every type."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n, k in ((0, 0), (0, 7), (7, 0), (1, 1), (8, 24)):
            packed = case.pack(case.dense(n, k, dtype))
            assert packed.check() is packed
    dense = case.dense(8, 24)
    dense[dense != 0] = NAN
    case.pack(dense).check()
    case.pack(torch.zeros(8, 24)).check()
    for name in ("sp24", "bsr"):
        MAKE[name](dtype=torch.int8).check()


def mutate(draw: st.DrawFn, t: Tensor) -> Tensor:
    """t with something done to it: another length, type, stride, device or a few other bits."""
    how = draw(st.sampled_from(["bits", "bits", "bits", "short", "long", "type", "dim", "strided", "meta"]))
    if how == "bits":
        if t.numel() == 0:
            return t
        raw = t.clone()
        flat = raw.view(torch.uint8).flatten() if raw.dim() else raw
        for _ in range(draw(st.integers(1, 3))):
            flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.integers(0, 255))
        return flat.view(t.dtype).reshape(t.shape)
    if how == "short":
        return t[: max(0, t.shape[0] - draw(st.integers(1, 3)))].contiguous()
    if how == "long":
        return torch.cat((t, t))
    if how == "type":
        other = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.float16]))
        return t.nan_to_num(0).to(other) if t.is_floating_point() else t.to(other)
    if how == "dim":
        return t[None]
    if how == "strided":
        return torch.stack((t, t), -1)[..., 0]
    return t.to("meta")


def is_right(packed: Layout) -> bool:
    """The invariants again, written as slowly and differently as possible."""
    (n, k), tensors = packed.shape, packed.tensors()
    if any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors.values()):
        return False
    values = packed.values
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return False
    if isinstance(packed, sk.Sp24):
        kp = -(-k // 8) * 8
        if (
            packed.metadata.dtype != torch.uint8
            or packed.metadata.shape != (n, kp // 8)
            or values.shape != (n, kp // 2)
        ):
            return False
        for row in range(n):
            for group in range(kp // 4):
                nibble = int(packed.metadata[row, group // 2]) >> (4 * (group % 2)) & 15
                first, second = nibble & 3, nibble >> 2
                if first >= second:
                    return False
                for place, at in ((first, 2 * group), (second, 2 * group + 1)):
                    if 4 * group + place >= k and float(values[row, at]) != 0:
                        return False
        return True
    starts = packed.offsets if isinstance(packed, sk.Bitmap) else packed.crow  # type: ignore[attr-defined]
    rows = -(-n // packed.block[0]) if isinstance(packed, sk.Bsr) else n
    if starts.dtype != (torch.int64 if isinstance(packed, sk.Bitmap) else torch.int32) or starts.shape != (rows + 1,):
        return False
    edges = starts.tolist()
    stored = values.shape[0] if values.dim() else 0
    if edges[0] != 0 or edges[-1] != stored or edges != sorted(edges):
        return False
    if isinstance(packed, sk.Bitmap):
        if values.dim() != 1 or packed.bits.dtype != torch.uint8 or packed.bits.shape != (n, -(-k // 8)):
            return False
        for row in range(n):
            word = int.from_bytes(bytes(packed.bits[row].tolist()), "little")
            if word >> k or bin(word).count("1") != edges[row + 1] - edges[row]:
                return False
        return True
    col = packed.col  # type: ignore[attr-defined]
    r, c = packed.block if isinstance(packed, sk.Bsr) else (1, 1)
    if col.dtype != torch.int32 or col.shape != (stored,):
        return False
    if values.shape != ((stored, r, c) if isinstance(packed, sk.Bsr) else (stored,)):
        return False
    for row in range(rows):
        columns = col[edges[row] : edges[row + 1]].tolist()
        if columns != sorted(set(columns)) or any(j < 0 or j >= -(-k // c) for j in columns):
            return False
        for at, j in zip(range(edges[row], edges[row + 1]), columns, strict=True):
            block = values[at].reshape(r, c)
            outside = [
                float(v) for v in (*block[max(0, n - row * r) :].flatten(), *block[:, max(0, k - j * c) :].flatten())
            ]
            if any(v != 0 for v in outside):
                return False
    return True


@pytest.mark.parametrize("format", list(MAKE))
@settings(max_examples=150)
@given(data=st.data())
def test_fuzz(format: str, data: st.DataObject) -> None:
    """A layout with a few parts spoilt at random is accepted exactly if it is still right."""
    draw = data.draw
    packed = MAKE[format](draw(st.integers(0, 7)), draw(st.integers(0, 23)))  # type: ignore[operator]
    names = list(packed.tensors())
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        packed = replace(packed, **{name: mutate(draw, getattr(packed, name))})
    if draw(st.booleans()):
        packed = replace(packed, shape=(draw(st.integers(0, 9)), draw(st.integers(0, 25))))
    if is_right(packed):
        assert packed.check() is packed
        packed.unpack()
    else:
        with pytest.raises(ValueError, match=f"^{format} layout of shape"):
            packed.check()


# Files ----------------------------------


@param(FOUR)
def test_hostile_pickle(case: Case) -> None:
    """A SparseTensor from a file is checked before anything can use it."""
    w = SparseTensor(case.pack(case.dense(8, 16)))
    back = pickle.loads(pickle.dumps(w))
    assert torch.equal(back.to_dense(), w.to_dense())
    _, parts = w.__reduce_ex__(2)
    format, values, index, scale, dims, transposed, grad = parts
    hostile = (
        (
            format,
            values,
            [put(index[0], (0,) * index[0].dim(), 0 if index[0].dim() == 2 else 77), *index[1:]],
            scale,
            dims,
            transposed,
            grad,
        ),
        (format, values, index[:-1], scale, dims, transposed, grad),
        (format, values, [*index, index[0]], scale, dims, transposed, grad),
        (format, values, [], scale, dims, transposed, grad),
        (format, values[:-1], index, scale, dims, transposed, grad),
        (format, values, index, scale, [10**9, 10**9, *dims[2:]], transposed, grad),
        (format, values, index, scale, dims[:1], transposed, grad),
        (format, values, index, scale, [-1, 16, *dims[2:]], transposed, grad),
        (format, values, index, torch.ones(8), dims, transposed, grad),
        (format, None, index, scale, dims, transposed, grad),
        (format, values, [None for _ in index], scale, dims, transposed, grad),
        ("coo", values, index, scale, dims, transposed, grad),
    )
    for bad in hostile:
        with pytest.raises(ValueError):  # noqa: PT011 - each has a message of its own; none may be another error
            _rebuild(*bad)


SPOILERS = (
    lambda t: t[:-1],
    lambda t: t[None] if t.is_floating_point() else put(t, (0,) * t.dim(), 0 if t.dtype == torch.uint8 else 77),
    lambda t: t.to(torch.complex64),
)


@param(FOUR)
def test_hostile_state_dict(case: Case) -> None:
    """A checkpoint with broken parts is refused by name, and the module keeps its weight."""
    from sparsekern.nn import SparseLinear

    module = SparseLinear.from_packed(case.pack(case.dense(8, 16)), torch.zeros(8))
    before = module.dense_weight().clone()
    for name in ("values", *module.packed.index_fields):
        for spoil in SPOILERS:
            state = {k: v.clone() for k, v in module.state_dict().items()}
            state[name] = spoil(state[name])
            with pytest.raises(RuntimeError, match=f"{case.format} layout of shape"):
                module.load_state_dict(state)
            assert torch.equal(module.dense_weight(), before)
        state = {k: v.clone() for k, v in module.state_dict().items() if k != name}
        with pytest.raises(RuntimeError, match=rf"no {name}|Missing key.*values"):
            module.load_state_dict(state)
        assert torch.equal(module.dense_weight(), before)
    with pytest.raises(RuntimeError, match=r"dense weight has shape \(8, 15\), expected \(8, 16\)"):
        module.load_state_dict({"weight": torch.zeros(8, 15), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**module.state_dict(), "stranger": torch.zeros(1)})
    assert torch.equal(module.dense_weight(), before)
