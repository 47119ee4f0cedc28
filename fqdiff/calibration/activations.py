"""What a network computes at its activation sites, by intervals of timesteps: exact extremes, and some of the numbers.

Shapes: N inputs, B batch, K intervals of timesteps, G scales of a site, g of one part of its channels, n numbers kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.requirements import check_intervals
from fqdiff.errors import NumericalError
from fqdiff.quant.activation_sites import grouped, site_axis, watching
from fqdiff.quant.phases import PhasedNetwork
from fqdiff.quant.timestep_bias import interval_of

NUMBERS = 2**15  # kept of each site, shared out among its intervals and scales,
LEAST_NUMBERS = 2**9  # but of each of them no fewer
MEMORY = 2**28  # bytes of kept numbers; what would take more is observed in several passes
GOLDEN = 0.6180339887498949


@dataclass
class Observed:
    """Numbers at one site. ``low``, ``high`` float32 [K, G]: exact extremes; ``ends[k]`` [G, 2 N_k]: those of each input.

    ``numbers[k]``: of interval k some of them, evenly spread over inputs and positions: one [g, n] for each part of the
    channels that :func:`grouped` gives, out of ``totals[k]`` many for each scale. All but extremes are empty where only those
    were asked for.
    """

    low: Tensor
    high: Tensor
    numbers: list[list[Tensor]]
    totals: list[list[int]]
    ends: list[Tensor]

    def weighted(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Numbers of interval k and how many each stands for, [g, n] both, for each part of the channels.

        The spread ones share out the total; with them go the extremes of every input, which they seldom meet, each for
        itself: what a range cuts off is mostly those.
        """
        found = []
        for numbers, total, ends in zip(
            self.numbers[k], self.totals[k], self.ends[k].split([len(part) for part in self.numbers[k]]), strict=True
        ):
            share = torch.full_like(numbers, total / numbers.shape[1])
            if total == numbers.shape[1]:  # all are there
                found.append((numbers, share))
            else:
                found.append((torch.cat([numbers, ends], dim=1), torch.cat([share, torch.ones_like(ends)], dim=1)))
        return found


def spread_positions(first_input: int, count: int, kept: int, length: int) -> Tensor:
    """Positions [B, kept] in [0, length) to keep of inputs ``first_input`` ...: evenly spaced, moved from input to input.

    The golden ratio moves them, so that all positions are met equally often and no pattern of the tensor is.
    """
    moved = torch.frac((first_input + torch.arange(count, dtype=torch.float64)) * GOLDEN)
    return ((torch.arange(kept) + moved[:, None]) * length / kept).long().clamp(max=length - 1)


def observe(
    network: nn.Module,
    parts: Mapping[str, tuple[int, ...]],
    inputs: CalibrationInputs,
    index: Tensor,
    intervals: int,
    keep_numbers: bool = True,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Observed]:
    """What ``network`` computes on ``inputs`` at the sites that ``parts`` names, whose channels share scales by ``parts``.

    ``index`` int64 [N]: the interval of each input, of ``intervals``. ``tick`` is told of every input of every pass,
    :func:`passes` of them. Raises ConfigError where an interval holds no input, NumericalError on NaN or infinity.
    """
    check_intervals(index, intervals, "--activation-intervals")
    number = index.bincount(minlength=intervals)
    found: dict[str, Observed] = {}
    for sites in passes(parts, intervals, len(inputs), keep_numbers):
        chosen = {site: parts[site] for site in sites}
        found |= _observe_together(network, chosen, inputs, index, number, keep_numbers, tick)
    return found


def passes(
    parts: Mapping[str, tuple[int, ...]], intervals: int, inputs: int, keep_numbers: bool = True
) -> list[list[str]]:
    """The sites of ``parts``, cut so that the numbers kept in one pass over so many ``inputs`` fit the memory meant for them."""
    cut: list[list[str]] = [[]]
    taken = 0
    for site, sizes in parts.items():
        each = intervals * numbers_each(intervals, len(sizes)) + 2 * inputs
        size = 4 * len(sizes) * each if keep_numbers else 0
        if taken + size > MEMORY and cut[-1]:
            cut.append([])
            taken = 0
        cut[-1].append(site)
        taken += size
    return cut


