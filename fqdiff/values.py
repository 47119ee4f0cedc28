"""What passes between stages: frozen dataclasses that hold tensors and plain data, and never a path.

Shapes: N images, C channels, H W pixels, T timesteps, O output channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fqdiff.diffusion.samplers import ErrorStd, PredictNoise
from fqdiff.diffusion.schedule import PREDICTIONS, NoiseSchedule, make_schedule, noise_from_velocity
from fqdiff.digests import tensor_digest
from fqdiff.errors import ArtifactCorrupt, LineageError, require
from fqdiff.evidence.comparison import Difference, Measure
from fqdiff.evidence.digits import DigitClassifier, in_batches
from fqdiff.evidence.features import FeatureNetwork, to_unit_range
from fqdiff.models.registry import build, skip_boundaries
from fqdiff.quant.activations import Activation, add_activation_quantizers
from fqdiff.quant.container import Description
from fqdiff.quant.elements import BY_FISHER, BY_RISE
from fqdiff.quant.formats import PerElement, PerTensor, get_format, parse_granularity
from fqdiff.quant.modules import hold_packed
from fqdiff.quant.noise_correction import NoiseCorrection, add_noise_correction
from fqdiff.quant.packed import PackedTensor, unpack_tensor
from fqdiff.quant.phases import phase_count, use_phases
from fqdiff.quant.ranges import FISHER
from fqdiff.quant.timestep_bias import add_timestep_bias

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Dataset:
    """Images in the order of their source, train files first, with their split.

    ``images`` uint8 [N, C, H, W], ``labels`` int64 [N] or None, ``held_out`` bool [N].
    """

    name: str
    images: Tensor
    labels: Tensor | None
    held_out: Tensor

    @property
    def train(self) -> Tensor:
        """The training images; no stage but ``fid`` sees the others."""
        return self.images[~self.held_out]

    @property
    def reference(self) -> Tensor:
        """The held-out images that generated ones are compared with."""
        return self.images[self.held_out]


@dataclass(frozen=True)
class ModelSpec:
    """All it takes to rebuild a diffusion model but its weights."""

    architecture: Mapping[str, object]
    schedule: str
    prediction: str

    def __post_init__(self) -> None:
        require(
            self.prediction in PREDICTIONS,
            f"unknown prediction '{self.prediction}'",
            f"one of: {', '.join(PREDICTIONS)}",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, size = self.architecture["image_channels"], self.architecture["image_size"]
        assert isinstance(channels, int)
        assert isinstance(size, int)
        return channels, size, size

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule the model was trained with."""
        steps = self.architecture["num_train_timesteps"]
        assert isinstance(steps, int)
        return make_schedule(self.schedule, steps)

    def network(self, tensors: Tensors) -> nn.Module:
        """The network in eval mode with ``tensors`` as its parameters, keyed by parameter name; none missing, none left."""
        network = self._empty_network({name: tuple(t.shape) for name, t in tensors.items()})
        network.load_state_dict(dict(tensors), strict=True, assign=True)
        return network.eval().requires_grad_(False)

    def packed_network(self, packed: Mapping[str, PackedTensor], cache: bool) -> nn.Module:
        """The network in eval mode that holds ``packed`` and no other weights, see :mod:`fqdiff.quant.modules`."""
        network = self._empty_network({name: p.shape for name, p in packed.items()})
        hold_packed(network, packed, cache)
        return network.eval()

    def _empty_network(self, got: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """The network without weights. Raises ArtifactCorrupt unless its parameters have just the shapes ``got``."""
        network = build(self.architecture, "meta")
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        if got != shapes:
            wrong = sorted(n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n))
            raise ArtifactCorrupt(
                f"tensors do not fit the architecture: {', '.join(wrong[:3])}", "the file is not what its manifest says"
            )
        return network


def model_description(spec: ModelSpec) -> dict[str, object]:
    """``spec`` as plain JSON data, as it stands in the header of a model file."""
    return {"architecture": dict(spec.architecture), "schedule": spec.schedule, "prediction": spec.prediction}


