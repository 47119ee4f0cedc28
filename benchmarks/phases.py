"""What phases of timesteps bring at a given traffic: predicted and measured noise error, bytes of the file, bytes read.

    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --kind true --timesteps 200 --samples 16 --name loss
    python benchmarks/phases.py mnist-small --loss loss

For each traffic R, in bits that a timestep reads per weight: the best plan without phases that reads R; the best with 2 and 4
phases, whose file may be twice as large; the best without phases whose file is as large as that of 4 phases; and the best for a
file of R, with 4 phases to choose from and nothing said of traffic. Noise error: 1/2 |eps_q - eps|^2, summed over pixels, mean
over held-out inputs, and over timesteps, with its standard error; as in ``budget.py``, on the same inputs.
"""

import argparse
import os
from pathlib import Path

from fqdiff.configs import PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.pipeline import Runner, Step
from fqdiff.quant.packed import read_bytes
from fqdiff.sensitivity.inputs import draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import outputs
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, Plan, QuantizedCheckpoint

TIMESTEPS, SAMPLES = 20, 5  # held-out inputs of the noise error


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--loss", required=True, help="Fisher table of the loss")
    parser.add_argument("--traffic", default="2.5,3,4", help="bits per weight that a timestep reads")
    options = parser.parse_args()

    store = Store(options.store)
    context = Context()
    runner = Runner(store, context)
    manifest = store.resolve(options.checkpoint, ("checkpoint",))
    table = store.resolve(options.loss, ("fisher",))
    checkpoint: Checkpoint = runner.load(manifest)
    given = manifest.input("dataset")
    assert given is not None
    dataset = store.find("dataset", given.id)
    assert dataset is not None
    timesteps, weights = graded_timesteps(checkpoint.spec.noise_schedule().num_train_timesteps, TIMESTEPS)
    held_out = runner.load(dataset).reference
    inputs = draw_inputs(held_out, checkpoint.spec, timesteps, weights, SAMPLES, 0, "budget")
    reference = outputs(checkpoint.network(), inputs, context.device)
    parameters = sum(t.numel() for t in checkpoint.tensors.values())

    def row(label: str, **settings: object) -> Plan:
        config = PlanConfig("budget", granularity="tensor,channel,group-near:64", scale="float16", **settings)  # type: ignore[arg-type]
        plan = runner.run(Step("plan", {"checkpoint": manifest, "fisher": table}, config))
        made = runner.run(Step("quantize", {"checkpoint": manifest, "plan": plan}, QuantizeConfig()))
        value: Plan = runner.load(plan)
        model: QuantizedCheckpoint = runner.load(made)
        assert value.budget is not None
        read = sum(read_bytes(*each) for each in model.described.values())
        delta = outputs(model.network(), inputs, context.device) - reference
        each = 0.5 * delta.double().square().flatten(1).sum(dim=1).view(TIMESTEPS, SAMPLES)
        error = float(each.mean(dim=1) @ weights)
        deviation = float((each.var(dim=1) / SAMPLES) @ weights.square()) ** 0.5
        size = made.file("model.safetensors").bytes
        print(
            f"{label:34} {8 * size / parameters:6.3f} {8 * read / parameters:6.3f} {value.budget.predicted:9.4f}"
            f" {error:9.4f} {deviation:6.4f}  {plan.id}",
            flush=True,
        )
        return value

    print(f"checkpoint {manifest.id}, table {table.id}, data set {dataset.id}")
    print(f"{'plan':34} {'file':>6} {'read':>6} {'predicted':>9} {'measured':>9} {'+-':>6}  source")
    for traffic in (float(r) for r in options.traffic.split(",")):
        row(f"file of {traffic:g}, 4 phases offered", target_bpw=traffic, phases=4)
        for phases in (2, 4):
            plan = row(f"read {traffic:g}, {phases} phases", target_bpw=2 * traffic, phases=phases, traffic_bpw=traffic)
        assert plan.phases is not None
        row(f"read {traffic:g}, no phases", target_bytes=plan.phases.single_bytes)
        row("no phases, file as with 4", target_bytes=plan.file_bytes)


if __name__ == "__main__":
    main()
