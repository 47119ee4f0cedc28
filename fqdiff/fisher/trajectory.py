"""Fisher diagonal of the whole sampler: J = d x_0 / d theta through every unrolled step.

One weight error acts at all steps, so that its effects add up coherently: F = E[(sum over s of J_s^T v)^2], v ~ N(0, I), where
J_s^T v is the gradient that reaches the weights at step s. Quantizing by d then changes the image by about sum_i F_i d_i^2
(squared, summed over pixels), to second order and without terms between weights.

The same pass tells what the sampler makes of an error of eps at step s, wherever it comes from: with J_s = d x_0 / d eps_s, the
network in the loop, E|J_s^T v|^2 = |J_s|_F^2 (Hutchinson), which divided by the pixels is the **gain** of step s.

The states x_s of the run are kept (one image each) and every step is computed again on the way back: memory does not grow with
steps times activations (Chen et al. 2016, arXiv:1604.06174).
Shapes: R runs of one batch, S steps, O output channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqdiff.diffusion.samplers import ddim_update, sampling_steps
from fqdiff.fisher.backward import per_sample_backward
from fqdiff.fisher.moments import channel_means
from fqdiff.fisher.rules import Pieces
from fqdiff.fisher.timesteps import moved
from fqdiff.rng import generator
from fqdiff.values import ModelSpec, predict_noise


@dataclass(frozen=True)
class Runs:
    """Squared gradients of R runs, float64, keyed by parameter. Windows are summed.

    ``total`` [R, O]: channel means for the whole run. ``step`` [R, S, O]: for each step alone. ``largest`` [R, S]: largest
    element at each step. ``elements`` [*shape]: of the whole run, divided by the run's sum over all parameters, summed over runs.
    ``norms`` [R]: that sum. ``gain`` [R, S]: |J_s^T v|^2 / pixels, to the end of the window.
    """

    total: dict[str, Tensor]
    step: dict[str, Tensor]
    largest: dict[str, Tensor]
    elements: dict[str, Tensor]
    norms: Tensor
    gain: Tensor


def windows(steps: int, window: int) -> list[range]:
    """``steps`` cut into pieces of ``window`` (0: one piece), the odd one first, where there is only noise."""
    size = window or steps
    return [range(max(0, stop - size), stop) for stop in range(steps, 0, -size)][::-1]


def measure_runs(
    network: nn.Module, spec: ModelSpec, runs: Sequence[int], steps: int, window: int, axes: dict[str, int], seed: int
) -> Runs:
    """Run n starts from the noise of (seed, "fisher trajectory", n). DDIM with eta = 0 and clipped images, as it samples.

    With a window of k steps, each piece of k steps is differentiated alone, at the x where it ends.
    """
    device = next(network.parameters()).device
    draws = [generator(seed, "fisher trajectory", n) for n in runs]
    x = moved(torch.stack([torch.randn(spec.image_shape, generator=g) for g in draws]), device)
    cuts = windows(steps, window)
    # One v for the end of every window, drawn in the order of the steps.
    cotangents = [torch.stack([torch.randn(spec.image_shape, generator=g) for g in draws]) for _ in cuts]
    plan = list(sampling_steps(spec.noise_schedule(), steps))
    predict = predict_noise(spec, network)

    def step(x: Tensor, index: int, error: Tensor | None = None) -> Tensor:
        t, abar, abar_next, _ = plan[index]
        eps = predict(x, torch.full((len(x),), t, device=device))
        return ddim_update(x, eps if error is None else eps + error, abar, abar_next)

    states = []
    with torch.no_grad():
        for index in range(steps):
            states.append(x)
            x = step(x, index)
    zeros = torch.zeros(len(runs), dtype=torch.float64)
    result = Runs({}, {}, {}, {}, zeros, torch.zeros(len(runs), steps, dtype=torch.float64))
    squares: dict[str, Tensor] = {}  # [R, *shape] of the whole run, windows summed
    for cut, v in zip(reversed(cuts), reversed(cotangents), strict=True):
        coherent: dict[str, Tensor] = {}  # [R, *shape]: gradients summed over the window's steps
        direction = moved(v, device)
        for index in reversed(cut):
            at = states[index].detach().requires_grad_(True)
            error = torch.zeros_like(at).requires_grad_(True)  # of eps: its gradient is J_s^T v

            def on_parameter(
                name: str, pieces: Pieces, index: int = index, coherent: dict[str, Tensor] = coherent
            ) -> None:
                gradient = torch.cat([piece.float().clone() for piece in pieces])
                _keep_step(result, name, gradient, index, steps, axes[name])
                coherent[name] = coherent[name].add_(gradient) if name in coherent else gradient

            per_sample_backward(
                network,
                lambda at=at, index=index, error=error: step(at, index, error),  # type: ignore[misc]
                lambda _, direction=direction: direction,  # type: ignore[misc]
                on_parameter,
            )
            assert at.grad is not None
            assert error.grad is not None
            result.gain[:, index] = error.grad.cpu().double().square().flatten(1).mean(dim=1)
            direction = at.grad
        for name, gradient in coherent.items():
            square = gradient.cpu().double().square()
            squares[name] = squares[name] + square if name in squares else square
    for square in squares.values():
        result.norms.add_(square.reshape(len(square), -1).sum(dim=1))
    for name, square in squares.items():
        result.total[name] = channel_means(square, axes[name])
        result.elements[name] = torch.einsum("r,r...->...", 1 / result.norms, square)
    return result


def _keep_step(result: Runs, name: str, gradient: Tensor, index: int, steps: int, axis: int) -> None:
    square = gradient.cpu().double().square()
    channel = channel_means(square, axis)
    if name not in result.step:
        result.step[name] = torch.zeros(len(square), steps, channel.shape[1], dtype=torch.float64)
        result.largest[name] = torch.zeros(len(square), steps, dtype=torch.float64)
    result.step[name][:, index] = channel
    result.largest[name][:, index] = square.reshape(len(square), -1).amax(dim=1)
