"""Scales by time: the table equals its network, which finds a smooth function of time again, and its bytes are counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fqdiff.calibration import temporal as module
from fqdiff.calibration.temporal import (
    ScaleNetwork,
    interval_middles,
    range_ends,
    slow_channels,
    tabulated,
    train_scales,
)
from fqdiff.configs import (
    ActivationConfig,
    CalibrateConfig,
    NoiseCorrectionConfig,
    PlanConfig,
    QuantizeConfig,
    TemporalConfig,
)
from fqdiff.context import Context
from fqdiff.errors import ConfigError, LineageError
from fqdiff.models.registry import build, time_features
from fqdiff.quant.activation_formats import activation_qparams, get_activation_format
from fqdiff.quant.activations import Activation
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.rng import generator
from fqdiff.stages.activations import quantize_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.noise_correction import correct_noise
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.temporal_scales import learn_temporal_scales
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint
from tests.test_activations import seen_by_time_alone
from tests.test_cli import call, good

FEW = TemporalConfig(intervals=25, iterations=3)


def features(checkpoint: Checkpoint) -> Tensor:
    return time_features(build(checkpoint.spec.architecture, "meta"))


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    return calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=4), 0, Context())


@pytest.fixture(scope="module")
def start(checkpoint: Checkpoint, calibration: CalibrationSet) -> QuantizedCheckpoint:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int4"), 0, Context())
    weights = quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())
    config = ActivationConfig("int8", range="min-max", intervals=10, softmax="log2", last="int8sym")
    return quantize_activations(checkpoint, weights, calibration, config, 0, Context())


def by_hand(network: ScaleNetwork, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The network in numpy."""
    layers = [m for m in network.layers if isinstance(m, torch.nn.Linear)]
    for layer in layers[:-1]:
        x = np.maximum(x @ layer.weight.numpy().T + layer.bias.numpy(), 0)
    return np.log1p(np.exp(x @ layers[-1].weight.numpy().T + layers[-1].bias.numpy()))


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "int8sym", "uint8", "log2_4"])
def test_the_table_equals_its_network(checkpoint: Checkpoint, name: str) -> None:
    """In numpy: softplus of the layers at the middle of each interval, times R; zero points are where 0 falls."""
    fmt, table = get_activation_format(name), features(checkpoint)
    t = torch.arange(12) * 80 + 40
    low, high = -1 - t / 1000, 2 + (t / 300).sin()
    qparams = activation_qparams(torch.stack([low, 3 * low], 1), torch.stack([high, high / 2], 1), fmt)
    sign = -1.0 if name.endswith("sym") else 1.0
    stored = qparams.zero_point if fmt.has_zero_points else None
    activation = Activation(name, "split", sign * qparams.scale.abs(), stored)
    network, unit = train_scales(table[t], range_ends(activation), replace(FEW, iterations=40), generator(0, "a"), int)
    middles = interval_middles(30, 1000)
    made = tabulated(network, unit, table[middles], activation, torch.full((30, 2), sign))
    found = by_hand(network, table[middles].numpy()).reshape(30, 2, -1) * unit.numpy()[:, None]
    assert made.scale is not None
    width = found.sum(axis=2) / fmt.qmax if fmt.has_zero_points else found[:, :, 0]
    np.testing.assert_allclose(made.scale.numpy(), sign * width, rtol=1e-4)
    if made.zero_point is not None:
        exact = found[:, :, 0] / width
        assert np.abs(made.zero_point.numpy() - exact).max() <= 0.5001
        assert len(np.unique(made.zero_point.numpy())) > 2


