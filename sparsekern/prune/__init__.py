"""Pruning: how (score) x what (pattern) x when (schedule). Masks live on dense modules until convert_."""

from . import score, score_activation, score_gradient
from .apply import magnitude_, prune_
from .attention import head_groups
from .calibrate import Call
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
from .score import CRITERIA, scores
from .score_gradient import Movement
from .structure import shrink_

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "Call",
    "Channels",
    "Heads",
    "Layers",
    "Mask",
    "Movement",
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
    "score_activation",
    "score_gradient",
    "scores",
    "set_mask",
    "shrink_",
]
