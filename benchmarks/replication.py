"""The layer-adaptive paper's study: its four ways to choose weights for a lower precision, on a trained model, really quantized.

    python benchmarks/replication.py                     # the small model; some minutes on a GPU, most of a day on two cores
    python benchmarks/replication.py --preset paper      # the paper's own network, trained first: for a GPU

Everything is made in the store (FQDIFF_STORE) unless it is there: the model, its Fisher table (empirical, every timestep), a plan
of each strategy for each low format, the quantized models, images of all from the same noise, and one comparison for each low
format, with Holm's correction over its pairs. Strategies decide at t = 1, as in the paper; stem and head stay float32, as there.

``small`` goes on from the pretrained model for a few hundred steps: that one was stored in float16, which a cast to float16
would find again without a loss.
"""

import argparse
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from fqdiff.chains import comparison_step
from fqdiff.cli.import_ import import_step
from fqdiff.cli.train import training_step
from fqdiff.configs import (
    ClassifierConfig,
    CompareConfig,
    FisherConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
    TrainConfig,
    get_preset,
)
from fqdiff.context import Context
from fqdiff.errors import FqdiffError
from fqdiff.evidence.comparison import BASELINE, FLOOR, Difference
from fqdiff.pipeline import Runner, Step
from fqdiff.report.words import interval
from fqdiff.store.manifest import Manifest
from fqdiff.store.pretrained import open_model
from fqdiff.store.sources import dataset_config
from fqdiff.store.store import Store
from fqdiff.values import Comparison, Plan

STRATEGIES: Mapping[str, PlanConfig] = {
    "one threshold": PlanConfig("groups", groups="123456"),
    "groups 12/3456": PlanConfig("groups", groups="12/3456"),
    "groups 12/345/6": PlanConfig("groups", groups="12/345/6"),
    **{f"top {p:.0%} of each block": PlanConfig("ratio", ratio=p) for p in (k / 100 for k in range(10, 55, 5))},
    "mean - k std": PlanConfig("mean-std", mean_std=0.5),
    "all weights": PlanConfig("uniform"),
}
SINGLE = "one threshold"
MORE_STEPS = {"steps": 300, "learning_rate": 1e-4, "warmup": 0, "ema_decay": 0.99}


@dataclass(frozen=True)
class Made:
    """A plan and the model it makes, with the model's images."""

    label: str
    plan: Manifest
    model: Manifest
    samples: Manifest


def trained(preset: str, data: str, runner: Runner) -> Manifest:
    """The checkpoint: the pretrained model trained on, or a fresh one of ``preset``."""
    chosen, images = get_preset(preset), dataset_config(data, get_preset(preset).image_size)
    if preset != "small":
        return runner.run(training_step(images, 1, chosen, TrainConfig(**chosen.train), 0))  # type: ignore[arg-type]
    start = runner.run(import_step(open_model("pretrained:mnist-small"), images))
    config = TrainConfig(**{**chosen.train, **MORE_STEPS})  # type: ignore[arg-type]
    return runner.run(training_step(images, 1, chosen, config, 0, start))


def made_models(
    runner: Runner, checkpoint: Manifest, table: Manifest, low: str, sampling: SampleConfig
) -> Iterator[Made]:
    """The model of every strategy, whatever does not reach its threshold in ``low``."""
    for label, strategy in STRATEGIES.items():
        inputs = {"checkpoint": checkpoint}
        if strategy.strategy != "uniform":
            inputs["fisher"] = table
        plan = runner.run(Step("plan", inputs, PlanConfig(**{**vars(strategy), "low": low})))
        model = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig()))
        yield Made(label, plan, model, runner.run(Step("sample", {"model": model}, sampling)))


