"""Measure, remember, predict: which form of a layer is fastest on this machine.

- `measure` times variants against each other; `store` and `lookup` keep what was found, on disk, per device.
- `predict` is the answer without a measurement: a pure function of (device, format, op, M, N, K, dtype,
  density).

The cache lives in $SPARSEKERN_CACHE, else $XDG_CACHE_HOME/sparsekern, else ~/.cache/sparsekern: one JSON
file per device. An entry holds for the device, library versions, instruction set, threads, op, format,
type, shape and bucket of M and density that it was measured with. SPARSEKERN_TUNE=0 switches the cache off.
A file that is not ours is ignored with a warning; a file is replaced whole, so a reader never sees half of
one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._ext import host, why_not_host

VERSION = 1
STEADY = 0.05  # relative uncertainty of a speed-up that asks for no second look
MAX_BYTES = 32 << 20  # a larger cache file is not ours
_FIELDS = ("m", "dense", "sparse", "spread")


class Record(NamedTuple):
    """One measurement: seconds of a dense and of a sparse call, interleaved, at M = m tokens.

    `spread` is the relative uncertainty of dense / sparse.
    """

    m: int
    dense: float
    sparse: float
    spread: float

    @property
    def speedup(self) -> float:
        return self.dense / self.sparse


@dataclass(frozen=True)
class Case:
    """What a time depends on. `format` has block and order ("bsr 32x32"), `op` a convolution's geometry."""

    op: str
    format: str
    backend: str
    dtype: str
    m: int
    n: int
    k: int
    density: float
    device: str = "cpu"

    @property
    def key(self) -> str:
        shape = f"m{bucket(self.m)} n{self.n} k{self.k} d{density_bucket(self.density):g}"
        parts = (environment(self.device), self.op, self.format, self.backend, self.dtype, shape)
        return " | ".join(parts)


def bucket(m: int) -> int:
    """M rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: two buckets an octave."""
    if m <= 2:
        return max(m, 0)
    power = 1 << (m - 1).bit_length() - 1  # the power of two below m
    return 3 * power // 2 if 2 * m <= 3 * power else 2 * power


def density_bucket(density: float) -> float:
    """Density in steps of 2 %, finer (two significant digits) below 10 %."""
    if density >= 0.1:
        return round(density * 50) / 50
    return float(f"{density:.2g}") if density > 0 else 0.0


# The machine ------------------------------------------------------------------------------------------------


@cache
def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    stepping = re.search(r"^model\s*:\s*(\d+)$", text, re.MULTILINE)
    return f"{name} model {stepping.group(1)}" if stepping else name


def isa() -> str:
    """The instruction set that the compiled kernels use now; "none" where they are missing."""
    return host().active_isa() if why_not_host() is None else "none"


@cache
def _build() -> str:
    """Tells one build of the compiled module from the next."""
    if why_not_host() is not None:
        return "none"
    try:
        stat = Path(str(host().__file__)).stat()
    except OSError:
        return "unknown"
    return f"{stat.st_size:x}.{stat.st_mtime_ns:x}"


def environment(device: str = "cpu") -> str:
    """Everything beside the call itself that a time depends on."""
    from . import __version__

    kind = torch.device(device).type
    versions = f"torch {torch.__version__} | sparsekern {__version__} {_build()}"
    return f"{device_name(device)} | {kind} | {versions} | {isa()} | {torch.get_num_threads()} threads"


# The cache --------------------------------------------------------------------------------------------------

_disabled = 0
_entries: dict[Path, dict[str, Record]] = {}
_unsaved: dict[Path, dict[str, Record]] = {}
_chosen: dict[Any, str | None] = {}
_measured: dict[torch.device, bool] = {}
_generation = 0


def enabled() -> bool:
    """False inside `disabled()` and under SPARSEKERN_TUNE=0 (off, no, false)."""
    return not _disabled and os.environ.get("SPARSEKERN_TUNE", "1").lower() not in ("0", "off", "no", "false")


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, nothing is looked up and nothing stored."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def directory() -> Path:
    """Where the cache files are."""
    given = os.environ.get("SPARSEKERN_CACHE")
    if given:
        return Path(given).expanduser()
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
    return base / "sparsekern"


def path(device: str = "cpu") -> Path:
    """The cache file of a device."""
    name = device_name(device)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
    return directory() / f"tune-{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def lookup(case: Case) -> Record | None:
    """What was measured for this case (same bucket of M and density), or None."""
    return _table(path(case.device)).get(case.key) if enabled() else None


def store(case: Case, record: Record) -> None:
    """Remembers a measurement in this process; `save` writes it to disk."""
    if not enabled():
        return
    place = path(case.device)
    _table(place)[case.key] = record
    _unsaved.setdefault(place, {})[case.key] = record
    _changed()


def save() -> None:
    """Writes what is new, joined with what others have written meanwhile. A warning where it cannot."""
    for place, new in list(_unsaved.items()):
        merged = {**_read(place), **new}
        try:
            _replace(place, {"version": VERSION, "entries": {key: list(r) for key, r in merged.items()}})
        except OSError as error:
            warnings.warn(f"sparsekern cannot keep its measurements in {place}: {error}", stacklevel=2)
        del _unsaved[place]


def discard() -> None:
    """Keeps what was measured since the last `save` in this process only."""
    _unsaved.clear()


def clear() -> None:
    """Forgets every measurement, in this process and on disk."""
    forget()
    for place in directory().glob("tune-*.json"):
        place.unlink(missing_ok=True)


