"""What was measured is kept and found; what cannot be ours is ignored; predictions are legal everywhere."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from bench import fit_heuristic
from sparsekern import dispatch, formats, heuristic, roofline, tune
from sparsekern.heuristic import predict
from sparsekern.tune import Case, Record

CASE = Case("mm", "csr", "host", "float32", 100, 512, 256, 0.1)
RECORD = Record(100, 2e-3, 1e-3, 0.01)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSEKERN_TUNE", raising=False)
    tune.forget()
    yield
    tune.forget()


# Keys -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 24))
def test_buckets_are_two_an_octave(m: int) -> None:
    b = tune.bucket(m)
    assert m <= b <= max(m * 1.5, 1)
    assert tune.bucket(b) == b
    assert tune.bucket(m + 1) >= b


def test_small_buckets() -> None:
    assert sorted({tune.bucket(m) for m in range(50)}) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@given(st.floats(0, 1))
def test_density_buckets(density: float) -> None:
    b = tune.density_bucket(density)
    assert abs(b - density) <= 0.0100001
    assert tune.density_bucket(b) == b


@pytest.mark.parametrize(
    "change",
    [
        {"op": "conv2d"}, {"format": "bsr 32x32"}, {"backend": "vendor"}, {"dtype": "bfloat16"}, {"m": 200},
        {"n": 513}, {"k": 257}, {"density": 0.3},
    ],
)  # fmt: skip
def test_every_part_of_a_case_counts(change: dict) -> None:
    tune.store(CASE, RECORD)
    assert tune.lookup(CASE) == RECORD
    assert tune.lookup(replace(CASE, **change)) is None


def test_equal_buckets_share_a_record() -> None:
    tune.store(CASE, RECORD)
    assert tune.lookup(replace(CASE, m=120, density=0.105)) == RECORD


def test_threads_and_instruction_set_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store(CASE, RECORD)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert tune.lookup(CASE) is None
    finally:
        torch.set_num_threads(before)
    assert tune.lookup(CASE) == RECORD
    monkeypatch.setattr(tune, "isa", lambda: "something else")
    assert tune.lookup(CASE) is None


def test_a_library_s_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store(CASE, RECORD)
    monkeypatch.setattr(sk, "__version__", "999")
    assert tune.lookup(CASE) is None


# The file ---------------------------------------------------------------------------------------------------


def test_saved_and_read_again() -> None:
    tune.store(CASE, RECORD)
    assert not tune.path().exists()
    tune.save()
    tune.forget()
    assert tune.lookup(CASE) == RECORD
    content = json.loads(tune.path().read_text())
    assert content["version"] == tune.VERSION
    assert not list(tune.directory().glob("*.tmp"))


def test_what_others_saved_meanwhile_is_kept() -> None:
    other = replace(CASE, n=1)
    tune.store(CASE, RECORD)
    tune.save()
    tune.forget()
    tune.lookup(CASE)  # read before the other process writes
    content = json.loads(tune.path().read_text())
    content["entries"][replace(CASE, n=2).key] = [1, 1.0, 1.0, 0.0]
    tune.path().write_text(json.dumps(content))
    tune.store(other, RECORD)
    tune.save()
    tune.forget()
    assert all(tune.lookup(replace(CASE, n=n)) is not None for n in (1, 2, 512))


def _save_one(n: int) -> None:
    for i in range(20):
        tune.store(replace(CASE, n=n, k=i), RECORD)
        tune.save()


def test_a_reader_never_sees_half_a_file() -> None:
    writers = [multiprocessing.get_context("fork").Process(target=_save_one, args=(n,)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.is_alive() for writer in writers):
            tune.forget()
            tune.lookup(CASE)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    tune.forget()
    assert tune.lookup(replace(CASE, n=1, k=19)) is not None or tune.lookup(replace(CASE, n=2, k=19)) is not None


GOOD = json.dumps({"version": tune.VERSION, "entries": {}})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not json", b"\xff\xfe\x00", b"[]", b"null", b'{"version": 1}',
        b'{"version": 99, "entries": {}}',
        b'{"version": 1, "entries": []}', b'{"version": 1, "entries": {"a": 1}}',
        b'{"version": 1, "entries": {"a": [1, 2, 3]}}', b'{"version": 1, "entries": {"a": [1, NaN, 1, 0]}}',
        b'{"version": 1, "entries": {"a": [1, 0, 1, 0]}}', b'{"version": 1, "entries": {"a": [1, -1, 1, 0]}}',
        b'{"version": 1, "entries": {"a": [1, "1", 1, 0]}}',
        b'{"version": 1, "entries": {"a": [true, 1, 1, 0]}}',
        b'{"version": 1, "entries": {"a": [1, 1e999, 1, 0]}}', b"[" * 100_000, GOOD.encode()[:-1],
    ],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_ignored_with_a_warning(content: bytes) -> None:
    tune.directory().mkdir(parents=True)
    tune.path().write_bytes(content)
    with pytest.warns(UserWarning, match="ignores the tuning cache"):
        assert tune.lookup(CASE) is None
    tune.store(CASE, RECORD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tune.save()
    tune.forget()
    assert tune.lookup(CASE) == RECORD  # and replaced by a good one


def test_a_huge_file_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "MAX_BYTES", 10)
    tune.directory().mkdir(parents=True)
    tune.path().write_text(GOOD)
    with pytest.warns(UserWarning, match="larger than"):
        tune.lookup(CASE)


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "file"))
    tune.store(CASE, RECORD)
    with pytest.warns(UserWarning, match="cannot keep its measurements"):
        tune.save()
    assert tune.lookup(CASE) == RECORD  # in this process it is still known


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.directory() == tmp_path / "cache"
    monkeypatch.delenv("SPARSEKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tune.directory() == tmp_path / "xdg" / "sparsekern"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore these
    assert tune.directory() == Path.home() / ".cache" / "sparsekern"
    assert tune.path().name.startswith("tune-")


def test_clear_forgets_on_disk_too() -> None:
    tune.store(CASE, RECORD)
    tune.save()
    (tune.directory() / "other.txt").write_text("not ours")
    tune.clear()
    assert tune.lookup(CASE) is None
    assert [p.name for p in tune.directory().iterdir()] == ["other.txt"]


@pytest.mark.parametrize("off", ["0", "off", "no", "FALSE"])
def test_switched_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.store(CASE, RECORD)
    monkeypatch.setenv("SPARSEKERN_TUNE", off)
    assert tune.lookup(CASE) is None
    monkeypatch.delenv("SPARSEKERN_TUNE")
    with tune.disabled():
        assert tune.lookup(CASE) is None
        tune.store(replace(CASE, n=7), RECORD)
    assert tune.lookup(CASE) == RECORD
    assert tune.lookup(replace(CASE, n=7)) is None


# Measuring and dispatch -------------------------------------------------------------------------------------


def test_measure_orders_what_differs_clearly() -> None:
    x = torch.randn(400, 400)
    records = tune.measure(
        lambda: [x @ x for _ in range(4)], {"one": lambda: x @ x, "nine": lambda: [x @ x for _ in range(9)]},
        m=7, seconds=0.05,
    )  # fmt: skip
    assert records["one"].speedup > 1 > records["nine"].speedup
    assert all(r.m == 7 and r.dense > 0 and r.spread >= 0 for r in records.values())


def test_an_unsteady_run_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekern import testing

    given: list[float] = []

    def noisy(variants: dict, repeats: int, warmup: int, seconds: float, device: str) -> dict:
        given.append(seconds)
        assert device == "cuda:1"
        width = {0.1: 8.0, 0.2: 2.0, 0.4: 5.0}[seconds] if noise else 0.01
        return {name: testing.Timing(1.0, 1.0 - width / 10, 1.0 + width, 9) for name in variants}

    monkeypatch.setattr(testing, "measure", noisy)
    noise = True
    record = tune.measure(lambda: None, {"a": lambda: None}, seconds=0.1, device="cuda:1")["a"]
    assert given == [0.1, 0.2, 0.4]
    steadiest = 1.2533 * 2.2 / 1.6832 / 3 * 2**0.5
    assert record.spread == pytest.approx(steadiest)
    noise = False
    tune.measure(lambda: None, {"a": lambda: None}, seconds=0.1, device="cuda:1")
    assert given == [0.1, 0.2, 0.4, 0.1]


def test_measure_has_no_gradients() -> None:
    modes: list[bool] = []
    tune.measure(lambda: modes.append(torch.is_grad_enabled()), {"a": lambda: None}, seconds=0.001)
    assert modes
    assert not any(modes)


def test_dispatch_follows_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two backends the measured one is taken; an explicit one wins; without a measurement the first."""
    w, x = sk.to_bitmap(torch.eye(16)).packed, torch.randn(4, 16)
    known = formats.FORMATS["bitmap"]
    monkeypatch.setitem(formats.FORMATS, "bitmap", replace(known, backends={"cpu": ("ref", "host")}))
    if dispatch.why_not("host", "mm", w, x) is not None:
        pytest.skip("needs a second backend")
    name = lambda m: m.__name__.rpartition(".")[2]  # noqa: E731
    case = Case("mm", "bitmap", "", "float32", 4, 16, 16, w.density)
    assert name(dispatch.choose("mm", w, x)) == "ref"
    tune.store(replace(case, backend="ref"), Record(4, 1.0, 2.0, 0.0))
    assert name(dispatch.choose("mm", w, x)) == "ref"  # one measurement says nothing
    tune.store(replace(case, backend="host"), Record(4, 1.0, 1.0, 0.0))
    assert name(dispatch.choose("mm", w, x)) == "host"
    assert name(dispatch.choose("mm", w, x, "ref")) == "ref"
    assert name(dispatch.choose("mm", w, torch.randn(64, 16))) == "ref"
    with tune.disabled():
        assert name(dispatch.choose("mm", w, x)) == "ref"


