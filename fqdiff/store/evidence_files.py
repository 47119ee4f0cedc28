"""The files of samples, feature networks, metrics and comparisons. Loaded, all are checked."""

import json
from collections.abc import Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fqdiff.evidence.comparison import (
    BASELINE,
    DISTRIBUTION,
    FLOOR,
    MODEL,
    NETWORK,
    PAIRED,
    Measure,
    compared,
    measured,
    model_pairs,
    model_roles,
)
from fqdiff.evidence.decisions import VERDICTS
from fqdiff.evidence.digits import DigitClassifier
from fqdiff.store.fields import count, items, mapping, number, record, text
from fqdiff.store.files import read_json, read_tensors, readable, write_tensors
from fqdiff.store.payload import LABEL_LIMIT, check_parameters, expect, expect_names, take, write_json
from fqdiff.values import (
    ClassifierWeights,
    Comparison,
    Curve,
    FidResult,
    SampleSet,
)
from fqdiff.viz.grids import image_grid, png

COMPARISON_SCHEMA = 3
WITHOUT_BLOCKS: dict[str, Any] = {"kid_blocks": []}  # metrics and comparisons that were made before there were any
GRID_IMAGES = 100


def save_samples(value: SampleSet, directory: Path) -> None:
    """``samples.safetensors``, and the first images as ``samples.png``."""
    tensors = {"images": value.images, "seeds": value.image_seeds}
    write_tensors(directory / "samples.safetensors", tensors, {})
    (directory / "samples.png").write_bytes(png(image_grid(value.images[:GRID_IMAGES], 10)))


def load_samples(directory: Path) -> SampleSet:
    """Images, numbered by the seeds that they were made from."""
    path = directory / "samples.safetensors"
    tensors, _ = read_tensors(path)
    expect_names(tensors, path, "images", "seeds")
    images = take(tensors, path, "images", torch.uint8, 4)
    seeds = take(tensors, path, "seeds", torch.int64, 2)
    value = SampleSet(images, int(seeds[0, 0]) if seeds.numel() else 0)
    expect(torch.equal(seeds, value.image_seeds), path, "its seeds are not those of one seed, image by image")
    return value


def save_features(value: ClassifierWeights, directory: Path) -> None:
    """``classifier.safetensors``."""
    facts = {k: v for k, v in asdict(value).items() if k != "tensors"}
    write_tensors(directory / "classifier.safetensors", value.tensors, {"fqdiff": json.dumps(facts, sort_keys=True)})


def load_features(directory: Path) -> ClassifierWeights:
    """The classifier whose layer gives the features."""
    path = directory / "classifier.safetensors"
    tensors, facts = read_tensors(path)
    with readable(path, "a classifier"):
        channels, size, width = (count(n) for n in items(facts["image_shape"]))
        classes = count(facts["classes"])
        if size != width or not (channels and size and 0 < classes <= LABEL_LIMIT):
            raise ValueError(f"images of {size} x {width} pixels in {classes} classes")
        for name in tensors:
            take(tensors, path, name, torch.float32, tensors[name].ndim)
        with torch.device("meta"):
            network = DigitClassifier(channels, size, classes)
        check_parameters(network, {name: tuple(t.shape) for name, t in tensors.items()})
        shares = number(facts["accuracy"]), number(facts["confidence"])
        return ClassifierWeights(text(facts["dataset"]), classes, (channels, size, width), tensors, *shares)


def save_metrics(value: FidResult, directory: Path) -> None:
    """``metrics.json``."""
    write_json(directory / "metrics.json", asdict(value))


def load_metrics(directory: Path) -> FidResult:
    """A FID with the metrics beside it."""
    path = directory / "metrics.json"
    with readable(path, "a FID result"):
        value = record(FidResult, WITHOUT_BLOCKS | dict(mapping(read_json(path))))
        places = [(m.metric, m.of) for m in value.measures]
        known = {(metric, of) for metric in DISTRIBUTION for of in (MODEL, BASELINE)}
        if len(set(places)) < len(places) or not known >= set(places):
            raise ValueError("it measures something twice, or something unknown")
        if any(not m.low <= m.value <= m.high or m.standard_error < 0 for m in value.measures):
            raise ValueError("a value is outside of its interval")
        if ("fid", MODEL) not in places or value.measure("fid").value != value.fid:
            raise ValueError("its FID is not the one that it measured")
        _check_blocks(value.kid_blocks, {MODEL, BASELINE})
        return value


