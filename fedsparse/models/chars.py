"""Builder of the next-character model of LEAF's Shakespeare.

Shapes: ``B`` texts, ``L`` characters.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsparse.core.checks import check_whole
from fedsparse.models.text_net import TextNet
from fedsparse.models.vision import seeded, start_head


class NextChar(TextNet):
    """Reads characters by an LSTM and tells the next one from its last hidden state.

    Args:
        vocabulary: characters that there are.
        num_classes: outputs of the head.
        embedding: numbers that a character becomes.
        hidden: units of a layer of the LSTM.
        layers: of the LSTM.
        dropout: between these layers.

    Attributes:
        longest: most characters of a text: any number.

    """

    longest = sys.maxsize

    def __init__(
        self, vocabulary: int, num_classes: int, embedding: int, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify places in the vocabulary (B, L): logits (B, num_classes)."""
        scored = torch.is_grad_enabled() and not self.training
        if scored and not torch.compiler.is_exporting():
            bool(x.any())  # refuses vmap, whose way through an LSTM takes ten times as long as text by text
        with supported(cudnn=not scored):
            states: Tensor = self.lstm(self.embedding(x))[0]
        logits: Tensor = self.head(states[:, -1])
        return logits


@contextmanager
def supported(cudnn: bool) -> Iterator[None]:
    """Leave cuDNN aside where it cannot differentiate, in evaluation mode, as scores are taken.

    Weights that are views of a client's row are copied for it, which it need not tell in every run.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        if cudnn:
            yield
        else:
            with torch.backends.cudnn.flags(enabled=False):
                yield


def next_char_lstm(
    num_classes: int,
    vocabulary: int = 80,
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
    dropout: float = 0.0,
    head_std: float = 0.02,
    seed: int = 0,
) -> NextChar:
    """Build the LSTM of McMahan et al. 2017 and LEAF (Caldas et al. 2018), AutoFLIP's ``NextCharLSTM``, at random.

    819,920 parameters for 80 characters and classes. Its state is one client's: clients are not stacked.

    Args:
        num_classes: outputs of the head.
        vocabulary: characters that there are.
        embedding: numbers that a character becomes.
        hidden: units of a layer of the LSTM.
        layers: of the LSTM.
        dropout: between these layers; of one layer there must be none.
        head_std: standard deviation of the head's normal before it is cut at two of them; the bias is zero.
        seed: decides all weights.

    Raises:
        ValueError: a size is below 1, or the dropout is not of [0, 1) or has nowhere to act.

    """
    check_whole("model.num_classes", num_classes, 1)
    for name, size in (("vocabulary", vocabulary), ("embedding", embedding), ("hidden", hidden), ("layers", layers)):
        check_whole(f"model.{name}", size, 1)
    if not 0 <= dropout < 1 or (dropout and layers == 1):
        raise ValueError(f"model.dropout is {dropout} with {layers} layers; give 0 or, between layers, below 1")
    net = seeded(lambda: NextChar(vocabulary, num_classes, embedding, hidden, layers, dropout), seed)
    start_head(net.head, head_std, seed)
    return net
