"""What nvcc made of the CUDA kernels, where the GPU module was built: no spills, the instructions that were meant.

For every architecture that it was built for: SPARSEKERN_CUDA_ARCHS=80,86,89,90a,100,120 python setup.py build_ext
--inplace builds all. Run with -rP to see the tables.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekern._ext import FP8
from sparsekern._sources import cuda_units, find_nvcc
from sparsekern.sp24 import config

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build" / f"cuda-{sys.implementation.cache_tag}"
UNITS = [(name, source) for source, name, _ in cuda_units() if source.suffix == ".cu" and name != "sp24_launch"]


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


UNREACHABLE = 8  # registers at most: of a kernel that this architecture cannot launch, which is a trap and no more


@cache
def sass(unit: str) -> dict[tuple[str, str], str]:
    """The machine code of a unit's kernels that can be reached, by architecture and name."""
    trap = {(arch, kernel) for kernel, arch, registers, _ in entries(unit) if registers <= UNREACHABLE}
    done = subprocess.run([disassembler(), "-sass", str(OBJECTS / f"{unit}.o")], capture_output=True, text=True)
    found = {}
    by_arch = re.split(r"^\s*code for (sm_\w+)$", done.stdout, flags=re.MULTILINE)
    for arch, text in zip(by_arch[1::2], by_arch[2::2], strict=True):
        parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
        found |= {(arch, name): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}
    return {key: code for key, code in found.items() if key not in trap}


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
        ("sp24_launch_sm80_4", r"QMMA\.SP"),
    ],
)
def test_sparse_products(unit: str, product: str) -> None:
    """Every kernel multiplies on the sparse tensor cores; on sm_90a with the weight's operand in registers.

    None of them by a conversion to 16 bits: where an architecture's mma.sp has no fp8, its kernels have no products.
    """
    kernels = {key: code for key, code in sass(unit).items() if "sp24_mm" in key[1] or "sp24_decode" in key[1]}
    assert kernels
    for (arch, name), code in kernels.items():
        if unit == "sp24_launch_sm80_4" and arch not in ("sm_89", "sm_120"):
            assert not re.search(r"\b[HIQ]MMA\b", code), (arch, name)
            continue
        assert re.search(product, code), (arch, name)
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory on {arch}"


def test_windows_come_by_tma() -> None:
    """The producer of every 16-bit kernel of Hopper has both roads: boxes of a matrix, and pixels of images."""
    for unit in ("sp24_launch_sm90_1", "sp24_launch_sm90_2"):
        for name, code in sass(unit).items():
            assert re.search(r"UTMALDG\.2D", code), name
            assert re.search(r"UTMALDG\.4D\.IM2COL", code), name


def test_the_main_loop_keeps_a_group_in_flight() -> None:
    """Between two groups of products no wait for zero groups: DEPBAR.LE gsb0, 0x1 inside, 0x0 only at the end."""
    for key, code in sass("sp24_launch_sm90_1").items():
        waits = [int(found, 16) for found in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code)]
        assert waits.count(1) >= 3, key  # one for each set of fragments
        assert waits.count(0) == 1, key


def test_promoted_sums_are_added_beside_products() -> None:
    """Of MmSm90<..., true>: two more products between two waits of a block of K, then 32 additions."""
    kernels = {name: code for (_, name), code in sass("sp24_launch_sm90_4").items() if "ELb1E" in name}
    assert len(kernels) == 3
    for name, code in kernels.items():
        steps = re.findall(r"(QGMMA\.SP|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|FADD)", code)
        first = next(i for i, step in enumerate(steps) if step.startswith("QGMMA"))
        last = max(i for i, step in enumerate(steps) if step.startswith("WARPGROUP"))
        loop = "".join({"Q": "m", "F": "+"}.get(step[0], step[-1]) for step in steps[first : last + 33])
        parts = 3 if "Li192E" in name else 2
        block = "mm" + r"mm1\+{32}" * (parts - 1) + r"0\+{32}"
        assert re.fullmatch(f"({block})+", loop), (name, loop)


def test_gradients_keep_a_group_in_flight() -> None:
    """Dense wgmma: W^T from registers, of which a group is always in flight; the sampled product from shared memory."""
    for kernel, product, waits in (
        ("mm_t", r"HGMMA\.64x\d+x16\.F32\S* R\d+, R\d+, gdesc", 4),
        ("sddmm", r"HGMMA\.64x256x16\.F32\S* R\d+, gdesc\[\w+\]\.tnspA\.tnspB", 1),
    ):
        found = {key: code for key, code in sass("sp24_launch_grad_sm90_1").items() if f"sp24_{kernel}_sm90" in key[1]}
        assert found
        for key, code in found.items():
            assert re.search(product, code), key
            assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code) == ["1"] * waits + ["0"], key
            assert not re.search(r"\b(LDL|STL)\b", code), key


