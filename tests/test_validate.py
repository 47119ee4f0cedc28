"""Whether predictions of quantization damage are judged rightly: by closed forms, by other libraries, and as a whole."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from fqdiff.cli.app import app
from fqdiff.cli.fisher_validate import verdict_text
from fqdiff.configs import ValidateConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.diffusion.samplers import ddim
from fqdiff.diffusion.schedule import make_schedule
from fqdiff.errors import ConfigError, DataError, LineageError
from fqdiff.evidence.correlation import bootstrap_spearman, percentile_interval, ranks, spearman
from fqdiff.quant.formats import PerChannel, get_format
from fqdiff.quant.qparams import choose_qparams, dequantize, quantize
from fqdiff.quant.ranges import least_error_qparams
from fqdiff.rng import generator
from fqdiff.sensitivity import rivals
from fqdiff.sensitivity.candidates import channel_errors, group_by_tensor, make_candidates, quantized_weight
from fqdiff.sensitivity.gram import cosines, gram, gram_rise
from fqdiff.sensitivity.inputs import Inputs, draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import outputs, replaced, residual, rises
from fqdiff.sensitivity.plans import make_plans
from fqdiff.sensitivity.predictions import at_timesteps, diagonal_rise, sampler_weights
from fqdiff.sensitivity.summary import Judge, correlate
from fqdiff.stages import validate as module
from fqdiff.stages.validate import validate
from fqdiff.store.codecs import CODECS
from fqdiff.values import (
    Candidate,
    Checkpoint,
    Correlation,
    Dataset,
    FisherEntry,
    FisherTable,
    TrajectoryEntry,
    Validation,
    Verdict,
    predict_noise,
)

CPU = torch.device("cpu")
QUICK = ValidateConfig(formats=("int8", "int3"), timesteps=3, samples=2, images=1, steps=2, plans=3, resamples=50)
QUICKER = replace(QUICK, formats=("int3",), clipped=("int3",), timesteps=2, samples=1, steps=1, plans=2)


class Linear(nn.Module):
    """eps_pred = (A + B) x: linear in its weights, and two tensors that can work together."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (self.a(flat) + self.b(flat)).view(x.shape)


def network(seed: int = 0) -> Linear:
    made = Linear()
    for index, p in enumerate(made.parameters()):
        p.data = torch.randn(4, 4, generator=generator(seed, index))
    return made


def linear_inputs(x: Tensor) -> Inputs:
    """Inputs of which each counts the same. ``x`` [N, 4]."""
    n = len(x)
    target = torch.randn(n, 1, 2, 2, generator=generator(1))
    share = torch.full((n,), 1 / n, dtype=torch.float64)
    return Inputs(x.view(n, 1, 2, 2), torch.zeros(n, dtype=torch.long), target, torch.ones(n, 1, 1, 1), share)


HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # E[x x^T] = 1
ALIKE = torch.ones(4, 4)  # every pixel the same: errors of a row add up


def measured(model: nn.Module, inputs: Inputs, tensors: Mapping[str, Tensor]) -> float:
    plain = outputs(model, inputs, CPU)
    with replaced(model, tensors):
        delta = outputs(model, inputs, CPU) - plain
    return float(rises(delta, residual(inputs, plain), len(inputs))[0])


def delta(model: nn.Module, inputs: Inputs, tensors: Mapping[str, Tensor]) -> Tensor:
    plain = outputs(model, inputs, CPU)
    with replaced(model, tensors):
        return outputs(model, inputs, CPU) - plain


