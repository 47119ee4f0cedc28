"""How many samples fit: what one sample's forward and backward pass keeps, measured on one."""

import torch
from torch import Tensor, nn

from fqdiff.configs import FisherConfig
from fqdiff.context import Context, peak_memory
from fqdiff.errors import ConfigError
from fqdiff.fisher.backward import layers, per_sample_backward
from fqdiff.fisher.rules import PIECE_BYTES
from fqdiff.fisher.timesteps import BATCH
from fqdiff.values import Checkpoint

HEADROOM = 1.5  # of allocators, and of the gradients that are alive while autograd walks back


def batch_that_fits(checkpoint: Checkpoint, context: Context, config: FisherConfig, batch: int) -> int:
    """``batch`` samples or sampler runs, or as many as keep all workers together below ``context.max_memory``.

    Raises ConfigError where not even one does.
    """
    if not context.max_memory:
        return batch
    count = torch.get_num_threads() if context.device.type == "cpu" else 1
    each, fixed = needed_bytes(checkpoint.network(), checkpoint.spec.image_shape, config)
    free = context.max_memory - peak_memory()
    fits = int((free / count - fixed) // each)
    if fits < 1:
        need = peak_memory() + count * (fixed + each)
        raise ConfigError(
            f"one sample on each of {count} threads needs about {need / 2**20:.0f} MiB",
            f"raise --max-memory, or use fewer threads (OMP_NUM_THREADS={max(1, count // 2)})",
        )
    return min(batch, fits)


def needed_bytes(network: nn.Module, image_shape: tuple[int, int, int], config: FisherConfig) -> tuple[int, int]:
    """What one worker takes for each sample (or sampler run), and once."""
    each = sample_bytes(network, image_shape)
    largest = max(p.numel() for p in network.parameters())
    parameters = sum(p.numel() for p in network.parameters())
    # Diagonals of all weights, float64: the one being made, two that wait to be added, and their sum.
    diagonals = 4 * 8 * parameters
    if config.kind == "trajectory":  # a run keeps its gradients in float32 and their squares in float64
        return each + 12 * parameters, diagonals
    # Of one timestep in the layer at work: float32 twice; where several batches are added, or single weights, float64 twice more.
    wide = config.samples > BATCH or config.granularity == "weight"
    squares = (24 if wide else 8) * largest
    fixed = max(PIECE_BYTES, squares) + (diagonals if config.granularity == "weight" else 0)
    return each + squares // config.samples, fixed


def sample_bytes(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """What one sample adds to the memory of a per-sample backward pass: tensors that autograd and the layers keep."""
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor.detach()
        return tensor

    def keep_inputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for tensor in inputs:
            keep(tensor)

    x, t = torch.zeros(1, *image_shape), torch.zeros(1, dtype=torch.long)
    handles = [layer.register_forward_pre_hook(keep_inputs) for layer in layers(network).values()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            per_sample_backward(network, lambda: network(x, t), torch.ones_like, lambda name, pieces: None)
    finally:
        for handle in handles:
            handle.remove()
    return int(HEADROOM * sum(v.untyped_storage().nbytes() for v in kept.values()))
