"""What is done when a plan is carried out, as data: which stages, each with its config."""

from dataclasses import dataclass, field

from fqdiff.configs import (
    ActivationConfig,
    NoiseCorrectionConfig,
    QuantizeConfig,
    ReconstructConfig,
    StepsConfig,
    TemporalConfig,
)
from fqdiff.errors import ConfigError, require


@dataclass(frozen=True)
class Treatment:
    """The config of every stage, in the order of work; None: the stage is left out.

    ``quantize`` packs the weights, after norms were given one range for all channels with ``reparameterize``. ``reconstruct``
    learns their rounding, of the layers that depend on t alone first and together with ``temporal_first``. ``activations``
    quantizes activations, ``temporal_scales`` makes their scales a function of time, ``activation_steps`` learns them.
    ``noise_correction`` corrects what the network predicts. Raises ConfigError for stages that do not go together.
    """

    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    reparameterize: bool = False
    reconstruct: ReconstructConfig | None = None
    temporal_first: bool = False
    activations: ActivationConfig | None = None
    temporal_scales: TemporalConfig | None = None
    activation_steps: StepsConfig | None = None
    noise_correction: NoiseCorrectionConfig | None = None

    def __post_init__(self) -> None:
        if self.reconstruct is not None:
            require(
                not self.reparameterize,
                "reconstruction of weights that were reparameterized",
                "leave one of the two out",
            )
            for name, what, hint in (
                ("bias_correction", "biases corrected", "leave --bias-correction out"),
                ("distill", "weights distilled", "--distill 0, or --no-reconstruct"),
            ):
                require(
                    getattr(self.quantize, name) == getattr(QuantizeConfig, name),
                    f"{what} before their rounding is learned",
                    hint,
                )
        if self.temporal_scales is not None:
            if self.activations is None:
                raise ConfigError("scales by time of activations that stay float32", "add --activations int8")
            require(
                not self.activations.dynamic,
                "dynamic activations have no scales to learn",
                "leave --temporal-scales or --dynamic out",
            )
            require(
                self.activations.intervals >= 2,
                "scales of one interval do not tell how they change with time",
                "add --activation-intervals 20",
            )
        if self.activation_steps is not None:
            if self.activations is None:
                raise ConfigError("learned steps of activations that stay float32", "add --activations int8")
            require(
                not self.activations.dynamic,
                "dynamic activations have no steps to learn",
                "leave --learn-steps or --dynamic out",
            )

    @property
    def is_calibrated(self) -> bool:
        """Whether a stage learns from a calibration set."""
        ranges = self.activations is not None and not self.activations.dynamic
        return self.reparameterize or self.reconstruct is not None or ranges or self.noise_correction is not None


def refuse_calibration(treatment: Treatment) -> None:
    """Raise ConfigError where nothing of ``treatment`` learns from the calibration set that was named."""
    if treatment.is_calibrated:
        return
    if treatment.activations is None:
        raise ConfigError(
            "a calibration set that nothing learns from", "add --activations int8 or --reconstruct, or leave it out"
        )
    raise ConfigError("dynamic activations have no use for a calibration set", "leave it out, or add --static")
