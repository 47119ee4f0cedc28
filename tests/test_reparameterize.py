"""Scale reparameterization: no output changes in full precision, channels get one range, and what is not exact is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.reparameterize import reparameterized
from fqdiff.configs import ActivationConfig, CalibrateConfig, PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import LineageError, QuantizationError
from fqdiff.models.registry import build, normed_layers
from fqdiff.pipeline import External, Runner, Step
from fqdiff.quant.activation_sites import watching
from fqdiff.quant.reparameterize import NormedInput, channel_factors, obstacle, reparameterize
from fqdiff.rng import generator
from fqdiff.stages.activations import quantize_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize, quantize_reparameterized
from fqdiff.store.store import Store
from fqdiff.values import CalibrationSet, Checkpoint, Dataset
from tests.conftest import tiny_config
from tests.test_cli import call, good


def normal(*shape: int, label: str = "numbers") -> Tensor:
    return torch.randn(*shape, generator=generator(0, "test reparameterize", label))


def places_of(checkpoint: Checkpoint) -> list[NormedInput]:
    network = build(checkpoint.spec.architecture, "meta")
    return [NormedInput(norm, layer, between, padded=True) for norm, between, layer in normed_layers(network)]


@pytest.fixture(scope="module")
def relu(checkpoint: Checkpoint) -> Checkpoint:
    """The tiny network with ReLU, and with norms whose channels differ in range by a hundred times; one channel is dead."""
    tensors = dict(checkpoint.tensors)
    for place in places_of(checkpoint):
        spread = torch.logspace(-1, 1, len(tensors[f"{place.norm}.weight"]))
        tensors[f"{place.norm}.weight"] = spread
        tensors[f"{place.layer}.weight"] = tensors[f"{place.layer}.weight"] / spread.view(1, -1, 1, 1)
    tensors["block1.res1.norm1.bias"] = torch.tensor([0.0, -1000.0, 0.0, 0.0])
    architecture = {**checkpoint.spec.architecture, "activation": "relu"}
    return replace(checkpoint, spec=replace(checkpoint.spec, architecture=architecture), tensors=tensors)


@pytest.fixture(scope="module")
def calibration(relu: Checkpoint) -> CalibrationSet:
    return calibrate(relu, None, None, CalibrateConfig(steps=10, timesteps=10, samples=4), 0, Context())


def layers(between: str, kernel: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Norm affine, weight and bias of a layer, and its outputs' inputs [B, C, H, W]; factors r."""
    shapes = ((8,), (8,), (5, 8, kernel, kernel), (5,))
    tensors = [normal(*shape, label=f"{between} {i}") for i, shape in enumerate(shapes)]
    return tensors, normal(3, 8, 6, 6, label="x"), torch.logspace(-1, 1, 8)


def outputs(tensors: list[Tensor], x: Tensor, between: str, padding: int) -> Tensor:
    norm_weight, norm_bias, weight, bias = tensors
    h = F.group_norm(x, 4, norm_weight, norm_bias)
    return F.conv2d(F.relu(h) if between == "relu" else h, weight, bias, padding=padding)


@pytest.mark.parametrize(
    ("between", "kernel", "padding", "shifted"),
    [("", 1, 0, True), ("", 3, 0, True), ("", 3, 1, False), ("relu", 3, 1, False)],
)
def test_float_outputs_stay_what_they_are(between: str, kernel: int, padding: int, shifted: bool) -> None:
    """Rejects a bias that is folded with the old weight, and one that forgets the other positions of a kernel."""
    tensors, x, ratio = layers(between, kernel)
    shift = normal(8, label="shift") if shifted else torch.zeros(8)
    assert obstacle(NormedInput("norm", "layer", between, padded=padding > 0), shifted) is None
    changed = list(reparameterize(*tensors, ratio, shift))
    expected = outputs(tensors, x, between, padding)
    torch.testing.assert_close(outputs(changed, x, between, padding), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed[2], tensors[2])


def test_a_linear_layer_is_folded_as_well() -> None:
    weight, bias, x = normal(5, 8, label="w"), normal(5, label="b"), normal(7, 8, label="x")
    gamma, beta, ratio, shift = (
        torch.ones(8),
        normal(8, label="beta"),
        torch.logspace(-1, 1, 8),
        normal(8, label="shift"),
    )
    g, b, w, c = reparameterize(gamma, beta, weight, bias, ratio, shift)
    expected = F.linear(F.layer_norm(x, (8,), gamma, beta), weight, bias)
    torch.testing.assert_close(F.linear(F.layer_norm(x, (8,), g, b), w, c), expected, atol=1e-5, rtol=1e-5)


