"""Scale reparameterization (RepQ-ViT, Li et al. 2023, arXiv:2212.08254): scales by channel become one for the tensor.

A norm's output x, quantized with scale s_j and zero point z_j in channel j, is rescaled by the norm's own affine

    x'_j = x_j / r_j + b_j,    r_j = s_j / s,    b_j = s (z_j - z),    s = mean(s_j), z = mean(z_j)

so that every channel of x' has the same s and z; the layer that x' goes to takes it back: W'_j = W_j r_j, and its bias gets
-sum_j W'_j b_j. In full precision nothing changes. That holds where the layer is given the norm's output itself; through a
ReLU with b = 0, since relu(x / r) = relu(x) / r for r > 0; and nowhere else in a U-Net of norm, activation, convolution.
Shapes: C channels, O output channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError

BY_CHANNEL = "give activations a scale for each channel instead: --activation-granularity channel"


@dataclass(frozen=True)
class NormedInput:
    """A layer whose input is the output of ``norm``, after the function ``between``, "" for none; both are module names.

    ``consumers``: how many layers are given that norm's output; ``padded``: whether zeros are put around it.
    """

    norm: str
    layer: str
    between: str = ""
    padded: bool = False
    consumers: int = 1


def obstacle(where: NormedInput, shifted: bool) -> str | None:
    """Why factors (and shifts, where ``shifted``) cannot be moved through ``where`` exactly; None where they can."""
    if where.consumers > 1:
        return (
            f"{where.consumers} layers are given the output of '{where.norm}', and each would need factors of its own"
        )
    if where.between not in ("", "relu"):
        name = where.between
        return f"{name} stands between '{where.norm}' and '{where.layer}', and {name}(x / r) is not {name}(x) / r"
    if shifted and where.between == "relu":
        return f"relu stands between '{where.norm}' and '{where.layer}', and relu(x + b) is not relu(x) + b"
    if shifted and where.padded:
        return f"'{where.layer}' puts zeros around its input, which a shift does not reach"
    return None


def channel_factors(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """r and b, float64 [C], that give the channels of ``scale`` and ``zero_point`` [C] one scale and one zero point."""
    s, z = scale.double(), zero_point.double()
    return s / s.mean(), s.mean() * (z - z.mean())


def reparameterize(
    norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, ratio: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm affine [C] twice, next layer's weight [O, C, ...] and bias [O], by ``ratio`` r and ``shift`` b [C].

    Together they compute what they did, in the places in which :func:`obstacle` finds none. Raises QuantizationError for
    factors that are not finite and above 0.
    """
    r, b = ratio.double(), shift.double()
    if not (torch.isfinite(r) & torch.isfinite(b) & (r > 0)).all():
        raise QuantizationError("factors of a reparameterization that are not finite and above 0")
    by_channel = r.view(-1, *[1] * (weight.ndim - 2))
    new_weight = weight.double() * by_channel
    moved = new_weight.flatten(2).sum(dim=2) if weight.ndim > 2 else new_weight  # [O, C]
    return (
        (norm_weight.double() / r).to(norm_weight.dtype),
        (norm_bias.double() / r + b).to(norm_bias.dtype),
        new_weight.to(weight.dtype),
        (bias.double() - moved @ b).to(bias.dtype),
    )
