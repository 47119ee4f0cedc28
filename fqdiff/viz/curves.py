"""Fisher values as curves and dots: block means over timesteps, weight tensors in order, whole sampler runs.

Shapes: N tensors of a block, T timesteps.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from fqdiff.values import FisherEntry, FisherTable, TrajectoryEntry
from fqdiff.viz.figures import (
    GREY,
    Array,
    block_styles,
    block_title,
    despine,
    in_blocks,
    label_blocks,
    label_tensors,
    log_limits,
    log_note,
    log_ticks,
    new_figure,
    row_points,
    rows_height,
    short_names,
)
from fqdiff.viz.maps import FISHER_VALUE, TIMESTEP, heading

FEW = 30  # timesteps up to which each gets a marker


def block_mean(entries: Sequence[FisherEntry]) -> tuple[Array, Array]:
    """Mean Fisher value over all elements of ``entries``, [T], and its standard error, [T].

    The tensors of a block share their samples, and how far they vary together is not in the table. So the standard error is
    the largest possible, that of tensors that rise and fall as one: sum of numel * standard error over sum of numel.
    """
    shares = np.array([e.numel for e in entries], dtype=np.float64) / sum(e.numel for e in entries)
    mean = shares @ np.stack([e.mean.double().numpy() for e in entries])
    error = shares @ np.stack([e.standard_error.double().numpy() for e in entries])
    return mean, error


def block_curves(table: FisherTable, artifact: str) -> Figure:
    """One line per block over timesteps, with a band of one standard error to either side."""
    timesteps = table.timesteps.double().numpy()
    means = {
        block: block_mean([table.entries[name] for name in names]) for block, names in in_blocks(table.entries).items()
    }
    every = np.concatenate([mean for mean, _ in means.values()])
    low, _ = log_limits(every)
    styles = block_styles(means)
    figure = new_figure(10, 6, artifact)
    axes = figure.add_subplot()
    for block, (mean, error) in means.items():
        colour, line = styles[block]
        shown = np.where(mean > 0, mean, np.nan)
        bottom = np.maximum(shown - error, low / 10)  # a band that reaches 0 reaches the lower edge
        marker = "o" if len(timesteps) <= FEW else ""
        axes.fill_between(timesteps, bottom, shown + error, color=colour, alpha=0.2, linewidth=0)
        axes.plot(timesteps, shown, line, color=colour, marker=marker, markersize=4, label=block_title(block))
        if len(timesteps) <= FEW:
            axes.vlines(timesteps, bottom, shown + error, color=colour, linewidth=1)
    _log_scale(axes, "y", every, np.concatenate([mean + error for mean, error in means.values()]))
    axes.set(xlabel=TIMESTEP, ylabel=FISHER_VALUE + log_note(every, "not drawn", "not drawn"))
    axes.set_title(heading(table, "Mean Fisher value of each block's weights, ± 1 standard error"), fontsize=11)
    if len(timesteps) <= 8:
        axes.set_xticks(table.timesteps.tolist())
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    size = min(10.0, 260 / len(means))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=size)
    despine(axes)
    return figure


def tensor_curves(table: FisherTable, weights: Sequence[str], artifact: str) -> Figure:
    """The paper's picture: a panel per block, its weight tensors in order, one curve per timestep."""
    groups = in_blocks({name: table.entries[name] for name in weights})
    values = {b: np.stack([table.entries[n].mean.double().numpy() for n in names]) for b, names in groups.items()}
    every = np.concatenate([v.ravel() for v in values.values()])
    columns = math.ceil(math.sqrt(len(groups)))
    rows = math.ceil(len(groups) / columns)
    timesteps = table.timesteps.double().numpy()
    norm = Normalize(timesteps[0], max(timesteps[-1], timesteps[0] + 1))
    colours = ScalarMappable(norm, ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256))))  # not the palest
    figure = new_figure(10, max(6.0, 2.9 * rows), artifact)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (block, names) in zip(panels.flat, groups.items(), strict=False):
        _timestep_lines(axes, values[block], colours.to_rgba(timesteps))
        step = math.ceil(len(names) / (36 / columns))
        labels = short_names(names)
        axes.set_xticks(range(0, len(names), step), labels[::step], rotation=45, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(block_title(block), fontsize=10)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
        despine(axes)
    _log_scale(panels[0, 0], "y", every, every)
    figure.supylabel(FISHER_VALUE + log_note(every, "not drawn", "not drawn"), fontsize=10)
    figure.suptitle(heading(table, "Fisher value of each block's weight tensors, in the network's order"), fontsize=11)
    ticks = table.timesteps.tolist() if len(timesteps) <= 8 else None
    figure.colorbar(colours, ax=panels, label=TIMESTEP, pad=0.02, aspect=40, ticks=ticks)
    return figure


def trajectory_dots(entries: Mapping[str, TrajectoryEntry], weights: Sequence[str], artifact: str) -> Figure:
    """Fisher value of each weight tensor for the sampler's whole run, ± 1 standard error."""
    groups = in_blocks({name: entries[name] for name in weights})
    chosen = [entries[name] for names in groups.values() for name in names]
    mean, error = np.array([e.mean for e in chosen]), np.array([e.standard_error for e in chosen])
    low, _ = log_limits(mean)
    styles = block_styles(groups)
    colours = [styles[e.block][0] for e in chosen]
    height = rows_height(len(chosen))
    figure = new_figure(10, height, artifact)
    axes = figure.add_subplot()
    shown, places = np.where(mean > 0, mean, np.nan), np.arange(len(chosen))
    size = min(row_points(len(chosen), height) / 2, 4.0)  # points
    axes.hlines(places, np.maximum(shown - error, low / 10), shown + error, color=colours, linewidth=size / 3)
    axes.scatter(shown, places, color=colours, s=size**2, zorder=3)
    _log_scale(axes, "x", mean, mean + error)
    label_tensors(axes, groups, height)
    label_blocks(axes, groups, height, GREY)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.6)
    axes.set_xlabel("mean squared gradient through the whole sampler run" + log_note(mean, "not drawn", "not drawn"))
    runs = max(len(e.samples) for e in chosen)
    axes.set_title(
        f"Fisher value of each weight tensor for the whole sampler run, ± 1 standard error\ntrajectory Fisher, {runs:,} runs",
        fontsize=11,
    )
    despine(axes)
    return figure


def _timestep_lines(axes: Axes, values: Array, colours: Array) -> None:
    """One curve per timestep through the tensors of ``values`` [N, T]; 0 leaves a gap."""
    places = np.arange(len(values))
    shown = np.where(values > 0, values, np.nan)
    lines = [np.column_stack([places, column]) for column in shown.T]
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=0.8, rasterized=True))
    at = np.repeat(places, shown.shape[1])
    axes.scatter(at, shown.ravel(), c=np.tile(colours, (len(values), 1)), s=5, linewidths=0, rasterized=True)


def _log_scale(axes: Axes, direction: str, values: Array, reach: Array) -> None:
    """A logarithmic axis from the smallest of ``values`` that can be shown to the largest of ``reach``."""
    low, top = log_limits(values)
    limits = (low / 1.5, 1.5 * max(top, float(reach.max())))
    if direction == "x":
        axes.set(xscale="log", xlim=limits)
        log_ticks(axes.xaxis, *limits)
    else:
        axes.set(yscale="log", ylim=limits)
        log_ticks(axes.yaxis, *limits)