# --- what is measured and predicted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_the_fisher_diagonal_is_exact_where_inputs_are_uncorrelated(name: str) -> None:
    """Rejects a missing 1/2, means in place of sums over pixels or weights, and channels along the wrong axis."""
    model = network()
    weight = model.a.weight.detach().clone()
    candidate = Candidate("a.weight", "1", 16, name, "min-max")
    stored = quantized_weight(candidate, weight, "channel", 0)
    one = torch.ones(1, dtype=torch.float64)
    entry = FisherEntry("1", 16, one, one, one, torch.ones(1, 4, dtype=torch.float64))  # true Fisher: E[x_j^2] = 1
    predicted = float(diagonal_rise(entry, channel_errors(weight, stored, 0)))
    assert predicted == pytest.approx(0.5 * float((stored - weight).double().square().sum()))
    # In float64: what int8 does is so small that float32's own rounding shows in the fifth digit, on some CPUs.
    exact = linear_inputs(HADAMARD.double())
    assert measured(model.double(), exact, {"a.weight": stored.double()}) == pytest.approx(predicted, rel=1e-9)
    without = replace(entry, channel=torch.zeros(1, 0, dtype=torch.float64))
    assert float(diagonal_rise(without, channel_errors(weight, stored, 0))) == pytest.approx(predicted)


def test_channels_of_different_fisher_weigh_their_own_errors() -> None:
    entry = FisherEntry("1", 4, torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([[1.0, 100.0]]).double())
    weight, stored = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(diagonal_rise(entry, channel_errors(weight, stored, 0))) == 0.5 * (1 + 400)
    assert float(diagonal_rise(entry, channel_errors(weight, stored.T.contiguous(), 1))) == 0.5 * (1 + 400)


def test_errors_that_point_the_same_way_escape_the_diagonal_but_not_the_gram_matrix() -> None:
    model, inputs = network(), linear_inputs(ALIKE)
    shrunk = {"a.weight": model.a.weight.detach() - 0.1}
    diagonal = 0.5 * 16 * 0.01
    assert measured(model, inputs, shrunk) == pytest.approx(4 * diagonal, rel=1e-5)
    matrix = gram(delta(model, inputs, shrunk)[None], inputs.share)
    assert float(0.5 * matrix) == pytest.approx(4 * diagonal, rel=1e-5)


def test_the_gram_matrix_gives_the_error_of_a_whole_plan() -> None:
    """Rejects a Gram matrix without its off-diagonal part, here a third of the rise or more."""
    model, inputs = network(), linear_inputs(torch.randn(6, 4, generator=generator(2)))
    shifted = {"a.weight": model.a.weight.detach() + 0.2, "b.weight": model.b.weight.detach() + 0.3}
    matrix = gram(torch.stack([delta(model, inputs, {name: w}) for name, w in shifted.items()]), inputs.share)
    rise, diagonal = gram_rise(matrix, torch.tensor([[0, 1]]))
    assert float(rise) == pytest.approx(measured(model, inputs, shifted), rel=1e-5)
    assert float(diagonal) < 0.67 * float(rise)
    assert cosines(matrix, torch.tensor([0, 1])).tolist() == pytest.approx([1.0], abs=1e-4)


def test_the_loss_rise_is_the_difference_of_the_losses() -> None:
    model, inputs = network(), linear_inputs(torch.randn(6, 4, generator=generator(3)))
    changed = {"b.weight": model.b.weight.detach() + 0.05}
    plain = outputs(model, inputs, CPU)
    with replaced(model, changed):
        after = outputs(model, inputs, CPU)
    _, rise, shift = rises(after - plain, residual(inputs, plain), 2)
    losses = [0.5 * (inputs.target.double() - o).square().flatten(1).sum(dim=1) for o in (plain, after)]
    assert torch.allclose(rise, (losses[1] - losses[0]).view(3, 2).mean(dim=1))
    assert torch.allclose(shift, (after - plain).view(3, 2, 4).mean(dim=(1, 2)))


def test_weights_are_the_same_to_the_bit_after_a_trial_that_failed() -> None:
    model = network()
    before = model.a.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shape"), replaced(model, {"a.weight": torch.zeros(4, 3)}):
        model(torch.ones(1, 1, 2, 2), torch.zeros(1))
    assert torch.equal(model.a.weight, before)