def forget() -> None:
    """Forgets what this process has read, not what is on disk."""
    for table in (_entries, _unsaved):
        table.clear()
    _changed()


def generation() -> int:
    """Another number whenever something else may be known: what was concluded before may be wrong."""
    return _generation


def _changed() -> None:
    global _generation
    _generation += 1
    _chosen.clear()
    _measured.clear()


def _table(place: Path) -> dict[str, Record]:
    if place not in _entries:
        _entries[place] = _read(place)
    return _entries[place]


def _read(place: Path) -> dict[str, Record]:
    """The entries of a cache file; a file that cannot be ours gives a warning and none."""
    try:
        if not place.is_file():
            return {}
        if place.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        content = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"not a tuning cache of version {VERSION}")
        entries = content.get("entries")
        if not isinstance(entries, dict):
            raise ValueError("it has no table of entries")
        return {key: _record(key, value) for key, value in entries.items()}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"sparsekern ignores the tuning cache {place}: {error}", stacklevel=2)
        return {}


def _record(key: str, value: Any) -> Record:
    def number(v: Any) -> bool:
        return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)

    right = isinstance(value, list) and len(value) == len(_FIELDS) and all(map(number, value))
    if not right or not isinstance(value[0], int) or min(value) < 0 or min(value[1:3]) == 0:
        raise ValueError(f"entry {key[:80]!r} is not [m, dense, sparse, spread] in positive numbers")
    return Record(*value)


def _replace(place: Path, content: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def foreign_load() -> float:
    """Cores' worth of other work during the last minute, beyond what is idle anyway; 0 where unknown."""
    if not hasattr(os, "getloadavg"):
        return 0.0
    return max(0.0, os.getloadavg()[0] - max(os.cpu_count() or 1, torch.get_num_threads()))


# Measuring --------------------------------------------------------------------------------------------------


def measure(
    dense: Callable[[], Any],
    variants: Mapping[str, Callable[[], Any]],
    *,
    m: int = 0,
    seconds: float = 0.3,
    device: torch.device | str = "cpu",
) -> dict[str, Record]:
    """Times every variant against `dense`: interleaved rounds in random order, medians, in this process.

    Under no_grad and with the current number of threads; on a GPU, `device`, as `testing.measure` says. `seconds`
    is what the rounds may take (at least five are made); where they leave more than STEADY of uncertainty, twice
    as many follow, up to two times, and the steadiest run counts. Returns a Record for every variant.
    """
    from .testing import measure as interleave

    runs: list[dict[str, Record]] = []
    for longer in (1, 2, 4):
        with torch.no_grad():
            both, rounds = {"dense": dense, **variants}, 200 * longer
            times = interleave(both, repeats=rounds, warmup=2, seconds=longer * seconds, device=device)
        base = times.pop("dense")
        runs.append(
            {
                name: Record(m, base.median, t.median, math.hypot(_uncertainty(base), _uncertainty(t)))
                for name, t in times.items()
            }
        )
        if _unsteadiness(runs[-1]) <= STEADY:
            break
    return min(runs, key=_unsteadiness)


def _unsteadiness(records: Mapping[str, Record]) -> float:
    return max((r.spread for r in records.values()), default=0.0)


def _uncertainty(t: Any) -> float:
    """Relative standard error of a median: 1.25 sigma / sqrt(n), sigma from 20th and 80th percentile."""
    return 1.2533 * (t.p80 - t.p20) / 1.6832 / math.sqrt(t.n) / t.median if t.median else 0.0


def measured(device: torch.device) -> bool:
    """Whether anything was, on this device; where not, calls need not ask."""
    found = _measured.get(device)
    if found is None:
        if not enabled():
            return False
        found = _measured[device] = bool(_table(path(str(device))))
    return found


def backend_for(op: str, layout: Any, x: torch.Tensor, names: tuple[str, ...]) -> str | None:
    """The backend among `names` that was measured fastest for this call; None where fewer than two were."""
    if not enabled():
        return None
    m, (n, k) = x.shape[0], layout.shape
    place = (op, layout.format, layout.dims, layout.values.numel(), x.dtype, bucket(m), x.device, names)
    key = (*place, isa(), torch.get_num_threads()) if x.is_cpu else place  # what a GPU's times do not depend on
    if key not in _chosen:
        device = str(x.device)
        dtype = str(x.dtype).removeprefix("torch.")
        case = Case(op, described(layout.format, layout.dims[2:]), "", dtype, m, n, k, stored_share(layout), device)
        known = {name: lookup(replace(case, backend=name)) for name in names}
        times = {name: record.sparse for name, record in known.items() if record is not None}
        _chosen[key] = min(times, key=lambda name: times[name]) if len(times) > 1 else None
    return _chosen[key]


def stored_share(layout: Any) -> float:
    """The share of the weights that a layout stores; of blocks, so that ragged edges do not count."""
    if layout.format != "bsr":
        return layout.density
    rows, columns = layout.grid
    return layout.values.shape[0] / (rows * columns) if rows * columns else 0.0


def described(format: str, block: tuple[int, ...] = (), order: str | None = None) -> str:
    """A format with what else a time depends on: "csr", "bsr 32x32", "sp24 rsc"."""
    size = f" {block[0]}x{block[1]}" if len(block) == 2 else ""
    return f"{format}{size}{f' {order}' if order else ''}"
