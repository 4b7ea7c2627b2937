"""What the README shows can be typed in as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(default_model, example):
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_there_are_examples_of_the_library_and_of_the_op():
    assert len(EXAMPLES) == 2
    assert "recycle_ext.generate(" in EXAMPLES[0]
    assert "torch.ops.recycle.decode_step(" in EXAMPLES[1]


def test_its_links_lead_to_files_and_headings():
    text = README.read_text("utf-8")
    headings = {
        "#" + re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert target in headings or (README.parent / target).exists(), target
