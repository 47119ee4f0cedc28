"""Network-wise reconstruction: roundings stay whole, what the network puts out comes closer than after blocks, runs resume."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fqdiff.calibration import reconstruct_network as module
from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.reconstruct import reconstruct, spread
from fqdiff.calibration.reconstruct_network import (
    begin,
    full_outputs,
    output_error,
    reconstruct_network,
    restore,
    snapshot,
)
from fqdiff.calibration.repeated import set_rate
from fqdiff.configs import (
    CalibrateConfig,
    PlanConfig,
    QuantizeConfig,
    ReconstructConfig,
    config_data,
    config_from_data,
)
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.models.registry import temporal_block
from fqdiff.quant.adaround import LearnedRounding, can_learn_rounding
from fqdiff.quant.formats import PerChannel, get_format
from fqdiff.quant.hard_rounding import MARGIN, HardRounding
from fqdiff.quant.packed import PackedTensor, pack_tensor, unpack_tensor
from fqdiff.quant.packing import unpack
from fqdiff.rng import generator
from fqdiff.stages import reconstruct as stage
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.reconstruct import reconstruct_blocks, reconstruct_temporal_first
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint

FEW = ReconstructConfig(iterations=20, batch=8, inputs=64, network_iterations=60)
BLOCKS = replace(FEW, network_iterations=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    return calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=13), 0, Context())


@pytest.fixture(scope="module")
def nearest(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int3"), 0, Context())
    return quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())


@pytest.fixture(scope="module")
def blocks(checkpoint: Checkpoint, nearest: QuantizedCheckpoint, calibration: CalibrationSet) -> QuantizedCheckpoint:
    return reconstruct_blocks(checkpoint, nearest, calibration, BLOCKS, 0, Context())


def inputs_of(calibration: CalibrationSet) -> CalibrationInputs:
    return CalibrationInputs(calibration.x_t.float(), calibration.t)


def learnable_of(model: QuantizedCheckpoint) -> dict[str, PackedTensor]:
    return {name: p for name, p in model.packed.items() if can_learn_rounding(p.format, p.granularity)}


def codes_of(p: PackedTensor) -> Tensor:
    return unpack(p.parts["codes"], p.format.bits, p.shape).int()


def same(one: PackedTensor, other: PackedTensor) -> bool:
    return all(torch.equal(t.view(torch.uint8), other.parts[k].view(torch.uint8)) for k, t in one.parts.items())


# --- rounding --------------------------------------------------------------------------------------------------------


def mixed_rounding() -> tuple[Tensor, PackedTensor, HardRounding]:
    """Weights of which a third is rounded away from the nearest."""
    tensor = torch.randn(5, 12, generator=generator(0, "test network"))
    packed = pack_tensor(tensor, get_format("int4"), PerChannel(0))
    choices = LearnedRounding("w", tensor, packed)
    is_up = (choices.soft() >= 0.5) ^ (torch.arange(60).view(5, 12) % 3 == 0)
    given = choices.packed(choices.chosen(is_up))
    return tensor, given, HardRounding("w", tensor, given)


def test_a_rounding_begins_as_it_is_stored_and_passes_gradients_as_if_it_lay_between() -> None:
    tensor, given, rounding = mixed_rounding()
    assert torch.equal(rounding(), unpack_tensor(given))
    assert same(rounding.packed(), given)
    fraction = tensor / rounding.choices.get_buffer("scale")[:, None]
    fraction = fraction - fraction.floor()
    up, down = rounding.choices.get_buffer("up"), rounding.choices.get_buffer("down")
    away, free = torch.arange(60).view(5, 12) % 3 == 0, up != down
    assert min((away & free).sum(), (~away & free).sum()) > 15
    torch.testing.assert_close(rounding.h[~away & free], fraction[~away & free], atol=1e-5, rtol=0)
    margins = (rounding.h[away & free] - 0.5).abs()
    torch.testing.assert_close(margins, torch.full_like(margins, MARGIN))
    slope = torch.randn(5, 12, generator=generator(1, "test network"))
    (rounding() * slope).sum().backward()
    torch.testing.assert_close(rounding.h.grad, slope * (up - down) * rounding.choices.get_buffer("scale")[:, None])
    assert [name for name, p in rounding.named_parameters() if p.requires_grad] == ["h"]


def test_a_rounding_is_down_or_up_wherever_it_is_moved() -> None:
    _, given, rounding = mixed_rounding()
    with torch.no_grad():
        rounding.h.add_(torch.randn(5, 12, generator=generator(2, "test network")) * 3)
    rounding.keep_within()
    assert rounding.h.min() == 0
    assert rounding.h.max() == 1
    codes = codes_of(rounding.packed())
    up, down = rounding.choices.get_buffer("up"), rounding.choices.get_buffer("down")
    assert ((codes == up) | (codes == down)).all()
    assert torch.equal(rounding(), unpack_tensor(rounding.packed()))
    assert not torch.equal(codes, codes_of(given))


def test_a_rate_is_put_where_a_graph_reads_it() -> None:
    """Rejects a tensor that is replaced: what was captured would go on by the first rate."""
    rate = torch.tensor(1.0)
    captured, plain = {"lr": rate}, {"lr": 1.0}
    for group in (captured, plain):
        set_rate(group, 0.25)
    assert captured["lr"] is rate
    assert rate.item() == plain["lr"] == 0.25


# --- networks --------------------------------------------------------------------------------------------------------


def test_the_network_comes_closer_on_other_inputs_and_codes_stay_down_or_up(
    checkpoint: Checkpoint, nearest: QuantizedCheckpoint, blocks: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    made = reconstruct_blocks(checkpoint, nearest, calibration, FEW, 0, Context())
    other = calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=4), 1, Context())
    full = checkpoint.network()
    targets = full_outputs(full, inputs_of(other), Context())

    def error(model: QuantizedCheckpoint) -> float:
        values = {name: unpack_tensor(p) for name, p in model.packed.items()}
        return output_error(full, values, targets, torch.arange(len(other.t)))

    with torch.no_grad():
        found, wanted = blocks.network()(other.x_t, other.t), full(other.x_t, other.t)
    assert error(blocks) == pytest.approx(float((found - wanted).square().mean()), rel=1e-4)
    assert error(made) < 0.8 * error(blocks)
    changed = 0
    for name, p in nearest.packed.items():
        if p.format.is_integer:
            changed += int((codes_of(made.packed[name]) != codes_of(blocks.packed[name])).sum())
            assert (codes_of(made.packed[name]) - codes_of(p)).abs().max() <= 1
        else:
            assert same(p, made.packed[name])
    assert changed > 100
    assert made.described == nearest.described


def test_none_is_the_blocks_alone(
    checkpoint: Checkpoint, nearest: QuantizedCheckpoint, blocks: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """0 steps are in no recipe, so that older artifacts keep their ids; and with no rounding to learn nothing changes."""
    inputs = inputs_of(calibration)
    alone, seconds = reconstruct(checkpoint, nearest, inputs, BLOCKS, 0, Context())
    assert seconds > 0
    assert all(same(p, blocks.packed[name]) for name, p in alone.items())
    kept = reconstruct_network(checkpoint, blocks, inputs, FEW, 0, Context(), blocks.packed.keys())
    assert all(same(p, kept[name]) for name, p in blocks.packed.items())
    assert "network_iterations" not in config_data(BLOCKS)
    assert config_data(FEW)["network_iterations"] == 60
    assert config_from_data(ReconstructConfig, config_data(BLOCKS)) == BLOCKS
    assert config_data(ReconstructConfig())["network_iterations"] == ReconstructConfig.network_iterations > 0


def test_what_is_apart_stays(checkpoint: Checkpoint, nearest: QuantizedCheckpoint, calibration: CalibrationSet) -> None:
    """The temporal block, learned before all others. Rejects one whose projections are learned again with the rest."""
    alone = reconstruct_temporal_first(checkpoint, nearest, calibration, BLOCKS, 0, Context())
    made = reconstruct_temporal_first(checkpoint, nearest, calibration, FEW, 0, Context())
    moved = {name for name, p in alone.packed.items() if not same(p, made.packed[name])}
    temporal = set(temporal_block(checkpoint.network())[1].values())
    assert len(temporal) > 10
    assert moved
    assert not moved & temporal
    free = reconstruct_blocks(checkpoint, nearest, calibration, FEW, 0, Context())
    held = reconstruct_blocks(checkpoint, nearest, calibration, BLOCKS, 0, Context())
    assert temporal & {name for name, p in held.packed.items() if not same(p, free.packed[name])}


class Stopping:
    """A stop that is asked for after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> AbstractContextManager[Callable[[], bool]]:
        return nullcontext(self.asked)

    def asked(self) -> bool:
        self.left -= 1
        return self.left == 0


