"""Query a Fisher table with DuckDB: what share of all Fisher information lies in each block, and which tensors lead it?

    python examples/query_fisher_duckdb.py            # the latest table in ./fqdiff-store, or FQDIFF_STORE

DuckDB (``pip install duckdb``) reads the table's Parquet file where it lies. Any other reader of Parquet does, too:
query_fisher.py is the same with pyarrow alone.
"""

import argparse
import os
from pathlib import Path

import duckdb

from fqdiff.store.store import Store

QUERY = """
    with tensors as (
        select block, tensor, avg("sum") as total
        from read_parquet(?)
        group by block, tensor
    )
    select block, sum(total) / (select sum(total) from tensors) as share, arg_max(tensor, total) as leader
    from tensors
    group by block
    order by share desc
"""


def main(store_path: str) -> dict[str, float]:
    """Share of the Fisher information of all weights, averaged over timesteps, that each block holds; the largest first."""
    store = Store(Path(store_path))
    manifest = store.resolve("latest", ("fisher",))
    path = store.directory("fisher", manifest.id) / "fisher.parquet"
    rows = duckdb.execute(QUERY, [str(path)]).fetchall()
    for block, share, leader in rows:
        print(f"block {block:4}  {share:6.1%} of all Fisher information, most of it in {leader}")
    return {block: share for block, share, _ in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("FQDIFF_STORE", "fqdiff-store"))
    options = parser.parse_args()
    main(options.store)
