"""Weights split where a skip is joined: each part is what it would be alone, both are learned, every byte is counted."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fqdiff.calibration.reconstruct import block_loss
from fqdiff.configs import CalibrateConfig, PlanConfig, QuantizeConfig, ReconstructConfig
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, QuantizationError
from fqdiff.models.registry import build, split_weights
from fqdiff.quant.adaround import LearnedRounding, rounding_penalty
from fqdiff.quant.container import metadata
from fqdiff.quant.formats import FORMATS, PerChannel, PerElement, PerSplit, get_format, parse_granularity
from fqdiff.quant.granularity import granularities
from fqdiff.quant.packed import PackedTensor, pack_tensor, stored_bytes, unpack_tensor
from fqdiff.quant.packing import unpack
from fqdiff.quant.qparams import from_rows, group_rows
from fqdiff.quant.trainable import trainable
from fqdiff.rng import generator
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.reconstruct import reconstruct_blocks
from fqdiff.store.files import write_tensors
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, Plan, QuantizedCheckpoint
from tests.test_cli import good
from tests.test_quant import read_with_numpy

SCALED = [name for name, fmt in FORMATS.items() if not fmt.is_cast]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test split"))


def joined(boundary: int = 5) -> Tensor:
    """[6, 8, 3, 3], what the skip is multiplied by 20 times smaller."""
    x = normal(6, 8, 3, 3)
    x[:, boundary:] /= 20
    return x


def low_plan(checkpoint: Checkpoint, **changes: Any) -> Plan:
    config = PlanConfig("uniform", **{"low": "int4", "granularity": "split", **changes})
    return plan(checkpoint, None, None, config, 0, Context())


# --- one tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((4, 7, 3), 0), ((7, 4, 2, 2), 1), ((5, 6), 0)])
@pytest.mark.parametrize("boundary", [1, 3, 5])
def test_rows_are_the_two_parts_of_each_channel_and_go_back(shape: tuple[int, ...], axis: int, boundary: int) -> None:
    x, grain = normal(*shape), PerSplit(boundary, axis)
    rows = group_rows(x, grain)
    for channel, of_channel in enumerate(x.movedim(axis, 0)):
        parts = of_channel[:boundary].flatten(), of_channel[boundary:].flatten()
        for half, part in enumerate(parts):
            row = rows[2 * channel + half]
            assert torch.equal(row[: len(part)], part)
            assert not row[len(part) :].any()
    assert torch.equal(from_rows(rows, shape, grain), x)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("span", ["min-max", "mse", "percentile", "fisher"])
def test_each_part_is_what_it_would_be_as_a_tensor_of_its_own(name: str, span: str) -> None:
    """Rejects ranges that padding or the other part has a say in. A part of 1100 weights has a thousandth of them."""
    for x, boundary in ((joined(), 5), (normal(2, 180, 3, 3).exp(), 122)):
        weight = normal(*x.shape, seed=1).square()
        made = pack_tensor(x, get_format(name), PerSplit(boundary, 0), span, weight=weight)
        halves = [
            pack_tensor(part, get_format(name), PerChannel(0), span, weight=w)
            for part, w in zip(
                x.split([boundary, x.shape[1] - boundary], 1),
                weight.split([boundary, x.shape[1] - boundary], 1),
                strict=True,
            )
        ]
        together = torch.cat([unpack_tensor(h) for h in halves], dim=1)
        if name.startswith("codebook"):  # k-means starts from other quantiles: as good, and not the same
            one, two = ((t - x).square().mul(weight).sum() for t in (unpack_tensor(made), together))
            assert span != "fisher" or one < 1.1 * two
            continue
        assert torch.equal(unpack_tensor(made), together)
        scales = torch.stack([h.parts["scale"] for h in halves], dim=1).flatten()
        assert torch.equal(made.parts["scale"], scales)


@pytest.mark.parametrize("name", [n for n in SCALED if FORMATS[n].is_integer])
@pytest.mark.parametrize("span", ["min-max", "mse"])
def test_split_equals_unsplit_when_both_parts_have_the_same_numbers(name: str, span: str) -> None:
    half = normal(6, 4, 3, 3)
    x = torch.cat([half, half.flip(1)], dim=1)
    split, whole = (pack_tensor(x, get_format(name), grain, span) for grain in (PerSplit(4, 0), PerChannel(0)))
    assert torch.equal(unpack_tensor(split), unpack_tensor(whole))
    assert torch.equal(split.parts["codes"], whole.parts["codes"])
    assert torch.equal(split.parts["scale"].view(6, 2), whole.parts["scale"][:, None].expand(6, 2))


def test_a_part_of_another_range_is_worth_a_split() -> None:
    x = joined()
    split, whole = (unpack_tensor(pack_tensor(x, get_format("int4"), g)) for g in (PerSplit(5, 0), PerChannel(0)))
    assert 100 * (split - x)[:, 5:].square().sum() < (whole - x)[:, 5:].square().sum()
    assert torch.equal(split[:, :5], whole[:, :5])


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_reader_that_knows_only_the_documentation_finds_the_same_values(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    for grain in (PerSplit(5, 0, dtype), PerSplit(2, 1, dtype)):
        packed = pack_tensor(joined(), get_format(name), grain)
        described = {"w": (packed.shape, packed.format, packed.granularity)}
        write_tensors(path, {f"w.{part}": t for part, t in packed.parts.items()}, metadata({}, described))
        assert read_with_numpy(path, "w").tolist() == unpack_tensor(packed).tolist()
        assert stored_bytes(*described["w"]) == sum(t.nbytes for t in packed.parts.values())


def test_the_second_set_of_scales_is_all_that_is_added() -> None:
    shape, fmt = (6, 8, 3, 3), get_format("int4")
    added = stored_bytes(shape, fmt, PerSplit(5, 0)) - stored_bytes(shape, fmt, PerChannel(0))
    assert added == 6 * 4 + 6 // 2  # float32 scales, and 4-bit zero points


def test_kept_elements_and_phases_go_with_it() -> None:
    x, at = joined(), torch.tensor([3, 200])
    kept = pack_tensor(x, get_format("int4"), PerElement(2, "float16", PerSplit(5, 0)), kept=at)
    back = unpack_tensor(kept)
    assert torch.equal(back.flatten()[at], x.flatten()[at].half().float())
    phased = pack_tensor(x, get_format("int4:4/2"), PerSplit(5, 0))
    assert torch.equal(unpack_tensor(phased), unpack_tensor(pack_tensor(x, get_format("int4"), PerSplit(5, 0))))
    assert (unpack_tensor(phased, 1) - x)[:, 5:].abs().max() < 0.05


def test_a_split_that_leaves_nothing_on_one_side_is_refused() -> None:
    for x, grain in ((normal(3, 4, 2), PerSplit(4, 0)), (normal(3), PerSplit(1, 0))):
        with pytest.raises(QuantizationError, match=r"a split at input channel"):
            pack_tensor(x, get_format("int4"), grain)


@pytest.mark.parametrize("text", ["split", "split:0:0", "split:4", "split:4:0:float32", "split:04:0", "split:4:0:0"])
def test_a_split_has_one_name_only(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown granularity"):
        parse_granularity(text)
    for grain in (PerSplit(64, 0), PerSplit(3, 1, torch.float16)):
        assert parse_granularity(str(grain)) == grain


# --- learning --------------------------------------------------------------------------------------------------------


def test_the_rounding_of_both_parts_is_learned_and_the_penalty_covers_both() -> None:
    """Rejects Q-Diffusion's published loop, whose penalty sees the first part alone."""
    x = joined()
    rounding = LearnedRounding("w", x, pack_tensor(x, get_format("int4"), PerSplit(5, 0)))
    parts = [
        LearnedRounding("w", part, pack_tensor(part, get_format("int4"), PerChannel(0)))
        for part in x.split([5, 3], dim=1)
    ]
    assert torch.equal(rounding(), torch.cat([p() for p in parts], dim=1))
    alone = [rounding_penalty(p.soft(), 3.0) for p in parts]
    torch.testing.assert_close(rounding_penalty(rounding.soft(), 3.0), alone[0] + alone[1])
    assert min(alone) > 10
    layer = torch.nn.Conv2d(8, 6, 3).requires_grad_(False)
    data = (normal(2, 8, 5, 5),), torch.zeros(2, 6, 3, 3)
    block_loss(layer, {"weight": rounding}, *data, 1.0, 3.0).backward()  # type: ignore[no-untyped-call]
    assert rounding.v.grad is not None
    assert rounding.v.grad.view(6, 2, -1)[:, 1, :27].abs().mean() > 0.01
    assert rounding.weights == x.numel()
    with torch.no_grad():
        rounding.v.copy_(normal(*rounding.v.shape, seed=3))
    made = rounding.packed(rounding.codes())
    assert torch.equal(unpack_tensor(made), rounding.values(rounding.codes()))
    flipped = unpack(made.parts["codes"], 4, made.shape) != rounding.stored_codes()
    assert flipped[:, :5].any()
    assert flipped[:, 5:].any()


