"""A few images of a model, to look at: every checkpoint carries them, trained or imported."""

import torch
from torch import Tensor

from fqdiff.diffusion.samplers import ddim
from fqdiff.evidence.features import to_uint8
from fqdiff.rng import generator
from fqdiff.values import ModelSpec, predict_noise
from fqdiff.values.models import Tensors


def preview(
    spec: ModelSpec, tensors: Tensors, seed: int, device: torch.device, count: int = 64, steps: int = 50
) -> Tensor:
    """DDIM samples in ``steps`` steps, uint8 [count, C, H, W]."""
    network = spec.network(tensors).to(device)
    noise = torch.randn(count, *spec.image_shape, generator=generator(seed, "preview")).to(device)
    schedule = spec.noise_schedule()
    steps = min(steps, schedule.num_train_timesteps)
    with torch.inference_mode():
        *_, (_, images) = ddim(predict_noise(spec, network), noise, schedule, steps, lambda: noise)
    return to_uint8(images).cpu()
