"""What a changed weight does: to the predicted noise at given timesteps, and to the final image.

Shapes: N inputs, C channels, H W pixels, K timesteps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fqdiff.diffusion.samplers import ddim
from fqdiff.errors import NumericalError
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import CHUNK, Inputs
from fqdiff.values import ModelSpec, predict_noise


@contextmanager
def replaced(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, ``network`` has ``tensors`` as parameters, keyed by name; afterwards its own again, to the bit."""
    parameters = dict(network.named_parameters())
    kept = {name: parameters[name].data for name in tensors}
    for name, tensor in tensors.items():
        parameters[name].data = tensor.to(kept[name].device)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            parameters[name].data = tensor


def outputs(network: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    """The network's output on ``inputs``, on the CPU in float64 and in units of the noise: weight * output, [N, C, H, W].

    Scaled, since an error of a velocity is one of sqrt(abar) as much noise; never computed through eps_pred, which would
    lose all digits near t = T.
    """
    with torch.inference_mode():
        found = [network(part.x_t.to(device), part.t.to(device)).cpu().double() for part in inputs.chunks()]
    result: Tensor = inputs.weight.double() * torch.cat(found)
    if not torch.isfinite(result).all():
        raise NumericalError("the network's output holds NaN or infinity", "check the checkpoint; try more bits")
    return result


def residual(inputs: Inputs, reference: Tensor) -> Tensor:
    """noise - eps_pred of the full-precision network, whose :func:`outputs` are ``reference``; float64 [N, C, H, W]."""
    return inputs.weight.double() * inputs.target.double() - reference


def rises(delta: Tensor, residual: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """What an output error ``delta`` [N, C, H, W] costs at each timestep, float64 [K] each; ``samples`` inputs at each.

    Output error 1/2 mean |eps_q - eps|^2 and loss rise mean (l_q - l) = output error - mean <residual, delta>, summed over
    pixels; and the mean of delta, the shift.
    """
    half = 0.5 * delta.square().flatten(1).sum(dim=1)
    cross = (residual * delta).flatten(1).sum(dim=1)
    columns = (half, half - cross, delta.flatten(1).mean(dim=1))
    error, rise, shift = (values.view(-1, samples).mean(dim=1) for values in columns)
    return error, rise, shift


def final_images(
    network: nn.Module, spec: ModelSpec, count: int, steps: int, seed: int, device: torch.device
) -> Tensor:
    """Images in [-1, 1], float64 [N, C, H, W], by ``steps`` steps of DDIM; image k starts from (seed, "validate image", k).

    Not rounded to bytes: small errors would vanish.
    """
    noise = [torch.randn(spec.image_shape, generator=generator(seed, "validate image", k)) for k in range(count)]
    predict, schedule = predict_noise(spec, network), spec.noise_schedule()
    done = []
    with torch.inference_mode():
        for start in torch.stack(noise).split(CHUNK):
            x = start.to(device)
            *_, (_, images) = ddim(predict, x, schedule, steps, lambda x=x: x)  # type: ignore[misc]
            done.append(images.cpu().double())
    return torch.cat(done)
