"""Data sets of texts, as tokens of the model's tokenizer.

Shapes: ``N`` texts, ``L`` tokens of the longest.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsparse.core.waits import may_download
from fedsparse.data.datasets import Dataset, Split, hold_out, stratified
from fedsparse.data.docs import TOPICS, held_by_clients
from fedsparse.data.files import check_folder, checked_file, checked_root, reason_of
from fedsparse.data.tokens import fingerprint, load_tokenizer, quiet_transformers, tokens

HUB = "fancyzhx/ag_news"
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")

Labelled = tuple[Sequence[str], np.ndarray]


def stdlib_docs(
    tokenizer: str | None,
    checkpoint: str | None = None,
    max_length: int = 128,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    root: str | Path | None = None,
) -> Dataset:
    """Load sentences of the documentation of Python's standard library, of four topics: see ``fedsparse.data.docs``.

    They depend on the version of Python; ``fingerprint`` identifies them. ``users`` are the modules.

    Args:
        tokenizer: name of the model's tokenizer, as in ``load_tokenizer``.
        checkpoint: a folder whose tokenizer is used instead.
        max_length: most tokens of a sentence.
        val_fraction: share of all sentences for validation, with the same class mix.
        test_fraction: share of all sentences for testing, likewise.
        split_seed: seed of both splits, independent of the seed of a run.
        root: folder of the library; None: of the running Python.

    Raises:
        ValueError: tokenizer or sentences cannot be loaded, or a fraction leaves a split without a class.

    """
    loaded_tokenizer = load_tokenizer(checkpoint or tokenizer)
    found = held_by_clients(None if root is None else Path(root))
    labels = np.array([sentence.topic for sentence in found])
    x = tokens([sentence.text for sentence in found], loaded_tokenizer, max_length)
    users = np.array([sentence.module for sentence in found])
    y = torch.from_numpy(labels.astype(np.int64))
    indices = stratified(labels, val_fraction, test_fraction, split_seed)
    train, val, test = (Split(x[part], y[part], users[part]) for part in indices)
    texts = [f"{sentence.topic} {sentence.text}" for sentence in found]
    return Dataset(train, val, test, len(TOPICS), "stdlib_docs", fingerprint=fingerprint(texts))


def ag_news(
    tokenizer: str | None,
    checkpoint: str | None = None,
    root: str | Path | None = None,
    max_length: int = 128,
    val_fraction: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Load AG News (Zhang, Zhao and LeCun 2015): 120,000 news for training, 7,600 for testing, four topics.

    Each text is title and description, joined by a space.

    Args:
        tokenizer: name of the model's tokenizer, as in ``load_tokenizer``.
        checkpoint: a folder whose tokenizer is used instead.
        root: a folder with ``train.csv`` and ``test.csv`` of class 1 to 4, title and description; or one that
            ``save_to_disk`` of Hugging Face's ``datasets`` wrote; None: ``datasets`` loads or downloads it.
        max_length: most tokens of a text.
        val_fraction: share of the training texts for validation, with the same class mix.
        split_seed: seed of the split, independent of the seed of a run.

    Raises:
        ValueError: tokenizer or files cannot be loaded, or a file is of another format.

    """
    loaded_tokenizer = load_tokenizer(checkpoint or tokenizer)
    found = read_csvs(Path(root)) if root is not None and (Path(root) / "train.csv").exists() else read_saved(root)
    lengths = [len(texts) for texts, _ in found.values()]
    x = tokens([text for texts, _ in found.values() for text in texts], loaded_tokenizer, max_length)
    labels = np.concatenate([y for _, y in found.values()])
    rest, held_out = hold_out(labels[: lengths[0]], val_fraction, split_seed)
    parts = (rest, held_out, np.arange(lengths[0], sum(lengths)))
    train, val, test = (Split(x[rows], torch.from_numpy(labels[rows])) for rows in parts)
    texts = [f"{y} {text}" for every, ys in found.values() for text, y in zip(every, ys.tolist(), strict=True)]
    return Dataset(train, val, test, len(AG_NEWS), "ag_news", fingerprint=fingerprint(texts))


def read_csvs(root: Path) -> dict[str, Labelled]:
    """Read ``train.csv`` and ``test.csv``.

    Raises:
        ValueError: a file is missing, or a line of it is not class, title and description.

    """
    return {part: _read_csv(root / f"{part}.csv") for part in ("train", "test")}


def _read_csv(path: Path) -> Labelled:
    if not path.exists():
        raise ValueError(f"{path} is missing; data.root needs train.csv and test.csv, or what save_to_disk wrote")
    try:
        with checked_file(path).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV of UTF-8 ({reason_of(error)})") from error
    for number, row in enumerate(rows, 1):
        if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
            raise ValueError(f"{path}: row {number} is not class 1 to 4, title and description, but {str(row)[:60]}")
    return [f"{title} {text}" for _, title, text in rows], np.array([int(row[0]) - 1 for row in rows], dtype=np.int64)


def read_saved(root: str | Path | None) -> dict[str, Labelled]:
    """Read a folder that ``save_to_disk`` of Hugging Face's ``datasets`` wrote, or load or download the data set by it.

    Raises:
        ValueError: ``datasets`` is not installed, or the data cannot be loaded; one line with the remedy.

    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data=ag_news without CSV files needs datasets: pip install 'fedsparse[text]'") from error
    wanted = "a folder with train.csv and test.csv (class 1 to 4, title, description), or one that save_to_disk wrote"
    if root is not None:
        check_folder(checked_root(root, wanted))
    if root is None:
        may_download(f"{HUB} comes from the Hugging Face hub, or from its cache")
    try:
        with quiet_transformers():
            parts = datasets.load_dataset(HUB) if root is None else datasets.load_from_disk(str(root))
    except (OSError, ValueError, RuntimeError) as error:
        kind = type(error).__name__
        where = f"{HUB} could not be downloaded" if root is None else f"data.root={root} holds no such data"
        raise ValueError(f"{where} ({kind}); set data.root to {wanted}") from error
    return {part: _columns(parts, part, root or HUB) for part in ("train", "test")}


def _columns(held: Any, part: str, where: object) -> Labelled:
    """Read texts and labels 0 to 3 of one part.

    Raises:
        ValueError: the part or a column is missing, or a label is out of range.

    """
    columns = held[part].column_names if isinstance(held, Mapping) and part in held else ()
    if not {"text", "label"} <= set(columns):
        raise ValueError(f"{where} has no {part} with the columns text and label")
    labels = np.asarray(held[part]["label"], dtype=np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(AG_NEWS):
        raise ValueError(f"{where}: a label of {part} is not 0 to {len(AG_NEWS) - 1}")
    return list(held[part]["text"]), labels
