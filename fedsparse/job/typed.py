"""Checks overrides before Hydra parses them, whose messages seldom name the valid form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from fedsparse.job import shipped
from fedsparse.job.advice import no_option

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def arranged(arguments: Sequence[str]) -> list[str]:
    """Check a command line, and move flags behind the overrides, which argparse expects contiguous.

    Raises:
        ValueError: an unknown flag, or an invalid override.

    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    known, unknown = parser.parse_known_intermixed_args(list(arguments))
    for flag in unknown:
        meant = flag.lstrip("-")
        raise ValueError(f"{flag} is no flag; " + (f"write {meant}" if "=" in meant else "--help lists them"))
    check_typed(known.overrides, sweeps=known.multirun)
    flags = list(arguments)
    for override in known.overrides:
        flags.remove(override)
    return [*known.overrides, *flags]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def check_typed(overrides: Sequence[str], sweeps: bool = False) -> None:
    """Check the form of overrides.

    Args:
        overrides: such as ``seed=1``.
        sweeps: whether a key may have several values, one for each cell.

    Raises:
        ValueError: one line, with the valid form.

    """
    parser = OverridesParser.create()
    sweeps = sweeps or any(typed.startswith("hydra.mode=") for typed in overrides)
    for place, typed in enumerate(overrides):
        _check_shape(typed, overrides[place + 1 : place + 3])
        try:
            override = parser.parse_override(typed)
        except HydraException:
            raise ValueError(
                f"{typed} cannot be read as key=value; quote a value with spaces or brackets: 'key=\"a b\"'"
            ) from None
        _check_value(typed, override, sweeps)


def _check_shape(typed: str, following: Sequence[str]) -> None:
    """Refuse an override without key or value, or with spaces around its equals sign."""
    key, equals, value = typed.partition("=")
    if typed.startswith("-"):
        raise ValueError(f"{typed}: write {typed.lstrip('-')}" if equals else f"{typed} is for the command line only")
    if typed.startswith("~"):
        if typed[1:] in shipped.groups():
            raise ValueError(
                f"{typed}: a run needs a {typed[1:]}; it is one of {', '.join(shipped.options(typed[1:]))}"
            )
        if typed[1:] in shipped.sections():
            raise ValueError(f"{typed}: a run needs the keys of {typed[1:]}")
        return
    if following and (following[0].startswith("=") or (equals and not value and "=" not in following[0])):
        whole = "".join([typed, *following[: 2 if following[0] == "=" else 1]])
        raise ValueError(f"write {whole}, without spaces around the equals sign")
    if equals and key.strip() and (key != key.strip() or (value != value.lstrip() and value.strip())):
        raise ValueError(f"write {key.strip()}={value.strip()}, without spaces around the equals sign")
    if not equals:
        raise ValueError(_without_value(typed))
    if not key or not value.strip():
        raise ValueError(f"{typed} has no {'value' if key else 'key'}; write key=value, or key=null for none")


def _without_value(word: str) -> str:
    """Write the error line for a word without equals sign, with a suggestion."""
    if word in shipped.groups():
        return f"{word} has no value; it is one of {', '.join(shipped.options(word))}: write {word}=<one of them>"
    if word in shipped.sections():
        return f"{word} is no key; it has keys, such as {word}.{_first_key(word)}"
    groups = [group for group in shipped.groups() if word in shipped.options(group)]
    meant = " or ".join(f"{group}={word}" for group in groups) or f"{word}=<value>"
    return f"{word} has no {'key' if groups else 'value'}; write {meant}"


def _check_value(typed: str, override: Override, sweeps: bool) -> None:
    """Refuse several values without a sweep, percentages, and numbers as options."""
    if override.is_sweep_override() and not sweeps:
        key, _, values = typed.partition("=")
        raise ValueError(f"{typed} are several values: add -m to run each, or write {key}=[{values}] for a list")
    parsed = override.value()
    for value in parsed.list if isinstance(parsed, ChoiceSweep) else [parsed]:
        if isinstance(value, str) and (share := _PERCENT.fullmatch(value)):
            raise ValueError(f"{typed}: write {float(share[1]) / 100:g} for {value}")
        _check_option(override.key_or_group, value)


def _check_option(key: str, value: Any) -> None:
    if key in shipped.groups() and (value is None or isinstance(value, bool | int | float)):
        raise ValueError(no_option(key, value))
    if key in shipped.sections() and not isinstance(value, dict):
        raise ValueError(
            f"there is no {key}={value}: {key} has keys alone, such as {key}.{_first_key(key)}; leave it out"
        )


def _first_key(section: str) -> str:
    return next((key for key in shipped.sections()[section] if not key.startswith("_")), "_target_")


def given_twice(overrides: Sequence[str]) -> list[str]:
    """List a line for each repeated key, of which Hydra takes the last value.

    >>> given_twice(["seed=1", "logger=csv", "seed=2"])
    ['seed is given twice; seed=2 counts']
    """
    keys = [override.partition("=")[0] for override in overrides]
    last = dict(zip(keys, overrides, strict=True))
    return [f"{key} is given twice; {last[key]} counts" for key in last if keys.count(key) > 1]
