"""How far networks are from a baseline's: noise errors by timestep and divergence by sampler step, against values by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fqdiff.configs import CompareConfig, PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.diffusion.samplers import ddim, sampling_timesteps
from fqdiff.diffusion.schedule import add_noise
from fqdiff.errors import ArtifactCorrupt, NumericalError
from fqdiff.evidence.features import FeatureNetwork, to_unit_range
from fqdiff.rng import generator
from fqdiff.sensitivity import curves, inputs
from fqdiff.sensitivity.curves import comparable, divergence, noise_error
from fqdiff.sensitivity.inputs import graded_timesteps
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.stages.compare import compare
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import sample
from fqdiff.store.codecs import CODECS
from fqdiff.values import Checkpoint, Comparison, Curve, Dataset, Model, predict_noise

CONFIG = CompareConfig(resamples=50, error_timesteps=6, error_inputs=8, trajectories=5, sampler="ddim", steps=4)
BIAS = "head.output.bias"


def errors(
    baseline: Model, models: dict[str, Model], dataset: Dataset, config: CompareConfig = CONFIG, **context: int
) -> tuple[Curve, ...]:
    used = Context(**context)  # type: ignore[arg-type]
    return noise_error(baseline, models, dataset.reference, config, 0, used, Ledger(used, lambda: False))[0]


def runs(
    baseline: Model, models: dict[str, Model], config: CompareConfig = CONFIG, seed: int = 3, **context: int
) -> tuple[Curve, ...]:
    used = Context(**context)  # type: ignore[arg-type]
    return divergence(baseline, models, config, seed, 0, used, Ledger(used, lambda: False))[0]


def values(curve: Curve) -> list[float]:
    return [point.value for point in curve.points]


def shifted(checkpoint: Checkpoint, by: float) -> Checkpoint:
    """The same model, its output ``by`` higher in every pixel."""
    return replace(checkpoint, tensors={**checkpoint.tensors, BIAS: checkpoint.tensors[BIAS] + by})


@pytest.fixture(scope="module")
def coarse(checkpoint: Checkpoint) -> Model:
    """int2, everything but what stays in float32."""
    planned = plan(checkpoint, None, None, PlanConfig("uniform", low="int2"), 0, Context())
    return quantize(checkpoint, planned, None, QuantizeConfig(), 0, Context())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_a_model_compared_with_itself_differs_in_nothing(
    checkpoint: Checkpoint, dataset: Dataset, sampler: str
) -> None:
    """Rejects step noise that is drawn on from one model to the next: with ddpm the copy would get another."""
    planned = plan(checkpoint, None, None, PlanConfig("uniform", low="float32"), 0, Context())
    models = {"model1": checkpoint, "model2": quantize(checkpoint, planned, None, QuantizeConfig(), 0, Context())}
    config = replace(CONFIG, sampler=sampler)
    for curve in (*errors(checkpoint, models, dataset, config), *runs(checkpoint, models, config)):
        assert values(curve) == [0.0] * len(curve.points)
        assert (curve.mean, curve.standard_error, curve.low, curve.high) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_constant_offset_of_the_output_costs_what_it_does_by_hand(
    checkpoint: Checkpoint, dataset: Dataset, prediction: str
) -> None:
    """1/2 c^2 for each of 64 pixels; of a velocity, an error c is one of sqrt(abar_t) c of the noise."""
    spec = replace(checkpoint.spec, prediction=prediction)
    base = replace(checkpoint, spec=spec)
    (curve,) = errors(base, {"model1": shifted(base, 0.25)}, dataset)
    schedule = spec.noise_schedule()
    by_hand = [
        0.5 * 0.25**2 * 64 * (float(schedule.alphas_cumprod[p.at]) if prediction == "v" else 1.0) for p in curve.points
    ]
    assert values(curve) == pytest.approx(by_hand, rel=1e-4)
    timesteps, weights = graded_timesteps(schedule.num_train_timesteps, CONFIG.error_timesteps)
    assert [p.at for p in curve.points] == timesteps.tolist()
    assert curve.mean == pytest.approx(sum(w * v for w, v in zip(weights.tolist(), by_hand, strict=True)), rel=1e-4)
    assert curve.worst.at == timesteps[values(curve).index(max(values(curve)))]


def test_noise_errors_are_those_of_plain_forward_passes(
    checkpoint: Checkpoint, coarse: Model, dataset: Dataset
) -> None:
    """The same inputs drawn here by hand, one at a time."""
    (curve,) = errors(checkpoint, {"model1": coarse}, dataset)
    full, low = (predict_noise(m.spec, m.network()) for m in (checkpoint, coarse))
    schedule = checkpoint.spec.noise_schedule()
    for point in curve.points:
        found = []
        for n in range(CONFIG.error_inputs):
            draw = generator(0, "compare", point.at, n)
            index = int(torch.randint(len(dataset.reference), (), generator=draw))
            noise, t = torch.randn(1, 1, 8, 8, generator=draw), torch.tensor([point.at])
            x_t = add_noise(schedule, to_unit_range(dataset.reference[index : index + 1]), noise, t)
            with torch.no_grad():
                found.append(0.5 * float((low(x_t, t) - full(x_t, t)).double().square().sum()))
        sampled = torch.tensor(found, dtype=torch.float64)
        assert point.value == pytest.approx(float(sampled.mean()), rel=1e-4)
        assert point.standard_error == pytest.approx(float(sampled.std() / len(found) ** 0.5), rel=0.5)


def test_divergence_is_that_of_runs_made_one_at_a_time(checkpoint: Checkpoint, coarse: Model) -> None:
    (curve,) = runs(checkpoint, {"model1": coarse})
    schedule = checkpoint.spec.noise_schedule()

    def states(model: Model, k: int) -> Tensor:
        x = torch.randn(1, 1, 8, 8, generator=generator(3, "image", k))
        with torch.no_grad():
            steps = ddim(predict_noise(model.spec, model.network()), x, schedule, 4, lambda: x)
            return torch.cat([x, *(state for _, state in steps)])

    pairs = [(states(checkpoint, k), states(coarse, k)) for k in range(CONFIG.trajectories)]
    by_hand = torch.stack([(a - b).double().square().flatten(1).mean(dim=1) for a, b in pairs]).mean(dim=0)
    assert values(curve) == pytest.approx(by_hand.tolist(), rel=1e-3)
    assert (curve.points[0].at, curve.points[0].value) == (0, 0.0)
    assert len(curve.points) == 1 + len(sampling_timesteps(schedule.num_train_timesteps, 4))
    assert curve.mean == pytest.approx(float(by_hand[1:].mean()), rel=1e-3)
    assert curve.low < curve.mean < curve.high


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_runs_are_those_of_the_samples(checkpoint: Checkpoint, coarse: Model, sampler: str) -> None:
    """The last step is the image error of the first images sampled with the seed, but for rounding to bytes."""
    (curve,) = runs(checkpoint, {"model1": coarse}, replace(CONFIG, sampler=sampler))
    config = SampleConfig(sampler, CONFIG.steps, count=CONFIG.trajectories)
    full, low = (to_unit_range(sample(model, config, 3, Context()).images) for model in (checkpoint, coarse))
    assert curve.points[-1].value == pytest.approx(float((full - low).square().mean()), rel=0.02)


def test_results_do_not_depend_on_the_batch(
    checkpoint: Checkpoint, coarse: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: dict[str, Model] = {"model1": coarse}
    whole = errors(checkpoint, models, dataset) + runs(checkpoint, models)
    assert errors(checkpoint, models, dataset, batch_size=3) + runs(checkpoint, models, batch_size=3) == whole
    monkeypatch.setattr(inputs, "CHUNK", 7)
    monkeypatch.setattr(curves, "RUNS", 2)
    for a, b in zip(whole, errors(checkpoint, models, dataset) + runs(checkpoint, models), strict=True):
        assert values(a) == pytest.approx(values(b), rel=1e-3)
        assert a.standard_error == pytest.approx(b.standard_error, rel=1e-3)


def test_one_model_does_not_change_what_is_measured_of_another(
    checkpoint: Checkpoint, coarse: Model, dataset: Dataset
) -> None:
    both: dict[str, Model] = {"model1": shifted(checkpoint, 0.1), "model2": coarse}
    alone: dict[str, Model] = {"model2": coarse}
    assert errors(checkpoint, both, dataset)[1:] == errors(checkpoint, alone, dataset)
    assert runs(checkpoint, both)[1:] == runs(checkpoint, alone)


def test_the_resamples_of_two_models_draw_the_same_inputs_and_runs(
    checkpoint: Checkpoint, coarse: Model, dataset: Dataset
) -> None:
    """Rejects draws of each model's own: the difference of a model from its copy would have an error of its own."""
    models: dict[str, Model] = {"model1": coarse, "model2": coarse}
    used = Context()
    ledger = Ledger(used, lambda: False)
    for found, means in (
        noise_error(checkpoint, models, dataset.reference, CONFIG, 0, used, ledger),
        divergence(checkpoint, models, CONFIG, 3, 0, used, ledger),
    ):
        one, other = means["model1"], means["model2"]
        assert (one.value, one.standard_error) == (found[0].mean, found[0].standard_error)
        assert one.standard_error > 0
        assert torch.equal(one.draws, other.draws)


