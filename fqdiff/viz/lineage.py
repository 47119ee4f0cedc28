"""What was made from what, as a graph of boxes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqdiff.viz.figures import new_figure, plain

COLUMN, ROW, MARGIN = 1.6, 0.56, 0.35  # inches


@dataclass(frozen=True)
class Node:
    """One artifact: its kind, the line below it, and the keys of what it was made from."""

    kind: str
    text: str
    sources: tuple[str, ...]
    there: bool


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


def places_of(nodes: Mapping[str, Node]) -> dict[str, tuple[int, float]]:
    """Column and row of each node; in a column the nodes stand in the order of what they were made from."""
    columns = columns_of(nodes)
    column = {key: columns[node.kind] for key, node in nodes.items()}
    rows: dict[str, float] = {}
    for number in range(max(column.values(), default=-1) + 1):
        members = [key for key in nodes if column[key] == number]
        near = {key: [rows[s] for s in nodes[key].sources if s in rows] for key in members}
        members.sort(key=lambda key: float(np.mean(near[key])) if near[key] else 0.0)
        rows |= {key: k - (len(members) - 1) / 2 for k, key in enumerate(members)}
    return {key: (column[key], rows[key]) for key in nodes}


def graph(nodes: Mapping[str, Node], artifact: str) -> Figure:
    """Boxes from left to right, lines to what each was made from. A box's gid is ``node-`` and its place in ``nodes``."""
    places = places_of(nodes)
    across = 1 + max((x for x, _ in places.values()), default=0)
    tall = 1 + 2 * max((abs(y) for _, y in places.values()), default=0.0)
    figure = new_figure(MARGIN + COLUMN * across, MARGIN + ROW * tall, artifact)
    figure.set_layout_engine("none")  # the axes fill the figure
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(-0.5, across - 0.5), ylim=(tall / 2, -tall / 2))
    for key, node in nodes.items():
        x, y = places[key]
        for source in node.sources:
            if source in places:
                _line(axes, places[source], (x, y))
    for number, (key, node) in enumerate(nodes.items()):
        x, y = places[key]
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": "#ffffff",
            "edgecolor": "#0072b2" if node.there else "#808080",
            "linestyle": "-" if node.there else "--",
        }
        label = f"{plain(node.kind, 20)}\n{plain(node.text, 19)}"
        axes.text(x, y, label, ha="center", va="center", fontsize=8.5, bbox=box, gid=f"node-{number}", zorder=3)
    return figure


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A line that leaves and arrives level."""
    t = np.linspace(0, 1, 24)
    ease = t * t * (3 - 2 * t)
    x, y = start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * ease
    axes.plot(x, y, color="#808080", linewidth=0.8, zorder=1)
