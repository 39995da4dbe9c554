"""What Triton's compiler makes of the kernels for cards that need not be here: instructions, spills, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparsekern import _ext
from sparsekern.bsr.config import shared_limit

HERE = Path(__file__).parent
MISSING = _ext.why_not_triton_compiler()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# The matrix instruction of 16-bit products with at least 64 tokens.
FAST = {80: "mma.sync.aligned.m16n8k16", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync.aligned.m16n8k16"}


@cache
def _compilers() -> dict[int, subprocess.Popen[str]]:
    """A process for every card, beside each other; they do not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *sys.path])
    command = [sys.executable, str(HERE / "codegen.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return {cc: subprocess.Popen([*command, str(cc), "quick"], **pipes) for cc in FAST}


@cache
def compiled(cc: int) -> dict[str, dict[str, Any]]:
    """A row for every case, by name."""
    out, errors = _compilers()[cc].communicate(timeout=900)
    assert _compilers()[cc].returncode == 0, errors[-2000:]
    return {row["case"]: row for row in map(json.loads, out.splitlines())}


@pytest.mark.parametrize("cc", FAST)
def test_every_kernel_compiles_without_spills(cc: int) -> None:
    rows = compiled(cc)
    assert len(rows) >= 24
    for name, row in rows.items():
        assert "error" not in row, row
        # Where ptxas stays below 255 registers by its own choice, for one more block, a word of an ending may go.
        assert row["spills"] <= (1 if "-full" in name and row["registers"] <= 168 else 0), row
        assert row["registers"] <= 255, row
        assert row["shared"] <= shared_limit(cc), row
        assert row["shared"] >= row["ahead"], f"{name}: not all stages are loaded ahead: {row}"


@pytest.mark.parametrize("cc", FAST)
def test_matrix_instructions(cc: int) -> None:
    rows = compiled(cc)
    for name, row in rows.items():
        used = row["matrix"]
        if "ieee" in name or name.startswith(("mm_join", "conv2d_join", "add_parts")):
            assert not used, f"{name} needs no matrix unit, uses {used}"
            continue
        else:
            assert used, f"{name} uses no matrix instruction"
        if "bf16" in name and "-m8-" not in name:
            assert any(instruction.startswith(FAST[cc]) for instruction in used), row
    assert any("tf32" in used for used in rows["mm-m4096-64x64-fp32-tf32x3"]["matrix"])
    assert any("s8" in used or "i8" in used for used in rows["mm-m4096-64x64-i8"]["matrix"])
    for name, row in rows.items():  # tensor maps on Hopper and Blackwell, for 16-bit products with many tokens
        if "-m4096-" in name and not name.startswith("mm_join"):
            assert row["maps"] == (
                cc in (90, 100) and "bf16" in name and not {"pointers", "bf16*i8"} & set(name.split("-"))
            ), (name, row)


def test_blocks_of_16_fill_the_instruction_with_tokens() -> None:
    """64 rows of wgmma are tokens; the block's 16 rows are its columns."""
    assert any("m64n16k16" in used for used in compiled(90)["mm-m4096-16x16-bf16"]["matrix"])
    assert any("m64n128k16" in used for used in compiled(90)["mm-m4096-128x128-bf16"]["matrix"])
