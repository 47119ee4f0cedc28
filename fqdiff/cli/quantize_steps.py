"""The steps that carry out a plan: quantized weights, what makes up for their errors, and activations, each on the one before."""

from typing import TYPE_CHECKING

from fqdiff.cli.session import Session, of_checkpoint, only_input
from fqdiff.configs import (
    ActivationConfig,
    NoiseCorrectionConfig,
    QuantizeConfig,
    ReconstructConfig,
    StepsConfig,
    TemporalConfig,
    quantize_reads_fisher,
)
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest

CORRECTION = "noise-correction"  # stage, and table of the settings file
STEPS, TEMPORAL = "activation-steps", "temporal-scales"  # likewise
RECONSTRUCT = ("reconstruct", "reconstruct-temporal")  # tables of one kind: which one is there says how
OF_ACTIVATIONS = ("activations", TEMPORAL, STEPS)


def quantize_step(
    session: Session, plan_manifest: "Manifest", base: "Mapping[str, object] | None" = None, **flags: object
) -> "Step":
    """The step that carries out a plan on the checkpoint it was made for, with the settings of flags and file, over ``base``.

    It gets the plan's Fisher table where ranges may be fitted to it, or output channels chosen by it.
    """
    from fqdiff.pipeline import Step

    inputs = {"checkpoint": only_input(session, plan_manifest, "checkpoint"), "plan": plan_manifest}
    if plan_manifest.input("fisher") is not None:
        table = only_input(session, plan_manifest, "fisher")
        granularities = (str(m.recipe.config.get("granularity")) for m in (plan_manifest, table))
        if quantize_reads_fisher(*granularities):
            inputs["fisher"] = table
            if plan_manifest.input("trajectory") is not None:
                inputs["trajectory"] = only_input(session, plan_manifest, "trajectory")
    config = session.settings("quantize", QuantizeConfig, base or {}, **flags)
    seed = session.seed if config.bias_correction != "none" or config.distill else 0  # nothing else is random
    return Step("quantize", inputs, config, seed)


def calibrated(
    session: Session, plan_manifest: "Manifest", model: "Step", calibration: str | None
) -> "dict[str, Step | Manifest]":
    """Inputs of a step that looks at ``model`` on the set ``calibration``, else on the latest of the plan's checkpoint."""
    checkpoint = only_input(session, plan_manifest, "checkpoint")
    chosen = of_checkpoint(session, "calibration", checkpoint.id, calibration)
    return {"checkpoint": checkpoint, "model": model, "calibration": chosen}


def planned_step(session: Session, plan_manifest: "Manifest") -> "Step":
    """The step that carries out a plan with the settings of the file alone, those of later stages among them."""
    weights = reconstruct_step(session, plan_manifest, quantize_step(session, plan_manifest))
    rounded = activations_step(session, plan_manifest, weights)
    learned = learned_steps_step(session, plan_manifest, temporal_step(session, rounded))
    return correction_step(session, plan_manifest, learned, None, CORRECTION in session.tables())


def reconstruct_step(
    session: Session,
    plan_manifest: "Manifest",
    weights: "Step",
    calibration: str | None = None,
    asked: bool | None = None,
    flags: "Mapping[str, object] | None" = None,
    temporal_first: bool | None = None,
) -> "Step":
    """The step that learns the rounding of what ``weights`` makes; ``weights`` itself where nothing asks for that.

    ``asked`` decides, and ``temporal_first``; else a table of the file does by being there. On ``calibration``, else on the
    latest set of the plan's checkpoint.
    """
    from fqdiff.pipeline import Step

    tables = [name for name in RECONSTRUCT if name in session.tables()]
    if len(tables) > 1:
        raise ConfigError("tables for reconstruct and reconstruct-temporal", "one of them: it says how")
    if not (asked if asked is not None else bool(tables)):
        given = {**(flags or {}), "temporal": temporal_first}
        unused = sorted(name for name, value in given.items() if value is not None)
        if unused:
            raise ConfigError(f"{', '.join(unused)} of a reconstruction that is not asked for", "add --reconstruct")
        return weights
    for name, what in (("bias_correction", "biases corrected"), ("distill", "weights distilled")):
        if getattr(weights.config, name) != getattr(QuantizeConfig, name):
            raise ConfigError(f"{what} before their rounding is learned", f"leave --{name.replace('_', '-')} out")
    stage = RECONSTRUCT[temporal_first if temporal_first is not None else "reconstruct-temporal" in tables]
    config = session.settings(tables[0] if tables else stage, ReconstructConfig, {}, **(flags or {}))
    return Step(stage, calibrated(session, plan_manifest, weights, calibration), config, session.seed)


