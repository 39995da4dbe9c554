"""What tests and benches share: weights, one error metric, one table of tolerances, traps, timers.

A bench that reports a time has checked its result with the same `assert_close` that the tests use.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ._ext import host
from .formats import FORMATS
from .layout import Layout
from .ref import ACTIVATIONS

# Weights and activations ------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    """A generator of its own on torch's default device: no test depends on what ran before it."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_dense(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random normal data; int8: whole numbers in [-127, 127]. Seeded, so equal arguments give equal data.

    On torch's default device, with the same numbers on each.
    """
    rng = torch.Generator("cpu").manual_seed(seed)
    if dtype == torch.int8:
        made = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8, device="cpu")
    else:
        made = torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu").to(dtype)
    return made.to(torch.get_default_device())


def random_weight(
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    density: float = 0.5,
    block: int | tuple[int, int] = 4,
    seed: int = 0,
) -> Tensor:
    """A dense W[N, K] whose zeros follow the format's pattern; about `density` of it is nonzero.

    sp24: two random positions of every group of four, thinned further where density < 0.5; bsr: random
    blocks; csr and bitmap: random entries.
    """
    w = random_dense(n, k, dtype=dtype, seed=seed)
    w = torch.where(w == 0, torch.ones_like(w), w)
    rng = generator(seed + 1)
    if format == "sp24":
        groups = -(-k // 4)
        ranks = torch.rand(n, groups, 4, generator=rng).argsort(-1).argsort(-1)
        keep = (ranks < 2).reshape(n, 4 * groups)[:, :k]
        if density < 0.5:
            keep = keep & (torch.rand(n, k, generator=rng) < 2 * density)
    elif format == "bsr":
        r, c = _block(block)
        kept = torch.rand(-(-n // r), -(-k // c), generator=rng) < density
        keep = kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    elif format in FORMATS:
        keep = torch.rand(n, k, generator=rng) < density
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return torch.where(keep, w, torch.zeros_like(w))


def _block(block: int | tuple[int, int]) -> tuple[int, int]:
    return (block, block) if isinstance(block, int) else block


def random_scale(n: int, seed: int = 0) -> Tensor:
    """Per-row scales of int8 weights, float32 in [0.01, 0.02)."""
    return 0.01 + 0.01 * torch.rand(n, generator=generator(seed))


def pack(format: str, dense: Tensor, block: int | tuple[int, int] = 4, scale: Tensor | None = None) -> Layout:
    """The layout of a dense weight, whatever its format; int8 weights take a scale (sp24 and bsr)."""
    options = {} if scale is None else {"scale": scale}
    if format == "bsr":
        return FORMATS["bsr"].pack(dense, _block(block), **options)
    return FORMATS[format].pack(dense, **options)


def skewed_weight(n: int, k: int, dtype: torch.dtype = torch.float32, density: float = 0.1, seed: int = 0) -> Tensor:
    """Unstructured, with row densities that fall as a power law: few rows nearly full, many nearly empty."""
    rng = generator(seed + 2)
    share = 1.0 / torch.arange(1, n + 1, dtype=torch.float64) ** 0.8
    share = (share / share.mean() * density if n else share).clamp(max=1.0)
    keep = torch.rand(n, k, generator=rng, dtype=torch.float64) < share[torch.randperm(n, generator=rng)][:, None]
    w = random_dense(n, k, dtype=dtype, seed=seed)
    return torch.where(keep, w, torch.zeros_like(w))


def dlmc_like(n: int, k: int, dtype: torch.dtype = torch.float32, density: float = 0.1, seed: int = 0) -> Tensor:
    """Pruned by magnitude as a trained layer is: normal weights times log-normal scales of rows and columns,
    one threshold for all. Rows differ in length as in the DLMC collection (Gale et al., arXiv 2006.10901)."""
    rng = generator(seed + 3)
    w = random_dense(n, k, seed=seed)
    w = w * torch.randn(n, 1, generator=rng).mul(0.3).exp() * torch.randn(1, k, generator=rng).mul(0.2).exp()
    kept = round(density * n * k)
    if kept == 0:
        return torch.zeros(n, k, dtype=dtype)
    threshold = w.abs().flatten().kthvalue(n * k - kept + 1).values
    return torch.where(w.abs() >= threshold, w, torch.zeros_like(w)).to(dtype)


def with_empty_rows(w: Tensor, share: float = 0.3, seed: int = 0) -> Tensor:
    """`w` with about this share of its rows zeroed, the first and the last always."""
    empty = torch.rand(w.shape[0], generator=generator(seed + 4)) < share
    empty[:1], empty[-1:] = True, True
    return torch.where(empty[:, None].to(w.device), torch.zeros_like(w), w)


# Error and tolerance ----------------------------------------------------------------------------------------

# ||out - ref|| / ||ref|| that a correct kernel stays below, by the type of the output: inputs exactly
# representable, float32 accumulation over up to a few thousand terms, one rounding at the end.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# A single entry may be this many times further off, measured against the root mean square of ref.
OUTLIER = 10.0


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64 over the finite entries of ref; inf where NaNs or shapes differ.

    Equal NaNs and infinities count as right; a ref that is all zero allows nothing but zeros.
    """
    if out.shape != ref.shape:
        return float("inf")
    o, r = out.detach().to("cpu", torch.float64), ref.detach().to("cpu", torch.float64)
    distance, size = float((o - r).norm()), float(r.norm())
    if not (distance < float("inf") and size < float("inf")):
        finite = torch.isfinite(r)
        special_right = torch.where(torch.isnan(r), torch.isnan(o), o == r) | finite
        if not bool(special_right.all()) or not bool(torch.isfinite(o[finite]).all()):
            return float("inf")
        distance, size = float((o - r)[finite].norm()), float(r[finite].norm())
    return distance / size if size else (0.0 if distance == 0 else float("inf"))


