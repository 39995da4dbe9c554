"""What the real-model benches share: the machine's description, tables, JSON, sizes, checks."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sparsekern import _ext, tune
from sparsekern.nn.report import Report
from sparsekern.testing import Timing, relative_error

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def console() -> Console:
    """A terminal's own width; in a file or a pipe wide enough for every table."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


def measure_afresh() -> None:
    """Later conversions use no measurement of an earlier run; SPARSEKERN_CACHE, where set, is respected."""
    if "SPARSEKERN_CACHE" not in os.environ:
        os.environ["SPARSEKERN_CACHE"] = str(ROOT / ".cache" / "tune")
        tune.clear()


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare: processor, instruction set, threads, versions, commit."""
    missing = _ext.why_not_host()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": missing or _ext.host().active_isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": _gpu() or "none",
        **gpu_state("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit"),
        "triton": _version("triton"),
        "sparsekern": _version("sparsekern"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> str | None:
    """The GPU's name, its memory and the CUDA that torch was built with."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory >> 30} GiB, CUDA {torch.version.cuda}"


def gpu_state(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU, by its names of fields; nothing where there is none to ask."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def save(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file whole: a run that is cut off leaves what it had before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    new.replace(path)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Table:
    """First column to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def milliseconds(t: Timing) -> str:
    """Three digits of the median: 0.123, 1.23, 12.3, 123 ms."""
    ms = t.median * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.{1 if ms >= 10 else 2 if ms >= 1 else 3}f}"


def ratio(base: Timing, own: Timing) -> str:
    """base / own as a speed-up: green where it is one, red where it is a loss, plain within the noise."""
    value = base.median / own.median
    style = "green" if own.p80 < base.p20 else "red" if own.p20 > base.p80 else "default"
    return f"[{style}]{value:.2f}x[/{style}]"


def timing_json(t: Timing) -> dict[str, float]:
    return {"ms": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3, "n": t.n}


def show_report(console: Console, report: Report) -> None:
    """The per-layer table of a conversion."""
    text = report.text(width=console.width, colour=console.is_terminal)
    console.print(Text.from_ansi(text), soft_wrap=True)


def bytes_on_disk(model: nn.Module) -> int:
    """The size of the model's safetensors file."""
    from safetensors.torch import save_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, str(path))
        return path.stat().st_size


@dataclass(frozen=True)
class Study:
    """One way of pruning, and the formats that can store what it leaves."""

    title: str
    pattern: str
    sparsity: float | None
    formats: tuple[str, ...]


class Disagreement(SystemExit):
    """A converted model does not compute what the pruned dense model computes."""


def require_close(what: str, out: Tensor, expected: Tensor, limit: float) -> float:
    """||out - expected|| / ||expected||; raises Disagreement above the limit."""
    error = relative_error(out, expected)
    if not error <= limit:
        raise Disagreement(
            f"{what}: relative error {error:.3g} against the dense model with the same zeros, limit {limit:g}"
        )
    return error


@contextmanager
def progress(console: Console, text: str, total: int) -> Iterator[Any]:
    """A bar that vanishes when it is done; yields the function that moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda note=text: bar.update(task, advance=1, description=note)
