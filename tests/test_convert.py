"""convert_ and to_dense_: what is converted, what is not and why, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.nn.utils import prune as torch_prune

import sparsekern as sk
from sparsekern import dispatch, tune
from sparsekern import formats as formats_module
from sparsekern.csr import vendor as csr_vendor
from sparsekern.nn import SparseLinear, SparseModule, convert, decide
from sparsekern.nn.candidates import candidates, describe, first_suitable
from sparsekern.patterns import analyse
from sparsekern.testing import random_weight

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pruned(*sizes: int, pattern: Any = "2:4", sparsity: float | None = None) -> nn.Sequential:
    """Linears of the given sizes with plain zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(sizes)))
    sk.prune.magnitude_(model, pattern, sparsity, keep_mask=False)
    return model.eval()


def blocky(size: int, block: int, density: float) -> torch.Tensor:
    weight = rand(size, size)
    return weight * sk.prune.Block(block).mask(weight.abs(), 1 - density)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "foreign_load", lambda: 0.0)
    tune.forget()
    yield
    tune.forget()


class Clock:
    """Stands in for tune.measure: says what each format takes, counts how often it was asked."""

    def __init__(self, times: Callable[[str, int], float], spread: float = 0.0) -> None:
        self.times, self.spread, self.calls = times, spread, 0

    def __call__(
        self, dense: Any, variants: dict[str, Any], *, m: int, seconds: float, device: torch.device
    ) -> dict[str, tune.Record]:
        assert device == torch.device("cpu"), "where the sample is, so that a GPU's calls are not taken for a CPU's"
        self.calls += 1
        out = {}
        for name, call in variants.items():
            call()  # it must run
            module = call.__closure__[0].cell_contents
            out[name] = tune.Record(m, 1e-3, self.times(module.format, m), self.spread)
        return out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """clock({"csr": 0.5}): csr is twice as fast as dense; formats not named take 2 ms. Any backend does."""

    def install(times: Any, spread: float = 0.0) -> Clock:
        of = times if callable(times) else lambda format, m: 1e-3 * times.get(format, 2.0)
        made = Clock(of, spread)
        monkeypatch.setattr(tune, "measure", made)
        monkeypatch.setattr(decide, "backend_of", lambda module, x: ("host", ""))
        return made

    return install


# What is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "text", "formats"),
    [
        (random_weight("sp24", 64, 64), "2:4", ["sp24", "csr", "bitmap"]),
        (random_weight("csr", 64, 64, density=0.2), "unstructured", ["csr", "bitmap"]),
        (random_weight("csr", 128, 128, density=0.08), "unstructured", ["csr"]),
        (blocky(128, 32, 0.25), "block 32", ["bsr", "csr", "bitmap"]),
        (torch.ones(64, 64), "dense", []),
        (torch.zeros(64, 64), "all zero", ["sp24", "csr"]),
        (random_weight("sp24", 64, 64).t().contiguous(), "2:4 along N", ["csr", "bitmap"]),
    ],
)
def test_patterns_and_candidates(weight: torch.Tensor, text: str, formats: list[str]) -> None:
    found = analyse(weight)
    assert describe(found) == text
    assert list(dict.fromkeys(c.format for c in candidates(found, "auto", None, False))) == formats


def test_near_24_is_said_and_pruned_only_when_asked() -> None:
    weight = random_weight("sp24", 64, 64)
    weight[3, 8:12] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = analyse(weight)
    assert describe(found).startswith("near 2:4")
    assert [c.format for c in candidates(found, "auto", None, False)] == ["csr", "bitmap"]
    first = candidates(found, "auto", None, True)[0]
    assert (first.format, first.prune) == ("sp24", True)
    # A sparse unstructured weight has few violating groups, too, and is not near 2:4.
    assert describe(analyse(random_weight("csr", 64, 64, density=0.05))) == "unstructured"


def test_the_untimed_choice_follows_the_pattern() -> None:
    def first(weight: torch.Tensor) -> str | None:
        found = analyse(weight)
        chosen = first_suitable(found, candidates(found, "auto", None, False))
        return chosen and str(chosen)

    assert first(random_weight("sp24", 64, 64)) == "sp24"
    assert first(blocky(256, 64, 0.25)) == "bsr 64x64"
    assert first(random_weight("csr", 64, 64, density=0.1)) == "csr"
    assert first(random_weight("csr", 64, 64, density=0.6)) == "bitmap"
    assert first(torch.ones(8, 8)) is None


# Policies ---------------------------------------------------------------------------------------------------


def test_measured_keeps_the_fastest(clock) -> None:
    clock({"sp24": 0.5, "csr": 0.4, "bitmap": 0.9})
    model, x = pruned(64, 32, 64), rand(8, 64)
    want = model(x)
    report = sk.convert_(model, sample=x, progress=False)
    assert [row.format for row in report] == ["csr", "csr"]
    assert report["0"].speedup == pytest.approx(2.5)
    assert report["0"].dense_ms == pytest.approx(1.0)
    assert report["0"].calls[0].tokens == 8
    assert report["0"].max_error < 1e-6
    assert torch.allclose(model(x), want, atol=1e-5)
    assert report.model is model


def test_dense_stays_where_it_wins(clock) -> None:
    clock({"sp24": 1.6})
    model = pruned(64, 32)
    report = sk.convert_(model, sample=rand(8, 64), progress=False)
    row = report["0"]
    assert (row.status, row.format) == ("dense", "dense")
    assert "dense is faster: best candidate sp24 at 0.62x" in row.reason
    assert type(model[0]) is nn.Linear
    assert row.bytes_after == row.bytes_before == 64 * 32 * 4
    assert report.totals()["speedup"] == 1.0


