"""What a sparse exchange costs and keeps: the section of a report with its picture and its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedsparse.analysis.baseline import dense_of
from fedsparse.analysis.exchange import fraction_of
from fedsparse.analysis.exchange_lines import Place, lines, places, references, sent_fraction
from fedsparse.analysis.exchange_plot import curves_figure, exchange_figure
from fedsparse.analysis.files import DASH
from fedsparse.analysis.page import Picture, Section, Table, slug
from fedsparse.analysis.pareto import AXES, front, point
from fedsparse.analysis.table import Row
from fedsparse.analysis.tables import MARKED, accuracy, difference, megabytes, own_note

_COST = "bytes_total"
_HEAD = (
    "exchange",
    "sent",
    "sent up, MB",
    "in all, MB",
    "of dense",
    "test accuracy, %",
    "difference to dense, points",
    "seeds",
)
_TEXT = (
    "What a client sends is chosen anew each round, by the rule that a line is named after: mean test accuracy over "
    "seeds ± half the 95 % interval, against the mean bytes of the whole run (1 MB = 10^6 bytes; both directions, and "
    "setup). The points of a line, from left to right, are the fractions sent: {fractions}. Stars and grey marks are "
    "what they stand beside: dense training, which sends everything, and masks fixed before the first round, of which "
    "both sides know the positions. Lines are drawn a little beside each other, by no more than a marker; the table is "
    "exact. 'Front': no other row of the table has as few bytes in all and as good a mean. "
)


def section(table: Sequence[Row]) -> list[Section]:
    """Show accuracy against bytes of sparse exchanges, if there are any."""
    parts = places(table)
    if not parts:
        return []
    found = {sent_fraction(row): fraction_of(row.runs[0].summary) for row in table if row.exchange}
    sent = {value: found[value] for value in sorted(found)}
    text = _TEXT.format(fractions=", ".join(filter(None, sent.values())) or "none") + MARKED + own_note(table)
    against = [_against_bytes(table, key) for key in (_COST, "bytes_up")]
    tables = [_table(place, shown, table) for place, shown in parts.items()]
    curves = [_over_rounds(table, value, words) for value, words in sent.items()]
    return [Section("Sparse exchange", text, [*against, *tables, *curves])]


def _against_bytes(table: Sequence[Row], key: str) -> Picture:
    caption = f"Sparse exchanges: test accuracy against MB {AXES[key]}"
    return Picture(f"exchange-{key}", caption, lambda: exchange_figure(table, key))


def _over_rounds(table: Sequence[Row], value: float, sent: str) -> Picture:
    caption = f"Sparse exchanges: accuracy over rounds, {f'{sent} sent' if sent else 'without a fraction'}"
    return Picture(f"exchange-rounds-{slug(sent) or 'other'}", caption, lambda: curves_figure(table, value))


def _table(place: Place, shown: Sequence[Row], table: Sequence[Row]) -> Table:
    """Lay out one place: references first, then lines with their fractions ascending."""
    named = list(_named(shown))
    best = {id(named[i][1]) for i in front([point(row, _COST) for _, row in named])}
    link = any(row.by_seed("link_seconds") for _, row in named)
    body = [[*_cells(name, row, table, link), "yes" if id(row) in best else ""] for name, row in named]
    return Table([*_HEAD[:5], *["link, s"] * link, *_HEAD[5:], "front"], body, ", ".join(filter(None, place)))


def _named(shown: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    named: Mapping[str, Row] = references(shown)
    yield from sorted(named.items(), key=lambda item: (item[0] != "dense", item[0]))
    for (rule, rest), rows in lines(shown).items():
        yield from ((", ".join(filter(None, [rule, rest])), row) for row in rows)


def _cells(name: str, row: Row, table: Sequence[Row], link: bool) -> list[str]:
    dense, bytes_ = dense_of(row, table), row.over_seeds(_COST).mean
    of_dense = f"{bytes_ / dense.over_seeds(_COST).mean:.1%}" if dense and dense.over_seeds(_COST).mean else DASH
    sent = fraction_of(row.runs[0].summary) or DASH
    seconds = [row.over_seeds("link_seconds").text()] * link
    figures = [accuracy(row), difference(row, dense, row.headline), str(len(row.runs))]
    return [
        name,
        sent,
        megabytes(row.over_seeds("bytes_up").mean, 2),
        megabytes(bytes_, 2),
        of_dense,
        *seconds,
        *figures,
    ]
