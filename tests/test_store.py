"""The store: round trips, ids, damage, references, removal, and what interrupted or simultaneous runs leave behind."""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fqdiff import pipeline
from fqdiff.configs import get_preset
from fqdiff.context import Context, Part
from fqdiff.errors import AmbiguousRef, ArtifactCorrupt, ArtifactNotFound, ConfigError, FqdiffError, LineageError
from fqdiff.evidence.comparison import DISTRIBUTION, PAIRED, Measure, Resampled, differences, measured, measures
from fqdiff.evidence.digits import DigitClassifier
from fqdiff.models.registry import build, parameter_blocks, unet_architecture, unet_config
from fqdiff.pipeline import Runner, Stage, Step
from fqdiff.quant.activations import Activation
from fqdiff.quant.formats import Granularity, PerChannel, PerGroup, PerTensor, get_format
from fqdiff.quant.packed import pack_tensor, stored_bytes
from fqdiff.rng import generator
from fqdiff.store.codecs import CODECS
from fqdiff.store.manifest import Input, Manifest, Recipe
from fqdiff.store.parts import StoredParts, last_unfinished
from fqdiff.store.store import Store, check_name
from fqdiff.values import (
    Alternative,
    Budget,
    CalibrationSet,
    Candidate,
    Checkpoint,
    ClassifierWeights,
    Comparison,
    Correlation,
    Curve,
    Dataset,
    ErrorShape,
    FidResult,
    FisherEntry,
    FisherTable,
    ModelSpec,
    Plan,
    PlanEntry,
    Point,
    QuantizedCheckpoint,
    SampleSet,
    TriedPlans,
    Validation,
    Verdict,
)

ROOT = Path(__file__).parent.parent
KINDS = sorted(CODECS)


# --- tiny values, and a store that holds them ------------------------------------------------------------------------


def tiny_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(0, "images"))


def tiny_fisher(shapes: Mapping[str, tuple[int, ...]], timesteps: int = 3) -> FisherTable:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw).double()  # channels are stored in float32

    draw = generator(0, "fisher")
    entries = {
        name: FisherEntry(
            "1",
            torch.Size(shape).numel(),
            numbers(timesteps),
            numbers(timesteps),
            numbers(timesteps),
            numbers(timesteps, shape[0]),
        )
        for name, shape in shapes.items()
    }
    return FisherTable("empirical", torch.arange(timesteps) * 7, 2, entries)


