"""A comparison in words: paired metrics first, since they see differences that no distance between distributions can."""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from fqdiff.cli.show import table
from fqdiff.report.words import DECIDING, DISTRIBUTION_COLUMNS, PAIRED_COLUMNS, interval, judged

if TYPE_CHECKING:
    from fqdiff.values import Comparison


def comparison_text(artifact: str, value: "Comparison", labels: Mapping[str, str]) -> str:
    """``value`` as tables. ``labels``: what each role is called."""
    parts = [
        f"comparison {artifact}: N = {value.n} images of each, seed {value.seed}; baseline {labels['baseline']}",
        "",
        "Same noise, image by image: how far from the baseline's image",
        paired_table(value, labels),
        *([nearer, ""] if (nearer := nearer_text(value, labels)) else [""]),
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
