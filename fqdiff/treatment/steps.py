"""The steps that carry out a plan: quantized weights, what makes up for their errors, and activations, each on the one before."""

from collections.abc import Iterator, Mapping

from fqdiff.configs import quantize_reads_fisher
from fqdiff.errors import ConfigError
from fqdiff.pipeline import Step
from fqdiff.store.manifest import Manifest
from fqdiff.treatment.treatment import Treatment, refuse_calibration

Source = Step | Manifest


def treated_step(
    checkpoint: Source,
    plan: Source,
    tables: Mapping[str, Source],
    calibration: Source | None,
    treatment: Treatment,
    seed: int,
) -> Step:
    """The last of the steps that carry out ``plan`` on the ``checkpoint`` it is for, as ``treatment`` says.

    ``tables``: the plan's Fisher tables by their roles in its recipe; they go along where ranges may be fitted to them, or
    output channels chosen by them. ``calibration``: the set that all stages learn from. Steps have ``seed`` only where
    something is random. Raises ConfigError where the set is missing or has no use, and where reparameterization would change
    the weights that a table is of.
    """
    if calibration is None and treatment.is_calibrated:
        raise ConfigError("stages that learn from a calibration set, without one", "fqdiff calibrate")
    if calibration is not None:
        refuse_calibration(treatment)
    fitted = _read_tables(plan, tables)
    inputs: dict[str, Source] = {"checkpoint": checkpoint, "plan": plan}
    learned = {"checkpoint": checkpoint, **({} if calibration is None else {"calibration": calibration})}
    chance = seed if treatment.quantize.bias_correction != "none" or treatment.quantize.distill else 0
    if not treatment.reparameterize:
        step = Step("quantize", {**inputs, **fitted}, treatment.quantize, chance)
    elif fitted:
        raise ConfigError(
            "the plan has Fisher values of single weights, which reparameterization changes",
            "make a plan without, or leave --reparameterize out",
        )
    else:
        step = Step("quantize-reparameterized", {**learned, "plan": plan}, treatment.quantize, chance)
    if treatment.reconstruct is not None:
        stage = "reconstruct-temporal" if treatment.temporal_first else "reconstruct"
        step = Step(stage, {**learned, "model": step}, treatment.reconstruct, seed)
    if treatment.activations is not None:
        ranges = {"checkpoint": checkpoint} if treatment.activations.dynamic else learned
        formats = {"plan": plan} if activations_of(plan) else {}
        step = Step("activations", {**ranges, **formats, "model": step}, treatment.activations)
    if treatment.temporal_scales is not None:
        step = Step("temporal-scales", {**learned, "model": step}, treatment.temporal_scales, seed)
    if treatment.activation_steps is not None:
        step = Step("activation-steps", {**learned, "model": step}, treatment.activation_steps, seed)
    if treatment.noise_correction is not None:
        step = Step("noise-correction", {**learned, "model": step}, treatment.noise_correction)
    return step


def activations_of(plan: Source) -> str:
    """The format that a plan has for activations, of several the narrow one; empty where it says nothing of them."""
    return str(plan.recipe.config.get("activations", ""))


def chain_of(step: Step) -> Iterator[Step]:
    """The steps of :func:`treated_step` that end in ``step``, the first of them first."""
    before = step.inputs.get("model")
    if isinstance(before, Step):
        yield from chain_of(before)
    yield step


def _read_tables(plan: Source, tables: Mapping[str, Source]) -> Mapping[str, Source]:
    """Those of ``tables`` that are read when the plan is carried out: all or none."""
    table = tables.get("fisher")
    if table is None:
        return {}
    granularities = (str(source.recipe.config.get("granularity")) for source in (plan, table))
    return tables if quantize_reads_fisher(*granularities) else {}
