"""Scores of others, timestep weights by gain, and single weights of a sampler run: what they are, and the plans they lead to."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fqdiff.configs import FisherConfig, PlanConfig, QuantizeConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.diffusion.samplers import sampling_timesteps
from fqdiff.errors import ConfigError, DataError, NumericalError
from fqdiff.fisher import trajectory
from fqdiff.fisher.moments import jackknife_error
from fqdiff.fisher.trajectory import measure_runs
from fqdiff.models.registry import output_axes
from fqdiff.planning.calibration import calibration_inputs
from fqdiff.planning.plans import make_offer, pareto
from fqdiff.planning.rivals import alike
from fqdiff.planning.scores import fisher_importance, timestep_weights, trajectory_importance
from fqdiff.quant.formats import get_format, parse_granularity
from fqdiff.quant.packed import pack_tensor, unpack_tensor
from fqdiff.rng import generator
from fqdiff.sensitivity import rivals as hessians
from fqdiff.sensitivity.inputs import Inputs
from fqdiff.sensitivity.predictions import sampler_weights
from fqdiff.stages.fisher import fisher
from fqdiff.stages.plan import plan, plan_by_gain
from fqdiff.stages.quantize import quantize, quantize_by_gain
from fqdiff.store.fisher_files import load_fisher, save_fisher
from fqdiff.store.model_files import save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, Dataset, FisherTable, Plan, predict_noise
from tests.test_cli import call, good

RIVALS = ("hawq", "modelopt", "autoround")
SEED = 5
STEPS = 3


def config(**changes: object) -> PlanConfig:
    given = {"target_bpw": 7.0, "formats": ("float32", "float16", "int6", "int3"), **changes}
    return PlanConfig("budget", **given)  # type: ignore[arg-type]


def by_rival(score: str, **changes: object) -> PlanConfig:
    return config(score=score, calibration_timesteps=2, calibration_samples=2, **changes)


def promised(checkpoint: Checkpoint, made: Plan, table: FisherTable | None, folder: Path) -> int:
    """Bytes of the file that the plan leads to, which are those that it promised."""
    save_plan(made, folder)
    assert load_plan(folder) == made
    save_quantized(quantize(checkpoint, made, table, QuantizeConfig(), 0, Context()), folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size == made.file_bytes
    return size


# --- scores of others ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans(checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Plan]:
    return {s: plan(checkpoint, None, dataset, by_rival(s), SEED, Context()) for s in RIVALS}


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint, dataset: Dataset) -> Inputs:
    return calibration_inputs(checkpoint, dataset, None, by_rival("hawq"), SEED)


def losses(network: torch.nn.Module, inputs: Inputs) -> Tensor:
    """1/2 sum over pixels (noise - eps_pred)^2 of each input, from the definition."""
    dtype = next(network.parameters()).dtype
    error = inputs.weight.to(dtype) * (inputs.target.to(dtype) - network(inputs.x_t.to(dtype), inputs.t))
    return 0.5 * error.square().flatten(1).sum(dim=1)


def stored(checkpoint: Checkpoint, made: Plan, name: str, fmt: str) -> tuple[Tensor, float]:
    """What the plan considered for one parameter: the tensor that would be read back, and its value."""
    (entry,) = (e for e in made.entries if e.parameter == name)
    (other,) = (a for a in entry.alternatives if a.format == fmt)
    packed = pack_tensor(checkpoint.tensors[name], get_format(fmt), parse_granularity(other.granularity), other.range)
    return unpack_tensor(packed), other.predicted


def test_hawqs_value_is_trace_over_size_times_squared_error(
    checkpoint: Checkpoint, plans: dict[str, Plan], inputs: Inputs
) -> None:
    """v^T H v by finite differences of gradients in float64: rejects a trace not divided by n, and that of all inputs' sum."""
    made = plans["hawq"]
    network = checkpoint.network().double().requires_grad_(True)
    few = inputs.chosen(torch.tensor([0, 2]))  # the first image at each of the two timesteps

    def gradient(name: str) -> Tensor:
        loss = losses(network, few) @ few.share
        return torch.autograd.grad(loss, dict(network.named_parameters())[name])[0]

    for name in ("head.output.weight", "block1.res1.conv1.weight"):
        weight = dict(network.named_parameters())[name]
        own, means = weight.data.clone(), []
        for number in range(4):
            signs = torch.randint(0, 2, own.shape, generator=generator(SEED, "hutchinson", name, number))
            v = signs.double() * 2 - 1
            ends = []
            for side in (1, -1):
                weight.data = own + side * 1e-5 * v
                ends.append(gradient(name))
            weight.data = own
            means.append(float((v * (ends[0] - ends[1])).sum() / 2e-5))
        trace = max(0.0, sum(means) / 4)
        assert trace > 0
        quantized, value = stored(checkpoint, made, name, "int3")
        squares = float((quantized.double() - checkpoint.tensors[name].double()).square().sum())
        assert value == pytest.approx(trace / own.numel() * squares, rel=1e-3)


