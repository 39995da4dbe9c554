"""Builds sparsekern._host with g++ (or clang++), and sparsekern._cuda with nvcc, by ninja. Imports no torch.

Every csrc/<format>/host.cpp is compiled once per instruction set; csrc/core/isa.h says how the sets are told
apart. Environment: SPARSEKERN_ISAS=avx2,amx builds only those and portable, which is always built;
SPARSEKERN_SANITIZE=address,undefined adds sanitizers; CXX names the compiler, with arguments if need be.
SPARSEKERN_CUDA_ARCHS=80,90a names the GPU architectures (default: that of the GPU here, without one all; "none": no
GPU module); CUDACXX names nvcc.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FORMATS = ("csr", "bsr", "sp24", "bitmap")
# 90a: the sm_90a kernels, and the others for sm_90. 75 and older have no sparse tensor cores.
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
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
    """One line on stderr. pip shows it with -v only; scripts/setup shows it always."""
    print(f"sparsekern: {message}", file=sys.stderr, flush=True)


def find_compiler() -> list[str]:
    """The command in CXX, which may have arguments ("ccache g++"), else the first of the usual names; may be empty."""
    named = shlex.split(os.environ.get("CXX", ""))
    return named or next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), [])


def complaint(cxx: list[str], flags: list[str], source: str = "") -> str | None:
    """The compiler's first line of error for this source with these flags, or None where it compiles."""
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


def why_not_host(cxx: list[str]) -> str | None:
    """What this machine lacks to build the CPU kernels, or None where they can be built."""
    if not cxx or shutil.which(cxx[0]) is None:
        return f"no C++ compiler ({shlex.join(cxx) or 'g++'}) found"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not any(Path(folder, "Python.h").exists() for folder in python_includes()):
        return f"no Python.h of {python} found (on Debian and Ubuntu: apt-get install {python}-dev)"
    error = complaint(cxx, ["-std=c++20"], "#include <atomic>\n#include <concepts>\n#include <thread>\n")
    return error and f"{shlex.join(cxx)} cannot compile C++20, which g++ 11 and clang++ 14 can ({error})"


def python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    return sorted({paths["include"], paths["platinclude"]})


def wanted_isas(cxx: list[str]) -> list[str]:
    """The sets to build: those asked for (all, unless SPARSEKERN_ISAS names some) that the compiler has flags for."""
    only = os.environ.get("SPARSEKERN_ISAS")
    unknown = set(only.split(",") if only else ()) - set(ISA_FLAGS)
    if unknown:
        raise SystemExit(f"SPARSEKERN_ISAS: unknown {sorted(unknown)}; known: {list(ISA_FLAGS)}")
    asked = ["portable", *(n for n in ISA_FLAGS if n != "portable" and (not only or n in only.split(",")))]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["portable"]
    refused = [name for name in asked if complaint(cxx, ISA_FLAGS[name].split())]
    if refused:
        say(f"{shlex.join(cxx)} cannot compile for {', '.join(refused)}: such processors run the next lower kernels")
    return [name for name in asked if name not in refused]


def why_not_cuda(nvcc: str | None) -> str | None:
    """What this machine lacks to build the GPU kernels, or None where they can be built."""
    if os.environ.get("SPARSEKERN_CUDA_ARCHS") == "none":
        return "SPARSEKERN_CUDA_ARCHS=none"
    if nvcc is None:
        return "no nvcc found"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if done.returncode or not version:
        return f"{nvcc} does not run"
    if (int(version[1]), int(version[2])) < (12, 5):
        return f"{nvcc} is of CUDA {version[1]}.{version[2]}, and mma.sp::ordered_metadata needs 12.5"
    return None


