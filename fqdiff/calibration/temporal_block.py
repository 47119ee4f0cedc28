"""Reconstruction of the temporal block: the time embedding and all its projections, over all timesteps.

After TFMQ-DM (Huang et al. 2024, arXiv:2311.16503). What a network adds for t depends on t alone: T vectors are all that it
will ever be given there, and no calibration set is needed. As part of residual blocks its layers are rounded for what images
make of them; here, as one block, for what they put out:

    minimise the mean over t of sum over projections |out_q(t) - out(t)|^2

by the same schedule and penalty as every block (:mod:`fqdiff.calibration.reconstruct`).
"""

import math
import time

import torch

from fqdiff.calibration.reconstruct import BlockData, learn_block, restore
from fqdiff.calibration.requirements import check_temporal
from fqdiff.configs import ReconstructConfig
from fqdiff.context import Context, Part
from fqdiff.models.registry import reconstruction_blocks, temporal_block
from fqdiff.quant.adaround import LearnedRounding, can_learn_rounding
from fqdiff.quant.packed import PackedTensor, unpack_tensor
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, QuantizedCheckpoint

NAME = "temporal"  # of its part


def reconstruct_temporal(
    checkpoint: Checkpoint, model: QuantizedCheckpoint, config: ReconstructConfig, seed: int, context: Context
) -> tuple[dict[str, PackedTensor], float]:
    """Packed tensors of the temporal block of ``model`` with their rounding learned, and the seconds that it took.

    With ``config.minutes`` it gets a block's share of these. A finished one is found again. Raises ConfigError where nothing
    that depends on t alone has a rounding to learn, LineageError where codes are not ``checkpoint``'s weights rounded.
    """
    device = context.device
    network = model.spec.network({name: unpack_tensor(p) for name, p in model.packed.items()}).to(device)
    block, names = temporal_block(network)
    own = {
        mine: LearnedRounding(name, checkpoint.tensors[name], p).to(device)
        for mine, name in names.items()
        if can_learn_rounding((p := model.packed[name]).format, p.granularity)
    }
    check_temporal({name: (p.format, p.granularity) for name, p in model.packed.items()}, names.values())
    with context.progress(config.iterations, "temporal block", "step") as bar:
        part = context.parts.load(NAME)
        if part is not None:
            codes, seconds = restore(part, own)
            bar.update(config.iterations)
        else:
            started = time.monotonic()
            t = torch.arange(model.spec.noise_schedule().num_train_timesteps)
            full, _ = temporal_block(checkpoint.network())
            with torch.no_grad():
                data = BlockData((t.to(device),), full(t).to(device))
            share = 60 * config.minutes / (1 + len(reconstruction_blocks(network))) if config.minutes else math.inf
            draw = generator(seed, "reconstruct", NAME)

            def tell(steps: int, text: str) -> None:
                bar.update(steps)
                bar.show(text)

            codes = learn_block(block, own, data, config, draw, started + share, tell).codes
            seconds = time.monotonic() - started
            streams = {name: r.packed(codes[name]).parts["codes"] for name, r in own.items()}
            context.parts.save(NAME, Part(streams, {"seconds": seconds}))
    return {names[mine]: r.packed(codes[mine]) for mine, r in own.items()}, seconds
