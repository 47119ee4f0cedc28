"""How many sampler runs a trajectory Fisher needs, by way of averaging them.

    fqdiff fisher --kind trajectory --samples 64 --name runs
    python benchmarks/trajectory_convergence.py runs --output docs/images/trajectory-convergence.png

The table keeps the squared gradient of every run and tensor. Two disjoint sets of n runs are averaged in the same way; what is
shown is how far the two disagree: the median over weight tensors of |log ratio|, its mean over random pairs of sets. An average
that has converged agrees with itself. Planning needs ratios between tensors, so one factor common to all of them is taken out;
the scale is shown by itself.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from fqdiff.fisher.moments import robust_weights
from fqdiff.pipeline import Runner
from fqdiff.rng import generator
from fqdiff.store.store import Store
from fqdiff.viz.figures import COLOURS

PAIRS = 200


def plain(values: Tensor, norms: Tensor) -> Tensor:
    """The mean over runs."""
    return values.mean(dim=0)


def median_of_means(values: Tensor, norms: Tensor) -> Tensor:
    """Median over (about) the square root of n group means."""
    groups = max(1, round(len(values) ** 0.5))
    return torch.stack([part.mean(dim=0) for part in values.tensor_split(groups)]).quantile(0.5, dim=0)


def truncated(values: Tensor, norms: Tensor) -> Tensor:
    """The mean without the tenth (at least one) of runs with the largest norm."""
    keep = norms.argsort()[: len(norms) - max(1, len(norms) // 10)]
    return values[keep].mean(dim=0)


def geometric(values: Tensor, norms: Tensor) -> Tensor:
    """exp of the mean log, tensor by tensor."""
    return values.log().mean(dim=0).exp()


def normalised(values: Tensor, norms: Tensor) -> Tensor:
    """What fqdiff keeps: geometric mean of the norms times the mean share of each run."""
    return torch.einsum("n,nk->k", robust_weights(norms), values)


AVERAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain mean": plain,
    "median of means": median_of_means,
    "truncated mean": truncated,
    "geometric mean of each tensor": geometric,
    "normalised per run (kept)": normalised,
}


def disagreement(values: Tensor, norms: Tensor, count: int, average: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    """(ratios between tensors, common scale): mean over pairs of sets of ``count`` runs."""
    found = []
    for pair in range(PAIRS):
        order = torch.randperm(len(values), generator=generator(0, "pairs", count, pair))
        one, other = (average(values[k], norms[k]).log() for k in (order[:count], order[count : 2 * count]))
        difference = one - other
        scale = difference.median()
        found.append([float((difference - scale).abs().median()), float(scale.abs())])
    return np.mean(found, axis=0)


def main() -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", help="trajectory Fisher table: name, id or prefix")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--output", type=Path, help="PNG to write")
    options = parser.parse_args()
    store = Store(options.store)
    manifest = store.resolve(options.ref, ("fisher",))
    table = Runner(store).load(manifest)
    norms = torch.stack([e.samples * e.numel for e in table.trajectory.values()]).sum(dim=0)
    values = torch.stack(
        [e.samples for n, e in table.trajectory.items() if e.numel > 1 and n.endswith("weight")], dim=1
    )
    counts = [n for n in (2, 4, 8, 12, 16, 24, 32) if 2 * n <= len(norms)]
    print(f"fisher {manifest.id}: {len(norms)} runs, squared norms {norms.min():.1e} to {norms.max():.1e}")
    print(f"{'runs':30}" + "".join(f"{n:>14}" for n in counts))
    curves = {}
    for name, average in AVERAGES.items():
        curves[name] = np.array([disagreement(values, norms, n, average) for n in counts])
        print(f"{name:30}" + "".join(f"{r:7.3f}{s:7.3f}" for r, s in curves[name]))
    print("each pair: disagreement on ratios between tensors, on the common scale (|log|)")
    if options.output:
        draw(curves, counts, manifest.id, options.output)


def draw(curves: dict[str, np.ndarray], counts: list[int], table_id: str, path: Path) -> None:
    """Two panels: ratios between tensors, common scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column, title in zip(
        figure.subplots(1, 2), (0, 1), ("ratios between tensors", "common scale"), strict=True
    ):
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(counts, curve[:, column], marker="o", color=colour, label=name)
        axes.set(
            xscale="log", yscale="log", xlabel="sampler runs", ylabel="|log ratio| of two disjoint sets", title=title
        )
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.text(0.995, 0.005, f"fisher {table_id}", ha="right", va="bottom", fontsize=6)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