def test_all_channels_get_one_scale_and_zero_point() -> None:
    """The codes of each channel by its own (s_j, z_j) are those of the new tensor by (mean s, mean z)."""
    scale, zero = torch.tensor([0.1, 0.4, 0.02]), torch.tensor([10.0, 128.0, 200.0])
    x = scale * (torch.arange(256)[:, None] - zero)
    r, b = channel_factors(scale, zero)
    codes = (x / r + b) / scale.double().mean() + zero.double().mean()
    torch.testing.assert_close(codes, torch.arange(256.0).double()[:, None].expand(256, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("place", "shifted", "reason"),
    [
        (NormedInput("norm1", "conv1", "silu"), False, r"silu stands between 'norm1' and 'conv1', and silu\(x / r\)"),
        (NormedInput("norm1", "conv1", "relu"), True, "relu stands between"),
        (NormedInput("norm1", "conv1", padded=True), True, "a shift does not reach"),
        (NormedInput("norm1", "conv1", consumers=2), False, "2 layers are given the output of 'norm1'"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_reason(place: NormedInput, shifted: bool, reason: str) -> None:
    found = obstacle(place, shifted)
    assert found is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)


def test_what_is_refused_is_not_exact() -> None:
    """Each obstacle that is a matter of numbers stands for a difference."""
    x, r = normal(100), 3.0
    assert float((F.silu(x / r) - F.silu(x) / r).abs().max()) > 0.05
    assert float((F.relu(x + 0.5) - F.relu(x) - 0.5).abs().max()) > 0.05
    tensors, x, ratio = layers("", 3)
    changed = list(reparameterize(*tensors, ratio, torch.ones(8)))
    assert float((outputs(changed, x, "", 1) - outputs(tensors, x, "", 1)).abs().max()) > 0.05


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_make_no_sense_are_refused(wrong: float) -> None:
    tensors, _, ratio = layers("", 1)
    ratio[3] = wrong
    with pytest.raises(QuantizationError, match="finite and above 0"):
        reparameterize(*tensors, ratio, torch.zeros(8))


def test_a_whole_network_predicts_the_same_with_one_range_a_layer(
    relu: Checkpoint, calibration: CalibrationSet
) -> None:
    inputs = CalibrationInputs(calibration.x_t.float(), calibration.t)
    places = places_of(relu)
    assert len(places) == 24
    same = reparameterized(relu, places, inputs, torch.device("cpu"))
    spans = []
    for each in (relu, same):
        network, seen = each.network(), dict[str, Tensor]()
        with torch.inference_mode(), watching(network, [p.layer for p in places], seen.__setitem__):
            spans.append((network(inputs.x_t, inputs.t), seen))
    torch.testing.assert_close(spans[0][0], spans[1][0], atol=1e-5, rtol=1e-5)
    for name in ("block3.res1.conv1", "block6.res2.conv2"):
        before, after = (s[name].amax(dim=(0, 2, 3)) for _, s in spans)
        live = before > 0
        assert float(before[live].max() / before[live].min()) > 10 * float(after[live].max() / after[live].min())
    assert torch.equal(same.tensors["block1.res1.norm1.weight"][1], relu.tensors["block1.res1.norm1.weight"][1])


def test_one_scale_is_then_as_good_as_one_a_channel(relu: Checkpoint, calibration: CalibrationSet) -> None:
    made = plan(relu, None, None, PlanConfig("uniform", low="float32"), 0, Context())
    as_it_is = quantize(relu, made, None, QuantizeConfig(), 0, Context())
    folded = quantize_reparameterized(relu, made, calibration, QuantizeConfig(), 0, Context())
    config, errors = ActivationConfig("int6", split_skips=False), []
    with torch.inference_mode():
        exact = relu.network()(calibration.x_t, calibration.t)
        for model in (as_it_is, folded):
            network = quantize_activations(relu, model, calibration, config, 0, Context()).network()
            errors.append(float((network(calibration.x_t, calibration.t) - exact).square().mean()))
    assert errors[1] < 0.7 * errors[0]
    with pytest.raises(LineageError, match="another model"):
        quantize_reparameterized(relu, made, replace(calibration, model="0" * 64), QuantizeConfig(), 0, Context())


def test_a_network_with_silu_is_refused_by_the_command(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(store, "plan", "--uniform", "int8", "--name", "int8")
    good(store, "calibrate", "one", "--steps", "2", "--timesteps", "2", "--samples", "2", "--name", "inputs")
    refused = call(store, "quantize", "int8", "--reparameterize", "--calibration", "inputs")
    assert refused.exit_code == 1
    assert "silu stands between 'block1.res1.norm1' and 'block1.res1.conv1'" in refused.stderr
    assert not (store / "quantized").exists() or not list((store / "quantized").glob("*/manifest.json"))


def test_the_command_reparameterizes_a_network_with_relu(dataset: Dataset, relu: Checkpoint, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = External("dataset", "0" * 16, dataset)
    step = Step("train", {"dataset": source}, tiny_config(architecture=dict(relu.spec.architecture)))
    store.give_name("one", Runner(store).run(step))
    planned = good(store.root, "plan", "one", "--uniform", "int8", "--name", "int8")
    few = ("--steps", "4", "--timesteps", "4", "--samples", "2")
    good(store.root, "calibrate", "one", *few, "--name", "inputs")
    flags = ("--reparameterize", "--calibration", "inputs")
    alone = good(store.root, "quantize", "int8", *flags)
    assert alone["file_bytes"] == planned["file_bytes"]
    assert alone["id"] != good(store.root, "quantize", "int8")["id"]
    both: Any = good(
        store.root, "quantize", "int8", *flags, "--activations", "int8", "--noise-correction", "--noise-intervals", "2"
    )
    added = both["activation_bytes"] + both["noise_correction_bytes"]
    assert both["file_bytes"] == both["promised_bytes"] + added
