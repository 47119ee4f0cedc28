"""Fisher diagonal of a trained network, per parameter and timestep, or of the whole sampler.

For the negative log-likelihood l = 1/2 * sum over pixels (noise - eps_pred)^2 of one sample (unit-variance Gaussian),

    empirical   F_t = mean over samples of (d l / d theta)^2, elementwise, at fixed t: the mean of squares
    true        the same with targets drawn from the model: g = J^T v, J = d eps_pred / d theta, v ~ N(0, I); its mean is the
                diagonal of the Gauss-Newton matrix E[J^T J]
    trajectory  g = J^T v with J = d x_0 / d theta through every step of the sampler

Kunstner et al. 2019 (arXiv:1905.12558) on how the first two differ. The work is cut into units that depend on the recipe
alone; each is kept as a part when it is done, so that a killed run continues, and several processes or machines can share
the units: the table comes out the same.

Shapes: T timesteps of the table, U timesteps of one unit, N sampler runs, O output channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from fqdiff import distributed
from fqdiff.configs import FisherConfig
from fqdiff.context import Bar, Context, Part, Parts
from fqdiff.diffusion.samplers import sampling_timesteps
from fqdiff.errors import ArtifactCorrupt, ArtifactNotFound, NumericalError
from fqdiff.fisher.backward import layers
from fqdiff.fisher.draws import Batch, antithetic, draw_batch, evenly_spaced_timesteps
from fqdiff.fisher.memory import batch_that_fits
from fqdiff.fisher.moments import jackknife_error, robust_weights
from fqdiff.fisher.timesteps import BATCH, Layout, Measured, Task, measure, tasks
from fqdiff.fisher.trajectory import Runs, measure_runs
from fqdiff.fisher.workers import Workers, workers
from fqdiff.models.registry import build, output_axes, parameter_blocks
from fqdiff.values import (
    Checkpoint,
    Dataset,
    FisherEntry,
    FisherTable,
    ModelSpec,
    SamplerGain,
    TrajectoryEntry,
    WeightBin,
)

UNITS = 64  # a run is kept about so many times
UNIT_SAMPLES = 128  # and not before so many samples
UNIT_RUNS = 4
ROW_KEYS = ("mean", "standard_error", "maximum", "channel")
RUNS_TOGETHER = 2  # sampler runs of one backward pass: each keeps a gradient of all parameters


@dataclass(frozen=True)
class Unit:
    """A piece of the work, and the name of the part that holds its result. ``members``: timesteps, or numbers of runs."""

    name: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """What all units have in common."""

    checkpoint: Checkpoint
    images: Tensor
    config: FisherConfig
    seed: int
    context: Context

    @cached_property
    def layout(self) -> Layout:
        """Where output channels are, by parameter and by layer."""
        network = build(self.checkpoint.spec.architecture, "meta")
        last = {
            name: isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm)
            for name, module in layers(network).items()
        }
        return Layout(output_axes(network), {name: -1 if is_last else 0 for name, is_last in last.items()})

    @cached_property
    def batch(self) -> int:
        """Samples of one backward pass, or sampler runs."""
        most = RUNS_TOGETHER if self.config.kind == "trajectory" else BATCH
        return batch_that_fits(self.checkpoint, self.context, self.config, most)


def fisher(checkpoint: Checkpoint, dataset: Dataset, config: FisherConfig, seed: int, context: Context) -> FisherTable:
    """The Fisher table of ``checkpoint`` on the training images of ``dataset`` (a trajectory needs no images).

    Raises NumericalError where a value is not finite or a parameter gets no gradient.
    """
    cut = units(checkpoint.spec, config)
    measure_units(checkpoint, dataset, config, seed, context, cut[distributed.rank() :: distributed.world_size()])
    distributed.barrier()
    table = gather(checkpoint, config, context)
    distributed.barrier()  # the first process removes the parts once it has the table; all must have read them
    return table


def fisher_shard(
    checkpoint: Checkpoint, dataset: Dataset, config: FisherConfig, seed: int, context: Context, shard: tuple[int, int]
) -> None:
    """Measure the units of shard k of N, counted from 1, and keep them as parts; :func:`gather` joins the shards."""
    number, count = shard
    cut = units(checkpoint.spec, config)
    measure_units(checkpoint, dataset, config, seed, context, cut[number - 1 :: count])


def units(spec: ModelSpec, config: FisherConfig) -> list[Unit]:
    """The cut of the whole work, from the recipe alone."""
    if config.kind == "trajectory":
        members: list[int] = list(range(config.samples))
        sizes = [UNIT_RUNS] * math.ceil(len(members) / UNIT_RUNS)
    else:
        members = evenly_spaced_timesteps(spec.noise_schedule().num_train_timesteps, config.timesteps).tolist()
        if config.granularity == "weight":  # a unit is a bin
            bins = min(config.bins, len(members))
            sizes = [len(members) * (k + 1) // bins - len(members) * k // bins for k in range(bins)]
        else:
            size = max(math.ceil(len(members) / UNITS), math.ceil(UNIT_SAMPLES / config.samples))
            sizes = [size] * math.ceil(len(members) / size)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [
        Unit(f"unit-{k + 1:04}-of-{len(sizes):04}", tuple(members[start : start + size]))
        for k, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_units(
    checkpoint: Checkpoint, dataset: Dataset, config: FisherConfig, seed: int, context: Context, mine: Sequence[Unit]
) -> None:
    """Measure those of ``mine`` that are not there yet, and keep each as a part."""
    job = Job(checkpoint, dataset.train, config, seed, context)
    measure_unit, word = (runs_of, "run") if config.kind == "trajectory" else (timesteps_of, "timestep")
    with (
        workers(checkpoint.network, context.device) as pool,
        context.progress(sum(len(u.members) for u in mine), "fisher", word) as bar,
        context.soft_stop() as stop_requested,
    ):
        for unit in mine:
            if context.parts.load(unit.name) is not None:
                bar.update(len(unit.members))
                continue
            context.parts.save(unit.name, measure_unit(job, unit, pool, bar))
            if stop_requested():
                raise KeyboardInterrupt


def timesteps_of(job: Job, unit: Unit, pool: Workers, bar: Bar) -> Part:
    """Rows at each timestep of ``unit``, and with single weights their sum over the unit."""
    config, pairs = job.config, antithetic(job.config)

    def draw(task: Task, samples: range) -> Batch:
        return draw_batch(job.images, job.checkpoint.spec, task.timesteps, samples, config, job.seed)

    def work(network: nn.Module, task: Task) -> Measured:
        return measure(
            network,
            task,
            draw,
            job.layout,
            true=config.kind == "true",
            pairs=pairs,
            outputs=config.activations,
            weights=config.granularity == "weight",
            autocast=config.precision == "bfloat16",
        )

    found: list[Measured] = []
    weights: dict[str, Tensor] = {}
    todo = tasks(unit.members, config.samples, job.batch, pairs)
    for task, measured in zip(todo, pool.map(work, todo), strict=True):
        for name, value in measured.weights.items():
            weights[name] = weights[name] + value if name in weights else value
        measured.weights.clear()
        found.append(measured)
        bar.update(len(task.timesteps))
    tensors = {f"weight/{name}": (value / len(unit.members)).float() for name, value in weights.items()}
    for what, parts in (("parameter", [m.parameters for m in found]), ("output", [m.outputs for m in found])):
        for name in parts[0]:
            for key in ROW_KEYS:
                tensors[f"{what}/{name}/{key}"] = torch.cat([getattr(part[name], key) for part in parts])
            if config.granularity == "tensor":
                tensors[f"{what}/{name}/channel"] = torch.zeros(len(unit.members), 0, dtype=torch.float64)
    _check_finite(tensors)
    return Part(tensors, {"members": list(unit.members), "elements": found[0].elements})


def runs_of(job: Job, unit: Unit, pool: Workers, bar: Bar) -> Part:
    """Squared gradients of each sampler run of ``unit``."""
    config = job.config

    def work(network: nn.Module, numbers: tuple[int, ...]) -> Runs:
        axes = dict(job.layout.parameters)
        return measure_runs(network, job.checkpoint.spec, numbers, config.steps, config.window, axes, job.seed)

    todo = [unit.members[k : k + job.batch] for k in range(0, len(unit.members), job.batch)]
    found: list[Runs] = []
    for numbers, runs in zip(todo, pool.map(work, todo), strict=True):
        found.append(runs)
        bar.update(len(numbers))
    tensors = {key: torch.cat([getattr(runs, key) for runs in found]) for key in ("norms", "gain")}
    for name in found[0].total:
        for key in ("total", "step", "largest"):
            tensors[f"{key}/{name}"] = torch.cat([getattr(runs, key)[name] for runs in found])
        tensors[f"elements/{name}"] = torch.stack([runs.elements[name] for runs in found]).sum(dim=0).float()
    if (tensors["norms"] == 0).any():
        raise NumericalError("a sampler run has no gradient at all", "is the checkpoint trained?")
    _check_finite(tensors)
    return Part(tensors, {"members": list(unit.members)})


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, values in tensors.items():
        if not torch.isfinite(values).all():
            raise NumericalError(f"the Fisher diagonal of '{name}' holds NaN or infinity", "check the checkpoint")


# --- joining ---------------------------------------------------------------------------------------------------------


def missing_units(spec: ModelSpec, config: FisherConfig, parts: Parts) -> list[str]:
    """Names of the units that nobody has measured yet. Raises ArtifactCorrupt for a damaged one."""
    return [unit.name for unit in units(spec, config) if parts.load(unit.name) is None]


def gather(checkpoint: Checkpoint, config: FisherConfig, context: Context) -> FisherTable:
    """The table from the parts of all units. Raises ArtifactNotFound for a missing one, ArtifactCorrupt for a wrong one."""
    cut = units(checkpoint.spec, config)
    parts = []
    for unit in cut:
        part = context.parts.load(unit.name)
        if part is None:
            raise ArtifactNotFound(f"{unit.name} of the Fisher table is missing", "run the shard that lacks it")
        if part.data.get("members") != list(unit.members):
            raise ArtifactCorrupt(f"{unit.name} holds other timesteps than it should", "remove it and measure it again")
        parts.append(part)
    network = build(checkpoint.spec.architecture, "meta")
    numel = {name: p.numel() for name, p in network.named_parameters()}
    blocks = parameter_blocks(network)
    try:
        if config.kind == "trajectory":
            return gather_runs(checkpoint.spec, config, parts, blocks, numel)
        return gather_timesteps(config, context, cut, parts, blocks, numel)
    except (KeyError, TypeError, ValueError) as error:  # parts may come from other machines
        raise ArtifactCorrupt(
            f"the units of the Fisher table do not fit together: {error!r}", "start over with --force"
        ) from None


def gather_timesteps(
    config: FisherConfig,
    context: Context,
    cut: Sequence[Unit],
    parts: Sequence[Part],
    blocks: Mapping[str, str],
    numel: Mapping[str, int],
) -> FisherTable:
    """Rows of all units, one after the other."""

    def entry(what: str, name: str, block: str, count: int) -> FisherEntry:
        joined = [torch.cat([p.tensors[f"{what}/{name}/{key}"] for p in parts]) for key in ROW_KEYS]
        return FisherEntry(block, count, *joined)

    elements = counts(parts[0].data["elements"])
    first = {name.rpartition(".")[0]: block for name, block in blocks.items()}  # block of each layer
    timesteps = torch.tensor([t for unit in cut for t in unit.members])
    weights = [
        WeightBin(unit.members[0], unit.members[-1], partial(_read_weights, context, unit.name, numel))
        for unit in cut
        if config.granularity == "weight"
    ]
    return FisherTable(
        config.kind,
        timesteps,
        config.samples,
        {name: entry("parameter", name, blocks[name], count) for name, count in numel.items()},
        {name: entry("output", name, first[name], count) for name, count in elements.items()},
        weights=weights,
    )


def counts(value: object) -> dict[str, int]:
    """Layer name to number of output elements, as a part keeps them."""
    if not isinstance(value, dict):
        raise TypeError("no counts of elements")
    return {str(name): int(count) for name, count in value.items()}


def _read_weights(context: Context, unit: str, numel: Mapping[str, int]) -> dict[str, Tensor]:
    part = context.parts.load(unit)
    assert part is not None
    return {name: part.tensors[f"weight/{name}"] for name in numel}


def gather_runs(
    spec: ModelSpec,
    config: FisherConfig,
    parts: Sequence[Part],
    blocks: Mapping[str, str],
    numel: Mapping[str, int],
) -> FisherTable:
    """The robust mean over all runs, of the whole run and of each step; single weights too: their means are the channels'."""
    norms = torch.cat([p.tensors["norms"] for p in parts])
    votes = robust_weights(norms)
    # Steps run from noise to image, tables from small t to large.
    timesteps = torch.tensor(sampling_timesteps(spec.noise_schedule().num_train_timesteps, config.steps)).flip(0)
    entries, whole, elements = {}, {}, {}
    for name, block in blocks.items():
        total, step, largest = (
            torch.cat([p.tensors[f"{k}/{name}"] for p in parts]) for k in ("total", "step", "largest")
        )
        step, largest = step.flip(1), largest.flip(1)
        channel = torch.einsum("n,nso->so", votes, step)
        kept = channel[:, :0] if config.granularity == "tensor" else channel
        error = jackknife_error(step.mean(dim=2), norms)
        entries[name] = FisherEntry(block, numel[name], channel.mean(dim=1), error, largest.amax(dim=0), kept)
        # Each element's share, summed over runs, times the geometric mean: the same robust mean, element by element.
        elements[name] = torch.stack([p.tensors[f"elements/{name}"].double() for p in parts]).sum(dim=0)
        elements[name] *= norms.log().mean().exp() / len(norms)
        channel = torch.einsum("n,no->o", votes, total)
        samples = total.mean(dim=1)
        whole[name] = TrajectoryEntry(
            block,
            numel[name],
            float(channel.mean()),
            float(jackknife_error(samples, norms)),
            float(elements[name].max()),
            channel[:0] if config.granularity == "tensor" else channel,
            samples,
        )
    gain = None
    if config.window in (0, config.steps):  # else it is that of a piece of the run
        each = torch.cat([p.tensors["gain"] for p in parts]).flip(1)
        gain = SamplerGain(timesteps, torch.einsum("n,ns->s", votes, each), jackknife_error(each, norms), each)
    weights = []
    if config.granularity == "weight":
        single = {name: values.float() for name, values in elements.items()}
        weights = [WeightBin(int(timesteps[0]), int(timesteps[-1]), lambda: single)]
    return FisherTable(config.kind, timesteps, config.samples, entries, {}, whole, weights, gain)
