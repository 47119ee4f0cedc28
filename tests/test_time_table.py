"""What depends on t alone is computed once for each timestep of a sampler, and no bit of what comes out changes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from fqdiff.configs import ActivationConfig, CalibrateConfig, PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context
from fqdiff.models.registry import temporal_layers
from fqdiff.models.time_table import TimeTable, tabulate_time
from fqdiff.stages import sample as stage
from fqdiff.stages.activations import quantize_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import sample
from fqdiff.values import Checkpoint, FisherTable, QuantizedCheckpoint
from tests.test_phases import phased_config

TWO_BATCHES = SampleConfig(count=10, steps=4)


def made(checkpoint: Checkpoint, low: str = "int4", **settings: object) -> QuantizedCheckpoint:
    """The tiny model with quantized activations, and with biases by timestep."""
    planned = plan(checkpoint, None, None, PlanConfig("uniform", low=low), 0, Context())
    correction = QuantizeConfig("timestep", bias_intervals=2, calibration_images=2, calibration_steps=4)
    stored = quantize(checkpoint, planned, None, correction, 0, Context())
    inputs = calibrate(checkpoint, None, None, CalibrateConfig(steps=4, timesteps=4, samples=2), 0, Context())
    config = ActivationConfig(intervals=2, **settings)  # type: ignore[arg-type]
    return quantize_activations(checkpoint, stored, inputs, config, 0, Context())


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    return made(checkpoint, temporal=False)


def counted(network: nn.Module, layers: set[str]) -> Counter[str]:
    """From now on, how often each of the ``layers``, which depend on t alone, computes."""
    calls: Counter[str] = Counter()

    def counts(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: calls.update([name])

    for name in layers:
        network.get_submodule(name).register_forward_hook(counts(name))
    return calls


@pytest.mark.parametrize("packed", [False, True])
def test_the_network_puts_out_the_same_to_the_bit(model: QuantizedCheckpoint, packed: bool) -> None:
    """At one t, again at it, in a batch of another size, and at several t. Rejects a row of one batch size used for another."""
    exact, kept = (model.packed_network() if packed else model.network() for _ in range(2))
    layers = temporal_layers(model.network())
    calls = counted(kept, layers)
    tabulate_time(kept)
    x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [torch.full((n,), t) for n, t in ((7, 500), (7, 20), (3, 500), (7, 500), (7, 20), (1, 999))]
    with torch.inference_mode():
        for t in [*batches, torch.tensor([0, 500, 20, 500])]:
            torch.testing.assert_close(kept(x[: len(t)], t), exact(x[: len(t)], t), atol=0, rtol=0)
    assert set(calls.values()) == {5}  # of 7 batches two were there
    assert calls.keys() == layers


def test_one_row_is_kept_of_a_batch_that_is_alike(model: QuantizedCheckpoint) -> None:
    network = model.network()
    tabulate_time(network)
    with torch.inference_mode():
        network(torch.zeros(7, 1, 8, 8), torch.full((7,), 3))
    (table,) = (m for m in network.modules() if isinstance(m, TimeTable))
    assert [len(rows) for rows in table.kept.values()] == [1]


def test_samplers_compute_it_once_for_each_step_of_all_batches(
    model: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects a table that is made anew for each batch, and one that images depend on."""
    calls: list[Counter[str]] = []
    network = QuantizedCheckpoint.network

    def watched(self: QuantizedCheckpoint) -> nn.Module:
        built = network(self)
        calls.append(counted(built, temporal_layers(built)))
        return built

    monkeypatch.setattr(QuantizedCheckpoint, "network", watched)
    found = sample(model, TWO_BATCHES, 0, Context(batch_size=5))
    monkeypatch.setattr(stage, "tabulate_time", lambda network: None)
    plain = sample(model, TWO_BATCHES, 0, Context(batch_size=5))
    assert torch.equal(found.images, plain.images)
    assert [set(each.values()) for each in calls] == [{4}, {8}]


def test_it_is_for_models_that_keep_these_inputs_exact_beside_quantized_ones(
    model: QuantizedCheckpoint, checkpoint: Checkpoint
) -> None:
    assert model.tabulates_time
    assert not made(checkpoint).tabulates_time
    assert not replace(model, activations={}).tabulates_time


def test_each_timestep_is_computed_in_its_phase(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    phased = plan(checkpoint, fisher_table, None, phased_config(), 0, Context())
    network, kept = (quantize(checkpoint, phased, None, QuantizeConfig(), 0, Context()).network() for _ in range(2))
    tabulate_time(kept)
    with torch.inference_mode():
        for t in ([10, 10], [990, 990], [10, 10], [990, 10]):
            batch = torch.zeros(2, 1, 8, 8), torch.tensor(t)
            assert torch.equal(kept(*batch), network(*batch))
