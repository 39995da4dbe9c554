"""Threads: the same bits for any number of them, and calls from several Python threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import FOUR, Case, param
from conftest import Backend, host_isas

from sparsekern import _ext
from sparsekern.testing import assert_close, host_isa, poisoned, random_dense, reference_mm, threads

# Just above the work from which the kernels share it: (M, N, K) at density 1/2.
SHAPES = ((1, 2050, 2050), (8, 514, 1026), (65, 258, 514))
# How work is shared is the same code on every level: the lowest, the highest and one between tell enough.
LEVELS = sorted({*host_isas()[:2], *host_isas()[-1:]})


@param((*FOUR, Case("bsr", (32, 32))))
@param((torch.float32, torch.bfloat16), "dtype")
@pytest.mark.parametrize("isa", LEVELS)
def test_threads_agree_to_the_bit(case: Case, dtype: torch.dtype, isa: str) -> None:
    backend = Backend("host", isa)
    for m, n, k in SHAPES:
        dense = case.dense(n, k, dtype, 0.5)
        layout = case.pack(dense)
        x, dy = random_dense(m, k, dtype=dtype, seed=1), random_dense(m, n, dtype=dtype, seed=2)
        bias = random_dense(n, dtype=dtype, seed=3)
        call = {
            "mm": lambda: backend.mm(layout, x, bias, "gelu"),  # noqa: B023
            "mm_t": lambda: backend.mm_t(layout, dy),  # noqa: B023
            "sddmm": lambda: backend.sddmm(layout, dy, x),  # noqa: B023
        }
        with host_isa(isa):
            for op in [op for op, t in (("mm", x), ("mm_t", dy), ("sddmm", x)) if backend.runs(op, layout, t)]:
                outs = []
                for count in (1, 2, 3):
                    with threads(count), poisoned():
                        outs.append(call[op]())
                assert torch.equal(outs[0], outs[1]), f"{op} M={m}: two threads"
                assert torch.equal(outs[0], outs[2]), f"{op} M={m}: three threads"
                if op == "mm":
                    assert_close(outs[0], reference_mm(dense, x, bias, "gelu"), dtype)


@param(FOUR)
def test_many_callers(case: Case) -> None:
    """Several Python threads share one weight, its derived index and the worker pool (the GIL is released)."""
    n, k, m = 258, 514, 33
    dense = case.dense(n, k)
    layout = case.pack(dense)
    backend = Backend("host")
    xs = [random_dense(m, k, seed=i) for i in range(8)]
    if not backend.runs("mm", layout, xs[0]):
        return
    with threads(2), ThreadPoolExecutor(4) as pool:
        for x, y in zip(xs, pool.map(lambda x: backend.mm(layout, x), xs), strict=True):
            assert_close(y, reference_mm(dense, x), torch.float32)


ALONE = """
import os, numpy, torch
import sparsekern as sk
torch.set_num_threads(3)
w, x = sk.to_csr(torch.randn(1024, 1024)), torch.randn(64, 1024)
big = torch.randn(4_000_000)
{body}
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and fork are Linux's")


def _alone(body: str) -> str:
    code = ALONE.format(body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@LINUX
@pytest.mark.skipif(_ext.openmp() == 0, reason="this torch has no OpenMP")
def test_the_threads_are_those_of_torch() -> None:
    """No second set of threads beside torch's, whose waiting threads would fight it for the cores."""
    body = """
tasks = lambda: len(os.listdir("/proc/self/task"))
big.exp()
before = tasks()
sk.linear(x, w)
print(before, tasks())
"""
    before, after = map(int, _alone(body).split())
    assert after == before


@LINUX
def test_a_forked_child_works() -> None:
    """GNU's OpenMP hangs in a child whose parent used it; our own threads take over there."""
    body = """
y = sk.linear(x, w).numpy()
child = os.fork()
if child == 0:
    os._exit(0 if numpy.array_equal(sk.linear(x, w).numpy(), y) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert _alone(body).strip() == "0"
