"""Quantized activations: formulas, ranges, sites, tables by timestep, files; and that sampling needs no calibration data."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fqdiff.calibration.activations import observe, passes, spread_positions
from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.ranges import DISTANCES, WIDTHS, activation_range
from fqdiff.calibration.temporal import range_ends
from fqdiff.configs import (
    ACTIVATION_RANGES,
    ActivationConfig,
    CalibrateConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
    config_data,
)
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, LineageError, NumericalError, QuantizationError
from fqdiff.models.registry import build, skip_boundaries, temporal_layers
from fqdiff.quant.activation_formats import (
    FORMATS,
    activation_qparams,
    fake_quantize,
    get_activation_format,
    softmax_format,
    zero_points,
)
from fqdiff.quant.activation_sites import OUTPUT, activation_sites, channel_parts, grouped, tap, watching
from fqdiff.quant.activations import Activation, activation_layout, add_activation_quantizers
from fqdiff.quant.container import file_bytes, stored_tensors
from fqdiff.quant.formats import PerTensor, get_format
from fqdiff.quant.packed import pack_tensor
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.rng import generator
from fqdiff.stages.activations import planned_activations
from fqdiff.stages.activations import quantize_activations as activations_stage
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import sample
from fqdiff.store.model_files import load_quantized, quantized_metadata, read_model, save_quantized
from fqdiff.store.pretrained import open_model
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint
from tests.test_bias_correction import rewrite
from tests.test_cli import call, good

LINEAR = [name for name, f in FORMATS.items() if f.kind != "log"]
LOG = [name for name, f in FORMATS.items() if f.kind == "log"]


def even(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every number for itself."""
    return x, torch.ones_like(x)


def normal(*shape: int, label: str = "numbers") -> Tensor:
    return torch.randn(*shape, generator=generator(0, "test activations", label))


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    config = CalibrateConfig(steps=10, timesteps=10, samples=4)
    return calibrate(checkpoint, None, None, config, 0, Context())


@pytest.fixture(scope="module")
def weights(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int4"), 0, Context())
    return quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())


@pytest.fixture(scope="module")
def models(
    checkpoint: Checkpoint, weights: QuantizedCheckpoint, calibration: CalibrationSet
) -> dict[str, QuantizedCheckpoint]:
    configs = {
        "int8": ActivationConfig(),
        "int8 by channel": ActivationConfig(granularity="channel", range="min-max"),
        "int4 table": ActivationConfig(
            "int4", range="percentile", intervals=5, softmax="log-sqrt2", first="int8", last="int8sym"
        ),
        "dynamic": ActivationConfig("int6", dynamic=True, softmax="log2"),
    }
    return {
        name: activations_stage(checkpoint, weights, None if config.dynamic else calibration, config, 0, Context())
        for name, config in configs.items()
    }


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
@settings(max_examples=25, deadline=None)
@given(low=st.floats(-50, 0), high=st.floats(0, 50))
def test_inside_the_range_the_error_is_at_most_half_a_step(name: str, low: float, high: float) -> None:
    fmt = get_activation_format(name)
    low = 0.0 if fmt.kind == "unsigned" else low
    x = torch.linspace(low, high, 501)
    qparams = activation_qparams(torch.tensor([low]), torch.tensor([high]), fmt)
    back = fake_quantize(x, qparams.scale, qparams.zero_point, fmt)
    assert (back - x).abs().max() <= qparams.scale.abs().max() * 0.5001 + 1e-6 * max(-low, high)
    assert torch.equal(fake_quantize(back, qparams.scale, qparams.zero_point, fmt), back)
    assert float(fake_quantize(torch.zeros(1), qparams.scale, qparams.zero_point, fmt)) == 0
    assert len(back.unique()) <= 2**fmt.bits


@pytest.mark.parametrize("name", ["int6", "int4sym", "uint4"])
def test_linear_formats_equal_numpys_formula(name: str) -> None:
    fmt = get_activation_format(name)
    x = normal(1000) * 3
    x = x.abs() if fmt.kind == "unsigned" else x
    qparams = activation_qparams(x.amin()[None] / 2, x.amax()[None] / 2, fmt)  # half of it saturates
    s, z = qparams.scale.numpy(), {"affine": qparams.zero_point.numpy(), "symmetric": 8, "unsigned": 0}[fmt.kind]
    expected = s * (np.clip(np.rint(x.numpy() / s) + z, 0, 2**fmt.bits - 1) - z)
    found = fake_quantize(x, qparams.scale, qparams.zero_point, fmt).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert zero_points(fmt, qparams.scale).item() == z or fmt.kind == "affine"


