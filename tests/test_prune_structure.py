"""Channels, heads, layers: the smaller model computes what the masked one does; groups hold what belongs together."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import prune
from sparsekern.prune import Channels, Heads, Layers


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """conv-bn-relu-conv-bn with a shortcut, a 1x1 convolution where the width changes."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b)
        self.short = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8, 8), Residual(8, 16), Residual(16, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1), 1))


class SelfAttention(nn.Module):
    """As transformers' BERT writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        size = (b, t, self.num_attention_heads, self.attention_head_size)
        q, k, v = (part(x).view(size).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size), -1) @ v
        return mixed.transpose(1, 2).reshape(b, t, self.all_head_size)


class Output(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(inside, outside), nn.LayerNorm(outside)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self, self.output = SelfAttention(width, heads), Output(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x), x)


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), Output(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.down(F.gelu(self.up(x)), x)


class Bert(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, width), nn.Parameter(torch.randn(1, 6, width))
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Mixer(nn.Module):
    """Residuals through a layer norm that sees every channel; no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.scale = nn.Parameter(torch.rand(12))
        self.final, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        x = x + self.down(F.gelu(self.up(self.norm(x)))) * self.scale
        return self.head(self.final(x))


class Gated(nn.Module):
    """Depthwise and grouped convolutions, a squeeze-and-excite gate, concatenation, flatten before a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.depth = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(20, 12, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.flat, self.head = nn.Flatten(), nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.depth(F.relu(self.a(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(a.mean((2, 3), keepdim=True)))))
        both = torch.cat((a * gate, self.b(x)), 1)
        return self.head(self.flat(F.max_pool2d(F.relu(self.norm(self.grouped(both))), 2)))


def settled(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Batch norms with statistics and scales of their own."""
    torch.manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for x in inputs:
            model(x)
    return model.eval()


