"""Loss landscapes of a finished run: ``python -m fedsparse.landscape <run folder> grid=25 data=[test,client:0]``.

The folder ``landscape`` in the run folder gets ``landscape.json``, ``surface_<data>.npz`` and the pictures; of an
earlier round ``landscape/round_<round>``. Keys: plane=random|models|pca grid range seed models=[global,0,1] round
data=[test,train,client:0] mask=all|inside|outside reference=<run folder> samples surface refine tolerance gif curvature
sharpness sigma.of=accuracy|loss processes, and trust=[<package>].
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedsparse.job import trust
from fedsparse.job.command import on_command_line
from fedsparse.landscape.options import Options


def main() -> None:
    """Entry point of the command line."""

    def body() -> None:
        trusted, typed = trust.split(sys.argv[1:])
        if {"-h", "--help"} & set(typed):
            print(__doc__)
            return
        if not typed:
            raise ValueError("give a run folder, such as: python -m fedsparse.landscape runs/x grid=11")
        options = Options.read(typed[1:])
        from fedsparse.job.execute import quiet  # here, so that a wrong option is refused without torch
        from fedsparse.landscape.drawing import landscape
        from fedsparse.landscape.table import print_landscape

        quiet()
        print_landscape(*landscape(Path(typed[0]), options, trusted))

    on_command_line(body)


if __name__ == "__main__":
    main()
