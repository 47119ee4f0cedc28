"""Samples, feature networks, FIDs, comparisons, and how predictions fared."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.digests import tensor_digest
from fqdiff.evidence.comparison import MODEL, Difference, Measure
from fqdiff.evidence.digits import DigitClassifier, in_batches
from fqdiff.evidence.features import FeatureNetwork, to_unit_range

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class SampleSet:
    """Generated images, uint8 [N, C, H, W]. Image k came from the generator of (seed, "image", k) alone."""

    images: Tensor
    seed: int

    @property
    def image_seeds(self) -> Tensor:
        """int64 [N, 2]: (seed, k) of each image."""
        return torch.stack([torch.full((len(self.images),), self.seed), torch.arange(len(self.images))], dim=1)


@dataclass(frozen=True)
class ClassifierWeights:
    """The digits feature network, trained on ``dataset``'s labelled training images; ``accuracy`` on the held-out ones."""

    dataset: str
    classes: int
    image_shape: tuple[int, int, int]
    tensors: Tensors
    accuracy: float
    confidence: float

    def feature_network(self) -> FeatureNetwork:
        """The classifier's penultimate layer as features, and its confidence."""
        channels, size, _ = self.image_shape
        network = DigitClassifier(channels, size, self.classes)
        network.load_state_dict(dict(self.tensors))
        network.eval().requires_grad_(False)

        def probabilities(images: Tensor) -> Tensor:  # of all layers at once, as its ids' results were made
            return in_batches(network, to_unit_range(images)).softmax(dim=1)

        return FeatureNetwork(
            name="digits",
            sha256=tensor_digest(self.tensors),
            extract=lambda images: in_batches(network.features, to_unit_range(images)),
            confidence=lambda images: float(probabilities(images).amax(dim=1).double().mean()),
            probabilities=lambda images, features: probabilities(images),
        )


@dataclass(frozen=True)
class FidResult:
    """A Fréchet distance, and the metrics of its kind, with all they depend on.

    ``n`` images on each side; ``image_mean`` and ``reference_mean`` are mean pixels in [-1, 1]. ``confidence``: mean top-1
    confidence, for classifier features. Where a baseline sample set was given: ``difference`` of the two FIDs with its 95 %
    bootstrap ``interval``, and, where both have one seed, ``image_error``, the mean squared difference between pixels (in
    [-1, 1]) of images made from the same noise; only then are the resamples paired. ``fid_infinity``: FID extrapolated to
    infinitely many images, where there are enough for it. ``measures``: every metric of ``model1``, these samples, and of
    ``baseline``, with 95 % intervals. ``kid_blocks``: KID of both once more, as the mean over blocks of images.
    """

    fid: float
    n: int
    features: str
    features_sha256: str
    dimension: int
    reference: str
    seed: int
    image_mean: float
    reference_mean: float
    confidence: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    image_error: float | None = None
    fid_infinity: float | None = None
    measures: tuple[Measure, ...] = ()
    kid_blocks: tuple[Measure, ...] = ()

    def measure(self, metric: str, of: str = MODEL) -> Measure:
        """The value of ``metric`` ``of`` one role. Raises KeyError."""
        return {(m.metric, m.of): m for m in self.measures}[metric, of]


@dataclass(frozen=True)
class Point:
    """A ``value`` with its standard error ``at`` a timestep or a sampler step; ``weight``: its part in a mean over all."""

    at: int
    weight: float
    value: float
    standard_error: float


@dataclass(frozen=True)
class Curve:
    """How far the model ``of`` one role is from the baseline's, point by point, and the weighted ``mean`` with its interval.

    ``samples``: noised images at each timestep, or runs of the sampler, the same for all models.
    """

    of: str
    samples: int
    points: tuple[Point, ...]
    mean: float
    standard_error: float
    low: float
    high: float

    @property
    def worst(self) -> Point:
        """The point of the largest value; of equal ones the first."""
        return max(self.points, key=lambda point: point.value)


