"""sp24 on sparse tensor cores, emulated: every kernel, type and schedule against the oracle; the choice of kernel."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import LAUNCHES, ON_CARD, Fp8Bounds, running_on_device, runs_fp8_mma_sp
from torch import Tensor

import sparsekern as sk
from sparsekern import _ext, _library, ref
from sparsekern._ext import CUDA_DTYPES, FP8
from sparsekern.sp24 import config, cuda, fragments
from sparsekern.sp24 import pack as pack24
from sparsekern.sp24.layout import Sp24
from sparsekern.testing import assert_close, poisoned, random_dense

OPERANDS = (torch.bfloat16, torch.float16, torch.int8, FP8)
KERNELS = 14
PROMOTING = 3  # of float8_e4m3fn, beside them
# Relative error of a result that is rounded once to the output's type.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6, torch.int32: 0.0}


def weight(n: int, k: int, dtype: torch.dtype, *, scale: bool = False, seed: int = 0) -> Sp24:
    dense = random_dense(n, k, seed=seed)
    packed = pack24((dense * 30).round() if dtype == torch.int8 else dense, prune=True)
    scales = random_dense(n, seed=seed + 1).sigmoid() + 0.5 if scale else None
    return Sp24(values=packed.values.to(dtype), metadata=packed.metadata, shape=(n, k), scale=scales)


def tokens(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    x = random_dense(m, k, seed=seed)
    return (x * 30).round().to(dtype) if dtype == torch.int8 else x.to(dtype)


def dense_of(layout: Sp24) -> Tensor:
    wide = Sp24(values=layout.values.double(), metadata=layout.metadata, shape=layout.shape, scale=None).unpack()
    return wide if layout.scale is None else wide * layout.scale.double()[:, None]


def error(out: Tensor, want: Tensor) -> float:
    assert not out.isnan().any()
    return float((out.double() - want).norm() / want.norm().clamp_min(1e-30))


def forced(number: int, m: int, n: int, k: int, dtype: torch.dtype, *, workers: int, streamed: int) -> config.Choice:
    """A choice that the heuristic would not make: few workers, so that every path is taken."""
    kernel = cuda.kernels(CUDA_DTYPES[dtype])[number]
    tiles = -(-n // kernel.rows) * -(-m // kernel.tokens)
    return config.Choice(number, workers, tiles if kernel.family == "decode" else min(streamed, tiles), tiles, 0.0)


def error_of(number: int, dtype: torch.dtype, out: torch.dtype, workers: int, streamed: int) -> float:
    """Of a kernel on odd numbers of rows, columns and tokens, more than a tile of each."""
    kernel = cuda.kernels(CUDA_DTYPES[dtype])[number]
    m = min(kernel.tokens, 29) if kernel.family == "decode" else kernel.tokens + 13
    n, k = (200, 136) if kernel.family == "decode" else (kernel.rows + 37, 4 * fragments.block_k(dtype) - 16)
    layout, x = weight(n, k, dtype, scale=True), tokens(m, k, dtype)
    how = forced(number, m, n, k, dtype, workers=workers, streamed=streamed)
    with poisoned():
        y = cuda.mm(layout, x, None, "none", out_dtype=out, how=how)
    return error(y, x.double() @ dense_of(layout).t())


@pytest.mark.parametrize("number", range(KERNELS))
def test_every_kernel(emulated: ModuleType, number: int) -> None:
    """Tiles whole, and cut along K."""
    for dtype, out, workers, streamed in (
        (torch.bfloat16, torch.bfloat16, 3, 0),
        (torch.float16, torch.float16, 2, 3),
        (torch.int8, torch.float32, 3, 0),
    ):
        assert error_of(number, dtype, out, workers, streamed) < TOLERANCE[out], dtype


@pytest.mark.parametrize("number", range(KERNELS))
def test_every_kernel_of_fp8(emulated: ModuleType, fp8_bounds: Fp8Bounds, number: int) -> None:
    """With sums of floats, and with those of tensor cores."""
    kernel = cuda.kernels(CUDA_DTYPES[FP8])[number]
    if kernel.family != "mm_sm90" and not runs_fp8_mma_sp():
        pytest.skip("this card has no mma.sp of e4m3")
    assert kernel.accurate == (kernel.family != "mm_sm90")
    bound = fp8_bounds.promoted if kernel.accurate else fp8_bounds.fast
    assert error_of(number, FP8, torch.float32, 2, 3) < bound


@pytest.mark.parametrize("number", range(KERNELS, KERNELS + PROMOTING))
def test_every_promoting_kernel(emulated: ModuleType, fp8_bounds: Fp8Bounds, number: int) -> None:
    """Whole tiles, and tiles cut along K with pieces of one block; K that ends in the middle of a block."""
    kernel = cuda.kernels(CUDA_DTYPES[FP8])[number]
    assert kernel.accurate
    assert kernel.family == "mm_sm90"
    m, n, k = kernel.tokens + 13, kernel.rows + 37, 5 * fragments.block_k(FP8) - 16
    layout, x = weight(n, k, FP8, scale=True), tokens(m, k, FP8)
    want = x.double() @ dense_of(layout).t()
    for workers, streamed in ((2, 0), (3, 3), (11, 4)):
        how = forced(number, m, n, k, FP8, workers=workers, streamed=streamed)
        with poisoned():
            y = cuda.mm(layout, x, None, "none", out_dtype=torch.float32, how=how)
        assert error(y, want) < fp8_bounds.promoted, (workers, streamed)


def test_every_number_of_tokens(emulated_once: ModuleType) -> None:
    """M = 1 .. 130 for one shape, by whatever the heuristic takes on a card of three processors."""
    layout = weight(130, 200, torch.bfloat16)
    x = tokens(130, 200, torch.bfloat16)
    want = x.double() @ dense_of(layout).t()
    families = set()
    for m in range(1, 131):
        how = cuda.choice(layout, x[:m])
        families.add(cuda.kernels(1)[how.kernel].family)
        with poisoned():
            assert error(cuda.mm(layout, x[:m], None, "none"), want[:m]) < TOLERANCE[torch.bfloat16], m
    assert len(families) > 1


# One kernel of every family: with clusters and without, of e4m3 that promotes its sums and that does not.
FAMILIES = {"mm_sm90": 0, "mm_sm90 alone": 4, "mm_sm80": 6, "decode": 8, "mm_sm90 promoting": KERNELS}


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_epilogue(emulated_once: ModuleType, family: str, activation: str) -> None:
    """Activations, biases of every type, scales of both sides, a residual and its factor, every type of output."""
    number = FAMILIES[family]
    for dtype, out, bias_dtype, beta in (
        (torch.bfloat16, torch.float32, torch.float32, 1.0),
        (torch.float16, torch.float16, torch.bfloat16, -0.5),
        (torch.int8, torch.bfloat16, torch.float16, 2.0),
        (FP8, torch.float32, torch.bfloat16, 0.25),
        (FP8, torch.bfloat16, torch.float32, 1.0),
    ):
        if (number >= KERNELS and dtype != FP8) or (dtype == FP8 and not has_fp8(family)):
            continue
        layout, x = weight(70, 80, dtype, scale=True), tokens(8, 80, dtype)
        bias, x_scale = torch.randn(70).to(bias_dtype), torch.rand(8) * (0.01 if dtype == torch.int8 else 1)
        residual = torch.randn(8, 70).to(out)
        how = forced(number, 8, 70, 80, dtype, workers=1, streamed=0)
        words = {"x_scale": x_scale, "residual": residual, "beta": beta, "out_dtype": out, "how": how}
        with poisoned():
            y = cuda.mm(layout, x, bias, activation, **words)
        want = (x.double() @ dense_of(layout).t()) * x_scale[:, None].double() + bias.double()
        want = ref.ACTIVATIONS[activation](want) + beta * residual.double()
        # Where hardware keeps 14 bits of the sums of fp8 the tolerance is that of its outputs.
        rough = dtype == FP8 and ON_CARD
        assert error(y, want) < (2e-3 if rough else 2 * TOLERANCE[out] + 1e-6), (dtype, out)


def has_fp8(family: str) -> bool:
    """Whether the card's own code multiplies e4m3 in this family; the emulator's does in all."""
    card = torch.cuda.get_device_capability() if ON_CARD else None
    return card is None or (card == (9, 0)) == family.startswith("mm_sm90")


@pytest.mark.parametrize("number", range(KERNELS))
def test_int32_sums_are_exact(emulated_once: ModuleType, number: int) -> None:
    layout, x = weight(90, 272, torch.int8), tokens(8, 272, torch.int8)
    how = forced(number, 8, 90, 272, torch.int8, workers=2, streamed=2)
    y = cuda.mm(layout, x, None, "none", out_dtype=torch.int32, how=how)
    assert torch.equal(y.long(), (x.double() @ dense_of(layout).t()).long())


def test_results_do_not_depend_on_the_schedule(device_module: ModuleType) -> None:
    """Tiles that several workers share are added up in the order of K, whoever comes last."""
    seen: dict[int, list[Tensor]] = {}
    for schedule in LAUNCHES:
        with running_on_device(device_module, schedule):
            layout, x = weight(130, 520, torch.float16), tokens(14, 520, torch.float16)
            for number in (4, 6, 9):
                how = forced(number, 14, 130, 520, torch.float16, workers=4, streamed=9)
                seen.setdefault(number, []).append(cuda.mm(layout, x, None, "none", out_dtype=torch.float32, how=how))
    for results in seen.values():
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_that_lie_anywhere(emulated: ModuleType) -> None:
    """Strides, offsets and lengths that TMA, 16-byte and 8-byte copies cannot take."""
    for k in (64, 36, 34, 33):
        layout = weight(40, k, torch.bfloat16)
        for offset in (0, 1, 2, 4):
            wide = tokens(9, k + 19, torch.bfloat16)
            x = wide[:, offset : offset + k]
            assert error(cuda.mm(layout, x, None, "none"), x.double() @ dense_of(layout).t()) < 3e-3
            assert (
                error(cuda.mm(layout, x.t().contiguous().t(), None, "none"), x.double() @ dense_of(layout).t()) < 3e-3
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_rows_that_overlap(emulated_once: ModuleType, dtype: torch.dtype) -> None:
    """v.expand(M, K), windows over a vector, a single row with any stride: the driver refuses them as tensor maps."""
    k = 64
    layout = weight(70, k, dtype)
    line = tokens(1, 400, dtype)[0]
    for x in (
        line[:k].expand(130, k),
        line[:k].expand(1, k),
        line.as_strided((20, k), (16, 1)),
        line.as_strided((1, k), (16, 1)),
        line.as_strided((1, k), (0, 1)),
        line.as_strided((9, k), (1, 4)),
    ):
        assert not cuda._aligned(x) or (x.stride(0) >= k and x.shape[0] == 1)
        want = x.double() @ dense_of(layout).t()
        y = cuda.mm(layout, x, None, "none", out_dtype=torch.float32)
        assert error(y, want) < (2e-6 if dtype != FP8 else 1e-5 if not ON_CARD else 2e-3)
    many = line[:k].expand(300, k)
    seen: list[tuple[int, bool]] = []
    with mock.patch.object(cuda, "_launch", lambda how, w, k, x, *rest: seen.append((x.stride(0), cuda._aligned(x)))):
        cuda.mm(layout, many, None, "none")
    assert seen == [(k, True)], "copied once, so that the fast kernels can take it"


def test_the_gradient_of_a_sum(emulated_once: ModuleType) -> None:
    """Its rows are one row, that of the gradient of y.sum(0)."""
    layer = sk.SparseLinear.from_dense(torch.nn.Linear(64, 72).to(torch.bfloat16), format="sp24", prune=True)
    grads = {}
    for backend in ("cuda", "ref"):
        x = random_dense(9, 64).to(torch.bfloat16).requires_grad_()
        layer.backend = backend
        (layer(x).sum(0) * torch.arange(72, dtype=torch.bfloat16)).sum().backward()
        grads[backend] = x.grad
    assert_close(grads["cuda"], grads["ref"])


def test_a_tensor_map_of_overlapping_rows_is_refused(emulated_once: ModuleType) -> None:
    """By the emulator as by the driver, should a launcher ever ask for one."""
    if ON_CARD:
        pytest.skip("for the emulator")
    layout, x = weight(70, 64, torch.bfloat16), tokens(1, 64, torch.bfloat16).expand(130, 64)
    how, y = forced(0, 130, 70, 64, torch.bfloat16, workers=1, streamed=0), torch.empty(130, 70, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="do not overlap"):
        cuda._launch(how, cuda.packed(layout), 64, x, y, None, None, "none", None, None, 1.0, ())


def test_through_the_public_call(emulated: ModuleType) -> None:
    """sk.linear(backend="cuda"): forward and all gradients, batched and empty inputs."""
    dense = torch.randn(72, 96)
    w = sk.to_sparse_semi_structured(dense.to(torch.bfloat16), prune=True)
    x = torch.randn(2, 5, 96).to(torch.bfloat16)
    bias = torch.randn(72, dtype=torch.bfloat16)
    y = sk.linear(x, w, bias, "gelu", backend="cuda")
    assert_close(y, sk.linear(x, w, bias, "gelu", backend="ref"))
    assert sk.linear(x[:0], w, backend="cuda").shape == (0, 5, 72)
    layer = sk.SparseLinear.from_dense(torch.nn.Linear(96, 72).to(torch.bfloat16), format="sp24", prune=True)
    grads = {}
    for backend in ("cuda", "ref"):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        layer.backend = backend
        layer(given).float().square().sum().backward()
        grads[backend] = [given.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    assert len(grads["cuda"]) == 3
    for got, want in zip(grads["cuda"], grads["ref"], strict=True):
        assert_close(got, want)


def test_fp8_on_hopper_is_multiplied_by_wgmma(emulated_once: ModuleType, fp8_bounds: Fp8Bounds) -> None:
    """Of few tokens and of rows that TMA cannot take, too: they are copied."""
    for k in (128, 68, 33):
        layout, x = weight(70, k, FP8, scale=True), tokens(5, k + 3, FP8)[:, :k]
        y = cuda.mm(layout, x, None, "none", out_dtype=torch.float32)
        assert error(y, x.double() @ dense_of(layout).t()) < fp8_bounds.promoted
    kernels = cuda.kernels(CUDA_DTYPES[FP8])
    options = {"capability": 90, "processors": 132, "aligned": True, "fp8": True}
    assert {kernels[c.kernel].family for c in config.candidates(kernels, 1, 4096, 32, **options)} == {"mm_sm90"}


def test_fp8_sums_are_promoted(emulated_once: ModuleType, fp8_sums: None) -> None:
    """With the 14 bits that Hopper's and Ada's tensor cores keep of fp8 sums, an error that grows with K; without
    use_fast_accum the error does not, whatever the kernel."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for k in (512, 2048, 8192):
        layout, x = weight(64, k, FP8), tokens(8, k, torch.float32).abs().to(FP8)
        layout = layout.with_values(layout.values.float().abs().to(FP8))  # sums of one sign: truncation adds up
        want = x.double() @ dense_of(layout).t()
        for fast, found in errors.items():
            assert cuda.kernels(CUDA_DTYPES[FP8])[cuda.choice(layout, x, fast).kernel].accurate != fast
            y = cuda.mm(layout, x, None, "none", out_dtype=torch.float32, use_fast_accum=fast)
            found.append(error(y, want))
    assert errors[True][0] > 1e-3
    assert errors[True][1] > 1.5 * errors[True][0]
    assert errors[True][2] > 1.5 * errors[True][1]
    assert max(errors[False]) < 2e-4
    assert max(errors[False]) < 1.2 * errors[False][0]
    if not ON_CARD:  # mma.sp of e4m3 is of Ada: a card that has wgmma does not run it
        for number in (6, 8):
            how = forced(number, 8, 64, k, FP8, workers=2, streamed=1)
            y = cuda.mm(layout, x, None, "none", out_dtype=torch.float32, how=how)
            assert error(y, want) < 2e-4


