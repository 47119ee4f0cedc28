"""Plans for a budget: the knapsack, the real file, the scores, and what a plan says about itself."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from fqdiff.cli.plan_budget import facts_text
from fqdiff.configs import INTEGERS, PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, LineageError, NumericalError, QuantizationError
from fqdiff.planning import budget
from fqdiff.planning.candidates import Market, Option
from fqdiff.planning.knapsack import Array, frontier, lower_bound, relax, total, undominated
from fqdiff.planning.plans import Offer, make_offer, make_plan, pareto
from fqdiff.planning.scores import exchanged, fisher_importance, single_weights, timestep_weights
from fqdiff.quant.formats import PerChannel, PerTensor, get_format, parse_granularity
from fqdiff.quant.packed import pack_tensor, stored_bytes, unpack_tensor
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import save_quantized
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, FisherTable, Plan, TrajectoryEntry, WeightBin, planned_bytes

FULL = 2**40


def budget_config(**changes: object) -> PlanConfig:
    return PlanConfig("budget", **{"target_bpw": 6.0, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def offer(checkpoint: Checkpoint, fisher_table: FisherTable) -> Offer:
    return make_offer(checkpoint, fisher_table, budget_config(), 0, Context())


@pytest.fixture(scope="module")
def trajectory_table(fisher_table: FisherTable) -> FisherTable:
    """A sampler run that looks at a tensor's channels in another way than the loss does."""
    runs = {
        name: TrajectoryEntry(e.block, e.numel, 2.0, 0.1, 9.0, torch.arange(1.0, 1 + e.channel.shape[1]), torch.ones(3))
        for name, e in fisher_table.entries.items()
    }
    return replace(fisher_table, kind="trajectory", trajectory=runs)


def of_size(offer: Offer, target: int) -> Plan:
    return make_plan(offer, budget_config(target_bpw=0.0, target_bytes=target))


def smallest(market: Market) -> int:
    return market.size(market.costs.argmin(axis=1).tolist())


# --- the knapsack ----------------------------------------------------------------------------------------------------


def instance(seed: int, most_items: int = 5) -> tuple[Array, Array]:
    """Items with a few choices each, some missing; values over six decades, or whole numbers with many ties."""
    draw = np.random.default_rng(seed)
    items, choices = draw.integers(1, most_items + 1), draw.integers(1, 5)
    values = draw.exponential(size=(items, choices)) * 10.0 ** draw.uniform(-3, 3, size=(items, 1))
    costs = draw.integers(1, 40, size=(items, choices)).astype(float)
    if seed % 3 == 0:
        values = np.round(values)
    if choices > 1:
        values[0, -1] = costs[0, -1] = np.inf
    return values, costs


def brute_force(values: Array, costs: Array, most: float) -> tuple[float, float]:
    """Least value, then least cost, over every choice there is."""
    every = itertools.product(*(range(len(row)) for row in values))
    return min((total(values, c), total(costs, c)) for c in every if total(costs, c) <= most)


@pytest.mark.parametrize("seed", range(60))
def test_every_budget_gets_the_optimum_that_brute_force_finds(seed: int) -> None:
    """Rejects a greedy solver, one that stays on the convex hull, and bounds that rule out too much."""
    values, costs = instance(seed)
    low = float(costs.min(axis=1).sum()) + seed % 7
    wanted: list[tuple[float, float]] = []
    for most in np.arange(low, low + 12):
        best = brute_force(values, costs, most)
        if not wanted or best[0] < wanted[-1][0]:
            wanted.append(best)
    found = frontier(values, costs, low, low + 11)
    assert [(s.value, s.cost) for s in found] == [pytest.approx(pair) for pair in wanted]
    assert all(s.exact and total(costs, s.choice) == s.cost for s in found)
    assert lower_bound(values, costs, low) <= wanted[0][0] * (1 + 1e-12) + 1e-12


