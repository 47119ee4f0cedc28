"""The picture of a comparison: how far each model's images are from the baseline's, and its FID's difference with intervals."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from fqdiff.evidence.comparison import model_roles
from fqdiff.values import Comparison
from fqdiff.viz.figures import GREY, SAME, TOLD, despine, left_title, new_figure, plain

ROW, MARGIN = 0.35, 1.9  # inches: of one model, and of all else


def intervals(value: Comparison, labels: Mapping[str, str], artifact: str) -> Figure:
    """Image error on the left, with that of other noise as a line; FID minus the baseline's on the right.

    The grey band is what other noise alone does to FID: half the width of the floor's interval on either side. ``labels``: what
    each role is called.
    """
    roles = model_roles(value.models)
    places = np.arange(len(roles))[::-1]
    figure = new_figure(10, MARGIN + ROW * len(roles), artifact)
    left, right = figure.subplots(1, 2, sharey=True)
    errors = [value.measure("image_mse", role) for role in roles]
    fids = [value.pair("fid", role, "baseline") for role in roles]
    for place, error, fid in zip(places, errors, fids, strict=True):
        colour = SAME if fid.verdict == "not distinguishable" else TOLD
        if error.value > 0:
            left.plot([max(error.low, error.value / 10), error.high], [place, place], color=SAME, linewidth=1.5)
            left.plot(error.value, place, "o", color=SAME, markersize=5)
        else:
            left.annotate("identical images", (0.02, float(place)), xycoords=("axes fraction", "data"), va="center")
        right.plot([fid.low, fid.high], [place, place], color=colour, linewidth=1.5)
        right.plot(fid.difference, place, "o", color=colour, markersize=5)
    left.set_yticks(places, [plain(labels[role]) for role in roles])
    left.set_ylim(-0.7, len(roles) - 0.3)
    if any(error.value > 0 for error in errors):
        left.set_xscale("log")
    left.set_xlabel(f"mean squared error to {plain(labels['baseline'])}'s image of the same noise")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel(f"FID minus {plain(labels['baseline'])}'s\n(orange: told apart; grey: other noise alone)")
    if value.floor_seed is not None:
        floor = value.pair("fid", "floor", "baseline")
        half = (floor.high - floor.low) / 2
        right.axvspan(-half, half, color=GREY, alpha=0.4, linewidth=0)
        unrelated = value.measure("image_mse", "floor").value
        left.axvline(unrelated, color="#606060", linestyle="--", linewidth=1)
        left.annotate("other noise", (unrelated, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    for axes in (left, right):
        despine(axes)
        axes.grid(axis="x", color="#e8e8e8", linewidth=0.6)
    left_title(figure, f"N = {value.n}, features {plain(value.features)}, {value.level:.0%} intervals")
    return figure