def predict_noise(spec: ModelSpec, network: PredictNoise) -> PredictNoise:
    """eps_pred(x_t, t) of ``network``, whichever quantity its output stands for."""
    if spec.prediction == "eps":
        return network
    schedule = spec.noise_schedule()
    return lambda x_t, t: noise_from_velocity(schedule, x_t, network(x_t, t), t)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model: exactly one set of weights, the EMA's, in float32, keyed by parameter name.

    ``loss`` float32 [steps] is the training loss of each step, None for an imported model, whose training was not seen here;
    ``preview`` uint8 [N, C, H, W] a few DDIM samples.
    """

    spec: ModelSpec
    tensors: Tensors
    loss: Tensor | None
    preview: Tensor

    @property
    def described(self) -> dict[str, Description]:
        """How each parameter is stored."""
        return {name: (tuple(t.shape), get_format("float32"), PerTensor()) for name, t in self.tensors.items()}

    def network(self) -> nn.Module:
        """The network, in eval mode."""
        return self.spec.network(self.tensors)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A model whose every parameter is stored as its plan says; there is no other copy of the weights.

    ``timestep_bias`` float16 [K, O], keyed by layer: what its output gets added in each of K intervals of timesteps.
    ``activations``, keyed by site: how they are quantized; none where they are in full precision. ``noise_correction``: what
    is done to the network's output, and what samplers are to know of it.
    """

    spec: ModelSpec
    packed: Mapping[str, PackedTensor]
    timestep_bias: Tensors = field(default_factory=dict)
    activations: Mapping[str, Activation] = field(default_factory=dict)
    noise_correction: NoiseCorrection | None = None

    @property
    def described(self) -> dict[str, Description]:
        """How each parameter is stored."""
        return {name: (p.shape, p.format, p.granularity) for name, p in self.packed.items()}

    @property
    def phases(self) -> int:
        """In how many phases of timesteps parameters are read with bits of their own."""
        formats = (p.format for p in self.packed.values())
        return phase_count(formats, self.spec.noise_schedule().num_train_timesteps)

    def network(self) -> nn.Module:
        """The network, in eval mode, its float32 weights computed from the packed tensors alone.

        With phases of timesteps: one float32 tensor for each precision of a parameter, from its first use on.
        """
        if self.phases > 1:
            return self.packed_network(cache=True)
        return self._dressed(self.spec.network({name: unpack_tensor(p) for name, p in self.packed.items()}))

    def packed_network(self, cache: bool = False) -> nn.Module:
        """The same network, to the bit, with the packed tensors as its only weights: slower, and as small as the file.

        With ``cache`` the float32 weights of each layer are kept from its first use on.
        """
        network = self._dressed(self.spec.packed_network(self.packed, cache))
        if self.phases > 1:
            use_phases(network, self.phases, self.spec.noise_schedule().num_train_timesteps)
        return network

    def _dressed(self, network: nn.Module) -> nn.Module:
        total = self.spec.noise_schedule().num_train_timesteps
        add_timestep_bias(network, self.timestep_bias, total)
        add_activation_quantizers(network, self.activations, total, skip_boundaries(network))
        add_noise_correction(network, self.noise_correction, total)
        return network


Model = Checkpoint | QuantizedCheckpoint


def error_std(model: Model) -> ErrorStd:
    """Standard deviation, by timestep, of the random error of the noise that ``model`` predicts; 0 unless it was measured.

    An error e of a velocity is one of sqrt(alphas_cumprod[t]) e of the noise.
    """
    correction = model.noise_correction if isinstance(model, QuantizedCheckpoint) else None
    if correction is None:
        return lambda t: 0.0
    schedule, velocity = model.spec.noise_schedule(), model.spec.prediction == "v"

    def of_noise(t: int) -> float:
        scale = float(schedule.alphas_cumprod[t]) ** 0.5 if velocity else 1.0
        return scale * correction.error_std(t, schedule.num_train_timesteps)

    return of_noise


