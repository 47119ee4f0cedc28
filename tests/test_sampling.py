"""Sampling many images: cut into units, stopped, continued, shared, and batched by memory; always the same images."""

import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.main import get_command

from fqdiff.cli.app import app
from fqdiff.cli.shards import parse_shard
from fqdiff.configs import PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.errors import ArtifactCorrupt, ConfigError, NumericalError
from fqdiff.memory import peak_bytes
from fqdiff.stages import sample as module
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import (
    HEADROOM,
    KERNELS,
    LARGEST_BATCH,
    batch_bytes,
    batch_that_fits,
    even_size,
    sample,
    sample_shard,
    units,
)
from fqdiff.store.parts import StoredParts, unfinished
from fqdiff.store.pretrained import open_model
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint
from tests.test_cli import call, good
from tests.test_fisher_memory import peak_of

SMALL = SampleConfig(steps=2, count=11)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 4 images."""
    monkeypatch.setattr(module, "UNIT_IMAGES", 4)


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> Tensor:
    return sample(checkpoint, SMALL, 0, Context()).images


def test_another_batch_size_moves_a_rare_pixel_by_one_level_and_the_help_promises_no_more() -> None:
    """Of ``mnist-small``, with the kernels of this machine. Rejects the promise that no image changes."""
    model = open_model("pretrained:mnist-small").model
    config = SampleConfig(steps=5, count=20)
    one, other = (sample(model, config, 0, Context(batch_size=size)).images.int() for size in (8, 20))
    apart = (one - other).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).double().mean()) < 1e-3
    (option,) = (p for p in get_command(app).commands["sample"].params if p.name == "batch_size")  # type: ignore[attr-defined]
    assert "changes no image" not in option.help
    assert "pixel" in option.help


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "number"), [(1, 1), (49, 1), (50, 1), (51, 2), (5000, 100)])
def test_units_hold_all_images_once_and_in_order(count: int, number: int) -> None:
    cut = units(count)
    assert [k for unit in cut for k in unit.members] == list(range(count))
    assert [unit.name for unit in cut] == [f"unit-{k:04}-of-{number:04}" for k in range(1, number + 1)]


@pytest.mark.parametrize(
    ("count", "largest", "size"),
    [(120, 100, 60), (100, 100, 100), (101, 100, 51), (5000, 100, 100), (7, 100, 7), (7, 1, 1)],
)
def test_batches_of_one_size_hold_hardly_more_than_the_images(count: int, largest: int, size: int) -> None:
    assert even_size(count, largest) == size
    batches = -(-count // largest)
    assert -(-count // size) == batches
    assert size * batches - count < batches


def test_a_hundred_and_twenty_images_are_two_batches_of_sixty(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects batches as large as may be, where 80 of 200 images computed are thrown away, and batches of two sizes."""
    sizes = []
    make_images = module.make_images

    def spy(predict, spec, config, seed, context, ks, size, *rest):  # type: ignore[no-untyped-def]
        sizes.append((len(ks), size))
        return make_images(predict, spec, config, seed, context, ks, size, *rest)

    monkeypatch.setattr(module, "make_images", spy)
    sample(checkpoint, SampleConfig(steps=1, count=120), 0, Context())
    assert sizes == [(60, 60), (60, 60)]


