"""What the job asks of a network that takes texts.

Shapes: ``B`` texts, ``L`` tokens.
"""

from __future__ import annotations

from torch import nn


class TextNet(nn.Module):
    """A network that takes texts, as token ids (B, L).

    Attributes:
        longest: most tokens of a text.
        vocabulary: number of characters, if tokens are characters; 0: they are of the model's tokenizer.
        sequences: whether it gives logits of every token (B, L, words), and not of the text (B, classes).
        stackable: whether the forward of several clients can be one, as ``models.stacked`` does it.

    """

    longest: int
    vocabulary: int = 0
    sequences: bool = False
    stackable: bool = False
