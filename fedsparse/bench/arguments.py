"""What the command lines of the bench share; none of it needs torch."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

MODELS = ("mlp", "conv", "conv_digits", "vit", "mlp_large", "resnet18_gn", "vit_small")  # that ``problems`` builds


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with the message."""
        sys.exit(f"fedsparse: {message}")


def positive(text: str) -> int:
    """Read a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
