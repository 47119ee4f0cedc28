"""Calibration sets: drawn as their scheme says, every x_t with its own t, and nothing depends on how the work is cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from fqdiff.calibration.inputs import CHUNK, Sampler, record_runs, sampler_inputs
from fqdiff.calibration.schemes import chosen_steps
from fqdiff.configs import CalibrateConfig, calibration_settings
from fqdiff.context import Context, MemoryParts
from fqdiff.diffusion.samplers import ddim, ddpm, sampling_timesteps
from fqdiff.diffusion.schedule import add_noise
from fqdiff.errors import ArtifactCorrupt, ConfigError, FqdiffError, LineageError, NumericalError
from fqdiff.evidence.features import to_unit_range
from fqdiff.rng import generator
from fqdiff.stages.calibrate import calibrate, fisher_mass
from fqdiff.store.model_files import load_calibration, save_calibration
from fqdiff.values import CalibrationSet, Checkpoint, Dataset, FisherTable, predict_noise
from tests.test_cli import call, good
from tests.test_store import tiny_fisher

SMALL = CalibrateConfig(steps=12, timesteps=4, samples=CHUNK + 2)


@pytest.fixture(scope="module")
def fisher_table(checkpoint: Checkpoint) -> FisherTable:
    """Values without a meaning, of the checkpoint's parameters."""
    return tiny_fisher({name: tuple(t.shape) for name, t in checkpoint.tensors.items()})


def make(checkpoint: Checkpoint, config: CalibrateConfig, seed: int = 0, **given: Any) -> CalibrationSet:
    context = given.pop("context", Context())
    return calibrate(checkpoint, given.get("fisher"), given.get("dataset"), config, seed, context)


# --- which steps -----------------------------------------------------------------------------------------------------


def test_uniform_takes_evenly_spaced_steps_of_every_run() -> None:
    steps = chosen_steps(CalibrateConfig(steps=100, timesteps=20, samples=3), 0)
    assert steps.tolist() == [list(range(2, 100, 5))] * 3
    assert chosen_steps(CalibrateConfig(steps=7, timesteps=7, samples=1), 0).tolist() == [list(range(7))]


@pytest.mark.parametrize(("scheme", "third"), [("early", 0), ("middle", 1), ("late", 2)])
def test_thirds_of_a_run_are_disjoint_and_late_is_near_the_image(
    scheme: str, third: int, checkpoint: Checkpoint
) -> None:
    config = CalibrateConfig(scheme, steps=60, timesteps=5, samples=2)
    steps = chosen_steps(config, 0)
    assert 20 * third <= int(steps.min()) <= int(steps.max()) < 20 * (third + 1)
    t = make(checkpoint, config).t
    assert (2 - third) * 1000 / 3 - 20 < int(t.min()) <= int(t.max()) < (3 - third) * 1000 / 3


@pytest.mark.parametrize(("scheme", "kept"), [("early", 16), ("middle", 17), ("late", 17)])
def test_by_default_a_third_keeps_at_most_all_its_steps(scheme: str, kept: int) -> None:
    """Rejects the default of all runs, 20 timesteps, which no third of the default 50 steps has. What is given stays."""
    assert calibration_settings({"scheme": scheme}, 1000) == {"scheme": scheme, "timesteps": kept}
    assert (
        chosen_steps(CalibrateConfig(**calibration_settings({"scheme": scheme}, 1000)), 0)[0].unique().numel() == kept
    )
    assert calibration_settings({"scheme": scheme, "steps": 300}, 1000)["timesteps"] == 20
    assert calibration_settings({"scheme": scheme, "timesteps": 18}, 1000) == {"scheme": scheme, "timesteps": 18}


def test_other_schemes_keep_the_defaults_of_their_recipes() -> None:
    assert CalibrateConfig(**calibration_settings({}, 1000)) == CalibrateConfig()
    assert calibration_settings({"scheme": "ndtc", "sampler": "ddpm"}, 400)["steps"] == 400
    assert calibration_settings({"scheme": "late", "sampler": "ddpm"}, 12)["timesteps"] == 4


def test_more_timesteps_than_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 timesteps of 4 sampler steps"):
        chosen_steps(CalibrateConfig("late", steps=12, timesteps=5), 0)


