"""The published methods by name: what of each is here, which flags make it, and where it deliberately differs. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fqdiff.errors import ConfigError

SWITCHES = {  # settings of activations that are no value of a flag, but one of two
    "split_skips": ("--joint-skips", "--split-skips"),
    "temporal": ("--tabulate-temporal", "--quantize-temporal"),
}


@dataclass(frozen=True)
class Bundle:
    """What ``fqdiff quantize --method`` stands for: settings of the stages, under those given as flags or in a file.

    ``activations``: fields of an ActivationConfig; they, ``temporal_scales`` and ``learn_steps`` count where activations are
    quantized at all. The plan comes from before: its ``strategy``, and the ``ranges`` and ``roundings`` of its integers, have to
    be among those listed, empty for any; ``scheme``: that of the calibration set, empty for any. ``split_weights``: layers that
    are given a joined skip have to have two scales by channel; ``by_channel``: integers have to have one for each channel.
    ``distill``: steps, 0 for none.
    """

    activations: Mapping[str, object] = field(default_factory=dict)
    distill: int = 0
    reconstruct: bool = False
    temporal_first: bool = False
    temporal_scales: bool = False
    learn_steps: bool = False
    reparameterize: bool = False
    noise_correction: bool = False
    strategy: str = ""
    ranges: tuple[str, ...] = ()
    roundings: tuple[str, ...] = ()
    scheme: str = ""
    split_weights: bool = False
    by_channel: bool = False

    @property
    def plan_settings(self) -> dict[str, object]:
        """Settings of a plan of integers that suits it, beside their format: what the plan's defaults are not."""
        return {
            **({"ranges": self.ranges} if self.ranges not in ((), ("min-max",)) else {}),
            **({"rounding": self.roundings[0]} if self.roundings not in ((), ("nearest",)) else {}),
            **({"granularity": "split"} if self.split_weights else {}),
        }

    def plan_flags(self) -> tuple[str, ...]:
        """What the plan has to have, as flags of ``fqdiff plan``, beside its formats or its budget."""
        budget = ("--target-bpw",) if self.strategy == "budget" else ()
        names = {"ranges": "range"}
        settings = {
            names.get(name, name): ",".join(value) if isinstance(value, tuple) else value
            for name, value in self.plan_settings.items()
        }
        return (*budget, *(f"--{name} {value}" for name, value in settings.items()))

    @property
    def is_of_activations(self) -> bool:
        """Whether it sets, and asks for, nothing but what is about activations."""
        return not (
            self.distill
            or self.reconstruct
            or self.reparameterize
            or self.noise_correction
            or self.strategy
            or self.ranges
            or self.roundings
            or self.split_weights
        ) and bool(self.activations)

    def flags(self, activations: bool) -> tuple[str, ...]:
        """The same as flags of ``fqdiff quantize``; those of activations only where these are quantized."""
        found = []
        for name, value in self.activations.items() if activations else ():
            if name in SWITCHES:
                found.append(SWITCHES[name][bool(value)])
            else:
                found.append(f"--{name if name == 'softmax' else f'activation-{name}'} {value}")
        parts = {
            f"--distill {self.distill}": self.distill > 0,
            "--reconstruct": self.reconstruct,
            "--reconstruct-temporal": self.temporal_first,
            "--temporal-scales": self.temporal_scales and activations,
            "--learn-steps": self.learn_steps and activations,
            "--reparameterize": self.reparameterize,
            "--noise-correction": self.noise_correction,
        }
        return (*found, *(flag for flag, wanted in parts.items() if wanted))