def tiny_validation(images: bool = True) -> Validation:
    """Four candidates of two tensors at three timesteps, and two plans."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    draw = generator(0, "validation")
    candidates = tuple(
        Candidate(name, block, 6, "int4", kind)
        for name, block in (("a", "1"), ("b", "head"))
        for kind in ("min-max", "clipped")
    )
    choice = torch.tensor([[0, 2], [1, 3]])
    sizes = (4, 2) if images else (0, 0)
    plans = TriedPlans(
        ("int4", "mixed"),
        choice,
        *(numbers(2) for _ in range(3)),
        numbers(sizes[1]),
        numbers(sizes[1]),
        {"gram": numbers(2)},
    )
    return Validation(
        candidates,
        torch.tensor([1, 6, 900]),
        numbers(3),
        *(numbers(4, 3) for _ in range(3)),
        numbers(sizes[0]),
        numbers(sizes[0]),
        {"true": numbers(4, 3)},
        {"true_mean": numbers(4), "random": numbers(4)},
        numbers(4, 4),
        plans,
        (
            Correlation("true_mean", "output_error", "all", 0.5, (-0.25, 0.75), 4, 2, 1.5, (0.5, 2.5)),
            Correlation("random", "output_error", "all", None, None, 4, 2, None, None),
        ),
        (Verdict("best two", "output_error", "true_mean", "random", 0.25, None),),
        (ErrorShape("int4", 0.1, -0.2, 0.0, 0.2), ErrorShape("int4 clipped", 0.3, -0.2, 0.0, 0.2)),
    )


def tiny_comparison() -> Comparison:
    """Two models and a noise floor, by every metric."""
    draws = torch.randn(3, 50, generator=generator(0, "draws")).double()
    results = {
        metric: {role: Resampled(0.1 * k, draws[k % 3] + k) for k, role in enumerate(measured(metric, 2, True))}
        for metric in (*PAIRED, *DISTRIBUTION)
    }
    rows = measures(results, 0.95), differences(results, 2, (1,), 10, 0.95)
    points = Point(3, 0.25, 0.0, 0.0), Point(7, 0.75, 2.0, 0.1)
    curves = [(Curve("model2", 8, points, 1.5, 0.1, 1.3, 1.7),)] * 2
    return Comparison(10, 0.95, 50, "digits", "0" * 64, 84, "noise", 0, 1, 2, *rows, *curves, "ddim, 2 steps")


@cache
def tiny_value(kind: str) -> Any:
    """A small valid value of ``kind``."""
    architecture = unet_architecture(unet_config(get_preset("tiny").architecture))
    spec = ModelSpec(architecture, "cosine", "v")
    network = build(architecture, "meta")
    draw = generator(0, "weights")
    tensors = {name: torch.randn(p.shape, generator=draw) for name, p in network.named_parameters()}
    blocks = parameter_blocks(network)
    names = ("float32", "float16", "bfloat16", "int8", "int5", "int4", "int2")
    formats = [get_format(f) for f in (*names, "int3sym", "ternary", "float8_e4m3", "float8_e5m2")]
    chosen = {name: formats[i % len(formats)] for i, name in enumerate(tensors)}
    kinds: list[Granularity] = [PerTensor(), PerChannel(0), PerGroup(4, 0, torch.float16), PerChannel(0, torch.float16)]
    grains = {
        name: PerTensor() if fmt.is_cast else kinds[i % 4] if tensors[name].ndim > 1 else kinds[i % 2]
        for i, (name, fmt) in enumerate(chosen.items())
    }
    if kind == "dataset":
        return Dataset("noise", tiny_images(10), torch.arange(10) % 3, torch.arange(10) >= 8)
    if kind == "checkpoint":
        return Checkpoint(spec, tensors, torch.rand(5, generator=draw), tiny_images(4))
    if kind == "fisher":
        return tiny_fisher({name: tuple(t.shape) for name, t in tensors.items()})
    if kind == "validation":
        return tiny_validation()
    if kind == "plan":
        sizes = {name: stored_bytes(tuple(t.shape), chosen[name], grains[name]) for name, t in tensors.items()}
        entries = [
            PlanEntry(
                name,
                blocks[name],
                tuple(t.shape),
                chosen[name].name,
                str(grains[name]),
                "min-max",
                "nearest",
                0.25,
                None,
                "a rule",
                sizes[name],
                0.0,
                "none",
                (
                    Alternative(chosen[name].name, str(grains[name]), "min-max", sizes[name], 0.0),
                    Alternative("int3", "channel:0", "mse", 5, 0.5),
                ),
            )
            for name, t in tensors.items()
        ]
        size = sum(sizes.values()) + 5000
        return Plan("budget", tuple(entries), size, Budget("fisher", "uniform", size, None, 0.0, 0.0, "budget"))
    if kind == "calibration":
        x_t = torch.randn(5, 1, 8, 8, generator=draw)
        return CalibrationSet(x_t, torch.tensor([999, 999, 500, 500, 0]), "0" * 64, 1000)
    if kind == "quantized":
        packed = {name: pack_tensor(t, chosen[name], grains[name]) for name, t in tensors.items()}
        tables = {name: torch.randn(3, o, generator=draw).half() for name, o in (("head.output", 1), ("stem.conv", 4))}
        zero_point = torch.tensor([[3, 200], [0, 255]], dtype=torch.uint8)
        made = {"head.late": Activation("int8", "split", torch.rand(2, 2, generator=draw) + 0.1, zero_point)}
        return QuantizedCheckpoint(spec, packed, tables, {**made, "output": Activation("int4sym", "channel")})
    if kind == "samples":
        return SampleSet(tiny_images(6), seed=5)
    if kind == "features":
        weights = {name: p.detach() for name, p in DigitClassifier(1, 8, 3).named_parameters()}
        return ClassifierWeights("noise", 3, (1, 8, 8), weights, 0.5, 0.75)
    if kind == "comparison":
        return tiny_comparison()
    return tiny_metrics()


def tiny_metrics() -> FidResult:
    """FID and KID of ten images, and how far FID is from a baseline's."""
    rows = (Measure("fid", "model1", 1.5, 0.25, 1.0, 2.0), Measure("kid", "baseline", -0.5, 0.25, -1.0, 0.0))
    return FidResult(
        1.5, 10, "digits", "0" * 64, 84, "noise", 0, 0.1, -0.2, 0.9, 0.25, (-0.5, 0.5), 0.02, measures=rows
    )


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors and types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def put(store: Store, kind: str, *inputs: Manifest, seed: int = 0, value: Any = None) -> Manifest:
    """Commit an artifact of ``kind`` as a stage would have."""
    sources = tuple(Input(f"role{i}", m.kind, m.id) for i, m in enumerate(inputs))
    recipe = Recipe(kind, "by-hand", 1, sources, {"size": 1.5}, seed)
    folder = store.temporary(kind)
    CODECS[kind].save(tiny_value(kind) if value is None else value, folder)
    created = f"2026-01-01T00:00:{len(list(store.manifests())):02}"
    return store.commit(folder, Manifest(recipe, recipe.id, created, "by hand", (), {}, 0.5, 1))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_loads_equal(kind: str, store: Store) -> None:
    assert same(Runner(store).load(put(store, kind)), tiny_value(kind))


