"""Data sets, models of both kinds, and the inputs that were recorded of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fqdiff.diffusion.samplers import ErrorStd, PredictNoise
from fqdiff.diffusion.schedule import PREDICTIONS, NoiseSchedule, make_schedule, noise_from_velocity
from fqdiff.digests import tensor_digest
from fqdiff.errors import ArtifactCorrupt, LineageError, require
from fqdiff.models.registry import build, skip_boundaries, temporal_layers
from fqdiff.quant.activations import Activation, add_activation_quantizers
from fqdiff.quant.container import Description
from fqdiff.quant.formats import PerTensor, get_format
from fqdiff.quant.modules import hold_packed
from fqdiff.quant.noise_correction import NoiseCorrection, add_noise_correction
from fqdiff.quant.packed import PackedTensor, unpack_tensor
from fqdiff.quant.phases import phase_count, use_phases
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

    @property
    def tabulates_time(self) -> bool:
        """Whether the inputs of layers that depend on t alone are in full precision where all others are not.

        These layers are then meant to be computed once for each timestep.
        """
        temporal = temporal_layers(build(self.spec.architecture, "meta"))
        return bool(self.activations and temporal) and not temporal & self.activations.keys()

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
