"""The real-model benches on random weights and made-up data: no download, seconds instead of minutes."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bench import antiberty, mnist, report, wheels
from bench.bert import BertMLM, Config, from_checkpoint
from sparsekern.nn import SparseLinear
from sparsekern.nn.base import SparseModule
from sparsekern.testing import timing

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"])}
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "vocab_size": 25,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


@pytest.fixture
def console() -> Console:
    return Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names that transformers gives them."""
    h, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {"bert.embeddings.position_ids": torch.arange(160)[None]}

    def linear(name: str, out: int, inside: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = random(out, inside), random(out)

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * random(h), random(h)

    for name, count in (("word", v), ("position", 160), ("token_type", 2)):
        state[f"bert.embeddings.{name}_embeddings.weight"] = random(count, h)
    norm("bert.embeddings.LayerNorm")
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", h, h)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", f, h)
        linear(f"{layer}.output.dense", h, f)
        norm(f"{layer}.output.LayerNorm")
    linear("bert.pooler.dense", h, h)
    linear("cls.predictions.transform.dense", h, h)
    norm("cls.predictions.transform.LayerNorm")
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"] = random(v)
    for name, count in (("species", 6), ("chain", 2), ("graft", 2)):
        linear(f"cls.{name}", count, h)
    return state


def small() -> BertMLM:
    return from_checkpoint(Config.from_json(CONFIG), checkpoint())


# The language model -----------------------------------------------------------------------------------------


def test_bert_equals_torch_encoder_layers() -> None:
    """The same weights in nn.TransformerEncoderLayer, torch's own post-norm layer, give the same logits."""
    model, state = small(), checkpoint()
    tokens = torch.randint(0, 25, (2, 11), generator=torch.Generator().manual_seed(1))
    e = "bert.embeddings."
    x = state[f"{e}word_embeddings.weight"][tokens] + state[f"{e}position_embeddings.weight"][:11]
    x = x + state[f"{e}token_type_embeddings.weight"][0]
    x = nn.functional.layer_norm(x, (32,), state[f"{e}LayerNorm.weight"], state[f"{e}LayerNorm.bias"], 1e-12)
    for i in range(2):
        p = f"bert.encoder.layer.{i}."
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True, norm_first=False
        )
        theirs = {
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm1": "attention.output.LayerNorm",
            "norm2": "output.LayerNorm",
            "self_attn.out_proj": "attention.output.dense",
        }
        loaded = {f"{a}.{w}": state[f"{p}{b}.{w}"] for a, b in theirs.items() for w in ("weight", "bias")}
        for w in ("weight", "bias"):
            parts = [state[f"{p}attention.self.{name}.{w}"] for name in ("query", "key", "value")]
            loaded[f"self_attn.in_proj_{w}"] = torch.cat(parts)
        layer.load_state_dict(loaded)
        x = layer(x)  # in training mode, so that the fused path is not taken
    c = "cls.predictions."
    x = nn.functional.gelu(
        nn.functional.linear(x, state[f"{c}transform.dense.weight"], state[f"{c}transform.dense.bias"])
    )
    x = nn.functional.layer_norm(
        x, (32,), state[f"{c}transform.LayerNorm.weight"], state[f"{c}transform.LayerNorm.bias"], 1e-12
    )
    expected = nn.functional.linear(x, state[f"{c}decoder.weight"], state[f"{c}decoder.bias"])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bert.encoder.layer.1.output.dense.bias"), "layers.1.down.bias"),
        (
            lambda s: s.update({"bert.encoder.layer.2.output.dense.bias": torch.zeros(32)}),
            "layers.2.down.bias",
        ),
        (lambda s: s.update({"cls.predictions.decoder.weight": torch.zeros(25, 32)}), "not tied"),
    ],
    ids=["missing", "unknown", "untied"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: object, message: str) -> None:
    state = checkpoint()
    change(state)  # type: ignore[operator]
    with pytest.raises((RuntimeError, ValueError), match=message):
        from_checkpoint(Config.from_json(CONFIG), state)


def test_a_config_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_act must be 'gelu', got 'relu'"):
        Config.from_json({**CONFIG, "hidden_act": "relu"})
    with pytest.raises(ValueError, match="vocab_size missing"):
        Config.from_json({k: v for k, v in CONFIG.items() if k != "vocab_size"})


