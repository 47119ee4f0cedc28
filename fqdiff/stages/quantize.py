"""Carry out a plan: every parameter packed in its format. Nothing of the full-precision weights is kept beside."""

from collections.abc import Mapping

from torch import Tensor

from fqdiff.calibration.bias import correct_bias
from fqdiff.calibration.distill import distill
from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.reparameterize import reparameterized
from fqdiff.calibration.requirements import check_weights, normed_inputs
from fqdiff.configs import QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, LineageError, QuantizationError
from fqdiff.models.registry import build
from fqdiff.planning.scores import default_score, table_importance, with_gain
from fqdiff.quant.elements import choose_kept
from fqdiff.quant.formats import PerOutput, get_format, parse_granularity
from fqdiff.quant.packed import pack_tensor
from fqdiff.values import CalibrationSet, Checkpoint, FisherTable, Plan, QuantizedCheckpoint, planned_bytes


def quantize_by_gain(
    checkpoint: Checkpoint,
    plan: Plan,
    fisher: FisherTable | None,
    trajectory: FisherTable | None,
    config: QuantizeConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """:func:`quantize`; where the plan weighted timesteps by gain, ``trajectory`` is the table that it took the gains from."""
    return quantize(checkpoint, plan, with_gain(fisher, trajectory), config, seed, context)


def quantize_reparameterized(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: CalibrationSet | None,
    config: QuantizeConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """:func:`quantize` of a network that computes the same, but whose normed layers are given one range for all channels.

    The ranges are taken from ``calibration``. Raises QuantizationError where the network's activation does not let factors
    through, LineageError where the set is missing or of another model, ConfigError where the plan fits ranges to Fisher values,
    which are those of the weights as they were.
    """
    if calibration is None:
        raise LineageError("ranges by channel without a calibration set", "fqdiff calibrate")
    calibration.check_model(checkpoint)
    if plan.fits_fisher:
        raise ConfigError(
            "the plan fits ranges to Fisher values of weights, which reparameterization changes",
            "plan with --range min-max or mse, or leave --reparameterize out",
        )
    inputs = CalibrationInputs(calibration.x_t.float(), calibration.t)
    places = normed_inputs(build(checkpoint.spec.architecture, "meta"))
    with context.progress(len(inputs), "reparameterize", "input") as bar:
        same = reparameterized(checkpoint, places, inputs, context.device, bar.update)
    return quantize(same, plan, None, config, seed, context)


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    fisher: FisherTable | None,
    config: QuantizeConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """``checkpoint`` packed as ``plan`` says, to the byte; timestep biases, where asked for, come on top.

    ``fisher`` is the plan's own table, where it fits ranges to it. Biases are corrected, and all that is stored distilled, on
    sampler runs drawn with ``seed``. Raises LineageError where the plan's parameters are not the checkpoint's or the table is
    missing, ArtifactCorrupt where its entries make a file of another size than it promises, ConfigError for either with phases,
    for distilling kept elements, QuantizationError, which names the tensor, on NaN or overflow.
    """
    check_weights(plan.stored, config, checkpoint.spec.noise_schedule().num_train_timesteps)
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    if {e.parameter: e.shape for e in plan.entries} != shapes:
        raise LineageError("the plan is for another model", "make a plan for this checkpoint: fqdiff plan")
    if (size := planned_bytes(checkpoint.spec, plan.entries)) != plan.file_bytes:
        raise ArtifactCorrupt(
            f"the plan promises a file of {plan.file_bytes:,} bytes, and its entries make one of {size:,}",
            "it was not written by fqdiff plan, or was edited: make it again with fqdiff plan --force",
        )
    weights: Mapping[str, Tensor] = {}
    if plan.reads_fisher:
        if fisher is None or (plan.fits_fisher and not fisher.weights):
            raise LineageError(
                "the plan fits ranges to Fisher values of single weights, and they are gone", "fqdiff plan"
            )
        weighting = plan.budget.timestep_weights if plan.budget is not None else plan.timestep_weights
        of_runs = default_score(fisher.kind) == "trajectory"
        weights = table_importance(
            fisher, "uniform" if of_runs else weighting, checkpoint.spec.noise_schedule(), shapes
        )
    packed = {}
    with context.progress(len(plan.entries), "quantize", "tensor") as bar:
        for e in plan.entries:
            tensor, weight = checkpoint.tensors[e.parameter], weights.get(e.parameter)
            fmt, granularity = get_format(e.format), parse_granularity(e.granularity)
            if isinstance(granularity, PerOutput) and weight is not None and weight.shape != tensor.shape:
                weight = like_channels(weight, tensor, granularity.scales.axis)
            try:
                kept = choose_kept(tensor, fmt, granularity, weight, plan.kept_by, e.range)
                packed[e.parameter] = pack_tensor(tensor, fmt, granularity, e.range, e.rounding, weight, kept)
            except QuantizationError as error:
                raise QuantizationError(f"'{e.parameter}': {error.message}", error.hint) from None
            bar.update()
    if config.distill:
        packed = distill(checkpoint, packed, config, seed, context)
    if config.bias_correction == "none":
        return QuantizedCheckpoint(checkpoint.spec, packed)
    return QuantizedCheckpoint(checkpoint.spec, *correct_bias(checkpoint, packed, config, seed, context))


def like_channels(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """``values`` [O], or [1], of the output channels of ``tensor`` in its shape, so that each channel's sum is its own."""
    each = values.reshape([-1 if k == axis else 1 for k in range(tensor.ndim)])
    return each.expand(tensor.shape).to(tensor.dtype)