@pytest.mark.parametrize("name", ["int3", "int3sym", "ternary", "codebook3", "float8_e4m3"])
def test_a_split_tensor_is_trained_to_the_bit_that_is_stored(name: str) -> None:
    x = joined()
    packed = pack_tensor(x, get_format(name), PerSplit(5, 0))
    part = trainable(x, packed)
    assert torch.equal(part(), unpack_tensor(packed))
    part().square().sum().backward()
    with torch.no_grad():
        for parameter in part.parameters():
            assert parameter.grad is not None
            parameter -= 0.05 * parameter.grad
    assert torch.equal(part(), unpack_tensor(part.packed()))


# --- plans and models ------------------------------------------------------------------------------------------------


def test_only_layers_that_are_given_a_joined_skip_are_split(checkpoint: Checkpoint) -> None:
    made = low_plan(checkpoint)
    found = {e.parameter: e.granularity for e in made.entries if e.granularity.startswith("split")}
    borders = split_weights(build(checkpoint.spec.architecture, "meta"))
    assert found == {name: f"split:{at}:0" for name, at in borders.items()}
    assert {e.granularity for e in made.entries} - set(found.values()) == {"channel:0", "channel:1", "tensor"}
    by_channel = low_plan(checkpoint, granularity="channel")
    rows = sum(checkpoint.tensors[name].shape[0] for name in borders)
    zeros = sum((checkpoint.tensors[name].shape[0] + 1) // 2 for name in borders)
    entries = (sum(e.bytes for e in p.entries) for p in (made, by_channel))
    assert next(entries) - next(entries) == 4 * rows + zeros
    both = granularities("split", "float16", {"a": ((4, 6, 3, 3), 0), "b": ((4, 6), 0)}, {"a": 2})
    assert both == {"a": PerSplit(2, 0, torch.float16), "b": PerChannel(0, torch.float16)}


def test_the_file_is_as_small_as_predicted_and_comes_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = low_plan(checkpoint, scale="float16")
    save_plan(made, tmp_path)
    assert load_plan(tmp_path) == made
    model = quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())
    save_quantized(model, tmp_path)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size == made.file_bytes
    back = load_quantized(tmp_path)
    assert back.described == model.described
    name = "head.late.weight"
    assert torch.equal(unpack_tensor(back.packed[name]), unpack_tensor(model.packed[name]))
    assert len(load_file(path)[f"{name}.scale"]) == 2 * checkpoint.tensors[name].shape[0]
    x, t = torch.zeros(1, *checkpoint.spec.image_shape), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(back.network()(x, t), back.packed_network()(x, t))