CASES: dict[str, tuple[Any, Tensor]] = {
    "resnet": (ResNet, rand(2, 3, 8, 8)),
    "bert": (Bert, torch.arange(12).reshape(2, 6) % 11),
    "mixer": (Mixer, rand(4, 5, 6)),
    "gated": (Gated, rand(2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("per", ["layer", "global"])
@pytest.mark.parametrize("over", ["producers", "group"])
def test_the_smaller_model_equals_the_masked_one(name: str, per: str, over: str) -> None:
    make, x = CASES[name]
    model = settled(make(), x)
    before = sum(p.numel() for p in model.parameters())
    removed = prune.prune_(model, Channels(per=per, over=over), 0.5, sample=x)
    assert sum(removed.values()) > 0
    masked = model(x).detach()
    cuts = prune.shrink_(model, x)
    assert torch.allclose(model(x), masked, atol=1e-5, rtol=1e-5)
    assert {c.name for c in cuts} == {n for n, share in removed.items() if share}
    after = sum(p.numel() for p in model.parameters())
    assert after < 0.7 * before
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_cut_is_not_what_pruning_the_rows_alone_would_be() -> None:
    """The batch norm's shift would leak through: the masks reach it and all that reads it."""
    model, x = settled(ResNet(), CASES["resnet"][1]), CASES["resnet"][1]
    full = model(x).detach()
    prune.prune_(model, Channels(), 0.5, sample=x)
    assert not torch.allclose(model(x), full, atol=1e-3)
    for name, _, parameter, mask in prune.mask.masked(model):
        if "bn1" in name:
            assert parameter in ("weight", "bias")
            assert not mask.mask.all()


def test_residual_channels_go_together() -> None:
    model, x = ResNet().eval(), CASES["resnet"][1]
    groups = {g.name: g for g in prune.channel_groups(model, x)}
    assert set(groups) == {
        "stem.0+blocks.0.conv2",
        "blocks.0.conv1",
        "blocks.1.conv1",
        "blocks.1.conv2+blocks.1.short+blocks.2.conv2",
        "blocks.2.conv1",
    }
    stem = groups["stem.0+blocks.0.conv2"]
    assert stem.units == 8
    assert {s.key for s in stem.role("in")} == {
        "blocks.0.conv1.weight",
        "blocks.1.conv1.weight",
        "blocks.1.short.weight",
    }
    assert {s.layer for s in stem.role("through")} == {"stem.1", "blocks.0.bn2"}
    assert {s.parameter for s in stem.role("buffer")} == {"running_mean", "running_var"}


def test_flatten_and_depthwise_take_several_columns() -> None:
    model, x = Gated().eval(), CASES["gated"][1]
    groups = {g.name: g for g in prune.channel_groups(model, x)}
    grouped = next(g for n, g in groups.items() if n.startswith("grouped"))
    assert grouped.units == 6  # the same place in both groups
    assert next(s for s in grouped.slices if s.layer == "head").index.shape == (6, 2 * 16)
    fed = next(g for g in groups.values() if "a" in g.producers)
    assert any(s.layer == "depth" and s.role == "through" for s in fed.slices)


def test_the_least_channels_go_and_budgets_hold() -> None:
    model, x = ResNet().eval(), CASES["resnet"][1]
    norms = model.blocks[0].conv1.weight.detach().abs().flatten(1).sum(1)
    prune.prune_(model, Channels(), {"blocks.0.conv1": 0.25}, sample=x)
    kept = model.blocks[0].conv1.weight.detach().flatten(1).any(1)
    assert int(kept.sum()) == 6
    assert norms[kept].min() >= norms[~kept].max()
    assert model.blocks[1].conv1.weight.detach().flatten(1).any(1).all()
    model = ResNet().eval()
    got = prune.prune_(model, Channels(round_to=4, min_keep=5), 0.9, sample=x)
    assert set(got.values()) == {0.0, 0.5}  # 5 of 8 rounds up to 8, 5 of 16 to 8
    with pytest.raises(ValueError, match="no group of channels is made by nothing"):
        prune.prune_(model, Channels(), {"nothing": 0.5}, sample=x)


def test_global_channels_are_taken_where_they_matter_least() -> None:
    model, x = settled(ResNet(), CASES["resnet"][1]), CASES["resnet"][1]
    with torch.no_grad():
        model.blocks[2].conv1.weight.mul_(0.01)
    got = prune.prune_(model, Channels(per="global"), 0.2, sample=x)
    assert got["blocks.2.conv1"] == max(got.values()) > 0.5
    assert got["stem.0+blocks.0.conv2"] < 0.2


def test_outputs_and_stated_sizes_stay() -> None:
    class Stated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).view(-1, 8)).tanh())

    assert [g.name for g in prune.channel_groups(Stated(), rand(2, 4))] == ["b"]  # a: view states 8; c: the output

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx cannot trace Branching"):
        prune.channel_groups(Branching(), rand(2, 4))


def test_tied_weights_are_not_cut() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    assert prune.channel_groups(Tied(), rand(2, 8)) == []


