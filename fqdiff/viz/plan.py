"""Pictures of plans: bits of every weight tensor beside its Fisher value."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqdiff.values import Plan
from fqdiff.viz.figures import (
    Array,
    block_styles,
    despine,
    in_blocks,
    label_blocks,
    label_tensors,
    log_limits,
    log_note,
    log_ticks,
    new_figure,
    plain,
    row_points,
    rows_height,
)

ON_BLUE = "#101010"  # on every blue of the bits, in a dark page too


def bits_and_fisher(plan: Plan, artifact: str) -> Figure:
    """Bits per weight of each weight tensor's codes on the left, its Fisher value on the right, where the plan knows it."""
    entries = {e.parameter: e for e in plan.entries if len(e.shape) >= 2}
    groups = in_blocks(entries)
    rows = [entries[name] for names in groups.values() for name in names]
    styles = block_styles(groups)
    colours = [styles[row.block][0] for row in rows]
    places = np.arange(len(rows))
    height = rows_height(len(rows))
    figure = new_figure(10, height, artifact)
    left, right = figure.subplots(1, 2, sharey=True)
    bits = [row.code_bits for row in rows]
    left.barh(places, bits, color=colours, height=0.75)
    for place, row, width in zip(places, rows, bits, strict=True):
        left.annotate(
            plain(row.format_label), (width, float(place)), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    left.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.set(xlim=(1, 80), xlabel="bits per weight, codes alone")
    label_tensors(left, groups, height)
    fisher = np.array([row.score if row.score is not None else np.nan for row in rows])
    _fisher_dots(right, fisher, colours, "mean Fisher value of the tensor's weights")
    label_blocks(right, groups, height, "#d0d0d0")
    right.tick_params(left=False)
    despine(left)
    title = f"{plan.bits_per_weight:.3f} bits per weight, everything counted: {plan.file_bytes:,} bytes"
    if plan.budget is not None:
        title += f"\nscore {plain(plan.budget.score)}, predicted {plan.budget.predicted:.4g}"
    figure.suptitle(title, fontsize=11)
    return figure


def plans_and_fisher(plans: Mapping[str, Plan], fisher: Mapping[str, float], artifact: str) -> Figure:
    """Format of each weight tensor in every plan, coloured by its bits, and on the right its Fisher value, where it is known.

    ``plans`` of one model, by label; ``fisher`` by parameter, in the network's order.
    """
    entries = [{e.parameter: e for e in plan.entries if len(e.shape) >= 2} for plan in plans.values()]
    order = {name: place for place, name in enumerate(fisher)}
    groups = in_blocks({name: entries[0][name] for name in sorted(entries[0], key=lambda n: order.get(n, len(order)))})
    names = [name for members in groups.values() for name in members]
    height = rows_height(len(names))
    figure = new_figure(10, height, artifact)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    cells = [[of[name] for of in entries] for name in names]
    bits = np.array([[entry.code_bits for entry in row] for row in cells])
    left.imshow(np.log2(bits), cmap="Blues", vmin=-1, vmax=7, aspect="auto", interpolation="nearest")
    size = min(7.0, 0.8 * row_points(len(names), height), 80 / len(plans))
    for row, chosen in enumerate(cells):
        for column, entry in enumerate(chosen):
            cell = left.text(
                column, row, plain(entry.format_label, 12), ha="center", va="center", fontsize=size, color=ON_BLUE
            )
            cell.set_in_layout(False)  # it lies inside, and to measure hundreds takes time
    crowded = len(plans) > 5
    slanted = {"rotation": 35, "ha": "left"} if crowded else {}
    left.set_xticks(range(len(plans)), [plain(name, 26 if crowded else 20) for name in plans], fontsize=8, **slanted)
    left.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    label_tensors(left, groups, height)
    styles = block_styles(groups)
    colours = [styles[entries[0][name].block][0] for name in names]
    _fisher_dots(right, np.array([fisher.get(name, np.nan) for name in names]), colours, "mean Fisher value")
    label_blocks(right, groups, height, "#d0d0d0")
    right.tick_params(left=False)
    return figure


def _fisher_dots(axes: Axes, fisher: Array, colours: Sequence[str], label: str) -> None:
    """One dot per row; NaN where nothing is known."""
    known = fisher[np.isfinite(fisher)]
    if known.size:
        places = np.arange(len(fisher))
        low, top = log_limits(known)
        axes.scatter(np.where(fisher >= low, fisher, np.nan), places, color=colours, s=14, zorder=3)
        axes.set(xscale="log", xlim=(low / 1.5, top * 1.5))
        axes.set_xlabel(label + log_note(known, "not drawn", "not drawn"))
        log_ticks(axes.xaxis, low / 1.5, top * 1.5)
        axes.grid(color="#e8e8e8", linewidth=0.6)
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no Fisher values:\nthe plan was made without", transform=axes.transAxes, ha="center")
