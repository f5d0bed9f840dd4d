"""Docstrings as Markdown: examples and formulas in the form that the site shows."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n.*\S.*)*", re.M)
_FORMULA = re.compile(r"^( *)\.\. math::[ \n]*((?:.*\S.*\n?)(?:\1 +.*\S.*\n?)*)", re.M)
_INLINE = re.compile(r":math:`([^`]+)`")


def markdown(text: str) -> str:
    r"""Fence examples, which else would be read as prose, and show formulas as code.

    >>> print(markdown("Add.\n\n>>> 1 + 1\n2"))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    fenced = _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    shown = _FORMULA.sub(lambda found: f"{found[1]}```latex\n{found[1]}{found[2].strip()}\n{found[1]}```\n", fenced)
    return _INLINE.sub(r"`\1`", shown)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that mkdocstrings shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object, once."""
        if obj.docstring is not None and "```pycon" not in obj.docstring.value:
            obj.docstring.value = markdown(obj.docstring.value)
