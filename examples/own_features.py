"""A feature network of your own for ``fqdiff fid`` and ``fqdiff compare``: a TorchScript file.

    python examples/own_features.py edges.pt
    fqdiff compare demo-fp32 demo-int4 --features torchscript:edges.pt

It takes float32 images [N, C, H, W] in [-1, 1] and gives features [N, D]. This one sees how strong edges are in each part of the
image, and nothing else: FID in it is a distance between the statistics of edges. A network that classifies may give a pair,
features and logits [N, K], and then has an Inception score. The file can execute: take it from nobody else.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn


class Edges(nn.Module):
    """Mean squared difference of neighbouring pixels, across and down, in each of 4 x 4 parts: 32 features."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(dim=1, keepdim=True)
        across = (grey[:, :, :, 1:] - grey[:, :, :, :-1]).square()
        down = (grey[:, :, 1:] - grey[:, :, :-1]).square()
        return torch.cat([nn.functional.adaptive_avg_pool2d(edges, 4).flatten(1) for edges in (across, down)], dim=1)


def main(path: str) -> Path:
    """Write the network to ``path``."""
    torch.jit.script(Edges().eval()).save(path)
    print(f"wrote {path}: use it as --features torchscript:{path}")
    return Path(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default="edges.pt", help="the file to write")
    main(parser.parse_args().path)