# Predictions ------------------------------------------------------------------------------------------------

CARDS = tuple(f"cuda-{card}" for card in roofline.CARDS)
DEVICES = ("cpu", "cuda", *CARDS, *(f"cpu-{isa}" for isa in heuristic._SCALE))
SIZES = (0, 1, 7, 16, 64, 65, 512, 4096)


@pytest.mark.parametrize("device", DEVICES)
def test_every_prediction_is_legal(device: str) -> None:
    grid = itertools.product(
        heuristic.FORMATS, heuristic.OPS, SIZES, (1, 64, 4096), (0, 8, 4096),
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8), (0.0, 0.05, 0.5, 1.0),
    )  # fmt: skip
    for format, op, m, n, k, dtype, density in grid:
        got = predict(device, format, op, m, n, k, dtype, density)
        assert got.backend in dispatch.backends(format, device.partition("-")[0])
        assert got.regime == ("decode" if m <= heuristic.DECODE else "prefill")
        assert math.isfinite(got.speedup)
        assert got.speedup > 0


def test_heuristic_names_every_format() -> None:
    assert set(heuristic.FORMATS) == set(formats.FORMATS)


@pytest.mark.parametrize("isa", heuristic._SCALE)
@pytest.mark.parametrize("format", ["csr", "bsr", "bitmap"])
@pytest.mark.parametrize("m", [1, 16, 128, 2048])
def test_fewer_weights_are_never_slower(isa: str, format: str, m: int) -> None:
    gains = [
        predict(f"cpu-{isa}", format, "mm", m, 2048, 2048, torch.float32, d).speedup for d in (0.05, 0.2, 0.5, 0.9)
    ]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("device", CARDS)
