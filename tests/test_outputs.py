"""Output channels of one tensor in two formats: the tensor, the file, the choice, plans, distillation."""

import itertools
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fqdiff.cli.plan_budget import block_rows, budget_defaults
from fqdiff.configs import PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, FqdiffError, LineageError, QuantizationError
from fqdiff.planning.outputs import SHARES
from fqdiff.planning.plans import make_offer
from fqdiff.quant.elements import BY_FISHER, BY_RISE, choose_kept
from fqdiff.quant.formats import PerChannel, PerGroup, PerOutput, PerTensor, get_format, parse_granularity
from fqdiff.quant.outputs import INDEX, channel_sums, counts_of, separated, together
from fqdiff.quant.packed import (
    PackedTensor,
    check_layout,
    check_values,
    pack_tensor,
    separate_outputs,
    stored_bytes,
    unpack_tensor,
)
from fqdiff.quant.positions import index_bytes
from fqdiff.quant.trainable import trainable
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, FisherTable, Plan, QuantizedCheckpoint, WeightBin
from tests.test_cli import call, good
from tests.test_quant import cast_value, read_index

HALF = torch.float16
PAIRS = (
    ("int3", "int8"),
    ("ternary", "int4"),
    ("codebook2", "codebook4"),
    ("codebook2", "int6"),
    ("int4sym", "int8"),
    ("int2", "float16"),
    ("float16", "float32"),
    ("int4", "float8_e4m3"),
)
GRAINS = (PerChannel(0), PerChannel(1, HALF), PerGroup(9, 0, HALF))
SHAPE = (6, 4, 3, 3)
FREE: dict[str, Any] = {"strategy": "budget", "granularity": "channel,output", "scale": "float16"}