def test_modelopts_value_is_its_formula_for_weights_and_biases(
    checkpoint: Checkpoint, plans: dict[str, Plan], inputs: Inputs
) -> None:
    """One input at a time, the layer run alone; rejects a layer's bias valued beside its quantized weight."""
    made = plans["modelopt"]
    network = checkpoint.network().requires_grad_(True)
    layer = network.get_submodule("block1.res1.conv1")
    expected = {"weight": 0.0, "bias": 0.0}
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        kept[:] = [args[0].detach(), output]

    layer.register_forward_hook(keep)
    for n in range(len(inputs)):
        one = inputs.parts(1)[n]
        losses(network, one).sum().backward()
        x, output = kept
        for part in expected:
            name = f"block1.res1.conv1.{part}"
            quantized, _ = stored(checkpoint, made, name, {"weight": "int3", "bias": "float16"}[part])
            changed = {"weight": checkpoint.tensors["block1.res1.conv1.weight"], "bias": layer.bias.detach()}
            changed[part] = quantized
            with torch.no_grad():
                delta = torch.conv2d(x, changed["weight"], changed["bias"], padding=1) - output
            assert output.grad is not None
            expected[part] += float((output.grad * delta).square().sum()) * float(one.share[0])
    for part, fmt in (("weight", "int3"), ("bias", "float16")):
        name = f"block1.res1.conv1.{part}"
        assert expected[part] > 0
        value = stored(checkpoint, made, name, fmt)[1]
        assert value == pytest.approx(expected[part], rel=1e-2 if part == "bias" else 1e-3)


def test_autorounds_value_takes_gradients_where_all_tensors_are_in_that_format(
    checkpoint: Checkpoint, plans: dict[str, Plan], inputs: Inputs
) -> None:
    """Rejects gradients of the full-precision network, and tensors of another format beside."""
    made = plans["autoround"]
    for fmt in ("int3", "float16"):
        placed = {
            e.parameter: stored(checkpoint, made, e.parameter, fmt)
            for e in made.entries
            if any(a.format == fmt for a in e.alternatives)
        }
        network = checkpoint.spec.network({**checkpoint.tensors, **{n: t for n, (t, _) in placed.items()}})
        network.requires_grad_(True)
        (losses(network, inputs).double() @ inputs.share).backward()
        gradients = {n: p.grad for n, p in network.named_parameters()}
        for name in ("stem.conv.weight", "block4.res1.conv1.weight", "head.output.weight"):
            gradient = gradients[name]
            assert gradient is not None
            expected = float((gradient * (checkpoint.tensors[name] - placed[name][0])).abs().sum())
            assert placed[name][1] == pytest.approx(expected, rel=1e-3)


def test_autoround_has_no_option_that_it_measured_in_a_network_without_gradients(
    checkpoint: Checkpoint, dataset: Dataset
) -> None:
    """A head so small that float16 rounds it to 0 passes no gradient on: every error would be free."""
    head = "head.output.weight"
    faint = replace(checkpoint, tensors={**checkpoint.tensors, head: 1e-9 * checkpoint.tensors[head]})
    settings = by_rival("autoround", formats=("float32", "int6", "float16"))
    for model, expected in ((checkpoint, True), (faint, False)):
        options = make_offer(model, None, settings, SEED, Context(), dataset).market.options
        offered = {name: {o.format for o in each} for name, each in options.items()}
        assert ("float16" in offered["block4.res1.conv1.weight"]) is expected
        assert "float16" in offered[head]  # whose own gradient comes from the loss
        assert all({"float32", "int6"} <= offered[name] for name, tensor in model.tensors.items() if tensor.ndim >= 2)


