"""cuSPARSELt as a backend, as far as a machine without a GPU can tell: why not, and what torch is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekern as sk
from sparsekern import dispatch, testing
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
        meta = torch._cslt_sparse_mm(
            weight.to("meta"),
            tokens.to("meta"),
            bias=None if bias is None else bias.to("meta"),
            out_dtype=out_dtype,
            transpose_result=transpose_result,
            alg_id=alg_id,
        )
        assert tokens.t().is_contiguous()
        assert tokens.shape[1] % vendor.ALIGNMENT[tokens.dtype][1] == 0
        self.algorithms.append(alg_id)
        y = (tokens.t().double() @ weight.double().t()).to(out_dtype or tokens.dtype)
        y = y if bias is None else (tokens.t().double() @ weight.double().t() + bias.double()).to(y.dtype)
        assert y.shape == meta.shape
        assert y.dtype == meta.dtype
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


def test_int8(library: Library) -> None:
    dense, scale = testing.random_weight("sp24", 64, 96, torch.int8), testing.random_scale(64)
    layout, x = pack(dense, scale=scale), random_dense(5, 96, dtype=torch.int8, seed=1)
    bias = random_dense(64)
    y = vendor.mm(layout, x, bias, "relu")
    assert_close(y, reference_mm(dense.double() * scale.double()[:, None], x, bias, "relu"), torch.float32)
