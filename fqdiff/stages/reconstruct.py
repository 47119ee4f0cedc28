"""Learn the rounding of a quantized model's weights on a calibration set, first block by block, then of all blocks together.

The file keeps its size.
"""

from collections.abc import Collection
from dataclasses import replace

from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.reconstruct import reconstruct
from fqdiff.calibration.reconstruct_network import reconstruct_network
from fqdiff.calibration.requirements import check_reconstruction
from fqdiff.calibration.temporal_block import reconstruct_temporal
from fqdiff.configs import ReconstructConfig
from fqdiff.context import Context
from fqdiff.errors import LineageError
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint

BLOCKS_SHARE = 0.5  # of minutes for both; what blocks leave is for all of them together
LEAST_MINUTES = 1e-3  # 0 would be no limit


def reconstruct_blocks(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    config: ReconstructConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """``model`` with every integer weight rounded up or down as outputs on ``calibration`` ask: blocks', then the network's.

    Batches are drawn with ``seed``. With ``config.minutes`` the result depends on the machine's speed as well. Raises
    LineageError where the calibration set is missing or of another model than ``checkpoint``, or ``model`` was distilled, its
    activations quantized, or its biases corrected by timestep for the rounding it has; ConfigError for phases, for kept elements
    and where no weight is an integer; NumericalError on NaN.
    """
    inputs = checked_inputs(checkpoint, model, calibration)
    return learn_rounding(checkpoint, model, inputs, config, seed, context)


def reconstruct_temporal_first(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    config: ReconstructConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """:func:`reconstruct_blocks`, but the layers that depend on t alone are reconstructed before all others, as one block.

    Raises ConfigError also where there are none.
    """
    inputs = checked_inputs(checkpoint, model, calibration)
    temporal, seconds = reconstruct_temporal(checkpoint, model, for_blocks(config), seed, context)
    begun = replace(model, packed={**model.packed, **temporal})
    return learn_rounding(checkpoint, begun, inputs, config, seed, context, temporal.keys(), seconds)


def for_blocks(config: ReconstructConfig) -> ReconstructConfig:
    """``config`` with the minutes that blocks may take: half of them where all blocks together follow."""
    return replace(config, minutes=config.minutes * (BLOCKS_SHARE if config.network_iterations else 1))


def learn_rounding(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    inputs: CalibrationInputs,
    config: ReconstructConfig,
    seed: int,
    context: Context,
    apart: Collection[str] = (),
    spent: float = 0.0,
) -> QuantizedCheckpoint:
    """``model`` after its blocks and, where they are asked for, all of them together.

    ``apart`` stays: it was learned before, in ``spent`` seconds, which count towards ``config.minutes``.
    """
    alone = less(for_blocks(config), spent)
    packed, seconds = reconstruct(checkpoint, model, inputs, alone, seed, context, apart)
    begun = replace(model, packed=packed)
    if not config.network_iterations:
        return begun
    rest = less(config, spent + seconds)
    return replace(begun, packed=reconstruct_network(checkpoint, begun, inputs, rest, seed, context, apart))


def less(config: ReconstructConfig, seconds: float) -> ReconstructConfig:
    """``config`` with ``seconds`` taken from its minutes, where it has a limit."""
    return replace(config, minutes=max(config.minutes - seconds / 60, LEAST_MINUTES) if config.minutes else 0.0)


def checked_inputs(
    checkpoint: Checkpoint, model: QuantizedCheckpoint, calibration: CalibrationSet | None
) -> CalibrationInputs:
    """What to reconstruct on. Raises what :func:`reconstruct_blocks` says of its arguments."""
    if calibration is None:
        raise LineageError("a reconstruction without a calibration set", "fqdiff calibrate")
    if {name: p.shape for name, p in model.packed.items()} != {
        n: tuple(t.shape) for n, t in checkpoint.tensors.items()
    }:
        raise LineageError("the quantized model is not of this checkpoint", "make it from its plan: fqdiff quantize")
    calibration.check_model(checkpoint)
    if model.activations:
        raise LineageError("the activations of this model are quantized already", "reconstruct it before")
    if model.timestep_bias:
        raise LineageError("the biases of this model make up for the rounding it has", "leave --bias-correction out")
    check_reconstruction({name: (p.format, p.granularity) for name, p in model.packed.items()})
    return CalibrationInputs(calibration.x_t.float(), calibration.t)
