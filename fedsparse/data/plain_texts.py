"""Plain texts, which a language model continues: a file a client, or a role of a play a client."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from fedsparse.core.checks import check_choice
from fedsparse.data.datasets import Dataset
from fedsparse.data.files import checked_file, checked_root, printable, reason_of
from fedsparse.data.sequences import LEAST, Example, ids_of, split_users, splits_of, windows
from fedsparse.data.tokens import fingerprint, load_tokenizer

log = logging.getLogger("fedsparse")
WANTED = "a folder of texts (*.txt): a file for each client, or with data.by=role plays"
SPEECH = re.compile(r"(?:\A|\n\n)([^\n:]{1,60}):\n")  # a role's name on a line of its own, after an empty one


def plain_texts(
    tokenizer: str | None,
    root: str | Path | None = None,
    checkpoint: str | None = None,
    by: str = "file",
    max_length: int = 128,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """Load ``root/*.txt``; every token but the first of a client's text is a target.

    Texts are cut into windows of ``max_length`` tokens, of which one begins with the last token of the one before.
    Clients with fewer than three windows are left out, and named in the log. ``users`` are the files, or the roles.

    Args:
        tokenizer: name of the model's tokenizer, as in ``load_tokenizer``.
        root: the folder.
        checkpoint: a folder whose tokenizer is used instead.
        by: ``file``; or ``role``: of plays in which ``NAME:`` on a line of its own begins a speech, all speeches of a
            role are a client's text.
        max_length: most tokens of a window.
        val_fraction: share of each client's windows for validation.
        test_fraction: share for testing, likewise.
        split_seed: seed of the splits, independent of the seed of a run.

    Raises:
        ValueError: tokenizer or files cannot be loaded, or no client is left.

    """
    loaded_tokenizer = load_tokenizer(checkpoint or tokenizer)
    check_choice("data.by", by, "file", "role")
    texts = read_texts(checked_root(root, WANTED), by)
    cut = {
        name: windows(ids, max_length)
        for name, ids in zip(texts, ids_of(list(texts.values()), loaded_tokenizer), strict=True)
    }
    pairs = [(name, example) for name in _long_enough(cut, str(root)) for example in cut[name]]
    users = [name for name, _ in pairs]
    parts = split_users(users, val_fraction, test_fraction, split_seed)
    train, val, test = splits_of([example for _, example in pairs], users, loaded_tokenizer, parts)
    kept = fingerprint([f"{name} {texts[name]}" for name in sorted(set(users))])
    return Dataset(train, val, test, len(loaded_tokenizer), str(root), fingerprint=kept)


def read_texts(root: Path, by: str) -> dict[str, str]:
    """Read the texts of all clients, by name.

    Raises:
        ValueError: there is no file, or no role, or a file is not UTF-8.

    """
    found = dict[str, str]()
    for path in sorted(root.glob("*.txt")):
        try:
            text = checked_file(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{printable(path)} is not UTF-8 ({reason_of(error)})") from error
        for name, part in [(path.stem, text)] if by == "file" else speeches(text):
            found[name] = f"{found[name]}\n\n{part}" if name in found else part
    if not found:
        raise ValueError(f"data.root={root} holds no {by} with a text; set data.root to {WANTED}")
    return found


def speeches(text: str) -> list[tuple[str, str]]:
    r"""List the speeches of a play: role and what it says.

    >>> speeches("First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\nNow!\n")
    [('First Citizen', 'Speak.'), ('All', 'Speak, speak.\nNow!')]
    """
    parts = SPEECH.split(text)
    return [(name.strip(), said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=True) if said.strip()]


def _long_enough(cut: dict[str, list[Example]], root: str) -> list[str]:
    """List the clients with enough windows; the others are counted and named in one line of the log."""
    short = [name for name, parts in cut.items() if len(parts) < LEAST]
    if short:
        named = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
        log.warning("%d of %d texts are shorter than %d windows, and left out: %s", len(short), len(cut), LEAST, named)
    if len(short) == len(cut):
        raise ValueError(f"no text of data.root={root} has {LEAST} windows of data.max_length; set a smaller one")
    return [name for name in cut if name not in short]
