"""Error lines for unknown keys and options, with suggestions of what may be meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from fedsparse.job.earlier import key_of_now
from fedsparse.job.shipped import defaults, groups, keys, options, settable

ALL_KEYS = "--cfg job lists all keys with their values"
WORDS = {  # of other tools, with the key of the same meaning
    "gpus": "trainer.devices",
    "gpu": "trainer.accelerator",
    "device": "trainer.accelerator",
    "learning_rate": "optimizer.lr",
    "epochs": "federation.local_epochs",
    "clients": "federation.num_clients",
    "num_rounds": "federation.rounds",
    "dataset": "data",
    "strategy": "aggregation",
}


def no_key(key: str) -> str:
    """Write the error line for an unknown key, with a suggestion."""
    if now := key_of_now(key):
        return f"there is no key {key}; it is {now} now"
    group, _, rest = key.partition(".")
    fitting = [f"{group}={option}" for option in options(group) if rest in keys(group, option)] if rest else []
    if fitting:
        has = "has it" if len(fitting) == 1 else "have it"
        return f"there is no key {key} with this {group}; {_joined(fitting[:4], 'and')} {has}; {ALL_KEYS}"
    near = _near(key)
    return f"there is no key {key}; {f'did you mean {_joined(near)}? ' if near else ''}{ALL_KEYS}"


def _near(key: str) -> list[str]:
    """List similar keys: the same last word in another group, else a word of another tool, else a close spelling."""
    word = key.rpartition(".")[2]
    same = sorted((k for k in settable() if k.rpartition(".")[2] == word), key=lambda k: (k.count("."), k))
    if same or word in WORDS:
        return same[:3] or [WORDS[word]]
    if "." in key:
        return difflib.get_close_matches(key, [k for k in settable() if "." in k], 1, 0.8)
    by_word = {k.rpartition(".")[2]: k for k in sorted(settable(), key=lambda k: k.count("."), reverse=True)}
    return [by_word[found] for found in difflib.get_close_matches(word, by_word, 1, 0.75)]


def no_option(group: str, value: Any, listed: Sequence[str] = ()) -> str:
    """Write the error line for an unknown option of a group, with a suggestion.

    Args:
        group: config group, such as ``mask_rule``.
        value: the unknown option.
        listed: the group's options; empty: the shipped ones.

    """
    listed = listed or options(group)
    said, known = f"there is no {group}={'null' if value is None else value}", f"{group} is one of {', '.join(listed)}"
    if isinstance(value, float | int) and not isinstance(value, bool):
        meant = _by_number(group, value)
    else:
        meant = _other_number(group, str(value)) or _of_timm(group, str(value))
    if meant:
        return f"{said}; write {meant}"
    near = [f"{other}={value}" for other in groups() if value in options(other)]
    near = near or [f"{group}={found}" for found in difflib.get_close_matches(str(value), listed, 2, 0.6)]
    return f"{said}; did you mean {_joined(near)}?" if near else f"{said}; {known}"


def _by_number(group: str, value: float) -> str:
    """Suggest a group's numeric key with this value, and an option that sets it.

    >>> _by_number("sparsity", 0.8)
    'sparsity.ratio=0.8 or sparsity=s80'
    """
    default = defaults().get(group)
    numbers = [key for key, found in keys(group, default).items() if _number(found) is not None] if default else []
    if not numbers:
        return ""
    having = [o for o in options(group) if _number(keys(group, o).get(numbers[0])) == value]
    return f"{group}.{numbers[0]}={value}{f' or {group}={min(having, key=len)}' if having else ''}"


def _other_number(group: str, name: str) -> str:
    """Suggest, for an option that differs by a number, a shipped option and the key that sets this number.

    >>> _other_number("partition", "noniid_nc3"), _other_number("sparsity", "s85")
    ('partition=noniid_nc1 partition.nc=3', 'sparsity=s50 sparsity.ratio=0.85')
    """
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    siblings = {option: option.removeprefix(stem) for option in options(group) if digits and option.startswith(stem)}
    for option, ending in siblings.items():
        for key, value in keys(group, option).items():
            for parse in _READ:
                if ending.isdigit() and int(ending) and _number(value) == parse(ending):
                    return f"{group}={option} {group}.{key}={parse(digits):g}"
    return ""


_READ = (float, lambda digits: int(digits) / 100, lambda digits: float(f"{digits[0]}.{digits[1:]}"))


def _number(value: Any) -> float | None:
    """Convert a value to a number, or None; YAML reads 1e-3 as a string."""
    try:
        return None if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        return None


def _of_timm(group: str, name: str) -> str:
    if group != "model":
        return ""
    from timm import is_model  # timm costs a second to import

    return f"model=timm model.name={name}" if is_model(name.partition(".")[0]) else ""


def _joined(listed: Sequence[str], word: str = "or") -> str:
    return f" {word} ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
