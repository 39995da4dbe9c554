"""Ways of pruning a trained language model, their accuracy and their measured speed: python -m bench.prune_antiberty.

The 48 encoder linears of AntiBERTy (see bench.antiberty) are pruned in one shot, by every method with several
calibration seeds; the orderings that the literature reports are stated as checks, by a paired bootstrap over the masked
residues. Every pruned model is converted and timed: accuracy against measured speed. Then the formats that one-shot
pruning breaks (blocks at 50 %, CSR at 80 %) are brought back towards the dense model by distillation.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import sparsekern as sk
from bench import report as r
from bench.antiberty import CHAINS, CLS, MASK, RESIDUES, SEP, guesses, is_encoder, load, sample
from bench.bert import BertMLM
from bench.wheels import ANTIBERTY
from sparsekern import prune
from sparsekern.prune import NM, Block, Unstructured
from sparsekern.testing import measure

# Variable domains of other antibodies, for calibration and for the seeds of fine-tuning; typed like bench.antiberty's.
CALIBRATION = {
    "bevacizumab VH": (
        "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYC"
        "AKYPHYYGSSHWYFDVWGQGTLVTVSS"
    ),
    "bevacizumab VL": (
        "DIQMTQSPSSLSASVGDRVTITCSASQDISNYLNWYQQKPGKAPKVLIYFTSSLHSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQYSTVPWTFGQGTKVEIK"
    ),
    "cetuximab VH": (
        "QVQLKQSGPGLVQPSQSLSITCTVSGFSLTNYGVHWVRQSPGKGLEWLGVIWSGGNTDYNTPFTSRLSINKDNSKSQVFFKMNSLQSNDTAIYYCA"
        "RALTYYDYEFAYWGQGTLVTVSA"
    ),
    "cetuximab VL": (
        "DILLTQSPVILSVSPGERVSFSCRASQSIGTNIHWYQQRTNGSPRLLIKYASESISGIPSRFSGSGSGTDFTLSINSVESEDIADYYCQQNNNWPTTFGAGTKLELK"
    ),
    "pembrolizumab VH": (
        "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYC"
        "ARRDYRFDMGFDYWGQGTTVTVSS"
    ),
}
MASKINGS, SHARE = 6, 0.15  # of each calibration chain, of its residues

Data = list[Tensor]
Prune = Callable[[BertMLM, Data], Any]


@dataclass(frozen=True)
class Method:
    """One way of pruning the encoder: `calibrated` ones are run with every seed, unless they are slow, others once."""

    name: str
    prune: Prune
    calibrated: bool = False
    slow: bool = False
    formats: str = ""  # what can store the result, for the reader


def _magnitude(pattern: Any, sparsity: float | None = None) -> Prune:
    return lambda model, data: prune.magnitude_(model, pattern, sparsity, filter_fn=is_encoder)


def _scored(criterion: str, pattern: Any, sparsity: float | None = None) -> Prune:
    def run(model: BertMLM, data: Data) -> None:
        scores = prune.scores(model, criterion, data=data, filter_fn=is_encoder)
        for name, score in scores.items():
            prune.set_mask(model.get_submodule(name), pattern.mask(score, sparsity))

    return run


def _sparsegpt(pattern: Any, sparsity: float | None = None, **options: Any) -> Prune:
    return lambda model, data: prune.sparsegpt_(model, data, pattern, sparsity, filter_fn=is_encoder, **options)


def _reconstructed(model: BertMLM, data: Data) -> None:
    prune.reconstruct_(model, list(model.layers), data, NM())


UPDATE, MASK_ONLY = "2:4 SparseGPT", "2:4 SparseGPT, mask only"

METHODS = (
    Method("2:4 random", _scored("random", NM()), formats="sp24"),
    Method("2:4 magnitude", _magnitude(NM()), formats="sp24"),
    Method("2:4 Wanda", _scored("wanda", NM()), True, formats="sp24"),
    Method("2:4 RIA", _scored("ria", NM()), True, True, "sp24"),
    Method(UPDATE, _sparsegpt(NM()), True, formats="sp24"),
    Method("2:4 SparseGPT, damp 0.01", _sparsegpt(NM(), damp=0.01), True, True, "sp24"),
    Method("2:4 SparseGPT, int8 in the sweep", _sparsegpt(NM(), quantise="int8"), True, True, "sp24"),
    Method("2:4 Wanda++", _reconstructed, True, True, "sp24"),
    Method("4:8 magnitude", _magnitude(NM(4, 8)), formats="csr, bitmap"),
    Method("4:8 SparseGPT", _sparsegpt(NM(4, 8)), True, True, "csr, bitmap"),
    Method("50 % magnitude", _magnitude("unstructured", 0.5), formats="csr, bitmap"),
    Method("50 % SparseGPT", _sparsegpt(Unstructured(), 0.5), True, True, "csr, bitmap"),
    Method("80 % magnitude", _magnitude("unstructured", 0.8), formats="csr"),
    Method("80 % SparseGPT", _sparsegpt(Unstructured(), 0.8), True, True, "csr"),
    Method("16x16 blocks 50 % magnitude", _magnitude(Block(16), 0.5), formats="bsr"),
    Method("16x16 blocks 50 % SparseGPT", _sparsegpt(Block(16), 0.5), True, True, "bsr"),
    Method("2:4 SparseGPT, sequential", _sparsegpt(NM(), hessians="sequential"), True, True, "sp24"),
)
RECOVERED = ("16x16 blocks 50 % SparseGPT", "80 % SparseGPT")


@dataclass(frozen=True)
class Effort:
    seeds: tuple[int, ...] = (0, 1, 2)
    slow: bool = True
    tokens: tuple[int, ...] = (1, 128)
    seconds: float = 4.0  # a row of timings
    minutes: float = 15.0  # of fine-tuning, each
    skip: tuple[str, ...] = ()  # methods whose names hold one of these


FULL = Effort()
QUICK = Effort(seeds=(0,), slow=False, tokens=(128,), seconds=1.0, minutes=0.5)


@dataclass
class Row:
    """One pruned model."""

    method: str
    seed: int | None
    losses: Tensor
    top1: float
    sparsity: float
    seconds: float
    formats: str = ""
    times: dict[int, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.mean()))


@dataclass(frozen=True)
class Difference:
    """Mean loss of one model less that of another over the same residues, nats, with a 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(a: Tensor, b: Tensor, draws: int = 5000) -> Difference:
    """Paired: residues are drawn with replacement, the same for both."""
    difference = (a - b).double()
    drawn = torch.randint(len(difference), (draws, len(difference)), generator=torch.Generator().manual_seed(0))
    means = difference[drawn].mean(1).sort().values
    return Difference(float(difference.mean()), float(means[int(0.025 * draws)]), float(means[int(0.975 * draws)]))


