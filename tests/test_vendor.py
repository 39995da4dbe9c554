"""torch's own sparse products as backends of csr and bsr: the same numbers, every refusal with its reason.

They are offered on GPUs alone; on a CPU torch has the same calls in float32 and float64, which is where they run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sparsekern import dispatch
from sparsekern.bsr import pack as pack_bsr
from sparsekern.bsr import vendor as bsr_vendor
from sparsekern.csr import Csr
from sparsekern.csr import pack as pack_csr
from sparsekern.csr import vendor as csr_vendor
from sparsekern.testing import assert_close, random_dense, random_weight, reference_mm, reference_mm_t, reference_sddmm

ON_CARD = torch.cuda.is_available()
TYPES = (torch.float32, torch.float64, *((torch.bfloat16, torch.float16) if ON_CARD else ()))
types = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if ON_CARD:
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@types
@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
def test_csr(dtype: torch.dtype, tokens: int) -> None:
    dense = random_weight("csr", 33, 50, dtype, 0.3)
    layout, bias = pack_csr(dense), random_dense(33, dtype=dtype, seed=3)
    x, dy = random_dense(tokens, 50, dtype=dtype, seed=1), random_dense(tokens, 33, dtype=dtype, seed=2)
    apart = random_dense(tokens, 60, dtype=dtype, seed=1)[:, 5:55]  # rows that do not follow each other
    assert_close(csr_vendor.mm(layout, x, bias, "gelu"), reference_mm(dense, x, bias, "gelu"), dtype)
    assert_close(csr_vendor.mm(layout, apart, None, "none"), reference_mm(dense, apart), dtype)
    assert_close(csr_vendor.mm_t(layout, dy), reference_mm_t(dense, dy), dtype)
    assert csr_vendor.mm(layout, x, None, "none").is_contiguous()
    if dtype in csr_vendor.SAMPLED:
        expected = layout.sample(reference_sddmm(dy, x))
        assert_close(csr_vendor.sddmm(layout, dy, x), expected, dtype)


@types
@pytest.mark.parametrize("block", [16, 32])
def test_bsr(dtype: torch.dtype, block: int) -> None:
    dense = random_weight("bsr", 64, 96, dtype, 0.4, block=block)
    layout, bias = pack_bsr(dense, (block, block)), random_dense(64, dtype=dtype, seed=3)
    for tokens in (0, 1, 33):
        x = random_dense(tokens, 96, dtype=dtype, seed=1)
        assert_close(bsr_vendor.mm(layout, x, bias, "relu"), reference_mm(dense, x, bias, "relu"), dtype)


def test_values_are_followed() -> None:
    """torch's tensor lies over the same memory: nothing to go stale."""
    dense = random_weight("csr", 12, 16, density=0.5)
    layout, x = pack_csr(dense), random_dense(3, 16)
    csr_vendor.mm(layout, x, None, "none")
    layout.values.mul_(2)
    assert_close(csr_vendor.mm(layout, x, None, "none"), reference_mm(2 * dense, x), torch.float32)


def _csr(**changes: Any) -> Csr:
    return pack_csr(random_weight("csr", 8, 12, density=0.5)).to(**changes)


REFUSED: dict[str, Callable[[], str | None]] = {
    "takes CUDA tensors": lambda: csr_vendor.why_not("mm", _csr(), torch.zeros(1, 12)),
    "they must agree": lambda: csr_vendor.why_not("mm", _csr(), torch.zeros(1, 12).half()),
    "sddmm does not take torch.float16": lambda: csr_vendor.why_not("sddmm", _csr(dtype=torch.float16), torch.zeros(1)),
    "CSR products are not asked": lambda: csr_vendor.why_not("mm", pack_csr(torch.zeros(4, 4)), torch.zeros(1, 4)),
    "no gradients": lambda: bsr_vendor.why_not("mm_t", pack_bsr(torch.eye(32), (16, 16)), torch.zeros(1, 32)),
    "not 4x4": lambda: bsr_vendor.why_not("mm", pack_bsr(torch.eye(8), (4, 4)), torch.zeros(1, 8)),
    "that divide W": lambda: bsr_vendor.why_not("mm", pack_bsr(torch.eye(40), (16, 16)), torch.zeros(1, 40)),
    "BSR product is not asked": lambda: bsr_vendor.why_not(
        "mm", pack_bsr(torch.zeros(32, 32), (16, 16)), torch.zeros(1, 32)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    if ON_CARD and "CUDA" in reason:
        pytest.skip("here it runs")
    torch.set_default_device("cpu")
    assert reason in str(REFUSED[reason]())


def test_they_are_candidates_on_a_gpu() -> None:
    assert dispatch.backends("csr", "cuda") == ("cuda", "vendor", "ref")
    assert dispatch.backends("bsr", "cuda") == ("triton", "vendor", "ref")
