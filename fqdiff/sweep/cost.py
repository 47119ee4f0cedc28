"""What missing steps may take: what the same stages took in this store, for the same model; sampling can be timed."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from fqdiff.configs import SampleConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.pipeline import Step
from fqdiff.stages.sample import sample
from fqdiff.store.manifest import Recipe
from fqdiff.store.store import Store
from fqdiff.values import Model

Rates = Mapping[tuple[str, str], list[float]]
TIMED_IMAGES, TIMED_STEPS = 16, 4


def work(recipe: Recipe) -> float:
    """How much a recipe asks for, in units that take about as long each within one stage and one model."""
    config = recipe.config
    if recipe.stage in ("reconstruct", "reconstruct-temporal", "activation-steps", "temporal-scales"):
        together = config.get("network_iterations", 0)  # a step of these takes about half of one of every block
        return float(config["iterations"] + together / 2)
    if recipe.stage == "sample":
        return float(config["count"] * config["steps"])
    if recipe.stage == "calibrate":
        return float(config["samples"] * config["steps"])
    if recipe.stage == "fisher":
        return float(config["samples"] * config["steps" if config["kind"] == "trajectory" else "timesteps"])
    if recipe.stage in ("quantize", "quantize-reparameterized"):
        return float(1 + config["distill"])
    return float(config["resamples"]) if recipe.stage == "compare" else 1.0


def measured_rates(store: Store) -> Rates:
    """Seconds per unit of work of every artifact, by its stage and the checkpoint it was made from; "" without one."""
    model: dict[tuple[str, str], str] = {}
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for manifest in store.manifests():  # oldest first: what it was made from has been seen
        inputs = [model.get((i.kind, i.id), "") for i in manifest.recipe.inputs]
        own = (manifest.kind, manifest.id)
        model[own] = manifest.id if manifest.kind == "checkpoint" else next(filter(None, inputs), "")
        rates[manifest.recipe.stage, model[own]].append(manifest.seconds / work(manifest.recipe))
    return rates


def sampling_rate(model: Model, context: Context) -> float:
    """Seconds that one step of one image takes; two lengths are timed, so that what comes before the first step cancels."""

    def timed(steps: int) -> float:
        fresh = replace(context, parts=MemoryParts())  # or it would find what the run before has made
        started = time.perf_counter()
        sample(model, SampleConfig(steps=steps, count=TIMED_IMAGES), 0, fresh)
        return time.perf_counter() - started

    timed(1)  # the first use of a network takes longer
    short, long = timed(1), timed(1 + TIMED_STEPS)
    if long <= short:  # on a busy machine; then at most
        return long / (TIMED_IMAGES * (1 + TIMED_STEPS))
    return (long - short) / (TIMED_IMAGES * TIMED_STEPS)


def estimated_seconds(step: Step, checkpoint: str, rates: Rates) -> float | None:
    """What ``step`` may take with the checkpoint of that id; None where nothing like it has been made."""
    known = rates.get((step.stage, checkpoint)) or rates.get((step.stage, ""))
    return median(known) * work(step.recipe) if known else None