def calibration(vocabulary: dict[str, int], seed: int) -> Data:
    """Batches [MASKINGS, L + 2], a chain each, with a random share of the residues masked."""
    generator = torch.Generator().manual_seed(seed)
    return [hide(tokens(chain, vocabulary).expand(MASKINGS, -1), generator) for chain in CALIBRATION.values()]


def tokens(chain: str, vocabulary: dict[str, int]) -> Tensor:
    return torch.tensor([CLS, *(vocabulary[residue] for residue in chain), SEP])


def hide(whole: Tensor, generator: torch.Generator, share: float = SHARE) -> Tensor:
    """Tokens with a random share of the residues masked."""
    chosen = torch.rand(whole.shape, generator=generator) < share
    return torch.where(chosen & (whole >= RESIDUES), MASK, whole)


class Bench:
    def __init__(self, effort: Effort, console: Console) -> None:
        self.effort, self.console = effort, console
        self.dense, self.vocabulary = load()
        losses, right = guesses(self.dense, self.vocabulary, CHAINS, lambda: None)
        self.rows = [Row("dense", None, losses, float(right.double().mean()), 0.0, 0.0)]
        self.models: dict[str, BertMLM] = {}  # of the first seed

    def all(self) -> None:
        for method in METHODS:
            if (method.slow and not self.effort.slow) or any(text in method.name for text in self.effort.skip):
                continue
            for seed in self.effort.seeds if method.calibrated and not method.slow else self.effort.seeds[:1]:
                self._one(method, seed)

    def _one(self, method: Method, seed: int) -> None:
        model, started = copy.deepcopy(self.dense), time.perf_counter()
        method.prune(model, calibration(self.vocabulary, seed))
        row = self._scored(method.name, seed if method.calibrated else None, model, time.perf_counter() - started)
        row.formats = method.formats
        if seed == self.effort.seeds[0]:
            self.models[method.name] = model
        if method.name == UPDATE:
            self._scored(MASK_ONLY, seed, self._without_update(model), row.seconds).formats = method.formats

    def _without_update(self, model: BertMLM) -> BertMLM:
        """The dense weights under the masks of a pruned model."""
        twin = copy.deepcopy(self.dense)
        for name, module in model.named_modules():
            mask = prune.mask_of(module)
            if mask is not None:
                prune.set_mask(twin.get_submodule(name), mask.mask)
        return twin

    def _scored(self, name: str, seed: int | None, model: BertMLM, seconds: float) -> Row:
        losses, right = guesses(model, self.vocabulary, CHAINS, lambda: None)
        weights = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_encoder(m, n)]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        row = Row(name, seed, losses, float(right.double().mean()), zeros, seconds)
        self.rows.append(row)
        shown = "" if seed is None else f", seed {seed}"
        self.console.print(
            f"{name}{shown}: perplexity {row.perplexity:.4f}, {row.top1:.1%} right, {seconds:.0f} s", highlight=False
        )
        return row

    def of(self, method: str) -> list[Row]:
        return [row for row in self.rows if row.method == method]

    def time(self) -> None:
        """Converts the first seed's models, checks them against the pruned ones, times them against dense."""
        first = {row.method: row for row in reversed(self.rows)}
        for name, model in self.models.items():
            for count in self.effort.tokens:
                first[name].times[count] = self._timed(name, model, count)
            self.console.print(f"timed {name}", highlight=False)

    @torch.no_grad()
    def _timed(self, name: str, model: BertMLM, count: int) -> dict[str, Any]:
        batch = sample(self.vocabulary, count)
        masked = prune.finalize_(copy.deepcopy(model))
        sparse = copy.deepcopy(masked)
        report = sk.convert_(sparse, policy="measured", sample=batch, filter_fn=is_encoder, progress=False)
        error = r.require_close(f"{name}, {count} tokens", sparse(batch), masked(batch), 1e-4)
        calls = {"dense": lambda: self.dense(batch), "sparse": lambda: sparse(batch)}
        times = measure(calls, repeats=100, seconds=self.effort.seconds)
        formats = sorted({layer.format for layer in report.converted})
        return {
            "dense": r.timing_json(times["dense"]),
            "sparse": r.timing_json(times["sparse"]),
            "speedup": times["dense"].median / times["sparse"].median,
            "beyond_noise": times["sparse"].p80 < times["dense"].p20,
            "layers": len(report.converted),
            "formats": formats,
            "error": error,
        }

    def recover(self) -> list[dict[str, Any]]:
        """Fine-tuning under the mask, by distillation from the dense model, for so many minutes each."""
        found = []
        for name in RECOVERED:
            model = self.models.get(name) or self._pruned(name)
            found.append({"method": name, "curve": self._recovered(name, copy.deepcopy(model))})
        return found

    def _pruned(self, name: str) -> BertMLM:
        method = next(m for m in METHODS if m.name == name)
        self._one(method, self.effort.seeds[0])
        return self.models[name]

    def _recovered(self, name: str, model: BertMLM) -> list[dict[str, float]]:
        """[{seconds, steps, perplexity, top1}], the first before any step. Evaluation counts as no time."""
        curve: list[dict[str, float]] = []
        budget, spent, steps = self.effort.minutes * 60, 0.0, 0
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        chains = Sampler(self.dense, self.vocabulary)

        def note() -> None:
            row = self._scored(f"{name}, distilled {spent:.0f} s", None, model, spent)
            self.rows.remove(row)
            curve.append({"seconds": spent, "steps": steps, "perplexity": row.perplexity, "top1": row.top1})

        note()
        while spent < budget:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (steps + ROUND / 2) / WARMUP) * max(0.05, 1 - spent / budget)
            started = time.perf_counter()
            batches = [chains.batch() for _ in range(ROUND)]
            prune.distil_(
                model,
                self.dense,
                batches,
                steps=ROUND,
                optimizer=optimizer,
                temperature=1.0,
                features=[f"layers.{i}" for i in range(len(model.layers))],
                forward=_bf16,
                progress=False,
            )
            spent, steps = spent + time.perf_counter() - started, steps + ROUND
            if len(curve) * budget / 8 <= spent or spent >= budget:
                note()
        self.models[f"{name}, distilled"] = model
        row = self._scored(f"{name}, distilled", None, model, spent)
        row.formats = next(m.formats for m in METHODS if m.name == name)
        return curve