def making(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of the images of each batch that is made from now on."""
    seen: list[list[int]] = []
    make_images = module.make_images

    def spy(predict, spec, config, seed, context, ks, *rest):  # type: ignore[no-untyped-def]
        seen.append(list(ks))
        return make_images(predict, spec, config, seed, context, ks, *rest)

    monkeypatch.setattr(module, "make_images", spy)
    return seen


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_units_and_batches_change_no_image(checkpoint: Checkpoint, small_units: None, batch: int, sampler: str) -> None:
    config = SampleConfig(sampler, steps=4, count=11)
    parts = MemoryParts()
    images = sample(checkpoint, config, 3, Context(batch_size=batch, parts=parts)).images
    assert sorted(parts.saved) == [f"unit-000{k}-of-0003" for k in (1, 2, 3)]
    alone = sample(checkpoint, SampleConfig(sampler, steps=4, count=1), 3, Context()).images
    assert torch.equal(images[:1], alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNIT_IMAGES", 50)
        assert torch.equal(images, sample(checkpoint, config, 3, Context()).images)


def test_a_run_continues_with_the_units_that_lack(
    checkpoint: Checkpoint, whole: Tensor, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may join images of units that are no neighbours."""
    parts = MemoryParts()
    sample(checkpoint, SMALL, 0, Context(parts=parts))
    del parts.saved["unit-0001-of-0003"], parts.saved["unit-0003-of-0003"]
    seen = making(monkeypatch)
    assert torch.equal(sample(checkpoint, SMALL, 0, Context(parts=parts, batch_size=5)).images, whole)
    assert seen == [[0, 1, 2, 3, 8], [9, 10]]
    seen.clear()
    assert torch.equal(sample(checkpoint, SMALL, 0, Context(parts=parts)).images, whole)
    assert not seen


@pytest.mark.parametrize("order", ["1/1", "2/2 1/2", "3/3 1/3 2/3", "2/7 1/7 7/7 3/7", "1/2 1/3 2/3 3/3"])
def test_shards_in_any_order_join_to_the_images_of_one_run(
    checkpoint: Checkpoint, whole: Tensor, small_units: None, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also more shards than units, and shares that overlap."""
    context = Context(parts=MemoryParts())
    for text in order.split():
        sample_shard(checkpoint, SMALL, 0, context, parse_shard(text))
    seen = making(monkeypatch)
    assert torch.equal(sample(checkpoint, SMALL, 0, context).images, whole)
    assert not seen


def test_a_unit_that_is_not_what_it_should_be_is_named(checkpoint: Checkpoint, small_units: None) -> None:
    parts = MemoryParts()
    sample(checkpoint, SMALL, 0, Context(parts=parts))
    name = "unit-0002-of-0003"
    images, data = parts.saved[name].tensors["images"], parts.saved[name].data
    wrong = [
        Part({"images": images}, {"members": [0, 1, 2, 3]}),
        Part({"images": images[:3]}, data),
        Part({"images": images.float()}, data),
        Part({}, data),
    ]
    for part in wrong:
        parts.save(name, part)
        with pytest.raises(ArtifactCorrupt, match=name):
            sample(checkpoint, SMALL, 0, Context(parts=parts))


def test_the_image_that_is_not_finite_is_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    def broken(predict, x, *rest):  # type: ignore[no-untyped-def]
        x = x.clone()
        x[1, 0, 0, 0] = float("inf")
        yield 0, x

    monkeypatch.setattr(module, "run_sampler", broken)
    parts = MemoryParts()
    sample_parts = Context(parts=parts, batch_size=4)
    with pytest.raises(NumericalError, match="image 1 holds NaN or infinity"):
        sample(checkpoint, SMALL, 0, sample_parts)
    assert not parts.saved


# --- memory ----------------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """[B, 1, H, W] -> the same, by way of 5 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, 5, 1), nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.wide(x).tanh())
        return out


def test_peak_bytes_are_those_that_single_operations_make(checkpoint: Checkpoint) -> None:
    """Below the functions that a network calls, nothing else of weight is made."""
    network, x, t = checkpoint.network(), torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.long)
    with torch.inference_mode():
        assert peak_bytes(lambda: network(x, t)) == pytest.approx(peak_of(lambda: network(x, t)), rel=0.02)


def test_peak_bytes_of_two_layers_are_counted_by_hand() -> None:
    """The wide layer's output and its tanh live at the same time, and nothing else does."""
    network, x, t = OneLayer(), torch.zeros(3, 1, 8, 8), torch.zeros(3)
    with torch.inference_mode():
        assert peak_bytes(lambda: network(x, t)) == 2 * 3 * 5 * 64 * 4


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_few_images_take_bounds_what_many_do(checkpoint: Checkpoint, sampler: str, packed: bool) -> None:
    """Counted on three steps, it holds for a run of ten. A line through one and three images of a packed model, whose largest
    layers are not its widest, would promise too little.
    """
    config, spec = SampleConfig(sampler, steps=10), checkpoint.spec
    low = plan(checkpoint, None, None, PlanConfig("uniform", low="int4"), 0, Context())
    model = quantize(checkpoint, low, None, QuantizeConfig(), 0, Context())
    network = model.packed_network() if packed else checkpoint.network()
    schedule, draw = spec.noise_schedule(), torch.randn(40, *spec.image_shape)
    predict = module.predict_noise(spec, network)

    def work() -> None:
        x = draw.clone()
        deque(module.run_sampler(predict, x, schedule, config, lambda: torch.randn_like(draw)), maxlen=0)

    with torch.inference_mode():
        work()  # tables of the schedule, which stay
        real = HEADROOM * peak_bytes(work)
        one, few = (batch_bytes(network, spec, config, torch.device("cpu"), n) for n in (1, 8))
        assert real <= 1.01 * 40 / 8 * few <= 1.02 * 40 * one
        if not packed:
            assert real >= 0.8 * 40 / 8 * few


