"""One codec per kind: a value into files of a directory, and back. Loaded files are checked before they become a value."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqdiff.configs import ACTIVATION_FORMATS, PREDICTORS, RANGES, ROUNDINGS, SCORES, STRATEGIES, TIMESTEP_WEIGHTS
from fqdiff.errors import ArtifactCorrupt, ConfigError
from fqdiff.evidence.comparison import (
    BASELINE,
    DISTRIBUTION,
    FLOOR,
    MODEL,
    NETWORK,
    PAIRED,
    compared,
    measured,
    model_pairs,
    model_roles,
)
from fqdiff.evidence.decisions import VERDICTS
from fqdiff.evidence.digits import DigitClassifier
from fqdiff.groups import PLACES
from fqdiff.models.registry import build, skip_boundaries
from fqdiff.quant.activations import SCALE, ZERO_POINT, Activation, check_activations, described_activations
from fqdiff.quant.container import SCHEMA, metadata, part_name
from fqdiff.quant.formats import MOST_PHASES, Mixed, PerTensor, get_format, parse_granularity, scales_of
from fqdiff.quant.noise_correction import check_noise_correction, noise_correction_of
from fqdiff.quant.packed import PackedTensor, check_layout, check_values, part_layout, read_bytes, stored_bytes
from fqdiff.quant.phases import phase_count
from fqdiff.quant.timestep_bias import SUFFIX as TIMESTEP_BIAS
from fqdiff.quant.timestep_bias import check_tables
from fqdiff.store.fields import count, items, mapping, number, record, tensor_shape, text
from fqdiff.store.files import JSON_LIMIT, MAKE_AGAIN, read_json, read_tensors, readable, write_tensors
from fqdiff.store.fisher_files import load_fisher, save_fisher
from fqdiff.store.validation import load_validation, save_validation
from fqdiff.values import (
    Budget,
    CalibrationSet,
    Checkpoint,
    ClassifierWeights,
    Comparison,
    Curve,
    Dataset,
    FidResult,
    ModelSpec,
    Phases,
    Plan,
    PlanEntry,
    QuantizedCheckpoint,
    SampleSet,
    model_description,
    predict_noise,
)
from fqdiff.viz.grids import image_grid, png
from fqdiff.viz.plots import loss_curve

GRID_IMAGES = 100
PLAN_SCHEMA = 3
COMPARISON_SCHEMA = 3
PLUGIN = re.compile(r".+ of [^\s]+ [^\s]+")  # a strategy, its distribution and version: fqdiff.planning.plugins
CONSTRAINTS = ("none", "budget", "max-loss-increase", "traffic", "budget and traffic")
LABEL_LIMIT = 65_536


@dataclass(frozen=True)
class Codec:
    """``save(value, directory)`` writes the payload files; ``load(directory)`` reads the value back."""

    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]


def _expect(condition: bool, path: Path, message: str) -> None:
    if not condition:
        raise ArtifactCorrupt(f"{path}: {message}", MAKE_AGAIN)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _expect_names(tensors: Mapping[str, Tensor], path: Path, *names: str) -> None:
    unknown = sorted(tensors.keys() - set(names))
    _expect(not unknown, path, f"unknown tensors {', '.join(unknown[:3])[:100]}")


def _take(tensors: Mapping[str, Tensor], path: Path, name: str, dtype: torch.dtype, ndim: int) -> Tensor:
    found = tensors.get(name)
    if found is None or found.dtype != dtype or found.ndim != ndim or not found.numel():
        got = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise ArtifactCorrupt(f"{path}: '{name}' is {got}; it should be {dtype} of {ndim} axes", MAKE_AGAIN)
    return found


def _check_parameters(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless ``network``, which may be on the meta device, has parameters of just these shapes."""
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters()}
    wrong = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
    if wrong:
        raise ValueError(f"tensors do not fit the architecture: {', '.join(wrong[:3])}")


# --- dataset ---------------------------------------------------------------------------------------------------------


def save_dataset(value: Dataset, directory: Path) -> None:
    tensors = {"images": value.images, "held_out": value.held_out}
    if value.labels is not None:
        tensors["labels"] = value.labels
    write_tensors(directory / "images.safetensors", tensors, {"fqdiff": json.dumps({"name": value.name})})


