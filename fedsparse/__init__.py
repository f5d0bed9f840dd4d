"""fedsparse: sparse federated fine-tuning of pre-trained models, simulated on one machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__version__ = "0.1.0"
__all__ = ["run"]


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run as ``python -m fedsparse.train`` does, and return the summary; see ``fedsparse.train.run``.

    Args:
        overrides: what one would type, such as ``["mask_rule=random", "partition=noniid_nc1"]``.

    """
    from fedsparse import train  # here, so that ``import fedsparse`` costs nothing

    return train.run(overrides)


def _interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say in one line that Ctrl-C came while a command was still being imported, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print("fedsparse: SIGINT: stopped before the end", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # what Python puts there until it has found the module of ``python -m fedsparse...``
    sys.excepthook = _interrupted