@pytest.mark.parametrize(
    ("times", "spread", "least", "converted"),
    [
        (0.99, 0.0, 1.0, False),  # within 2 %: no gain
        (0.95, 0.0, 1.0, True),
        (0.95, 0.05, 1.0, False),  # a noisy 5 % is none either
        (0.7, 9.0, 1.0, True),  # but no noise asks for more than a quarter
        (0.7, 0.0, 1.5, False),
        (0.6, 0.0, 1.5, True),
        (1.1, 0.0, 0.5, True),  # to save memory
    ],
)
def test_noise_and_min_speedup(clock, times: float, spread: float, least: float, converted: bool) -> None:
    clock({"sp24": times}, spread)
    report = sk.convert_(pruned(64, 32), sample=rand(8, 64), min_speedup=least, progress=False)
    assert (report["0"].status == "converted") == converted
    if not converted:
        assert "x asked for" in report["0"].reason or "dense is faster" in report["0"].reason


def test_several_token_counts_are_weighed(clock) -> None:
    # sp24: twice as fast at one token, half as fast at 64. Three single calls against one of 64.
    clock(lambda format, m: 9e-3 if format != "sp24" else 0.5e-3 if m == 1 else 2e-3)
    sample = [rand(1, 64), rand(1, 64, seed=1), rand(1, 64, seed=2), rand(64, 64)]
    report = sk.convert_(pruned(64, 32), sample=sample, progress=False)
    row = report["0"]
    assert [(c.tokens, c.count) for c in row.calls] == [(1, 3), (64, 1)]
    assert row.speedup == pytest.approx(4 / 3.5)
    assert row.worst_speedup == pytest.approx(0.5)
    assert row.status == "converted"
    assert "worst 0.50x" in str(report)
    worst = sk.convert_(pruned(64, 32), sample=sample, decide="worst", progress=False)["0"]
    assert worst.status == "dense"
    assert "at its worst shape" in worst.reason


def test_without_a_sample_the_default_counts_are_said(clock) -> None:
    clock({"sp24": 0.5})
    report = sk.convert_(pruned(64, 32), progress=False)
    assert [c.tokens for c in report["0"].calls] == [1, 128]
    assert any("1, 128 tokens" in note for note in report.notes)
    report = sk.convert_(pruned(64, 32), tokens=(7,), progress=False)
    assert [c.tokens for c in report["0"].calls] == [7]


