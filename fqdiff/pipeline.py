"""Run one stage over the store: find it if it is there; else load its inputs, call it, and commit what it returns.

A :class:`Step` is an artifact that may not exist yet. Its id follows from its recipe alone, so that a chain of steps can be
listed, looked up and resumed without computing anything.
"""

import importlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import Timeout

import fqdiff
from fqdiff import distributed
from fqdiff.configs import config_data
from fqdiff.context import Context, peak_memory
from fqdiff.errors import LineageError
from fqdiff.store.codecs import CODECS
from fqdiff.store.fields import printable
from fqdiff.store.files import disk_error
from fqdiff.store.manifest import Input, Manifest, Recipe
from fqdiff.store.parts import StoredParts
from fqdiff.store.store import Store


@dataclass(frozen=True)
class Stage:
    """``run``: module and function. ``inputs``: roles in the order of its parameters. ``schema`` rises when results change.

    A role that ends in a star stands for any number of inputs, ``model*`` for ``model1``, ``model2``, ..., passed as a tuple.
    ``shard``: the function that does one of several shares of the work and keeps it as parts, where the stage has one.
    ``compares``: its inputs may be of several checkpoints; those of all other stages belong to one.
    """

    kind: str
    run: str
    inputs: tuple[str, ...] = ()
    schema: int = 1
    parallel: bool = False  # whether every process started by torchrun takes part
    shard: str = ""
    compares: bool = False

    def roles(self, given: Iterable[str]) -> tuple[str, ...]:
        """The roles in order, stars replaced by those of ``given`` they stand for."""
        return tuple(name for role in self.inputs for name in matching(role, given))


def matching(role: str, given: Iterable[str]) -> tuple[str, ...]:
    """The roles that ``role`` stands for: itself, or with a star those of ``given`` that end in a number, in its order."""
    if not role.endswith("*"):
        return (role,)
    stem = role.removesuffix("*")
    numbers = (name.removeprefix(stem) for name in given if name.startswith(stem))
    return tuple(f"{stem}{n}" for n in sorted(int(text) for text in numbers if text.isdecimal()))


def _function(where: str) -> Callable[..., Any]:
    """The function called ``module:name``; importing it may import torch."""
    module, name = where.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


STAGES: Mapping[str, Stage] = {
    "dataset": Stage("dataset", "fqdiff.store.sources:load_dataset"),
    "train": Stage("checkpoint", "fqdiff.stages.train:train", ("dataset", "init"), parallel=True),
    "import": Stage("checkpoint", "fqdiff.stages.import_:import_checkpoint", ("file", "dataset")),
    "fisher": Stage(
        "fisher",
        "fqdiff.stages.fisher:fisher",
        ("checkpoint", "dataset"),
        schema=2,
        parallel=True,
        shard="fqdiff.stages.fisher:fisher_shard",
    ),
    "validate": Stage(
        "validation",
        "fqdiff.stages.validate:validate",
        ("checkpoint", "dataset", "empirical", "true", "trajectory"),
    ),
    "plan": Stage(
        "plan", "fqdiff.stages.plan:plan_by_gain", ("checkpoint", "fisher", "dataset", "trajectory"), schema=5
    ),
    "plan-plugin": Stage("plan", "fqdiff.stages.plan:plan_by_plugin", ("checkpoint", "fisher")),
    "quantize": Stage(
        "quantized", "fqdiff.stages.quantize:quantize_by_gain", ("checkpoint", "plan", "fisher", "trajectory")
    ),
    "quantize-reparameterized": Stage(
        "quantized", "fqdiff.stages.quantize:quantize_reparameterized", ("checkpoint", "plan", "calibration")
    ),
    "calibrate": Stage("calibration", "fqdiff.stages.calibrate:calibrate", ("checkpoint", "fisher", "dataset")),
    "reconstruct": Stage(
        "quantized", "fqdiff.stages.reconstruct:reconstruct_blocks", ("checkpoint", "model", "calibration")
    ),
    "reconstruct-temporal": Stage(
        "quantized", "fqdiff.stages.reconstruct:reconstruct_temporal_first", ("checkpoint", "model", "calibration")
    ),
    "activations": Stage(
        "quantized",
        "fqdiff.stages.activations:quantize_planned_activations",
        ("checkpoint", "model", "calibration", "plan"),
    ),
    "temporal-scales": Stage(
        "quantized", "fqdiff.stages.temporal_scales:learn_temporal_scales", ("checkpoint", "model", "calibration")
    ),
    "activation-steps": Stage(
        "quantized", "fqdiff.stages.activation_steps:learn_activation_steps", ("checkpoint", "model", "calibration")
    ),
    "noise-correction": Stage(
        "quantized", "fqdiff.stages.noise_correction:correct_noise", ("checkpoint", "model", "calibration")
    ),
    "sample": Stage("samples", "fqdiff.stages.sample:sample", ("model",), shard="fqdiff.stages.sample:sample_shard"),
    "classifier": Stage("features", "fqdiff.stages.classifier:classifier", ("dataset",)),
    "fid": Stage(
        "metrics", "fqdiff.stages.fid:fid", ("samples", "dataset", "features", "baseline"), schema=2, compares=True
    ),
    "compare": Stage(
        "comparison",
        "fqdiff.stages.compare:compare",
        ("dataset", "features", "baseline", "floor", "model*", "network*"),
        schema=4,
        compares=True,
    ),
}


