"""Images from a model. Image k depends on the model, the sampler and (seed, k): its noise on no batch size or other image.

Kernels of another batch size may round differently in the last bit, which rarely moves a pixel by one of its 256 levels. Runs and
shards of one batch size make the same bytes.

The work is cut into units of consecutive images. Each is kept as a part when it is done, so that a killed run continues, and
several processes or machines can share the units: the images come out the same.

Shapes: N images of a set, B of one batch, C channels, H W pixels.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fqdiff.configs import SampleConfig
from fqdiff.context import Bar, Context, Part, Parts, peak_memory
from fqdiff.diffusion.samplers import ErrorStd, PredictNoise, no_error, run_sampler
from fqdiff.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError, NumericalError
from fqdiff.evidence.features import to_uint8
from fqdiff.memory import peak_bytes
from fqdiff.models.time_table import tabulate_time
from fqdiff.rng import generator
from fqdiff.values import Model, ModelSpec, QuantizedCheckpoint, SampleSet, error_std, predict_noise

UNIT_IMAGES = 50
LARGEST_BATCH = 100  # of what the stage chooses itself; a CPU gains nothing from more
LARGEST_ON_CUDA = 1000  # there as many as this, if they fit into
FREE_SHARE = 0.5  # of the memory that is free on the device
PROBE = 8  # images of a batch whose memory is measured
HEADROOM = 2.0  # of allocators, and of what kernels take inside: a process grows by 1.55 times what tensors take
KERNELS = (
    6 * 2**20
)  # bytes that compiled kernels and their scratch take, once, for a batch of another size than any before


@dataclass(frozen=True)
class Unit:
    """Images ``members``, and the name of the part that holds them."""

    name: str
    members: range


def sample(model: Model, config: SampleConfig, seed: int, context: Context) -> SampleSet:
    """``config.count`` images. The generator of (seed, "image", k) draws image k's first noise, then its step noise.

    Models sampled with the same seed and sampler thus share all their noise; one with a noise correction gets less of the step
    noise, as much as the random part of its errors stands for. Raises NumericalError where an image is not
    finite, ConfigError where not even one fits into ``context.max_memory``.
    """
    cut = units(config.count)
    make_units(model, config, seed, context, cut)
    return SampleSet(gather(model.spec, cut, context.parts), seed)


def sample_shard(model: Model, config: SampleConfig, seed: int, context: Context, shard: tuple[int, int]) -> None:
    """Make the units of shard k of N, counted from 1, and keep them as parts for :func:`sample`."""
    number, count = shard
    make_units(model, config, seed, context, units(config.count)[number - 1 :: count])


def units(count: int) -> list[Unit]:
    """The cut of the whole work, from the recipe alone."""
    cut = [range(first, min(first + UNIT_IMAGES, count)) for first in range(0, count, UNIT_IMAGES)]
    return [Unit(f"unit-{k:04}-of-{len(cut):04}", members) for k, members in enumerate(cut, start=1)]


def make_units(model: Model, config: SampleConfig, seed: int, context: Context, mine: Sequence[Unit]) -> None:
    """Make those of ``mine`` that are not there yet, in batches that may join units, and keep each as a part."""
    missing = [unit for unit in mine if context.parts.load(unit.name) is None]
    todo = [k for unit in missing for k in unit.members]
    if not todo:
        return
    network = model.network().to(context.device, memory_format=layout(context.device))  # type: ignore[call-overload]
    if isinstance(model, QuantizedCheckpoint) and model.tabulates_time:
        tabulate_time(network)
    predict, error = predict_noise(model.spec, network), error_std(model)
    done: dict[int, Tensor] = {}
    # The bar counts what is still to do: units found would pass for a speed that was never reached.
    with context.progress(len(todo) * config.steps, "sample", "image-step") as bar, torch.inference_mode():
        # Every batch is filled up to the same size: another would mean other kernels, and other last bits.
        size = min(context.batch_size, config.count) or even_size(
            config.count, batch_that_fits(network, model.spec, config, context)
        )
        for start in range(0, len(todo), size):
            ks = todo[start : start + size]
            made = make_images(predict, model.spec, config, seed, context, ks, size, bar, error)
            done |= zip(ks, made, strict=True)
            while missing and missing[0].members[-1] in done:
                unit = missing.pop(0)
                images = torch.stack([done.pop(k) for k in unit.members])
                context.parts.save(unit.name, Part({"images": images}, {"members": list(unit.members)}))


def even_size(count: int, largest: int) -> int:
    """Size of batches of at most ``largest`` that ``count`` images fill with the least left over: 60 for 120, and not 100.

    Of the whole set, not of what a stopped run or a shard has still to do: in all of them an image has a batch of the same size.
    """
    return -(-count // -(-count // largest))


def make_images(
    predict: PredictNoise,
    spec: ModelSpec,
    config: SampleConfig,
    seed: int,
    context: Context,
    ks: Sequence[int],
    size: int,
    bar: Bar,
    error: ErrorStd = no_error,
) -> Tensor:
    """Images ``ks``, uint8 [len(ks), C, H, W] on the CPU, made in one batch of ``size`` that is filled up with the first."""
    generators = [generator(seed, "image", k) for k in ks]

    def draw_noise() -> Tensor:
        noise = torch.stack([torch.randn(spec.image_shape, generator=g) for g in generators])
        padded = torch.cat([noise, noise[:1].expand(size - len(ks), *spec.image_shape)])
        return padded.to(context.device, memory_format=layout(context.device))

    x = draw_noise()
    for _, image in run_sampler(predict, x, spec.noise_schedule(), config, draw_noise, error):
        x = image
        bar.update(len(ks))
    x = x[: len(ks)]
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if not finite.all():
        raise NumericalError(f"image {ks[int(finite.int().argmin())]} holds NaN or infinity", "check the model's plan")
    return to_uint8(x).cpu()


def layout(device: torch.device) -> torch.memory_format:
    """How images lie in memory: convolutions in float32 are faster with the channels last on a CPU, with them first on CUDA."""
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last


def gather(spec: ModelSpec, cut: Sequence[Unit], parts: Parts) -> Tensor:
    """The images of all units, uint8 [N, C, H, W]. Raises ArtifactNotFound for a missing one, ArtifactCorrupt for a wrong one."""
    found = []
    for unit in cut:
        part = parts.load(unit.name)
        if part is None:
            raise ArtifactNotFound(f"{unit.name} of the samples is gone", "run the same command again")
        images = part.tensors.get("images", torch.empty(0))
        shape = (len(unit.members), *spec.image_shape)
        if part.data.get("members") != list(unit.members) or images.shape != shape or images.dtype != torch.uint8:
            raise ArtifactCorrupt(
                f"{unit.name} of the samples holds other images than it should", "start over with --force"
            )
        found.append(images)
    return torch.cat(found)


# --- memory ----------------------------------------------------------------------------------------------------------


def batch_that_fits(network: nn.Module, spec: ModelSpec, config: SampleConfig, context: Context) -> int:
    """LARGEST_BATCH, or as many images as keep the process below ``context.max_memory``.

    On CUDA the limit is that of the tensors on the device; without one, a share of what is free there. A batch of B takes the
    largest of a + b B over the operations of a run, a >= 0, such as weights unpacked for a layer: for each image the less, the
    more there are. What n images take, n <= B, thus bounds it. These n have been run here: what they took is in the peak.
    Raises ConfigError where not even one image fits.
    """
    on_cuda = context.device.type == "cuda"
    limit, largest = context.max_memory, LARGEST_ON_CUDA if on_cuda else LARGEST_BATCH
    if on_cuda and not limit:
        limit = peak_so_far(context.device) + int(FREE_SHARE * torch.cuda.mem_get_info(context.device)[0])
    if not limit:
        return largest
    batch_bytes(network, spec, config, context.device, 1)  # weights that are unpacked once are there from here on
    one = batch_bytes(network, spec, config, context.device, 1)
    held = peak_so_far(context.device)
    free = limit - held
    if free < one:
        raise ConfigError(f"one image needs about {(held + one) / 2**20:.0f} MiB", "raise --max-memory")
    few = min(PROBE, max(1, (free - KERNELS) // one))
    these = batch_bytes(network, spec, config, context.device, few)
    left = limit - KERNELS - peak_so_far(context.device)
    return min(largest, few + max(0, few * left // these))


def peak_so_far(device: torch.device) -> int:
    """The most bytes that this process ever took, on CUDA those of its tensors there."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def batch_bytes(network: nn.Module, spec: ModelSpec, config: SampleConfig, device: torch.device, batch: int) -> int:
    """What sampling a batch takes beside the network, measured on the first steps."""
    predict, schedule = predict_noise(spec, network), spec.noise_schedule()
    few = replace(config, steps=min(3, config.steps))  # in its third step every sampler holds all that it ever does

    def run() -> None:
        x = torch.zeros(batch, *spec.image_shape, device=device).to(memory_format=layout(device))
        deque(run_sampler(predict, x, schedule, few, lambda: torch.zeros_like(x)), maxlen=0)

    return int(HEADROOM * peak_bytes(run))