def test_alike_are_options_of_one_format_kind_of_granularity_and_range(
    checkpoint: Checkpoint, dataset: Dataset
) -> None:
    settings = config(score="weight-mse", granularity="tensor,channel,group-near:16", ranges=("min-max", "mse"))
    market = make_offer(checkpoint, None, settings, 0, Context()).market
    ways = alike(market.options)
    assert sum(map(len, ways)) == sum(map(len, market.options.values()))
    for way in ways:
        options = [market.options[name][j] for name, j in way.items()]
        assert len({(o.format, type(o.description[2]), o.span) for o in options}) == 1


@pytest.mark.parametrize("score", ["modelopt", "autoround"])
def test_of_several_ranges_the_rivals_own_choice_is_kept(checkpoint: Checkpoint, dataset: Dataset, score: str) -> None:
    def values(*ranges: str) -> dict[str, float]:
        settings = by_rival(score, formats=("float32", "int3"), ranges=ranges)
        options = make_offer(checkpoint, None, settings, SEED, Context(), dataset).market.options
        return {
            name: min(o.value for o in each if o.format == "int3")
            for name, each in options.items()
            if len(each) > 2 or each[-1].format == "int3"
        }

    both, first, second = values("min-max", "mse"), values("min-max"), values("mse")
    assert len(both) > 30
    if score == "modelopt":  # autoround's gradients are those of a network that is all in one range
        assert both == pytest.approx({name: min(first[name], second[name]) for name in both}, rel=1e-3)
    assert {both[n] < first[n] for n in both} == {True, False}


@pytest.mark.parametrize("score", RIVALS)
def test_a_rivals_plan_needs_a_checkpoint_and_images_and_its_file_is_as_large_as_promised(
    checkpoint: Checkpoint, dataset: Dataset, plans: dict[str, Plan], score: str, tmp_path: Path
) -> None:
    made = plans[score]
    assert promised(checkpoint, made, None, tmp_path) <= 7.0 * made.parameters / 8
    assert made.budget is not None
    assert (made.budget.score, made.budget.measured) == (score, None)
    samples = 1 if score == "hawq" else 2  # which looks at one image at each timestep, whatever there is
    assert (made.budget.calibration_timesteps, made.budget.calibration_samples) == (2, samples)
    assert len({e.format for e in made.entries if len(e.shape) > 1}) > 1
    if score == "modelopt":  # all draw their inputs in one place
        blind = replace(dataset, images=torch.where(dataset.held_out[:, None, None, None], 0, dataset.images))
        assert plan(checkpoint, None, blind, by_rival(score), SEED, Context()) == made
        other = plan(checkpoint, None, dataset, by_rival(score), SEED + 1, Context())
        assert other.budget is not None
        assert other.budget.predicted != made.budget.predicted


