"""Packed weights in networks that fqdiff does not know."""

import copy

import pytest
import torch
from torch import nn

from fqdiff.errors import ConfigError, QuantizationError
from fqdiff.quant.formats import PerChannel, get_format
from fqdiff.quant.layers import layer_weights, pack_layers
from fqdiff.quant.packed import pack_tensor, unpack_tensor


class Odd(nn.Module):
    """One layer of each kind, a norm, a parameter of its own, attention, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3, bias=False)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.norm(self.first(x)))
        rows = h.flatten(2).transpose(1, 2) + self.shift
        rows = rows + self.attend(rows, rows, rows, need_weights=False)[0]
        return self.last(rows) + self.last(rows.square())  # type: ignore[no-any-return]


@pytest.fixture
def network() -> Odd:
    torch.manual_seed(0)
    return Odd().eval()


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
AXES = {"first.weight": 0, "up.weight": 1, "attend.out_proj.weight": 0, "last.weight": 0}


def test_outputs_are_those_of_weights_that_were_packed_and_unpacked_by_hand(network: Odd) -> None:
    """Rejects a transposed convolution with scales along its input channels."""
    assert set(layer_weights(network)) == AXES.keys()
    by_hand = copy.deepcopy(network)
    for name, axis in AXES.items():
        weight = by_hand.get_parameter(name)
        weight.data = unpack_tensor(pack_tensor(weight.data, get_format("int4"), PerChannel(axis)))
    kept = {n: p for n, p in network.named_parameters() if n not in AXES}
    packed = pack_layers(network, "int4")
    assert {name: t.granularity.axis for name, t in packed.items()} == AXES  # type: ignore[union-attr]
    assert dict(network.named_parameters()).keys() == kept.keys()
    with torch.no_grad():
        assert torch.equal(network(X), by_hand(X))
    assert "last.weight.codes" in network.state_dict()


@pytest.mark.parametrize("cache", [False, True])
def test_another_network_takes_the_stored_tensors(network: Odd, cache: bool) -> None:
    formats = {"first.weight": "int3", "last.weight": "bfloat16", "up.weight": "codebook4"}
    pack_layers(network, formats, "group-near:8", "float16", cache)
    other = Odd().eval()
    pack_layers(other, formats, "group-near:8", "float16", cache)
    with torch.no_grad():
        wanted = network(X)
        assert not torch.equal(other(X), wanted)
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(X), wanted)


def test_a_layer_alone_is_a_network(network: Odd) -> None:
    layer = nn.Linear(4, 3)
    pack_layers(layer, "float16")
    assert dict(layer.named_parameters()).keys() == {"bias"}
    assert layer(torch.zeros(2, 4)).shape == (2, 3)


def test_what_cannot_be_packed_is_named_and_nothing_changes(network: Odd) -> None:
    before = {name: p.clone() for name, p in network.named_parameters()}
    nan = copy.deepcopy(network)
    nan.last.weight.data[0, 0] = float("nan")
    tied = copy.deepcopy(network)
    tied.attend.out_proj.weight = tied.other = nn.Parameter(torch.randn(4, 4))
    for broken, formats, granularity, message in (
        (network, {"norm.weight": "int4"}, "channel", "'norm.weight' is no weight of a convolution"),
        (network, {"nothing": "int4"}, "channel", "'nothing' is no weight"),
        (network, "int99", "channel", "unknown format 'int99'"),
        (network, "int4", "group:5", "groups of 5 do not divide"),
        (network, "int4", "rows", "unknown granularity 'rows'"),
        (nan, "int4", "channel", "NaN or infinity"),
        (tied, "int4", "channel", "are one tensor"),
        (copy.deepcopy(network).half(), "int4", "channel", "is torch.float16"),
    ):
        with pytest.raises((QuantizationError, ConfigError), match=message):
            pack_layers(broken, formats, granularity)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert type(network.first) is nn.Conv2d
    with pytest.raises(ConfigError, match="unknown scale 'float8'"):
        pack_layers(network, "int4", scale="float8")