@pytest.mark.parametrize("name", LOG)
def test_logarithmic_formats_equal_the_papers_formula(name: str) -> None:
    """RepQ-ViT's: 2^-ceil(q / 2) sqrt(2)^[q odd] for base sqrt 2; codes beyond the last become 0."""
    fmt, delta = get_activation_format(name), 0.8
    x = np.concatenate([np.geomspace(1e-12, 1.0, 4000), [0.0]]).astype(np.float32)
    with np.errstate(divide="ignore"):
        q = np.rint(-fmt.per_octave * np.log2(x.astype(np.float64) / delta))
    clipped = np.clip(q, 0, 2**fmt.bits - 1)
    if fmt.per_octave == 1:
        back = delta * 2.0**-clipped
    else:
        back = delta * 2.0 ** -np.ceil(clipped / 2) * np.where(clipped % 2 == 1, np.sqrt(2), 1.0)
    expected = np.where(q > 2**fmt.bits - 1, 0, back)
    found = fake_quantize(torch.from_numpy(x), torch.tensor(delta), torch.tensor(0, dtype=torch.uint8), fmt).numpy()
    border = (
        np.abs(-fmt.per_octave * np.log2(np.maximum(x, 1e-30) / delta) % 1 - 0.5) < 1e-3
    )  # float32 may go either way
    np.testing.assert_allclose(found[~border], expected[~border], rtol=1e-5)
    assert found[-1] == 0
    inside = (expected > 0) & (x <= delta)
    assert (np.abs(np.log2(found[inside] / x[inside])) <= 0.501 / fmt.per_octave).all()


def test_nan_stays_nan() -> None:
    for fmt in FORMATS.values():
        assert torch.isnan(fake_quantize(torch.tensor([float("nan")]), torch.ones(1), torch.zeros(1).byte(), fmt)).all()


# --- ranges ----------------------------------------------------------------------------------------------------------


def brute_force(x: Tensor, low: float, high: float, bits: int, metric: str) -> float:
    """The least distance over a grid of all pairs of ends, in numpy."""
    a, best = x.double().numpy(), float("inf")
    for i in range(1, 51):
        for j in range(1, 51):
            scale = np.float32((high * j - low * i) / 50 / (2**bits - 1))
            zero = np.clip(np.rint(-low * i / 50 / scale), 0, 2**bits - 1)
            back = scale * (np.clip(np.rint(a / scale) + zero, 0, 2**bits - 1) - zero)
            if metric == "mse":
                error = np.sum((back - a) ** 2)
            elif metric == "l1":
                error = np.sum(np.abs(back - a))
            else:
                error = 1 - back @ a / max(np.linalg.norm(back) * np.linalg.norm(a), 1e-300)
            best = min(best, float(error))
    return best


@pytest.mark.parametrize("metric", ["mse", "l1", "cosine"])
def test_the_search_comes_close_to_brute_force_over_both_ends(metric: str) -> None:
    """The high end has outliers, and the low end must stay where it is. Rejects a search over one width alone."""
    x = 2 * torch.rand(1, 3000, generator=generator(0, "uniform")) - 1
    x[0, :2] = 3.0
    fmt, low, high = get_activation_format("int4"), x.amin(dim=1), x.amax(dim=1)
    found = activation_range(*even(x), low, high, fmt, metric)
    error = float(DISTANCES[metric](*even(x), found, fmt, low, high))
    assert error <= 1.05 * brute_force(x[0], float(low), float(high), 4, metric)
    joint = [activation_qparams(c * low, c * high, fmt) for c in WIDTHS]
    assert error < 0.9 * min(float(DISTANCES[metric](*even(x), q, fmt, low, high)) for q in joint)


@pytest.mark.parametrize("span", [r for r in ACTIVATION_RANGES if r != "min-max"])
def test_a_number_of_weight_three_counts_as_three(span: str) -> None:
    x = normal(2, 2000)
    fmt, low, high = get_activation_format("int4"), x.amin(dim=1), x.amax(dim=1)
    weights = 1 + 2 * (torch.arange(2000) % 3 == 0).float().expand(2, -1)
    repeated = torch.stack([row.repeat_interleave(weights[0].long()) for row in x])
    expected = activation_range(*even(repeated), low, high, fmt, span)
    found = activation_range(x, weights, low, high, fmt, span)
    assert torch.equal(found.zero_point, expected.zero_point)
    torch.testing.assert_close(found.scale, expected.scale)


def reference_divergence(x: np.ndarray[Any, Any], low: float, high: float, top: float, levels: int) -> float:
    """KL divergence written out bin by bin, for unsigned codes from 0 to ``top``."""
    counts, edges = np.histogram(x, 2048, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    step = top / (levels - 1)
    last = max(i for i, c in enumerate(centres) if c <= top + step / 2)
    p = counts[: last + 1].astype(float)
    q = np.zeros_like(p)
    codes = [min(round(c / step), levels - 1) for c in centres[: last + 1]]
    for code in set(codes):
        members = [i for i, c in enumerate(codes) if c == code and p[i] > 0]
        for i in members:
            q[i] = sum(p[j] for j in members) / len(members)
    p[last] += counts[last + 1 :].sum()
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0))


def test_the_divergence_equals_one_written_out() -> None:
    x = normal(1, 5000).abs()
    fmt, low, high = get_activation_format("uint4"), torch.zeros(1), x.amax(dim=1)
    for width in (1.0, 0.7, 0.4):
        qparams = activation_qparams(low, width * high, fmt)
        found = float(DISTANCES["kl"](*even(x), qparams, fmt, low, high))
        assert found == pytest.approx(
            reference_divergence(x[0].numpy(), 0, float(high), width * float(high), 16), rel=0.02
        )


