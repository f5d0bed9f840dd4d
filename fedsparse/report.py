"""A table of finished runs: ``python -m fedsparse.report <run or sweep folder> ... [--pixels]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsparse.analysis.table import markdown, read_runs, rows


def pixels_accuracy() -> float:
    """Test accuracy of a logistic regression on the raw pixels of the digits, on the same split: a reference."""
    from sklearn.linear_model import LogisticRegression

    from fedsparse.data.datasets import digits

    data = digits()
    model = LogisticRegression(max_iter=5000).fit(data.train.x.flatten(1).numpy(), data.train.y.numpy())
    return float(model.score(data.test.x.flatten(1).numpy(), data.test.y.numpy()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that hold some")
    parser.add_argument("--pixels", action="store_true", help="add a logistic regression on the pixels of the digits")
    options = parser.parse_args(arguments)
    try:
        print(markdown(rows(read_runs(options.folders))))
    except ValueError as error:
        sys.exit(f"fedsparse: {error}")
    print("\n`*`: the best learning rate is the smallest or largest of those tried.")
    if options.pixels:
        print(f"Centralised logistic regression on the pixels: {pixels_accuracy():.1%} test accuracy.")


if __name__ == "__main__":
    main()
