"""Noise correction: what quantization does to a network's output, told apart into what follows the output and what is random.

With eps what the full-precision network puts out, eps_q what the quantized one does, at timesteps of interval k and in image
channel c (PTQD, He et al. 2023, arXiv:2305.10657, eq. 8 and 9):

    eps_q = (1 + slope_k) eps + bias_kc + residual,      var(residual) = variance_k

so that (eps_q - bias_kc) / (1 + slope_k) is eps but for noise of variance_k / (1 + slope_k)^2, which a sampler can count as
part of its own step noise. The intervals have equal width: t in [0, T) is in interval floor(t K / T).
Shapes: B batch, C image channels, K intervals of timesteps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqdiff.errors import QuantizationError
from fqdiff.quant.activation_sites import OUTPUT, activation_sites, last_layer
from fqdiff.quant.container import Stored
from fqdiff.quant.timestep_bias import interval_of

PREFIX = "noise_correction."  # of the tensors' names in the file
PARTS = ("slope", "bias", "variance")


@dataclass(frozen=True)
class NoiseCorrection:
    """``slope`` [K], 0 or more; ``bias`` [K, C]; ``variance`` [K], 0 or more; all float32, of the network's output."""

    slope: Tensor
    bias: Tensor
    variance: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the file holds of it, by name."""
        return {PREFIX + part: getattr(self, part) for part in PARTS}

    @property
    def intervals(self) -> int:
        """K."""
        return len(self.slope)

    def error_std(self, t: int, num_train_timesteps: int) -> float:
        """Standard deviation of what is still wrong with a corrected output at timestep ``t``."""
        k = t * self.intervals // num_train_timesteps
        return math.sqrt(float(self.variance[k])) / (1 + float(self.slope[k]))


def noise_correction_layout(correction: NoiseCorrection | None) -> dict[str, Stored]:
    """dtype and shape of every tensor that the file holds for ``correction``."""
    return {name: (t.dtype, tuple(t.shape)) for name, t in (correction.tensors if correction else {}).items()}


def noise_correction_of(tensors: Mapping[str, Tensor]) -> NoiseCorrection | None:
    """The correction whose tensors are among ``tensors``; None where none is.

    Raises QuantizationError where only some are there.
    """
    found = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not found:
        return None
    if found.keys() != set(PARTS):
        raise QuantizationError(f"a noise correction of {', '.join(sorted(found))[:100]}", f"it has {', '.join(PARTS)}")
    return NoiseCorrection(**found)


def check_noise_correction(network: nn.Module, correction: NoiseCorrection, num_train_timesteps: int) -> None:
    """Raise QuantizationError unless ``correction`` is finite, float32, for the channels of ``network``, with K in [1, T]."""
    intervals, channels = correction.slope.numel(), activation_sites(network)[OUTPUT]
    if not 1 <= intervals <= num_train_timesteps:
        raise QuantizationError(f"a noise correction for {intervals} intervals", "a number from 1 to T")
    for part, shape in (("slope", (intervals,)), ("bias", (intervals, channels)), ("variance", (intervals,))):
        tensor: Tensor = getattr(correction, part)
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise QuantizationError(f"the {part} of a noise correction is {tensor.dtype} {tuple(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise QuantizationError(f"the {part} of a noise correction holds NaN or infinity")
        if part != "bias" and (tensor < 0).any():
            raise QuantizationError(f"the {part} of a noise correction is less than 0")


def add_noise_correction(network: nn.Module, correction: NoiseCorrection | None, num_train_timesteps: int) -> None:
    """From now on ``network(x, t)`` puts out (eps_q - bias) / (1 + slope), each sample with the row of its own t.

    The tables become buffers of the last layer, which move with the network, but are in no state dict. Whatever else is to be
    done to the output has to be added before.
    """
    if correction is None:
        return
    check_noise_correction(network, correction, num_train_timesteps)
    intervals = correction.intervals
    current: list[Tensor] = []  # the interval of each sample of the batch on its way

    def note_timesteps(module: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        current[:] = [interval_of(arguments[1], intervals, num_train_timesteps)]

    def correct(layer: nn.Module, arguments: object, output: Tensor) -> Tensor:
        slope, bias = (layer.get_buffer(f"noise_correction_{part}")[current[0]] for part in ("slope", "bias"))
        return (output - bias[:, :, None, None]) / (1 + slope[:, None, None, None])

    network.register_forward_pre_hook(note_timesteps)
    # By the last layer: a network with phases calls itself for parts of a batch, and would correct those twice.
    last = network.get_submodule(last_layer(network))
    for part in ("slope", "bias"):
        last.register_buffer(f"noise_correction_{part}", getattr(correction, part), persistent=False)
    last.register_forward_hook(correct)
