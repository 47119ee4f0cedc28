"""Distillation: what is trained is what is stored, nothing changes size, and the predicted noise comes closer."""

from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fqdiff.calibration.distill import (
    RUN_STEPS,
    Pool,
    Walkers,
    begin,
    distill,
    distill_step,
    learner,
    restore,
    snapshot,
)
from fqdiff.configs import PlanConfig, QuantizeConfig
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.diffusion.samplers import ddim_update
from fqdiff.errors import ConfigError
from fqdiff.quant.formats import PerChannel, PerGroup, PerTensor, get_format
from fqdiff.quant.packed import check_layout, check_values, pack_tensor, unpack_tensor
from fqdiff.quant.trainable import trainable
from fqdiff.rng import generator
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.values import Checkpoint, Plan, QuantizedCheckpoint, predict_noise

FORMATS = (
    "int8",
    "int4",
    "int3sym",
    "int2",
    "ternary",
    "codebook3",
    "codebook2",
    "codebook1",
    "float8_e4m3",
    "float16",
    "bfloat16",
    "float32",
)
GRAINS = (PerTensor(), PerChannel(0, torch.float16), PerGroup(9, 0, torch.float16))
FEW = QuantizeConfig(distill=6, distill_batch=4)


@pytest.fixture(scope="module")
def low(checkpoint: Checkpoint) -> Plan:
    return plan(checkpoint, None, None, PlanConfig("uniform", low="int3"), 0, Context())


def weights(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, 3, 3, generator=generator(seed, "weights"))


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("grain", GRAINS, ids=str)
def test_a_trainable_tensor_is_what_is_stored_before_and_after_a_step(name: str, grain: PerTensor) -> None:
    fmt = get_format(name)
    packed = pack_tensor(weights(), fmt, PerTensor() if fmt.is_cast else grain)
    module = trainable(weights(), packed)
    torch.testing.assert_close(module().detach(), unpack_tensor(packed), atol=0, rtol=0)
    again = module.packed()
    assert all(torch.equal(again.parts[part], t) for part, t in packed.parts.items())

    target = weights(1)
    before = float((module().detach() - target).square().sum())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (module() - target).square().sum().backward()
        optimizer.step()
    made = module.packed()
    check_layout(made)
    check_values(made)
    torch.testing.assert_close(module().detach(), unpack_tensor(made), atol=0, rtol=0)
    assert {p: (t.dtype, t.shape) for p, t in made.parts.items()} == {
        p: (t.dtype, t.shape) for p, t in packed.parts.items()
    }
    assert float((unpack_tensor(made) - target).square().sum()) < 0.8 * before


