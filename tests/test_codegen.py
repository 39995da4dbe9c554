"""What nvcc made of the CUDA kernels, where the GPU module was built: no spills, the instructions that were meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sparsekern._sources import cuda_units

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build" / f"cuda-{sys.implementation.cache_tag}"
UNITS = [(name, source) for source, name, _ in cuda_units() if source.suffix == ".cu" and source.stem != "launch"]


@cache
def entries(unit: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilled) of every kernel that ptxas reported for a unit."""
    log = OBJECTS / f"{unit}.o.log"
    if not log.exists():
        pytest.skip("the GPU module was not built here (no nvcc, or SPARSEKERN_CUDA_ARCHS=none)")
    found, kernel, arch, spilled = [], "", "", 0
    for line in log.read_text().splitlines():
        if named := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, arch = named[1], named[2]
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found.append((kernel, arch, int(used[1]), spilled))
    return found


@pytest.mark.parametrize("unit", [name for name, _ in UNITS])
def test_nothing_spills(unit: str) -> None:
    kernels = entries(unit)
    assert kernels, "ptxas reported no kernel"
    for kernel, arch, registers, spilled in kernels:
        print(f"{arch:8} {registers:4} registers {spilled:5} bytes spilled  {kernel}")
    assert {(kernel, arch): spilled for kernel, arch, _, spilled in kernels if spilled} == {}


@pytest.mark.parametrize("unit", [name for name, _ in UNITS])
def test_products_are_not_serialised(unit: str) -> None:
    """ptxas says so where it must wait after every wgmma, or ignores setmaxnreg."""
    entries(unit)
    log = (OBJECTS / f"{unit}.o.log").read_text()
    assert not re.findall(r"\(C75\d\d\).*", log)


def disassembler() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton

            found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        except ImportError:
            found = None
    if found is None or not Path(found).exists():
        pytest.skip("no cuobjdump: it comes with CUDA and inside Triton's wheel")
    return found


def sass(unit: str) -> dict[str, str]:
    """The machine code of a unit's kernels, by name."""
    entries(unit)
    done = subprocess.run([disassembler(), "-sass", str(OBJECTS / f"{unit}.o")], capture_output=True, text=True)
    parts = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("unit", "product"),
    [
        ("sp24_launch_sm90_1", r"HGMMA\.SP\S+ R\d+, R\d+, gdesc"),
        ("sp24_launch_sm90_2", r"HGMMA\.SP\S+ R\d+, R\d+, gdesc"),
        ("sp24_launch_sm90_3", r"IGMMA\.SP\S+ R\d+, R\d+, gdesc"),
        ("sp24_launch_sm90_4", r"QGMMA\.SP\S+ R\d+, R\d+, gdesc"),
        ("sp24_launch_sm80_1", r"HMMA\.SP"),
        ("sp24_launch_sm80_2", r"HMMA\.SP"),
        ("sp24_launch_sm80_3", r"IMMA\.SP"),
    ],
)
def test_sparse_products(unit: str, product: str) -> None:
    """Every kernel multiplies on the sparse tensor cores; on sm_90a with the weight's operand in registers."""
    kernels = {name: code for name, code in sass(unit).items() if "sp24_mm" in name or "sp24_decode" in name}
    assert kernels
    for name, code in kernels.items():
        assert re.search(product, code), name
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"


def test_windows_come_by_tma() -> None:
    """The producer of every 16-bit kernel of Hopper has both roads: boxes of a matrix, and pixels of images."""
    for unit in ("sp24_launch_sm90_1", "sp24_launch_sm90_2"):
        for name, code in sass(unit).items():
            assert re.search(r"UTMALDG\.2D", code), name
            assert re.search(r"UTMALDG\.4D\.IM2COL", code), name


def test_the_main_loop_keeps_a_group_in_flight() -> None:
    """Between two groups of products no wait for zero groups: DEPBAR.LE gsb0, 0x1 inside, 0x0 only at the end."""
    for name, code in sass("sp24_launch_sm90_1").items():
        waits = [int(found, 16) for found in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code)]
        assert waits.count(1) >= 3, name  # one for each set of fragments
        assert waits.count(0) == 1, name
