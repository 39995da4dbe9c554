"""One block at a time: a model larger than memory, pruned with only one of its blocks loaded.

The inputs of the next block are the outputs of the pruned one, so that each makes up for what those before it lost.
What is kept is those inputs for all of the calibration data, and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .calibrate import Call, Enough, Forward, evaluating, feed, shown, tracked

R = TypeVar("R")


def calls_of(
    model: nn.Module,
    module: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: bool = True,
) -> list[Call]:
    """What `module` (the first block, say) is called with when the batches go through the model, as batches.

    The rest of the model does not run. Raises ValueError where a batch does not reach the module.
    """
    forward = forward or feed
    found: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(_detached(args), _detached(kwargs)))
        raise Enough

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with evaluating(model):
            for batch in tracked(data, "inputs of the first block", progress):
                try:
                    forward(model, batch)
                except Enough:
                    continue
                raise ValueError("a batch does not reach the module whose inputs were asked for")
    finally:
        handle.remove()
    return found


def by_blocks(
    blocks: Iterable[nn.Module | Callable[[], nn.Module]],
    calls: Iterable[Call],
    work: Callable[[nn.Module, Sequence[Call]], R],
    *,
    done: Callable[[int, nn.Module], Any] | None = None,
    progress: bool = True,
) -> list[R]:
    """work(block, its calls) for every block in turn; the next block's calls carry this one's new outputs.

    blocks: modules, or functions that load one (from disk, say), called when it is its turn; a loaded block is let go
    before the next one comes. done(i, block) saves it. calls: of the first block (`calls_of`); a block's output (the
    first, where it gives several) takes the place of the first positional argument of the next, the other arguments
    stay. work is any pruning in place, for instance

        lambda block, calls: sparsegpt_(block, calls, "2:4")

    Returns what work returned. Raises ValueError for a block that does not return a tensor first, or calls without a
    positional argument.
    """
    current = list(calls)
    if not all(call.args for call in current):
        raise ValueError("a block must take its input as the first positional argument")
    results = []
    total = len(blocks) if isinstance(blocks, (list, tuple, nn.ModuleList)) else None
    with shown("block by block", total, progress) as step:
        for i, source in enumerate(blocks):
            block = source if isinstance(source, nn.Module) else source()
            results.append(work(block, current))
            with evaluating(block):
                for j, call in enumerate(current):  # in place: no second set of inputs
                    current[j] = Call((first_tensor(block(*call.args, **call.kwargs)), *call.args[1:]), call.kwargs)
            if done is not None:
                done(i, block)
            del block
            step()
    return results


def first_tensor(output: Any) -> Tensor:
    """A block's output, or the first of several."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor):
        raise ValueError(f"a block must return a tensor, or a tuple that begins with one; got {type(output).__name__}")
    return first


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(part) for part in value) if type(value) in (tuple, list) else value
    return value