def assert_close(out: Tensor, ref64: Tensor, dtype: torch.dtype | None = None, *, tol: float | None = None) -> None:
    """Raises AssertionError unless `out` equals the float64 reference within the tolerance of its type.

    `dtype` is the type that `out` must have (default: whatever it has). Beside the norm every single entry is
    held to OUTLIER times the tolerance, relative to the root mean square of ref: one wrong entry in a large
    output does not drown.
    """
    if dtype is not None and out.dtype != dtype:
        raise AssertionError(f"expected {dtype}, got {out.dtype}")
    if out.shape != ref64.shape:
        raise AssertionError(f"expected shape {tuple(ref64.shape)}, got {tuple(out.shape)}")
    limit = TOLERANCE[out.dtype] if tol is None else tol
    o, r = out.detach().to("cpu", torch.float64), ref64.detach().to("cpu", torch.float64)
    error = relative_error(o, r)
    if not error <= limit:
        raise AssertionError(f"relative error {error:.3g} > {limit:.3g} ({out.dtype}); {_worst(o, r)}")
    off, size = (o - r).abs_(), r.abs()  # NaN or inf where both are: no comparison with them is true
    typical = float(r.norm()) / max(r.numel(), 1) ** 0.5
    if not typical < float("inf"):
        typical = float(r[torch.isfinite(r)].square().mean().sqrt())
    if bool((off > (size + typical).mul_(OUTLIER * limit)).any()):
        raise AssertionError(f"one entry is off by more than {OUTLIER:g} tolerances; {_worst(o, r)}")


def _worst(o: Tensor, r: Tensor) -> str:
    wrong = torch.where(torch.isnan(o) & torch.isnan(r) | (o == r), 0.0, (o - r).abs().nan_to_num(float("inf")))
    at = tuple(int(i) for i in torch.unravel_index(wrong.argmax(), wrong.shape)) if wrong.numel() else ()
    return f"worst at {at}: {float(o[at]):g}, expected {float(r[at]):g}" if wrong.numel() else "empty"


