"""A Fisher table as Parquet files.

``fisher.parquet`` parameters, ``activations.parquet`` outputs of layers: one row per (tensor, timestep), sorted so.
``trajectory.parquet`` the whole sampler: one row per parameter; ``gain.parquet``: one per step. ``weights-NNNN.parquet``
every single weight, one file per bin of timesteps and one row per parameter.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fqdiff.store.fields import mapping, text
from fqdiff.store.files import parse_json, plain_size, readable
from fqdiff.store.parquet import unpacked_size
from fqdiff.values import FisherEntry, FisherTable, SamplerGain, TrajectoryEntry, WeightBin

LOSS = "1/2 * sum over pixels (noise - eps_pred)^2"
FLOATS = pa.list_(pa.field("element", pa.float32()))
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
        ("channel", FLOATS),
    ]
)
TRAJECTORY_SCHEMA = pa.schema(
    [f for f in FISHER_SCHEMA if f.name != "timestep"]
    + [pa.field("sample", pa.list_(pa.field("element", pa.float64())))]
)
WEIGHTS_SCHEMA = pa.schema(
    [
        ("tensor", pa.string()),
        ("first_timestep", pa.int16()),
        ("last_timestep", pa.int16()),
        ("shape", pa.list_(pa.field("element", pa.int32()))),
        ("value", FLOATS),
    ]
)
GAIN_SCHEMA = pa.schema(
    [
        ("timestep", pa.int16()),
        ("mean", pa.float64()),
        ("standard_error", pa.float64()),
        ("sample", pa.list_(pa.field("element", pa.float64()))),
    ]
)
NAMES = ("tensor", "block")  # read as dictionaries: they then take the space that they take in the file


# --- writing ---------------------------------------------------------------------------------------------------------


def save_fisher(value: FisherTable, directory: Path) -> None:
    """All files of one table. Every single weight is written bin by bin, so that one bin at a time is in memory."""
    facts = {"fqdiff": json.dumps({"schema": 1, "kind": value.kind, "loss": LOSS})}
    _write(_rows(value, value.entries), directory / "fisher.parquet", facts)
    if value.activations:
        _write(_rows(value, value.activations), directory / "activations.parquet", facts)
    if value.trajectory:
        _write(_trajectory_rows(value), directory / "trajectory.parquet", facts)
    if value.gain is not None:
        _write(_gain_rows(value.gain), directory / "gain.parquet", facts)
    for number, one in enumerate(value.weights):
        _write(_weight_rows(one), directory / f"weights-{number:04}.parquet", facts)


def _write(table: pa.Table, path: Path, facts: Mapping[str, str]) -> None:
    lists = [f.name for f in table.schema if pa.types.is_list(f.type) and f.name != "shape"]
    pq.write_table(
        table.replace_schema_metadata(facts),
        path,
        compression="zstd",
        use_dictionary=[name for name in NAMES if name in table.column_names],
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists},
        row_group_size=1000,
    )


def _rows(value: FisherTable, entries: Mapping[str, FisherEntry]) -> pa.Table:
    tables = []
    for tensor_id, (name, entry) in enumerate(entries.items()):
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
            "channel": pa.array(list(entry.channel.float().numpy()), FLOATS),
        }
        tables.append(pa.table(columns, schema=FISHER_SCHEMA))
    return pa.concat_tables(tables)


def _trajectory_rows(value: FisherTable) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in TRAJECTORY_SCHEMA.names}
    for tensor_id, (name, entry) in enumerate(value.trajectory.items()):
        row = {
            "tensor_id": tensor_id,
            "tensor": name,
            "block": entry.block,
            "n_samples": value.samples,
            "numel": entry.numel,
            "mean": entry.mean,
            "standard_error": entry.standard_error,
            "sum": entry.mean * entry.numel,
            "max": entry.maximum,
            "channel": entry.channel.float().numpy(),
            "sample": entry.samples.numpy(),
        }
        for key, cell in row.items():
            columns[key].append(cell)
    return pa.table(columns, schema=TRAJECTORY_SCHEMA)


def _gain_rows(gain: SamplerGain) -> pa.Table:
    columns = {
        "timestep": pa.array(gain.timesteps.numpy(), pa.int16()),
        "mean": pa.array(gain.mean.numpy()),
        "standard_error": pa.array(gain.standard_error.numpy()),
        "sample": pa.array(list(gain.samples.T.numpy()), GAIN_SCHEMA.field("sample").type),
    }
    return pa.table(columns, schema=GAIN_SCHEMA)


def _weight_rows(one: WeightBin) -> pa.Table:
    tensors = one.read()
    columns = {
        "tensor": list(tensors),
        "first_timestep": [one.first] * len(tensors),
        "last_timestep": [one.last] * len(tensors),
        "shape": [list(t.shape) for t in tensors.values()],
        "value": [t.flatten().numpy() for t in tensors.values()],
    }
    return pa.table(columns, schema=WEIGHTS_SCHEMA)


def weights_bytes(parameters: int, bins: int) -> int:
    """About how many bytes single weights take: float32, of which zstd leaves about 0.83 (mantissas look random)."""
    return round(0.83 * 4 * parameters * bins)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_fisher(directory: Path) -> FisherTable:
    """The table in ``directory``, every cell checked. Single weights are read when they are asked for."""
    path = directory / "fisher.parquet"
    with readable(path, "a Fisher table"):
        kind, table = _read(path, FISHER_SCHEMA)
        timesteps, samples, entries = _fisher_entries(table)
    activations: dict[str, FisherEntry] = {}
    path = directory / "activations.parquet"
    if _there(path):
        with readable(path, "a Fisher table"):
            other_timesteps, other_samples, activations = _fisher_entries(_read(path, FISHER_SCHEMA)[1])
            if not torch.equal(timesteps, other_timesteps) or samples != other_samples:
                raise ValueError("its timesteps or samples are not those of fisher.parquet")
    trajectory: dict[str, TrajectoryEntry] = {}
    path = directory / "trajectory.parquet"
    if _there(path):
        with readable(path, "a trajectory Fisher table"):
            trajectory = _trajectory_entries(_read(path, TRAJECTORY_SCHEMA)[1], entries, samples)
    gain = None
    path = directory / "gain.parquet"
    if _there(path):
        with readable(path, "a table of gains"):
            gain = _gain(_read(path, GAIN_SCHEMA)[1], timesteps, samples)
    weights: list[WeightBin] = []
    for path in sorted(directory.glob("weights-*.parquet")):
        with readable(path, "a table of single weights"):
            table = _read(path, WEIGHTS_SCHEMA, ["tensor", "first_timestep", "last_timestep"])[1]
            first, last = (table[key].unique().to_pylist() for key in ("first_timestep", "last_timestep"))
            if len(first) != 1 or len(last) != 1 or not 0 <= first[0] <= last[0]:
                raise ValueError("its timesteps make no sense")
            if trajectory and weights:
                raise ValueError("a trajectory has its weights in one bin, that of the whole run")
            weights.append(WeightBin(first[0], last[0], partial(_read_weights, path, entries)))
    return FisherTable(kind, timesteps, samples, entries, activations, trajectory, tuple(weights), gain)


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _read(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> tuple[str, pa.Table]:
    """Kind and rows of a file with just the columns of ``schema``, no row missing, no cell empty. Raises ValueError."""
    size = plain_size(path)
    # Real tables hardly shrink: nearly all of their cells are measured numbers, whose bits look random.
    cells, unpacked = unpacked_size(path)
    if cells > max(size, 2**24) or unpacked > max(8 * size, 2**27):
        raise ValueError(f"{size} bytes that unpack to {cells} cells of {unpacked} bytes")
    names = [f.name for f in schema if f.name in NAMES]
    file = pq.ParquetFile(path, memory_map=False, read_dictionary=names)
    wanted = pa.schema([f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in names else f for f in schema])
    if not file.schema_arrow.equals(wanted):
        raise ValueError("it has other columns")
    table = file.read(columns)
    if not table.num_rows or any(c.null_count for c in table.columns):
        raise ValueError("it has no rows, or empty cells")
    return text(mapping(parse_json(file.metadata.metadata[b"fqdiff"]))["kind"]), table


def _fisher_entries(table: pa.Table) -> tuple[Tensor, int, dict[str, FisherEntry]]:
    """Timesteps, samples and entries of one row per (tensor, timestep). Raises ValueError where it is anything else."""
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
        channel = _equal_lists(table["channel"].slice(i * steps, steps), f"channels of '{name}'")
        values = [numbers[key][i] for key in ("mean", "standard_error", "max")] + [channel]
        _check_values(values, name)
        block = text(blocks.dictionary[int(per_tensor["block"][i, 0])].as_py())
        entries[name] = FisherEntry(block, int(per_tensor["numel"][i, 0]), *values)
    return torch.tensor(timesteps[0]), int(samples[0, 0]), entries


def _equal_lists(column: pa.ChunkedArray, what: str) -> Tensor:
    """float64 [rows, length] from lists of one length, which may be 0."""
    cells = column.combine_chunks()
    lengths = np.asarray(cells.value_lengths())
    if cells.flatten().null_count or (lengths != lengths[0]).any():
        raise ValueError(f"{what} differ in number, or are missing")
    return torch.tensor(np.asarray(cells.flatten())).double().view(len(lengths), int(lengths[0]))


def _check_values(values: list[Tensor], name: str) -> None:
    if not all(torch.isfinite(v).all() and (v >= 0).all() for v in values):
        raise ValueError(f"a value of '{name}' is negative or not finite")


def _trajectory_entries(table: pa.Table, entries: Mapping[str, FisherEntry], runs: int) -> dict[str, TrajectoryEntry]:
    """One entry per parameter of ``entries``, each of ``runs`` runs. Raises ValueError where the table is anything else."""
    found: dict[str, TrajectoryEntry] = {}
    for i, name in enumerate(table["tensor"].to_pylist()):
        channel, samples = (_equal_lists(table[key].slice(i, 1), f"'{name}'")[0] for key in ("channel", "sample"))
        mean, error, largest = (float(table[key][i].as_py()) for key in ("mean", "standard_error", "max"))
        _check_values([channel, samples, torch.tensor([mean, error, largest])], name)
        known = entries.get(name)
        if known is None or (known.block, known.numel) != (table["block"][i].as_py(), table["numel"][i].as_py()):
            raise ValueError(f"'{text(name)}' is not a parameter of fisher.parquet")
        if not len(samples) == table["n_samples"][i].as_py() == runs:
            raise ValueError(f"'{name}' has {len(samples)} runs, not {runs}")
        found[name] = TrajectoryEntry(known.block, known.numel, mean, error, largest, channel, samples)
    if found.keys() != entries.keys() or len(found) < table.num_rows:
        raise ValueError("its parameters are not those of fisher.parquet, once each")
    return found


def _gain(table: pa.Table, timesteps: Tensor, runs: int) -> SamplerGain:
    """One row per step of the table's ``timesteps``, each of ``runs`` runs. Raises ValueError where it is anything else."""
    if table["timestep"].to_pylist() != timesteps.tolist():
        raise ValueError("its timesteps are not those of fisher.parquet")
    mean, error = (torch.tensor(np.asarray(table[key])) for key in ("mean", "standard_error"))
    samples = _equal_lists(table["sample"], "runs")
    if samples.shape[1] != runs:
        raise ValueError(f"it has {samples.shape[1]} runs, not {runs}")
    _check_values([mean, error, samples], "gain")
    return SamplerGain(timesteps, mean, error, samples.T)


def _read_weights(path: Path, entries: Mapping[str, FisherEntry]) -> dict[str, Tensor]:
    """Single weights of one bin, shaped like the parameters. Raises ArtifactCorrupt."""
    with readable(path, "a table of single weights"):
        table = _read(path, WEIGHTS_SCHEMA)[1]
        found: dict[str, Tensor] = {}
        for i, name in enumerate(table["tensor"].to_pylist()):
            shape = [int(n) for n in table["shape"][i].as_py()]
            values = _equal_lists(table["value"].slice(i, 1), f"values of '{name}'")[0].float()
            if name not in entries or not math.prod(shape) == entries[name].numel == len(values):
                raise ValueError(f"'{text(name)}' has {len(values)} values of shape {shape}")
            _check_values([values], name)
            found[name] = values.view(shape)
        if found.keys() != entries.keys() or len(found) < table.num_rows:
            raise ValueError("its parameters are not those of fisher.parquet, once each")
        return found
