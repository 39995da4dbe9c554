"""Two real models, pruned, converted, checked and measured: a masked language model and a convolutional
network.

Every converted model is compared with the pruned dense one before a time is shown; the run fails where they
disagree. Times are medians of interleaved runs in one process, the losing cases among them. JSON goes to
demo_output/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench import antiberty, mnist
from bench import report as r


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small part of it, in about a minute")
    parser.add_argument("--only", choices=("antiberty", "mnist"), help="one of the two models")
    parser.add_argument("--output", type=Path, default=r.ROOT / "demo_output", help="folder for the JSON files")
    args = parser.parse_args()
    r.measure_afresh()
    began, console = time.monotonic(), r.console()
    m = r.machine()
    console.print(
        f"{m['cpu']}, {m['threads']} threads, instruction set {m['isa']}, torch {m['torch']}", highlight=False
    )
    if args.only != "mnist":
        antiberty.run(antiberty.QUICK if args.quick else antiberty.FULL, console, args.output)
    if args.only != "antiberty":
        mnist.run(mnist.QUICK if args.quick else mnist.FULL, console, args.output)
    spent = time.monotonic() - began
    console.print(f"Everything agreed. {spent:.0f} s; JSON in {args.output}", highlight=False)


if __name__ == "__main__":
    main()
