"""Pictures of a checkpoint's weight tensors.

Shapes: N weight tensors, O output channels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from fqdiff.viz.figures import (
    GREY,
    Array,
    block_styles,
    block_title,
    despine,
    label_blocks,
    label_tensors,
    log_limits,
    log_note,
    log_ticks,
    new_figure,
    row_points,
    rows_height,
)

BINS = 101  # odd: one bin is centred at 0


def channel_magnitudes(weight: Tensor, axis: int) -> Array:
    """Mean |w| within each output channel: [O]."""
    magnitudes: Array = weight.double().abs().movedim(axis, 0).flatten(1).mean(dim=1).numpy()
    return magnitudes


def magnitude_map(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]], axes_of: Mapping[str, int], artifact: str
) -> Figure:
    """Mean |w| of each weight tensor, and of each of its output channels. ``groups``: weight tensors of each block."""
    rows = {name: channel_magnitudes(tensors[name], axes_of[name]) for names in groups.values() for name in names}
    every = np.concatenate(list(rows.values()))
    height = rows_height(len(rows))
    figure = new_figure(10, height, artifact)
    left, right = figure.subplots(1, 2, width_ratios=[1, 3], sharey=True)
    styles = block_styles(groups)
    means = np.array([row.mean() for row in rows.values()])
    size = min(row_points(len(rows), height) / 2, 4.0)  # points
    colours = [styles[block][0] for block, names in groups.items() for _ in names]
    left.scatter(np.where(means > 0, means, np.nan), np.arange(len(rows)), color=colours, s=size**2, zorder=3)
    low, top = log_limits(means)
    left.set(xscale="log", xlim=(low / 1.5, top * 1.5), xlabel="mean |w| of the tensor")
    log_ticks(left.xaxis, low / 1.5, top * 1.5)
    label_tensors(left, groups, height)
    left.grid(color="#e8e8e8", linewidth=0.6)
    colours_of = ScalarMappable(LogNorm(*log_limits(every)), colormaps["viridis"].with_extremes(bad=GREY))
    for row, values in enumerate(rows.values()):
        right.pcolormesh(
            np.linspace(0, 100, len(values) + 1),
            [row - 0.5, row + 0.5],
            np.ma.masked_less_equal(values[None], 0),
            norm=colours_of.norm,
            cmap=colours_of.cmap,
            rasterized=True,
        )
    right.set_facecolor(GREY)
    right.set_xlabel("output channel, in % of the tensor's channels, in order")
    label_blocks(right, groups, height, "white")
    right.tick_params(left=False)
    label = "mean |w| of the channel" + log_note(every, "grey", "darkest")
    bar = figure.colorbar(colours_of, ax=right, label=label, pad=0.02, aspect=40)
    log_ticks(bar.ax.yaxis, *log_limits(every))
    figure.suptitle("Weight magnitudes: each weight tensor, and each of its output channels", fontsize=11)
    return figure


def histograms(tensors: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]], artifact: str) -> Figure:
    """How the weights of each block's tensors are distributed; one range of weights for all blocks."""
    values = {block: torch.cat([tensors[n].flatten() for n in names]).numpy() for block, names in groups.items()}
    reach = max(float(np.abs(v).max()) for v in values.values()) or 1.0
    columns = math.ceil(math.sqrt(len(groups)))
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(10, max(6.0, 2.4 * rows), artifact)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    styles = block_styles(groups)
    highest = 1
    for axes, (block, weights) in zip(panels.flat, values.items(), strict=False):
        counts, edges = np.histogram(weights, BINS, (-reach, reach))
        highest = max(highest, int(counts.max()))
        axes.stairs(counts, edges, fill=True, color=styles[block][0], alpha=0.85)
        axes.set_title(
            f"{block_title(block)}: {weights.size:,} weights\nstd {weights.std():.3g}, max |w| {np.abs(weights).max():.3g}",
            fontsize=9,
        )
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
        axes.set_axisbelow(True)
        despine(axes)
    panels[0, 0].set(yscale="log", ylim=(0.7, 2 * highest))
    figure.supxlabel("weight", fontsize=10)
    figure.supylabel(f"weights per bin of {2 * reach / BINS:.2g}", fontsize=10)
    figure.suptitle("Distribution of each block's weight tensors", fontsize=11)
    return figure