@dataclass(frozen=True)
class External:
    """An input that lives outside the store, such as Inception weights or a model file: its value and what identifies it."""

    kind: str
    id: str
    value: Any


@dataclass(frozen=True)
class Step:
    """One stage with its inputs, which may be steps themselves; a role left out is an input not given."""

    stage: str
    inputs: Mapping[str, "Step | Manifest | External"]
    config: Any
    seed: int = 0

    @cached_property
    def recipe(self) -> Recipe:
        """What determines the artifact. Computed once: the steps of a sweep are made of each other many times over."""
        stage = STAGES[self.stage]
        given = (
            Input(role, source.kind, source.id)
            for role in stage.roles(self.inputs)
            if (source := self.inputs.get(role)) is not None
        )
        return Recipe(stage.kind, self.stage, stage.schema, tuple(given), _plain(config_data(self.config)), self.seed)

    @property
    def kind(self) -> str:
        """Kind of the artifact."""
        return STAGES[self.stage].kind

    @cached_property
    def id(self) -> str:
        """Id of the artifact, before it exists."""
        return self.recipe.id


def checkpoint_of(source: "Step | Manifest | External") -> str | None:
    """Id of the checkpoint that ``source`` is, or was made from under that role; None where its recipe names none."""
    if isinstance(source, External) or source.kind == "checkpoint":
        return source.id if source.kind == "checkpoint" else None
    found = source.recipe.input("checkpoint")
    return found.id if found is not None else None


def check_one_checkpoint(step: Step) -> None:
    """Raise LineageError where inputs of ``step`` belong to different checkpoints, though names and shapes may agree."""
    if STAGES[step.stage].compares:
        return
    owners = {role: (source, owner) for role, source in step.inputs.items() if (owner := checkpoint_of(source))}
    # Of a checkpoint and what is said to be made from it, the checkpoint is the one that was asked for.
    first = next((role for role, (source, _) in owners.items() if source.kind == "checkpoint"), next(iter(owners), ""))
    for role, (source, owner) in owners.items():
        if owner != owners[first][1]:
            raise LineageError(
                f"{step.stage}: {role} {source.id} is of checkpoint {owner}, {first} of {owners[first][1]}",
                f"give a {source.kind} made from checkpoint {owners[first][1]}: equal names and shapes are not enough",
            )


