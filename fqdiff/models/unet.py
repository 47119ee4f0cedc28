"""The six-block U-Net of the layer-adaptive Fisher paper, readable top to bottom.

Blocks 1-3 halve the resolution, blocks 4-6 double it; each has two residual blocks, and attention where asked. What a block
computes before it changes the resolution is its skip: it joins the output of the block on the other side.
Shapes: B batch, C channels, H W pixels, L = H * W tokens, N attention heads, D channels per head, E embedding channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fqdiff.errors import ConfigError

TIME_EMBEDDINGS = ("sliced", "learned")
TIME_TABLE_LIMIT = 2**23  # timesteps x channels: even a network without weights holds this table; the paper's has 2**19
TIMESTEP_LIMIT = 2**15 - 1  # Fisher tables hold timesteps as 16-bit numbers
IMAGE_SIZE_LIMIT = 4096
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class UNetConfig:
    """The architecture. ``channels[i]`` is the width inside block i + 1; block i + 1 widens or narrows after itself."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512, 384)
    image_channels: int = 1
    image_size: int = 32
    attention_blocks: tuple[int, ...] = (2, 6)
    num_heads: int = 8
    norm_groups: int = 32
    dropout: float = 0.1
    activation: str = "relu"
    time_embedding: str = "sliced"
    time_channels: int = 32  # of a learned embedding; a sliced one is as wide as the widest block
    num_train_timesteps: int = 1000


