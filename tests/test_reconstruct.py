"""Block reconstruction: codes stay down or up, h ends binary, blocks and the network come closer, bytes and lineage hold."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fqdiff.calibration import reconstruct as module
from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.reconstruct import (
    HELD_OUT,
    BlockData,
    block_loss,
    capture,
    hard_error,
    learn_block,
    spread,
    undecided,
)
from fqdiff.configs import CalibrateConfig, PlanConfig, QuantizeConfig, ReconstructConfig
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.errors import ConfigError, LineageError, NumericalError
from fqdiff.models.registry import build, reconstruction_blocks
from fqdiff.models.unet import UNet
from fqdiff.quant.adaround import (
    LearnedRounding,
    annealed_beta,
    can_learn_rounding,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
)
from fqdiff.quant.formats import PerChannel, PerElement, PerGroup, PerOutput, PerTensor, get_format
from fqdiff.quant.packed import PackedTensor, check_layout, pack_tensor, unpack_tensor
from fqdiff.quant.packing import unpack
from fqdiff.quant.qparams import group_rows
from fqdiff.rng import generator
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.reconstruct import reconstruct_blocks
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.values import CalibrationSet, Checkpoint, Plan, QuantizedCheckpoint, predict_noise
from tests.test_cli import call, good

INTEGERS = [f"int{bits}{end}" for bits in (8, 6, 5, 4, 3, 2) for end in ("", "sym")]
GRAINS = (PerTensor(), PerChannel(0, torch.float16), PerGroup(9, 0))
FEW = ReconstructConfig(iterations=20, batch=8, inputs=16, network_iterations=0)
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test reconstruct"))


def low_plan(checkpoint: Checkpoint, low: str) -> Plan:
    return plan(checkpoint, None, None, PlanConfig("uniform", low=low), 0, Context())


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    return calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=13), 0, Context())


@pytest.fixture(scope="module")
def stored(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """int3 but for stem, head and one tensor each of formats that have no rounding to learn."""
    made = quantize(checkpoint, low_plan(checkpoint, "int3"), None, QuantizeConfig(), 0, Context())
    others = {f"block3.res1.conv{k}.weight": name for k, name in ((1, "codebook3"), (2, "ternary"))} | {
        "block4.res1.conv1.weight": "float8_e4m3"
    }
    changed = {
        name: pack_tensor(checkpoint.tensors[name], get_format(fmt), PerChannel(0)) for name, fmt in others.items()
    }
    return replace(made, packed={**made.packed, **changed})


@pytest.fixture(scope="module")
def short(checkpoint: Checkpoint, stored: QuantizedCheckpoint, calibration: CalibrationSet) -> QuantizedCheckpoint:
    return reconstruct_blocks(checkpoint, stored, calibration, FEW, 0, Context())


def same_parts(one: PackedTensor, other: PackedTensor, but: str = "") -> bool:
    """As bytes: torch compares no float8."""
    return all(
        torch.equal(t.view(torch.uint8), other.parts[k].view(torch.uint8)) for k, t in one.parts.items() if k != but
    )


def same_bytes(one: QuantizedCheckpoint, other: QuantizedCheckpoint) -> bool:
    return all(same_parts(p, other.packed[name]) for name, p in one.packed.items())


# --- AdaRound --------------------------------------------------------------------------------------------------------


def test_the_rectified_sigmoid_has_the_papers_values_and_an_inverse() -> None:
    assert rectified_sigmoid(torch.tensor([0.0])).item() == 0.5
    assert rectified_sigmoid(torch.tensor([-2.5, 2.5])).tolist() == [0, 1]  # sigmoid(2.5) 1.2 - 0.1 = 1.009
    h = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_the_penalty_and_its_gradient_are_those_of_the_formula(beta: float) -> None:
    """By finite differences of the formula in plain Python, at both sides of 1/2 and beyond the clamp."""

    def formula(values: list[float]) -> float:
        total = 0.0
        for v in values:
            h = min(max(1.2 / (1 + 2.718281828459045**-v) - 0.1, 0.0), 1.0)
            total += 1 - abs(2 * h - 1) ** beta
        return total

    points = [-3.0, -2.1, -0.7, 0.2, 1.4, 2.2, 3.0]
    v = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    penalty = rounding_penalty(rectified_sigmoid(v), beta)
    assert penalty.item() == pytest.approx(formula(points), rel=1e-9)
    penalty.backward()
    assert v.grad is not None
    for k, slope in enumerate(v.grad.tolist()):
        higher, lower = ([p + s * (i == k) for i, p in enumerate(points)] for s in (1e-5, -1e-5))
        assert slope == pytest.approx((formula(higher) - formula(lower)) / 2e-5, rel=1e-5, abs=1e-8)
    assert v.grad[0] == v.grad[-1] == 0


def test_beta_falls_in_a_straight_line_after_the_warm_up() -> None:
    assert annealed_beta(0.0) is annealed_beta(0.19) is None
    assert [annealed_beta(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("grain", GRAINS, ids=str)
def test_rounding_starts_soft_at_the_weights_and_stays_down_or_up(name: str, grain: PerTensor) -> None:
    tensor = normal(6, 4, 3, 3)
    packed = pack_tensor(tensor, get_format(name), grain)
    rounding = LearnedRounding("w", tensor, packed)
    scale = packed.parts["scale"].float().numpy()[:, None]
    zeros, qmax = rounding.get_buffer("zero_point").numpy().astype(np.float32)[:, None], packed.format.qmax
    steps = group_rows(tensor, grain).numpy() / scale
    soft = group_rows(rounding().detach(), grain).numpy() / scale + zeros
    np.testing.assert_allclose(soft, np.clip(steps + zeros, 0, qmax), atol=1e-4)
    down, up = (np.clip(whole(steps) + zeros, 0, qmax) for whole in (np.floor, np.ceil))
    for seed in range(3):
        with torch.no_grad():
            rounding.v.copy_(3 * normal(*rounding.v.shape, seed=seed))
        codes = rounding.codes()
        np.testing.assert_array_equal(group_rows(codes, grain).numpy(), np.where(rounding.v.detach() >= 0, up, down))
        made = rounding.packed(codes)
        check_layout(made)
        assert torch.equal(unpack_tensor(made), rounding.values(codes))
        assert same_parts(packed, made, but="codes")


def test_a_weight_on_the_grid_or_beyond_its_end_has_no_choice() -> None:
    tensor = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.4]])
    rounding = LearnedRounding("w", tensor, pack_tensor(tensor, get_format("int2"), PerTensor()))
    with torch.no_grad():
        rounding.v.fill_(9.0)
    assert rounding.codes().tolist() == [[0, 1, 2, 3, 1]]
    cut = torch.cat([normal(1, 200), torch.tensor([[40.0]])], dim=1)
    packed = pack_tensor(cut, get_format("int3"), PerTensor(), "percentile")
    rounding = LearnedRounding("w", cut, packed)
    with torch.no_grad():
        rounding.v.fill_(9.0)
    assert rounding.codes()[0, -1] == 7
    assert int(rounding.codes().min()) >= 0


def test_squants_codes_are_down_or_up_and_codes_of_other_weights_are_refused() -> None:
    tensor = normal(6, 4, 3, 3)
    packed = pack_tensor(tensor, get_format("int3"), PerChannel(0), rounding="squant")
    rounding = LearnedRounding("w", tensor, packed)
    assert torch.equal(rounding.stored_codes(), unpack(packed.parts["codes"], 3, packed.shape))
    with pytest.raises(LineageError, match="codes of w are not the checkpoint's weights rounded"):
        LearnedRounding("w", 2 * tensor, packed)


def test_only_plain_integers_are_learned() -> None:
    learned = [name for name in (*INTEGERS, "float16", "float8_e4m3", "ternary", "codebook3", "int6:6/4")
               if can_learn_rounding(get_format(name), PerTensor())]  # fmt: skip
    assert learned == INTEGERS
    assert not can_learn_rounding(get_format("int4"), PerElement(2, "float16", PerTensor()))


# --- one block -------------------------------------------------------------------------------------------------------


def linear_problem() -> tuple[nn.Linear, LearnedRounding, BlockData]:
    """A layer of 2 x 10 weights whose inputs are correlated, so that errors can cancel: 2^10 roundings of each output."""
    layer = nn.Linear(10, 2)
    with torch.no_grad():
        layer.weight.copy_(normal(2, 10))
    layer.requires_grad_(False)
    x = (normal(400, 3, seed=1) @ normal(3, 10, seed=2) + normal(400, 10, seed=3)) / 2
    packed = pack_tensor(layer.weight, get_format("int3"), PerChannel(0))
    return layer, LearnedRounding("weight", layer.weight, packed), BlockData((x,), layer(x))


def test_the_rounding_learned_is_the_best_of_all() -> None:
    """Brute force over every choice of every output: the best of 1024. Nearest is more than twice as bad."""
    layer, rounding, data = linear_problem()
    nearest = rounding.values(rounding.stored_codes())
    config = ReconstructConfig(iterations=400, batch=64)
    learned = learn_block(layer, {"weight": rounding}, data, config, generator(0, "draw"))
    assert undecided({"weight": rounding}) == 0
    h = rounding.soft()
    assert ((h == 0) | (h == 1) | (rounding.get_buffer("up") == rounding.get_buffer("down"))).float().mean() > 0.9
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10)
    down, up = rounding.get_buffer("down"), rounding.get_buffer("up")
    gram = data.arguments[0].T @ data.arguments[0] / len(data.target)

    def error(values: Tensor) -> Tensor:
        delta = values - layer.weight[:, None]
        return torch.einsum("okn,nm,okm->ok", delta, gram, delta)

    zeros = rounding.get_buffer("zero_point")[:, None, None].float()
    every = (down[:, None] + choices * (up - down)[:, None] - zeros) * rounding.get_buffer("scale")[:, None, None]
    best = error(every).min(dim=1).values.sum()
    found = error(rounding.values(learned.codes["weight"])[:, None]).sum()
    torch.testing.assert_close(found, best)
    assert 2 * found < error(nearest[:, None]).sum()


def test_the_loss_is_the_formula_in_the_docstring() -> None:
    layer, rounding, data = linear_problem()
    with torch.no_grad():
        rounding.v.add_(normal(*rounding.v.shape, seed=4))
    values, h = rounding().detach().double(), rounding.soft().detach().double()
    error = (data.arguments[0].double() @ (values - layer.weight).T).square().mean()
    penalty = (1 - (2 * h - 1).abs() ** 5).sum()
    for beta, expected in ((None, 20 * error / 0.3), (5.0, 20 * error / 0.3 + module.PENALTY * penalty)):
        loss = block_loss(layer, {"weight": rounding}, *data.rows(torch.arange(400)), 0.3, beta)
        torch.testing.assert_close(loss.detach().double(), expected, atol=1e-4, rtol=1e-4)


def test_the_best_rounding_met_on_held_out_inputs_is_kept_the_stored_one_included() -> None:
    layer, rounding, data = linear_problem()
    held = torch.arange(400) % module.HELD_OUT == 0
    nearest = rounding.stored_codes()
    good_one = nn.functional.linear(data.arguments[0], rounding.values(nearest), layer.bias) + 0.01 * normal(
        400, 2, seed=5
    )
    target = torch.where(held[:, None], good_one, layer(data.arguments[0]))  # what is trained on leads elsewhere
    learned = learn_block(
        layer, {"weight": rounding}, BlockData(data.arguments, target), replace(FEW, iterations=80), generator(0, "d")
    )
    assert min(learned.errors) == 1
    assert learned.errors[-1] > 1
    assert torch.equal(learned.codes["weight"], nearest)


def test_a_deadline_shortens_the_schedule_and_completes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rounding, data = linear_problem()
    clock = iter(range(10_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    betas: list[float] = []
    penalty = module.rounding_penalty
    monkeypatch.setattr(module, "rounding_penalty", lambda h, beta: (betas.append(beta), penalty(h, beta))[1])
    told: list[int] = []
    config = ReconstructConfig(iterations=5000, batch=8)
    learned = learn_block(
        layer, {"weight": rounding}, data, config, generator(0, "d"), 100.0, lambda n, text: told.append(n)
    )
    assert 90 <= len(told) <= 101
    assert sum(told) == 5000
    assert betas[0] == pytest.approx(20, abs=0.5)
    assert betas[-1] == pytest.approx(2, abs=0.5)
    assert min(learned.errors) < 1


def as_measured(data: BlockData, compute: Callable[[Tensor], Tensor]) -> BlockData:
    """``data`` with what ``compute`` makes of its held-out rows as targets, in the batches in which their error is measured:
    matrices of other sizes may differ in the last bits.
    """
    target = data.target.clone()
    for rows in torch.arange(0, len(target), HELD_OUT).split(CHUNK):
        target[rows] = compute(data.arguments[0][rows])
    return BlockData(data.arguments, target)


def test_nan_is_refused_and_an_exact_block_is_left() -> None:
    layer, rounding, data = linear_problem()
    broken = BlockData(data.arguments, data.target * torch.nan)
    with pytest.raises(NumericalError, match="NaN"):
        learn_block(layer, {"weight": rounding}, broken, FEW, generator(0, "d"))
    with torch.no_grad():
        values = rounding.values(rounding.stored_codes())
    exact = as_measured(data, lambda x: nn.functional.linear(x, values, layer.bias))
    told: list[str] = []
    learned = learn_block(
        layer, {"weight": rounding}, exact, FEW, generator(0, "d"), tell=lambda n, text: told.append(text)
    )
    assert learned.errors == (0.0,)
    assert told == ["exact"]
    assert torch.equal(learned.codes["weight"], rounding.stored_codes())


# --- networks --------------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_block_and_blocks_come_in_the_order_of_computing(checkpoint: Checkpoint) -> None:
    network = checkpoint.network()
    blocks = reconstruction_blocks(network)
    for name, _ in network.named_parameters():
        assert sum(name.startswith(f"{block}.") for block in blocks) == 1
    seen: list[str] = []
    for block in blocks:
        network.get_submodule(block).register_forward_pre_hook(lambda m, a, block=block: seen.append(block))  # type: ignore[misc]
    network(torch.zeros(1, *checkpoint.spec.image_shape), torch.zeros(1, dtype=torch.int64))
    assert seen == blocks
    architecture = {**checkpoint.spec.architecture, "time_embedding": "sliced"}
    assert "stem.time" not in reconstruction_blocks(build(architecture, "meta"))


def test_inputs_come_from_the_quantized_network_and_targets_from_full_precision(
    checkpoint: Checkpoint, stored: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """Replayed by running the U-Net's first half by hand."""
    inputs = CalibrationInputs(calibration.x_t[:40], calibration.t[:40])
    full, small = checkpoint.network(), stored.network()
    data = capture(full, small, "block2.res1", inputs, CPU)

    def until(network: nn.Module) -> tuple[Tensor, Tensor]:
        assert isinstance(network, UNet)
        x, embedding = network.stem(inputs.x_t, inputs.t)
        return network.block1(x, embedding)[0], embedding

    for got, want in zip(data.arguments, until(small), strict=True):
        torch.testing.assert_close(got, want)
    block = full.get_submodule("block2.res1")
    torch.testing.assert_close(data.target, block(*until(full)))
    assert not torch.allclose(data.target, block(*until(small)), atol=1e-3)
    full(inputs.x_t[:1], inputs.t[:1])  # nothing is left hooked


