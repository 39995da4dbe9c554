"""Drop-in modules with sparse weights, and the conversion of whole models."""

from .base import SparseModule, dense_state_dict
from .conv import SparseConv2d, WeightSparseConv2d
from .convert import convert_, to_dense_
from .dynamic import DynamicSparseLinear
from .linear import SparseLinear
from .report import Report

__all__ = [
    "DynamicSparseLinear",
    "Report",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "WeightSparseConv2d",
    "convert_",
    "dense_state_dict",
    "to_dense_",
]
