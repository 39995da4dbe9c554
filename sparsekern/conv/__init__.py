"""Convolution with a sparse weight: geometry, oracle, compiled kernels, ops. One set for every format.

The weight [O, C / groups, kh, kw] is stored as a matrix W[O, K], K = C / groups * kh * kw, in one of two K
orders: "crs" (torch's own flattening) or "rsc" (channels innermost, what 2:4 pruning along channels means).
"""

from .geometry import ORDERS as ORDERS
from .geometry import Geometry as Geometry
from .geometry import matrix_of as matrix_of
from .geometry import padding_of as padding_of
from .geometry import weight_of as weight_of
from .library import conv2d_layout as conv2d_layout
