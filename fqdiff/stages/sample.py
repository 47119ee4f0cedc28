"""Images from a model. Image k depends on the model, the sampler and (seed, k): not on batch size or other images."""

import torch
from torch import Tensor

from fqdiff.configs import SampleConfig
from fqdiff.context import Context
from fqdiff.diffusion.samplers import ddim, ddpm
from fqdiff.errors import NumericalError
from fqdiff.evidence.features import to_uint8
from fqdiff.rng import generator
from fqdiff.values import Model, SampleSet, predict_noise


def sample(model: Model, config: SampleConfig, seed: int, context: Context) -> SampleSet:
    """``config.count`` images. The generator of (seed, "image", k) draws image k's first noise, then its step noise.

    Models sampled with the same seed and sampler thus share all their noise. Raises NumericalError where an image is not
    finite.
    """
    spec = model.spec
    network = model.network().to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    predict, schedule = predict_noise(spec, network), spec.noise_schedule()
    done = []
    with context.progress(config.count * config.steps, "sample", "image-step") as bar, torch.inference_mode():
        for ks in torch.arange(config.count).split(context.batch_size):
            # The last batch is filled up: another batch size would mean other kernels, and other last bits.
            fill = min(context.batch_size, config.count) - len(ks)
            generators = [generator(seed, "image", int(k)) for k in ks]

            def draw_noise(generators: list[torch.Generator] = generators, fill: int = fill) -> Tensor:
                noise = torch.stack([torch.randn(spec.image_shape, generator=g) for g in generators])
                padded = torch.cat([noise, noise[:1].expand(fill, *spec.image_shape)])
                return padded.to(context.device, memory_format=torch.channels_last)

            x = draw_noise()
            if config.sampler == "ddim":
                steps = ddim(predict, x, schedule, config.steps, draw_noise, config.eta)
            else:
                steps = ddpm(predict, x, schedule, config.steps, draw_noise)
            for _, image in steps:
                x = image
                bar.update(len(ks))
            if not torch.isfinite(x).all():
                raise NumericalError(
                    f"images {int(ks[0])}-{int(ks[-1])} hold NaN or infinity", "check the model's plan"
                )
            done.append(to_uint8(x[: len(ks)]).cpu())
    return SampleSet(torch.cat(done), seed)
