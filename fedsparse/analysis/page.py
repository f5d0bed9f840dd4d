"""A report as Markdown and as one HTML page that needs nothing beside it; whatever a name holds is shown as text.

Tables also as CSV, with numbers alone in their cells, and as LaTeX.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedsparse.analysis.files import DASH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
_PADDED = 60  # characters of a column in a terminal; longer cells stand out
_LONGEST = 120  # characters of a file's name
_PART = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
_NUMBER = re.compile(rf"(?P<mean>[+-]?{_PART})(?: ± (?P<half>{_PART}))?(?P<percent> ?%)?\*?(?: [▲▼†])*$")
_FILLERS = ("", DASH, "no mask")  # cells of a column of numbers that are none
_MINUS = "\N{MINUS SIGN}"
_TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    _MINUS: "$-$",
    "▲": r"$\uparrow$",
    "▼": r"$\downarrow$",
    "†": r"$\dagger$",
    DASH: "--",
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page fetches and runs nothing
_CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --rule: #ccc; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e7; --paper: #18181b; --rule: #52525b; --link: #8ab4f8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid var(--rule); }
p { max-width: 52rem; } nav a { margin-right: 1.2rem; white-space: nowrap; } a { color: var(--link); }
.wide { overflow-x: auto; } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th { text-align: left; border-bottom: 2px solid var(--ink); vertical-align: bottom; }
td { border-bottom: 1px solid var(--rule); } th, td { padding: .25rem .8rem .25rem 0; }
.n { text-align: right; white-space: nowrap; }
"""


class Bold(str):
    """A cell to set in bold."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A table of plain text."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, drawn only when it is written.

    Attributes:
        name: file name without its ending.
        caption: what it shows.
        draw: makes the figure.

    """

    name: str
    caption: str
    draw: Callable[[], Figure] = field(repr=False)


@dataclass(frozen=True)
class Section:
    """A heading, how to read what follows, and what follows."""

    title: str
    text: str
    blocks: Sequence[Table | Picture]


def filled(section: Section) -> Section:
    """Leave out the tables without a line."""
    return replace(section, blocks=[block for block in section.blocks if isinstance(block, Picture) or block.body])


def slug(text: str) -> str:
    """Make a name that is safe as a file and as an anchor.

    >>> slug("dirichlet(0.1), s=50%")
    'dirichlet-0.1-s-50'

    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def png(figure: Figure) -> bytes:
    """Draw a figure; the same one gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def markdown(title: str, sections: Sequence[Section], *, terminal: bool = False) -> str:
    """Write sections as Markdown; pictures are links to files beside it.

    Args:
        title: heading.
        sections: what it holds.
        terminal: for the eye: columns are padded to one width, and pictures left out.

    """
    return "\n\n".join([f"# {_md(title)}", *(part for s in sections for part in _md_section(s, terminal))]) + "\n"


def _md_section(section: Section, terminal: bool) -> Iterator[str]:
    yield f"## {_md(section.title)}"
    yield _md(section.text)
    for block in section.blocks:
        if isinstance(block, Table):
            yield from [f"**{_md(block.caption)}**"] * bool(block.caption)
            yield md_table(block, padded=terminal)
        elif not terminal:
            yield f"![{_md(block.caption)}]({block.name}.png)"


