"""Learn the scales of a quantized model's activations, block by block, on a calibration set: the file keeps its size."""

from dataclasses import replace

from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.requirements import check_learned_steps
from fqdiff.calibration.steps import learn_steps
from fqdiff.configs import StepsConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, LineageError
from fqdiff.quant.learned_steps import can_learn_steps
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint


def learn_activation_steps(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    config: StepsConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """``model`` with the activation scales that its blocks' outputs on ``calibration`` ask for; zero points stay.

    Batches are drawn with ``seed``. Raises LineageError where the calibration set is missing or of another model than
    ``checkpoint``, the activations are not quantized, or a noise correction rests on their scales; ConfigError for phases and
    for dynamic activations, NumericalError on NaN.
    """
    if not model.activations:
        raise LineageError("steps of activations that are not quantized", "fqdiff quantize --activations int8")
    if calibration is None:
        raise LineageError("learned steps without a calibration set", "fqdiff calibrate")
    if {n: p.shape for n, p in model.packed.items()} != {n: tuple(t.shape) for n, t in checkpoint.tensors.items()}:
        raise LineageError("the quantized model is not of this checkpoint", "make it from its plan: fqdiff quantize")
    calibration.check_model(checkpoint)
    if model.noise_correction is not None:
        raise LineageError("what this model predicts is corrected for the steps it has", "start from its plan")
    check_learned_steps({name: (p.format, p.granularity) for name, p in model.packed.items()})
    if not any(can_learn_steps(a) for a in model.activations.values()):
        raise ConfigError("dynamic activations have no steps to learn", "leave --learn-steps or --dynamic out")
    inputs = CalibrationInputs(calibration.x_t.float(), calibration.t)
    return replace(model, activations=learn_steps(checkpoint, model, inputs, config, seed, context))