def test_a_data_set_without_labels_loads_equal(store: Store) -> None:
    value = replace(tiny_value("dataset"), labels=None)
    assert same(Runner(store).load(put(store, "dataset", value=value)), value)


def test_a_checkpoint_without_training_loss_loads_equal_and_has_no_curve(store: Store) -> None:
    value = replace(tiny_value("checkpoint"), loss=None)
    manifest = put(store, "checkpoint", value=value)
    assert same(Runner(store).load(manifest), value)
    assert "loss.png" not in {f.name for f in manifest.files}


def test_a_validation_without_images_loads_equal(store: Store) -> None:
    value = tiny_validation(images=False)
    assert same(Runner(store).load(put(store, "validation", value=value)), value)


def test_fisher_rows_of_many_row_groups_load_in_order(store: Store) -> None:
    value = tiny_fisher({"b": (3, 2), "a": (5,)}, timesteps=1700)
    assert same(Runner(store).load(put(store, "fisher", value=value)), value)
    assert list(value.entries) == ["b", "a"]


@pytest.mark.parametrize("kind", KINDS)
def test_saving_twice_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        CODECS[kind].save(tiny_value(kind), tmp_path / name)
    files = [p.name for p in (tmp_path / "one").iterdir()]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


# --- ids -------------------------------------------------------------------------------------------------------------

RECIPE = Recipe("plan", "plan", 1, (Input("checkpoint", "checkpoint", "a" * 16),), {"ratio": 0.5, "groups": "1/2"}, 0)


