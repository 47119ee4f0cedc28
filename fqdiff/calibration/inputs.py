"""Calibration inputs: the (x_t, t) that a sampler gives to the network, which noised data never are exactly.

Shapes: N inputs, C channels, H W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqdiff.diffusion.samplers import ddim
from fqdiff.errors import NumericalError
from fqdiff.rng import generator
from fqdiff.values import ModelSpec, predict_noise

CHUNK = 32  # inputs in one forward pass; fixed, so that results depend neither on the batch size nor on the machine


@dataclass(frozen=True)
class CalibrationInputs:
    """``x_t`` float32 [N, C, H, W] and ``t`` int64 [N], on the CPU, timestep by timestep in the sampler's order."""

    x_t: Tensor
    t: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_t, t) in pieces that fit one forward pass."""
        yield from zip(self.x_t.split(CHUNK), self.t.split(CHUNK), strict=True)


def sampler_inputs(
    spec: ModelSpec,
    network: nn.Module,
    images: int,
    steps: int,
    seed: int,
    device: torch.device,
    tick: Callable[[int], None] = lambda n: None,
) -> CalibrationInputs:
    """What ``network`` is given by ``steps`` steps of DDIM (eta = 0) for each of ``images`` images.

    Image k starts from the noise of (seed, "calibration", k). ``tick`` is told of every image-step. Raises NumericalError
    where the run leaves the finite numbers.
    """
    predict, schedule = predict_noise(spec, network), spec.noise_schedule()
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(steps)]  # of each step, chunk by chunk
    with torch.inference_mode():
        for ks in torch.arange(images).split(CHUNK):
            noise = [torch.randn(spec.image_shape, generator=generator(seed, "calibration", int(k))) for k in ks]
            x = torch.stack(noise).to(device)
            given: list[tuple[Tensor, Tensor]] = []

            def noting(x: Tensor, t: Tensor, given: list[tuple[Tensor, Tensor]] = given) -> Tensor:
                given.append((x.cpu().clone(), t.cpu()))
                return predict(x, t)

            for _, image in ddim(noting, x, schedule, steps, lambda x=x: x):  # type: ignore[misc]
                tick(len(ks))
                if not torch.isfinite(image).all():
                    raise NumericalError("calibration images hold NaN or infinity", "check the checkpoint")
            for step, pair in zip(kept, given, strict=True):
                step.append(pair)
    pairs = [pair for step in kept for pair in step]
    return CalibrationInputs(torch.cat([x for x, _ in pairs]), torch.cat([t for _, t in pairs]))
