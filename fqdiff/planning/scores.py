"""What a plan tries to keep small: for every weight, by how much an error of it is expected to hurt.

A score of a tensor is an importance per output channel I_c >= 0; a weight error d is valued sum_c I_c * sum of d^2 within c.
Where the table has single weights, each of them has its own. For scores of others see :mod:`fqdiff.planning.rivals`.
Shapes: T timesteps of a table, K timesteps asked for, O output channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fqdiff.diffusion.schedule import NoiseSchedule
from fqdiff.errors import ConfigError, LineageError, NumericalError
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.rng import generator
from fqdiff.sensitivity.predictions import at_timesteps, sampler_weights
from fqdiff.values import FisherTable, SamplerGain, WeightBin

SAMPLER_STEPS = 50
MIN_SNR = 5.0
Shapes = Mapping[str, tuple[int, ...]]


def default_score(kind: str) -> str:
    """``trajectory`` for a table of that kind, else ``fisher``."""
    return "trajectory" if kind == "trajectory" else "fisher"


def with_gain(table: FisherTable | None, trajectory: FisherTable | None) -> FisherTable | None:
    """``table`` with the gains of the sampler's steps that a ``trajectory`` table has, for the timestep weights ``gain``."""
    return table if table is None or trajectory is None else replace(table, gain=trajectory.gain)


def timestep_weights(name: str, schedule: NoiseSchedule, gain: SamplerGain | None = None) -> tuple[Tensor, Tensor]:
    """Timesteps int64 [K], increasing, and the weight of each, float64 [K]; SNR_t = abar_t / (1 - abar_t).

    ``uniform``: 1 / T each. ``snr``: min(SNR_t, 5) / SNR_t, scaled to a sum of 1: an error of eps_t moves the x_0 that it
    implies by 1 / SNR_t of its square; that, but never more than a fifth (min-SNR, Hang et al. 2023, arXiv:2303.09556).
    ``sampler:ddimN``: c_t^2 at the steps of DDIM-N, see :func:`sampler_weights`; ``sampler``: of DDIM-50. ``gain``: at the steps
    of a trajectory, what an error of eps there becomes in the final image, as measured. ``at:T``: one timestep.
    """
    total = schedule.num_train_timesteps
    if name == "gain":
        if gain is None:
            raise ConfigError(
                "timestep weights by gain need a trajectory table that has measured it",
                "run fqdiff fisher --kind trajectory without --window; an older table: with --force",
            )
        return gain.timesteps, gain.mean
    if name == "sampler":
        return sampler_weights(schedule, min(SAMPLER_STEPS, total))
    if name.startswith("sampler:ddim"):
        return sampler_weights(schedule, int(name.removeprefix("sampler:ddim")))
    if name.startswith("at:"):
        t = int(name.removeprefix("at:"))
        if t >= total:
            raise ConfigError(f"timestep {t} of a model that has {total}", f"use at:0 to at:{total - 1}")
        return torch.tensor([t]), torch.ones(1, dtype=torch.float64)
    if name not in ("uniform", "snr"):
        raise ConfigError(f"unknown timestep weights '{name}'", "make the plan again")
    weights = torch.ones(total, dtype=torch.float64)
    if name == "snr":
        abar = schedule.alphas_cumprod
        weights = (MIN_SNR * (1 - abar) / abar).clamp(max=1)
    return torch.arange(total), weights / weights.sum()


def table_importance(table: FisherTable, weighting: str, schedule: NoiseSchedule, shapes: Shapes) -> dict[str, Tensor]:
    """What a table of any kind says of every parameter: :func:`trajectory_importance` or :func:`fisher_importance`."""
    if default_score(table.kind) == "trajectory":
        if weighting != "uniform":
            raise ConfigError("a trajectory table has no timesteps to weight", "leave --timestep-weights out")
        return trajectory_importance(table, shapes)
    return fisher_importance(table, weighting, schedule, shapes)