def test_equal_recipes_have_equal_ids() -> None:
    again = replace(RECIPE, config={"groups": "1/2", "ratio": 0.5})
    assert again.id == RECIPE.id


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"ratio": 0.5, "groups": "12"}},
        {"config": {"ratio": 0.5}},
        {"seed": 1},
        {"schema": 2},
        {"stage": "other"},
        {"kind": "metrics"},
        {"inputs": ()},
        {"inputs": (Input("checkpoint", "checkpoint", "b" * 16),)},
        {"inputs": (Input("baseline", "checkpoint", "a" * 16),)},
        {"inputs": (Input("checkpoint", "quantized", "a" * 16),)},
    ],
    ids=str,
)
def test_any_changed_part_changes_the_id(change: dict[str, Any]) -> None:
    assert replace(RECIPE, **change).id != RECIPE.id


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_that_is_no_finite_number_has_no_id(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        _ = replace(RECIPE, config={"ratio": value}).id


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_in_any_file_is_found_and_named(kind: str, store: Store) -> None:
    manifest = put(store, kind)
    for record in manifest.files:
        path = store.directory(kind, manifest.id) / record.name
        good = path.read_bytes()
        for position in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(ArtifactCorrupt, match=record.name):
                Runner(store).load(manifest)
        path.write_bytes(good)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_or_missing_file_is_named(kind: str, store: Store) -> None:
    manifest = put(store, kind)
    for record in manifest.files:
        path = store.directory(kind, manifest.id) / record.name
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(ArtifactCorrupt, match=f"{record.name} is damaged"):
            Runner(store).load(manifest)
        path.unlink()
        with pytest.raises(ArtifactCorrupt, match=f"{record.name} is missing"):
            Runner(store).load(manifest)
        path.write_bytes(good)


def test_a_file_that_the_manifest_does_not_list_is_refused(store: Store) -> None:
    manifest = put(store, "plan")
    (store.directory("plan", manifest.id) / "extra.json").write_text("{}")
    with pytest.raises(ArtifactCorrupt, match=r"extra\.json"):
        Runner(store).load(manifest)


def test_an_artifact_that_is_gone_is_an_error_and_not_a_traceback(store: Store) -> None:
    manifest = put(store, "plan")
    shutil.rmtree(store.directory("plan", manifest.id))
    with pytest.raises(ArtifactCorrupt, match=r"plan\.json is missing"):
        Runner(store).load(manifest)


@pytest.mark.parametrize(
    ("part", "value"), [("config", {"size": 2}), ("seed", 9), ("inputs", []), ("schema", 2), ("stage", "x")]
)
def test_a_recipe_edited_by_hand_is_refused(part: str, value: Any, store: Store) -> None:
    manifest = put(store, "plan", put(store, "checkpoint"))
    path = store.directory("plan", manifest.id) / "manifest.json"
    data = json.loads(path.read_text())
    data["recipe"][part] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactCorrupt, match="edited") as error:
        store.find("plan", manifest.id)
    assert str(path.parent) in error.value.hint  # fqdiff store rm would read the manifest first


def test_an_artifact_moved_to_another_id_is_refused(store: Store) -> None:
    manifest = put(store, "plan")
    os.rename(store.directory("plan", manifest.id), store.directory("plan", "0" * 16))
    with pytest.raises(ArtifactCorrupt, match=manifest.id):
        store.find("plan", "0" * 16)


# --- references ------------------------------------------------------------------------------------------------------


def test_an_artifact_answers_to_its_name_id_prefix_and_latest(store: Store) -> None:
    put(store, "plan", seed=1)
    manifest = put(store, "plan", seed=2)
    store.give_name("best", manifest)
    for ref in ("best", manifest.id, manifest.id[:6], f"plan/{manifest.id[:6]}", f"plan/{manifest.id}", "latest"):
        assert store.resolve(ref) == manifest


def test_latest_is_the_latest_of_the_kinds_asked_for(store: Store) -> None:
    plan = put(store, "plan")
    put(store, "samples")
    assert store.resolve("latest", ("plan", "fisher")) == plan


def test_a_name_moves_when_it_is_given_again(store: Store) -> None:
    store.give_name("best", put(store, "plan", seed=1))
    second = put(store, "plan", seed=2)
    store.give_name("best", second)
    assert store.resolve("best") == second


def test_a_prefix_of_two_ids_is_ambiguous_and_both_are_listed(store: Store) -> None:
    ids: dict[str, int] = {}
    for seed in range(2000):  # two ids with four equal digits are found long before
        prefix = replace(RECIPE, kind="metrics", stage="by-hand", inputs=(), config={"size": 1.5}, seed=seed).id[:4]
        if prefix in ids:
            break
        ids[prefix] = seed
    both = [put(store, "metrics", seed=s) for s in (ids[prefix], seed)]
    with pytest.raises(AmbiguousRef) as error:
        store.resolve(prefix)
    assert all(m.id in error.value.message for m in both)


@pytest.mark.parametrize("ref", ["nothing", "abc", "plan/0000", "../x", "", "fisher/latest"])
def test_an_unknown_reference_is_an_error_with_a_hint(ref: str, store: Store) -> None:
    put(store, "plan")
    with pytest.raises(ArtifactNotFound) as error:
        store.resolve(ref)
    assert "fqdiff store ls" in error.value.hint


