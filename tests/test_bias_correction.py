"""Bias correction: means over calibration inputs come back, files keep their promised size, and nothing else changes."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fqdiff.calibration.bias import Shifts, output_shifts, watching
from fqdiff.calibration.inputs import CHUNK, CalibrationInputs, sampler_inputs
from fqdiff.configs import PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context
from fqdiff.diffusion.samplers import ddim
from fqdiff.errors import ArtifactCorrupt, ConfigError, QuantizationError
from fqdiff.quant.container import file_bytes, metadata, stored_tensors
from fqdiff.quant.packed import unpack_tensor
from fqdiff.quant.timestep_bias import add_timestep_bias, channel_axis, interval_of
from fqdiff.rng import generator
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import sample
from fqdiff.store.model_files import load_quantized, read_model, save_quantized
from fqdiff.store.pretrained import open_model
from fqdiff.store.store import Store
from fqdiff.values import (
    Checkpoint,
    Plan,
    PlanEntry,
    QuantizedCheckpoint,
    model_description,
    planned_bytes,
    predict_noise,
)
from tests import attacker
from tests.test_cli import call, good

STATIC = QuantizeConfig("static", calibration_images=6, calibration_steps=10)
TIMESTEP = replace(STATIC, bias_correction="timestep", bias_intervals=5)
CPU = torch.device("cpu")


def uniform(checkpoint: Checkpoint, fmt: str = "int3") -> Plan:
    return plan(checkpoint, None, None, PlanConfig("uniform", low=fmt), 0, Context())


def with_entries(checkpoint: Checkpoint, made: Plan, entries: Iterable[PlanEntry]) -> Plan:
    """``made`` with other entries, and the size that they promise."""
    given = tuple(entries)
    return replace(made, entries=given, file_bytes=planned_bytes(checkpoint.spec, given))


def only(checkpoint: Checkpoint, made: Plan, kept: Plan, layer: str) -> Plan:
    """``made`` for the weight of ``layer``, ``kept`` for all else."""
    pairs = zip(made.entries, kept.entries, strict=True)
    return with_entries(checkpoint, kept, (a if a.parameter == f"{layer}.weight" else b for a, b in pairs))


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> CalibrationInputs:
    """The very inputs that STATIC and TIMESTEP are corrected on with seed 0."""
    network = checkpoint.network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return sampler_inputs(checkpoint.spec, network, 6, 10, 0, CPU)


@pytest.fixture(scope="module")
def models(checkpoint: Checkpoint) -> dict[str, QuantizedCheckpoint]:
    made = uniform(checkpoint)
    configs = {"none": QuantizeConfig(), "static": STATIC, "timestep": TIMESTEP}
    return {name: quantize(checkpoint, made, None, config, 0, Context()) for name, config in configs.items()}


def layer_outputs(network: nn.Module, layer: str, inputs: CalibrationInputs) -> Tensor:
    """What ``layer`` puts out, its mean over positions, float64 [N, O]."""
    found: list[Tensor] = []
    module = network.get_submodule(layer)

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        rows = output.double().movedim(channel_axis(module), 1)
        found.append(rows.reshape(*rows.shape[:2], -1).mean(dim=2))

    handle = module.register_forward_hook(keep)
    with torch.inference_mode():
        network(inputs.x_t, inputs.t)
    handle.remove()
    return found[0]


# --- the calibration inputs ------------------------------------------------------------------------------------------


def test_calibration_inputs_are_what_the_sampler_gives_the_network(checkpoint: Checkpoint) -> None:
    """Against each image sampled alone. Rejects noised images, and labels that belong to the next x."""
    spec, network = checkpoint.spec, checkpoint.network()
    images, steps = CHUNK + 1, 4
    found = sampler_inputs(spec, network, images, steps, 7, CPU)
    assert len(found) == images * steps
    assert found.t.view(steps, images).tolist() == [[t] * images for t in (999, 749, 499, 249)]
    states = found.x_t.view(steps, images, *spec.image_shape)
    for k in (0, CHUNK):
        x = torch.randn(1, *spec.image_shape, generator=generator(7, "calibration", k))
        alone = [x]
        with torch.inference_mode():
            run = ddim(predict_noise(spec, network), x, spec.noise_schedule(), steps, torch.Tensor)
            alone += [state for _, state in run]
        torch.testing.assert_close(states[:, k], torch.cat(alone[:-1]), atol=1e-5, rtol=1e-5)


# --- means -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Linear layers over pixels, one after the other: a mean put right in one is right in all that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 5, 1), nn.Linear(5, 4), nn.ConvTranspose2d(4, 2, 2, stride=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x).movedim(1, -1)).movedim(-1, 1))
        return out


def test_a_linear_network_keeps_its_mean_output_exactly() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = Chain().requires_grad_(False), torch.randn(50, 3, 4, 4) + 1
        errors = {name: type(layer)(**sizes) for name, layer, sizes in chain_layers(network)}
    inputs = CalibrationInputs(x, torch.arange(50))
    shifts = output_shifts(network, {n: e.double().requires_grad_(False) for n, e in errors.items()}, inputs, 1, 50)
    before = network(x, inputs.t).double().mean(dim=(0, 2, 3))
    for name, error in errors.items():
        network.get_submodule(name).get_parameter("weight").data += error.weight.float()
    rounded = network(x, inputs.t).double().mean(dim=(0, 2, 3))
    for name, shift in shifts.items():
        network.get_submodule(name).get_parameter("bias").data -= shift.mean.float()
    after = network(x, inputs.t).double().mean(dim=(0, 2, 3))
    assert (rounded - before).abs().min() > 1e-2
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def chain_layers(network: Chain) -> list[tuple[str, nn.Module, dict[str, Any]]]:
    """Of each layer its name, itself, and how to make another of its kind without a bias."""
    return [
        ("a", network.a, {"in_channels": 3, "out_channels": 5, "kernel_size": 1, "bias": False}),
        ("b", network.b, {"in_features": 5, "out_features": 4, "bias": False}),
        ("c", network.c, {"in_channels": 4, "out_channels": 2, "kernel_size": 2, "stride": 2, "bias": False}),
    ]


@pytest.mark.parametrize(
    "layer",
    [
        "stem.conv",
        "stem.time.linear1",
        "block1.res1.conv1",
        "block2.resample",
        "block2.attention.qkv",
        "block5.resample",
        "head.output",
    ],
)
def test_a_corrected_layer_puts_out_its_full_precision_mean(
    checkpoint: Checkpoint, inputs: CalibrationInputs, layer: str
) -> None:
    """Strided, padded, transposed, over tokens and over embeddings; by timestep interval too, but for float16's rounding."""
    made = only(checkpoint, uniform(checkpoint), uniform(checkpoint, "float32"), layer)
    exact = layer_outputs(checkpoint.network(), layer, inputs)
    plain, static, timestep = (
        layer_outputs(quantize(checkpoint, made, None, config, 0, Context()).network(), layer, inputs) - exact
        for config in (QuantizeConfig(), STATIC, TIMESTEP)
    )
    assert plain.mean(dim=0).abs().max() > 1e-4
    torch.testing.assert_close(static.mean(dim=0), torch.zeros(static.shape[1]).double(), atol=1e-6, rtol=0)
    for k in range(5):
        rows = timestep[interval_of(inputs.t, 5, 1000) == k]
        torch.testing.assert_close(rows.mean(dim=0), torch.zeros(rows.shape[1]).double(), atol=2e-4, rtol=0)


