"""The files of a validation: three tables, the Gram matrix, the summary and a picture. Loaded, all of them are checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fqdiff.store.fields import count, items, mapping, record, text
from fqdiff.store.files import plain_size, read_json, read_tensors, readable, write_tensors
from fqdiff.store.parquet import unpacked_size
from fqdiff.values import Candidate, Correlation, ErrorShape, TriedPlans, Validation, Verdict
from fqdiff.viz.validation import scatter

NAMES = pa.dictionary(pa.int32(), pa.string())  # read so, names take the space that they take in the file
CANDIDATE = {"tensor": NAMES, "block": NAMES, "format": NAMES, "range": NAMES}
RISES = ("output_error", "loss_rise", "shift")
IMAGES = ("image_error", "image_shift")
PREDICTED, SCORE = "predicted_", "score_"
COLUMN_LIMIT = 100
TIMESTEP_LIMIT = 2**15
Columns = dict[str, Any]


def save_validation(value: Validation, directory: Path) -> None:
    """Parquet by timestep, by candidate and by plan; ``gram.safetensors``; ``summary.json``; ``scatter.png`` and ``.svg``."""
    _write(directory / "validation.parquet", _by_timestep(value))
    _write(directory / "candidates.parquet", _by_candidate(value))
    _write(directory / "plans.parquet", _by_plan(value.plans))
    write_tensors(directory / "gram.safetensors", {"gram": value.gram, "choice": value.plans.choice}, {})
    summary = {
        "schema": 1,
        "images": len(value.image_error) > 0,
        "correlations": [asdict(row) for row in value.correlations],
        "verdicts": [asdict(row) for row in value.verdicts],
        "errors": [asdict(row) for row in value.errors],
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    for suffix, picture in scatter(value).items():
        (directory / f"scatter.{suffix}").write_bytes(picture)


def _names(candidates: Sequence[Candidate], repeats: int = 1) -> Columns:
    rows = [c for c in candidates for _ in range(repeats)]
    return {name: pa.array([getattr(c, name) for c in rows]) for name in CANDIDATE}


def _by_timestep(value: Validation) -> Columns:
    """One row per (candidate, timestep), sorted so."""
    total, steps = value.output_error.shape
    numbers = {name: getattr(value, name) for name in RISES} | {PREDICTED + k: v for k, v in value.predicted.items()}
    return {
        **_names(value.candidates, steps),
        "timestep": pa.array(np.tile(value.timesteps.numpy(), total), pa.int16()),
        "weight": pa.array(np.tile(value.weights.numpy(), total)),
        **{name: pa.array(v.flatten().numpy()) for name, v in numbers.items()},
    }


def _by_candidate(value: Validation) -> Columns:
    """One row per candidate: what was measured, averaged over timesteps, and every score."""
    numbers = {name: getattr(value, name) @ value.weights for name in RISES}
    if len(value.image_error):
        numbers |= {name: getattr(value, name) for name in IMAGES}
    numbers |= {SCORE + name: v for name, v in value.scores.items()}
    return {
        **_names(value.candidates),
        "numel": pa.array([c.numel for c in value.candidates], pa.int64()),
        **{name: pa.array(v.numpy()) for name, v in numbers.items()},
    }


def _by_plan(plans: TriedPlans) -> Columns:
    """One row per whole plan."""
    numbers = {name: getattr(plans, name) for name in ("bits", "output_error", "shift")}
    if len(plans.image_error):
        numbers |= {name: getattr(plans, name) for name in IMAGES}
    numbers |= {PREDICTED + name: v for name, v in plans.predicted.items()}
    return {
        "plan": pa.array(plans.labels, pa.string()),
        **{name: pa.array(v.numpy()) for name, v in numbers.items()},
    }


def _write(path: Path, columns: Columns) -> None:
    names = [name for name, values in columns.items() if pa.types.is_string(values.type)]
    facts = {"fqdiff": json.dumps({"schema": 1})}
    table = pa.table(columns).replace_schema_metadata(facts)
    pq.write_table(table, path, compression="zstd", use_dictionary=names, row_group_size=10_000)


def load_validation(directory: Path) -> Validation:
    """The value that :func:`save_validation` wrote. Raises ArtifactCorrupt."""
    path = directory / "summary.json"
    with readable(path, "a summary"):
        summary = mapping(read_json(path))
        if summary["schema"] != 1 or not isinstance(summary["images"], bool):
            raise ValueError(f"schema {str(summary['schema'])[:20]}; this fqdiff reads schema 1")
        correlations = tuple(record(Correlation, row) for row in items(summary["correlations"]))
        verdicts = tuple(record(Verdict, row) for row in items(summary["verdicts"]))
        errors = tuple(record(ErrorShape, row) for row in items(summary["errors"]))
        images = IMAGES if summary["images"] else ()

    path = directory / "candidates.parquet"
    with readable(path, "a table of candidates"):
        fixed = {**CANDIDATE, "numel": pa.int64(), **dict.fromkeys((*RISES, *images), pa.float64())}
        table = _read(path, fixed, SCORE)
        columns = {name: _texts(table[name]) for name in CANDIDATE}
        sizes = [count(n.as_py()) for n in table["numel"]]
        candidates = tuple(
            Candidate(tensor, block, numel, fmt, kind)
            for tensor, block, fmt, kind, numel in zip(*(columns[n] for n in CANDIDATE), sizes, strict=True)
        )
        if not candidates or len(set(candidates)) < len(candidates) or min(sizes) < 1:
            raise ValueError("it has no rows, or two for one candidate")
        scores = {n.removeprefix(SCORE): _numbers(table[n]) for n in table.column_names if n.startswith(SCORE)}
        measured = {n: _numbers(table[n]) for n in images}
        total = len(candidates)

    path = directory / "validation.parquet"
    with readable(path, "a validation"):
        kinds = dict.fromkeys(("weight", *RISES), pa.float64())
        table = _read(path, {**CANDIDATE, "timestep": pa.int16(), **kinds}, PREDICTED)
        steps, rest = divmod(table.num_rows, total)
        timesteps, weights = (table[n].to_numpy()[:steps] for n in ("timestep", "weight"))
        if rest or not steps or not (np.diff(timesteps.astype(np.int64), prepend=-1) > 0).all():
            raise ValueError(f"{table.num_rows} rows for {total} candidates, or timesteps that do not rise")
        for name, wanted in (("timestep", timesteps), ("weight", weights)):
            if (table[name].to_numpy().reshape(total, steps) != wanted).any():
                raise ValueError(f"its {name}s differ between candidates")
        for name in CANDIDATE:
            if _texts(table[name]) != [text for text in columns[name] for _ in range(steps)]:
                raise ValueError(f"its {name}s are not those of the candidates")
        grid = {n: _numbers(table[n]).view(total, steps) for n in table.column_names if n in kinds or PREDICTED in n}

    path = directory / "plans.parquet"
    with readable(path, "a table of plans"):
        fixed = {"plan": NAMES, **dict.fromkeys(("bits", "output_error", "shift", *images), pa.float64())}
        table = _read(path, fixed, PREDICTED)
        labels = tuple(_texts(table["plan"]))
        tried = {name: _numbers(table[name]) for name in table.column_names if name != "plan"}

    path = directory / "gram.safetensors"
    tensors, _ = read_tensors(path)
    with readable(path, "a Gram matrix"):
        matrix, choice = _gram(tensors, total, len(labels))

    empty = torch.zeros(0, dtype=torch.float64)
    plans = TriedPlans(
        labels=labels,
        choice=choice,
        predicted={n.removeprefix(PREDICTED): v for n, v in tried.items() if n.startswith(PREDICTED)},
        **{name: tried.get(name, empty) for name in ("bits", "output_error", "shift", *IMAGES)},
    )
    return Validation(
        candidates=candidates,
        timesteps=torch.tensor(timesteps.astype(np.int64)),
        weights=torch.tensor(weights),
        predicted={n.removeprefix(PREDICTED): v for n, v in grid.items() if n.startswith(PREDICTED)},
        scores=scores,
        gram=matrix,
        plans=plans,
        correlations=correlations,
        verdicts=verdicts,
        errors=errors,
        **{name: grid[name] for name in RISES},
        **{name: measured.get(name, empty) for name in IMAGES},
    )


def _gram(tensors: Mapping[str, Tensor], total: int, plans: int) -> tuple[Tensor, Tensor]:
    matrix, choice = tensors["gram"], tensors["choice"]
    if matrix.dtype != torch.float64 or tuple(matrix.shape) != (total, total) or not torch.isfinite(matrix).all():
        raise ValueError(f"a matrix of {matrix.dtype} and shape {tuple(matrix.shape)} for {total} candidates")
    if choice.dtype != torch.int64 or choice.ndim != 2 or len(choice) != plans:
        raise ValueError(f"choices of {choice.dtype} and shape {tuple(choice.shape)} for {plans} plans")
    if choice.numel() and not 0 <= int(choice.min()) <= int(choice.max()) < total:
        raise ValueError("a plan chooses a candidate that there is not")
    if len(tensors) > 2:
        raise ValueError("it holds other tensors too")
    return matrix, choice


def _read(path: Path, fixed: Mapping[str, pa.DataType], prefix: str) -> pa.Table:
    """The table in ``path``: the ``fixed`` columns in their order, then float64 ones whose names begin with ``prefix``."""
    size = plain_size(path)
    cells, unpacked = unpacked_size(path)
    if cells > max(size, 2**22) or unpacked > max(8 * size, 2**25):
        raise ValueError(f"{size} bytes that unpack to {cells} cells of {unpacked} bytes")
    names = [name for name, kind in fixed.items() if kind is NAMES]
    table = pq.ParquetFile(path, memory_map=False, read_dictionary=names).read()
    extra = [text(name) for name in table.column_names[len(fixed) :]]
    if len(extra) > COLUMN_LIMIT or len(set(extra)) < len(extra) or not all(n.startswith(prefix) for n in extra):
        raise ValueError("it has unknown columns")
    wanted = pa.schema([*fixed.items(), *((name, pa.float64()) for name in extra)])
    if not table.schema.equals(wanted) or any(column.null_count for column in table.columns):
        raise ValueError("it has other columns, or empty cells")
    return table


def _texts(column: pa.ChunkedArray) -> list[str]:
    """The strings of a dictionary column, each checked once."""
    joined = column.unify_dictionaries().combine_chunks()
    known = [text(value.as_py()) for value in joined.dictionary]
    return [known[i] for i in joined.indices.to_numpy()]


def _numbers(column: pa.ChunkedArray) -> Tensor:
    values = torch.tensor(column.to_numpy())
    if not torch.isfinite(values).all():
        raise ValueError("a number is not finite")
    return values
