"""What the stages that carry out a plan ask of it, of the network and of a calibration set: checked on data alone.

Each stage checks what it asks for itself; :mod:`fqdiff.treatment.feasible` checks all stages before the first begins to work.
Shapes: N inputs, K intervals of timesteps.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fqdiff.configs import QuantizeConfig, TemporalConfig
from fqdiff.diffusion.samplers import sampling_timesteps
from fqdiff.errors import ConfigError, QuantizationError, require
from fqdiff.models.registry import normed_layers
from fqdiff.quant.adaround import can_learn_rounding
from fqdiff.quant.formats import Format, Grain, Mixed, PerElement
from fqdiff.quant.reparameterize import BY_CHANNEL, NormedInput, obstacle
from fqdiff.quant.timestep_bias import interval_of

Stored = Mapping[str, tuple[Format, Grain]]  # how each parameter is stored, by its name


def check_weights(stored: Stored, config: QuantizeConfig, num_train_timesteps: int) -> None:
    """Raise ConfigError where weights ``stored`` so cannot be corrected or distilled as ``config`` says."""
    if any(fmt.phase_bits for fmt, _ in stored.values()):
        if config.bias_correction != "none":
            raise ConfigError(
                "the means that biases correct differ from phase to phase",
                "leave --bias-correction out, or plan without phases",
            )
        if config.distill:
            raise ConfigError("phases cannot be distilled", "--distill 0, or plan without phases")
    if config.distill and any(isinstance(granularity, PerElement) for _, granularity in stored.values()):
        raise ConfigError("kept elements cannot be distilled", "--distill 0, or plan without elements")
    if config.bias_correction == "timestep" and any(fmt.name != "float32" for fmt, _ in stored.values()):
        t = torch.tensor(sampling_timesteps(num_train_timesteps, config.calibration_steps))
        check_bias_intervals(t, config, num_train_timesteps)


def check_bias_intervals(t: Tensor, config: QuantizeConfig, num_train_timesteps: int) -> None:
    """Raise ConfigError where an interval of timesteps with biases of its own would hold none of ``t``, int64 [N]."""
    require(
        len(interval_of(t, config.bias_intervals, num_train_timesteps).unique()) == config.bias_intervals,
        f"{config.bias_intervals} intervals for {config.calibration_steps} calibration steps leave one without any",
        "use fewer --bias-intervals, or more --calibration-steps",
    )


def check_reconstruction(stored: Stored) -> None:
    """Raise ConfigError where the rounding of weights ``stored`` so cannot be learned."""
    if any(fmt.phase_bits for fmt, _ in stored.values()):
        raise ConfigError("phases cannot be reconstructed", "--no-reconstruct, or plan without phases")
    if any(isinstance(granularity, Mixed) for _, granularity in stored.values()):
        raise ConfigError(
            "tensors of two formats cannot be reconstructed",
            "--no-reconstruct, or plan without element and output",
        )
    if not any(can_learn_rounding(*how) for how in stored.values()):
        raise ConfigError("no weight of this model is an integer, so that there is no rounding to learn", "e.g. int4")


def check_temporal(stored: Stored, temporal: Collection[str]) -> None:
    """Raise ConfigError where none of the parameters ``temporal``, which depend on t alone, has a rounding to learn."""
    if not any(can_learn_rounding(*stored[name]) for name in temporal):
        raise ConfigError(
            "no integer weight of this model depends on t alone", "add --reconstruct-together, or choose another method"
        )


def check_learned_steps(stored: Stored) -> None:
    """Raise ConfigError where weights ``stored`` so leave blocks no one output to learn activation steps from."""
    if any(fmt.phase_bits for fmt, _ in stored.values()):
        raise ConfigError(
            "a block with phases has no one output to match", "add --no-learn-steps, or plan without phases"
        )


def check_temporal_scales(config: TemporalConfig, num_train_timesteps: int) -> None:
    """Raise ConfigError where a table of scales would have more intervals than there are timesteps."""
    require(
        config.intervals <= num_train_timesteps,
        f"{config.intervals} intervals of {num_train_timesteps} timesteps",
        f"use {num_train_timesteps} or fewer",
    )


def check_enough(count: int, what: str) -> None:
    """Raise ConfigError unless ``count`` inputs are enough to train on some and to measure on others, for ``what``."""
    require(count >= 2, f"one calibration input is too few to {what} on", "record more: fqdiff calibrate")


def check_intervals(index: Tensor, intervals: int, option: str) -> None:
    """Raise ConfigError where one of ``intervals`` holds no input; ``index`` int64 [N]: each one's. ``option`` sets how many."""
    empty = int((index.bincount(minlength=intervals) == 0).sum())
    require(
        empty == 0,
        f"{empty} of {intervals} intervals of timesteps hold no calibration input",
        f"use fewer {option}, or a set with more timesteps",
    )


def normed_inputs(network: nn.Module) -> list[NormedInput]:
    """The layers of ``network`` that are given what a norm puts out, after its activation."""
    return [NormedInput(norm, layer, between, padded=True) for norm, between, layer in normed_layers(network)]


def check_reparameterization(places: Sequence[NormedInput]) -> None:
    """Raise QuantizationError where factors cannot be moved through one of ``places`` exactly, or there is none."""
    found = [reason for place in places if (reason := obstacle(place, shifted=place.between == "")) is not None]
    if found or not places:
        raise QuantizationError(
            f"no reparameterization: {found[0] if found else 'no layer follows a norm'}", BY_CHANNEL
        )
