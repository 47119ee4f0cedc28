"""Whether models differ: the statistics hold their level, the stage pairs what belongs together, and says no more than it may."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import norm, t
from torch import Tensor

from fqdiff.chains import comparison_step
from fqdiff.configs import CompareConfig, SampleConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.errors import ArtifactCorrupt, ConfigError, DataError, LineageError, NumericalError
from fqdiff.evidence.comparison import DISTRIBUTION, Measure, Resampled, differences, measures, network_differences
from fqdiff.evidence.decisions import half_width, holm, holm_shares, images_needed, p_value, verdict
from fqdiff.evidence.features import FeatureNetwork
from fqdiff.evidence.frechet import frechet_distance_of_features
from fqdiff.evidence.frechet_bootstrap import frechet_draws
from fqdiff.evidence.kernel import kernel_distance, kernel_draws
from fqdiff.evidence.resampling import draw_counts, mean_draws, widened
from fqdiff.pipeline import External, Step, matching
from fqdiff.report.words import measured
from fqdiff.rng import generator
from fqdiff.stages.compare import compare
from fqdiff.store.codecs import CODECS
from fqdiff.store.manifest import Manifest, Recipe
from fqdiff.store.torchscript import load_torchscript
from fqdiff.values import Comparison, Dataset, FidResult, SampleSet

PIXELS = FeatureNetwork("pixels", "0" * 64, lambda images: images.float().flatten(1)[:, ::7] / 50)

# --- decisions -------------------------------------------------------------------------------------------------------


def test_p_values_and_intervals_are_those_of_the_normal_distribution() -> None:
    assert p_value(-3.0, 2.0) == pytest.approx(2 * norm.sf(1.5), rel=1e-12)
    assert half_width(2.0, 0.9) == pytest.approx(2 * norm.ppf(0.95), rel=1e-12)
    assert (p_value(0.0, 0.0), p_value(1.0, 0.0)) == (1.0, 0.0)
    with pytest.raises(NumericalError):
        p_value(math.nan, 1.0)


def test_holms_correction_is_that_of_the_paper() -> None:
    """Holm 1979: 0.01 * 4, 0.02 * 3, then no smaller than the one before."""
    assert holm([0.04, 0.01, 0.9, 0.02]) == pytest.approx([0.08, 0.04, 0.9, 0.06])
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([]) == []


def test_holm_holds_the_level_for_the_family_where_single_tests_do_not() -> None:
    g = generator(0, "holm")
    families = torch.rand(500, 10, generator=g, dtype=torch.float64).tolist()
    alone = sum(min(p) <= 0.05 for p in families)
    corrected = sum(min(holm(p)) <= 0.05 for p in families)
    assert alone > 150
    assert 10 <= corrected <= 42  # 25 expected


def test_the_number_of_images_needed_has_the_power_it_promises() -> None:
    needed = images_needed(0.1, 0.2, 100, 0.95)
    assert needed is not None
    error = 0.2 * (100 / needed) ** 0.5
    power = norm.sf(norm.ppf(0.975) - 0.1 / error)
    assert power == pytest.approx(0.8, abs=0.002)
    assert images_needed(0.0, 0.2, 100, 0.95) is None
    assert images_needed(1e-12, 1.0, 100, 0.95) is None


def test_the_number_of_runs_needed_is_by_students_t() -> None:
    """2 runs that are 3 standard errors apart tell nothing: t has one degree of freedom. Rejects a normal N, which is 2."""
    needed = images_needed(3.0, 1.0, 2, 0.95, freedom=1)
    assert needed is not None

    def enough(n: int) -> bool:
        return bool(t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1) <= 3 * (n / 2) ** 0.5)

    assert (enough(needed - 1), enough(needed)) == (False, True)
    assert images_needed(3.0, 1.0, 2, 0.95) == 2
    assert images_needed(1e-12, 1.0, 100, 0.95, freedom=99) is None


def test_what_holms_rule_leaves_to_a_test_is_what_it_holds_the_test_to() -> None:
    """On paper for 4 tests at 5 %: 0.01 <= 0.05 / 4 is told, 0.02 > 0.05 / 3 is not, and so none after it."""
    assert holm_shares([0.04, 0.01, 0.9, 0.02], 0.05) == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])
    g = generator(0, "shares")
    for p in (torch.rand(500, 6, generator=g, dtype=torch.float64) ** 4).tolist():
        shares = holm_shares(p, 0.05)
        assert [one <= share for one, share in zip(p, shares, strict=True)] == [q <= 0.05 for q in holm(p)]


def test_what_cannot_be_told_needs_more_images_than_there_were() -> None:
    """Rejects an N at the level of a single test: a z of 3.1 fails Holm's rule over 55 pairs, and 80 % power at 5 % needs 2.8."""
    draws = torch.randn(4000, generator=generator(0, "many"), dtype=torch.float64)
    draws = (draws - draws.mean()) / draws.std()
    roles = ["baseline", *(f"model{k}" for k in range(1, 11))]
    found = {role: Resampled(0.0, 0 * draws) for role in roles} | {"model1": Resampled(3.1, 3.1 + draws)}
    rows = differences({"fid": found}, 10, (), 100, 0.95)
    row = next(d for d in rows if (d.of, d.against) == ("model1", "baseline"))
    assert (row.p < 0.05, row.verdict) == (True, "not distinguishable")
    assert row.images_needed is not None
    assert row.images_needed > 100
    power = norm.sf(norm.ppf(1 - 0.05 / 55 / 2) - 3.1 * (row.images_needed / 100) ** 0.5)
    assert power == pytest.approx(0.8, abs=0.01)