def test_the_batch_is_what_fits(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """``held`` stands for the peak, which here does not grow by the images that are tried: they come on top."""
    held = 100 * 2**20
    monkeypatch.setattr(module, "peak_so_far", lambda device: held)
    network, spec = checkpoint.network(), checkpoint.spec
    with torch.inference_mode():
        one, three, eight = (batch_bytes(network, spec, SMALL, torch.device("cpu"), n) for n in (1, 3, 8))

        def batch(limit: int) -> int:
            return batch_that_fits(network, spec, SMALL, Context(max_memory=limit))

        assert batch(0) == batch(held + KERNELS + 1000 * one) == LARGEST_BATCH
        assert batch(held + one) == batch(held + KERNELS) == batch(held + KERNELS + one - 1) == 1
        assert batch(held + KERNELS + 3 * one) == 3 + 3 * (3 * one) // three
        assert batch(held + KERNELS + 5 * eight) == 8 + 40
        assert batch(held + KERNELS + 5 * eight - 1) == 8 + 39
        with pytest.raises(ConfigError, match=f"one image needs about {(held + one) / 2**20:.0f} MiB"):
            batch(held + one - 1)


def test_a_batch_made_small_by_memory_changes_no_image(
    checkpoint: Checkpoint, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = [0]

    def took(*given: object) -> int:
        tried.append(1000 * int(str(given[-1])))
        return tried[-1]

    monkeypatch.setattr(module, "peak_so_far", lambda device: max(tried))
    monkeypatch.setattr(module, "KERNELS", 0)
    monkeypatch.setattr(module, "batch_bytes", took)
    seen = making(monkeypatch)
    assert torch.equal(sample(checkpoint, SMALL, 0, Context(max_memory=4999)).images, whole)
    assert [len(ks) for ks in seen] == [4, 4, 3]


GROWTH = """
from fqdiff.configs import SampleConfig
from fqdiff.context import Context, peak_memory
from fqdiff.stages.sample import sample
from fqdiff.store.pretrained import open_model

model = open_model("pretrained:mnist-small").model
before = peak_memory()
for limit in (before + 40 * 2**20, 0):
    sample(model, SampleConfig(steps=1, count=60), 0, Context(max_memory=limit))
    print(peak_memory() - before)
"""


def test_a_process_stays_below_its_limit() -> None:
    """What the system says of a process of its own; the same test sees that without a limit it takes more."""
    # A program begins with the peak of the process that it replaces, so it must not be this one: the shell's child is small.
    shell = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, GROWTH]
    run = subprocess.run(shell, capture_output=True, text=True, timeout=120, check=True)
    limited, free = map(int, run.stdout.split())
    assert limited <= 40 * 2**20 < free


# --- whole commands --------------------------------------------------------------------------------------------------

MAKE = ["sample", "--count", "180", "--steps", "40", "--sampler", "dpm++"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "3")
    return folder


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Id and file of one run without a stop."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("made") / "store"))
    return str(good(folder, *MAKE)["id"]), images_of(folder)


def images_of(store: Path) -> bytes:
    """The file of the only samples."""
    (path,) = store.glob("samples/*/samples.safetensors")
    return path.read_bytes()


def parts_of(store: Path) -> list[str]:
    return sorted(p.stem for p in store.glob("parts/samples/*/unit-*.safetensors"))


def test_a_killed_sampling_continues_to_the_same_bytes(
    store: Path, made: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly = [*MAKE, "--batch-size", "10"]
    process = subprocess.Popen([sys.executable, "-m", "fqdiff", *slowly, "--quiet", "--store", str(store)])
    deadline = time.monotonic() + 60
    while not parts_of(store):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.005)
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    kept = parts_of(store)
    assert 1 <= len(kept) < 4
    assert not list(store.glob("samples/*/manifest.json"))
    seen = making(monkeypatch)
    result = call(store, *slowly)
    assert result.exit_code == 0, result.stderr
    assert f"continuing samples {made[0]}" in result.stderr
    assert [k for ks in seen for k in ks] == list(range(50 * len(kept), 180))
    assert images_of(store) == made[1]
    assert not parts_of(store)


def test_shards_of_two_machines_join_to_the_bytes_of_one_run(
    store: Path, trained: Path, made: tuple[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    for folder, text in ((store, "1/2"), (other, "2/2")):
        shown = good(folder, *MAKE, "--shard", text)
        assert (shown["kind"], shown["id"], shown["done"]) == ("samples", made[0], True)
        assert not list(folder.glob("samples/*"))
    assert parts_of(store) == ["unit-0001-of-0004", "unit-0003-of-0004"]
    seen = making(monkeypatch)
    assert good(store, *MAKE, "--from", str(other), "--dry-run")["exists"] is False
    assert len(parts_of(store)) == 2
    result = call(store, *MAKE, "--from", str(other))
    assert result.exit_code == 0, result.stderr
    assert f"samples {made[0]}: 2 units taken over from {other}" in result.stderr
    assert not seen
    assert images_of(store) == made[1]
    assert not parts_of(store)
    result = call(store, *MAKE, "--seed", "1", "--from", str(other))
    assert result.exit_code == 1
    assert f"in {other}" in result.stderr
    # A second time there is nothing to do, and nothing is left behind.
    assert good(store, *MAKE, "--from", str(other))["id"] == made[0]
    assert not parts_of(store)
    assert "whole" in call(store, *MAKE, "--shard", "1/2").stderr


def test_units_that_differ_between_machines_are_refused(store: Path, trained: Path, tmp_path: Path) -> None:
    good(store, *MAKE, "--shard", "1/2")
    other = Path(shutil.copytree(store, tmp_path / "other"))
    (recipe,) = unfinished(Store(other), "samples")
    parts = StoredParts(Store(other).parts_folder("samples", recipe.id), recipe)
    name = "unit-0003-of-0004"
    part = parts.load(name)
    assert part is not None
    parts.save(name, Part({"images": part.tensors["images"] ^ 1}, part.data))
    result = call(store, *MAKE, "--from", str(other))
    assert result.exit_code == 1
    assert f"{name} of samples {recipe.id} differs between the stores" in result.stderr
    assert len(parts_of(store)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/2"], "there is no shard 0 of 2"),
        (["--shard", "1/2", "--name", "half"], "a shard is no artifact and takes no --name"),
        (["--max-memory", "much"], "cannot read --max-memory 'much'"),
        (["--max-memory", "100"], "--max-memory 100 would be 100 bytes"),
        (["--max-memory", "1MB"], "one image needs about"),
        (["--max-memory", "1GiB", "--batch-size", "5"], "give one of them"),
        (["--sampler", "dpm"], "one of: ddim, ddpm, dpm++"),
        (["--sampler", "dpm++", "--eta", "0.5"], "eta is DDIM's; dpm++ has none"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(store: Path, arguments: list[str], message: str) -> None:
    result = call(store, "sample", "--count", "3", "--steps", "2", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(store.glob("samples/*"))
    assert not parts_of(store)


def test_dpm_solver_is_chosen_by_flag_and_by_file(store: Path, tmp_path: Path) -> None:
    """In every command that samples; without a number of steps it takes as many as DDIM."""
    config = tmp_path / "fqdiff.toml"
    config.write_text('[sample]\nsampler = "dpm++"\n')
    for arguments in (["--config", str(config)], ["--sampler", "dpm++"]):
        shown = good(store, "sample", "--dry-run", *arguments)
        assert shown["config"] == {"sampler": "dpm++", "steps": 50, "eta": 0.0, "count": 5000}
    for command in (["fid"], ["compare", "latest"]):
        result = call(store, *command, "latest", "--features", "digits", "--config", str(config), "--dry-run")
        assert result.exit_code == 0, result.stderr
        assert "with dpm++ in 50 steps" in result.stderr
