"""Learned activation steps: gradients are those of LSQ, blocks come closer, all else stays, and a stopped run goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fqdiff.calibration import steps as module
from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.reconstruct import BlockData, capture
from fqdiff.calibration.steps import learn_block, output_error, sites_within, trainable_network
from fqdiff.configs import (
    ActivationConfig,
    CalibrateConfig,
    NoiseCorrectionConfig,
    PlanConfig,
    QuantizeConfig,
    StepsConfig,
    config_data,
)
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.errors import ConfigError, LineageError, NumericalError
from fqdiff.models.registry import reconstruction_blocks, temporal_layers
from fqdiff.quant.activation_formats import fake_quantize, get_activation_format, zero_points
from fqdiff.quant.activations import SCALE, Activation
from fqdiff.quant.formats import PerChannel, get_format
from fqdiff.quant.learned_steps import LEAST_RATIO, LearnedSteps, can_learn_steps, quantize_by_step
from fqdiff.quant.packed import pack_tensor
from fqdiff.rng import generator
from fqdiff.stages.activation_steps import learn_activation_steps
from fqdiff.stages.activations import quantize_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.noise_correction import correct_noise
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint, predict_noise
from tests.test_cli import call, good
from tests.test_reconstruct import as_measured

FEW = StepsConfig(iterations=6, batch=8, inputs=24)
EVEN = ("int8", "int4", "int4sym", "uint4")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test steps"))


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    return calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=16), 0, Context())


@pytest.fixture(scope="module")
def start(checkpoint: Checkpoint, calibration: CalibrationSet) -> QuantizedCheckpoint:
    """W4A4 by the whole range, which is far too wide; two intervals, softmax by octaves, and the output quantized too."""
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int4"), 0, Context())
    weights = quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())
    config = ActivationConfig("int4", range="min-max", intervals=2, softmax="log2", last="int4sym")
    return quantize_activations(checkpoint, weights, calibration, config, 0, Context())


@pytest.fixture(scope="module")
def short(checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet) -> QuantizedCheckpoint:
    return learn_activation_steps(checkpoint, start, calibration, FEW, 0, Context())


def same(one: QuantizedCheckpoint, other: QuantizedCheckpoint) -> bool:
    return all(torch.equal(a.scale, other.activations[site].scale) for site, a in one.activations.items())  # type: ignore[arg-type]


# --- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVEN)
def test_gradients_equal_finite_differences_of_the_surrogate(name: str) -> None:
    """The surrogate in numpy: what rounding adds stays as it is, while the step and x move. Rejects a step whose gradient is
    that of the dequantizing product alone, round(x / s).
    """
    fmt = get_activation_format(name)
    x = (3 * normal(40)).double()
    s0 = 0.29
    z = 5.0 if fmt.has_zero_points else float(zero_points(fmt, torch.ones(1)))
    x = x.abs() if fmt.kind == "unsigned" else x

    def inside(values: Any, s: float) -> Any:
        return np.clip(values / s, -z, fmt.qmax - z)

    kept = np.round(inside(x.numpy(), s0)) - inside(x.numpy(), s0)
    outgoing = normal(40, seed=1).double().numpy()

    def surrogate(values: Any, s: float) -> float:
        return float((outgoing * (inside(values, s) + kept) * s).sum())

    step = torch.tensor([s0], dtype=torch.float64, requires_grad=True)
    given = x.clone().requires_grad_()
    out = quantize_by_step(given, step, torch.tensor([z], dtype=torch.float64), fmt.qmax)
    (out * torch.tensor(outgoing)).sum().backward()
    assert step.grad is not None
    assert given.grad is not None
    d = 1e-7
    slope = (surrogate(x.numpy(), s0 + d) - surrogate(x.numpy(), s0 - d)) / (2 * d)
    assert step.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-6)
    for k in range(0, 40, 7):
        moved = d * (np.arange(40) == k)
        slope = (surrogate(x.numpy() + moved, s0) - surrogate(x.numpy() - moved, s0)) / (2 * d)
        assert given.grad[k].item() == pytest.approx(slope, abs=1e-6)


def test_the_gradient_is_equation_3_of_the_paper_times_its_scale() -> None:
    """LSQ, eq. 3: round(v) - v within, the ends beyond; and 1 / sqrt(numbers that share the step x largest code)."""
    parts, s0 = (2, 3), torch.tensor([[0.3, 0.5], [0.2, 0.7]])
    zero = torch.tensor([[3, 8], [0, 15]], dtype=torch.uint8)
    quantizer = LearnedSteps(Activation("int4", "split", s0, zero), 1, parts)
    x, interval, outgoing = 2 * normal(6, 5, 4, 4), torch.tensor([0, 1, 1, 0, 1, 0]), normal(6, 5, 4, 4, seed=2)
    (quantizer(x, interval) * outgoing).sum().backward()
    expected = np.zeros((2, 2))
    channels = np.array([0, 0, 1, 1, 1])
    for b in range(6):
        for c in range(5):
            s, z = float(s0[interval[b], channels[c]]), int(zero[interval[b], channels[c]])
            v = x[b, c].numpy().astype(np.float64) / s
            slope = np.where(v <= -z, -z, np.where(v >= 15 - z, 15 - z, np.round(v) - v))
            expected[interval[b], channels[c]] += (slope * outgoing[b, c].numpy()).sum()
    expected *= s0.numpy() / np.sqrt(15 * 16 * np.array(parts))  # s = r s_0
    assert quantizer.ratio.grad is not None
    np.testing.assert_allclose(quantizer.ratio.grad.numpy(), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVEN)
def test_values_are_those_of_the_plain_quantizer_to_the_bit_and_a_step_keeps_its_sign(name: str) -> None:
    fmt = get_activation_format(name)
    scale = torch.tensor([[-0.31 if name.endswith("sym") else 0.31]])
    zero = torch.tensor([[7]], dtype=torch.uint8) if fmt.has_zero_points else None
    quantizer = LearnedSteps(Activation(name, "tensor", scale, zero), 1, (3,))
    x = 4 * normal(5, 3, 8)
    row = zero_points(fmt, scale) if zero is None else zero
    assert torch.equal(quantizer(x, torch.zeros(5, dtype=torch.int64)), fake_quantize(x, scale, row, fmt))
    with torch.no_grad():
        quantizer.ratio.fill_(-3)
    assert torch.equal(quantizer.steps(), scale * LEAST_RATIO)
    quantizer.settle(torch.tensor([[2.0]]))
    assert quantizer.steps().item() == 2
    assert abs(scale.item()) == pytest.approx(0.31)  # the model's own table stays


# --- one block -------------------------------------------------------------------------------------------------------


def one_site(spread: float = 1.0) -> tuple[torch.nn.Module, LearnedSteps, BlockData, Tensor, Callable[[Tensor], None]]:
    """A layer of ones whose input is quantized to 4 bits by far too wide a range."""
    layer = torch.nn.Linear(6, 4).requires_grad_(False)
    quantizer = LearnedSteps(Activation("int4sym", "tensor", torch.tensor([[2.0]])), -1, (6,))
    layer.register_forward_pre_hook(lambda m, a: (quantizer(a[0], torch.zeros(len(a[0]), dtype=torch.int64)),))
    x = spread * normal(400, 6)
    target = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return layer, quantizer, BlockData((x,), target), torch.zeros(400, dtype=torch.int64), lambda t: None


def test_the_step_learned_is_near_the_best_of_a_fine_grid() -> None:
    layer, quantizer, data, t, note = one_site()
    everything = torch.arange(400)
    errors = {}
    for s in np.geomspace(0.05, 2, 120):
        quantizer.settle(torch.tensor([[float(s)]]))
        errors[s] = output_error(layer, data, t, note, everything)
    quantizer.settle(torch.tensor([[2.0]]))
    config = StepsConfig(iterations=400, rate=0.02)
    learned = learn_block(layer, {"x": quantizer}, data, t, note, config, generator(0, "draw"))
    quantizer.settle(learned.steps["x"])
    found = output_error(layer, data, t, note, everything)
    assert found < 1.15 * min(errors.values()) < 0.1 * errors[max(errors)]
    assert learned.errors[0] == 1
    assert min(learned.errors) < 0.1


def test_the_best_steps_met_on_held_out_inputs_are_kept_those_of_the_start_included() -> None:
    layer, quantizer, data, t, note = one_site()
    held = torch.arange(400) % module.HELD_OUT == 0
    with torch.no_grad():
        good_one = layer(data.arguments[0]) + 0.01 * normal(400, 4, seed=3)
    torn = BlockData(data.arguments, torch.where(held[:, None], good_one, data.target))
    learned = learn_block(layer, {"x": quantizer}, torn, t, note, FEW, generator(0, "draw"))
    assert min(learned.errors) == 1 < learned.errors[-1]
    assert learned.steps["x"].item() == 2


def test_nan_is_refused_and_an_exact_block_is_left() -> None:
    layer, quantizer, data, t, note = one_site()
    broken = BlockData(data.arguments, data.target * torch.nan)
    with pytest.raises(NumericalError, match="NaN"):
        learn_block(layer, {"x": quantizer}, broken, t, note, FEW, generator(0, "d"))
    told: list[str] = []
    with torch.no_grad():
        exact = as_measured(data, layer)
    learned = learn_block(
        layer, {"x": quantizer}, exact, t, note, FEW, generator(0, "d"), tell=lambda n, text: told.append(text)
    )
    assert (told, learned.errors) == (["exact"], (0.0,))


# --- networks --------------------------------------------------------------------------------------------------------


def test_every_site_is_in_one_block(checkpoint: Checkpoint, start: QuantizedCheckpoint) -> None:
    network = checkpoint.network()
    found = [s for block in reconstruction_blocks(network) for s in sites_within(network, block, start.activations)]
    assert sorted(found) == sorted(start.activations)
    assert sites_within(network, "head", start.activations)[-1] == "output"
    assert "block2.attention.key" in sites_within(network, "block2.attention", start.activations)


def test_the_trainable_network_computes_the_same_and_a_block_is_given_what_no_quantizer_touched(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """With biases by timestep too, in a batch of mixed timesteps; the door of a single layer is watched before its quantizer."""
    table = {"block1.resample": normal(3, 32).half()[:, : checkpoint.tensors["block1.resample.bias"].numel()]}
    model = replace(start, timestep_bias=table)
    network, quantizers, note = trainable_network(model, torch.device("cpu"))
    x, t = calibration.x_t[::9], calibration.t[::9]
    with torch.no_grad():
        assert torch.equal(network(x, t), model.network()(x, t))
    inputs = CalibrationInputs(x, t)
    data = capture(checkpoint.network(), network, "block1.resample", inputs, torch.device("cpu"))
    assert len(data.arguments[0].unique()) > 100
    seen: list[Tensor] = []
    layer = network.get_submodule("block1.resample")
    handle = layer.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        network(x, t)
        note(t)
        layer(data.arguments[0])
        note(t.flip(0))
        layer(data.arguments[0])
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert isinstance(quantizers["block1.resample"], LearnedSteps)


def test_blocks_and_the_network_come_closer_and_only_steps_change(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet, tmp_path: Path
) -> None:
    config = StepsConfig(iterations=60, batch=16, rate=0.03)
    new = learn_activation_steps(checkpoint, start, calibration, config, 0, Context())
    other = calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=4), 1, Context())

    def noise_error(model: QuantizedCheckpoint) -> float:
        full, small = (predict_noise(checkpoint.spec, n) for n in (checkpoint.network(), model.network()))
        with torch.inference_mode():
            return float((small(other.x_t, other.t) - full(other.x_t, other.t)).square().mean())

    assert noise_error(new) < 0.8 * noise_error(start)
    assert new.packed is start.packed
    kept = temporal_layers(checkpoint.network())
    assert kept < new.activations.keys()
    for site in kept:  # the set lacks most timesteps that their scales are for
        assert torch.equal(new.activations[site].tensors[SCALE], start.activations[site].tensors[SCALE])
    for site, a in start.activations.items():
        b = new.activations[site]
        assert (a.format, a.granularity) == (b.format, b.granularity)
        assert a.zero_point is None or torch.equal(a.zero_point, b.zero_point)  # type: ignore[arg-type]
        if not can_learn_steps(a):
            assert site.endswith(".softmax")
            assert a is b
    sizes = []
    for name, model in (("start", start), ("new", new)):
        (tmp_path / name).mkdir()
        save_quantized(model, tmp_path / name)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]
    assert same(load_quantized(tmp_path / "new"), new)


def test_a_stopped_run_ends_alike_and_the_seed_matters(
    checkpoint: Checkpoint,
    start: QuantizedCheckpoint,
    calibration: CalibrationSet,
    short: QuantizedCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = MemoryParts()
    learn, begun = module.learn_block, []

    def stopping(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return learn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "learn_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            learn_activation_steps(checkpoint, start, calibration, FEW, 0, Context(parts=parts))
        assert len(parts.saved) == 3
        again = learn_activation_steps(checkpoint, start, calibration, FEW, 0, Context(parts=parts, batch_size=3))
    assert same(again, short)
    assert not same(short, start)
    assert not same(learn_activation_steps(checkpoint, start, calibration, FEW, 1, Context()), short)
    name, part = next(iter(parts.saved.items()))
    for broken in (Part({}, part.data), Part({k: t[:1] for k, t in part.tensors.items()}, part.data)):
        parts.save(name, broken)
        with pytest.raises(ConfigError, match="another recipe"):
            learn_activation_steps(checkpoint, start, calibration, FEW, 0, Context(parts=parts))


def test_blocks_that_come_when_no_time_is_left_stay_as_they_are(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks a minute when it is read: of two, one block or two. Rejects fixed costs of a block for every one."""
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    config, parts = StepsConfig(iterations=5, batch=4, inputs=16, minutes=2.0), MemoryParts()
    made = learn_activation_steps(checkpoint, start, calibration, config, 0, Context(parts=parts))
    assert 1 <= len(parts.saved) <= 2
    done = {site for part in parts.saved.values() for site in part.tensors}
    for site, a in made.activations.items():
        if site not in done:
            assert torch.equal(a.tensors[SCALE], start.activations[site].tensors[SCALE])


