"""Pruning: how (score) x what (pattern) x when. Masks live on dense modules until convert_."""

from . import score, score_activation, score_gradient
from .apply import magnitude_
from .calibrate import Call
from .mask import Mask, finalize_, mask_of, set_mask
from .pattern import NM, Block, Pattern, Unstructured
from .score import CRITERIA, scores
from .score_gradient import Movement
from .solve_model import LayerResult, obs_, refit_, sparsegpt_

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "Call",
    "LayerResult",
    "Mask",
    "Movement",
    "Pattern",
    "Unstructured",
    "finalize_",
    "magnitude_",
    "mask_of",
    "obs_",
    "refit_",
    "score",
    "score_activation",
    "score_gradient",
    "scores",
    "set_mask",
    "sparsegpt_",
]