def fisher_importance(
    table: FisherTable, weighting: str, schedule: NoiseSchedule, shapes: Shapes, phase: tuple[int, int] = (0, 1)
) -> dict[str, Tensor]:
    """1/2 sum_t weight_t F_t,c of every parameter, float64 [O], or [1] from a table without channels.

    ``phase`` (k, K): summed over phase k of K alone; the sums of all K add up to that of (0, 1).

    Between the table's timesteps, log F is taken for linear. From a table of single weights: shaped like the parameter, each
    bin's mean with the weight of its timesteps.
    """
    if table.kind == "trajectory":
        raise ConfigError("the trajectory table knows no loss by timestep", "use --score trajectory")
    check_parameters(table.entries.keys(), shapes)
    wanted, weights = timestep_weights(weighting, schedule, table.gain)
    inside = interval_of(wanted, phase[1], schedule.num_train_timesteps) == phase[0]
    wanted, weights = wanted[inside], weights[inside]
    if table.weights:
        return checked(single_weights(table.weights, wanted, weights), shapes)
    if weighting.startswith("at:") and not (table.timesteps == wanted).any():
        near = int(table.timesteps[(table.timesteps - wanted).abs().argmin()])
        raise ConfigError(
            f"the Fisher table has no timestep {int(wanted)}",
            f"the nearest is {near}: --timestep-weights at:{near}, or fqdiff fisher with more timesteps",
        )
    found = {}
    for name, entry in table.entries.items():
        curves = entry.channel.double() if entry.channel.shape[1] else entry.mean[:, None]
        check_values(name, curves)  # before the logarithm, which would take what is no number for 0
        found[name] = 0.5 * weights @ at_timesteps(curves, table.timesteps, wanted)
    return checked(found, shapes)


def single_weights(bins: Sequence[WeightBin], wanted: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """1/2 sum_b weight_b F_b of every single weight, float32; weight_b sums the ``weights`` of the ``wanted`` timesteps in bin b.

    A timestep between two bins belongs to the nearer one.
    """
    middles = torch.tensor([(b.first + b.last) / 2 for b in bins], dtype=torch.float64)
    nearest = (wanted[:, None] - middles).abs().argmin(dim=1)
    shares = torch.zeros(len(bins), dtype=torch.float64).index_add_(0, nearest, weights)
    found: dict[str, Tensor] = {}
    for each, share in zip(bins, shares.tolist(), strict=True):
        for name, values in each.read().items() if share > 0 else ():
            found[name] = found.get(name, torch.zeros_like(values)).add(values, alpha=0.5 * share)
    return found


def trajectory_importance(table: FisherTable, shapes: Shapes) -> dict[str, Tensor]:
    """1/2 F of the sampler's whole run of every parameter: what half the squared image error rises by.

    float64 [O], or [1] from a table without channels; of single weights float32, shaped like the parameter.
    """
    if not table.trajectory:
        raise ConfigError(
            f"the {table.kind} Fisher table holds no sampler run",
            "use --score fisher, or fqdiff fisher --kind trajectory",
        )
    check_parameters(table.trajectory.keys(), shapes)
    if table.weights:
        return checked({name: 0.5 * values for name, values in table.weights[0].read().items()}, shapes)
    rows = table.trajectory.items()
    means = {n: torch.tensor([e.mean], dtype=torch.float64) for n, e in rows if not len(e.channel)}
    return checked({n: 0.5 * means.get(n, e.channel.double()) for n, e in rows}, shapes)


def check_parameters(known: object, shapes: Shapes) -> None:
    """Raise LineageError unless a table's parameters are the checkpoint's."""
    if known != shapes.keys():
        raise LineageError("the Fisher table is of another model", "run fqdiff fisher on this checkpoint")


def checked(importance: dict[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """``importance``, in the order of ``shapes``. Raises NumericalError where a value is NaN, infinite or negative."""
    for name, values in importance.items():
        check_values(name, values)
    return {name: importance[name] for name in shapes}


def check_values(name: str, values: Tensor) -> None:
    """Raise NumericalError unless ``values`` are numbers of 0 or more."""
    if not ((values >= 0) & (values < float("inf"))).all():
        raise NumericalError(f"the Fisher value of '{name}' is NaN, infinite or negative", "run fqdiff fisher again")


def exchanged(importance: Mapping[str, Tensor], score: str, seed: int) -> dict[str, Tensor]:
    """Every tensor with the mean importance of another: controls, as many values to tell apart, in the wrong places.

    ``reverse``: the k-th highest gets the k-th lowest. ``random``: shuffled by ``seed``.
    """
    means = {name: float(values.mean()) for name, values in importance.items()}
    ordered = sorted(means, key=means.__getitem__)
    if score == "reverse":
        donors = ordered[::-1]
    else:
        shuffled = torch.randperm(len(ordered), generator=generator(seed, "plan score"))
        donors = [ordered[k] for k in shuffled.tolist()]
    given = {name: means[donor] for name, donor in zip(ordered, donors, strict=True)}
    return {name: torch.tensor([given[name]], dtype=torch.float64) for name in importance}
