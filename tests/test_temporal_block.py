"""The temporal block: it is what depends on t alone, is reconstructed first, over all timesteps, and then left as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fqdiff.calibration import reconstruct as blocks
from fqdiff.calibration import temporal_block as module
from fqdiff.calibration.temporal_block import reconstruct_temporal
from fqdiff.configs import ActivationConfig, CalibrateConfig, PlanConfig, QuantizeConfig, ReconstructConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.errors import ConfigError
from fqdiff.models.registry import build, temporal_block, temporal_layers
from fqdiff.models.unet import ResBlock
from fqdiff.quant.packed import unpack_tensor
from fqdiff.stages.activations import planned_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.reconstruct import reconstruct_blocks, reconstruct_temporal_first
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint
from tests.test_cli import call, good

FEW = ReconstructConfig(iterations=6, batch=8, inputs=16, network_iterations=0)


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    return calibrate(checkpoint, None, None, CalibrateConfig(steps=4, timesteps=4, samples=6), 0, Context())


@pytest.fixture(scope="module")
def stored(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int3"), 0, Context())
    return quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())


def outputs(network: torch.nn.Module, t: Tensor) -> Tensor:
    """What every residual block adds for t, noted while the whole network computes."""
    seen: list[Tensor] = []
    handles = [
        m.time.register_forward_hook(lambda layer, a, output: seen.append(output))
        for m in network.modules()
        if isinstance(m, ResBlock) and m.time is not None
    ]
    with torch.no_grad():
        network(torch.randn(len(t), 1, 8, 8), t)
    for handle in handles:
        handle.remove()
    return torch.cat(seen, dim=1)


def test_the_block_computes_what_residual_blocks_add_for_t_and_nothing_else_depends_on_t_alone(
    checkpoint: Checkpoint,
) -> None:
    network, t = checkpoint.network(), torch.tensor([0, 17, 500, 999])
    block, names = temporal_block(network)
    assert torch.equal(block(t), outputs(network, t))
    layers = temporal_layers(network)
    assert layers == {"stem.time.linear1", "stem.time.linear2"} | {
        f"block{b}.res{r}.time" for b in range(1, 7) for r in (1, 2)
    }
    assert set(names.values()) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for own, name in names.items():
        assert block.get_parameter(own) is network.get_parameter(name)
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_pre_hook(lambda m, a, name=name: inputs.setdefault(name, []).append(a[0]))  # type: ignore[misc]
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(4, 1, 8, 8), t)
    assert {name for name, (one, two) in inputs.items() if torch.equal(one, two)} == layers


def test_what_it_puts_out_comes_closer_at_every_timestep_and_its_rounding_then_stays(
    checkpoint: Checkpoint, stored: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """Rejects a reconstruction that learns these layers again with their residual blocks."""
    config, t = replace(FEW, iterations=120, batch=32), torch.arange(1000)
    learned, _ = reconstruct_temporal(checkpoint, stored, config, 0, Context())
    after = replace(stored, packed={**stored.packed, **learned})
    full, before, now = (outputs(m.network(), t) for m in (checkpoint, stored, after))
    assert (now - full).square().mean() < 0.7 * (before - full).square().mean()
    assert set(learned) == {f"{layer}.weight" for layer in temporal_layers(checkpoint.network())}
    made = reconstruct_temporal_first(checkpoint, stored, calibration, FEW, 0, Context())
    short, _ = reconstruct_temporal(checkpoint, stored, FEW, 0, Context())
    together = reconstruct_blocks(checkpoint, stored, calibration, FEW, 0, Context())
    changed = 0
    for name, p in made.packed.items():
        if name in short:
            assert torch.equal(p.parts["codes"], short[name].parts["codes"])
        elif "codes" in p.parts:
            changed += int((unpack_tensor(p) != unpack_tensor(stored.packed[name])).sum())
    assert changed > 100
    assert any(not torch.equal(together.packed[n].parts["codes"], short[n].parts["codes"]) for n in short)
    assert made.described == stored.described


def test_a_stopped_run_ends_alike(
    checkpoint: Checkpoint,
    stored: QuantizedCheckpoint,
    calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = reconstruct_temporal_first(checkpoint, stored, calibration, FEW, 0, Context())
    parts = MemoryParts()
    learn, begun = blocks.learn_block, []

    def stopping(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return learn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "learn_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_temporal_first(checkpoint, stored, calibration, FEW, 0, Context(parts=parts))
    assert module.NAME in parts.saved
    assert len(parts.saved) == 3
    monkeypatch.setattr(module, "learn_block", None)  # it is not learned again
    again = reconstruct_temporal_first(checkpoint, stored, calibration, FEW, 0, Context(parts=parts, batch_size=2))
    for name, p in whole.packed.items():
        assert torch.equal(unpack_tensor(p), unpack_tensor(again.packed[name]))


def test_networks_and_plans_without_a_temporal_rounding_are_refused(
    checkpoint: Checkpoint, stored: QuantizedCheckpoint
) -> None:
    sliced = build({**checkpoint.spec.architecture, "time_embedding": "sliced"}, "meta")
    assert not temporal_layers(sliced)
    names = temporal_block(checkpoint.network())[1].values()
    floats = quantize(
        checkpoint, plan(checkpoint, None, None, PlanConfig("uniform", low="float16"), 0, Context()), None,
        QuantizeConfig(), 0, Context(),
    )  # fmt: skip
    kept = replace(stored, packed={n: (floats if n in names else stored).packed[n] for n in stored.packed})
    with pytest.raises(ConfigError, match="no integer weight of this model depends on t alone"):
        reconstruct_temporal(checkpoint, kept, FEW, 0, Context())


def test_inputs_that_depend_on_t_alone_can_stay_as_they_are(checkpoint: Checkpoint) -> None:
    every = planned_activations(checkpoint.spec, ActivationConfig())
    fewer = planned_activations(checkpoint.spec, ActivationConfig(temporal=False))
    assert every.keys() - fewer.keys() == temporal_layers(checkpoint.network())
    assert all(every[site] == a for site, a in fewer.items())


def test_the_command_reconstructs_the_temporal_block_first(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(store, "plan", "--uniform", "int4", "--name", "int4")
    good(store, "calibrate", "one", "--steps", "4", "--timesteps", "4", "--samples", "4", "--name", "inputs")
    few = ("--reconstruct-iterations", "3", "--reconstruct-network", "2")
    flags = ("--reconstruct", *few, "--reconstruct-temporal")
    made: Any = good(store, "quantize", "int4", *flags)
    assert made["file_bytes"] == made["promised_bytes"]
    method = ("--method", "tfmq", *few)
    assert good(store, "quantize", "int4", *method, "--dry-run")["id"] == made["id"]
    together: Any = good(store, "quantize", "int4", *method, "--reconstruct-together", "--dry-run")
    assert together["id"] == good(store, "quantize", "int4", *flags[:5], "--dry-run")["id"] != made["id"]
    config = tmp_path / "fqdiff.toml"
    config.write_text("[reconstruct-temporal]\niterations = 3\nnetwork_iterations = 2\n")
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    both: Any = good(store, "quantize", "int4", *method, "--activations", "int8", "--activation-intervals", "2")
    assert made["id"] in str(both["inputs"]["model"])
    config.write_text("[reconstruct-temporal]\n[reconstruct]\n")
    for arguments, message in (
        (("--reconstruct-temporal",), "temporal of a reconstruction that is not asked for"),
        (("--config", str(config)), "tables for reconstruct and reconstruct-temporal"),
    ):
        refused = call(store, "quantize", "int4", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