@pytest.mark.parametrize("length", [1, 6, 7, 8, 50])
def test_every_residue_is_masked_exactly_once(length: int) -> None:
    sequence = ("ACDEFGHIKLMNPQRSTVWY" * 3)[:length]
    tokens, hidden = antiberty.masked(sequence, VOCABULARY)
    assert tokens.shape == hidden.shape == (antiberty.PASSES, length + 2)
    assert hidden.sum(0).tolist() == [0, *[1] * length, 0]
    assert bool((tokens[hidden] == antiberty.MASK).all())
    unmasked = [VOCABULARY["[CLS]"], *(VOCABULARY[a] for a in sequence), VOCABULARY["[SEP]"]]
    for row, gone in zip(tokens, hidden, strict=True):
        assert row[~gone].tolist() == torch.tensor(unmasked)[~gone].tolist()


class Oracle(nn.Module):
    """Knows the sequence and puts all but `doubt` of the probability on the right token."""

    def __init__(self, sequence: str, doubt: float) -> None:
        super().__init__()
        truth = torch.tensor([2, *(VOCABULARY[a] for a in sequence), 3])
        p = torch.full((len(truth), 25), doubt / 24)
        p[torch.arange(len(truth)), truth] = 1 - doubt
        self.log = p.log()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.log.expand(len(tokens), -1, -1)


def test_perplexity_of_a_known_distribution() -> None:
    sequence = "QVQLVQSGVEVKKPGASV"
    found = antiberty.score(Oracle(sequence, 0.2), VOCABULARY, {"chain": sequence}, lambda: None)
    assert found.perplexity == pytest.approx(1 / 0.8, rel=1e-5)
    assert found.top1 == 1.0
    assert found.residues == len(sequence)


def test_the_chains_are_residues() -> None:
    for sequence in antiberty.CHAINS.values():
        assert set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY")
        assert 100 < len(sequence) < 126


EFFORT = antiberty.Effort(tokens=(1, 16), chains=("trastuzumab VL",), seconds=0.01)


@pytest.mark.parametrize("study", antiberty.STUDIES, ids=lambda s: s.title)
def test_the_language_model_study(study: antiberty.Study, console: Console) -> None:
    bench = antiberty.Bench(small(), VOCABULARY, study, EFFORT, console)
    for (_, fmt), model in bench.always.items():
        sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
        assert len(sparse) == 12
        assert {m.format for m in sparse} == {fmt}
    quality, latency = bench.quality(), bench.latency()
    by_name = {row["variant"]: row for row in quality}
    expected = by_name["pruned, stored dense"]
    assert expected["perplexity"] != by_name["dense, as published"]["perplexity"]
    for fmt in study.formats:
        row = by_name[f"converted to {fmt}"]
        assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert [(row["tokens"], row["dtype"]) for row in latency] == [
        (1, "fp32"),
        (1, "bf16"),
        (16, "fp32"),
        (16, "bf16"),
    ]
    antiberty.show_quality(quality, study, console)
    antiberty.show_latency(latency, study, console)
    text = console.export_text()
    assert f"{study.title}: the whole model" in text
    content = antiberty.as_json(bench, quality, latency)
    assert json.loads(json.dumps(content, allow_nan=False))["study"]["title"] == study.title


def spoil(model: nn.Module) -> None:
    module = [m for m in model.modules() if isinstance(m, SparseModule)][-1]
    module.values.data.view(-1)[:64] += 3


def test_a_wrong_conversion_ends_the_run(console: Console) -> None:
    bench = antiberty.Bench(small(), VOCABULARY, antiberty.STUDIES[0], EFFORT, console)
    spoil(bench.always["fp32", "sp24"])
    with pytest.raises(SystemExit, match="converted to sp24: perplexity"):
        bench.quality()
    with pytest.raises(SystemExit, match="always sp24, 1 tokens: relative error"):
        bench.latency()


# The digits -------------------------------------------------------------------------------------------------


def fake_digits(each: int = 130) -> np.ndarray:
    """Stripes whose direction and period tell the digit, with noise."""
    rng = np.random.default_rng(0)
    rows = []
    for digit in range(10):
        images = 40 * rng.random((each, 28, 28))
        stripes = np.arange(28) % (2 + digit % 5) == 0
        images[:, stripes if digit < 5 else slice(None), slice(None) if digit < 5 else stripes] = 255
        rows.append(np.concatenate([images.reshape(each, -1), np.full((each, 1), digit)], axis=1))
    return np.concatenate(rows).astype(np.float32)


