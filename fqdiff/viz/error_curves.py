"""How far models are from the baseline, timestep by timestep and sampler step by sampler step."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fqdiff.evidence.comparison import BASELINE
from fqdiff.evidence.decisions import half_width
from fqdiff.values import Comparison, Curve
from fqdiff.viz.figures import COLOURS, LINES, despine, log_limits, log_ticks, new_figure, plain

FEW = 30  # points up to which each gets a marker
HEIGHT = 4.4  # inches


def both_curves(value: Comparison, labels: Mapping[str, str], artifact: str) -> Figure:
    """Noise errors on the left, divergence on the right; only one where the other was not measured."""
    panels = [draw for curves, draw in ((value.noise_error, noise_panel), (value.divergence, run_panel)) if curves]
    figure = new_figure(5 * max(len(panels), 1.4), HEIGHT, artifact)
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, value, labels)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def one_panel(curves: Sequence[Curve], value: Comparison, labels: Mapping[str, str]) -> Figure:
    """Either of the two alone, for a page, which has title and legend beside it."""
    figure = new_figure(7, HEIGHT)
    axes = figure.add_subplot()
    (noise_panel if curves is value.noise_error else run_panel)(axes, value, labels)
    axes.set_title("")
    return figure


def curve_style(number: int) -> tuple[str, str]:
    """Colour and line of the curve of that number, from 0; after six the colours return with another line."""
    return COLOURS[(3 - number) % 6], LINES[number // 6 % len(LINES)]


def noise_title(value: Comparison) -> str:
    """What the curves of noise errors show."""
    return f"Noise predicted for {value.noise_error[0].samples} held-out images at each t"


def run_title(value: Comparison) -> str:
    """What the curves of divergence show."""
    return f"{value.divergence[0].samples} runs, {plain(value.sampler)}"


def limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Ends of the axis of timesteps or steps: a little more than the points."""
    first, last = curves[0].points[0].at, curves[0].points[-1].at
    margin = 0.02 * max(last - first, 1)
    return first - margin, last + margin


def noise_panel(axes: Axes, value: Comparison, labels: Mapping[str, str]) -> None:
    """Error of the noise predicted for held-out images, over timesteps."""
    _draw(axes, value.noise_error, value.level, labels)
    axes.set(xlabel="timestep t", ylabel=f"1/2 |eps - eps of {plain(labels[BASELINE], 20)}|², summed over pixels")
    axes.set_title(noise_title(value), fontsize=10)


def run_panel(axes: Axes, value: Comparison, labels: Mapping[str, str]) -> None:
    """Distance between runs of the sampler from the same noise, over its steps."""
    _draw(axes, value.divergence, value.level, labels)
    axes.set(
        xlabel="sampler step (0: noise)", ylabel=f"mean squared distance of x from {plain(labels[BASELINE], 20)}'s"
    )
    axes.set_title(run_title(value), fontsize=10)


def _draw(axes: Axes, curves: Sequence[Curve], level: float, labels: Mapping[str, str]) -> None:
    """One line per curve on a logarithmic axis, with a band of its intervals; 0, such as at a start, is not drawn."""
    every = np.array([p.value for curve in curves for p in curve.points])
    low, top = log_limits(every)
    highest = top
    for number, curve in enumerate(curves):
        at = np.array([p.at for p in curve.points])
        middle = np.array([p.value if p.value > 0 else np.nan for p in curve.points])
        half = np.array([half_width(p.standard_error, level, curve.samples - 1) for p in curve.points])
        highest = max(highest, float(np.nanmax(middle + half, initial=0.0)))
        colour, line = curve_style(number)
        same = "" if curve.mean > 0 else " (identical)"
        axes.fill_between(at, np.maximum(middle - half, low / 2), middle + half, color=colour, alpha=0.2, linewidth=0)
        marker = "o" if len(at) <= FEW else ""
        axes.plot(at, middle, line, color=colour, marker=marker, markersize=4, label=plain(labels[curve.of]) + same)
    axes.set_yscale("log")
    axes.set_ylim(low / 2, 1.5 * highest)
    log_ticks(axes.yaxis, low / 2, 1.5 * highest)
    axes.set_xlim(*limits(curves))
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    despine(axes)
