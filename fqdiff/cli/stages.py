"""``fqdiff fisher``, ``plan``, ``quantize``, ``sample`` and ``fid``: one stage each, on the latest artifact or the one named."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, mebibytes, table
from fqdiff.configs import ClassifierConfig, FidConfig, FisherConfig, PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.errors import ArtifactNotFound, ConfigError

if TYPE_CHECKING:
    from fqdiff.pipeline import External, Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import FidResult, FisherTable, Plan


def announce(session: Session, step: "Step") -> None:
    """Print what ``step`` would make, for --dry-run."""
    exists = session.store.find(step.kind, step.id) is not None
    data = {"kind": step.kind, "id": step.id, "exists": exists, "config": dict(step.recipe.config)}
    session.result(data, lambda: f"would make {step.kind} {step.id}" + (" (it is there)" if exists else ""))


# --- fisher ----------------------------------------------------------------------------------------------------------


@common()
def fisher(
    session: Session,
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint: name, id or prefix.", show_default="the latest")
    ] = None,
    timesteps: Annotated[
        int | None, typer.Option(min=1, help="Evenly spaced timesteps.", show_default=f"{FisherConfig.timesteps}")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples per timestep.", show_default=f"{FisherConfig.samples}")
    ] = None,
) -> None:
    """Measure the Fisher information of every layer at every timestep."""
    from fqdiff.pipeline import Step

    source = session.resolve(checkpoint, ("checkpoint",))
    config = session.settings("fisher", FisherConfig, {}, timesteps=timesteps, samples=samples)
    inputs = {"checkpoint": source, "dataset": only_input(session, source, "dataset")}
    step = Step("fisher", inputs, config, session.seed)
    if session.dry_run:
        announce(session, step)
        return
    manifest = session.runner.run(step)
    session.finish(manifest)
    value: FisherTable = session.runner.load(manifest)
    rows = fisher_rows(value)
    data = {
        **artifact_data(session.store, manifest),
        "timesteps": len(value.timesteps),
        "samples": value.samples,
        "blocks": rows,
    }
    session.result(data, lambda: fisher_text(manifest, value, rows))


def fisher_rows(value: "FisherTable") -> list[dict[str, object]]:
    """Mean Fisher value of each block's weights at the first, middle and last timestep and over all of them."""
    import torch

    rows: list[dict[str, object]] = []
    for block in ("stem", "1", "2", "3", "4", "5", "6", "head"):
        entries = [e for e in value.entries.values() if e.block == block]
        weights = sum(e.numel for e in entries)
        mean = torch.stack([e.mean * e.numel for e in entries]).sum(dim=0) / weights
        middle = len(value.timesteps) // 2
        numbers = {"first": mean[0], "middle": mean[middle], "last": mean[-1], "mean": mean.mean()}
        rows.append({"block": block, "weights": weights, **{k: float(v) for k, v in numbers.items()}})
    return rows


def fisher_text(manifest: "Manifest", value: "FisherTable", rows: list[dict[str, object]]) -> str:
    """The table of :func:`fisher_rows` for people."""
    t = value.timesteps
    header = ("block", "weights", f"t={t[0]}", f"t={t[len(t) // 2]}", f"t={t[-1]}", "mean over t")
    cells = [
        [str(r["block"]), f"{r['weights']:,}", *(f"{r[k]:.2e}" for k in ("first", "middle", "last", "mean"))]
        for r in rows
    ]
    title = f"fisher {manifest.id}: mean squared per-sample gradient, {len(t)} timesteps x {value.samples} samples"
    return title + "\n" + table(header, cells)


# --- plan ------------------------------------------------------------------------------------------------------------


