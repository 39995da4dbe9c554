"""Derived data kept beside the tensor it was made from.

Kernels want more than the canonical layout: segment pointers, expanded columns, transposed indices. Such a plan
depends on one tensor only, is made on first use, and dies with the tensor's storage, as whose attribute it is kept.
It follows the tensor's version counter, so a plan is never used after an in-place change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_sparsekern_plans"


def plan(tensor: Tensor, key: Hashable, make: Callable[[], Any], again: Callable[[Any], Any] | None = None) -> Any:
    """`make()`, remembered for this tensor's storage, view and version under `key`.

    After an in-place change it is made anew, or, where `again` is given, brought up to date by `again(old)`: a CUDA
    graph that was captured with the old plan's memory then reads the new contents.
    """
    # Without a version counter its owner promised not to change it.
    version = -1 if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()
    known: dict[Any, Any] | None = getattr(storage, _ATTRIBUTE, None)
    if known is None:
        known = {}
        setattr(storage, _ATTRIBUTE, known)
    place = (key, tensor.storage_offset(), tensor.shape)
    found = known.get(place)
    if found is not None and found[0] == version:
        return found[1]
    if found is not None and again is not None:
        again(found[1])
        made = found[1]
    else:
        made = make()
    known[place] = (version, made)
    return made


def plans(tensor: Tensor) -> list[Any]:
    """The keys of all that is remembered for this tensor's storage and view."""
    known: dict[Any, Any] = getattr(tensor.untyped_storage(), _ATTRIBUTE, {})
    return [key for key, *place in known if place == [tensor.storage_offset(), tensor.shape]]