def like_a_model(seed: int, items: int) -> tuple[Array, Array]:
    """Tensors of many sizes, importances over eight decades, errors that fall fourfold with every bit."""
    draw = np.random.default_rng(seed)
    sizes = np.round(10 ** draw.uniform(2, 5.5, size=items))
    importance = 10 ** draw.uniform(-6, 2, size=items)
    bits = np.array([2, 3, 4, 5, 6, 8, 16, 32])
    costs = np.ceil(sizes[:, None] * bits / 8) + np.where(bits < 16, 150.0, 60.0)
    noise = draw.uniform(0.8, 1.2, size=costs.shape)
    return np.where(bits < 32, (importance * sizes)[:, None] * 4.0**-bits * noise, 0), costs


@pytest.mark.parametrize(("seed", "items"), [(1, 10), (2, 33), (3, 60)])
@pytest.mark.parametrize("bits", [2.5, 4.0, 7.0])
def test_the_optimum_is_that_of_an_integer_programme(seed: int, items: int, bits: float) -> None:
    values, costs = like_a_model(seed, items)
    most = float(round(costs[:, -1].sum() / 32 * bits))
    one_each = np.kron(np.eye(items), np.ones(8))
    rows = LinearConstraint(np.vstack([one_each, costs.reshape(1, -1)]), [*[1] * items, 0], [*[1] * items, most])
    solved = milp(
        values.ravel(),
        constraints=rows,
        integrality=np.ones(8 * items),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    chosen = solved.x.reshape(items, 8).argmax(axis=1).tolist()
    (found, *_) = frontier(values, costs, most, most)
    assert found.exact
    assert found.cost <= most
    assert found.value == pytest.approx(total(values, chosen), rel=1e-6)


def test_with_too_many_states_the_result_still_fits_and_says_that_it_may_not_be_best() -> None:
    values, costs = like_a_model(5, 200)
    most = float(round(costs[:, -1].sum() / 32 * 6.0))
    (exact, *_) = frontier(values, costs, most, most)
    (found, *_) = frontier(values, costs, most, most, states=100)
    assert exact.exact
    assert not found.exact
    assert found.cost == total(costs, found.choice) <= most
    assert (
        lower_bound(values, costs, most)
        <= exact.value
        <= found.value
        <= total(values, relax(values, costs, most).choice)
    )


def test_a_budget_below_the_cheapest_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest"):
        frontier(*instance(1), low=0, high=0)


# --- the file --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1))
def test_no_plan_is_over_its_budget_by_a_byte_and_no_better_option_still_fits(offer: Offer, share: float) -> None:
    """Rejects a budget for the payload alone, and a header that is only estimated."""
    market = offer.market
    low, high = smallest(market), market.size(budget.keep_everything(market))
    target = low + int(share * (high - low))
    choice = budget.best_within(market, target).positions
    assert market.size(choice) <= target
    for i, j in itertools.product(range(market.values.shape[0]), range(market.values.shape[1])):
        if market.values[i, j] < market.values[i, choice[i]]:
            assert market.size((*choice[:i], j, *choice[i + 1 :])) > target


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), more=st.integers(1, 3000))
def test_a_larger_budget_never_predicts_more_rise(offer: Offer, share: float, more: int) -> None:
    low = smallest(offer.market)
    target = low + int(share**2 * 100_000)
    a, b = (of_size(offer, t).budget for t in (target, target + more))
    assert a is not None
    assert b is not None
    assert b.predicted <= a.predicted
    assert a.lower_bound <= a.predicted


def test_the_smallest_size_is_reached_and_one_byte_less_is_an_error_that_names_it(offer: Offer) -> None:
    least = smallest(offer.market)
    assert of_size(offer, least).file_bytes == least
    with pytest.raises(ConfigError, match=f"{least - 1:,} bytes") as caught:
        of_size(offer, least - 1)
    assert f"{least:,}" in caught.value.hint


