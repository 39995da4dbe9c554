"""The csr format: layout, packer and backends."""

from .layout import Csr as Csr
from .pack import pack as pack
