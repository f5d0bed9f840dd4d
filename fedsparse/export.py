"""Export a pruned run as a small dense model: ``python -m fedsparse.export run=<run folder> format=safetensors,onnx``.

The folder ``export`` in the run folder gets ``model.onnx``, ``figures.json``, and ``model.safetensors`` with
``config.json``, from which ``fedsparse.export.load`` builds the network. It is written only if outputs agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsparse.core.folder import EXPORT
from fedsparse.core.lazy import lazily
from fedsparse.job import trust
from fedsparse.job.command import on_command_line

if TYPE_CHECKING:
    from fedsparse.job.exporting import check, export, load, measure, write
else:  # so that a wrong argument is refused without torch
    _HOMES = dict.fromkeys(("check", "export", "load", "measure", "write"), "fedsparse.job.exporting")
    __getattr__, __dir__ = lazily(__name__, _HOMES)

__all__ = ["check", "export", "load", "main", "measure", "write"]
KEYS = "give run=<run folder> and, if wanted, format=safetensors or format=onnx, and trust=[<package>]"


def _read(typed: Sequence[str]) -> tuple[Path, tuple[str, ...] | None, tuple[str, ...]]:
    """Parse arguments: the run folder, the formats or None for all, the trusted names."""
    trusted, arguments = trust.split(typed)
    values = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = [argument for argument in arguments if argument.partition("=")[0] not in ("run", "format")]
    if unknown or not values.get("run"):
        raise ValueError(f"{' '.join(unknown) or 'run= is missing'}: {KEYS}")
    return Path(values["run"]), tuple(values["format"].split(",")) if "format" in values else None, trusted


def main() -> None:
    """Entry point of the command line."""

    def body() -> None:
        if {"-h", "--help"} & set(sys.argv):
            print(__doc__)
            return
        folder, formats, trusted = _read(sys.argv[1:])
        from fedsparse.analysis.export_table import print_export
        from fedsparse.job.execute import quiet
        from fedsparse.job.exporting import FORMATS, export

        quiet()
        print_export(folder / EXPORT, export(folder, FORMATS if formats is None else formats, trusted))

    on_command_line(body)


if __name__ == "__main__":
    main()
