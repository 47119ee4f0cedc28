"""What a network does with its weights changed, batch by batch: the noise that it predicts, or its final images.

Shapes: B inputs of a batch, C channels, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fqdiff.diffusion.samplers import ddim
from fqdiff.errors import NumericalError
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import Inputs
from fqdiff.sensitivity.measure import replaced
from fqdiff.values import ModelSpec, predict_noise


class Probe(Protocol):
    """``timesteps``: how many are looked at. ``shares``: each input's part in a mean, float64 [B] of every batch.

    ``dtype``: what the network is to compute in.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def timesteps(self) -> int: ...

    @property
    def shares(self) -> Sequence[Tensor]: ...

    def output(self, network: nn.Module, number: int) -> Tensor:
        """What ``network`` makes of batch ``number``, on the CPU in float64, [B, C, H, W]."""


@dataclass(frozen=True)
class NoiseProbe:
    """Predicted noise at given inputs, each batch one timestep's."""

    batches: tuple[Inputs, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def timesteps(self) -> int:
        """One a batch."""
        return len(self.batches)

    @property
    def shares(self) -> Sequence[Tensor]:
        """Of the timesteps' weights."""
        return [batch.share for batch in self.batches]

    def output(self, network: nn.Module, number: int) -> Tensor:
        """In units of the noise: weight * output."""
        batch = self.batches[number]
        found: Tensor = network(batch.x_t.to(self.device), batch.t.to(self.device)).cpu().double()
        return batch.weight.double() * found


@dataclass(frozen=True)
class ImageProbe:
    """Final images in [-1, 1] of DDIM runs of ``steps`` steps; run k, a batch of its own, starts from (seed, label, k).

    In float64: the first steps divide by sqrt(abar), which makes of float32's rounding errors as large as those of int8 weights.
    The full-precision run's are in every difference to it, so that they would pass for something that all tensors do together.
    """

    spec: ModelSpec
    steps: int
    runs: int
    seed: int
    label: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Apple's GPUs have no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def timesteps(self) -> int:
        """The sampler's steps."""
        return self.steps

    @property
    def shares(self) -> Sequence[Tensor]:
        """The same for every run."""
        return [torch.full((1,), 1 / self.runs, dtype=torch.float64)] * self.runs

    def output(self, network: nn.Module, number: int) -> Tensor:
        """Not rounded to bytes: small errors would vanish. On the way back every step is computed again."""
        predict = predict_noise(self.spec, network)

        def step(x: Tensor, t: Tensor) -> Tensor:
            found = recompute(predict, x, t, use_reentrant=False) if torch.is_grad_enabled() else predict(x, t)
            assert isinstance(found, Tensor)
            return found

        noise = torch.randn(1, *self.spec.image_shape, generator=generator(self.seed, self.label, number))
        x = noise.to(self.device, self.dtype)
        *_, (_, images) = ddim(step, x, self.spec.noise_schedule(), self.steps, lambda: x)
        return images.cpu().double()


def attributed_rise(
    network: nn.Module, probe: Probe, number: int, plain: Tensor, weights: Mapping[str, Tensor]
) -> tuple[float, dict[str, float]]:
    """1/2 sum over inputs of share * |output with ``weights`` - ``plain``|^2 on one batch, and each tensor's part in it.

    The part is 1/2 <gradient, change of the tensor>: of a quadratic rise 1/2 d^T H d the parts sum to the rise (Euler's
    theorem), what tensors do together or against each other included; one may be negative. Raises NumericalError.
    """
    parameters = dict(network.named_parameters())
    own = {name: parameters[name].data for name in weights}
    with replaced(network, weights), torch.enable_grad():
        for name in weights:
            parameters[name].requires_grad_(True)
        error = (probe.output(network, number) - plain).square().flatten(1).sum(dim=1)
        rise = 0.5 * error @ probe.shares[number]
        gradients = torch.autograd.grad(rise, [parameters[name] for name in weights])
        for name in weights:
            parameters[name].requires_grad_(False)
        found = float(rise.detach())
        parts = {
            name: 0.5 * float(gradient.double().flatten() @ (parameters[name].detach() - own[name]).double().flatten())
            for name, gradient in zip(weights, gradients, strict=True)
        }
    if not torch.isfinite(torch.tensor([found, *parts.values()])).all():
        raise NumericalError("the rise of a plan is NaN or infinite", "check the checkpoint; try more bits")
    return found, parts
