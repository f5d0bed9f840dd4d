"""Converts texts to tokens, by tokenizers of transformers, which is imported on first use.

Shapes: ``N`` texts, ``L`` tokens of the longest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.waits import may_download
from fedsparse.data.checks import checked_integer

WEIGHTS = Path(str(files("fedsparse.models"))) / "weights"
TINY, TINY_LM = "bert_tiny", "qwen_tiny"  # names of the packaged models
PACKAGED, PACKAGED_LM = WEIGHTS / TINY, WEIGHTS / TINY_LM
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?$")
ASKED, PATIENCE = "google-bert/bert-base-cased", 5.0  # a model that the hub has; seconds
BATCH = 4096  # texts in one call of the tokenizer


def load_tokenizer(source: str | None) -> Any:
    """Load the tokenizer of a model.

    Args:
        source: a folder, a name of the Hugging Face hub, or ``bert_tiny`` for the packaged one.

    Raises:
        ValueError: there is no source, transformers is not installed, or the tokenizer cannot be loaded.

    """
    if source is None:
        raise ValueError(
            "this data is text and the model has no tokenizer; choose model=bert_tiny or model=bert_base, or "
            "model=qwen_tiny or model=qwen for texts to continue"
        )
    transformers = need_transformers()
    place = place_of(source)
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **only_local(place))
    except (OSError, ValueError) as error:
        missing = "no such folder" if not Path(place).exists() and not HUB_NAME.match(place) else type(error).__name__
        raise ValueError(
            f"the tokenizer of {source} cannot be had ({missing}); put vocab.txt (or tokenizer.json), "
            "tokenizer_config.json, config.json and model.safetensors in a folder and set model.checkpoint=<folder>"
        ) from error


def place_of(source: str) -> str:
    """Find the packaged folder of a model, by its name; another source is a folder or a name of the hub itself."""
    return str(WEIGHTS / source) if source in (TINY, TINY_LM) else source


def only_local(place: str) -> dict[str, bool]:
    """Choose the option that keeps transformers from asking a hub that does not answer, which takes it a minute.

    Args:
        place: a folder, or a name of the hub.

    Returns:
        ``local_files_only=True``, or nothing if the hub answers.

    """
    return {} if HUB_NAME.match(place) and not Path(place).exists() and hub_answers() else {"local_files_only": True}


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub answers one request within a few seconds; what it downloaded before needs none."""
    from huggingface_hub import HfApi

    may_download(f"weights and tokenizers of the Hugging Face hub, or its cache; it has {PATIENCE:g} s to answer")
    try:
        HfApi().model_info(ASKED, timeout=PATIENCE)
    except Exception:  # of several packages, by version
        return False
    return True


def need_transformers() -> Any:
    """Import transformers, an optional package.

    Raises:
        ValueError: it is not installed; one line with the command to install it.

    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("text needs transformers, which is not installed: pip install 'fedsparse[text]'") from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the messages of transformers about loading."""
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
        ValueError: ``max_length`` is no whole number of 3 or more, with the model's first and last token.

    """
    most = checked_integer("data.max_length", max_length, 3)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # explicit, since else a later fork gives a warning
    batches = (list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
    ids = [row for run in batches for row in tokenizer(run, truncation=True, max_length=most)["input_ids"]]
    x = torch.full((len(ids), max(map(len, ids), default=0)), pad_of(tokenizer), dtype=torch.int32)
    for place, row in zip(x, ids, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return x


def pad_of(tokenizer: Any) -> int:
    """Read the id of a tokenizer's padding; 0, as in BERT, if it has none."""
    return tokenizer.pad_token_id or 0


def fingerprint(texts: Sequence[str]) -> str:
    """Compute the SHA-256 of texts in order, each with its length, so that different lists differ."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
