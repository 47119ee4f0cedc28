"""What an FID of N images would be if the generator were perfect: held-out real images against other held-out real ones.

    python examples/real_vs_real.py --dataset mnist5k --count 500

No FID of N generated images can be expected below it, and a difference much smaller than its spread says nothing.
"""

import argparse
import os
from pathlib import Path

import torch

from fqdiff.configs import ClassifierConfig
from fqdiff.evidence.frechet import frechet_distance_of_features
from fqdiff.pipeline import Runner, Step
from fqdiff.rng import generator
from fqdiff.store.sources import dataset_config
from fqdiff.store.store import Store


def main(store_path: str, dataset: str, size: int, count: int, splits: int, features: str = "") -> list[float]:
    """FIDs of ``splits`` random pairs of disjoint held-out sets; ``features``: whose digits network, by default its own."""
    runner = Runner(Store(Path(store_path)))
    step = Step("dataset", {}, dataset_config(dataset, size))
    trained_on = Step("dataset", {}, dataset_config(features, size)) if features else step
    classifier = Step("classifier", {"dataset": trained_on}, ClassifierConfig())
    extract = runner.load(runner.run(classifier)).feature_network().extract
    found = extract(runner.load(runner.run(step)).reference)
    if 2 * count > len(found):
        raise SystemExit(f"{len(found)} held-out images make no two sets of {count}")
    distances = []
    for split in range(splits):
        order = torch.randperm(len(found), generator=generator(0, "real", split))
        one, other = found[order[:count]], found[order[count : 2 * count]]
        distances.append(frechet_distance_of_features(one, other))
    values = torch.tensor(distances)
    print(f"{dataset}, N = {count}: real against real {values.mean():.2f}, {values.min():.2f} to {values.max():.2f}")
    print(f"features {classifier.id}; mean of {splits} random splits of {len(found)} held-out images")
    return distances


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("FQDIFF_STORE", "fqdiff-store"))
    parser.add_argument("--dataset", default="mnist5k")
    parser.add_argument("--features", default="", help="data set whose digits network gives the features")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--splits", type=int, default=5)
    options = parser.parse_args()
    main(options.store, options.dataset, options.image_size, options.count, options.splits, options.features)
