"""The build: the compiled module is there, every instruction set was built, and what is missing is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import FLOATS, FOUR, Case, param
from conftest import host_isas

from sparsekern import _ext, _sources, dispatch
from sparsekern.testing import random_dense

ROOT = Path(__file__).parent.parent


def test_the_compiled_module_is_there() -> None:
    """Every test of the host kernels is empty without it, so this one fails."""
    assert _ext.why_not_host() is None
    assert "portable" in host_isas()


def test_active_isa_is_the_best() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from sparsekern import _ext; print(_ext.host().active_isa())"],
        env={k: v for k, v in os.environ.items() if k != "SPARSEKERN_ISA"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == host_isas()[-1], done.stderr


@pytest.mark.parametrize("isa", ["portable", "nonsense"])
def test_environment_lowers_the_isa(isa: str) -> None:
    code = "from sparsekern import _ext; print(_ext.host().active_isa())"
    env = {**os.environ, "SPARSEKERN_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == (isa if isa == "portable" else host_isas()[-1]), done.stderr


def test_unknown_isa_is_refused() -> None:
    module = _ext.host()
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        module.set_active_isa("sse9")
    for name in ("avx2", "avx512", "avx512_bf16", "amx"):
        if name not in host_isas():
            with pytest.raises(ValueError, match=r"not supported|was not built"):
                module.set_active_isa(name)


@param(FOUR)
@param(FLOATS, "dtype")
@pytest.mark.parametrize("op", ["mm", "mm_t", "sddmm"])
def test_nothing_in_the_matrix_is_a_stub(case: Case, dtype, op: str) -> None:  # type: ignore[no-untyped-def]
    """The support matrix: every format has each product on the host in float32 and both halves."""
    layout = case.pack(case.dense(8, 16, dtype))
    x = random_dense(3, 8 if op == "mm_t" else 16, dtype=dtype)
    assert dispatch.why_not("host", op, layout, x) is None
    assert dispatch.choose(op, layout, x).__name__.endswith(".host")


def test_no_compiler_is_one_line(tmp_path: Path) -> None:
    """Without g++ the package installs and says what does not work."""
    env = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sparsekern: no C++ compiler (g++) found: the CPU kernels are not built" in done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))


# scripts/setup with an interpreter that only writes down what it would install --------------------------------------

FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"-m pip"*) echo "$*" >>pip.log ;;
*urllib*) exit {offline} ;;
*"import torch"*) ;;
*) exec {python} "$@" ;;
esac
"""


def set_up(folder: Path, driver: bool, offline: bool = True) -> list[str]:
    """What scripts/setup asks pip for, a command a line, on a machine with or without an NVIDIA driver."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    commands = {"python3": FAKE_PYTHON.format(python=sys.executable, offline=int(offline))}
    if driver:
        commands["nvidia-smi"] = "#!/bin/sh\nexit 0\n"
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("scripts/setup", "setup.py", "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc").mkdir(exist_ok=True)
    (folder / "pip.log").write_text("")
    # A version that no interpreter has, so that what is installed here does not count.
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "", "SPARSEKERN_TORCH": "99.0.0"}
    done = subprocess.run(["bash", "scripts/setup"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "pip.log").read_text().splitlines()


HAS_DRIVER = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="torch has one wheel for this system")


@LINUX
def test_setup_takes_a_cuda_torch_where_there_is_a_driver(tmp_path: Path) -> None:
    torch, *_ = [line for line in set_up(tmp_path, driver=True) if "torch" in line]
    assert torch.endswith("install torch==99.0.0,!=99.0.0+cpu")


@LINUX
@pytest.mark.skipif(HAS_DRIVER, reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("offline", [True, False])
def test_setup_takes_a_cpu_torch_elsewhere(tmp_path: Path, offline: bool) -> None:
    torch, *_ = [line for line in set_up(tmp_path, driver=False, offline=offline) if "torch" in line]
    assert torch.endswith(" torch==99.0.0")
    assert ("--index-url" in torch) != offline


@LINUX
def test_setup_installs_the_package_once(tmp_path: Path) -> None:
    first = set_up(tmp_path, driver=False)
    assert any("--editable .[all]" in line for line in first)
    assert not any("--editable" in line for line in set_up(tmp_path, driver=False))
    (tmp_path / "csrc" / "new.h").write_text("int a;")
    assert any("--editable" in line for line in set_up(tmp_path, driver=False))


def test_unknown_isa_in_the_build_is_refused(tmp_path: Path) -> None:
    env = {**os.environ, "SPARSEKERN_ISAS": "portable,avx1024"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "avx1024" in done.stderr


FAKE_NINJA = """
import pathlib, re, sys
text = pathlib.Path(sys.argv[sys.argv.index("-C") + 1], "build.ninja").read_text()
pathlib.Path(re.search(r"^build (\\S+): link", text, re.MULTILINE)[1]).touch()
"""


def test_a_module_that_is_not_built_does_not_keep_the_other_back(tmp_path: Path) -> None:
    """build_ext --inplace, which an editable install runs too, puts _host beside the sources without an nvcc."""
    for name in ("setup.py", "pyproject.toml", "README.md", "sparsekern/__init__.py", "sparsekern/_sources.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "ninja.py").write_text(FAKE_NINJA)
    env = {**os.environ, "SPARSEKERN_CUDA_ARCHS": "none", "PYTHONPATH": str(tmp_path / "fake")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name.split(".")[0] for path in (tmp_path / "sparsekern").glob("_*.so")] == ["_host"]


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
def test_explain(format: str) -> None:
    """Every backend with its reason, none without."""
    case = Case(format, (4, 4))
    reasons = dispatch.explain("mm", case.pack(case.dense(8, 16)), random_dense(3, 16))
    assert reasons["ref"] is None
    assert reasons["host"] is None
    assert all(reasons[name] for name in ("cuda", "triton", "vendor"))


# A compiled module that does not belong to the Python code beside it ---------------------------------------------

RUN = """
import sys, torch, sparsekern as sk
from sparsekern import _ext
assert _ext.__file__.startswith({place!r})
w, x = sk.to_csr(torch.eye(4)), torch.ones(2, 4)
assert torch.equal(sk.linear(x, w), x)
try:
    sk.linear(x, w, backend="host")
