"""The error of a federation whose model is not finite; a command line expects it, and imports no torch for it."""

from __future__ import annotations


class Diverged(RuntimeError):
    """The model is not finite; the message says what to try."""
