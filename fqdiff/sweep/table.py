"""The table of a sweep: one row per cell, as Parquet and as CSV."""

import csv
import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from fqdiff.sweep.numbers import Row
from fqdiff.sweep.tenths import TENTHS
from fqdiff.sweep.verdicts import with_verdicts

SCHEMA = 2
LEADING: dict[str, pa.DataType] = {"cell": pa.int64(), "plan": pa.string(), "quantize": pa.string(), "seed": pa.int64()}
NUMBERS: dict[str, pa.DataType] = {
    "bytes": pa.int64(),
    "bits_per_weight": pa.float64(),
    "predicted": pa.float64(),
    "n": pa.int64(),
    "level": pa.float64(),
    "feature_network": pa.string(),
    **dict.fromkeys(("image_mse", "image_mse_low", "image_mse_high", "fid", "fid_low", "fid_high"), pa.float64()),
    **dict.fromkeys(("fid_difference", "fid_difference_low", "fid_difference_high", "fid_p"), pa.float64()),
    "fid_p_adjusted": pa.float64(),
    "verdict": pa.string(),
    **dict.fromkeys(("fid_full", "fid_floor"), pa.float64()),
    **dict.fromkeys(("fid_floor_difference", "fid_floor_difference_low", "fid_floor_difference_high"), pa.float64()),
    "image_mse_floor": pa.float64(),
    **dict.fromkeys(("noise_error", "noise_error_low", "noise_error_high", *TENTHS, "making_seconds"), pa.float64()),
}
IDS = ("dataset", "checkpoint", "fisher", "trajectory", "plan", "calibration", "quantized", "samples", "full_samples",
       "floor_samples", "features", "comparison")  # fmt: skip
TRAILING: dict[str, pa.DataType] = {**{f"{name}_id": pa.string() for name in IDS}, "error": pa.string()}


def make_table(rows: Sequence[Row], name: str) -> pa.Table:
    """``rows`` in the order of cells: what a cell is, the settings its file gives, its numbers, its ids, its error.

    Verdicts are over all of them.
    """
    fixed = LEADING | NUMBERS | TRAILING
    # Whichever ended first: columns come in that order too.
    ordered = with_verdicts(sorted(rows, key=lambda row: int(row["cell"])))
    given = dict.fromkeys(column for row in ordered for column in row if column not in fixed)
    columns = [*LEADING, *given, *NUMBERS, *TRAILING]
    arrays = [pa.array([row.get(column) for row in ordered], fixed.get(column)) for column in columns]
    facts = {"fqdiff": json.dumps({"schema": SCHEMA, "sweep": name})}
    return pa.table(arrays, names=columns).replace_schema_metadata(facts)


def parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def comma_separated(table: pa.Table) -> bytes:
    """The table as a CSV file in UTF-8, every digit of its numbers written; what is not there is empty."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(row.values() for row in table.to_pylist())
    return sink.getvalue().encode()