RATE, WARMUP, ROUND, BATCH = 2e-4, 20, 5, 16


def _bf16(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch)


class Sampler:
    """Antibody-like chains without a data set: calibration chains, much of them resampled from the dense model."""

    def __init__(self, model: BertMLM, vocabulary: dict[str, int], seed: int = 0) -> None:
        self.model, self.generator = model, torch.Generator().manual_seed(seed)
        self.pool = [tokens(chain, vocabulary) for chain in CALIBRATION.values()]

    @torch.no_grad()
    def batch(self) -> Tensor:
        """[BATCH, L + 2]: 40 % resampled residue by residue at once, then 15 % masked."""
        chosen = int(torch.randint(len(self.pool), (), generator=self.generator))
        start = hide(self.pool[chosen].expand(BATCH, -1), self.generator, 0.4)
        chances = _bf16(self.model, start)[..., RESIDUES:].float().softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=self.generator).reshape(start.shape) + RESIDUES
        return hide(torch.where(start == MASK, drawn, start), self.generator)


@dataclass(frozen=True)
class Check:
    """A claim about orderings, whether it holds here, and the figures."""

    claim: str
    holds: bool
    figures: str


def checks(bench: Bench) -> list[Check]:
    """The orderings: by the paired bootstrap, for every calibration seed."""
    dense, magnitude, random = bench.of("dense")[0], bench.of("2:4 magnitude")[0], bench.of("2:4 random")[0]
    updated, masks = bench.of(UPDATE), bench.of(MASK_ONLY)
    unstructured, wider = bench.of("50 % magnitude")[0], bench.of("4:8 magnitude")[0]

    def below(claim: str, pairs: list[tuple[Row, Row]], margin: float = 0.0) -> Check:
        """Every first one is below its second one by more than `margin` nats, its interval included."""
        found = [bootstrap(b.losses, a.losses) for a, b in pairs]
        figures = ", ".join(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found)
        return Check(claim, all(d.low > margin for d in found), f"{figures} nats")

    worst = max(row.perplexity for row in updated)
    lost = bootstrap(unstructured.losses, dense.losses)
    return [
        below("dense < 2:4 SparseGPT", [(dense, row) for row in updated]),
        Check("2:4 SparseGPT at most 1.70", worst <= 1.70, ", ".join(f"{row.perplexity:.3f}" for row in updated)),
        below("2:4 SparseGPT < 2:4 magnitude", [(row, magnitude) for row in updated]),
        below("2:4 magnitude << 2:4 random (by more than a nat)", [(magnitude, random)], 1.0),
        below("the update < mask only", list(zip(updated, masks, strict=True))),
        Check(
            "50 % unstructured about dense (within 0.05 nats)",
            abs(lost.mean) < 0.05,
            f"{lost.mean:+.3f} [{lost.low:+.3f}, {lost.high:+.3f}] nats, perplexity {unstructured.perplexity:.3f}",
        ),
        below("4:8 magnitude < 2:4 magnitude", [(wider, magnitude)]),
    ]


