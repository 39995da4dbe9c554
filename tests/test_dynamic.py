"""2:4 training over a dense master weight: gradients, masks, autocast, compile, freezing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern._library import PRUNE, REMOVED
from sparsekern.nn import DynamicSparseLinear
from sparsekern.sp24.dynamic import MASKS
from sparsekern.sp24.pack import prune_mask, transposable_mask
from sparsekern.testing import assert_close, random_dense

MASK_OF = {"top2": prune_mask, "transposable": transposable_mask}
masks = pytest.mark.parametrize("mask", MASKS)


def made(mask: str, n: int = 12, k: int = 20, decay: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple:
    layer = DynamicSparseLinear(k, n, mask=mask, decay=decay, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random_dense(n, k, seed=1))
    return layer, random_dense(2, 3, k, dtype=dtype, seed=2)


def pruned(layer: DynamicSparseLinear) -> Tensor:
    weight = layer.weight.detach()
    return weight.where(MASK_OF[layer.mask](weight), 0)


@masks
@pytest.mark.parametrize("shape", [(12, 20), (7, 9), (64, 72)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_gradients(mask: str, shape: tuple[int, int], decay: float) -> None:
    """dW = dY^T X + decay * (W - S(W)) for every weight, dX = dY S(W)."""
    layer, x = made(mask, *shape, decay=decay)
    x.requires_grad_()
    dy = random_dense(2, 3, shape[0], seed=3)
    y = layer(x)
    y.backward(dy)
    kept, flat_x, flat_dy = pruned(layer), x.detach().flatten(0, 1).double(), dy.flatten(0, 1).double()
    assert_close(y, (flat_x @ kept.double().t() + layer.bias.double()).reshape(y.shape))
    expected = flat_dy.t() @ flat_x + decay * (layer.weight.detach() - kept).double()
    assert_close(layer.weight.grad, expected)
    assert_close(x.grad, (flat_dy @ kept.double()).reshape(x.shape))
    assert_close(layer.bias.grad, flat_dy.sum(0))


@masks
def test_the_mask_follows_the_weight(mask: str) -> None:
    layer, x = made(mask)
    for turn in range(3):
        with torch.no_grad():
            layer.weight.copy_(random_dense(12, 20, seed=10 + turn))
            expected = (x.double() @ pruned(layer).double().t()) + layer.bias.double()
            assert_close(layer(x), expected)
            assert layer.packed() is layer.packed(), "packed once for each state of the weight"
        assert_close(layer(x), expected)
    for row in range(0, 12, 4):
        assert int((pruned(layer)[row : row + 4] != 0).sum()) == 40


@masks
def test_a_tiny_model_learns(mask: str) -> None:
    """A 2:4 student reaches a 2:4 teacher whose mask it does not know."""
    teacher, x = made(mask, 16, 32)
    x = random_dense(256, 32, seed=4)
    target = x @ pruned(teacher).t()
    student = DynamicSparseLinear(32, 16, bias=False, mask=mask, decay=2e-3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(student(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


def test_decay_settles_the_removed_weights() -> None:
    layer, x = made("top2", decay=0.5)
    removed = layer.weight.detach() - pruned(layer)
    layer(x).sum().mul(0).backward()
    assert_close(layer.weight.grad, 0.5 * removed.double())


@masks
def test_autocast(mask: str) -> None:
    """Products in bfloat16, the gradient and its decay in the master's float32."""
    layer, x = made(mask, decay=2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().mul(0).backward()
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    rounded = layer.weight.detach().bfloat16()
    removed = layer.weight.detach().masked_fill(MASK_OF[mask](rounded), 0)
    assert_close(layer.weight.grad, 2e-4 * removed.double())
    kept = rounded.where(MASK_OF[mask](rounded), 0)
    expected = x.bfloat16().double() @ kept.double().t() + layer.bias.bfloat16().double()
    assert_close(y, expected, torch.bfloat16)


@masks
def test_compile(mask: str) -> None:
    layer, x = made(mask, decay=0.1)
    x.requires_grad_()
    eager = layer(x)
    eager.square().sum().backward()
    grads = [p.grad.clone() for p in (layer.weight, layer.bias, x)]
    for p in (layer.weight, layer.bias, x):
        p.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.square().sum().backward()
    assert torch.equal(compiled, eager)
    for p, expected in zip((layer.weight, layer.bias, x), grads, strict=True):
        assert_close(p.grad, expected.double())


def test_ops() -> None:
    w = random_dense(10, 12, seed=5)
    for mask in MASKS:
        torch.library.opcheck(PRUNE, (w, mask, None))
    torch.library.opcheck(REMOVED, (w, PRUNE(w, "top2", None)[1]))


def test_it_is_a_linear() -> None:
    """state_dict both ways, deepcopy, from_dense, repr."""
    layer, x = made("transposable")
    dense = nn.Linear(20, 12)
    dense.load_state_dict(layer.state_dict())
    twin = DynamicSparseLinear.from_dense(dense, mask="transposable")
    assert twin.weight is dense.weight
    assert twin.bias is dense.bias
    copied = copy.deepcopy(layer)
    for other in (twin, copied):
        assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        before = layer(x)
        copied.weight.zero_()
        assert torch.equal(copied(x), copied.bias.expand(2, 3, 12))
        assert torch.equal(layer(x), before)
    assert "mask='transposable'" in repr(layer)


@masks
@pytest.mark.parametrize("policy", ["always", "measured"])
def test_convert_freezes_it(mask: str, policy: str) -> None:
    layer, x = made(mask, 32, 64)
    model = nn.Sequential(layer, nn.ReLU())
    with torch.no_grad():
        expected = model(x)
    report = sk.convert_(model, format="sp24", policy=policy, min_speedup=1e-6, progress=False, cache=False)
    assert isinstance(model[0], sk.SparseLinear), report
    assert "mask frozen" in report.rows[0].reason
    with torch.no_grad():
        assert_close(model(x), expected.double())
        assert torch.equal(model[0].dense_weight(), pruned(layer))
        assert_close(layer.to_sparse()(x), layer(x).double())
    back = sk.to_dense_(model)
    assert isinstance(back[0], DynamicSparseLinear)
    assert back[0].mask == mask
    with torch.no_grad():
        assert_close(back(x), expected.double())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="mask must be one of top2, transposable"):
        DynamicSparseLinear(8, 8, mask="top3")
    with pytest.raises(ValueError, match="decay must be a number of at least 0"):
        DynamicSparseLinear(8, 8, decay=-1.0)
    layer, x = made("top2")
    with pytest.raises(ValueError, match="K = 20"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match="cast one of them"):
        layer(x.bfloat16())
    with pytest.raises(TypeError, match="dense"):
        sk.dynamic_linear(None, layer.weight)  # type: ignore[arg-type]
