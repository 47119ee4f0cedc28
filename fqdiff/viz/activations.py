"""Pictures of activations over the sampler's run: boxes and histograms by timestep, and channels on both sides of a skip.

Shapes: K groups of timesteps, n numbers, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from fqdiff.viz.figures import COLOURS, Array, despine, new_figure, plain
from fqdiff.viz.maps import TIMESTEP

BINS = 80
COLUMNS = 6
BOX = (1, 25, 50, 75, 99)  # per cent: whiskers, box, median
BOXES = f"box: {BOX[1]} to {BOX[3]} %, whiskers: {BOX[0]} to {BOX[4]} %, dots: extremes"


@dataclass(frozen=True)
class SiteNumbers:
    """What one site computes. ``numbers``: [n] for each of K groups; ``low``, ``high`` [K] their exact extremes."""

    numbers: Sequence[Array]
    low: Array
    high: Array


@dataclass(frozen=True)
class SkipNumbers:
    """Numbers [C, n] of each channel of what a layer is given, the skip's from channel ``boundary`` on, and extremes [C]."""

    numbers: Array
    low: Array
    high: Array
    boundary: int


def box_statistics(numbers: Array, low: float, high: float) -> dict[str, Any]:
    """Quantiles of ``numbers`` as matplotlib's boxes take them, with the extremes as dots."""
    least, lower, middle, upper, most = np.percentile(numbers, BOX)
    return {"whislo": least, "q1": lower, "med": middle, "q3": upper, "whishi": most, "fliers": [low, high]}


def boxes_over_time(sites: Mapping[str, SiteNumbers], timesteps: Array, artifact: str) -> Figure:
    """A panel per site: a box per group of ``timesteps`` [K] (their means), from noise on the left to the image."""
    figure, panels = _panels(len(sites), artifact)
    for axes, (name, site) in zip(panels, sites.items(), strict=True):
        each = zip(site.numbers, site.low, site.high, strict=True)
        _boxes(axes, [box_statistics(*one) for one in each], [COLOURS[1]] * len(timesteps))
        axes.set_title(plain(name), fontsize=8)
        axes.set_xticks([0, len(timesteps) - 1], [f"{timesteps[0]:.0f}", f"{timesteps[-1]:.0f}"])
    figure.supxlabel(TIMESTEP, fontsize=10)
    figure.suptitle(f"Activations over the sampler's run\n{BOXES}", fontsize=11)
    return figure


def histograms_over_time(sites: Mapping[str, SiteNumbers], timesteps: Array, artifact: str) -> Figure:
    """A panel per site: the density of its numbers, one line per group of timesteps; logarithmic, for tails to show."""
    figure, panels = _panels(len(sites), artifact)
    norm = Normalize(float(timesteps.min()), max(float(timesteps.max()), float(timesteps.min()) + 1))
    colours = ScalarMappable(norm, ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256))))
    for axes, (name, site) in zip(panels, sites.items(), strict=True):
        low, high = float(site.low.min()), float(site.high.max())
        high = high if high > low else low + 1.0
        for t, numbers in zip(timesteps, site.numbers, strict=True):
            counts, edges = np.histogram(numbers, BINS, (low, high))
            density = np.where(counts > 0, counts / max(counts.sum(), 1) / (edges[1] - edges[0]), np.nan)
            axes.plot((edges[:-1] + edges[1:]) / 2, density, color=colours.to_rgba(t), linewidth=0.8)
        axes.set_yscale("log")
        axes.tick_params(axis="y", which="both", labelleft=False)
        axes.set_title(plain(name), fontsize=8)
    figure.colorbar(colours, ax=panels, label=TIMESTEP, shrink=0.5, aspect=40)
    figure.suptitle("Distribution of activations, by timestep; density, logarithmic", fontsize=11)
    return figure


def skip_channels(layers: Mapping[str, SkipNumbers], artifact: str) -> Figure:
    """A row per layer that is given a joined skip: a box per channel, in one colour on either side."""
    figure = new_figure(11, 2.6 * len(layers) + 0.8, artifact)
    rows = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, (name, layer) in zip(rows, layers.items(), strict=True):
        each = zip(layer.numbers, layer.low, layer.high, strict=True)
        sides = [COLOURS[0] if c < layer.boundary else COLOURS[3] for c in range(len(layer.low))]
        _boxes(axes, [box_statistics(*one) for one in each], sides)
        axes.axvline(layer.boundary - 0.5, color="black", linewidth=0.8, linestyle=":")
        before, after = (slice(0, layer.boundary), slice(layer.boundary, None))
        spans = [f"{layer.low[s].min():.3g} to {layer.high[s].max():.3g}" for s in (before, after)]
        axes.set_title(f"{plain(name)}: decoder {spans[0]}, skip {spans[1]}", fontsize=9)
        axes.set_xticks([0, layer.boundary, len(layer.low) - 1])
    rows[-1].set_xlabel("input channel: the decoder's, then the skip's")
    figure.suptitle(f"What layers are given where a skip is joined, channel by channel\n{BOXES}", fontsize=11)
    return figure


def _panels(count: int, artifact: str) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = new_figure(max(2.4 * columns, 6.0), 1.5 * rows + 1.6, artifact)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.tick_params(labelsize=6)
        despine(axes)
    return figure, list(panels[:count])


def _boxes(axes: Axes, statistics: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    drawn = axes.bxp(
        statistics,
        positions=range(len(statistics)),
        widths=0.7,
        patch_artist=True,
        manage_ticks=False,
        medianprops={"color": "black", "linewidth": 0.8},
        whiskerprops={"linewidth": 0.6},
        capprops={"linewidth": 0.6},
        boxprops={"linewidth": 0.4},
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": "#606060"},
    )
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set_facecolor(colour)
    axes.set_xlim(-0.8, len(statistics) - 0.2)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    despine(axes)