def test_a_block_with_large_inputs_gets_fewer_evenly_spread(
    checkpoint: Checkpoint, stored: QuantizedCheckpoint, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = CalibrationInputs(calibration.x_t.float(), calibration.t)
    assert spread(inputs, 10).t.tolist() == inputs.t.unique().flip(0).tolist()
    monkeypatch.setattr(module, "MEMORY", 20_000)
    data = capture(checkpoint.network(), stored.network(), "block1.res1", inputs, CPU)
    assert len(data.target) < 60
    assert sum(t.nbytes for t in (*data.arguments, data.target)) <= 20_000


@pytest.mark.parametrize(("low", "better"), [("int3", 0.8), ("int4", 0.8)])
def test_blocks_and_the_network_come_closer_on_other_inputs_at_the_same_size(
    checkpoint: Checkpoint, calibration: CalibrationSet, tmp_path: Path, low: str, better: float
) -> None:
    made = low_plan(checkpoint, low)
    nearest = quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())
    config = ReconstructConfig(iterations=60, batch=16, network_iterations=0)
    new = reconstruct_blocks(checkpoint, nearest, calibration, config, 0, Context())
    other = calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=4), 1, Context())

    def noise_error(model: QuantizedCheckpoint) -> float:
        full, small = (predict_noise(checkpoint.spec, n) for n in (checkpoint.network(), model.network()))
        with torch.inference_mode():
            return float((small(other.x_t, other.t) - full(other.x_t, other.t)).square().mean())

    assert noise_error(new) < better * noise_error(nearest)
    full, first = checkpoint.network(), "block1.res1"
    data = capture(full, nearest.network(), "block1.res1", CalibrationInputs(other.x_t, other.t), CPU)
    errors = []
    for model in (nearest, new):
        block = model.network().get_submodule(first)
        errors.append(hard_error(block, dict(block.named_parameters()), data, torch.arange(len(other.t))))
    assert errors[1] < errors[0]
    save_quantized(new, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes
    assert same_bytes(load_quantized(tmp_path), new)


def test_only_codes_of_integers_change_and_only_by_one(
    checkpoint: Checkpoint, stored: QuantizedCheckpoint, short: QuantizedCheckpoint
) -> None:
    changed = 0
    assert {p.format.kind for p in stored.packed.values()} == {"cast", "integer", "codebook", "ternary", "float"}
    for name, p in stored.packed.items():
        new = short.packed[name]
        if not can_learn_rounding(p.format, p.granularity):
            assert same_parts(p, new)
            continue
        assert same_parts(p, new, but="codes")
        one, two = (unpack(q.parts["codes"], p.format.bits, p.shape).int() for q in (p, new))
        changed += int((one != two).sum())
        assert (one - two).abs().max() <= 1
    assert changed > 100
    assert short.described == stored.described


def test_a_stopped_run_ends_alike_and_the_seed_matters(
    checkpoint: Checkpoint,
    stored: QuantizedCheckpoint,
    calibration: CalibrationSet,
    short: QuantizedCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = MemoryParts()
    learn, begun = module.learn_block, []

    def stopping(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == 6:
            raise KeyboardInterrupt
        return learn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "learn_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_blocks(checkpoint, stored, calibration, FEW, 0, Context(parts=parts))
        assert len(parts.saved) == 5
        again = reconstruct_blocks(checkpoint, stored, calibration, FEW, 0, Context(parts=parts, batch_size=3))
        assert len(begun) == 6 + len(reconstruction_blocks(checkpoint.network())) - 5
    assert same_bytes(again, short)
    assert not same_bytes(reconstruct_blocks(checkpoint, stored, calibration, FEW, 1, Context()), short)
    name, part = next(iter(parts.saved.items()))
    for broken in (
        Part({}, part.data),
        Part(part.tensors, {}),
        Part({k: t[1:] for k, t in part.tensors.items()}, part.data),
    ):
        parts.save(name, broken)
        with pytest.raises(ConfigError, match="another recipe"):
            reconstruct_blocks(checkpoint, stored, calibration, FEW, 0, Context(parts=parts))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_reconstructed_is_refused_by_name(
    checkpoint: Checkpoint, stored: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    def refused(model: QuantizedCheckpoint, given: CalibrationSet | None, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            reconstruct_blocks(checkpoint, model, given, FEW, 0, Context())

    refused(stored, None, LineageError, "without a calibration set")
    refused(stored, replace(calibration, model="0" * 64), LineageError, "another model")
    refused(stored, replace(calibration, num_train_timesteps=50), LineageError, "timesteps of 50")
    few = replace(calibration, x_t=calibration.x_t[:1], t=calibration.t[:1])
    refused(stored, few, ConfigError, "too few")
    name = next(n for n, p in stored.packed.items() if p.format.name == "int3")
    tensor = checkpoint.tensors[name]
    phased = pack_tensor(tensor, get_format("int3:3/2"), PerChannel(0))
    refused(replace(stored, packed={**stored.packed, name: phased}), calibration, ConfigError, "phases")
    for kept in (PerElement(2, "float16", PerChannel(0)), PerOutput(2, "int8", PerChannel(0))):
        mixed = pack_tensor(tensor, get_format("int3"), kept, kept=torch.tensor([0, 3]))
        refused(replace(stored, packed={**stored.packed, name: mixed}), calibration, ConfigError, "two formats")
    fewer = {n: p for n, p in stored.packed.items() if n != name}
    refused(replace(stored, packed=fewer), calibration, LineageError, "not of this checkpoint")
    plain = {n: pack_tensor(t, get_format("float16"), PerTensor()) for n, t in checkpoint.tensors.items()}
    casts = QuantizedCheckpoint(checkpoint.spec, plain)
    refused(casts, calibration, ConfigError, "no rounding to learn")
    trained = quantize(
        checkpoint,
        low_plan(checkpoint, "int3"),
        None,
        QuantizeConfig(distill=8, distill_batch=2, distill_rate=1.0),
        0,
        Context(),
    )
    refused(trained, calibration, LineageError, "not the checkpoint's weights rounded")
    biased = QuantizeConfig("timestep", calibration_images=4, calibration_steps=10)
    corrected = quantize(checkpoint, low_plan(checkpoint, "int3"), None, biased, 0, Context())
    refused(corrected, calibration, LineageError, "make up for the rounding")


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"batch": 0},
        {"inputs": 1},
        {"rate": 0.0},
        {"minutes": -1.0},
        {"minutes": float("nan")},
        {"network_iterations": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReconstructConfig(**settings)


def test_the_command_reconstructs_before_activations_are_quantized(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    planned = good(store, "plan", "--uniform", "int4", "--name", "int4")
    plain: Any = good(store, "quantize", "int4", "--dry-run")
    few = ("--steps", "4", "--timesteps", "4", "--samples", "4")
    good(store, "calibrate", "one", *few, "--name", "inputs")
    flags = ("--reconstruct", "--reconstruct-iterations", "3", "--reconstruct-network", "2", "--calibration", "inputs")
    made: Any = good(store, "quantize", "int4", *flags)
    assert made["inputs"].keys() == {"checkpoint", "model", "calibration"}
    assert plain["id"] in str(made["inputs"]["model"])
    assert made["file_bytes"] == made["promised_bytes"] == planned["file_bytes"]
    assert "as planned" in call(store, "quantize", "int4", *flags).stdout
    both: Any = good(store, "quantize", "int4", *flags, "--activations", "int8", "--dynamic")
    assert made["id"] in str(both["inputs"]["model"])
    config = tmp_path / "fqdiff.toml"
    config.write_text("[reconstruct]\niterations = 3\nnetwork_iterations = 2\n")
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    assert (
        good(store, "quantize", "int4", "--config", str(config), "--no-reconstruct", "--dry-run")["id"] == plain["id"]
    )
    for arguments, message in (
        (("--reconstruct-iterations", "3"), "reconstruction that is not asked for"),
        (("--reconstruct", "--distill", "5"), "weights distilled before their rounding is learned"),
        (("--reconstruct", "--bias-correction", "static"), "biases corrected before"),
        (("--calibration", "inputs"), "a calibration set that nothing learns from"),
        (("--reconstruct", "--reconstruct-rate", "2"), "rate is 2"),
    ):
        refused = call(store, "quantize", "int4", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "6", "--name", "two")
    good(store, "calibrate", "two", *few, "--name", "foreign")
    refused = call(store, "quantize", "int4", "--reconstruct", "--calibration", "foreign")
    assert refused.exit_code == 1
    assert "is not of checkpoint" in refused.stderr