@dataclass(frozen=True)
class CalibrationSet:
    """Model inputs, in the sampler's order: ``x_t`` float32 or float16 [N, C, H, W], ``t`` int64 [N] in [0, T).

    ``model``: digest of the weights of the model that they were recorded for; ``num_train_timesteps``: its T.
    """

    x_t: Tensor
    t: Tensor
    model: str
    num_train_timesteps: int

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raise LineageError unless the set was recorded for ``checkpoint``."""
        total = checkpoint.spec.noise_schedule().num_train_timesteps
        if self.num_train_timesteps != total:
            raise LineageError(
                f"the calibration set has timesteps of {self.num_train_timesteps}, the model {total}",
                "record one for this checkpoint: fqdiff calibrate",
            )
        same_images = tuple(self.x_t.shape[1:]) == checkpoint.spec.image_shape
        if not same_images or self.model != tensor_digest(checkpoint.tensors):
            raise LineageError(
                "the calibration set was recorded for another model",
                "record one for this checkpoint: fqdiff calibrate",
            )


@dataclass(frozen=True)
class FisherEntry:
    """Fisher diagonal of one parameter, or of one layer's output, at each timestep, reduced over its elements; float64.

    ``mean`` [T], ``maximum`` [T], ``standard_error`` [T] (of the mean, over samples), ``channel`` [T, O]: mean within each
    output channel; [T, 0] in a table without channels.
    """

    block: str
    numel: int
    mean: Tensor
    standard_error: Tensor
    maximum: Tensor
    channel: Tensor


@dataclass(frozen=True)
class TrajectoryEntry:
    """Fisher diagonal of one parameter for the sampler's whole run, its error acting at every step; float64.

    ``samples`` [N]: mean over elements of each run's squared gradient. ``mean``, ``maximum`` and ``channel`` [O] rest on
    their robust mean; ``standard_error`` is that of ``mean``.
    """

    block: str
    numel: int
    mean: float
    standard_error: float
    maximum: float
    channel: Tensor
    samples: Tensor


@dataclass(frozen=True)
class WeightBin:
    """Fisher diagonal of every single weight, averaged over the table's timesteps from ``first`` to ``last``.

    ``read()`` gives float32 tensors shaped like the parameters, keyed by name; bins are large, so none is held in memory.
    """

    first: int
    last: int
    read: Callable[[], Tensors]


@dataclass(frozen=True)
class SamplerGain:
    """What an error of eps at each step of a sampler becomes in its final image: E|J_s^T v|^2 / pixels, J_s = d x_0 / d eps_s.

    An error of that step of squared norm e that points anywhere changes the image by ``mean`` * e. ``timesteps`` int64 [S],
    increasing; ``mean`` and ``standard_error`` [S] are robust ones over runs, ``samples`` [N, S] those of each run; float64.
    """

    timesteps: Tensor
    mean: Tensor
    standard_error: Tensor
    samples: Tensor


@dataclass(frozen=True)
class FisherTable:
    """Fisher diagonal per parameter and timestep. ``timesteps`` int64 [T], increasing; ``samples`` per timestep.

    ``activations`` holds the same for the output of each layer, keyed by layer name; ``trajectory`` what the whole sampler
    run gives, for that kind, and ``gain`` how its steps amplify errors; ``weights`` the single weights, where they were asked
    for.
    """

    kind: str
    timesteps: Tensor
    samples: int
    entries: Mapping[str, FisherEntry]
    activations: Mapping[str, FisherEntry] = field(default_factory=dict)
    trajectory: Mapping[str, TrajectoryEntry] = field(default_factory=dict)
    weights: Sequence[WeightBin] = ()
    gain: SamplerGain | None = None


@dataclass(frozen=True)
class Alternative:
    """How a parameter could have been stored: its payload ``bytes``, and what it was ``predicted`` to do."""

    format: str
    granularity: str
    range: str
    bytes: int
    predicted: float


@dataclass(frozen=True)
class PlanEntry:
    """What becomes of one parameter, and why. ``bytes`` is its payload in the file, scales and zero points included.

    ``range``: which weights the codes span, one of RANGES; ``rounding``: one of ROUNDINGS.

    Of a plan with a budget also: what the format chosen is ``predicted`` to do, all ``alternatives`` with it among them, and
    the ``constraint`` that kept a better one away ("none" where it is the best).
    """

    parameter: str
    block: str
    shape: tuple[int, ...]
    format: str
    granularity: str
    range: str
    rounding: str
    score: float | None
    threshold: float | None
    rule: str
    bytes: int
    predicted: float | None = None
    constraint: str | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Budget:
    """What a plan was to fit, and how well it does. One of ``target_bytes`` and ``max_loss_increase`` is given.

    ``predicted``: the rise, summed over parameters, in the unit of ``score``. ``lower_bound``: no plan from the same formats
    that fits is predicted less; of a limit on the rise, none takes fewer bytes. None
    where no such bound is known: with cross terms.

    With the ``predictor`` gram: ``swaps`` from a plan made without cross terms to this one, a local optimum; ``diagonal``:
    what is predicted of the plan that the score alone would make. Where the network was run, on ``calibration_samples``
    inputs at each of ``calibration_timesteps`` (or sampler runs of so many steps): ``evaluations`` plans were ``measured``,
    this one rose least.
    """

    score: str
    timestep_weights: str
    target_bytes: int | None
    max_loss_increase: float | None
    predicted: float
    lower_bound: float | None
    constraint: str
    predictor: str = "diagonal"
    swaps: int | None = None
    diagonal: float | None = None
    calibration_timesteps: int = 0
    calibration_samples: int = 0
    measured: float | None = None
    evaluations: int = 0


@dataclass(frozen=True)
class Phases:
    """What ``count`` phases of timesteps bring. ``read_bytes``: payload that a timestep reads, averaged over all of them, to be
    at most ``traffic_bytes``, where that is given.

    ``single_predicted``, ``single_bytes``: predicted rise and file of the best plan without phases within the same limits.
    """

    count: int
    read_bytes: float
    traffic_bytes: int | None
    single_predicted: float
    single_bytes: int


@dataclass(frozen=True)
class Plan:
    """One entry per parameter, kept ones included. ``file_bytes`` is the size of the file that ``quantize`` writes.

    ``timestep_weights``: how timesteps count in the Fisher values of single weights, where no budget says so.
    """

    strategy: str
    entries: tuple[PlanEntry, ...]
    file_bytes: int
    budget: Budget | None = None
    phases: Phases | None = None
    timestep_weights: str = "uniform"

    @property
    def fits_fisher(self) -> bool:
        """Whether carrying it out takes the Fisher values of single weights."""
        return any(e.range == FISHER or isinstance(parse_granularity(e.granularity), PerElement) for e in self.entries)

    @property
    def kept_by(self) -> str:
        """What chooses single elements that are kept: rules by Fisher value, budgets by predicted rise."""
        return BY_FISHER if self.budget is None else BY_RISE

    @property
    def parameters(self) -> int:
        """Number of weights of the model."""
        return sum(torch.Size(e.shape).numel() for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """All bits of the file, header included, over the number of weights."""
        return 8 * self.file_bytes / self.parameters


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

        def probabilities(images: Tensor) -> Tensor:
            return in_batches(network, to_unit_range(images)).softmax(dim=1)

        return FeatureNetwork(
            name="digits",
            sha256=tensor_digest(self.tensors),
            extract=lambda images: in_batches(network.features, to_unit_range(images)),
            confidence=lambda images: float(probabilities(images).amax(dim=1).double().mean()),
            probabilities=probabilities,
        )


@dataclass(frozen=True)
class FidResult:
    """A Fréchet distance with all it depends on.

    ``n`` images on each side; ``image_mean`` and ``reference_mean`` are mean pixels in [-1, 1]. ``confidence``: mean top-1
    confidence, for classifier features. Where a baseline sample set of the same seed was given: ``difference`` of the two
    FIDs with its 95 % paired bootstrap ``interval``, and ``image_error``, the mean squared difference between pixels (in
    [-1, 1]) of images made from the same noise.
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


@dataclass(frozen=True)
class Comparison:
    """What tells models apart: every metric of the roles ``baseline``, ``model1`` ... and ``floor``, and of their pairs.

    ``n`` images of each and of the real ones. ``floor``: the baseline's own model with ``floor_seed``, where given.
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