def test_errors_of_a_velocity_are_measured_in_units_of_the_noise(checkpoint: Checkpoint, dataset: Dataset) -> None:
    inputs = draw_inputs(
        dataset.reference, checkpoint.spec, torch.tensor([10, 700]), torch.tensor([0.5, 0.5]), 2, 0, "x"
    )
    model = checkpoint.network()
    changed = {"head.output.weight": checkpoint.tensors["head.output.weight"] + 0.1}
    found = delta(model, inputs, changed)
    predict = predict_noise(checkpoint.spec, model)
    before = predict(inputs.x_t, inputs.t)
    with replaced(model, changed):
        after = predict(inputs.x_t, inputs.t)
    assert torch.allclose(found.float(), after - before, atol=1e-5)
    assert float(found.abs().max()) > 0.01


def test_timesteps_are_dense_near_the_image_and_weighted_by_their_width() -> None:
    timesteps, weights = graded_timesteps(1000, 20)
    assert timesteps[:3].tolist() == [1, 6, 16]
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[0]) == pytest.approx(1 / 400)
    assert float(timesteps.double() @ weights) == pytest.approx(499.5, rel=0.01)  # the mean over all timesteps
    merged, shares = graded_timesteps(10, 10)
    assert merged.tolist() == sorted(set(merged.tolist()))
    assert float(shares.sum()) == pytest.approx(1)
    with pytest.raises(ConfigError, match="11 timesteps"):
        graded_timesteps(10, 11)


def test_inputs_do_not_depend_on_which_timesteps_are_asked_for(checkpoint: Checkpoint, dataset: Dataset) -> None:
    ones = torch.ones(2, dtype=torch.float64)
    both = draw_inputs(dataset.train, checkpoint.spec, torch.tensor([5, 9]), ones / 2, 2, 0, "x")
    second = draw_inputs(dataset.train, checkpoint.spec, torch.tensor([9]), ones[:1], 2, 0, "x")
    assert torch.equal(both.x_t[2:], second.x_t)
    assert float(both.share.sum()) == pytest.approx(1)


def test_tables_are_read_between_their_timesteps_in_the_logarithm() -> None:
    values, timesteps = torch.tensor([100.0, 1.0, 0.0]).double(), torch.tensor([0, 10, 20])
    found = at_timesteps(values, timesteps, torch.tensor([0, 5, 10, 20, 30]))
    assert found.tolist() == pytest.approx([100, 10, 1, 0, 0])
    assert at_timesteps(values[:1], timesteps[:1], torch.tensor([3, 4])).tolist() == [100, 100]


def test_the_samplers_weights_are_what_a_step_makes_of_an_error() -> None:
    """Against the sampler itself: eps_pred changed at one step, the next x compared."""
    schedule = make_schedule("linear", 1000)
    timesteps, gains = sampler_weights(schedule, 4)
    assert timesteps.tolist() == [249, 499, 749, 999]
    start = torch.randn(1, 1, 2, 2, generator=generator(0)).double()
    for t, gain in zip(timesteps.tolist(), gains.tolist(), strict=True):

        def run(error: float, t: int = t) -> Tensor:
            steps = ddim(
                lambda x, at: 0.1 * x + (error if int(at[0]) == t else 0.0),
                start,
                schedule,
                4,
                lambda: start,
                clip=False,
            )
            return next(x for at, x in steps if at == t)

        change = float((run(1e-3) - run(0.0)).mean()) / 1e-3
        assert change**2 == pytest.approx(gain, rel=1e-4)


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_clipping_never_raises_the_weight_error_and_finds_the_best_of_its_ranges() -> None:
    fmt, grain = get_format("int3"), PerChannel(0)
    x = torch.randn(5, 600, generator=generator(0))

    def error(low: Tensor, high: Tensor) -> Tensor:
        """By hand, row by row: asymmetric rounding from ``low`` to ``high``."""
        step = (high - low) / 7
        zero = (-low / step).round()
        codes = (x / step[:, None]).round() + zero[:, None]
        return ((codes.clamp(0, 7) - zero[:, None]) * step[:, None] - x).square().mean(dim=1)

    ends = x.amin(dim=1), x.amax(dim=1)
    best = torch.stack([error(c / 100 * ends[0], c / 100 * ends[1]) for c in range(100, 20, -1)]).amin(dim=0)
    found = least_error_qparams(x, fmt, grain)
    back = dequantize(quantize(x, found, fmt, grain), found, grain)
    assert torch.allclose((back - x).square().mean(dim=1), best, rtol=1e-3)
    plain = choose_qparams(x, fmt, grain)
    assert bool((found.scale < 0.9 * plain.scale).all())


