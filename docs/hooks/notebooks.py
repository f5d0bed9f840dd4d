"""Notebooks as pages."""

from __future__ import annotations

import json
from pathlib import Path


def page(path: Path) -> str:
    """Write a notebook as Markdown; its code is shown, and its outputs are where it runs.

    Args:
        path: the notebook, which is stored without outputs.

    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    note = f"*The notebook `notebooks/{path.name}`, which a test runs from top to bottom; run it to see its pictures.*"
    parts = ["".join(cell["source"]) for cell in cells[:1]] + [note]
    for cell in cells[1:]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
