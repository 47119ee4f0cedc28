"""Whether a treatment can be carried out, told from its inputs before the first of its stages begins to work."""

from torch import Tensor, nn

from fqdiff.calibration.requirements import (
    check_enough,
    check_intervals,
    check_learned_steps,
    check_reconstruction,
    check_reparameterization,
    check_temporal,
    check_temporal_scales,
    check_weights,
    normed_inputs,
)
from fqdiff.models.registry import build, temporal_block
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.treatment.treatment import Treatment
from fqdiff.values import ModelSpec, Plan


def check_feasible(treatment: Treatment, spec: ModelSpec, plan: Plan | None, t: Tensor | None) -> None:
    """Raise what a stage of ``treatment`` would raise of ``plan``, of the network of ``spec``, or of the calibration set.

    ``t`` int64 [N]: the set's timesteps. A plan or a set that is None is not looked at.
    """
    total = spec.noise_schedule().num_train_timesteps
    network = build(spec.architecture, "meta")
    if treatment.reparameterize:
        check_reparameterization(normed_inputs(network))
    if treatment.temporal_scales is not None:
        check_temporal_scales(treatment.temporal_scales, total)
    if treatment.temporal_first and not temporal_block(network)[1]:  # whatever the plan, which may not be made yet
        check_temporal({}, ())
    if plan is not None:
        _check_formats(treatment, plan, network, total)
    if t is not None:
        _check_timesteps(treatment, t, total)


def _check_formats(treatment: Treatment, plan: Plan, network: nn.Module, num_train_timesteps: int) -> None:
    check_weights(plan.stored, treatment.quantize, num_train_timesteps)
    if treatment.reconstruct is not None:
        check_reconstruction(plan.stored)
        if treatment.temporal_first:
            check_temporal(plan.stored, temporal_block(network)[1].values())
    if treatment.activation_steps is not None:
        check_learned_steps(plan.stored)


def _check_timesteps(treatment: Treatment, t: Tensor, num_train_timesteps: int) -> None:
    if treatment.reconstruct is not None:
        check_enough(min(len(t), treatment.reconstruct.inputs), "reconstruct")
    if treatment.activation_steps is not None:
        check_enough(min(len(t), treatment.activation_steps.inputs), "learn steps")
    if treatment.activations is not None and not treatment.activations.dynamic:
        count = treatment.activations.intervals
        check_intervals(interval_of(t, count, num_train_timesteps), count, "--activation-intervals")
    if treatment.noise_correction is not None:
        count = treatment.noise_correction.intervals
        check_intervals(interval_of(t, count, num_train_timesteps), count, "--noise-intervals")
