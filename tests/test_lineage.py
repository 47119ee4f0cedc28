"""Inputs of one step that belong to different checkpoints are refused, however equal their names and shapes."""

from dataclasses import replace
from pathlib import Path

import pytest

from fqdiff.configs import ClassifierConfig, CompareConfig, PlanConfig, QuantizeConfig
from fqdiff.errors import LineageError
from fqdiff.pipeline import Runner, Step, check_one_checkpoint
from fqdiff.store.manifest import Input, Manifest, Recipe
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, FisherTable
from tests.test_store import put

UNIFORM = PlanConfig("uniform", low="int4")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def twins(store: Store, checkpoint: Checkpoint) -> tuple[Manifest, Manifest]:
    """Two checkpoints of one architecture, whose weights differ."""
    other = replace(checkpoint, tensors={name: 2 * t for name, t in checkpoint.tensors.items()})
    return put(store, "checkpoint", value=checkpoint), put(store, "checkpoint", value=other, seed=1)


def put_table(store: Store, checkpoint: Manifest, table: FisherTable) -> Manifest:
    made = put(store, "fisher", value=table)
    recipe = replace(made.recipe, inputs=(Input("checkpoint", "checkpoint", checkpoint.id),))
    return replace(made, recipe=recipe, id=recipe.id)


def test_the_plan_of_another_checkpoint_is_refused_and_nothing_is_written(
    store: Store, twins: tuple[Manifest, Manifest]
) -> None:
    """Rejects a comparison of names and shapes alone: both are equal here."""
    runner = Runner(store)
    plan = runner.run(Step("plan", {"checkpoint": twins[0]}, UNIFORM))
    with pytest.raises(LineageError) as error:
        runner.run(Step("quantize", {"checkpoint": twins[1], "plan": plan}, QuantizeConfig()))
    for part in (plan.id, *(twin.id for twin in twins)):
        assert part in error.value.message
    assert f"made from checkpoint {twins[1].id}" in error.value.hint
    assert not list(store.manifests("quantized"))
    runner.run(Step("quantize", {"checkpoint": twins[0], "plan": plan}, QuantizeConfig()))


def test_steps_that_are_not_made_yet_are_refused_before_any_of_them_is(
    store: Store, twins: tuple[Manifest, Manifest]
) -> None:
    plan = Step("plan", {"checkpoint": twins[0]}, UNIFORM)
    with pytest.raises(LineageError, match="quantize: plan"):
        Runner(store).run(Step("quantize", {"plan": plan, "checkpoint": twins[1]}, QuantizeConfig()))
    assert not list(store.manifests("plan"))


def test_the_fisher_table_of_another_checkpoint_is_refused(
    store: Store, twins: tuple[Manifest, Manifest], fisher_table: FisherTable
) -> None:
    table = put_table(store, twins[0], fisher_table)
    with pytest.raises(LineageError, match=f"plan: fisher {table.id} is of checkpoint {twins[0].id}"):
        Runner(store).run(Step("plan", {"checkpoint": twins[1], "fisher": table}, PlanConfig()))


def test_a_comparison_may_be_of_several_checkpoints(store: Store) -> None:
    def quantized(of: str) -> Manifest:
        recipe = Recipe("quantized", "quantize", 1, (Input("checkpoint", "checkpoint", of),), {}, 0)
        return Manifest(recipe, recipe.id, "", "", (), {}, 0.0, 0)

    networks = {"network1": quantized("a" * 16), "network2": quantized("b" * 16)}
    check_one_checkpoint(Step("compare", networks, CompareConfig()))
    with pytest.raises(LineageError, match="classifier: network2"):
        check_one_checkpoint(Step("classifier", networks, ClassifierConfig()))