def test_every_range_holds_per_scale_what_it_would_alone() -> None:
    """Scales of one site are chosen apart. Rejects an error summed over them."""
    x = normal(3, 800) * torch.tensor([[0.1], [1.0], [30.0]])
    for fmt in (get_activation_format("int4"), get_activation_format("int6sym")):
        for span in ACTIVATION_RANGES:
            together = activation_range(*even(x), x.amin(dim=1), x.amax(dim=1), fmt, span)
            for g in range(3):
                alone = activation_range(*even(x[g : g + 1]), x[g].amin()[None], x[g].amax()[None], fmt, span)
                assert torch.equal(together.scale[g : g + 1], alone.scale)
                assert torch.equal(together.zero_point[g : g + 1], alone.zero_point)


def test_a_softmax_is_searched_for_in_its_own_formats() -> None:
    x = torch.softmax(4 * normal(1, 64, 64), dim=-1).reshape(1, -1)
    errors = {}
    for name in ("uniform", "log2", "log-sqrt2"):
        fmt = softmax_format(name, 4)
        qparams = activation_range(*even(x), x.amin(dim=1), x.amax(dim=1), fmt, "mse")
        back = fake_quantize(x, qparams.scale, qparams.zero_point, fmt)
        errors[name] = float(((back - x).abs() / x)[x > 0.01].mean())  # 4 bits of base sqrt 2 reach down to 0.006
        assert int(qparams.zero_point) == 0
    assert errors["log-sqrt2"] < errors["log2"] < errors["uniform"]


# --- sites and taps --------------------------------------------------------------------------------------------------


def test_sites_are_all_layers_both_products_of_attention_and_the_output(checkpoint: Checkpoint) -> None:
    network = checkpoint.network()
    sites = activation_sites(network)
    layers = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)}
    operands = {f"block{b}.attention.{o}" for b in (2, 6) for o in ("query", "key", "value", "softmax")}
    assert sites.keys() == layers | operands | {OUTPUT}
    seen: dict[str, tuple[int, ...]] = {}
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])
    with watching(network, sites, lambda site, x: seen.__setitem__(site, tuple(x.shape))):
        network(x, t)
    assert seen.keys() == sites.keys()
    assert seen["block2.attention.softmax"] == (2, 2, 16, 16)
    assert seen["block2.attention.query"] == seen["block2.attention.value"] == (2, 2, 16, 4)
    assert seen[OUTPUT] == (2, 1, 8, 8)


