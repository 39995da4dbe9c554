"""The C++ kernels under AddressSanitizer and UBSan: a build of their own, kept in build/, and one subprocess.

And what compute-sanitizer runs on a card, rehearsed in the emulator.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import host_isas
from sanitize import gpu

ROOT = Path(__file__).parent.parent
SANITIZERS = "address,undefined"


def runtime(name: str) -> Path | None:
    """The compiler's sanitizer library, or None where it is not installed."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        return None
    done = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def sanitized_module() -> Path:
    """Builds (incrementally) the portable and the highest instruction set with sanitizers."""
    levels = host_isas()
    lib = ROOT / "build" / "sanitize"
    env = {
        **os.environ,
        "SPARSEKERN_SANITIZE": SANITIZERS,
        "SPARSEKERN_ISAS": ",".join({levels[0], levels[-1]}),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(lib)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return lib / "sparsekern" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    asan, ubsan = runtime("libasan.so"), runtime("libubsan.so")
    if asan is None or ubsan is None:
        pytest.skip("the compiler has no libasan and libubsan here")
    env = {
        **os.environ,
        "LD_PRELOAD": f"{asan} {ubsan}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=98",
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, str(ROOT / "tests" / "sanitize" / "numerics.py"), str(sanitized_module())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "clean" in done.stdout


def test_what_compute_sanitizer_runs(emulated_once: object) -> None:
    gpu.multiply(step=5)
    gpu.gradients(step=2)
    gpu.rows(40, 72, (1, 12))
    gpu.planes()
