"""What a network adds for t, computed once for each timestep of a sampler and kept: it depends on t alone.

After TFMQ-DM (Huang et al. 2024, arXiv:2311.16503). Exact: what is kept is what the network's own layers gave for a batch of the
same size, since a matrix product may end in other last bits for another.
Shapes: B batch, P channels that all residual blocks add, side by side.
"""

from torch import Tensor, nn

from fqdiff.models.unet import ResBlock, TemporalBlock, UNet


class TimeTable(nn.Module):
    """In the place of a network's time embedding: t [B] -> what its residual blocks add, [B, P].

    ``block`` computes it, once for each timestep and batch size; batches of several timesteps are computed every time. On CUDA,
    looking at t waits for the device. Nothing that ``block`` holds may change afterwards, nor move.
    """

    def __init__(self, block: TemporalBlock) -> None:
        super().__init__()
        self.block = block
        self.kept: dict[tuple[int, int], Tensor] = {}

    def forward(self, t: Tensor) -> Tensor:
        timesteps = t.tolist()
        if len(set(timesteps)) != 1:
            return self._computed(t)
        key = timesteps[0], len(timesteps)
        if key not in self.kept:
            rows = self._computed(t)
            # One row is enough, and a thousand timesteps fit into a few MiB, where all are the same to the last bit.
            self.kept[key] = rows[:1].clone() if (rows == rows[:1]).all() else rows
        return self.kept[key].expand(len(timesteps), -1)

    def _computed(self, t: Tensor) -> Tensor:
        rows: Tensor = self.block(t)
        return rows


class Columns(nn.Module):
    """In the place of a residual block's projection: of all [B, P] its own ``count`` channels, from ``first`` on.

    They lie in memory as the projection's do: strides decide how what they are added to lies, and that, which kernels follow.
    """

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count

    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, self.first : self.first + self.count].contiguous()


def tabulate_time(network: nn.Module) -> None:
    """From now on ``network``, in eval mode, computes what depends on t alone once for each timestep, and keeps it.

    It puts out the same to the bit, be its weights float32 or packed. Its temporal layers change their names.
    """
    assert isinstance(network, UNet)
    block = TemporalBlock(network)
    if not block.projections:
        return
    network.stem.time = TimeTable(block)
    first = 0
    for module in network.modules():
        if isinstance(module, ResBlock) and module.time is not None:
            count = module.time.out_features
            assert isinstance(count, int)
            module.time = Columns(first, count)
            first += count
