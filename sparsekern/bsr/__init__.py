"""The bsr format: layout, packer and backends."""

from .layout import Bsr as Bsr
from .pack import pack as pack
from .topology import update_topology as update_topology
