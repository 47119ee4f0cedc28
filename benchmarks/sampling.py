"""Where sampling spends its time: the share inside the network's forward, of the stage's wall time, in one run.

python benchmarks/sampling.py --model mnist-small --samplers ddim,ddpm,dpm++ --images 60 --steps 10

Everything else counts against it: building the network, noise, the sampler's own arithmetic, and parts written to disk.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from fqdiff.configs import SampleConfig
from fqdiff.context import Context
from fqdiff.stages.sample import sample
from fqdiff.store.manifest import Recipe
from fqdiff.store.parts import StoredParts
from fqdiff.store.pretrained import open_model
from fqdiff.values import Model, ModelSpec


@dataclass
class Timed:
    """A model whose network notes how long each forward took, in seconds."""

    model: Model
    seconds: list[float] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        """That of the model."""
        return self.model.spec

    def network(self) -> nn.Module:
        """The model's network with a clock."""
        network, begun = self.model.network(), [0.0]
        network.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
        network.register_forward_hook(lambda *_: self.seconds.append(time.perf_counter() - begun[0]))
        return network


def main(model: str, sampler: str, images: int, steps: int) -> dict[str, float]:
    """Share of the wall time inside forward, and milliseconds per image and step."""
    timed = Timed(open_model(f"pretrained:{model}").model)
    with tempfile.TemporaryDirectory() as folder:
        config = SampleConfig(sampler, steps, count=images)
        parts = StoredParts(Path(folder), Recipe("samples", "sample", 1, (), vars(config), 0))
        start = time.perf_counter()
        sample(timed, config, 0, Context(parts=parts))  # type: ignore[arg-type]
        wall = time.perf_counter() - start
    return {"inside forward": sum(timed.seconds) / wall, "ms per image-step": 1000 * wall / (images * steps)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist-small")
    parser.add_argument("--samplers", default="ddim,ddpm,dpm++")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    for name in given.samplers.split(","):
        found = main(given.model, name, given.images, given.steps)
        print(
            f"{name:6} {100 * found['inside forward']:.1f} % of the time inside the network's forward, "
            f"{found['ms per image-step']:.2f} ms per image and step, {torch.get_num_threads()} threads"
        )