def wanted_archs() -> list[str]:
    """The GPU architectures to build for: those asked for, else that of the GPU here, else all."""
    asked = os.environ.get("SPARSEKERN_CUDA_ARCHS")
    if asked:
        unknown = set(asked.split(",")) - set(CUDA_ARCHS)
        if unknown:
            raise SystemExit(f"SPARSEKERN_CUDA_ARCHS: unknown {sorted(unknown)}; known: {list(CUDA_ARCHS)}")
        return asked.split(",")
    smi = shutil.which("nvidia-smi")
    command = [smi or "", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split() if smi else []
    here = {"90a" if cap == "9.0" else cap.replace(".", "") for cap in found}
    return sorted(here & set(CUDA_ARCHS)) or list(CUDA_ARCHS)


def cuda_ninja_file(cxx: list[str], nvcc: str, out: Path, objects: Path) -> str:
    """The GPU module's build: nvcc for csrc/*/launch*.cu, the C++ compiler for the bindings and to link."""
    import pybind11

    sources = runpy.run_path(str(ROOT / "sparsekern" / "_sources.py"))
    archs = wanted_archs()
    plain = [arch.rstrip("a") for arch in archs]
    codes = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in plain)
    codes += f" -gencode arch=compute_{plain[-1]},code=compute_{plain[-1]}"  # for cards that are newer than this
    home = Path(os.path.realpath(nvcc_root(nvcc)))
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in (pybind11.get_include(), *python_includes()))
    lines = [
        f"cxx = {shlex.join(cxx)}".replace("$", "$$"),
        f"nvcc = {shlex.quote(nvcc)} -ccbin {shlex.quote(cxx[-1])}".replace("$", "$$"),
        f"python = {includes}".replace("$", "$$"),
        "rule device",  # what ptxas says of registers and spills stays beside the object, for the tests
        "  command = $nvcc -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v -MD -MF $out.d $flags "
        "-c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule compile",
        "  command = $cxx -std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared -pthread $in -o $out -L{shlex.quote(str(home / 'lib64'))} "
        f"-L{shlex.quote(str(home / 'lib'))} -lcudart_static -ldl -lrt",
        "  description = $out",
    ]
    made = []
    for source, name, kind in sources["cuda_units"]():
        target = escape(objects / f"{name}.o")
        if source.suffix == ".cpp":
            flags = f"$python -DSK_SOURCES={sources['digest'](cuda=True)}ull -DSK_ARCHS='\"{','.join(archs)}\"'"
            lines += [f"build {target}: compile {escape(source)}", f"  flags = {flags}"]
        else:
            flags = codes
            if "sm90" in source.name:
                flags = "-gencode arch=compute_90a,code=sm_90a" + ("" if "90a" in archs else " -DSK_NO_KERNELS")
            flags += f" -DSK_TYPE={kind}" if kind else ""
            lines += [f"build {target}: device {escape(source)}", f"  flags = {flags}"]
        made.append(target)
    lines.append(f"build {escape(out)}: link {' '.join(made)}")
    return "\n".join(lines) + "\n"


def nvcc_root(nvcc: str) -> str:
    """The toolkit's folder; nvcc itself may be a script that calls another."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    return top[1] if top else str(Path(nvcc).resolve().parent.parent)


def ninja_file(cxx: list[str], out: Path, objects: Path) -> str:
    """The whole build as a ninja file: a rule to compile, a rule to link, one edge per source and set."""
    import pybind11

    sources = runpy.run_path(str(ROOT / "sparsekern" / "_sources.py"))["digest"]()
    isas = wanted_isas(cxx)
    built = sum(1 << i for i, name in enumerate(ISA_FLAGS) if name in isas)
    sanitize = os.environ.get("SPARSEKERN_SANITIZE", "")
    optimise = "-O0 -g1" if sanitize else "-O3"  # -O1 with sanitizers takes three times as long to compile
    # Not for bind*.cpp: they only pass integers on, and pybind11 takes minutes to compile with sanitizers.
    checked = f"-fsanitize={sanitize} -fno-sanitize=null,object-size" if sanitize else ""
    # For bind*.cpp alone: with pip's build isolation pybind11 lies elsewhere every time, and all would be rebuilt.
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in (pybind11.get_include(), *python_includes()))
    common = f"-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -pthread -DSK_BUILT_ISAS={built} {optimise}"
    lines = [
        f"cxx = {shlex.join(cxx)}".replace("$", "$$"),
        f"common = {common}",
        f"python = {includes}".replace("$", "$$"),
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
        flags = f"{flags} {'$python' if source.stem.startswith('bind') else checked}".strip()
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
        nvcc = runpy.run_path(str(ROOT / "sparsekern" / "_sources.py"))["find_nvcc"]()
        cxx, on_gpu = find_compiler(), ext.name.endswith("_cuda")
        missing = why_not_host(cxx)
        if on_gpu:
            if os.environ.get("SPARSEKERN_SANITIZE"):
                return  # sanitizers are for the CPU kernels
            missing = missing or why_not_cuda(nvcc)
            without = "the GPU kernels are not built and CUDA tensors run on Triton or plain torch"
        else:
            without = "the CPU kernels are not built and every op runs on plain torch, slowly"
        if missing:
            say(f"{missing}: {without}")
            return
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp: pip makes a new one for every editable install, and the build would never be incremental.
        sanitized = "" if on_gpu else os.environ.get("SPARSEKERN_SANITIZE", "")
        kind = "-".join(["cuda" if on_gpu else "host", *sanitized.split(",")]).rstrip("-")
        objects = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        objects.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        text = cuda_ninja_file(cxx, str(nvcc), out, objects) if on_gpu else ninja_file(cxx, out, objects)
        (objects / "build.ninja").write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(objects), *jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit("sparsekern: the C++ build failed; the compiler's message is above") from error

    def copy_extensions_to_source(self) -> None:
        every = self.extensions  # one that was not built (no nvcc, say) must not keep the other back
        self.extensions = [e for e in every if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()
        self.extensions = every

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[Extension("sparsekern._host", sources=[]), Extension("sparsekern._cuda", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