except NotImplementedError as error:
    print(error)
"""
STALE = "the compiled CPU module is out of date; rebuild it with: "


def python(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(place), "PYTHONWARNINGS": "default"}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=place, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package, its compiled module and its sources."""
    for folder in ("sparsekern", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_compiled_module_knows_its_sources() -> None:
    assert _ext.host().sources == _sources.digest()


@pytest.mark.parametrize("sources", ["as built", "an installed wheel"])
def test_a_module_that_fits(checkout: Path, sources: str) -> None:
    if sources != "as built":
        shutil.rmtree(checkout / "csrc")
    done = python(checkout, "-W", "error::UserWarning", "-c", RUN.format(place=str(checkout)))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_an_outdated_module_is_named_with_its_cure(checkout: Path) -> None:
    """Sources that changed after the build: one warning, plain torch, the reason wherever one is asked for."""
    with (checkout / "csrc" / "core" / "types.h").open("a") as file:
        file.write("// newer\n")
    cure = "python setup.py build_ext --inplace"
    done = python(checkout, "-c", RUN.format(place=str(checkout)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"backend 'host' cannot run csr_mm: {STALE}{cure}"
    assert done.stderr.count(STALE + cure) == 1
    shown = python(checkout, "-W", "ignore", "-m", "sparsekern", "info", "--json")
    assert json.loads(shown.stdout)["machine"]["compiled_kernels"] == STALE + cure


@pytest.mark.parametrize(
    ("sources", "cure"),
    [(True, "python setup.py build_ext --inplace"), (False, "pip install --force-reinstall sparsekern")],
)
def test_a_module_from_before_the_digest(checkout: Path, sources: bool, cure: str) -> None:
    (module,) = (checkout / "sparsekern").glob("_host*.so")
    module.unlink()
    (checkout / "sparsekern" / "_host.py").write_text("def active_isa():\n    return 'avx2'\n")
    if not sources:
        shutil.rmtree(checkout / "csrc")
    done = python(checkout, "-c", RUN.format(place=str(checkout)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(STALE + cure)


def test_the_digest_sees_names_and_texts(tmp_path: Path) -> None:
    assert _sources.digest(tmp_path) is None
    (tmp_path / "sources.cpp").write_text("int a;")
    seen = [_sources.digest(tmp_path)]
    for name, text in (("sources.cpp", "int b;"), ("x.h", ""), ("core/x.h", "y")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.append(_sources.digest(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "notes.md").write_text("not a source")
    assert _sources.digest(tmp_path) == seen[-1]
