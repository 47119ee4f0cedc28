"""Correct what a quantized model predicts: its file gets small tables, and sampling needs no calibration data."""

from dataclasses import replace

import torch

from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.ptqd import measure_correction
from fqdiff.configs import NoiseCorrectionConfig
from fqdiff.context import Context
from fqdiff.errors import LineageError
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint


def correct_noise(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    config: NoiseCorrectionConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """``model`` with a noise correction, measured against ``checkpoint`` on ``calibration``. Nothing is random.

    Raises LineageError where the set is missing or of another model than ``checkpoint``, or the model is corrected already;
    ConfigError where an interval of timesteps holds no input, NumericalError where an output is not finite.
    """
    if model.noise_correction is not None:
        raise LineageError("what this model predicts is corrected already", "start from its plan")
    if calibration is None:
        raise LineageError("errors of predictions without a calibration set", "fqdiff calibrate")
    calibration.check_model(checkpoint)
    exact, quantized = (
        m.network().to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for m in (checkpoint, model)
    )
    inputs = CalibrationInputs(calibration.x_t.float(), calibration.t)
    with context.progress(len(inputs), "noise correction", "input") as bar:
        found = measure_correction(
            exact, quantized, inputs, config.intervals, calibration.num_train_timesteps, bar.update
        )
    return replace(model, noise_correction=found)
