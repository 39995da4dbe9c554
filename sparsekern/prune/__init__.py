"""Pruning: how (score) x what (pattern) x when (schedule). Masks live on dense modules until convert_."""

from . import score, score_activation, score_gradient
from .apply import magnitude_, prune_
from .attention import head_groups
from .calibrate import Call
from .curve import Curve, Sensitivity, curve, sensitivity
from .groups import channel_groups
from .grow import SET, RigL, erk
from .learn import LearnableMask, freeze_masks_, sr_ste_
from .mask import Mask, apply_masks_, finalize_, hold_zeros_, mask_of, masks_of, set_mask
from .metrics import Result, Size, Speed, evaluate_pruned, size_of, speed_of
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
from .permute import Permutation, Permuted, permute_
from .regularise import bn_l1, group_lasso, l1
from .schedule import Gradual, Ice, Iterative, LotteryTicket, OneShot, Schedule, fit, reinitialise_
from .score import CRITERIA, scores
from .score_gradient import Movement
from .structure import shrink_

__all__ = [
    "CRITERIA",
    "NM",
    "SET",
    "Block",
    "Call",
    "Channels",
    "Curve",
    "Gradual",
    "Heads",
    "Ice",
    "Iterative",
    "Layers",
    "LearnableMask",
    "LotteryTicket",
    "Mask",
    "Movement",
    "OneShot",
    "Pattern",
    "Permutation",
    "Permuted",
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
    "channel_groups",
    "curve",
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
    "pattern_of",
    "permute_",
    "prune_",
    "reinitialise_",
    "score",
    "score_activation",
    "score_gradient",
    "scores",
    "sensitivity",
    "set_mask",
    "shrink_",
    "size_of",
    "speed_of",
    "sr_ste_",
]
