"""The pictures of a Fisher table, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from fqdiff.errors import LineageError
from fqdiff.models.registry import build, output_axes
from fqdiff.values import Checkpoint, FisherEntry, FisherTable
from fqdiff.viz import curves, maps, weights
from fqdiff.viz.figures import InBlock, in_blocks


@dataclass(frozen=True)
class Subject:
    """What is drawn: a Fisher table, the checkpoint that it was measured on, and the id to put in the corner."""

    table: FisherTable
    checkpoint: Checkpoint
    artifact: str

    def __post_init__(self) -> None:
        for measured in (self.table.entries, self.table.trajectory):
            if measured and measured.keys() != self.checkpoint.tensors.keys():
                raise LineageError("the Fisher table is of another model", "run fqdiff fisher on this checkpoint")

    @property
    def measured(self) -> Mapping[str, InBlock]:
        """Every parameter, in the network's order, as the table has it; a safetensors file sorts them by name."""
        return self.table.entries or self.table.trajectory

    @property
    def weights(self) -> list[str]:
        """Names of the parameters with two axes or more."""
        return [name for name in self.measured if self.checkpoint.tensors[name].ndim >= 2]

    @property
    def weight_entries(self) -> dict[str, FisherEntry]:
        """The Fisher values of the weight tensors; biases and norms, which no plan lowers, would double every picture."""
        return {name: self.table.entries[name] for name in self.weights}

    @property
    def weight_groups(self) -> dict[str, list[str]]:
        """The weight tensors of each block."""
        return in_blocks({name: self.measured[name] for name in self.weights})


def _magnitudes(subject: Subject) -> Figure:
    axes_of = output_axes(build(subject.checkpoint.spec.architecture, "meta"))
    return weights.magnitude_map(subject.checkpoint.tensors, subject.weight_groups, axes_of, subject.artifact)


DRAW: Mapping[str, Callable[[Subject], Figure]] = {
    "heatmap-linear": lambda s: maps.linear_map(s.table, s.weight_entries, s.artifact),
    "heatmap-log": lambda s: maps.log_map(s.table, s.weight_entries, s.artifact),
    "heatmap-minmax": lambda s: maps.scaled_map(s.table, s.weight_entries, s.artifact),
    "blocks": lambda s: curves.block_curves(s.table, s.artifact),
    "tensors": lambda s: curves.tensor_curves(s.table, s.weights, s.artifact),
    "weights": _magnitudes,
    "histograms": lambda s: weights.histograms(s.checkpoint.tensors, s.weight_groups, s.artifact),
    "error": lambda s: maps.error_map(s.table, s.weight_entries, s.artifact),
    "trajectory": lambda s: curves.trajectory_dots(s.table.trajectory, s.weights, s.artifact),
    "activations": lambda s: maps.activation_map(s.table, s.artifact),
}
OF_ENTRIES = {"heatmap-linear", "heatmap-log", "heatmap-minmax", "blocks", "tensors", "error"}


def applicable(table: FisherTable) -> list[str]:
    """Names of the pictures that ``table`` has values for."""
    absent = set() if table.entries else set(OF_ENTRIES)
    absent |= set() if table.trajectory else {"trajectory"}
    absent |= set() if table.activations else {"activations"}
    return [name for name in DRAW if name not in absent]
