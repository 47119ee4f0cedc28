"""Read a Fisher table with pyarrow alone: which weight tensors matter most, early and late in sampling?

python examples/query_fisher.py            # the latest table in ./fqdiff-store, or FQDIFF_STORE
"""

import argparse
import os
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from fqdiff.store.store import Store


def main(store_path: str, top: int = 5) -> list[str]:
    """Names of the ``top`` tensors by mean Fisher value over all timesteps."""
    store = Store(Path(store_path))
    manifest = store.resolve("latest", ("fisher",))
    path = store.directory("fisher", manifest.id) / "fisher.parquet"
    table = pq.read_table(path, columns=["tensor", "block", "timestep", "mean"])
    last = pc.max(table["timestep"]).as_py()
    means = table.group_by(["tensor", "block"]).aggregate([("mean", "mean")]).sort_by([("mean_mean", "descending")])
    at = {t: dict(zip(*_columns(table.filter(pc.field("timestep") == t)), strict=True)) for t in (0, last)}
    for row in means.slice(0, top).to_pylist():
        early, late = at[last][row["tensor"]], at[0][row["tensor"]]
        print(
            f"{row['tensor']:32} block {row['block']:4}  mean {row['mean_mean']:.2e}  t={last} {early:.2e}  t=0 {late:.2e}"
        )
    return means["tensor"].to_pylist()[:top]


def _columns(table):
    return table["tensor"].to_pylist(), table["mean"].to_pylist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("FQDIFF_STORE", "fqdiff-store"))
    options = parser.parse_args()
    main(options.store)