def check_config(config: UNetConfig) -> None:
    """Raise ConfigError unless a network can be built from ``config``."""
    c = config.channels
    if len(c) != 6 or any(v < 2 or v % 2 for v in c):
        raise ConfigError(f"channels {c} are not six even numbers", "e.g. 16,32,64,128,128,96")
    for name, got, want in (
        ("channels[1]", c[1], 2 * c[0]),
        ("channels[2]", c[2], 2 * c[1]),
        ("channels[3]", c[3], 2 * c[2]),
        ("channels[4]", c[4], c[3] // 2 + c[2]),
        ("channels[5]", c[5], c[4] // 2 + c[1]),
    ):
        if got != want:
            raise ConfigError(f"{name} is {got}, but the skips and strides make it {want}", "only channels[0] is free")
    if any(v % config.norm_groups for v in c):
        raise ConfigError(f"norm_groups {config.norm_groups} does not divide every one of {c}", "lower norm_groups")
    if any(not 1 <= b <= 6 or c[b - 1] % config.num_heads for b in config.attention_blocks):
        raise ConfigError(
            f"attention in blocks {config.attention_blocks} with {config.num_heads} heads", "blocks are 1-6"
        )
    if config.image_size % 8 or config.image_size > IMAGE_SIZE_LIMIT:
        raise ConfigError(
            f"image_size {config.image_size} is not a multiple of 8 up to {IMAGE_SIZE_LIMIT}",
            "three blocks halve the resolution",
        )
    table = config.num_train_timesteps * max(config.time_channels, *c)
    if config.num_train_timesteps > TIMESTEP_LIMIT or table > TIME_TABLE_LIMIT:
        raise ConfigError(f"{config.num_train_timesteps} timesteps for channels {c}", "use fewer timesteps, e.g. 1000")
    if config.time_embedding not in TIME_EMBEDDINGS:
        raise ConfigError(f"unknown time embedding '{config.time_embedding}'", f"one of: {', '.join(TIME_EMBEDDINGS)}")
    if config.activation not in ACTIVATIONS:
        raise ConfigError(f"unknown activation '{config.activation}'", f"one of: {', '.join(ACTIVATIONS)}")


class SinusoidalTable(nn.Module):
    """sin and cos of t at geometrically falling frequencies (Vaswani et al. 2017), interleaved: t [B] -> [B, E]."""

    def __init__(self, num_train_timesteps: int, channels: int) -> None:
        super().__init__()
        # Named as CPU tensors: the table has to be real even in a network that is built without weights, on "meta".
        t = torch.arange(num_train_timesteps, dtype=torch.float64, device="cpu")
        pairs = torch.arange(0, channels, 2, dtype=torch.float64, device="cpu")
        frequency = torch.exp(pairs * (-math.log(10_000) / channels))
        angle = t[:, None] * frequency
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(num_train_timesteps, -1)
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.get_buffer("table")[t]


class LearnedTimeEmbedding(nn.Module):
    """The sinusoidal table through a two-layer perceptron: t [B] -> [B, E]; every residual block projects it."""

    def __init__(self, num_train_timesteps: int, channels: int) -> None:
        super().__init__()
        self.sinusoid = SinusoidalTable(num_train_timesteps, channels)
        self.linear1 = nn.Linear(channels, channels)
        self.linear2 = nn.Linear(channels, channels)

    def forward(self, t: Tensor) -> Tensor:
        return F.silu(self.linear2(F.silu(self.linear1(self.sinusoid(t)))))


class ResBlock(nn.Module):
    """x + conv(dropout(conv(x + time))), each convolution after GroupNorm and activation: [B, C, H, W] -> same shape."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        learned = config.time_embedding == "learned"
        self.time: nn.Module | None = nn.Linear(config.time_channels, channels) if learned else None
        self.norm1 = nn.GroupNorm(config.norm_groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        time = embedding[:, : x.shape[1]] if self.time is None else self.time(embedding)
        x = x + time[:, :, None, None]
        h = self.conv1(self.activation(self.norm1(x)))
        h = self.conv2(self.activation(self.norm2(self.dropout(h))))
        out: Tensor = x + h
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by the fused kernel: [B, N, L, D] -> same shape.

    At 256 tokens and 4 channels per head it trains four times faster than the written-out form; but on a CPU it is three
    times slower in bfloat16 than in float32.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head self-attention over pixels, added to its input: [B, C, H, W] -> same shape."""

    def __init__(self, channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.dropout = dropout
        self.attend: Callable[[Tensor, Tensor, Tensor, float], Tensor] = attend

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = rearrange(self.qkv(tokens), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        mixed = self.attend(q, k, v, self.dropout if self.training else 0.0)
        mixed = rearrange(mixed, "b n l d -> b l (n d)")
        out: Tensor = x + rearrange(self.out(mixed), "b (h w) c -> b c h w", h=height, w=width)
        return out


class Block(nn.Module):
    """One of the six numbered blocks: [B, C, H, W] -> (resampled output, skip of the input's shape)."""

    def __init__(self, number: int, config: UNetConfig) -> None:
        super().__init__()
        channels = config.channels[number - 1]
        self.res1 = ResBlock(channels, config)
        attends = number in config.attention_blocks
        self.attention = Attention(channels, config.num_heads, config.dropout) if attends else None
        self.res2 = ResBlock(channels, config)
        if number <= 3:
            self.resample: nn.Module = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        else:
            self.resample = nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        x = self.res1(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        skip = self.res2(x, embedding)
        return self.resample(skip), skip


class Stem(nn.Module):
    """The first convolution and the time embedding: x [B, image channels, H, W], t [B] -> ([B, C1, H, W], [B, E])."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.image_channels, config.channels[0], 3, padding=1)
        if config.time_embedding == "learned":
            self.time: nn.Module = LearnedTimeEmbedding(config.num_train_timesteps, config.time_channels)
        else:
            self.time = SinusoidalTable(config.num_train_timesteps, max(config.channels))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.time(t)


class Head(nn.Module):
    """The late 3x3 convolution and the 1x1 output convolution: [B, C6 / 2 + C1, H, W] -> [B, image channels, H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.channels[5] // 2 + config.channels[0]
        self.late = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.output = nn.Conv2d(channels // 2, config.image_channels, 1)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.activation(self.late(x)))
        return out


class UNet(nn.Module):
    """x_t [B, image channels, H, W] and integer timesteps t [B] -> a prediction shaped like x_t."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.stem = Stem(config)
        self.block1, self.block2, self.block3 = (Block(n, config) for n in (1, 2, 3))
        self.block4, self.block5, self.block6 = (Block(n, config) for n in (4, 5, 6))
        self.head = Head(config)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, embedding = self.stem(x, t)
        x, skip1 = self.block1(x, embedding)
        x, skip2 = self.block2(x, embedding)
        x, skip3 = self.block3(x, embedding)
        x = torch.cat([self.block4(x, embedding)[0], skip3], dim=1)
        x = torch.cat([self.block5(x, embedding)[0], skip2], dim=1)
        x = torch.cat([self.block6(x, embedding)[0], skip1], dim=1)
        out: Tensor = self.head(x)
        return out


class TemporalBlock(nn.Module):
    """All of a network that depends on t alone: t [B] -> what every residual block adds for it, side by side [B, channels].

    Its layers are the network's own. A sliced embedding has none.
    """

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.embedding = network.stem.time
        found = (m.time for m in network.modules() if isinstance(m, ResBlock))
        self.projections = nn.ModuleList(layer for layer in found if layer is not None)

    def forward(self, t: Tensor) -> Tensor:
        embedding = self.embedding(t)
        return torch.cat([projection(embedding) for projection in self.projections], dim=1)


# What block reconstruction matches the output of: blocks with a shortcut and the head as a whole, else single layers.
RECONSTRUCTED = (LearnedTimeEmbedding, ResBlock, Attention, Head, nn.Conv2d, nn.ConvTranspose2d)


def concat_boundaries(config: UNetConfig) -> dict[str, int]:
    """The layers whose input is two tensors joined along the channels, and how many channels the first one has.

    The head's late convolution is given the joint tensor as it is; blocks 5 and 6 through the norm and activation of their
    first residual block, which keep every channel in its place.
    """
    c = config.channels
    return {"block5.res1.conv1": c[3] // 2, "block6.res1.conv1": c[4] // 2, "head.late": c[5] // 2}


def normed_convolutions(network: UNet) -> Iterator[tuple[str, str]]:
    """Names of every norm and of the convolution behind it; the network's activation stands between them."""
    for name, module in network.named_modules():
        if isinstance(module, ResBlock):
            yield f"{name}.norm1", f"{name}.conv1"
            yield f"{name}.norm2", f"{name}.conv2"


def block_of(parameter_name: str) -> str:
    """``"1"`` to ``"6"``, ``"stem"`` or ``"head"``: where a parameter of :class:`UNet` lives."""
    first = parameter_name.split(".", 1)[0]
    if first in ("stem", "head"):
        return first
    if first.startswith("block") and first[5:] in ("1", "2", "3", "4", "5", "6"):
        return first[5:]
    raise ConfigError(f"'{parameter_name}' is in no block of the U-Net", "names start with stem, block1-6 or head")
