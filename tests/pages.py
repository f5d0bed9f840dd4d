"""The pages that people read: README, CONTRIBUTING and ``docs/``, with their blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(?:^<!-- norun: (?P<why>.+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@cache
def pages():
    """Text of each page, by its path from the root."""
    site = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "template"]  # of new.py
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *site]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in found}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``why`` says why it is not run, if it is not."""

    page: str
    kind: str
    text: str
    why: str | None


def blocks(page):
    """Blocks of a page, from top to bottom."""
    return [Block(page, found["kind"], found["text"], found["why"]) for found in _BLOCK.finditer(pages()[page])]


def section(page, heading):
    """Text below a heading of the second level, until the next one."""
    return pages()[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