def test_the_split_holds_out_a_hundred_of_each_digit() -> None:
    digits = mnist.split(fake_digits())
    assert torch.bincount(digits.test_labels).tolist() == [100] * 10
    assert len(digits.train) == 300
    assert digits.train.max() <= 1.0
    with pytest.raises(SystemExit, match="784 pixels and a label"):
        mnist.split(np.zeros((3, 784), np.float32))


@pytest.mark.parametrize("study", mnist.STUDIES, ids=lambda s: s.title)
def test_the_digit_study(study: mnist.Study, console: Console) -> None:
    torch.manual_seed(0)
    digits = mnist.split(fake_digits(each=180))
    effort = mnist.Effort(epochs=2, tuning_epochs=1, images=(1, 3), seconds=0.01)
    trained = mnist.fit(mnist.network(width=8), digits, effort.epochs, 3e-3, lambda: None)
    bench = mnist.Bench(trained, digits, study, effort, console)
    convs = [m for m in bench.dense.modules() if isinstance(m, nn.Conv2d)]
    assert float((convs[0].weight == 0).float().mean()) < 0.1
    wanted = study.sparsity or 0.5
    for conv in convs[1:]:  # the mask held through the fine-tuning
        assert float((conv.weight == 0).float().mean()) == pytest.approx(wanted, abs=0.01)
    for fmt, model in bench.always.items():
        assert [m.format for m in model.modules() if isinstance(m, SparseModule)] == [fmt] * 3
    quality, latency = bench.quality(), bench.latency()
    by_name = {row["variant"]: row for row in quality}
    tuned = by_name["pruned, tuned, stored dense"]["accuracy"]
    assert by_name["dense, trained"]["accuracy"] > 0.5
    assert tuned > 0.5
    assert tuned >= by_name["pruned, not tuned"]["accuracy"] - 0.05
    mnist.show(latency, quality, study, console)
    assert f"{study.title}: the whole network" in console.export_text()
    json.dumps(mnist.as_json(bench, quality, latency), allow_nan=False)
    spoil(next(iter(bench.always.values())))
    with pytest.raises(SystemExit, match="relative error"):
        bench.quality()


# Shared pieces ----------------------------------------------------------------------------------------------


def test_a_wheel_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "CACHE", tmp_path)
    path = tmp_path / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("made/data.txt", "payload")
    right = wheels.Wheel("made==1.0", path.name, wheels.digest(path), "MIT")
    with right.open() as wheel:
        assert wheel.read("made/data.txt") == b"payload"
    with pytest.raises(SystemExit, match=r"is not the made==1\.0 that was expected"):
        wheels.Wheel("made==1.0", path.name, "0" * 64, "MIT").open()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "CACHE", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit, match=r"No matching distribution(.|\n)*put it into"):
        wheels.ANTIBERTY.open()


def test_a_ratio_is_coloured_beyond_the_noise_only() -> None:
    fast, slow = timing([1.0, 1.01, 1.02]), timing([2.0, 2.01, 2.02])
    noisy = timing([0.5, 1.0, 4.0])
    assert report.ratio(slow, fast) == "[green]1.99x[/green]"
    assert report.ratio(fast, slow) == "[red]0.50x[/red]"
    assert report.ratio(fast, noisy) == "[default]1.01x[/default]"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0001234, "0.123"), (0.001234, "1.23"), (0.01234, "12.3"), (0.1234, "123")]
)
def test_milliseconds_have_three_digits(seconds: float, text: str) -> None:
    assert report.milliseconds(timing([seconds])) == text


def test_the_machine_is_described() -> None:
    found = report.machine()
    assert found["threads"] == torch.get_num_threads()
    assert all(value for value in found.values())


@pytest.mark.parametrize("script", ["setup", "demo", "test", "lint"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=True)


@pytest.mark.parametrize("script", ["setup", "lint"])
def test_an_unknown_option_is_explained(script: str) -> None:
    done = subprocess.run([str(ROOT / "scripts" / script), "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert script == "lint" or "--test" in done.stdout
