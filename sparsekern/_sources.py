"""Which C++ sources a compiled module belongs to. Imports no torch: setup.py runs this file, too."""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def digest(folder: Path = CSRC) -> int | None:
    """64 bits of the names and texts of the host's C++ files in `folder`; None where they are not (a wheel)."""
    if not (folder / "sources.cpp").is_file():
        return None
    whole = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp")):
        if file.relative_to(folder).parts[0] in ("cuda", "device"):
            continue
        text = file.read_bytes()
        whole.update(f"{file.relative_to(folder).as_posix()}\0{len(text)}\0".encode() + text)
    return int.from_bytes(whole.digest(), "big")