def test_the_predicted_noise_shifts_less(
    checkpoint: Checkpoint, inputs: CalibrationInputs, models: Mapping[str, QuantizedCheckpoint]
) -> None:
    """Every layer rounded to 3 bits: the mean over all inputs, and the mean within each interval."""
    exact = layer_outputs(checkpoint.network(), "head.output", inputs)
    delta = {name: layer_outputs(m.network(), "head.output", inputs) - exact for name, m in models.items()}
    whole = {name: float(d.mean(dim=0).abs().mean()) for name, d in delta.items()}
    part = interval_of(inputs.t, 5, 1000)
    parts = {name: sum(float(d[part == k].mean().abs()) for k in range(5)) / 5 for name, d in delta.items()}
    assert whole["static"] < whole["none"] / 2
    assert parts["timestep"] < parts["static"] / 2
    assert parts["timestep"] < parts["none"] / 2


def test_layers_that_lost_nothing_are_left_alone(checkpoint: Checkpoint) -> None:
    made = uniform(checkpoint, "float32")
    same = quantize(checkpoint, made, None, TIMESTEP, 0, Context())
    assert not same.timestep_bias
    assert all(torch.equal(unpack_tensor(p), checkpoint.tensors[name]) for name, p in same.packed.items())


def test_only_biases_change_and_they_keep_their_format(
    checkpoint: Checkpoint, models: Mapping[str, QuantizedCheckpoint]
) -> None:
    plain, static = models["none"], models["static"]
    assert static.described == plain.described
    changed = {
        name
        for name, p in static.packed.items()
        if not torch.equal(unpack_tensor(p), unpack_tensor(plain.packed[name]))
    }
    assert changed == {f"{layer}.bias" for layer in models["timestep"].timestep_bias}
    entries = tuple(replace(e, format="float16") if e.parameter in changed else e for e in uniform(checkpoint).entries)
    half = quantize(checkpoint, with_entries(checkpoint, uniform(checkpoint), entries), None, STATIC, 0, Context())
    for name in changed:
        assert half.packed[name].parts["data"].dtype == torch.float16
        assert torch.equal(half.packed[name].parts["data"], static.packed[name].parts["data"].half())


