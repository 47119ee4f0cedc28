"""What per-sample squared gradients cost, as ratios to a plain batched forward and backward pass of the same network.

    python benchmarks/fisher.py                  # speed and memory of the small preset: about 4 minutes on 2 idle cores
    python benchmarks/fisher.py --variance       # samples needed for a 5 % standard error, by way of drawing them

All ways are measured in turn, round after round, in one process; a ratio compares the fastest round of each. Run it on an idle
machine: figures of a busy one say nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fqdiff.configs import FisherConfig, get_preset
from fqdiff.context import Context
from fqdiff.fisher.draws import Batch
from fqdiff.fisher.timesteps import BATCH, Layout, Task, measure
from fqdiff.fisher.workers import Workers, workers
from fqdiff.models.registry import build, output_axes, unet_architecture, unet_config
from fqdiff.quant.packed import unpack_tensor
from fqdiff.stages.fisher import fisher
from fqdiff.store.pretrained import open_model
from fqdiff.store.sources import dataset_config, load_dataset
from fqdiff.values import Checkpoint

SAMPLES = 128  # of one round, for every way


def network() -> nn.Module:
    """The small preset with random weights, in eval mode and in the memory layout it is fastest in."""
    torch.manual_seed(0)
    made = build(unet_architecture(unet_config(get_preset("small").architecture))).eval()
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def images(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and target of ``count`` samples, sixteen for each timestep."""
    x, target = torch.randn(2, count, 1, 32, 32)
    t = torch.linspace(0, 999, max(1, count // 16)).long().repeat_interleave(16)[:count]
    return x.contiguous(memory_format=torch.channels_last), t, target


def plain(net: nn.Module, batch: int) -> Callable[[], None]:
    """Forward and backward of half the summed squared error: what training computes."""
    x, t, target = images(batch)

    def run() -> None:
        net.requires_grad_(True)
        for _ in range(SAMPLES // batch):
            net.zero_grad(set_to_none=True)
            (0.5 * (net(x, t) - target).square().sum()).backward()

    return run


def one_at_a_time(net: nn.Module) -> Callable[[], None]:
    """Plain autograd, one sample after the other; squares added to one accumulator."""
    x, t, target = images(SAMPLES)
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}

    def run() -> None:
        net.requires_grad_(True)
        for n in range(SAMPLES):
            net.zero_grad(set_to_none=True)
            (0.5 * (net(x[n : n + 1], t[n : n + 1]) - target[n : n + 1]).square().sum()).backward()
            for name, p in net.named_parameters():
                assert p.grad is not None
                sums[name].addcmul_(p.grad, p.grad)

    return run


def by_vmap(net: nn.Module, chunk: int) -> Callable[[], None]:
    """torch.func's vmap(grad), ``chunk`` samples at a time, squared and summed in float32."""
    x, t, target = images(chunk)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, t: Tensor, target: Tensor) -> Tensor:
        output: Tensor = functional_call(net, weights, (x[None], t[None]))[0]
        return 0.5 * (output - target).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0))

    def run() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(SAMPLES // chunk):
                found: Mapping[str, Tensor] = gradients(parameters, x, t, target)
                for g in found.values():
                    g.square_().sum(dim=0)

    return run


def ours(net: nn.Module, pool: Workers, *, outputs: bool, bfloat16: bool) -> Callable[[], None]:
    """What ``fqdiff fisher`` runs: batches side by side on all threads, every reduction included."""
    x, t, target = images(SAMPLES)
    found_layers = {name for name, m in net.named_modules() if next(m.parameters(recurse=False), None) is not None}
    layout = Layout(output_axes(net), dict.fromkeys(found_layers, 0))
    together = BATCH // 16
    todo = [Task(tuple(t[k * BATCH : (k + 1) * BATCH : 16].tolist()), (range(16),)) for k in range(SAMPLES // BATCH)]

    def draw(task: Task, samples: range) -> Batch:
        assert len(task.timesteps) * len(samples) == 16 * together
        return Batch(x[:BATCH], t[:BATCH], target[:BATCH], torch.ones(BATCH, dtype=torch.float64), torch.empty(0))

    def work(replica: nn.Module, task: Task) -> None:
        measure(replica, task, draw, layout, true=False, pairs=False, outputs=outputs, weights=False, autocast=bfloat16)

    return lambda: consume(pool.map(work, todo))


def consume(results: Iterator[object]) -> None:
    """Wait for all of them."""
    for _ in results:
        pass


def speed(rounds: int) -> None:
    """The table of times, the fastest of ``rounds`` rounds each."""
    net = network()
    with workers(network, torch.device("cpu")) as pool:
        ways = {
            "plain batched, batch 64": plain(net, 64),
            "plain batched, batch 32": plain(net, 32),
            "fqdiff, parameters": ours(net, pool, outputs=False, bfloat16=False),
            "fqdiff, parameters and layer outputs": ours(net, pool, outputs=True, bfloat16=False),
            "fqdiff, bfloat16": ours(net, pool, outputs=False, bfloat16=True),
            "vmap(grad), chunks of 16": by_vmap(net, 16),
            "one sample at a time": one_at_a_time(net),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - started)
    base = min(best["plain batched, batch 64"], best["plain batched, batch 32"])
    print(f"{torch.get_num_threads()} threads, fastest of {rounds} rounds of {SAMPLES} samples")
    for name, seconds in best.items():
        print(f"{name:40} {seconds / base:5.2f} x   {1000 * seconds / SAMPLES:6.1f} ms a sample here")


# --- memory ----------------------------------------------------------------------------------------------------------


def resident() -> float:
    """Resident size of this process now, MiB. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def memory_of(way: str) -> None:
    """Run ``way`` once in this process, and print what it added to the resident size at most, sampled every millisecond."""
    net, threads = network(), torch.get_num_threads()
    plain(net, 2)()  # what libraries take once
    before, highest, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if way == "fqdiff":
        with workers(network, torch.device("cpu")) as pool:
            ours(net, pool, outputs=True, bfloat16=False)()
    else:
        {"plain": plain(net, BATCH), "threads": plain(net, BATCH * threads), "vmap": by_vmap(net, BATCH)}[way]()
    done.set()
    watcher.join()
    print(json.dumps(highest[0] - before))


def memory() -> None:
    """Added peak memory of each way, each in a process of its own."""
    for way, label in (
        ("plain", f"plain batched, batch {BATCH}"),
        ("threads", f"plain batched, batch {BATCH} x threads"),
        ("fqdiff", f"fqdiff, a batch of {BATCH} on every thread"),
        ("vmap", f"vmap(grad), chunk {BATCH}"),
    ):
        command = [sys.executable, __file__, "--memory-of", way]
        added = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{label:40} {added:6.0f} MiB")


# --- samples for an error --------------------------------------------------------------------------------------------


def variance(timesteps: int, samples: int, seeds: int) -> None:
    """Samples that each way of drawing needs for a 5 % median standard error, on the trained mnist-small.

    The error of a row is the spread of its mean over independent seeds, so that nothing rests on the formulas under test.
    """
    model = open_model("pretrained:mnist-small").model
    tensors = {name: unpack_tensor(packed) for name, packed in model.packed.items()}
    checkpoint = Checkpoint(model.spec, tensors, None, torch.zeros(1, *model.spec.image_shape, dtype=torch.uint8))
    data = load_dataset(dataset_config("mnist5k", 32), 0, Context())
    print(f"{timesteps} timesteps x {samples} samples, {seeds} seeds; weight tensors only")
    print(f"{'drawing':12} {'one row':>10} {'mean over t':>12} {'ratio of neighbours in t':>26}   samples for 5 %")
    for kind in ("empirical", "true"):
        for way in ("none", "antithetic", "common", "both"):
            config = FisherConfig(kind, timesteps, samples, "tensor", activations=False, variance_reduction=way)
            found = []
            for seed in range(seeds):
                table = fisher(checkpoint, data, config, seed, Context())
                names = [n for n, t in checkpoint.tensors.items() if t.ndim > 1]
                found.append(torch.stack([table.entries[n].mean for n in names]))
            means = torch.stack(found)  # [seeds, tensors, timesteps]

            def needed(values: Tensor) -> float:
                relative = values.std(dim=0) / values.mean(dim=0).abs()
                return samples * (float(relative.median()) / 0.05) ** 2

            ratios = means[:, :, 1:] / means[:, :, :-1]
            row = f"{needed(means):10.1f} {needed(means.mean(dim=2)):12.1f} {needed(ratios):26.1f}"
            print(f"{kind[:4]} {way:10} {row}", flush=True)


def main() -> None:
    """Parse the command line and print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--variance", action="store_true", help="samples for a 5 %% error instead of speed and memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(options.memory_of)
    elif options.variance:
        variance(timesteps=10, samples=16, seeds=8)
    else:
        speed(options.rounds)
        memory()


if __name__ == "__main__":
    main()