def lines(runner: Runner, checkpoint: Manifest, made: list[Made], compared: Manifest) -> Iterator[str]:
    """A table of ``made`` against full precision, and of every strategy against one threshold."""
    value: Comparison = runner.load(compared)
    full = checkpoint.file("model.safetensors").bytes
    yield (
        "| strategy | weights in the low format | bytes | of float32's | bits | FID digits - full precision's | verdict |"
        + (" image error | noise error | plan | model |")
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    error, fid = value.measure("image_mse", FLOOR), value.pair("fid", FLOOR, BASELINE)
    base = value.measure("fid", BASELINE)
    yield (
        f"| float32, other noise | 0 % | {full:,} | 100 % | {8 * full / parameters(runner, made[0]):.2f} |"
        f" {interval(fid, '+.2f')}; full precision: {base.value:.2f} [{base.low:.2f}, {base.high:.2f}] | |"
        f" {error.value:.4f} | 0 | | {checkpoint.id} |"
    )
    for number, one in enumerate(made, start=1):
        role, size = f"model{number}", one.model.file("model.safetensors").bytes
        pair, error = value.pair("fid", role, BASELINE), value.measure("image_mse", role)
        noise = next(c for c in value.noise_error if c.of == role)
        plan: Plan = runner.load(one.plan)
        low = sum(math.prod(e.shape) for e in plan.entries if e.format != "float32") / plan.parameters
        yield (
            f"| {one.label} | {low:.1%} | {size:,} | {size / full:.1%} | {8 * size / plan.parameters:.2f} |"
            f" {interval(pair, '+.2f')} | {pair.verdict} | {error.value:.2e} [{error.low:.2e}, {error.high:.2e}] |"
            f" {noise.mean:.2e} | {one.plan.id} | {one.model.id} |"
        )
    yield ""
    yield "| against one threshold | bytes | image error [95 %] | verdict | FID digits [95 %] | verdict |"
    yield "|---|---|---|---|---|---|"
    labels = [one.label for one in made]
    single = labels.index(SINGLE)
    for number, one in enumerate(made):
        if one.label == SINGLE:
            continue
        size = one.model.file("model.safetensors").bytes - made[single].model.file("model.safetensors").bytes
        image, fids = (against(value, metric, number + 1, single + 1) for metric in ("image_mse", "fid"))
        yield f"| {one.label} | {size:+,} | {image} | {fids} |"


def parameters(runner: Runner, made: Made) -> int:
    """How many numbers the model has."""
    plan: Plan = runner.load(made.plan)
    return plan.parameters


def against(value: Comparison, metric: str, one: int, other: int) -> str:
    """The difference of two models, the first one's minus the other's, and its verdict, as two cells."""
    known = {(d.metric, d.of, d.against): d for d in value.differences}
    found: Difference | None = known.get((metric, f"model{one}", f"model{other}"))
    form = "+.2f" if metric == "fid" else "+.2e"
    if found is not None:
        return f"{interval(found, form)} | {found.verdict}"
    turned = known[metric, f"model{other}", f"model{one}"]
    opposite = {"better": "worse", "worse": "better", "not better": "not worse", "not worse": "not better"}
    low, high = -turned.high, -turned.low
    words = opposite.get(turned.verdict, turned.verdict)
    return f"{-turned.difference:{form}} [{low:{form}}, {high:{form}}] | {words}"


def main() -> None:
    """Read the options; what cannot be done is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--preset", default="small", choices=("small", "paper", "tiny"))
    parser.add_argument("--dataset", default="mnist15k", help="with 5,000 held-out images; mnist has 10,000")
    parser.add_argument("--lows", default="float16,int8,int4")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--fisher-samples", type=int, default=8, help="at each timestep")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    try:
        run(options)
    except FqdiffError as error:
        raise SystemExit(f"error: {error.message}; {error.hint}") from None


def run(options: argparse.Namespace) -> None:
    """Make what is missing for ``options`` and print a table for each low format. Raises FqdiffError."""
    config = FisherConfig(timesteps=1000, samples=options.fisher_samples)
    runner = Runner(Store(options.store), Context(torch.device(options.device)), command="benchmarks/replication.py")
    checkpoint = trained(options.preset, options.dataset, runner)
    given = checkpoint.input("dataset")
    assert given is not None
    dataset = runner.store.find("dataset", given.id)
    assert dataset is not None
    table = runner.run(Step("fisher", {"checkpoint": checkpoint, "dataset": dataset}, config))
    features = runner.run(Step("classifier", {"dataset": dataset}, ClassifierConfig()))
    sampling = SampleConfig(steps=options.steps, count=options.count)
    full, floor = (runner.run(Step("sample", {"model": checkpoint}, sampling, seed)) for seed in (0, 1))
    print(f"checkpoint {checkpoint.id}, Fisher table {table.id}, data set {dataset.id}, features {features.id}")
    for low in options.lows.split(","):
        made = list(made_models(runner, checkpoint, table, low, sampling))
        compare = CompareConfig(
            resamples=options.resamples, full_precision_of=tuple(range(1, len(made) + 1)), trajectories=0
        )
        samples, models = [one.samples for one in made], [checkpoint, *(one.model for one in made)]
        compared = runner.run(comparison_step(dataset, features, full, samples, floor, models, compare))
        print(f"\n### {low} (comparison {compared.id})\n", flush=True)
        print("\n".join(lines(runner, checkpoint, made, compared)), flush=True)


if __name__ == "__main__":
    main()
