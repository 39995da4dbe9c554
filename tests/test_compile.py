"""torch.library, torch.compile, torch.export: every op and format, dynamic token counts, fresh processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from cases import FOUR, QUANTISED, Case, param
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import testing
from sparsekern._library import MM, MM_T, SDDMM
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.testing import assert_close, random_dense, reference_mm

N, K = 20, 30
STRICT = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6 cannot export an autograd.Function strictly with a dynamic size",
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def activations(m: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "contiguous": random_dense(m, width, dtype=dtype, seed=1),
        "permuted": random_dense(width, m, dtype=dtype, seed=1).t(),
        "sliced": random_dense(m, width + 5, dtype=dtype, seed=1)[:, 2 : 2 + width],
        "empty": random_dense(0, width, dtype=dtype, seed=1),
    }


@param(FOUR)
@pytest.mark.parametrize("strides", ["contiguous", "permuted", "sliced", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case: Case, strides: str, dtype: torch.dtype) -> None:
    """Schema, autograd, fake against real (shape, type, strides) and AOT dispatch, static and dynamic."""
    packed = case.pack(case.dense(N, K, dtype))
    format, (values, index, scale, dims) = packed.format, packed.parts
    x, dy = activations(5, K, dtype)[strides], activations(5, N, dtype)[strides]
    weight = (values, list(index), scale, list(dims))
    bias = random_dense(N, dtype=dtype)
    torch.library.opcheck(MM[format], (*weight, x, bias, "gelu", None))
    torch.library.opcheck(MM[format], (*weight, x, None, "none", "ref"))
    torch.library.opcheck(MM_T[format], (*weight, dy, None))
    torch.library.opcheck(SDDMM[format], (*weight, dy, x, None))


@param(QUANTISED[:3])
def test_opcheck_int8(case: Case) -> None:
    packed = case.pack(case.dense(N, K, torch.int8), testing.random_scale(N))
    format, (values, index, scale, dims) = packed.format, packed.parts
    weight = (values, list(index), scale, list(dims))
    for dtype in (torch.int8, torch.float32):
        x = random_dense(5, K, dtype=dtype)
        torch.library.opcheck(MM[format], (*weight, x, random_dense(N), "relu", None))


@param(FOUR)
def test_compile_functions(case: Case) -> None:
    """linear and matmul on a SparseTensor, whole graphs, one graph for every number of tokens."""
    dense = case.dense(N, K)
    w = sk.SparseTensor(case.pack(dense))
    bias = random_dense(N, seed=3)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    linear = torch.compile(lambda x: sk.linear(x, w, bias, "silu"), fullgraph=True, backend=frames, dynamic=True)
    for m in (5, 2, 33, 7):
        x = random_dense(m, K, seed=m)
        assert_close(linear(x), reference_mm(dense, x, bias, "silu"), torch.float32)
    assert frames.frame_count == 1, "another number of tokens must not compile again"
    more = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with_residual = torch.compile(
        lambda x, r: sk.linear(x, w, residual=sk.linear(x, w, residual=r), beta=0.5),
        fullgraph=True, backend=more, dynamic=True,
    )  # fmt: skip
    for m in (5, 2, 33):
        x, r = random_dense(m, K, seed=m), random_dense(m, N, seed=m + 1)
        want = 1.5 * reference_mm(dense, x).double() + 0.5 * r
        assert_close(with_residual(x, r), want, torch.float32)
    assert more.frame_count == 1
    products = torch.compile(
        lambda x, y: (sk.matmul(y, w), w @ x.transpose(-1, -2), w.t() @ y.transpose(-1, -2)),
        fullgraph=True,
        backend="aot_eager",
    )
    x, y = random_dense(3, 4, K, seed=1), random_dense(3, 4, N, seed=2)
    wide = dense.double()
    right = (y.double() @ wide, wide @ x.double().mT, wide.t() @ y.double().mT)
    for out, ref in zip(products(x, y), right, strict=True):
        assert_close(out, ref, torch.float32)


@param(FOUR)
def test_compile_training_step(case: Case) -> None:
    """Forward and backward of a small model in one graph each; gradients as in eager mode."""
    torch.manual_seed(0)
    first = SparseLinear.from_packed(case.pack(case.dense(N, K)), torch.zeros(N))
    model = nn.Sequential(first, nn.ReLU(), nn.LayerNorm(N), nn.Linear(N, 3))
    x = random_dense(2, 4, K, seed=1)
    eager = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(model.parameters())), eager, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(" " in torch.__file__, reason="inductor does not quote torch's own path for the compiler")
def test_inductor() -> None:
    """The default backend of torch.compile, forward and backward."""
    case = Case("csr")
    dense = case.dense(N, K)
    module = SparseLinear.from_packed(case.pack(dense), torch.zeros(N))
    model = torch.compile(nn.Sequential(module, nn.GELU()), fullgraph=True)
    x = random_dense(6, K, seed=1).requires_grad_()
    y = model(x)
    assert_close(y, reference_mm(dense, x.detach(), None, "gelu"), torch.float32, tol=1e-5)
    y.sum().backward()
    x64 = x.detach().double().requires_grad_()
    nn.functional.gelu(x64 @ dense.double().t()).sum().backward()
    assert_close(x.grad, x64.grad, torch.float32, tol=1e-5)
    assert module.values.grad is not None


def saved(program: torch.export.ExportedProgram, folder: Path) -> nn.Module:
    """What a program computes after it was written and read."""
    torch.export.save(program, folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


@param(FOUR)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "inside"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_export(case: Case, alone: bool, bias: bool, tmp_path: Path) -> None:
    """torch.export with a dynamic number of tokens; the program, also saved and loaded, against eager."""
    weight = case.pack(case.dense(N, K))
    layer = SparseLinear.from_packed(weight, random_dense(N, seed=3) if bias else None, "relu")
    module = layer if alone else nn.Sequential(layer)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    x = random_dense(4, K)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},), strict=False)
    assert any(f"sparsekern.{case.format}_mm" in str(node.target) for node in program.graph.nodes)
    loaded = saved(program, tmp_path)
    for m in (4, 9, 130):
        x = random_dense(m, K, seed=m)
        assert torch.equal(program.module()(x), module(x))
        assert torch.equal(loaded(x), module(x))


@param(FOUR)
@pytest.mark.parametrize("strict", [pytest.param(True, marks=STRICT), False], ids=["strict", "not strict"])
def test_export_of_batched_tokens(case: Case, strict: bool) -> None:
    """Both leading dimensions [batch, tokens, K] may change."""
    layer = SparseLinear.from_packed(case.pack(case.dense(N, K)), random_dense(N, seed=3))
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(
        layer, (random_dense(6, 4 * K).reshape(6, 4, K),), dynamic_shapes=({0: batch, 1: tokens},), strict=strict
    )
    for b, m in ((6, 4), (2, 7), (1, 33)):
        x = random_dense(b * m, K, seed=m).reshape(b, m, K)
        assert torch.equal(program.module()(x), layer(x))


@param(FOUR)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("geometry", [(3, 1, 1), (1, 1, 0), (3, 2, 1)], ids=["3x3", "1x1", "stride 2"])
def test_export_conv(case: Case, bias: bool, geometry: tuple[int, int, int], tmp_path: Path) -> None:
    """A SparseConv2d as the root module, with any number of images; names of buffers must be ones a graph may have."""
    kernel, stride, padding = geometry
    conv = nn.Conv2d(8, 12, kernel, stride, padding, bias=bias)
    conv.weight = nn.Parameter(case.dense(12, 8 * kernel**2).view(12, 8, kernel, kernel))
    layer = SparseConv2d.from_dense(conv, format=case.format, block_size=case.block)
    images = torch.export.Dim("images", min=1, max=64)
    x = random_dense(2, 240).reshape(2, 8, 6, 5)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: images},), strict=False)
    assert any(f"sparsekern.{case.format}_conv2d" in str(node.target) for node in program.graph.nodes)
    loaded = saved(program, tmp_path)
    for count in (2, 1, 5):
        x = random_dense(count, 240, seed=count).reshape(count, 8, 6, 5)
        assert torch.equal(program.module()(x), layer(x))
        assert torch.equal(loaded(x), layer(x))


def test_a_saved_program_runs_where_sparsekern_is_imported(tmp_path: Path) -> None:
    """In another process, which knows the ops but not the module's class instance."""
    layer = SparseLinear.from_packed(Case("csr").pack(Case("csr").dense(N, K)), random_dense(N, seed=3))
    x = random_dense(4, K)
    torch.export.save(torch.export.export(layer, (x,), strict=False), tmp_path / "model.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "example.pt")
    code = (
        "import torch, sparsekern\n"
        "x, y = torch.load('example.pt')\n"
        "assert torch.equal(torch.export.load('model.pt2').module()(x), y)\n"
    )
    root = str(Path(sk.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_says_what_to_do(kind: str, dynamo: bool) -> None:
    """ONNX has no sparse weights: either exporter ends with the way out, and that way works."""
    pytest.importorskip("onnxscript")
    module = nn.Linear(K, N) if kind == "linear" else nn.Conv2d(8, 12, 3)
    model = nn.Sequential(module, nn.ReLU()).eval()
    x = random_dense(4, K) if kind == "linear" else random_dense(2, 240).reshape(2, 8, 6, 5)
    sk.convert_(model, format="csr", policy="always", progress=False)
    with pytest.raises(Exception, match=r"ONNX has no product with a csr weight: .*to_dense_"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo)
    sk.to_dense_(model)
    torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo)


FIRST = """
import torch, sparsekern as sk
from sparsekern.nn import SparseLinear
torch.set_num_threads(1)
dense = torch.nn.Linear(32, 16)
module = SparseLinear.from_dense(dense, format="{format}", **{options})
x = torch.randn(5, 32)
y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
torch.testing.assert_close(y, dense(x))
y.sum().backward()
"""


@pytest.mark.parametrize(("format", "options"), [("bsr", {"block_size": 4}), ("csr", {})])
def test_compile_is_the_first_thing_a_process_does(format: str, options: dict[str, int]) -> None:
    """Nothing may be loaded or built lazily in a way that a trace cannot survive."""
    code = FIRST.format(format=format, options=options)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_warm_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: what Python costs on a warm call (run with -s)."""
    lines = []
    for case in FOUR:
        module = SparseLinear.from_packed(case.pack(case.dense(16, 16)), torch.zeros(16))
        x = random_dense(1, 16)
        with torch.no_grad():
            times = testing.measure(
                {"layer": lambda: module(x), "dense": lambda: nn.functional.linear(x, x.expand(16, 16))},  # noqa: B023
                repeats=300,
            )
        lines.append(f"{case}: SparseLinear {times['layer']}, F.linear {times['dense']}")
    with capsys.disabled():
        print("\nwarm call, 16 x 16, one token\n" + "\n".join(lines))
