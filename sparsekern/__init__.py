"""sparsekern: pruned neural networks that are actually faster."""

from . import checkpoint, prune, tune
from .bitmap import Bitmap
from .bsr import Bsr
from .convert_dense import to_bitmap, to_block_sparse, to_csr, to_sparse_semi_structured
from .csr import Csr
from .functional import conv2d, dynamic_linear, linear, matmul
from .layout import Layout
from .nn import DynamicSparseLinear, Report, SparseConv2d, SparseLinear, convert_, to_dense_
from .sp24 import Sp24
from .tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "Bitmap",
    "Bsr",
    "Csr",
    "DynamicSparseLinear",
    "Layout",
    "Report",
    "Sp24",
    "SparseConv2d",
    "SparseLinear",
    "SparseTensor",
    "checkpoint",
    "conv2d",
    "convert_",
    "dynamic_linear",
    "linear",
    "matmul",
    "prune",
    "to_bitmap",
    "to_block_sparse",
    "to_csr",
    "to_dense_",
    "to_sparse_semi_structured",
    "tune",
]
