"""Convolution with sparse weights: every geometry against torch in float64, the module's habits, refusals."""

from __future__ import annotations

import copy
import io
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekern as sk
from sparsekern import _ext
from sparsekern.conv import Geometry, library, matrix_of, weight_of
from sparsekern.formats import FORMATS
from sparsekern.functional import conv2d
from sparsekern.nn import SparseConv2d, WeightSparseConv2d, dense_state_dict
from sparsekern.sp24.pack import prune_mask
from sparsekern.testing import (
    TOLERANCE,
    assert_close,
    generator,
    guarded,
    host_isa,
    pack,
    poisoned,
    random_dense,
    random_weight,
    relative_error,
    threads,
)

COMPILED = _ext.why_not_host() is None
ISAS = [i for i in _ext.host().built_isas() if i in _ext.host().supported_isas()] if COMPILED else []
BACKENDS = ["ref"] + (["host"] if COMPILED else [])
LAST = torch.channels_last


def pruned(
    shape: tuple[int, ...], order: str = "crs", density: float = 0.5, seed: int = 0, format: str = "csr"
) -> Tensor:
    """A weight [O, C, kh, kw] with zeros that `format` can store in this K order."""
    made = torch.randn(*shape, generator=generator(seed))
    matrix = matrix_of(made, order)
    if format == "sp24":
        matrix = matrix * prune_mask(matrix)
    elif format == "bsr":
        n, k = matrix.shape
        keep = torch.rand(-(-n // 4), -(-k // 4), generator=generator(seed + 1)) < density
        matrix = matrix * keep.repeat_interleave(4, 0).repeat_interleave(4, 1)[:n, :k]
    else:
        matrix = matrix * (torch.rand(matrix.shape, generator=generator(seed + 1)) < density)
    return weight_of(matrix, (shape[2], shape[3]), order)


def layout(weight: Tensor, format: str, order: str = "crs") -> sk.Layout:
    matrix = matrix_of(weight, order)
    return FORMATS[format].pack(matrix, (4, 4)) if format == "bsr" else FORMATS[format].pack(matrix)


def images(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 5) -> Tensor:
    x = torch.randn(*shape, generator=generator(seed)).to(dtype)
    return x.to(memory_format=LAST) if last else x


def check(weight: Tensor, x: Tensor, format: str, order: str, backend: str, bias: bool = True, **how: object) -> None:
    """Forward and all gradients of one convolution against torch's dense one in float64."""
    dtype, packed = x.dtype, layout(weight, format, order).to(dtype=x.dtype)
    kernel = tuple(weight.shape[2:])
    dense = weight_of(packed.to_dense(), kernel, order).double().requires_grad_()
    b = images(weight.shape[0], dtype=dtype, seed=9) if bias else None
    x64, b64 = x.double().requires_grad_(), None if b is None else b.double().requires_grad_()
    ref = functional.conv2d(x64, dense, b64, **how)
    call = {"backend": backend, "kernel_size": kernel, "order": order, **how}
    with torch.no_grad(), poisoned():
        y = conv2d(x, packed, b, **call)
        relu = conv2d(x, packed, b, activation="relu", **call)
    assert_close(y, ref, dtype)
    assert_close(relu, ref.relu(), dtype)
    assert (
        y.is_contiguous(
            memory_format=LAST if x.is_contiguous(memory_format=LAST) and x.shape[1] > 1 else torch.contiguous_format
        )
        or y.shape[1] == 1
        or y.shape[2:] == (1, 1)
    )

    dy = torch.randn(ref.shape, generator=generator(7)).to(dtype)
    if x.is_contiguous(memory_format=LAST):
        dy = dy.to(memory_format=LAST)
    grads = torch.autograd.grad(ref, [x64, dense] + ([b64] if bias else []), dy.double())
    values = packed.values.detach().clone().requires_grad_()
    leaf = x.detach().clone().requires_grad_()
    leaf_b = None if b is None else b.clone().requires_grad_()
    operand = packed.with_values(values)
    with poisoned():
        out = conv2d(leaf, operand, leaf_b, **call)
        out.backward(dy)
    loose = 4 * TOLERANCE[dtype]
    assert_close(leaf.grad, grads[0], dtype, tol=loose)
    assert_close(values.grad, packed.sample(matrix_of(grads[1], order)), dtype, tol=loose)
    if bias:
        assert_close(leaf_b.grad, grads[2], dtype, tol=loose)


GEOMETRIES = [
    # kernel, channels in, out, groups, stride, padding, dilation, height, width
    ((1, 1), 16, 24, 1, 1, 0, 1, 14, 14),
    ((1, 1), 7, 9, 1, 2, 0, 1, 13, 9),
    ((1, 1), 6, 8, 2, 1, 1, 1, 5, 5),
    ((3, 3), 16, 24, 1, 1, 1, 1, 14, 14),
    ((3, 3), 5, 33, 1, 1, 0, 1, 28, 31),
    ((3, 3), 8, 12, 4, 1, 1, 1, 9, 17),
    ((3, 3), 6, 6, 6, 1, 1, 1, 10, 10),
    ((3, 3), 4, 8, 4, 2, 1, 1, 11, 12),
    ((3, 3), 8, 8, 1, 2, 1, 1, 15, 15),
    ((3, 3), 8, 8, 1, 1, 2, 2, 12, 12),
    ((3, 3), 8, 8, 1, (2, 3), (3, 0), (2, 1), 17, 19),
    ((5, 5), 3, 8, 1, 1, 2, 1, 20, 20),
    ((5, 5), 4, 4, 1, 2, 4, 1, 7, 6),
    ((1, 3), 8, 8, 1, 1, (0, 1), 1, 6, 40),
    ((3, 1), 8, 8, 1, (1, 2), (1, 0), 1, 40, 6),
    ((7, 7), 3, 16, 1, 2, 3, 1, 31, 33),
    ((4, 4), 3, 16, 1, 4, 0, 1, 16, 20),
    ((2, 2), 4, 4, 1, 3, 0, 1, 10, 11),
    ((3, 3), 4, 8, 1, 1, 1, 1, 1, 1),
    ((3, 3), 2, 4, 1, 1, 5, 1, 3, 2),
    ((3, 3), 64, 40, 1, 1, 1, 1, 10, 10),
    ((1, 1), 300, 20, 1, 1, 0, 1, 4, 40),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda c: "k{}x{}c{}o{}g{}s{}p{}d{}i{}x{}".format(*c[0], *c[1:]))
def test_geometries(case, last, backend):
    kernel, c, o, groups, stride, padding, dilation, h, w = case
    for order in ("crs", "rsc"):
        weight = pruned((o, c // groups, *kernel), order)
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        check(weight, images(2, c, h, w, last=last), "csr", order, backend, **how)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(isa, dtype):
    with host_isa(isa):
        for last, (c, o, kernel, stride) in itertools.product(
            (False, True), [(16, 20, 3, 1), (20, 33, 3, 2), (70, 40, 1, 1), (9, 8, 5, 1)]
        ):
            weight = pruned((o, c, kernel, kernel))
            check(
                weight,
                images(3, c, 15, 13, dtype=dtype, last=last),
                "csr",
                "crs",
                "host",
                stride=stride,
                padding=kernel // 2,
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", list(FORMATS))
def test_formats(format, backend):
    for order, (o, c, kernel, groups), dtype in itertools.product(
        ("crs", "rsc"),
        [(10, 12, 3, 1), (16, 8, 3, 2), (5, 3, 1, 1), (7, 7, 3, 1)],
        (torch.float32, torch.bfloat16),
    ):
        weight = pruned((o, c // groups, kernel, kernel), order, format=format)
        check(weight, images(2, c, 9, 8, dtype=dtype), format, order, backend, padding=1, groups=groups)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_threads_and_densities(count, density):
    with threads(count):
        check(pruned((64, 64, 3, 3), density=density), images(1, 64, 30, 30), "csr", "crs", "host", padding=1)
        check(pruned((48, 32, 3, 3), density=density), images(9, 32, 7, 7), "csr", "crs", "host", padding=1)
        check(
            pruned((96, 1, 3, 3), density=density),
            images(4, 96, 33, 33),
            "csr",
            "crs",
            "host",
            padding=1,
            groups=96,
        )


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_same_bits_every_time():
    weight, x = layout(pruned((64, 32, 3, 3)), "csr"), images(4, 32, 20, 20)
    outs = [conv2d(x, weight, padding=1, backend="host") for _ in range(4)]
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_reads_and_writes_nothing_outside():
    for dtype, kernel in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 3)):
        weight = layout(pruned((10, 6, kernel, kernel)), "csr").to(dtype=dtype)
        x, b = guarded(images(2, 6, 11, 13, dtype=dtype)), guarded(images(10, dtype=dtype))
        with poisoned():
            y = conv2d(x.tensor, weight, b.tensor, padding=kernel // 2, backend="host")
        assert torch.isfinite(y).all()
        x.check()
        b.check()


@pytest.mark.parametrize("format", list(FORMATS))
def test_gradcheck(format):
    packed = layout(pruned((4, 4, 2, 3), format=format), format).to(dtype=torch.float64)
    x = images(2, 4, 5, 6, dtype=torch.float64).requires_grad_()
    b = images(4, dtype=torch.float64).requires_grad_()

    def call(x, values, b):
        return conv2d(x, packed.with_values(values), b, stride=(2, 1), padding=1, kernel_size=(2, 3), activation="silu")

    # Padded places of a block or group take no gradient, so only the others are free to move.
    live = packed.sample(torch.ones(packed.shape, dtype=torch.float64))
    values = packed.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v, b: call(x, v * live, b), (x, values, b))


# Modules --------------------------------------------------------------------------------------------------


def twin(format: str = "csr", order: str = "auto", **how: object) -> tuple[nn.Conv2d, SparseConv2d]:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, 3, **how)
    with torch.no_grad():
        dense.weight.copy_(pruned(tuple(dense.weight.shape), "crs" if order == "auto" else order, format=format))
    return dense, SparseConv2d.from_dense(dense, format=format, order=order, block_size=4)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"], ids=str)
def test_padding_modes(mode, padding):
    dense, sparse = twin(padding=padding, padding_mode=mode, dilation=2)
    for x in (images(2, 8, 9, 11), images(2, 8, 9, 11, last=True), images(8, 9, 11)):
        torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-4)


def test_same_with_an_even_kernel():
    dense = nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(3, 1))
    sparse = SparseConv2d.from_dense(dense)
    x = images(2, 3, 9, 8)
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-4)


def test_memory_formats_are_kept():
    dense, sparse = twin(padding=1, stride=2)
    for x in (images(2, 8, 9, 11), images(2, 8, 9, 11, last=True), images(4, 16, 9, 22)[::2, ::2, :, ::2]):
        assert sparse(x).stride() == dense(x).stride() or not x.is_contiguous()
        torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_pointwise(last):
    dense = nn.Conv2d(20, 30, 1)
    sparse = SparseConv2d.from_dense(dense, format="sp24", prune=True)
    x = images(2, 20, 6, 5, last=last)
    y = sparse(x)
    assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    torch.testing.assert_close(y, sparse.to_dense()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", list(FORMATS))
def test_no_images(format):
    dense, sparse = twin(format)
    x = images(0, 8, 9, 11).requires_grad_()
    y = sparse(x)
    assert y.shape == dense(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not sparse.values.grad.any()


def test_both_orders_are_recognised():
    for order in ("crs", "rsc"):
        dense = nn.Conv2d(8, 12, 3)
        with torch.no_grad():
            dense.weight.copy_(pruned((12, 8, 3, 3), order, format="sp24"))
        sparse = SparseConv2d.from_dense(dense, format="sp24")
        assert sparse.order == order
        torch.testing.assert_close(sparse.dense_weight(), dense.weight.detach())
    with pytest.raises(ValueError, match=r"order crs: .*row 0, group 0.*order rsc: .*row 0, group 0"):
        SparseConv2d.from_dense(nn.Conv2d(8, 12, 3), format="sp24")
    blocks = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        blocks.weight.copy_(pruned((16, 16, 3, 3), "rsc", format="bsr", density=0.2))
    assert SparseConv2d.from_dense(blocks, format="bsr", block_size=4).order == "rsc"


@pytest.mark.parametrize("format", list(FORMATS))
def test_to_dense_is_exact(format):
    dense, sparse = twin(format, groups=2, stride=2, padding=1, bias=format != "csr")
    back = sparse.eval().to_dense()
    assert torch.equal(back.weight, dense.weight)
    assert back.bias is sparse.bias
    assert repr(back) == repr(dense)
    assert not back.training


@pytest.mark.parametrize("format", list(FORMATS))
def test_checkpoints(format):
    dense, sparse = twin(format, order="rsc")
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    other = SparseConv2d(8, 12, 3, format=format, block_size=4, density=1.0)  # order crs until it reads the file
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.order == "rsc"
    x = images(1, 8, 7, 7)
    assert torch.equal(other(x), sparse(x))
    again = SparseConv2d(8, 12, 3, format=format, block_size=4, order="rsc")
    again.load_state_dict(dense.state_dict())
    torch.testing.assert_close(again(x), dense(x), atol=1e-5, rtol=1e-4)
    state = dense_state_dict(nn.Sequential(sparse))
    assert set(state) == {"0.weight", "0.bias"}
    assert torch.equal(state["0.weight"], dense.weight)
    with pytest.raises(RuntimeError, match="expected"):
        again.load_state_dict(nn.Conv2d(8, 12, 5).state_dict())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("format", list(FORMATS))
def test_training_follows_the_dense_twin(format, optimizer):
    dense, sparse = twin(format, padding=1)
    sparse.bias = nn.Parameter(dense.bias.detach().clone())
    mask = weight_of(sparse.packed.with_values(torch.ones_like(sparse.values)).to_dense(), (3, 3), sparse.order)
    steps = [optimizer(m.parameters(), lr=0.01) for m in (dense, sparse)]
    for step in range(3):
        x = images(2, 8, 6, 6, seed=step)
        for module, opt in zip((dense, sparse), steps, strict=True):
            opt.zero_grad()
            module(x).square().mean().backward()
            if module is dense:
                module.weight.grad *= mask
            opt.step()
        with torch.no_grad():
            dense.weight *= mask
    torch.testing.assert_close(sparse.dense_weight().detach(), dense.weight.detach(), atol=1e-5, rtol=1e-4)


def test_copies_and_casts():
    _, sparse = twin()
    x = images(1, 8, 7, 7)
    clone = copy.deepcopy(sparse)
    with torch.no_grad():
        clone.values.zero_()
    assert sparse(x).abs().sum() > clone(x).abs().sum()
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, sparse(x)) < 1e-2


@pytest.mark.parametrize("last", [False, True])
def test_compile(last):
    dense, sparse = twin(padding=1)
    model = nn.Sequential(sparse, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(2, 8, 9, 11, last=last).requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, dense(x).relu(), atol=1e-5, rtol=1e-4)
    y.sum().backward()
    assert sparse.values.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(x).relu(), atol=1e-5, rtol=1e-4)


def test_opcheck():
    from sparsekern.conv.library import CONV2D, CONV2D_INPUT, CONV2D_WEIGHT

    for format in FORMATS:
        packed = layout(pruned((8, 4, 3, 3), format=format), format)
        geometry = [3, 3, 2, 1, 1, 1, 1, 1, 0, 2, 1, 0]
        x = images(2, 4, 7, 8)
        weight = packed.parts
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(CONV2D[format], (*weight, x, None, geometry, "none", None), test_utils=tests)
        y = CONV2D[format](*weight, x, None, geometry, "none", None)
        torch.library.opcheck(CONV2D_INPUT[format], (*weight, y, geometry, 7, 8, None), test_utils=tests)
        torch.library.opcheck(CONV2D_WEIGHT[format], (*weight, y, x, geometry, None), test_utils=tests)


def test_functional_conv2d_takes_a_sparse_weight():
    dense, _ = twin(padding=1, stride=2)
    w = sk.to_csr(dense.weight.detach().flatten(1))
    x = images(2, 8, 9, 9)
    torch.testing.assert_close(functional.conv2d(x, w, dense.bias, stride=2, padding=1), dense(x), atol=1e-5, rtol=1e-4)


# Refusals -------------------------------------------------------------------------------------------------


def test_inputs_of_sparse_activation_libraries_are_refused():
    assert WeightSparseConv2d is SparseConv2d
    _, sparse = twin()
    spconv_like = SimpleNamespace(features=torch.randn(5, 8), indices=torch.zeros(5, 3), spatial_shape=[4, 4])
    for bad in (spconv_like, [1, 2], None):
        with pytest.raises(TypeError, match=r"weights are sparse and its activations dense.*spconv"):
            sparse(bad)
    with pytest.raises(TypeError, match="activations dense"):
        sparse(sk.to_csr(torch.eye(4)))
    with pytest.raises(ValueError, match="activations dense"):
        sparse(torch.zeros(1, 8, 5, 5).to_sparse())


def test_bad_arguments():
    _, sparse = twin()
    w, x = layout(pruned((8, 4, 3, 3)), "csr"), images(1, 4, 8, 8)
    for call, message in (
        (lambda: sparse(images(8, 8)), r"\[B, C, H, W\]"),
        (lambda: sparse(images(1, 7, 8, 8)), "does not fit 7 channels"),
        (lambda: sparse(images(1, 8, 2, 8)), "smaller than"),
        (lambda: sparse(images(1, 8, 8, 8).double()), "float64"),
        (lambda: conv2d(x, w, stride=0), "stride must be"),
        (lambda: conv2d(x, w, padding=-1), "padding must be"),
        (lambda: conv2d(x, w, padding="some"), "'same' or 'valid'"),
        (lambda: conv2d(x, w, padding="same", stride=2), "needs stride 1"),
        (lambda: conv2d(x, w, dilation=(1, 2, 3)), "dilation must be"),
        (lambda: conv2d(x, w, groups=3), "groups must divide"),
        (lambda: conv2d(x, w, order="src"), "order must be"),
        (lambda: conv2d(x, w, kernel_size=(3, 2)), "K must be"),
        (lambda: conv2d(x, w, bias=torch.zeros(9)), r"bias must have shape \[N = 8\]"),
        (lambda: conv2d(x, w, activation="tanh"), "activation must be"),
        (lambda: SparseConv2d(4, 8, 3, format="coo"), "format must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match=r"'host' cannot run csr_conv2d.*float64"):
        conv2d(x.double(), w.to(dtype=torch.float64), backend="host")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("format", ["sp24", "bsr"])
def test_quantised_weights_have_no_compiled_convolution(format: str, dtype: torch.dtype) -> None:
    """Every compiled backend says so, and plain torch runs them."""
    from sparsekern.prune import quantised

    q = quantised(random_weight(format, 32, 288, block=16), dtype)
    layout = pack(format, q.values, 16, q.scale)
    x, g = random_dense(1, 32, 5, 5), Geometry(3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    for backend in ("host", "triton"):
        if backend == "triton" and format == "sp24":
            continue
        reason = library.why_not(backend, "conv2d", layout, x, g)
        if reason is not None and "no such backend" not in reason and "missing" not in reason:
            assert "convolution weights are not supported" in reason
        else:
            assert reason is not None
    y = conv2d(x, layout, padding=1, kernel_size=3, order="rsc")
    right = nn.functional.conv2d(x.double(), weight_of(layout.to_dense().double(), (3, 3), "rsc"), padding=1)
    assert_close(y, right)
