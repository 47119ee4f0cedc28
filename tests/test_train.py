import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fqdiff.configs import TrainConfig
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.errors import ConfigError, DataError, NumericalError
from fqdiff.stages.train import batch_indices, initial_state, learning_rate, train
from fqdiff.values import Checkpoint, Dataset, ModelSpec
from tests.conftest import tiny_config


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors) and torch.equal(a.loss, b.loss)


def test_training_lowers_the_loss(dataset: Dataset) -> None:
    loss = train(dataset, None, tiny_config(steps=150, learning_rate=3e-3), 0, Context()).loss
    assert float(loss[-20:].mean()) < 0.9 * float(loss[:20].mean())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(dataset: Dataset, checkpoint: Checkpoint) -> None:
    torch.manual_seed(12345)  # the global generator must not matter
    assert same(train(dataset, None, tiny_config(), 0, Context()), checkpoint)
    assert not same(train(dataset, None, tiny_config(), 1, Context()), checkpoint)


def test_training_leaves_the_global_generator_alone(dataset: Dataset) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(dataset, None, tiny_config(steps=1), 0, Context())
    assert torch.equal(torch.rand(3), expected)


def test_training_starts_from_the_weights_of_another_checkpoint(dataset: Dataset, checkpoint: Checkpoint) -> None:
    before = checkpoint.tensors["stem.conv.weight"].clone()
    still = train(dataset, checkpoint, tiny_config(steps=2, learning_rate=1e-30), 0, Context())
    assert all(torch.allclose(still.tensors[name], t, atol=1e-6) for name, t in checkpoint.tensors.items())
    longer = train(dataset, checkpoint, tiny_config(steps=30), 0, Context())
    assert float(longer.loss.mean()) < float(train(dataset, None, tiny_config(steps=30), 0, Context()).loss.mean())
    assert torch.equal(checkpoint.tensors["stem.conv.weight"], before)


def test_training_refuses_to_start_from_another_network(dataset: Dataset, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="another network"):
        train(dataset, checkpoint, tiny_config(prediction="eps", schedule="linear"), 0, Context())


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_an_interrupted_run_continues_to_the_same_bits(dataset: Dataset, optimizer: str) -> None:
    config = tiny_config(optimizer=optimizer, steps=7)
    config.architecture["dropout"] = 0.3  # dropout's draws must continue too
    whole = train(dataset, None, config, 0, Context())
    parts, asked = MemoryParts(), iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        train(dataset, None, config, 0, Context(parts=parts, soft_stop=lambda: nullcontext(lambda: next(asked))))
    assert parts.saved["state"].data["step"] == 3
    assert same(train(dataset, None, config, 0, Context(parts=parts)), whole)


def test_the_checkpoint_holds_the_average_not_the_last_weights(dataset: Dataset) -> None:
    parts = MemoryParts()
    config = tiny_config(steps=20, ema_decay=0.9)
    averaged = train(dataset, None, config, 0, Context(parts=parts, save_interval=0)).tensors
    last = {k.removeprefix("network."): v for k, v in parts.saved["state"].tensors.items() if k.startswith("network.")}
    assert averaged.keys() == last.keys()
    assert all(not torch.equal(averaged[name], last[name]) for name in last if name.endswith("conv1.weight"))


def test_a_nan_loss_stops_and_keeps_the_last_good_state(dataset: Dataset) -> None:
    """Long before the next regular save: the state of the step before is kept, and it is finite."""
    parts = MemoryParts()
    wild = tiny_config(learning_rate=1e30, warmup=0, steps=30, clip_norm=0.0)
    with pytest.raises(NumericalError, match="at step") as caught:
        train(dataset, None, wild, 0, Context(parts=parts))
    kept = parts.saved["state"]
    assert f"at step {kept.data['step']}" in caught.value.message
    assert all(torch.isfinite(v).all() for k, v in kept.tensors.items() if k.startswith("average."))


def test_a_state_of_another_recipe_is_refused(dataset: Dataset) -> None:
    parts = MemoryParts()
    parts.save("state", Part({"loss": torch.zeros(3)}, {"step": 1}))
    with pytest.raises(ConfigError, match="another recipe"):
        train(dataset, None, tiny_config(), 0, Context(parts=parts))


