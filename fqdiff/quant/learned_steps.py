"""Activation steps that are learned by gradient (LSQ: Esser et al. 2020, arXiv:1902.08153).

    x_q = s round(clamp(x / s, -z, qmax - z)),    dx_q / ds = round(x / s) - x / s within the range, -z and qmax - z at its ends

which is what follows where rounding passes gradients on as if it did nothing (eq. 3), times 1 / sqrt(n qmax), n the numbers of
one sample that share the step (section 2.2). What is learned is the factor r of s = r s_0, so that one learning rate suits
steps of any size. Zero points stay. Logarithmic codes are not learned: by the same rule their derivative is 0, since a step of
an octave gives the same grid.

Shapes: B batch, K intervals of timesteps, G scales of a site at one timestep.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fqdiff.quant.activation_formats import get_activation_format, zero_points
from fqdiff.quant.activations import Activation, ActivationQuantizer
from fqdiff.quant.straight_through import scaled_gradient, straight_through

LEAST_RATIO = 1 / 8  # of a step to the one it started from


def can_learn_steps(activation: Activation) -> bool:
    """Whether the scales are stored ones, and those of evenly spaced codes."""
    return activation.scale is not None and get_activation_format(activation.format).kind != "log"


class _QuantizedByStep(torch.autograd.Function):
    """Written out, and in place: softmax outputs are the largest tensors of a network, and autograd would keep five copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.qmax = qmax
        return _codes(x / step, zero_point, qmax).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        slope = x / step
        within = (slope >= -zero_point) & (slope <= ctx.qmax - zero_point)
        codes = _codes(slope.clone(), zero_point, ctx.qmax)
        slope.mul_(within).neg_().add_(codes).mul_(gradient)
        return gradient * within, slope.sum_to_size(step.shape), None, None


def _codes(steps: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    """``steps`` rounded and bounded, in place: codes less zero points."""
    return torch.minimum(torch.maximum(steps.round_(), -zero_point, out=steps), qmax - zero_point, out=steps)


def quantize_by_step(x: Tensor, step: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    """``x`` as its codes give it back, with gradients for ``x`` and ``step``; ``step`` and ``zero_point`` broadcast to ``x``."""
    found: Tensor = _QuantizedByStep.apply(x, step, zero_point, qmax)  # type: ignore[no-untyped-call]
    return found


class FixedSteps(ActivationQuantizer):
    """An :class:`ActivationQuantizer` that learns nothing and passes gradients on as if it did nothing."""

    def forward(self, x: Tensor, interval: Tensor) -> Tensor:
        """``x`` with sample b quantized by the scales of ``interval[b]``."""
        return straight_through(x, super().forward(x.detach(), interval))


class LearnedSteps(ActivationQuantizer):
    """An :class:`ActivationQuantizer` of evenly spaced codes that passes gradients on, to ``ratio`` [K, G] as well."""

    def __init__(self, activation: Activation, axis: int, parts: tuple[int, ...]) -> None:
        assert can_learn_steps(activation)
        super().__init__(activation, axis, parts)
        scale = self.get_buffer("scale").clone()  # the model's own stays as it is
        self.scale = scale
        self.ratio = nn.Parameter(torch.ones_like(scale))
        if activation.zero_point is None:
            self.zero_point = zero_points(self.format, scale)

    def steps(self) -> Tensor:
        """The steps as they are now, [K, G]."""
        return self.get_buffer("scale") * self.ratio.clamp(min=LEAST_RATIO)

    def forward(self, x: Tensor, interval: Tensor) -> Tensor:
        """``x`` with sample b quantized by the steps of ``interval[b]``."""
        sharing = x[0].numel() // sum(self.parts) * torch.tensor(self.parts, device=x.device)
        factor = (sharing * self.format.qmax).float().rsqrt()
        step = scaled_gradient(self.steps()[interval], factor.expand(len(interval), -1))
        zero_point = self.get_buffer("zero_point")[interval].float()
        return quantize_by_step(x, self._by_channel(step, x), self._by_channel(zero_point, x), self.format.qmax)

    @torch.no_grad()
    def settle(self, steps: Tensor) -> None:
        """Let ``steps`` [K, G] be those it starts from."""
        self.get_buffer("scale").copy_(steps)
        self.ratio.fill_(1)
