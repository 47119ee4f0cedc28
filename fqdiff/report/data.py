"""What a report shows: a comparison, and everything that the lineage of its inputs still holds.

Shapes: N images, C channels, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fqdiff.errors import ArtifactNotFound, ConfigError
from fqdiff.evidence.comparison import BASELINE, FLOOR, model_roles
from fqdiff.pipeline import Runner
from fqdiff.store.manifest import Input, Manifest
from fqdiff.store.store import Store
from fqdiff.values import Comparison, Plan
from fqdiff.viz.fisher import Subject

KIND = "comparison"


@dataclass(frozen=True)
class ModelRow:
    """One role of the comparison. ``file_bytes`` and ``bits_per_weight`` are None where its model is gone from the store."""

    role: str
    label: str
    model: str
    samples: str
    file_bytes: int | None
    bits_per_weight: float | None


@dataclass(frozen=True)
class ArtifactRow:
    """One artifact of the lineage. ``inputs``: (role, kind/id). The rest is None where the artifact is not in the store."""

    kind: str
    id: str
    names: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...] = ()
    manifest: Manifest | None = None

    @property
    def key(self) -> str:
        """``kind/id``."""
        return f"{self.kind}/{self.id}"


@dataclass(frozen=True)
class Report:
    """All that a report shows, in the order of the comparison's roles.

    ``images`` uint8 [N, C, H, W] of each role whose samples are there; image k of all but the floor came from the same noise.
    ``plans`` of each role that has one; ``fisher`` the tables that those plans or their models were made from, by id;
    ``artifacts`` what everything was made from, the oldest first.
    """

    id: str
    comparison: Comparison
    rows: tuple[ModelRow, ...]
    images: Mapping[str, Tensor]
    plans: Mapping[str, Plan]
    fisher: Mapping[str, Subject]
    artifacts: tuple[ArtifactRow, ...]

    @property
    def labels(self) -> dict[str, str]:
        """What each role is called."""
        return {row.role: row.label for row in self.rows}

    def row(self, role: str) -> ModelRow:
        """The row of ``role``. Raises KeyError."""
        return {row.role: row for row in self.rows}[role]

    @property
    def models(self) -> list[ModelRow]:
        """The rows of the models that the baseline is compared with."""
        return [self.row(role) for role in model_roles(self.comparison.models)]

    @property
    def commands(self) -> list[tuple[str, str]]:
        """The commands that made the artifacts, in the order in which they were first given, each with the text of its settings
        file, empty where it was given none.
        """
        manifests = [row.manifest for row in self.artifacts if row.manifest is not None]
        ordered = sorted(manifests, key=lambda m: (m.created, m.id))
        return list(dict.fromkeys((m.command, m.settings) for m in ordered if m.command))


def find_comparison(store: Store, refs: Sequence[str]) -> Manifest:
    """The comparison that ``refs`` name: the latest without any; one named itself; or the latest that has all models named.

    A model may be named by its samples, itself, or its plan. Raises ArtifactNotFound, AmbiguousRef, and ConfigError for a
    comparison beside other names.
    """
    if not refs:
        return store.resolve("latest", (KIND,))
    kinds = (KIND, "samples", "quantized", "plan", "checkpoint")
    found = [store.resolve(ref, kinds) for ref in refs]
    if found[0].kind == KIND and len(found) == 1:
        return found[0]
    for ref, one in zip(refs, found, strict=True):
        if one.kind == KIND:
            raise ConfigError(
                f"'{ref}' is a comparison, and there are other names beside it", "name one comparison, or models"
            )
    wanted = {(one.kind, one.id) for one in found}
    for manifest in reversed(list(store.manifests(KIND))):
        if wanted <= {target for role in sample_roles(manifest) for target in _targets(store, role)}:
            return manifest
    models = " ".join(refs)
    raise ArtifactNotFound(f"no comparison in {store.root} has all of: {models}", f"fqdiff compare {models}")


def sample_roles(comparison: Manifest) -> list[Input]:
    """The inputs of a comparison that are samples."""
    return [found for found in comparison.recipe.inputs if found.kind == "samples"]


def _sources(store: Store, samples: Input) -> tuple[Input | None, Input | None]:
    """The model that made ``samples``, and the plan that made the model, as far as their manifests are there."""
    manifest = store.find(samples.kind, samples.id)
    model = manifest.input("model") if manifest is not None else None
    made = store.find(model.kind, model.id) if model is not None else None
    return model, made.input("plan") if made is not None else None


def _targets(store: Store, samples: Input) -> list[tuple[str, str]]:
    return [(i.kind, i.id) for i in (samples, *_sources(store, samples)) if i is not None]


def role_labels(store: Store, comparison: Manifest) -> dict[str, str]:
    """What each role is called: a name of its samples, its model or its model's plan, else the model's id."""
    names = {target: name for name, target in sorted(store.names().items(), reverse=True)}
    labels = {}
    for samples in sample_roles(comparison):
        targets = _targets(store, samples)
        known = [names[target] for target in targets if target in names]
        labels[samples.role] = known[0] if known else " ".join(targets[1] if len(targets) > 1 else targets[0])
    if FLOOR in labels:
        labels[FLOOR] = f"{labels[BASELINE]}, other noise"
    return labels


def collect(runner: Runner, comparison: Manifest) -> Report:
    """Everything to be shown of ``comparison``; of what is gone from the store, nothing. Raises ArtifactCorrupt."""
    store = runner.store
    labels = role_labels(store, comparison)
    inputs = {found.role: found for found in sample_roles(comparison)}
    order = sorted(inputs, key=lambda role: (role == FLOOR, role != BASELINE, len(role), role))
    rows: list[ModelRow] = []
    images: dict[str, Tensor] = {}
    plans: dict[str, Plan] = {}
    fisher: dict[str, Subject] = {}
    for role in order:
        model, plan = _sources(store, inputs[role])
        rows.append(_model_row(runner, role, labels[role], inputs[role], model))
        if (samples := store.find("samples", inputs[role].id)) is not None:
            images[role] = runner.load(samples).images
        if model is None or role == FLOOR:
            continue
        made = store.find(model.kind, model.id)
        planned = store.find(plan.kind, plan.id) if plan is not None else None
        if planned is not None:
            plans[role] = runner.load(planned)
        for manifest in (planned, made):
            table = manifest.input("fisher") if manifest is not None else None
            if table is not None and table.id not in fisher:
                fisher |= _fisher_subject(runner, table)
    artifacts = _artifacts(store, comparison)
    return Report(comparison.id, runner.load(comparison), tuple(rows), images, plans, fisher, artifacts)


def _model_row(runner: Runner, role: str, label: str, samples: Input, model: Input | None) -> ModelRow:
    manifest = runner.store.find(model.kind, model.id) if model is not None else None
    name = f"{model.kind}/{model.id}" if model is not None else ""
    if manifest is None:
        return ModelRow(role, label, name, samples.id, None, None)
    file_bytes = manifest.file("model.safetensors").bytes
    weights = sum(prod(shape) for shape, _, _ in runner.load(manifest).described.values())
    return ModelRow(role, label, name, samples.id, file_bytes, 8 * file_bytes / weights)


def _fisher_subject(runner: Runner, table: Input) -> dict[str, Subject]:
    """The Fisher table by its id, with the checkpoint that it was measured on; nothing where one of the two is gone."""
    manifest = runner.store.find(table.kind, table.id)
    source = manifest.input("checkpoint") if manifest is not None else None
    checkpoint = runner.store.find(source.kind, source.id) if source is not None else None
    if manifest is None or checkpoint is None:
        return {}
    name = f"fisher {manifest.id} of checkpoint {checkpoint.id}"
    return {manifest.id: Subject(runner.load(manifest), runner.load(checkpoint), name)}


def _artifacts(store: Store, comparison: Manifest) -> tuple[ArtifactRow, ...]:
    """The lineage without repetitions; what is outside the store, or gone, comes first."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, target in store.names().items():
        names.setdefault(target, []).append(name)
    rows = {}
    for _, manifest, _, key in store.lineage(comparison):
        kind, _, artifact_id = key.partition("/")
        given = manifest.recipe.inputs if manifest is not None else ()
        inputs = tuple((i.role, f"{i.kind}/{i.id}") for i in given)
        rows[key] = ArtifactRow(kind, artifact_id, tuple(names.get((kind, artifact_id), ())), inputs, manifest)
    return tuple(sorted(rows.values(), key=lambda r: (r.manifest.created if r.manifest else "", r.kind, r.id)))


def mean_fisher(subject: Subject) -> dict[str, float]:
    """Fisher value of each weight tensor: the mean over the table's timesteps, or that of the whole sampler run."""
    table = subject.table
    if not table.entries:
        return {name: table.trajectory[name].mean for name in subject.weights}
    return {name: float(torch.mean(table.entries[name].mean)) for name in subject.weights}