# --- at run time -----------------------------------------------------------------------------------------------------


def test_a_table_is_a_bias_that_t_chooses(checkpoint: Checkpoint) -> None:
    """Against the network with each interval's row added to the stored biases; samples of one batch have their own t."""
    draw = generator(0, "tables")
    names = ("stem.time.linear2", "block1.res1.conv2", "block2.attention.out", "block4.resample", "head.output")
    network, x = checkpoint.network(), torch.randn(4, 1, 8, 8, generator=draw)
    sizes = {name: len(checkpoint.tensors[f"{name}.bias"]) for name in names}
    tables = {name: torch.randn(4, size, generator=draw).half() for name, size in sizes.items()}
    add_timestep_bias(network, tables, 1000)
    t = torch.tensor([0, 249, 250, 999])
    found = network(x, t)
    for n, k in enumerate((0, 0, 1, 3)):
        biases = {f"{name}.bias": checkpoint.tensors[f"{name}.bias"] + tables[name][k].float() for name in names}
        plain = checkpoint.spec.network({**checkpoint.tensors, **biases})
        torch.testing.assert_close(found[n : n + 1], plain(x[n : n + 1], t[n : n + 1]), atol=1e-5, rtol=1e-5)
    assert dict(network.named_parameters()).keys() == checkpoint.tensors.keys()


def test_intervals_share_the_timesteps_evenly() -> None:
    counts = interval_of(torch.arange(1000), 7, 1000).bincount()
    assert len(counts) == 7
    assert set(counts.tolist()) <= {142, 143}


# --- files -----------------------------------------------------------------------------------------------------------