def test_a_smooth_function_of_time_is_found_again_between_its_timesteps(checkpoint: Checkpoint) -> None:
    """Better than the nearest known timestep, which is what a table without a network says. Rejects the whole embedding, whose
    fast channels make it worse.
    """
    whole, every = features(checkpoint), torch.arange(25, 975)

    def truth(t: Tensor) -> Tensor:
        return 0.02 + 0.03 * torch.sigmoid((t.float() - 500) / 150)

    t = torch.arange(20) * 50 + 25
    activation = Activation("uint8", "tensor", truth(t)[:, None])

    def error(scale: Tensor) -> float:
        return float((scale - truth(every)).square().mean().sqrt())

    def learned(table: Tensor) -> float:
        network, unit = train_scales(table[t], range_ends(activation), TemporalConfig(), generator(0, "b"), int)
        found = tabulated(network, unit, table[every], activation, torch.ones(len(every), 1)).scale
        assert found is not None
        return error(found[:, 0])

    nearest = error(truth(t)[(every[:, None] - t).abs().argmin(dim=1)])
    slow = slow_channels(whole, t.double())
    assert 3 * learned(slow) < nearest < learned(whole)
    frequency = 10_000 ** (-torch.arange(0, whole.shape[1], 2) / whole.shape[1])
    assert torch.equal(slow, whole[:, (50 * frequency <= torch.pi / 4).repeat_interleave(2)])


def test_it_starts_at_the_mean_and_needs_no_training_for_a_constant(checkpoint: Checkpoint) -> None:
    t = torch.arange(10) * 100
    activation = Activation("int8", "tensor", torch.full((10, 1), 0.05), torch.full((10, 1), 100, dtype=torch.uint8))
    before = torch.get_rng_state()
    network, unit = train_scales(features(checkpoint)[t], range_ends(activation), FEW, generator(0, "c"), int)
    assert torch.equal(torch.get_rng_state(), before)
    made = tabulated(network, unit, features(checkpoint)[::37], activation, torch.ones(28, 1))
    assert made.scale is not None
    assert made.zero_point is not None
    torch.testing.assert_close(made.scale, torch.full((28, 1), 0.05), rtol=1e-3, atol=0)
    assert made.zero_point.unique().tolist() == [100]


