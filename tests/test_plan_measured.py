"""Plans that are found by running the network: the Gram matrix of what options do, and corrections by what plans did."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fqdiff.configs import FisherConfig, PlanConfig, QuantizeConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.diffusion.samplers import ddim
from fqdiff.errors import ArtifactCorrupt, ConfigError, DataError
from fqdiff.planning.calibration import Calibration, calibration_timesteps, make_probe
from fqdiff.planning.knapsack import Array
from fqdiff.planning.plans import Offer, make_offer
from fqdiff.planning.quadratic import Quadratic, separate
from fqdiff.planning.refine import corrections, refine, solve
from fqdiff.planning.scores import timestep_weights
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import draw_inputs, graded_timesteps
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.stages.fisher import fisher
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, Dataset, FisherTable, Plan, predict_noise

FEW = ("float32", "int8", "int6", "int4", "int3")
TRUE = FisherConfig(kind="true", timesteps=20, samples=2)


def config(**changes: object) -> PlanConfig:
    given = {"target_bpw": 7.0, "formats": FEW, "calibration_timesteps": 4, "calibration_samples": 2, **changes}
    if not (given.get("refine") or given.get("predictor") == "gram"):
        given = {k: v for k, v in given.items() if not k.startswith("calibration")}
    return PlanConfig("budget", **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint, dataset: Dataset) -> FisherTable:
    return fisher(checkpoint, dataset, TRUE, 0, Context())


@pytest.fixture(scope="module")
def runs(checkpoint: Checkpoint, dataset: Dataset) -> FisherTable:
    return fisher(checkpoint, dataset, FisherConfig(kind="trajectory", steps=3, samples=2), 0, Context())


def make(checkpoint: Checkpoint, table: FisherTable, dataset: Dataset | None, **changes: object) -> Plan:
    return plan(checkpoint, table, dataset, config(**changes), 0, Context())


def calibration(checkpoint: Checkpoint, table: FisherTable, dataset: Dataset) -> Calibration:
    settings = config(predictor="gram")
    offer = make_offer(checkpoint, table, settings, 0, Context())
    probe = make_probe(checkpoint, dataset, table, settings, 0, torch.device("cpu"))
    return Calibration(checkpoint, offer.market, offer.weights, probe, Context())


@pytest.fixture(scope="module")
def bench(checkpoint: Checkpoint, table: FisherTable, dataset: Dataset) -> Calibration:
    return calibration(checkpoint, table, dataset)


@pytest.fixture(scope="module")
def problem(bench: Calibration) -> Quadratic:
    return bench.quadratic(Ledger(Context(), lambda: False))


def noise_rise(checkpoint: Checkpoint, made: Plan, dataset: Dataset, settings: PlanConfig) -> float:
    """From the definition: the quantized file's network beside the full one on the calibration inputs, one at a time."""
    spec = checkpoint.spec
    steps, weights = calibration_timesteps("uniform", spec.noise_schedule(), settings.calibration_timesteps)
    inputs = draw_inputs(dataset.train, spec, steps, weights, settings.calibration_samples, 0, "plan calibration")
    networks = checkpoint.network(), quantize(checkpoint, made, None, QuantizeConfig(), 0, Context()).network()
    rise = 0.0
    for n in range(len(inputs)):
        eps = [
            predict_noise(spec, network)(inputs.x_t[n : n + 1], inputs.t[n : n + 1]).double() for network in networks
        ]
        rise += 0.5 * float((eps[1] - eps[0]).square().sum() * inputs.share[n])
    return rise


def test_only_options_worth_their_bytes_have_a_row(bench: Calibration, table: FisherTable) -> None:
    everything = make_offer(bench.checkpoint, table, config(), 0, Context()).market
    for name, kept in bench.market.options.items():
        assert set(kept) <= set(everything.options[name])
        by_bytes = sorted(kept, key=lambda o: o.bytes)
        assert [o.value for o in by_bytes] == sorted((o.value for o in kept), reverse=True)
        assert min(o.value for o in kept) == min(o.value for o in everything.options[name])


# --- the Gram matrix -------------------------------------------------------------------------------------------------


