"""Data sets, training, import, and the presets of models."""

from dataclasses import dataclass, field

from fqdiff.errors import require


@dataclass(frozen=True)
class DatasetConfig:
    """Which images, at which size, and how many of them are held out as the reference set."""

    name: str = "mnist5k"
    image_size: int = 32
    content: str = ""  # sha256 over the source files: other pixels, other id


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. ``architecture`` holds the fields of a UNetConfig."""

    architecture: dict[str, object] = field(default_factory=dict)
    schedule: str = "linear"
    prediction: str = "eps"
    weighting: str = "uniform"
    steps: int = 5000
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 200
    decay: str = "cosine"
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "float32"

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps is {self.steps}", "train for at least one step")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}", "use 1 or more")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}", "use a positive rate, e.g. 1e-3")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}", "use 0 or more")
        require(self.warmup >= 0, f"warmup is {self.warmup}", "use 0 or more steps")
        require(self.clip_norm >= 0, f"clip_norm is {self.clip_norm}", "use 0 (no clipping) or more")
        require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}", "use a value in [0, 1), e.g. 0.999")
        require(self.optimizer in ("adam", "adamw"), f"unknown optimizer '{self.optimizer}'", "one of: adam, adamw")
        require(self.decay in ("none", "cosine"), f"unknown decay '{self.decay}'", "one of: none, cosine")
        require(self.prediction in ("eps", "v"), f"unknown prediction '{self.prediction}'", "one of: eps, v")
        require(
            self.weighting in ("uniform", "min-snr"),
            f"unknown weighting '{self.weighting}'",
            "one of: uniform, min-snr",
        )
        require(
            self.precision in ("float32", "bfloat16"),
            f"unknown precision '{self.precision}'",
            "one of: float32, bfloat16",
        )


@dataclass(frozen=True)
class ImportConfig:
    """Which model file: ``pretrained:NAME`` or the file's own name, and the sha256 of its bytes."""

    source: str = ""
    content: str = ""


@dataclass(frozen=True)
class Preset:
    """A model size with the training that suits it. ``architecture`` holds what differs from the paper's U-Net."""

    description: str
    image_size: int
    architecture: dict[str, object]
    train: dict[str, object]


def _own_recipe(base: int, image_size: int, norm_groups: int, num_heads: int) -> dict[str, object]:
    """The paper's topology at another width, with SiLU, a learned time embedding and no dropout, which train faster."""
    return {
        "channels": [base, 2 * base, 4 * base, 8 * base, 8 * base, 6 * base],
        "image_size": image_size,
        "norm_groups": norm_groups,
        "num_heads": num_heads,
        "dropout": 0.0,
        "activation": "silu",
        "time_embedding": "learned",
    }


PRESETS = {
    "paper": Preset(
        "the paper's U-Net, 35.2 M parameters, 32 x 32: days on a CPU",
        32,
        {},
        {
            "optimizer": "adam",
            "learning_rate": 2e-5,
            "steps": 14_070,  # 15 epochs of 60,000 images
            "warmup": 0,
            "decay": "none",
            "ema_decay": 0.9999,
        },
    ),
    "small": Preset(
        "the same topology at a quarter of the width, 2.2 M parameters, 32 x 32",
        32,
        _own_recipe(16, 32, 8, 8),
        {"schedule": "cosine", "prediction": "v", "steps": 4500, "learning_rate": 2e-3},
    ),
    "demo": Preset(
        "the same topology at an eighth of the width, 0.6 M parameters, 16 x 16: two and a half minutes on two cores",
        16,
        _own_recipe(8, 16, 8, 4),
        {
            "schedule": "cosine",
            "prediction": "v",
            "steps": 1500,
            "learning_rate": 4e-3,
            "warmup": 100,
            "ema_decay": 0.995,
        },
    ),
    "tiny": Preset(
        "0.15 M parameters on 8 x 8 images: seconds, for tests; its images are not worth looking at",
        8,
        _own_recipe(4, 8, 2, 2),
        {"schedule": "cosine", "prediction": "v", "steps": 50, "batch_size": 16, "warmup": 10, "ema_decay": 0.9},
    ),
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``, or ConfigError."""
    require(name in PRESETS, f"unknown preset '{name}'", f"one of: {', '.join(PRESETS)}")
    return PRESETS[name]
