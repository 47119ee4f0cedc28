"""What measuring takes: counted to the byte, by following every tensor that an operation makes."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fqdiff.configs import FisherConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError
from fqdiff.fisher import memory
from fqdiff.fisher.backward import per_sample_backward
from fqdiff.fisher.draws import Batch
from fqdiff.fisher.memory import HEADROOM, batch_that_fits, needed_bytes, sample_bytes
from fqdiff.fisher.timesteps import Layout, Task, measure
from fqdiff.fisher.trajectory import measure_runs
from fqdiff.models.registry import build, output_axes, unet_architecture
from fqdiff.models.unet import UNet, UNetConfig
from fqdiff.stages import fisher as module
from fqdiff.stages.fisher import fisher
from fqdiff.values import Checkpoint, Dataset, ModelSpec


class Living(TorchDispatchMode):
    """Bytes of tensors made within it that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {v.untyped_storage().data_ptr() for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                storage = value.untyped_storage()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, count: int) -> None:
        self.now -= count


def peak_of(work: Callable[[], object]) -> int:
    with Living() as living:
        work()
    return living.peak


def test_the_count_is_right() -> None:
    def work() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        (b.view(10, 100) * 2).sum()

    assert 8000 <= peak_of(work) <= 8100


def test_the_memory_of_a_trajectory_does_not_grow_with_its_steps(checkpoint: Checkpoint) -> None:
    """But for one image and one row of numbers for each step. Rejects a graph through all steps: six times as much."""
    network = checkpoint.network()
    axes = output_axes(network)

    def peak(steps: int) -> int:
        return peak_of(lambda: measure_runs(network, checkpoint.spec, [0, 1], steps, 0, axes, 0))

    peak(1)
    few, many = peak(2), peak(12)
    channels = sum(p.shape[axes[n]] for n, p in network.named_parameters())
    rows = 2 * 8 * (channels + len(axes))  # float64: channels and the largest element
    image = 2 * 4 * 64
    assert many - few <= 1.05 * 10 * (rows + 2 * image)
    one_step = sample_bytes(network, (1, 8, 8)) * 2 / HEADROOM
    assert many - few < 0.5 * 10 * one_step


def model(image_size: int = 16, first: int = 8) -> nn.Module:
    channels = (first, 2 * first, 4 * first, 8 * first, 8 * first, 6 * first)
    config = UNetConfig(channels, image_size=image_size, num_heads=2, norm_groups=4, activation="silu", dropout=0.0)
    return build(unet_architecture(config)).eval().requires_grad_(False)


@pytest.mark.parametrize(("image_size", "first"), [(16, 8), (32, 4)])
def test_what_one_sample_takes_is_estimated_within_a_factor_of_two(image_size: int, first: int) -> None:
    """Tensors alive while a batch goes forward and back, gradients used up as they come."""
    network = model(image_size, first)

    def work(batch: int) -> int:
        x, t = torch.randn(batch, 1, image_size, image_size), torch.full((batch,), 5)
        return peak_of(
            lambda: per_sample_backward(
                network, lambda: network(x, t), torch.ones_like, lambda _, pieces: [p.square().sum() for p in pieces]
            )
        )

    real = (work(12) - work(4)) / 8
    assert real <= sample_bytes(network, (1, image_size, image_size)) <= 2 * real


def test_a_sample_of_two_layers_is_counted_by_hand() -> None:
    """Kept: the image, and what tanh gives, which both tanh and the layer after it need. The first layer's output is not."""
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 1))

    class WithTimesteps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = network

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.stack(x)
            return out

    image, hidden = 4 * 64, 4 * 3 * 64
    assert sample_bytes(WithTimesteps(), (1, 8, 8)) == int(HEADROOM * (image + hidden))


@pytest.mark.parametrize(
    ("timesteps", "samples", "granularity"), [(1, 8, "channel"), (4, 2, "channel"), (4, 4, "channel"), (1, 8, "weight")]
)
def test_what_a_batch_takes_is_estimated_within_a_factor_of_two(timesteps: int, samples: int, granularity: str) -> None:
    """Many timesteps with few samples each take more: every one has squares of its own."""
    network, shape = model(8, 16), (timesteps * samples, 1, 8, 8)
    config = FisherConfig(samples=samples, granularity=granularity)
    batch = Batch(
        torch.randn(shape), torch.zeros(len(torch.empty(shape)), dtype=torch.long), torch.randn(shape),
        torch.ones(shape[0]).double(), torch.empty(0),
    )  # fmt: skip
    task, layout = Task(tuple(range(timesteps)), (range(samples),)), Layout(output_axes(network), {})
    settings = {"true": False, "pairs": False, "outputs": False, "weights": granularity == "weight", "autocast": False}
    real = peak_of(lambda: measure(network, task, lambda task, n: batch, layout, **settings))
    each, fixed = needed_bytes(network, (1, 8, 8), config)
    if granularity == "weight":  # which besides counts what waits for its turn
        fixed -= 3 * 8 * sum(p.numel() for p in network.parameters())
    assert real <= fixed + shape[0] * each <= 2 * real


