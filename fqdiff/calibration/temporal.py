"""Scales of activations as a function of time (TDQ: So et al. 2023, arXiv:2306.02316), and the table that it becomes.

    s(t) = R softplus(MLP(embedding(t)))

One network for each site, of three hidden layers of 64 (the paper's, without dropout), on the sinusoidal embedding that the model
itself has. It is trained to the ranges that calibration found at its own timesteps, and tabulated for all: between these it
says what lies between, where a table alone has steps. For that it is given the slow channels of the embedding alone: those
that turn far from one known timestep to the next tell these apart and say nothing of what lies between, and with them the
network is further from the truth there than the nearest known timestep is. What it predicts are the ends of the range in units
of R, their mean width: of formats with a zero point both ends, of others one, so that no end has the wrong sign.

Shapes: T timesteps, E channels of the embedding, K intervals, G scales of a site at one timestep, D ends of one scale: 2 or 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fqdiff.configs import TemporalConfig
from fqdiff.quant.activation_formats import ActivationFormat, activation_qparams, get_activation_format
from fqdiff.quant.activations import Activation

HIDDEN = 64
TURN = math.pi / 4  # how far a channel may turn between neighbouring known timesteps
LEAST = 1e-6  # of R: the least that an end is told to be, and that a scale becomes


class ScaleNetwork(nn.Module):
    """Embedding [..., E] -> ends of ranges [..., outputs], all above 0; before training the constants ``first`` [outputs]."""

    def __init__(self, channels: int, first: Tensor, draw: torch.Generator) -> None:
        super().__init__()
        inner = [skip_init(nn.Linear, a, HIDDEN) for a in (channels, HIDDEN, HIDDEN)]
        last = skip_init(nn.Linear, HIDDEN, len(first))
        self.layers = nn.Sequential(*(part for layer in inner for part in (layer, nn.ReLU())), last, nn.Softplus())
        with torch.no_grad():
            for layer in inner:
                nn.init.kaiming_uniform_(layer.get_parameter("weight"), nonlinearity="relu", generator=draw)
                layer.get_parameter("bias").zero_()
            last.get_parameter("weight").zero_()
            last.get_parameter("bias").copy_(first.clamp(min=LEAST).double().expm1().log())  # softplus undone

    def forward(self, embedding: Tensor) -> Tensor:
        found: Tensor = self.layers(embedding)
        return found


def range_ends(activation: Activation) -> Tensor:
    """How far the codes of each scale reach, float32 [K, G, D]: below and above 0, or their scale without its sign."""
    fmt, scale, zero_point = get_activation_format(activation.format), activation.scale, activation.zero_point
    assert scale is not None
    if zero_point is None:
        return scale.abs()[:, :, None]
    return torch.stack([zero_point * scale, (fmt.qmax - zero_point.float()) * scale], dim=2)


def slow_channels(embedding: Tensor, times: Tensor) -> Tensor:
    """The channels of ``embedding`` [T, E] that turn by at most TURN between neighbouring ``times`` [K], and the slowest."""
    speed = embedding.diff(dim=0).abs().amax(dim=0)
    gap = float(times.sort().values.diff().max())
    return embedding[:, speed <= max(TURN / gap, float(speed.min()))]


def train_scales(
    embedding: Tensor, ends: Tensor, config: TemporalConfig, draw: torch.Generator, tick: Callable[[], object]
) -> tuple[ScaleNetwork, Tensor]:
    """The network for ``ends`` [K, G, D] at ``embedding`` [K, E], and R [G], their mean width.

    Minimises the mean squared error in units of R by Adam, its rate falling to 0 by half a cosine.
    """
    unit = ends.sum(dim=2).mean(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    wanted = (ends / unit[:, None]).flatten(1)
    network = ScaleNetwork(embedding.shape[1], wanted.mean(dim=0), draw)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.rate)
    with torch.enable_grad():
        for step in range(config.iterations):
            optimizer.param_groups[0]["lr"] = config.rate * (1 + math.cos(math.pi * step / config.iterations)) / 2
            loss = (network(embedding) - wanted).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tick()
    return network.requires_grad_(False), unit


def interval_middles(intervals: int, num_train_timesteps: int) -> Tensor:
    """The timestep in the middle of each of ``intervals``, of two the lower one; int64 [K]."""
    first = -(-torch.arange(intervals + 1) * num_train_timesteps // intervals)
    return (first[:-1] + first[1:] - 1) // 2


def tabulated(
    network: ScaleNetwork, unit: Tensor, embedding: Tensor, activation: Activation, sign: Tensor
) -> Activation:
    """``activation`` with the scales that ``network`` has at ``embedding`` [K, E]; ``sign`` [K, G] of symmetric ones."""
    fmt: ActivationFormat = get_activation_format(activation.format)
    with torch.no_grad():
        found = network(embedding).reshape(len(embedding), len(unit), -1).clamp(min=LEAST) * unit[:, None]
    if fmt.has_zero_points:
        qparams = activation_qparams(-found[:, :, 0], found[:, :, 1], fmt)
        return Activation(activation.format, activation.granularity, qparams.scale, qparams.zero_point)
    return Activation(activation.format, activation.granularity, found[:, :, 0] * sign)
