"""The command line: python -m sparsekern info | inspect | prune | convert | bench.

Exit codes: 0 for success, 2 for wrong usage or input, with one line on stderr that says what was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

DESCRIPTION = """Pruned neural networks that are actually faster.

  info      this machine: instruction sets, and which backend runs which format, or why not
  inspect   a checkpoint: which weights are 2:4, block-sparse or unstructured, and what they would gain
  prune     a checkpoint or a model: remove the weights that matter least, in a pattern that a format stores
  convert   a checkpoint: store its pruned weights sparse, in sparsekern's or compressed-tensors' form, or undo it
  bench     one layer: sparsekern against dense and against torch's own sparse formats, on this machine
"""


class _Parser(argparse.ArgumentParser):
    """One line for a wrong call; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    from . import __version__
    from .commands import bench, convert, info, inspect, prune

    top = _Parser(prog="sparsekern", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for module in (info, inspect, prune, convert, bench):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        args = parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("SPARSEKERN_TRACEBACK"):
            raise
        first = str(error).strip().replace("\n", " ") or type(error).__name__
        sys.stderr.write(f"sparsekern: error: {first}\n")
        return 2