@pytest.mark.parametrize("format", ["csr", "bsr", "bitmap"])
@pytest.mark.parametrize("m", [1, 16, 128, 2048])
def test_fewer_weights_are_never_slower_on_a_gpu(device: str, format: str, m: int) -> None:
    for dtype, op in itertools.product((torch.float32, torch.bfloat16), heuristic.OPS):
        gains = [predict(device, format, op, m, 8192, 8192, dtype, d).speedup for d in (0.0, 0.05, 0.2, 0.5, 0.9)]
        assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("device", CARDS)
def test_predictions_for_gpus_know_the_known_cases(device: str) -> None:
    """The cases that rooflines alone decide (block_and_csr, semi_structured): no card has confirmed the figures."""
    half = torch.bfloat16

    def gain(format: str, m: int, density: float, dtype: torch.dtype = half, size: int = 8192, **more: Any) -> float:
        return predict(device, format, "mm", m, size, size, dtype, density, **more).speedup

    assert 1.2 < gain("sp24", 1, 0.5) <= 1.78  # bytes: 0.5625 of dense ones
    assert 1 < gain("sp24", 8192, 0.5) < 2
    assert gain("sp24", 8192, 0.5, torch.float32) == 0.5  # no kernel
    assert gain("bsr", 8192, 0.1, block=(128, 128)) > 3
    assert gain("bsr", 8192, 0.5, block=(16, 16)) < 1  # small blocks wait for the second-level cache
    assert gain("bsr", 8192, 0.5, block=(16, 16)) < gain("bsr", 8192, 0.5, block=(64, 64))
    assert gain("bsr", 16, 0.1, block=(64, 64)) > 2
    assert gain("csr", 512, 0.3) < 1  # float32 units against tensor cores
    assert gain("csr", 1, 0.1) > 1.5
    assert gain("csr", 512, 0.05, torch.float32) > 1
    assert gain("bitmap", 1, 0.5) > 1.1
    assert gain("bitmap", 512, 0.5) < 1
    assert gain("bsr", 1, 0.1, size=64) < 1  # a small layer is all overhead
    assert predict(device, "sp24", "mm_t", 512, 4096, 4096, half, 0.5).speedup < 1


