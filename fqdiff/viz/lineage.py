"""What was made from what, as a graph of boxes.

Columns from left to right, one for each kind. A line that passes a column has a lane of its own there, between the boxes; the
lines from one box share their lanes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqdiff.viz.figures import new_figure, plain

COLUMN, ROW, MARGIN = 1.9, 0.74, 0.35  # inches
LANE = 0.3  # rows that a line takes that passes by
LONGEST = 20  # characters of a line in a box
SIDE = 0.37  # columns from a box's middle to where lines leave and arrive

LINE: Mapping[str, Any] = {"color": "#808080", "linewidth": 0.8, "zorder": 1}

Lane = tuple[str, int]  # the box where its lines come from, and the column that they pass


@dataclass(frozen=True)
class Node:
    """One artifact: its kind, the lines below it, and the keys of what it was made from."""

    kind: str
    lines: tuple[str, ...]
    sources: tuple[str, ...]
    there: bool


@dataclass(frozen=True)
class Layout:
    """Column and row of each box, by key, and of each lane; rows grow downwards from 0, ``rows`` in all."""

    boxes: Mapping[str, tuple[int, float]]
    lanes: Mapping[Lane, tuple[int, float]]
    rows: float


def columns_of(nodes: Mapping[str, Node]) -> dict[str, int]:
    """The column of each kind: how many steps its last artifact is from what was made from nothing, along the longest way."""
    found: dict[str, int] = {}

    def depth(key: str, above: frozenset[str]) -> int:
        if key not in found:  # no recipe can have a loop; what a stranger wrote may
            sources = [s for s in nodes[key].sources if s in nodes and s not in above]
            found[key] = max((1 + depth(s, above | {key}) for s in sources), default=0)
        return found[key]

    columns: dict[str, int] = {}
    for key, node in nodes.items():
        columns[node.kind] = max(depth(key, frozenset({key})), columns.get(node.kind, 0))
    return columns


def layout(nodes: Mapping[str, Node]) -> Layout:
    """Places for boxes and lanes; in a column they stand in the order of what they come from."""
    columns = columns_of(nodes)
    column = {key: columns[node.kind] for key, node in nodes.items()}
    reach = {key: column[key] for key in nodes}  # the last column that a line from this box arrives in
    for key, node in nodes.items():
        for source in (s for s in node.sources if s in nodes):
            reach[source] = max(reach[source], column[key])
    stacks: list[tuple[list[str | Lane], float]] = []
    middle: dict[str | Lane, float] = {}  # rows from the middle of the column
    for number in range(1 + max(column.values(), default=-1)):
        members: list[str | Lane] = [key for key in nodes if column[key] == number]
        members += [(key, number) for key in nodes if column[key] < number < reach[key]]
        near = {one: [middle[at] for at in _before(one, number, nodes, column)] for one in members}
        members.sort(key=lambda one: float(np.mean(near[one])) if near[one] else 0.0)
        height = sum(_height(one) for one in members)
        top = -height / 2
        for one in members:
            middle[one] = top + _height(one) / 2
            top += _height(one)
        stacks.append((members, height))
    rows = max((height for _, height in stacks), default=1.0)
    places = {one: (number, rows / 2 + middle[one]) for number, (members, _) in enumerate(stacks) for one in members}
    boxes = {one: place for one, place in places.items() if isinstance(one, str)}
    return Layout(boxes, {one: place for one, place in places.items() if not isinstance(one, str)}, rows)


def _height(one: str | Lane) -> float:
    return 1.0 if isinstance(one, str) else LANE


def _before(one: str | Lane, number: int, nodes: Mapping[str, Node], column: Mapping[str, int]) -> list[str | Lane]:
    """What lies one column to the left of ``one`` on the way from where it comes from."""
    sources = [one[0]] if not isinstance(one, str) else [s for s in nodes[one].sources if s in nodes]
    return [s if column[s] == number - 1 else (s, number - 1) for s in sources if column[s] < number]


def graph(nodes: Mapping[str, Node], artifact: str) -> Figure:
    """Boxes from left to right, lines to what each was made from. A box's gid is ``node-`` and its place in ``nodes``."""
    found = layout(nodes)
    across = 1 + max((x for x, _ in found.boxes.values()), default=0)
    figure = new_figure(MARGIN + COLUMN * across, MARGIN + ROW * found.rows, artifact)
    figure.set_layout_engine("none")  # the axes fill the figure
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(-0.5, across - 0.5), ylim=(found.rows + 0.1, -0.1))
    for start, end in lines_of(nodes, found):
        _line(axes, start, end)
    for x, y in found.lanes.values():
        axes.plot([x - SIDE, x + SIDE], [y, y], **LINE)
    for number, (key, node) in enumerate(nodes.items()):
        x, y = found.boxes[key]
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": "#ffffff",
            "edgecolor": "#0072b2" if node.there else "#808080",
            "linestyle": "-" if node.there else "--",
        }
        taken = any(source in found.boxes for source in node.sources), any(key in n.sources for n in nodes.values())
        axes.plot([x - SIDE * taken[0], x + SIDE * taken[1]], [y, y], **LINE)  # behind the box, to where its lines are
        label = "\n".join(plain(line, LONGEST) for line in (node.kind, *node.lines))
        axes.text(x, y, label, ha="center", va="center", fontsize=8.5, bbox=box, gid=f"node-{number}", zorder=3)
    return figure


def lines_of(nodes: Mapping[str, Node], found: Layout) -> Sequence[tuple[tuple[float, float], tuple[float, float]]]:
    """Both ends of every line between two columns, each once: from a box or a lane to a box or a lane of the next."""
    column = {key: x for key, (x, _) in found.boxes.items()}
    places: dict[str | Lane, tuple[int, float]] = dict(found.boxes.items())
    places |= found.lanes.items()
    ways = []
    for one, (x, y) in places.items():
        for source in _before(one, x, nodes, column):
            ways.append(((x - 1 + SIDE, places[source][1]), (x - SIDE, y)))
    return ways


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A line that leaves and arrives level."""
    t = np.linspace(0, 1, 24)
    ease = t * t * (3 - 2 * t)
    x, y = start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * ease
    axes.plot(x, y, **LINE)
