"""cuSPARSELt as a backend, as far as a machine without a GPU can tell: why not, and what torch is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekern as sk
from sparsekern import dispatch, testing
from sparsekern._ext import FP8
from sparsekern.sp24 import pack, vendor
from sparsekern.testing import assert_close, random_dense, reference_mm


def test_why_not() -> None:
    x = random_dense(4, 32, dtype=torch.bfloat16)
    layout = pack(testing.random_weight("sp24", 32, 32, torch.bfloat16))
    reasons = {
        "mm only": ("mm_t", layout, x),
        "not torch.float32": ("mm", layout.to(dtype=torch.float32), x.float()),
        "they must agree": ("mm", layout, x.half()),
        "multiples of 16": ("mm", pack(testing.random_weight("sp24", 24, 32, torch.bfloat16)), x),
        "takes CUDA tensors": ("mm", layout, x),
    }
    for expected, arguments in reasons.items():
        assert expected in str(vendor.why_not(*arguments))
    assert "vendor" in dispatch.backends("sp24", "cuda")
    with pytest.raises(NotImplementedError, match="no such backend on cpu"):
        sk.linear(x, layout, backend="vendor")


class Library:
    """cuSPARSELt as torch has it, in plain torch: it records what it is asked and refuses what that would refuse."""

    def __init__(self) -> None:
        self.searches = self.compressions = 0
        self.algorithms: list[int] = []

    def compress(self, dense: Tensor) -> Tensor:
        self.compressions += 1
        return dense.clone()

    def search(self, weight: Tensor, tokens: Tensor, **_: Any) -> int:
        self.searches += 1
        return 7

    def mm(
        self, weight: Tensor, tokens: Tensor, bias: Tensor | None, out_dtype: Any, transpose_result: bool, alg_id: int
    ) -> Tensor:
        known = torch.bfloat16 if out_dtype == torch.float32 else out_dtype  # torch 2.6 forgot one in its meta function
        (n, k), sixteenths = weight.shape, 10 if weight.dtype.itemsize == 1 else 9
        meta = torch._cslt_sparse_mm(
            weight.new_empty((n, k * sixteenths // 16), device="meta"),  # a compressed weight has as many
            tokens.to("meta"),
            bias=None if bias is None else bias.to("meta"),
            out_dtype=known,
            transpose_result=transpose_result,
            alg_id=alg_id,
        )
        assert tokens.t().is_contiguous()
        assert tokens.shape[1] % vendor.ALIGNMENT[tokens.dtype][1] == 0
        self.algorithms.append(alg_id)
        y = (tokens.t().double() @ weight.double().t()).to(out_dtype or tokens.dtype)
        y = y if bias is None else (tokens.t().double() @ weight.double().t() + bias.double()).to(y.dtype)
        assert y.shape == meta.shape
        assert known != out_dtype or y.dtype == meta.dtype
        return y


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", made.search)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", _or_meta(torch._cslt_sparse_mm, made.mm))
    monkeypatch.setattr(vendor, "_FOUND", {})
    return made


def _or_meta(real: Callable[..., Tensor], mine: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's own op for meta tensors, which checks shapes and types; the stand-in for others."""
    return lambda weight, *rest, **named: (real if weight.is_meta else mine)(weight, *rest, **named)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_mm(library: Library, dtype: torch.dtype, activation: str) -> None:
    dense = testing.random_weight("sp24", 48, 64, dtype)
    layout, bias = pack(dense), random_dense(48, dtype=dtype, seed=3)
    for m in (1, 7, 8, 33, 0):
        x = random_dense(m, 64, dtype=dtype, seed=m)
        y = vendor.mm(layout, x, bias, activation)
        tolerance = 2 * testing.TOLERANCE[dtype]  # rounded before the activation, and after
        assert_close(y, reference_mm(dense, x, bias, activation), dtype, tol=tolerance)
        assert_close(vendor.mm(layout, x, bias.float(), "none"), reference_mm(dense, x, bias), dtype, tol=tolerance)
    assert library.compressions == 1
    assert library.searches == 3, "1; 7 and 8; 33"
    assert set(library.algorithms) == {7}
    with torch.no_grad():
        layout.values.mul_(2)
    assert_close(vendor.mm(layout, random_dense(9, 64, dtype=dtype), None, "none", algorithm=3),
                 reference_mm(2 * dense, random_dense(9, 64, dtype=dtype)), dtype)  # fmt: skip
    assert (library.compressions, library.searches, library.algorithms[-1]) == (2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_quantised(library: Library, dtype: torch.dtype) -> None:
    made_as = torch.float32 if dtype.is_floating_point else dtype  # torch 2.6 has no torch.where of float8
    dense, scale = testing.random_weight("sp24", 64, 96, made_as).to(dtype), testing.random_scale(64)
    layout, x = pack(dense, scale=scale), random_dense(5, 96, dtype=dtype, seed=1)
    bias = random_dense(64)
    y = vendor.mm(layout, x, bias, "relu")
    assert y.dtype == torch.float32
    assert_close(y, reference_mm(dense.double() * scale.double()[:, None], x, bias, "relu"), torch.float32)


def test_types_that_a_card_should_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on Hopper from 0.8 on, reported to take the process's CUDA context with it; float8 too early."""
    device = torch.device("cuda")
    for card, version, dtype, reason in (
        ((9, 0), 801, torch.float16, r"cuSPARSELt 0.8.1 may end in an illegal instruction with float16"),
        ((9, 0), 1000, torch.float16, "cuSPARSELt 1.0.0 may"),
        ((9, 0), None, torch.float16, "this cuSPARSELt may"),
        ((9, 0), 701, torch.float16, None),
        ((9, 0), 602, torch.float16, None),
        ((8, 0), 801, torch.float16, None),
        ((9, 0), 801, torch.bfloat16, None),
        ((9, 0), 801, torch.int8, None),
        ((9, 0), 602, FP8, None),
        ((8, 9), 801, FP8, None),
        ((8, 9), 701, FP8, "cuSPARSELt 0.7.1"),
        ((8, 0), 801, FP8, "needs compute capability 9.0"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, card=card: card)
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda version=version: version)
        got = vendor.why_not_type(dtype, device)
        assert (got is None) if reason is None else (reason in str(got)), (card, version, dtype)
    monkeypatch.setattr(vendor, "why_not_here", lambda device: None)
    monkeypatch.setattr(vendor, "why_not_type", lambda dtype, device: "it would not end well")
    layout = pack(testing.random_weight("sp24", 32, 32, torch.float16))
    assert vendor.why_not("mm", layout, random_dense(4, 32, dtype=torch.float16)) == "it would not end well"


def test_a_compressed_weight_is_renewed_in_place(library: Library) -> None:
    """So that a CUDA graph which was captured with it reads the new values."""
    layout = pack(testing.random_weight("sp24", 32, 32, torch.bfloat16))
    before = vendor.compressed(layout)
    with torch.no_grad():
        layout.values.mul_(2)
    after = vendor.compressed(layout)
    assert after is before
    assert torch.equal(after, layout.unpack())
