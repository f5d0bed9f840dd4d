"""Which parameters of a model are federated: the key ``model.trainable``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from fedsparse.core.space import Patterns, listed, matches

LAST_BLOCKS = "last_blocks:"
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def trainable_filter(
    spec: str | Sequence[str], head: Patterns, names: Sequence[str], frozen: Collection[str] = ()
) -> Callable[[str], bool]:
    """Turn a specification into a test of parameter names; what the net's builder froze stays frozen.

    Args:
        spec: ``all``; ``head``; ``last_blocks:<n>``, the last n transformer blocks (timm's ``blocks.<i>.``) and
            whatever the net lists after them, such as the final norm and the head; or one or several glob patterns.
        head: glob patterns of the head's parameters.
        names: the net's parameter names, in its own order.
        frozen: those of them that the builder froze, by ``requires_grad=False``.

    Returns:
        A function of a name: True where the parameter is federated.

    Raises:
        ValueError: nothing matches a pattern, or only what is frozen, or n is not between 1 and the number of blocks.

    >>> names = ["embed.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "norm.weight", "head.weight"]
    >>> [name for name in names if trainable_filter("last_blocks:1", "head.*", names)(name)]
    ['blocks.1.fc.weight', 'norm.weight', 'head.weight']
    """
    if isinstance(spec, str) and spec.startswith(LAST_BLOCKS):
        chosen = _last_blocks(spec, names)
    elif spec == "all":
        chosen = frozenset(names)
    else:
        chosen = _globbed(
            head if spec == "head" else spec, names, "model.head" if spec == "head" else "model.trainable"
        )
    left = chosen - frozenset(frozen)
    if not left:
        raise ValueError(
            f"model.trainable={spec} names only parameters that the model's builder froze (requires_grad=False), such "
            f"as {', '.join(sorted(chosen)[:3])}; what it froze stays frozen"
        )
    return left.__contains__


def _globbed(patterns: Patterns, names: Sequence[str], key: str) -> frozenset[str]:
    """Names that match a pattern; each pattern has to match something, so that a slip of the pen is seen."""
    given = listed(patterns)
    for pattern in given:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"{key}={pattern} matches no parameter; it is all, head, last_blocks:<n> or glob patterns of names "
                f"such as {', '.join(names[:3])}"
            )
    if not given:
        raise ValueError(f"{key} is an empty list; it is all, head, last_blocks:<n> or glob patterns of names")
    return frozenset(name for name in names if matches(name, given))


def _last_blocks(spec: str, names: Sequence[str]) -> frozenset[str]:
    """Names from the first one of the last n blocks on."""
    numbers = [int(found[1]) if (found := BLOCK.search(name)) else -1 for name in names]
    count = max(numbers, default=-1) + 1
    text = spec.removeprefix(LAST_BLOCKS)
    if not (text.isdecimal() and 1 <= int(text) <= count):
        raise ValueError(
            f"model.trainable={spec}: n has to be 1 to {count}, the blocks.<i> of this model"
            if count
            else f"model.trainable={spec}: this model has no blocks.<i>; use all, head or glob patterns"
        )
    return frozenset(names[numbers.index(count - int(text)) :])
