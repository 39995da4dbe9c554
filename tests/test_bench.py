"""The benches: every convolution case is right before it is timed; the README's tables say what was measured."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import cases, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results_table() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("results_table", str(ROOT / "scripts" / "results_table"))
    spec = importlib.util.spec_from_loader("results_table", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def row(own: float | None, dense: float, **params: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"group": "g", "params": {"shape": "8x8", **params}, "threads": 1}
    if own is None:
        return made | {"error": "differs"}
    spread = {"median": own, "p20": own / 2, "p80": own * 2, "n": 3}
    return made | {"ms": {"sparsekern": spread}, "ratio": {"dense": dense / own}, "bars": []}


def test_convolutions_are_right_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CONVOLUTIONS", ((3, 32, 32, 5, 1), (1, 32, 64, 4, 1), (3, 32, 32, 6, 2)))
    made = list(cases.conv())
    assert len({case.name for case in made}) == len(made) == 3 * 6 * 2 * 2
    for case in made:
        found = run.run(case, 1)
        assert "error" not in found, f"{case.name}: {found['error']}"
        assert set(found["ms"]) == {"sparsekern", "dense"}


def test_a_wrong_convolution_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CONVOLUTIONS", ((3, 32, 32, 5, 1),))
    case = next(cases.conv())
    make = case.make

    def wrong() -> cases.Variants:
        variants = make()
        right = variants["sparsekern"]
        return variants | {"sparsekern": lambda: right() * 1.01}

    object.__setattr__(case, "make", wrong)
    found = run.run(case, 1)
    assert "differs from dense" in found["error"]
    assert "ms" not in found


def test_wide_table(results_table: ModuleType) -> None:
    rows = [row(2.0, 5.0, format="csr", dtype="float32"), row(4.0, 2.0, format="csr", dtype="bfloat16"),
            row(None, 1.0, format="sp24", dtype="float32")]  # fmt: skip
    lines = results_table.wide_table({"rows": rows}, "g", ("dtype",)).splitlines()
    assert lines[0].startswith("shape 8x8; 1 thread(s)")
    assert lines[2:] == [
        "| format | float32 | bfloat16 |",
        "|---|---|---|",
        "| csr | 2 [1, 4], 2.50× | 4 [2, 8], 0.50× |",
        "| sp24 | wrong result |  |",
    ]


def test_a_table_without_bars_has_no_column_for_them(results_table: ModuleType) -> None:
    rows = [row(2.0, 5.0, format="csr"), row(None, 1.0, format="sp24")]
    assert results_table.bench_table({"rows": rows}, "g").splitlines()[2:] == [
        "| format | ours, ms [p20, p80] | vs dense |",
        "|---|---|---|",
        "| csr | 2 [1, 4] | 2.50× |",
        "| sp24 | wrong result |  |",
    ]
    rows[0]["bars"] = [{"baseline": "dense", "bar": 3.0, "ratio": 2.5, "met": False}]
    assert "| csr | 2 [1, 4] | 2.50× | 3× **missed** |" in results_table.bench_table({"rows": rows}, "g")


@pytest.mark.parametrize(
    ("commit", "said"), [("0123abcd", "0123abcd"), ("0123abcd-dirty", "0123abcd with uncommitted changes")]
)
def test_a_dirty_tree_is_told(results_table: ModuleType, commit: str, said: str) -> None:
    machine = {
        "cpu": "X",
        "cores": 2,
        "isa": "avx2",
        "torch": "2.13.0",
        "date": "2026-01-02T03:04:05",
        "commit": commit,
    }
    assert results_table.machine_line({"machine": machine}).endswith(f"2026-01-02, commit {said}")
