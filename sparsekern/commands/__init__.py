"""The subcommands of `python -m sparsekern`, a module each: `add(subparsers)`, `run(args) -> exit code`."""