@pytest.mark.parametrize(("location", "spread", "skew"), [(0.4, 0.4, 0.0), (0.1, 0.5, 4.0), (0.9, 0.3, -2.0)])
def test_ndtc_is_a_truncated_skew_normal(location: float, spread: float, skew: float) -> None:
    """Kolmogorov-Smirnov against scipy. Rejects a clamped one, which has spikes at both ends, and one that ignores the skew."""
    config = CalibrateConfig(
        "ndtc", steps=2**20, timesteps=20, samples=1000, location=location, spread=spread, skew=skew
    )
    share = 1 - (chosen_steps(config, 1).flatten().double().numpy() + 0.5) / 2**20
    whole = stats.skewnorm(skew, location, spread)
    low, high = whole.cdf([0.0, 1.0])
    assert stats.kstest(share, lambda u: (whole.cdf(u) - low) / (high - low)).pvalue > 1e-3
    clamped = np.clip(whole.rvs(4000, random_state=0), 0, 1 - 1e-9)
    assert stats.kstest(clamped, lambda u: (whole.cdf(u) - low) / (high - low)).pvalue < 1e-6


def test_a_skew_normal_that_misses_every_timestep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is in \[0, 1\)"):
        chosen_steps(CalibrateConfig("ndtc", samples=1, timesteps=1, location=-1.0, spread=0.1), 0)