def test_watching_changes_no_output_and_is_gone_afterwards(checkpoint: Checkpoint) -> None:
    network, x, t = checkpoint.network(), normal(3, 1, 8, 8), torch.tensor([0, 500, 999])
    before = network(x, t)
    with watching(network, activation_sites(network), lambda site, x: None):
        torch.testing.assert_close(network(x, t), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(network(x, t), before)
    with pytest.raises(KeyError), watching(network, ["head.output"], lambda site, x: None):
        raise KeyError
    assert not network.get_submodule("head.output")._forward_pre_hooks


@pytest.mark.parametrize("operand", ["query", "key", "value", "softmax"])
def test_what_an_operand_becomes_is_what_attention_multiplies(checkpoint: Checkpoint, operand: str) -> None:
    network, x = checkpoint.network(), normal(2, 8, 4, 4)
    attention: Any = network.get_submodule("block2.attention")
    expected_parts = attention.qkv(x.flatten(2).mT).view(2, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k, v = (
        2 * p if name == operand else p for name, p in zip(("query", "key", "value"), expected_parts, strict=True)
    )
    mixed = (torch.softmax(q @ k.mT / 2, dim=-1) * (2 if operand == "softmax" else 1)) @ v
    expected = x + attention.out(mixed.transpose(1, 2).reshape(2, 16, 8)).mT.view(2, 8, 4, 4)
    release = tap(network, f"block2.attention.{operand}", lambda x: 2 * x)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
    release()
    plain = attention(x)
    assert not torch.allclose(plain, expected)


def test_boundaries_are_where_the_skips_begin(checkpoint: Checkpoint) -> None:
    """A NaN on one side of each concatenation shows up on that side of every layer named, and in no other group."""
    network = checkpoint.network()
    borders = skip_boundaries(network)
    assert borders.keys() == {"block5.res1.conv1", "block6.res1.conv1", "head.late"}
    for site, skip in (
        ("head.late", "block1.res2"),
        ("block6.res1.norm1", "block2.res2"),
        ("block5.res1.norm1", "block3.res2"),
    ):
        marked: list[Tensor] = []
        skipped = network.get_submodule(skip).register_forward_hook(lambda m, a, out: torch.full_like(out, 7.0))
        seen = network.get_submodule(site).register_forward_pre_hook(lambda m, a, marked=marked: marked.append(a[0]))
        network(torch.zeros(1, 1, 8, 8), torch.tensor([5]))
        skipped.remove()
        seen.remove()
        border = borders[site.replace("norm1", "conv1")]
        spread = (
            (marked[0] - marked[0][:, :, :1, :1]).abs().amax(dim=(0, 2, 3))
        )  # of a skip of one number: only the time's
        assert (spread[border:] == 0).all()
        assert (spread[:border] > 0).all()


def test_groups_are_neighbouring_channels() -> None:
    x = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert [g.tolist() for g in grouped(x, 1, (5,))] == [x.reshape(2, 1, 15).tolist()]
    assert [g.tolist() for g in grouped(x, 1, (1,) * 5)] == [x.tolist()]
    assert [g.shape for g in grouped(x, 1, channel_parts("split", 5, 2))] == [(2, 1, 6), (2, 1, 9)]
    assert torch.equal(grouped(x, -1, (1, 1, 1))[0], x.movedim(-1, 1))


# --- observing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_what_is_observed_is_what_is_computed(
    checkpoint: Checkpoint, calibration: CalibrationSet, granularity: str
) -> None:
    """Extremes of every interval against the network run on that interval alone; kept numbers are some of the real ones."""
    network, inputs = checkpoint.network(), CalibrationInputs(calibration.x_t, calibration.t)
    sites = activation_sites(network)
    names = ("stem.time.linear1", "block2.attention.softmax", "block4.resample", "head.late", OUTPUT)
    parts = {n: channel_parts(granularity, sites[n], None) for n in names}
    found = observe(network, parts, inputs, interval_of(inputs.t, 5, 1000), 5)
    for k in (0, 3):
        rows = torch.div(inputs.t * 5, 1000, rounding_mode="floor") == k
        computed: dict[str, Tensor] = {}
        with watching(network, names, computed.__setitem__):
            network(inputs.x_t[rows], inputs.t[rows])
        for name in names:
            axis = -1 if name == "stem.time.linear1" else 1
            values = computed[name].movedim(axis, 0).flatten(1)
            values = values if granularity == "channel" else values.reshape(1, -1)
            torch.testing.assert_close(found[name].low[k], values.amin(dim=1), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[name].high[k], values.amax(dim=1), atol=1e-5, rtol=1e-4)
            (kept,) = found[name].numbers[k]
            assert len(kept) == len(values)
            distance = (kept[:, :50, None] - values[:, None, :]).abs().amin(dim=2)
            assert distance.max() < 1e-4 * (1 + values.abs().max())


def test_extremes_of_every_input_go_with_the_numbers(checkpoint: Checkpoint, calibration: CalibrationSet) -> None:
    """Weights add up to all numbers there are, and the largest of every input is among them."""
    many = CalibrationInputs(calibration.x_t.repeat(40, 1, 1, 1), calibration.t.repeat(40))
    seen = observe(checkpoint.network(), {OUTPUT: (1,)}, many, torch.zeros_like(many.t), 1)[OUTPUT]
    ((numbers, weights),) = seen.weighted(0)
    assert seen.totals == [[1600 * 64]]
    assert float(weights.sum()) == pytest.approx(1600 * 64 + 2 * 1600, rel=1e-4)
    with torch.inference_mode():
        largest = checkpoint.network()(calibration.x_t, calibration.t).amax(dim=(1, 2, 3))
    assert (numbers[0][None] - largest[:, None]).abs().amin(dim=1).max() < 1e-5
    few = CalibrationInputs(calibration.x_t, calibration.t)
    ((numbers, weights),) = observe(checkpoint.network(), {OUTPUT: (1,)}, few, torch.zeros_like(few.t), 1)[
        OUTPUT
    ].weighted(0)
    assert weights.unique().tolist() == [1.0]
    assert numbers.shape == (1, 40 * 64)


def test_kept_positions_are_spread_evenly_over_inputs() -> None:
    places = spread_positions(7, 400, 8, 100)
    assert places.shape == (400, 8)
    counts = places.flatten().bincount(minlength=100)
    assert 28 <= int(counts.min()) <= int(counts.max()) <= 36
    assert torch.equal(places[3:], spread_positions(10, 397, 8, 100))
    assert spread_positions(0, 2, 100, 100).tolist() == [list(range(100))] * 2


def test_memory_is_bounded_by_several_passes() -> None:
    parts = {f"s{i}": (1,) * 4096 for i in range(100)}
    cut = passes(parts, 20, 1000)
    assert [s for group in cut for s in group] == list(parts)
    assert len(cut) > 1
    assert max(len(group) * 4 * 4096 * (20 * 512 + 2000) for group in cut) <= 2**28
    assert passes(parts, 20, 1000, keep_numbers=False) == [list(parts)]


def test_what_cannot_be_observed_is_refused(checkpoint: Checkpoint, calibration: CalibrationSet) -> None:
    inputs = CalibrationInputs(calibration.x_t, calibration.t)
    with pytest.raises(ConfigError, match="1 of 11 intervals of timesteps hold no"):
        observe(checkpoint.network(), {OUTPUT: (1,)}, inputs, interval_of(inputs.t, 11, 1000), 11)
    broken = CalibrationInputs(inputs.x_t * float("nan"), inputs.t)
    with pytest.raises(NumericalError, match=r"activations at 'stem.conv' are NaN"):
        observe(checkpoint.network(), {"stem.conv": (1,)}, broken, torch.zeros_like(inputs.t), 1)


# --- the network -----------------------------------------------------------------------------------------------------


def written_out(network: nn.Module, activations: Mapping[str, Activation], x: Tensor, t: Tensor, k: int) -> Tensor:
    """The network with row k of every table, each site quantized by a formula of its own."""
    sites, borders = activation_sites(network), skip_boundaries(network)

    def transform(site: str, a: Activation) -> Any:
        fmt = get_activation_format(a.format)
        assert a.scale is not None
        parts = torch.tensor(channel_parts(a.granularity, sites[site], borders.get(site)))
        scale = a.scale[k].repeat_interleave(parts)
        zero = (zero_points(fmt, a.scale) if a.zero_point is None else a.zero_point)[k].repeat_interleave(parts)
        last = isinstance(network.get_submodule(site), nn.Linear) if site in dict(network.named_modules()) else False

        def quantized(x: Tensor) -> Tensor:
            channels = x.movedim(-1 if last else 1, 0)
            each = [fake_quantize(c, s, z, fmt) for c, s, z in zip(channels, scale, zero, strict=True)]
            return torch.stack(each).movedim(0, -1 if last else 1).contiguous()

        return quantized

    releases = [tap(network, site, transform(site, a)) for site, a in activations.items()]
    out: Tensor = network(x, t)
    for release in releases:
        release()
    return out


@pytest.mark.parametrize("name", ["int8", "int8 by channel", "int4 table"])
def test_a_mixed_batch_takes_for_each_sample_the_row_of_its_timestep(
    models: Mapping[str, QuantizedCheckpoint], name: str
) -> None:
    """Against the plain network, site by site and timestep by timestep. Rejects one row for a whole batch."""
    model = models[name]
    intervals = 5 if name == "int4 table" else 1
    x, t = normal(4, 1, 8, 8), torch.tensor([0, 199, 200, 999])
    found = model.network()(x, t)
    plain = replace(model, activations={}).network()
    for n, timestep in enumerate(t.tolist()):
        by_row = written_out(plain, model.activations, x, t, timestep * intervals // 1000)
        torch.testing.assert_close(found[n], by_row[n], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain(x, t), atol=1e-4)


def test_split_equals_unsplit_when_both_ranges_agree(weights: QuantizedCheckpoint) -> None:
    x, t = normal(3, 1, 8, 8), torch.tensor([3, 500, 999])
    outputs = {}
    for how, groups in (("split", 2), ("tensor", 1)):
        scale, zero = torch.full((1, groups), 0.05), torch.full((1, groups), 90, dtype=torch.uint8)
        made = {site: Activation("int8", how, scale, zero) for site in ("block5.res1.conv1", "head.late")}
        outputs[how] = replace(weights, activations=made).network()(x, t)
    assert torch.equal(outputs["split"], outputs["tensor"])
    apart = Activation("int8", "split", torch.tensor([[0.05, 0.5]]), torch.tensor([[90, 90]], dtype=torch.uint8))
    assert not torch.equal(replace(weights, activations={"head.late": apart}).network()(x, t), outputs["split"])


def test_a_skip_of_another_range_is_worth_a_split() -> None:
    """Two halves whose ranges differ a hundredfold, at 4 bits: one scale for both leaves nothing of the smaller one."""
    x = torch.cat([normal(1, 1, 500) * 0.01, normal(1, 1, 500)], dim=1)
    fmt = get_activation_format("int4")
    errors = []
    for parts in ((2,), (1, 1)):
        (rows,) = grouped(x, 1, parts)
        rows = rows[0]
        qparams = activation_range(*even(rows), rows.amin(dim=1), rows.amax(dim=1), fmt, "mse")
        back = fake_quantize(rows, qparams.scale[:, None], qparams.zero_point[:, None], fmt).reshape(2, 500)
        errors.append(float((back - x[0])[0].square().mean() / x[0, 0].square().mean()))
    assert errors[0] > 0.5
    assert errors[1] < 0.05


def test_dynamic_ranges_are_each_samples_own(models: Mapping[str, QuantizedCheckpoint]) -> None:
    """Batches do not matter, and a tensor is quantized between its own extremes."""
    network = models["dynamic"].network()
    x, t = normal(3, 1, 8, 8) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1), torch.tensor([0, 500, 999])
    together = network(x, t)
    for n in range(3):
        torch.testing.assert_close(network(x[n : n + 1], t[n : n + 1]), together[n : n + 1], atol=1e-4, rtol=1e-3)
    quantizer: Any = network.get_submodule("head.late.input_quantizer")
    given = normal(2, 16, 4, 4) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1)
    back = quantizer(given, torch.zeros(2, dtype=torch.int64))
    for n in range(2):
        for half in (slice(0, 12), slice(12, 16)):
            part = given[n, half]
            step = (float(part.max().clamp(min=0)) - float(part.min().clamp(max=0))) / 63
            assert (back[n, half] - part).abs().max() <= 0.5001 * step