def test_scales_have_the_gradient_of_learned_step_sizes() -> None:
    """Esser et al. 2020, eq. 3, written out: round(v) - v inside, the bound outside."""
    packed = pack_tensor(weights(), get_format("int2"), PerChannel(0), "percentile")
    module = trainable(weights(), packed)
    assert module.grid is not None
    (module() * weights(2)).sum().backward()
    scale, zero = packed.parts["scale"].double()[:, None], module.get_buffer("zero_point").double()[:, None]
    v = module.weight.detach().double() / scale
    low, high = -zero, 3 - zero
    slope = torch.where(v < low, low, torch.where(v > high, high, v.round() - v))
    expected = (slope * weights(2).reshape(6, -1).double()).sum(dim=1)
    assert module.grid.grad is not None
    torch.testing.assert_close(module.grid.grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_codebook_entries_have_the_summed_gradient_of_their_weights() -> None:
    packed = pack_tensor(weights(), get_format("codebook2"), PerChannel(0))
    module = trainable(weights(), packed)
    (module() * weights(2)).sum().backward()
    rows, values = weights(2).reshape(6, -1), module().detach().reshape(6, -1)
    expected = torch.zeros(6, 4)
    for g in range(6):
        for k, entry in enumerate(packed.parts["codebook"].float()[g]):
            expected[g, k] = rows[g][values[g] == entry].sum()
    assert module.grid is not None
    torch.testing.assert_close(module.grid.grad, expected)
    torch.testing.assert_close(module.weight.grad, rows)


def test_squant_and_cut_ranges_start_at_what_is_stored() -> None:
    for packed in (
        pack_tensor(weights(), get_format("int3"), PerChannel(0), rounding="squant"),
        pack_tensor(weights(), get_format("int3"), PerChannel(0), "percentile"),
    ):
        torch.testing.assert_close(trainable(weights(), packed)().detach(), unpack_tensor(packed), atol=0, rtol=0)


# --- walkers ---------------------------------------------------------------------------------------------------------


def test_walkers_follow_ddim_from_their_noise_and_the_pool_holds_what_they_meet(checkpoint: Checkpoint) -> None:
    """Two runs and a bit of every walker, replayed by hand, alone, from the noise of its run."""
    spec, network = checkpoint.spec, checkpoint.network()
    schedule, total = spec.noise_schedule(), spec.noise_schedule().num_train_timesteps
    walkers, steps = Walkers.begin(spec, 3, seed=3), 2 * RUN_STEPS + 5
    pool = Pool.empty(spec, 3 * steps)
    for where in torch.arange(3 * steps).split(3):
        pool.put(where, walkers, network, schedule, 3)
    assert walkers.runs == 9
    assert pool.t.min() >= 0
    assert pool.t.max() < total
    assert len(pool.t.unique()) > 100  # offsets differ from run to run, so that all timesteps come up in the end

    draw = generator(3, "distill", 4)  # the second run of walker 1
    x = torch.randn(spec.image_shape, generator=draw)[None]
    offset = float(torch.rand(1, generator=draw, dtype=torch.float64))
    for step in range(RUN_STEPS):
        t, after = (int((RUN_STEPS - 1 - step - k + offset) * total / RUN_STEPS) for k in (0, 1))
        place = 3 * (RUN_STEPS + step) + 1
        with torch.inference_mode():
            eps = network(x, torch.tensor([t]))
        assert pool.t[place] == t
        assert pool.abar[place] == schedule.alphas_cumprod[t].float()
        torch.testing.assert_close(pool.x[place], x[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(pool.eps[place], eps[0], atol=1e-3, rtol=1e-3)
        abar, abar_next = schedule.alphas_cumprod[t].float(), schedule.alphas_cumprod[max(after, 0)].float()
        x = ddim_update(x, eps, abar, abar_next if step < RUN_STEPS - 1 else torch.ones(()))


# --- models ----------------------------------------------------------------------------------------------------------


def noise_error(checkpoint: Checkpoint, model: QuantizedCheckpoint) -> float:
    """On inputs of other runs."""
    spec, network, small = checkpoint.spec, checkpoint.network(), model.network()
    walkers, pool = Walkers.begin(spec, 4, seed=99), Pool.empty(spec, 4 * RUN_STEPS)
    for where in torch.arange(4 * RUN_STEPS).split(4):
        pool.put(where, walkers, network, spec.noise_schedule(), 99)
    with torch.inference_mode():
        delta = small(pool.x, pool.t) - pool.eps
    return 0.5 * float(delta.square().sum()) / len(pool.t)


def test_distillation_lowers_the_noise_error_on_other_inputs_at_the_same_size(
    checkpoint: Checkpoint, low: Plan, tmp_path: Path
) -> None:
    plain = quantize(checkpoint, low, None, QuantizeConfig(), 0, Context())
    config = QuantizeConfig(distill=40, distill_batch=8)
    better = quantize(checkpoint, low, None, config, 0, Context())
    assert noise_error(checkpoint, better) < 0.7 * noise_error(checkpoint, plain)
    save_quantized(better, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == low.file_bytes
    loaded = load_quantized(tmp_path).network().state_dict()
    assert all(torch.equal(t, loaded[name]) for name, t in better.network().state_dict().items())


def test_a_step_takes_the_velocity_error_of_inputs_drawn_from_all_of_the_pool_and_replaces_them(
    checkpoint: Checkpoint, low: Plan
) -> None:
    """The loss written out by hand, for the inputs that are gone after the step."""
    spec, schedule, seed = checkpoint.spec, checkpoint.spec.noise_schedule(), 5
    packed = quantize(checkpoint, low, None, QuantizeConfig(), 0, Context()).packed
    student = QuantizedCheckpoint(spec, packed).network()
    teacher = checkpoint.network()
    state = begin(checkpoint, packed, FEW, seed, torch.device("cpu"))
    for where in torch.arange(len(state.pool.t)).split(FEW.distill_batch):
        state.pool.put(where, state.walkers, predict_noise(spec, teacher), schedule, seed)
    places, learn = [], learner(state, teacher, spec)
    for step in range(5):
        before = deepcopy(state.pool)
        distill_step(state, learn, predict_noise(spec, teacher), schedule, FEW, seed)
        gone = (state.pool.x != before.x).flatten(1).any(dim=1).nonzero().flatten()
        assert len(gone) == FEW.distill_batch
        places.append(gone)
        if step == 0:
            abar = schedule.alphas_cumprod[before.t[gone]].double().clamp(min=0.01)
            with torch.inference_mode():
                error = predict_noise(spec, student)(before.x[gone], before.t[gone]) - before.eps[gone]
            by_image = 0.5 * error.double().square().flatten(1).sum(dim=1)
            assert state.losses[0] == pytest.approx(float((by_image / abar).mean()), rel=1e-4)
            assert state.losses[0] > 1.05 * float(by_image.mean())
    drawn = torch.cat(places)
    assert drawn.min() < len(state.pool.t) / 4
    assert drawn.max() > len(state.pool.t) * 3 / 4
    assert all((gone.diff() > 1).any() for gone in places)  # neighbours in the pool come from neighbouring steps


def test_the_seed_matters_and_a_stopped_run_ends_alike(checkpoint: Checkpoint, low: Plan) -> None:
    packed = quantize(checkpoint, low, None, QuantizeConfig(), 0, Context()).packed
    whole = distill(checkpoint, packed, FEW, 0, Context())
    other = distill(checkpoint, packed, FEW, 1, Context())
    asked: list[int] = []

    @contextmanager
    def stop_after_three() -> "Callable[[], bool]":  # type: ignore[misc]
        def stop() -> bool:
            asked.append(1)
            return len(asked) == 3

        yield stop

    parts = MemoryParts()
    with pytest.raises(KeyboardInterrupt):
        distill(checkpoint, packed, FEW, 0, Context(parts=parts, soft_stop=stop_after_three))
    again = distill(checkpoint, packed, FEW, 0, Context(parts=parts))
    for name, tensor in whole.items():
        assert all(torch.equal(t, again[name].parts[part]) for part, t in tensor.parts.items())
    assert any(not torch.equal(t, other[n].parts[p]) for n, w in whole.items() for p, t in w.parts.items())


def test_a_saved_part_of_another_recipe_is_refused(checkpoint: Checkpoint, low: Plan) -> None:
    packed = quantize(checkpoint, low, None, QuantizeConfig(), 0, Context()).packed
    state = begin(checkpoint, packed, FEW, 0, torch.device("cpu"))
    part = snapshot(state)
    fewer = begin(checkpoint, packed, replace(FEW, distill_batch=2), 0, torch.device("cpu"))
    for broken in (part, Part({}, part.data), Part(part.tensors, {"runs": "many"})):
        with pytest.raises(ConfigError, match="another recipe"):
            restore(fewer, broken)


@pytest.mark.parametrize(
    "settings",
    [
        {"distill": -1},
        {"distill": 5, "distill_rate": 0.0},
        {"distill": 5, "distill_batch": 0},
        {"distill": 5, "bias_correction": "static"},
        {"distill_rate": 0.1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        QuantizeConfig(**settings)  # type: ignore[arg-type]


def test_phases_and_kept_elements_are_refused(checkpoint: Checkpoint, low: Plan) -> None:
    first = next(e for e in low.entries if e.format == "int3" and e.shape[0] > 1)
    for change in (
        {"format": "int3:3/2", "bytes": 0},
        {"granularity": f"element:2:float16+{first.granularity}", "bytes": 0},
    ):
        entries = tuple(replace(e, **change) if e is first else e for e in low.entries)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="cannot be distilled"):
            quantize(checkpoint, replace(low, entries=entries), None, FEW, 0, Context())
