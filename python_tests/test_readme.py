"""Examples of the README run as they stand, and links between the pages lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("recycle_ext/modules/*/README.md"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_example_runs(default_model, example):
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_readme_has_an_example_of_the_library_and_of_the_op():
    assert len(EXAMPLES) == 2
    assert "recycle_ext.generate(" in EXAMPLES[0]
    assert "torch.ops.recycle.decode_step(" in EXAMPLES[1]


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of links and images that are no addresses of other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if "://" not in target and "mailto:" not in target]


def broken_links(page: Path) -> list[str]:
    """Links of a page to files, or headings of pages, that do not exist."""
    broken = []
    for target in links(page.read_text("utf-8")):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_readme_has_links_between_pages():
    """Without any, the test above would hold whatever the pages say."""
    assert len(links(README.read_text("utf-8"))) >= 3


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, here\n```\n# no heading\n```\n[x](#a-heading-here) [x](page.md#a-heading-here) "
        "[x](https://example.org/gone) [x](#no-heading) ![x](gone.png) [x](page.md#gone)\n"
    )
    assert broken_links(page) == ["#no-heading", "gone.png", "page.md#gone"]
