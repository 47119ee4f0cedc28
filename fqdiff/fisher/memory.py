"""How many samples fit: what one sample's forward and backward pass keeps, measured on one."""

import torch
from torch import Tensor, nn

from fqdiff.context import Context, peak_memory
from fqdiff.errors import ConfigError
from fqdiff.fisher.backward import per_sample_backward
from fqdiff.fisher.rules import PIECE_BYTES
from fqdiff.values import Checkpoint

HEADROOM = 1.5  # of allocators, and of the gradients that are alive while autograd walks back


def batch_that_fits(checkpoint: Checkpoint, context: Context, batch: int) -> int:
    """``batch``, or as many samples as keep every worker together below ``context.max_memory``.

    Raises ConfigError where not even one sample does.
    """
    if not context.max_memory:
        return batch
    network = checkpoint.network()
    count = torch.get_num_threads() if context.device.type == "cpu" else 1
    each, fixed = sample_bytes(network, checkpoint.spec.image_shape), gradient_bytes(network)
    free = context.max_memory - peak_memory()
    fits = int((free / count - fixed) // each)
    if fits < 1:
        need = peak_memory() + count * (fixed + each)
        raise ConfigError(
            f"one sample on each of {count} threads needs about {need / 2**20:.0f} MiB",
            f"raise --max-memory, or use fewer threads (OMP_NUM_THREADS={max(1, count // 2)})",
        )
    return min(batch, fits)


def gradient_bytes(network: nn.Module) -> int:
    """One sample's gradient of the largest layer, with its squares: float32 once and float64 twice."""
    largest = max(p.numel() for p in network.parameters())
    return max(PIECE_BYTES, 20 * largest)


def sample_bytes(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """What one sample adds to the memory of a per-sample backward pass: tensors that autograd and the layers keep."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, t = torch.zeros(1, *image_shape), torch.zeros(1, dtype=torch.long)
    handles = [m.register_forward_hook(lambda _, args, output: (keep(args[0]), None)[1]) for m in network.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            per_sample_backward(network, lambda: network(x, t), torch.ones_like, lambda name, pieces: None)
    finally:
        for handle in handles:
            handle.remove()
    return int(HEADROOM * sum(kept.values()))
