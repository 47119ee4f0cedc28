"""How well each score foretold what was measured: correlations with intervals, and what the errors look like.

Shapes: K candidates = M tensors x F ways of storing, T timesteps, P plans, S scores.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fqdiff.evidence.correlation import bootstrap_spearman, percentile_interval, spearman
from fqdiff.rng import generator
from fqdiff.sensitivity.candidates import MIN_MAX, group_by_tensor
from fqdiff.sensitivity.gram import cosines
from fqdiff.sensitivity.plans import way
from fqdiff.values import Candidate, Correlation, ErrorShape, TriedPlans, Verdict

OUTPUT, IMAGE = "output_error", "image_error"
FISHER_KINDS = ("empirical", "true", "trajectory")
SPREAD = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
FEWEST_CLUSTERS = 5  # fewer give no interval worth the name
Scores = Mapping[str, Tensor]


def family(score: str) -> str:
    """``fisher``, ``gram`` or ``rival``."""
    kind = score.split("_")[0]
    return "fisher" if kind in FISHER_KINDS else "gram" if kind == "gram" else "rival"


def unit(score: str) -> str | None:
    """The target in whose unit ``score`` is: half a squared error, summed over pixels. None for a score without."""
    if family(score) == "gram" or (family(score) == "fisher" and score.endswith(("_mean", "_timesteps"))):
        return OUTPUT
    return IMAGE if score == "trajectory" or (family(score) == "fisher" and score.endswith("_sampler")) else None


class Judge:
    """Correlates scores with targets over clusters; every call draws from (seed, "correlation", target, subset)."""

    def __init__(self, seed: int, resamples: int, pixels: int) -> None:
        self.seed, self.resamples, self.pixels = seed, resamples, pixels

    def draws(self, scores: Tensor, target: Tensor, *label: str) -> Tensor:
        """Bootstrapped rho of ``scores`` [S, clusters, points] with ``target`` [clusters, points]: [S, resamples]."""
        return bootstrap_spearman(scores, target, generator(self.seed, "correlation", *label), self.resamples)

    def rows(self, scores: Scores, name: str, target: Tensor, subset: str) -> list[Correlation]:
        """One row per score. ``scores`` and ``target`` [clusters, points]."""
        stacked = torch.stack(list(scores.values()))
        enough = len(target) >= FEWEST_CLUSTERS
        draws = self.draws(stacked, target, name, subset) if enough else None
        found = spearman(stacked.flatten(1), target.flatten().expand(len(stacked), -1)).tolist()
        rows = []
        for i, (score, values) in enumerate(scores.items()):
            rho = found[i] if found[i] == found[i] else None
            interval = percentile_interval(draws[i]) if draws is not None and rho is not None else None
            ratio, spread = self.ratio(score, name, values, target)
            rows.append(Correlation(score, name, subset, rho, interval, target.numel(), len(target), ratio, spread))
        return rows

    def ratio(
        self, score: str, name: str, predicted: Tensor, target: Tensor
    ) -> tuple[float | None, tuple[float, float] | None]:
        """Median and 5 % and 95 % quantiles of measured over predicted, both half a squared error summed over pixels."""
        usable = predicted > 0
        if unit(score) != name or not usable.any():
            return None, None
        measured = target * 0.5 * self.pixels if name == IMAGE else target
        low, middle, high = (measured[usable] / predicted[usable]).quantile(SPREAD).tolist()
        return middle, (low, high)

    def verdicts(self, scores: Scores, name: str, target: Tensor, rows: Sequence[Correlation]) -> list[Verdict]:
        """The best score against the runner-up, and the best Fisher score against the best rival."""
        rho = {r.score: r.rho for r in rows if r.rho is not None}
        ranked = sorted(rho, key=lambda score: -rho[score])
        fishers, others = ([s for s in ranked if family(s) == kind] for kind in ("fisher", "rival"))
        contests = [("best two", ranked[:2])]
        if fishers and others:
            contests.append(("Fisher against rivals", sorted((fishers[0], others[0]), key=ranked.index)))
        result = []
        for question, pair in contests:
            if len(pair) == 2:
                better, other = pair
                draws = self.draws(torch.stack([scores[better], scores[other]]), target, name, "all")
                interval = percentile_interval(draws[0] - draws[1]) if len(target) >= FEWEST_CLUSTERS else None
                result.append(Verdict(question, name, better, other, rho[better] - rho[other], interval))
        return result


def subsets(candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    """Name -> positions [tensors, points]: ``all`` and each block (min-max ranges), and each way of storing."""
    groups = list(group_by_tensor(candidates).values())
    plain = [[k for k in group if candidates[k].range == MIN_MAX] for group in groups]
    blocks = dict.fromkeys(candidates[group[0]].block for group in groups)
    found = {"all": plain}
    for block in blocks:
        found[f"block {block}" if block.isdigit() else block] = [g for g in plain if candidates[g[0]].block == block]
    for column, k in enumerate(groups[0]):
        found[way(candidates[k])] = [[group[column]] for group in groups]
    return {name: torch.tensor(rows) for name, rows in found.items()}


def correlate(
    candidates: Sequence[Candidate], scores: Scores, by_timestep: Scores, targets: Scores, judge: Judge
) -> tuple[list[Correlation], list[Verdict]]:
    """Every score [K] with every target [K], and per-timestep predictions [K, T] with ``targets["timesteps"]``."""
    rows: list[Correlation] = []
    verdicts: list[Verdict] = []
    picks = subsets(candidates)
    for target in (t for t in (OUTPUT, IMAGE) if t in targets):
        for subset, pick in picks.items():
            chosen = {name: values[pick] for name, values in scores.items()}
            found = judge.rows(chosen, target, targets[target][pick], subset)
            rows += found
            if subset == "all":
                verdicts += judge.verdicts(chosen, target, targets[target][pick], found)
    if by_timestep:
        for subset, pick in picks.items():
            chosen = {f"{kind}_timesteps": values[pick].flatten(1) for kind, values in by_timestep.items()}
            rows += judge.rows(chosen, OUTPUT, targets["timesteps"][pick].flatten(1), subset)
    return rows, verdicts


def correlate_plans(plans: TriedPlans, judge: Judge) -> list[Correlation]:
    """Every score's prediction for whole plans with what they did; each plan a cluster of its own."""
    targets = {OUTPUT: plans.output_error, IMAGE: plans.image_error}
    scores = {name: values[:, None] for name, values in plans.predicted.items()}
    found = [judge.rows(scores, name, t[:, None], "plans") for name, t in targets.items() if len(t)]
    return [row for rows in found for row in rows]


def error_shapes(
    candidates: Sequence[Candidate], matrix: Tensor, output_error: Tensor, shift: Tensor, pixels: int
) -> tuple[ErrorShape, ...]:
    """What the errors of each way of storing have in common. ``output_error`` and squared ``shift`` [K], over timesteps."""
    shapes = []
    for name, pick in subsets(candidates).items():
        chosen = pick[:, 0]
        if name != way(candidates[int(chosen[0])]):
            continue
        share = (0.5 * pixels * shift[chosen] / output_error[chosen].clamp(min=1e-300)).median()
        angles = cosines(matrix, chosen)
        low, middle, high = angles.quantile(SPREAD).tolist() if len(angles) else (0.0, 0.0, 0.0)
        shapes.append(ErrorShape(name, float(share), low, middle, high))
    return tuple(shapes)
