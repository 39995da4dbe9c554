"""The bitmap format: layout, packer and backends."""

from .layout import Bitmap as Bitmap
from .pack import pack as pack
