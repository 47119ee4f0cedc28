"""What resampling FID by counts saves: seconds per resample by updated moments and from the drawn rows, in one run.

python benchmarks/frechet_bootstrap.py --images 5000 --features 128 --models 2
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from fqdiff.evidence.frechet_bootstrap import _by_rows, frechet_draws
from fqdiff.evidence.resampling import draw_counts
from fqdiff.rng import generator


def main(images: int, features: int, models: int, resamples: int, rows: int) -> dict[str, float]:
    """Seconds for ``resamples`` by moments, per resample by moments and by rows, and how many times faster moments are."""
    draw = generator(0, "benchmark")
    real, *sets = (torch.randn(images, features, generator=draw) for _ in range(models + 1))
    counts, apart = draw_counts(images, resamples, draw), draw_counts(images, resamples, draw)
    start = time.perf_counter()
    fast = frechet_draws(real, apart, [(x, counts) for x in sets])
    middle = time.perf_counter()
    slow = _by_rows(real, apart[:rows], [(x, counts[:rows]) for x in sets])
    end = time.perf_counter()
    torch.testing.assert_close(fast[:rows], slow, rtol=1e-6, atol=1e-6)
    one, other = (middle - start) / resamples, (end - middle) / rows
    return {"seconds": middle - start, "by moments": one, "by rows": other, "times faster": other / one}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 5000), ("features", 128), ("models", 2), ("resamples", 1000), ("rows", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    found = main(**vars(parser.parse_args()))
    print(f"{torch.get_num_threads()} threads; " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
