"""Rounding that is whole at every step: each weight down or up, with a gradient that passes as if it lay between.

    w_q = s (down + [h >= 1/2] (up - down) - z),    dw_q / dh = s (up - down)

the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432), h kept within [0, 1]. Unlike AdaRound's soft h
(:mod:`fqdiff.quant.adaround`) it never computes with anything that the file could not hold: nothing has to be decided in the end.

Shapes: G groups of weights that share a scale, n weights in each.
"""

import torch
from torch import Tensor, nn

from fqdiff.quant.adaround import LearnedRounding
from fqdiff.quant.packed import PackedTensor
from fqdiff.quant.qparams import group_rows
from fqdiff.quant.straight_through import straight_through

MARGIN = 0.05  # how far beyond 1/2 a weight begins that is not rounded to the nearest


class HardRounding(nn.Module):
    """One packed tensor whose rounding is learned. Calling it gives its values, float32, in the shape of the tensor.

    ``h`` [G, n]: what is learned. It begins at the fraction that rounding down leaves, where that is rounded as ``packed`` is,
    else just beyond 1/2. Raises LineageError as :class:`LearnedRounding` does.
    """

    def __init__(self, name: str, tensor: Tensor, packed: PackedTensor) -> None:
        super().__init__()
        self.choices = LearnedRounding(name, tensor, packed)
        self.choices.requires_grad_(False)
        fraction = self.choices.soft()
        is_up = group_rows(self.choices.stored_codes().float(), self.choices.granularity) == self.choices.get_buffer(
            "up"
        )
        beyond = torch.where(is_up, 0.5 + MARGIN, 0.5 - MARGIN)
        self.h = nn.Parameter(torch.where((fraction >= 0.5) == is_up, fraction, beyond))

    def forward(self) -> Tensor:
        return self.choices.between(straight_through(self.h, (self.h >= 0.5).float()))

    @torch.no_grad()
    def keep_within(self) -> None:
        """What a step moved out of [0, 1] goes back: there is nothing beyond down and up."""
        self.h.clamp_(0, 1)

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """The tensor as it is rounded now, in its format, byte for byte as large as before."""
        return self.choices.packed(self.choices.chosen(self.h >= 0.5))
