"""Empirical Fisher diagonal of a trained network, per parameter and timestep.

For the negative log-likelihood l = 1/2 * sum over pixels (noise - eps_pred)^2 of one sample (unit-variance Gaussian),
F_t = mean over samples of (d l / d theta)^2, elementwise, at fixed t: the mean of squares, not the square of a mean.
Kunstner et al. 2019 (arXiv:1905.12558) on how it differs from the true Fisher, whose targets the model draws.

Shapes: S samples per timestep, G timesteps handled together, B = G * S samples, C channels, H W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fqdiff.configs import FisherConfig
from fqdiff.context import Context
from fqdiff.diffusion.schedule import add_noise, regression_target
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.evidence.features import to_unit_range
from fqdiff.models.registry import output_axes, parameter_blocks
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, Dataset, FisherEntry, FisherTable, ModelSpec

CHUNK = 16  # samples whose gradients are held at once
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x_t, t, target, weight: noise - eps_pred = weight * (target - output)
PerSampleGradients = Callable[[Tensor, Tensor, Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reduced:
    """One parameter's Fisher at G timesteps: ``mean``, ``standard_error``, ``maximum`` [G] and ``channel`` [G, O], float64."""

    mean: Tensor
    standard_error: Tensor
    maximum: Tensor
    channel: Tensor


def evenly_spaced_timesteps(num_train_timesteps: int, count: int) -> Tensor:
    """``count`` increasing timesteps from 0 to T - 1, both ends included."""
    if count > num_train_timesteps:
        raise ConfigError(
            f"{count} timesteps of a model that has {num_train_timesteps}", f"use 1 to {num_train_timesteps}"
        )
    return torch.linspace(0, num_train_timesteps - 1, count, dtype=torch.float64).round().long()


def per_sample_gradients(network: nn.Module) -> PerSampleGradients:
    """A function of a batch of B samples to the gradients of each one's l, keyed by parameter name, [B, ...]."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor], x_t: Tensor, t: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = functional_call(network, weights, (x_t[None], t[None]))[0]
        return 0.5 * (weight * (target - output)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))

    def call(x_t: Tensor, t: Tensor, target: Tensor, weight: Tensor) -> Mapping[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel and would loop over the samples
            result: Mapping[str, Tensor] = gradients(parameters, x_t, t, target, weight)
        return result

    return call


def fisher(checkpoint: Checkpoint, dataset: Dataset, config: FisherConfig, seed: int, context: Context) -> FisherTable:
    """The Fisher table of ``checkpoint`` on the training images of ``dataset``.

    Sample n at timestep t draws its image and noise from (seed, "fisher", t, n), so nothing depends on the chunking.
    Raises NumericalError where a value is not finite; every parameter has a row, or it is an error.
    """
    spec = checkpoint.spec
    network = checkpoint.network().to(context.device)
    timesteps = evenly_spaced_timesteps(spec.noise_schedule().num_train_timesteps, config.timesteps)
    gradients = per_sample_gradients(network)
    axes, blocks = output_axes(network), parameter_blocks(network)
    collected: dict[str, list[Reduced]] = {name: [] for name in blocks}
    group = max(1, CHUNK // config.samples)
    images = dataset.train
    with context.progress(len(timesteps), "fisher", "timestep") as bar:
        for piece in timesteps.split(group):
            batch = draw_batch(images, spec, piece.tolist(), config.samples, seed)
            reduced = reduce_gradients(gradients, batch, len(piece), config.samples, axes, context.device)
            for name, rows in collected.items():
                if name not in reduced:
                    raise NumericalError(f"no gradient reached '{name}'", "the network must use every parameter")
                rows.append(reduced[name])
            bar.update(len(piece))
    entries = {
        name: _entry(blocks[name], dict(checkpoint.tensors)[name].numel(), rows, name)
        for name, rows in collected.items()
    }
    return FisherTable(config.kind, timesteps, config.samples, entries)


def draw_batch(images: Tensor, spec: ModelSpec, timesteps: list[int], samples: int, seed: int) -> Batch:
    """``samples`` samples at each of ``timesteps``, timestep by timestep."""
    schedule = spec.noise_schedule()
    chosen, noise = [], []
    for t in timesteps:
        for n in range(samples):
            draw = generator(seed, "fisher", t, n)
            chosen.append(int(torch.randint(len(images), (), generator=draw)))
            noise.append(torch.randn(images.shape[1:], generator=draw))
    t_all = torch.tensor(timesteps).repeat_interleave(samples)
    x_0, noise_all = to_unit_range(images[chosen]), torch.stack(noise)
    target, weight = regression_target(schedule, spec.prediction, x_0, noise_all, t_all)
    return add_noise(schedule, x_0, noise_all, t_all), t_all, target, weight


def reduce_gradients(
    gradients: PerSampleGradients,
    batch: Batch,
    groups: int,
    samples: int,
    axes: Mapping[str, int],
    device: torch.device,
) -> dict[str, Reduced]:
    """Squares, summed over the samples of each of ``groups`` timesteps in float64, then reduced over elements."""
    wide = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs know no float64
    owner = torch.arange(groups, device=wide).repeat_interleave(samples)
    diagonal: dict[str, Tensor] = {}  # [G, *shape]: sum of squares over samples
    per_sample: dict[str, list[Tensor]] = {}  # [B]: mean square of each sample
    for part in torch.arange(groups * samples).split(CHUNK):
        for name, gradient in gradients(*(values[part].to(device) for values in batch)).items():
            square = gradient.to(wide).double().square()
            if name not in diagonal:
                diagonal[name] = torch.zeros(groups, *square.shape[1:], dtype=torch.float64, device=wide)
            diagonal[name].index_add_(0, owner[part.to(wide)], square)
            per_sample.setdefault(name, []).append(square.flatten(1).mean(dim=1))
    return {
        name: _reduce(total / samples, torch.cat(per_sample[name]).view(groups, samples), axes[name])
        for name, total in diagonal.items()
    }


def _reduce(diagonal: Tensor, per_sample: Tensor, axis: int) -> Reduced:
    flat = diagonal.flatten(1)
    channel = diagonal.movedim(axis + 1, 1).flatten(2).mean(dim=2) if diagonal.ndim > 2 else flat
    error = per_sample.std(dim=1) / per_sample.shape[1] ** 0.5
    return Reduced(*(v.cpu() for v in (flat.mean(dim=1), error, flat.amax(dim=1), channel)))


def _entry(block: str, numel: int, rows: list[Reduced], name: str) -> FisherEntry:
    joined = [torch.cat([getattr(r, key) for r in rows]) for key in ("mean", "standard_error", "maximum", "channel")]
    if not all(torch.isfinite(values).all() for values in joined):
        raise NumericalError(f"the Fisher diagonal of '{name}' holds NaN or infinity", "check the checkpoint")
    return FisherEntry(block, numel, *joined)
