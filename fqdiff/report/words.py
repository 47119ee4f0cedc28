"""How metrics are called and written, and what a comparison says in sentences."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fqdiff.evidence.comparison import Difference, Measure
    from fqdiff.report.data import ModelRow, Report

NETWORK_COLUMNS = {"noise_error": ("noise error", ".2e"), "divergence": ("divergence", ".2e")}
PAIRED_COLUMNS = {
    "image_mse": ("image MSE", ".2e"),
    "psnr": ("PSNR dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "feature_distance": ("feature distance", ".3f"),
}
DISTRIBUTION_COLUMNS = {
    "fid": ("FID", ".3f"),
    "kid": ("KID", ".3g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "density": ("density", ".3f"),
    "coverage": ("coverage", ".3f"),
    "inception_score": ("Inception score", ".3f"),
}
NOISE_ERROR = "1/2 |eps - baseline's eps|²"
DIVERGENCE = "mean squared distance of x"
DECIDING = ("fid", "kid")  # with a verdict each; those on the others are in the artifact
SAME = "not distinguishable"
BEYOND = ("not worse", "not better")
NO_GAIN = (
    "Not worse, not better: one of the two is nearer to the real images than the full precision it was made from, by more than "
    "chance. That is no gain: it moved away."
)
WHAT_N_COUNTS = (
    "N that would tell, Holm's correction included: images; of noise errors inputs at each timestep, of divergence runs of the "
    "sampler."
)


def pair_columns() -> dict[str, tuple[str, str]]:
    """Metrics whose pairs are shown, what is surest first: name and how numbers are written."""
    deciding = {metric: DISTRIBUTION_COLUMNS[metric] for metric in DECIDING}
    return {**NETWORK_COLUMNS, "image_mse": PAIRED_COLUMNS["image_mse"], **deciding}


def interval(d: "Difference", form: str) -> str:
    """The difference with its interval."""
    return f"{d.difference:{form}} [{d.low:{form}}, {d.high:{form}}]"


def measured(m: "Measure", form: str) -> str:
    """The value ± half its interval; its ends where a part of it cannot be, as below a precision of 0."""
    from fqdiff.evidence.comparison import SHARES, possible

    low, high = possible(m.metric, m.low, m.high)  # those that were stored before they were cut
    if m.metric in SHARES and abs((high - m.value) - (m.value - low)) > 1e-6:
        return f"{m.value:{form}} [{low:{form}}, {high:{form}}]"
    return f"{m.value:{form}} ± {high - m.value:{form}}"


def judged(d: "Difference") -> str:
    """The verdict, with the N that would tell where this one does not."""
    if d.verdict != SAME or d.images_needed is None:
        return d.verdict
    return f"{d.verdict} (N = {d.images_needed:,} would tell)"


def noise_share(report: "Report", role: str) -> str:
    """Image error as a share of that of other noise; empty where there is no noise floor."""
    value = report.comparison
    error = value.measure("image_mse", role).value
    whole = value.measure("image_mse", "floor").value if value.floor_seed is not None else 0.0
    return "identical" if error == 0 else f"{error / whole:.3%}" if whole > 0 else ""


def times_smaller(report: "Report", row: "ModelRow") -> float | None:
    """The baseline's file size over the row's; None where one is not known."""
    baseline = report.row("baseline").file_bytes
    return baseline / row.file_bytes if baseline and row.file_bytes else None


def dominated(report: "Report") -> list[tuple["ModelRow", "ModelRow"]]:
    """(better, other) for models of which the better is no larger and, by a verdict, nearer to the baseline image by image."""
    nearer = {
        (d.of, d.against) if d.verdict == "better" else (d.against, d.of)
        for d in report.comparison.differences
        if d.metric == "image_mse" and d.verdict in ("better", "worse")
    }
    return [
        (better, other)
        for better in report.models
        for other in report.models
        if (better.role, other.role) in nearer and better.file_bytes and (other.file_bytes or 0) >= better.file_bytes
    ]


def title(report: "Report") -> str:
    """What is compared, in one line."""
    models, baseline = report.models, report.row("baseline").label
    return f"{models[0].label} against {baseline}" if len(models) == 1 else f"{len(models)} models against {baseline}"


def verdict(report: "Report") -> list[str]:
    """The result in sentences, what is surest first: sizes and distances image by image, then what metrics of sets tell."""
    baseline = report.row("baseline").label
    first = report.models[0]
    if len(report.models) > 1:
        lines = [_extremes(report, baseline)]
    else:
        lines = [f"{first.label} against {baseline}: {_size(report, first)}; {_distance(report, first)}."]
    lines += [
        f"{better.label} is no larger than {other.label}, and nearer to {baseline}."
        for better, other in dominated(report)
    ]
    return lines + _told(report, baseline)


def model_sentences(report: "Report") -> list[tuple[str, str]]:
    """Label, and in a sentence what became of it, for every model."""
    return [
        (row.label, f"{_size(report, row)}; {_distance(report, row)}; {_judgements(report, row)}.")
        for row in report.models
    ]


def _extremes(report: "Report", baseline: str) -> str:
    """Which model is nearest to the baseline, and which the smallest."""
    value = report.comparison
    nearest = min(report.models, key=lambda row: value.measure("image_mse", row.role).value)
    error = f"{nearest.label} is nearest to {baseline} (image MSE {value.measure('image_mse', nearest.role).value:.1e})"
    known = [row for row in report.models if row.file_bytes]
    smallest = min(known, key=lambda row: row.file_bytes or 0, default=None)
    if smallest is None:
        return f"{error}."
    if smallest is nearest:
        return f"{error}, and the smallest ({_size(report, smallest)})."
    return f"{error}, {smallest.label} the smallest ({_size(report, smallest)})."


def _size(report: "Report", row: "ModelRow") -> str:
    ratio = times_smaller(report, row)
    if ratio is None:
        return "of unknown size"
    if 0.98 < ratio < 1.02:
        return f"as large as {report.row('baseline').label}"
    return f"{ratio:.1f} times smaller" if ratio > 1 else f"{1 / ratio:.1f} times larger"


def _distance(report: "Report", row: "ModelRow") -> str:
    share = noise_share(report, row.role)
    if share == "identical":
        return "identical images"
    error = report.comparison.measure("image_mse", row.role)
    of_noise = f", {share} of what other noise does" if share else ""
    return f"image MSE {error.value:.2e} ± {error.high - error.value:.2e}{of_noise}"


def _judgements(report: "Report", row: "ModelRow") -> str:
    pairs = [(DISTRIBUTION_COLUMNS[m][0], report.comparison.pair(m, row.role, "baseline")) for m in DECIDING]
    no_gain = f"lower than {report.row('baseline').label}'s, which is no gain"
    return "; ".join(f"{name} {no_gain if d.verdict == 'not worse' else judged(d)}" for name, d in pairs)


def _told(report: "Report", baseline: str) -> list[str]:
    """What metrics of whole sets tell; that they tell nothing is no proof that nothing differs."""
    value, models = report.comparison, report.models
    silent = [m for m in DECIDING if all(value.pair(m, row.role, "baseline").verdict == SAME for row in models)]
    lines = [_told_by(report, metric, baseline) for metric in DECIDING if metric not in silent]
    if silent:
        whom = models[0].label if len(models) == 1 else "any model"
        names = join([DISTRIBUTION_COLUMNS[m][0] for m in silent])
        lines.append(f"{names} of {value.n:,} images cannot tell {whom} from {baseline}.")
    return lines


def _told_by(report: "Report", metric: str, baseline: str) -> str:
    """Which models are worse than the baseline by one metric, which differ without gain, and which cannot be told from it."""
    value, name = report.comparison, DISTRIBUTION_COLUMNS[metric][0]
    of: dict[str, list[str]] = {}
    for row in report.models:
        of.setdefault(value.pair(metric, row.role, "baseline").verdict, []).append(row.label)
    parts = []
    for word in ("worse", "better"):
        if word in of:
            parts.append(f"{join(of[word])} {'is' if len(of[word]) == 1 else 'are'} {word} than {baseline}")
    for word in (w for w in BEYOND if w in of):
        side, verb = "lower" if word == "not worse" else "higher", "differs" if len(of[word]) == 1 else "differ"
        parts.append(f"{join(of[word])} {verb} from {baseline} by a {side} {name}, which is no gain")
    if SAME in of:
        parts.append(f"{join(of[SAME])} cannot be told from {baseline}")
    return f"By {name} of {value.n:,} images, {'; '.join(parts)}."


def join(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
