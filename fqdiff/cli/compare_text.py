"""A comparison in words: paired metrics first, since they see differences that no distance between distributions can."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from fqdiff.cli.show import table
from fqdiff.report.words import (
    DECIDING,
    DISTRIBUTION_COLUMNS,
    DIVERGENCE,
    NOISE_ERROR,
    PAIRED_COLUMNS,
    interval,
    judged,
)

if TYPE_CHECKING:
    from fqdiff.values import Comparison, Curve


def comparison_text(artifact: str, value: "Comparison", labels: Mapping[str, str]) -> str:
    """``value`` as tables. ``labels``: what each role is called."""
    parts = [
        f"comparison {artifact}: N = {value.n} images of each, seed {value.seed}; baseline {labels['baseline']}",
        "",
        "Same noise, image by image: how far from the baseline's image",
        paired_table(value, labels),
        *([nearer, ""] if (nearer := nearer_text(value, labels)) else [""]),
        *network_text(value, labels),
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


def cells(value: "Comparison", role: str, columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Value and half interval of each metric; empty where it was not measured."""
    found = {m.metric: m for m in value.measures if m.of == role}
    out = []
    for metric, (_, form) in columns.items():
        m = found.get(metric)
        out.append("" if m is None else f"{m.value:{form}} ± {m.high - m.value:{form}}")
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
        body.append([labels[role], *cells(value, role, PAIRED_COLUMNS), share])
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


def nearer_text(value: "Comparison", labels: Mapping[str, str]) -> str:
    """Which of two models is nearer to the baseline, for every pair."""
    lines = []
    for first, second in combinations(models_of(value), 2):
        mse, fid = (value.pair(metric, second, first) for metric in ("image_mse", "fid"))
        lines.append(
            f"{labels[second]} against {labels[first]}: image MSE {interval(mse, '+.2e')} {judged(mse)}; "
            f"FID {interval(fid, '+.3f')} {judged(fid)}"
        )
    return "\n".join(lines)


def distribution_table(value: "Comparison", labels: Mapping[str, str]) -> str:
    """All metrics of all sets."""
    measured = {m.metric for m in value.measures}
    columns = {metric: column for metric, column in DISTRIBUTION_COLUMNS.items() if metric in measured}
    header = ["model", *(name for name, _ in columns.values())]
    return table(header, [[label, *cells(value, role, columns)] for role, label in labels.items()])


def difference_table(value: "Comparison", labels: Mapping[str, str]) -> str:
    """FID and KID of each model minus the baseline's, and what may be said of it."""
    header = ["model", "metric", f"difference [{value.level:.0%}]", "adjusted p", "verdict", "N that would tell"]
    body = []
    for role, label in labels.items():
        for metric in DECIDING:
            if role == "baseline":
                continue
            d = value.pair(metric, role, "baseline")
            name, form = DISTRIBUTION_COLUMNS[metric]
            needed = "" if d.images_needed is None else f"{d.images_needed:,}"
            body.append([label, name, interval(d, "+" + form), f"{d.adjusted_p:.2g}", d.verdict, needed])
    return table(header, body)


def notes(value: "Comparison") -> list[str]:
    """What the numbers rest on."""
    lines = [
        f"± and [ ]: {value.level:.0%} intervals from {value.resamples} resamples of images, the same for all models.",
        f"Verdicts: at the {value.level:.0%} level, after Holm's correction over all pairs. N that would tell: at 80 % power.",
        f"Features: {value.features}, {value.dimension} dimensions, sha256 {value.features_sha256[:16]}.",
    ]
    if value.floor_seed is not None:
        lines.append(
            f"Other noise: the baseline's model with seed {value.floor_seed}, what chance alone does; its images share no noise."
        )
    if any(d.verdict in ("not worse", "not better") for d in value.differences):
        lines.append(
            "Not worse, not better: one is nearer to the real images than its own full precision. That is no gain: it moved away."
        )
    return lines
