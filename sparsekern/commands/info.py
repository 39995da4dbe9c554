"""sparsekern info: the machine, and which backend runs which format here, or why not."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import _ext, dispatch
from ..conv import Geometry
from ..conv import library as convolution
from ..formats import FORMATS
from ..layout import Layout
from . import show

OPS = ("mm", "mm_t", "sddmm")
CONVOLUTIONS = ("conv2d", "conv2d_input", "conv2d_weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
EXAMPLE = """example:
  python -m sparsekern info
  python -m sparsekern info --json | python -m json.tool
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="this machine, and which backend runs which format here, or why not",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts, rows = machine(), backends()
    if args.json:
        show.print_json({"machine": facts, "backends": rows, "absent": absent()})
        return 0
    out = show.console()
    values = [", ".join(v) if isinstance(v, list) else str(v) for v in facts.values()]
    names = [name.replace("_", " ") for name in facts]
    facts_table = show.table("machine", ("", " "), zip(names, values, strict=True))
    facts_table.show_header = False
    out.print(facts_table)
    headings = ("format", "device", "backend", "runs", "does not run")
    out.print(show.table("backends", headings, map(_cells, rows)))
    for backend, reason in absent().items():
        out.print(f"no backend {backend!r} here: {reason}", markup=False)
    out.print(dispatch_order(), markup=False)
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    runs = _briefly([f"{op} {name}" for op, names in row["runs"].items() for name in names]) or "-"
    why = "; ".join(f"{_briefly(what)}: {reason}" for reason, what in row["why_not"].items())
    return (row["format"], row["device"], row["backend"], runs, why)


def _briefly(calls: list[str]) -> str:
    """["mm float32", "mm bfloat16", "mm_t float32"] as "mm (float32 bfloat16), mm_t (float32)"."""
    by_op: dict[str, list[str]] = {}
    for call in calls:
        op, _, dtype = call.partition(" ")
        by_op.setdefault(op, []).append(dtype)
    by_dtypes: dict[str, list[str]] = {}
    for op, names in by_op.items():
        by_dtypes.setdefault(" ".join(names), []).append(op)
    return ", ".join(" ".join(ops) + (f" ({names})" if names else "") for names, ops in by_dtypes.items())


def machine() -> dict[str, Any]:
    """What decides about speed here."""
    facts: dict[str, Any] = {
        "sparsekern": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache": _cache(),
    }
    missing = _ext.why_not_host()
    if missing is not None:
        facts["compiled_kernels"] = missing
    else:
        host = _ext.host()
        facts["instruction_set"] = host.active_isa()
        facts["instruction_sets_built"] = list(host.built_isas())
        facts["instruction_sets_supported"] = list(host.supported_isas())
    facts["gpu"] = _gpu()
    facts["gpu_kernels"] = _ext.why_not_cuda() or "available"
    return facts


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _version() -> str:
    from .. import __version__

    return __version__


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache() -> str:
    from ..testing import last_level_cache

    return show.size(last_level_cache())


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    return f"{name} (compute capability {major}.{minor}), {count} in all"


def backends() -> list[dict[str, Any]]:
    """A row per format, device and backend: what it runs, and why it does not run the rest."""
    rows = []
    for format in FORMATS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for backend in dispatch.backends(format, device):
                rows.append(_row(format, device, backend))
    return rows


def absent() -> dict[str, str]:
    """The backends that no format has on this machine's devices, and why."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    present = {name for format in FORMATS for device in devices for name in dispatch.backends(format, device)}
    gpu = _ext.why_not_cuda() or "this release has no kernels for it"
    return {name: gpu for name in dispatch.BACKENDS if name not in present}


def _row(format: str, device: str, backend: str) -> dict[str, Any]:
    runs: dict[str, list[str]] = {}
    why_not: dict[str, list[str]] = {}
    for op in (*OPS, *CONVOLUTIONS):
        for dtype in DTYPES:
            layout = _sample(format, dtype, device)
            if layout is None:
                continue
            wide = torch.float32 if dtype == torch.int8 else dtype
            if op in OPS:
                x = torch.zeros(16, 64, dtype=wide, device=device)
                reason = dispatch.why_not(backend, op, layout, x)
            else:
                x = torch.zeros(1, 64, 1, 1, dtype=wide, device=device)
                reason = convolution.why_not(backend, op, layout, x, Geometry(1, 1))
            name = str(dtype).removeprefix("torch.")
            if reason is None:
                runs.setdefault(op, []).append(name)
            else:
                why_not.setdefault(reason, []).append(f"{op} {name}")
    missing = _ext.why_not_host() if backend == "host" else None
    if not runs and (missing is not None or len(why_not) == 1):
        why_not = {missing or next(iter(why_not)): ["all"]}
    return {"format": format, "device": device, "backend": backend, "runs": runs, "why_not": why_not}


def _sample(format: str, dtype: torch.dtype, device: str) -> Layout | None:
    """A small layout of the format in this type, or None where the format does not store it."""
    from ..testing import pack, random_scale, random_weight

    if dtype == torch.int8 and format not in ("sp24", "bsr"):
        return None
    dense = random_weight(format, 64, 64, dtype=dtype, block=16)
    scale = random_scale(64) if dtype == torch.int8 else None
    return pack(format, dense, block=16, scale=scale).to(device=device)


def dispatch_order() -> str:
    order = ", ".join(f"{format}: {' > '.join(dispatch.backends(format, 'cpu'))}" for format in FORMATS)
    return f"Without backend= what tune measured is taken, else the first that can run a call ({order})."