def weights(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weight_table(checkpoint: Checkpoint, fisher_table: FisherTable) -> FisherTable:
    """Fisher values of single weights, unlike from weight to weight, and more so from channel to channel."""
    draw = torch.Generator().manual_seed(0)

    def values(t: Tensor) -> Tensor:
        channels = (3 * torch.randn([len(t), *[1] * (t.ndim - 1)], generator=draw)).exp()
        return torch.randn(t.shape, generator=draw).exp() * channels

    found = {name: values(t) for name, t in checkpoint.tensors.items()}
    return replace(fisher_table, weights=(WeightBin(0, 999, lambda: found),))


def carried_out(checkpoint: Checkpoint, made: Plan, table: FisherTable | None, distill: int = 0) -> QuantizedCheckpoint:
    config = QuantizeConfig(distill=distill, distill_batch=4) if distill else QuantizeConfig()
    return quantize(checkpoint, made, table, config, 0, Context())


# --- the tensor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), PAIRS)
@pytest.mark.parametrize("scales", GRAINS, ids=str)
def test_each_channel_is_what_its_own_format_makes_of_it(low: str, high: str, scales: PerChannel | PerGroup) -> None:
    x, kept, axis = weights(), torch.tensor([0, 3]), scales.axis
    granularity = PerOutput(2, high, scales)
    assert parse_granularity(str(granularity)) == granularity
    packed = pack_tensor(x, get_format(low), granularity, kept=kept)
    check_layout(packed)
    check_values(packed)
    values = unpack_tensor(packed)
    assert values.is_contiguous()
    alone = {
        name: unpack_tensor(pack_tensor(x, get_format(name), PerTensor() if get_format(name).is_cast else scales))
        for name in (low, high)
    }
    for channel in range(x.shape[axis]):
        expected = alone[high if channel in kept else low].select(axis, channel)
        torch.testing.assert_close(values.select(axis, channel), expected, atol=0, rtol=0)


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_bytes_are_those_of_both_parts_and_of_the_index(low: str, high: str) -> None:
    for count in (1, 2, 5):
        granularity = PerOutput(count, high, PerChannel(0, HALF))
        parts = [
            stored_bytes((n, *SHAPE[1:]), get_format(f), PerChannel(0, HALF))
            for n, f in ((6 - count, low), (count, high))
        ]
        assert stored_bytes(SHAPE, get_format(low), granularity) == sum(parts) + index_bytes(count, 6)


def test_rows_come_back_where_they_were() -> None:
    for axis, kept in ((0, [1, 2, 5]), (1, [0]), (2, [2])):
        low, high = separated(weights(), axis, torch.tensor(kept))
        assert high.shape[0] == len(kept)
        assert torch.equal(together(low, high, axis, torch.tensor(kept)), weights())


@pytest.mark.parametrize(
    "text",
    [
        "output:0:int8+channel:0",
        "output:2:int9+channel:0",
        "output:2:int8",
        "output:2:int8+tensor",
        "output:2:int8+element:1:float16+channel:0",
    ],
)
def test_granularities_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_granularity(text)


def test_counts_and_indexes_that_do_not_fit_are_refused() -> None:
    grain = PerOutput(2, "int8", PerChannel(0))
    for shape, count in ((SHAPE, 6), (SHAPE, 7)):
        with pytest.raises(QuantizationError):
            stored_bytes(shape, get_format("int3"), replace(grain, count=count))
    with pytest.raises(QuantizationError):
        stored_bytes((4,), get_format("int3"), replace(grain, scales=PerChannel(1)))
    packed = pack_tensor(weights(), get_format("int3"), grain, kept=torch.tensor([0, 3]))
    bad: dict[str, Tensor] = {INDEX: torch.tensor([0b111], dtype=torch.uint8), "scale": torch.full((6,), torch.nan)}
    for name, part in bad.items():
        with pytest.raises(QuantizationError):
            check_values(replace(packed, parts={**packed.parts, name: part}))
    with pytest.raises(QuantizationError):
        check_layout(replace(packed, parts={**packed.parts, "scale": torch.ones(5)}))


# --- the file ----------------------------------------------------------------------------------------------------------


def read_with_numpy(path: Path, name: str) -> np.ndarray:
    """Written from docs/artifacts.md alone."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    facts = json.loads(header["__metadata__"]["fqdiff"])["quantized"][name]
    kept, _, scales = facts["granularity"].rpartition("+")
    _, count, high = kept.split(":")
    axis, dtype = int(scales.removesuffix(":float16").split(":")[-1]), "<f2" if scales.endswith("float16") else "<f4"
    shape = [facts["shape"][axis], *(n for k, n in enumerate(facts["shape"]) if k != axis)]
    per_row = int(np.prod(shape[1:]))
    chosen = np.zeros(shape[0], bool)
    begin, end = header[f"{name}.kept_index"]["data_offsets"]
    index = np.frombuffer(content[start + begin : start + end], np.uint8)
    chosen[read_index(index, int(count), shape[0])] = True
    assert chosen.sum() == int(count)

    used: dict[str, int] = {}

    def take(part: str, size: int) -> np.ndarray:
        """The next ``size`` bytes of a part: those of the other channels come first."""
        begin, _ = header[name if part == "data" else f"{name}.{part}"]["data_offsets"]
        begin += start + used.get(part, 0)
        used[part] = used.get(part, 0) + size
        return np.frombuffer(content[begin : begin + size], np.uint8)

    rows = np.zeros((shape[0], per_row), np.float32)
    for fmt, own in ((facts["format"], ~chosen), (high, chosen)):
        n = int(own.sum())
        width = {"float32": 4, "float16": 2}.get(fmt)
        if width:
            prefix = "high_" if own is chosen and facts["format"] in ("float32", "float16") else ""
            rows[own] = cast_value(take(prefix + "data", width * n * per_row), fmt).reshape(n, per_row)
            continue
        bits = int(fmt[-1]) if fmt != "ternary" else 0
        if fmt == "ternary":
            stream = take("codes", -(-n * per_row // 5))
            codes = np.array([byte // 3**k % 3 for byte in stream.tolist() for k in range(5)][: n * per_row])
        else:
            stream = take("codes", -(-n * per_row * bits // 8))
            codes = np.unpackbits(stream, bitorder="little")[: n * per_row * bits].reshape(-1, bits) @ (
                1 << np.arange(bits)
            )
        codes = codes.reshape(n, per_row)
        size = np.dtype(dtype).itemsize
        if fmt.startswith("codebook"):
            book = take("codebook", size * n * 2**bits).view(dtype).astype(np.float32).reshape(n, -1)
            rows[own] = np.take_along_axis(book, codes, axis=1)
            continue
        scale = take("scale", size * n).view(dtype).astype(np.float32)
        zero = np.ones(n)
        if fmt != "ternary":
            stream = take("zero_point", -(-n * bits // 8))
            zero = np.unpackbits(stream, bitorder="little")[: n * bits].reshape(n, bits) @ (1 << np.arange(bits))
        rows[own] = (codes - zero[:, None]).astype(np.float32) * scale[:, None]
    return np.moveaxis(rows.reshape(shape), 0, axis)


def test_a_reader_of_the_documentation_reads_what_was_stored(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path
) -> None:
    kinds = set()
    for bpw in (4.0, 6.0, 8.0):
        made = plan(checkpoint, weight_table, None, PlanConfig(target_bpw=bpw, **FREE), 0, Context())
        model = carried_out(checkpoint, made, weight_table)
        folder = tmp_path / str(bpw)
        folder.mkdir()
        save_quantized(model, folder)
        path = folder / "model.safetensors"
        assert path.stat().st_size == made.file_bytes <= bpw * made.parameters / 8
        state = model.network().state_dict()
        again = load_quantized(folder).network().state_dict()
        for entry in made.entries:
            assert torch.equal(again[entry.parameter], state[entry.parameter])
            grain = parse_granularity(entry.granularity)
            if isinstance(grain, PerOutput):
                kinds.add((entry.format, grain.high))
                np.testing.assert_array_equal(read_with_numpy(path, entry.parameter), state[entry.parameter].numpy())
    assert len(kinds) > 3


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_the_channels_chosen_lower_the_rise_most() -> None:
    """Against every subset of the same size."""
    x, fisher, axis = weights(3), weights(4).exp() * weights(5, (6, 1, 1, 1)).exp(), 0
    granularity = PerOutput(2, "int6", PerChannel(axis))
    for by in (BY_RISE, BY_FISHER):
        kept = choose_kept(x, get_format("int2"), granularity, fisher, by, "min-max")
        assert kept is not None
        rises = {}
        for subset in itertools.combinations(range(6), 2):
            packed = pack_tensor(x, get_format("int2"), granularity, kept=torch.tensor(subset))
            rises[subset] = float((fisher * (unpack_tensor(packed) - x).square()).sum())
        if by == BY_RISE:
            assert tuple(kept.tolist()) == min(rises, key=lambda s: rises[s])
        else:
            assert kept.tolist() == sorted(channel_sums(fisher, axis).argsort(descending=True)[:2].tolist())


def test_without_fisher_values_nothing_can_be_chosen() -> None:
    with pytest.raises(ConfigError, match="without Fisher"):
        choose_kept(weights(), get_format("int2"), PerOutput(2, "int6", PerChannel(0)), None, BY_RISE)


# --- plans -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "channel,group-near:12"])
def test_what_a_plan_predicts_is_what_its_tensors_do_and_less_than_without(
    checkpoint: Checkpoint, weight_table: FisherTable, granularity: str, tmp_path: Path
) -> None:
    settings = {**FREE, "target_bpw": 6.0}
    made = plan(
        checkpoint, weight_table, None, PlanConfig(**{**settings, "granularity": f"{granularity},output"}), 0, Context()
    )
    whole = plan(checkpoint, weight_table, None, PlanConfig(**{**settings, "granularity": granularity}), 0, Context())
    assert made.budget is not None
    assert whole.budget is not None
    assert made.budget.predicted < 0.95 * whole.budget.predicted
    state = carried_out(checkpoint, made, weight_table).network().state_dict()
    fisher = weight_table.weights[0].read()
    mixed = 0
    for e in made.entries:
        delta = state[e.parameter].double() - checkpoint.tensors[e.parameter].double()
        assert e.predicted == pytest.approx(
            0.5 * float((fisher[e.parameter].double() * delta.square()).sum()), rel=1e-4, abs=1e-12
        )
        mixed += isinstance(parse_granularity(e.granularity), PerOutput)
    assert mixed > 5
    save_plan(made, tmp_path)
    assert load_plan(tmp_path) == made


def test_a_plan_tells_how_many_weights_go_to_each_format(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    """Against the stored tensors: rejects counts that know one format for a tensor of two."""
    made = plan(checkpoint, weight_table, None, PlanConfig(target_bpw=6.0, **FREE), 0, Context())
    packed = carried_out(checkpoint, made, weight_table).packed
    counts: dict[str, int] = {}
    for entry in made.entries:
        own = packed[entry.parameter]
        parts = separate_outputs(own)[:2] if isinstance(own.granularity, PerOutput) else (own,)
        found = {p.format.name: int(np.prod(p.shape)) for p in parts}
        assert entry.weights_by_format == found
        assert entry.code_bits == pytest.approx(
            sum(p.format.bits * np.prod(p.shape) for p in parts) / np.prod(entry.shape)
        )
        assert entry.format_label == "+".join(p.format.name for p in parts)
        for name, count in found.items():
            counts[name] = counts.get(name, 0) + count
    shown: dict[str, int] = {}
    for row in block_rows(made):
        assert isinstance(row["formats"], dict)
        for name, count in row["formats"].items():
            shown[name] = shown.get(name, 0) + count
    assert shown == counts


def test_every_share_is_offered_where_it_is_worth_its_bytes(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    """Each mixture offered beats every straight line between two other options: rejects an offer of everything."""
    market = make_offer(checkpoint, weight_table, PlanConfig(target_bpw=6.0, **FREE), 0, Context()).market
    counts = set()
    for (name, options), costs in zip(market.options.items(), market.costs, strict=True):
        for option, cost in zip(options, costs, strict=False):
            if isinstance(grain := option.description[2], PerOutput):
                counts.add(grain.count / option.description[0][grain.scales.axis])
                others = [(o, c) for o, c in zip(options, costs, strict=False) if o is not option]
                assert not [o for o, c in others if c <= cost and o.value <= option.value], name
    assert len(counts) >= 3
    assert counts_of(SHARES, 2) == (1,)
    assert counts_of(SHARES, 1) == ()


def test_every_split_on_offer_can_be_packed(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    """Of channels near 0 alone float16 can hold no scales: rejects splits that are valued and never packed."""
    tensors = {name: t.clone() for name, t in checkpoint.tensors.items()}
    for t in tensors.values():
        if t.ndim == 4:
            t[: len(t) // 2] *= 1e-7
    faint, config = replace(checkpoint, tensors=tensors), PlanConfig(target_bpw=6.0, formats=("int8", "int4"), **FREE)
    options = make_offer(faint, weight_table, config, 0, Context()).market.options
    fisher = weight_table.weights[0].read()
    splits = 0
    for name, each in options.items():
        for option in each:
            if tensors[name].ndim == 4 and isinstance(option.description[2], PerOutput):
                option.stored(tensors[name], fisher[name])
                splits += 1
    assert splits > 5


def test_a_rule_puts_the_channels_above_its_threshold_into_the_wider_format(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    """With a table of channels, as the paper's strategies read it."""
    config = PlanConfig("threshold", low="int4", granularity="output", at=str(int(fisher_table.timesteps[1])))
    name = "block1.res1.conv1.weight"
    values = fisher_table.entries[name].channel[1].double()
    threshold = float(values.sort().values[len(values) // 2])
    made = plan(checkpoint, fisher_table, None, replace(config, threshold=threshold), 0, Context())
    (entry,) = (e for e in made.entries if e.parameter == name)
    grain = parse_granularity(entry.granularity)
    assert isinstance(grain, PerOutput)
    assert entry.format == "int4"
    assert (grain.high, grain.count) == ("float32", int((values >= threshold).sum()))
    model = carried_out(checkpoint, made, fisher_table)
    _, _, positions = separate_outputs(model.packed[name])
    assert positions.tolist() == (values >= threshold).nonzero().flatten().tolist()
    with pytest.raises(LineageError):
        carried_out(checkpoint, made, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "uniform", "low": "int4", "granularity": "output"},
        {"strategy": "budget", "target_bpw": 4.0, "granularity": "tensor,output"},
        {"strategy": "budget", "target_bpw": 4.0, "granularity": "element,output"},
        {"strategy": "budget", "target_bpw": 4.0, "granularity": "output", "score": "modelopt"},
        {"strategy": "budget", "target_bpw": 4.0, "granularity": "output", "score": "uniform"},
        {"strategy": "budget", "target_bpw": 4.0, "granularity": "output", "phases": 2},
        {"strategy": "groups", "granularity": "output", "rounding": "squant", "low": "int4"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PlanConfig(**settings)


LADDER = ("float16", "int8", "int4", "int2")


def ladder_plan(checkpoint: Checkpoint, table: FisherTable, **settings: Any) -> Plan:
    given = {"strategy": "mean-std", "mean_std": 0.1, "ladder_step": 8.0, "ladder": LADDER, "granularity": "output"}
    return plan(checkpoint, table, None, PlanConfig(**{**given, **settings}), 0, Context())  # type: ignore[arg-type]


def test_no_channel_of_a_ladder_gets_a_narrower_format_than_it_asks_for(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path
) -> None:
    """Told from the stored tensors. Rejects neighbours of the ladder that cut off the channels that ask for most."""
    made = ladder_plan(checkpoint, weight_table)
    save_plan(made, tmp_path)
    assert load_plan(tmp_path) == made
    model = carried_out(checkpoint, load_plan(tmp_path), weight_table)
    save_quantized(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes
    fisher = weight_table.weights[0].read()
    pairs = set()
    for e in made.entries:
        grain = parse_granularity(e.granularity)
        if not isinstance(grain, PerOutput):
            continue
        assert e.threshold is not None
        values = channel_sums(fisher[e.parameter], grain.scales.axis) / (prod(e.shape) / e.shape[grain.scales.axis])
        asks = sum((values < e.threshold / 8**k).int() for k in range(3))
        assert isinstance(asks, Tensor)
        own = torch.full_like(asks, LADDER.index(e.format))
        own[separate_outputs(model.packed[e.parameter])[2]] = LADDER.index(grain.high)
        assert bool((own <= asks).all())
        assert grain.high == LADDER[int(asks.min())]
        ranks = sorted(set(asks.tolist()))
        others = {
            rank: stored_bytes(
                e.shape, get_format(LADDER[rank]), PerOutput(int((asks < rank).sum()), grain.high, grain.scales)
            )
            for rank in ranks[1:]
        }
        assert e.bytes == min(others.values())
        pairs.add((grain.high, e.format))
    assert len(pairs) > 2


def test_a_ladder_of_two_is_high_and_low_for_channels_too(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    two = ladder_plan(checkpoint, weight_table, ladder=("int8", "int3"), ladder_step=10.0)
    given = {"ladder": (), "high": "int8", "low": "int3", "ladder_step": 10.0}
    assert two == ladder_plan(checkpoint, weight_table, **given)


def test_a_tensor_that_two_formats_would_not_make_smaller_keeps_its_scales(
    checkpoint: Checkpoint, weight_table: FisherTable
) -> None:
    """Rejects one scale for the whole tensor, which would have been smaller and was never asked for."""
    made = ladder_plan(checkpoint, weight_table, ladder=(), high="int8", low="int6", ladder_step=10.0)
    whole = [e for e in made.entries if e.format == "int8" and not e.granularity.startswith("output")]
    assert whole
    assert {e.granularity.partition(":")[0] for e in whole} == {"channel"}


def test_a_budget_needs_single_weights(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    with pytest.raises(FqdiffError, match="single weights"):
        plan(checkpoint, fisher_table, None, PlanConfig(target_bpw=6.0, **FREE), 0, Context())


def test_budgets_offer_channels_by_default_where_single_weights_are_known() -> None:
    weight, channel = ({"kind": "true", "granularity": name} for name in ("weight", "channel"))
    assert "output" in str(budget_defaults(weight, {})["granularity"]).split(",")
    for table, given in (
        (channel, {}),
        ({}, {"score": "weight-mse"}),
        (weight, {"phases": 4}),
        (weight, {"predictor": "gram"}),
        (weight, {"rounding": "squant"}),
        (weight, {"score": "uniform"}),
        (weight, {"score": "autoround"}),
    ):
        defaults = budget_defaults(table, given)
        assert "output" not in str(defaults["granularity"])
        PlanConfig("budget", target_bpw=4.0, **{**defaults, **given})  # type: ignore[arg-type]


# --- distillation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_a_trainable_tensor_of_two_formats_is_what_is_stored(low: str, high: str) -> None:
    granularity = PerOutput(2, high, PerChannel(1, HALF))
    packed = pack_tensor(weights(), get_format(low), granularity, kept=torch.tensor([1, 3]))
    module = trainable(weights(), packed)
    torch.testing.assert_close(module().detach(), unpack_tensor(packed), atol=0, rtol=0)
    target, optimizer = weights(1), torch.optim.Adam(module.parameters(), lr=0.05)
    before = float((module().detach() - target).square().sum())
    for _ in range(30):
        optimizer.zero_grad()
        (module() - target).square().sum().backward()
        optimizer.step()
    made: PackedTensor = module.packed()
    check_layout(made)
    check_values(made)
    torch.testing.assert_close(module().detach(), unpack_tensor(made), atol=0, rtol=0)
    assert float((unpack_tensor(made) - target).square().sum()) < 0.8 * before
    assert torch.equal(made.parts[INDEX], packed.parts[INDEX])


def test_distillation_keeps_the_size(checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path) -> None:
    made = plan(checkpoint, weight_table, None, PlanConfig(target_bpw=6.0, **FREE), 0, Context())
    model = carried_out(checkpoint, made, weight_table, distill=3)
    save_quantized(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes
    plain = carried_out(checkpoint, made, weight_table)
    assert any(not torch.equal(t, model.network().state_dict()[n]) for n, t in plain.network().state_dict().items())


# --- commands ------------------------------------------------------------------------------------------------------------------


def test_commands_hand_the_table_on_to_what_chooses_channels(tmp_path: Path) -> None:
    """Also one of channels only."""
    store = tmp_path / "store"
    good(store, "import", "pretrained:mnist-small")
    good(store, "fisher", "--timesteps", "2", "--samples", "2")
    good(store, "plan", "--groups", "12/345/6", "--low", "int4", "--granularity", "output", "--at", "mean")
    model = good(store, "quantize")
    sizes = good(store, "size", str(model["id"]))
    assert sizes["file_bytes"] == (store / "quantized" / str(model["id"]) / "model.safetensors").stat().st_size
    shown = call(store, "plan", "show")
    assert shown.exit_code == 0
    assert "output:" in shown.stdout
