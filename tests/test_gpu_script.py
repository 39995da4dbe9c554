"""scripts/gpu without a GPU: what it runs where there seems to be one, and what it says where there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = run_path(str(ROOT / "scripts" / "gpu"))
FINE = "def test_fine(): pass\n"
KERNEL = re.compile(r"SK_KERNEL\([^)]*\)\s*(\w+)\(")
CONFTEST = """
def pytest_configure(config):
    for name in ("on_cpu", "on_triton"):
        config.addinivalue_line("markers", name)
"""
STAGES = ("build", "device", "tests", "triton", "sanitize", "bench")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project like this one whose tests take no time."""
    names = [*SCRIPT["ON_CARD"], "test_device", "test_device_words", "test_bsr_triton", "test_sp24_cuda"]
    made = {f"tests/{name}.py": FINE for name in names}
    made["tests/conftest.py"] = CONFTEST
    made["tests/test_bsr_triton.py"] = f"import pytest\npytestmark = pytest.mark.on_triton\n{FINE}"
    made |= {
        "setup.py": "print('building')\n",
        "tests/emulator/build.py": "raise SystemExit('no probes')\n",
        "tests/sanitize/gpu.py": "",
        "sparsekern/__init__.py": "",
        "sparsekern/__main__.py": "print('info')\n",
        "bench/run.py": "import sys\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').write(' '.join(sys.argv[1:]))\n",
        "build/cuda-x/unit.o.log": "ptxas info: 40 registers\n",
        "bin/nvidia-smi": "#!/bin/sh\necho a card\n",
        "bin/compute-sanitizer": '#!/bin/sh\necho "sanitizer $*"\ncase "$*" in *racecheck*planes*) exit 9;; esac\n',
    }
    for name, text in made.items():
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if file.parent.name == "bin":
            file.chmod(0o755)
    (tmp_path / "tree" / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu", tmp_path / "tree" / "scripts" / "gpu")
    return tmp_path / "tree"


def call(tree: Path, *words: str, card: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvidia-smi").exists())
    path = f"{tree / 'bin'}{os.pathsep}{kept}" if card else kept
    env = {**os.environ, "PATH": path, "JOBS": "2", **variables}
    command = [sys.executable, str(tree / "scripts" / "gpu"), str(tree / "out"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def cases(tree: Path) -> dict[str, str]:
    """Of OUT/junit.xml: each test of each file, and what became of it."""
    found = ET.parse(tree / "out" / "junit.xml").getroot().iter("testcase")
    return {f"{c.get('classname')} {c.get('name')}": c[0].tag if len(c) else "passed" for c in found}


def test_without_a_card(tree: Path) -> None:
    done = call(tree, card=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^gpu: build: ok, \d+ s$", done.stdout, re.M)
    for name in STAGES[1:]:
        assert f"gpu: {name}: skipped, there is no NVIDIA GPU here" in done.stdout
        assert "skipped" in (tree / "out" / f"{name}.log").read_text()
    assert "no probes" not in (tree / "out" / "build.log").read_text()


def test_every_stage(tree: Path) -> None:
    """Where a card seems to be: all stages run in their order, whatever fails before them."""
    (tree / "tests" / "test_sp24_cuda.py").write_text("def test_it():\n    raise ValueError('wrong')\n")
    (tree / "tests" / "test_dies_cuda.py").write_text("import os\ndef test_it(): os.kill(os.getpid(), 9)\n")
    done = call(tree, BENCH="gpu_prefill gpu_decode")
    assert done.returncode == 1
    said = re.findall(r"^gpu: (\w+): (.*)$", done.stdout, re.M)
    assert [name for name, _ in said[:6]] == list(STAGES)
    told = dict(said)
    assert re.fullmatch(r"FAILED, \d+ s: probes: exit 1", told["build"])
    assert told["device"].startswith("ok")
    assert "test_sp24_cuda: exit 1" in told["tests"]
    assert "test_dies_cuda: killed by SIGKILL" in told["tests"]
    assert told["tests"].count(";") == 1, "no other file failed"
    assert "ValueError: wrong" in done.stdout
    assert told["triton"].startswith("ok")
    assert told["sanitize"].split(": ", 1)[1] == "racecheck planes: exit 9"
    assert told["bench"].startswith("ok")
    log = (tree / "out" / "build.log").read_text()
    assert "building" in log
    assert "ptxas info: 40 registers" in log
    sanitizer = (tree / "out" / "sanitize.log").read_text()
    for tool in SCRIPT["TOOLS"]:
        for part in SCRIPT["PARTS"]:
            assert re.search(rf"sanitizer --tool {tool} .*kns=\w+_ .*gpu.py {part}$", sanitizer, re.M)
    words = (tree / "out" / "gpu.json").read_text().split()
    assert words[:4] == ["gpu_prefill", "gpu_decode", "--device", "cuda"]
    assert 20 < float(words[words.index("--seconds") + 1]) < 560
    seen = cases(tree)
    assert seen["tests.test_sp24_cuda test_it"] == "failure"
    assert seen["test_dies_cuda all of the file"] == "error"
    assert sum(state == "passed" for state in seen.values()) == len(SCRIPT["ON_CARD"]) + 3


def test_what_hangs_is_interrupted_and_told(tree: Path) -> None:
    """At the end of its time pytest reports what it did; what does not listen is killed; the deadline holds."""
    sleeps = "import time\ndef test_first(): pass\ndef test_hangs(): time.sleep(100)\n"
    (tree / "tests" / "test_sp24_cuda.py").write_text(sleeps)
    marked = "import pytest, signal, time\npytestmark = pytest.mark.on_triton\n"
    deaf = f"{marked}signal.signal(signal.SIGINT, signal.SIG_IGN)\n{sleeps}"
    (tree / "tests" / "test_bsr_triton.py").write_text(deaf)
    began = time.monotonic()
    done = call(tree, "tests", "triton", GPU_SECONDS="40", JOBS="8")
    assert time.monotonic() - began < 46
    assert re.search(r"^gpu: tests: FAILED, \d+ s: test_sp24_cuda: stopped after its \d+ s$", done.stdout, re.M)
    assert re.search(r"^gpu: triton: FAILED, \d+ s: triton: stopped after its \d+ s$", done.stdout, re.M)
    assert "test_sp24_cuda.py::test_hangs" in (tree / "out" / "tests.log").read_text()
    seen = cases(tree)
    assert seen["tests.test_sp24_cuda test_first"] == "passed"
    assert seen["triton all of the file"] == "error"


@pytest.mark.parametrize(
    ("words", "message"), [(["tests", "benhc"], "no such stage: benhc"), (["all"], "no such stage: all")]
)
def test_unknown_stages(tree: Path, words: list[str], message: str) -> None:
    done = call(tree, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tree / "out").exists()


def test_usage() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "gpu")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "scripts/gpu OUT [STAGE ...]" in done.stdout


def test_every_stage_has_its_time() -> None:
    """What is kept for later stages leaves something for the first, and the most of each is more than its least."""
    seconds = SCRIPT["SECONDS"]
    assert tuple(seconds) == tuple(SCRIPT["STAGES"]) == STAGES
    assert sum(least for _, least in seconds.values()) < 560 - SCRIPT["GRACE"]
    assert all(least < most for most, least in seconds.values())
    for total in (30.0, 300.0, 560.0, 5000.0):
        left = total
        for name in STAGES:
            got = SCRIPT["share"](name, list(STAGES), left)
            assert min(seconds[name][1], total / 50) <= got <= seconds[name][0]
            left -= got
        assert left >= -1e-6


def test_no_test_of_a_card_is_forgotten() -> None:
    """Every test file that uses the kernels, or asks for a card, is run by a stage."""
    uses = re.compile(
        r"\b(emulated|emulated_once|probed|device_module): |\"emulated\"|torch\.cuda\.is_available|\bON_CARD\b"
        r"|backend: Backend"
    )
    instead = {
        "test_device": "its own stage",
        "test_device_words": "beside it",
        "test_bsr_triton": "the triton stage",
        "test_bench_gpu": "the bench itself",
        "test_default_device": "about tensors of the CPU",
        "test_codegen": "looks at what was compiled, not at a card",
        "test_sanitize": "the sanitize stage",
        "test_cli": "asks for the words of a machine, not for its card",
        "test_gpu_script": "this file",
    }
    wanted: Callable[[Path], bool] = lambda file: bool(uses.search(file.read_text()))  # noqa: E731
    using = {file.stem for file in (ROOT / "tests").glob("test_*.py") if wanted(file)}
    run = {file.stem for file in (ROOT / "tests").glob("test_*_cuda.py")} | set(SCRIPT["ON_CARD"])
    assert using - run == set(instead)
    wanted = lambda file: "on_triton" in file.read_text() or "backend: Backend" in file.read_text()  # noqa: E731
    assert {file.stem for file in (ROOT / "tests").glob("test_*.py") if wanted(file)} - {"test_gpu_script"} == set(
        SCRIPT["ON_TRITON"]
    )
    assert {name for name in run if not (ROOT / "tests" / f"{name}.py").exists()} == set()


def test_the_sanitizers_parts_are_those_of_its_script() -> None:
    from sanitize import gpu

    assert set(gpu.PARTS) == set(SCRIPT["PARTS"])


def test_the_sanitizers_filters_name_every_kernel() -> None:
    """What is in a kernel's name, mangled or not; a kernel of another name would go unchecked."""
    launched = {name for file in (ROOT / "csrc").glob("*/*.cuh") for name in KERNEL.findall(file.read_text())}
    assert len(launched) > 8
    assert {name for name in launched if not name.startswith(tuple(SCRIPT["PARTS"].values()))} == set()
