"""One cell of a sweep: its steps, how they are run, and its row of the table."""

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fqdiff.chains import comparison_step
from fqdiff.configs import CompareConfig, PlanConfig, QuantizeConfig, SampleConfig, quantize_reads_fisher
from fqdiff.errors import ArtifactCorrupt, FqdiffError
from fqdiff.pipeline import External, Runner, Step
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Comparison, Plan

Source = Step | Manifest
Row = dict[str, Any]
MODEL, BASELINE, FLOOR = "model1", "baseline", "floor"  # roles of a cell's comparison


@dataclass(frozen=True)
class Subject:
    """What all cells of a sweep share: the model, the images, the features, and how samples are made and compared."""

    checkpoint: Source
    dataset: Source
    features: Step | External
    sample: SampleConfig
    compare: CompareConfig


@dataclass(frozen=True)
class Tables:
    """The Fisher tables that one plan reads. ``trajectory``: a second one, for the gain of the sampler's steps."""

    fisher: Source | None = None
    trajectory: Source | None = None


@dataclass(frozen=True)
class Cell:
    """A plan, a way to quantize and a seed, with the steps they take. Labels and ``settings`` are as the sweep names them."""

    number: int
    plan_label: str
    quantize_label: str
    seed: int
    settings: Mapping[str, object]
    artifacts: Mapping[str, Source | External]

    @property
    def label(self) -> str:
        """The cell in words."""
        how = f"; {self.quantize_label}" if self.quantize_label else ""
        return f"{self.plan_label}{how}; seed {self.seed}"

    def steps(self) -> Iterator[tuple[str, Step]]:
        """Name and step of all that can be made, in the order of work: what may fail soon comes first."""
        for name, source in self.artifacts.items():
            if isinstance(source, Step):
                yield name, source


def make_cell(
    number: int,
    labels: tuple[str, str],
    settings: Mapping[str, object],
    subject: Subject,
    tables: Tables,
    plan: PlanConfig,
    quantize: QuantizeConfig,
    seed: int,
) -> Cell:
    """The cell's steps, with the ids that the single commands would give them with ``--seed seed``.

    Fisher tables keep the seed that they have: what differs between seeds is chance after them. The noise floor is full
    precision sampled with the next seed.
    """
    checkpoint, dataset = subject.checkpoint, subject.dataset
    read: dict[str, Source] = {}
    if tables.fisher is not None:
        read["fisher"] = tables.fisher
    if tables.trajectory is not None:
        read["trajectory"] = tables.trajectory
    images = {"dataset": dataset} if plan.is_calibrated and plan.score != "trajectory" else {}
    random = plan.score == "random" or plan.is_calibrated
    planned = Step("plan", {"checkpoint": checkpoint, **read, **images}, plan, seed if random else 0)
    table = "" if tables.fisher is None else str(tables.fisher.recipe.config.get("granularity"))
    fitted = read if quantize_reads_fisher(plan.granularity, table) else {}
    chance = seed if quantize.bias_correction != "none" or quantize.distill else 0
    model = Step("quantize", {"checkpoint": checkpoint, "plan": planned, **fitted}, quantize, chance)
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
        "quantized": model,
        "full_samples": full,
        "floor_samples": floor,
        "samples": samples,
        "features": subject.features,
        "comparison": comparison,
    }
    return Cell(number, *labels, seed, settings, artifacts)


def run_cell(cell: Cell, runner: Runner, failed: dict[str, FqdiffError]) -> Row:
    """Make what is missing of ``cell``, and its row. What cannot be made is told in the row's ``error``.

    ``failed``: what other cells failed at, by id. It is not tried again, and this cell's failure joins it.
    """
    alone = replace(runner, _loaded={}, _made=set())  # what a cell loaded is freed with it
    making = ""
    try:
        for _, step in cell.steps():
            making = step.id
            if making in failed:
                raise failed[making]
            if runner.store.find(step.kind, making) is None:
                alone.run(step)
        return cell_row(cell, alone)
    except FqdiffError as error:
        failed[making] = error
    except Exception as error:  # no memory, or a mistake of ours: the other cells can go on
        runner.say(traceback.format_exc())
        failed[making] = FqdiffError(f"{type(error).__name__}: {error}")
    return cell_row(cell, alone, failure(failed[making]))


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
    return {**row, **numbers(quantized.file("model.safetensors").bytes, promised, runner.load(comparison))}


def existing(source: Source | External, store: Store) -> Manifest | External | None:
    """``source`` where it exists; what is damaged does not."""
    try:
        return store.find(source.kind, source.id) if isinstance(source, Step) else source
    except ArtifactCorrupt:
        return None


def numbers(size: int, plan: Plan, value: Comparison) -> Row:
    """What a cell that is done has measured: its file's size in bytes, and what its comparison says."""
    fid, error, pair = (
        value.measure("fid", MODEL),
        value.measure("image_mse", MODEL),
        value.pair("fid", MODEL, BASELINE),
    )
    return {
        "bytes": size,
        "bits_per_weight": 8 * size / plan.parameters,
        "predicted": plan.budget.predicted if plan.budget is not None else None,
        "n": value.n,
        "level": value.level,
        "feature_network": value.features,
        "image_mse": error.value,
        "image_mse_low": error.low,
        "image_mse_high": error.high,
        "fid": fid.value,
        "fid_low": fid.low,
        "fid_high": fid.high,
        "fid_difference": pair.difference,
        "fid_difference_low": pair.low,
        "fid_difference_high": pair.high,
        "fid_p": pair.p,
        "fid_full": value.measure("fid", BASELINE).value,
        "fid_floor": value.measure("fid", FLOOR).value,
        "image_mse_floor": value.measure("image_mse", FLOOR).value,
    }


def settings_of(prefix: str, config: PlanConfig | QuantizeConfig, given: Mapping[str, object]) -> dict[str, object]:
    """Columns of a table for the settings that a sweep's file gives, as the config holds them; lists with commas."""
    resolved = {**given, **asdict(config)}
    names = dict.fromkeys(["strategy", *given] if prefix == "plan" else given)
    return {f"{prefix}_{name}": plain(resolved[name]) for name in names}


def plain(value: object) -> object:
    """``value`` as a cell of a table."""
    return ",".join(str(one) for one in value) if isinstance(value, list | tuple) else value
