"""Texts as tokens: transformers' own tokenizers, loaded when a text is first needed.

Shapes: ``N`` texts, ``L`` tokens of the longest.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsparse.data.checks import checked_integer

PACKAGED = Path(str(files("fedsparse.models"))) / "weights" / "bert_tiny"
TINY = "bert_tiny"  # the name of what lies there
BATCH = 4096  # texts at once


def load_tokenizer(source: str | None) -> Any:
    """Load the tokenizer of a model.

    Args:
        source: a folder, a name of the Hugging Face hub, or ``bert_tiny`` for the packaged one.

    Raises:
        ValueError: there is no source, transformers is not installed, or the tokenizer cannot be had.

    """
    if source is None:
        raise ValueError("this data is text and the model has no tokenizer; choose model=bert_tiny or model=bert_base")
    transformers = need_transformers()
    place = str(PACKAGED) if source == TINY else source
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {source} cannot be had ({type(error).__name__}); put vocab.txt (or tokenizer.json), "
            "tokenizer_config.json, config.json and model.safetensors in a folder and set model.checkpoint=<folder>"
        ) from error


def need_transformers() -> Any:
    """Import transformers, an optional package.

    Raises:
        ValueError: it is not installed; says what to install.

    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("text needs transformers, which is not installed: pip install 'fedsparse[text]'") from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep what transformers says about loading off the terminal."""
    from transformers.utils import logging as words

    before, bars = words.get_verbosity(), words.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    words.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    words.disable_progress_bar()
    try:
        yield
    finally:
        words.set_verbosity(before)
        hub.setLevel(level)
        if bars:
            words.enable_progress_bar()


def tokens(texts: Sequence[str], tokenizer: Any, max_length: int) -> Tensor:
    """Tokenise texts, cut each to ``max_length`` tokens and pad all to the longest: int32 (N, L).

    Raises:
        ValueError: ``max_length`` is no number of 3 or more: the first and the last token are the model's own.

    """
    most = checked_integer("data.max_length", max_length, 3)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, or a later fork would be warned of
    runs = (list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
    ids = [row for run in runs for row in tokenizer(run, truncation=True, max_length=most)["input_ids"]]
    x = torch.full((len(ids), max(map(len, ids), default=0)), pad_of(tokenizer), dtype=torch.int32)
    for place, row in zip(x, ids, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return x


def pad_of(tokenizer: Any) -> int:
    """Id of a tokenizer's padding; 0, as BERT has it, where it has none."""
    return tokenizer.pad_token_id or 0


def fingerprint(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order, each with its length, so that no two lists have the same."""
    digest = hashlib.sha256()
    for text in texts:
        held = text.encode()
        digest.update(len(held).to_bytes(8, "little") + held)
    return digest.hexdigest()
