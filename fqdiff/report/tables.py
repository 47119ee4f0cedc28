"""The report's tables as data: what each cell says, and what it is sorted by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fqdiff.evidence.comparison import BASELINE, FLOOR
from fqdiff.report.data import ModelRow, Report, mean_fisher
from fqdiff.report.words import (
    DISTRIBUTION_COLUMNS,
    NETWORK_COLUMNS,
    PAIRED_COLUMNS,
    interval,
    measured,
    noise_share,
    pair_columns,
    times_smaller,
)
from fqdiff.values import Comparison, Curve, Plan


@dataclass(frozen=True)
class Cell:
    """What a cell says, and the number or text that it is sorted by; without one it comes last."""

    text: str
    key: float | str | None = None


EMPTY = Cell("")


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. ``title``: what it shows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def tables(report: Report) -> list[Table]:
    """All of the report's tables."""
    metrics = [paired_table(report), distribution_table(report), pair_table(report)]
    return [model_table(report), *metrics, *decile_tables(report), *plan_tables(report)]


def model_table(report: Report) -> Table:
    """Sizes, distances from the baseline's images, and whether FID tells."""
    value = report.comparison
    header: tuple[str, ...] = ("model", "bits/weight", "bytes", "times smaller", "image MSE", "of other noise")
    rows = [
        (
            _word(row.label),
            _number(row.bits_per_weight, ".3f"),
            _number(row.file_bytes, ",d"),
            _number(times_smaller(report, row), ".2f"),
            _measured(value, "image_mse", row.role, PAIRED_COLUMNS),
            _share(report, row),
            *_differences(value, row.role),
        )
        for row in report.rows
    ]
    header += (f"FID minus baseline's [{value.level:.0%}]", "verdict by FID")
    return Table("Models", header, tuple(rows))


def _differences(value: Comparison, role: str) -> tuple[Cell, Cell]:
    if role == BASELINE:
        return EMPTY, EMPTY
    d = value.pair("fid", role, BASELINE)
    return Cell(interval(d, "+.3f"), d.difference), _word(d.verdict)


def paired_table(report: Report) -> Table:
    """How far each model is from the baseline, given the same inputs, or the same noise."""
    value = report.comparison
    means = {
        metric: {c.of: (c.mean, c.high - c.mean) for c in curves}
        for metric, curves in (("noise_error", value.noise_error), ("divergence", value.divergence))
        if curves
    }
    rows = [
        (
            _word(row.label),
            *(_with_half(of.get(row.role), NETWORK_COLUMNS[metric][1]) for metric, of in means.items()),
            *(_measured(value, metric, row.role, PAIRED_COLUMNS) for metric in PAIRED_COLUMNS),
        )
        for row in report.rows
        if row.role != BASELINE
    ]
    names = [*(NETWORK_COLUMNS[m][0] for m in means), *(name for name, _ in PAIRED_COLUMNS.values())]
    return Table("Same inputs, same noise: distance from the baseline", ("model", *names), tuple(rows))


def distribution_table(report: Report) -> Table:
    """Every metric of sets of images, of every role."""
    value = report.comparison
    there = {m.metric for m in value.measures}
    columns = {metric: c for metric, c in DISTRIBUTION_COLUMNS.items() if metric in there}
    rows = [(_word(row.label), *(_measured(value, m, row.role, columns) for m in columns)) for row in report.rows]
    return Table("Against real images", ("model", *(name for name, _ in columns.values())), tuple(rows))


def pair_table(report: Report) -> Table:
    """Every pair by what the models predict, by their images, and by FID and KID, with verdicts."""
    columns = pair_columns()
    labels = report.labels
    rows = tuple(
        (
            _word(labels[d.of]),
            _word(labels[d.against]),
            _word(columns[d.metric][0]),
            Cell(interval(d, f"+{columns[d.metric][1]}"), d.difference),
            Cell(f"{d.adjusted_p:.2g}", d.adjusted_p),
            _word(d.verdict),
            _number(d.images_needed, ",d"),
        )
        for d in report.comparison.differences
        if d.metric in columns
    )
    title = f"difference [{report.comparison.level:.0%}]"
    header = ("model", "against", "metric", title, "adjusted p", "verdict", "N that would tell")
    return Table("Every pair", header, rows)