def test_clipping_leaves_weights_that_lie_on_the_grid_alone() -> None:
    x = torch.arange(8.0).repeat(2, 1) - 3
    fmt, grain = get_format("int3"), PerChannel(0)
    found = least_error_qparams(x, fmt, grain)
    assert torch.equal(dequantize(quantize(x, found, fmt, grain), found, grain), x)


def test_a_cast_has_no_range_to_clip() -> None:
    with pytest.raises(ConfigError, match="float16 is no integer"):
        make_candidates({"a": torch.ones(2, 2)}, {"a": "1"}, ("int8",), ("float16",))


# --- rivals ----------------------------------------------------------------------------------------------------------


def test_the_hessian_trace_of_a_tensor_is_its_closed_form_without_the_other_tensors() -> None:
    """H of A is 1 (x) E[x x^T] = 1, so that every draw gives 16. One draw for A and B at once gives 0 to 32."""
    inputs = linear_inputs(HADAMARD)
    for draws in (1, 5):
        assert rivals.hessian_trace(network(), "a.weight", inputs, CPU, 0, draws) == pytest.approx(16, rel=1e-5)


def test_hutchinsons_mean_nears_the_trace_where_single_draws_do_not() -> None:
    """E[x x^T] has 1 everywhere: v^T H v is the sum of (v_o . 1)^2, anything from 0 to 64, and 16 on average."""
    inputs, draws = linear_inputs(ALIKE), 300
    traces = [rivals.hessian_trace(network(), "a.weight", inputs, CPU, seed, 1) for seed in range(draws)]
    assert len({round(t) for t in traces}) > 3
    assert sum(traces) / draws == pytest.approx(16, abs=3 * (24 * 4 / draws) ** 0.5)
    settled = rivals.hessian_trace(network(), "a.weight", inputs, CPU, 0, draws)
    assert settled == pytest.approx(16, rel=0.5)


def test_modelopts_score_is_its_formula_and_adds_up_over_batches() -> None:
    model, inputs = network(), linear_inputs(torch.randn(6, 4, generator=generator(4)))
    weight = model.a.weight.detach()
    stored = [weight + 0.1, (weight * 2).round() / 2]
    quantized = {"a.weight": [(0, stored[0]), (1, stored[1])]}
    found = rivals.modelopt_scores(model, quantized, inputs, CPU, 2)
    x = inputs.x_t.flatten(1)
    gradient = model(inputs.x_t, inputs.t).detach().flatten(1) - inputs.target.flatten(1)
    expected = [float((gradient * (x @ (w - weight).T)).square().sum(dim=1).mean()) for w in stored]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    halves = [
        Inputs(*(getattr(inputs, f)[part] for f in ("x_t", "t", "target", "weight", "share")))
        for part in (slice(0, 2), slice(2, 6))
    ]
    parts = sum(rivals.modelopt_scores(model, quantized, half, CPU, 2) for half in halves)
    assert torch.allclose(torch.as_tensor(parts), found, rtol=1e-5)


