"""Which C++ sources a compiled module is made of, and by which nvcc. Imports no torch: setup.py runs this file, too."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def digest(folder: Path = CSRC, *, cuda: bool = False) -> int | None:
    """64 bits of the names and texts of the host's (or the GPU's) sources; None where they are not (a wheel)."""
    if not (folder / "sources.cpp").is_file():
        return None
    whole = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")):
        name = file.relative_to(folder)
        on_gpu = name.parts[0] in ("cuda", "device") or file.suffix in (".cuh", ".cu")
        if on_gpu == cuda:
            text = file.read_bytes()
            whole.update(f"{name.as_posix()}\0{len(text)}\0".encode() + text)
    return int.from_bytes(whole.digest(), "big")


def cuda_units(folder: Path = CSRC) -> list[tuple[Path, str, str | None]]:
    """The GPU module's translation units: (source, name, operand type for -DSK_TYPE or None), slowest first.

    A source with a line `// SK_TYPE: 1 2` is compiled once for each of these types. One whose name has sm90 is for
    sm_90a alone. The emulator of the tests is made of the same units.
    """
    units = []
    for source in sorted(folder.glob("*/launch*.cu"), key=lambda path: ("sm90" not in path.name, path)):
        found = re.search(r"^// SK_TYPE: (.*)$", source.read_text(), re.MULTILINE)
        for kind in found[1].split() if found else [None]:
            name = "_".join(filter(None, (source.parent.name, source.stem, kind)))
            units.append((source, name, kind))
    return units + [(source, f"bind_{source.stem}", None) for source in sorted(folder.glob("cuda/*.cpp"))]


def find_nvcc() -> str | None:
    """The nvcc in CUDACXX, on PATH, below CUDA_HOME (or CUDA_PATH), or in /usr/local/cuda; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    below = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or below or shutil.which("/usr/local/cuda/bin/nvcc")