def test_latest_in_an_empty_store_says_how_to_make_one(store: Store) -> None:
    with pytest.raises(ArtifactNotFound) as error:
        store.resolve("latest", ("plan",))
    assert "fqdiff plan" in error.value.hint
    assert not store.root.exists()


def test_what_a_reference_is_instead_is_said(store: Store) -> None:
    """Of another kind, by its id; and of the right one, by the path of its folder or of a file in it."""
    plan = put(store, "plan")
    with pytest.raises(ArtifactNotFound, match=f"'{plan.id[:6]}' is the plan {plan.id}, and another kind is asked for"):
        store.resolve(plan.id[:6], ("quantized", "checkpoint"))
    for path in (store.directory("plan", plan.id), store.directory("plan", plan.id) / "plan.json"):
        with pytest.raises(ArtifactNotFound, match="no plan is named") as error:
            store.resolve(str(path), ("plan",))
        assert error.value.hint == f"the plan goes by its id: {plan.id}"
    with pytest.raises(ArtifactNotFound, match="no plan is named 'abc'") as error:
        store.resolve("abc", ("plan",))
    assert "4 digits" in error.value.hint


def test_a_name_of_another_kind_or_of_a_removed_artifact_says_so(store: Store) -> None:
    manifest = put(store, "plan")
    store.give_name("best", manifest)
    with pytest.raises(ArtifactNotFound, match="another kind"):
        store.resolve("best", ("samples",))
    shutil.rmtree(store.directory("plan", manifest.id))
    with pytest.raises(ArtifactNotFound, match="gone"):
        store.resolve("best")


@pytest.mark.parametrize("name", ["../x", "latest", "", ".hidden", "a/b", "a b", "x" * 101, "-x", "a\0b", "a\n"])
def test_an_unsafe_name_is_refused(name: str, store: Store) -> None:
    with pytest.raises(ConfigError):
        check_name(name)
    with pytest.raises(ConfigError):
        store.give_name(name, put(store, "plan"))


# --- lineage, removal, leftovers -------------------------------------------------------------------------------------


def test_lineage_lists_every_ancestor_and_what_is_gone(store: Store) -> None:
    dataset = put(store, "dataset")
    checkpoint = put(store, "checkpoint", dataset)
    samples = put(store, "samples", checkpoint)
    metrics = put(store, "metrics", samples, dataset)
    store.remove(dataset.kind, dataset.id)
    chain = list(store.lineage(metrics))
    assert [(depth, name) for depth, _, _, name in chain] == [
        (0, f"metrics/{metrics.id}"),
        (1, f"samples/{samples.id}"),
        (2, f"checkpoint/{checkpoint.id}"),
        (3, f"dataset/{dataset.id}"),
        (1, f"dataset/{dataset.id}"),
    ]
    assert [name for _, manifest, _, name in chain if manifest is None] == [f"dataset/{dataset.id}"] * 2


def test_lineage_of_a_long_chain_of_diamonds_is_short(store: Store) -> None:
    last = put(store, "metrics")
    for seed in range(1, 60):
        last = put(store, "metrics", last, last, seed=seed)
    assert len(list(store.lineage(last))) == 1 + 2 * 59


def test_an_artifact_is_used_by_what_others_were_made_from_but_not_by_its_fellows(store: Store) -> None:
    checkpoint = put(store, "checkpoint")
    plan = put(store, "plan", checkpoint)
    with pytest.raises(LineageError, match=plan.id):
        store.check_unused([("checkpoint", checkpoint.id)])
    store.check_unused([("checkpoint", checkpoint.id), ("plan", plan.id)])


def test_removing_takes_the_artifact_and_its_names_only(store: Store) -> None:
    checkpoint = put(store, "checkpoint")
    plan = put(store, "plan", checkpoint)
    store.give_name("base", checkpoint)
    store.give_name("best", plan)
    store.remove(checkpoint.kind, checkpoint.id)
    assert list(store.manifests()) == [plan]
    assert list(store.names()) == ["best"]
    assert store.leftovers() == []


