"""Fisher tables: of every parameter, at every timestep or through a whole sampler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FisherEntry:
    """Fisher diagonal of one parameter, or of one layer's output, at each timestep, reduced over its elements; float64.

    ``mean`` [T], ``maximum`` [T], ``standard_error`` [T] (of the mean, over samples), ``channel`` [T, O]: mean within each
    output channel; [T, 0] in a table without channels.
    """

    block: str
    numel: int
    mean: Tensor
    standard_error: Tensor
    maximum: Tensor
    channel: Tensor


@dataclass(frozen=True)
class TrajectoryEntry:
    """Fisher diagonal of one parameter for the sampler's whole run, its error acting at every step; float64.

    ``samples`` [N]: mean over elements of each run's squared gradient. ``mean``, ``maximum`` and ``channel`` [O] rest on
    their robust mean; ``standard_error`` is that of ``mean``.
    """

    block: str
    numel: int
    mean: float
    standard_error: float
    maximum: float
    channel: Tensor
    samples: Tensor


@dataclass(frozen=True)
class WeightBin:
    """Fisher diagonal of every single weight, averaged over the table's timesteps from ``first`` to ``last``.

    ``read()`` gives float32 tensors shaped like the parameters, keyed by name; bins are large, so none is held in memory.
    """

    first: int
    last: int
    read: Callable[[], Tensors]


@dataclass(frozen=True)
class SamplerGain:
    """What an error of eps at each step of a sampler becomes in its final image: E|J_s^T v|^2 / pixels, J_s = d x_0 / d eps_s.

    An error of that step of squared norm e that points anywhere changes the image by ``mean`` * e. ``timesteps`` int64 [S],
    increasing; ``mean`` and ``standard_error`` [S] are robust ones over runs, ``samples`` [N, S] those of each run; float64.
    """

    timesteps: Tensor
    mean: Tensor
    standard_error: Tensor
    samples: Tensor


@dataclass(frozen=True)
class FisherTable:
    """Fisher diagonal per parameter and timestep. ``timesteps`` int64 [T], increasing; ``samples`` per timestep.

    ``activations`` holds the same for the output of each layer, keyed by layer name; ``trajectory`` what the whole sampler
    run gives, for that kind, and ``gain`` how its steps amplify errors; ``weights`` the single weights, where they were asked
    for.
    """

    kind: str
    timesteps: Tensor
    samples: int
    entries: Mapping[str, FisherEntry]
    activations: Mapping[str, FisherEntry] = field(default_factory=dict)
    trajectory: Mapping[str, TrajectoryEntry] = field(default_factory=dict)
    weights: Sequence[WeightBin] = ()
    gain: SamplerGain | None = None
