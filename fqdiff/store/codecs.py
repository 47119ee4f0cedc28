"""One codec per kind: a value into files of a directory, and back. Loaded files are checked before they become a value."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from fqdiff.errors import ArtifactCorrupt
from fqdiff.evidence.digits import DigitClassifier
from fqdiff.models.registry import build
from fqdiff.quant.container import SCHEMA, metadata, part_name
from fqdiff.quant.formats import PerTensor, get_format, parse_granularity
from fqdiff.quant.packed import PackedTensor, part_layout, stored_bytes
from fqdiff.store.fields import count, items, mapping, number, record, tensor_shape, text
from fqdiff.store.files import MAKE_AGAIN, parse_json, plain_size, read_json, read_tensors, readable, write_tensors
from fqdiff.store.parquet import unpacked_size
from fqdiff.store.validation import load_validation, save_validation
from fqdiff.values import (
    Checkpoint,
    ClassifierWeights,
    Dataset,
    FidResult,
    FisherEntry,
    FisherTable,
    ModelSpec,
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
    write_tensors(directory / "history.safetensors", {"loss": value.loss, "preview": value.preview}, {})
    (directory / "loss.png").write_bytes(loss_curve(value.loss, "training loss"))
    (directory / "samples.png").write_bytes(png(image_grid(value.preview, 8)))


def load_checkpoint(directory: Path) -> Checkpoint:
    path = directory / "model.safetensors"
    tensors, meta = read_tensors(path)
    with readable(path, "a checkpoint"):
        spec = _model_spec(meta, {name: tuple(t.shape) for name, t in tensors.items()})
    for name in tensors:
        _take(tensors, path, name, torch.float32, tensors[name].ndim)
    path = directory / "history.safetensors"
    history, _ = read_tensors(path)
    _expect_names(history, path, "loss", "preview")
    preview = _take(history, path, "preview", torch.uint8, 4)
    _expect(preview.shape[1:] == spec.image_shape, path, f"previews of shape {tuple(preview.shape)}")
    return Checkpoint(spec, tensors, _take(history, path, "loss", torch.float32, 1), preview)


# --- fisher ----------------------------------------------------------------------------------------------------------

FISHER_SCHEMA = pa.schema(
    [
        ("tensor_id", pa.int16()),
        ("timestep", pa.int16()),
        ("tensor", pa.string()),
        ("block", pa.string()),
        ("n_samples", pa.int32()),
        ("numel", pa.int64()),
        ("mean", pa.float64()),
        ("standard_error", pa.float64()),
        ("sum", pa.float64()),
        ("max", pa.float64()),
        ("channel", pa.list_(pa.field("element", pa.float32()))),
    ]
)
NAMES = ("tensor", "block")  # read as dictionaries: they then take the space that they take in the file
FISHER_READ_SCHEMA = pa.schema(
    [f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in NAMES else f for f in FISHER_SCHEMA]
)


def save_fisher(value: FisherTable, directory: Path) -> None:
    """One row per (tensor, timestep), sorted so; ``channel`` holds the mean of each output channel."""
    tables = []
    for tensor_id, (name, entry) in enumerate(value.entries.items()):
        count = len(value.timesteps)
        columns = {
            "tensor_id": pa.array([tensor_id] * count, pa.int16()),
            "timestep": pa.array(value.timesteps.numpy(), pa.int16()),
            "tensor": pa.array([name] * count),
            "block": pa.array([entry.block] * count),
            "n_samples": pa.array([value.samples] * count, pa.int32()),
            "numel": pa.array([entry.numel] * count, pa.int64()),
            "mean": pa.array(entry.mean.numpy()),
            "standard_error": pa.array(entry.standard_error.numpy()),
            "sum": pa.array((entry.mean * entry.numel).numpy()),
            "max": pa.array(entry.maximum.numpy()),
            "channel": pa.array(list(entry.channel.float().numpy()), FISHER_SCHEMA.field("channel").type),
        }
        tables.append(pa.table(columns, schema=FISHER_SCHEMA))
    facts = {
        "fqdiff": json.dumps({"schema": 1, "kind": value.kind, "loss": "1/2 * sum over pixels (noise - eps_pred)^2"})
    }
    pq.write_table(
        pa.concat_tables(tables).replace_schema_metadata(facts),
        directory / "fisher.parquet",
        compression="zstd",
        use_dictionary=list(NAMES),
        column_encoding={"channel.list.element": "BYTE_STREAM_SPLIT"},
        row_group_size=1000,
    )


def load_fisher(directory: Path) -> FisherTable:
    path = directory / "fisher.parquet"
    size = plain_size(path)
    with readable(path, "a Fisher table"):
        # Real tables hardly shrink: nearly all of their cells are measured numbers, whose bits look random.
        cells, unpacked = unpacked_size(path)
        if cells > max(size, 2**24) or unpacked > max(8 * size, 2**27):
            raise ValueError(f"{size} bytes that unpack to {cells} cells of {unpacked} bytes")
        file = pq.ParquetFile(path, memory_map=False, read_dictionary=list(NAMES))
        kind = text(mapping(parse_json(file.metadata.metadata[b"fqdiff"]))["kind"])
        return _fisher_table(kind, file.read())


def _fisher_table(kind: str, table: pa.Table) -> FisherTable:
    """The value in ``table``. Raises ValueError where it is not what :func:`save_fisher` wrote."""
    if not table.schema.equals(FISHER_READ_SCHEMA) or not table.num_rows or any(c.null_count for c in table.columns):
        raise ValueError("it has other columns, no rows, or empty cells")
    names, blocks = (table[key].unify_dictionaries().combine_chunks() for key in NAMES)
    tensor = names.indices.to_numpy()
    starts = np.flatnonzero(np.diff(tensor, prepend=-1))
    steps = table.num_rows // len(starts)

    def rows(values: Any) -> Any:
        """[tensors, timesteps]: one row of numbers for each tensor."""
        return np.asarray(values).reshape(len(starts), steps)

    per_tensor = {key: rows(table[key]) for key in ("tensor_id", "n_samples", "numel")} | {
        "block": rows(blocks.indices)
    }
    if (rows(tensor) != tensor[starts, None]).any() or any((v != v[:, :1]).any() for v in per_tensor.values()):
        raise ValueError("its rows are not sorted by tensor")
    timesteps = rows(table["timestep"]).astype(np.int64)
    if (timesteps != timesteps[0]).any() or (np.diff(timesteps[0], prepend=-1) <= 0).any():
        raise ValueError("its timesteps do not rise, or differ between tensors")
    samples = per_tensor["n_samples"]
    if (samples != samples[0, 0]).any() or samples[0, 0] < 1 or (per_tensor["numel"] < 1).any():
        raise ValueError("its counts are not positive, or differ between tensors")
    numbers = {key: torch.tensor(rows(table[key])) for key in ("mean", "standard_error", "max")}
    order = [text(names.dictionary[int(tensor[start])].as_py()) for start in starts]
    if len(set(order)) < len(order):
        raise ValueError("a tensor appears twice")
    entries = {}
    for i, name in enumerate(order):
        cells = table["channel"].slice(i * steps, steps).combine_chunks()
        channels = int(cells.value_lengths()[0].as_py())
        if cells.flatten().null_count or not channels or (np.asarray(cells.value_lengths()) != channels).any():
            raise ValueError(f"channels of '{name}' differ in number, or are missing")
        channel = torch.tensor(np.asarray(cells.flatten())).double().view(steps, channels)
        values = [numbers[key][i] for key in ("mean", "standard_error", "max")] + [channel]
        if not all(torch.isfinite(v).all() and (v >= 0).all() for v in values):
            raise ValueError(f"a value of '{name}' is negative or not finite")
        block = text(blocks.dictionary[int(per_tensor["block"][i, 0])].as_py())
        entries[name] = FisherEntry(block, int(per_tensor["numel"][i, 0]), *values)
    return FisherTable(kind, torch.tensor(timesteps[0]), int(samples[0, 0]), entries)


# --- plan ------------------------------------------------------------------------------------------------------------


def save_plan(value: Plan, directory: Path) -> None:
    totals = {"file_bytes": value.file_bytes, "parameters": value.parameters, "bits_per_weight": value.bits_per_weight}
    entries = [asdict(e) for e in value.entries]
    _write_json(
        directory / "plan.json", {"schema": 1, "strategy": value.strategy, "totals": totals, "entries": entries}
    )


def load_plan(directory: Path) -> Plan:
    path = directory / "plan.json"
    with readable(path, "a plan"):
        data = mapping(read_json(path))
        if data["schema"] != 1:
            raise ValueError(f"schema {str(data['schema'])[:20]}; this fqdiff reads schema 1")
        entries = tuple(_plan_entry(e) for e in items(data["entries"]))
        value = Plan(text(data["strategy"]), entries, count(mapping(data["totals"])["file_bytes"]))
        if not entries or len({e.parameter for e in entries}) < len(entries):
            raise ValueError("it has no entries, or several for one parameter")
        if value.file_bytes < sum(e.bytes for e in entries):
            raise ValueError(f"its file of {value.file_bytes} bytes is smaller than its entries")
        return value


def _plan_entry(data: Any) -> PlanEntry:
    entry = record(PlanEntry, data)
    size = stored_bytes(entry.shape, get_format(entry.format), parse_granularity(entry.granularity))
    if entry.bytes != size:
        raise ValueError(f"'{entry.parameter}' takes {size} bytes, not {entry.bytes}")
    return entry


# --- quantized -------------------------------------------------------------------------------------------------------


def save_quantized(value: QuantizedCheckpoint, directory: Path) -> None:
    described = {name: (p.shape, p.format, p.granularity) for name, p in value.packed.items()}
    tensors = {part_name(name, part): t for name, p in value.packed.items() for part, t in p.parts.items()}
    write_tensors(directory / "model.safetensors", tensors, metadata(model_description(value.spec), described))


def load_quantized(directory: Path) -> QuantizedCheckpoint:
    path = directory / "model.safetensors"
    tensors, meta = read_tensors(path)
    with readable(path, "a quantized model"):
        packed = {name: _packed_tensor(name, facts, tensors) for name, facts in mapping(meta["quantized"]).items()}
        casts = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        for name, tensor in tensors.items():
            if tensor.dtype not in casts or name in packed:
                raise ValueError(f"'{name}' is {tensor.dtype}, and no format says how to read it")
            fmt = get_format(casts[tensor.dtype])
            packed[name] = PackedTensor(fmt, PerTensor(), tuple(tensor.shape), {"data": tensor})
        return QuantizedCheckpoint(_model_spec(meta, {name: p.shape for name, p in packed.items()}), packed)


def _packed_tensor(name: str, facts: Any, tensors: dict[str, Tensor]) -> PackedTensor:
    """The integer tensor that ``facts`` describe; its parts are taken out of ``tensors``."""
    given = mapping(facts)
    fmt, granularity = get_format(text(given["format"])), parse_granularity(text(given["granularity"]))
    shape = tensor_shape(given["shape"])
    layout = part_layout(shape, fmt, granularity)
    parts = {part: tensors.pop(part_name(name, part)) for part in layout}
    if not fmt.is_integer or {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} != layout:
        raise ValueError(f"the stored parts of '{name}' are not those of {fmt.name} of shape {shape}")
    return PackedTensor(fmt, granularity, shape, parts)


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
        return record(FidResult, read_json(path))


CODECS: Mapping[str, Codec] = {
    "dataset": Codec(save_dataset, load_dataset),
    "checkpoint": Codec(save_checkpoint, load_checkpoint),
    "fisher": Codec(save_fisher, load_fisher),
    "validation": Codec(save_validation, load_validation),
    "plan": Codec(save_plan, load_plan),
    "quantized": Codec(save_quantized, load_quantized),
    "samples": Codec(save_samples, load_samples),
    "features": Codec(save_features, load_features),
    "metrics": Codec(save_metrics, load_metrics),
}
