"""The library without the command line: pack one checkpoint in several formats and compare its images with FP32's.

    python examples/compare_formats.py            # the latest checkpoint in ./fqdiff-store, or FQDIFF_STORE

Every step is stored: run it again and nothing is computed twice.
"""

import argparse
import os
from pathlib import Path

from fqdiff.configs import PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.pipeline import Runner, Step
from fqdiff.store.store import Store


def main(store_path: str, count: int = 50, steps: int = 20) -> dict[str, float]:
    """Mean squared pixel difference to FP32's images (same noise, pixels in [-1, 1]) for each format."""
    store = Store(Path(store_path))
    runner = Runner(store)
    checkpoint = store.resolve("latest", ("checkpoint",))
    sampling = SampleConfig(steps=steps, count=count)

    def images(model: Step | None = None) -> object:
        return runner.load(runner.run(Step("sample", {"model": model or checkpoint}, sampling))).images.float() / 127.5

    full, errors = images(), {}
    for name in ("float16", "int8", "int6", "int4", "int3"):
        plan = Step("plan", {"checkpoint": checkpoint}, PlanConfig("uniform", low=name))
        model = Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig())
        errors[name] = float((images(model) - full).square().mean())
        size = runner.load(store.find("plan", plan.id)).file_bytes
        print(f"{name:8}  {size:>10,} bytes  image error {errors[name]:.2e}")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("FQDIFF_STORE", "fqdiff-store"))
    options = parser.parse_args()
    main(options.store)
