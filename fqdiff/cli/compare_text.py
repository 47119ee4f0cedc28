"""A comparison in words, what is surest first: predictions and runs of the models, images of the same noise, sets of images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fqdiff.cli.show import table
from fqdiff.report.words import (
    BEYOND,
    DECIDING,
    DISTRIBUTION_COLUMNS,
    DIVERGENCE,
    NO_GAIN,
    NOISE_ERROR,
    PAIRED_COLUMNS,
    WHAT_N_COUNTS,
    interval,
    measured,
    pair_columns,
)

if TYPE_CHECKING:
    from fqdiff.evidence.comparison import Difference, Measure
    from fqdiff.values import Comparison, Curve


def comparison_text(artifact: str, value: "Comparison", labels: Mapping[str, str]) -> str:
    """``value`` as tables. ``labels``: what each role is called."""
    parts = [
        f"comparison {artifact}: N = {value.n} images of each, seed {value.seed}; baseline {labels['baseline']}",
        "",
        *network_text(value, labels),
        "Same noise, image by image: how far from the baseline's image",
        paired_table(value, labels),
        "",
        *(["Model against model", model_pair_table(value, labels), ""] if value.models > 1 else []),
        f"Against real images: {value.reference}",
        distribution_table(value, labels),
        "",
        "Difference to the baseline",
        difference_table(value, labels),
        "",
        *notes(value),
    ]
    return "\n".join(parts)


def models_of(value: "Comparison") -> list[str]:
    """The models' roles."""
    from fqdiff.evidence.comparison import model_roles

    return model_roles(value.models)


def cells(measures: "Sequence[Measure]", role: str, columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Value and interval of each metric of ``role``; empty where it was not measured."""
    found = {m.metric: m for m in measures if m.of == role}
    out = []
    for metric, (_, form) in columns.items():
        m = found.get(metric)
        out.append("" if m is None else measured(m, form))
    return out


def paired_table(value: "Comparison", labels: Mapping[str, str]) -> str:
    """One row for each model, and one for images that share nothing but the model."""
    rows = [role for role in (*models_of(value), "floor") if role in labels]
    header = ["model", *(name for name, _ in PAIRED_COLUMNS.values()), "MSE, of other noise's"]
    body = []
    for role in rows:
        error = value.measure("image_mse", role).value
        whole = value.measure("image_mse", "floor").value if value.floor_seed is not None else 0.0
        share = "identical" if error == 0 else f"{error / whole:.3%}" if whole > 0 else ""
        body.append([labels[role], *cells(value.measures, role, PAIRED_COLUMNS), share])
    return table(header, body)


def network_text(value: "Comparison", labels: Mapping[str, str]) -> list[str]:
    """Noise errors and sampler runs, a row for each model; empty where neither was measured."""
    lines = []
    if value.noise_error:
        count, samples = len(value.noise_error[0].points), value.noise_error[0].samples
        lines += [
            f"Noise predicted for held-out images, {NOISE_ERROR}: {count} timesteps, {samples} images at each",
            table(["model", "mean over timesteps", "worst at t", "there"], curve_rows(value.noise_error, labels)),
            "",
        ]
    if value.divergence:
        rows = zip(curve_rows(value.divergence, labels), value.divergence, strict=True)
        runs = [[*row, f"{curve.points[-1].value:.3e}"] for row, curve in rows]
        lines += [
            f"Sampler runs from the same noise, {DIVERGENCE}: {value.sampler}, {value.divergence[0].samples} runs",
            table(["model", "mean over steps", "worst after step", "there", "last step"], runs),
            "",
        ]
    there = {curve.of for curve in (*value.noise_error, *value.divergence)}
    left_out = [labels[role] for role in models_of(value) if lines and role not in there]
    if left_out:
        lines += [f"{', '.join(left_out)}: neither, for noise schedule or kind of output are not the baseline's.", ""]
    return lines


def curve_rows(curves: "Sequence[Curve]", labels: Mapping[str, str]) -> list[list[str]]:
    """Of each curve: model, mean, where it is highest, and how high."""
    return [
        [
            labels[c.of],
            f"{c.mean:.3e} ± {c.high - c.mean:.1e}",
            str(c.worst.at) if c.worst.value else "",
            f"{c.worst.value:.3e}",
        ]
        for c in curves
    ]


def model_pair_table(value: "Comparison", labels: Mapping[str, str]) -> str:
    """Every pair of models by what is surest, and by FID, with a verdict each; pair by pair."""
    columns = {metric: column for metric, column in pair_columns().items() if metric != "kid"}
    found = [d for d in value.differences if d.metric in columns and not {"baseline", "floor"} & {d.of, d.against}]
    roles, metrics = list(labels), list(columns)
    found.sort(key=lambda d: (roles.index(d.against), roles.index(d.of), metrics.index(d.metric)))
    return _verdict_table(
        value, found, ((f"{labels[d.of]} against {labels[d.against]}", columns[d.metric]) for d in found)
    )


def distribution_table(value: "Comparison", labels: Mapping[str, str]) -> str:
    """All metrics of all sets."""
    measured = {m.metric for m in value.measures}
    columns = {metric: column for metric, column in DISTRIBUTION_COLUMNS.items() if metric in measured}
    header = ["model", *(name for name, _ in columns.values())]
    return table(header, [[label, *cells(value.measures, role, columns)] for role, label in labels.items()])


def difference_table(value: "Comparison", labels: Mapping[str, str]) -> str:
    """FID and KID of each model minus the baseline's, and what may be said of it."""
    pairs = [(role, metric) for role in labels if role != "baseline" for metric in DECIDING]
    found = [value.pair(metric, role, "baseline") for role, metric in pairs]
    return _verdict_table(value, found, ((labels[d.of], DISTRIBUTION_COLUMNS[d.metric]) for d in found))


def _verdict_table(
    value: "Comparison", found: "Sequence[Difference]", names: "Iterable[tuple[str, tuple[str, str]]]"
) -> str:
    """A row for each difference. ``names``: of each what is compared, and the metric with how it is written."""
    header = ["model", "metric", f"difference [{value.level:.0%}]", "adjusted p", "verdict", "N that would tell"]
    body = []
    for d, (label, (name, form)) in zip(found, names, strict=True):
        needed = "" if d.images_needed is None else f"{d.images_needed:,}"
        body.append([label, name, interval(d, "+" + form), f"{d.adjusted_p:.2g}", d.verdict, needed])
    return table(header, body)


def notes(value: "Comparison") -> list[str]:
    """What the numbers rest on."""
    lines = [
        f"± and [ ]: {value.level:.0%} intervals from {value.resamples} resamples of images, the same for all models.",
        f"Verdicts: at the {value.level:.0%} level, after Holm's correction over all pairs of a metric.",
        f"{WHAT_N_COUNTS} At 80 % power.",
        f"Features: {value.features}, {value.dimension} dimensions, sha256 {value.features_sha256[:16]}.",
    ]
    if value.floor_seed is not None:
        lines.append(
            f"Other noise: the baseline's model with seed {value.floor_seed}, what chance alone does; its images share no noise, "
            "and its p are of one test each."
        )
    if any(d.verdict in BEYOND for d in value.differences):
        lines.append(NO_GAIN)
    return lines