def test_leftovers_are_temporary_files_and_parts_of_finished_artifacts_and_nothing_else(store: Store) -> None:
    plan = put(store, "plan")
    store.give_name("best", plan)
    lock = store.lock("plan", plan.id)
    lock.acquire()
    lock.release()
    part = Part({"x": torch.ones(2)}, {})
    StoredParts(store.parts_folder("plan", plan.id), plan.recipe).save("state", part)
    unfinished = store.parts_folder("plan", RECIPE.id)
    StoredParts(unfinished, RECIPE).save("state", part)
    assert store.leftovers() == [store.parts_folder("plan", plan.id)]
    killed = [store.temporary("plan"), store.root / "names" / ".tmp-1", unfinished / ".tmp-2"]
    for path in killed[1:]:
        path.write_text("half")
    assert sorted(store.leftovers()) == sorted([store.parts_folder("plan", plan.id), *killed])


# --- running stages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyConfig:
    label: str = "toy"


def toy(config: ToyConfig, seed: int, context: Context) -> Any:
    return tiny_value(config.label)


@pytest.fixture
def toy_step(monkeypatch: pytest.MonkeyPatch) -> Step:
    stages = {f"toy-{kind}": Stage(kind, "tests.test_store:toy") for kind in KINDS}
    monkeypatch.setattr(pipeline, "STAGES", {**pipeline.STAGES, **stages})
    return Step("toy-metrics", {}, ToyConfig("metrics"))


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_the_second_run_finds_what_the_first_made(store: Store, toy_step: Step) -> None:
    said: list[str] = []
    runner = Runner(store, say=said.append)
    assert runner.run(toy_step) == runner.run(toy_step)
    assert [line.split()[1] for line in said] == ["making", "found"]


def test_force_makes_it_again_keeps_its_names_and_reads_the_new_one(store: Store, toy_step: Step) -> None:
    first = Runner(store).run(toy_step)
    store.give_name("best", first)
    runner = Runner(store, force=True)
    runner.load(first)
    second = runner.run(toy_step)
    assert second.created > first.created
    assert store.resolve("best") == second
    assert runner.load(second) == tiny_value("metrics")
    assert store.leftovers() == []


def test_force_replaces_an_artifact_whose_manifest_is_damaged(store: Store, toy_step: Step) -> None:
    first = Runner(store).run(toy_step)
    (store.directory(first.kind, first.id) / "manifest.json").write_text("{")
    with pytest.raises(ArtifactCorrupt):
        Runner(store).run(toy_step)
    assert Runner(store, force=True).run(toy_step).files == first.files


@pytest.mark.parametrize("command", ["fqdiff --store caf\udce9", "fqdiff " + "x" * 20_000])
def test_any_command_line_can_be_recorded(command: str, store: Store, toy_step: Step) -> None:
    manifest = Runner(store, command=command).run(toy_step)
    assert store.find(manifest.kind, manifest.id) == manifest
    assert manifest.command.startswith("fqdiff ")


def test_files_get_the_permissions_of_the_umask(store: Store, toy_step: Step) -> None:
    before = os.umask(0o027)
    try:
        manifest = Runner(store).run(toy_step)
    finally:
        os.umask(before)
    folder = store.directory(manifest.kind, manifest.id)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o640}


SCRIPT = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

import fqdiff.pipeline as pipeline
from fqdiff.evidence.comparison import Measure
from fqdiff.store.store import Store
from fqdiff.values import FidResult

@dataclass(frozen=True)
class ToyConfig:
    label: str = "toy"

def toy(config, seed, context):
    time.sleep(1)
    rows = (Measure("fid", "model1", 1.5, 0.25, 1.0, 2.0),)
    return FidResult(1.5, 10, "digits", "0" * 64, 84, "noise", 0, 0.1, -0.2, measures=rows)

pipeline.STAGES = {**pipeline.STAGES, "toy-metrics": pipeline.Stage("metrics", "__main__:toy")}
runner = pipeline.Runner(Store(Path(sys.argv[1])), say=print)
step = pipeline.Step("toy-metrics", {}, ToyConfig("metrics"))
"""
RUN_TOGETHER = (
    SCRIPT
    + """