def test_autorounds_score_takes_its_gradient_at_the_quantized_weights() -> None:
    model, inputs = network(), linear_inputs(torch.randn(6, 4, generator=generator(5)))
    weight = model.a.weight.detach().clone()
    stored = weight.round()
    found = rivals.autoround_scores(model, {"a.weight": (3, stored)}, inputs, CPU)
    x = inputs.x_t.flatten(1)
    error = x @ (stored + model.b.weight.detach()).T - inputs.target.flatten(1)
    gradient = error.T @ x / 6
    assert found[3] == pytest.approx(float((gradient * (weight - stored)).abs().sum()), rel=1e-4)
    assert torch.equal(model.a.weight, weight)
    assert model.b.weight.grad is None


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_agrees_with_scipy_ties_included(levels: int) -> None:
    draw = generator(levels)
    x = torch.randint(0, levels, (40,), generator=draw).double()
    y = x + torch.randint(0, levels, (40,), generator=draw)
    assert float(spearman(x, y)) == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-12)
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert bool(spearman(torch.ones(5), torch.arange(5)).isnan())


def test_clusters_are_resampled_whole() -> None:
    """Eight copies of each of 12 points say no more than the 12: an interval that narrows has drawn single points."""
    draw = generator(0)
    x = torch.rand(12, 1, generator=draw)
    y = x + torch.rand(12, 1, generator=draw)
    one = percentile_interval(bootstrap_spearman(x[None], y, generator(1), 400)[0])
    many = percentile_interval(bootstrap_spearman(x[None].expand(1, 12, 8), y.expand(12, 8), generator(1), 400)[0])
    assert one == pytest.approx(many)
    assert one is not None
    assert one[0] < float(spearman(x[:, 0], y[:, 0])) < one[1]


def test_scores_share_their_draws_and_undefined_ones_have_no_interval() -> None:
    x, y = torch.rand(10, 2, generator=generator(0)), torch.rand(10, 2, generator=generator(1))
    draws = bootstrap_spearman(torch.stack([x, 2 * x, torch.ones(10, 2)]), y, generator(2), 50)
    assert torch.equal(draws[0], draws[1])
    assert percentile_interval(draws[2]) is None


def test_the_interval_of_unrelated_numbers_holds_zero_about_as_often_as_it_should() -> None:
    held = 0
    for k in range(60):
        draw = generator(k, "coverage")
        x, y = torch.rand(30, 1, generator=draw), torch.rand(30, 1, generator=draw)
        interval = percentile_interval(bootstrap_spearman(x[None], y, draw, 200)[0])
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert held >= 50


def judged(scores: dict[str, Tensor], output: Tensor, image: Tensor) -> tuple[list[Correlation], list[Verdict]]:
    """Eight tensors in two formats, as the stage judges them; 4 pixels."""
    candidates = [Candidate(f"w{m}", "1", 4, fmt, "min-max") for m in range(8) for fmt in ("int8", "int4")]
    targets = {"output_error": output, "image_error": image, "timesteps": output[:, None]}
    return correlate(candidates, scores, {}, targets, Judge(0, 200, 4))


def test_a_score_that_knows_beats_one_that_guesses_and_units_are_respected() -> None:
    output, image, noise = torch.rand(3, 16, generator=generator(0, "judged")).double()
    rows, verdicts = judged({"true_mean": output / 3, "trajectory": image, "random": noise}, output, image)
    found = {(r.score, r.target, r.subset): r for r in rows}
    assert found["true_mean", "output_error", "all"].rho == 1
    assert found["true_mean", "output_error", "int4"].ratio == pytest.approx(3)
    assert found["true_mean", "image_error", "all"].ratio is None
    assert found["trajectory", "image_error", "all"].ratio == pytest.approx(0.5 * 4)  # half a sum, not a mean
    assert found["random", "output_error", "all"].ratio is None
    verdict = next(v for v in verdicts if v.question == "Fisher against rivals" and v.target == "output_error")
    assert (verdict.better, verdict.other) == ("true_mean", "random")
    assert verdict.interval is not None
    assert verdict.interval[0] > 0


