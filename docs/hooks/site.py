"""What mkdocs calls while it builds the site: it adds the pages that are written from the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402

import notebooks  # noqa: E402  beside this file

_LINE, _INSIDE = re.compile(r"^\|.*", re.M), re.compile(r" (?=[±▲▼†])|(?<=±) ")
WHOLE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def pages() -> dict[str, str]:
    """Write all pages that are no file of ``docs/``: by their place in the site."""
    written = {"reference/configuration.md": reference.configuration(), "reference/commands.md": reference.commands()}
    books = {f"notebooks/{path.stem}.md": notebooks.page(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    whole = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in WHOLE.items()}
    return written | reference.api() | books | whole


def on_files(files: Files, config: Any) -> Files:
    """Add the written pages."""
    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep a figure, its interval and its mark on one line of a table's cell: ``97.6 ± 0.4 ▼``."""
    return _LINE.sub(lambda line: _INSIDE.sub("\N{NO-BREAK SPACE}", line[0]), markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """List only the groups of the configuration beside its page: with the options of each, 145 lines."""
    if page.file.src_uri == "reference/configuration.md":
        for title in page.toc:
            for group in title.children:
                group.children.clear()
    return html