def test_cards_are_recognised() -> None:
    known = {80: "a100", 86: "rtx4090", 89: "rtx4090", 90: "h100", 100: "h200", 120: "rtx4090"}
    assert {cc: roofline.card(cc) for cc in known} == known
    assert roofline.card(90, "NVIDIA H200") == "h200"
    assert roofline.card(90, "NVIDIA GH200 480GB") == "h200"


def test_predictions_know_the_known_cases() -> None:
    def gain(format: str, m: int, dtype: torch.dtype, density: float, size: int = 4096, isa: str = "amx") -> float:
        return predict(f"cpu-{isa}", format, "mm", m, size, size, dtype, density).speedup

    assert gain("csr", 128, torch.float32, 0.05) > 5
    assert gain("csr", 512, torch.bfloat16, 0.5) < 1  # dense tensor units win by far
    assert gain("csr", 1, torch.float32, 0.5) < 1.2  # 4 bytes of column for every 4 bytes of value
    assert gain("bsr", 512, torch.bfloat16, 0.1) > 3.5
    assert 0.8 < gain("sp24", 512, torch.bfloat16, 0.5) < 1.1  # dense tiles either way
    assert gain("sp24", 1, torch.bfloat16, 0.5) > 1.4
    assert gain("bitmap", 1, torch.bfloat16, 0.5) > 1.4
    assert gain("csr", 1, torch.float32, 0.5, size=32) < 1  # a small layer is all overhead


def test_the_constants_are_those_of_the_measurements() -> None:
    """sparsekern/heuristic.py holds what bench/fit_heuristic.py makes of bench/results."""
    dense, sparse, misses = fit_heuristic.fit(fit_heuristic.load())
    for name, rates in dense.items():
        assert heuristic.DENSE[name] == pytest.approx(rates, rel=0.02)
    for format, by_type in sparse.items():
        for name, rates in by_type.items():
            assert heuristic.SPARSE[format][name] == pytest.approx(rates, rel=0.02)
    assert len(misses) >= 6
    assert max(misses.values()) < 1.6, misses


def test_a_fit_finds_the_rates_behind_the_times() -> None:
    true = heuristic.Rates(300.0, 9.0, 0.15)
    cases = [(m, d) for m in (1, 8, 64, 512) for d in (0.05, 0.1, 0.3, 0.5)]

    def times(rates: heuristic.Rates) -> list[float]:
        return [heuristic.sparse_us(rates, "csr", m, 2048, 1024, 4, d) for m, d in cases]

    found, miss = fit_heuristic.fit_rates(heuristic.Rates(100.0, 20.0, 0.2), times, times(true), few=1)
    assert found == pytest.approx(true, rel=0.1)
    assert miss < 1.05
    kept, _ = fit_heuristic.fit_rates(heuristic.Rates(100.0, 20.0, 0.2), times, times(true), few=64)
    assert kept.gbs == 20.0


def test_rows_that_the_fit_must_not_see() -> None:
    def row(**changes: object) -> dict:
        times = {name: {"median": 1.0} for name in ("sparsekern", "dense")}
        params = {"shape": "64x32", "M": 4, "sparsity": 0.9, "dtype": "float32"}
        return {"group": "csr_mm", "params": params, "threads": 1, "ms": times} | changes

    assert fit_heuristic.observations([row()]) == [("csr", "float32", 4, 64, 32, pytest.approx(0.1), 1e3, 1e3)]
    assert fit_heuristic.observations([row(threads=2)])[0].sparse == 2e3  # of two cores
    assert not fit_heuristic.observations([row(error="wrong"), row(group="packing"), row(group="overhead")])


@pytest.mark.parametrize(
    "bad",
    [
        ("cuda-amx", "csr", "mm", 1, 1, 1, torch.float32, 0.5), ("cpu-h100", "csr", "mm", 1, 1, 1, torch.float32, 0.5),
        ("cpu-sse", "csr", "mm", 1, 1, 1, torch.float32, 0.5),
        ("tpu", "csr", "mm", 1, 1, 1, torch.float32, 0.5),
        ("cpu", "coo", "mm", 1, 1, 1, torch.float32, 0.5),
        ("cpu", "csr", "conv", 1, 1, 1, torch.float32, 0.5),
        ("cpu", "csr", "mm", -1, 1, 1, torch.float32, 0.5), ("cpu", "csr", "mm", 1, 1, 1, torch.float32, 1.5),
    ],
)  # fmt: skip
def test_predictions_refuse_nonsense(bad: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected|must"):
        predict(*bad)
