"""A family of whole plans to try predictions on: one candidate for every weight tensor.

Shapes: P plans, M tensors, F formats.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fqdiff.quant.formats import get_format
from fqdiff.rng import generator
from fqdiff.sensitivity.candidates import CLIPPED, MIN_MAX, group_by_tensor, mean_bits
from fqdiff.values import Candidate

ENDS = ("stem", "head")


def way(candidate: Candidate) -> str:
    """``int4`` or ``int4 clipped``: how the candidate stores its tensor."""
    return candidate.format + (f" {CLIPPED}" if candidate.range == CLIPPED else "")


def make_plans(candidates: Sequence[Candidate], mixed: int, seed: int) -> tuple[tuple[str, ...], Tensor]:
    """Labels and choices, int64 [P, M] positions in ``candidates``.

    Every way of storing, for all tensors; the same with stem and head in the widest format; and ``mixed`` random plans.
    Those are centred on average bits b evenly spaced over the formats': a tensor takes a min-max format with probability in
    proportion to exp(-|bits - b|).
    """
    rows = torch.tensor(list(group_by_tensor(candidates).values()))  # [M, F]
    first = [candidates[k] for k in rows[0].tolist()]
    bits = torch.tensor([get_format(c.format).bits for c in first], dtype=torch.float64)
    rounding = torch.tensor([c.range == MIN_MAX for c in first])
    widest = int(torch.where(rounding, bits, -1.0).argmax())
    ends = torch.tensor([candidates[k].block in ENDS for k in rows[:, 0].tolist()])
    labels, choices = [], []
    for column, candidate in enumerate(first):
        labels.append(way(candidate))
        choices.append(rows[:, column])
        if column != widest:
            labels.append(f"{way(candidate)}, ends {way(first[widest])}")
            choices.append(torch.where(ends, rows[:, widest], rows[:, column]))
    for number in range(mixed):
        centre = bits.min() + (bits.max() - bits.min()) * (number + 0.5) / mixed
        odds = torch.exp(-(bits - centre).abs()) * rounding
        columns = torch.multinomial(odds, len(rows), replacement=True, generator=generator(seed, "plan", number))
        choice = rows[torch.arange(len(rows)), columns]
        labels.append(f"mixed, {mean_bits([candidates[k] for k in choice.tolist()]):.2f} bits")
        choices.append(choice)
    return tuple(labels), torch.stack(choices)
