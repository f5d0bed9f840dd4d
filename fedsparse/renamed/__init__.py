"""Commands under their names of version 0.1, for one release: each says its new name and carries it out."""

from __future__ import annotations

import sys


def renamed(old: str, new: str) -> None:
    """Say that a command has another name now."""
    print(f"fedsparse: python -m fedsparse.{old} is python -m fedsparse.{new} now", file=sys.stderr)
