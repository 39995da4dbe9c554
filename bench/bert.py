"""A BERT masked language model in plain torch: the architecture of AntiBERTy, for its published weights.

Post-norm encoder, absolute positions, exact gelu, decoder tied to the token embeddings (Devlin et al.,
1810.04805; Ruffolo et al., 2112.07782). No attention mask: every batch holds sequences of one length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The fields of a BERT config.json that the model needs."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Config:
        """Raises ValueError where the config describes another model than this one."""
        for name, value in (
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
            ("model_type", "bert"),
        ):
            if fields.get(name) != value:
                raise ValueError(f"config: {name} must be {value!r}, got {fields.get(name)!r}")
        missing = [name for name in cls.__dataclass_fields__ if name not in fields]
        if missing:
            raise ValueError(f"config: {', '.join(missing)} missing")
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class Embeddings(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.word = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        fixed = self.position.weight[: tokens.shape[1]] + self.token_type.weight[0]
        return self.norm(self.word(tokens) + fixed)


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        h = c.hidden_size
        self.heads = c.num_attention_heads
        self.query, self.key, self.value, self.attended = (nn.Linear(h, h) for _ in range(4))
        self.attention_norm = nn.LayerNorm(h, c.layer_norm_eps)
        self.up = nn.Linear(h, c.intermediate_size)
        self.down = nn.Linear(c.intermediate_size, h)
        self.norm = nn.LayerNorm(h, c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(*(split(p(x)) for p in (self.query, self.key, self.value)))
        x = self.attention_norm(x + self.attended(mixed.transpose(1, 2).flatten(2)))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Head(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.transform = nn.Linear(c.hidden_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.decoder = nn.Linear(c.hidden_size, c.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.transform(x))))


class BertMLM(nn.Module):
    """logits [B, S, vocabulary] of tokens [B, S], S at most max_position_embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = Head(config)
        self.head.decoder.weight = self.embeddings.word.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


_RENAMED = (
    ("bert.embeddings.word_embeddings.", "embeddings.word."),
    ("bert.embeddings.position_embeddings.", "embeddings.position."),
    ("bert.embeddings.token_type_embeddings.", "embeddings.token_type."),
    ("bert.embeddings.LayerNorm.", "embeddings.norm."),
    ("bert.encoder.layer.", "layers."),
    (".attention.self.", "."),
    (".attention.output.dense.", ".attended."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".up."),
    (".output.dense.", ".down."),
    (".output.LayerNorm.", ".norm."),
    ("cls.predictions.transform.dense.", "head.transform."),
    ("cls.predictions.transform.LayerNorm.", "head.norm."),
    ("cls.predictions.decoder.", "head.decoder."),
)
# The decoder's bias under a second name, a constant, and what the other tasks of the checkpoint use.
_UNUSED = (
    "cls.predictions.bias",
    "bert.embeddings.position_ids",
    "bert.pooler.",
    "cls.species.",
    "cls.chain.",
    "cls.graft.",
)


def from_checkpoint(config: Config, state: Mapping[str, Tensor]) -> BertMLM:
    """The model with the weights of a transformers checkpoint; no key unknown, no weight missing."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_UNUSED):
            continue
        for theirs, ours in _RENAMED:
            key = key.replace(theirs, ours)
        renamed[key] = value
    model = BertMLM(config)
    model.load_state_dict(renamed, strict=True)
    if not torch.equal(model.head.decoder.weight, renamed["embeddings.word.weight"]):
        raise ValueError("the checkpoint's decoder is not tied to its token embeddings")
    return model.eval()
