import pytest
import torch

from fqdiff.configs import PRESETS
from fqdiff.errors import ConfigError
from fqdiff.models.registry import build, output_axes, parameter_blocks, unet_architecture, unet_config
from fqdiff.models.unet import UNet, UNetConfig, block_of


def parameters_of(preset: str) -> int:
    network = build(unet_architecture(unet_config(PRESETS[preset].architecture)), "meta")
    return sum(p.numel() for p in network.parameters())


def test_the_paper_preset_has_exactly_the_papers_parameters() -> None:
    assert parameters_of("paper") == 35_178_689
    assert round(4 * 35_178_689 / 2**20, 2) == 134.20


def test_the_papers_weights_halved_have_the_published_size() -> None:
    """67.70 MiB: every parameter called weight (norms' too) in the six blocks in float16, all else in float32."""
    network = build(unet_architecture(UNetConfig()), "meta")
    size = sum(
        p.numel() * (2 if name.endswith("weight") and block_of(name) in "123456" else 4)
        for name, p in network.named_parameters()
    )
    assert round(size / 2**20, 2) == 67.70


def test_the_small_preset_has_two_million_parameters() -> None:
    assert round(parameters_of("small") / 1e6, 1) == 2.2


def test_every_parameter_has_a_block_and_every_block_a_parameter() -> None:
    blocks = parameter_blocks(build(unet_architecture(unet_config(PRESETS["small"].architecture)), "meta"))
    assert set(blocks.values()) == {"stem", "1", "2", "3", "4", "5", "6", "head"}
    with pytest.raises(ConfigError, match=r"'block7\.conv' is in no block"):
        block_of("block7.conv")


def test_attention_is_in_blocks_two_and_six() -> None:
    blocks = parameter_blocks(build(unet_architecture(UNetConfig()), "meta"))
    assert {block for name, block in blocks.items() if "attention" in name} == {"2", "6"}


def test_output_channels_of_a_transposed_convolution_are_on_axis_one() -> None:
    network = build(unet_architecture(UNetConfig()), "meta")
    axes = output_axes(network)
    assert axes["block4.resample.weight"] == 1
    assert axes["block1.resample.weight"] == 0
    assert axes["block4.resample.bias"] == 0
    assert axes.keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_the_output_has_the_shape_of_the_input(preset: str) -> None:
    config = unet_config(PRESETS[preset].architecture)
    x = torch.randn(2, 1, config.image_size, config.image_size)
    assert UNet(config)(x, torch.tensor([0, 999])).shape == x.shape


def test_dropout_acts_in_training_only_and_attentions_too() -> None:
    config = UNetConfig(channels=(8, 16, 32, 64, 64, 48), norm_groups=4, num_heads=2, dropout=0.5, image_size=8)
    network = UNet(config)
    for module in network.modules():  # silence all dropout but attention's
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    network.train()
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


def test_the_time_reaches_every_block() -> None:
    network = UNet(unet_config(PRESETS["tiny"].architecture)).eval()
    seen = {}
    for number in range(1, 7):
        getattr(network, f"block{number}").register_forward_hook(
            lambda module, inputs, output, number=number: seen.setdefault(number, []).append(output[1])
        )
    x = torch.randn(1, 1, 8, 8)
    network(x, torch.tensor([0]))
    network(x, torch.tensor([900]))
    assert all(not torch.allclose(a, b) for a, b in seen.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (10, 20, 40, 80, 80, 60)}, "norm_groups 32 does not divide"),
        ({"channels": (64, 128, 256, 512, 512, 512)}, r"channels\[5\] is 512"),
        ({"image_size": 20}, "not a multiple of 8"),
        ({"attention_blocks": (7,)}, "attention in blocks"),
        ({"time_embedding": "none"}, "unknown time embedding"),
        ({"activation": "tanh"}, "unknown activation"),
        ({"num_train_timesteps": 40_000}, "40000 timesteps"),
        ({"image_size": 8192}, "up to 4096"),
    ],
)
def test_an_architecture_that_cannot_be_built_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet(UNetConfig(**changes))  # type: ignore[arg-type]
