"""sparsekern: pruned neural networks that are actually faster."""

from .bitmap import Bitmap
from .bsr import Bsr
from .convert_dense import to_bitmap, to_block_sparse, to_csr, to_sparse_semi_structured
from .csr import Csr
from .functional import conv2d, linear, matmul
from .layout import Layout
from .sp24 import Sp24
from .tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "Bitmap",
    "Bsr",
    "Csr",
    "Layout",
    "Sp24",
    "SparseTensor",
    "conv2d",
    "linear",
    "matmul",
    "to_bitmap",
    "to_block_sparse",
    "to_csr",
    "to_sparse_semi_structured",
]