def test_two_scores_of_the_same_worth_cannot_be_told_apart() -> None:
    output = torch.rand(16, generator=generator(1, "judged")).double()
    near = [output + 0.3 * torch.rand(16, generator=generator(k, "near")) for k in range(2)]
    _, verdicts = judged({"true_mean": near[0], "modelopt": near[1]}, output, output)
    assert verdicts[0].interval is not None
    assert verdicts[0].interval[0] < 0 < verdicts[0].interval[1]
    assert "cannot be told apart" in verdict_text(verdicts[0])


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_has_one_candidate_for_each_tensor() -> None:
    tensors = {"stem.w": torch.ones(2, 2), "block1.w": torch.ones(3, 3), "block1.b": torch.ones(3)}
    blocks = {"stem.w": "stem", "block1.w": "1", "block1.b": "1"}
    candidates = make_candidates(tensors, blocks, ("int8", "int3"), ("int3",))
    assert [(c.tensor, c.format, c.range) for c in candidates[:3]] == [
        ("stem.w", "int8", "min-max"),
        ("stem.w", "int3", "min-max"),
        ("stem.w", "int3", "clipped"),
    ]
    labels, choice = make_plans(candidates, 4, 0)
    assert labels[:5] == ("int8", "int3", "int3, ends int8", "int3 clipped", "int3 clipped, ends int8")
    assert choice[:5].tolist() == [[0, 3], [1, 4], [0, 4], [2, 5], [0, 5]]
    groups = [set(group) for group in group_by_tensor(candidates).values()]
    assert all(int(k) in group for row in choice for k, group in zip(row, groups, strict=True))
    assert all(candidates[int(k)].range == "min-max" for k in choice[5:].flatten())
    assert torch.equal(make_plans(candidates, 4, 0)[1], choice)


# --- the stage -------------------------------------------------------------------------------------------------------


def tables(fisher_table: FisherTable) -> tuple[FisherTable, FisherTable, FisherTable]:
    """An empirical table, the same without channels as the true one, and a trajectory table."""
    bare = {
        name: replace(e, channel=torch.zeros(len(e.mean), 0, dtype=torch.float64))
        for name, e in fisher_table.entries.items()
    }
    runs = {
        name: TrajectoryEntry(
            e.block, e.numel, float(e.mean.mean()), 0.1, float(e.maximum.max()), e.channel.mean(dim=0), e.mean[:3]
        )
        for name, e in fisher_table.entries.items()
    }
    true = replace(fisher_table, kind="true", entries=bare)
    return fisher_table, true, replace(fisher_table, kind="trajectory", entries={}, trajectory=runs)


@pytest.fixture(scope="module", autouse=True)
def one_hessian_draw() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HESSIAN_DRAWS", 1)
        yield


@pytest.fixture(scope="module")
def validation(checkpoint: Checkpoint, dataset: Dataset, fisher_table: FisherTable) -> Validation:
    return validate(checkpoint, dataset, *tables(fisher_table), QUICK, 0, Context())


def test_every_score_of_every_candidate_is_finite(validation: Validation) -> None:
    assert set(validation.scores) == {
        *(f"{kind}_{at}" for kind in ("empirical", "true") for at in ("t1", "mean", "sampler")),
        *("trajectory", "gram", "weight_mse", "magnitude", "hutchinson", "modelopt", "autoround", "random"),
    }
    for name, values in validation.scores.items():
        assert values.shape == (len(validation.candidates),)
        assert bool(torch.isfinite(values).all()), name
        assert name == "magnitude" or len(values.unique()) > 10, name
    assert bool((validation.output_error > 0).all())
    assert bool((validation.image_error > 0).all())


def test_correlations_cover_blocks_bit_widths_and_plans(validation: Validation) -> None:
    found = {(r.score, r.target, r.subset): r for r in validation.correlations}
    for score in ("empirical_mean", "trajectory", "weight_mse"):
        for target in ("output_error", "image_error"):
            for subset in (
                "all",
                "stem",
                *(f"block {k}" for k in "123456"),
                "head",
                "int8",
                "int3",
                "int4 clipped",
                "plans",
            ):
                assert found[score, target, subset].rho is not None, (score, target, subset)
    assert found["true_timesteps", "output_error", "int8"].n == 3 * found["true_mean", "output_error", "int8"].n
    for row in found.values():
        assert row.interval is None or row.interval[0] <= row.interval[1]