def test_images_of_another_size_are_refused(dataset: Dataset) -> None:
    wrong = replace(dataset, images=torch.zeros(60, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(DataError, match="images of shape"):
        train(wrong, None, tiny_config(), 0, Context())


def test_only_training_images_are_seen(dataset: Dataset) -> None:
    """Other held-out images, same weights: a loop that trains on everything fails."""
    images = dataset.images.clone()
    images[dataset.held_out] = 255
    assert same(
        train(replace(dataset, images=images), None, tiny_config(), 0, Context()),
        train(dataset, None, tiny_config(), 0, Context()),
    )


def test_every_image_is_seen_once_per_epoch() -> None:
    seen = torch.cat([batch_indices(10, 4, step, 0) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainConfig(steps=1000, warmup=100, learning_rate=1.0)
    assert learning_rate(config, 0) == pytest.approx(0.01, rel=1e-3)
    assert learning_rate(config, 99) > 0.95
    assert learning_rate(config, 999) < 1e-4
    assert learning_rate(replace(config, decay="none"), 999) == 1.0


def test_bfloat16_trains_other_bits_but_close(dataset: Dataset, checkpoint: Checkpoint) -> None:
    half = train(dataset, None, tiny_config(precision="bfloat16"), 0, Context())
    assert not same(half, checkpoint)
    assert torch.allclose(half.loss, checkpoint.loss, rtol=0.05)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = tiny_config()
    spec = ModelSpec(config.architecture, config.schedule, config.prediction)
    states = [initial_state(spec, config, seed, torch.device("cpu")).network.state_dict() for seed in (0, 0, 1)]
    assert torch.equal(states[0]["stem.conv.weight"], states[1]["stem.conv.weight"])
    assert not torch.equal(states[0]["stem.conv.weight"], states[2]["stem.conv.weight"])


TRAIN = ["train", "--preset", "tiny", "--dataset", "mnist5k", "--quiet"]


def run_cli(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fqdiff", *arguments, "--store", str(store)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def model_bytes(store: Path) -> bytes:
    (path,) = store.glob("checkpoint/*/model.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_training_continues_to_identical_weights(tmp_path: Path, how: signal.Signals, code: int) -> None:
    length = ["--steps", "250"]
    whole = run_cli(tmp_path / "whole", *TRAIN, *length)
    assert whole.returncode == 0, whole.stderr
    store = tmp_path / "killed"
    environment = {**os.environ, "FQDIFF_SAVE_INTERVAL": "0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fqdiff", *TRAIN, *length, "--store", str(store)], env=environment
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("parts/checkpoint/*/state.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "training ended before it could be interrupted"
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(timeout=60) == code
    assert not list(store.glob("checkpoint/*/manifest.json"))
    resumed = run_cli(store, "train", "--resume", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert model_bytes(store) == model_bytes(tmp_path / "whole")
    assert not list(store.glob("parts/checkpoint/*"))


def test_init_is_part_of_the_lineage_and_the_id(tmp_path: Path) -> None:
    first = run_cli(tmp_path, *TRAIN, "--steps", "3", "--name", "first")
    assert first.returncode == 0, first.stderr
    second = run_cli(tmp_path, *TRAIN, "--steps", "3", "--init", "first", "--name", "second", "--json")
    assert second.returncode == 0, second.stderr
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoint/*/manifest.json")]
    roles = {tuple(i["role"] for i in m["recipe"]["inputs"]) for m in manifests}
    assert roles == {("dataset",), ("dataset", "init")}


def test_resuming_without_an_interrupted_run_says_so(tmp_path: Path) -> None:
    result = run_cli(tmp_path, "train", "--resume")
    assert result.returncode == 1
    assert "no interrupted training" in result.stderr


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """torchrun on the CPU (gloo): each process takes half of every batch."""
    alone = run_cli(tmp_path / "one", *TRAIN)
    assert alone.returncode == 0, alone.stderr
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fqdiff",
        *TRAIN,
    ]
    both = subprocess.run(
        [*command, "--store", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert both.returncode == 0, both.stderr
    one, two = (
        load_file(next((tmp_path / n).glob("checkpoint/*/history.safetensors")))["loss"] for n in ("one", "two")
    )
    assert torch.allclose(one, two, rtol=1e-3)