def test_a_value_beyond_full_precisions_is_no_merit() -> None:
    assert verdict(1.0, 0.01, 0.95, beyond=True) == "not worse"
    assert verdict(1.0, 0.01, 0.95, beyond=False) == "better"
    assert verdict(-1.0, 0.01, 0.95, beyond=True) == "not better"
    assert verdict(-1.0, 0.01, 0.95, beyond=False) == "worse"
    assert verdict(-1.0, 0.06, 0.95, beyond=False) == "not distinguishable"


def test_of_two_quantized_models_that_with_a_fid_below_full_precisions_is_not_the_better_one() -> None:
    """Rejects a rule for pairs with the baseline alone: int4 would be better than int8 because it is further from float32."""
    draws = 0.001 * torch.randn(100, generator=generator(0, "tiny"), dtype=torch.float64)

    def words(fids: tuple[float, ...], own: tuple[int, ...]) -> list[str]:
        roles = ("baseline", "model1", "model2")
        found = {role: Resampled(fid, fid + draws * k) for k, (role, fid) in enumerate(zip(roles, fids, strict=True))}
        return [d.verdict for d in differences({"fid": found}, 2, own, 100, 0.95)]

    assert words((10.0, 12.0, 7.0), (1, 2)) == ["worse", "not worse", "not worse"]
    assert words((10.0, 7.0, 12.0), (1, 2)) == ["not worse", "worse", "not better"]
    assert words((10.0, 14.0, 12.0), (1, 2)) == ["worse", "worse", "better"]
    assert words((10.0, 12.0, 7.0), ()) == ["worse", "better", "better"]


def test_a_leader_that_cannot_be_told_from_full_precision_takes_nothing_from_who_is_worse() -> None:
    """Rejects a rule by the sign of the point estimate: int8 is 0.33 +- 0.35 below full precision, and the other one
    9 above both; that is worse than int8, too, and not merely "not better".
    """
    g = generator(0, "leader")
    common, own, other = (torch.randn(4000, generator=g, dtype=torch.float64) for _ in range(3))

    def word(leader: float) -> str:
        found = {
            "baseline": Resampled(46.5, 46.5 + 3 * common),
            "model1": Resampled(46.5 + leader, 46.5 + leader + 3 * common + 0.35 * own),
            "model2": Resampled(55.5, 55.5 + 3 * common + 2.5 * other),
        }
        rows = {(d.of, d.against): d.verdict for d in differences({"fid": found}, 2, (1, 2), 400, 0.95)}
        assert rows["model2", "baseline"] == "worse"
        return rows["model2", "model1"]

    assert word(-0.326) == "worse"
    assert word(-3.26) == "not better"


