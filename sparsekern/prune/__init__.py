"""Pruning: how (score) x what (pattern) x when. Masks live on dense modules until convert_ makes them formats."""

from . import score
from .apply import magnitude_
from .find import Found, find
from .mask import Mask, finalize_, mask_of, set_mask
from .pattern import NM, Block, Pattern, Unstructured, as_matrix, from_matrix

__all__ = [
    "NM",
    "Block",
    "Found",
    "Mask",
    "Pattern",
    "Unstructured",
    "as_matrix",
    "finalize_",
    "find",
    "from_matrix",
    "magnitude_",
    "mask_of",
    "score",
    "set_mask",
]