def test_the_measured_error_itself_correlates_perfectly_and_chance_does_not(validation: Validation) -> None:
    found = {(r.score, r.target, r.subset): r.rho for r in validation.correlations}
    assert found["gram", "output_error", "all"] > 0.95  # the same quantity on other images
    assert abs(found["random", "output_error", "all"]) < 0.3
    verdicts = {(v.question, v.target): v for v in validation.verdicts}
    assert verdicts["best two", "output_error"].difference >= 0
    assert set(verdicts) == {
        (question, target)
        for question in ("best two", "Fisher against rivals")
        for target in ("output_error", "image_error")
    }


def test_what_is_measured_is_the_plan_quantized_and_run(
    validation: Validation, checkpoint: Checkpoint, dataset: Dataset
) -> None:
    """A network built anew with the first plan's weights, against the stage's numbers."""
    tensors = dict(checkpoint.tensors)
    for k in validation.plans.choice[0].tolist():
        c = validation.candidates[k]
        axis = 1 if "resample" in c.tensor and c.tensor[5] in "456" else 0
        tensors[c.tensor] = quantized_weight(c, tensors[c.tensor], "channel", axis)
    assert validation.plans.labels[0] == "int8"
    inputs = draw_inputs(dataset.reference, checkpoint.spec, validation.timesteps, validation.weights, 2, 0, "validate")
    before, after = (checkpoint.spec.network(t)(inputs.x_t, inputs.t) for t in (checkpoint.tensors, tensors))
    error = (inputs.weight * (after - before)).double().square().flatten(1).sum(dim=1) / 2
    assert float(error @ inputs.share) == pytest.approx(float(validation.plans.output_error[0]), rel=1e-3)


def test_the_rises_do_not_depend_on_training_images_nor_the_scores_on_held_out_ones(
    checkpoint: Checkpoint, dataset: Dataset, fisher_table: FisherTable
) -> None:
    config = replace(QUICKER, clipped=(), images=0, plans=0)
    whole = validate(checkpoint, dataset, fisher_table, None, None, config, 0, Context())
    for held_out in (True, False):
        images = dataset.images.clone()
        images[dataset.held_out == held_out] = 0
        other = validate(checkpoint, replace(dataset, images=images), fisher_table, None, None, config, 0, Context())
        assert torch.equal(other.output_error, whole.output_error) != held_out
        assert torch.equal(other.gram, whole.gram) == held_out
        assert torch.equal(other.scores["modelopt"], whole.scores["modelopt"]) == held_out
    assert whole.image_error.numel() == len(whole.plans.labels) == 0


def test_an_interrupted_validation_continues_to_the_same_bytes(
    checkpoint: Checkpoint, dataset: Dataset, fisher_table: FisherTable, tmp_path: Path
) -> None:
    """Stopped after every twentieth unit of work: among candidates, in each of the scores, and among the plans."""
    whole = validate(checkpoint, dataset, *tables(fisher_table), QUICKER, 0, Context())
    parts, stops = MemoryParts(), 0
    while True:
        left = iter([False] * 19 + [True])
        context = Context(parts=parts, soft_stop=lambda left=left: nullcontext(lambda: next(left)))
        try:
            again = validate(checkpoint, dataset, *tables(fisher_table), QUICKER, 0, context)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5
    for name, value in (("whole", whole), ("again", again)):
        (tmp_path / name).mkdir()
        CODECS["validation"].save(value, tmp_path / name)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_saved_part_of_another_recipe_is_refused(
    checkpoint: Checkpoint, dataset: Dataset, fisher_table: FisherTable
) -> None:
    parts = MemoryParts()
    context = Context(parts=parts, soft_stop=lambda: nullcontext(lambda: True))
    with pytest.raises(KeyboardInterrupt):
        validate(checkpoint, dataset, fisher_table, None, None, QUICK, 0, context)
    with pytest.raises(ConfigError, match="another recipe"):
        validate(checkpoint, dataset, fisher_table, None, None, replace(QUICK, timesteps=2), 0, Context(parts=parts))


