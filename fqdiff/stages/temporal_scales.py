"""Make the scales of a quantized model's activations a function of time, and store what it tabulates to."""

from dataclasses import replace

import torch

from fqdiff.calibration.requirements import check_temporal_scales
from fqdiff.calibration.temporal import interval_middles, range_ends, slow_channels, tabulated, train_scales
from fqdiff.configs import TemporalConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, LineageError
from fqdiff.models.registry import build, temporal_layers, time_features
from fqdiff.quant.activations import interval_count
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.rng import generator
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint


def learn_temporal_scales(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    config: TemporalConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """``model`` whose scales are those of a network of t, trained to the ones it has, for ``config.intervals`` intervals.

    ``calibration`` is the set that the model's scales were taken from: it tells at which timesteps. Networks start from weights
    drawn with ``seed``. Raises LineageError where it is missing or of another model than ``checkpoint``, the activations are not
    quantized, or a noise correction rests on them; ConfigError for dynamic activations, for scales of a single interval, and
    where an interval holds no input.
    """
    if not model.activations:
        raise LineageError("scales of activations that are not quantized", "fqdiff quantize --activations int8")
    if calibration is None:
        raise LineageError("scales by time without a calibration set", "fqdiff calibrate")
    calibration.check_model(checkpoint)
    if model.noise_correction is not None:
        raise LineageError("what this model predicts is corrected for the scales it has", "start from its plan")
    if any(a.scale is None for a in model.activations.values()):
        raise ConfigError("dynamic activations have no scales to learn", "leave --temporal-scales or --dynamic out")
    total, known = calibration.num_train_timesteps, interval_count(model.activations)
    if known < 2:
        raise ConfigError("scales of one interval do not tell how they change with time", "--activation-intervals 20")
    check_temporal_scales(config, total)
    index = interval_of(calibration.t, known, total)
    number = index.bincount(minlength=known)
    if not number.all():
        raise ConfigError("the scales are not of this calibration set: an interval holds none of its inputs")
    times = torch.zeros(known, dtype=torch.float64).index_add_(0, index, calibration.t.double()) / number
    network = build(checkpoint.spec.architecture, "meta")
    features, timed = time_features(network), temporal_layers(network)
    middles, known_middles = interval_middles(config.intervals, total), interval_middles(known, total).double()
    made = {}
    with context.progress(len(model.activations) * config.iterations, "scales by time", "step") as bar:
        for site, activation in model.activations.items():
            # Ranges of what depends on t alone are those of whole intervals, others those of the set's timesteps in them.
            at = known_middles if site in timed else times
            slow, draw = slow_channels(features, at), generator(seed, "temporal scales", site)
            scales, unit = train_scales(slow[at.round().long()], range_ends(activation), config, draw, bar.update)
            assert activation.scale is not None
            sign = activation.scale.sign()[(middles[:, None] - at).abs().argmin(dim=1)]
            made[site] = tabulated(scales, unit, slow[middles], activation, sign)
    return replace(model, activations=made)
