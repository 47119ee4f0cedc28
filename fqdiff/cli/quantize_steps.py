"""From flags, a settings file and the store to the steps that carry out a plan."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fqdiff.cli.quantize_inputs import Planned, calibration_of, planned, timesteps_of
from fqdiff.cli.session import Session
from fqdiff.configs import (
    ActivationConfig,
    NoiseCorrectionConfig,
    QuantizeConfig,
    ReconstructConfig,
    StepsConfig,
    TemporalConfig,
)
from fqdiff.errors import ConfigError, require
from fqdiff.treatment.request import Request, Wish, make_treatment
from fqdiff.treatment.treatment import Treatment

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest

CORRECTION = "noise-correction"  # stage, and table of the settings file
STEPS, TEMPORAL = "activation-steps", "temporal-scales"  # likewise
RECONSTRUCT = ("reconstruct", "reconstruct-temporal")  # tables of one kind: which one is there says how
OF_ACTIVATIONS = ("activations", TEMPORAL, STEPS)

Flags = Mapping[str, Mapping[str, object]]


def requested(
    session: Session,
    flags: Flags | None = None,
    asked: Mapping[str, bool | None] | None = None,
    reparameterize: bool | None = None,
    temporal_first: bool | None = None,
    minutes: float | None = None,
    planned_format: str = "",
) -> Request:
    """What flags ask of every stage, and under them the settings file, whose tables ask for their stage by being there.

    ``flags``: settings by stage, None where not given; ``asked``: whether a stage is, by flag. ``minutes``: for all that learns.
    ``planned_format``: of activations where the plan has it; to ask for another is refused.
    """
    tables = [name for name in RECONSTRUCT if name in session.tables()]
    if len(tables) > 1:
        raise ConfigError("tables for reconstruct and reconstruct-temporal", "one of them: it says how")
    flags, asked = flags or {}, asked or {}

    def wish(stage: str, kind: type[Any], table: str) -> Wish:
        own = flags.get(stage, {})
        wanted = asked.get(stage)
        if wanted is False:
            return Wish(False, {name: value for name, value in own.items() if value is not None})
        return Wish(wanted or (True if table in session.tables() else None), session.given(table, kind, **own))

    if temporal_first is None and tables == ["reconstruct-temporal"] and asked.get("reconstruct") is not False:
        temporal_first = True
    activations = session.given("activations", ActivationConfig, **flags.get("activations", {}))
    if planned_format:
        require("format" not in activations, "--activations of a plan that has its own", "leave it out")
        activations["format"] = planned_format
    return Request(
        quantize=session.given("quantize", QuantizeConfig, **flags.get("quantize", {})),
        reparameterize=reparameterize,
        reconstruct=wish("reconstruct", ReconstructConfig, tables[0] if tables else "reconstruct"),
        temporal_first=temporal_first,
        activations=activations,
        temporal_scales=wish(TEMPORAL, TemporalConfig, TEMPORAL),
        activation_steps=wish(STEPS, StepsConfig, STEPS),
        noise_correction=wish(CORRECTION, NoiseCorrectionConfig, CORRECTION),
        minutes=minutes or 0.0,
    )


def carried_out(
    session: Session, subject: Planned, treatment: Treatment, calibration: "Manifest | Step | None"
) -> "Step":
    """The step that carries out a plan on the checkpoint it is for.

    Unless the result is there already, raises what one of its stages would raise of the network, of the set, or of the plan,
    where that is made.
    """
    from fqdiff.pipeline import Step
    from fqdiff.treatment.feasible import check_feasible
    from fqdiff.treatment.steps import treated_step

    checkpoint, plan = subject.checkpoint, subject.plan
    step = treated_step(checkpoint, plan, subject.tables, calibration, treatment, session.seed)
    if session.store.find(step.kind, step.id) is None:
        made = None if isinstance(plan, Step) else session.runner.load(plan)
        spec = session.runner.load(checkpoint).spec
        check_feasible(treatment, spec, made, timesteps_of(session, checkpoint, calibration))
    return step


def planned_step(session: Session, plan_manifest: "Manifest") -> "Step":
    """The step that carries out a plan with the settings of the file alone, those of later stages among them."""
    from fqdiff.treatment.steps import activations_of

    subject = planned(session, plan_manifest)
    treatment = make_treatment(requested(session, planned_format=activations_of(plan_manifest)))
    return carried_out(session, subject, treatment, calibration_of(session, subject.checkpoint, treatment, None))
