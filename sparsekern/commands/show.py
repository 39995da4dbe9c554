"""How the commands print: tables on stdout, progress on stderr, JSON where it is asked for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

WIDE = 200  # columns of a table that goes to a file or a pipe


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader who has seen enough is no failure; `cli.main` ends quietly."""
        raise BrokenPipeError


def console() -> Console:
    """stdout; wide where it is no terminal, so that nothing is cut off."""
    return _Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, soft_wrap=False)


def progress() -> Progress:
    """A bar on stderr that leaves nothing behind; none where stderr is no terminal."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def table(title: str, headings: Iterable[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> Table:
    """A table whose columns named in `right` are numbers. Text is shown as it is: names hold brackets."""
    made, numbers = Table(title=Text(title), title_justify="left", header_style="bold"), set(right)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def shape(dims: Iterable[int]) -> str:
    return "x".join(map(str, dims))


def chosen(include: str | None, exclude: str | None) -> Any:
    """name -> whether its weight is wanted. Raises ValueError for a pattern that is no regular expression."""
    try:
        wanted = re.compile(include) if include else None
        unwanted = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is not a regular expression: {error}") from None

    def accept(name: str) -> bool:
        if wanted is not None and not wanted.search(name):
            return False
        return not (unwanted is not None and unwanted.search(name))

    return accept
