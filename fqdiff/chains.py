"""The whole pipeline as one chain of steps: train or import, Fisher, plans, quantized models, samples, FIDs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fqdiff.configs import (
    OUTPUT,
    ClassifierConfig,
    CompareConfig,
    FidConfig,
    FisherConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
    quantize_reads_fisher,
)
from fqdiff.errors import LineageError, require
from fqdiff.pipeline import External, Step
from fqdiff.store.manifest import Manifest

PLANS: Mapping[str, PlanConfig] = {
    "bfloat16 by groups 12/345/6": PlanConfig("groups", groups="12/345/6", low="bfloat16"),
    "int8": PlanConfig("uniform", low="int8"),
    "int4": PlanConfig("uniform", low="int4"),
    "Fisher budget, 4.25 bits": PlanConfig(
        "budget", target_bpw=4.25, granularity="tensor,channel,group-near:64,output", scale="float16"
    ),
}


@dataclass(frozen=True)
class ModelSteps:
    """One row of the table: a model, its samples and its FID. ``plan`` is None for full precision."""

    label: str
    plan: Step | None
    model: Step
    samples: Step
    fid: Step


@dataclass(frozen=True)
class Chain:
    """Every step of a run, each made from the ones before. ``noise_floor``: full precision again, with other noise."""

    dataset: Step
    checkpoint: Step
    fisher: Step
    classifier: Step
    models: tuple[ModelSteps, ...]
    noise_floor: ModelSteps

    def steps(self) -> Iterator[tuple[str, Step]]:
        """Label and step, in the order of work."""
        yield "data set", self.dataset
        yield self.checkpoint.stage, self.checkpoint
        yield "fisher", self.fisher
        yield "classifier", self.classifier
        for row in (*self.models, self.noise_floor):
            if row.plan is not None:
                yield f"plan: {row.label}", row.plan
                yield f"quantize: {row.label}", row.model
            yield f"sample: {row.label}", row.samples
            yield f"fid: {row.label}", row.fid


def make_chain(
    checkpoint: Step,
    fisher: FisherConfig,
    sample: SampleConfig,
    classifier_config: ClassifierConfig,
    fid: FidConfig,
    seed: int,
) -> Chain:
    """The chain that starts at ``checkpoint``: FP32 and every plan of PLANS, all sampled with the same seed."""
    dataset = checkpoint.inputs["dataset"]
    assert isinstance(dataset, Step)
    table = Step("fisher", {"checkpoint": checkpoint, "dataset": dataset}, fisher, seed)
    classifier = Step("classifier", {"dataset": dataset}, classifier_config)
    full = Step("sample", {"model": checkpoint}, sample, seed)

    def row(label: str, plan: Step | None, model: Step, samples: Step) -> ModelSteps:
        inputs = {"samples": samples, "dataset": dataset, "features": classifier}
        if samples is not full:
            inputs["baseline"] = full
        return ModelSteps(label, plan, model, samples, Step("fid", inputs, fid))

    rows = [row("FP32", None, checkpoint, full)]
    for label, config in PLANS.items():
        if fisher.granularity != "weight":
            config = without_outputs(config)
        inputs = (
            {"checkpoint": checkpoint} if config.strategy == "uniform" else {"checkpoint": checkpoint, "fisher": table}
        )
        plan = Step("plan", inputs, config)
        fitted = (
            {"fisher": table}
            if "fisher" in inputs and quantize_reads_fisher(config.granularity, fisher.granularity)
            else {}
        )
        model = Step("quantize", {"checkpoint": checkpoint, "plan": plan, **fitted}, QuantizeConfig())
        rows.append(row(label, plan, model, Step("sample", {"model": model}, sample, seed)))
    other = Step("sample", {"model": checkpoint}, sample, seed + 1)
    floor = row("FP32, other noise", None, checkpoint, other)
    return Chain(dataset, checkpoint, table, classifier, tuple(rows), floor)


def without_outputs(config: PlanConfig) -> PlanConfig:
    """``config`` with one format for each tensor: for a Fisher table without single weights, which tells no channels apart."""
    return replace(config, granularity=",".join(g for g in config.granularity.split(",") if g != OUTPUT))


def comparison_step(
    dataset: Manifest | Step,
    features: Step | External,
    baseline: Manifest | Step,
    models: Sequence[Manifest | Step],
    floor: Manifest | Step | None,
    networks: Sequence[Manifest | Step],
    config: CompareConfig,
) -> Step:
    """The step that compares samples ``models`` with samples ``baseline``; ``floor`` are the baseline's with another seed.

    ``networks``: the models that made ``baseline`` and ``models``, in this order. Their runs repeat those of the samples: what
    ``config`` says of the sampler is filled in.

    Raises LineageError unless all were sampled in the same way, and all but the floor with the same seed: only then does
    image k come from the same noise everywhere.
    """
    first = baseline.recipe
    for source in [*models, *([floor] if floor is not None else [])]:
        for setting in first.config.keys() - {"count"}:
            here, there = source.recipe.config.get(setting), first.config[setting]
            if here != there:
                raise LineageError(
                    f"samples {source.id} were made with {setting} {here}, the baseline's, {first.id}, with {there}",
                    "sample all models in the same way, or name the models instead of their samples",
                )
        if source is not floor and source.recipe.seed != first.seed:
            raise LineageError(
                f"samples {source.id} were made with seed {source.recipe.seed}, the baseline's, {first.id}, with {first.seed}",
                "sample all with the same --seed",
            )
    inputs: dict[str, Step | Manifest | External] = {"dataset": dataset, "features": features, "baseline": baseline}
    if floor is not None:
        inputs["floor"] = floor
    inputs |= {f"model{k}": source for k, source in enumerate(models, start=1)}
    if config.compares_networks:
        inputs |= {f"network{k}": source for k, source in enumerate(networks)}
    require(
        not (config.sampler or config.steps or config.eta),
        "runs of the sampler are those of the samples: comparisons have no sampler, steps or eta of their own",
        "leave them out of [compare]",
    )
    if config.trajectories:
        given = {name: first.config[name] for name in ("sampler", "steps", "eta")}
        config = replace(config, **given)
    return Step("compare", inputs, config)