def test_predicted_and_measured_agree_to_a_few_percent_where_errors_are_small(
    checkpoint: Checkpoint, table: FisherTable, dataset: Dataset
) -> None:
    """Rejects cross terms left out (off by a quarter and more) or counted twice; measured from the quantized file."""
    made = make(checkpoint, table, dataset, predictor="gram", target_bpw=9.0)
    assert made.budget is not None
    settings = config(predictor="gram")
    rise = noise_rise(checkpoint, made, dataset, settings)
    assert made.budget.predicted == pytest.approx(rise, rel=0.05)


def test_cross_terms_lead_to_a_plan_that_really_rises_less(
    checkpoint: Checkpoint, table: FisherTable, dataset: Dataset, tmp_path: Path
) -> None:
    """Both of one size; the rise is that of the files, and the gain of the size that was told."""
    settings = config(predictor="gram", target_bpw=6.0)
    gram, diagonal = (make(checkpoint, table, dataset, target_bpw=6.0, predictor=p) for p in ("gram", "diagonal"))
    rises = [noise_rise(checkpoint, made, dataset, settings) for made in (gram, diagonal)]
    assert rises[0] < 0.9 * rises[1]
    assert gram.budget is not None
    assert gram.budget.diagonal is not None
    assert gram.budget.swaps
    assert gram.budget.predicted < gram.budget.diagonal
    assert gram.budget.lower_bound is not None
    assert 0 < gram.budget.lower_bound <= gram.budget.predicted
    save_quantized(quantize(checkpoint, gram, None, QuantizeConfig(), 0, Context()), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == gram.file_bytes <= 6.0 * gram.parameters / 8


@pytest.mark.parametrize("bits", [5.0, 5.5, 6.5, 8.0, 11.0, 20.0, 40.0])
def test_no_plan_is_over_its_budget_by_a_byte(bench: Calibration, problem: Quadratic, bits: float) -> None:
    target = int(bits * 150_000 / 8)
    found = solve(bench.market, target, problem)
    assert bench.market.size(found.choice.positions) <= target
    assert found.predicted <= found.diagonal


def test_parts_of_a_measured_rise_are_the_rows_of_the_gram_matrix(bench: Calibration, table: FisherTable) -> None:
    """By a gradient at the quantized weights, and by inner products at the full ones: equal where errors are small."""
    bench = replace(bench, market=make_offer(bench.checkpoint, table, config(), 0, Context()).market)
    problem = bench.quadratic(Ledger(Context(), lambda: False))
    positions = tuple(int(len(options) > 2) for options in bench.market.options.values())  # int8, biases in float32
    rise, parts = bench.measure(positions)
    shares = problem.shares(positions)
    assert parts.sum() == pytest.approx(rise, rel=0.03)
    assert shares.sum() == pytest.approx(rise, rel=0.03)
    assert np.abs(parts - shares).max() < 0.05 * shares.max()
    assert (shares[[len(t.shape) == 1 for t in bench.checkpoint.tensors.values()]] == 0).all()
    assert problem.alone[range(len(positions)), positions].sum() != pytest.approx(rise, rel=0.1)
    weights = dict(bench.network.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in bench.checkpoint.tensors.items())


def test_strata_carry_the_weights_of_all_their_timesteps(checkpoint: Checkpoint) -> None:
    schedule = checkpoint.spec.noise_schedule()
    steps, weights = calibration_timesteps("uniform", schedule, 10)
    graded, widths = graded_timesteps(1000, 10)
    assert torch.equal(steps, graded)
    assert torch.allclose(weights, widths)
    for name in ("snr", "sampler", "at:7"):
        wanted, all_weights = timestep_weights(name, schedule)
        steps, weights = calibration_timesteps(name, schedule, 10)
        assert set(steps.tolist()) <= set(wanted.tolist())
        assert len(steps) == (1 if name == "at:7" else 10)
        assert float(weights.sum()) == pytest.approx(float(all_weights.sum()))


# --- corrections -----------------------------------------------------------------------------------------------------


def truth(offer: Offer, seed: int) -> tuple[Array, Array]:
    """What every option really does: its value times a factor of its tensor's own, and all ten times as much."""
    factors = 10 * np.exp(np.random.default_rng(seed).uniform(-1.2, 1.2, size=len(offer.market.options)))
    return factors, offer.market.values * factors[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_refining_finds_the_plan_of_the_true_values(checkpoint: Checkpoint, table: FisherTable, seed: int) -> None:
    """Rejects one factor for the whole plan: it mends the number and leaves the plan."""
    offer = make_offer(checkpoint, table, config(), 0, Context())
    _, real = truth(offer, seed)

    def measure(choice: tuple[int, ...]) -> tuple[float, Array]:
        parts = real[np.arange(len(choice)), list(choice)]
        return float(parts.sum()), parts

    trials = refine(offer.market, 110_000, separate(offer.market.values), measure, 8, Ledger(Context(), lambda: False))
    assert len(trials) <= 8
    assert trials[-1].agrees
    assert not trials[0].agrees
    best = min(trial.measured for trial in trials)
    assert best < 0.9 * trials[0].measured


def test_a_factor_is_measured_over_predicted_and_the_last_plan_is_predicted_right() -> None:
    values = np.array([[0.0, 2.0], [0.0, 3.0], [0.0, 5.0]])
    parts = np.array([4.0, 3.0, 9.0])
    factors = corrections(separate(values), [(1, 1, 0)], [7.0], [parts * [1, 1, 0]])
    assert factors[:2] == pytest.approx([2.0, 1.0])
    assert separate(values).scaled(factors).value((1, 1, 0)) == pytest.approx(7.0)
    # A part that is negative, and one that is enormous, are taken to differ from the whole by a factor of 4.
    wild = corrections(separate(values), [(1, 1, 1)], [10.0], [np.array([-5.0, 3.0, 1000.0])])
    assert wild[2] / wild[0] == pytest.approx(16.0)
    assert separate(values).scaled(wild).value((1, 1, 1)) == pytest.approx(10.0)


@pytest.mark.parametrize("predictor", ["diagonal", "gram"])
def test_refining_ends_within_its_number_and_keeps_the_plan_that_rose_least(
    checkpoint: Checkpoint, table: FisherTable, dataset: Dataset, predictor: str
) -> None:
    changes = {"predictor": predictor, "target_bpw": 5.0}
    first = make(checkpoint, table, dataset, **changes, refine=1)
    many = make(checkpoint, table, dataset, **changes, refine=3)
    assert first.budget is not None
    assert many.budget is not None
    assert first.budget.evaluations == 1
    assert 1 <= many.budget.evaluations <= 3
    plain = make(checkpoint, table, dataset, **changes)
    assert [e.format for e in first.entries] == [e.format for e in plain.entries]
    for made in (first, many):
        assert made.budget is not None
        rise = noise_rise(checkpoint, made, dataset, config(refine=1))
        assert made.budget.measured == pytest.approx(rise, rel=1e-4)
        assert made.file_bytes <= 5.0 * made.parameters / 8
    assert many.budget.measured is not None
    assert first.budget.measured is not None
    assert many.budget.measured <= first.budget.measured


def test_a_killed_run_continues_to_the_same_plan(checkpoint: Checkpoint, table: FisherTable, dataset: Dataset) -> None:
    """Stopped after every unit of work: every timestep of the Gram matrix, every plan measured."""
    changes = {"predictor": "gram", "refine": 3, "target_bpw": 5.0}
    whole = make(checkpoint, table, dataset, **changes)
    parts, stops = MemoryParts(), 0
    while True:
        context = Context(parts=parts, soft_stop=lambda: nullcontext(lambda: True))
        try:
            again = plan(checkpoint, table, dataset, config(**changes), 0, context)
            break
        except KeyboardInterrupt:
            stops += 1
    assert whole.budget is not None
    assert stops >= 4 + whole.budget.evaluations - 1
    assert again == whole


def test_a_trajectory_score_is_measured_by_final_images(
    checkpoint: Checkpoint, runs: FisherTable, dataset: Dataset
) -> None:
    """No data set: runs start from noise. From the definition: paired DDIM images, half their squared difference."""
    changes = {"score": "trajectory", "calibration_timesteps": 10, "refine": 2}
    made = make(checkpoint, runs, None, **changes)
    assert made.budget is not None
    networks = checkpoint.network(), quantize(checkpoint, made, None, QuantizeConfig(), 0, Context()).network()
    start = torch.stack([torch.randn(1, 8, 8, generator=generator(0, "plan calibration", k)) for k in range(2)])

    def images(index: int) -> Tensor:
        predict = predict_noise(checkpoint.spec, networks[index])
        *_, (_, x) = ddim(predict, start, checkpoint.spec.noise_schedule(), 3, lambda: start)
        return x.double()

    rise = 0.5 * (images(1) - images(0)).square().flatten(1).sum(dim=1).mean()
    assert made.budget.measured == pytest.approx(float(rise), rel=0.02)
    assert (made.budget.calibration_timesteps, made.budget.calibration_samples) == (3, 2)
    gram = make(
        checkpoint, runs, None, **{**changes, "refine": 1}, predictor="gram", formats=("float32", "int6", "int3")
    )
    assert gram.budget is not None
    assert gram.budget.measured == pytest.approx(gram.budget.predicted, rel=0.05)


# --- what a plan says about itself, and bad input ----------------------------------------------------------------------


def test_a_gram_plan_survives_the_disk_and_lies_about_it_do_not(
    checkpoint: Checkpoint, table: FisherTable, dataset: Dataset, tmp_path: Path
) -> None:
    made = make(checkpoint, table, dataset, predictor="gram", refine=1, target_bpw=5.0)
    assert made.budget is not None
    for entry in made.entries:
        better = [a for a in entry.alternatives if a.predicted < entry.predicted]  # type: ignore[operator]
        assert entry.constraint == ("budget" if better else "none")
    for kept in (replace(made, budget=replace(made.budget, lower_bound=None)), made):  # older ones had none
        save_plan(kept, tmp_path)
        assert load_plan(tmp_path) == kept
    lies: tuple[dict[str, object], ...] = (
        {"predictor": "oracle"},
        {"predictor": "diagonal"},
        {"swaps": None},
        {"lower_bound": 1e9},
        {"measured": None},
        {"evaluations": 0},
        {"measured": -1.0},
    )
    for lie in lies:
        save_plan(replace(made, budget=replace(made.budget, **lie)), tmp_path)  # type: ignore[arg-type]
        with pytest.raises(ArtifactCorrupt):
            load_plan(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": "oracle"}, "unknown predictor 'oracle'"),
        ({"refine": -1}, "refine is -1"),
        ({"refine": 1, "score": "random"}, "'random' predicts cannot be measured"),
        ({"predictor": "gram", "score": "weight-mse"}, "cannot be measured"),
        ({"refine": 1, "target_bpw": 0.0, "max_loss_increase": 1.0}, "least rise of a size"),
        ({"refine": 1, "score": "trajectory"}, "the steps of its Fisher table"),
        ({"refine": 1, "calibration_samples": 0}, "calibration_samples is 0"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
    with pytest.raises(ConfigError, match="nothing looks at --calibration-samples"):
        PlanConfig("budget", target_bpw=4.0, calibration_samples=8)


def test_images_that_are_missing_or_do_not_fit_are_refused(
    checkpoint: Checkpoint, table: FisherTable, dataset: Dataset
) -> None:
    with pytest.raises(ConfigError, match="needs training images"):
        make(checkpoint, table, None, refine=1)
    with pytest.raises(DataError, match="a network of"):
        make(checkpoint, table, replace(dataset, images=dataset.images[:, :, :4]), refine=1)


def test_calibration_sees_training_images_only(checkpoint: Checkpoint, table: FisherTable, dataset: Dataset) -> None:
    def measured(held_out: bool) -> float | None:
        images = dataset.images.clone()
        images[dataset.held_out == held_out] = 0
        made = make(checkpoint, table, replace(dataset, images=images), refine=1)
        assert made.budget is not None
        return made.budget.measured

    whole = make(checkpoint, table, dataset, refine=1).budget
    assert whole is not None
    assert measured(held_out=True) == whole.measured != measured(held_out=False)
