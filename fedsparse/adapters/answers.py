"""Greedy answers of language models, side by side.

Shapes: B texts, L tokens, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedsparse.adapters.kept import Kept, Model, Moment
from fedsparse.core.checks import check_whole
from fedsparse.simulation.devices import device_of

MOST = 64  # new tokens of an answer


@runtime_checkable
class Speaker(Protocol):
    """A network that answers in words: ids int64 (B, L) -> logits (B, L, V), of the token that follows each.

    Attributes:
        end: id of the token that ends an answer.
        longest: most tokens of a text.

    """

    end: int
    longest: int

    def encode(self, prompt: str) -> list[int]:
        """Write a question as the training data does, up to where the answer begins: ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Write ids as text."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute logits."""


@torch.no_grad()
def greedy(net: Speaker, ids: Sequence[int], most: int = MOST, device: torch.device | None = None) -> list[int]:
    """Continue ids by the likeliest token, again and again, until the end token, ``most`` tokens or the longest text.

    The whole text is computed anew for each token: for short answers of a few models, without a cache of keys.

    Returns:
        The new ids, without the end token.

    Raises:
        ValueError: there is no token to begin with, or no room for an answer.

    """
    check_whole("--tokens", most, 1)
    if not 0 < len(ids) < net.longest:
        raise ValueError(f"the prompt has {len(ids)} tokens; it must leave room for an answer in {net.longest}")
    text = list(ids)
    for _ in range(min(most, net.longest - len(ids))):
        following = int(net(torch.tensor([text], device=device))[0, -1].argmax())
        if following == net.end:
            break
        text.append(following)
    return text[len(ids) :]


def answers(
    kept: Kept, moment: Moment, models: Sequence[Model], prompt: str, most: int = MOST
) -> Iterator[tuple[str, str]]:
    """Let models answer a prompt, one after the other.

    Args:
        kept: the run.
        moment: the round.
        models: of that round.
        prompt: the question.
        most: new tokens at most.

    Returns:
        Names of the models with their answers.

    Raises:
        ValueError: the run's model is no language model.

    """
    device = device_of(kept.assembly.session.accelerator)
    for model in models:
        net = kept.load(moment, model).to(device)
        speaker = speaking(net, kept)
        yield model.name, speaker.decode(greedy(speaker, speaker.encode(prompt), most, device))
        net.cpu()


def speaking(net: nn.Module, kept: Kept) -> Speaker:
    """Take a network for a language model.

    Raises:
        ValueError: it is a classifier.

    """
    if not isinstance(net, Speaker):
        raise ValueError(
            f"answer needs a language model, such as model=qwen_tiny, and {kept.folder} trained the classifier "
            f"model={kept.choices.get('model')}"
        )
    return net
