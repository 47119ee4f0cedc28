from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fqdiff.configs import FisherConfig
from fqdiff.context import Context
from fqdiff.diffusion.schedule import add_noise
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.models.registry import output_axes
from fqdiff.rng import generator
from fqdiff.stages import fisher as module
from fqdiff.stages.fisher import draw_batch, evenly_spaced_timesteps, fisher, per_sample_gradients, reduce_gradients
from fqdiff.values import Checkpoint, Dataset, FisherTable, ModelSpec, predict_noise


def one_at_a_time(spec: ModelSpec, network: nn.Module, images: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Independent oracle: plain autograd in float64, one sample after the other; sum of squares over samples."""
    network = network.double().requires_grad_(True)
    schedule = spec.noise_schedule()
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for n in range(len(t)):
        network.zero_grad()
        x_0, e, at = images[n : n + 1].double(), noise[n : n + 1].double(), t[n : n + 1]
        x_t = add_noise(schedule, x_0, e, at)
        (0.5 * (e - predict_noise(spec, network)(x_t, at)).square().sum()).backward()
        for name, p in network.named_parameters():
            total[name] += p.grad.square()
    return total


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_fisher_equals_one_sample_at_a_time_in_float64(
    checkpoint: Checkpoint, dataset: Dataset, prediction: str
) -> None:
    """Rejects the square of a batch gradient, a mean over pixels, and x_t mistaken for the noise."""
    checkpoint = replace(checkpoint, spec=replace(checkpoint.spec, prediction=prediction))
    table = fisher(checkpoint, dataset, FisherConfig(timesteps=3, samples=3), 5, Context())
    for k, t in enumerate([0, 500, 999]):
        draws = [generator(5, "fisher", t, n) for n in range(3)]
        images = (
            torch.stack([dataset.train[int(torch.randint(40, (), generator=g))] for g in draws]).float() / 127.5 - 1
        )
        noise = torch.stack([torch.randn(1, 8, 8, generator=g) for g in draws])
        expected = one_at_a_time(checkpoint.spec, checkpoint.network(), images, noise, torch.full((3,), t))
        for name, entry in table.entries.items():
            diagonal = expected[name] / 3
            assert float(entry.mean[k]) == pytest.approx(float(diagonal.mean()), rel=1e-5)
            assert float(entry.maximum[k]) == pytest.approx(float(diagonal.max()), rel=1e-4)
            axis = 1 if "resample.weight" in name and name[5] in "456" else 0
            channels = diagonal.movedim(axis, 0).flatten(1).mean(dim=1) if diagonal.ndim > 1 else diagonal
            # A channel whose gradient is zero on paper (a bias of attention's keys) is rounding noise in float32.
            assert torch.allclose(entry.channel[k], channels, rtol=1e-4, atol=1e-9 * float(diagonal.max()))


def test_fisher_of_a_linear_model_has_its_closed_form() -> None:
    """eps_pred = W x: the gradient of sample n is -(noise_n - W x_n) x_n^T."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x.flatten(1)).view(x.shape)

    network = Linear()
    x, noise = torch.randn(2, 6, 1, 2, 2)
    batch = (x, torch.zeros(6, dtype=torch.long), noise, torch.ones(6, 1, 1, 1))
    gradients = per_sample_gradients(network)
    reduced = reduce_gradients(gradients, batch, 2, 3, output_axes(network), torch.device("cpu"))["layer.weight"]
    residual = (noise.flatten(1) - x.flatten(1) @ network.layer.weight.detach().T).double()
    squares = (residual[:, :, None] * x.flatten(1).double()[:, None, :]).square()
    for k, rows in enumerate((slice(0, 3), slice(3, 6))):
        assert float(reduced.mean[k]) == pytest.approx(float(squares[rows].mean()), rel=1e-5)
        assert torch.allclose(reduced.channel[k], squares[rows].mean(dim=(0, 2)), rtol=1e-5)
        error = squares[rows].mean(dim=(1, 2)).std() / 3**0.5
        assert float(reduced.standard_error[k]) == pytest.approx(float(error), rel=1e-5)


def test_every_parameter_has_a_row_at_every_timestep(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    assert fisher_table.entries.keys() == checkpoint.tensors.keys()
    assert fisher_table.timesteps.tolist() == list(range(1000))
    for name, entry in fisher_table.entries.items():
        assert entry.mean.shape == entry.maximum.shape == entry.standard_error.shape == (1000,)
        assert entry.numel == checkpoint.tensors[name].numel()
        assert bool((entry.maximum >= entry.mean).all())


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_the_chunk_size_does_not_matter(
    checkpoint: Checkpoint, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    config = FisherConfig(timesteps=3, samples=5)
    whole = fisher(checkpoint, dataset, config, 0, Context())
    monkeypatch.setattr(module, "CHUNK", chunk)
    pieces = fisher(checkpoint, dataset, config, 0, Context())
    for name, entry in whole.entries.items():
        assert torch.allclose(entry.mean, pieces.entries[name].mean, rtol=1e-5, atol=0)
        assert torch.allclose(entry.standard_error, pieces.entries[name].standard_error, rtol=1e-4, atol=0)


def test_fisher_does_not_depend_on_held_out_images_or_the_global_generator(
    checkpoint: Checkpoint, dataset: Dataset
) -> None:
    config = FisherConfig(timesteps=2, samples=2)
    first = fisher(checkpoint, dataset, config, 0, Context())
    images = dataset.images.clone()
    images[dataset.held_out] = 0
    torch.manual_seed(99)
    second = fisher(checkpoint, replace(dataset, images=images), config, 0, Context())
    assert all(torch.equal(first.entries[n].mean, second.entries[n].mean) for n in first.entries)


def test_weights_that_are_not_finite_are_an_error(checkpoint: Checkpoint, dataset: Dataset) -> None:
    broken = {**checkpoint.tensors, "head.output.bias": torch.tensor([float("nan")])}
    with pytest.raises(NumericalError, match="NaN"):
        fisher(replace(checkpoint, tensors=broken), dataset, FisherConfig(timesteps=1, samples=2), 0, Context())


def test_timesteps_are_evenly_spaced_with_both_ends() -> None:
    assert evenly_spaced_timesteps(1000, 5).tolist() == [0, 250, 500, 749, 999]
    assert evenly_spaced_timesteps(10, 10).tolist() == list(range(10))
    with pytest.raises(ConfigError, match="11 timesteps"):
        evenly_spaced_timesteps(10, 11)


def test_samples_are_drawn_by_timestep_and_number_alone(checkpoint: Checkpoint, dataset: Dataset) -> None:
    both = draw_batch(dataset.train, checkpoint.spec, [10, 20], 2, 0)
    second = draw_batch(dataset.train, checkpoint.spec, [20], 2, 0)
    assert all(torch.equal(a[2:], b) for a, b in zip(both, second, strict=True))