def plan_groups(report: Report) -> list[dict[str, Plan]]:
    """The plans by label, those of one architecture together."""
    groups: dict[tuple[str, ...], dict[str, Plan]] = {}
    for role, plan in report.plans.items():
        groups.setdefault(tuple(e.parameter for e in plan.entries), {})[report.labels[role]] = plan
    return list(groups.values())


def fisher_values(report: Report) -> dict[str, float]:
    """Fisher value of each weight tensor, of the first table that has it."""
    values: dict[str, float] = {}
    for subject in reversed(list(report.fisher.values())):
        values |= mean_fisher(subject)
    return values


def plan_tables(report: Report) -> list[Table]:
    """The format of each weight tensor in every plan, beside its Fisher value; a table for each architecture."""
    values, groups = fisher_values(report), plan_groups(report)
    found = []
    for number, plans in enumerate(groups, start=1):
        rows = [
            (
                _word(first.parameter),
                _word(first.block),
                _number(values.get(first.parameter), ".2e"),
                *(Cell(entry.format_label, entry.code_bits) for entry in entries),
            )
            for first, *others in zip(*(plan.entries for plan in plans.values()), strict=True)
            if len(first.shape) >= 2
            for entries in [(first, *others)]
        ]
        title = "Format of each weight tensor" + (f", architecture {number}" if len(groups) > 1 else "")
        found.append(Table(title, ("weight tensor", "block", "Fisher value", *plans), tuple(rows)))
    return found


def decile_tables(report: Report) -> list[Table]:
    """Noise errors by tenths of the timesteps, and divergence by tenths of the sampler's steps, as far as measured."""
    value = report.comparison
    found = []
    if value.noise_error:
        title = "Noise error by timestep: half the squared error, summed over pixels"
        found.append(_decile_table(title, "t", value.noise_error, report))
    if value.divergence:
        title = "Divergence of sampler runs by step: mean squared distance of x"
        found.append(_decile_table(title, "step", value.divergence, report))
    return found


def _decile_table(title: str, axis: str, curves: Sequence[Curve], report: Report) -> Table:
    """A row for each model: the mean of its curve's points in each tenth of the axis, and of all of them."""
    tenths = deciles([point.at for point in curves[0].points if point.weight])
    header = ("model", *(f"{axis} {low}" if low == high else f"{axis} {low} to {high}" for low, high in tenths), "mean")
    rows = []
    for curve in curves:
        means = [decile_mean(curve, low, high) for low, high in tenths]
        mean = Cell(f"{curve.mean:.2e} ± {curve.high - curve.mean:.1e}", curve.mean)
        rows.append((_word(report.labels[curve.of]), *(_number(m, ".2e") for m in means), mean))
    return Table(title, header, tuple(rows))


def deciles(at: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of ``at``, which rise, in each tenth of the way from 0 to the last; tenths without any are left out."""
    tenths: dict[int, list[int]] = {}
    for place in at:
        tenths.setdefault(min(9, 10 * place // (at[-1] + 1)), []).append(place)
    return [(places[0], places[-1]) for places in tenths.values()]


def decile_mean(curve: Curve, low: int, high: int) -> float:
    """Mean of the curve's points from ``low`` to ``high``, each with its weight."""
    inside = [point for point in curve.points if low <= point.at <= high]
    return sum(p.weight * p.value for p in inside) / sum(p.weight for p in inside)


def _word(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None, form: str) -> Cell:
    return EMPTY if value is None else Cell(f"{value:{form}}", value)


def _measured(value: Comparison, metric: str, role: str, columns: Mapping[str, tuple[str, str]]) -> Cell:
    """Value and interval; empty where the role has no such measure."""
    found = next((m for m in value.measures if (m.metric, m.of) == (metric, role)), None)
    return EMPTY if found is None else Cell(measured(found, columns[metric][1]), found.value)


def _with_half(found: tuple[float, float] | None, form: str) -> Cell:
    """A value and half its interval."""
    return EMPTY if found is None else Cell(f"{found[0]:{form}} ± {found[1]:{form}}", found[0])


def _share(report: Report, row: ModelRow) -> Cell:
    if row.role in (BASELINE, FLOOR):
        return EMPTY
    return Cell(noise_share(report, row.role), report.comparison.measure("image_mse", row.role).value)
