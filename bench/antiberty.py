"""A trained language model, pruned, converted, checked and measured: python -m bench.antiberty [--quick].

AntiBERTy (Ruffolo et al., arXiv 2112.07782; MIT) is a 26 M-parameter BERT masked language model of antibody
sequences. Its 48 encoder linears are pruned by magnitude, 2:4 and 50 % unstructured, without any fine-tuning,
and converted. The converted model must compute what the pruned one computes; a disagreement ends the run with
an error.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import sparsekern as sk
from bench import report as r
from bench.bert import BertMLM, Config, from_checkpoint
from bench.report import Study
from bench.wheels import ANTIBERTY
from sparsekern.testing import Timing, measure, relative_error

FOLDER = "antiberty/trained_models/"
CLS, SEP, MASK, RESIDUES = (
    2,
    3,
    4,
    5,
)  # places in the vocabulary; residues are the 20 after the special tokens
PASSES = 7  # each residue is masked once, every seventh in one pass

# Variable domains of three approved antibodies, typed from public knowledge of their INN sequences and not
# checked against a database: good for comparing models with each other, nothing else.
CHAINS = {
    "trastuzumab VH": (
        "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAED"
        "TAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
    ),
    "trastuzumab VL": (
        "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
    ),
    "adalimumab VH": (
        "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAED"
        "TAVYYCAKVSYLSTASSLDYWGQGTLVTVSS"
    ),
    "adalimumab VL": (
        "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK"
    ),
    "rituximab VH": (
        "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSED"
        "SAVYYCARSTYYGGDWYFNVWGAGTTVTVSA"
    ),
    "rituximab VL": (
        "QIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPTFGGGTKLEIK"
    ),
}


STUDIES = (
    Study("2:4", "2:4", None, ("sp24",)),
    Study("unstructured 50 %", "unstructured", 0.5, ("csr", "bitmap")),
)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    tokens: tuple[int, ...] = (1, 16, 128, 512)
    chains: tuple[str, ...] = tuple(CHAINS)
    seconds: float = 2.5  # a row of the latency table


FULL = Effort()
QUICK = Effort(tokens=(1, 128), chains=("trastuzumab VH", "adalimumab VL"), seconds=1.0)


class Score(NamedTuple):
    """exp(mean negative log-likelihood) of the masked residues, the share guessed right, their count."""

    perplexity: float
    top1: float
    residues: int


def load() -> tuple[BertMLM, dict[str, int]]:
    """The trained model and its vocabulary, from the wheel."""
    with ANTIBERTY.open() as wheel:
        config = Config.from_json(json.loads(wheel.read(f"{FOLDER}AntiBERTy_md_smooth/config.json")))
        words = wheel.read(f"{FOLDER}vocab.txt").decode().split()
        # Read whole: torch.load seeks, and every seek in a compressed file starts over.
        weights = io.BytesIO(wheel.read(f"{FOLDER}AntiBERTy_md_smooth/pytorch_model.bin"))
        state = torch.load(weights, map_location="cpu", weights_only=True)
    if words[:RESIDUES] != ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] or len(words) != config.vocab_size:
        raise SystemExit(f"{ANTIBERTY.filename}: unexpected vocabulary {words}")
    return from_checkpoint(config, state), {word: i for i, word in enumerate(words)}


def masked(sequence: str, vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Tokens [PASSES, L + 2] with every PASSES-th residue masked, and which those are."""
    tokens = torch.tensor([CLS, *(vocabulary[residue] for residue in sequence), SEP])
    place = torch.arange(len(tokens)) - 1
    inside = (place >= 0) & (place < len(sequence))
    hidden = (place % PASSES == torch.arange(PASSES)[:, None]) & inside
    return torch.where(hidden, MASK, tokens), hidden


class Guesses(NamedTuple):
    """What a model makes of every masked residue, in one order for all models: -log p of the truth, right or not."""

    losses: Tensor
    right: Tensor


@torch.no_grad()
def guesses(model: nn.Module, vocabulary: dict[str, int], chains: dict[str, str], step: Callable[[], Any]) -> Guesses:
    """Every residue of the chains, masked once and guessed."""
    losses, right = [], []
    for sequence in chains.values():
        tokens, hidden = masked(sequence, vocabulary)
        truth = torch.tensor([CLS, *(vocabulary[residue] for residue in sequence), SEP]).expand_as(tokens)[hidden]
        logits = model(tokens)[hidden].double()
        losses.append(nn.functional.cross_entropy(logits, truth, reduction="none"))
        right.append(logits.argmax(-1) == truth)
        step()
    return Guesses(torch.cat(losses), torch.cat(right))