def numbers_each(intervals: int, scales: int) -> int:
    """How many numbers are kept for each scale and interval of a site with so many."""
    return max(NUMBERS // (intervals * scales), LEAST_NUMBERS)


def _observe_together(
    network: nn.Module,
    parts: Mapping[str, tuple[int, ...]],
    inputs: CalibrationInputs,
    every_index: Tensor,
    number: Tensor,
    keep_numbers: bool,
    tick: Callable[[int], None],
) -> dict[str, Observed]:
    device, intervals = next(chain(network.parameters(), network.buffers())).device, len(number)
    axes = {site: site_axis(network, site) for site in parts}
    found: dict[str, Observed] = {}
    pieces: dict[str, list[list[list[Tensor]]]] = {}
    index = torch.zeros(0, dtype=torch.int64)  # the interval of each input of the chunk on its way
    begun = torch.zeros(intervals, dtype=torch.int64)  # inputs of each interval before this chunk

    def see(site: str, x: Tensor) -> None:
        groups = grouped(x, axes[site], parts[site])
        low, high = (
            torch.cat([getattr(g, end)(dim=2) for g in groups], dim=1).float().cpu() for end in ("amin", "amax")
        )
        if not (torch.isfinite(low) & torch.isfinite(high)).all():
            raise NumericalError(f"activations at '{site}' are NaN or infinite", "check the model")
        if site not in found:
            shape = intervals, low.shape[1]
            empty = [[0] * len(groups) for _ in range(intervals)], [torch.empty(shape[1], 0)] * intervals
            found[site] = Observed(torch.full(shape, float("inf")), torch.full(shape, float("-inf")), [], *empty)
            pieces[site] = [[[] for _ in groups] for _ in range(intervals)]
        held = found[site]
        held.low.scatter_reduce_(0, index[:, None].expand_as(low), low, "amin")
        held.high.scatter_reduce_(0, index[:, None].expand_as(high), high, "amax")
        for k in index.unique().tolist() if keep_numbers else ():
            rows = index == k
            held.ends[k] = torch.cat([held.ends[k], low[rows].T, high[rows].T], dim=1)
            for part, (each, group) in enumerate(zip(pieces[site][k], groups, strict=True)):
                held.totals[k][part] += int(rows.sum()) * group.shape[2]
                each.append(_some(group[rows.to(group.device)], int(begun[k]), int(number[k]), held.low.shape))

    with watching(network, parts, see), torch.inference_mode():
        for x_t, t, index in _calls(network, inputs, every_index):
            network(x_t.to(device), t.to(device))
            begun += index.bincount(minlength=intervals)
            tick(len(t))
    for site, held in found.items():
        held.numbers = [[torch.cat(each, dim=1) for each in part] for part in pieces[site]] if keep_numbers else []
    return found


def _calls(network: nn.Module, inputs: CalibrationInputs, index: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``inputs`` and their intervals in pieces of which ``network`` makes one call: it takes phases of timesteps apart."""
    for (x_t, t), part in zip(inputs.chunks(), index.split(CHUNK), strict=True):
        if not isinstance(network, PhasedNetwork):
            yield x_t, t, part
            continue
        phase = interval_of(t, *network.phases_of_timesteps)
        for each in phase.unique().tolist():
            yield x_t[phase == each], t[phase == each], part[phase == each]


def _some(group: Tensor, first_input: int, number: int, shape: Sequence[int]) -> Tensor:
    """A few numbers of each row of ``group`` [B, g, L], as float32 [g, B n]; ``number`` inputs will come in all."""
    length = group.shape[2]
    kept = min(length, -(-numbers_each(*shape) // number))
    places = spread_positions(first_input, len(group), kept, length).to(group.device)
    taken = group.gather(2, places[:, None].expand(-1, group.shape[1], -1))
    return taken.movedim(1, 0).flatten(1).float().cpu()


def timestep_groups(t: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The group int64 [N] of each of ``t`` [N], and the mean t, float64 [K], of each group, from noise to image.

    At most ``most`` groups of neighbouring timesteps, of about as many different ones each; none is empty.
    """
    different = t.unique().flip(0)
    count = min(most, len(different))
    group = torch.arange(len(different)) * count // len(different)
    index = group[(len(different) - 1) - torch.searchsorted(different.flip(0), t)]
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, index, t.double())
    return index, totals / index.bincount(minlength=count)