def test_models_are_held_against_each_other_by_their_predictions_too() -> None:
    """By draws in pairs: two means whose own errors are as large as the means, and whose difference is sure."""
    draws = torch.randn(2000, generator=generator(0, "paired"), dtype=torch.float64)
    noise = {"model1": Resampled(1.0, 1 + draws), "model3": Resampled(1.5, 1.5 + 1.02 * draws)}
    (row,) = network_differences({"noise_error": noise}, {"noise_error": 32, "divergence": 16}, 0.95)
    assert (row.metric, row.of, row.against, row.verdict) == ("noise_error", "model3", "model1", "worse")
    assert row.standard_error == pytest.approx(0.02, rel=0.1)
    assert row.images_needed == images_needed(row.difference, row.standard_error, 32, 0.95)
    few = {role: replace(one, freedom=31) for role, one in noise.items()}
    (wide,) = network_differences({"noise_error": few}, {"noise_error": 32}, 0.95)
    assert wide.high - wide.difference == pytest.approx(t.ppf(0.975, 31) * row.standard_error)
    assert wide.p == pytest.approx(2 * t.sf(wide.difference / wide.standard_error, 31))
    runs = {f"model{k}": Resampled(1.0 + 0.045 * k, 1.0 + 0.045 * k + 0.02 * k * draws) for k in (1, 2, 3)}
    rows = network_differences({"divergence": runs}, {"divergence": 16}, 0.95)
    assert [d.adjusted_p for d in rows] == pytest.approx(holm([d.p for d in rows]))


# --- the statistics hold their level ---------------------------------------------------------------------------------


def simulated(n: int, effect: float, trials: int, label: str) -> tuple[int, int, int]:
    """Of ``trials`` comparisons of two models, how many find a difference: by FID, by KID, by the mean of a paired value.

    Features of image k of both models have much in common, as those from the same noise do, and both are far from the real
    ones, as those of models are. ``effect`` shifts one model away.
    """
    g = generator(0, "simulation", label, n)
    found = [0, 0, 0]
    for _ in range(trials):
        real, common = torch.randn(n, 4, generator=g), torch.randn(n, 4, generator=g)
        one, other = (0.8 * common + 0.6 * torch.randn(n, 4, generator=g) + 0.6 for _ in range(2))
        other += effect
        counts, apart = draw_counts(n, 100, g), draw_counts(n, 100, g)
        sets = [(one, counts), (other, counts)]
        fid, kid = frechet_draws(real, apart, sets), kernel_draws(real, apart, sets)
        error = mean_draws(one[:, 0], counts) - mean_draws(other[:, 0], counts)
        tests = [
            (
                frechet_distance_of_features(real, one) - frechet_distance_of_features(real, other),
                fid[:, 0] - fid[:, 1],
            ),
            (kernel_distance(real, one) - kernel_distance(real, other), kid[:, 0] - kid[:, 1]),
            (float((one - other)[:, 0].mean()), error),
        ]
        for k, (difference, draws) in enumerate(tests):
            found[k] += p_value(difference, float(draws.std())) <= 0.05
    return found[0], found[1], found[2]


def test_under_the_null_differences_are_found_as_seldom_as_the_level_says() -> None:
    """200 comparisons at 5 %: 10 expected; fewer than 3 or more than 18 have a probability below 1 % on either side."""
    for found in simulated(200, 0.0, 200, "null"):
        assert 3 <= found <= 18


@pytest.mark.parametrize("runs", [2, 4, 16])
def test_under_the_null_few_runs_tell_as_seldom_as_the_level_says(runs: int) -> None:
    """Of 1000 comparisons at 5 % 50 are expected. Rejects normal intervals of plain resamples: 85 with 16 runs, 417 with 2."""
    g = generator(0, "few runs", runs)
    told = 0
    for _ in range(1000):
        common, counts = torch.randn(runs, generator=g), draw_counts(runs, 200, g)
        found = {}
        for role in ("model1", "model2"):
            values = (common + 0.3 * torch.randn(runs, generator=g)).double()
            mean = values.mean()
            found[role] = Resampled(float(mean), widened(mean_draws(values, counts), mean, runs), runs - 1)
        (row,) = network_differences({"divergence": found}, {"divergence": runs}, 0.95)
        told += row.verdict != "not distinguishable"
        assert row.verdict != "not distinguishable" or row.images_needed is None or row.images_needed > runs
    assert 33 <= told <= 70


def test_power_rises_with_the_number_of_images() -> None:
    few, some, many = (simulated(n, 0.1, 40, "power")[0] for n in (40, 100, 250))
    assert few < some < many
    assert few < 20
    assert many > 34