def activations_step(
    session: Session,
    plan_manifest: "Manifest",
    weights: "Step",
    calibration: str | None = None,
    flags: "Mapping[str, object] | None" = None,
    shared: bool = False,
    base: "Mapping[str, object] | None" = None,
) -> "Step":
    """The step that quantizes the activations of what ``weights`` makes; ``weights`` itself where nothing asks for that.

    Ranges come from ``calibration``, else from the latest set of the plan's checkpoint. ``shared``: another step is given that
    set too, and it may be for that one alone. ``base``: settings that flags and file go over.
    """
    from fqdiff.pipeline import Step

    given = {name for name, value in (flags or {}).items() if value is not None}
    in_file = session.tables().get("activations", {})
    if not given & {"format"} and "format" not in in_file:
        unused = sorted(given | ({"calibration"} if calibration is not None and not shared else set()) | set(in_file))
        if unused:
            raise ConfigError(f"{', '.join(unused)} of activations that stay float32", "add --activations int8")
        return weights
    config = session.settings("activations", ActivationConfig, base or {}, **(flags or {}))
    inputs: dict[str, Step | Manifest] = {
        "checkpoint": only_input(session, plan_manifest, "checkpoint"),
        "model": weights,
    }
    if not config.dynamic:
        inputs["calibration"] = of_checkpoint(session, "calibration", inputs["checkpoint"].id, calibration)
    elif calibration is not None and not shared:
        raise ConfigError("dynamic activations have no use for a calibration set", "leave it out, or add --static")
    return Step("activations", inputs, config)


def learned_steps_step(
    session: Session,
    plan_manifest: "Manifest",
    model: "Step",
    calibration: str | None = None,
    asked: bool | None = None,
    flags: "Mapping[str, object] | None" = None,
) -> "Step":
    """The step that learns the activation scales of what ``model`` makes; ``model`` itself where nothing asks for that.

    ``asked`` decides; else a table of the file does by being there. On ``calibration``, else on the latest set of the plan's
    checkpoint.
    """
    from fqdiff.pipeline import Step

    if not (asked if asked is not None else STEPS in session.tables()):
        unused = sorted(name for name, value in (flags or {}).items() if value is not None)
        if unused:
            raise ConfigError(f"{', '.join(unused)} of activation steps that are not learned", "add --learn-steps")
        return model
    if model.stage not in OF_ACTIVATIONS:
        raise ConfigError("learned steps of activations that stay float32", "add --activations int8")
    if model.stage == "activations" and model.config.dynamic:
        raise ConfigError("dynamic activations have no steps to learn", "leave --learn-steps or --dynamic out")
    config = session.settings(STEPS, StepsConfig, {}, **(flags or {}))
    return Step(STEPS, calibrated(session, plan_manifest, model, calibration), config, session.seed)


def temporal_step(
    session: Session,
    model: "Step",
    asked: bool | None = None,
    flags: "Mapping[str, object] | None" = None,
) -> "Step":
    """The step that fits the activation scales of what ``model`` makes by functions of time; ``model`` where nothing asks for it.

    ``asked`` decides; else a table of the file does by being there. The calibration set is the one that the scales come from.
    """
    from fqdiff.pipeline import Step

    if not (asked if asked is not None else TEMPORAL in session.tables()):
        unused = sorted(name for name, value in (flags or {}).items() if value is not None)
        if unused:
            raise ConfigError(f"{', '.join(unused)} of scales that are no function of time", "add --temporal-scales")
        return model
    if model.stage != "activations":
        raise ConfigError("scales by time of activations that stay float32", "add --activations int8")
    if model.config.dynamic:
        raise ConfigError("dynamic activations have no scales to learn", "leave --temporal-scales or --dynamic out")
    if model.config.intervals < 2:
        raise ConfigError(
            "scales of one interval do not tell how they change with time", "add --activation-intervals 20"
        )
    config = session.settings(TEMPORAL, TemporalConfig, {}, **(flags or {}))
    return Step(TEMPORAL, {**model.inputs, "model": model}, config, session.seed)


def reparameterized_step(
    session: Session, plan_manifest: "Manifest", weights: "Step", calibration: str | None
) -> "Step":
    """The step that does what ``weights`` does, with a network that has one range for all channels behind every norm."""
    from fqdiff.pipeline import Step

    if "fisher" in weights.inputs:
        raise ConfigError(
            "the plan has Fisher values of single weights, which reparameterization changes",
            "make a plan without, or leave --reparameterize out",
        )
    checkpoint = only_input(session, plan_manifest, "checkpoint")
    chosen = of_checkpoint(session, "calibration", checkpoint.id, calibration)
    inputs = {"checkpoint": checkpoint, "plan": plan_manifest, "calibration": chosen}
    return Step("quantize-reparameterized", inputs, weights.config, weights.seed)


def correction_step(
    session: Session,
    plan_manifest: "Manifest",
    model: "Step",
    calibration: str | None,
    corrected: bool,
    **flags: object,
) -> "Step":
    """The step that corrects what the model of the step ``model`` predicts; ``model`` itself unless it is to be ``corrected``."""
    from fqdiff.pipeline import Step

    if not corrected:
        if flags.get("intervals") is not None:
            raise ConfigError("noise intervals of a prediction that stays as it is", "add --noise-correction")
        return model
    config = session.settings(CORRECTION, NoiseCorrectionConfig, {}, **flags)
    return Step(CORRECTION, calibrated(session, plan_manifest, model, calibration), config)
