"""Pruning: how (score) x what (pattern) x when (schedule). Masks live on dense modules until convert_."""

from . import score, score_activation, score_gradient
from .apply import magnitude_, prune_
from .attention import head_groups
from .calibrate import Call
from .curve import Curve, Sensitivity, curve, sensitivity
from .distil import Distillation, distil_
from .groups import channel_groups
from .grow import SET, RigL, erk
from .learn import LearnableMask, freeze_masks_, sr_ste_
from .mask import Mask, apply_masks_, finalize_, hold_zeros_, mask_of, masks_of, set_mask
from .metrics import Result, Size, Speed, evaluate_pruned, size_of, speed_of
from .pattern import NM, Block, Channels, Heads, Layers, Pattern, Transposable, Unstructured, Vector, pattern_of
from .permute import Permutation, Permuted, permute_
from .pipeline import Pipeline
from .quantise import quantised
from .quantise_model import quantise_, stored
from .regularise import bn_l1, group_lasso, l1
from .schedule import Gradual, Ice, Iterative, LotteryTicket, OneShot, Schedule, fit, reinitialise_
from .score import CRITERIA, scores
from .score_gradient import Movement
from .solve_blocks import by_blocks, calls_of
from .solve_model import LayerResult, obs_, refit_, sparsegpt_
from .solve_regional import reconstruct_, reconstruct_block_
from .structure import shrink_

__all__ = [
    "CRITERIA",
    "NM",
    "SET",
    "Block",
    "Call",
    "Channels",
    "Curve",
    "Distillation",
    "Gradual",
    "Heads",
    "Ice",
    "Iterative",
    "LayerResult",
    "Layers",
    "LearnableMask",
    "LotteryTicket",
    "Mask",
    "Movement",
    "OneShot",
    "Pattern",
    "Permutation",
    "Permuted",
    "Pipeline",
    "Result",
    "RigL",
    "Schedule",
    "Sensitivity",
    "Size",
    "Speed",
    "Transposable",
    "Unstructured",
    "Vector",
    "apply_masks_",
    "bn_l1",
    "by_blocks",
    "calls_of",
    "channel_groups",
    "curve",
    "distil_",
    "erk",
    "evaluate_pruned",
    "finalize_",
    "fit",
    "freeze_masks_",
    "group_lasso",
    "head_groups",
    "hold_zeros_",
    "l1",
    "magnitude_",
    "mask_of",
    "masks_of",
    "obs_",
    "pattern_of",
    "permute_",
    "prune_",
    "quantise_",
    "quantised",
    "reconstruct_",
    "reconstruct_block_",
    "refit_",
    "reinitialise_",
    "score",
    "score_activation",
    "score_gradient",
    "scores",
    "sensitivity",
    "set_mask",
    "shrink_",
    "size_of",
    "sparsegpt_",
    "speed_of",
    "sr_ste_",
    "stored",
]