def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Checkpoint, dataset: Dataset, fisher_table: FisherTable
) -> None:
    with pytest.raises(ConfigError, match="no Fisher table"):
        validate(checkpoint, dataset, None, None, None, QUICK, 0, Context())
    with pytest.raises(LineageError, match="kind 'empirical' as the true one"):
        validate(checkpoint, dataset, None, fisher_table, None, QUICK, 0, Context())
    other = replace(fisher_table, entries={k: v for k, v in fisher_table.entries.items() if "head" not in k})
    with pytest.raises(LineageError, match="no 'head"):
        validate(checkpoint, dataset, other, None, None, QUICK, 0, Context())
    every = replace(dataset, held_out=torch.zeros(60, dtype=torch.bool))
    with pytest.raises(DataError, match="holds no image back"):
        validate(checkpoint, every, fisher_table, None, None, QUICK, 0, Context())
    for wrong in ({"formats": ()}, {"formats": ("int8", "int8")}, {"samples": 0}, {"granularity": "group"}):
        with pytest.raises(ConfigError):
            ValidateConfig(**wrong)  # type: ignore[arg-type]


# --- the command -----------------------------------------------------------------------------------------------------

FEW = ("--timesteps", "2", "--samples", "1", "--images", "1", "--plans", "2", "--formats", "int8,int2", "--config")
SETTINGS = "[validate]\nsteps = 2\nresamples = 50\n"


def call(store: Path, *arguments: str) -> Result:
    return CliRunner(env={"FQDIFF_STORE": str(store), "COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "store"
    for command in (
        ["train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5"],
        ["fisher", "--timesteps", "3", "--samples", "2"],
    ):
        assert call(folder, *command, "--quiet").exit_code == 0
    return folder


def test_the_command_shows_scores_plans_and_a_verdict(store: Path, tmp_path: Path) -> None:
    few = [*FEW, str(tmp_path / "few.toml")]
    (tmp_path / "few.toml").write_text(SETTINGS)
    result = call(store, "fisher", "validate", *few)
    assert result.exit_code == 0, result.stderr
    for words in (
        "empirical_mean",
        "weight_mse",
        "int4 clipped",
        "whole plans",
        "Fisher against rivals",
        "scatter.png",
    ):
        assert words in result.stdout
    assert "the latest empirical table" in result.stderr

    found = json.loads(call(store, "fisher", "validate", *few, "--json").stdout)
    assert found["kind"] == "validation"
    assert {"scores", "correlations", "verdicts", "errors", "timesteps", "candidates"} <= found.keys()
    assert (Path(found["path"]) / "scatter.svg").read_bytes().startswith(b"<?xml")
    assert found["inputs"].keys() == {"checkpoint", "dataset", "empirical"}


def test_formats_come_from_the_config_file_too(store: Path, tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text('[validate]\nformats = ["int6"]\nclipped = []\n')
    arguments = ("fisher", "validate", "--config", str(tmp_path / "few.toml"), "--dry-run", "--json")
    assert json.loads(call(store, *arguments).stdout)["config"]["formats"] == ["int6"]


def test_tables_of_another_checkpoint_or_of_one_kind_twice_are_refused(store: Path) -> None:
    (table,) = (p.name for p in (store / "fisher").iterdir())
    twice = call(store, "fisher", "validate", "--fisher", table, "--fisher", table)
    assert twice.exit_code == 2
    assert "two empirical Fisher tables" in twice.stderr
    call(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "4", "--name", "other", "--quiet")
    for arguments, words in (
        (("other",), "no Fisher table of checkpoint"),
        (("other", "--fisher", table), "is not of checkpoint"),
        (("--formats", "int9", "--fisher", table), "unknown format 'int9'"),
    ):
        result = call(store, "fisher", "validate", *arguments)
        assert result.exit_code in (1, 2)
        assert words in result.stderr