@common()
def plan(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(help="Fisher table, or checkpoint for --uniform.", show_default="the latest", metavar="[REF]"),
    ] = None,
    groups: Annotated[str | None, typer.Option(help="Block groups, one threshold each, e.g. 12/345/6.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="The groups' thresholds, e.g. 0.1/0.01/0.1.", show_default="mean of each")
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, help="One threshold for the whole model.")] = None,
    ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of each block's tensors that stays high.")
    ] = None,
    mean_std: Annotated[
        float | None, typer.Option(min=0, help="Threshold mean - k std per block, k = clamp(A mean/std, 0.1, 2).")
    ] = None,
    uniform: Annotated[
        str | None, typer.Option(help="Every weight tensor in this format; needs no Fisher values.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Read Fisher values at this timestep, or 'mean'.", show_default=f"{PlanConfig.at}"),
    ] = None,
    low: Annotated[
        str | None, typer.Option(help="Format below the threshold.", show_default=f"{PlanConfig.low}")
    ] = None,
    high: Annotated[str | None, typer.Option(help="Format above it.", show_default=f"{PlanConfig.high}")] = None,
    granularity: Annotated[
        str | None, typer.Option(help="One scale per tensor or channel.", show_default=f"{PlanConfig.granularity}")
    ] = None,
) -> None:
    """Choose a format for every parameter, from its Fisher value."""
    from fqdiff.pipeline import Step

    asked = {"groups": groups, "threshold": threshold, "ratio": ratio, "mean-std": mean_std, "uniform": uniform}
    strategies = [name for name, value in asked.items() if value is not None]
    if len(strategies) > 1:
        raise ConfigError(f"--{' and --'.join(strategies)} are different strategies", "give one of them")
    if uniform is not None and low is not None:
        raise ConfigError("--uniform names the format already", "leave --low out")
    config = session.settings(
        "plan",
        PlanConfig,
        {},
        strategy=strategies[0] if strategies else None,
        groups=groups,
        thresholds=parse_thresholds(thresholds) if thresholds is not None else None,
        threshold=threshold,
        ratio=ratio,
        mean_std=mean_std,
        at=at,
        low=uniform or low,
        high=high,
        granularity=granularity,
    )
    step = Step("plan", plan_inputs(session, source, config.strategy), config)
    if session.dry_run:
        announce(session, step)
        return
    manifest = session.runner.run(step)
    session.finish(manifest)
    value: Plan = session.runner.load(manifest)
    rows = plan_rows(value)
    totals = {"strategy": value.strategy, "file_bytes": value.file_bytes, "bits_per_weight": value.bits_per_weight}
    session.result(
        {**artifact_data(session.store, manifest), **totals, "blocks": rows}, lambda: plan_text(manifest, value, rows)
    )


def parse_thresholds(text: str) -> tuple[float, ...]:
    """``0.1/0.01/0.1`` as numbers."""
    try:
        return tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"thresholds '{text}' are not numbers", "one per group, e.g. 0.1/0.01/0.1") from None


def plan_inputs(session: Session, ref: str | None, strategy: str) -> "dict[str, Step | Manifest | External]":
    """Checkpoint and Fisher table of a plan: of the table named, of the checkpoint named, or the latest."""
    if strategy == "uniform":
        found = session.resolve(ref, ("checkpoint", "fisher") if ref else ("checkpoint",))
        return {"checkpoint": found if found.kind == "checkpoint" else only_input(session, found, "checkpoint")}
    found = session.resolve(ref, ("checkpoint", "fisher") if ref else ("fisher",))
    if found.kind == "checkpoint":
        tables = [m for m in session.store.manifests("fisher") if (i := m.input("checkpoint")) and i.id == found.id]
        if not tables:
            raise ArtifactNotFound(f"no Fisher table of checkpoint {found.id}", f"fqdiff fisher {found.id}")
        found = tables[-1]
        session.note(f"fisher: the latest of that checkpoint, {found.id}")
    return {"checkpoint": only_input(session, found, "checkpoint"), "fisher": found}


def plan_rows(value: "Plan") -> list[dict[str, object]]:
    """Block by block: weight tensors, how many of them change format, payload bytes before and after."""
    rows: list[dict[str, object]] = []
    for block in ("stem", "1", "2", "3", "4", "5", "6", "head"):
        entries = [e for e in value.entries if e.block == block]
        tensors = [e for e in entries if len(e.shape) >= 2]
        counts: dict[str, int] = {}
        for e in tensors:
            counts[e.format] = counts.get(e.format, 0) + 1
        before = sum(4 * _numel(e.shape) for e in entries)
        rows.append({"block": block, "formats": counts, "before": before, "after": sum(e.bytes for e in entries)})
    return rows


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def plan_text(manifest: "Manifest", value: "Plan", rows: list[dict[str, object]]) -> str:
    """The table of :func:`plan_rows` for people."""
    cells = []
    for r in rows:
        counts = r["formats"]
        assert isinstance(counts, dict)
        shown = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        cells.append([str(r["block"]), shown, f"{r['before']:,}", f"{r['after']:,}"])
    payload = sum(e.bytes for e in value.entries)
    before = sum(4 * _numel(e.shape) for e in value.entries)
    cells.append(["header", "", "", f"{value.file_bytes - payload:,}"])
    cells.append(["file", "", f"{before:,}", f"{value.file_bytes:,}"])
    header = ("block", "weight tensors", "bytes in float32", "bytes planned")
    rules = list(
        dict.fromkeys(f"{e.rule} (threshold {e.threshold:.3g})" for e in value.entries if e.threshold is not None)
    )
    title = f"plan {manifest.id}: {value.strategy}, {value.bits_per_weight:.3f} bits per weight, {mebibytes(value.file_bytes)}"
    return "\n".join([title, table(header, cells), *rules])


