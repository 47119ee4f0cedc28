"""The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): a value of one thing, the gradient of another."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """x + (value - x) would differ from ``value`` in the last digit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, shaped like ``x``, with the gradient of ``x``."""
    found: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return found


def scaled_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` with ``factor`` times its gradient; ``factor`` broadcasts to ``x``."""
    found: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return found
