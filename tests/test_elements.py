"""Single elements kept in another format: the index, the file, the choice, and plans that keep some."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from math import comb, log2, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqdiff.configs import PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, FqdiffError, QuantizationError
from fqdiff.planning.candidates import KEPT_SHARES
from fqdiff.quant.container import file_bytes, metadata, part_name, stored_tensors
from fqdiff.quant.elements import BY_FISHER, BY_RISE, choose_kept, largest
from fqdiff.quant.formats import (
    FORMATS,
    Format,
    Grain,
    PerChannel,
    PerElement,
    PerTensor,
    get_format,
    parse_granularity,
    scales_of,
)
from fqdiff.quant.packed import PackedTensor, check_layout, check_values, pack_tensor, stored_bytes, unpack_tensor
from fqdiff.quant.positions import check_positions, index_bytes, is_bitmap, pack_positions, unpack_positions
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.files import read_tensors, write_tensors
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, FisherTable, Plan, PlanEntry, QuantizedCheckpoint, WeightBin
from tests.test_quant import read_with_numpy

GRAINS = ("tensor", "channel:1", "channel:0:float16", "group:6:0")
NAME = "block1.res1.conv1.weight"
FEW = ("float32", "float16", "int8", "int4", "int3")


@pytest.fixture(scope="module")
def weight_table(checkpoint: Checkpoint, fisher_table: FisherTable) -> FisherTable:
    """Fisher values of single weights in two bins, unlike from weight to weight."""
    draw = torch.Generator().manual_seed(0)
    bins = [{n: torch.randn(t.shape, generator=draw).exp() for n, t in checkpoint.tensors.items()} for _ in range(2)]
    halves = (WeightBin(0, 499, lambda: bins[0]), WeightBin(500, 999, lambda: bins[1]))
    return replace(fisher_table, weights=halves)


def make(checkpoint: Checkpoint, table: FisherTable, **settings: Any) -> Plan:
    return plan(checkpoint, table, None, PlanConfig(**settings), 0, Context())


def carried_out(checkpoint: Checkpoint, made: Plan, table: FisherTable) -> QuantizedCheckpoint:
    return quantize(checkpoint, made, table, QuantizeConfig(), 0, Context())


def kept_in(entries: "tuple[PlanEntry, ...]") -> dict[str, PerElement]:
    found = {e.parameter: parse_granularity(e.granularity) for e in entries}
    return {name: grain for name, grain in found.items() if isinstance(grain, PerElement)}


# --- the index ---------------------------------------------------------------------------------------------------------


def chosen(numel: int, count: int, seed: int) -> torch.Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@settings(max_examples=150, deadline=None)
@given(numel=st.integers(2, 3000), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_positions_come_back_from_an_index_of_the_promised_size(numel: int, share: float, seed: int) -> None:
    count = min(max(round(share * numel), 1), numel - 1)
    for positions in (chosen(numel, count, seed), torch.arange(count), torch.arange(numel - count, numel)):
        stream = pack_positions(positions, numel)
        assert stream.dtype == torch.uint8
        assert len(stream) == index_bytes(count, numel)
        assert torch.equal(unpack_positions(stream, count, numel), positions)
        check_positions(stream, count, numel)


def test_every_choice_from_few_elements_comes_back() -> None:
    for numel in range(2, 10):
        for count in range(1, numel):
            for positions in itertools.combinations(range(numel), count):
                stream = pack_positions(torch.tensor(positions), numel)
                assert unpack_positions(stream, count, numel).tolist() == list(positions)


@pytest.mark.parametrize("numel", [1000, 36_864, 1_000_000])
def test_the_index_is_never_larger_than_a_bitmap_and_near_the_least(numel: int) -> None:
    """Rejects plain positions of ceil(log2 n) bits each, which take nearly twice as much."""
    for share in (0.0001, 0.001, 0.005, 0.02, 0.1, 0.3, 0.5):
        count = max(round(share * numel), 1)
        assert index_bytes(count, numel) <= -(-numel // 8)
        assert is_bitmap(count, numel) == (index_bytes(count, numel) == -(-numel // 8))
        least = log2(comb(numel, count)) if numel <= 36_864 else 0.0
        if least and not is_bitmap(count, numel):
            assert least <= 8 * index_bytes(count, numel) <= least + 0.6 * count + 10


def test_streams_that_are_no_index_are_refused() -> None:
    good = pack_positions(torch.tensor([1, 5, 40, 90]), 100)
    check_positions(good, 4, 100)
    assert not is_bitmap(4, 100)
    accepted = []
    for place in range(8 * len(good)):
        bad = good.clone()
        bad[place // 8] ^= 1 << place % 8
        try:
            check_positions(bad, 4, 100)
        except QuantizationError:
            continue
        found = unpack_positions(bad, 4, 100).tolist()
        accepted.append(place)
        assert found == sorted(set(found))
        assert found[-1] < 100
        assert torch.equal(pack_positions(torch.tensor(found), 100), bad)
    assert len(accepted) <= 4 * 4  # a low bit changed is another position


# --- the tensor --------------------------------------------------------------------------------------------------------


def with_outliers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with a few large ones, and Fisher values."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(6, 4, 12, generator=g), torch.rand(6, 4, 12, generator=g) + 0.5
    x.view(-1)[torch.randperm(288, generator=g)[:3]] *= 20
    return x, weight


def packed_with(
    x: torch.Tensor, weight: torch.Tensor, fmt: Format, grain: Grain, by: str = BY_RISE, span: str = "min-max"
) -> PackedTensor:
    return pack_tensor(x, fmt, grain, span, weight=weight, kept=choose_kept(x, fmt, grain, weight, by))


@pytest.mark.parametrize("name", list(FORMATS))
def test_kept_elements_come_back_from_a_file_of_the_promised_size(name: str, tmp_path: Path) -> None:
    """With numpy and the text of docs/artifacts.md too."""
    path, (x, weight) = tmp_path / "model.safetensors", with_outliers()
    fmt = get_format(name)
    for scales, high, count in itertools.product(GRAINS, ("float32", "float16", "bfloat16"), (1, 5, 100)):
        if fmt.is_cast and scales != "tensor":
            continue
        grain = parse_granularity(f"element:{count}:{high}+{scales}")
        packed = packed_with(x, weight, fmt, grain)
        check_layout(packed)
        check_values(packed)
        assert sum(t.nbytes for t in packed.parts.values()) == stored_bytes((6, 4, 12), fmt, grain)
        described = {"w": (packed.shape, fmt, grain)}
        write_tensors(path, {part_name("w", k): t for k, t in packed.parts.items()}, metadata({}, described))
        assert file_bytes(stored_tensors(described), metadata({}, described)) == path.stat().st_size
        back = unpack_tensor(packed)
        positions = choose_kept(x, fmt, grain, weight, BY_RISE)
        assert torch.equal(back.view(-1)[positions], x.view(-1)[positions].to(get_format(high).dtype).float())
        assert np.array_equal(read_with_numpy(path, "w"), back.numpy())


def test_ranges_of_the_others_do_not_reach_out_for_kept_elements() -> None:
    """Rejects an index on top of codes that were fitted to all elements."""
    x = torch.linspace(-1, 1, 64).view(2, 32)
    outliers = x.clone()
    outliers[0, 3], outliers[1, 7] = 50.0, -80.0
    grain = PerElement(2, "float32", PerTensor())
    packed = packed_with(outliers, torch.ones_like(x), get_format("int4"), grain)
    back = unpack_tensor(packed)
    assert back[0, 3] == 50.0
    assert back[1, 7] == -80.0
    assert float((back - outliers).abs().max()) <= 1 / 15 + 1e-6
    assert float((unpack_tensor(pack_tensor(outliers, get_format("int4"), PerTensor())) - outliers).abs().max()) > 0.9


def test_the_two_choices_are_what_they_say() -> None:
    x, weight = with_outliers(1)
    grain, fmt = PerElement(3, "float16", PerTensor()), get_format("int4")
    by_fisher = choose_kept(x, fmt, grain, weight, BY_FISHER)
    assert set(by_fisher.tolist()) == set(weight.flatten().argsort(descending=True)[:3].tolist())
    by_rise = choose_kept(x, fmt, grain, weight, BY_RISE)
    rest = x.clone().view(-1)
    rest[(weight * x.square()).flatten().argsort(descending=True)[:3]] = 0.0
    fitted = pack_tensor(rest.view(x.shape), fmt, PerTensor(), "fisher", weight=weight).parts
    scale, zero_point = float(fitted["scale"]), int(fitted["zero_point"])
    codes = (torch.round(x / scale) + zero_point).clamp(0, 15)
    error = weight * ((codes - zero_point) * scale - x).square()
    assert set(by_rise.tolist()) == set(error.flatten().argsort(descending=True)[:3].tolist())
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]  # of equals the first
    assert choose_kept(x, fmt, PerTensor(), None, BY_RISE) is None
    with pytest.raises(ConfigError, match="without Fisher values"):
        choose_kept(x, fmt, grain, None, BY_RISE)


def test_where_there_are_outliers_kept_elements_beat_a_plain_tensor_of_more_bytes() -> None:
    x, weight = with_outliers(2)
    grain = parse_granularity("element:6:float16+channel:0:float16")
    mixed = packed_with(x, weight, get_format("int4"), grain)

    def rise(packed: PackedTensor) -> float:
        return float((weight * (unpack_tensor(packed) - x).square()).sum())

    plain = {
        name: pack_tensor(x, get_format(name), parse_granularity("channel:0:float16"), span, weight=weight)
        for name, span in itertools.product(("int5", "int6"), ("min-max", "fisher"))
    }
    size = sum(t.nbytes for t in mixed.parts.values())
    for other in plain.values():
        assert sum(t.nbytes for t in other.parts.values()) > size
        assert rise(other) > 1.5 * rise(mixed)


def test_nonsense_is_no_granularity() -> None:
    elements = "element:3:float16+"
    for text in (
        "element:0:float16+tensor",
        "element:3:int8+tensor",
        "element:3:float16",
        f"{elements}{elements}tensor",
    ):
        with pytest.raises(ConfigError, match="unknown granularity"):
            parse_granularity(text)
    with pytest.raises(QuantizationError, match="4 elements kept of 4"):
        stored_bytes((2, 2), get_format("int4"), PerElement(4, "float16", PerTensor()))
    text = "element:12:bfloat16+group:32:1:float16"
    assert str(parse_granularity(text)) == text


# --- plans -------------------------------------------------------------------------------------------------------------

RULES = {
    "threshold": {"strategy": "threshold", "threshold": 3.0, "low": "int4"},
    "groups": {"low": "int3", "high": "float16", "scale": "float16", "granularity": "group-near:16,element"},
    "ratio": {"strategy": "ratio", "ratio": 0.02, "low": "int2", "at": "mean", "ranges": ("fisher",)},
    "mean-std": {"strategy": "mean-std", "mean_std": 0.0, "high": "float32"},  # float16 beside float32
    "budget": {"strategy": "budget", "target_bpw": 12.0, "formats": ("int2", "int3"), "granularity": "channel,element"},
}


@pytest.mark.parametrize("name", RULES)
def test_the_file_has_the_planned_size_and_loads_back_bit_exactly(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path, name: str
) -> None:
    made = make(checkpoint, weight_table, **{"granularity": "element", **RULES[name]})
    save_plan(made, tmp_path)
    assert load_plan(tmp_path) == made
    assert kept_in(made.entries)
    model = carried_out(checkpoint, load_plan(tmp_path), weight_table)
    save_quantized(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes
    loaded = load_quantized(tmp_path)
    network = dict(loaded.network().named_parameters())
    lazy = loaded.packed_network()
    for parameter, packed in model.packed.items():
        owner, _, own = parameter.rpartition(".")
        assert torch.equal(network[parameter], unpack_tensor(packed))
        assert torch.equal(getattr(lazy.get_submodule(owner), own), network[parameter])
    for entry in made.entries:
        if isinstance(grain := parse_granularity(entry.granularity), PerElement):
            error = (network[entry.parameter] - checkpoint.tensors[entry.parameter]).abs()
            assert int((error <= 2**-11 * checkpoint.tensors[entry.parameter].abs() + 1e-7).sum()) >= grain.count


def test_a_rule_keeps_just_the_elements_whose_fisher_value_reaches_the_threshold(
    checkpoint: Checkpoint, weight_table: FisherTable
) -> None:
    settings: dict[str, Any] = {"strategy": "threshold", "threshold": 3.0, "low": "int2", "granularity": "element"}
    made = make(checkpoint, weight_table, **settings)
    model = carried_out(checkpoint, made, weight_table)
    fisher = weight_table.weights[0].read()  # the bin that holds t = 1
    for name, grain in kept_in(made.entries).items():
        above = fisher[name] >= 3.0
        assert grain.count == int(above.sum())
        back = unpack_tensor(model.packed[name])
        assert torch.equal(back[above], checkpoint.tensors[name][above])
    averaged = make(checkpoint, weight_table, **settings, at="mean")
    assert kept_in(averaged.entries) != kept_in(made.entries)
    low = make(checkpoint, weight_table, **{**settings, "threshold": 1e-9})
    assert not kept_in(low.entries)  # all reach it: whole tensors stay high
    assert {e.format for e in low.entries} == {"float32"}


def test_the_ratio_keeps_no_more_than_its_share_where_values_are_equal(
    checkpoint: Checkpoint, weight_table: FisherTable
) -> None:
    """Rejects a threshold alone, which all of the equal values reach."""
    nothing = {name: torch.zeros_like(t) for name, t in checkpoint.tensors.items()}
    table = replace(weight_table, weights=(WeightBin(0, 999, lambda: nothing),))
    made = make(checkpoint, table, strategy="ratio", ratio=0.005, low="int2", granularity="element")
    for block in "123456":
        entries = [e for e in made.entries if e.block == block and len(e.shape) >= 2]
        kept = sum(e.weights_by_format.get("float32", 0) for e in entries)
        assert kept == round(0.005 * sum(prod(e.shape) for e in entries))
        assert all(f"the top {kept} of " in e.rule for e in entries)


def test_the_ratio_counts_elements_of_the_whole_block(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    made = make(checkpoint, weight_table, strategy="ratio", ratio=0.02, low="int2", granularity="element")
    shapes = {e.parameter: e.shape for e in made.entries}
    for block in "123456":
        members = [e.parameter for e in made.entries if e.block == block and len(e.shape) >= 2]
        count = sum(grain.count for name, grain in kept_in(made.entries).items() if name in members)
        assert count == round(0.02 * sum(prod(shapes[name]) for name in members))


def test_a_tensor_that_would_take_no_fewer_bytes_stays_high_as_a_whole(
    checkpoint: Checkpoint, weight_table: FisherTable
) -> None:
    made = make(checkpoint, weight_table, strategy="ratio", ratio=0.97, low="float16", granularity="element")
    assert not kept_in(made.entries)
    assert all(e.bytes == 4 * prod(e.shape) for e in made.entries)


def test_no_element_of_a_ladder_gets_a_narrower_format_than_it_asks_for_and_no_way_with_two_takes_fewer_bytes(
    checkpoint: Checkpoint, weight_table: FisherTable
) -> None:
    """Every way counted anew. Rejects the cast for all that ask for no more than int8, and int4 for those that do."""
    ladder = ("float16", "int8", "int4", "int2")
    given = {"strategy": "threshold", "threshold": 60.0, "lower_thresholds": (8.0, 2.0), "ladder": ladder}
    # Tensors whose values differ by decades, so that they ask for different formats.
    fisher = {n: v * 4.0 ** (k % 6 - 3) for k, (n, v) in enumerate(weight_table.weights[0].read().items())}
    table = replace(weight_table, weights=(WeightBin(0, 999, lambda: fisher),))
    made = make(checkpoint, table, granularity="element", **given)
    stored = set()
    for e in made.entries:
        if e.threshold is None:
            continue
        grain = parse_granularity(e.granularity)
        asks = sum((fisher[e.parameter].double() < t).int() for t in (60.0, 8.0, 2.0))
        assert isinstance(asks, torch.Tensor)
        at_most = {rank: int((asks < rank).sum()) for rank in range(1, 4)}  # so many ask for more than this format
        widest = int(asks.min())
        by = scales_of(grain) if "channel" in e.granularity else PerChannel(0)
        scales = PerTensor() if widest == 0 else by
        sizes = {(widest, 0): stored_bytes(e.shape, get_format(ladder[widest]), scales)}
        for rank in set(asks.flatten().tolist()) - {widest}:
            kept = PerElement(at_most[rank], "float16", by)
            sizes[rank, at_most[rank]] = stored_bytes(e.shape, get_format(ladder[rank]), kept)
        count = grain.count if isinstance(grain, PerElement) else 0
        rank = ladder.index(e.format)
        assert count == (at_most[rank] if count else 0)
        assert count or rank == widest
        assert e.bytes == min(sizes.values())
        stored.add((e.format, bool(count)))
    assert len({fmt for fmt, _ in stored}) > 1
    assert any(mixed for _, mixed in stored)


def test_a_budget_keeps_elements_where_that_is_predicted_less(
    checkpoint: Checkpoint, weight_table: FisherTable
) -> None:
    tensors = {n: t.clone() for n, t in checkpoint.tensors.items()}
    draw = torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        if tensor.ndim >= 2:
            places = torch.randperm(tensor.numel(), generator=draw)[: tensor.numel() // 100]
            tensor.view(-1)[places] *= 30
    model = replace(checkpoint, tensors=tensors)
    plain, mixed = (
        make(model, weight_table, strategy="budget", target_bpw=8.0, granularity=g, scale="float16", formats=FEW)
        for g in ("channel", "channel,element")
    )
    assert plain.budget is not None
    assert mixed.budget is not None
    assert mixed.budget.predicted < 0.8 * plain.budget.predicted
    assert kept_in(mixed.entries)
    (entry,) = (e for e in mixed.entries if e.parameter == NAME)
    offered = [parse_granularity(a.granularity) for a in entry.alternatives if a.format == "int3"]
    counts = {g.count for g in offered if isinstance(g, PerElement)}
    assert counts == {round(share * prod(entry.shape)) for share in KEPT_SHARES} - {0}
    stored = carried_out(model, mixed, weight_table)
    for e in mixed.entries:
        error = unpack_tensor(stored.packed[e.parameter]).double() - tensors[e.parameter].double()
        fisher = sum(0.5 * each.read()[e.parameter].double() for each in weight_table.weights)
        assert e.predicted == pytest.approx(float((0.5 * fisher * error.square()).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "uniform"}, "one format for all"),
        ({"strategy": "budget", "target_bpw": 4.0, "score": "uniform"}, "one format for all"),
        ({"low": "int4", "rounding": "squant"}, "squant"),
        ({"ladder": ("int8", "int6", "int4")}, "single elements kept in int8"),
        ({"low": "int4", "high": "int8"}, "single elements kept in int8"),
    ],
)
def test_settings_that_do_not_go_with_elements_are_refused(
    checkpoint: Checkpoint, weight_table: FisherTable, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(checkpoint, weight_table, **{"granularity": "element", **settings})


@pytest.mark.parametrize("settings", [{}, {"strategy": "budget", "target_bpw": 4.0}])
def test_a_table_without_single_weights_says_what_to_do(
    checkpoint: Checkpoint, fisher_table: FisherTable, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(checkpoint, fisher_table, granularity="element", **settings)
    assert caught.value.hint == "fqdiff fisher --granularity weight"


# --- files of strangers ------------------------------------------------------------------------------------------------


def spoil(tensors: dict[str, torch.Tensor], part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"].clone())


def refilled(byte: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.full_like(t, byte)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("kept_index", refilled(0)),
        ("kept_index", refilled(255)),
        ("kept_index", lambda t: t.flip(0)),
        ("kept_index", lambda t: t[:-1]),
        ("kept_index", lambda t: torch.cat([t, t])),
        ("kept", lambda t: t[:-1]),
        ("kept", lambda t: torch.full_like(t, float("nan"))),
        ("kept", lambda t: t.float()),
    ],
)
def test_an_index_or_values_that_make_no_sense_are_refused(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path, part: str, change: Any
) -> None:
    made = make(checkpoint, weight_table, **{"granularity": "element", **RULES["threshold"], "high": "float16"})
    save_quantized(carried_out(checkpoint, made, weight_table), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, meta = read_tensors(path)
    spoil(tensors, part, change)
    write_tensors(path, tensors, {"fqdiff": json.dumps(meta)})
    with pytest.raises(ArtifactCorrupt):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    "grain",
    ["element:{n}:float16+channel:0", "element:{more}:float16+channel:0", "element:9999999999999:float16+channel:0",
     "element:{count}:float32+channel:0", "element:{count}:float16+tensor", "element:{count}:int8+channel:0", "channel:0"],
)  # fmt: skip
def test_a_description_of_other_kept_elements_is_refused(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path, grain: str
) -> None:
    made = make(checkpoint, weight_table, **{"granularity": "element", **RULES["threshold"], "high": "float16"})
    save_quantized(carried_out(checkpoint, made, weight_table), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, meta = read_tensors(path)
    count = kept_in(made.entries)[NAME].count
    facts = meta["quantized"][NAME]
    facts["granularity"] = grain.format(n=prod(facts["shape"]), count=count, more=count + 1)
    write_tensors(path, tensors, {"fqdiff": json.dumps(meta)})
    with pytest.raises(FqdiffError) as caught:
        load_quantized(tmp_path)
    assert isinstance(caught.value, ArtifactCorrupt)


def test_a_plan_with_other_timestep_weights_is_refused(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path
) -> None:
    made = make(checkpoint, weight_table, granularity="element", **RULES["threshold"])
    assert made.timestep_weights == "at:1"
    for nonsense in ("at:", "at:x", "sampler:9", 5, None):
        save_plan(made, tmp_path)
        data = json.loads((tmp_path / "plan.json").read_text()) | {"timestep_weights": nonsense}
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(ArtifactCorrupt):
            load_plan(tmp_path)
    data.pop("timestep_weights")  # as before there were any
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert load_plan(tmp_path).timestep_weights == "uniform"
