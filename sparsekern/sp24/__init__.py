"""The sp24 format: layout, packer and backends."""

from .layout import Sp24 as Sp24
from .pack import pack as pack