def save_comparison(value: Comparison, directory: Path) -> None:
    """``comparison.json``."""
    write_json(directory / "comparison.json", {"schema": COMPARISON_SCHEMA, **asdict(value)})


def load_comparison(directory: Path) -> Comparison:
    """A comparison: every role and pair that there has to be, and no other."""
    path = directory / "comparison.json"
    with readable(path, "a comparison"):
        data = dict(mapping(read_json(path)))
        if data.pop("schema", None) != COMPARISON_SCHEMA:
            raise ValueError(f"it is not of schema {COMPARISON_SCHEMA}, which this fqdiff reads")
        value = record(Comparison, WITHOUT_BLOCKS | data)
        _check_comparison(value)
        return value


def _check_blocks(blocks: Sequence[Measure], roles: Set[str]) -> None:
    named = [m.of for m in blocks]
    if any(m.metric != "kid_blocks" or not m.low <= m.value <= m.high or m.standard_error < 0 for m in blocks):
        raise ValueError("its blocks measure something else, or a value is outside of its interval")
    if len(set(named)) < len(named) or not roles >= set(named):
        raise ValueError(f"it has blocks of {', '.join(named)[:100]}")


def _check_comparison(value: Comparison) -> None:
    metrics = [metric for metric in (*PAIRED, *DISTRIBUTION) if any(m.metric == metric for m in value.measures)]
    if metrics not in ([*PAIRED, *DISTRIBUTION], [*PAIRED, *DISTRIBUTION[:-1]]):
        raise ValueError(f"it has the metrics {', '.join(metrics)}")
    if not 1 <= value.models <= len(value.measures) or not 0.5 <= value.level < 1:
        raise ValueError(f"it has {value.models} models, and a level of {value.level}")
    floor = value.floor_seed is not None
    measures = [(metric, role) for metric in metrics for role in measured(metric, value.models, floor)]
    if sorted((m.metric, m.of) for m in value.measures) != sorted(measures):
        raise ValueError("it lacks a measure, or has one too many")
    if any(d.verdict not in VERDICTS or not 0 <= d.p <= d.adjusted_p <= 1 for d in value.differences):
        raise ValueError("it has a verdict or a p-value that cannot be")
    roles = model_roles(value.models)
    _check_blocks(value.kid_blocks, {BASELINE, *roles, *([FLOOR] if floor else [])})
    for curves in (value.noise_error, value.divergence):
        named = [curve.of for curve in curves]
        if named != [role for role in roles if role in named]:
            raise ValueError(f"it has curves of {', '.join(named)[:100]}")
        if len({tuple((p.at, p.weight) for p in curve.points) for curve in curves}) > 1:
            raise ValueError("its curves have points of their own")
        for curve in curves:
            _check_curve(curve)
    pairs = [(metric, *pair) for metric in metrics for pair in compared(metric, value.models)]
    pairs += [(metric, FLOOR, BASELINE) for metric in metrics if floor and metric not in PAIRED]
    for metric, curves in zip(NETWORK, (value.noise_error, value.divergence), strict=True):
        pairs += [(metric, *pair) for pair in model_pairs([curve.of for curve in curves])]
    if sorted((d.metric, d.of, d.against) for d in value.differences) != sorted(pairs):
        raise ValueError("it lacks a difference, or has one too many")
    if bool(value.divergence) != bool(value.sampler):
        raise ValueError(f"it has {len(value.divergence)} sampler runs, of the sampler '{value.sampler[:50]}'")


def _check_curve(curve: Curve) -> None:
    at = [point.at for point in curve.points]
    if not at or at != sorted(set(at)) or min(min(p.value, p.standard_error, p.weight) for p in curve.points) < 0:
        raise ValueError(f"the curve of {curve.of} has no points, not in order, or below 0")
    mean, whole = sum(p.weight * p.value for p in curve.points), sum(p.weight for p in curve.points)
    if abs(mean - curve.mean) > 1e-6 * mean or abs(whole - 1) > 1e-6 or curve.samples < 2:
        raise ValueError(f"the mean of the curve of {curve.of} is not that of its points")
