"""Derived data kept beside the tensor it was made from.

Kernels want more than the canonical layout: segment pointers, expanded columns, transposed indices, the weight in
another order. Such a plan depends on one tensor only, is made on first use, and dies with the tensor's storage, as
whose attribute it is kept. It follows the tensor's version counter, so a plan is never used after an in-place change.

Streams: a plan is made, and brought up to date, on the stream that is current at the call which needs it, and later
calls take it to be there. As with any tensor of torch's, whoever uses a weight on another stream than that of its
first call lets that stream wait for the first (`Stream.wait_stream`), and frees or changes it only when both are done.

CUDA graphs: what is captured is not done, and the memory that it gets belongs to the graph. So a call that is captured
leaves nothing behind for others: where a plan is missing or out of date, its making becomes a part of the graph, which
repeats it at every replay. A plan that is up to date is read by the graph as it is, with two consequences for `live`
ones, which are the tensor's contents in another form (an index that is derived from a topology is not):

- Replays must see contents that change between them (an optimizer's step outside of the graph, or inside of it). So a
  captured call brings a live plan up to date as a part of the graph if its tensor requires a gradient, or has ever
  changed after the plan was made: each replay then runs on the contents of that moment. Other tensors are taken to be
  constant. For inference call `requires_grad_(False)` first: a weight that is never stepped is then never repacked. If
  such a weight is changed after all, capture anew.
- A replay changes tensors behind the back of their version counters. So after a captured call has renewed a live plan,
  its version proves nothing, and calls outside of graphs bring it up to date every time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ._ext import capturing

_ATTRIBUTE = "_sparsekern_plans"


class _Kept:
    """A plan. version: the tensor's when it was made; changed: the tensor did so since; unseen: replays may do so."""

    __slots__ = ("changed", "made", "unseen", "version")

    def __init__(self, version: Hashable, made: Any) -> None:
        self.version, self.made = version, made
        self.changed = self.unseen = False


def plan(
    tensor: Tensor,
    key: Hashable,
    make: Callable[[], Any],
    again: Callable[[Any], Any] | None = None,
    *,
    live: bool = False,
    also: Tensor | None = None,
) -> Any:
    """`make()`, remembered for this tensor's storage, view and version under `key`.

    After an in-place change it is made anew, or, where `again` is given, brought up to date by `again(old)`: a CUDA
    graph that was captured with the old plan's memory then reads the new contents. live: the plan is the tensor's
    contents in another form, and a graph can hold the work of `make` and `again`, which wait for nothing; see above.
    also: another tensor whose in-place changes count, too (its address belongs into the key).
    """
    version = _version(tensor, also)
    storage = tensor.untyped_storage()
    known = getattr(storage, _ATTRIBUTE, None)
    if known is None:
        known = _new(storage)
    place = (key, tensor.storage_offset(), tensor.shape)
    found = known.get(place)
    fits = found is not None and found.version == version
    if found is not None and fits and not (live and (found.changed or tensor.requires_grad)):
        return found.made
    if capturing(tensor):
        return _captured(tensor, known, place, make, again, live)
    if found is None or found.version is None:
        made = make()
    elif fits and not found.unseen:
        return found.made
    elif again is None:
        made = make()
    else:
        again(found.made)
        made = found.made
    if found is None:
        known[place] = _Kept(version, made)
    else:
        found.version, found.made, found.changed = version, made, True
    return made


def _version(tensor: Tensor, also: Tensor | None) -> Hashable:
    """Without a version counter a tensor's owner promised not to change it."""
    own = -1 if tensor.is_inference() else tensor._version
    return own if also is None else (own, -1 if also.is_inference() else also._version)


def keep(tensor: Tensor, key: Hashable, made: Any, also: Tensor | None = None) -> None:
    """Remembers a plan that was made together with its tensor: if that was captured, both are the graph's memory."""
    storage = tensor.untyped_storage()
    known = getattr(storage, _ATTRIBUTE, None) or _new(storage)
    known[key, tensor.storage_offset(), tensor.shape] = _Kept(_version(tensor, also), made)


def overwrite(old: Tensor, new: Tensor) -> None:
    """Gives a kept tensor new contents, as `again` does, in whichever mode of torch's it was made."""
    with torch.inference_mode(old.is_inference()), torch.no_grad():
        old.copy_(new)


def _new(storage: UntypedStorage) -> dict[Any, _Kept]:
    known: dict[Any, _Kept] = {}
    setattr(storage, _ATTRIBUTE, known)
    return known


def _captured(
    tensor: Tensor,
    known: dict[Any, _Kept],
    place: Any,
    make: Callable[[], Any],
    again: Callable[[Any], Any] | None,
    live: bool,
) -> Any:
    """A plan whose making, or renewal in place, becomes a part of the CUDA graph that is being captured."""
    found = known.get(place)
    if live and tensor.requires_grad and torch.is_inference_mode_enabled():
        warnings.warn(
            "sparsekern: a CUDA graph packs a weight that requires a gradient anew in every replay, because it may "
            "change between them; where it does not, call requires_grad_(False) before the capture",
            stacklevel=2,
        )
    if live and (tensor.requires_grad or found is not None):
        if found is None:
            found = known[place] = _Kept(None, None)
        found.changed = found.unseen = True
    if found is None or found.version is None or again is None:
        return make()
    again(found.made)
    return found.made


def plans(tensor: Tensor) -> list[Any]:
    """The keys of all that is remembered for this tensor's storage and view."""
    known: dict[Any, _Kept] = getattr(tensor.untyped_storage(), _ATTRIBUTE, {})
    return [key for key, *place in known if place == [tensor.storage_offset(), tensor.shape]]
