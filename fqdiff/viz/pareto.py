"""Bytes against quality: which models nothing else beats at their size."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from fqdiff.evidence.comparison import BASELINE, model_roles
from fqdiff.values import Comparison
from fqdiff.viz.figures import GREY, SAME, TOLD, despine, left_title, new_figure, plain

HALO = 22  # points: what the pointer can hit around a dot
LINE, LETTER = 10, 4.7  # points: height of a label, width of a letter
APART = 32  # points: how far a label may stand from its dot
MIB = 2**20
UNTOLD = "not distinguishable"


@dataclass(frozen=True)
class Dot:
    """One model: its file's size in bytes, a metric and its interval."""

    role: str
    size: int
    value: float
    low: float
    high: float


def front(dots: Sequence[Dot]) -> list[Dot]:
    """The dots that no other beats: none that is as small has a lower value. The smallest first."""
    best: list[Dot] = []
    for dot in sorted(dots, key=lambda d: (d.size, d.value)):
        if not best or dot.value < best[-1].value:
            best.append(dot)
    return best


def error_dots(value: Comparison, file_bytes: Mapping[str, int]) -> list[Dot]:
    """Image MSE of each model whose size is known."""
    found = [value.measure("image_mse", role) for role in model_roles(value.models) if role in file_bytes]
    return [Dot(m.of, file_bytes[m.of], m.value, m.low, m.high) for m in found]


def fid_dots(value: Comparison, file_bytes: Mapping[str, int]) -> list[Dot]:
    """FID minus the baseline's of each model whose size is known: a paired difference, whose interval is the narrower one."""
    found = [value.pair("fid", role, BASELINE) for role in model_roles(value.models) if role in file_bytes]
    return [Dot(d.of, file_bytes[d.of], d.difference, d.low, d.high) for d in found]


def pareto(value: Comparison, labels: Mapping[str, str], file_bytes: Mapping[str, int], artifact: str) -> Figure:
    """File size against image error on the left and FID minus the baseline's on the right, with intervals.

    On the left a line joins what nothing beats, and what something beats is hollow; on the right there is no such line, since a
    FID below the baseline's is no gain: orange is what FID tells from the baseline.
    ``file_bytes``: by role, where known. The gids of dots are ``image_mse-ROLE`` and ``fid-ROLE``.
    """
    figure = new_figure(10, 4.4, artifact)
    left, right = figure.subplots(1, 2)
    errors, fids = error_dots(value, file_bytes), fid_dots(value, file_bytes)
    bottom = min((d.value for d in errors if d.value > 0), default=1.0) / 10
    if any(d.value > 0 for d in errors):
        left.set_yscale("log")
        errors = [Dot(d.role, d.size, max(d.value, bottom), max(d.low, d.value / 10, bottom), d.high) for d in errors]
    best = front(errors)
    left.step([d.size / MIB for d in best], [d.value for d in best], where="post", **FRONT)
    base = plain(labels[BASELINE])
    notes = ["hollow: another is no larger, and nearer"] if len(best) < len(errors) else []
    notes += ["at the bottom: identical"] if any(d.value <= bottom for d in errors) else []
    left.set(xlabel="file size, MiB" + (f"\n({'; '.join(notes)})" if notes else ""))
    left.set_ylabel(f"image MSE to {base}, same noise")
    right.set(xlabel="file size, MiB\n(orange: told apart)", ylabel=f"FID minus {base}'s")
    right.axhline(0, color="black", linewidth=0.8)
    if value.floor_seed is not None:
        floor = value.pair("fid", "floor", BASELINE)
        half = (floor.high - floor.low) / 2
        right.axhspan(-half, half, color=GREY, alpha=0.4, linewidth=0, zorder=0)
        right.set_xlabel("file size, MiB\n(orange: told apart; grey: other noise alone)")
    told = {d.of for d in value.differences if (d.metric, d.against) == ("fid", BASELINE) and d.verdict != UNTOLD}
    sizes = [file_bytes[role] / MIB for role in file_bytes if role == BASELINE or role in {d.role for d in errors}]
    for axes, metric, dots in ((left, "image_mse", errors), (right, "fid", fids)):
        _size_axis(axes, sizes)
        _draw(axes, metric, dots, {d.role for d in dots} - {d.role for d in best} if axes is left else set(), told)
        if BASELINE in file_bytes:
            axes.axvline(file_bytes[BASELINE] / MIB, color="#808080", linestyle=":", linewidth=1)
            axes.annotate(
                base, (file_bytes[BASELINE] / MIB, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8
            )
    left_title(figure, f"N = {value.n}, features {plain(value.features)}, {value.level:.0%} intervals")
    figure.draw_without_rendering()  # labels stand apart in points, so the layout has to be known
    for axes, dots in ((left, errors), (right, fids)):
        _name(axes, sorted(dots, key=lambda d: (d.role not in {b.role for b in best}, d.value, d.role)), labels)
    return figure


FRONT: Mapping[str, object] = {"color": "#606060", "linewidth": 1, "linestyle": "--", "zorder": 1}


def _draw(axes: Axes, metric: str, dots: Sequence[Dot], hollow: Set[str], told: Set[str]) -> None:
    """Dots with intervals; those of roles in ``hollow`` are, and of FID those in ``told`` have a colour of their own."""
    for dot in dots:
        colour = TOLD if metric == "fid" and dot.role in told else SAME
        face = "#ffffff" if dot.role in hollow else colour
        x = dot.size / MIB
        axes.plot([x, x], [dot.low, dot.high], color=colour, linewidth=1.5)
        axes.plot(x, dot.value, "o", color=colour, markerfacecolor=face, markersize=6)
        axes.plot(x, dot.value, "o", markersize=HALO, alpha=0.0, gid=f"{metric}-{dot.role}", zorder=9)


def _size_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """Logarithmic, in steps of about a half."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5) if max(sizes) / min(sizes) < 20 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    despine(axes)


def _name(axes: Axes, dots: Sequence[Dot], labels: Mapping[str, str]) -> None:
    """Name each dot on the side that has room, none on top of another; one that would stand too far from its dot is left out."""
    points = 72 / axes.figure.dpi
    left, _, width, _ = (edge * points for edge in axes.get_window_extent().bounds)
    boxes: list[tuple[float, float, float]] = []  # left, right, bottom of what is written already
    for dot in dots:
        x, y = (float(p) * points for p in axes.transData.transform((dot.size / MIB, dot.value)))
        name = plain(labels[dot.role], 34)
        side = -1 if x > left + width / 2 else 1
        start, end = sorted((x + 6 * side, x + (6 + LETTER * len(name)) * side))
        height = y + 4
        while any(start < b and end > a and abs(height - bottom) < LINE for a, b, bottom in boxes):
            height += 1
        if height > y + 4 + APART:
            continue
        boxes.append((start, end, height))
        axes.annotate(
            name,
            (dot.size / MIB, dot.value),
            (6 * side, height - y),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            fontsize=8,
        )
