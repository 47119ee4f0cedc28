"""Pieces of HTML. What artifacts say comes from files that strangers may write: it enters a page through :func:`text` alone."""

from html import escape

from fqdiff.report.svg import Placed
from fqdiff.report.tables import Cell, Table


def text(value: object) -> str:
    """``value`` as text of a page or of an attribute."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value)))


def sortable_table(table: Table) -> str:
    """``table`` with what the page's script sorts it by."""
    head = "".join(f'<th scope="col"{_words(column)}>{text(name)}</th>' for name, column in _columns(table))
    rows = "".join(
        f'<tr><th scope="row"{_key(row[0])}>{text(row[0].text)}</th>{"".join(_cell(c) for c in row[1:])}</tr>'
        for row in table.rows
    )
    return html_table("sortable", table.title, head, rows)


def _columns(table: Table) -> list[tuple[str, list[Cell]]]:
    """The head of each column with its cells."""
    return [(name, [row[number] for row in table.rows]) for number, name in enumerate(table.header)]


def _words(cells: list[Cell]) -> str:
    """The class of a column that holds words, which stand on the left, its head too."""
    return ' class="words"' if any(isinstance(cell.key, str) for cell in cells) else ""


def html_table(style: str, caption: str, head: str, rows: str) -> str:
    """A table that scrolls. ``head``: cells; ``rows``: rows; both are HTML."""
    inside = f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return scrolling("", caption, f'<table class="{style}">{inside}</table>')


def scrolling(style: str, label: str, inside: str) -> str:
    """What may be wider than the screen: it scrolls on its own, by keyboard too."""
    return f'<div class="scroll {style}" tabindex="0" role="region" aria-label="{text(label)}">{inside}</div>'


def _cell(cell: Cell) -> str:
    return f"<td{_words([cell])}{_key(cell)}>{text(cell.text)}</td>"


def _key(cell: Cell) -> str:
    return "" if cell.key is None else f' data-key="{text(cell.key)}"'


def chart(placed: Placed, label: str) -> str:
    """A figure that scrolls on a small screen."""
    return scrolling("chart", label, f'<div class="frame" style="min-width: {placed.smallest}px">{placed.svg}</div>')
