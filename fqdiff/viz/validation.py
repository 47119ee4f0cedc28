"""Measured against foretold: one panel per score, one point per candidate."""

import io
from typing import Any

import torch
from torch import Tensor

from fqdiff.values import Correlation, Validation

# Okabe and Ito 2008: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#000000")
RIVALS = ("weight_mse", "hutchinson", "modelopt", "autoround")
TITLES = {
    "gram": "Gram matrix of output errors",
    "weight_mse": "weight MSE",
    "hutchinson": "Hessian trace (HAWQ)",
    "modelopt": "(dL/dy dy)² (ModelOpt)",
    "autoround": "|g dw| (AutoRound)",
}


def scatter(value: Validation) -> dict[str, bytes]:
    """PNG and SVG by suffix: output error of each candidate against the best Fisher score, the Gram matrix and the rivals."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = value.output_error @ value.weights
    rho = {r.score: r for r in value.correlations if (r.target, r.subset) == ("output_error", "all")}
    panels = [s for s in (_best_fisher(rho), "gram", *RIVALS) if s in value.scores]
    figure = Figure(figsize=(12, 4 * -(-len(panels) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    shared = None
    for place, score in enumerate(panels, start=1):
        axes = shared = figure.add_subplot(-(-len(panels) // 3), 3, place, sharey=shared)
        drawn = _points(axes, value, value.scores[score], measured)
        if score in ("gram",) or score.endswith("_mean"):
            ends = [float(measured[measured > 0].min()), float(measured.max())] if (measured > 0).any() else [1, 10]
            axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
        title = TITLES.get(score, f"Fisher: {score.replace('_', ', ')}")
        left_out = f", {len(measured) - drawn} not above 0" if drawn < len(measured) else ""
        axes.set(xscale="log", yscale="log", title=title + _told(rho.get(score)), xlabel="foretold" + left_out)
        axes.spines[["top", "right"]].set_visible(False)
        if place % 3 == 1:
            axes.set_ylabel("measured output error")
        if place == 1:
            axes.legend(frameon=False, fontsize=8, markerscale=2)
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "fqdiff"}):  # the same picture, the same bytes
        for suffix, facts in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=120, metadata=facts)
            files[suffix] = buffer.getvalue()
    return files


def _best_fisher(rho: dict[str, Correlation]) -> str:
    """The Fisher score averaged over timesteps with the highest rho: only those are in the unit of the error."""
    means = [name for name in rho if name.endswith("_mean")]
    return max(means, key=lambda name: rho[name].rho or -1.0, default="trajectory")


def _told(row: Correlation | None) -> str:
    return "" if row is None or row.rho is None else f", rho {row.rho:.3f}"


def _points(axes: Any, value: Validation, score: Tensor, measured: Tensor) -> int:
    """One colour per way of storing; how many points a logarithm can show."""
    ways = list(dict.fromkeys((c.format, c.range) for c in value.candidates))
    formats = list(dict.fromkeys(fmt for fmt, _ in ways))
    drawn = 0
    for fmt, kind in ways:
        of_way = torch.tensor([(c.format, c.range) == (fmt, kind) for c in value.candidates])
        shown = of_way & (score > 0) & (measured > 0)
        clipped = kind != "min-max"
        axes.scatter(
            score[shown].numpy(),
            measured[shown].numpy(),
            s=12,
            marker="x" if clipped else "o",
            linewidths=0.8 if clipped else 0,
            color=COLOURS[formats.index(fmt) % len(COLOURS)],
            label=f"{fmt} {kind}" if clipped else fmt,
        )
        drawn += int(shown.sum())
    return drawn