def test_torch_s_encoder_layer() -> None:
    x = rand(3, 5, 16)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).eval()
    prune.prune_(model, Channels(), 0.5, sample=x)
    prune.prune_(model, Heads(), 0.5)
    masked = model(x).detach()
    cuts = prune.shrink_(model, x)
    assert {(c.kind, c.before, c.after) for c in cuts} == {("channels", 32, 16), ("heads", 4, 2)}
    assert model[0].linear1.weight.shape == (16, 16)
    assert model[0].self_attn.in_proj_weight.shape == (24, 16)
    assert torch.allclose(model(x), masked, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_torch_s_attention(batch_first: bool) -> None:
    model = nn.MultiheadAttention(24, 4, batch_first=batch_first).eval()
    nn.init.normal_(model.in_proj_bias)
    scores = model.in_proj_weight.detach().abs().reshape(3, 4, -1).sum((0, 2))
    scores += model.out_proj.weight.detach().abs().reshape(24, 4, 6).sum((0, 2))
    got = prune.prune_(model, "heads", 0.5)
    assert list(got.values()) == [0.5]
    kept = model.out_proj.weight.detach().reshape(24, 4, 6).any(2).any(0)
    assert torch.equal(kept.nonzero().flatten(), scores.topk(2).indices.sort().values)
    x, memory = rand(2, 5, 24), rand(2, 7, 24, seed=1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    calls: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)},
        {"attn_mask": rand(5, 7, seed=4), "need_weights": False},
    ]
    masked = [model(x, memory, memory, **call)[0].detach() for call in calls]
    prune.shrink_(model)
    assert model.num_heads == 2
    for call, want in zip(calls, masked, strict=True):
        out, weights = model(x, memory, memory, **call)
        assert torch.allclose(out, want, atol=1e-5)
        assert weights is None or weights.shape == (2, 5, 7)
    assert model(x[0] if batch_first else x[:, 0], *[memory[0] if batch_first else memory[:, 0]] * 2)[0].dim() == 2


def test_heads_as_transformers_writes_them() -> None:
    model, x = Bert().eval(), CASES["bert"][1]
    got = prune.prune_(model, Heads(), 0.25)
    assert set(got) == {"layers.0.attention.self", "layers.1.attention.self"}
    masked = model(x).detach()
    prune.shrink_(model)
    assert model.layers[0].attention.self.num_attention_heads == 3
    assert model.layers[0].attention.output.dense.weight.shape == (16, 12)
    assert torch.allclose(model(x), masked, atol=1e-5)
    with pytest.raises(ValueError, match="no attention was found"):
        prune.prune_(nn.Sequential(nn.Linear(4, 4)), "heads", 0.5)


def test_layers_that_change_their_input_least_go() -> None:
    model, x = Bert(layers=4).eval(), CASES["bert"][1]
    with torch.no_grad():
        for part in (model.layers[2].attention.output, model.layers[2].down):
            part.dense.weight.mul_(0.01)
            part.dense.bias.zero_()
    expected = copy.deepcopy(model)
    del expected.layers[2]
    got = prune.prune_(model, Layers(), 0.25, "influence", data=[x])
    assert got == {"layers.0": 0.0, "layers.1": 0.0, "layers.2": 1.0, "layers.3": 0.0}
    assert torch.equal(model(x), expected(x))
    by_name = Bert(layers=3).eval()
    assert prune.prune_(by_name, "layers", {"layers.1": 1.0})["layers.1"] == 1
    assert len(by_name.layers) == 2
    assert sum(prune.prune_(by_name, Layers(min_keep=1), 1.0).values()) == 1
    with pytest.raises(ValueError, match="no Sequential or ModuleList"):
        prune.prune_(nn.Linear(2, 2), "layers", 0.5)


def test_other_masks_are_cut_along_and_stay() -> None:
    model, x = settled(ResNet(), CASES["resnet"][1]), CASES["resnet"][1]
    prune.prune_(model, "unstructured", 0.5)
    prune.prune_(model, "channels", 0.5, sample=x)
    masked = model(x).detach()
    prune.shrink_(model, x)
    assert torch.allclose(model(x), masked, atol=1e-5)
    mask = prune.mask_of(model.blocks[0].conv1)
    assert mask is not None
    assert mask.mask.shape == model.blocks[0].conv1.weight.shape
    assert not model.blocks[0].conv1.weight[~mask.mask].any()


def test_training_a_shrunk_model() -> None:
    model, x = settled(ResNet(), CASES["resnet"][1]), CASES["resnet"][1]
    prune.prune_(model, "channels", 0.5, sample=x, keep_mask=False)
    prune.shrink_(model, x)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    before = F.cross_entropy(model(x), torch.tensor([1, 2]))
    before.backward()
    optimizer.step()
    assert F.cross_entropy(model(x), torch.tensor([1, 2])) < before
