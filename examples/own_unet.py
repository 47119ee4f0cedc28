"""Quantize a network that fqdiff knows nothing about: any nn.Module's convolutions and linear layers.

    python examples/own_unet.py

What works for any network: packed weights that stay packed, in every format, and files of their size. What needs fqdiff's own
U-Net (trained or imported): Fisher tables, plans, sampling, comparisons. So the format of each layer is chosen here by
what it does to the output when it alone is quantized.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fqdiff.quant.layers import layer_weights, pack_layers


class SmallUNet(nn.Module):
    """Two resolutions, a skip connection, the timestep as a shift of channels."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.enter = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.middle = nn.Sequential(
            nn.GroupNorm(8, 2 * channels), nn.SiLU(), nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        )
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(2 * channels, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first = self.enter(x) + self.time(t[:, None].float() / 1000)[:, :, None, None]
        low = self.down(nn.functional.silu(first))
        low = low + self.middle(low)
        return self.leave(torch.cat([first, self.up(low)], dim=1))


def main(channels: int = 32) -> dict[str, tuple[int, float]]:
    """File size and mean squared output error of each way to store the weights."""
    torch.manual_seed(0)
    network = SmallUNet(channels).eval()  # yours would be trained
    x, t = torch.randn(8, 1, 16, 16), torch.randint(1000, (8,))
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "model.safetensors"

    @torch.no_grad()
    def error(formats: str | dict[str, str]) -> float:
        packed = copy.deepcopy(network)
        pack_layers(packed, formats, granularity="channel", scale="float16")
        save_file(packed.state_dict(), file)
        return float((packed(x, t) - network(x, t)).square().mean())

    alone = {name: error({name: "int4"}) for name in layer_weights(network)}
    most = sorted(alone, key=alone.__getitem__)[-2:]
    mixed = {name: "int8" if name in most else "int4" for name in alone}
    found = {}
    for label, formats in {"float32": {}, "int8": "int8", "int4": "int4", "int4, two in int8": mixed}.items():
        found[label] = (0, error(formats))
        found[label] = (file.stat().st_size, found[label][1])
        print(f"{label:18} {found[label][0]:>9,} bytes  output error {found[label][1]:.2e}")

    # Back from the file: a new network, packed in the same way, takes the stored tensors. Its weights are never written out.
    again = SmallUNet(channels).eval()
    pack_layers(again, mixed, granularity="channel", scale="float16")
    again.load_state_dict(load_file(file))
    with torch.no_grad():
        assert float((again(x, t) - network(x, t)).square().mean()) == found["int4, two in int8"][1]
    folder.cleanup()
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
