"""Names of sparse exchanges, whose clients choose anew each round what they send, from summary.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsparse.analysis.files import finite

_SPARSE = ("topk", "randomk", "threshold", "layers", "pattern")
_OTHERS = (None, "full", "masked")  # what travels is known beforehand; older summaries do not say
_PRECISIONS = {"float16": "half"}


def is_sparse(summary: Mapping[str, Any]) -> bool:
    """Say whether a summary is of a run that chose anew each round what to send.

    An exchange of one's own counts if it gives its rule.
    """
    exchange = summary.get("exchange")
    return exchange in _SPARSE or (exchange not in _OTHERS and summary.get("exchange_rule") is not None)


def exchange_label(summary: Mapping[str, Any]) -> str:
    """Name a sparse exchange; "" for every other.

    >>> exchange_label({"exchange": "topk", "exchange_rule": "largest_change", "exchange_fraction": 0.1,
    ...                 "exchange_feedback": 1.0, "exchange_precision": "float16"})
    'largest_change 10 %, feedback, half'

    """
    return _joined(f"{rule_of(summary)} {fraction_of(summary)}".strip(), summary)


def line_label(summary: Mapping[str, Any]) -> str:
    """Name a sparse exchange without its fraction, "" for every other: the line of a picture that its points lie on."""
    return _joined(rule_of(summary), summary)


def rule_of(summary: Mapping[str, Any]) -> str:
    """Name what a sparse exchange chooses by; other kinds than single coordinates come first.

    >>> rule_of({"exchange": "layers", "exchange_rule": "largest_change"}), rule_of({"exchange": "randomk"})
    ('layers largest_change', 'randomk')

    """
    exchange, rule = str(summary.get("exchange")), summary.get("exchange_rule")
    if rule is None or rule == exchange:
        return exchange
    return str(rule) if exchange == "topk" else f"{exchange} {rule}"


def fraction_of(summary: Mapping[str, Any]) -> str:
    """Write the fraction that is sent; "" where the rule has none.

    >>> fraction_of({"exchange_fraction": 0.001})
    '0.1 %'

    """
    fraction: Any = summary.get("exchange_fraction")
    return f"{100 * fraction:.4g} %" if finite(fraction) else ""


def variant_of(summary: Mapping[str, Any]) -> str:
    """Say how what was chosen is sent; "" for changes in float32 without error feedback.

    >>> variant_of({"exchange_feedback": 0.9, "exchange_precision": "int8", "exchange_payload": "value"})
    'feedback 0.9, int8, values'

    """
    decay, precision = summary.get("exchange_feedback"), summary.get("exchange_precision")
    feedback = f"feedback {decay:g}".removesuffix(" 1") if finite(decay) else ""
    half = str(_PRECISIONS.get(precision, precision)) if isinstance(precision, str) else ""
    values = "values" * (summary.get("exchange_payload") == "value")
    return ", ".join(filter(None, [feedback, half, values]))


def _joined(chosen: str, summary: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, [chosen, variant_of(summary)])) if is_sparse(summary) else ""
