"""AdaRound (Nagel et al. 2020, arXiv:2004.10568): the rounding of every weight, down or up, as something to learn by gradient.

    w_q = s (clamp(floor(w / s) + h(V) + z, 0, qmax) - z),    h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)

V starts where h is the fraction that rounding down leaves, so that w_q is w; a penalty then drives every h to 0 or 1. Scales and
zero points stay, so that the stored tensor keeps its size to the byte. A weight on the grid has no choice: down and up are the
same, as they are beyond the ends of the range.

Shapes: G groups of weights that share a scale, n weights in each.
"""

import torch
from torch import Tensor, nn

from fqdiff.errors import LineageError
from fqdiff.quant.formats import Format, Grain, Mixed
from fqdiff.quant.packed import PackedTensor
from fqdiff.quant.packing import pack, unpack
from fqdiff.quant.qparams import QParams, dequantize, fixed_zero_point, from_rows, group_rows

GAMMA, ZETA = -0.1, 1.1  # how far the sigmoid is stretched beyond 0 and 1, eq. 23
WARM_UP = 0.2  # share of the schedule without a penalty, as in BRECQ and Q-Diffusion
FIRST_BETA, LAST_BETA = 20.0, 2.0


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), eq. 23: in [0, 1], and both ends within reach."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The V of h in [0, 1]."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def rounding_penalty(h: Tensor, beta: Tensor | float) -> Tensor:
    """sum 1 - |2 h - 1|^beta, eq. 24: 0 where every h is 0 or 1, and 1 for each that is 1/2."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed_beta(progress: float) -> float | None:
    """beta at a share of the schedule: none during the warm-up, then from 20 down to 2 in a straight line.

    A large beta moves only what is almost decided; towards the end all have to choose.
    """
    if progress < WARM_UP:
        return None
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * (progress - WARM_UP) / (1 - WARM_UP)


def can_learn_rounding(fmt: Format, granularity: Grain) -> bool:
    """Whether the weights are codes of evenly spaced numbers, all of them and in all phases."""
    return fmt.is_integer and not fmt.phase_bits and not isinstance(granularity, Mixed)


class LearnedRounding(nn.Module):
    """One packed tensor whose rounding is learned. Calling it gives its soft values, float32, in the shape of the tensor.

    ``v`` [G, n]: what is learned. ``down``, ``up`` [G, n]: the codes to choose from, as float32. Raises LineageError where the
    stored codes of ``name`` are neither: then they were not rounded from ``tensor``, and it cannot tell what they should be.
    """

    def __init__(self, name: str, tensor: Tensor, packed: PackedTensor) -> None:
        super().__init__()
        fmt, granularity = packed.format, packed.granularity
        assert can_learn_rounding(fmt, granularity)
        assert not isinstance(granularity, Mixed)
        self.start, self.granularity = packed, granularity
        scale = packed.parts["scale"].float()
        if fmt.has_zero_points:
            zero_point = unpack(packed.parts["zero_point"], fmt.bits, (len(scale),))
        else:
            zero_point = fixed_zero_point(fmt, len(scale), scale.device)
        steps = group_rows(tensor, granularity) / scale[:, None]
        zeros = zero_point[:, None]
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("down", (steps.floor() + zeros).clamp(0, fmt.qmax))
        self.register_buffer("up", (steps.ceil() + zeros).clamp(0, fmt.qmax))
        self.v = nn.Parameter(inverse_rectified_sigmoid(steps - steps.floor()))
        stored = self.stored_codes()
        if not torch.stack([stored == self._whole(self.get_buffer(way)) for way in ("down", "up")]).any(dim=0).all():
            raise LineageError(
                f"the codes of {name} are not the checkpoint's weights rounded down or up",
                "reconstruct what was only quantized: --distill 0",
            )

    @property
    def weights(self) -> int:
        """How many weights there are to round."""
        return torch.Size(self.start.shape).numel()

    def _whole(self, rows: Tensor) -> Tensor:
        return from_rows(rows, self.start.shape, self.granularity)

    def soft(self) -> Tensor:
        """h(V) [G, n]."""
        return rectified_sigmoid(self.v)

    def between(self, h: Tensor) -> Tensor:
        """The values that are ``h`` [G, n] of the way from down to up."""
        down, up, zeros = self.get_buffer("down"), self.get_buffer("up"), self.get_buffer("zero_point")[:, None].float()
        rows = (down + h * (up - down) - zeros) * self.get_buffer("scale")[:, None]
        return self._whole(rows)

    def forward(self) -> Tensor:
        return self.between(self.soft())

    def stored_codes(self) -> Tensor:
        """The codes that the tensor came with, uint8 in its shape."""
        return self.unpacked(self.start.parts["codes"])

    def unpacked(self, stream: Tensor) -> Tensor:
        """The codes that ``stream`` holds, uint8 in the shape of the tensor."""
        return unpack(stream, self.start.format.bits, self.start.shape).to(self.v.device)

    def chosen(self, is_up: Tensor) -> Tensor:
        """Codes, uint8 in the shape of the tensor: up where ``is_up`` [G, n] says so."""
        rows = torch.where(is_up, self.get_buffer("up"), self.get_buffer("down"))
        return self._whole(rows.to(torch.uint8))

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes chosen: up where h is 1/2 or more, that is V >= 0."""
        return self.chosen(self.v >= 0)

    def values(self, codes: Tensor) -> Tensor:
        """What ``codes`` stand for, float32: to the bit what the file gives back."""
        return dequantize(codes, QParams(self.get_buffer("scale"), self.get_buffer("zero_point")), self.granularity)

    def packed(self, codes: Tensor) -> PackedTensor:
        """The tensor with ``codes``, in its format, byte for byte as large as before."""
        stream = pack(codes.cpu(), self.start.format.bits)
        return PackedTensor(
            self.start.format, self.granularity, self.start.shape, {**self.start.parts, "codes": stream}
        )