@pytest.mark.parametrize("score", RIVALS)
def test_a_killed_run_continues_to_the_same_plan(
    checkpoint: Checkpoint, dataset: Dataset, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every unit of work; second derivatives, which take long, stand aside."""
    monkeypatch.setattr(hessians, "hessian_trace", lambda network, name, *others: float(len(name)))
    whole = plan(checkpoint, None, dataset, by_rival(score), SEED, Context())
    parts, stops = MemoryParts(), 0
    while True:
        context = Context(parts=parts, soft_stop=lambda: nullcontext(lambda: True))
        try:
            again = plan(checkpoint, None, dataset, by_rival(score), SEED, context)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= {"hawq": 30, "modelopt": 1, "autoround": 3}[score]
    assert again == whole


def test_a_rivals_plan_can_be_refined_by_what_plans_did(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """After the first the prediction is in the unit of the measured rise."""
    made = plan(checkpoint, None, dataset, by_rival("modelopt", refine=4), SEED, Context())
    assert made.budget is not None
    assert made.budget.measured is not None
    assert made.budget.evaluations >= 2
    assert made.budget.predicted == pytest.approx(made.budget.measured, rel=0.3)


def test_a_curve_of_budgets_knows_rivals_too(checkpoint: Checkpoint, dataset: Dataset) -> None:
    settings = by_rival("modelopt")
    points = pareto(make_offer(checkpoint, None, settings, SEED, Context(), dataset), settings, [6.0, 9.0], Context())
    assert points[0].predicted is not None
    assert points[1].predicted is not None
    assert 0 < points[1].predicted < points[0].predicted


def test_what_a_rival_cannot_do_is_refused(checkpoint: Checkpoint, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="gram measures what 'hawq' guesses"):
        config(score="hawq", predictor="gram")
    with pytest.raises(ConfigError, match="no loss that could be limited"):
        config(score="modelopt", target_bpw=0.0, max_loss_increase=1.0)
    with pytest.raises(ConfigError, match="needs training images"):
        plan(checkpoint, None, None, by_rival("hawq"), 0, Context())
    with pytest.raises(DataError, match="a network of"):
        plan(checkpoint, None, replace(dataset, images=dataset.images[:, :, :4]), by_rival("hawq"), 0, Context())
    name = "head.output.bias"
    huge = replace(checkpoint, tensors={**checkpoint.tensors, name: torch.full_like(checkpoint.tensors[name], 3e38)})
    with pytest.raises(NumericalError, match="the score 'modelopt' holds NaN or infinity"):
        plan(huge, None, dataset, by_rival("modelopt"), 0, Context())


# --- the sampler's gain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_gain_is_that_of_finite_differences_through_the_sampler(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """Every pixel of eps moved at every step, the network in the loop and clamps included: rejects c_t^2 alone."""
    monkeypatch.setattr(trajectory, "moved", lambda images, device: images.double())
    name = "head.output.weight"
    bold = replace(
        checkpoint,
        tensors={**checkpoint.tensors, name: 30 * checkpoint.tensors[name]},
        spec=replace(checkpoint.spec, prediction=prediction),
    )
    spec, network = bold.spec, bold.network().double()
    found = measure_runs(network, spec, [4], STEPS, 0, output_axes(network), SEED).gain[0]

    draw = generator(SEED, "fisher trajectory", 4)
    start, v = (torch.randn(spec.image_shape, generator=draw).double() for _ in range(2))
    timesteps = sampling_timesteps(1000, STEPS)
    abar = [float(spec.noise_schedule().alphas_cumprod[t]) for t in timesteps] + [1.0]
    predict, pixels = predict_noise(spec, network), start.numel()
    for moved in range(STEPS):
        size = 1e-6 * abar[moved] ** 0.5  # of eps, so that the image implied moves by little
        h = size * torch.eye(pixels, dtype=torch.float64).view(pixels, *start.shape)
        x = start.expand(2 * pixels, *start.shape)
        for s, t in enumerate(timesteps):
            eps = predict(x, torch.full((len(x),), t)).detach()
            eps = eps + torch.cat([h, -h]) if s == moved else eps
            image = ((x - (1 - abar[s]) ** 0.5 * eps) / abar[s] ** 0.5).clamp(-1, 1)
            eps = (x - abar[s] ** 0.5 * image) / (1 - abar[s]) ** 0.5
            x = abar[s + 1] ** 0.5 * image + (1 - abar[s + 1]) ** 0.5 * eps
        ends = (x * v).flatten(1).sum(dim=1)
        gradient = (ends[:pixels] - ends[pixels:]) / (2 * size)
        assert float(found[moved]) == pytest.approx(float(gradient.square().mean()), rel=1e-3)
    assert (found > 0).sum() >= 2


RUNS = FisherConfig("trajectory", samples=3, steps=STEPS, granularity="weight")


@pytest.fixture(scope="module")
def runs(checkpoint: Checkpoint, dataset: Dataset) -> FisherTable:
    return fisher(checkpoint, dataset, RUNS, SEED, Context())


def test_a_table_holds_the_robust_mean_of_the_gains_and_a_windowed_one_none(
    checkpoint: Checkpoint, dataset: Dataset, runs: FisherTable, tmp_path: Path
) -> None:
    network = checkpoint.network()
    each = [measure_runs(network, checkpoint.spec, [n], STEPS, 0, output_axes(network), SEED) for n in range(3)]
    gains, norms = torch.cat([r.gain for r in each]).flip(1), torch.cat([r.norms for r in each])
    assert runs.gain is not None
    assert runs.gain.timesteps.tolist() == sampling_timesteps(1000, STEPS)[::-1]
    torch.testing.assert_close(runs.gain.samples, gains, rtol=1e-4, atol=0)
    robust = norms.log().mean().exp() * (gains / norms[:, None]).mean(dim=0)
    torch.testing.assert_close(runs.gain.mean, robust, rtol=1e-4, atol=0)
    torch.testing.assert_close(runs.gain.standard_error, jackknife_error(gains, norms), rtol=1e-3, atol=0)
    save_fisher(runs, tmp_path)
    again = load_fisher(tmp_path).gain
    assert again is not None
    assert all(torch.equal(getattr(again, f), getattr(runs.gain, f)) for f in ("timesteps", "mean", "samples"))
    short = fisher(checkpoint, dataset, replace(RUNS, samples=2, window=2, granularity="channel"), SEED, Context())
    assert short.gain is None


def test_timestep_weights_by_gain_are_the_gains_and_by_sampler_those_of_its_steps(
    checkpoint: Checkpoint, fisher_table: FisherTable, runs: FisherTable
) -> None:
    schedule = checkpoint.spec.noise_schedule()
    assert runs.gain is not None
    steps, weights = timestep_weights("gain", schedule, runs.gain)
    assert torch.equal(steps, runs.gain.timesteps)
    assert torch.equal(weights, runs.gain.mean)
    for name, count in (("sampler", 50), ("sampler:ddim50", 50), ("sampler:ddim7", 7)):
        found, wanted = timestep_weights(name, schedule), sampler_weights(schedule, count)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    importance = fisher_importance(replace(fisher_table, gain=runs.gain), "gain", schedule, shapes)
    entry = fisher_table.entries["head.output.weight"]
    expected = sum(0.5 * w * entry.channel[t].double() for t, w in zip(steps.tolist(), weights.tolist(), strict=True))
    torch.testing.assert_close(importance["head.output.weight"], expected)


def test_a_plan_by_gain_fits_ranges_by_it_and_keeps_its_promise(
    checkpoint: Checkpoint, dataset: Dataset, runs: FisherTable, tmp_path: Path
) -> None:
    """Predicted as the quantized file's weights say; ranges fitted with other weights would not give that."""
    table = fisher(
        checkpoint, dataset, FisherConfig("true", timesteps=4, samples=2, granularity="weight", bins=2), 0, Context()
    )
    settings = config(timestep_weights="gain", formats=("float32", "int4", "codebook2"), ranges=("fisher",))
    made = plan_by_gain(checkpoint, table, None, runs, settings, 0, Context())
    assert made.fits_fisher
    packed = quantize_by_gain(checkpoint, made, table, runs, QuantizeConfig(), 0, Context())
    save_quantized(packed, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    importance = fisher_importance(replace(table, gain=runs.gain), "gain", checkpoint.spec.noise_schedule(), shapes)
    tensors = dict(packed.network().named_parameters())
    rise = sum(
        float((importance[n].double() * (tensors[n].detach() - t).double().square()).sum())
        for n, t in checkpoint.tensors.items()
    )
    assert made.budget is not None
    assert made.budget.predicted == pytest.approx(rise, rel=1e-4)
    with pytest.raises(ConfigError, match="need a trajectory table"):
        quantize(checkpoint, made, table, QuantizeConfig(), 0, Context())
    with pytest.raises(ConfigError, match="need a trajectory table"):
        plan(checkpoint, table, None, settings, 0, Context())


@pytest.mark.parametrize("name", ["sampler:ddim0", "sampler:ddim", "sampler:ddpm50", "gains", "at:", "at:1x"])
def test_unknown_timestep_weights_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown timestep weights"):
        config(timestep_weights=name)


def test_a_sampler_of_more_steps_than_there_are_is_refused(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    with pytest.raises(ConfigError, match="1001 inference steps"):
        plan(checkpoint, fisher_table, None, config(timestep_weights="sampler:ddim1001"), 0, Context())


# --- single weights of a sampler run -----------------------------------------------------------------------------------


def test_single_weights_of_a_run_average_to_its_channels(
    checkpoint: Checkpoint, runs: FisherTable, tmp_path: Path
) -> None:
    """From the files; rejects a plain mean beside the channels' robust one."""
    save_fisher(runs, tmp_path)
    table = load_fisher(tmp_path)
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    single, channels = trajectory_importance(table, shapes), trajectory_importance(replace(table, weights=()), shapes)
    axes = output_axes(checkpoint.network())
    for name, values in single.items():
        assert values.shape == shapes[name]
        mean = values.double().movedim(axes[name], 0).flatten(1).mean(dim=1) if values.ndim > 1 else values.double()
        torch.testing.assert_close(mean, channels[name], rtol=1e-4, atol=1e-7 * float(channels[name].max()))


def test_a_plan_by_a_run_fits_ranges_to_single_weights_and_keeps_its_promise(
    checkpoint: Checkpoint, runs: FisherTable, tmp_path: Path
) -> None:
    """Predicted = 1/2 sum F_i d_i^2 of the weights in the file, F_i the single weights'."""
    settings = config(score="trajectory", formats=("float32", "int4", "codebook3"), target_bpw=6.0)
    made = plan(checkpoint, runs, None, settings, 0, Context())
    assert made.fits_fisher
    assert any(e.format.startswith("codebook") for e in made.entries)
    assert promised(checkpoint, made, runs, tmp_path) <= 6.0 * made.parameters / 8
    tensors = dict(quantize(checkpoint, made, runs, QuantizeConfig(), 0, Context()).network().named_parameters())
    single = runs.weights[0].read()
    rise = sum(
        0.5 * float((single[n].double() * (tensors[n].detach() - t).double().square()).sum())
        for n, t in checkpoint.tensors.items()
    )
    assert made.budget is not None
    assert made.budget.predicted == pytest.approx(rise, rel=1e-4)


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_find_data_sets_and_gains_by_themselves(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "tiny-fp32")
    few = ("--formats", "float32,int6,int3", "--granularity", "channel", "--target-bpw", "7")
    look = ("--score", "modelopt", "--calibration-timesteps", "2", "--calibration-samples", "2")
    made = good(store, "plan", "tiny-fp32", *look, *few)
    assert made["inputs"].keys() == {"checkpoint", "dataset"}  # type: ignore[attr-defined]
    assert made["id"] != good(store, "plan", "tiny-fp32", *look, *few, "--seed", "1", "--dry-run")["id"]
    assert (
        "score modelopt looked at 2 timesteps x 2 training images"
        in call(store, "plan", "tiny-fp32", *look, *few).stdout
    )

    good(store, "fisher", "--timesteps", "4", "--samples", "2", "--granularity", "weight", "--bins", "2", "--name", "f")
    missing = call(store, "plan", "f", "--timestep-weights", "gain", *few)
    assert missing.exit_code == 1
    assert "no trajectory Fisher table" in missing.stderr
    windowed = ("fisher", "tiny-fp32", "--kind", "trajectory", "--steps", "2", "--samples", "2")
    good(store, *windowed, "--window", "1")
    assert call(store, "plan", "f", "--timestep-weights", "gain", *few).exit_code == 1
    good(store, *windowed, "--granularity", "weight", "--name", "run")
    gain = good(store, "plan", "f", "--timestep-weights", "gain", *few, "--range", "fisher", "--name", "by-gain")
    assert (
        gain["inputs"]["trajectory"]
        == f"fisher/{good(store, 'fisher', *windowed[1:], '--granularity', 'weight')['id']}"
    )  # type: ignore[index]
    small = good(store, "quantize", "by-gain")
    assert small["file_bytes"] == gain["file_bytes"]
    assert Store(store).resolve(str(small["id"])).input("trajectory") is not None
    curve = good(store, "plan", "f", "--timestep-weights", "gain", *few[:4], "--pareto", "7:8:1")
    assert len(curve["points"]) == 2  # type: ignore[arg-type]

    good(store, "plan", "run", *few, "--name", "by-run")
    small = good(store, "quantize", "by-run")
    assert small["file_bytes"] == small["promised_bytes"]