# --- quantize --------------------------------------------------------------------------------------------------------


@common()
def quantize(
    session: Session,
    source: Annotated[
        str | None, typer.Argument(help="Plan: name, id or prefix.", show_default="the latest", metavar="[PLAN]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also copy the safetensors file here.")] = None,
) -> None:
    """Write the smaller checkpoint that a plan describes."""
    from fqdiff.cli.output import copy_out

    chosen = session.resolve(source, ("plan",))
    step = quantize_step(session, chosen)
    if session.dry_run:
        announce(session, step)
        return
    manifest = session.runner.run(step)
    session.finish(manifest)
    promised = session.runner.load(chosen).file_bytes
    file = next(f for f in manifest.files if f.name == "model.safetensors")
    path = session.store.directory(manifest.kind, manifest.id) / file.name
    if output is not None:
        copy_out(path, output)
    data = {
        **artifact_data(session.store, manifest),
        "file": str(path),
        "file_bytes": file.bytes,
        "promised_bytes": promised,
    }

    def text() -> str:
        same = "as planned" if file.bytes == promised else f"the plan said {promised:,}"
        return f"quantized {manifest.id}: {mebibytes(file.bytes)}, {same}\n{output or path}"

    session.result(data, text)


def quantize_step(session: Session, plan_manifest: "Manifest") -> "Step":
    """The step that carries out a plan on the checkpoint it was made for."""
    from fqdiff.pipeline import Step

    checkpoint = only_input(session, plan_manifest, "checkpoint")
    return Step("quantize", {"checkpoint": checkpoint, "plan": plan_manifest}, QuantizeConfig())


# --- sample ----------------------------------------------------------------------------------------------------------


@common()
def sample(
    session: Session,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint or quantized checkpoint.", show_default="the latest")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many images.", show_default=f"{SampleConfig.count}")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim or ddpm.", show_default=f"{SampleConfig.sampler}")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Inference steps.", show_default="50; for ddpm all timesteps")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="DDIM's randomness, 0 to 1.", show_default="0")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass; changes no image.")] = 100,
) -> None:
    """Make images from a model; image k depends on the seed and k alone."""
    from dataclasses import replace

    from fqdiff.pipeline import Step

    source = session.resolve(model, ("checkpoint", "quantized"))
    all_steps = {"steps": training_timesteps(session, source)} if sampler == "ddpm" else {}
    config = session.settings("sample", SampleConfig, all_steps, sampler=sampler, steps=steps, eta=eta, count=count)
    step = Step("sample", {"model": source}, config, session.seed)
    if session.dry_run:
        announce(session, step)
        return
    session.runner.context = replace(session.runner.context, batch_size=batch_size)
    manifest = session.runner.run(step)
    session.finish(manifest)
    grid = session.store.directory(manifest.kind, manifest.id) / "samples.png"
    data = {**artifact_data(session.store, manifest), "count": config.count, "seed": session.seed, "grid": str(grid)}
    session.result(data, lambda: f"samples {manifest.id}: {config.count} images, seed {session.seed}\nlook at {grid}")


def training_timesteps(session: Session, model: "Manifest") -> int:
    """Timesteps that ``model`` was trained with."""
    steps = session.runner.load(model).spec.architecture["num_train_timesteps"]
    assert isinstance(steps, int)
    return steps


# --- fid -------------------------------------------------------------------------------------------------------------


@common()
def fid(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Samples; or a plan or model, which is sampled first.",
            show_default="the latest of these",
            metavar="[REF]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Baseline samples of the same seed.", show_default="the full-precision model's, if sampled"),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="inception or digits.", show_default="inception if its weights are at hand, else digits"),
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option(
            envvar="FQDIFF_INCEPTION",
            help="clean-fid's inception-2015-12-05.pt, from a source you trust: it is executable.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Images of each set.", show_default="as many as both sets have")
    ] = None,
) -> None:
    """Compare generated images with held-out real ones (Fréchet distance)."""
    from fqdiff.pipeline import Step

    samples, baseline = fid_samples(session, source, count, against)
    if session.dry_run and isinstance(samples, Step) and session.store.find(samples.kind, samples.id) is None:
        announce(session, samples)
        return
    made = session.runner.run(samples) if isinstance(samples, Step) else samples
    base = session.runner.run(baseline) if isinstance(baseline, Step) else baseline
    dataset = ancestor(session, made, "dataset")
    network = choose_features(session, features, inception_weights, dataset)
    inputs: dict[str, Step | Manifest | External] = {"samples": made, "dataset": dataset, "features": network}
    if base is not None:
        inputs["baseline"] = base
    step = Step("fid", inputs, session.settings("fid", FidConfig, {}, count=count))
    if session.dry_run:
        announce(session, step)
        return
    manifest = session.runner.run(step)
    session.finish(manifest)
    value: FidResult = session.runner.load(manifest)
    session.result({**artifact_data(session.store, manifest), **vars(value)}, lambda: fid_text(manifest, value))