def reference_mm(dense: Tensor, x: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """act(x W^T + bias) in float64 from the dense weight: independent of every layout's own unpack."""
    y = x.double() @ dense.double().t()
    return ACTIVATIONS[activation](y if bias is None else y + bias.double())


def reference_mm_t(dense: Tensor, dy: Tensor) -> Tensor:
    """dY W in float64 from the dense weight."""
    return dy.double() @ dense.double()


def reference_sddmm(dy: Tensor, x: Tensor) -> Tensor:
    """The whole dense dY^T X in float64."""
    return dy.double().t() @ x.double()


# Traps: poison and guard bands ------------------------------------------------------------------------------

GUARD = 67  # odd: what lies between the bands is aligned to its own element size and to nothing more


class Guarded:
    """A copy of a tensor with bands of poison on both sides (and `gap` columns of it after every row).

    Floats are surrounded by NaN, integers by 0x5A bytes. `tensor` is the copy; `check()` raises
    AssertionError where a band was written to. What reads beyond the tensor meets poison, not harmless zeros.
    """

    def __init__(self, t: Tensor, gap: int = 0) -> None:
        if gap and t.dim() != 2:
            raise ValueError(f"gap needs a matrix, got {t.dim()} dimensions")
        width = (t.shape[-1] + gap) if t.dim() else 1
        rows = t.numel() // t.shape[-1] if t.dim() and t.shape[-1] else 1
        inner = max(t.numel(), rows * width)
        self.memory = torch.empty(inner + 2 * GUARD, dtype=t.dtype, device=t.device)
        _poison(self.memory)
        strides = (width, 1) if gap else t.contiguous().stride()
        self.tensor = self.memory.as_strided(t.shape, strides, GUARD)
        self._inside = torch.zeros(self.memory.shape, dtype=torch.bool, device=t.device)
        self._inside.as_strided(t.shape, strides, GUARD).fill_(True)
        self.tensor.copy_(t)
        self._before = self._bytes()

    def _bytes(self) -> Tensor:
        outside = self.memory[~self._inside]
        return outside.view(torch.uint8).clone() if outside.numel() else outside

    def check(self) -> None:
        changed = (self._bytes() != self._before).nonzero()
        if len(changed):
            at = int(changed[0]) // self.memory.element_size()
            where = f"{GUARD - at} before the start" if at < GUARD else f"{at - GUARD} into the rear band or gaps"
            raise AssertionError(f"wrote outside a tensor of shape {tuple(self.tensor.shape)}: {where}")


def guarded(t: Tensor, gap: int = 0) -> Guarded:
    """A guarded copy of `t`; see Guarded."""
    return Guarded(t, gap)


def guarded_layout(layout: Layout) -> tuple[Layout, Callable[[], None]]:
    """The layout with every tensor between guard bands, and the check of them all."""
    guards = {name: Guarded(t) for name, t in layout.tensors().items()}
    by_id = {id(t): guards[name].tensor for name, t in layout.tensors().items()}
    originals = [g.tensor.clone() for g in guards.values()]

    def check() -> None:
        for (name, guard), original in zip(guards.items(), originals, strict=True):
            guard.check()
            if original.numel() and not torch.equal(guard.tensor.view(torch.uint8), original.view(torch.uint8)):
                raise AssertionError(f"{name} was written to")

    return layout.map(lambda t: by_id[id(t)]), check


def _poison(t: Tensor) -> None:
    if t.numel() == 0:
        return
    if t.is_floating_point():
        t.fill_(float("nan"))
    else:
        t.view(torch.uint8).fill_(0x5A)


@contextmanager
def poisoned() -> Iterator[list[Guarded]]:
    """Inside, `x.new_empty`, `torch.empty` and `torch.empty_like` give poisoned memory between guard bands.

    So what a launcher forgets to write is NaN and not last call's right answer, and what it writes outside
    its output is found: the bands are checked on the way out. Yields the guards made so far.
    """
    guards: list[Guarded] = []
    new_empty, empty, empty_like = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def trap(t: Tensor) -> Tensor:
        if type(t) is not Tensor or t.layout != torch.strided or not t.is_contiguous():
            return t
        _poison(t)
        guards.append(Guarded(t))
        return guards[-1].tensor

    def trapped(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            with mock.patch.object(torch, "empty", empty):  # Guarded allocates, too
                return trap(make(*args, **kwargs))

        return allocate

    with (
        mock.patch.object(torch.Tensor, "new_empty", trapped(new_empty)),
        mock.patch.object(torch, "empty", trapped(empty)),
        mock.patch.object(torch, "empty_like", trapped(empty_like)),
    ):
        yield guards
    for guard in guards:
        guard.check()


# Threads and instruction sets -------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads(count), undone on the way out."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single_thread() -> Any:
    """`with single_thread():` what is timed runs on one thread."""
    return threads(1)


@contextmanager
def host_isa(name: str | None) -> Iterator[None]:
    """Selects an instruction set of the compiled CPU kernels (None: leave it), undone on the way out."""
    if name is None:
        yield
        return
    module = host()
    before = module.active_isa()
    module.set_active_isa(name)
    try:
        yield
    finally:
        module.set_active_isa(before)


# Timers -----------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Seconds a call: the median of n, and the 20th and 80th percentile beside it."""

    median: float
    p20: float
    p80: float
    n: int

    def __str__(self) -> str:
        unit, factor = next(
            (u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if self.median * f >= 1 or u == "µs"
        )
        return f"{self.median * factor:.3g} {unit} [{self.p20 * factor:.3g} .. {self.p80 * factor:.3g}]"


def timing(seconds: Sequence[float]) -> Timing:
    """The Timing of single-call times."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    fifths, median = statistics.quantiles(seconds, n=5, method="inclusive"), statistics.median(seconds)
    # Interpolation between equal times rounds, and may end on the wrong side of the median.
    return Timing(median, min(fifths[0], median), max(fifths[3], median), len(seconds))


def measure(
    variants: Mapping[str, Callable[..., Any]],
    repeats: int = 30,
    warmup: int = 3,
    *,
    inputs: Sequence[Any] | None = None,
    cold: bool = False,
    seconds: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Times the variants against each other, fairly: every round calls each once, in a new random order.

    A machine that slows down for a while slows all of them. `inputs`: each round passes the next of these to
    every variant, in rotation, so that no activation stays in a cache where a real model would not keep it.
    `cold` evicts the caches before every call. `seconds` ends the rounds early once so much time is spent (at
    least five rounds are made). `device`: where the calls compute; on "cpu" a call must have finished when it
    returns. On a GPU caches are always cold, and a call takes what the GPU takes between two events or what the
    host takes to launch it, whichever is longer: of a model's many calls the other one is hidden.
    """
    order, rng = list(variants), random.Random(seed)
    clock = _CardClock(torch.device(device)) if torch.device(device).type == "cuda" else _HostClock(cold)
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in order}
    begin = time.perf_counter()
    for turn in range(-warmup, repeats):
        if seconds is not None and turn >= 5 and time.perf_counter() - begin > seconds:
            break
        rng.shuffle(order)
        args = () if inputs is None else (inputs[turn % len(inputs)],)
        for name in order:
            spent = clock.time(variants[name], args)
            if turn >= 0:
                times[name].append(spent)
        clock.finish()
    return {name: timing([spent() for spent in times[name]]) for name in variants}


class _HostClock:
    """Times calls that have finished when they return."""

    def __init__(self, cold: bool) -> None:
        self._evict = _evictor() if cold else lambda: None

    def time(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], float]:
        """Makes the call; its seconds can be asked for after `finish`."""
        self._evict()
        start = time.perf_counter_ns()
        call(*args)
        spent = time.perf_counter_ns() - start
        return lambda: spent * 1e-9

    def finish(self) -> None:
        """Waits for all calls."""


class _CardClock:
    """Times calls that launch work on a GPU's current stream.

    Before each the second-level cache is written over. That also keeps the GPU busy while the host launches the call,
    so that the time between the events is the GPU's alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(size, 128 << 20), dtype=torch.int8, device=device)

    def time(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], float]:
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._buffer.zero_()
            begin.record()
            start = time.perf_counter_ns()
            call(*args)
            spent = time.perf_counter_ns() - start
            end.record()
        return lambda: max(spent * 1e-9, begin.elapsed_time(end) * 1e-3)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def _evictor() -> Callable[[], Any]:
    """Writes a buffer twice as large as the last cache (at most 512 MiB)."""
    buffer = torch.zeros(min(2 * last_level_cache(), 512 << 20) // 4)
    return lambda: buffer.add_(1.0)