def test_of_equal_candidates_the_smallest_is_kept(clock) -> None:
    clock({"sp24": 0.505, "csr": 0.5, "bitmap": 0.504})
    report = sk.convert_(pruned(64, 32), sample=rand(8, 64), progress=False)
    assert report["0"].format == "sp24"
    assert report["0"].bytes_after == 32 * (64 // 2 * 4 + 64 // 8)


def test_a_wrong_kernel_is_caught(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong entry in one row of many: the model stays dense and the error says where."""
    clock({"sp24": 0.5})
    right = SparseLinear.forward

    def wrong(self: SparseLinear, x: torch.Tensor) -> torch.Tensor:
        out = right(self, x)
        out[-1, 3] += 0.01
        return out

    monkeypatch.setattr(SparseLinear, "forward", wrong)
    model = pruned(64, 32)
    with pytest.raises(RuntimeError, match=r"0 as sp24 \(host\) differs .*worst at \(255, 3\)"):
        sk.convert_(model, sample=rand(5000, 64), progress=False)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    x = rand(4, 64)
    x[2, 1] = value
    model = pruned(64, 32)
    with torch.no_grad():
        model[0].weight[:, 1] = 0
        model[0].weight[0, 1] = 1  # elsewhere 0 * inf is NaN dense and nothing sparse
        model[0].weight[0, 2:4] = 0
    report = sk.convert_(model, policy="always", sample=x)
    assert report["0"].status == "converted"
    assert report["0"].max_error < 1e-6


def test_always_takes_the_first_that_fits_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measure", lambda *a, **k: pytest.fail("timed"))
    model, x = pruned(64, 32), rand(8, 64)
    want = model(x)
    report = sk.convert_(model, policy="always")
    assert isinstance(model[0], SparseLinear)
    assert report["0"].format == "sp24"
    assert report["0"].dense_ms is None
    assert torch.allclose(model(x), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
def test_every_format_and_type(format: str, dtype: torch.dtype) -> None:
    model = pruned(64, 40, 32).to(dtype)
    want = copy.deepcopy(model)
    report = sk.convert_(model, format, policy="always", block_size=8, sample=rand(5, 64).to(dtype))
    assert [row.format.split()[0] for row in report] == [format] * 2
    assert all(row.max_error < 0.02 for row in report)
    sk.to_dense_(model)
    for a, b in zip(model.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == dtype


def test_heuristic_needs_no_time_and_keeps_hopeless_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measure", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(decide, "backend_of", lambda module, x: ("host", ""))
    monkeypatch.setattr(tune, "isa", lambda: "avx512")
    big = pruned(1024, 1024, pattern="unstructured", sparsity=0.95)
    report = sk.convert_(big, policy="heuristic", sample=rand(128, 1024))
    assert report["0"].format == "csr"
    assert report["0"].expected > 2
    small = pruned(16, 16, pattern="unstructured", sparsity=0.5)
    report = sk.convert_(small, policy="heuristic", sample=rand(1, 16))
    assert report["0"].status == "dense"
    assert "expected to be faster" in report["0"].reason


def test_without_a_fast_kernel_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "backend_of", lambda module, x: ("ref", "host: not on this machine"))
    report = sk.convert_(pruned(64, 32), progress=False)
    assert report["0"].status == "dense"
    assert "no fast kernel here (host: not on this machine)" in report["0"].reason


def test_a_real_measurement() -> None:
    """No stand-ins: whatever wins, outputs stay and the figures agree with the decision."""
    model, x = pruned(512, 512, pattern="unstructured", sparsity=0.95), rand(32, 512)
    want = model(x)
    report = sk.convert_(model, sample=x, seconds=0.02, progress=False)
    row = report["0"]
    assert torch.allclose(model(x), want, atol=1e-4)
    if row.status == "converted":
        assert row.speedup > 1
        assert row.backend == "host"
        assert isinstance(model[0], SparseLinear)
    else:
        assert row.reason


# Format asked for -------------------------------------------------------------------------------------------


def test_a_weight_that_is_not_24_is_named_and_nothing_changed() -> None:
    model = pruned(64, 32, 64, 32)
    with torch.no_grad():
        model[1].weight[5, 8:12] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError,
        match=r"1 of 3 weights.*\n  1: not 2:4: 1 of 512 groups, first row 5, group 2 .*1, 2, 3, 4",
    ):
        sk.convert_(model, "sp24", policy="always")
    assert all(type(m) is nn.Linear for m in model)
    report = sk.convert_(model, "sp24", policy="always", strict=False)
    assert [row.status for row in report] == ["converted", "dense", "converted"]
    assert "row 5, group 2" in report["1"].reason
    assert torch.equal(sk.to_dense_(model)[1].weight, before[1].weight)


def test_prune_true_keeps_the_two_largest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    want = sk.to_sparse_semi_structured(model[0].weight, prune=True).to_dense()
    report = sk.convert_(model, "sp24", policy="always", prune=True)
    assert "pruned to 2:4" in report["0"].reason
    assert torch.equal(model[0].weight.to_dense(), want)


def test_prune_true_leaves_a_layer_alone_that_stays_dense(clock) -> None:
    clock({})
    model = nn.Sequential(nn.Linear(64, 32))
    before = model[0].weight.clone()
    sk.convert_(model, "sp24", prune=True, sample=rand(2, 64), progress=False)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "coo"}, "format must be"),
        ({"policy": "fastest"}, "policy must be"),
        ({"format": "csr", "prune": True}, "prune=True is for"),
        ({"min_speedup": 0}, "min_speedup"),
        ({"decide": "best"}, "decide must be"),
        ({"tokens": (0,)}, "tokens must be"),
        ({"sample": []}, "empty list"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sk.convert_(pruned(8, 8), **options)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        sk.convert_(torch.ones(3, 3))
    with pytest.raises(TypeError, match="sample must be"):
        sk.convert_(pruned(8, 8), sample=3.5)
    with pytest.raises(ValueError, match="scripted"):
        sk.convert_(torch.jit.trace(pruned(8, 8), rand(1, 8)))


def test_beyond_tolerance_raises_and_leaves_the_model() -> None:
    model = pruned(64, 32)
    with pytest.raises(RuntimeError, match=r"0 as sp24 .* differs from dense"):
        sk.convert_(model, policy="always", tolerance=1e-12)
    assert type(model[0]) is nn.Linear


# Samples ----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.a(x) if other is None else self.a(x) + self.b(input=other)


@pytest.mark.parametrize(
    ("sample", "calls"),
    [
        (rand(3, 16), {"a": [(3, 1)], "b": []}),
        ((rand(3, 16), rand(3, 16)), {"a": [(3, 1)], "b": [(3, 1)]}),
        ({"x": rand(2, 3, 16), "other": rand(1, 3, 16)}, {"a": [(6, 1)], "b": [(3, 1)]}),
        (UserDict(x=rand(4, 16)), {"a": [(4, 1)], "b": []}),
        (lambda model: [model(rand(5, 16)) for _ in range(3)], {"a": [(5, 3)], "b": []}),
        ([rand(3, 16), (rand(7, 16), rand(1, 16))], {"a": [(3, 1), (7, 1)], "b": [(1, 1)]}),
        (rand(0, 16), {"a": [], "b": []}),
    ],
)
@pytest.mark.filterwarnings("ignore:the sample reached none")
def test_samples(clock, sample: Any, calls: dict[str, list[tuple[int, int]]]) -> None:
    clock({"sp24": 0.5})
    model = Two().train()
    sk.prune.magnitude_(model)
    report = sk.convert_(model, sample=sample, progress=False)
    for name, want in calls.items():
        assert [(c.tokens, c.count) for c in report[name].calls] == want
        if not want:
            assert report[name].reason == "the sample never calls this layer"
    assert report["unused"].status == "dense"
    assert model.training
    assert model.unused.training
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_autocast_is_seen_and_kept(clock) -> None:
    seen = clock({"sp24": 0.5})
    model = pruned(64, 32)

    def sample(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(rand(4, 64))

    report = sk.convert_(model, sample=sample, progress=False)
    assert report["0"].status == "converted"
    assert 1e-4 < report["0"].max_error < 1e-2  # bfloat16 arithmetic
    assert seen.calls == 1
    sk.convert_(pruned(64, 32), sample=rand(4, 64), progress=False)
    assert seen.calls == 2  # float32 is another case


def test_a_failing_sample_leaves_no_trace() -> None:
    model = pruned(64, 32).train()
    with pytest.raises(RuntimeError):
        sk.convert_(model, sample=rand(4, 63))
    assert model.training
    assert not model[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_equal_layers_are_measured_once_and_across_runs(clock) -> None:
    seen = clock({"sp24": 0.5})
    model = nn.Sequential(*(pruned(64, 64)[0] for _ in range(6)))
    sk.convert_(model, sample=rand(4, 64), progress=False)
    assert seen.calls == 1
    tune.forget()  # as a new process would
    sk.convert_(pruned(64, 64), sample=rand(4, 64), progress=False)
    assert seen.calls == 1
    sk.convert_(pruned(64, 64), sample=rand(4, 64), cache=False, progress=False)
    assert seen.calls == 2


# Undoing ----------------------------------------------------------------------------------------------------


def test_convert_is_idempotent(clock) -> None:
    seen = clock(lambda format, m: 0.5e-3 if format == "csr" else 2e-3)
    model = nn.Sequential(*pruned(64, 32), *pruned(32, 64, pattern="unstructured", sparsity=0.9), nn.Linear(64, 8))
    sk.prune.magnitude_(model[2], "2:4", keep_mask=False)
    options = {"sample": rand(4, 64), "progress": False, "filter_fn": None, "cache": False}
    first = sk.convert_(model, "auto", **options)
    kept = list(model)
    timed = seen.calls
    second = sk.convert_(model, "auto", **options)
    assert list(model) == kept
    assert seen.calls == timed
    assert [row.status for row in second] == ["sparse" if r.status == "converted" else r.status for r in first]
    assert second["0"].reason == "sparse already"


def test_a_layer_kept_dense_is_not_timed_twice(clock) -> None:
    seen = clock({})
    model = pruned(64, 32)
    first = sk.convert_(model, sample=rand(4, 64), progress=False, cache=False)
    second = sk.convert_(model, sample=rand(4, 64), progress=False, cache=False)
    assert seen.calls == 1
    assert (second["0"].reason, second["0"].dense_ms) == (first["0"].reason, first["0"].dense_ms)
    with torch.no_grad():
        model[0].weight.mul_(2)
    sk.convert_(model, sample=rand(4, 64), progress=False, cache=False)
    assert seen.calls == 2  # another weight is another question


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "block"])
def test_to_dense_undoes_it_exactly(pattern: str) -> None:
    model = pruned(64, 96, 32, pattern=pattern, sparsity=None if pattern == "2:4" else 0.8)
    model[0].weight.requires_grad_(False)
    model[1].train()
    model[1].bias = None
    model[0].tag = {"anything": 1}
    ran: list[str] = []
    handle = model[0].register_forward_hook(lambda *a: ran.append("forward"))
    model[1].register_forward_pre_hook(lambda *a, **k: ran.append("pre"), with_kwargs=True)
    before, bias = copy.deepcopy(model.state_dict()), model[0].bias
    x = rand(3, 64)
    want = model(x)
    sk.convert_(model, policy="always")
    assert all(isinstance(m, SparseLinear) for m in model)
    assert model[0].tag == {"anything": 1}
    assert not model[0].values.requires_grad
    ran.clear()
    assert torch.allclose(model(x), want, atol=1e-5)
    assert ran == ["forward", "pre"]
    assert sk.to_dense_(model) is model
    assert all(type(m) is nn.Linear for m in model)
    for (name, a), (other, b) in zip(model.state_dict().items(), before.items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert model[0].bias is bias
    assert (model[0].weight.requires_grad, model[1].weight.requires_grad) == (False, True)
    assert (model[0].training, model[1].training) == (False, True)
    assert model[0].tag == {"anything": 1}
    ran.clear()
    assert torch.equal(model(x), want)
    assert ran == ["forward", "pre"]
    handle.remove()
    ran.clear()
    model(x)
    assert ran == ["pre"]


def test_to_dense_after_copying_and_training() -> None:
    model = pruned(64, 32)
    sk.convert_(model, policy="always")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(rand(4, 64)).sum().backward()
    optimizer.step()
    want = twin(rand(4, 64))
    zeros = sk.to_dense_(copy.deepcopy(model))[0].weight == 0
    assert torch.allclose(sk.to_dense_(twin)(rand(4, 64)), want, atol=1e-5)
    assert type(twin[0]) is nn.Linear
    assert not twin[0].weight[zeros].any()


def test_subclass_without_behaviour_comes_back_as_itself() -> None:
    class Marked(nn.Linear):
        """A Linear in all but name."""

    model = nn.Sequential(Marked(64, 32))
    sk.prune.magnitude_(model, keep_mask=False)
    sk.convert_(model, policy="always")
    assert isinstance(model[0], SparseLinear)
    assert type(sk.to_dense_(model)[0]) is Marked


def test_the_model_itself_is_a_layer() -> None:
    layer = pruned(64, 32)[0]
    with pytest.warns(UserWarning, match=r"use report\.model"):
        report = sk.convert_(layer, policy="always")
    assert isinstance(report.model, SparseLinear)
    assert type(layer) is nn.Linear
    assert torch.allclose(report.model(rand(2, 64)), layer(rand(2, 64)), atol=1e-5)
    back = sk.to_dense_(report.model)
    assert torch.equal(back.weight, layer.weight)
    assert any("report.model" in note for note in report.notes)


# Shared, tied, wrapped, masked ------------------------------------------------------------------------------


def test_a_shared_module_is_converted_once_and_everywhere(clock) -> None:
    seen = clock({"sp24": 0.5})
    shared = pruned(64, 64)[0]
    model = nn.ModuleDict({"first": shared, "deep": nn.Sequential(nn.ReLU(), shared)})
    report = sk.convert_(model, sample=lambda m: m["deep"](m["first"](rand(4, 64))), progress=False)
    assert len(report) == 1
    assert report["deep.1"] is report["first"]
    assert report["first"].calls[0].count == 2
    assert seen.calls == 1
    assert model["first"] is model["deep"][1]
    assert isinstance(model["first"], SparseLinear)
    sk.to_dense_(model)
    assert model["first"] is model["deep"][1]


def test_tied_linears_share_their_sparse_weight() -> None:
    model = nn.Sequential(*pruned(64, 64, 64))
    model[1].weight = model[0].weight
    bias = model[1].bias
    want = model(rand(3, 64))
    report = sk.convert_(model, policy="always")
    assert len(report) == 1
    assert report["0"].also == ("1",)
    assert model[0] is not model[1]
    assert model[0].values is model[1].values
    assert model[1].bias is bias
    assert torch.allclose(model(rand(3, 64)), want, atol=1e-5)
    assert len(list(model.parameters())) == 3
    sk.to_dense_(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model(rand(3, 64)), want)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(64, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 64, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


def test_an_embedding_s_head_is_left_and_named() -> None:
    model = Tied()
    with pytest.warns(UserWarning, match="head"):
        sk.prune.magnitude_(model, keep_mask=False)
    report = sk.convert_(model, policy="always", sample=torch.arange(5))
    assert report["head"].status == "skipped"
    assert report["head"].reason == "its weight is tied to embed.weight (Embedding)"
    assert report["body"].status == "converted"
    assert model.head.weight is model.embed.weight


def test_memory_shared_behind_torch_s_back_is_noticed() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert sk.convert_(model, policy="always")["1"].reason == "its weight shares memory with 0.weight"
    # Neighbours in one buffer do not overlap and are fine.
    flat = torch.zeros(2, 32, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight, model[1].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    assert len(sk.convert_(model, policy="always").converted) == 2


def test_attention_is_left_alone_and_still_runs() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    sk.prune.magnitude_(model, keep_mask=False)
    x = rand(2, 5, 32)
    with torch.no_grad():
        want = model(x)
        report = sk.convert_(model, sample=x, policy="always")
        assert torch.allclose(model(x), want, atol=1e-5)
        assert torch.allclose(model(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)), want, atol=1e-5)
    assert report["layers.0.self_attn.out_proj"].reason == "nn.MultiheadAttention reads its weight directly"
    assert report["layers.1.self_attn.in_proj_weight"].status == "skipped"
    assert {r.layer for r in report.converted} == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert any("fused inference path" in note for note in report.notes)


def test_own_masks_become_permanent_only_where_converted(clock) -> None:
    clock(lambda format, m: 0.5e-3 if m == 4 else 2e-3)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    sk.prune.magnitude_(model)
    want = model(rand(4, 64))
    report = sk.convert_(model, sample=lambda m: (m(rand(4, 64)), m[1](rand(1000, 32))), progress=False)
    assert report["0"].reason == "mask made permanent"
    assert isinstance(model[0], SparseLinear)
    assert report["1"].status == "dense"
    assert sk.prune.mask_of(model[1]) is not None
    assert torch.allclose(model(rand(4, 64)), want, atol=1e-5)
    sk.to_dense_(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(rand(4, 64)), want)


def test_torch_s_masks_are_understood() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    torch_prune.l1_unstructured(model[0], "weight", 0.9)
    torch_prune.l1_unstructured(model[1], "bias", 0.5)
    ran: list[int] = []
    model[0].register_forward_pre_hook(lambda *a: ran.append(1))
    want = model(rand(4, 64))
    report = sk.convert_(model, policy="always")
    assert report["0"].format == "csr"
    assert report["0"].reason == "torch.nn.utils.prune mask made permanent"
    assert report["1"].status == "skipped"
    ran.clear()
    assert torch.allclose(model(rand(4, 64)), want, atol=1e-5)
    assert ran == [1]
    sk.to_dense_(model)
    assert torch.equal(model(rand(4, 64)), want)
    assert set(dict(model[0].named_parameters())) == {"weight", "bias"}


class Lora(nn.Module):
    """As adapters are built: the base layer's weight is read and merged into."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = pruned(32, 32)[0]
        self.lora_A, self.lora_B = (
            nn.ModuleDict({"default": nn.Linear(32, 4)}),
            nn.ModuleDict({"default": nn.Linear(4, 32)}),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class OwnTensor(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("extra", torch.zeros(1))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.plain = [self.fc]


def patched() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer._register_state_dict_hook(lambda *a: None)
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(32, 32))


def torch_sparse_weight() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(sk.to_sparse_semi_structured(layer.weight, prune=True))
    return layer


@pytest.mark.parametrize(
    ("make", "layer", "reason"),
    [
        (lambda: nn.Sequential(OwnForward(32, 32)), "0", "OwnForward is a Linear that defines forward"),
        (lambda: nn.Sequential(OwnTensor(32, 32)), "0", "tensors or modules of its own: extra"),
        (lambda: nn.Sequential(patched()), "0", "its forward was replaced"),
        (lambda: nn.Sequential(hooked()), "0", "state_dict hooks"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 32))), "0", "_WeightNorm"),
        (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(32, 32), "weight")), "0", "_Orthogonal"),
        (lambda: nn.Sequential(old_weight_norm()), "0", "hook recomputes it"),
        (lambda: nn.Sequential(spectral_norm(nn.Linear(32, 32))), "0", "recomputed by a hook"),
        (lambda: nn.Sequential(Lora()), "0.base_layer", "part of the adapter Lora"),
        (lambda: nn.Sequential(Lora()), "0.lora_A.default", "part of the adapter Lora"),
        (Listed, "fc", "also held by the plain container Listed.plain"),
        (lambda: nn.Sequential(nn.Linear(32, 32, device="meta")), "0", "meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "0", "lazy"),
        (lambda: nn.Sequential(nn.Linear(32, 0)), "0", "empty"),
        (lambda: nn.Sequential(nn.Linear(32, 32).to(torch.complex64)), "0", "complex64"),
        (lambda: nn.Sequential(torch_sparse_weight()), "0", "SparseTensor already"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_is_skipped_and_why(make: Callable[[], nn.Module], layer: str, reason: str) -> None:
    model = make()
    report = sk.convert_(model, "csr", policy="always")
    row = report[layer]
    assert reason in row.reason
    assert row.status in ("skipped", "sparse")
    assert not any(isinstance(m, SparseModule) for m in model.modules())
    assert layer in str(report)


def test_filter_fn() -> None:
    model = pruned(32, 32, 32)
    report = sk.convert_(model, policy="always", filter_fn=lambda module, name: name == "1")
    assert [row.status for row in report] == ["skipped", "converted"]
    assert report["0"].reason == "left out by filter_fn"


class Reader(nn.Module):
    """Reads its layer's weight in a way that only a dense tensor allows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = pruned(32, 32)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) / self.fc.weight.norm(dim=1)


def test_a_model_that_would_break_is_put_back() -> None:
    model = Reader().eval()
    layer, want = model.fc, model(rand(2, 32))
    with pytest.raises(RuntimeError, match="no longer runs"):
        sk.convert_(model, policy="always", sample=rand(2, 32))
    assert model.fc is layer
    assert torch.equal(model(rand(2, 32)), want)


# Convolutions -----------------------------------------------------------------------------------------------


def image_model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 24, 3, **options), nn.ReLU(), nn.Flatten(2)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": 2, "padding": 1}, {"padding": "same", "bias": False},
        {"dilation": 2, "padding": (1, 2)},
        {"groups": 4}, {"groups": 8, "padding": 1, "padding_mode": "reflect"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions(format: str, options: dict[str, Any], layout: torch.memory_format) -> None:
    model = image_model(**options)
    order = "rsc" if options.get("groups", 1) < 8 else "crs"
    sk.prune.magnitude_(model, sk.prune.NM(order=order), keep_mask=False)
    x = rand(2, 16, 9, 11).contiguous(memory_format=layout)
    want, weight, settings = model(x), model[0].weight, repr(model[0])
    report = sk.convert_(model, format, policy="always", sample=x, block_size=8)
    row = report["0"]
    assert row.status == "converted"
    assert row.max_error < 1e-6
    assert row.calls == []
    if format == "sp24":
        assert row.format == f"sp24 {order}"
        assert row.pattern == f"2:4 {order}"
    assert torch.allclose(model(x), want, atol=1e-5)
    sk.to_dense_(model)
    assert type(model[0]) is nn.Conv2d
    assert repr(model[0]) == settings
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), want)


def test_a_conv_s_violation_names_both_orders() -> None:
    with pytest.raises(ValueError, match=r"0: not 2:4: crs: \d+ of 864 groups, first row 0.*; rsc: \d+ of 864"):
        sk.convert_(image_model(), "sp24", policy="always")
    report = sk.convert_(image_model(), "sp24", policy="always", prune=True)
    assert report["0"].status == "converted"


def test_convs_are_measured_at_their_images(clock) -> None:
    seen = clock({"csr": 0.5})
    model = image_model()
    sk.prune.magnitude_(model, "unstructured", 0.8)
    x = rand(2, 16, 9, 11)
    sample = [x, x.contiguous(memory_format=torch.channels_last), x[0]]
    report = sk.convert_(model, sample=sample, progress=False)
    assert [(c.shape, c.tokens, c.count) for c in report["0"].calls] == [
        ((2, 16, 9, 11), 198, 1), ((2, 16, 9, 11), 198, 1), ((16, 9, 11), 99, 1),
    ]  # fmt: skip
    assert seen.calls == 3  # another memory order is another case
    assert report["0"].format == "csr"
    seen.times = lambda format, m: 2e-3
    model = image_model()
    sk.prune.magnitude_(model, "unstructured", 0.8)
    report = sk.convert_(model, progress=False)
    assert report["0"].calls[0].shape == (1, 16, 28, 28)
    assert report["0"].status == "dense"


def test_1x1_and_depthwise() -> None:
    """A 1 x 1 kernel is a product; a depthwise one has nothing to skip, says so and stays dense under any policy."""
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16, padding=1)).eval()
    sk.prune.magnitude_(model, "2:4", keep_mask=False)
    x = rand(1, 16, 6, 6)
    want = model(x)
    report = sk.convert_(model, policy="always", sample=x)
    assert [row.status for row in report] == ["converted", "dense"]
    assert "depthwise" in report["1"].reason
    assert torch.allclose(model(x), want, atol=1e-5)
    for format in formats_module.FORMATS:
        alone = nn.Sequential(copy.deepcopy(model[1]))
        row = sk.convert_(alone, format, policy="always", progress=False)["0"]
        assert (row.status, "depthwise" in row.reason) == ("dense", True)


def test_a_shared_conv_head() -> None:
    head = image_model()[0]
    sk.prune.magnitude_(head, "unstructured", 0.9, keep_mask=False)
    model = nn.ModuleList([head, nn.Sequential(head)])
    report = sk.convert_(model, policy="always")
    assert len(report) == 1
    assert model[0] is model[1][0]
    assert isinstance(model[0], SparseModule)


def test_convs_with_one_weight_are_left() -> None:
    model = nn.Sequential(image_model()[0], image_model(stride=2)[0])
    model[1].weight = model[0].weight
    report = sk.convert_(model, "csr", policy="always")
    assert [row.status for row in report] == ["skipped", "skipped"]
    assert "tied to 1.weight (Conv2d)" in report["0"].reason


# Report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def report(clock) -> sk.Report:
    clock({"sp24": 0.5, "csr": 1.5, "bitmap": 1.7})
    model = nn.ModuleDict({
        "encoder [bold]": nn.Sequential(*pruned(64, 32)),
        "a_rather_long_name_for_a_module_in_a_deep_model": nn.Sequential(
            *pruned(32, 64, pattern="row", sparsity=0.6)),
        "left": nn.Linear(64, 64),
    })  # fmt: skip

    def sample(m: nn.Module) -> None:
        for block in m.values():
            for _ in range(2):
                block(rand(4, block.in_features if isinstance(block, nn.Linear) else block[0].in_features))

    return sk.convert_(model, sample=sample, progress=False)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 220])
def test_the_table_fits_its_width(report: sk.Report, width: int) -> None:
    text = report.text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    assert "[bold].0" in text  # a name is no markup
    assert "2.00x" in text
    assert "1 converted, 2 dense" in text
    coloured = report.text(width, colour=True)
    assert "\x1b[" in coloured


def test_the_table_says_what_was_done(report: sk.Report) -> None:
    text = str(report)
    for part in (
        "sp24",
        "2:4",
        "unstructured",
        "dense is faster: best candidate csr at 0.67x",
        "dense weight: nothing to gain",
    ):
        assert part in text
    totals = report.totals()
    assert totals["layers"] == {"converted": 1, "dense": 2, "skipped": 0, "sparse": 0}
    assert totals["dense_ms"] == pytest.approx(4.0)
    assert totals["now_ms"] == pytest.approx(3.0)  # the layer that stays dense counts as it is
    sparse = report.model["encoder [bold]"][0]
    assert report["encoder [bold].0"].bytes_after == sparse.nbytes
    assert totals["bytes_after"] == totals["bytes_before"] - 64 * 32 * 4 + sparse.nbytes


def test_json_holds_everything(report: sk.Report, tmp_path) -> None:
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text().strip() == text
    data = json.loads(text)
    row = data["rows"][0]
    assert row["layer"] == "encoder [bold].0"
    assert row["speedup"] == pytest.approx(2.0)
    assert row["calls"] == [{"shape": [4, 64], "tokens": 4, "count": 2, "dense_ms": 1.0, "sparse_ms": 0.5}]
    assert data["settings"]["policy"] == "measured"
    assert "torch" in data["settings"]["environment"]
    assert data["rows"][2]["speedup"] is None


def test_plot_draws_a_picture(report: sk.Report, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = report.plot(tmp_path / "report.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    untimed = sk.convert_(pruned(64, 32), policy="always")
    assert untimed.plot(tmp_path / "untimed.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="no layer"):
        sk.convert_(nn.Sequential(nn.ReLU())).plot(tmp_path / "empty.png")


def test_plot_without_matplotlib_names_the_extra(report: sk.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sparsekern\[plot\]"):
        report.plot("never.png")


def test_an_empty_model_gives_an_empty_report() -> None:
    report = sk.convert_(nn.Sequential(nn.ReLU(), nn.Embedding(3, 3)))
    assert len(report) == 0
    assert "0 layers: none." in str(report)
    assert "1 Embedding" in str(report)
    with pytest.raises(KeyError, match="no layer 'x'"):
        report["x"]


def test_progress_is_shown_on_stderr_only(clock, capsys: pytest.CaptureFixture[str]) -> None:
    clock({"sp24": 0.5})
    sk.convert_(pruned(64, 32), sample=rand(4, 64), progress=True)
    assert capsys.readouterr().out == ""


def test_a_busy_machine_is_noted_and_not_remembered(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock({"sp24": 0.5})
    monkeypatch.setattr(tune, "foreign_load", lambda: 3.0)
    report = sk.convert_(pruned(64, 32), sample=rand(4, 64), progress=False)
    assert any("busy machine" in note for note in report.notes)
    assert not tune.path().exists()
    assert convert.POLICIES[0] == "measured"


# Layers with a threshold of tokens --------------------------------------------------------------------------


def by_tokens(limit: int) -> Callable[[str, int], float]:
    """csr takes half of dense's 1 ms up to `limit` tokens and twice as long above; other formats never win."""
    return lambda format, m: 1e-3 * ((0.5 if m <= limit else 2.0) if format == "csr" else 3.0)


SEVERAL = [rand(m, 64) for m in (1, 1, 1, 8, 32, 128)]


def test_thresholds_serve_decode_and_prefill(clock: Callable[..., Clock]) -> None:
    clock(by_tokens(8))
    model = pruned(64, 32, pattern="unstructured", sparsity=0.9)
    dense = copy.deepcopy(model)
    plain = sk.convert_(copy.deepcopy(model), sample=SEVERAL, progress=False)
    assert plain["0"].status == "dense"  # 4 x 0.5 + 2 x 2 against 6 x 1
    keys = {k: v.shape for k, v in sk.convert_(copy.deepcopy(model), "csr", "always").model.state_dict().items()}
    report = sk.convert_(model, sample=SEVERAL, thresholds=True, progress=False)
    row = report["0"]
    assert (row.status, row.format, row.dense_above, model[0].dense_above) == ("converted", "csr", 8, 8)
    assert (row.dense_ms, row.sparse_ms, row.worst_speedup) == (6.0, 4.0, 1.0)
    assert row.bytes_after == model[0].nbytes + row.bytes_before
    assert "dense above 8 tokens" in str(report)
    assert json.loads(report.to_json())["rows"][0]["dense_above"] == 8
    assert {k: v.shape for k, v in model.state_dict().items()} == keys
    with torch.no_grad():
        for x in SEVERAL:
            torch.testing.assert_close(model(x), dense(x))
    assert torch.equal(sk.to_dense_(model)[0].weight, dense[0].weight)


def test_thresholds_where_one_side_always_wins(clock: Callable[..., Clock]) -> None:
    clock(by_tokens(1 << 20))
    model = pruned(64, 32, pattern="unstructured", sparsity=0.9)
    row = sk.convert_(model, sample=SEVERAL, thresholds=True, progress=False)["0"]
    assert (row.status, row.dense_above, model[0].dense_above) == ("converted", None, None)
    assert row.bytes_after == model[0].nbytes
    clock(by_tokens(0))
    tune.forget()
    model = pruned(64, 32, pattern="unstructured", sparsity=0.9)
    row = sk.convert_(model, sample=SEVERAL, thresholds=True, progress=False, cache=False)["0"]
    assert (row.status, row.dense_above) == ("dense", None)


def test_a_threshold_must_stand_above_the_noise(clock: Callable[..., Clock]) -> None:
    """Dense a tenth faster at many tokens is no reason to keep it, where times scatter by that much."""
    clock(lambda format, m: 1e-3 * ((0.5 if m <= 8 else 1.1) if format == "csr" else 3.0), spread=0.1)
    model = pruned(64, 32, pattern="unstructured", sparsity=0.9)
    assert sk.convert_(model, sample=SEVERAL, thresholds=True, progress=False)["0"].dense_above is None


def test_thresholds_come_from_the_cache_too(clock: Callable[..., Clock]) -> None:
    made = clock(by_tokens(8))
    for _ in range(2):
        model = pruned(64, 32, pattern="unstructured", sparsity=0.9)
        row = sk.convert_(model, sample=SEVERAL, thresholds=True, decide="worst", progress=False)["0"]
        assert (row.status, row.dense_above) == ("converted", 8)
    assert made.calls == 4  # once for every number of tokens


def test_tied_layers_share_the_threshold(clock: Callable[..., Clock]) -> None:
    clock(by_tokens(8))
    model = pruned(64, 64, 64, pattern="unstructured", sparsity=0.9)
    model[1].weight = model[0].weight
    sk.convert_(model, sample=SEVERAL, thresholds=True, progress=False)
    assert [layer.dense_above for layer in model] == [8, 8]


def test_thresholds_need_times() -> None:
    with pytest.raises(ValueError, match="thresholds=True needs policy='measured'"):
        sk.convert_(pruned(8, 8), policy="always", thresholds=True)


def test_every_backend_that_may_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the vendor's: each is a trial of its own, the report names the winner, calls follow it, and so does a
    conversion from the cache."""
    model = pruned(64, 32)
    known = formats_module.FORMATS["csr"]
    monkeypatch.setitem(formats_module.FORMATS, "csr", replace(known, backends={"cpu": ("host", "vendor")}))
    dispatch._modules.cache_clear()
    monkeypatch.setattr(csr_vendor, "why_not", lambda op, layout, x: None)
    slow = {"host": 1.0, "vendor": 1.0}
    ran: list[str] = []

    def timed(dense: Any, variants: dict, *, m: int, seconds: float, device: torch.device) -> dict[str, tune.Record]:
        records = {}
        for name, call in variants.items():
            backend = name.partition(" ")[2]
            ran.append(backend)
            call()
            records[name] = tune.Record(m, 4.0, slow.get(backend, 9.0), 0.0)
        return records

    monkeypatch.setattr(tune, "measure", timed)
    monkeypatch.setattr(tune, "foreign_load", lambda: 0.0)
    monkeypatch.setattr(decide, "backend_of", lambda module, x: ("host" if module.format == "csr" else "ref", ""))
    try:
        for winner, loser in (("vendor", "host"), ("host", "vendor")):
            tune.clear()
            slow.update({winner: 1.0, loser: 2.0})
            for cached in (False, True):
                ran.clear()
                twin = copy.deepcopy(model)
                report = sk.convert_(twin, format="csr", sample=torch.randn(8, 64), progress=False)
                row = next(iter(report))
                assert (row.status, row.backend) == ("converted", winner)
                assert sorted(set(ran)) == ([] if cached else ["host", "vendor"])
                layer = next(m for m in twin.modules() if isinstance(m, SparseLinear))
                assert layer.backend is None
                chosen = dispatch.choose("mm", layer.packed, torch.randn(8, 64))
                assert chosen.__name__.endswith(winner)
        with tune.disabled():  # nothing would be looked up, so only the first is timed
            ran.clear()
            sk.convert_(copy.deepcopy(model), format="csr", sample=torch.randn(8, 64), progress=False)
            assert set(ran) <= {"host", ""}
    finally:
        dispatch._modules.cache_clear()


def test_backends_measure_their_ways_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: configurations of a kernel, roads of a convolution; not on a CPU, nor where nothing is remembered."""
    asked: list[tuple[Any, ...]] = []

    def ways(*given: Any) -> None:
        asked.append(given[:-1])
        assert given[-1](lambda: None) > 0

    from sparsekern.conv import host as conv_host
    from sparsekern.csr import host

    monkeypatch.setattr(host, "tune_forward", ways, raising=False)
    monkeypatch.setattr(conv_host, "tune_forward", ways, raising=False)
    if dispatch.why_not("host", "mm", sk.to_csr(rand(4, 4)).packed, rand(1, 4)) is not None:
        pytest.skip("needs the compiled module")
    linear = SparseLinear.from_dense(nn.Linear(8, 8), format="csr")
    conv = sk.SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), format="csr")
    for module, x in ((linear, rand(2, 3, 8)), (conv, rand(1, 4, 5, 5))):
        trial = decide.Trial(None, None, ("host",))  # type: ignore[arg-type]
        trial.module = module
        for device, times in (("cpu", 0), ("meta", 1)):  # any that is no CPU
            call = decide.Seen(tuple(x.shape), x.dtype, x.stride(), torch.device(device), x=x)
            decide.tune_kernels(trial, call)
            with tune.disabled():
                decide.tune_kernels(trial, call)
            assert len(asked) == times
        (given,) = asked
        assert given[0].format == "csr"
        assert given[1].shape == ((6, 8) if module is linear else x.shape)
        assert len(given) == (2 if module is linear else 3)
        asked.clear()
