"""What a Fisher table foretells of a weight error d: the rise 1/2 sum_i F_i d_i^2, channel by channel.

Shapes: T timesteps of the table, O output channels, K timesteps asked for.
"""

import torch
from torch import Tensor

from fqdiff.diffusion.samplers import sampling_timesteps
from fqdiff.diffusion.schedule import NoiseSchedule
from fqdiff.errors import LineageError
from fqdiff.values import Candidate, FisherEntry, FisherTable, TrajectoryEntry

TINY = 1e-300


def diagonal_rise(entry: FisherEntry, squares: Tensor) -> Tensor:
    """1/2 sum over channels of F_t,channel * (sum of d^2 within it), float64 [T]. ``squares`` [O].

    A table without channels gives the mean of the tensor to every weight.
    """
    if entry.channel.shape[1] == 0:
        return 0.5 * entry.mean * squares.sum()
    return 0.5 * entry.channel.double() @ squares


def trajectory_rise(entry: TrajectoryEntry, squares: Tensor) -> float:
    """1/2 sum F d^2 with the trajectory Fisher: half the squared change of the final image, summed over pixels."""
    if not len(entry.channel):
        return 0.5 * entry.mean * float(squares.sum())
    return 0.5 * float(entry.channel.double() @ squares)


def at_timesteps(values: Tensor, timesteps: Tensor, wanted: Tensor) -> Tensor:
    """``values`` [T, ...], known at ``timesteps``, at the ``wanted`` ones [K, ...]: their logarithm linear, constant outside.

    Fisher values span ten decades over the timesteps, and a straight line would follow the largest neighbour.
    """
    if len(timesteps) == 1:
        return values.expand(len(wanted), *values.shape[1:])
    right = torch.searchsorted(timesteps, wanted).clamp(1, len(timesteps) - 1)
    low, high = timesteps[right - 1].double(), timesteps[right].double()
    part = ((wanted - low) / (high - low)).clamp(0, 1).view(-1, *[1] * (values.ndim - 1))
    logs = values.clamp(min=TINY).log()
    found = torch.lerp(logs[right - 1], logs[right], part).exp()
    return torch.where(found > TINY * 10, found, torch.zeros_like(found))


def sampler_weights(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps of a DDIM run, increasing, and c_t^2 of each: the square of what an error of eps_t enters the next x with.

    c_t = sqrt(1 - abar_prev) - sqrt(abar_prev (1 - abar_t) / abar_t), abar_prev that of the step after t (Song et al.
    2021, eq. 12 with sigma = 0). That errors of several steps add up, and are carried on by later ones, is left out.
    """
    timesteps = torch.tensor(sampling_timesteps(schedule.num_train_timesteps, steps))
    abar = schedule.alphas_cumprod[timesteps]
    following = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
    factor = (1 - following).sqrt() - (following * (1 - abar) / abar).sqrt()
    return timesteps.flip(0), factor.square().flip(0)


def check_table(table: FisherTable, candidates: tuple[Candidate, ...]) -> None:
    """Raise LineageError unless ``table`` knows every candidate's tensor."""
    known = table.trajectory if table.kind == "trajectory" else table.entries
    for candidate in candidates:
        entry = known.get(candidate.tensor)
        if entry is None or entry.numel != candidate.numel:
            raise LineageError(
                f"the {table.kind} Fisher table has no '{candidate.tensor}' of {candidate.numel} weights",
                "run fqdiff fisher on this checkpoint",
            )
