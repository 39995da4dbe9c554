"""Drop-in modules with sparse weights, and the conversion of whole models."""

from .base import SparseModule, dense_state_dict
from .conv import SparseConv2d, WeightSparseConv2d
from .linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLinear", "SparseModule", "WeightSparseConv2d", "dense_state_dict"]
