"""Pruning: how (score) x what (pattern) x when. Masks live on dense modules until convert_."""

from . import score
from .apply import magnitude_
from .mask import Mask, finalize_, mask_of, set_mask
from .pattern import NM, Block, Pattern, Unstructured

__all__ = [
    "NM",
    "Block",
    "Mask",
    "Pattern",
    "Unstructured",
    "finalize_",
    "magnitude_",
    "mask_of",
    "score",
    "set_mask",
]