def md_table(table: Table, *, padded: bool = False) -> str:
    """Write a table as Markdown, columns of numbers to the right; if padded, for a terminal too."""
    cells = [[f"**{_md(cell)}**" if isinstance(cell, Bold) else _md(cell) for cell in line] for line in table.body]
    numbers = numeric(table)
    rule = ["---:" if number else "---" for number in numbers]
    lines = [[_md(cell) for cell in table.head], rule, *cells]
    if padded:
        widths = [min(_PADDED, max(map(len, column))) for column in zip(*lines, strict=True)]
        widths[-1] *= numbers[-1]  # a text at the end needs no room behind it
        lines = [[_pad(*cell) for cell in zip(line, widths, numbers, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pad(cell: str, width: int, number: bool) -> str:
    return cell.rjust(width) if number else cell.ljust(width)


def numeric(table: Table) -> list[bool]:
    """Say of each column whether it holds numbers, and where there are none dashes.

    >>> numeric(Table(["rule", "MB", "points"], [["random", "1.0", "-3.0 ± 2.5 ▼"], ["dense", "–", "–"]]))
    [False, True, True]
    """
    columns = [list(column) for column in zip(*table.body, strict=True)]
    return [
        any(map(_NUMBER.match, column)) and all(_NUMBER.match(cell) or cell in _FILLERS for cell in column)
        for column in columns
    ] or [False] * len(table.head)


def csv_table(table: Table) -> str:
    """Write a table as CSV: numbers alone in their cells, half the width of an interval in a column of its own.

    Marks are left out, dashes are empty cells, and a text that a spreadsheet would compute gets an apostrophe.
    """
    head: list[str] = []
    body: list[Sequence[str]] = []
    for name, number, column in zip(table.head, numeric(table), zip(*table.body, strict=True), strict=True):
        if not number:
            head, body = [*head, name], [*body, [_harmless(cell) for cell in column]]
            continue
        found = [_NUMBER.match(cell) for cell in column]
        head.append(name + ", %" * any(m is not None and bool(m["percent"]) for m in found))
        body.append([m["mean"] if m else "" for m in found])
        if any(m is not None and m["half"] for m in found):
            head.append(f"{name}, half of the 95 % interval")
            body.append([(m["half"] or "") if m else "" for m in found])
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([head, *zip(*body, strict=True)])
    return file.getvalue()


def _harmless(text: str) -> str:
    text = "" if text == DASH else _printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def latex_table(table: Table) -> str:
    """Write a table as LaTeX (booktabs), columns of numbers to the right; the caption is a comment."""
    columns = "".join("r" if number else "l" for number in numeric(table))
    cells = [[rf"\textbf{{{_tex(c)}}}" if isinstance(c, Bold) else _tex(c) for c in line] for line in table.body]
    head, *body = [" & ".join(line) + r" \\" for line in [[_tex(cell) for cell in table.head], *cells]]
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    parts = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end]
    caption = [f"% {_printable(table.caption)}"] * bool(table.caption)
    return "\n".join([r"% needs \usepackage{booktabs}", *caption, *parts]) + "\n"


def _tex(text: str) -> str:
    r"""Write text so that LaTeX shows it as it is, and needs no package for it.

    >>> print(_tex("most_sensitive & 50%: -3.0 ± 2.5 ▼"))
    most\_sensitive \& 50\%: $-$3.0 $\pm$ 2.5 $\downarrow$
    """
    return "".join(_TEX.get(letter, letter) for letter in re.sub(r"(?<![\w.])-(?=\d)", _MINUS, _printable(text)))


def tables_of(sections: Sequence[Section]) -> dict[str, Table]:
    """Name every table of a report as its files are named, after section and caption."""
    named: dict[str, Table] = {}
    for section in sections:
        tables = [block for block in section.blocks if isinstance(block, Table)]
        for table in tables:
            name = slug(", ".join(filter(None, [section.title, table.caption * (len(tables) > 1)])))[:_LONGEST].lower()
            named[next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(named) + 3))) if n not in named)] = table
    return named


def _md(text: str) -> str:
    """Write text so that Markdown, the HTML in it, and a terminal show it as it is, on one line."""
    return re.sub(r"([\\|`\[\]])", r"\\\1", html.escape(_printable(text), quote=False))


def page(title: str, sections: Sequence[Section], drawn: Mapping[str, bytes]) -> str:
    """Write sections as an HTML page.

    Args:
        title: heading of the page.
        sections: what it holds.
        drawn: PNG of every picture, by its name; they become part of the page.

    """
    nav = " ".join(f'<a href="#{slug(s.title)}">{_text(s.title)}</a>' for s in sections)
    body = "\n".join(_html_section(section, drawn) for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f'<body>\n<main>\n<h1>{_text(title)}</h1>\n<nav aria-label="Sections">{nav}</nav>\n{body}\n'
        f"</main>\n</body>\n</html>\n"
    )


def _html_section(section: Section, drawn: Mapping[str, bytes]) -> str:
    blocks = [
        _html_table(b, section.title) if isinstance(b, Table) else _html_picture(b, drawn[b.name])
        for b in section.blocks
    ]
    heading = f'<h2 id="{slug(section.title)}">{_text(section.title)}</h2>'
    return "\n".join([heading, f"<p>{_text(section.text)}</p>", *blocks])


def _html_table(table: Table, title: str) -> str:
    """Write a table in a box that scrolls, also by keyboard; a screen reader says the name of the box."""
    numbers = numeric(table)
    head = "".join(f'<th scope="col"{_side(n)}>{_text(cell)}</th>' for cell, n in zip(table.head, numbers, strict=True))
    lines = "\n".join(f"<tr>{''.join(map(_html_cell, line, numbers))}</tr>" for line in table.body)
    caption = f"<caption>{_text(table.caption)}</caption>" * bool(table.caption)
    head = f"{caption}\n<thead><tr>{head}</tr></thead>"
    box = f'<div class="wide" tabindex="0" role="group" aria-label="{_text(table.caption or title)}">'
    return f"{box}<table>{head}\n<tbody>\n{lines}\n</tbody></table></div>"


def _html_cell(cell: str, number: bool) -> str:
    text = f"<b>{_text(cell)}</b>" if isinstance(cell, Bold) else _text(cell)
    return f"<td{_side(number)}>{text}</td>"


def _side(number: bool) -> str:
    return ' class="n"' * number


def _html_picture(picture: Picture, drawn: bytes) -> str:
    data = base64.b64encode(drawn).decode()
    caption = _text(picture.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _text(text: str) -> str:
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    """Put spaces for what is not printed: line ends, and codes that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
