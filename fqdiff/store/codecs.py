"""One codec per kind: a value into files of a directory, and back. Loaded files are checked before they become a value."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fqdiff.errors import ArtifactCorrupt, FqdiffError
from fqdiff.quant.container import metadata, part_name
from fqdiff.quant.formats import PerTensor, get_format, parse_granularity
from fqdiff.quant.packed import PackedTensor, part_layout
from fqdiff.store.files import read_json, read_tensors, write_tensors
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
)
from fqdiff.viz.grids import image_grid, png
from fqdiff.viz.plots import loss_curve

GRID_IMAGES = 100
FISHER_ROW_LIMIT = 50_000_000


@dataclass(frozen=True)
class Codec:
    """``save(value, directory)`` writes the payload files; ``load(directory)`` reads the value back."""

    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]


def _expect(condition: bool, path: Path, message: str) -> None:
    if not condition:
        raise ArtifactCorrupt(f"{path}: {message}", "remove the artifact and make it again")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _take(tensors: Mapping[str, Tensor], path: Path, name: str, dtype: torch.dtype, ndim: int) -> Tensor:
    found = tensors.get(name)
    if found is None or found.dtype != dtype or found.ndim != ndim:
        got = "nothing" if found is None else f"{found.dtype} of {found.ndim} axes"
        raise ArtifactCorrupt(f"{path}: '{name}' is {got}, not {dtype} of {ndim} axes", "remove the artifact")
    return found


# --- dataset ---------------------------------------------------------------------------------------------------------


def save_dataset(value: Dataset, directory: Path) -> None:
    tensors = {"images": value.images, "held_out": value.held_out, "origin": value.origin}
    if value.labels is not None:
        tensors["labels"] = value.labels
    write_tensors(directory / "images.safetensors", tensors, {"fqdiff": json.dumps({"name": value.name})})


def load_dataset(directory: Path) -> Dataset:
    path = directory / "images.safetensors"
    tensors, meta = read_tensors(path)
    images = _take(tensors, path, "images", torch.uint8, 4)
    held_out = _take(tensors, path, "held_out", torch.bool, 1)
    origin = _take(tensors, path, "origin", torch.int64, 1)
    labels = _take(tensors, path, "labels", torch.int64, 1) if "labels" in tensors else None
    lengths = {len(t) for t in (images, held_out, origin, *([labels] if labels is not None else []))}
    _expect(len(lengths) == 1, path, f"tensors of different lengths {sorted(lengths)}")
    return Dataset(str(meta.get("name", "?")), images, labels, held_out, origin)


# --- checkpoint ------------------------------------------------------------------------------------------------------


def _model_spec(meta: Mapping[str, Any], path: Path) -> ModelSpec:
    model = meta.get("model")
    fields = ("architecture", "schedule", "prediction")
    if not isinstance(model, dict) or sorted(model) != sorted(fields) or not isinstance(model["architecture"], dict):
        raise ArtifactCorrupt(f"{path} does not say what model it holds", "it was not written by fqdiff")
    return ModelSpec(model["architecture"], str(model["schedule"]), str(model["prediction"]))


def save_checkpoint(value: Checkpoint, directory: Path) -> None:
    meta = metadata(model_description(value.spec), {})
    write_tensors(directory / "model.safetensors", value.tensors, meta)
    write_tensors(directory / "history.safetensors", {"loss": value.loss, "preview": value.preview}, {})
    (directory / "loss.png").write_bytes(loss_curve(value.loss, "training loss"))
    (directory / "samples.png").write_bytes(png(image_grid(value.preview, 8)))


def load_checkpoint(directory: Path) -> Checkpoint:
    path = directory / "model.safetensors"
    tensors, meta = read_tensors(path)
    for name in tensors:
        _take(tensors, path, name, torch.float32, tensors[name].ndim)
    history, _ = read_tensors(directory / "history.safetensors")
    loss = _take(history, directory / "history.safetensors", "loss", torch.float32, 1)
    preview = _take(history, directory / "history.safetensors", "preview", torch.uint8, 4)
    return Checkpoint(_model_spec(meta, path), tensors, loss, preview)


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
        use_dictionary=["tensor", "block"],
        column_encoding={"channel.list.element": "BYTE_STREAM_SPLIT"},
        row_group_size=1000,
    )


def load_fisher(directory: Path) -> FisherTable:
    path = directory / "fisher.parquet"
    try:
        file = pq.ParquetFile(path, memory_map=False)
        _expect(file.schema_arrow.equals(FISHER_SCHEMA), path, "its columns are not a Fisher table's")
        _expect(0 < file.metadata.num_rows <= FISHER_ROW_LIMIT, path, f"{file.metadata.num_rows} rows")
        declared = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        _expect(declared < 1000 * path.stat().st_size, path, f"claims to unpack to {declared} bytes")
        kind = json.loads((file.metadata.metadata or {})[b"fqdiff"])["kind"]
        table = file.read()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactCorrupt(f"{path} cannot be read as a Fisher table: {error}", "remove the artifact") from None
    names = table["tensor"].to_pylist()
    order = list(dict.fromkeys(names))
    count = len(names) // len(order)
    timesteps = torch.tensor(table["timestep"].to_pylist()[:count], dtype=torch.int64)
    _expect(names == [n for n in order for _ in range(count)], path, "its rows are not sorted by tensor and timestep")
    _expect(
        table["timestep"].to_pylist() == timesteps.tolist() * len(order), path, "its timesteps differ between tensors"
    )
    _expect(all(column.null_count == 0 for column in table.columns), path, "it holds empty cells")
    numbers = {key: torch.tensor(table[key].to_numpy()) for key in ("mean", "standard_error", "max")}
    entries = {}
    for i, name in enumerate(order):
        rows = slice(i * count, (i + 1) * count)
        channel = table["channel"][i * count : (i + 1) * count].to_pylist()
        _expect(len({len(c) for c in channel}) == 1, path, f"channels of '{name}' differ in number")
        entries[name] = FisherEntry(
            block=table["block"][i * count].as_py(),
            numel=table["numel"][i * count].as_py(),
            mean=numbers["mean"][rows],
            standard_error=numbers["standard_error"][rows],
            maximum=numbers["max"][rows],
            channel=torch.tensor(channel, dtype=torch.float64),
        )
    return FisherTable(str(kind), timesteps, table["n_samples"][0].as_py(), entries)


# --- plan ------------------------------------------------------------------------------------------------------------


def save_plan(value: Plan, directory: Path) -> None:
    totals = {"file_bytes": value.file_bytes, "parameters": value.parameters, "bits_per_weight": value.bits_per_weight}
    entries = [asdict(e) for e in value.entries]
    _write_json(
        directory / "plan.json", {"schema": 1, "strategy": value.strategy, "totals": totals, "entries": entries}
    )


def load_plan(directory: Path) -> Plan:
    path = directory / "plan.json"
    data = read_json(path)
    try:
        entries = tuple(_plan_entry(e) for e in data["entries"])
        return Plan(str(data["strategy"]), entries, int(data["totals"]["file_bytes"]))
    except FqdiffError as error:
        raise ArtifactCorrupt(f"{path}: {error.message}", "it was edited by hand; make the plan again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(f"{path} is not a plan: {error}", "make the plan again") from None


def _plan_entry(data: Mapping[str, Any]) -> PlanEntry:
    shape = tuple(data["shape"])
    if not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"shape {shape} of {data['parameter']}")
    fields = {**data, "shape": shape}
    get_format(fields["format"])
    parse_granularity(fields["granularity"])
    return PlanEntry(**fields)


# --- quantized -------------------------------------------------------------------------------------------------------


def save_quantized(value: QuantizedCheckpoint, directory: Path) -> None:
    described = {name: (p.shape, p.format, p.granularity) for name, p in value.packed.items()}
    tensors = {part_name(name, part): t for name, p in value.packed.items() for part, t in p.parts.items()}
    write_tensors(directory / "model.safetensors", tensors, metadata(model_description(value.spec), described))


def load_quantized(directory: Path) -> QuantizedCheckpoint:
    path = directory / "model.safetensors"
    tensors, meta = read_tensors(path)
    remaining = dict(tensors)
    packed: dict[str, PackedTensor] = {}
    try:
        for name, facts in dict(meta.get("quantized", {})).items():
            fmt, granularity = get_format(facts["format"]), parse_granularity(facts["granularity"])
            shape = tuple(int(n) for n in facts["shape"])
            parts = {part: remaining.pop(part_name(name, part)) for part in part_layout(shape, fmt, granularity)}
            packed[name] = PackedTensor(fmt, granularity, shape, parts)
    except (FqdiffError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactCorrupt(f"{path}: its description does not fit its tensors: {error}", "quantize again") from None
    casts = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    for name, tensor in remaining.items():
        fmt_name = next((n for n, dtype in casts.items() if dtype == tensor.dtype), None)
        _expect(fmt_name is not None, path, f"'{name}' is {tensor.dtype}, which no format uses")
        packed[name] = PackedTensor(get_format(str(fmt_name)), PerTensor(), tuple(tensor.shape), {"data": tensor})
    return QuantizedCheckpoint(_model_spec(meta, path), packed)


# --- samples, features, metrics --------------------------------------------------------------------------------------


def save_samples(value: SampleSet, directory: Path) -> None:
    tensors = {"images": value.images, "seeds": value.image_seeds}
    write_tensors(directory / "samples.safetensors", tensors, {})
    (directory / "samples.png").write_bytes(png(image_grid(value.images[:GRID_IMAGES], 10)))


def load_samples(directory: Path) -> SampleSet:
    path = directory / "samples.safetensors"
    tensors, _ = read_tensors(path)
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
    try:
        channels, height, width = (int(n) for n in facts["image_shape"])
        shape = (channels, height, width)
        return ClassifierWeights(
            str(facts["dataset"]),
            int(facts["classes"]),
            shape,
            tensors,
            float(facts["accuracy"]),
            float(facts["confidence"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(f"{path} is not a classifier: {error}", "remove the artifact and make it again") from None


def save_metrics(value: FidResult, directory: Path) -> None:
    _write_json(directory / "metrics.json", asdict(value))


def load_metrics(directory: Path) -> FidResult:
    path = directory / "metrics.json"
    try:
        data = dict(read_json(path))
        if data["interval"] is not None:
            low, high = data["interval"]
            data["interval"] = (float(low), float(high))
        return FidResult(**data)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(f"{path} is not a FID result: {error}", "remove the artifact and make it again") from None


CODECS: Mapping[str, Codec] = {
    "dataset": Codec(save_dataset, load_dataset),
    "checkpoint": Codec(save_checkpoint, load_checkpoint),
    "fisher": Codec(save_fisher, load_fisher),
    "plan": Codec(save_plan, load_plan),
    "quantized": Codec(save_quantized, load_quantized),
    "samples": Codec(save_samples, load_samples),
    "features": Codec(save_features, load_features),
    "metrics": Codec(save_metrics, load_metrics),
}
