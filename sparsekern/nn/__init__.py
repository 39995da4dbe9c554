"""Drop-in modules with sparse weights, and the conversion of whole models."""

from .base import SparseModule, dense_state_dict
from .linear import SparseLinear

__all__ = ["SparseLinear", "SparseModule", "dense_state_dict"]
