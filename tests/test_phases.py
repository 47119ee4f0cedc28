"""Precision by phases of timesteps: nested codes, the network that reads them by t, the file, and plans for two limits."""

import copy
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fqdiff.cli.plan_budget import facts_text
from fqdiff.configs import PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, FqdiffError, QuantizationError
from fqdiff.planning import phases
from fqdiff.planning.candidates import Market, Option
from fqdiff.planning.knapsack import total
from fqdiff.planning.plans import Offer, make_offer, make_plan
from fqdiff.planning.scores import fisher_importance
from fqdiff.quant.formats import PerChannel, PerTensor, get_format, with_phases
from fqdiff.quant.modules import PackedParameter
from fqdiff.quant.nested import plane_widths
from fqdiff.quant.packed import PackedTensor, pack_tensor, read_bytes, stored_bytes, unpack_tensor
from fqdiff.quant.packing import unpack
from fqdiff.quant.timestep_bias import add_timestep_bias
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, FisherTable, Plan, QuantizedCheckpoint
from tests.test_quant import read_with_numpy

STEPS = 1000


def phased_config(**changes: object) -> PlanConfig:
    return PlanConfig("budget", **{"target_bpw": 6.0, "phases": 4, "traffic_bpw": 4.5, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def offer(checkpoint: Checkpoint, fisher_table: FisherTable) -> Offer:
    return make_offer(checkpoint, fisher_table, phased_config(), 0, Context())


@pytest.fixture(scope="module")
def phased(checkpoint: Checkpoint, fisher_table: FisherTable) -> Plan:
    return plan(checkpoint, fisher_table, None, phased_config(), 0, Context())


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, phased: Plan) -> QuantizedCheckpoint:
    return quantize(checkpoint, phased, None, QuantizeConfig(), 0, Context())


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int6:2/4/6/6", "int8sym:3/8", "int5:5/2/3", "int3:2/3/2/2"])
def test_the_top_bits_of_the_code_are_the_code_of_fewer_bits(name: str) -> None:
    """Rejects planes that start from the low bits, and a phase that is given another one's number of bits."""
    fmt, x = get_format(name), torch.randn(5, 3, 7)
    whole = pack_tensor(x, get_format(name.partition(":")[0]), PerChannel(0))
    packed = pack_tensor(x, fmt, PerChannel(0))
    full = unpack(whole.parts["codes"], fmt.bits, (5, 3, 7)).int()
    assert torch.equal(
        unpack(packed.parts["codes"], min(fmt.phase_bits), (5, 3, 7)), full >> int(fmt.bits) - min(fmt.phase_bits)
    )
    assert torch.equal(unpack_tensor(packed), unpack_tensor(whole))
    scale = packed.parts["scale"][:, None, None]
    zero = unpack(packed.parts["zero_point"], fmt.bits, (5,))[:, None, None] if fmt.has_zero_points else fmt.zero_point
    for phase, bits in enumerate(fmt.phase_bits):
        steps = 2 ** (int(fmt.bits) - bits)
        alike = [full // steps * steps + k for k in range(steps)]  # all codes with the same top bits
        centre = sum(alike) / steps - zero
        assert torch.allclose(unpack_tensor(packed, phase), scale * centre, rtol=0, atol=1e-6)


@given(st.integers(0, 10_000))
def test_errors_fall_with_the_bits_and_stay_within_half_an_interval(seed: int) -> None:
    """Rejects reading the lower end of an interval in place of its middle."""
    x = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
    packed = pack_tensor(x, replace(get_format("int8"), phase_bits=(2, 3, 4, 5, 6, 8)), PerTensor())
    scale = float(packed.parts["scale"])
    errors = [(unpack_tensor(packed, phase) - x).abs() for phase in range(6)]
    for error, bits in zip(errors, packed.format.phase_bits, strict=True):
        assert float(error.max()) <= scale * (2 ** (8 - bits) / 2 + 0.001)
    squares = [float(e.square().sum()) for e in errors]
    assert squares == sorted(squares, reverse=True)


def test_a_plane_is_a_part_and_a_phase_reads_no_plane_beyond_its_bits() -> None:
    fmt = get_format("int6:6/4/2/2")
    assert plane_widths(fmt) == {"codes": 2, "plane1": 2, "plane2": 2}
    packed = pack_tensor(torch.randn(8, 8), fmt, PerChannel(0))
    rest = {k: (torch.full_like(t, 0x5A) if k.startswith("plane") else t) for k, t in packed.parts.items()}
    spoilt = PackedTensor(fmt, packed.granularity, packed.shape, rest)
    assert torch.equal(unpack_tensor(spoilt, 2), unpack_tensor(packed, 2))
    assert not torch.equal(unpack_tensor(spoilt, 1), unpack_tensor(packed, 1))
    others = 8 * 4 + 6  # scales, packed zero points
    assert stored_bytes((8, 8), fmt, PerChannel(0)) == 64 * 6 // 8 + others
    assert read_bytes((8, 8), fmt, PerChannel(0)) == 64 * (6 + 4 + 2 + 2) / 4 / 8 + others
    assert read_bytes((8, 8), get_format("int6"), PerChannel(0)) == 64 * 6 // 8 + others


@pytest.mark.parametrize("name", ["int6:2/4/6/6", "int8sym:3/8", "int5:5/2/3"])
def test_a_reader_that_knows_only_the_documentation_finds_the_same_values(name: str, tmp_path: Path) -> None:
    from fqdiff.quant.container import file_bytes, metadata, part_name, stored_tensors
    from fqdiff.store.files import write_tensors

    path, packed = tmp_path / "model.safetensors", pack_tensor(torch.randn(6, 4, 10), get_format(name), PerChannel(1))
    described = {"w": (packed.shape, packed.format, packed.granularity)}
    write_tensors(path, {part_name("w", k): t for k, t in packed.parts.items()}, metadata({}, described))
    assert path.stat().st_size == file_bytes(stored_tensors(described), metadata({}, described))
    assert np.array_equal(read_with_numpy(path, "w"), unpack_tensor(packed).numpy())
    for phase in range(len(packed.format.phase_bits)):
        assert np.array_equal(read_with_numpy(path, "w", phase), unpack_tensor(packed, phase).numpy())


@pytest.mark.parametrize(
    "name",
    [
        *("int6:6", "int6:6/6", "int6:2/4", "int6:8/6", "int7:7/2", "ternary:2/3", "float16:8/2", "int6:6/2/2/2/2"),
        *("int6:6/2/", "int6:", "int6:06/2", "int6:6/²", "int6:6/7", "int6:6/2:6/2", ":6/2"),
    ],
)
def test_phases_that_make_no_sense_are_no_format(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown format"):
        get_format(name)


# --- networks --------------------------------------------------------------------------------------------------------


def in_phase(model: QuantizedCheckpoint, phase: int) -> nn.Module:
    """A plain network with the weights of one phase."""
    return model.spec.network({name: unpack_tensor(p, phase) for name, p in model.packed.items()})


def inputs(t: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(len(t), 1, 8, 8), torch.tensor(t)


@pytest.mark.parametrize("cache", [False, True])
def test_a_batch_uses_the_weights_of_its_phase(cache: bool, model: QuantizedCheckpoint) -> None:
    network = model.packed_network(cache)
    outputs = []
    for t in (0, 249, 250, 499, 500, 749, 750, 999, 3):  # and back again
        x, steps = inputs([t, t])
        outputs.append(network(x, steps))
        assert torch.equal(outputs[-1], in_phase(model, t // 250)(x, steps))
        assert torch.equal(model.network()(x, steps), outputs[-1])
    assert not torch.equal(in_phase(model, 0)(*inputs([999])), in_phase(model, 3)(*inputs([999])))


def test_samples_of_several_phases_go_through_the_network_phase_by_phase(model: QuantizedCheckpoint) -> None:
    """Rejects one phase for all of a batch. And, with biases by timestep, hooks that keep looking at the whole batch."""
    x, t = inputs([999, 0, 400, 1, 600])
    head = next(name.removesuffix(".bias") for name in reversed(list(model.packed)) if name.endswith(".bias"))
    tables = {head: torch.randn(10, *model.packed[f"{head}.bias"].shape).half()}
    for each in (model, replace(model, timestep_bias=tables)):
        network, found = each.network(), each.network()(x, t)
        assert torch.equal(copy.deepcopy(network)(x, t), found)
        for k in range(len(t)):
            plain = in_phase(model, int(t[k]) // 250)
            add_timestep_bias(plain, each.timestep_bias, STEPS)
            assert torch.allclose(found[k : k + 1], plain(x[k : k + 1], t[k : k + 1]), atol=1e-5)


def test_a_copy_of_a_network_reads_its_own_parameters(model: QuantizedCheckpoint) -> None:
    """Rejects closures that keep the network they were made for."""
    network = model.packed_network()
    twin = copy.deepcopy(network)
    for buffer in twin.buffers():
        buffer.zero_()
    x, t = inputs([10])
    assert not twin(x, t).any()
    assert torch.equal(network(x, t), in_phase(model, 0)(x, t))


def test_a_network_keeps_one_tensor_for_each_precision(model: QuantizedCheckpoint) -> None:
    network = model.network()
    for t in (0, 300, 600, 900):
        network(*inputs([t]))
    held = {name: module.values for name, module in network.named_modules() if isinstance(module, PackedParameter)}
    for name, packed in model.packed.items():
        assert held[name].keys() == set(packed.format.phase_bits or (packed.format.bits,))


def test_timesteps_that_the_model_does_not_have_are_refused(model: QuantizedCheckpoint) -> None:
    for t in (-1, STEPS):
        with pytest.raises(QuantizationError, match="of a model that has 1000"):
            model.network()(*inputs([5, t]))


# --- plans -----------------------------------------------------------------------------------------------------------


def test_the_importance_of_all_phases_is_that_of_the_whole(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    schedule, shapes = checkpoint.spec.noise_schedule(), {n: tuple(t.shape) for n, t in checkpoint.tensors.items()}
    whole = fisher_importance(fisher_table, "snr", schedule, shapes)
    parts = [fisher_importance(fisher_table, "snr", schedule, shapes, (k, 3)) for k in range(3)]
    for name, values in whole.items():
        assert torch.allclose(sum(p[name] for p in parts), values, rtol=1e-9)  # type: ignore[arg-type]


def test_a_plan_keeps_both_limits_and_is_carried_out_to_the_byte(
    phased: Plan, model: QuantizedCheckpoint, checkpoint: Checkpoint, fisher_table: FisherTable, tmp_path: Path
) -> None:
    """And its prediction is the sum over timesteps of half the Fisher value times the squared error in that phase."""
    assert phased.budget is not None
    assert phased.phases is not None
    save_quantized(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == phased.file_bytes <= 6.0 * phased.parameters / 8
    read, rise = 0.0, 0.0
    for name, packed in load_quantized(tmp_path).packed.items():
        fmt, entry = packed.format, fisher_table.entries[name]
        for k in range(4):
            bits = fmt.phase_bits[k] if fmt.phase_bits else None
            parts = dict(packed.parts)
            for part, width in (plane_widths(fmt) if fmt.phase_bits else {}).items():
                if bits is not None and bits <= 0:
                    parts.pop(part)
                bits = bits - width if bits is not None else None
            read += sum(t.nbytes for t in parts.values()) / 4
            error = (unpack_tensor(packed, k).double() - checkpoint.tensors[name].double()).square()
            axis = 1 if entry.channel.shape[1] != error.shape[0] else 0
            rows = error.movedim(axis, 0).flatten(1).sum(dim=1) if error.ndim > 1 else error
            rise += float(0.5 * (entry.channel[250 * k : 250 * (k + 1)].double() @ rows).sum()) / STEPS
    assert read == pytest.approx(phased.phases.read_bytes)
    assert read <= 4.5 * phased.parameters / 8
    assert rise == pytest.approx(phased.budget.predicted, rel=1e-4)
    assert phased.budget.predicted < phased.phases.single_predicted
    assert phased.budget.lower_bound is not None
    assert phased.budget.lower_bound <= phased.budget.predicted <= 1.05 * phased.budget.lower_bound


def test_for_bytes_of_the_file_alone_phases_change_nothing(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    one, four = (
        plan(checkpoint, fisher_table, None, phased_config(phases=k, traffic_bpw=0.0), 0, Context()) for k in (1, 4)
    )
    assert one.phases is None
    assert four.phases is not None
    assert [(e.format, e.granularity) for e in four.entries] == [(e.format, e.granularity) for e in one.entries]
    assert four.budget == one.budget
    assert four.file_bytes == one.file_bytes
    assert "4 phases change nothing" in "\n".join(facts_text(four))


def test_one_phase_is_the_plan_that_it_was(offer: Offer, checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    config = phased_config(phases=1, traffic_bpw=0.0)
    assert plan(checkpoint, fisher_table, None, config, 0, Context()) == make_plan(offer, config)


def small_market(seed: int) -> Market:
    draw = np.random.default_rng(seed)
    options = {}
    for name in "abcd":
        shape, each = (int(draw.integers(4, 40)), 64), []
        for bits in (2, 4, 8):
            fmt = get_format(f"int{bits}")
            lower = [b for b in (2, 4) if b < bits]
            for variant in (fmt, *(with_phases(fmt, (bits, b)) for b in lower)):
                description = (shape, variant, PerTensor())
                value = float(draw.exponential() * sum(4.0**-b for b in variant.phase_bits or (bits, bits)))
                each.append(Option(description, "min-max", "nearest", stored_bytes(*description), value))
        options[name] = tuple(each)
    return Market({}, options)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_two_limits_is_between_its_bound_and_brute_force(seed: int) -> None:
    """Rejects bounds above the optimum, choices over a limit, and results far from the optimum."""
    market = small_market(seed)
    reads = phases.reads_of(market)
    every = list(itertools.product(*(range(len(o)) for o in market.options.values())))
    target = int(np.quantile([market.size(c) for c in every[::7]], 0.5))
    limit = int(np.quantile([total(reads, c) for c in every], 0.3))
    best = phases.best_within(market, target, limit)
    found = best.predicted(market)
    fitting = [total(market.values, c) for c in every if total(reads, c) <= limit and market.size(c) <= target]
    assert market.size(best.choice.positions) <= target
    assert total(reads, best.choice.positions) <= limit
    assert best.choice.lower_bound <= min(fitting) * (1 + 1e-9)
    assert min(fitting) <= found * (1 + 1e-9)
    assert found <= 1.5 * min(fitting)


def test_a_plan_comes_back_from_its_file_and_lies_about_phases_are_refused(phased: Plan, tmp_path: Path) -> None:
    save_plan(phased, tmp_path)
    assert load_plan(tmp_path) == phased
    data = json.loads((tmp_path / "plan.json").read_text())
    facts = asdict(phased.phases)  # type: ignore[call-overload]
    lies: tuple[object, ...] = (
        {**facts, "count": 3},
        {**facts, "read_bytes": facts["read_bytes"] / 2},
        {**facts, "traffic_bytes": 10},
        {**facts, "single_predicted": -1.0},
        {**facts, "more": 1},
        [],
        None,
    )
    for lie in lies:
        (tmp_path / "plan.json").write_text(json.dumps({**data, "phases": lie}))
        with pytest.raises(ArtifactCorrupt):
            load_plan(tmp_path)
    del data["phases"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactCorrupt, match="phases"):
        load_plan(tmp_path)


@pytest.mark.parametrize("fmt", ["int6:6/2", "int6:2/2/2/6", "int6:6/4/2", "int6:6/2/2/2/2", "int6:6/3/3/3"])
def test_a_file_whose_planes_or_phases_do_not_fit_is_refused(fmt: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    from fqdiff.store.files import read_tensors, write_tensors

    config = PlanConfig("uniform", low="int6")
    plain = quantize(
        checkpoint, plan(checkpoint, None, None, config, 0, Context()), None, QuantizeConfig(), 0, Context()
    )
    names = [name for name, p in plain.packed.items() if p.format.name == "int6"][:2]
    made = {n: pack_tensor(checkpoint.tensors[n], get_format("int6:6/4/2/2"), PerChannel(0)) for n in names}
    save_quantized(replace(plain, packed={**plain.packed, **made}), tmp_path)
    assert load_quantized(tmp_path).phases == 4
    path = tmp_path / "model.safetensors"
    tensors, meta = read_tensors(path)
    content = dict(meta)
    content["quantized"][names[0]]["format"] = fmt
    write_tensors(path, tensors, {"fqdiff": json.dumps(content)})
    with pytest.raises(ArtifactCorrupt):
        load_quantized(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": 1}, "--traffic-bpw without phases"),
        ({"phases": 5}, "phases is 5"),
        ({"phases": 0}, "phases is 0"),
        ({"traffic_bpw": -1.0}, "traffic_bpw is -1"),
        ({"traffic_bpw": float("nan")}, "traffic_bpw is nan"),
        ({"score": "trajectory"}, "does not tell phases apart"),
        ({"timestep_weights": "at:1"}, "does not tell phases apart"),
        ({"refine": 3}, "know no phases"),
        ({"target_bpw": 0.0, "max_loss_increase": 1.0}, "phases for a limit on the rise"),
        ({"formats": ("int6:6/2",)}, "format int6:6/2 for all"),
    ],
)
def test_settings_that_phases_cannot_have_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phased_config(**changes)
    with pytest.raises(ConfigError):
        PlanConfig("uniform", low="int6:6/2")


def test_traffic_below_the_least_names_it(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(checkpoint, fisher_table, None, phased_config(traffic_bpw=0.5), 0, Context())
    least = float(caught.value.hint.rpartition(" ")[2])
    plan(checkpoint, fisher_table, None, phased_config(traffic_bpw=least), 0, Context())
    with pytest.raises(ConfigError):
        plan(checkpoint, fisher_table, None, phased_config(traffic_bpw=least - 0.01), 0, Context())


def test_biases_are_not_corrected_where_their_means_change_by_phase(checkpoint: Checkpoint, phased: Plan) -> None:
    with pytest.raises(FqdiffError, match="from phase to phase"):
        quantize(checkpoint, phased, None, QuantizeConfig(bias_correction="static"), 0, Context())
