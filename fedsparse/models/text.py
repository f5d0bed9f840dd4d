"""Builders of text models: transformers' own BERT with a new classification head.

Shapes: ``B`` texts, ``L`` tokens.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_whole
from fedsparse.data.tokens import need_transformers, only_local, place_of, quiet_transformers
from fedsparse.models.text_net import TextNet
from fedsparse.models.vision import seeded, start_head

log = logging.getLogger("fedsparse")
NEW = ("classifier.", "bert.pooler.")  # what a checkpoint may lack


class TextClassifier(TextNet):
    """Calls a classifier of transformers with ids alone, and takes the attention mask from their padding.

    On a CPU columns that are padding in every text of a batch are cut off: nothing attends to them. On a GPU the host
    would wait for their number in every step, and no CUDA graph could hold the steps.

    Args:
        net: such as ``BertForSequenceClassification``; its parameters are this module's, under ``net.``.

    Attributes:
        longest: most tokens of a text.

    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.pad: int = net.config.pad_token_id or 0
        self.longest = net.config.max_position_embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Classify ids (B, L): logits (B, classes)."""
        x, mask = short(x, self.pad) if x.device.type == "cpu" else whole(x, self.pad)
        logits: Tensor = self.net(input_ids=x, attention_mask=mask).logits
        return logits


def short(x: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Cut off the columns that are padding in every text: ids (B, L') and their attention mask, int64 (B, L').

    >>> short(torch.tensor([[5, 0, 0], [6, 7, 0]]), pad=0)[0]
    tensor([[5, 0],
            [6, 7]])
    """
    columns = (x != pad).any(0).nonzero()
    x = x[:, : int(columns[-1]) + 1 if len(columns) else 1]
    return x, (x != pad).long()


def whole(x: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Keep all columns: ids (B, L), and which of them every place attends to, bool (B, 1, 1, L).

    A mask of four dimensions is used as it is; of one with two transformers reads the values, for which the host waits.
    """
    return x, (x != pad)[:, None, None, :]


def bert(
    tokenizer: str,
    num_classes: int,
    checkpoint: str | None = None,
    pretrained: bool = True,
    dropout: float | None = None,
    head_std: float = 0.02,
    seed: int = 0,
) -> TextClassifier:
    """Build transformers' ``BertForSequenceClassification`` with a new head and, everywhere else, pre-trained weights.

    Args:
        tokenizer: name of weights and tokenizer: ``bert_tiny``, which is packaged, or one of the Hugging Face hub,
            downloaded once, such as ``google-bert/bert-base-cased``.
        num_classes: outputs of the head.
        checkpoint: a folder that transformers' ``save_pretrained`` wrote, used instead; its head, if any, is left out.
        pretrained: start from these weights; else at random, from ``seed``.
        dropout: of attention, hidden states and before the head; None: as the configuration has it.
        head_std: standard deviation of the head's normal before it is cut at two of them; the bias is zero.
        seed: decides the head, and the rest if that is random.

    Returns:
        A module: ids (B, L) -> (B, num_classes).

    Raises:
        ValueError: transformers is not installed, or the weights cannot be had or are not BERT's.

    """
    check_whole("model.num_classes", num_classes, 1)
    need_transformers()  # before it is asked to be quiet
    place = checkpoint or place_of(tokenizer)
    with quiet_transformers():
        config = _config(place, checkpoint, num_classes, dropout)
        net = seeded(lambda: _weights(place, checkpoint, config) if pretrained else _random(config), seed)
    start_head(net.classifier, head_std, seed)
    return TextClassifier(net.train())  # transformers hands it over in eval mode


def _config(place: str, checkpoint: str | None, num_classes: int, dropout: float | None) -> Any:
    """Read the configuration, and set what is asked for."""
    try:
        config = need_transformers().AutoConfig.from_pretrained(place, trust_remote_code=False, **only_local(place))
    except (OSError, ValueError) as error:
        raise unavailable(place, checkpoint, error) from error
    if config.model_type != "bert":
        raise ValueError(f"{place} is a {config.model_type}; this model takes BERT's weights")
    config.num_labels = num_classes
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = config.classifier_dropout = dropout
    return config


def _random(config: Any) -> Any:
    return need_transformers().BertForSequenceClassification(config)


def _weights(place: str, checkpoint: str | None, config: Any) -> Any:
    """Load weights as float32; nothing but the head and the pooler may be missing, or of another shape."""
    try:
        net, found = need_transformers().BertForSequenceClassification.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **only_local(place),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise unavailable(place, checkpoint, error) from error
    other = [str(key[0]) for key in found["mismatched_keys"]]
    lacking = sorted(name for name in {*found["missing_keys"], *other} if not name.startswith("classifier."))
    if strange := [name for name in lacking if name in other or not name.startswith(NEW)]:
        raise ValueError(f"{place} does not fit BERT: {strange[0]} is missing or of another shape")
    if lacking:
        log.warning("%s has no pooler: it starts at random", place)
    return net


def unavailable(place: str, checkpoint: str | None, error: Exception) -> ValueError:
    """Say which files to put where."""
    wanted = "config.json, model.safetensors, tokenizer_config.json and vocab.txt (or tokenizer.json)"
    if checkpoint is not None:
        why = f"it needs {wanted}" if Path(checkpoint).is_dir() else "there is no such folder"
        return ValueError(f"model.checkpoint={checkpoint} cannot be loaded ({type(error).__name__}); {why}")
    return ValueError(
        f"the weights of {place} could not be downloaded ({type(error).__name__}); put {wanted} of "
        f"https://huggingface.co/{place} in a folder and set model.checkpoint=<folder>"
    )