def test_fast_accumulation_is_for_fp8_alone(device_module: ModuleType) -> None:
    for dtype in (1, 2, 3):
        assert all(config.Kernel(*row).accurate for row in device_module.sp24_kernels(dtype))
    fp8 = [config.Kernel(*row) for row in device_module.sp24_kernels(CUDA_DTYPES[FP8])]
    assert len(fp8) == KERNELS + PROMOTING
    for m in (1, 64, 500, 4096):
        options = {"processors": 132, "aligned": True, "fp8": True}
        hopper = config.candidates(fp8, m, 4096, 32, capability=90, **options)
        assert all(fp8[choice.kernel].accurate for choice in hopper)
        fast = config.candidates(fp8, m, 4096, 32, capability=90, fast_accum=True, **options)
        assert not fp8[fast[0].kernel].accurate
        ada = config.candidates(fp8, m, 4096, 32, capability=89, **options)
        assert ada == config.candidates(fp8, m, 4096, 32, capability=89, fast_accum=True, **options)


def test_fragments_follow_the_values(emulated: ModuleType) -> None:
    layout, x = weight(64, 64, torch.bfloat16), tokens(4, 64, torch.bfloat16)
    before = cuda.mm(layout, x, None, "none")
    kept = cuda.packed(layout).data_ptr()
    layout.values.mul_(2)
    assert torch.equal(cuda.mm(layout, x, None, "none"), before * 2)
    assert cuda.packed(layout).data_ptr() == kept  # renewed in place: a CUDA graph reads the new values


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (64, 64), (65, 132), (130, 36), (7, 520)])
def test_fragments_are_lossless(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layout = weight(*shape, dtype)
    packed = fragments.pack(layout)
    rows, blocks = -(-shape[0] // 64), -(-shape[1] // fragments.block_k(dtype))
    assert packed.shape == (rows, blocks, 4608 if dtype.itemsize == 2 else 5120)
    values, metadata = fragments.unpack(packed, shape, dtype)
    assert torch.equal(values.view(torch.uint8), layout.values.view(torch.uint8))
    assert torch.equal(metadata, layout.metadata)


def test_reasons(emulated: ModuleType) -> None:
    x = torch.randn(4, 64)
    assert "not torch.float32" in str(cuda.why_not("mm", weight(64, 64, torch.float32), x))
    half = weight(64, 64, torch.float16)
    assert "must agree" in str(cuda.why_not("mm", half, x.to(torch.bfloat16)))
    assert cuda.why_not("mm", half, x.half()) is None
    quantised = weight(64, 64, torch.int8, scale=True)
    assert "no kernel but mm" in str(cuda.why_not("mm_t", quantised, x.to(torch.int8)))
    with pytest.raises(ValueError, match="out_dtype must be one of"):
        cuda.mm(half, x.half(), None, "none", out_dtype=torch.int32)


@pytest.mark.skipif(not ON_CARD, reason="needs a GPU")
def test_calls_on_a_card_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain CUDA tensor is known as one (in and outside of inference mode), and autocast is noticed."""
    layout = weight(64, 64, torch.float16).map(lambda t: t.cuda())
    x, bias = torch.randn(4, 64, dtype=torch.float16, device="cuda"), torch.zeros(64, device="cuda")
    assert _library.unwatched(layout.values, x, bias)
    assert not _library.unwatched(layout.values, x, bias.cpu())
    with torch.inference_mode():
        assert _library.unwatched(layout.values, x.clone(), bias)
    with torch.autocast("cuda"):
        assert not _library.unwatched(layout.values, x, bias)
    want = sk.linear(x, layout, bias)
    monkeypatch.setitem(_library.MM, "sp24", None)
    assert torch.equal(sk.linear(x, layout, bias), want)


def test_without_a_card() -> None:
    x = torch.randn(4, 64, dtype=torch.float16)
    if not ON_CARD:
        assert cuda.why_not("mm", weight(64, 64, torch.float16), x) == "torch sees no CUDA device"
        w = sk.to_sparse_semi_structured(torch.randn(8, 64).half(), prune=True)
        with pytest.raises(NotImplementedError, match="has no such backend on cpu tensors"):
            sk.linear(x, w, backend="cuda")


@pytest.mark.parametrize("card", [80, 86, 89, 90, 100, 120])
def test_every_choice_is_legal(device_module: ModuleType, card: int) -> None:
    """A grid of shapes: there is always a choice, it fits the card, and its work is dealt out completely."""
    shared = config.SHARED[card] * 1024
    for dtype in (1, 3, *([CUDA_DTYPES[FP8]] if card in (89, 120) else [])):
        kernels = [config.Kernel(*row) for row in device_module.sp24_kernels(dtype)]
        for m in (1, 7, 16, 17, 64, 65, 128, 500, 2048, 16384):
            for n in (1, 64, 4096, 14336):
                for k_blocks in (1, 3, 64, 216):
                    for processors in (1, 24, 108, 132):
                        for aligned in (True, False):
                            options = {"capability": card, "processors": processors, "aligned": aligned}
                            found = config.candidates(kernels, m, n, k_blocks, **options)
                            assert found
                            for choice in found:
                                kernel = kernels[choice.kernel]
                                assert kernel.shared_bytes <= shared
                                assert kernel.family != "mm_sm90" or (card == 90 and aligned)
                                assert kernel.family != "decode" or m <= kernel.tokens
                                assert 1 <= choice.workers * kernel.cluster <= max(processors, kernel.cluster)
                                assert 0 <= choice.streamed <= choice.tiles
                                assert choice.tiles * kernel.rows * kernel.tokens >= n * m or kernel.family == "decode"


def test_choices_of_a_hopper(device_module: ModuleType) -> None:
    """Printed for the layers of the benches (run with -rP): few tokens decode, many take Hopper's own kernels."""
    for dtype in (torch.bfloat16, torch.int8, FP8):
        kernels = table(device_module, CUDA_DTYPES[dtype])
        for n, k in ((4096, 4096), (8192, 8192), (27648, 5120), (5120, 13824), (14336, 4096)):
            for m in (1, 4, 16, 64, 256, 512, 2048, 8192):
                given = {"capability": 90, "processors": 132, "aligned": True, "fp8": dtype == FP8}
                best = config.candidates(kernels, m, n, k // fragments.block_k(dtype), **given)[0]
                line = best.described(kernels)
                print(f"{dtype!s:20} {n:6} x {k:6} M={m:5}: {line}")
                family = kernels[best.kernel].family
                assert line.startswith(f"{best.kernel} {family} ")
                if dtype != FP8 and m <= 16 and n == k == 8192:
                    assert family == "decode"
                if m >= 256 or dtype == FP8:
                    assert family == "mm_sm90"


def table(module: ModuleType, dtype: int) -> list[config.Kernel]:
    return [config.Kernel(*row) for row in module.sp24_kernels(dtype)]


def test_clusters_that_are_there_at_once(device_module: ModuleType) -> None:
    """Of whole GPCs of 18 multiprocessors and one with the rest; nothing is lost to clusters of one or two."""
    for processors in (1, 2, 24, 78, 114, 132, 144):
        assert config.resident_clusters(processors, 1) == processors
        assert config.resident_clusters(processors, 2) == max(1, processors // 2)
        assert config.resident_clusters(processors, 4) * 4 <= max(4, processors)
    assert config.resident_clusters(132, 4) == 29
    assert config.resident_clusters(144, 4) == 32
    kernels = table(device_module, 1)
    for resident in (None, [132 // kernel.cluster - (kernel.cluster > 2) for kernel in kernels]):
        for m in (1, 65, 500, 2048, 16384):
            for n in (64, 4096, 14336):
                for k_blocks in (1, 3, 64):
                    options = {"capability": 90, "processors": 132, "aligned": True, "resident": resident}
                    for choice in config.candidates(kernels, m, n, k_blocks, **options):
                        kernel = kernels[choice.kernel]
                        most = config.resident_clusters(132, kernel.cluster)
                        if resident is not None:
                            most = resident[choice.kernel]
                        assert choice.workers <= most


def test_idle_processors_cost_time(device_module: ModuleType) -> None:
    """Fewer clusters at once, dearer tiles: kernels of larger clusters lose what they leave idle."""
    kernels = table(device_module, 1)
    options = {"capability": 90, "processors": 132, "aligned": True}
    whole = [132 // kernel.cluster for kernel in kernels]

    def best(resident: list[int], cluster: int) -> float:
        found = config.candidates(kernels, 4096, 8192, 128, **options, resident=resident)
        return min(c.cost for c in found if kernels[c.kernel].cluster == cluster)

    fewer = [29 if kernel.cluster == 4 else count for kernel, count in zip(kernels, whole, strict=True)]
    assert best(fewer, 4) > 1.05 * best(whole, 4)
    assert best(fewer, 2) == best(whole, 2)
    none = [0 if kernel.cluster == 4 else count for kernel, count in zip(kernels, whole, strict=True)]
    found = config.candidates(kernels, 4096, 8192, 128, **options, resident=none)
    assert {kernels[c.kernel].cluster for c in found} == {1, 2}, "a card that cannot hold one cluster is not asked to"


def test_a_card_is_asked_for_its_clusters(device_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each kernel with clusters, and only where the code for them is there."""
    asked: list[tuple[int, int]] = []

    def answer(dtype: int, number: int) -> int:
        asked.append((dtype, number))
        return 31

    built = SimpleNamespace(archs="90a", sp24_kernels=device_module.sp24_kernels, sp24_resident=answer)
    monkeypatch.setattr(cuda, "cuda", lambda: built)
    monkeypatch.setattr(_ext, "cuda", lambda: built)
    monkeypatch.setattr(cuda, "capability", lambda device: 90)
    monkeypatch.setattr(_ext, "capability", lambda device: 90)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    functions = (cuda._resident, cuda._choice, cuda.kernels, _ext.code_on)
    try:
        for function in functions:
            function.cache_clear()
        kernels = table(device_module, 1)
        wanted = tuple(31 if kernel.cluster > 1 else 132 for kernel in kernels)
        assert cuda._resident(1, 5) == cuda._resident(1, 5) == wanted
        assert asked == [(1, number) for number, kernel in enumerate(kernels) if kernel.cluster > 1]
        how = cuda._choice(1, 4096, 8192, 8192, 5, True, False, False)
        assert how.workers <= wanted[how.kernel]
        built.archs = "80,86"
        for function in functions:
            function.cache_clear()
        assert cuda._resident(1, 5) is None
        how = cuda._choice(1, 4096, 8192, 8192, 5, True, False, False)
        assert kernels[how.kernel].family == "mm_sm80"
        assert cuda._resident(1, -1) is None
    finally:
        for function in functions:
            function.cache_clear()


def test_code_for_a_card() -> None:
    """The last of its own generation, else PTX of the last that was built, which must not be newer than the card."""
    for card, archs, code in (
        (80, "80", 80), (86, "80", 80), (89, "80,86", 86), (89, "80,90a", 80), (90, "80,90a", 90), (90, "80,86,89", 89),
        (120, "80,86,89,90a", 90), (120, "100,120", 120), (103, "100", 100), (80, "86,90a", None), (90, "100", None),
        (90, "120,80", 80), (87, "80,86,89", 86), (121, "120", 120),
    ):  # fmt: skip
        assert _ext.code_for(card, archs) == code, (card, archs)


def test_fp8_is_refused_where_its_code_would_trap() -> None:
    """Which card, and which code it runs: PTX of another architecture may be all that was built."""
    runs = {(89, 89), (90, 90), (120, 89), (120, 120), (121, 120)}
    for card in (80, 86, 89, 90, 100, 103, 120, 121):
        for code in (arch for arch in config.SHARED if arch <= card):
            assert (config.why_not_fp8(card, code) is None) == ((card, code) in runs or (card == 121 and code == 89))
    assert "built for 89, and of this build it runs those for 80" in str(config.why_not_fp8(89, 80))
    assert "SPARSEKERN_CUDA_ARCHS=90a" in str(config.why_not_fp8(90, 80))
    assert "SPARSEKERN_CUDA_ARCHS=120" in str(config.why_not_fp8(120, 90))
    assert "tcgen05" in str(config.why_not_fp8(100, 100))


def test_reasons_ask_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, x = weight(64, 64, FP8), tokens(4, 64, FP8)
    monkeypatch.setattr(cuda, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(cuda, "capability", lambda device: 89)
    for code, reason in ((89, None), (80, "built for 89")):
        monkeypatch.setattr(cuda, "code_on", lambda device, code=code: code)
        got = cuda.why_not("mm", layout, x)
        assert got is None if reason is None else reason in str(got)
        assert cuda.why_not("mm", weight(64, 64, torch.float16), x.half()) is None


@pytest.mark.parametrize(("card", "code"), [(90, 80), (90, 89), (120, 90), (89, 80), (90, 86), (120, 100)])
def test_choices_follow_the_code(device_module: ModuleType, card: int, code: int) -> None:
    """No kernel of Hopper's without its code, and none that the code's architecture has no shared memory for."""
    kernels = table(device_module, 1)
    for m in (1, 16, 500, 4096):
        found = config.candidates(kernels, m, 4096, 64, capability=card, processors=132, aligned=True, code=code)
        assert found
        assert {kernels[choice.kernel].family for choice in found} <= {"mm_sm80", "decode"}
        most = max(kernels[choice.kernel].shared_bytes for choice in found)
        assert most <= 1024 * min(config.SHARED[code], config.SHARED[card])


def test_without_a_driver() -> None:
    """The compiled module loads on a machine without a GPU; its entries say what they need, whichever comes first."""
    module, reason = _ext._load_fitting("_cuda", "GPU", "nvcc")
    if module is None or torch.cuda.is_available():
        pytest.skip(reason or "there is a driver")
    assert len(module.sp24_kernels(3)) == KERNELS
    layout, x = weight(64, 64, torch.bfloat16), tokens(130, 64, torch.bfloat16)
    packed, y = fragments.pack(layout), torch.empty(130, 64, dtype=torch.bfloat16)
    with mock.patch.object(cuda, "cuda", return_value=module):
        for number in (0, 4, 6):
            how = forced(number, 130, 64, 64, torch.bfloat16, workers=1, streamed=0)
            with pytest.raises(RuntimeError, match=r"needs an NVIDIA driver for CUDA \d+\.\d+"):
                cuda._launch(how, packed, 64, x, y, None, None, "none", None, None, 1.0, ())
    if "90a" in module.archs:
        with pytest.raises(RuntimeError, match=r"needs an NVIDIA driver .* there is none here"):
            module.sp24_resident(1, 0)