def test_pairing_tells_what_unpaired_draws_cannot() -> None:
    g = generator(0, "pairing")
    real, one = torch.randn(200, 4, generator=g), torch.randn(200, 4, generator=g) + 0.5
    other = one + 0.05 * torch.randn(200, 4, generator=g) + 0.03
    shared, apart, counts = (draw_counts(200, 200, g) for _ in range(3))
    paired, unpaired = (frechet_draws(real, counts, [(one, shared), (other, c)]) for c in (shared, apart))
    errors = [float((draws[:, 0] - draws[:, 1]).std()) for draws in (paired, unpaired)]
    assert errors[0] < 0.3 * errors[1]


def test_the_standard_error_of_fid_is_that_of_fresh_samples() -> None:
    g = generator(0, "fresh")
    real = torch.randn(300, 4, generator=g)
    sets = [1.3 * torch.randn(300, 4, generator=g) + 0.4 for _ in range(200)]
    fresh = torch.tensor([frechet_distance_of_features(real, x) for x in sets]).std()
    whole = torch.ones(200, 300, dtype=torch.int32)
    found = torch.stack([frechet_draws(real, whole, [(x, draw_counts(300, 200, g))]).std() for x in sets[:10]])
    assert float(found.mean()) == pytest.approx(float(fresh), rel=0.2)


def test_correction_is_over_the_pairs_of_a_metric_and_leaves_the_floor_out() -> None:
    g = generator(0, "rows")

    def resampled(value: float) -> Resampled:
        return Resampled(value, value + 0.1 * torch.randn(2000, generator=g, dtype=torch.float64))

    fid = {"baseline": resampled(1.0), "model1": resampled(1.3), "model2": resampled(1.05), "floor": resampled(1.3)}
    rows = differences({"fid": fid}, 2, [1], 100, 0.95)
    assert [(d.of, d.against) for d in rows] == [
        ("model1", "baseline"), ("model2", "baseline"), ("model2", "model1"), ("floor", "baseline"),
    ]  # fmt: skip
    assert [d.adjusted_p for d in rows[:3]] == pytest.approx(holm([d.p for d in rows[:3]]))
    assert rows[3].adjusted_p == rows[3].p
    assert rows[0].difference == pytest.approx(0.3)
    assert rows[0].standard_error == pytest.approx(0.1 * 2**0.5, rel=0.1)
    paired = {"model1": resampled(0.1), "model2": resampled(0.9), "floor": resampled(3.0)}
    (row,) = differences({"image_mse": paired}, 2, [1], 100, 0.95)
    assert (row.of, row.against, row.verdict) == ("model2", "model1", "worse")


def test_intervals_of_shares_end_at_nothing_and_at_all() -> None:
    """Rejects a precision of 0.025 +- 0.041. A FID of 0.025 may well be one, and a stored interval is cut where it is printed."""
    draws = 0.02 * torch.randn(1000, generator=generator(0, "shares"), dtype=torch.float64)
    metrics = ("precision", "recall", "coverage", "density", "fid")
    rows = measures({m: {"model1": Resampled(0.025, draws), "model2": Resampled(0.99, draws)} for m in metrics}, 0.95)
    for row in rows:
        shares = row.metric in metrics[:3]
        assert (row.low == 0) == (shares and row.of == "model1")
        assert (row.high == 1) == (shares and row.of == "model2")
    stored = Measure("recall", "model1", 0.025, 0.02, -0.016, 0.066)
    assert measured(stored, ".3f") == "0.025 [0.000, 0.066]"
    assert measured(replace(stored, metric="fid"), ".3f") == "0.025 ± 0.041"


# --- the stage -------------------------------------------------------------------------------------------------------


