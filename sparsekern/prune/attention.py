"""Attention heads as groups, and an attention with fewer heads than its width speaks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Group, Slice

# Names of the projections q, k, v in attention modules, of the output projection, and of the number of heads.
_PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
                ("q_lin", "k_lin", "v_lin"), ("wq", "wk", "wv"))  # fmt: skip
_OUTPUTS = ("out_proj", "o_proj", "to_out", "out", "o", "out_lin", "wo", "proj", "dense")
_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "heads", "n_head")
_WIDTHS = ("all_head_size", "inner_dim")


def head_groups(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> list[Group]:
    """One group for every attention: nn.MultiheadAttention, or a module with Linears q, k, v and an output.

    A module counts as attention where it has three Linears of the usual names (query/key/value,
    q_proj/k_proj/v_proj, q/k/v ...), an attribute with the number of heads (num_heads,
    num_attention_heads ...), and an output Linear (out_proj, o_proj ..., or transformers' sibling
    `output.dense`). Grouped queries, whose k and v have fewer heads, are left out. filter_fn(module, name).
    """
    modules = dict(model.named_modules())
    groups = []
    for name, module in modules.items():
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None and module.bias_k is None:
                groups.append(_torch_attention(name, module))
        else:
            groups += _projected(name, module, modules)
    return groups


def _rows(heads: int, size: int, offset: int = 0) -> Tensor:
    return offset + torch.arange(heads * size).reshape(heads, size)


def _torch_attention(name: str, module: Any) -> Group:
    heads, size, width = module.num_heads, module.head_dim, module.embed_dim
    rows = torch.cat([_rows(heads, size, part * width) for part in range(3)], 1)
    slices = [Slice(name, module, "in_proj_weight", 0, rows, "out")]
    if module.in_proj_bias is not None:
        slices.append(Slice(name, module, "in_proj_bias", 0, rows, "out"))
    out = f"{name}.out_proj" if name else "out_proj"
    slices.append(Slice(out, module.out_proj, "weight", 1, _rows(heads, size), "in"))

    def after(kept: Tensor) -> None:
        module.__class__ = NarrowAttention
        module.num_heads = len(kept)
        module._qkv_same_embed_dim = False  # keeps torch's fused paths, which assume heads * size = width, away

    return Group("heads", name, slices, after)


def _projected(name: str, module: Any, modules: dict[str, nn.Module]) -> Iterator[Group]:
    count = next((c for c in _COUNTS if isinstance(getattr(module, c, None), int)), None)
    names = next(
        (n for n in _PROJECTIONS if all(isinstance(getattr(module, part, None), nn.Linear) for part in n)), None
    )
    output = _output(name, module, modules)
    if count is None or names is None or output is None:
        return
    heads, layers = getattr(module, count), [getattr(module, part) for part in names]
    width = layers[0].out_features
    if any(layer.out_features != width for layer in layers) or output[1].in_features != width or width % heads:
        return
    rows, slices = _rows(heads, width // heads), []
    for part, layer in zip(names, layers, strict=True):
        for parameter in ("weight", "bias") if layer.bias is not None else ("weight",):
            slices.append(Slice(f"{name}.{part}" if name else part, layer, parameter, 0, rows, "out"))
    slices.append(Slice(output[0], output[1], "weight", 1, rows, "in"))

    def after(kept: Tensor) -> None:
        setattr(module, count, len(kept))
        for attribute in _WIDTHS:
            if getattr(module, attribute, None) == width:
                setattr(module, attribute, len(kept) * (width // heads))

    yield Group("heads", name, slices, after)


def _output(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, Any] | None:
    for part in _OUTPUTS:
        found = getattr(module, part, None)
        if isinstance(found, nn.Sequential) and len(found) and isinstance(found[0], nn.Linear):
            part, found = f"{part}.0", found[0]
        if isinstance(found, nn.Linear):
            return (f"{name}.{part}" if name else part), found
    parent = name.rpartition(".")[0]
    beside = f"{parent}.output.dense" if parent else "output.dense"  # transformers: attention.self, attention.output
    found = modules.get(beside)
    return (beside, found) if isinstance(found, nn.Linear) else None


class NarrowAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose heads were cut: num_heads * head_dim is less than embed_dim.

    softmax(q kᵀ / sqrt(head_dim)) v of the heads that are left, through the same parameters as torch's
    (in_proj_weight [3 * heads * head_dim, embed_dim], out_proj [embed_dim, heads * head_dim]), and the same
    call. `shrink_` turns a module into one; it is not constructed by itself.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() not in (2, 3):
            raise ValueError(f"query must have two or three dimensions, got {query.dim()}")
        batched = query.dim() == 3
        inputs = [t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)] if batched else [
            t[None] for t in (query, key, value)
        ]  # fmt: skip
        width = self.num_heads * self.head_dim
        weights = self.in_proj_weight.split(width)
        biases = self.in_proj_bias.split(width) if self.in_proj_bias is not None else (None,) * 3
        q, k, v = (
            nn.functional.linear(t, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for t, w, b in zip(inputs, weights, biases, strict=True)
        )
        logits = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        logits = logits + self._bias(logits, attn_mask, key_padding_mask)
        attention = logits.softmax(-1)
        mixed = nn.functional.dropout(attention, self.dropout, self.training) @ v
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        shown = (attention.mean(1) if average_attn_weights else attention) if need_weights else None
        if not batched:
            return out[0], None if shown is None else shown[0]
        return (out if self.batch_first else out.transpose(0, 1)), shown

    def _bias(self, logits: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """What the two masks add to the logits [B, heads, T, S]."""
        total = logits.new_zeros(())
        if attn_mask is not None:
            m = _additive(attn_mask, logits.dtype)
            if m.dim() == 3:  # [B * heads of before, T, S] cannot be told apart any more
                if m.shape[0] != logits.shape[0] * logits.shape[1]:
                    raise ValueError(f"a 3-D attn_mask needs {logits.shape[0] * logits.shape[1]} planes")
                m = m.unflatten(0, logits.shape[:2])
            total = total + m
        if padding is not None:
            total = total + _additive(padding, logits.dtype).reshape(-1, 1, 1, logits.shape[-1])
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