def test_minutes_shorten_the_schedule_and_a_recipe_without_them_is_what_it_was(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks a second when it is read. Rejects a schedule that is cut off, its rate still high, and new ids."""
    assert config_data(StepsConfig()) == {"iterations": 100, "batch": 16, "rate": 0.02, "inputs": 1024}
    config = StepsConfig(iterations=100_000, batch=4, inputs=16, minutes=4.0)
    assert config_data(config)["minutes"] == 4.0
    clock, rates = iter(range(10**9)), []
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    learn_activation_steps(checkpoint, start, calibration, config, 0, Context())
    assert next(clock) < 300  # a few ticks for each block beside its share
    falls = [k for k in range(1, len(rates)) if rates[k] > rates[k - 1]]
    assert len(falls) >= 10
    assert all(rates[k - 1] < 0.5 * config.rate for k in falls)


def test_what_cannot_be_learned_is_refused_by_name(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    def refused(model: QuantizedCheckpoint, given: CalibrationSet | None, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            learn_activation_steps(checkpoint, model, given, FEW, 0, Context())

    refused(replace(start, activations={}), calibration, LineageError, "not quantized")
    refused(start, None, LineageError, "without a calibration set")
    refused(start, replace(calibration, model="0" * 64), LineageError, "another model")
    refused(replace(start, packed={}), calibration, LineageError, "not of this checkpoint")
    few = replace(calibration, x_t=calibration.x_t[:1], t=calibration.t[:1])
    refused(start, few, ConfigError, "too few")
    dynamic = {s: replace(a, scale=None, zero_point=None) for s, a in start.activations.items()}
    refused(replace(start, activations=dynamic), calibration, ConfigError, "dynamic")
    noisy = correct_noise(checkpoint, start, calibration, NoiseCorrectionConfig(1), 0, Context())
    refused(noisy, calibration, LineageError, "corrected for the steps")
    name = "block3.res1.conv1.weight"
    phased = pack_tensor(checkpoint.tensors[name], get_format("int4:4/2"), PerChannel(0))
    refused(replace(start, packed={**start.packed, name: phased}), calibration, ConfigError, "phases")


def test_steps_of_what_depends_on_t_alone_are_learned_where_one_holds_for_all_timesteps(
    checkpoint: Checkpoint, start: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """Of several intervals they stay, since the set lacks most timesteps. Rejects steps that stay always, or never."""
    temporal = temporal_layers(checkpoint.network())
    weights = replace(start, activations={})
    moved = {}
    for intervals in (1, 2):
        config = ActivationConfig("int4", range="min-max", intervals=intervals)
        plain = quantize_activations(checkpoint, weights, calibration, config, 0, Context())
        made = learn_activation_steps(checkpoint, plain, calibration, FEW, 0, Context())
        moved[intervals] = {
            site
            for site, a in made.activations.items()
            if a.scale is not None and not torch.equal(a.scale, plain.activations[site].scale)  # type: ignore[arg-type]
        }
    assert moved[1] & temporal
    assert moved[2]
    assert not moved[2] & temporal


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"batch": 0}, {"inputs": 1}, {"rate": 0.0}, {"rate": 2.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        StepsConfig(**settings)


def test_the_command_learns_steps_after_activations_are_quantized(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(store, "plan", "--uniform", "int4", "--name", "int4")
    few = ("--steps", "4", "--timesteps", "4", "--samples", "4")
    good(store, "calibrate", "one", *few, "--name", "inputs")
    plain: Any = good(store, "quantize", "int4", "--activations", "int4")
    flags = ("--activations", "int4", "--learn-steps", "--steps-iterations", "2")
    made: Any = good(store, "quantize", "int4", *flags)
    assert plain["id"] in str(made["inputs"]["model"])
    assert made["inputs"].keys() == {"checkpoint", "model", "calibration"}
    assert made["file_bytes"] == plain["file_bytes"] == made["promised_bytes"] + made["activation_bytes"]
    both: Any = good(store, "quantize", "int4", *flags, "--noise-correction", "--noise-intervals", "1")
    assert made["id"] in str(both["inputs"]["model"])
    assert both["file_bytes"] == both["promised_bytes"] + both["activation_bytes"] + both["noise_correction_bytes"]
    config = tmp_path / "fqdiff.toml"
    config.write_text('[activations]\nformat = "int4"\n[activation-steps]\niterations = 2\n')
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    assert (
        good(store, "quantize", "int4", "--config", str(config), "--no-learn-steps", "--dry-run")["id"] == plain["id"]
    )
    for arguments, message in (
        (("--activations", "int4", "--steps-rate", "0.1"), "rate of activation steps that are not learned"),
        (("--learn-steps",), "learned steps of activations that stay float32"),
        (("--activations", "int4", "--dynamic", "--learn-steps"), "dynamic activations have no steps"),
    ):
        refused = call(store, "quantize", "int4", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
