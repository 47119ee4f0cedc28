"""One cell of a sweep: its steps, how they are run, and its row of the table."""

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fqdiff.chains import comparison_step
from fqdiff.configs import CompareConfig, PlanConfig, SampleConfig
from fqdiff.errors import ArtifactCorrupt, FqdiffError, require
from fqdiff.pipeline import External, Runner, Step
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.sweep.numbers import Row, noise_errors, numbers
from fqdiff.treatment.feasible import check_feasible
from fqdiff.treatment.steps import chain_of, treated_step
from fqdiff.treatment.suits import check_method, traits_of_config, traits_of_plan
from fqdiff.treatment.treatment import Treatment
from fqdiff.values import ModelSpec, Plan

Source = Step | Manifest


@dataclass(frozen=True)
class Subject:
    """What all cells of a sweep share: the model, the images, the features, and how samples are made and compared.

    ``num_train_timesteps``: the model's.
    """

    checkpoint: Source
    dataset: Source
    features: Step | External
    sample: SampleConfig
    compare: CompareConfig
    num_train_timesteps: int


@dataclass(frozen=True)
class Tables:
    """The Fisher tables that one plan reads. ``trajectory``: a second one, for the gain of the sampler's steps."""

    fisher: Source | None = None
    trajectory: Source | None = None


@dataclass(frozen=True)
class Way:
    """A way to quantize. ``calibration``: the set that it learns from; ``method``: which one the plan has to suit, if any."""

    treatment: Treatment
    calibration: Source | None = None
    method: str = ""


@dataclass(frozen=True)
class Cell:
    """A plan, a way to quantize and a seed, with the steps they take. Labels and ``settings`` are as the sweep names them.

    ``method``, ``treatment`` and ``calibration`` are those of the way to quantize, ``num_train_timesteps`` the model's.
    """

    number: int
    plan_label: str
    quantize_label: str
    seed: int
    settings: Mapping[str, object]
    artifacts: Mapping[str, Source | External]
    method: str
    treatment: Treatment
    num_train_timesteps: int

    @property
    def label(self) -> str:
        """The cell in words."""
        how = f"; {self.quantize_label}" if self.quantize_label else ""
        return f"{self.plan_label}{how}; seed {self.seed}"

    def steps(self) -> Iterator[tuple[str, Step]]:
        """Name and step of all that can be made, in the order of work: what may fail soon comes first.

        What a quantized model or a calibration set is made from goes by the names of the stages.
        """
        for name, source in self.artifacts.items():
            if not isinstance(source, Step):
                continue
            weights = source.inputs.get("fisher")
            if name == "calibration" and isinstance(weights, Step):
                yield weights.stage, weights
            before = list(chain_of(source))[:-1] if name == "quantized" else []
            yield from ((step.stage, step) for step in before)
            yield name, source

    def quantizing(self) -> Iterator[Step]:
        """Every stage of the quantized model."""
        quantized = self.artifacts["quantized"]
        assert isinstance(quantized, Step)
        yield from chain_of(quantized)

    def made_for_it(self) -> Iterator[Source]:
        """All that is made of the checkpoint for the quantized model: Fisher tables, plan, calibration set, and every stage."""
        for name in ("fisher", "trajectory", "plan", "calibration"):
            source = self.artifacts.get(name)
            if isinstance(source, Step | Manifest):
                yield source
        yield from self.quantizing()


def make_cell(
    number: int,
    labels: tuple[str, str],
    settings: Mapping[str, object],
    subject: Subject,
    tables: Tables,
    plan: PlanConfig,
    way: Way,
    seed: int,
) -> Cell:
    """The cell's steps, with the ids that the single commands would give them with ``--seed seed``.

    Fisher tables and calibration sets keep the seed that they have: what differs between seeds is chance after them. The noise
    floor is full precision sampled with the next seed. Raises ConfigError where the plan, as far as its settings tell, or the
    calibration set does not suit the way to quantize.
    """
    checkpoint, dataset = subject.checkpoint, subject.dataset
    require(not plan.activations, "a sweep's plan with formats of activations", "give [[quantize]] activations instead")
    if way.method:
        check_method(way.method, traits_of_config(plan), way.calibration)
    read: dict[str, Source] = {}
    if tables.fisher is not None:
        read["fisher"] = tables.fisher
    if tables.trajectory is not None:
        read["trajectory"] = tables.trajectory
    images = {"dataset": dataset} if plan.is_calibrated and plan.score != "trajectory" else {}
    random = plan.score == "random" or plan.is_calibrated
    planned = Step("plan", {"checkpoint": checkpoint, **read, **images}, plan, seed if random else 0)
    model = treated_step(checkpoint, planned, read, way.calibration, way.treatment, seed)
    full, floor, samples = (
        Step("sample", {"model": source}, subject.sample, k)
        for source, k in ((checkpoint, seed), (checkpoint, seed + 1), (model, seed))
    )
    config = replace(subject.compare, full_precision_of=(1,))
    comparison = comparison_step(dataset, subject.features, full, [samples], floor, [checkpoint, model], config)
    artifacts: dict[str, Source | External] = {
        "dataset": dataset,
        "checkpoint": checkpoint,
        **read,
        "plan": planned,
        **({} if way.calibration is None else {"calibration": way.calibration}),
        "quantized": model,
        "full_samples": full,
        "floor_samples": floor,
        "samples": samples,
        "features": subject.features,
        "comparison": comparison,
    }
    return Cell(number, *labels, seed, settings, artifacts, way.method, way.treatment, subject.num_train_timesteps)


