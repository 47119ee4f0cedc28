"""What ``fqdiff quantize`` works on: a plan, or a checkpoint of which a method makes one, and the calibration set for either."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fqdiff.cli.calibrate import calibration_step
from fqdiff.cli.plan_budget import budget_config
from fqdiff.cli.plan_inputs import budget_inputs
from fqdiff.cli.session import Session, of_checkpoint, only_input
from fqdiff.configs import CalibrateConfig, PlanConfig
from fqdiff.errors import ConfigError
from fqdiff.methods import Bundle
from fqdiff.treatment.treatment import Treatment, refuse_calibration

if TYPE_CHECKING:
    from torch import Tensor

    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest

WEIGHTS = "int8"
NUMBER = re.compile(r"\d+(\.\d+)?")
WEIGHTS_AND_ACTIVATIONS = re.compile(r"W(\d+)A(\d+)")


@dataclass(frozen=True)
class Planned:
    """A plan, the checkpoint that it is for, and the Fisher tables that it was made from, by their roles in its recipe."""

    checkpoint: "Manifest"
    plan: "Manifest | Step"
    tables: "Mapping[str, Manifest]" = field(default_factory=dict)

    @property
    def made(self) -> "Manifest | None":
        """The plan, None where it is still to be made."""
        from fqdiff.pipeline import Step

        return None if isinstance(self.plan, Step) else self.plan


def planned(session: Session, plan: "Manifest") -> Planned:
    """A plan that is there, with what it was made from."""
    tables = {role: only_input(session, plan, role) for role in ("fisher", "trajectory") if plan.input(role)}
    return Planned(only_input(session, plan, "checkpoint"), plan, tables)


def planned_by_method(
    session: Session, checkpoint: "Manifest", method: str, bundle: Bundle, weights: str | None
) -> Planned:
    """The plan that ``fqdiff plan`` would make of ``checkpoint`` for a method, all its weights in the format ``weights``.

    Of a method that plans for a budget: of as many bits per weight, or of the number that ``weights`` is, by the latest
    trajectory table of the checkpoint, else by its latest Fisher table. Raises ArtifactNotFound where it has none, ConfigError
    for what is no format.
    """
    from fqdiff.pipeline import Step

    name = weights or WEIGHTS
    bits = _bits(name, bundle)
    if bundle.strategy == "budget":
        table = budget_inputs(session, checkpoint.id, True, {})["fisher"]
        config = budget_config(session, {"target_bpw": bits}, table)
        words, tables = f"{config.target_bpw:g} bits per weight by Fisher table {table.id}", {"fisher": table}
    else:
        config = session.settings("plan", PlanConfig, {}, strategy="uniform", low=name, **bundle.plan_settings)
        words, tables = f"uniform {name}", {}
    step = Step("plan", {"checkpoint": checkpoint, **tables}, config)
    found = session.store.find("plan", step.id)
    session.note(f"plan: {words}, for {method}, {step.id}" + ("" if found else ", to be made"))
    return Planned(checkpoint, found or step, tables)


def _bits(weights: str, bundle: Bundle) -> float:
    """The bits of the format ``weights``, or of a budget the number that it is."""
    from fqdiff.quant.formats import get_format

    if bundle.strategy == "budget" and NUMBER.fullmatch(weights):
        return float(weights)
    if both := WEIGHTS_AND_ACTIVATIONS.fullmatch(weights.upper()):
        raise ConfigError(
            f"unknown format '{weights}'", f"--weights int{both[1]} --activations int{both[2]}; A32 is without"
        )
    return float(get_format(weights).bits)


def check_plan(session: Session, method: str, subject: Planned, calibration: "Manifest | Step | None") -> None:
    """Raise ConfigError where the plan, as far as is known before it is made, or the set is not what ``method`` asks for."""
    from fqdiff.pipeline import Step
    from fqdiff.treatment.suits import check_method, traits_of_config, traits_of_plan

    plan = subject.plan
    traits = traits_of_config(plan.config) if isinstance(plan, Step) else traits_of_plan(session.runner.load(plan))
    check_method(method, traits, calibration)


def with_plan(session: Session, subject: Planned) -> Planned:
    """``subject`` with its plan made."""
    from fqdiff.pipeline import Step

    return replace(subject, plan=session.runner.run(subject.plan)) if isinstance(subject.plan, Step) else subject


def calibration_of(
    session: Session, checkpoint: "Manifest", treatment: Treatment, ref: str | None
) -> "Manifest | None":
    """The set that ``treatment`` learns from: the one that ``ref`` names, else the latest of ``checkpoint``.

    None where nothing learns from one; naming one is then refused.
    """
    if ref is not None:
        refuse_calibration(treatment)
    if not treatment.is_calibrated:
        return None
    return of_checkpoint(session, "calibration", checkpoint.id, ref)


def calibration_by_method(
    session: Session, checkpoint: "Manifest", treatment: Treatment, ref: str | None, scheme: str
) -> "Manifest | Step | None":
    """As :func:`calibration_of`, but the latest of ``scheme``, by default uniform, that a sampler met.

    Where there is none, the one that ``fqdiff calibrate`` would make. Sets of other schemes, or of noised images, are for
    those who ask for them: the latest of all may be anything.
    """
    if ref is not None or not treatment.is_calibrated:
        return calibration_of(session, checkpoint, treatment, ref)
    own = [m for m in session.store.manifests("calibration") if (i := m.input("checkpoint")) and i.id == checkpoint.id]
    wanted = {"scheme": scheme or CalibrateConfig.scheme, "source": CalibrateConfig.source}
    own = [m for m in own if wanted.items() <= m.recipe.config.items()]
    if own:
        session.note(f"calibration: the latest {wanted['scheme']} of that checkpoint, {own[-1].id}")
        return own[-1]
    step = calibration_step(session, checkpoint, **wanted)
    session.note(f"calibration: {step.config.scheme} of that checkpoint, {step.id}, to be made")
    return step


def timesteps_of(session: Session, checkpoint: "Manifest", calibration: "Manifest | Step | None") -> "Tensor | None":
    """The timesteps of a calibration set, int64 [N], None where they are not known before it is made, or there is none."""
    import torch

    from fqdiff.calibration.schemes import chosen_steps
    from fqdiff.diffusion.samplers import sampling_timesteps
    from fqdiff.pipeline import Step

    if not isinstance(calibration, Step):
        return None if calibration is None else session.runner.load(calibration).t
    if calibration.config.scheme == "fisher":
        return None
    total = session.runner.load(checkpoint).spec.noise_schedule().num_train_timesteps
    t = torch.tensor(sampling_timesteps(total, calibration.config.steps))
    return t[chosen_steps(calibration.config, calibration.seed).flatten()]
