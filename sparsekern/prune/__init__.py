"""Pruning: how (score) x what (pattern) x when. Masks live on dense modules until convert_."""

from . import score, score_activation, score_gradient
from .apply import magnitude_
from .calibrate import Call
from .distil import Distillation, distil_
from .mask import Mask, finalize_, mask_of, set_mask
from .pattern import NM, Block, Pattern, Unstructured
from .pipeline import Pipeline
from .quantise import quantised
from .quantise_model import quantise_, stored
from .score import CRITERIA, scores
from .score_gradient import Movement
from .solve_blocks import by_blocks, calls_of
from .solve_model import LayerResult, obs_, refit_, sparsegpt_
from .solve_regional import reconstruct_, reconstruct_block_

__all__ = [
    "CRITERIA",
    "NM",
    "Block",
    "Call",
    "Distillation",
    "LayerResult",
    "Mask",
    "Movement",
    "Pattern",
    "Pipeline",
    "Unstructured",
    "by_blocks",
    "calls_of",
    "distil_",
    "finalize_",
    "magnitude_",
    "mask_of",
    "obs_",
    "quantise_",
    "quantised",
    "reconstruct_",
    "reconstruct_block_",
    "refit_",
    "score",
    "score_activation",
    "score_gradient",
    "scores",
    "set_mask",
    "sparsegpt_",
    "stored",
]