def test_static_correction_keeps_the_promised_size_and_tables_add_theirs(
    checkpoint: Checkpoint, models: Mapping[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    promised = uniform(checkpoint).file_bytes
    path = tmp_path / "model.safetensors"
    save_quantized(models["static"], tmp_path)
    assert path.stat().st_size == promised
    save_quantized(models["timestep"], tmp_path)
    tables = models["timestep"].timestep_bias
    listed = {f"{layer}.timestep_bias": (t.dtype, tuple(t.shape)) for layer, t in tables.items()}
    described = models["timestep"].described
    meta = metadata(model_description(checkpoint.spec), described)
    assert path.stat().st_size == file_bytes(stored_tensors(described) | listed, meta)
    channels = sum(len(checkpoint.tensors[f"{layer}.bias"]) for layer in tables)
    assert sum(t.nbytes for t in tables.values()) == 2 * 5 * channels < path.stat().st_size - promised


@pytest.mark.parametrize("name", ["static", "timestep"])
def test_a_corrected_model_comes_back_from_its_file(
    models: Mapping[str, QuantizedCheckpoint], name: str, tmp_path: Path
) -> None:
    save_quantized(models[name], tmp_path)
    loaded = load_quantized(tmp_path)
    assert loaded.timestep_bias.keys() == models[name].timestep_bias.keys()
    assert all(torch.equal(t, loaded.timestep_bias[layer]) for layer, t in models[name].timestep_bias.items())
    config = SampleConfig(steps=4, count=3)
    images = sample(loaded, config, 0, Context()).images
    assert torch.equal(images, sample(models[name], config, 0, Context()).images)
    assert not torch.equal(images, sample(models["none"], config, 0, Context()).images)


@pytest.mark.parametrize(
    ("layer", "table"),
    [
        ("head.output", torch.full((5, 1), float("nan")).half()),
        ("head.output", torch.full((5, 1), float("inf")).half()),
        ("head.output", torch.zeros(5, 1)),
        ("head.output", torch.zeros(5, 1).bfloat16()),
        ("head.output", torch.zeros(5, 2).half()),
        ("head.output", torch.zeros(5).half()),
        ("head.output", torch.tensor(0).half()),
        ("head.output", torch.zeros(0, 1).half()),
        ("head.output", torch.zeros(4, 1).half()),
        ("head.nothing", torch.zeros(5, 1).half()),
        ("head", torch.zeros(5, 1).half()),
        ("", torch.zeros(5, 1).half()),
        ("block1.res1.norm1", torch.zeros(5, 4).half()),
        ("head.output.bias", torch.zeros(5, 1).half()),
    ],
)
def test_tables_that_do_not_fit_the_model_are_refused(
    models: Mapping[str, QuantizedCheckpoint], layer: str, table: Tensor, tmp_path: Path
) -> None:
    save_quantized(models["timestep"], tmp_path)
    path = tmp_path / "model.safetensors"
    rewrite(path, {f"{layer}.timestep_bias": table})
    with pytest.raises(ArtifactCorrupt, match="timestep bias"):
        read_model(path)


def test_more_intervals_than_timesteps_are_refused(models: Mapping[str, QuantizedCheckpoint], tmp_path: Path) -> None:
    tables = {name: torch.zeros(1001, t.shape[1]).half() for name, t in models["timestep"].timestep_bias.items()}
    save_quantized(replace(models["timestep"], timestep_bias=tables), tmp_path)
    with pytest.raises(ArtifactCorrupt, match="1001"):
        load_quantized(tmp_path)


def rewrite(path: Path, changes: Mapping[str, Tensor]) -> None:
    """The file again, with ``changes`` among its tensors."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    save_file({**load_file(path), **changes}, path, metadata=header["__metadata__"])


def test_a_model_with_tables_is_not_imported_without_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = quantize(checkpoint, uniform(checkpoint, "float16"), None, TIMESTEP, 0, Context())
    assert made.timestep_bias
    save_quantized(made, tmp_path)
    with pytest.raises(ArtifactCorrupt, match="biases by timestep"):
        open_model(str(tmp_path / "model.safetensors"))


def test_a_packed_network_has_its_tables_too(
    inputs: CalibrationInputs, models: Mapping[str, QuantizedCheckpoint]
) -> None:
    x, t = next(inputs.chunks())
    with torch.inference_mode():
        whole, packed = (n(x, t) for n in (models["timestep"].network(), models["timestep"].packed_network()))
        without = replace(models["timestep"], timestep_bias={}).packed_network()(x, t)
    torch.testing.assert_close(packed, whole, atol=0, rtol=0)
    assert not torch.equal(packed, without)


# --- what a result depends on ----------------------------------------------------------------------------------------


def test_the_seed_matters_and_batch_size_and_global_generator_do_not(
    checkpoint: Checkpoint, models: Mapping[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    save_quantized(models["timestep"], tmp_path)
    expected = (tmp_path / "model.safetensors").read_bytes()
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        save_quantized(quantize(checkpoint, uniform(checkpoint), None, TIMESTEP, 0, Context(batch_size=3)), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    save_quantized(quantize(checkpoint, uniform(checkpoint), None, TIMESTEP, 1, Context()), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != expected


def test_chunks_add_up(checkpoint: Checkpoint, inputs: CalibrationInputs) -> None:
    """The mean over all is that of the intervals, weighted by their counts; halves add up to the whole."""
    network = checkpoint.network()
    twin = {"head.late": nn.Conv2d(16, 8, 3, padding=1, bias=False).double().requires_grad_(False)}
    assert twin["head.late"].weight.shape == network.get_submodule("head.late").get_parameter("weight").shape
    whole = output_shifts(network, twin, inputs, 5, 1000)["head.late"]
    halves = [CalibrationInputs(inputs.x_t[s], inputs.t[s]) for s in (slice(0, 25), slice(25, None))]
    parts = [output_shifts(network, twin, half, 5, 1000)["head.late"] for half in halves]
    joined = Shifts(parts[0].total + parts[1].total, parts[0].count + parts[1].count)
    assert whole.count.tolist() == [12.0] * 5
    torch.testing.assert_close(joined.interval_means, whole.interval_means, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(joined.mean, whole.interval_means.mean(dim=0), atol=1e-6, rtol=1e-6)


def test_watching_leaves_no_hook_behind(checkpoint: Checkpoint) -> None:
    network = checkpoint.network()
    with pytest.raises(KeyError), watching(network, ["head.output"], lambda name, x: None):
        raise KeyError
    assert not network.get_submodule("head.output")._forward_pre_hooks


@pytest.mark.parametrize(
    "changes",
    [
        {"bias_correction": "dynamic"},
        {"bias_correction": "static", "bias_intervals": 5},
        {"bias_correction": "none", "calibration_images": 5},
        {"bias_correction": "static", "calibration_steps": 0},
    ],
)
def test_settings_that_say_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QuantizeConfig(**changes)


def test_an_interval_without_inputs_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="11 intervals for 10 calibration steps"):
        quantize(checkpoint, uniform(checkpoint), None, replace(TIMESTEP, bias_intervals=11), 0, Context())


def test_a_table_that_overflows_is_refused(checkpoint: Checkpoint) -> None:
    huge = {n: t * (1e9 if n == "head.output.weight" else 1) for n, t in checkpoint.tensors.items()}
    loud = replace(checkpoint, tensors=huge)
    with pytest.raises(QuantizationError, match="timestep biases of 'head"):
        quantize(loud, only(loud, uniform(loud), uniform(loud, "float32"), "head.output"), None, TIMESTEP, 0, Context())


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_both_sizes_and_size_shows_the_tables(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5")
    planned = good(store, "plan", "--uniform", "int4", "--name", "int4")
    static = good(store, "quantize", "int4", "--bias-correction", "static", "--calibration-images", "2")
    assert static["file_bytes"] == static["promised_bytes"] == planned["file_bytes"]
    assert static["timestep_bias_bytes"] == 0
    flags = ("--bias-correction", "timestep", "--bias-intervals", "4", "--calibration-images", "2")
    made: Any = good(store, "quantize", "int4", *flags)
    assert made["promised_bytes"] == planned["file_bytes"]
    assert made["file_bytes"] == made["promised_bytes"] + made["timestep_bias_bytes"] > made["promised_bytes"]
    told = call(store, "quantize", "int4", *flags).stdout
    assert f"the plan's {made['promised_bytes']:,} and {made['timestep_bias_bytes']:,} of biases by timestep" in told
    found: Any = good(store, "size", str(made["id"]))
    tables = {n: t for n, t in load_file(made["file"]).items() if n.endswith(".timestep_bias")}
    assert found["kinds"]["timestep_bias"] == sum(t.nbytes for t in tables.values()) > 0
    assert sum(found["kinds"].values()) == found["file_bytes"] == made["file_bytes"]
    rows = {row["tensor"]: row["timestep_bias"] for row in found["tensors"]}
    assert rows["head.output.bias"] == 2 * 4 * 1
    assert rows["head.output.weight"] == 0
    assert "timestep bias" in call(store, "size", str(made["id"])).stdout
    assert "timestep bias" not in call(store, "size", str(static["id"])).stdout
    config = tmp_path / "fqdiff.toml"
    config.write_text('[quantize]\nbias_correction = "timestep"\nbias_intervals = 4\ncalibration_images = 2\n')
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    other, same = (good(store, "quantize", "int4", "--seed", "1", *f, "--dry-run")["id"] for f in (flags, ()))
    assert other != made["id"]
    assert same == good(store, "quantize", "int4", "--dry-run")["id"]
    # A plan edited to promise less is not explained by biases that nobody asked for.
    opened = Store(store)
    edited = opened.resolve("int4")
    data = json.loads((opened.directory("plan", edited.id) / "plan.json").read_text())
    size = data["totals"]["file_bytes"] - 8
    data["totals"] |= {"file_bytes": size, "bits_per_weight": 8 * size / data["totals"]["parameters"]}
    attacker.rewrite(opened, edited, "plan.json", json.dumps(data).encode())
    refused = call(store, "quantize", "int4", "--bias-correction", "static", "--calibration-images", "2")
    assert (refused.exit_code, "biases by timestep" in refused.stderr) == (1, False)
    assert f"takes {size + 8:,} bytes, and its plan promises {size:,}" in refused.stderr