@dataclass(frozen=True)
class Comparison:
    """What tells models apart: every metric of the roles ``baseline``, ``model1`` ... and ``floor``, and of their pairs.

    ``n`` images of each and of the real ones. ``floor``: the baseline's own model with ``floor_seed``, where given.
    ``noise_error`` over timesteps and ``divergence`` over steps of ``sampler`` (in words): of models, in order, that share the
    baseline's noise schedule and kind of output; none where not measured. ``kid_blocks``: KID once more, over blocks of images.
    """

    n: int
    level: float
    resamples: int
    features: str
    features_sha256: str
    dimension: int
    reference: str
    seed: int
    floor_seed: int | None
    models: int
    measures: tuple[Measure, ...]
    differences: tuple[Difference, ...]
    noise_error: tuple[Curve, ...]
    divergence: tuple[Curve, ...]
    sampler: str
    kid_blocks: tuple[Measure, ...] = ()

    def measure(self, metric: str, of: str) -> Measure:
        """The value of ``metric`` ``of`` one role. Raises KeyError."""
        return {(m.metric, m.of): m for m in self.measures}[metric, of]

    def pair(self, metric: str, of: str, against: str) -> Difference:
        """The difference in ``metric`` between two roles. Raises KeyError."""
        return {(d.metric, d.of, d.against): d for d in self.differences}[metric, of, against]


@dataclass(frozen=True)
class Candidate:
    """One weight tensor in one format. ``range``: "min-max", or "clipped" to the least weight error."""

    tensor: str
    block: str
    numel: int
    format: str
    range: str


@dataclass(frozen=True)
class TriedPlans:
    """Whole plans, P of them, with what they did. ``choice`` int64 [P, M]: the candidate of each weight tensor.

    float64 [P] each: ``bits`` (mean of the weights' codes), ``output_error`` and ``shift`` (averaged over timesteps),
    ``image_error`` and ``image_shift`` ([0] where not measured), and what each score ``predicted``.
    """

    labels: tuple[str, ...]
    choice: Tensor
    bits: Tensor
    output_error: Tensor
    shift: Tensor
    image_error: Tensor
    image_shift: Tensor
    predicted: Mapping[str, Tensor]


@dataclass(frozen=True)
class Correlation:
    """Spearman's ``rho`` between a score and what was measured, with its 95 % bootstrap interval over ``clusters``.

    ``n`` points; ``ratio``: median of measured over predicted, for scores in the target's unit, and ``spread`` its 5 % and
    95 % quantiles. None where undefined.
    """

    score: str
    target: str
    subset: str
    rho: float | None
    interval: tuple[float, float] | None
    n: int
    clusters: int
    ratio: float | None
    spread: tuple[float, float] | None


@dataclass(frozen=True)
class Verdict:
    """Difference of two scores' rho with the same target, over the same bootstrap draws. ``better`` has the higher rho."""

    question: str
    target: str
    better: str
    other: str
    difference: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class ErrorShape:
    """What the output errors of one way of storing have in common; medians over tensors.

    ``shift_share``: part of the output error that is a shift of the output's mean. ``alignment``: cosine between the output
    errors of pairs of tensors, its 5 %, 50 % and 95 % quantiles as ``low``, ``middle``, ``high``.
    """

    way: str
    shift_share: float
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Validation:
    """Measured rises of K candidates at T timesteps beside what every score foretold.

    ``timesteps`` int64 [T] with their ``weights`` float64 [T] in a mean over all timesteps. float64: ``output_error``,
    ``loss_rise``, ``shift`` [K, T]; ``image_error``, ``image_shift`` [K] ([0] where not measured); ``predicted``
    Fisher table kind -> [K, T]; ``scores`` name -> [K]; ``gram`` [K, K], inner products of output errors.
    """

    candidates: tuple[Candidate, ...]
    timesteps: Tensor
    weights: Tensor
    output_error: Tensor
    loss_rise: Tensor
    shift: Tensor
    image_error: Tensor
    image_shift: Tensor
    predicted: Tensors
    scores: Tensors
    gram: Tensor
    plans: TriedPlans
    correlations: tuple[Correlation, ...]
    verdicts: tuple[Verdict, ...]
    errors: tuple[ErrorShape, ...]