@pytest.mark.parametrize(("intervals", "total"), [(1, 1000), (7, 1000), (50, 1000), (1000, 1000), (3, 4)])
def test_middles_are_in_their_intervals(intervals: int, total: int) -> None:
    middles = interval_middles(intervals, total)
    of_interval = [[t for t in range(total) if t * intervals // total == k] for k in range(intervals)]
    assert middles.tolist() == [ts[(len(ts) - 1) // 2] for ts in of_interval]


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_gets_the_tables_of_its_networks_and_comes_back_from_its_file(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet, tmp_path: Path
) -> None:
    made = learn_temporal_scales(checkpoint, start, calibration, FEW, 0, Context())
    again = learn_temporal_scales(checkpoint, start, calibration, FEW, 0, Context(batch_size=3))
    other = learn_temporal_scales(checkpoint, start, calibration, FEW, 1, Context())
    t = calibration.t.unique()  # one timestep for each interval
    site, table = "block4.res1.conv2", slow_channels(features(checkpoint), t)
    old = start.activations[site]
    draw = generator(0, "temporal scales", site)
    network, unit = train_scales(table[t], range_ends(old), FEW, draw, int)
    expected = by_hand(network, table[interval_middles(25, 1000)].numpy()).sum(axis=1) * unit.numpy() / 255
    found = made.activations[site].scale
    assert found is not None
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-4)
    assert torch.equal(found, again.activations[site].scale)  # type: ignore[arg-type]
    assert not torch.equal(found, other.activations[site].scale)  # type: ignore[arg-type]
    assert made.packed is start.packed
    for name, a in start.activations.items():
        b = made.activations[name]
        assert (a.format, a.granularity, (a.zero_point is None)) == (b.format, b.granularity, b.zero_point is None)
        assert len(b.tensors[".activation_scale"]) == 25
    save_quantized(made, tmp_path)
    back = load_quantized(tmp_path)
    x, steps = calibration.x_t[::5], calibration.t[::5]
    with torch.no_grad():
        assert torch.equal(back.network()(x, steps), made.network()(x, steps))


def test_what_has_no_scales_to_learn_is_refused(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    def refused(
        model: QuantizedCheckpoint,
        given: CalibrationSet | None,
        kind: type[Exception],
        message: str,
        config: TemporalConfig = FEW,
    ) -> None:
        with pytest.raises(kind, match=message):
            learn_temporal_scales(checkpoint, model, given, config, 0, Context())

    refused(replace(start, activations={}), calibration, LineageError, "not quantized")
    refused(start, None, LineageError, "without a calibration set")
    refused(start, replace(calibration, model="0" * 64), LineageError, "another model")
    refused(start, calibration, ConfigError, "1001 intervals of 1000", replace(FEW, intervals=1001))
    early = replace(calibration, t=calibration.t.clamp(max=300))
    refused(start, early, ConfigError, "not of this calibration set")
    dynamic = {s: replace(a, scale=None, zero_point=None) for s, a in start.activations.items()}
    refused(replace(start, activations=dynamic), calibration, ConfigError, "dynamic")
    single = {
        s: replace(a, scale=a.scale[:1], zero_point=None if a.zero_point is None else a.zero_point[:1])  # type: ignore[index]
        for s, a in start.activations.items()
    }
    refused(replace(start, activations=single), calibration, ConfigError, "one interval")
    noisy = correct_noise(checkpoint, start, calibration, NoiseCorrectionConfig(1), 0, Context())
    refused(noisy, calibration, LineageError, "corrected for the scales")


@pytest.mark.parametrize("settings", [{"intervals": 0}, {"iterations": 0}, {"rate": 0.0}, {"rate": 2.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TemporalConfig(**settings)


def test_the_command_makes_tables_and_counts_their_bytes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(store, "plan", "--uniform", "int4", "--name", "int4")
    good(store, "calibrate", "one", "--steps", "4", "--timesteps", "4", "--samples", "4", "--name", "inputs")
    first = ("--activations", "int4", "--activation-intervals", "4")
    flags = (*first, "--temporal-scales", "--temporal-iterations", "2", "--temporal-intervals", "6")
    plain: Any = good(store, "quantize", "int4", *first)
    made: Any = good(store, "quantize", "int4", *flags)
    assert plain["id"] in str(made["inputs"]["model"])
    assert made["file_bytes"] == made["promised_bytes"] + made["activation_bytes"]
    tensors = load_file(made["file"])
    assert {len(t) for n, t in tensors.items() if ".activation_" in n} == {6}
    both: Any = good(store, "quantize", "int4", *flags, "--learn-steps", "--steps-iterations", "1")
    assert made["id"] in str(both["inputs"]["model"])
    assert both["activation_bytes"] == made["activation_bytes"]
    config = tmp_path / "fqdiff.toml"
    tables = '[activations]\nformat = "int4"\nintervals = 4\n[temporal-scales]\niterations = 2\nintervals = 6\n'
    config.write_text(tables)
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    for arguments, message in (
        ((*first, "--temporal-rate", "0.1"), "rate of scales that are no function of time"),
        (("--temporal-scales",), "scales by time of activations that stay float32"),
        (("--activations", "int4", "--temporal-scales"), "scales of one interval"),
        (("--activations", "int4", "--dynamic", "--temporal-scales"), "dynamic activations have no scales"),
    ):
        refused = call(store, "quantize", "int4", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_hidden_layers_are_the_papers() -> None:
    network = ScaleNetwork(32, torch.ones(1), generator(0, "d"))
    assert [(m.in_features, m.out_features) for m in network.layers if isinstance(m, torch.nn.Linear)] == [
        (32, module.HIDDEN), (64, 64), (64, 64), (64, 1),
    ]  # fmt: skip


def test_the_table_clips_nothing_that_depends_on_t_alone(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """Its networks are trained to ranges of whole intervals there: between the set's timesteps numbers may be larger."""
    made = learn_temporal_scales(checkpoint, start, calibration, TemporalConfig(intervals=25), 0, Context())
    seen = seen_by_time_alone(made)
    index = interval_of(torch.arange(1000), 25, 1000)
    assert seen
    for site, x in seen.items():
        ends = range_ends(made.activations[site])[index, 0]
        beyond = torch.maximum(-x.amin(dim=1) - ends[:, 0], x.amax(dim=1) - ends[:, 1])
        assert float((beyond / ends.sum(dim=1)).max()) < 0.1, site
