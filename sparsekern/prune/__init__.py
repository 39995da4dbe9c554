"""Pruning: how (score) x what (pattern) x when. Masks live on dense modules until convert_."""

from . import score, score_activation, score_gradient
from .apply import magnitude_
from .calibrate import Call
from .mask import Mask, finalize_, mask_of, set_mask
from .pattern import NM, Block, Pattern, Unstructured
from .score import CRITERIA, scores
from .score_gradient import Movement

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "Call",
    "Mask",
    "Movement",
    "Pattern",
    "Unstructured",
    "finalize_",
    "magnitude_",
    "mask_of",
    "score",
    "score_activation",
    "score_gradient",
    "scores",
    "set_mask",
]