def noisy(images: Tensor, strength: float, label: str) -> Tensor:
    noise = strength * torch.randn(images.shape, generator=generator(0, "noise", label))
    return (images.float() + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def real() -> Dataset:
    images = noisy(torch.full((160, 1, 8, 8), 128), 40.0, "real")
    return Dataset("noise", images, None, torch.arange(160) < 80)


@pytest.fixture(scope="module")
def sets() -> dict[str, SampleSet]:
    base = noisy(torch.full((80, 1, 8, 8), 128), 40.0, "baseline")
    return {
        "baseline": SampleSet(base, 3),
        "floor": SampleSet(noisy(torch.full((80, 1, 8, 8), 128), 40.0, "floor"), 4),
        "same": SampleSet(base.clone(), 3),
        "near": SampleSet(noisy(base, 4.0, "near"), 3),
        "dark": SampleSet((base * 0.8).to(torch.uint8), 3),
    }


CONFIG = CompareConfig(resamples=60, full_precision_of=(1, 2))


@pytest.fixture(scope="module")
def comparison(real: Dataset, sets: dict[str, SampleSet]) -> Comparison:
    models = [sets[name] for name in ("same", "near", "dark")]
    return compare(real, PIXELS, sets["baseline"], sets["floor"], models, [], CONFIG, 0, Context())


def test_equal_images_differ_in_nothing(comparison: Comparison) -> None:
    assert comparison.measure("image_mse", "model1").value == 0.0
    assert comparison.measure("ssim", "model1").value == pytest.approx(1.0)
    for metric in ("fid", "kid", "precision", "coverage"):
        pair = comparison.pair(metric, "model1", "baseline")
        assert (pair.difference, pair.p, pair.verdict, pair.images_needed) == (0.0, 1.0, "not distinguishable", None)


def test_paired_metrics_see_what_fid_does_not(comparison: Comparison) -> None:
    near = comparison.measure("image_mse", "model2")
    assert near.low > 0
    assert near.high < 0.02 * comparison.measure("image_mse", "floor").value
    assert comparison.pair("fid", "model2", "baseline").verdict == "not distinguishable"
    assert comparison.pair("image_mse", "model2", "model1").verdict == "worse"


def test_what_is_far_is_worse_by_every_measure(comparison: Comparison) -> None:
    for metric in ("fid", "kid", "image_mse", "psnr", "feature_distance"):
        assert comparison.pair(metric, "model3", "model2").verdict == "worse", metric
    assert comparison.pair("fid", "model3", "baseline").low > 0


def test_values_are_those_of_the_images_themselves(
    comparison: Comparison, real: Dataset, sets: dict[str, SampleSet]
) -> None:
    expected = frechet_distance_of_features(PIXELS.extract(real.reference), PIXELS.extract(sets["dark"].images))
    assert comparison.measure("fid", "model3").value == pytest.approx(expected, rel=1e-9)
    assert (comparison.n, comparison.seed, comparison.floor_seed, comparison.models) == (80, 3, 4, 3)
    assert comparison.reference == "noise, 80 of 80 held-out images"


def test_the_floor_is_compared_with_the_baseline_alone(comparison: Comparison) -> None:
    assert not [d for d in comparison.differences if d.of == "floor" and d.against != "baseline"]
    assert comparison.pair("fid", "floor", "baseline").verdict == "not distinguishable"


def test_a_lower_fid_than_full_precisions_is_not_called_better(real: Dataset, sets: dict[str, SampleSet]) -> None:
    for own, word in (((1,), "not worse"), ((), "better")):
        config = replace(CONFIG, full_precision_of=own)
        found = compare(real, PIXELS, sets["dark"], None, [sets["baseline"]], [], config, 0, Context())
        assert found.pair("fid", "model1", "baseline").verdict == word
        assert found.floor_seed is None


def test_a_stopped_bootstrap_goes_on_where_it_was(
    real: Dataset, sets: dict[str, SampleSet], comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fqdiff.sensitivity.distributions as stage

    parts = MemoryParts()
    models = [sets[name] for name in ("same", "near", "dark")]
    monkeypatch.setattr(stage, "resamples_at_once", lambda reference: 25)
    calls = []

    def draws(*arguments: object) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return frechet_draws(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "frechet_draws", draws)
    context = Context(parts=parts, save_interval=0)
    with pytest.raises(KeyboardInterrupt):
        compare(real, PIXELS, sets["baseline"], sets["floor"], models, [], CONFIG, 0, context)
    resumed = compare(real, PIXELS, sets["baseline"], sets["floor"], models, [], CONFIG, 0, context)
    assert len(calls) == 4  # of three pieces, the second was interrupted
    assert [d.verdict for d in resumed.differences] == [d.verdict for d in comparison.differences]
    assert [m.value for m in resumed.measures] == [m.value for m in comparison.measures]
    errors = [[m.standard_error for m in c.measures] for c in (resumed, comparison)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


def test_sets_that_cannot_be_paired_are_refused(real: Dataset, sets: dict[str, SampleSet]) -> None:
    def run(model: SampleSet, floor: SampleSet | None = None, count: int = 0) -> None:
        compare(real, PIXELS, sets["baseline"], floor, [model], [], replace(CONFIG, count=count), 0, Context())

    with pytest.raises(LineageError, match="model1 has seed 4, the baseline 3"):
        run(sets["floor"])
    with pytest.raises(LineageError, match="the baseline's own seed 3"):
        run(sets["near"], sets["baseline"])
    with pytest.raises(DataError, match=r"model1 has images \(1, 9, 9\)"):
        run(SampleSet(torch.zeros(80, 1, 9, 9, dtype=torch.uint8), 3))
    with pytest.raises(ConfigError, match="50 images asked for; there are 20 of model1"):
        run(SampleSet(sets["near"].images[:20], 3), count=50)
    with pytest.raises(ConfigError, match="no model"):
        compare(real, PIXELS, sets["baseline"], None, [], [], CONFIG, 0, Context())


def test_features_that_are_not_finite_are_refused_by_name(real: Dataset, sets: dict[str, SampleSet]) -> None:
    network = FeatureNetwork("log", "0" * 64, lambda images: (images.float().flatten(1)[:, ::7] - 300).log())
    with pytest.raises(NumericalError, match="features of held-out images hold NaN or infinity"):
        compare(real, network, sets["baseline"], None, [sets["dark"]], [], CONFIG, 0, Context())


def test_all_sets_are_cut_to_one_n(real: Dataset, sets: dict[str, SampleSet]) -> None:
    short = SampleSet(sets["near"].images[:30], 3)
    found = compare(real, PIXELS, sets["baseline"], sets["floor"], [short, sets["dark"]], [], CONFIG, 0, Context())
    again = compare(
        real,
        PIXELS,
        sets["baseline"],
        sets["floor"],
        [short, sets["dark"]],
        [],
        replace(CONFIG, count=30),
        0,
        Context(),
    )
    assert found == again
    assert found.n == 30


# --- recipes and files -----------------------------------------------------------------------------------------------


def samples(seed: int = 0, **settings: object) -> Manifest:
    config = vars(SampleConfig(**settings))  # type: ignore[arg-type]
    recipe = Recipe("samples", "sample", 1, (), config, seed)
    return Manifest(recipe, recipe.id, "", "", (), {}, 0.0, 0)


def test_samples_made_in_other_ways_are_not_compared() -> None:
    features = External("digits", "0" * 16, None)

    def step(*models: Manifest, floor: Manifest | None = None) -> Step:
        return comparison_step(samples(), features, samples(), models, floor, [], CONFIG)

    with pytest.raises(LineageError, match=r"were made with steps 20, the baseline's, \w+, with 50"):
        step(samples(steps=20))
    with pytest.raises(LineageError, match=r"were made with eta 0\.5"):
        step(samples(), floor=samples(1, eta=0.5))
    with pytest.raises(LineageError, match="were made with seed 1, the baseline's"):
        step(samples(1))
    one = step(samples(count=10), samples(), floor=samples(1))
    assert [i.role for i in one.recipe.inputs] == ["dataset", "features", "baseline", "floor", "model1", "model2"]
    assert one.id != step(samples(), samples(count=10), floor=samples(1)).id


def test_a_role_with_a_star_takes_its_inputs_in_the_order_of_their_numbers() -> None:
    given = ["model10", "model2", "baseline", "modelling", "model1"]
    assert matching("model*", given) == ("model1", "model2", "model10")
    assert matching("baseline", []) == ("baseline",)


def test_a_stored_comparison_comes_back_and_a_wrong_one_does_not(comparison: Comparison, tmp_path: Path) -> None:
    codec = CODECS["comparison"]
    codec.save(comparison, tmp_path)
    assert codec.load(tmp_path) == comparison
    path = tmp_path / "comparison.json"
    good = json.loads(path.read_text())
    for change in (
        {"schema": 9},
        {"measures": good["measures"] * 2},
        {"measures": good["measures"][1:]},
        {"differences": [{**good["differences"][0], "verdict": "superb"}]},
        {"differences": [{**good["differences"][0], "p": 2.0}]},
        {"measures": [{**good["measures"][0], "metric": "charm"}]},
        {"level": None},
        {"models": 2},
        {"models": 10**12},
        {"floor_seed": None},
        {"differences": good["differences"][1:]},
        {"kid_blocks": good["kid_blocks"] * 2},
        {"kid_blocks": [{**good["kid_blocks"][0], "of": "model9"}]},
        {"kid_blocks": [{**good["kid_blocks"][0], "metric": "fid"}]},
        {"kid_blocks": [{**good["kid_blocks"][0], "high": -1e9}]},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactCorrupt):
            codec.load(tmp_path)


@pytest.mark.parametrize("kind", ["comparison", "metrics"])
def test_what_was_made_before_there_were_blocks_still_loads(kind: str, comparison: Comparison, tmp_path: Path) -> None:
    value: Comparison | FidResult = comparison
    if kind == "metrics":
        mine = tuple(m for m in comparison.measures if m.of == "model1" and m.metric in DISTRIBUTION)
        fid = next(m.value for m in mine if m.metric == "fid")
        value = FidResult(fid, 9, "pixels", "0" * 64, 10, "real", 0, 0.0, 0.0, measures=mine)
    CODECS[kind].save(value, tmp_path)
    path = tmp_path / f"{kind}.json"
    path.write_text(
        json.dumps({name: field for name, field in json.loads(path.read_text()).items() if name != "kid_blocks"})
    )
    assert CODECS[kind].load(tmp_path) == replace(value, kid_blocks=())


# --- a network of the user's own -------------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, :, :4].mean(dim=(1, 2)), x[:, 0, :, 4:].mean(dim=(1, 2))], dim=1)


class Classes(torch.nn.Module):
    """Features, and logits of two classes: the brighter half."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halves = torch.stack([x[:, 0, :, :4].mean(dim=(1, 2)), x[:, 0, :, 4:].mean(dim=(1, 2))], dim=1)
        return x.flatten(1), 9 * halves


class Three(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x.flatten(1), 3


class Whole(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Endless(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0.0


def saved(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def test_a_torchscript_network_gets_images_from_minus_one_to_one(tmp_path: Path) -> None:
    network = load_torchscript(saved(Halves(), tmp_path / "halves.pt"))
    images = torch.zeros(300, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 4:] = 255
    assert network.extract(images).unique(dim=0).tolist() == [[-1.0, 1.0]]
    assert (network.name, len(network.sha256)) == ("torchscript", 64)


@pytest.mark.parametrize(
    ("module", "message"), [(Whole(), "gives torch.float32 of shape"), (Endless(), "NaN or infinity")]
)
def test_a_network_that_gives_no_features_is_one_clear_error(
    module: torch.nn.Module, message: str, tmp_path: Path
) -> None:
    network = load_torchscript(saved(module, tmp_path / "network.pt"))
    with pytest.raises(DataError, match=message):
        network.extract(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))


def test_a_network_that_gives_logits_too_has_an_inception_score(
    real: Dataset, sets: dict[str, SampleSet], tmp_path: Path
) -> None:
    """Rejects probabilities that are the logits, or their first ones: by hand for images whose class is sure."""
    network = load_torchscript(saved(Classes(), tmp_path / "classes.pt"))
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[:2, :, :, 4:] = images[2:, :, :, :4] = 255
    assert network.extract(images).shape == (4, 64)
    assert network.probabilities is not None
    sure = 1 / (1 + math.exp(-18))
    assert network.probabilities(images, network.extract(images))[0].tolist() == pytest.approx(
        [1 - sure, sure], rel=1e-5
    )
    assert load_torchscript(saved(Halves(), tmp_path / "halves.pt")).probabilities is None
    reduced = replace(network, extract=lambda x: network.extract(x)[:, ::7])
    found = compare(real, reduced, sets["baseline"], None, [sets["dark"]], [], CONFIG, 0, Context())
    assert 1 <= found.measure("inception_score", "model1").value <= 2
    odd = load_torchscript(saved(Three(), tmp_path / "three.pt"))
    assert odd.probabilities is not None
    with pytest.raises(DataError, match=r"fails on images \(1, 8, 8\)"):
        odd.probabilities(images, images)


def test_files_that_are_no_torchscript_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no feature network at"):
        load_torchscript(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(DataError, match="is no TorchScript"):
        load_torchscript(tmp_path / "text.pt")
    grey = load_torchscript(saved(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3)), tmp_path / "grey.pt"))
    with pytest.raises(DataError, match=r"fails on images \(3, 8, 8\)"):
        grey.extract(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
