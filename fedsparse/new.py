"""Begin a project with parts of your own: ``python -m fedsparse.new <folder>``.

The folder gets a mask rule, a loss and a data set in ``mine/``, a YAML for each and an experiment that joins them in
``conf/``, a test, and a README with the commands to type: sixty lines, to change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedsparse.core.signals import command

README = "README.md"


def template_dir() -> Path:
    """Find the folder that is copied: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "template" if (here / "template").is_dir() else here.parent / "docs" / "template"


def begin(folder: Path) -> list[str]:
    """Write a project into a folder, which is made.

    Args:
        folder: a new or an empty one; its name is the project's.

    Returns:
        The commands to type in the folder, as its README has them.

    Raises:
        ValueError: there is something in the folder, or it is a file.

    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty; give the name of a new folder")
    template = template_dir()
    for path in sorted(path for path in template.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        target = folder / path.relative_to(template)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    readme = (folder / README).read_text(encoding="utf-8").format(name=folder.resolve().name)
    (folder / README).write_text(readme, encoding="utf-8")
    return [line.strip() for line in readme.splitlines() if line.startswith("    ")]


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, or an empty one")
    folder = parser.parse_args().folder
    try:
        commands = begin(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"fedsparse: {' '.join(str(error).split())}")
    print(f"A project in {folder}; type:", f"cd {folder}", *commands, sep="\n  ")


if __name__ == "__main__":
    with command():
        main()
