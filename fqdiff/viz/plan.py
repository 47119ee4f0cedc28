"""The picture of a plan: bits of every weight tensor as bars, beside its Fisher value."""

import numpy as np
from matplotlib.figure import Figure

from fqdiff.quant.formats import get_format
from fqdiff.values import Plan
from fqdiff.viz.figures import (
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
    rows_height,
)


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
    bits = [get_format(row.format).bits for row in rows]
    left.barh(places, bits, color=colours, height=0.75)
    for place, row, width in zip(places, rows, bits, strict=True):
        left.annotate(
            plain(row.format), (width, float(place)), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    left.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.set(xlim=(1, 80), xlabel="bits per weight, codes alone")
    label_tensors(left, groups, height)
    fisher = np.array([row.score if row.score is not None else np.nan for row in rows])
    known = fisher[np.isfinite(fisher)]
    if known.size:
        low, top = log_limits(known)
        right.scatter(np.where(fisher >= low, fisher, np.nan), places, color=colours, s=14, zorder=3)
        right.set(xscale="log", xlim=(low / 1.5, top * 1.5))
        right.set_xlabel("mean Fisher value of the tensor's weights" + log_note(known, "not drawn", "not drawn"))
        log_ticks(right.xaxis, low / 1.5, top * 1.5)
        right.grid(color="#e8e8e8", linewidth=0.6)
    else:
        right.set_xticks([])
        right.text(0.5, 0.5, "no Fisher values:\nthe plan was made without", transform=right.transAxes, ha="center")
    label_blocks(right, groups, height, "#d0d0d0")
    right.tick_params(left=False)
    despine(left)
    title = f"{plan.bits_per_weight:.3f} bits per weight, everything counted: {plan.file_bytes:,} bytes"
    if plan.budget is not None:
        title += f"\nscore {plain(plan.budget.score)}, predicted {plan.budget.predicted:.4g}"
    figure.suptitle(title, fontsize=11)
    return figure