def test_a_file_whose_split_is_beyond_its_tensor_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantize(checkpoint, low_plan(checkpoint), None, QuantizeConfig(), 0, Context())
    p = model.packed["head.late.weight"]
    for boundary in (p.shape[1], 2**20):
        wrong = PackedTensor(p.format, PerSplit(boundary, 0), p.shape, p.parts)
        save_quantized(replace(model, packed={**model.packed, "head.late.weight": wrong}), tmp_path)
        with pytest.raises(ArtifactCorrupt, match="a split at input channel"):
            load_quantized(tmp_path)


def test_a_split_model_is_reconstructed(checkpoint: Checkpoint) -> None:
    inputs = calibrate(checkpoint, None, None, CalibrateConfig(steps=4, timesteps=4, samples=8), 0, Context())
    model = quantize(checkpoint, low_plan(checkpoint, low="int3"), None, QuantizeConfig(), 0, Context())
    config = ReconstructConfig(iterations=30, batch=8, inputs=32, network_iterations=0)
    new: QuantizedCheckpoint = reconstruct_blocks(checkpoint, model, inputs, config, 0, Context())
    name = "head.late.weight"
    old, found = (unpack(m.packed[name].parts["codes"], 3, m.packed[name].shape) for m in (model, new))
    boundary = split_weights(build(checkpoint.spec.architecture, "meta"))[name]
    assert (old != found)[:, :boundary].any()
    assert (old != found)[:, boundary:].any()
    assert new.described == model.described


@pytest.mark.parametrize("granularity", ["split", "channel,split,group-near:16"])
def test_a_budget_may_choose_it(tmp_path_factory: pytest.TempPathFactory, granularity: str) -> None:
    store = tmp_path_factory.mktemp("split") / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    made: Any = good(store, "plan", "--score", "weight-mse", "--target-bpw", "5", "--granularity", granularity)
    quantized: Any = good(store, "quantize", str(made["id"]))
    assert quantized["file_bytes"] == made["file_bytes"]
    shown: Any = good(store, "size", str(quantized["id"]), "--tensors")
    assert sum(shown["kinds"].values()) == quantized["file_bytes"]


def test_refusals_name_the_granularity(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="squant with scales by split"):
        low_plan(checkpoint, rounding="squant")


def test_combinations_of_formats_have_distinct_names() -> None:
    grains = [PerSplit(b, a, d) for b, a, d in product((1, 2), (0, 1), (torch.float32, torch.float16))]
    assert len({str(g) for g in grains}) == len(grains)