def test_eight_bits_are_close_and_four_are_further(
    checkpoint: Checkpoint, weights: QuantizedCheckpoint, models: Mapping[str, QuantizedCheckpoint]
) -> None:
    x, t = normal(20, 1, 8, 8), torch.linspace(0, 999, 20).long()
    exact = weights.network()(x, t)
    error = {
        name: float((m.network()(x, t) - exact).square().mean() / exact.square().mean()) for name, m in models.items()
    }
    assert error["int8"] < 0.01
    assert error["int8 by channel"] < 0.01
    assert error["int8"] < error["dynamic"] < error["int4 table"]


def test_a_packed_network_quantizes_the_same(models: Mapping[str, QuantizedCheckpoint]) -> None:
    x, t = normal(3, 1, 8, 8), torch.tensor([3, 500, 999])
    for model in models.values():
        torch.testing.assert_close(model.packed_network()(x, t), model.network()(x, t), atol=0, rtol=0)
        assert dict(model.network().named_parameters()).keys() == model.packed.keys()
        assert model.network().state_dict().keys() == model.packed.keys()


def test_phases_of_timesteps_and_activations_go_together(
    checkpoint: Checkpoint, calibration: CalibrationSet, models: Mapping[str, QuantizedCheckpoint]
) -> None:
    """A batch over two phases against its samples alone. Rejects an output quantized once more, with rows of another phase."""
    fmt = get_format("int8:8/3")
    tensors = checkpoint.tensors.items()
    packed = {n: pack_tensor(t, fmt if t.ndim > 1 else get_format("float32"), PerTensor()) for n, t in tensors}
    phased = QuantizedCheckpoint(checkpoint.spec, packed)
    config = ActivationConfig("int4", range="percentile", intervals=4, first="int8", last="int4")
    made = activations_stage(checkpoint, phased, calibration, config, 0, Context())
    x, t = normal(4, 1, 8, 8), torch.tensor([0, 499, 500, 999])
    assert made.phases == 2
    network = made.network()
    together, alone = network(x, t), torch.cat([network(x[:2], t[:2]), network(x[2:], t[2:])])
    torch.testing.assert_close(together, alone, atol=0, rtol=0)
    rows = calibration.t < 500
    seen: dict[str, Tensor] = {}
    with watching(plain := phased.network(), ["head.late"], seen.__setitem__):
        plain(calibration.x_t[rows], calibration.t[rows])
    found = activations_stage(
        checkpoint, phased, calibration, replace(config, range="min-max", intervals=2), 0, Context()
    ).activations["head.late"]
    low, high = seen["head.late"][:, :12].amin().clamp(max=0), seen["head.late"][:, :12].amax().clamp(min=0)
    assert found.scale is not None
    assert float(found.scale[0, 0]) == pytest.approx(float(high - low) / 15, rel=1e-4)