def show(bench: Bench, found: list[Check], console: Console) -> None:
    body = []
    for name in dict.fromkeys(row.method for row in bench.rows):
        rows = bench.of(name)
        values = sorted(row.perplexity for row in rows)
        span = f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f}-{values[-1]:.3f}"
        lost = "" if name == "dense" else _interval(bootstrap(rows[0].losses, bench.rows[0].losses))
        times = []
        for count in bench.effort.tokens:
            t = rows[0].times.get(count)
            times += [f"{t['speedup']:.2f}x {'' if t['beyond_noise'] else '(noise) '}{t['layers']}" if t else ""]
        body.append(
            (name, str(len(rows)), f"{rows[0].sparsity:.0%}", span, f"{rows[0].top1:.1%}", lost,
             f"{rows[0].seconds:.0f}", *times)
        )  # fmt: skip
    headings = ("method", "seeds", "zeros", "perplexity", "right", "nats over dense", "s")
    headings += tuple(f"speed, {count} tokens, layers" for count in bench.effort.tokens)
    caption = (
        f"{len(bench.rows[0].losses)} masked residues; nats: first seed, 95 % interval by paired bootstrap; speed: the "
        f"whole model, fp32, {torch.get_num_threads()} threads, converted layers of 48, against dense"
    )
    console.print(r.table("AntiBERTy, pruned", headings, body, caption))
    for check in found:
        console.print(f"{'holds' if check.holds else 'FAILS'}: {check.claim}: {check.figures}", highlight=False)


