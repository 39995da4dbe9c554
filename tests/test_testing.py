"""The instruments themselves: a metric or a trap that cannot fail would make every other test worthless."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ON_CARD
from torch import Tensor

from sparsekern import testing
from sparsekern.testing import assert_close, guarded, guarded_layout, measure, poisoned, relative_error, timing

NAN, INF = float("nan"), float("inf")


def row(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("out", "ref", "error"),
    [
        (row(NAN, 1, INF), row(NAN, 1, INF), 0),
        (row(NAN, 1, INF), row(NAN, 1, -INF), INF),
        (row(NAN, 1), row(2, 1), INF),
        (row(3, 1), row(NAN, 1), INF),
        (row(INF, 1), row(3, 1), INF),
        (row(0, 0), row(0, 0), 0),
        (row(0, 1e-30), row(0, 0), INF),
        (row(3, 4.5), row(3, 4), 0.1),
        (row(NAN, 3, 4.5), row(NAN, 3, 4), 0.1),
        (row(1, 2), row(1), INF),
        (torch.zeros(0, 3), torch.zeros(0, 3), 0),
    ],
)
def test_relative_error(out: Tensor, ref: Tensor, error: float) -> None:
    assert relative_error(out, ref) == pytest.approx(error)


def test_assert_close_sees_one_wrong_entry() -> None:
    ref = torch.randn(1000, 1000, dtype=torch.float64)
    out = ref.float()
    assert_close(out, ref, torch.float32)
    out[5, 7] += 1e-3
    with pytest.raises(AssertionError, match=r"worst at \(5, 7\)"):
        assert_close(out, ref)
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        assert_close(ref, ref, torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ref[:1], ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerance_is_tight(dtype: torch.dtype) -> None:
    """One rounding passes, four of them in the same direction do not."""
    ref = torch.randn(100, 100, dtype=torch.float64)
    assert_close(ref.to(dtype), ref)
    with pytest.raises(AssertionError):
        assert_close((ref * (1 + 8 * torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1))).to(dtype), ref)


def test_poison_and_guard_bands() -> None:
    with poisoned() as guards:
        y = torch.zeros(3).new_empty(4, 5)
        z = torch.empty(3, dtype=torch.int32)
        like = torch.empty_like(y)
    assert y.isnan().all()
    assert like.isnan().all()
    assert (z == 0x5A5A5A5A).all()
    assert len(guards) == 3
    assert y.data_ptr() % 64 != 0 or y.storage_offset() % 16 != 0
    assert not torch.zeros(3).new_zeros(4).isnan().any()

    def late() -> None:
        with poisoned():
            y = torch.zeros(3).new_empty(4, 5)
            y.as_strided((21,), (1,), y.storage_offset()).zero_()

    with pytest.raises(AssertionError, match="0 into the rear"):
        late()


def test_guard_between_rows() -> None:
    guard = guarded(torch.randn(5, 3), gap=4)
    assert guard.tensor.stride() == (7, 1)
    guard.tensor.mul_(2)
    guard.check()
    guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() - 1).zero_()
    with pytest.raises(AssertionError, match="1 before the start"):
        guard.check()
    guard = guarded(torch.randn(5, 3), gap=4)
    guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() + 3).zero_()
    with pytest.raises(AssertionError, match="wrote outside"):
        guard.check()


def test_guarded_layout() -> None:
    layout, check = guarded_layout(testing.pack("csr", testing.random_weight("csr", 9, 9)))
    check()
    layout.values[3] = 7
    with pytest.raises(AssertionError, match="values was written to"):
        check()


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_random_weights(format: str, dtype: torch.dtype) -> None:
    """Seeded, of about the density asked for, with the pattern of the format."""
    density = 0.4
    w = testing.random_weight(format, 130, 157, dtype, density, seed=5)
    assert torch.equal(w, testing.random_weight(format, 130, 157, dtype, density, seed=5))
    assert not torch.equal(w, testing.random_weight(format, 130, 157, dtype, density, seed=6))
    assert (w != 0).float().mean().item() == pytest.approx(density, abs=0.06)
    scale = testing.random_scale(130) if dtype == torch.int8 else None
    if scale is None or format in ("sp24", "bsr"):
        assert torch.equal(testing.pack(format, w, 4, scale).check().unpack(), w)
    with pytest.raises(ValueError, match="format must be one of sp24"):
        testing.random_weight("coo", 4, 4)


def test_skewed_and_dlmc_like_weights() -> None:
    for make in (testing.skewed_weight, testing.dlmc_like):
        w = make(256, 300, density=0.1)
        lengths = (w != 0).sum(1).double()
        assert lengths.mean().item() / 300 == pytest.approx(0.1, abs=0.02)
        assert lengths.std() > 1.5 * (300 * 0.1 * 0.9) ** 0.5, "rows as even as a uniform mask's"
    empty = (testing.with_empty_rows(torch.ones(50, 4), 0.3) == 0).all(1)
    assert empty[0]
    assert empty[-1]
    assert 5 < empty.sum() < 30


def test_measure_interleaves_and_rotates() -> None:
    seen: list[tuple[str, int]] = []
    variants = {name: (lambda i, name=name: seen.append((name, i))) for name in "abc"}
    times = measure(variants, repeats=10, warmup=2, inputs=[0, 1, 2])
    assert list(times) == ["a", "b", "c"]
    assert all(t.n == 10 and 0 <= t.p20 <= t.median <= t.p80 for t in times.values())
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == 12
    for one in rounds:
        assert sorted(name for name, _ in one) == ["a", "b", "c"], "every round calls every variant once"
        assert len({i for _, i in one}) == 1, "with the same input"
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1, "in no fixed order"
    assert len({one[0][1] for one in rounds}) == 3, "inputs rotate"
    assert str(testing.timing([2e-3] * 5)) == "2 ms [2 .. 2]"


class Card:
    """A GPU whose calls return at once and whose clock only its work moves; times are known after a synchronize."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.flushes, self.waited, self.entered = 0.0, 0, -1.0, []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self, enable_timing))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=100 << 20))
        monkeypatch.setattr(torch, "empty", self.empty)

    @contextmanager
    def device(self, which: torch.device) -> Iterator[None]:
        self.entered.append(which)
        yield

    def empty(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Any:
        assert size == 200 << 20, "twice the cache"
        assert device == torch.device("cuda", 1)
        return self

    def zero_(self) -> None:
        self.flushes += 1
        self.work(7.0)

    def work(self, seconds: float) -> None:
        self.now += seconds

    def synchronize(self, which: torch.device) -> None:
        assert which == torch.device("cuda", 1)
        self.waited = self.now


class Event:
    def __init__(self, card: Card, enable_timing: bool) -> None:
        assert enable_timing
        self.card, self.at = card, -1.0

    def record(self) -> None:
        self.at = self.card.now

    def elapsed_time(self, end: Event) -> float:
        assert 0 <= self.at <= end.at <= self.card.waited, "asked before the GPU was done"
        return 1e3 * (end.at - self.at)


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the launch, which returns at once; not what empties the cache; and the host where it takes longer."""
    card = Card(monkeypatch)
    variants = {
        "short": lambda: card.work(3.0),
        "long": lambda: card.work(5.0),
        "waits for the host": lambda: (time.sleep(0.02), card.work(1e-6)),
    }
    times = measure(variants, repeats=6, warmup=2, device="cuda:1")
    assert times["short"].median == pytest.approx(3.0)
    assert times["long"].median == pytest.approx(5.0)
    assert 0.02 <= times["waits for the host"].median < 1.0
    assert card.flushes == 3 * (6 + 2), "cold every time"
    assert set(card.entered) == {torch.device("cuda", 1)}


@pytest.mark.skipif(not ON_CARD, reason="needs a GPU")
def test_a_card_is_timed() -> None:
    """A product takes what its multiplications take, not what its launch does."""
    a, b = (torch.randn(n, n, device="cuda").half() for n in (8192, 64))
    times = measure({"large": lambda: a @ a, "small": lambda: b @ b}, repeats=10, device="cuda")
    assert times["large"].median > 2 * 8192**3 / 3e15, "more than any card multiplies in a second"
    assert times["large"].median > 5 * times["small"].median


def test_single_thread() -> None:
    before = torch.get_num_threads()
    with testing.threads(3):
        with testing.single_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_percentiles_enclose_the_median_of_equal_times() -> None:
    for i in range(1, 2000):
        t = timing([i * 1e-7 / 3] * 4)
        assert t.p20 <= t.median <= t.p80