def _plain(value: Any) -> Any:
    """``value`` as JSON would give it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass
class Runner:
    """A store with all it takes to run stages on it. ``say`` gets one line per event, such as what was found or made.

    ``command`` and ``settings``, the text of the TOML file that it was given, are kept with what is made.
    """

    store: Store
    context: Context = field(default_factory=Context)
    say: Callable[[str], None] = lambda line: None
    command: str = ""
    force: bool = False
    settings: str = ""
    _loaded: dict[tuple[str, str], Any] = field(default_factory=dict)
    _made: set[tuple[str, str]] = field(default_factory=set)

    def run(self, step: Step) -> Manifest:
        """The artifact of ``step``: found in the store, or made now together with the steps it needs.

        With ``force`` the last step is made again even if it is there; its inputs are not. Raises LineageError where inputs are
        of different checkpoints.
        """
        check_one_checkpoint(step)
        recipe = step.recipe
        made_now = (recipe.kind, recipe.id) in self._made
        found = None if self.force and not made_now else self.store.find(recipe.kind, recipe.id)
        # The first process decides for all: another may look only after the artifact has appeared.
        if distributed.agree(found is not None):
            self.say(f"{step.stage}: found {recipe.kind} {recipe.id}")
            return found or self._committed(recipe)
        sources = {role: self._input(source) for role, source in step.inputs.items()}
        if distributed.rank() == 0:
            manifest = self._make_alone(step, recipe, sources)
            distributed.barrier()
            return manifest
        if not distributed.agree(False) and STAGES[step.stage].parallel:
            self._compute(step, recipe, sources)
        distributed.barrier()
        return self._committed(recipe)

    def _input(self, source: "Step | Manifest | External") -> "Manifest | External":
        """``source`` as something that exists; a step that is there already is not worth a word."""
        if not isinstance(source, Step):
            return source
        found = self.store.find(source.kind, source.id)
        if distributed.agree(found is not None):
            return found or self._committed(source.recipe)
        return replace(self, force=False).run(source)

    def _make_alone(self, step: Step, recipe: Recipe, sources: "Mapping[str, Manifest | External]") -> Manifest:
        """Make the artifact while no other process does; take theirs if they were first."""
        lock = self.store.lock(recipe.kind, recipe.id)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.say(f"{step.stage}: another process is making {recipe.kind} {recipe.id}; waiting for it")
                lock.acquire()
        except OSError as error:
            raise disk_error(error, f"cannot use the store {self.store.root}") from error
        try:
            found = None if self.force else self.store.find(recipe.kind, recipe.id)
            if self.force:
                shutil.rmtree(self.store.parts_folder(recipe.kind, recipe.id), ignore_errors=True)
            # The others wait here: what they keep as parts must neither be removed nor be in vain.
            distributed.agree(found is not None)
            if found is not None:
                self.say(f"{step.stage}: found {recipe.kind} {recipe.id}")
                return found
            begun = self.store.parts_folder(recipe.kind, recipe.id).exists()
            self.say(f"{step.stage}: {'continuing' if begun else 'making'} {recipe.kind} {recipe.id}")
            started = time.monotonic()
            value = self._compute(step, recipe, sources)
            manifest = self._commit(recipe, value, time.monotonic() - started)
            self._loaded.pop((recipe.kind, recipe.id), None)  # made again, it may differ from what was read before
            shutil.rmtree(self.store.parts_folder(recipe.kind, recipe.id), ignore_errors=True)
        finally:
            lock.release()
        self._made.add((recipe.kind, recipe.id))
        return manifest

    def run_shard(self, step: Step, shard: tuple[int, int]) -> None:
        """Do share k of N of ``step``, counted from 1, and keep it as parts. Other shares may run at the same time."""
        check_one_checkpoint(step)
        recipe = step.recipe
        if self.store.find(recipe.kind, recipe.id) is not None:
            self.say(f"{step.stage}: found {recipe.kind} {recipe.id}, whole")
            return
        sources = {role: self._input(source) for role, source in step.inputs.items()}
        self.say(f"{step.stage}: shard {shard[0]} of {shard[1]} of {recipe.kind} {recipe.id}")
        _function(STAGES[step.stage].shard)(*self._arguments(step, recipe, sources), shard)

    def parts(self, recipe: Recipe) -> StoredParts:
        """Partial results of the artifact of ``recipe``."""
        return StoredParts(self.store.parts_folder(recipe.kind, recipe.id), recipe)

    def _compute(self, step: Step, recipe: Recipe, sources: "Mapping[str, Manifest | External]") -> Any:
        return _function(STAGES[step.stage].run)(*self._arguments(step, recipe, sources))

    def _arguments(self, step: Step, recipe: Recipe, sources: "Mapping[str, Manifest | External]") -> list[Any]:
        values: list[Any] = []
        for role in STAGES[step.stage].inputs:
            if role.endswith("*"):
                values.append(tuple(self.load(sources[name]) for name in matching(role, sources)))
            else:
                values.append(self.load(sources[role]) if role in sources else None)
        context = Context(**{**vars(self.context), "parts": self.parts(recipe)})
        return [*values, step.config, step.seed, context]

    def _commit(self, recipe: Recipe, value: Any, seconds: float) -> Manifest:
        draft = Manifest(
            recipe,
            recipe.id,
            datetime.now(UTC).isoformat(timespec="microseconds"),
            printable(self.command),
            (),
            environment(str(self.context.device)),
            round(seconds, 3),
            peak_memory(),
            self.settings,
        )
        try:
            directory = self.store.temporary(recipe.kind)
            try:
                CODECS[recipe.kind].save(value, directory)
                return self.store.commit(directory, draft, replace=self.force)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        except OSError as error:
            raise disk_error(error, f"cannot write {recipe.kind} {recipe.id}") from error

    def _committed(self, recipe: Recipe) -> Manifest:
        found = self.store.find(recipe.kind, recipe.id)
        if found is None:
            raise LineageError(f"{recipe.kind} {recipe.id} was not written", "look at the first process's error")
        return found

    def load(self, source: "Manifest | External") -> Any:
        """The value of an artifact, its files checked against their hashes; kept for the next stage that asks."""
        if isinstance(source, External):
            return source.value
        key = (source.kind, source.id)
        if key not in self._loaded:
            self.store.verify(source)
            value = CODECS[source.kind].load(self.store.directory(*key))
            self._loaded[key] = value
        return self._loaded[key]


def environment(device: str) -> dict[str, Any]:
    """What the result may depend on beside its recipe."""
    import torch

    return {
        "fqdiff": fqdiff.__version__,
        "git": _git_commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def _git_commit() -> str | None:
    """Commit of the source tree that fqdiff runs from, with a plus where it has changes; None when installed elsewhere."""
    root = Path(fqdiff.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = [
            "git",
            "--no-optional-locks",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty=+",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(described, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