def test_a_plan_of_the_best_options_is_its_own_bound(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    """Rejects 0, which no plan reaches without a format that is exact."""
    made = plan(checkpoint, fisher_table, None, budget_config(formats=("int8", "int4"), target_bpw=32.0), 0, Context())
    assert made.budget is not None
    assert made.budget.constraint == "none"
    assert made.budget.lower_bound == made.budget.predicted > 0
    assert "no plan is predicted less" in facts_text(made)[1]


def small_market(seed: int) -> Market:
    """Five tensors so small that their sizes decide how many digits the header's offsets have."""
    draw = np.random.default_rng(seed)
    grains = {"float16": PerTensor(), "int8": PerTensor(), "int6": PerChannel(0), "int8sym": PerTensor()}
    options = {}
    for k in range(5):
        shape = (int(draw.integers(1, 5)), int(draw.integers(1, 90)))
        ways = [(shape, get_format(name), grain) for name, grain in grains.items()]
        options[f"p{k}"] = tuple(Option(way, "min-max", "nearest", stored_bytes(*way), draw.random()) for way in ways)
    return Market({}, options)


@pytest.mark.parametrize("seed", [3, 7, 11, 13, 18, 22])
def test_no_target_that_some_plan_fits_is_refused(seed: int) -> None:
    """Against every plan there is. Rejects the cheapest options as the smallest file."""
    market = small_market(seed)
    least = min(market.size(choice) for choice in itertools.product(range(4), repeat=5))
    assert least < smallest(market)
    assert market.size(budget.best_within(market, least).positions) == least
    with pytest.raises(budget.TargetTooSmall) as caught:
        budget.best_within(market, least - 1)
    assert caught.value.smallest == least


@pytest.mark.parametrize("seed", [3, 7, 11, 13, 18, 22])
def test_a_search_that_left_nothing_out_bounds_more_closely_than_prices_do(seed: int) -> None:
    """Against every plan there is. Rejects Lagrange's bound, told where the search has proven more, and a bound that is none."""
    market = small_market(seed)
    plans = [(market.size(c), total(market.values, c)) for c in itertools.product(range(4), repeat=5)]
    sizes = sorted(size for size, _ in plans)
    gaps, wide = [], []
    for target in sizes[50::150]:
        choice = budget.best_within(market, target)
        best = min(value for size, value in plans if size <= target)
        assert choice.lower_bound is not None
        assert choice.lower_bound <= best * (1 + 1e-12)
        gaps.append(best - choice.lower_bound)
        room = target - market.size(choice.positions) + total(market.costs, choice.positions) + budget.MARGIN
        wide.append(best - lower_bound(market.values, market.costs, room))
    assert sum(gaps) < sum(wide)


def test_a_budget_for_everything_keeps_everything(offer: Offer, checkpoint: Checkpoint) -> None:
    full = offer.market.size(budget.keep_everything(offer.market))
    made = of_size(offer, full)
    assert {e.format for e in made.entries} == {"float32"}
    assert made.file_bytes == full
    assert made.budget is not None
    assert made.budget.constraint == "none"
    assert of_size(offer, FULL) == replace(made, budget=replace(made.budget, target_bytes=FULL))
    assert {e.format for e in of_size(offer, full - 1).entries} != {"float32"}


@pytest.mark.parametrize("score", ["fisher", "weight-mse", "random", "reverse", "uniform"])
@pytest.mark.parametrize("bits", [5.0, 7.0, 12.0])
def test_the_quantized_file_has_the_planned_size(
    checkpoint: Checkpoint, fisher_table: FisherTable, tmp_path: Path, score: str, bits: float
) -> None:
    made = plan(checkpoint, fisher_table, None, budget_config(target_bpw=bits, score=score), 0, Context())
    save_quantized(quantize(checkpoint, made, None, QuantizeConfig(), 0, Context()), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes <= bits * made.parameters / 8
    assert planned_bytes(checkpoint.spec, made.entries) == made.file_bytes
    assert made.bits_per_weight <= bits


def test_counted_bytes_are_the_files_but_for_the_digits_of_offsets(offer: Offer) -> None:
    """Rejects a cost without the header: two plans' sizes differ as their counted bytes do."""
    draw = np.random.default_rng(0)
    market = offer.market
    widths = [len(options) for options in market.options.values()]
    choices = [[int(draw.integers(n)) for n in widths] for _ in range(20)]
    over = [total(market.costs, c) - market.size(c) for c in choices]
    assert max(over) - min(over) < 0.02 * min(market.size(c) for c in choices)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_the_predicted_rise_is_half_the_fisher_weighted_squared_error(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    """From the definition: every weight's error, packed and unpacked, with its channel's Fisher at t = 7."""
    config = budget_config(timestep_weights="at:7", formats=("float32", "int3"))
    made = plan(checkpoint, fisher_table, None, config, 0, Context())
    for name in ("block4.resample.weight", "block1.res1.conv1.weight", "stem.conv.bias"):
        (entry,) = (e for e in made.entries if e.parameter == name)
        weight = checkpoint.tensors[name]
        channel = fisher_table.entries[name].channel[7].double()
        axis = 1 if name == "block4.resample.weight" else 0
        for other in entry.alternatives:
            fmt = get_format(other.format)
            packed = pack_tensor(weight, fmt, PerChannel(axis) if fmt.is_integer else PerTensor())
            error = (unpack_tensor(packed) - weight).double().square()
            by_channel = error.movedim(axis, 0).reshape(len(channel), -1).sum(dim=1)
            assert other.predicted == pytest.approx(float(0.5 * (channel * by_channel).sum()), rel=1e-9)
            assert other.bytes == sum(part.numel() * part.element_size() for part in packed.parts.values())


def test_timestep_weights_are_the_formulas(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    schedule = checkpoint.spec.noise_schedule()
    name, shapes = "block6.res1.conv1.weight", {n: tuple(t.shape) for n, t in checkpoint.tensors.items()}
    curve = fisher_table.entries[name].channel.double()
    abar = schedule.alphas_cumprod
    snr = abar / (1 - abar)
    by_snr = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64)) / snr
    for weighting, weights in (("uniform", torch.full((1000,), 1e-3).double()), ("snr", by_snr / by_snr.sum())):
        found = fisher_importance(fisher_table, weighting, schedule, shapes)[name]
        assert torch.allclose(found, 0.5 * weights @ curve, rtol=1e-6)
    steps, gains = timestep_weights("sampler", schedule)
    assert len(steps) == 50
    found = fisher_importance(fisher_table, "sampler", schedule, shapes)[name]
    assert torch.allclose(found, 0.5 * gains @ curve[steps], rtol=1e-6)


def test_a_trajectory_table_is_read_for_the_whole_run(checkpoint: Checkpoint, trajectory_table: FisherTable) -> None:
    config = budget_config(score="trajectory", formats=("float32", "int2"))
    made = plan(checkpoint, trajectory_table, None, config, 0, Context())
    (entry,) = (e for e in made.entries if e.parameter == "stem.conv.weight")
    weight = checkpoint.tensors["stem.conv.weight"]
    error = unpack_tensor(pack_tensor(weight, get_format("int2"), PerChannel(0))) - weight
    by_channel = error.double().square().flatten(1).sum(dim=1)
    ramp = torch.arange(1.0, 1 + len(weight)).double()
    assert entry.alternatives[1].predicted == pytest.approx(float(0.5 * ramp @ by_channel))
    assert entry.alternatives[0].predicted == 0


def test_controls_exchange_importances_and_chance_is_seeded() -> None:
    given = {
        name: torch.tensor([v, v], dtype=torch.float64) for name, v in zip("abcde", (3.0, 1, 5, 2, 4), strict=True)
    }
    turned = {name: float(v) for name, v in exchanged(given, "reverse", 0).items()}
    assert turned == {"a": 3, "b": 5, "c": 1, "d": 4, "e": 2}
    drawn = [{name: float(v) for name, v in exchanged(given, "random", seed).items()} for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0].values()) == [1, 2, 3, 4, 5]


def test_the_fisher_plan_is_predicted_less_than_every_control(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    plans = {
        score: plan(checkpoint, fisher_table, None, budget_config(score=score), 0, Context())
        for score in ("fisher", "weight-mse", "random", "reverse", "uniform")
    }
    priced = {
        (e.parameter, a.format, a.granularity): a.predicted for e in plans["fisher"].entries for a in e.alternatives
    }
    rises = {s: sum(priced[e.parameter, e.format, e.granularity] for e in made.entries) for s, made in plans.items()}
    assert all(rises["fisher"] < rise for score, rise in rises.items() if score != "fisher")
    assert rises["reverse"] > rises["weight-mse"]


def test_uniform_is_the_widest_single_width_with_the_ends_at_eight_bits(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    made = plan(checkpoint, fisher_table, None, budget_config(score="uniform", target_bpw=6.5), 0, Context())
    ends = {e.format for e in made.entries if e.block in ("stem", "head") and len(e.shape) >= 2}
    (inner,) = {e.format for e in made.entries if e.block in "123456" and len(e.shape) >= 2}
    assert ends == {"int8"}
    assert {e.format for e in made.entries if len(e.shape) < 2} == {"float32"}
    wider = INTEGERS[INTEGERS.index(inner) - 1]
    next_up = [replace(e, format=wider) if e.format == inner else e for e in made.entries]
    assert planned_bytes(checkpoint.spec, next_up) > 6.5 * made.parameters / 8 >= made.file_bytes


def test_one_width_takes_the_best_of_its_granularities_that_fit(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    """Rejects the first one listed."""
    grains = ("tensor", "channel", "group-near:12")

    def of(granularity: str, target: int) -> Plan:
        config = budget_config(
            score="uniform",
            target_bpw=0.0,
            target_bytes=target,
            formats=("int4",),
            ends="int4",
            granularity=granularity,
        )
        return make_plan(make_offer(checkpoint, fisher_table, config, 0, Context()), config)

    alone = [of(grain, FULL) for grain in grains]
    assert len({made.file_bytes for made in alone}) == 3
    for limit in alone:
        made = of(",".join(grains), limit.file_bytes)
        fitting = [a.budget.predicted for a in alone if a.budget and a.file_bytes <= limit.file_bytes]
        assert made.budget is not None
        assert made.budget.predicted == min(fitting)


def test_a_plan_of_one_width_claims_no_bound(offer: Offer, tmp_path: Path) -> None:
    """Rejects its own value as the bound: a plan of many widths that fits is predicted less."""
    for change in ({}, {"target_bpw": 0.0, "max_loss_increase": 0.5}):
        made = make_plan(offer, budget_config(score="uniform", **change))
        assert made.budget is not None
        assert made.budget.lower_bound is None
        assert "no plan" not in "".join(facts_text(made))
        older = replace(made, budget=replace(made.budget, lower_bound=0.0))
        for each in (made, older):
            save_plan(each, tmp_path)
            assert load_plan(tmp_path) == each
        assert "no plan" not in "".join(facts_text(older))


def test_a_limit_on_the_rise_is_kept_by_the_smallest_file(offer: Offer) -> None:
    within = of_size(offer, 90_000)
    assert within.budget is not None
    limit = within.budget.predicted
    made = make_plan(offer, budget_config(target_bpw=0.0, max_loss_increase=limit))
    assert made.budget is not None
    assert made.budget.predicted <= limit
    assert made.file_bytes <= within.file_bytes
    assert made.budget.lower_bound <= made.file_bytes
    assert made.budget.constraint == "max-loss-increase"
    lossless = make_plan(offer, budget_config(target_bpw=0.0, max_loss_increase=0.0))
    assert lossless.budget is not None
    assert lossless.budget.predicted == 0


def test_ends_can_be_fixed_for_every_score(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    made = plan(checkpoint, fisher_table, None, budget_config(target_bpw=6.0, ends="int8"), 0, Context())
    fixed = [e for e in made.entries if e.block in ("stem", "head") and len(e.shape) >= 2]
    assert {e.format for e in fixed} == {"int8"}
    assert {len(e.alternatives) for e in fixed} == {1}


def test_a_pareto_curve_falls_and_knows_what_cannot_be_reached(offer: Offer) -> None:
    points = pareto(offer, budget_config(), [0.5, 5.0, 6.0, 7.0, 40.0], Context())
    assert points[0].file_bytes is None
    rises = [p.predicted for p in points[1:] if p.predicted is not None]
    assert rises == sorted(rises, reverse=True)
    assert rises[-1] == 0
    assert all(p.file_bytes is not None and p.file_bytes <= p.target_bytes for p in points[1:])
    assert rises[1] == pytest.approx(of_size(offer, points[2].target_bytes).budget.predicted)  # type: ignore[union-attr]


# --- what a plan says about itself, and bad input ----------------------------------------------------------------------


def test_a_plan_lists_what_it_considered_and_survives_the_disk(offer: Offer, tmp_path: Path) -> None:
    made = make_plan(offer, budget_config())
    for entry in made.entries:
        formats = [a.format for a in entry.alternatives]
        assert formats == list(INTEGERS if len(entry.shape) >= 2 else ("float32", "float16"))
        better = [a for a in entry.alternatives if a.predicted < entry.predicted]  # type: ignore[operator]
        assert entry.constraint == ("budget" if better else "none")
    save_plan(made, tmp_path)
    assert load_plan(tmp_path) == made
    assert (tmp_path / "plan.json").stat().st_size < 1500 * len(made.entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_bpw": 0.0}, "0 targets"),
        ({"target_bytes": 1000}, "2 targets"),
        ({"target_bpw": -1.0}, "target_bpw is -1"),
        ({"target_bpw": float("nan")}, "target_bpw is nan"),
        ({"score": "luck"}, "unknown score 'luck'"),
        ({"timestep_weights": "at:x"}, "unknown timestep weights 'at:x'"),
        ({"timestep_weights": "snr", "score": "weight-mse"}, "no timesteps to weight"),
        ({"target_bpw": 0.0, "max_loss_increase": 1.0, "score": "random"}, "no loss that could be limited"),
        ({"ratio": 0.5}, "has no use for ratio"),
        ({"formats": ("int4", "int4")}, "name one twice"),
        ({"formats": ("float32", "int4"), "ends": "int8"}, "ends in int8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget_config(**changes)


def test_settings_of_a_budget_are_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match="'groups' has no use for score"):
        PlanConfig("groups", score="random")


def test_a_table_or_score_that_does_not_fit_is_refused(
    checkpoint: Checkpoint, fisher_table: FisherTable, trajectory_table: FisherTable
) -> None:
    def make(table: FisherTable | None, **changes: object) -> Plan:
        return plan(checkpoint, table, None, budget_config(**changes), 0, Context())

    with pytest.raises(ConfigError, match="needs Fisher values"):
        make(None)
    assert make(None, score="weight-mse").entries[0].score is None
    with pytest.raises(ConfigError, match="holds no sampler run"):
        make(fisher_table, score="trajectory")
    with pytest.raises(ConfigError, match="no loss by timestep"):
        make(trajectory_table, score="fisher")
    every_tenth = replace(fisher_table, timesteps=fisher_table.timesteps * 10)
    with pytest.raises(ConfigError, match="no timestep 17") as caught:
        make(every_tenth, timestep_weights="at:17")
    assert "at:20" in caught.value.hint
    with pytest.raises(ConfigError, match="timestep 1000 of a model"):
        make(fisher_table, timestep_weights="at:1000")
    with pytest.raises(ConfigError, match="unknown format 'int9'"):
        make(fisher_table, formats=("int9",))
    entries = {n: e for n, e in fisher_table.entries.items() if n != "head.output.bias"}
    with pytest.raises(LineageError, match="another model"):
        make(replace(fisher_table, entries=entries))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_fisher_values_that_are_no_numbers_are_refused(
    checkpoint: Checkpoint, fisher_table: FisherTable, value: float
) -> None:
    name = "block1.res1.conv1.weight"
    entry = fisher_table.entries[name]
    channel = entry.channel.clone()
    channel[:, 0] = value
    broken = {**fisher_table.entries, name: replace(entry, channel=channel)}
    with pytest.raises(NumericalError, match=r"block1\.res1"):
        plan(checkpoint, replace(fisher_table, entries=broken), None, budget_config(), 0, Context())


def test_a_rule_promises_no_size_of_what_overflows(checkpoint: Checkpoint) -> None:
    name = "block3.res1.conv1.weight"
    huge = {**checkpoint.tensors, name: 1e6 * torch.ones_like(checkpoint.tensors[name])}
    model = replace(checkpoint, tensors=huge)
    with pytest.raises(QuantizationError, match=rf"{name}.*in float16") as caught:
        plan(model, None, None, PlanConfig("uniform", low="float16"), 0, Context())
    assert "bfloat16" in caught.value.hint
    assert plan(model, None, None, PlanConfig("uniform", low="bfloat16"), 0, Context()).file_bytes


def test_nan_weights_are_refused_and_weights_too_large_for_float16_never_get_it(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    name = "stem.conv.weight"
    huge = {**checkpoint.tensors, name: 1e6 * torch.ones_like(checkpoint.tensors[name])}
    made = plan(replace(checkpoint, tensors=huge), fisher_table, None, budget_config(target_bpw=20.0), 0, Context())
    (entry,) = (e for e in made.entries if e.parameter == name)
    assert "float16" not in [a.format for a in entry.alternatives]
    broken = {**checkpoint.tensors, name: torch.full_like(checkpoint.tensors[name], float("nan"))}
    with pytest.raises(QuantizationError, match=r"stem\.conv\.weight"):
        plan(replace(checkpoint, tensors=broken), fisher_table, None, budget_config(), 0, Context())


# --- single weights, ranges and granularities -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight_table(checkpoint: Checkpoint, fisher_table: FisherTable) -> FisherTable:
    """Fisher values of single weights in two bins, unlike from weight to weight."""
    draw = torch.Generator().manual_seed(0)
    bins = [{n: torch.randn(t.shape, generator=draw).exp() for n, t in checkpoint.tensors.items()} for _ in range(2)]
    halves = (WeightBin(0, 499, lambda: bins[0]), WeightBin(500, 999, lambda: bins[1]))
    return replace(fisher_table, weights=halves)


def test_single_weights_are_weighted_one_by_one(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    config = budget_config(target_bpw=8.0, formats=("float32", "int3", "codebook2", "ternary"))
    made = plan(checkpoint, weight_table, None, config, 0, Context())
    name = "block1.res1.conv1.weight"
    fisher = sum(0.5 * each.read()[name].double() for each in weight_table.weights)
    (entry,) = (e for e in made.entries if e.parameter == name)
    assert {a.range for a in entry.alternatives if a.format != "int3"} == {"min-max", "fisher"}
    weight = checkpoint.tensors[name]
    for other in entry.alternatives:
        grain = parse_granularity(other.granularity)
        back = unpack_tensor(pack_tensor(weight, get_format(other.format), grain, other.range, weight=0.5 * fisher))
        rise = float((0.5 * fisher * (back - weight).double().square()).sum())
        assert other.predicted == pytest.approx(rise, rel=1e-5)
    steps, weights = timestep_weights("at:7", checkpoint.spec.noise_schedule())
    first = single_weights(weight_table.weights, steps, weights)[name]
    assert torch.allclose(first, 0.5 * weight_table.weights[0].read()[name])


def test_of_several_ranges_the_better_one_is_kept(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    def options(*ranges: str) -> dict[tuple[str, str], float]:
        config = budget_config(target_bpw=8.0, formats=("float32", "int3"), ranges=ranges)
        entries = plan(checkpoint, weight_table, None, config, 0, Context()).entries
        return {(e.parameter, a.format): a.predicted for e in entries for a in e.alternatives}

    wide, fitted, both = options("min-max"), options("fisher"), options("min-max", "fisher")
    assert all(both[key] == min(wide[key], fitted[key]) for key in both)
    assert sum(both.values()) < sum(wide.values())


def test_granularities_are_options_of_their_own(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    config = budget_config(formats=("float16", "int3", "codebook2"), granularity="tensor,channel,group-near:16")
    made = plan(checkpoint, fisher_table, None, config, 0, Context())
    (entry,) = (e for e in made.entries if e.parameter == "block3.res1.conv1.weight")
    kinds = [(a.format, a.granularity.split(":")[0]) for a in entry.alternatives]
    assert kinds == [
        ("float16", "tensor"),
        *[("int3", g) for g in ("tensor", "channel", "group")],
        *[("codebook2", g) for g in ("tensor", "channel")],
    ]


def test_a_plan_fitted_to_fisher_values_is_carried_out_with_them_to_the_byte(
    checkpoint: Checkpoint, weight_table: FisherTable, tmp_path: Path
) -> None:
    made = plan(checkpoint, weight_table, None, budget_config(), 0, Context())
    assert made.fits_fisher
    packed = quantize(checkpoint, made, weight_table, QuantizeConfig(), 0, Context())
    save_quantized(packed, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == made.file_bytes <= 6.0 * made.parameters / 8
    rise = 0.0
    for entry in made.entries:
        fisher = sum(0.5 * each.read()[entry.parameter].double() for each in weight_table.weights)
        error = unpack_tensor(packed.packed[entry.parameter]).double() - checkpoint.tensors[entry.parameter].double()
        rise += float((0.5 * fisher * error.square()).sum())
    assert made.budget is not None
    assert rise == pytest.approx(made.budget.predicted, rel=1e-5)
    with pytest.raises(LineageError, match="they are gone"):
        quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())


def test_ranges_by_fisher_values_need_those_of_single_weights(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    for config in (budget_config(ranges=("fisher",)), PlanConfig("uniform", low="int4", ranges=("fisher",))):
        with pytest.raises(ConfigError) as caught:
            plan(checkpoint, fisher_table, None, config, 0, Context())
        assert "--granularity weight" in caught.value.hint
        if config.strategy == "budget":  # a table that has them may be there, and not named
            assert "fqdiff plan TABLE" in caught.value.hint


def test_squant_is_refused_where_scales_are_not_by_channel(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    for config in (
        budget_config(rounding="squant", granularity="tensor,channel"),
        PlanConfig("uniform", low="int4", rounding="squant", granularity="tensor"),
    ):
        with pytest.raises(ConfigError, match="squant with scales by tensor"):
            plan(checkpoint, fisher_table, None, config, 0, Context())
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int4", rounding="squant"), 0, Context())
    assert {e.rounding for e in made.entries if e.format == "int4"} == {"squant"}
    assert {e.rounding for e in made.entries if e.format == "float32"} == {"nearest"}


def test_squant_is_refused_with_ranges_that_cut_weights_off(checkpoint: Checkpoint, weight_table: FisherTable) -> None:
    """Rejects sums of errors of many steps in a channel, which squant brings to half a step at most."""
    budget_settings: dict[str, object] = {"rounding": "squant", "granularity": "channel", "formats": ("int4", "int8")}
    for config in (
        PlanConfig("uniform", low="int4", rounding="squant", ranges=("mse",)),
        budget_config(**budget_settings, ranges=("min-max", "fisher")),
    ):
        with pytest.raises(ConfigError, match="squant with the range") as caught:
            plan(checkpoint, weight_table, None, config, 0, Context())
        assert "--range min-max" in caught.value.hint
    made = plan(checkpoint, weight_table, None, budget_config(**budget_settings), 0, Context())
    assert {e.range for e in made.entries} == {"min-max"}
    packed = quantize(checkpoint, made, weight_table, QuantizeConfig(), 0, Context()).packed
    for name, each in packed.items():
        if len(each.shape) == 4 and each.format.bits == 4:
            grain = parse_granularity(next(e.granularity for e in made.entries if e.parameter == name))
            assert isinstance(grain, PerChannel)
            error = (unpack_tensor(each) - checkpoint.tensors[name]).movedim(grain.axis, 0).flatten(1).sum(dim=1)
            assert bool((error.abs() <= 0.501 * each.parts["scale"]).all())


def test_dominated_choices_are_left_out_of_the_search() -> None:
    values, costs = np.array([3.0, 2.0, 2.0, 5.0, 1.0, np.inf]), np.array([1.0, 2.0, 3.0, 2.0, 9.0, np.inf])
    assert undominated(values, costs).tolist() == [0, 1, 4]
