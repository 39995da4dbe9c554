"""Builds sparsekern._host with g++ (or clang++) and ninja. Imports no torch.

Every csrc/<format>/host.cpp is compiled once per instruction set; csrc/core/isa.h says how the sets are told
apart. Environment: SPARSEKERN_ISAS=portable,amx builds only those; SPARSEKERN_SANITIZE=address,undefined adds
sanitizers; CXX names the compiler.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FORMATS = ("csr", "bsr", "sp24", "bitmap")
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd -mprefer-vector-width=512"
BF16 = f"{AVX512} -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mavx512vpopcntdq -mavx512bf16"
# In rising order: core/isa.h has the same names and numbers.
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt",
    "avx512": f"-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt {AVX512}",
    "avx512_bf16": f"-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt {BF16}",
    "amx": f"-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt {BF16} -mamx-tile -mamx-bf16 -mamx-int8",
}


def say(message: str) -> None:
    """One line that is seen even where pip hides a build's output."""
    print(f"sparsekern: {message}", file=sys.stderr, flush=True)


def accepts(cxx: str, flags: str) -> bool:
    command = [cxx, *flags.split(), "-x", "c++", "-E", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def wanted_isas(cxx: str) -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = [name for name in ISA_FLAGS if name == "portable" or (x86 and accepts(cxx, ISA_FLAGS[name]))]
    only = os.environ.get("SPARSEKERN_ISAS")
    if only:
        unknown = set(only.split(",")) - set(ISA_FLAGS)
        if unknown:
            raise SystemExit(f"SPARSEKERN_ISAS: unknown {sorted(unknown)}; known: {list(ISA_FLAGS)}")
        names = [name for name in names if name in only.split(",")]
    return names


def ninja_file(cxx: str, out: Path, objects: Path) -> str:
    """The whole build as a ninja file: a rule to compile, a rule to link, one edge per source and set."""
    import pybind11

    sources = runpy.run_path(str(ROOT / "sparsekern" / "_sources.py"))["digest"]()
    isas = wanted_isas(cxx)
    built = sum(1 << i for i, name in enumerate(ISA_FLAGS) if name in isas)
    sanitize = os.environ.get("SPARSEKERN_SANITIZE", "")
    optimise = "-O0 -g1" if sanitize else "-O3"  # -O1 with sanitizers takes three times as long to compile
    # Not for bind*.cpp: they only pass integers on, and pybind11 takes minutes to compile with sanitizers.
    checked = f"-fsanitize={sanitize} -fno-sanitize=null,object-size" if sanitize else ""
    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    common = f"-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -pthread -DSK_BUILT_ISAS={built} {optimise}"
    lines = [
        f"cxx = {cxx}",
        f"common = {common} {includes}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $common $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared -pthread {'-fsanitize=' + sanitize if sanitize else ''} $link $in -o $out",
        "  description = $out",
    ]
    if sys.platform == "darwin":
        lines.append("  link = -undefined dynamic_lookup")
    made: list[str] = []

    def edge(source: Path, name: str, flags: str = "") -> None:
        target = objects / f"{name}.o"
        flags = flags if source.stem.startswith("bind") else f"{flags} {checked}".strip()
        lines.append(f"build {escape(target)}: compile {escape(source)}")
        if flags:
            lines.append(f"  flags = {flags}")
        made.append(escape(target))

    # Plain sources first: where a library template is emitted by several objects the linker keeps the first, and
    # that one must run on every processor.
    for source in sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "core").glob("*.cpp")):
        edge(source, source.stem, f"-DSK_SOURCES={sources}ull" if source.stem == "sources" else "")
    for fmt in FORMATS:
        for source in sorted((ROOT / "csrc" / fmt).glob("bind*.cpp")):
            edge(source, f"{fmt}_{source.stem}")
    for isa in isas:
        for fmt in FORMATS:
            for source in sorted((ROOT / "csrc" / fmt).glob("host*.cpp")):
                flags = f"{ISA_FLAGS[isa]} -DSK_ISA={isa} -ffp-contract=fast -fno-math-errno -fno-trapping-math"
                edge(source, f"{fmt}_{source.stem}_{isa}", flags)
    lines.append(f"build {escape(out)}: link {' '.join(made)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it; without a compiler the package installs with its torch backend only."""

    def build_extension(self, ext: Extension) -> None:
        cxx = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
        if cxx is None or shutil.which(cxx.split()[0]) is None:
            say("no C++ compiler (g++) found: the CPU kernels are not built and every op runs on plain torch")
            return
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp: pip makes a new one for every editable install, and the build would never be incremental.
        kind = "-".join(["host", *os.environ.get("SPARSEKERN_SANITIZE", "").split(",")]).rstrip("-")
        objects = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        objects.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(cxx, out, objects))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(objects), *jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit("sparsekern: the C++ build failed; the compiler's message is above") from error
        if shutil.which("nvcc") is None:
            say("no nvcc found: the GPU kernels are not built and CUDA tensors run on plain torch")

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.build_lib, self.get_ext_filename(e.name)).exists() for e in self.extensions):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(ext_modules=[Extension("sparsekern._host", sources=[])], cmdclass={"build_ext": NinjaBuild})