@dataclass(frozen=True)
class Method:
    """One method. ``made_by``: the commands that make it; ``missing``: what of it is not there, empty for nothing.

    ``bundle``: what ``--method`` stands for.
    """

    name: str
    title: str
    paper: str
    year: int
    made_by: tuple[str, ...]
    implemented: str
    differs: str
    missing: str = ""
    bundle: Bundle = field(default_factory=Bundle)


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method(
            "linear",
            "Linear quantization to the nearest, by the whole range",
            "Jacob et al., CVPR 2018, arXiv:1712.05877",
            2018,
            ("fqdiff plan --uniform int4", "fqdiff quantize --method linear [--activations int8]"),
            "scales by channel, min-max ranges of weights and activations, rounding to the nearest",
            "nothing is trained: this is the baseline that the papers below call linear quantization",
            bundle=Bundle(
                {"range": "min-max", "split_skips": False},
                strategy="uniform",
                ranges=("min-max",),
                roundings=("nearest",),
                by_channel=True,
            ),
        ),
        Method(
            "squant",
            "SQuant: on-the-fly data-free quantization via diagonal Hessian approximation",
            "Guo et al., ICLR 2022, arXiv:2202.07471",
            2022,
            ("fqdiff plan --uniform int4 --rounding squant", "fqdiff quantize --method squant"),
            "rounding by element, kernel and channel, from weights alone",
            "a kernel of one weight has no sum of its own: 1x1 convolutions and linear layers are mended channel by channel "
            "only; no code leaves its range, others make up for it. Activations, where asked for, are as in linear",
            bundle=Bundle({"range": "min-max", "split_skips": False}, ranges=("min-max",), roundings=("squant",)),
        ),
        Method(
            "ptq4dm",
            "Post-training quantization on diffusion models",
            "Shang et al., CVPR 2023, arXiv:2211.15736",
            2023,
            (
                "fqdiff plan --uniform int8 --range mse",
                "fqdiff calibrate --scheme ndtc",
                "fqdiff quantize --method ptq4dm --activations int8",
            ),
            "calibration along the full-precision sampler at timesteps from a normal cut off at both ends, 0.4 T its mean and "
            "its spread, as in the script; --skew makes it the paper's skew-normal; ranges of least squared error",
            "timesteps beyond the ends are drawn again, where the script clamps them into spikes at both; every x_t goes with "
            "its own t, where the script pairs it with the number of the step, counted from noise; squared errors, not |x|^2.4",
            bundle=Bundle(
                {"range": "mse", "split_skips": False}, ranges=("mse",), roundings=("nearest",), scheme="ndtc"
            ),
        ),
        Method(
            "q-diffusion",
            "Q-Diffusion: quantizing diffusion models",
            "Li et al., ICCV 2023, arXiv:2302.04304",
            2023,
            (
                "fqdiff plan --uniform int4 --granularity split",
                "fqdiff calibrate --scheme uniform",
                "fqdiff quantize --method q-diffusion [--activations int8]",
            ),
            "its calibration set (20 timesteps of 256 runs, the default), block reconstruction with AdaRound, then learned steps "
            "of activations, and scales of their own, of weights and of activations, for the two parts of a joined skip",
            "every layer that is given a joined skip is split, two of them through a norm, where the paper splits 1x1 "
            "shortcuts; the penalty on undecided roundings covers both parts, where the code leaves out the second; 250 "
            "iterations a block and 500 of all blocks together, on 7 of 8 inputs, the best rounding on the others kept, where "
            "the code takes 20,000 a block and the last, and none together; steps start from ranges of least squared error and "
            "learn by squared errors, where the code has min-max and |x|^2.4; the time embedding and the output are quantized as "
            "the plan says",
            bundle=Bundle(
                {"range": "mse", "split_skips": True},
                reconstruct=True,
                learn_steps=True,
                roundings=("nearest",),
                scheme="uniform",
                split_weights=True,
            ),
        ),
        Method(
            "ptqd",
            "PTQD: accurate post-training quantization for diffusion models",
            "He et al., NeurIPS 2023, arXiv:2305.10657",
            2023,
            (
                "fqdiff plan --uniform int4",
                "fqdiff calibrate",
                "fqdiff quantize --method ptqd [--activations int8]",
                "fqdiff sample --sampler ddpm",
            ),
            "slope of the correlated error, bias by image channel, and residual variance that the sampler's step noise absorbs; "
            "by intervals of timesteps, in the file",
            "the slope has an intercept for each channel and the bias is the residual's mean, so that an error k eps + b is "
            "undone exactly, where the code leaks one into the other; the direction of a DDIM step keeps sigma, where the code "
            "puts sigma' there as well; of a velocity model, the velocity is corrected",
            "block reconstruction of weights and learned steps of activations are flags, --reconstruct and --learn-steps, and no "
            "part of the name; precision by timestep from "
            "signal-to-noise ratios (fqdiff plan --phases chooses it by Fisher information)",
            Bundle({"range": "mse", "split_skips": False}, noise_correction=True),
        ),
        Method(
            "tdq",
            "Temporal dynamic quantization for diffusion models",
            "So et al., NeurIPS 2023, arXiv:2306.02316",
            2023,
            ("fqdiff plan --uniform int4", "fqdiff calibrate", "fqdiff quantize --method tdq --activations int8"),
            "a network for each site from the model's time embedding to the range of its activations, tabulated into the form in "
            "which it is deployed: scales by site and interval of timesteps",
            "the networks are trained to ranges of least squared error at 20 timesteps (of what depends on t alone, "
            "in 20 intervals), after training, where the paper's main "
            "form trains them with the network, and its other one to layer outputs; ranges have two ends where the format has a "
            "zero point, so that SiLU's outputs need no shift; only channels of the embedding that are slow enough for 20 "
            "timesteps; no dropout; weights are as the plan says",
            bundle=Bundle({"range": "mse", "intervals": 20, "split_skips": False}, temporal_scales=True),
        ),
        Method(
            "tfmq",
            "TFMQ-DM: temporal feature maintenance quantization for diffusion models",
            "Huang et al., CVPR 2024, arXiv:2311.16503",
            2024,
            ("fqdiff plan --uniform int4", "fqdiff calibrate", "fqdiff quantize --method tfmq [--activations int8]"),
            "the time embedding and all its projections reconstructed first, as one block over all timesteps, then the other "
            "blocks; ranges of activations for each interval of timesteps, from that interval's inputs alone; the inputs of "
            "layers that depend on t alone stay in full precision, and samplers compute their outputs once for each t",
            "exact extremes of an interval, where the code takes a moving average over batches; 20 intervals of equal width; "
            "250 iterations a block and 500 of all together, where the code takes 20,000 and none; those layers' weights are "
            "stored as the plan says, since a table of their outputs for all t would be larger than they are",
            bundle=Bundle(
                {"range": "min-max", "intervals": 20, "split_skips": False, "temporal": False},
                reconstruct=True,
                temporal_first=True,
                roundings=("nearest",),
            ),
        ),
        Method(
            "repq",
            "RepQ-ViT: scale reparameterization for post-training quantization of vision transformers",
            "Li et al., ICCV 2023, arXiv:2212.08254",
            2023,
            ("fqdiff plan --uniform int4", "fqdiff calibrate", "fqdiff quantize --method repq --activations int8"),
            "scales by channel folded into the norm before and the layer behind, where that is exact; softmax in log sqrt 2",
            "through ReLU only factors go, no shifts; a network with SiLU is refused with the reason, since silu(x / r) is not "
            "silu(x) / r. Ranges are those of least squared error, where the paper picks the best of three percentiles",
            "scales folded into norms of a network with SiLU, which every preset but paper is. The other parts are there by "
            "flag: --softmax log-sqrt2, and --activation-granularity channel for the scales that could not be folded",
            Bundle({"range": "mse", "softmax": "log-sqrt2", "split_skips": False}, reparameterize=True),
        ),
        Method(
            "fisher",
            "Precision by Fisher information, for a byte budget",
            "this project's own, docs/concepts.md",
            2026,
            (
                "fqdiff fisher --kind trajectory --samples 64 --granularity weight --bins 1",
                "fqdiff plan --target-bpw 4.25",
                "fqdiff quantize --method fisher [--activations int8]",
            ),
            "a format for every tensor, or two for its output channels, so that the predicted error of the final image is least "
            "within the budget (any other Fisher table will do: then it is the rise of the loss); 1,000 steps of "
            "distillation of all that is stored; then activations of least squared error, for 20 intervals of timesteps, split "
            "where skips are joined, and their steps learned",
            "it is this project's own; plans with elements, which cannot be distilled, take --distill 0, those with phases "
            "--no-learn-steps too",
            "bias correction harms such plans (docs/results/bias-correction.md); noise correction brings it "
            "nothing that can be told (docs/results/methods.md)",
            Bundle(
                {"range": "mse", "intervals": 20, "split_skips": True},
                distill=1000,
                learn_steps=True,
                strategy="budget",
            ),
        ),
    )
}


def get_bundle(name: str) -> Bundle:
    """What ``--method name`` stands for. Raises ConfigError where there is no such method."""
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'", f"one of: {', '.join(METHODS)}; fqdiff methods says more")
    return METHODS[name].bundle
