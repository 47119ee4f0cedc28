"""What is asked for, as flags, a settings file or a sweep say it, and the treatment that it makes with a method's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fqdiff.configs import (
    ActivationConfig,
    NoiseCorrectionConfig,
    QuantizeConfig,
    ReconstructConfig,
    StepsConfig,
    TemporalConfig,
)
from fqdiff.errors import ConfigError, require
from fqdiff.methods import Bundle, get_bundle
from fqdiff.treatment.treatment import Treatment

Config = TypeVar("Config")
Settings = Mapping[str, object]
STEPS_SHARE = 0.25  # of a budget for both: schedules are a tenth as long, but every step passes all quantizers


@dataclass(frozen=True)
class Wish:
    """Whether a stage is asked for, None where the method decides, and settings for it; the others have their defaults."""

    asked: bool | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What is asked of every stage of a treatment. Activations are quantized where their settings name a ``format``.

    ``minutes``: what learned roundings and learned steps may take together, 0 for as long as they take.
    """

    quantize: Settings = field(default_factory=dict)
    reparameterize: bool | None = None
    reconstruct: Wish = field(default_factory=Wish)
    temporal_first: bool | None = None
    activations: Settings = field(default_factory=dict)
    temporal_scales: Wish = field(default_factory=Wish)
    activation_steps: Wish = field(default_factory=Wish)
    noise_correction: Wish = field(default_factory=Wish)
    minutes: float = 0.0


def make_treatment(request: Request, method: str | None = None) -> Treatment:
    """The treatment that ``request`` asks for; what it leaves open is as the published ``method`` has it.

    Raises ConfigError for unknown methods, and those of which nothing would be left; for settings of a stage that is left out,
    for values that a config refuses, and for stages that do not go together.
    """
    bundle = Bundle() if method is None else get_bundle(method)
    quantized = "format" in request.activations
    _check_activations(request, method, bundle)
    if not quantized and request.activations:
        raise ConfigError(
            f"{', '.join(sorted(request.activations))} of activations that stay float32", "add --activations int8"
        )
    first = {} if request.temporal_first is None else {"temporal": request.temporal_first}
    reconstruct = _stage(
        ReconstructConfig,
        request.reconstruct,
        bundle.reconstruct,
        ("{} of a reconstruction that is not asked for", "add --reconstruct"),
        first,
    )
    temporal_first = bundle.temporal_first if request.temporal_first is None else request.temporal_first
    steps = _stage(
        StepsConfig,
        request.activation_steps,
        bundle.learn_steps and quantized,
        ("{} of activation steps that are not learned", "add --learn-steps"),
    )
    if request.minutes:
        reconstruct, steps = _within(request.minutes, reconstruct, steps)
    return Treatment(
        quantize=QuantizeConfig(**_any({"distill": bundle.distill, **request.quantize})),
        reparameterize=bundle.reparameterize if request.reparameterize is None else request.reparameterize,
        reconstruct=reconstruct,
        temporal_first=temporal_first and reconstruct is not None,
        activations=ActivationConfig(**_any({**bundle.activations, **request.activations})) if quantized else None,
        temporal_scales=_stage(
            TemporalConfig,
            request.temporal_scales,
            bundle.temporal_scales and quantized,
            ("{} of scales that are no function of time", "add --temporal-scales"),
        ),
        activation_steps=steps,
        noise_correction=_stage(
            NoiseCorrectionConfig,
            request.noise_correction,
            bundle.noise_correction,
            ("noise {} of a prediction that stays as it is", "add --noise-correction"),
        ),
    )


def _within(
    minutes: float, reconstruct: ReconstructConfig | None, steps: StepsConfig | None
) -> tuple[ReconstructConfig | None, StepsConfig | None]:
    """The configs with so many ``minutes`` for both together. Raises ConfigError where there is neither, or one has its own."""
    learned = [config for config in (reconstruct, steps) if config is not None]
    require(
        bool(learned),
        "a budget of minutes, and nothing that learns by them",
        "add --reconstruct or --learn-steps; distillation goes by steps: --distill 1000",
    )
    require(
        not any(config.minutes for config in learned),
        "a budget beside minutes of its own for a stage",
        "give one of them",
    )
    of_steps = 0.0 if steps is None else minutes * (1.0 if reconstruct is None else STEPS_SHARE)
    return (
        None if reconstruct is None else replace(reconstruct, minutes=minutes - of_steps),
        None if steps is None else replace(steps, minutes=of_steps),
    )


def _check_activations(request: Request, method: str | None, bundle: Bundle) -> None:
    """Raise ConfigError where the method is about activations alone and they stay, or has ranges that dynamic ones have not."""
    if bundle.is_of_activations and "format" not in request.activations:
        raise ConfigError(f"{method} is about activations, and these stay float32", "add --activations int8")
    known = {name: value for name, value in bundle.activations.items() if value != getattr(ActivationConfig, name)}
    calibrated = [name for name in ("range", "intervals") if name in known and name not in request.activations]
    learned = (
        bundle.temporal_scales and request.temporal_scales.asked is not False,
        bundle.learn_steps and request.activation_steps.asked is not False,
    )
    if request.activations.get("dynamic") and (calibrated or any(learned)):
        raise ConfigError(
            f"{method} calibrates the ranges of activations; dynamic ones are taken from every input as it comes",
            f"leave --dynamic or --method {method} out",
        )


def _stage(
    kind: type[Config], wish: Wish, by_method: bool, refusal: tuple[str, str], beside: Settings | None = None
) -> Config | None:
    """The stage's config, or None where it is left out: settings, and what is said ``beside`` them, are refused then.

    ``refusal``: a message with a place for their names, and a hint.
    """
    if wish.asked if wish.asked is not None else by_method:
        return kind(**_any(wish.settings))
    unused = sorted({**wish.settings, **(beside or {})})
    if unused:
        raise ConfigError(refusal[0].format(", ".join(unused)), refusal[1])
    return None


def _any(settings: Settings) -> dict[str, Any]:
    """``settings`` for a config, which checks them itself."""
    return dict(settings)
