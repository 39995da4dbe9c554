"""Builds the emulator: the translation units of sparsekern._cuda by g++, with the engine, as module _emulator.

On a machine with a GPU the same probes are built by nvcc instead, as module _probes (python tests/emulator/build.py).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

from sparsekern._sources import cuda_units, find_nvcc

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROBES = HERE / "probes.cu"


def build() -> ModuleType:
    """The emulator, built or brought up to date in build/emulator-<python>."""
    folder = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    cxx = os.environ.get("CXX") or next(name for name in ("g++", "clang++") if shutil.which(name))
    includes = (ROOT / "csrc", ROOT / "csrc" / "device", HERE, pybind11.get_include(), sysconfig.get_path("include"))
    flags = " ".join(f"-I{shlex.quote(str(path))}" for path in includes)
    lines = [
        f"flags = -std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -DSK_EMULATOR {flags}",
        "rule compile",
        f"  command = {cxx} $flags $more -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared -pthread $in -o $out",
    ]
    made = []
    units = [*cuda_units(), *((HERE / name, Path(name).stem, None) for name in ("engine.cpp", "probes.cu"))]
    for source, name, kind in units:
        made.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {_escaped(source)}")
        if kind:
            lines.append(f"  more = -DSK_TYPE={kind}")
    lines.append(f"build {_escaped(out)}: link {' '.join(made)}")
    with FileLock(folder / "lock"):  # of several test processes one builds, and the others wait
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = [sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)]
        done = subprocess.run(ninja, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator cannot be built:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return _load("_emulator", out)


def build_probes() -> ModuleType:
    """The probes for the GPU that is here (sm_90a)."""
    folder = ROOT / "build" / f"probes-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"_probes{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = (PROBES, *(ROOT / "csrc" / "device").glob("*.h"))
    with FileLock(folder / "lock"):
        if not out.exists() or out.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            compile_probes(out, "-Xcompiler", "-fPIC", "-shared")
    return _load("_probes", out)


def compile_probes(out: Path, *how: str) -> None:
    """probes.cu by nvcc for sm_90a, into what `how` says. RuntimeError with nvcc's words where it cannot."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc found in CUDACXX, on PATH, in CUDA_HOME or in /usr/local/cuda")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-O2", "-gencode", "arch=compute_90a,code=sm_90a"]
    new = out.with_name(f"{out.name}.new")
    command = [nvcc, *flags, *how, *includes, str(PROBES), "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the probes cannot be built:\n{shlex.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    new.replace(out)


def _load(name: str, out: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, out)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    print(build_probes())