def load_dataset(directory: Path) -> Dataset:
    path = directory / "images.safetensors"
    tensors, meta = read_tensors(path)
    _expect_names(tensors, path, "images", "labels", "held_out")
    images = _take(tensors, path, "images", torch.uint8, 4)
    held_out = _take(tensors, path, "held_out", torch.bool, 1)
    labels = _take(tensors, path, "labels", torch.int64, 1) if "labels" in tensors else None
    lengths = {len(t) for t in (images, held_out, *([labels] if labels is not None else []))}
    _expect(len(lengths) == 1, path, f"tensors of different lengths {sorted(lengths)}")
    _expect(not held_out.all(), path, "it has no training image")
    _expect(labels is None or 0 <= int(labels.min()) <= int(labels.max()) < LABEL_LIMIT, path, "labels out of range")
    with readable(path, "a data set"):
        return Dataset(text(meta["name"]), images, labels, held_out)


# --- checkpoint ------------------------------------------------------------------------------------------------------


def _model_spec(meta: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The model that a file's metadata describes, which can be built, and whose parameters have ``shapes``."""
    if meta["schema"] != SCHEMA:
        raise ValueError(f"schema {str(meta['schema'])[:20]}; this fqdiff reads schema {SCHEMA}")
    model = mapping(meta["model"])
    spec = ModelSpec(mapping(model["architecture"]), text(model["schedule"]), text(model["prediction"]))
    network = build(spec.architecture, "meta")
    _check_parameters(network, shapes)
    # Used once, so that a setting that is missing or unknown shows here.
    _ = spec.image_shape, spec.noise_schedule(), predict_noise(spec, network)
    return spec


def save_checkpoint(value: Checkpoint, directory: Path) -> None:
    meta = metadata(model_description(value.spec), {})
    write_tensors(directory / "model.safetensors", value.tensors, meta)
    history = {"preview": value.preview}
    if value.loss is not None:
        history["loss"] = value.loss
        (directory / "loss.png").write_bytes(loss_curve(value.loss, "training loss"))
    write_tensors(directory / "history.safetensors", history, {})
    (directory / "samples.png").write_bytes(png(image_grid(value.preview, 8)))


def load_checkpoint(directory: Path) -> Checkpoint:
    path = directory / "model.safetensors"
    tensors, meta = read_tensors(path)
    with readable(path, "a checkpoint"):
        spec = _model_spec(meta, {name: tuple(t.shape) for name, t in tensors.items()})
    for name in tensors:
        weights = _take(tensors, path, name, torch.float32, tensors[name].ndim)
        _expect(bool(torch.isfinite(weights).all()), path, f"'{name}' holds NaN or infinity")
    path = directory / "history.safetensors"
    history, _ = read_tensors(path)
    _expect_names(history, path, "loss", "preview")
    preview = _take(history, path, "preview", torch.uint8, 4)
    _expect(preview.shape[1:] == spec.image_shape, path, f"previews of shape {tuple(preview.shape)}")
    loss = _take(history, path, "loss", torch.float32, 1) if "loss" in history else None
    return Checkpoint(spec, tensors, loss, preview)


# --- plan ------------------------------------------------------------------------------------------------------------


def save_plan(value: Plan, directory: Path) -> None:
    budget = asdict(value.budget) if value.budget is not None else None
    head = {"schema": PLAN_SCHEMA, "strategy": value.strategy, "totals": _totals(value), "budget": budget}
    head |= {"phases": asdict(value.phases)} if value.phases is not None else {}
    head["timestep_weights"] = value.timestep_weights
    head |= {"activations": dict(value.activations)} if value.activations else {}
    # One line per entry: what was considered stays on it, and a large model's plan within what is read as JSON.
    lines = ",\n".join(json.dumps(asdict(e), allow_nan=False) for e in value.entries)
    content = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + f',\n "entries": [\n{lines}\n]}}\n'
    if len(content) > JSON_LIMIT:
        raise ConfigError(
            f"a plan of {len(content):,} bytes of JSON is more than the {JSON_LIMIT:,} that are read",
            "give fewer formats to choose from",
        )
    (directory / "plan.json").write_text(content)


def _totals(plan: Plan) -> dict[str, int | float]:
    return {"file_bytes": plan.file_bytes, "parameters": plan.parameters, "bits_per_weight": plan.bits_per_weight}


def load_plan(directory: Path) -> Plan:
    path = directory / "plan.json"
    with readable(path, "a plan"):
        data = mapping(read_json(path))
        if data["schema"] != PLAN_SCHEMA:
            raise ValueError(f"schema {str(data['schema'])[:20]}; this fqdiff reads schema {PLAN_SCHEMA}")
        entries = tuple(_plan_entry(e) for e in items(data["entries"]))
        budget = record(Budget, data["budget"]) if data["budget"] is not None else None
        phases = record(Phases, data["phases"]) if "phases" in data else None
        weights = text(data.get("timestep_weights", "uniform"))  # which plans of earlier versions lack
        if re.fullmatch(r"uniform|at:[0-9]{1,9}", weights, re.ASCII) is None:
            raise ValueError(f"its timesteps are weighted by '{weights[:20]}'")
        activations = {site: text(name) for site, name in mapping(data.get("activations", {})).items()}
        if not set(activations.values()) <= set(ACTIVATION_FORMATS):
            raise ValueError("it has activations in an unknown format")
        totals = mapping(data["totals"])
        size = count(totals["file_bytes"])
        value = Plan(text(data["strategy"]), entries, size, budget, phases, weights, activations)
        if not entries or len({e.parameter for e in entries}) < len(entries):
            raise ValueError("it has no entries, or several for one parameter")
        if value.file_bytes < sum(e.bytes for e in entries):
            raise ValueError(f"its file of {value.file_bytes} bytes is smaller than its entries")
        if totals != _totals(value):
            raise ValueError("its totals are not those of its entries")
        _check_strategy(value)
        _check_budget(budget, value)
        _check_phases(value)
        return value


def _check_phases(plan: Plan) -> None:
    described = [(e.shape, get_format(e.format), parse_granularity(e.granularity)) for e in plan.entries]
    counts = {len(fmt.phase_bits) for _, fmt, _ in described if fmt.phase_bits}
    facts = plan.phases
    if facts is None and not counts:
        return
    if facts is None or plan.budget is None or not counts <= {facts.count} or not 1 < facts.count <= MOST_PHASES:
        raise ValueError(f"its tensors have {sorted(counts)} phases, and it speaks of {facts and facts.count}")
    read = sum(read_bytes(*each) for each in described)
    if abs(read - facts.read_bytes) > 1e-6 * read or (facts.traffic_bytes is not None and read > facts.traffic_bytes):
        raise ValueError(f"a timestep reads {read:.0f} bytes; it says {facts.read_bytes:.0f}, or they are too many")
    if facts.single_predicted < 0:
        raise ValueError("it predicts something less than 0")


def _check_strategy(plan: Plan) -> None:
    if plan.strategy not in STRATEGIES and PLUGIN.fullmatch(plan.strategy) is None:
        raise ValueError(f"its strategy is '{plan.strategy[:50]}'")
    if (plan.strategy == "budget") != (plan.budget is not None):
        raise ValueError(f"it is by {plan.strategy[:50]}, and {'has' if plan.budget is not None else 'lacks'} a budget")
    for e in plan.entries:
        weighed = e.predicted is not None and e.constraint is not None and bool(e.alternatives)
        told = e.predicted is not None or e.constraint is not None or bool(e.alternatives)
        if plan.budget is None and told:
            raise ValueError(f"'{e.parameter}' was weighed against others, and there is no budget")
        if plan.budget is not None and (not weighed or e.threshold is not None):
            raise ValueError(f"'{e.parameter}' was not weighed against others, and there is a budget")


def _check_budget(budget: Budget | None, plan: Plan) -> None:
    # What a tensor does beside others may be good: only with cross terms can a prediction be less than 0.
    gram = budget is not None and budget.predictor == "gram"
    if not gram and any(a.predicted < 0 for e in plan.entries for a in e.alternatives):
        raise ValueError("it predicts something less than 0")
    if budget is None:
        return
    if budget.predictor not in PREDICTORS:
        raise ValueError(f"its predictor is '{budget.predictor[:20]}'")
    if budget.score not in SCORES or TIMESTEP_WEIGHTS.fullmatch(budget.timestep_weights) is None:
        raise ValueError(f"its score is '{budget.score[:20]}', timesteps weighted by '{budget.timestep_weights[:20]}'")
    if budget.constraint not in CONSTRAINTS or any(
        e.constraint not in ("none", budget.constraint) for e in plan.entries
    ):
        raise ValueError(f"its constraint is '{budget.constraint[:20]}', or entries name another one")
    if (budget.swaps is None) == gram or (budget.diagonal is None) == gram or (budget.lower_bound is None) != gram:
        raise ValueError(f"its search does not fit the predictor {budget.predictor}")
    if (budget.measured is None) != (budget.evaluations == 0) or (budget.measured or 0.0) < 0:
        raise ValueError(f"{budget.evaluations} plans were measured, the best as {budget.measured}")
    if (budget.target_bytes is None) == (budget.max_loss_increase is None):
        raise ValueError("its budget has no target, or two")
    if budget.target_bytes is not None and plan.file_bytes > budget.target_bytes:
        raise ValueError(f"its file of {plan.file_bytes} bytes is over its budget of {budget.target_bytes}")
    predicted = sum(e.predicted or 0.0 for e in plan.entries)
    if abs(predicted - budget.predicted) > 1e-6 * abs(predicted):
        raise ValueError(f"its entries are predicted {predicted:g}, the whole {budget.predicted:g}")
    if budget.max_loss_increase is not None and predicted > budget.max_loss_increase * (1 + 1e-6):
        raise ValueError(f"it is predicted {predicted:g}, over its limit of {budget.max_loss_increase:g}")
    reached = predicted if budget.max_loss_increase is None else plan.file_bytes
    if budget.lower_bound is not None and not 0 <= budget.lower_bound <= reached * (1 + 1e-6):
        raise ValueError(f"it reaches {reached:g}, below its lower bound of {budget.lower_bound:g}")


def _plan_entry(data: Any) -> PlanEntry:
    entry = record(PlanEntry, data)
    fmt, granularity = get_format(entry.format), parse_granularity(entry.granularity)
    if fmt.is_cast and scales_of(granularity) != PerTensor():
        raise ValueError(f"'{entry.parameter}' is {fmt.name}, which has no scales, by {granularity}")
    if entry.block not in PLACES or (entry.score or 0.0) < 0:
        raise ValueError(f"'{entry.parameter}' is in block {entry.block[:20]}, with a Fisher value of {entry.score}")
    if entry.range not in RANGES or entry.rounding not in ROUNDINGS:
        raise ValueError(f"'{entry.parameter}' has range {entry.range[:20]} and rounding {entry.rounding[:20]}")
    size = stored_bytes(entry.shape, fmt, granularity)
    if entry.bytes != size:
        raise ValueError(f"'{entry.parameter}' takes {size} bytes, not {entry.bytes}")
    ways = [(get_format(a.format).name, str(parse_granularity(a.granularity))) for a in entry.alternatives]
    if len(set(ways)) < len(ways) or any(a.range not in RANGES for a in entry.alternatives):
        raise ValueError(f"the alternatives of '{entry.parameter}' name a way twice, or an unknown range")
    own = [
        (a.range, a.bytes, a.predicted)
        for a, way in zip(entry.alternatives, ways, strict=True)
        if way == (entry.format, entry.granularity)
    ]
    if entry.alternatives and own != [(entry.range, entry.bytes, entry.predicted)]:
        raise ValueError(f"'{entry.parameter}' is not what it says of {entry.format}")
    return entry


# --- calibration -----------------------------------------------------------------------------------------------------


def save_calibration(value: CalibrationSet, directory: Path) -> None:
    facts = {"schema": 1, "model": value.model, "num_train_timesteps": value.num_train_timesteps}
    tensors = {"x_t": value.x_t, "t": value.t}
    write_tensors(directory / "calibration.safetensors", tensors, {"fqdiff": json.dumps(facts, sort_keys=True)})


def load_calibration(directory: Path) -> CalibrationSet:
    path = directory / "calibration.safetensors"
    tensors, facts = read_tensors(path)
    with readable(path, "a calibration set"):
        if facts["schema"] != 1:
            raise ValueError(f"schema {str(facts['schema'])[:20]}; this fqdiff reads schema 1")
        model, total = text(facts["model"]), count(facts["num_train_timesteps"])
    _expect_names(tensors, path, "x_t", "t")
    half = "x_t" in tensors and tensors["x_t"].dtype == torch.float16
    x_t = _take(tensors, path, "x_t", torch.float16 if half else torch.float32, 4)
    t = _take(tensors, path, "t", torch.int64, 1)
    _expect(len(t) == len(x_t), path, f"{len(x_t)} inputs with {len(t)} timesteps")
    _expect(0 <= int(t.min()) <= int(t.max()) < total, path, f"timesteps beyond the model's {total}")
    _expect(bool(torch.isfinite(x_t).all()), path, "inputs that are no numbers")
    return CalibrationSet(x_t, t, model, total)


# --- quantized -------------------------------------------------------------------------------------------------------


def save_quantized(value: QuantizedCheckpoint, directory: Path) -> None:
    write_model(value, directory / "model.safetensors")


def load_quantized(directory: Path) -> QuantizedCheckpoint:
    return read_model(directory / "model.safetensors")


def write_model(value: QuantizedCheckpoint, path: Path) -> None:
    """The model file that :func:`read_model` reads; equal values give equal bytes."""
    tensors = {part_name(name, part): t for name, p in value.packed.items() for part, t in p.parts.items()}
    tensors |= {layer + TIMESTEP_BIAS: table for layer, table in value.timestep_bias.items()}
    tensors |= {site + suffix: t for site, a in value.activations.items() for suffix, t in a.tensors.items()}
    tensors |= value.noise_correction.tensors if value.noise_correction is not None else {}
    write_tensors(path, tensors, quantized_metadata(value))


def quantized_metadata(value: QuantizedCheckpoint) -> dict[str, str]:
    """What the header of ``value``'s file says beside its tensors."""
    return metadata(model_description(value.spec), value.described, described_activations(value.activations))


def read_model(path: Path, hint: str = MAKE_AGAIN) -> QuantizedCheckpoint:
    """The model in a file of casts and scaled tensors, everything in it checked. Raises ArtifactCorrupt."""
    tensors, meta = read_tensors(path, hint)
    with readable(path, "a model", hint):
        packed = {name: _packed_tensor(name, facts, tensors) for name, facts in mapping(meta["quantized"]).items()}
        tables = {
            name.removesuffix(TIMESTEP_BIAS): tensors.pop(name) for name in [*tensors] if name.endswith(TIMESTEP_BIAS)
        }
        activations = _activations(items(meta.get("activations", [])), tensors)
        correction = noise_correction_of(tensors)
        for name in correction.tensors if correction is not None else ():
            tensors.pop(name)
        casts = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        for name, tensor in tensors.items():
            if tensor.dtype not in casts or name in packed:
                raise ValueError(f"'{name}' is {tensor.dtype}, and no format says how to read it")
            fmt = get_format(casts[tensor.dtype])
            packed[name] = PackedTensor(fmt, PerTensor(), tuple(tensor.shape), {"data": tensor})
        spec = _model_spec(meta, {name: p.shape for name, p in packed.items()})
        network, total = build(spec.architecture, "meta"), spec.noise_schedule().num_train_timesteps
        phase_count((p.format for p in packed.values()), total)
        check_tables(network, tables, total)
        check_activations(network, activations, total, skip_boundaries(network))
        if correction is not None:
            check_noise_correction(network, correction, total)
        return QuantizedCheckpoint(spec, packed, tables, activations, correction)


def _activations(described: list[Any], tensors: dict[str, Tensor]) -> dict[str, Activation]:
    """The activations that ``described`` lists; their scales are taken out of ``tensors``."""
    found: dict[str, Activation] = {}
    for each in described:
        given = mapping(each)
        if given.keys() != {"format", "granularity", "dynamic", "sites"} or type(given["dynamic"]) is not bool:
            raise ValueError("activations are described by format, granularity, dynamic and sites")
        for site in map(text, items(given["sites"])):
            if site in found:
                raise ValueError(f"the activation of '{site[:100]}' is described twice")
            scale = None if given["dynamic"] else tensors.pop(site + SCALE)
            zero_point = None if given["dynamic"] else tensors.pop(site + ZERO_POINT, None)
            found[site] = Activation(text(given["format"]), text(given["granularity"]), scale, zero_point)
    return found


def _packed_tensor(name: str, facts: Any, tensors: dict[str, Tensor]) -> PackedTensor:
    """The scaled tensor that ``facts`` describe; its parts are taken out of ``tensors``."""
    given = mapping(facts)
    fmt, granularity = get_format(text(given["format"])), parse_granularity(text(given["granularity"]))
    shape = tensor_shape(given["shape"])
    mere_cast = fmt.is_cast and not isinstance(granularity, Mixed)
    if mere_cast or given.keys() != {"format", "granularity", "shape"}:
        raise ValueError(f"'{name}' is described as {fmt.name} by {len(given)} fields")
    parts = {part: tensors.pop(part_name(name, part)) for part in part_layout(shape, fmt, granularity)}
    packed = PackedTensor(fmt, granularity, shape, parts)
    check_layout(packed)
    check_values(packed)
    return packed


# --- samples, features, metrics --------------------------------------------------------------------------------------


def save_samples(value: SampleSet, directory: Path) -> None:
    tensors = {"images": value.images, "seeds": value.image_seeds}
    write_tensors(directory / "samples.safetensors", tensors, {})
    (directory / "samples.png").write_bytes(png(image_grid(value.images[:GRID_IMAGES], 10)))


def load_samples(directory: Path) -> SampleSet:
    path = directory / "samples.safetensors"
    tensors, _ = read_tensors(path)
    _expect_names(tensors, path, "images", "seeds")
    images = _take(tensors, path, "images", torch.uint8, 4)
    seeds = _take(tensors, path, "seeds", torch.int64, 2)
    value = SampleSet(images, int(seeds[0, 0]) if seeds.numel() else 0)
    _expect(torch.equal(seeds, value.image_seeds), path, "its seeds are not those of one seed, image by image")
    return value


def save_features(value: ClassifierWeights, directory: Path) -> None:
    facts = {k: v for k, v in asdict(value).items() if k != "tensors"}
    write_tensors(directory / "classifier.safetensors", value.tensors, {"fqdiff": json.dumps(facts, sort_keys=True)})


def load_features(directory: Path) -> ClassifierWeights:
    path = directory / "classifier.safetensors"
    tensors, facts = read_tensors(path)
    with readable(path, "a classifier"):
        channels, size, width = (count(n) for n in items(facts["image_shape"]))
        classes = count(facts["classes"])
        if size != width or not (channels and size and 0 < classes <= LABEL_LIMIT):
            raise ValueError(f"images of {size} x {width} pixels in {classes} classes")
        for name in tensors:
            _take(tensors, path, name, torch.float32, tensors[name].ndim)
        with torch.device("meta"):
            network = DigitClassifier(channels, size, classes)
        _check_parameters(network, {name: tuple(t.shape) for name, t in tensors.items()})
        shares = number(facts["accuracy"]), number(facts["confidence"])
        return ClassifierWeights(text(facts["dataset"]), classes, (channels, size, width), tensors, *shares)


def save_metrics(value: FidResult, directory: Path) -> None:
    _write_json(directory / "metrics.json", asdict(value))


def load_metrics(directory: Path) -> FidResult:
    path = directory / "metrics.json"
    with readable(path, "a FID result"):
        value = record(FidResult, read_json(path))
        places = [(m.metric, m.of) for m in value.measures]
        known = {(metric, of) for metric in DISTRIBUTION for of in (MODEL, BASELINE)}
        if len(set(places)) < len(places) or not known >= set(places):
            raise ValueError("it measures something twice, or something unknown")
        if any(not m.low <= m.value <= m.high or m.standard_error < 0 for m in value.measures):
            raise ValueError("a value is outside of its interval")
        if ("fid", MODEL) not in places or value.measure("fid").value != value.fid:
            raise ValueError("its FID is not the one that it measured")
        return value


def save_comparison(value: Comparison, directory: Path) -> None:
    _write_json(directory / "comparison.json", {"schema": COMPARISON_SCHEMA, **asdict(value)})


def load_comparison(directory: Path) -> Comparison:
    path = directory / "comparison.json"
    with readable(path, "a comparison"):
        data = dict(mapping(read_json(path)))
        if data.pop("schema", None) != COMPARISON_SCHEMA:
            raise ValueError(f"it is not of schema {COMPARISON_SCHEMA}, which this fqdiff reads")
        value = record(Comparison, data)
        _check_comparison(value)
        return value


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


CODECS: Mapping[str, Codec] = {
    "dataset": Codec(save_dataset, load_dataset),
    "checkpoint": Codec(save_checkpoint, load_checkpoint),
    "fisher": Codec(save_fisher, load_fisher),
    "validation": Codec(save_validation, load_validation),
    "plan": Codec(save_plan, load_plan),
    "calibration": Codec(save_calibration, load_calibration),
    "quantized": Codec(save_quantized, load_quantized),
    "samples": Codec(save_samples, load_samples),
    "features": Codec(save_features, load_features),
    "metrics": Codec(save_metrics, load_metrics),
    "comparison": Codec(save_comparison, load_comparison),
}
