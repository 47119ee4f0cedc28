"""A market's options tried on calibration inputs: their Gram matrix, and what whole plans do.

Shapes: M parameters, F options each, K perturbations, B inputs of a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from fqdiff.configs import PlanConfig
from fqdiff.context import Context
from fqdiff.diffusion.schedule import NoiseSchedule
from fqdiff.errors import ConfigError, DataError, NumericalError
from fqdiff.planning.candidates import Market
from fqdiff.planning.knapsack import Array
from fqdiff.planning.quadratic import Quadratic
from fqdiff.planning.scores import timestep_weights
from fqdiff.sensitivity.gram import gram
from fqdiff.sensitivity.inputs import Inputs, draw_inputs
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.sensitivity.measure import replaced
from fqdiff.sensitivity.probes import ImageProbe, NoiseProbe, Probe, attributed_rise
from fqdiff.values import Checkpoint, Dataset, FisherTable, SamplerGain

LABEL = "plan calibration"


def calibration_timesteps(
    weighting: str, schedule: NoiseSchedule, count: int, gain: SamplerGain | None = None
) -> tuple[Tensor, Tensor]:
    """Timesteps int64, increasing, at most ``count``, and the weight of each, float64, all as :func:`timestep_weights` sums.

    Each is the middle of a stratum, with the weights of all of it. Strata widen with t, as (k / count)^2: errors grow by
    orders of magnitude toward t = 0. Those of a sampler's steps are all alike.
    """
    wanted, weights = timestep_weights(weighting, schedule, gain)
    power = 1 if weighting == "gain" or weighting.startswith("sampler") else 2
    edges = (len(wanted) * torch.linspace(0, 1, count + 1, dtype=torch.float64) ** power).round().long().unique()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(dim=0)])[edges]
    return wanted[(edges[:-1] + edges[1:]) // 2], sums.diff()


def calibration_inputs(
    checkpoint: Checkpoint, dataset: Dataset | None, table: FisherTable | None, config: PlanConfig, seed: int
) -> Inputs:
    """Training images of ``dataset``, noised: ``calibration_samples`` at each of ``calibration_timesteps``.

    ``table`` holds the gains of timestep weights by gain. Raises ConfigError or DataError without images that fit.
    """
    spec = checkpoint.spec
    if dataset is None:
        raise ConfigError(
            "a plan that runs the network needs training images", "give the data set that the model was trained on"
        )
    if tuple(dataset.images.shape[1:]) != spec.image_shape:
        raise DataError(
            f"images of shape {tuple(dataset.images.shape[1:])} for a network of {spec.image_shape}",
            "take the data set that the model was trained on",
        )
    gain = table.gain if table is not None else None
    steps, weights = calibration_timesteps(
        config.timestep_weights, spec.noise_schedule(), config.calibration_timesteps, gain
    )
    return draw_inputs(dataset.train, spec, steps, weights, config.calibration_samples, seed, LABEL)


def make_probe(
    checkpoint: Checkpoint,
    dataset: Dataset | None,
    table: FisherTable | None,
    config: PlanConfig,
    seed: int,
    device: torch.device,
) -> Probe:
    """What ``config.score`` predicts, to be measured: the noise at training inputs, or the images of a few sampler runs.

    Runs take as many steps as those of the trajectory table. Raises ConfigError or DataError without images that fit.
    """
    if config.score == "trajectory":
        assert table is not None
        steps = len(table.timesteps)
        return ImageProbe(checkpoint.spec, steps, config.calibration_samples, seed, LABEL, device)
    inputs = calibration_inputs(checkpoint, dataset, table, config, seed)
    return NoiseProbe(tuple(inputs.parts(config.calibration_samples)), device)


@dataclass(frozen=True)
class Calibration:
    """A checkpoint with its market and a probe. The parameters are the market's, in its order.

    ``fisher``: values of single weights that ranges and codebooks are fitted to, where they are known.
    """

    checkpoint: Checkpoint
    market: Market
    fisher: Mapping[str, Tensor]
    probe: Probe
    context: Context

    @cached_property
    def network(self) -> nn.Module:
        """In full precision, on the device."""
        network = self.checkpoint.network().to(self.context.device, self.probe.dtype)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @cached_property
    def plain(self) -> list[Tensor]:
        """What the full-precision network makes of every batch."""
        with torch.no_grad():
            return [self.probe.output(self.network, n) for n in range(len(self.probe.shares))]

    def weights(self, choice: tuple[int, ...]) -> dict[str, Tensor]:
        """The parameters that ``choice`` changes, as it stores them."""
        stored = {
            name: option.stored(self.checkpoint.tensors[name], self.fisher.get(name))
            for name, option in self.market.chosen(choice).items()
        }
        changed = {name: t for name, t in stored.items() if not torch.equal(t, self.checkpoint.tensors[name])}
        return {name: t.to(self.probe.dtype) for name, t in changed.items()}

    def measure(self, choice: tuple[int, ...]) -> tuple[float, Array]:
        """Rise of the network that ``choice`` leads to, and each parameter's part in it, [M]."""
        weights, names = self.weights(choice), {name: i for i, name in enumerate(self.market.options)}
        rise, parts = 0.0, np.zeros(len(names))
        for number, plain in enumerate(self.plain):
            found, by_name = attributed_rise(self.network, self.probe, number, plain, weights) if weights else (0.0, {})
            rise += found
            for name, part in by_name.items():
                parts[names[name]] += part
        return rise, parts

    def quadratic(self, ledger: Ledger) -> Quadratic:
        """1/2 sum of G over the options of weight tensors; biases and norms keep their diagonal values.

        Options that store a weight tensor to the bit have no row: they perturb nothing.
        """
        stored: list[tuple[str, Tensor]] = []
        rows = np.full(self.market.values.shape, -1, dtype=np.intp)
        linear = self.market.values.copy()
        for i, (name, options) in enumerate(self.market.options.items()):
            tensor = self.checkpoint.tensors[name]
            if tensor.ndim < 2:
                continue
            for j, option in enumerate(options):
                linear[i, j] = 0.0
                value = option.stored(tensor, self.fisher.get(name))
                if not torch.equal(value, tensor):
                    rows[i, j] = len(stored)
                    stored.append((name, value))
        rows[rows < 0] = len(stored)
        matrix = np.zeros((len(stored) + 1, len(stored) + 1))
        matrix[:-1, :-1] = self._gram(stored, ledger).numpy()
        return Quadratic(linear, matrix, rows)

    def _gram(self, stored: list[tuple[str, Tensor]], ledger: Ledger) -> Tensor:
        """Sum over inputs of share * <delta_k, delta_l>, [K, K], batch by batch."""
        total = ledger.rows("gram", len(stored), len(stored))
        for number in ledger.units("gram", len(self.probe.shares), "candidate", steps=len(stored)):
            deltas = torch.empty(len(stored), *self.plain[number].shape)
            for k, (name, tensor) in enumerate(stored):
                with torch.no_grad(), replaced(self.network, {name: tensor.to(self.probe.dtype)}):
                    deltas[k] = self.probe.output(self.network, number) - self.plain[number]
                ledger.step()
            total += gram(deltas, self.probe.shares[number])
            if not torch.isfinite(total).all():
                raise NumericalError("the network's output holds NaN or infinity", "check the checkpoint")
        return total