def test_ends_are_quantized_by_choice(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    plain = planned_activations(spec, ActivationConfig())
    assert activation_sites(build(spec.architecture, "meta")).keys() - plain.keys() == {"stem.conv", OUTPUT}
    both = planned_activations(spec, ActivationConfig("int4", first="int8", last="int6sym", softmax="log2"))
    assert {s: a.format for s, a in both.items() if a.format != "int4"} == {
        "stem.conv": "int8", OUTPUT: "int6sym", **{f"block{b}.attention.softmax": "log2_4" for b in (2, 6)},
    }  # fmt: skip
    assert {s for s, a in both.items() if a.granularity == "split"} == set(skip_boundaries(checkpoint.network()))
    joint = planned_activations(spec, ActivationConfig(split_skips=False))
    assert {a.granularity for a in joint.values()} == {"tensor"}


# --- the stage -------------------------------------------------------------------------------------------------------


def test_min_max_scales_are_those_of_the_extremes(
    checkpoint: Checkpoint,
    weights: QuantizedCheckpoint,
    calibration: CalibrationSet,
    models: Mapping[str, QuantizedCheckpoint],
) -> None:
    """Of what the network with quantized weights computes, not the one in full precision."""
    made, seen = models["int8 by channel"].activations["head.output"], {}
    with watching(weights.network(), [], lambda site, x: None):
        network = weights.network()
    with watching(network, ["head.output"], seen.__setitem__):
        network(calibration.x_t, calibration.t)
    rows = seen["head.output"].movedim(1, 0).flatten(1)
    low, high = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
    assert made.scale is not None
    torch.testing.assert_close(made.scale[0], (high - low) / 255, atol=1e-6, rtol=1e-4)


def seen_by_time_alone(model: QuantizedCheckpoint) -> dict[str, Tensor]:
    """What layers that depend on t alone are given at every timestep, [T, C], by their names."""
    network, found = replace(model, activations={}).network(), {}
    t = torch.arange(model.spec.noise_schedule().num_train_timesteps)
    with watching(network, temporal_layers(network), found.__setitem__), torch.no_grad():
        network(torch.zeros(len(t), *model.spec.image_shape), t)
    return found


def test_what_depends_on_t_alone_is_clipped_at_no_timestep(
    checkpoint: Checkpoint, weights: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """A set has few timesteps of an interval, and the others' numbers may be larger: all T are looked at instead."""
    rough = calibration.t.unique()
    config = ActivationConfig("int8", range="min-max", intervals=len(rough))
    index = interval_of(torch.arange(1000), config.intervals, 1000)
    assert len(interval_of(rough, config.intervals, 1000).unique()) == config.intervals
    made = activations_stage(checkpoint, weights, calibration, config, 0, Context())
    seen = seen_by_time_alone(made)
    assert seen
    for site, x in seen.items():
        ends = range_ends(made.activations[site])[:, 0]
        for k in range(config.intervals):
            low, high = float(x[index == k].min()), float(x[index == k].max())
            step = float(ends[k].sum()) / 255
            assert -low <= ends[k, 0] + step, (site, k)
            assert high <= ends[k, 1] + step, (site, k)
            width = max(high, 0.0) - min(low, 0.0)
            assert ends[k].sum() == pytest.approx(width, rel=0.02), "and no wider than these ask for"


def test_a_recipe_says_where_all_timesteps_were_looked_at() -> None:
    """Models of several intervals made before have other scales, and keep their ids; those of one interval are the same."""
    assert "every_timestep" not in config_data(ActivationConfig())
    assert "every_timestep" not in config_data(ActivationConfig(intervals=20, temporal=False))
    assert config_data(ActivationConfig(intervals=20))["every_timestep"] is True


def test_weights_and_their_format_stay_as_they_are(
    weights: QuantizedCheckpoint, models: Mapping[str, QuantizedCheckpoint]
) -> None:
    for model in models.values():
        assert model.packed is weights.packed


def test_batch_size_and_chunks_do_not_matter(
    checkpoint: Checkpoint,
    weights: QuantizedCheckpoint,
    calibration: CalibrationSet,
    models: Mapping[str, QuantizedCheckpoint],
) -> None:
    assert len(calibration.t) > CHUNK
    again = activations_stage(checkpoint, weights, calibration, ActivationConfig(), 7, Context(batch_size=3))
    for site, activation in models["int8"].activations.items():
        assert all(torch.equal(t, again.activations[site].tensors[name]) for name, t in activation.tensors.items())


def test_a_calibration_set_that_does_not_belong_is_refused(
    checkpoint: Checkpoint,
    weights: QuantizedCheckpoint,
    calibration: CalibrationSet,
    models: Mapping[str, QuantizedCheckpoint],
) -> None:
    def stage(model: QuantizedCheckpoint, given: CalibrationSet | None) -> None:
        activations_stage(checkpoint, model, given, ActivationConfig(), 0, Context())

    with pytest.raises(LineageError, match="recorded for another model"):
        stage(weights, replace(calibration, model="0" * 64))
    with pytest.raises(LineageError, match="recorded for another model"):
        stage(weights, replace(calibration, x_t=calibration.x_t[:, :, :4]))
    with pytest.raises(LineageError, match="timesteps of 500, the model 1000"):
        stage(weights, replace(calibration, num_train_timesteps=500))
    with pytest.raises(LineageError, match="without a calibration set"):
        stage(weights, None)
    with pytest.raises(LineageError, match="quantized already"):
        stage(models["int8"], calibration)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "int5"}, {"range": "max"}, {"softmax": "log3"}, {"first": "float16"}, {"intervals": 0},
        {"dynamic": True, "range": "kl"}, {"dynamic": True, "intervals": 3}, {"granularity": "group:4"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ActivationConfig(**changes)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int8 by channel", "int4 table", "dynamic"])
def test_a_model_comes_back_from_its_file_whose_size_is_known(
    models: Mapping[str, QuantizedCheckpoint], name: str, tmp_path: Path
) -> None:
    """To the byte; sampling from it needs nothing else."""
    model = models[name]
    save_quantized(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = stored_tensors(model.described) | activation_layout(model.activations)
    assert path.stat().st_size == file_bytes(tensors, quantized_metadata(model))
    content, loaded = path.read_bytes(), load_quantized(tmp_path)
    assert loaded.activations.keys() == model.activations.keys()
    for site, a in model.activations.items():
        b = loaded.activations[site]
        assert (a.format, a.granularity, a.tensors.keys()) == (b.format, b.granularity, b.tensors.keys())
        assert all(torch.equal(a.tensors[part], b.tensors[part]) for part in a.tensors)
    save_quantized(loaded, tmp_path)
    assert path.read_bytes() == content
    config = SampleConfig(steps=3, count=2)
    images = sample(loaded, config, 0, Context()).images
    assert torch.equal(images, sample(model, config, 0, Context()).images)
    assert not torch.equal(images, sample(replace(model, activations={}), config, 0, Context()).images)


def test_without_activations_the_file_is_what_it_was(weights: QuantizedCheckpoint) -> None:
    assert "activations" not in json.loads(quantized_metadata(weights)["fqdiff"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.late.activation_scale": torch.full((1, 2), float("nan"))}, "no numbers"),
        ({"head.late.activation_scale": torch.zeros(1, 2)}, "are 0"),
        ({"head.late.activation_scale": torch.full((1, 2), -1.0)}, "negative"),
        ({"head.late.activation_scale": torch.ones(1, 2).half()}, "float16"),
        ({"head.late.activation_scale": torch.ones(2)}, "scales"),
        ({"head.late.activation_scale": torch.ones(1, 3)}, "scales"),
        ({"head.late.activation_scale": torch.ones(2, 2)}, "intervals"),
        ({"head.late.activation_zero_point": torch.ones(1, 1, dtype=torch.uint8)}, "zero points"),
        ({"head.late.activation_zero_point": torch.ones(1, 2)}, "zero points"),
        ({"block2.attention.softmax.activation_zero_point": torch.zeros(1, 1, dtype=torch.uint8)}, "no use for"),
        ({"head.nothing.activation_scale": torch.ones(1, 1)}, "fit the architecture"),
    ],
)
def test_scales_that_do_not_fit_the_model_are_refused(
    models: Mapping[str, QuantizedCheckpoint], changes: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_quantized(models["int8"], tmp_path)
    rewrite(tmp_path / "model.safetensors", changes)
    with pytest.raises(ArtifactCorrupt, match=message):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ([{"format": "int8", "granularity": "tensor", "dynamic": True, "sites": ["nowhere"]}], "no layer"),
        (
            [{"format": "int9", "granularity": "tensor", "dynamic": True, "sites": [OUTPUT]}],
            "unknown activation format",
        ),
        ([{"format": "log2_8", "granularity": "tensor", "dynamic": True, "sites": [OUTPUT]}], "may be negative"),
        ([{"format": "int8", "granularity": "split", "dynamic": True, "sites": [OUTPUT]}], "by 'split'"),
        ([{"format": "int8", "granularity": "tensor", "dynamic": False, "sites": [OUTPUT]}], "is missing"),
        ([{"format": "int8", "granularity": "tensor", "dynamic": 1, "sites": [OUTPUT]}], "described by"),
        ([{"format": "int8", "granularity": "tensor", "dynamic": True, "sites": [OUTPUT] * 2}], "twice"),
        ([{"format": "int8"}], "described by"),
        ({"format": "int8"}, "not a list"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(
    weights: QuantizedCheckpoint, described: Any, message: str, tmp_path: Path
) -> None:
    save_quantized(weights, tmp_path)
    path = tmp_path / "model.safetensors"
    facts = json.loads(quantized_metadata(weights)["fqdiff"]) | {"activations": described}
    save_file(load_file(path), path, metadata={"fqdiff": json.dumps(facts)})
    with pytest.raises(ArtifactCorrupt, match=message):
        read_model(path)


def test_tables_of_different_lengths_are_refused(weights: QuantizedCheckpoint) -> None:
    made = {site: Activation("int8sym", "tensor", torch.ones(k, 1)) for k, site in ((2, "head.output"), (3, OUTPUT))}
    with pytest.raises(QuantizationError, match=r"\[2, 3\] intervals"):
        add_activation_quantizers(weights.network(), made, 1000, {})


def test_a_model_with_quantized_activations_is_not_imported(
    checkpoint: Checkpoint, calibration: CalibrationSet, tmp_path: Path
) -> None:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="float16"), 0, Context())
    half = quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())
    save_quantized(activations_stage(checkpoint, half, None, ActivationConfig(dynamic=True), 0, Context()), tmp_path)
    with pytest.raises(ArtifactCorrupt, match="activations are quantized"):
        open_model(str(tmp_path / "model.safetensors"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_quantizes_both_and_every_byte_is_accounted_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    planned = good(store, "plan", "--uniform", "int4", "--name", "int4")
    refused = call(store, "quantize", "int4", "--activations", "int8")
    assert refused.exit_code == 1
    assert "no calibration of checkpoint" in refused.stderr
    few = ("--steps", "4", "--timesteps", "4", "--samples", "2")
    good(store, "calibrate", "one", *few, "--name", "inputs")
    flags = (
        "--activations",
        "int8",
        "--activation-intervals",
        "2",
        "--activation-range",
        "min-max",
        "--softmax",
        "log2",
    )
    made: Any = good(store, "quantize", "int4", *flags, "--calibration", "inputs")
    assert made["inputs"].keys() == {"checkpoint", "model", "calibration"}
    assert made["promised_bytes"] == planned["file_bytes"]
    assert made["file_bytes"] == Path(made["file"]).stat().st_size == made["promised_bytes"] + made["activation_bytes"]
    assert f"and {made['activation_bytes']:,} of activation scales" in call(store, "quantize", "int4", *flags).stdout
    found: Any = good(store, "size", str(made["id"]))
    scales = {n: t.nbytes for n, t in load_file(made["file"]).items() if ".activation_" in n}
    assert found["kinds"]["activation_scales"] == sum(scales.values()) > 0
    assert sum(found["kinds"].values()) == found["file_bytes"] == made["file_bytes"]
    assert "head.late (activation)" in call(store, "size", "--tensors", str(made["id"])).stdout
    assert good(store, "sample", str(made["id"]), "--count", "2", "--steps", "2")["count"] == 2
    config = tmp_path / "fqdiff.toml"
    config.write_text('[activations]\nformat = "int8"\nintervals = 2\nrange = "min-max"\nsoftmax = "log2"\n')
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    for arguments, message in (
        (("--softmax", "log2"), "softmax of activations that stay float32"),
        (("--calibration", "inputs"), "a calibration set that nothing learns from"),
        (("--activations", "int8", "--dynamic", "--calibration", "inputs"), "no use for a calibration set"),
        (("--activations", "int7"), "unknown activation format 'int7'"),
        (
            ("--activations", "int8", "--activation-intervals", "5", "--calibration", "inputs"),
            "hold no calibration input",
        ),
    ):
        refused = call(store, "quantize", "int4", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert good(store, "quantize", "int4", "--activations", "int8", "--dynamic")["inputs"].keys() == {
        "checkpoint",
        "model",
    }  # type: ignore[attr-defined]
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "6", "--name", "two")
    good(store, "calibrate", "two", *few, "--name", "foreign")
    refused = call(store, "quantize", "int4", "--activations", "int8", "--calibration", "foreign")
    assert refused.exit_code == 1
    assert "is not of checkpoint" in refused.stderr


@pytest.mark.parametrize("name", ["int8", "int8sym"])
def test_parameters_have_the_shape_of_the_ranges(name: str) -> None:
    low = -torch.rand(3, 5)
    found = activation_qparams(low, torch.rand(3, 5), get_activation_format(name))
    assert found.scale.shape == found.zero_point.shape == low.shape
