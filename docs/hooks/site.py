"""What mkdocs calls while it builds the site: it adds the pages that are written from the code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402

import notebooks  # noqa: E402  beside this file

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
