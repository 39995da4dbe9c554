"""The shape of the house: imports point one way, no torch in csrc, short modules, what may be missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparsekern"
FORMATS = ("sp24", "bsr", "csr", "bitmap")
LAUNCHERS = ("host", "cuda", "triton", "vendor")
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high; a module imports only from its own row (inside a format: see below) or from lower ones.
ROWS = (
    {"_sources", "_ext", "_plan", "_rows", "_workspace", "layout", "tune", "roofline", "heuristic", "patterns"},
    {"formats/layout"},
    {"formats/pack"},
    {"_rows", "_rows_cuda"},
    {"formats/package", "ref", "_ending"},
    {"formats/launcher", "formats"},
    {"dispatch"},
    {"_library"},
    {"tensor", "convert_dense"},
    {"conv", "functional"},
    {"prune", "testing"},
    {"nn", "checkpoint"},
    {"commands"},
    {"cli", "__main__", "__init__"},
)
# Where a function imports upwards at call time, each with its reason.
LATE = {
    ("tensor", "functional"): "__torch_function__ of the subclass calls the public functions",
    ("prune", "nn"): "a study converts what it pruned, to time it",
    ("tune", "testing"): "measures with the timer that tests and benches use",
}


def role(module: str) -> str:
    """Which place in ROWS a dotted module (without "sparsekern.") has."""
    head, _, rest = module.partition(".")
    if head in FORMATS:
        if rest in LAUNCHERS:
            return "formats/launcher"
        return (
            f"formats/{rest}" if rest in ("layout", "pack") else "formats/package" if not rest else "formats/launcher"
        )
    return head or "__init__"


def row(module: str) -> int:
    found = [i for i, names in enumerate(ROWS) if role(module) in names]
    assert found, f"{module} has no place in ROWS: say where it belongs"
    return found[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module without "sparsekern.", whether inside a function) for every import of the package in the file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [a.name.split(".", 1)[1] for a in node.names if a.name.startswith("sparsekern.")]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            whole = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names = [".".join(filter(None, (whole, a.name))) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsekern":
            whole = (node.module or "").partition(".")[2]
            names = [".".join(filter(None, (whole, a.name))) for a in node.names]
        else:
            continue
        found += [(module_part(name), id(node) in inside) for name in names]
    return found


def module_part(name: str) -> str:
    """Cuts a dotted name down to the part that is a module or package of ours."""
    parts = name.split(".")
    while parts and not ((PACKAGE / Path(*parts)).is_dir() or (PACKAGE / Path(*parts)).with_suffix(".py").exists()):
        parts.pop()
    return ".".join(parts)


@pytest.mark.parametrize("path", MODULES, ids=[name_of(p) for p in MODULES])
def test_imports_point_one_way(path: Path) -> None:
    here = name_of(path)
    for there, late in imports(path):
        if not there or there == here or there.split(".")[0] == here.split(".")[0]:
            continue  # its own package: test_formats_and_launchers looks into those of the formats
        if late and (here.split(".")[0], there.split(".")[0]) in LATE:
            continue
        assert row(there) <= row(here), f"{here} imports {there}, which lies above it"


@pytest.mark.parametrize("format", FORMATS)
def test_formats_and_launchers(format: str) -> None:
    """Formats never import each other, launchers never import each other, layouts and packers import neither."""
    for path in sorted((PACKAGE / format).glob("*.py")):
        for there, _ in imports(path):
            head, _, rest = there.partition(".")
            assert head not in FORMATS or head == format, f"{path.name} of {format} imports {there}"
            if path.stem in LAUNCHERS and head == format:
                assert rest not in LAUNCHERS, f"{format}/{path.name} imports another launcher: {there}"
            if path.stem in ("layout", "pack") and head == format:
                assert rest not in LAUNCHERS, f"{format}/{path.name} imports a launcher: {there}"


def test_no_torch_in_csrc() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    assert not re.search(r"^\s*(import|from)\s+torch", (ROOT / "setup.py").read_text(), re.M)


def sources() -> list[Path]:
    folders = ("sparsekern", "csrc", "tests", "bench", "scripts")
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    kept = [
        p for p in found if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".md", "") and "__pycache__" not in p.parts
    ]
    return [*kept, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "README.md"]


def test_modules_are_short() -> None:
    shipped = [p for p in sources() if p.suffix != ".md" and "tests" not in p.parts]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in shipped}
    assert not {name: n for name, n in lengths.items() if n > 600}


def test_no_machine_paths() -> None:
    """No absolute path of somebody's machine in anything that is shipped."""
    pattern = re.compile(r"/(home|root|work|Users)/\w+")
    for path in sources():
        if path == Path(__file__):
            continue
        hit = pattern.search(path.read_text())
        assert hit is None, f"{path.relative_to(ROOT)}: {hit and hit.group()}"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


# As if these were not installed: torch itself asks find_spec("triton"), which must say no and not raise.
BLOCK = """
import sys
sys.modules.update(dict.fromkeys({names!r}))
import torch, sparsekern as sk
"""


def test_import_needs_neither_extras_nor_triton() -> None:
    """triton, scipy, safetensors and matplotlib are loaded by what uses them, not by `import sparsekern`."""
    done = run(
        BLOCK.format(names=["triton", "scipy", "safetensors", "matplotlib"])
        + """
w = sk.to_csr(torch.eye(4))
assert torch.equal(sk.linear(torch.ones(2, 4), w), torch.ones(2, 4))
"""
    )
    assert done.returncode == 0, done.stderr


def test_without_the_compiled_module() -> None:
    """Everything runs on the oracle; asking for the host by name says what is missing and what to do."""
    done = run(
        BLOCK.format(names=["sparsekern._host"])
        + """
for convert in (sk.to_csr, sk.to_bitmap, lambda w: sk.to_block_sparse(w, 2), sk.to_sparse_semi_structured):
    w = convert(torch.eye(4))
    assert torch.equal(sk.linear(torch.ones(2, 4), w), torch.ones(2, 4))
    assert torch.equal(sk.matmul(torch.ones(2, 4), w), torch.ones(2, 4))
    try:
        sk.linear(torch.ones(2, 4), w, backend="host")
    except NotImplementedError as error:
        assert "compiled CPU module is missing (reinstall with a C++ compiler)" in str(error), error
    else:
        raise SystemExit("the host backend ran without its module")
"""
    )
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    import sparsekern

    for name in sparsekern.__all__:
        assert getattr(sparsekern, name).__doc__, f"sparsekern.{name} has no docstring"
