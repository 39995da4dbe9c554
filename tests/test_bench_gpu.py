"""The benches of a GPU without one: cases of every group are made and called on small shapes, by emulated and
interpreted kernels; what a run keeps when cases fail or its time ends."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_CARD

from bench import gpu, gpu_bsr, gpu_calls, gpu_data, gpu_sp24, gpu_stream, report, run
from bench.cases import Bar, Case
from sparsekern import _ext, testing

pytestmark = pytest.mark.skipif(ON_CARD, reason="there the benches themselves run")

SMALL: dict[Any, dict[str, Any]] = {
    gpu_sp24: {
        "LAYERS": [(64, 128), (128, 64)],
        "MANY_TOKENS": (24, 40, 48),
        "MIDDLE": [(64, 64)],
        "MIDDLE_TOKENS": (70,),
        "FEW": [(64, 64), (128, 64)],
        "IMAGES": 1,
        "IMAGE_SHAPES": ((64, 4), (256, 3)),
        "COPIED": 1 << 10,
        "MULTIPLIED": 16,
        "ROUNDS": 1,
    },
    gpu_bsr: {
        "DTYPE": torch.float32,  # the interpreter computes bfloat16 wrongly
        "MANY": ((64, 96),),
        "MANY_TOKENS": (8,),
        "BLOCKS": (32, 16),
        "FEW": (64, 64),
        "SQUARE": 64,
        "IMAGES": 1,
        "CHANNELS": 32,
        "SIDES": (4,),
    },
    gpu_stream: {
        "FEW": (64, 96),
        "MANY": 64,
        "MANY_TOKENS": (5,),
        "IMAGES": 1,
        "CHANNELS": 12,
        "IMAGE_SHAPES": ((4, False), (4, True)),
    },
    gpu_calls: {"PACKED": 128, "SMALL": 32},
}
# What torch on a CPU has no product for; our own are never among them.
ABSENT = {"cuSPARSELt", "cuSPARSE"}


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return max(1e-3, 1e3 * (end.at - self.at))


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that is the CPU, whose graphs are captured by calling; yields how many calls each graph had."""
    captured: list[int] = []

    def capture(calls: list[Any]) -> Graph:
        for call in calls:
            call()
        captured.append(len(calls))
        return Graph()

    monkeypatch.setattr(gpu, "captured", capture)
    monkeypatch.setattr(gpu_data, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_data, "cache_bytes", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu_data.forget()
    return captured


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, sizes in SMALL.items():
        for name, value in sizes.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
    yield
    gpu_data.forget()


@pytest.mark.parametrize("group", gpu.GROUPS)
def test_cases(group: str, emulated_once: Any, stand_in: list[int], small: None) -> None:
    """All names of a group, and four of its cases from first to last, made and called."""
    if "bsr" in group and _ext.why_not_triton(torch.device("cpu")) is not None:
        pytest.skip("no Triton interpreter")
    made = list(gpu.GROUPS[group]())
    assert made
    assert len({case.name for case in made}) == len(made)
    for case in made[:: -(-len(made) // 4)]:
        assert case.group == group
        row = gpu.run(case, 1)
        assert "error" not in row, f"{case.name}: {row['error']}"
        missing = row.get("failed", {})
        assert set(missing) <= ABSENT, f"{case.name}: {missing}"
        assert {"sparsekern"} <= set(row["ms"])
        named = {bar.baseline for bar in case.bars}
        assert named <= set(row["ms"]) | set(missing) | {f"{name} searched" for name in missing}, case.name
        assert len(row["bars"]) >= len(named & set(row["ms"])) + len(case.microseconds)
        json.dumps(row, allow_nan=False)
    if group in ("gpu_decode", "gpu_bitmap"):
        assert max(stand_in) > 1, "weights that fit in the cache are measured as several copies"


def test_the_groups_of_the_command(emulated_once: Any) -> None:
    """Every module's public generators are in the list: none is forgotten."""
    listed = set(gpu.GROUPS.values())
    for module in SMALL:
        cases = {
            f for f in vars(module).values() if getattr(f, "__annotations__", {}).get("return") == "Iterator[Case]"
        }
        assert cases <= listed, module


def test_measure(monkeypatch: pytest.MonkeyPatch, stand_in: list[int]) -> None:
    """Seconds of one call of a graph's several, the first rounds left out, in no fixed order."""
    order: list[str] = []

    class Slow(Graph):
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def replay(self) -> None:
            order.append(self.name)
            time.sleep(self.seconds)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.zeros(1))
    times = gpu.measure({"four": (Slow("four", 0.04), 4), "one": (Slow("one", 0.02), 1)}, 6)
    assert times["four"].median == pytest.approx(0.01, rel=0.5)
    assert times["one"].median == pytest.approx(0.02, rel=0.5)
    assert all(t.n == 6 for t in times.values())
    assert len(order) == 2 * 9
    assert len({tuple(order[i : i + 2]) for i in range(0, len(order), 2)}) == 2


def test_a_peer_that_no_graph_holds_is_timed(monkeypatch: pytest.MonkeyPatch, stand_in: list[int]) -> None:
    """One call after the other, and the row says so; ours has no such way out."""
    capture = gpu.captured

    def refusing(calls: list[Any]) -> Any:
        if calls[0] in refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(calls)

    monkeypatch.setattr(gpu, "captured", refusing)
    variants = right()
    refused = [variants["dense"]]
    row = gpu.run(simple("refused", lambda: variants), 2)
    assert row["ms"]["dense"]["n"] == 2
    assert "stream is capturing" in row["uncaptured"]["dense"]
    assert "failed" not in row
    refused[:] = [variants["sparsekern"]]
    assert "stream is capturing" in gpu.run(simple("refused", lambda: variants), 2)["error"]


def simple(name: str, variants: Any, **more: Any) -> Case:
    return Case("gpu_x", {"case": name}, (Bar("dense", 0.5),), variants, **more)


def right() -> dict[str, Any]:
    x = torch.ones(4)
    return {"sparsekern": lambda: x + 1, "dense": lambda: x + 1}


def fails() -> dict[str, Any]:
    raise RuntimeError("CUDA error: out of memory")


def wrong(variants: Any) -> None:
    raise AssertionError("sparsekern differs from dense by 1")


def peer_fails() -> dict[str, Any]:
    return right() | {"peer": fails}


CASES = {
    "fine": simple("fine", right),
    "cannot be made": simple("cannot be made", fails),
    "differs": simple("differs", right, gate=wrong),
    "a peer fails": simple("a peer fails", peer_fails),
    "ours fails": simple("ours fails", lambda: {"sparsekern": fails, "dense": right()["dense"]}),
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, stand_in: list[int], tmp_path: Path) -> Any:
    """run.main() on CASES as if there were a card; returns what it wrote."""
    smi = tmp_path / "nvidia-smi"
    answers = "*driver*) echo 580.1, 1980 MHz, 3201 MHz, 700 W;; *) echo 1755, 3201, 41;;"
    smi.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "_gpu", lambda: "a card")
    monkeypatch.setattr(gpu, "GROUPS", {"gpu_x": lambda: iter(CASES.values())})
    out = tmp_path / "gpu.json"

    def call(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["run", "--device", "cuda", "--repeats", "2", "--out", str(out), *words])
        with pytest.raises(SystemExit, match="a case failed") if "0" not in words else nullcontext():
            run.main()
        return json.loads(out.read_text())

    return call


def test_a_case_that_fails_is_a_row(command: Any) -> None:
    written = command()
    rows = {row["params"]["case"]: row for row in written["rows"]}
    assert list(rows) == list(CASES)
    assert rows["cannot be made"]["error"] == "RuntimeError: CUDA error: out of memory"
    assert rows["differs"]["error"] == "sparsekern differs from dense by 1"
    assert "out of memory" in rows["ours fails"]["error"]
    assert "out of memory" in rows["a peer fails"]["failed"]["peer"]
    for name in ("fine", "a peer fails"):
        assert rows[name]["bars"] == [
            {"baseline": "dense", "bar": 0.5, "ratio": rows[name]["ratio"]["dense"], "met": True}
        ]
    machine = written["machine"]
    assert (machine["driver_version"], machine["clocks.max.sm"]) == ("580.1", "1980 MHz")
    assert written["clocks"] == {"gpu_x": {"clocks.sm": "1755", "clocks.mem": "3201", "temperature.gpu": "41"}}


def test_what_was_measured_is_kept(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without time no case is begun, and the file says which were not; --resume measures these alone."""
    assert len(command("--seconds", "0")["unreached"]) == len(CASES)
    first = command()
    monkeypatch.setattr(gpu, "run", lambda case, repeats: pytest.fail("measured again"))
    assert command("--resume") == first
    del first["rows"][0]
    Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(first))
    monkeypatch.setattr(gpu, "run", lambda case, repeats: {"group": case.group, "params": case.params, "error": "now"})
    assert [row["error"] for row in command("--resume")["rows"] if row["params"]["case"] == "fine"] == ["now"]


def test_a_kernels_fault_costs_one_case(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA context that is lost takes its process with it: another one goes on after the case."""
    started: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit("a case failed: another process")

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    written = command("--seconds", "500", "gpu_x")
    assert len(written["rows"]) == 1
    assert started[0][1:4] == ["-m", "bench.run", "gpu_x"]
    assert "--resume" in started[0]
    assert 0 < float(started[0][started[0].index("--seconds") + 1]) <= 500


def test_small_weights_are_like_those_of_the_tests(emulated_once: Any, stand_in: list[int]) -> None:
    """About the density asked for, in whole blocks; 2:4 as it is packed; the same every time."""
    w = gpu_data.weight(64, 96, torch.bfloat16, 0.25, 16)
    blocks = w.reshape(4, 16, 6, 16).transpose(1, 2)
    assert torch.equal((blocks != 0).any(3).any(2), (blocks != 0).all(3).all(2))
    assert torch.equal(w, gpu_data.weight(64, 96, torch.bfloat16, 0.25, 16))
    assert float((gpu_data.weight(200, 300, torch.float32, 0.1) != 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    for dtype in (torch.bfloat16, torch.int8):
        dense, packed = gpu_data.weight24(64, 128, dtype)
        assert torch.equal(packed.unpack(), dense)
        assert torch.equal(testing.pack("sp24", dense).unpack(), dense)
        assert float((dense != 0).float().mean()) == pytest.approx(0.5, abs=0.02)
