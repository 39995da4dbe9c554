"""Pruning: how (score) x what (pattern) x when (schedule). Masks live on dense modules until convert_."""

from . import score
from .apply import magnitude_, prune_
from .attention import head_groups
from .groups import channel_groups
from .mask import Mask, apply_masks_, finalize_, hold_zeros_, mask_of, masks_of, set_mask
from .pattern import (
    NM,
    Block,
    Channels,
    Heads,
    Layers,
    Pattern,
    Transposable,
    Unstructured,
    Vector,
    pattern_of,
)
from .structure import shrink_

__all__ = [
    "NM",
    "Block",
    "Channels",
    "Heads",
    "Layers",
    "Mask",
    "Pattern",
    "Transposable",
    "Unstructured",
    "Vector",
    "apply_masks_",
    "channel_groups",
    "finalize_",
    "head_groups",
    "hold_zeros_",
    "magnitude_",
    "mask_of",
    "masks_of",
    "pattern_of",
    "prune_",
    "score",
    "set_mask",
    "shrink_",
]