def test_a_stopped_run_ends_alike_and_the_seed_matters(
    checkpoint: Checkpoint, blocks: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects moments, codes or the lowest error that are lost between two processes."""
    inputs = inputs_of(calibration)
    whole = reconstruct_network(checkpoint, blocks, inputs, FEW, 0, Context())
    parts = MemoryParts()
    with pytest.raises(KeyboardInterrupt):
        reconstruct_network(checkpoint, blocks, inputs, FEW, 0, Context(parts=parts, soft_stop=Stopping(23)))
    part = parts.saved[module.NAME]
    assert part.data["step"] == 23
    state = begin(checkpoint, learnable_of(blocks), CPU)
    restore(state, part)
    assert state.lowest == part.data["lowest"] < 1
    assert all(torch.equal(p.parts["codes"], part.tensors[f"best/{name}"]) for name, p in state.best.items())
    steps = []
    learn = module.learn_step
    monkeypatch.setattr(module, "learn_step", lambda *a: (steps.append(1), learn(*a))[1])
    again = reconstruct_network(checkpoint, blocks, inputs, FEW, 0, Context(parts=parts))
    assert len(steps) == 60 - 23
    assert all(same(p, whole[name]) for name, p in again.items())
    other = reconstruct_network(checkpoint, blocks, inputs, FEW, 1, Context())
    assert not all(same(p, whole[name]) for name, p in other.items())


@pytest.mark.parametrize("broken", ["nothing", "no numbers", "h", "best", "exp_avg", "no moments", "nan"])
def test_a_part_of_another_recipe_is_refused(checkpoint: Checkpoint, blocks: QuantizedCheckpoint, broken: str) -> None:
    state = begin(checkpoint, learnable_of(blocks), CPU)
    sum(r().square().sum() for r in state.roundings.values()).backward()  # type: ignore[union-attr]
    state.optimizer.step()
    part = snapshot(state)
    restore(begin(checkpoint, learnable_of(blocks), CPU), part)
    name = next(iter(state.roundings))
    tensors = dict(part.tensors)
    if broken in ("h", "best", "exp_avg"):
        tensors[f"{broken}/{name}"] = tensors[f"{broken}/{name}"][1:]
    elif broken == "no moments":
        tensors = {key: t for key, t in tensors.items() if key.startswith(("h/", "best/"))}
    elif broken == "nan":
        tensors[f"h/{name}"] = tensors[f"h/{name}"] * math.nan
    elif broken == "nothing":
        tensors = {}
    data = {} if broken == "no numbers" else part.data
    with pytest.raises(ConfigError, match="another recipe"):
        restore(begin(checkpoint, learnable_of(blocks), CPU), Part(tensors, data))


def clocked(monkeypatch: pytest.MonkeyPatch, rates: list[float]) -> None:
    """A clock that a look moves on by a second, and the rates of steps in ``rates``."""
    clock = iter(range(10_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    put: Callable[..., None] = module.set_rate
    monkeypatch.setattr(module, "set_rate", lambda group, rate: (rates.append(rate), put(group, rate))[1])


def test_minutes_shorten_the_schedule_and_complete_it_after_a_stop_too(
    checkpoint: Checkpoint, blocks: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects a clock that begins anew, by which rates would rise again; and errors that are measured by steps alone."""
    rates: list[float] = []
    clocked(monkeypatch, rates)
    config, parts, inputs = replace(FEW, network_iterations=5000, minutes=1.5), MemoryParts(), inputs_of(calibration)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_network(checkpoint, blocks, inputs, config, 0, Context(parts=parts, soft_stop=Stopping(30)))
    assert len(rates) == 30
    measured = []
    measure = module.output_error
    monkeypatch.setattr(module, "output_error", lambda *a: (measured.append(1), measure(*a))[1])
    reconstruct_network(checkpoint, blocks, inputs, config, 0, Context(parts=parts))
    assert 50 <= len(rates) <= 90
    assert module.RATE >= rates[0] > 0.99 * module.RATE
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.02 * module.RATE
    assert len(measured) > 10


def test_blocks_leave_the_rest_of_the_minutes_to_all_of_them_together(
    checkpoint: Checkpoint, nearest: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects halves that are fixed. The temporal block's seconds are blocks'."""
    given = []

    def noting(c: Any, model: QuantizedCheckpoint, i: Any, config: ReconstructConfig, *rest: Any) -> Any:
        given.append(config.minutes)
        return dict(model.packed)

    monkeypatch.setattr(stage, "reconstruct", lambda *a: given.append(a[3].minutes) or (a[1].packed, 90.0))
    monkeypatch.setattr(stage, "reconstruct_network", noting)
    monkeypatch.setattr(stage, "reconstruct_temporal", lambda *a: given.append(a[2].minutes) or ({}, 60.0))
    config = replace(FEW, minutes=10.0)
    reconstruct_blocks(checkpoint, nearest, calibration, config, 0, Context())
    assert given == [5.0, 8.5]
    given.clear()
    reconstruct_temporal_first(checkpoint, nearest, calibration, config, 0, Context())
    assert given == [5.0, 4.0, 7.5]
    given.clear()
    reconstruct_blocks(checkpoint, nearest, calibration, replace(config, network_iterations=0), 0, Context())
    assert given == [10.0]
    given.clear()
    reconstruct_blocks(checkpoint, nearest, calibration, FEW, 0, Context())
    assert given == [0.0, 0.0]


def test_nan_is_refused_and_an_exact_network_is_left(
    checkpoint: Checkpoint, blocks: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(calibration)
    x_t = inputs.x_t.clone()
    x_t[1] = math.nan  # the second is trained on, and no error is measured on it
    for broken in (replace(inputs, x_t=inputs.x_t * math.nan), replace(inputs, x_t=x_t)):
        with pytest.raises(NumericalError, match="NaN"):
            reconstruct_network(checkpoint, blocks, broken, replace(FEW, batch=64), 0, Context())
    with pytest.raises(ConfigError, match="one calibration input is too few"):
        reconstruct_network(checkpoint, blocks, spread(inputs, 1), FEW, 0, Context())
    rounded = replace(checkpoint, tensors={name: unpack_tensor(p) for name, p in blocks.packed.items()})
    monkeypatch.setattr(module, "learn_step", lambda *a: pytest.fail("a step of what is exact"))
    exact = reconstruct_network(rounded, blocks, inputs, FEW, 0, Context())
    assert all(same(p, exact[name]) for name, p in blocks.packed.items())
