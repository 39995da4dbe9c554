"""Every Python example of the README runs as it stands, and its tables are what the scripts write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"## ([^\n]+)\n(?:(?!## ).)*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_there_are_examples():
    assert [name for name, _ in EXAMPLES][:5] == [
        "Swap a layer",
        "Quantise as well",
        "Convert a model",
        "Prune: how × what × when",
        "Benchmark against dense",
    ]


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_example(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_tables_are_current():
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "results_table"), "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