def test_bitmaps_become_operands() -> None:
    """Every kernel multiplies what it has decoded in registers: by wgmma on sm_90a, by mma elsewhere."""
    for unit, kernel, product in (
        ("bitmap_launch_sm90", "bitmap_mm_sm90", r"HGMMA\.64x\d+x16\.F32\S* R\d+, R\d+, gdesc"),
        ("bitmap_launch", "bitmap_mm_sm80", r"HMMA\.16816\.F32"),
    ):
        found = {key: code for key, code in sass(unit).items() if kernel in key[1]}
        assert found, unit
        for (arch, name), code in found.items():
            assert re.search(product, code), (arch, name)
            assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory on {arch}"


OTHERS = [  # unit, operand type, architecture, what multiplies (None: not the tensor cores)
    ("sp24/launch_sm80.cu", 1, "80", r"HMMA\.SP"),
    ("sp24/launch_sm80.cu", 3, "86", r"IMMA\.SP"),
    ("sp24/launch_sm80.cu", 4, "89", r"QMMA\.SP"),
    ("sp24/launch_sm80.cu", 4, "120", r"QMMA\.SP"),
    ("bitmap/launch.cu", 0, "80", r"HMMA\.16816"),
    ("csr/launch.cu", 0, "80", None),
]


@pytest.mark.parametrize(("unit", "kind", "arch", "product"), OTHERS)
def test_other_architectures(unit: str, kind: int, arch: str, product: str | None, tmp_path: Path) -> None:
    """Units compiled here for cards that the module was not built for: no spills, the instruction that was meant.

    Every unit for every architecture is a release's build (SPARSEKERN_CUDA_ARCHS, head of this file).
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path / "unit.cubin"
    flags = ["-std=c++20", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", f"-DSK_TYPE={kind}", "-cubin"]
    done = subprocess.run([nvcc, *flags, str(ROOT / "csrc" / unit), "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"[1-9]\d* bytes spill", done.stderr)
    code = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", code, flags=re.MULTILINE)
    found = {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if "BPT.TRAP" not in text}
    assert found
    products = [text for name, text in found.items() if re.search(r"(sp24|bitmap)_(mm|decode)", name)]
    assert bool(products) == (product is not None)
    assert all(re.search(str(product), text) for text in products)


LOGIC = [
    "LOP3",
    "SHF",
    "PRMT",
    "IADD3",
    "ISETP",
    "SEL",
    "LEA",
    "VIADD",
    "R2P",
    "SGXT",
    "BMSK",
    "IABS",
    "IMNMX",
    "VIMNMX",
    "PLOP3",
]
MULTIPLY = ["IMAD", "IDP"]
SHARED = ["LDS", "LDSM", "STS", "SHFL"]


def loop(code: str, product: str) -> list[str]:
    """The instructions of the smallest loop that holds most of the products."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?(\w+)([^;]*);", code)
    steps = [(int(at, 16), word, rest) for at, word, rest in lines]
    back = [(int(to[1], 16), at) for at, word, rest in steps if word == "BRA" and (to := re.search(r"0x(\w+)", rest))]
    ranges = [(sum(low <= at <= high and word == product for at, word, _ in steps), low - high, low, high)
              for low, high in back if low < high]  # fmt: skip
    _, _, low, high = max(ranges)
    return [word for at, word, _ in steps if low <= at <= high]


def test_decoding_keeps_up_with_the_memory() -> None:
    """What csrc/bitmap/fragments.cuh promises of a warp's 1024 weights: 55 cycles of a multiprocessor.

    It issues four instructions of a warp a cycle, and completes two of logic, two multiplications and one access of
    shared memory.
    """
    kernels = {name: code for (_, name), code in sass("bitmap_launch_sm90").items() if "bitmap_mm_sm90" in name}
    assert kernels
    for name, code in kernels.items():
        words = loop(code, "HGMMA")
        counts = [sum(word in kind for word in words) for kind in (LOGIC, MULTIPLY, SHARED)]
        print(f"{len(words)} instructions, {counts[0]} logic, {counts[1]} multiply, {counts[2]} shared  {name}")
        assert len(words) <= 220
        assert counts[0] <= 110
        assert counts[1] <= 110
        assert counts[2] <= 44


def test_shared_memory(device_module: Any) -> None:
    """Every architecture has a kernel for few tokens and one for many of each type that it multiplies; printed."""
    for dtype, number in ((torch.bfloat16, 1), (torch.int8, 3), (FP8, 4)):
        kernels = [config.Kernel(*row) for row in device_module.sp24_kernels(number)]
        for i, kernel in enumerate(kernels):
            fits = [arch for arch, most in config.SHARED.items() if kernel.shared_bytes <= most * 1024]
            fits = [90] if kernel.family == "mm_sm90" else fits
            tile = f"{kernel.rows} x {kernel.tokens}"
            print(f"{dtype} {i:2} {kernel.family:8} {tile:10} {kernel.shared_bytes / 1024:6.1f} KiB, fits sm_{fits}")
        for arch, most in config.SHARED.items():
            if dtype == FP8 and arch not in (89, 120):
                continue
            here = [kernel for kernel in kernels if kernel.shared_bytes <= most * 1024]
            assert any(kernel.family == "decode" and kernel.tokens >= 16 for kernel in here), (dtype, arch)
            assert any(kernel.family == "mm_sm80" and kernel.tokens >= 128 for kernel in here), (dtype, arch)