def score(model: nn.Module, vocabulary: dict[str, int], chains: dict[str, str], step: Callable[[], Any]) -> Score:
    """How well the model guesses masked residues."""
    losses, right = guesses(model, vocabulary, chains, step)
    return Score(math.exp(float(losses.mean())), float(right.double().mean()), len(losses))


def is_encoder(module: nn.Module, name: str) -> bool:
    return name.startswith("layers.")


def pruned(model: BertMLM, study: Study) -> BertMLM:
    """A copy with the encoder's linears pruned and the zeros written into their weights."""
    twin = copy.deepcopy(model)
    sk.prune.magnitude_(twin, study.pattern, study.sparsity, filter_fn=is_encoder, keep_mask=False)
    return twin


def sample(vocabulary: dict[str, int], count: int) -> Tensor:
    """[B, S] tokens, B x S = count, S at most 128: a chain is 106 to 121 residues long."""
    length = min(count, 128)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(RESIDUES, len(vocabulary), (count // length, length), generator=generator)


class Bench:
    """One study, from the dense model to the tables."""

    def __init__(self, model: BertMLM, vocabulary: dict[str, int], study: Study, effort: Effort, console: Console):
        self.study, self.effort, self.console, self.vocabulary = study, effort, console, vocabulary
        self.original = model
        zeroed = pruned(model, study)
        self.dense = {name: copy.deepcopy(zeroed).to(dtype) for name, dtype in r.DTYPES.items()}
        self.always = {
            (name, fmt): self._convert(dense, format=fmt, policy="always", filter_fn=is_encoder)[0]
            for name, dense in self.dense.items()
            for fmt in study.formats
        }
        self.reports: list[dict[str, Any]] = []

    def _convert(self, dense: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
        twin = copy.deepcopy(dense)
        return twin, sk.convert_(twin, progress=False, **options)

    def measured(self, dtype: str, tokens: Tensor) -> tuple[nn.Module, Any]:
        model, report = self._convert(self.dense[dtype], policy="measured", sample=tokens)
        self.reports.append({"dtype": dtype, "tokens": tokens.numel(), "report": report.to_dict()})
        return model, report

    @torch.no_grad()
    def check(self, model: nn.Module, dtype: str, what: str, tokens: Tensor) -> float:
        """The relative error of the logits. fp32: 1e-4 at most; bf16: like dense bf16's, against fp32."""
        exact = self.dense["fp32"](tokens)
        if dtype == "fp32":
            return r.require_close(what, model(tokens), exact, 1e-4)
        own = relative_error(self.dense[dtype](tokens), exact)
        return r.require_close(what, model(tokens), exact, max(1.5 * own, 1e-2))

    def quality(self) -> list[dict[str, Any]]:
        """Perplexity and size of every variant; the converted ones must agree with the pruned one."""
        chains = {name: CHAINS[name] for name in self.effort.chains}
        variants: dict[str, nn.Module] = {
            "dense, as published": self.original,
            "pruned, stored dense": self.dense["fp32"],
        }
        variants |= {f"converted to {fmt}": self.always["fp32", fmt] for fmt in self.study.formats}
        variants |= {"pruned, stored dense, bf16": self.dense["bf16"]}
        variants |= {f"converted to {fmt}, bf16": self.always["bf16", fmt] for fmt in self.study.formats}
        rows = []
        with r.progress(self.console, "masked-residue perplexity", len(variants) * len(chains)) as step:
            for name, model in variants.items():
                found = score(model, self.vocabulary, chains, step)
                rows.append({"variant": name, **found._asdict(), "bytes": r.bytes_on_disk(model)})
        expected = rows[1]["perplexity"]
        for row in rows[2 : 2 + len(self.study.formats)]:
            if abs(row["perplexity"] / expected - 1) > 1e-3:
                raise r.Disagreement(f"{row['variant']}: perplexity {row['perplexity']:.5f}, pruned {expected:.5f}")
        return rows

    def latency(self) -> list[dict[str, Any]]:
        """Dense, always-sparse and measured conversion at every number of tokens, interleaved."""
        cases = [(count, dtype) for count in self.effort.tokens for dtype in r.DTYPES]
        with r.progress(self.console, "converting and timing", len(cases)) as step:
            return [self._case(count, dtype, step) for count, dtype in cases]

    def _case(self, count: int, dtype: str, step: Callable[[], Any]) -> dict[str, Any]:
        """One row: converted for this number of tokens, checked, timed."""
        tokens = sample(self.vocabulary, count)
        chosen, report = self.measured(dtype, tokens)
        models = {"dense": self.dense[dtype]}
        models |= {f"always {fmt}": self.always[dtype, fmt] for fmt in self.study.formats}
        models["measured"] = chosen
        errors = {
            name: self.check(model, dtype, f"{dtype} {name}, {count} tokens", tokens)
            for name, model in models.items()
            if name != "dense"
        }
        times = self._time(models, tokens)
        step()
        return {"tokens": count, "dtype": dtype, "times": times, "errors": errors, "report": report}

    @torch.no_grad()
    def _time(self, models: dict[str, nn.Module], tokens: Tensor) -> dict[str, Timing]:
        calls = {name: (lambda m=model: m(tokens)) for name, model in models.items()}
        return measure(calls, repeats=100, seconds=self.effort.seconds)


def show_quality(rows: list[dict[str, Any]], study: Study, console: Console) -> None:
    residues = rows[0]["residues"]
    console.print(
        r.table(
            f"{study.title}: quality and size",
            ("model", "perplexity", "right", "file"),
            [
                (
                    row["variant"],
                    f"{row['perplexity']:.4f}",
                    f"{row['top1']:.1%}",
                    f"{row['bytes'] / 1e6:.1f} MB",
                )
                for row in rows
            ],
            f"{residues} masked residues of public antibody sequences; file: the whole model as safetensors",
        )
    )


def show_latency(rows: list[dict[str, Any]], study: Study, console: Console) -> None:
    names = [f"always {fmt}" for fmt in study.formats] + ["measured"]
    body = []
    for row in rows:
        dense = row["times"]["dense"]
        cells = [str(row["tokens"]), row["dtype"], r.milliseconds(dense)]
        for name in names:
            own = row["times"][name]
            cells += [r.milliseconds(own), r.ratio(dense, own)]
        body.append((*cells, str(len(row["report"].converted))))
    headings = ["tokens", "type", "dense ms"]
    for name in names:
        headings += [f"{name} ms", "speed"]
    console.print(
        r.table(
            f"{study.title}: the whole model",
            (*headings, "sparse layers"),
            body,
            f"{torch.get_num_threads()} threads, medians of interleaved runs; colour: beyond the noise. "
            "'always' stores every encoder layer sparse, 'measured' keeps dense what is faster dense.",
        )
    )


def as_json(bench: Bench, quality: list[dict[str, Any]], latency: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {
            "tokens": row["tokens"],
            "dtype": row["dtype"],
            "times": {name: r.timing_json(t) for name, t in row["times"].items()},
            "errors": row["errors"],
            "sparse_layers": len(row["report"].converted),
        }
        for row in latency
    ]
    return {"study": asdict(bench.study), "quality": quality, "latency": rows, "reports": bench.reports}


def run(effort: Effort, console: Console, output: Path) -> None:
    """The whole case; raises SystemExit where a converted model computes something else."""
    if not ANTIBERTY.cached:
        console.print(f"downloading {ANTIBERTY.requirement} (97 MB, {ANTIBERTY.licence}) ...")
    model, vocabulary = load()
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"AntiBERTy: {parameters / 1e6:.1f} M parameters, {len(model.layers)} layers, MIT licence",
        highlight=False,
    )
    results = []
    for study in STUDIES:
        console.rule(f"AntiBERTy, {study.title}")
        bench = Bench(model, vocabulary, study, effort, console)
        quality = bench.quality()
        latency = bench.latency()
        typical = max(
            (row for row in latency if row["dtype"] == "fp32" and row["tokens"] <= 128),
            key=lambda row: row["tokens"],
        )
        console.print(f"What the conversion chose for {typical['tokens']} tokens, fp32:")
        r.show_report(console, typical["report"])
        show_quality(quality, study, console)
        show_latency(latency, study, console)
        results.append(as_json(bench, quality, latency))
    wheel = {"requirement": ANTIBERTY.requirement, "sha256": ANTIBERTY.sha256, "licence": ANTIBERTY.licence}
    r.save(output / "antiberty.json", {"machine": r.machine(), "wheel": wheel, "results": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two chains, two numbers of tokens, short timings")
    parser.add_argument("--output", type=Path, default=r.ROOT / "demo_output", help="folder for antiberty.json")
    args = parser.parse_args()
    r.measure_afresh()
    run(QUICK if args.quick else FULL, r.console(), args.output)


if __name__ == "__main__":
    main()
