"""What figures share: a canvas without a display, colours, labels that do not overlap, and files that do not change.

Shapes: R rows, one per tensor.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

Array = NDArray[np.float64]
FORMATS = ("png", "svg")
DPI = 120
DECADES = 10  # of a log scale, at most: what lies further below the largest value is rounding noise
GREY = "#c8c8c8"

# Okabe and Ito's palette (Color Universal Design, 2008), told apart by colour-blind readers; its yellow is too faint on white.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
SAME, TOLD = COLOURS[3], COLOURS[4]  # of models: not told from the baseline, told apart; orange means nothing else
ENDS = {"stem": "#000000", "head": "#808080"}
LINES = ("-", "--", "-.", ":")


class InBlock(Protocol):
    """Anything that belongs to a block."""

    @property
    def block(self) -> str: ...


def new_figure(width: float, height: float, artifact: str = "") -> Figure:
    """An empty figure of so many inches, the artifact's id small in its lower right corner."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    corner = 0.16 / height if artifact else 0
    figure.set_layout_engine("constrained", rect=(0, corner, 1, 1 - corner))
    figure.text(0.995, 0.03 / height, plain(artifact, 100), ha="right", fontsize=7, color="#606060")
    return figure


def left_title(figure: Figure, text: str) -> None:
    """A title that begins where the figure does: on a small screen, which shows its left part first, it is read."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def render(figure: Figure, image_format: str) -> bytes:
    """``figure`` as a PNG or SVG file; text in SVG stays text. Equal figures give equal bytes: no date, no random ids."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        _settle(figure)
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if image_format == "svg" else {}
    with rc_context({"svg.hashsalt": "fqdiff", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=image_format, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def _settle(figure: Figure) -> None:
    """Lay ``figure`` out for good: every further drawing would move things by a little, and the solver's last bits vary."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(float(v), 5) for v in axes.get_position().bounds])  # type: ignore[arg-type]
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((round(float(x), 5), round(float(y), 5)))


def plain(text: str, longest: int = 40) -> str:
    """``text`` as a label: no formula, no control characters, not endless. Names come from files that strangers may write."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return (shown if len(shown) <= longest else "…" + shown[1 - longest :]).replace("$", r"\$")


def in_blocks(entries: Mapping[str, InBlock]) -> dict[str, list[str]]:
    """Names of ``entries`` block by block, each in the order of its first appearance."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.block, []).append(name)
    return groups


def block_title(block: str) -> str:
    """``block 3``, ``stem``."""
    return plain(f"block {block}" if block.isdigit() else block)


def block_styles(blocks: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each block; after six blocks the colours return with another line."""
    numbered = [b for b in blocks if b not in ENDS]
    styles = {b: (COLOURS[i % 6], LINES[i // 6 % len(LINES)]) for i, b in enumerate(numbered)}
    return styles | {block: (colour, "--") for block, colour in ENDS.items()}


def short_names(names: Sequence[str]) -> list[str]:
    """``names`` of one block without ``.weight``, and without the parts that all begin with; one stays at least."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    common = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))
    return [plain(".".join(p[min(common, len(p) - 1) :])) for p in parts]


def log_limits(values: Array) -> tuple[float, float]:
    """Ends of a log scale: the largest value, and the smallest above 0 that is at most DECADES below it."""
    positive = values[values > 0]
    if not positive.size:
        return 0.1, 1.0
    top = max(float(positive.max()), 1e-290)
    return min(max(float(positive.min()), top * 10.0**-DECADES), top / 10), top


def log_note(values: Array, zero: str, below: str) -> str:
    """A line on what a log scale of ``values`` cannot show, and what happens to it; empty where it shows everything."""
    low, _ = log_limits(values)
    notes = [f"0: {zero}"] if (values == 0).any() else []
    if ((values > 0) & (values < low)).any():
        notes.append(f"under {low:.0e}, {DECADES} decades below the largest: {below}")
    return f"\n({'; '.join(notes)})" if notes else ""


def rows_height(rows: int) -> float:
    """Inches that a figure of one row per tensor takes: room for every label, up to about 80."""
    return min(max(6.0, 1.8 + 0.105 * rows), 11.0)


def label_tensors(axes: Axes, groups: Mapping[str, Sequence[str]], height: float) -> None:
    """Name row r at y = r, first on top, in a figure of ``height`` inches; every second or k-th where all would overlap."""
    labels = [label for names in groups.values() for label in short_names(names)]
    space = row_points(len(labels), height)
    step = math.ceil(7.5 / space)
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=min(max(0.85 * space * step, 6.5), 8.5))
    axes.set_ylim(len(labels) - 0.5, -0.5)


def label_blocks(axes: Axes, groups: Mapping[str, Sequence[str]], height: float, line: str) -> None:
    """Name the blocks on the right of their rows, and draw a line between two."""
    side = axes.secondary_yaxis("right")
    ends = np.cumsum([len(names) for names in groups.values()])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color=line, linewidth=1)
    places: list[float] = []
    titles: list[str] = []
    apart = 11 / row_points(int(ends[-1]), height)  # rows: of two names that would overlap the second is left out
    for (block, names), end in zip(groups.items(), ends, strict=True):
        centre = end - 0.5 - len(names) / 2
        if not places or centre - places[-1] >= apart:
            places.append(centre)
            titles.append(block_title(block))
    side.set_yticks(places, titles, fontsize=9)
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)


def row_points(rows: int, height: float) -> float:
    """Points per row in a figure of ``height`` inches, next to its title and axis labels."""
    return 72 * (height - 1.4) / rows


def log_ticks(axis: Axis, low: float, top: float) -> None:
    """Ticks of a logarithmic axis from ``low`` to ``top``: powers of ten, or 1, 2 and 5 where there are hardly any."""
    if top / low < 200:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def despine(axes: Axes) -> None:
    """Take away the lines above and on the right, which say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
