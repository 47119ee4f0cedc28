"""The whole chain from Python, without the command line: train, measure, plan, quantize, sample, compare.

    python examples/end_to_end.py            # into ./fqdiff-store, or FQDIFF_STORE; about a minute

Nothing is computed until it is asked for: a Step is an artifact that may not exist yet, and ``runner.run`` makes what is missing.
"""

import argparse
import os
from pathlib import Path

from fqdiff.chains import comparison_step
from fqdiff.configs import (
    ClassifierConfig,
    CompareConfig,
    FisherConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
    TrainConfig,
    get_preset,
)
from fqdiff.models.registry import unet_architecture, unet_config
from fqdiff.pipeline import Runner, Step
from fqdiff.store.sources import dataset_config
from fqdiff.store.store import Store


def main(store_path: str, count: int = 200, **training: int) -> dict[str, float]:
    """Noise error of each plan against full precision. ``training``: changes to the tiny preset's recipe."""
    runner = Runner(Store(Path(store_path)), say=print)
    preset = get_preset("tiny")
    architecture = unet_architecture(unet_config({**preset.architecture, "image_size": 8, "image_channels": 1}))
    dataset = Step("dataset", {}, dataset_config("mnist5k", 8))
    full = Step(
        "train", {"dataset": dataset}, TrainConfig(**{**preset.train, "architecture": architecture, **training})
    )
    table = Step("fisher", {"checkpoint": full, "dataset": dataset}, FisherConfig(kind="true", timesteps=10, samples=8))

    plans = {
        f"{score}, 4 bits": Step(
            "plan", {"checkpoint": full, "fisher": table}, PlanConfig("budget", target_bpw=4, score=score)
        )
        for score in ("fisher", "reverse")  # reverse: what matters most gets least, to see what the scores are worth
    }
    models = [Step("quantize", {"checkpoint": full, "plan": plan}, QuantizeConfig()) for plan in plans.values()]
    sets = [Step("sample", {"model": model}, SampleConfig(steps=20, count=count)) for model in (full, *models)]
    features = Step("classifier", {"dataset": dataset}, ClassifierConfig(epochs=1))
    comparison = comparison_step(
        dataset, features, sets[0], sets[1:], None, [full, *models], CompareConfig(resamples=100)
    )

    value = runner.load(runner.run(comparison))
    found = dict(zip(plans, (curve.mean for curve in value.noise_error), strict=True))
    for label, error in found.items():
        print(f"{label:16} 1/2 |eps_q - eps|^2 = {error:.3g}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("FQDIFF_STORE", "fqdiff-store"))
    options = parser.parse_args()
    main(options.store, steps=300)