def _interval(d: Difference) -> str:
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def as_json(bench: Bench, found: list[Check], recovered: list[dict[str, Any]]) -> dict[str, Any]:
    dense = bench.rows[0]
    rows = [
        {
            "method": row.method,
            "seed": row.seed,
            "sparsity": row.sparsity,
            "perplexity": row.perplexity,
            "top1": row.top1,
            "nats_over_dense": vars(bootstrap(row.losses, dense.losses)),
            "seconds": row.seconds,
            "formats": row.formats,
            "times": row.times,
        }
        for row in bench.rows
    ]
    wheel = {"requirement": ANTIBERTY.requirement, "sha256": ANTIBERTY.sha256, "licence": ANTIBERTY.licence}
    return {
        "machine": r.machine(),
        "wheel": wheel,
        "residues": len(dense.losses),
        "minutes_of_recovery": bench.effort.minutes,
        "rows": rows,
        "checks": [vars(check) for check in found],
        "recovery": recovered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, the fast methods, half a minute of recovery")
    parser.add_argument("--minutes", type=float, help="fine-tuning of each recovered model (15; 0: none)")
    parser.add_argument("--skip", action="append", default=[], help="leave out methods whose names hold this text")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--output", type=Path, default=r.ROOT / "bench" / "results", help="folder for the JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    r.measure_afresh()
    console = r.console()
    effort = replace(QUICK if args.quick else FULL, skip=tuple(args.skip))
    if args.minutes is not None:
        effort = replace(effort, minutes=args.minutes)
    bench = Bench(effort, console)
    bench.all()
    found, path = checks(bench), args.output / "prune_antiberty.json"
    r.save(path, as_json(bench, found, []))  # an hour's work is not lost to an interrupt
    recovered = bench.recover() if effort.minutes else []
    bench.time()
    show(bench, found, console)
    r.save(path, as_json(bench, found, recovered))
    if not all(check.holds for check in found):
        raise SystemExit("an ordering does not hold")


if __name__ == "__main__":
    main()
