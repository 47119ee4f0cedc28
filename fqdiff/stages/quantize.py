"""Carry out a plan: every parameter packed in its format. Nothing of the full-precision weights is kept beside."""

from fqdiff.calibration.bias import correct_bias
from fqdiff.configs import QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import LineageError
from fqdiff.quant.formats import get_format, parse_granularity
from fqdiff.quant.packed import pack_tensor
from fqdiff.values import Checkpoint, Plan, QuantizedCheckpoint


def quantize(
    checkpoint: Checkpoint, plan: Plan, config: QuantizeConfig, seed: int, context: Context
) -> QuantizedCheckpoint:
    """``checkpoint`` packed as ``plan`` says, to the byte; timestep biases, where asked for, come on top.

    Biases are corrected on calibration inputs drawn with ``seed``. Raises LineageError where the plan's parameters are not the
    checkpoint's, QuantizationError on NaN or overflow.
    """
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    if {e.parameter: e.shape for e in plan.entries} != shapes:
        raise LineageError("the plan is for another model", "make a plan for this checkpoint: fqdiff plan")
    packed = {
        e.parameter: pack_tensor(
            checkpoint.tensors[e.parameter], get_format(e.format), parse_granularity(e.granularity)
        )
        for e in plan.entries
    }
    if config.bias_correction == "none":
        return QuantizedCheckpoint(checkpoint.spec, packed)
    return QuantizedCheckpoint(checkpoint.spec, *correct_bias(checkpoint, packed, config, seed, context))
