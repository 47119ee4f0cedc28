"""Heat maps over timesteps: one row per tensor or layer, block by block.

Shapes: R rows, T timesteps.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from fqdiff.values import FisherEntry, FisherTable
from fqdiff.viz.figures import (
    ENDS,
    GREY,
    Array,
    in_blocks,
    label_blocks,
    label_tensors,
    log_limits,
    log_note,
    log_ticks,
    new_figure,
    plain,
    rows_height,
)

FISHER_VALUE = "mean squared per-sample gradient F_t"
LINEAR_PERCENTILE = 95
Entries = Mapping[str, FisherEntry]
TIMESTEP = "timestep t (0 = image, T-1 = noise)"


def heading(table: FisherTable, what: str) -> str:
    """A title: what is shown, then the kind of Fisher and what it rests on."""
    count = len(table.timesteps)
    return f"{what}\n{plain(table.kind)} Fisher, {count:,} timestep{'s' * (count != 1)} x {table.samples:,} samples"


def scaled_to_maximum(values: Array) -> Array:
    """``values`` [R, T], each timestep divided by its largest, as the layer-adaptive paper has it; 0 where all are 0."""
    top = values.max(axis=0, keepdims=True)
    scaled: Array = np.divide(values, top, out=np.zeros_like(values), where=top > 0)
    return scaled


def relative_error(means: Array, errors: Array) -> Array:
    """Standard error over mean, in per cent; NaN where the mean is 0."""
    ratio: Array = np.divide(errors, means, out=np.full_like(means, np.nan), where=means > 0)
    return 100 * ratio


def linear_map(table: FisherTable, entries: Entries, artifact: str) -> Figure:
    """Fisher values per tensor and timestep, linear; the few largest, which would leave all others dark, share a colour."""
    values = stack(entries, "mean")
    top = float(np.percentile(values, LINEAR_PERCENTILE)) or float(values.max()) or 1.0
    above = float((values > top).mean())
    label = FISHER_VALUE + (f"\n(the largest {above:.1%} share the brightest colour)" if above else "")
    title = heading(table, "Fisher value of each weight tensor, linear")
    return heat_map(table, entries, values, Normalize(0, top), title, label, artifact)


def log_map(table: FisherTable, entries: Entries, artifact: str) -> Figure:
    """Fisher values per tensor and timestep, logarithmic."""
    title = heading(table, "Fisher value of each weight tensor, logarithmic")
    return _log_map(table, entries, title, FISHER_VALUE, artifact)


def scaled_map(table: FisherTable, entries: Entries, artifact: str) -> Figure:
    """Fisher values of the blocks' tensors as a share of the timestep's largest: the paper's picture.

    Without stem and head, which are in no block, and whose values leave all others dark.
    """
    chosen = {name: e for name, e in entries.items() if e.block not in ENDS} or entries
    values = scaled_to_maximum(stack(chosen, "mean"))
    title = heading(table, "Fisher value of each weight tensor of the blocks, scaled to the largest of each timestep")
    return heat_map(table, chosen, values, Normalize(0, 1), title, "F_t / largest F_t of the timestep", artifact)


def error_map(table: FisherTable, entries: Entries, artifact: str) -> Figure:
    """Relative standard error per tensor and timestep: how far the other pictures can be trusted."""
    values = relative_error(stack(entries, "mean"), stack(entries, "standard_error"))
    known = values[np.isfinite(values)]
    top = min(float(known.max(initial=0)) or 1.0, 100.0)
    label = "standard error / mean over the samples, in %" + ("\n(grey: mean is 0)" if len(known) < values.size else "")
    title = heading(table, "Relative standard error of each weight tensor's Fisher value")
    return heat_map(table, entries, values, Normalize(0, top), title, label, artifact, "cividis")


def activation_map(table: FisherTable, artifact: str) -> Figure:
    """Fisher values of the layers' outputs, logarithmic."""
    title = heading(table, "Fisher value of each layer's output, logarithmic")
    return _log_map(table, table.activations, title, "mean squared per-sample gradient of the output", artifact)


def stack(entries: Entries, field: str) -> Array:
    """One field of all entries, block by block: [R, T]."""
    rows: list[Tensor] = [getattr(entries[name], field) for names in in_blocks(entries).values() for name in names]
    return np.stack([row.double().numpy() for row in rows])


def _log_map(table: FisherTable, entries: Entries, title: str, label: str, artifact: str) -> Figure:
    """A heat map of logarithms; values of exactly 0 are grey."""
    values = stack(entries, "mean")
    label += log_note(values, "grey", "darkest")
    shown = np.where(values > 0, values, np.nan)
    return heat_map(table, entries, shown, LogNorm(*log_limits(values)), title, label, artifact)


def heat_map(
    table: FisherTable,
    entries: Entries,
    values: Array,
    norm: Normalize,
    title: str,
    label: str,
    artifact: str,
    colours: str = "viridis",
) -> Figure:
    """``values`` [R, T] as colours; NaN is grey."""
    height = rows_height(len(values))
    figure = new_figure(10, height, artifact)
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        cell_edges(table.timesteps.double().numpy()),
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_invalid(values),
        norm=norm,
        cmap=colormaps[colours].with_extremes(bad=GREY),
        rasterized=True,  # in an SVG too: 75,000 cells are an image
    )
    axes.set_facecolor(GREY)
    label_tensors(axes, in_blocks(entries), height)
    label_blocks(axes, in_blocks(entries), height, "white")
    axes.set_xlabel(TIMESTEP)
    axes.set_title(title, fontsize=11)
    if len(table.timesteps) <= 8:
        axes.set_xticks(table.timesteps.tolist())
    finite = values[np.isfinite(values)]
    assert norm.vmin is not None
    assert norm.vmax is not None
    low, high = bool((finite < norm.vmin).any()), bool((finite > norm.vmax).any())
    extend = "both" if low and high else "min" if low else "max" if high else "neither"
    bar = figure.colorbar(mesh, ax=axes, label=label, pad=0.02, aspect=40, extend=extend)
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax.yaxis, norm.vmin, norm.vmax)
    return figure


def cell_edges(timesteps: Array) -> Array:
    """Edges half-way between increasing ``timesteps`` [T]: [T + 1]."""
    if len(timesteps) == 1:
        return np.array([timesteps[0] - 0.5, timesteps[0] + 0.5])
    first, last = 1.5 * timesteps[0] - 0.5 * timesteps[1], 1.5 * timesteps[-1] - 0.5 * timesteps[-2]
    return np.array([first, *(timesteps[1:] + timesteps[:-1]) / 2, last])