def test_what_a_sampler_run_takes_is_estimated_within_a_factor_of_two() -> None:
    network = model(8, 8)
    assert isinstance(network, UNet)
    spec = ModelSpec(unet_architecture(network.config), "cosine", "v")

    def work(runs: int) -> int:
        return peak_of(lambda: measure_runs(network, spec, list(range(runs)), 3, 0, output_axes(network), 0))

    each, fixed = needed_bytes(network, (1, 8, 8), FisherConfig("trajectory"))
    real = (work(3) - work(1)) / 2
    assert real <= each <= 2 * real
    assert work(2) <= fixed + 2 * each <= 3 * work(2)


# --- --max-memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_process(monkeypatch: pytest.MonkeyPatch) -> int:
    """A process that has 100 MiB so far, on one thread."""
    monkeypatch.setattr(memory, "peak_memory", lambda: 100 * 2**20)
    return 100 * 2**20


CONFIG = FisherConfig(timesteps=2, samples=5)


def test_the_batch_is_what_fits(checkpoint: Checkpoint, small_process: int) -> None:
    each, fixed = needed_bytes(checkpoint.network(), checkpoint.spec.image_shape, CONFIG)

    def batch(limit: int) -> int:
        return batch_that_fits(checkpoint, Context(max_memory=limit), CONFIG, 32)

    assert torch.get_num_threads() == 1
    assert batch_that_fits(checkpoint, Context(), CONFIG, 32) == 32
    assert batch(small_process + fixed + 5 * each) == 5
    assert batch(small_process + fixed + 6 * each - 1) == 5
    assert batch(small_process + fixed + 1000 * each) == 32
    with pytest.raises(ConfigError) as caught:
        batch(small_process + fixed + each - 1)
    assert f"needs about {(small_process + fixed + each) / 2**20:.0f} MiB" in caught.value.message
    assert "--max-memory" in caught.value.hint


def test_two_threads_share_the_memory(checkpoint: Checkpoint, small_process: int) -> None:
    each, fixed = needed_bytes(checkpoint.network(), checkpoint.spec.image_shape, CONFIG)
    torch.set_num_threads(2)
    try:
        limit = small_process + 2 * fixed + 11 * each
        assert batch_that_fits(checkpoint, Context(max_memory=limit), CONFIG, 32) == 5
    finally:
        torch.set_num_threads(1)


def test_a_smaller_batch_gives_the_same_table(
    checkpoint: Checkpoint, dataset: Dataset, small_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, fixed = needed_bytes(checkpoint.network(), checkpoint.spec.image_shape, CONFIG)
    seen: set[int] = set()
    cut = module.tasks

    def spy(members: Any, samples: int, batch: int, pairs: bool) -> Any:
        seen.add(batch)
        return cut(members, samples, batch, pairs)

    monkeypatch.setattr(module, "tasks", spy)
    whole = fisher(checkpoint, dataset, CONFIG, 0, Context())
    small = fisher(checkpoint, dataset, CONFIG, 0, Context(max_memory=small_process + fixed + 3 * each))
    assert seen == {32, 3}
    for name, entry in whole.entries.items():
        torch.testing.assert_close(small.entries[name].mean, entry.mean, rtol=1e-6, atol=0)


def test_fewer_sampler_runs_together_give_the_same_table(
    checkpoint: Checkpoint, dataset: Dataset, small_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FisherConfig("trajectory", samples=3, steps=2)
    each, fixed = needed_bytes(checkpoint.network(), checkpoint.spec.image_shape, config)
    seen: set[int] = set()
    plain = module.measure_runs

    def spy(network: nn.Module, spec: ModelSpec, runs: tuple[int, ...], *rest: Any) -> Any:
        seen.add(len(runs))
        return plain(network, spec, runs, *rest)

    monkeypatch.setattr(module, "measure_runs", spy)
    whole = fisher(checkpoint, dataset, config, 0, Context())
    assert max(seen) == 2
    seen.clear()
    small = fisher(checkpoint, dataset, config, 0, Context(max_memory=small_process + fixed + each))
    assert seen == {1}
    for name, entry in whole.trajectory.items():
        if not name.endswith("qkv.bias"):
            assert small.trajectory[name].mean == pytest.approx(entry.mean, rel=1e-5)
    with pytest.raises(ConfigError, match="needs about"):
        fisher(checkpoint, dataset, config, 0, Context(max_memory=small_process))