def fid_samples(
    session: Session, ref: str | None, count: int | None, against: str | None
) -> "tuple[Step | Manifest, Step | Manifest | None]":
    """The samples to judge and their baseline. A plan is quantized and a model sampled on the way.

    The baseline is the one named; else, for a quantized model, samples of its checkpoint made in the same way: where they
    exist, or where samples are being made anyway.
    """
    from fqdiff.pipeline import Step

    found = session.resolve(ref, ("samples", "quantized", "plan", "checkpoint"))
    named = session.store.resolve(against, ("samples",)) if against is not None else None
    if found.kind == "samples":
        model = only_input(session, found, "model")
        if named is not None or model.kind == "checkpoint":
            return found, named
        recipe = found.recipe
        full = Step(
            "sample", {"model": ancestor(session, model, "checkpoint")}, SampleConfig(**recipe.config), recipe.seed
        )
        return found, session.store.find(full.kind, full.id)
    dataset = session.runner.load(ancestor(session, found, "dataset"))
    config = session.settings(
        "sample", SampleConfig, {"count": count or min(SampleConfig.count, len(dataset.reference))}
    )
    quantized = quantize_step(session, found) if found.kind == "plan" else found
    session.note(f"samples: making {config.count} with {config.sampler} in {config.steps} steps, seed {session.seed}")
    samples = Step("sample", {"model": quantized}, config, session.seed)
    if found.kind == "checkpoint":
        return samples, named
    return samples, named or Step("sample", {"model": ancestor(session, found, "checkpoint")}, config, session.seed)


def ancestor(session: Session, manifest: "Manifest", kind: str) -> "Manifest":
    """The nearest artifact of ``kind`` that ``manifest`` was made from."""
    found = next((m for _, m, _, _ in session.store.lineage(manifest) if m is not None and m.kind == kind), None)
    if found is None:
        raise ArtifactNotFound(
            f"the {kind} behind {manifest.kind} {manifest.id} is gone", "make it again, or name another"
        )
    return found


def choose_features(
    session: Session, asked: str | None, weights: Path | None, dataset: "Manifest"
) -> "Step | External":
    """The feature network asked for; without a choice Inception if its weights are at hand, else digits, and a note."""
    from fqdiff.pipeline import External, Step
    from fqdiff.store.inception import find_inception, load_inception

    if asked not in (None, "inception", "digits"):
        raise ConfigError(f"unknown features '{asked}'", "one of: inception, digits")
    if asked is None:
        asked = "inception" if weights or find_inception() else "digits"
        reason = "" if asked == "inception" else " (no Inception weights at hand: --inception-weights FILE)"
        session.note(f"features: {asked}{reason}")
    if asked == "inception":
        network = load_inception(weights)
        return External("inception", network.sha256[:16], network)
    return Step("classifier", {"dataset": dataset}, session.settings("classifier", ClassifierConfig, {}))


def fid_text(manifest: "Manifest", value: "FidResult") -> str:
    """The result in words: the number, what it depends on, and how sure the difference is."""
    lines = [
        f"FID {value.features} {value.fid:.3f}  (N = {value.n}, seed {value.seed}, metrics {manifest.id})",
        f"features: {value.features}, {value.dimension} dimensions, sha256 {value.features_sha256[:16]}",
        f"reference: {value.reference}; mean pixel {value.image_mean:+.3f}, reference {value.reference_mean:+.3f}",
    ]
    if value.confidence is not None:
        lines.append(f"mean top-1 confidence of the classifier: {value.confidence:.3f}")
    if value.difference is not None and value.interval is not None:
        low, high = value.interval
        verdict = "not distinguishable at the 95 % level" if low <= 0 <= high else "distinguishable at the 95 % level"
        lines.append(f"mean squared pixel difference to the baseline, same noise: {value.image_error:.2e}")
        lines.append(
            f"difference to the baseline: {value.difference:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]: {verdict}"
        )
    return "\n".join(lines)