def test_what_is_no_number_is_named(checkpoint: Checkpoint, dataset: Dataset) -> None:
    broken = shifted(checkpoint, float("nan"))
    with pytest.raises(NumericalError, match="model7"):
        errors(checkpoint, {"model7": broken}, dataset)
    with pytest.raises(NumericalError, match="x of model7 holds NaN or infinity after timestep 999"):
        runs(checkpoint, {"model7": broken})
    with pytest.raises(NumericalError, match="baseline"):
        errors(broken, {"model7": checkpoint}, dataset)


def test_a_stopped_measurement_goes_on_where_it_was(
    checkpoint: Checkpoint, coarse: Model, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "RUNS", 2)
    parts, made = MemoryParts(), []
    context = Context(parts=parts, save_interval=0)
    real = curves._states

    def states(role: str, *arguments: object) -> object:
        made.append(role)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(role, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(curves, "_states", states)
    models: dict[str, Model] = {"model1": coarse}
    with pytest.raises(KeyboardInterrupt):
        divergence(checkpoint, models, CONFIG, 3, 0, context, Ledger(context, lambda: False))
    resumed, _ = divergence(checkpoint, models, CONFIG, 3, 0, context, Ledger(context, lambda: False))
    assert len(made) == 3 + 2 * 2  # of three batches of two models the second was stopped at its first
    assert resumed == runs(checkpoint, models)


# --- in a comparison -------------------------------------------------------------------------------------------------

PIXELS = FeatureNetwork("pixels", "0" * 64, lambda images: images.float().flatten(1)[:, ::16] / 50)


@pytest.fixture(scope="module")
def comparison(checkpoint: Checkpoint, coarse: Model, dataset: Dataset) -> Comparison:
    """int2, the same model with another noise schedule, and the model itself."""
    schedule = {"linear": "cosine", "cosine": "linear"}[checkpoint.spec.schedule]
    other = replace(checkpoint, spec=replace(checkpoint.spec, schedule=schedule))
    models: list[Model] = [coarse, other, checkpoint]
    full, *sets = (sample(m, SampleConfig(steps=4, count=20), 3, Context()) for m in (checkpoint, *models))
    return compare(dataset, PIXELS, full, None, sets, [checkpoint, *models], CONFIG, 0, Context())


def test_what_cannot_be_held_against_the_baseline_is_left_out(
    comparison: Comparison, checkpoint: Checkpoint, coarse: Model
) -> None:
    assert [c.of for c in comparison.noise_error] == [c.of for c in comparison.divergence] == ["model1", "model3"]
    assert comparison.divergence[1].mean == 0.0
    assert comparison.sampler == "ddim, 4 steps"
    for metric, curves_of in (("noise_error", comparison.noise_error), ("divergence", comparison.divergence)):
        rows = [d for d in comparison.differences if d.metric == metric]
        assert [(d.of, d.against, d.verdict) for d in rows] == [("model3", "model1", "better")]
        assert rows[0].difference == -curves_of[0].mean
    assert [d.metric for d in comparison.differences][:2] == ["noise_error", "divergence"]
    assert comparable(coarse, checkpoint)
    prediction = {"eps": "v", "v": "eps"}[checkpoint.spec.prediction]
    assert not comparable(replace(checkpoint, spec=replace(checkpoint.spec, prediction=prediction)), checkpoint)


def test_curves_come_back_and_wrong_ones_do_not(comparison: Comparison, tmp_path: Path) -> None:
    codec = CODECS["comparison"]
    codec.save(comparison, tmp_path)
    assert codec.load(tmp_path) == comparison
    path = tmp_path / "comparison.json"
    good = json.loads(path.read_text())
    curve = good["noise_error"][0]
    point = curve["points"][0]
    for change in (
        {"noise_error": good["noise_error"][::-1]},
        {"noise_error": [{**curve, "of": "model4"}]},
        {"noise_error": [{**curve, "of": "floor"}]},
        {"noise_error": [curve, curve]},
        {"noise_error": [{**curve, "mean": 2 * curve["mean"]}]},
        {"noise_error": [{**curve, "points": []}]},
        {"noise_error": [{**curve, "points": curve["points"][::-1]}]},
        {"noise_error": [{**curve, "points": [{**point, "value": -1.0}, *curve["points"][1:]]}]},
        {"noise_error": [{**curve, "points": [{**point, "value": None}, *curve["points"][1:]]}]},
        {"noise_error": [{**curve, "samples": 1}]},
        {"noise_error": [curve, good["divergence"][1]]},
        {"noise_error": None},
        {"sampler": ""},
        {"divergence": []},
        {"differences": good["differences"][1:]},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactCorrupt):
            codec.load(tmp_path)