ready = Path(sys.argv[1] + "-ready")
ready.mkdir(exist_ok=True)
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.01)
print(runner.run(step).created)
"""
)
KILLED_IN_MID_WRITE = (
    SCRIPT
    + """
class Killed:
    def save(value, directory):
        (directory / "metrics.json").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

pipeline.CODECS = {"metrics": Killed}
runner.run(step)
"""
)


def start(script: str, store: Store) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, str(store.root)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_of_two_processes_one_makes_the_artifact_and_both_return_it(store: Store, toy_step: Step) -> None:
    outputs = [
        p.communicate(timeout=60)[0].splitlines() for p in [start(RUN_TOGETHER, store), start(RUN_TOGETHER, store)]
    ]
    said = "\n".join(line for lines in outputs for line in lines)
    assert said.count(": making") == 1
    assert said.count("another process is making") == 1
    manifest = store.find("metrics", toy_step.id)
    assert manifest is not None
    assert [lines[-1] for lines in outputs] == [manifest.created] * 2


def test_kill_9_in_mid_write_leaves_no_artifact_and_the_next_run_succeeds(store: Store, toy_step: Step) -> None:
    process = start(KILLED_IN_MID_WRITE, store)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(store.manifests()) == []
    (leftover,) = store.leftovers()
    assert (leftover / "metrics.json").exists()
    assert Runner(store).load(Runner(store).run(toy_step)) == tiny_value("metrics")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond ``room`` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_one_error_and_leaves_nothing(kind: str, store: Store, toy_step: Step) -> None:
    step = Step(f"toy-{kind}", {}, ToyConfig(kind))
    with (
        full_disk(200),
        pytest.raises(FqdiffError, match=f"cannot write {kind} {step.id}: .*[Ff]ile too large") as error,
    ):
        Runner(store).run(step)
    assert error.value.exit_code == 1
    assert files_in(store.root) == []
    assert store.leftovers() == []
    assert Runner(store).run(step).id == step.id


def test_the_command_ends_with_one_line_and_exit_code_1_on_a_full_disk(tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from fqdiff.cli.app import main; main()"
    )
    command = [sys.executable, "-c", script, "train", "--preset", "tiny", "--dataset", "mnist5k", "--store", "store"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("error: cannot write dataset") == 1
    assert "Traceback" not in done.stderr
    assert files_in(tmp_path / "store") == []


def test_a_store_that_cannot_be_written_is_one_error(tmp_path: Path, toy_step: Step) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    with pytest.raises(FqdiffError, match="cannot use"):
        Runner(Store(tmp_path / "store")).run(toy_step)


# --- parts -----------------------------------------------------------------------------------------------------------


def part(number: float) -> Part:
    return Part({"x": torch.full((100,), number), "flags": torch.tensor([True, False])}, {"step": int(number)})


def test_a_part_comes_back_equal_and_the_last_one_wins(store: Store) -> None:
    parts = StoredParts(store.parts_folder("plan", RECIPE.id), RECIPE)
    assert parts.load("state") is None
    for number in (1.0, 2.0):
        parts.save("state", part(number))
    assert same(parts.load("state"), part(2.0))
    assert last_unfinished(store, "plan") == RECIPE


def test_a_part_that_does_not_fit_on_the_disk_leaves_the_one_before(store: Store) -> None:
    parts = StoredParts(store.parts_folder("plan", RECIPE.id), RECIPE)
    parts.save("state", part(1.0))
    with full_disk(100), pytest.raises(FqdiffError, match=r"state\.safetensors: File too large"):
        parts.save("state", part(2.0))
    assert same(parts.load("state"), part(1.0))
    assert files_in(parts.folder) == ["recipe.json", "state.safetensors"]


@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_damaged_part_is_named(position: int, store: Store) -> None:
    parts = StoredParts(store.parts_folder("plan", RECIPE.id), RECIPE)
    parts.save("state", part(1.0))
    path = parts.folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match=r"state\.safetensors") as error:
        parts.load("state")
    assert "--force" in error.value.hint