def run_cell(cell: Cell, runner: Runner, failed: dict[str, FqdiffError]) -> Row:
    """Make what is missing of ``cell``, and its row. What cannot be made is told in the row's ``error``.

    ``failed``: what other cells failed at, by id. It is not tried again, and this cell's failure joins it.
    """
    alone = replace(runner, _loaded={}, _made=set())  # what a cell loaded is freed with it
    making, quantizing = "", {step.id for step in cell.quantizing()}
    try:
        for name, step in cell.steps():
            making = step.id
            if making in failed:
                raise failed[making]
            found = runner.store.find(step.kind, making)
            if found is None and making in quantizing:
                making = cell.artifacts["quantized"].id  # no failure of what other cells begin with, too
                check_feasible(cell.treatment, *_inputs(cell, alone))
                making = step.id
            made = found or alone.run(step)
            if name == "plan" and cell.method:
                making = f"{cell.method} with plan {step.id}"  # no failure of the plan's
                check_method(cell.method, traits_of_plan(alone.load(made)), None)
        return cell_row(cell, alone)
    except FqdiffError as error:
        failed[making] = error
    except Exception as error:  # no memory, or a mistake of ours: the other cells can go on
        runner.say(traceback.format_exc())
        failed[making] = FqdiffError(f"{type(error).__name__}: {error}")
    return cell_row(cell, alone, failure(failed[making]))


def _inputs(cell: Cell, runner: Runner) -> tuple[ModelSpec, Plan, Tensor | None]:
    """What the cell's plan is carried out on, all of which exists: model, plan, and timesteps of the calibration set."""

    def load(name: str) -> Any:
        source = existing(cell.artifacts[name], runner.store)
        assert source is not None
        return runner.load(source)

    return load("checkpoint").spec, load("plan"), load("calibration").t if "calibration" in cell.artifacts else None


def failure(error: FqdiffError) -> str:
    """An error as one line."""
    return f"{error.message} (hint: {error.hint})" if error.hint else error.message


def cell_row(cell: Cell, runner: Runner, error: str | None = None) -> Row:
    """The cell's row of the table: what it is, the ids of what exists of it, and its numbers unless it failed with ``error``."""
    found = {name: existing(source, runner.store) for name, source in cell.artifacts.items()}
    named = {"cell": cell.number, "plan": cell.plan_label, "quantize": cell.quantize_label, "seed": cell.seed}
    ids = {f"{name}_id": source.id if source is not None else None for name, source in found.items()}
    row = {**named, **cell.settings, **ids, "error": error}
    if error is not None:
        return row
    plan, quantized, comparison = (found[name] for name in ("plan", "quantized", "comparison"))
    assert plan is not None
    assert isinstance(quantized, Manifest)
    assert comparison is not None
    promised: Plan = runner.load(plan)
    made = [existing(source, runner.store) for source in cell.made_for_it()]
    seconds = sum(one.seconds for one in made if isinstance(one, Manifest))
    size, value = quantized.file("model.safetensors").bytes, runner.load(comparison)
    measured = numbers(size, promised, value) | noise_errors(value, cell.num_train_timesteps)
    return {**row, **measured, "making_seconds": round(seconds, 3)}


def existing(source: Source | External, store: Store) -> Manifest | External | None:
    """``source`` where it exists; what is damaged does not."""
    try:
        return store.find(source.kind, source.id) if isinstance(source, Step) else source
    except ArtifactCorrupt:
        return None
