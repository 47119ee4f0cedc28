"""How the output of a quantized network differs from that of the full-precision one (PTQD, He et al. 2023, arXiv:2305.10657).

Both are given the same inputs. With d = eps_q - eps: the slope is that of the least-squares lines of d over eps which have
one slope for all image channels and an intercept for each. The published code fits one line without intercept and takes the mean
of d itself as the bias, so that a bias leaks into the slope and k mean(eps) into the bias; here an error of the form
k eps + b_c is found, and undone, exactly. A slope below 0 becomes 0, as in the paper: quantization adds noise to a prediction,
and a smaller prediction is not to be made up for by enlarging the noise in it.
Shapes: N inputs, B batch, C image channels, K intervals of timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.requirements import check_intervals
from fqdiff.errors import NumericalError
from fqdiff.quant.noise_correction import NoiseCorrection
from fqdiff.quant.timestep_bias import interval_of


@dataclass(frozen=True)
class Moments:
    """Sums over inputs and positions, float64: ``count`` [K], the others [K, C], of eps, d, eps^2, eps d and d^2."""

    count: Tensor
    eps: Tensor
    d: Tensor
    eps_eps: Tensor
    eps_d: Tensor
    d_d: Tensor

    @classmethod
    def empty(cls, intervals: int, channels: int) -> "Moments":
        """Nothing seen yet."""
        zeros = (torch.zeros(intervals, channels, dtype=torch.float64) for _ in range(5))
        return cls(torch.zeros(intervals, dtype=torch.float64), *zeros)

    def add(self, index: Tensor, eps: Tensor, quantized: Tensor) -> None:
        """Two outputs [B, C, H, W] for the same inputs, which are of intervals ``index`` [B]."""
        exact = eps.double().flatten(2).cpu()
        d = quantized.double().flatten(2).cpu() - exact
        self.count.index_add_(0, index, torch.full((len(index),), exact.shape[2], dtype=torch.float64))
        for total, values in (
            (self.eps, exact), (self.d, d), (self.eps_eps, exact * exact), (self.eps_d, exact * d), (self.d_d, d * d)
        ):  # fmt: skip
            total.index_add_(0, index, values.sum(dim=2))


def fit_correction(moments: Moments) -> NoiseCorrection:
    """Slope, bias and variance of every interval from its moments; each interval has been seen."""
    n = moments.count[:, None]
    eps_eps = (moments.eps_eps - moments.eps**2 / n).sum(dim=1)  # [K]: within channels, around their means
    eps_d = (moments.eps_d - moments.eps * moments.d / n).sum(dim=1)
    d_d = (moments.d_d - moments.d**2 / n).sum(dim=1)
    slope = torch.where(eps_eps > 0, eps_d / eps_eps, 0).clamp(min=0)
    bias = (moments.d - slope[:, None] * moments.eps) / n
    # Where nothing is left but rounding, the difference may come out a little below 0.
    squares = (d_d - 2 * slope * eps_d + slope**2 * eps_eps).clamp(min=0)
    variance = squares / (moments.count * moments.eps.shape[1])
    return NoiseCorrection(slope.float(), bias.float(), variance.float())


def measure_correction(
    exact: nn.Module,
    quantized: nn.Module,
    inputs: CalibrationInputs,
    intervals: int,
    num_train_timesteps: int,
    tick: Callable[[int], None] = lambda n: None,
) -> NoiseCorrection:
    """What makes up for the difference between the outputs of two networks on ``inputs``, interval by interval.

    ``tick`` is told of every input. Raises ConfigError where an interval holds no input, NumericalError on NaN or infinity.
    """
    index = interval_of(inputs.t, intervals, num_train_timesteps)
    check_intervals(index, intervals, "--noise-intervals")
    device = next(exact.parameters()).device
    moments = Moments.empty(intervals, inputs.x_t.shape[1])
    with torch.inference_mode():
        for x_t, t in inputs.chunks():
            x, at = x_t.to(device, memory_format=torch.channels_last), t.to(device)
            outputs = exact(x, at), quantized(x, at)
            for whose, output in zip(("full-precision", "quantized"), outputs, strict=True):
                if not torch.isfinite(output).all():
                    raise NumericalError(f"the {whose} network puts out NaN or infinity", "check the model")
            moments.add(interval_of(t, intervals, num_train_timesteps), *outputs)
            tick(len(t))
    return fit_correction(moments)
