"""What a model of texts is worth on stdlib_docs: ``python -m fedsparse.studies.text_baselines [key=value ...]``.

Majority class and bag of words are scikit-learn's, fitted on the whole training split in one place; the head alone and
the fine-tuned model are federated runs of the main job, with whatever is typed added. ``--ag-news FOLDER`` in their
place scores the first two on AG News' ``train.csv`` and ``test.csv``, as ``data=ag_news`` splits them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from fedsparse.core.signals import command
from fedsparse.data.datasets import hold_out, stratified
from fedsparse.data.docs import held_by_clients
from fedsparse.data.text import read_csvs
from fedsparse.job.command import on_command_line
from fedsparse.job.runs import run

RUN = (
    "data=stdlib_docs",
    "model=bert_tiny",
    "mask_rule=dense",
    "sparsity=s0",
    "logger=csv",
    "pictures=false",
    "data.max_length=48",  # six sentences of a hundred are longer
    "federation.rounds=40",
    "federation.eval_every=10",
    "federation.local_steps=null",
    "federation.local_epochs=1",
)
MODELS = {"head alone": ("model.trainable=head",), "fine-tuned": ()}


def bag_of_words(texts: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Accuracy on the test texts of the majority class and of a logistic regression on TF-IDF weights.

    Args:
        texts: (N,), strings.
        labels: (N,).
        train: indices to fit on.
        test: indices to score on.

    """
    models = {
        "majority class": DummyClassifier(),
        "bag of words": make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=4.0, max_iter=1000)),
    }
    fitted = {name: model.fit(texts[train], labels[train]) for name, model in models.items()}
    return {name: float(model.score(texts[test], labels[test])) for name, model in fitted.items()}


def of_ag_news(root: Path) -> dict[str, float]:
    """Test accuracy of majority class and bag of words on AG News.

    Args:
        root: a folder with ``train.csv`` and ``test.csv``.

    Raises:
        ValueError: a file is missing or damaged.

    """
    (texts, labels), (others, answers) = read_csvs(root).values()
    train, _ = hold_out(labels, 0.1, 0)  # as data=ag_news splits them
    test = len(texts) + np.arange(len(others))
    return bag_of_words(np.array([*texts, *others]), np.concatenate([labels, answers]), train, test)


def baselines(overrides: Sequence[str] = ()) -> dict[str, float]:
    """Test accuracy of every baseline, and of the fine-tuned model.

    Args:
        overrides: added to the two runs, such as ``["partition=noniid_nc1"]``.

    """
    found = held_by_clients()
    labels = np.array([sentence.topic for sentence in found])
    train, _, test = stratified(labels, 0.1, 0.2, 0)  # as data=stdlib_docs splits them
    figures = bag_of_words(np.array([sentence.text for sentence in found]), labels, train, test)
    runs = {name: run([*RUN, *options, *overrides]) for name, options in MODELS.items()}
    return figures | {name: summary["test/acc"] for name, summary in runs.items()}


def main() -> None:
    """Print the table."""

    def body() -> None:
        typed = sys.argv[1:]
        news = Path(typed[1]) if len(typed) == 2 and typed[0] == "--ag-news" else None
        table = Table(title=f"{'ag_news' if news else 'stdlib_docs'}, test accuracy", title_justify="left")
        table.add_column("model")
        table.add_column("accuracy", justify="right")
        for name, accuracy in (of_ag_news(news) if news else baselines(typed)).items():
            table.add_row(name, f"{accuracy:.1%}")
        Console().print(table)

    on_command_line(body)


if __name__ == "__main__":
    with command():
        main()
