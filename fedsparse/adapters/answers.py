"""Greedy answers of language models, side by side.

Shapes: B texts, L tokens, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsparse.adapters.kept import Kept, Model, Moment
from fedsparse.adapters.limits import MOST
from fedsparse.core.checks import check_whole
from fedsparse.data.sequences import ids_of, prompts
from fedsparse.data.tokens import load_tokenizer
from fedsparse.models.text_net import TextNet
from fedsparse.simulation.devices import device_of


@dataclass(frozen=True)
class Speech:
    """How a run's language model is asked, and how its answer is read.

    Attributes:
        tokenizer: of the model.
        template: form of a question in the data that it was trained on; empty: a prompt is continued as it is.
        longest: most tokens of question and answer.

    """

    tokenizer: Any
    template: str
    longest: int

    @classmethod
    def of(cls, kept: Kept) -> Speech:
        """Read them from a run.

        Raises:
            ValueError: its model is no language model, or the tokenizer cannot be had.

        """
        problem, data = kept.assembly.problem, kept.assembly.config["data"]
        if not isinstance(problem.net, TextNet) or not problem.net.sequences:
            raise ValueError(
                f"answer needs a language model, such as model=qwen_tiny, and {kept.folder} trained the classifier "
                f"model={kept.choices.get('model')}"
            )
        tokenizer = load_tokenizer(data["checkpoint"] or data["tokenizer"])
        return cls(tokenizer, problem.dataset.template, problem.net.longest)

    def encode(self, prompt: str) -> list[int]:
        """Write a question as the data does, up to where the answer begins: ids."""
        asked = prompts([prompt], self.tokenizer, self.template) if self.template else [prompt]
        return ids_of(asked, self.tokenizer)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Write ids as text, without tokens that are no words."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@torch.no_grad()
def greedy(
    net: Callable[[Tensor], Tensor],
    ids: Sequence[int],
    end: int | None,
    longest: int,
    most: int = MOST,
    device: torch.device | None = None,
) -> list[int]:
    """Continue ids by the likeliest token, again and again.

    The whole text is computed anew for each token: for short answers of a few models, without a cache of keys.

    Args:
        net: ids int64 (B, L) -> logits (B, L, V), of the token that follows each.
        ids: of the question.
        end: id of the token that ends an answer; None if there is none.
        longest: most tokens of question and answer.
        most: new tokens at most.
        device: of the network.

    Returns:
        The new ids, without the end token.

    Raises:
        ValueError: there is no token to begin with, or no room for an answer.

    """
    check_whole("--tokens", most, 1)
    if not 0 < len(ids) < longest:
        raise ValueError(f"the prompt has {len(ids)} tokens; it must leave room for an answer in {longest}")
    text = list(ids)
    for _ in range(min(most, longest - len(ids))):
        following = int(net(torch.tensor([text], device=device))[0, -1].argmax())
        if following == end:
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
    speech, device = Speech.of(kept), device_of(kept.assembly.session.accelerator)
    asked, end = speech.encode(prompt), speech.tokenizer.eos_token_id
    for model in models:
        net = kept.load(moment, model).to(device)
        yield model.name, speech.decode(greedy(net, asked, end, speech.longest, most, device))
        net.cpu()