def test_fisher_draws_steps_in_proportion_to_their_mass() -> None:
    """Chi-squared; a step without mass is never drawn."""
    mass = torch.tensor([0.0, 1.0, 0.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    steps = chosen_steps(CalibrateConfig("fisher", steps=6, timesteps=10, samples=200), 0, mass)
    counts = torch.bincount(steps.flatten(), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert stats.chisquare(counts[[1, 3, 4]], 2000 * np.array([1, 5, 2]) / 8).pvalue > 0.01


@pytest.mark.parametrize("mass", [[0.0, 0.0], [1.0, float("nan")], [1.0, -1.0], [1.0, float("inf")]])
def test_a_mass_that_is_none_is_refused(mass: list[float]) -> None:
    with pytest.raises(NumericalError, match="Fisher information"):
        chosen_steps(CalibrateConfig("fisher", steps=2, timesteps=1), 0, torch.tensor(mass, dtype=torch.float64))


def test_fisher_mass_counts_every_weight(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    t = torch.tensor([14, 7, 0])
    expected = [sum(e.numel * float(e.mean[k]) for e in fisher_table.entries.values()) for k in (2, 1, 0)]
    assert fisher_mass(checkpoint, fisher_table, t).tolist() == pytest.approx(expected)
    entries = {name: e for name, e in fisher_table.entries.items() if name != "head.output.weight"}
    for table, error in ((None, "without a Fisher table"), (replace(fisher_table, entries=entries), "another model")):
        with pytest.raises(LineageError, match=error):
            fisher_mass(checkpoint, table, t)
    with pytest.raises(ConfigError, match="by timestep"):
        fisher_mass(checkpoint, replace(fisher_table, entries={}), t)


# --- what is recorded ------------------------------------------------------------------------------------------------


def rerun(checkpoint: Checkpoint, config: CalibrateConfig, k: int, seed: int = 0) -> dict[int, Tensor]:
    """x_t of run k alone at every t, by the sampler itself."""
    spec, draw = checkpoint.spec, generator(seed, "calibration", k)
    schedule, predict = spec.noise_schedule(), predict_noise(spec, checkpoint.network())
    noise = lambda: torch.randn(1, *spec.image_shape, generator=draw)  # noqa: E731
    x, states = noise(), {}
    timesteps = sampling_timesteps(1000, config.steps)
    with torch.inference_mode():
        if config.sampler == "ddim":
            run = ddim(predict, x, schedule, config.steps, noise, config.eta)
        else:
            run = ddpm(predict, x, schedule, config.steps, noise)
        states[timesteps[0]] = x
        for following, (_, after) in zip(timesteps[1:], run, strict=False):
            states[following] = after
    return states


@pytest.mark.parametrize(
    "changes",
    [{}, {"eta": 0.5}, {"sampler": "ddpm"}, {"scheme": "ndtc"}, {"scheme": "late"}, {"scheme": "fisher"}],
    ids=str,
)
def test_every_x_is_what_the_sampler_meets_at_its_t(
    checkpoint: Checkpoint, fisher_table: FisherTable, changes: dict[str, Any]
) -> None:
    """Against the runs one by one. Rejects labels that count from the wrong end, as the published NDTC script's do."""
    config = replace(SMALL, **changes)
    found = make(checkpoint, config, fisher=fisher_table)
    assert len(found.t) == config.samples * config.timesteps
    steps = chosen_steps(config, 0, fisher_mass(checkpoint, fisher_table, torch.tensor(sampling_timesteps(1000, 12))))
    wanted = sorted(
        ((int(s), k) for k, row in enumerate(steps) for s in row if k in (0, 1, CHUNK + 1)), key=lambda pair: pair[0]
    )
    states = {k: rerun(checkpoint, config, k) for k in (0, 1, CHUNK + 1)}
    for step, k in wanted:
        t = sampling_timesteps(1000, config.steps)[step]
        distance = (found.x_t[found.t == t] - states[k][t]).abs().amax(dim=(1, 2, 3)).min()
        assert distance < 1e-5, (t, k)
    assert sorted(found.t.tolist(), reverse=True) == found.t.tolist()


def test_bias_correction_records_the_same_inputs(checkpoint: Checkpoint) -> None:
    found = make(checkpoint, replace(SMALL, steps=4))
    network = checkpoint.network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    own = sampler_inputs(checkpoint.spec, network, SMALL.samples, 4, 0, torch.device("cpu"))
    assert torch.equal(own.t, found.t)
    assert torch.equal(own.x_t, found.x_t)


def test_noised_images_are_taken_where_asked_for(checkpoint: Checkpoint, dataset: Dataset) -> None:
    config = replace(SMALL, source="data", samples=2, timesteps=3)
    found = make(checkpoint, config, dataset=dataset)
    assert found.t.tolist() == [832, 832, 499, 499, 166, 166]
    draw, schedule = generator(0, "calibration", 1), checkpoint.spec.noise_schedule()
    image = dataset.train[int(torch.randint(len(dataset.train), (), generator=draw))]
    noise = torch.randn(3, 1, 8, 8, generator=draw)
    expected = add_noise(schedule, to_unit_range(image.expand(3, 1, 8, 8)), noise, torch.tensor([832, 499, 166]))
    torch.testing.assert_close(found.x_t[1::2], expected)
    with pytest.raises(LineageError, match="without a data set"):
        make(checkpoint, config)
    with pytest.raises(LineageError, match="images of shape"):
        make(checkpoint, config, dataset=replace(dataset, images=dataset.images[:, :, :4]))


def test_runs_end_with_their_last_step_that_is_kept(checkpoint: Checkpoint) -> None:
    ticks: list[int] = []
    network, steps = checkpoint.network(), torch.tensor([[0, 2], [1, 1]])
    kept = record_runs(
        checkpoint.spec, network, Sampler("ddim", 10), [0, 1], steps, 0, torch.device("cpu"), ticks.append
    )
    assert ticks == [2, 2, 2]
    assert kept.step.tolist() == [0, 1, 1, 2]
    assert kept.t.tolist() == [999, 899, 899, 799]
    assert torch.equal(kept.x_t[1], kept.x_t[2])


def test_a_run_that_is_not_finite_is_refused(checkpoint: Checkpoint) -> None:
    broken = {n: t * float("nan") if n == "head.output.weight" else t for n, t in checkpoint.tensors.items()}
    with pytest.raises(NumericalError, match="NaN"):
        make(replace(checkpoint, tensors=broken), SMALL)


# --- what a result depends on ----------------------------------------------------------------------------------------


def test_more_runs_leave_the_first_ones_as_they_are(checkpoint: Checkpoint) -> None:
    config = replace(SMALL, scheme="ndtc")
    few, many = (chosen_steps(replace(config, samples=n), 3) for n in (CHUNK, 2 * CHUNK))
    assert torch.equal(few, many[:CHUNK])
    small, large = (make(checkpoint, replace(SMALL, samples=n)) for n in (CHUNK, CHUNK + 2))
    for t in small.t.unique():
        assert torch.equal(small.x_t[small.t == t], large.x_t[large.t == t][:CHUNK])


def test_batch_size_and_global_generator_do_not_matter_and_the_seed_does(checkpoint: Checkpoint) -> None:
    config = replace(SMALL, scheme="ndtc", eta=1.0)
    first = make(checkpoint, config)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = make(checkpoint, config, context=Context(batch_size=3))
    assert torch.equal(first.x_t, again.x_t)
    assert torch.equal(first.t, again.t)
    assert not torch.equal(first.t, make(checkpoint, config, 1).t)


def test_a_killed_run_continues(checkpoint: Checkpoint) -> None:
    """The second half is recorded by a model whose first half would be NaN: what is kept is not made again."""
    parts = MemoryParts()
    whole = make(checkpoint, SMALL, context=Context(parts=parts))
    assert sorted(parts.saved) == ["runs-0000", "runs-0001"]
    del parts.saved["runs-0001"]
    part = parts.saved["runs-0000"]
    marked = part.tensors["x_t"] + 1
    parts.saved["runs-0000"] = replace(part, tensors={**part.tensors, "x_t": marked})
    resumed = make(checkpoint, SMALL, context=Context(parts=parts))
    late = torch.tensor([n % SMALL.samples >= CHUNK for n in range(len(whole.t))])
    assert torch.equal(resumed.x_t[late], whole.x_t[late])
    assert torch.equal(resumed.x_t[~late], whole.x_t[~late] + 1)


# --- files -----------------------------------------------------------------------------------------------------------


def test_float16_halves_the_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sizes = {}
    for precision in ("float32", "float16"):
        value = make(checkpoint, replace(SMALL, precision=precision))
        save_calibration(value, tmp_path)
        sizes[precision] = (tmp_path / "calibration.safetensors").stat().st_size
        loaded = load_calibration(tmp_path)
        assert loaded.x_t.dtype == getattr(torch, precision)
        assert torch.equal(loaded.x_t, value.x_t)
    assert sizes["float32"] - sizes["float16"] == 2 * SMALL.samples * SMALL.timesteps * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": torch.tensor([0, 1000])}, "beyond the model's 1000"),
        ({"t": torch.tensor([-1, 0])}, "beyond"),
        ({"t": torch.tensor([1, 2, 3])}, "2 inputs with 3 timesteps"),
        ({"t": torch.tensor([1.0, 2.0])}, "'t' is"),
        ({"x_t": torch.full((2, 1, 8, 8), float("nan"))}, "no numbers"),
        ({"x_t": torch.zeros(2, 8, 8)}, "'x_t' is"),
        ({"x_t": torch.zeros(2, 1, 8, 8).double()}, "'x_t' is"),
        ({"more": torch.zeros(1)}, "unknown tensors more"),
    ],
)
def test_a_file_that_is_no_calibration_set_is_refused(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_calibration(CalibrationSet(torch.zeros(2, 1, 8, 8), torch.tensor([5, 0]), "0" * 64, 1000), tmp_path)
    path = tmp_path / "calibration.safetensors"
    facts = {"fqdiff": json.dumps({"schema": 1, "model": "0" * 64, "num_train_timesteps": 1000})}
    save_file({**load_file(path), **changes}, path, metadata=facts)
    with pytest.raises(ArtifactCorrupt, match=message):
        load_calibration(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "random"},
        {"source": "web"},
        {"sampler": "ddpm", "eta": 0.5},
        {"skew": 1.0},
        {"scheme": "ndtc", "spread": 0.0},
        {"samples": 0},
        {"precision": "int8"},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FqdiffError):
        CalibrateConfig(**changes)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_records_and_lists_what_the_set_was_made_from(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    flags = ("--steps", "6", "--timesteps", "2", "--samples", "3")
    made: Any = good(store, "calibrate", *flags, "--name", "inputs")
    assert made["inputs"].keys() == {"checkpoint"}
    assert made["count"] == 6
    assert (made["first_timestep"], made["last_timestep"]) == (332, 832)
    assert load_file(Path(made["path"]) / "calibration.safetensors")["t"].tolist() == [832] * 3 + [332] * 3
    assert "6 inputs at 2 timesteps from 332 to 832" in call(store, "calibrate", *flags).stdout
    assert "no fisher of checkpoint" in call(store, "calibrate", *flags, "--scheme", "fisher").stderr
    assert "no use for a Fisher table" in call(store, "calibrate", *flags, "--fisher", "latest").stderr
    for wrong in (("--timesteps", "7"), ("--steps", "2000")):
        refused = call(store, "calibrate", "one", *flags, *wrong, "--dry-run")
        assert refused.exit_code in (1, 2)
        assert "would make" not in refused.stdout
    good(store, "fisher", "one", "--timesteps", "5", "--samples", "2", "--name", "table")
    by_fisher = good(store, "calibrate", *flags, "--scheme", "fisher", "--dry-run")
    assert (
        by_fisher["id"]
        == good(store, "calibrate", *flags, "--scheme", "fisher", "--fisher", "table", "--dry-run")["id"]
    )
    assert good(store, "calibrate", *flags, "--source", "data")["id"] != made["id"]
    assert good(store, "calibrate", "--sampler", "ddpm", "--samples", "1", "--dry-run")["config"]["steps"] == 1000  # type: ignore[index]
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "6", "--name", "two")
    refused = call(store, "calibrate", "two", *flags, "--scheme", "fisher", "--fisher", "table")
    assert refused.exit_code == 1
    assert "is not of checkpoint" in refused.stderr
