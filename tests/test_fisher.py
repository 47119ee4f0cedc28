"""The empirical and the true Fisher diagonal at fixed timesteps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from fqdiff.configs import FisherConfig
from fqdiff.context import Context
from fqdiff.diffusion.schedule import add_noise
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.fisher.backward import layers
from fqdiff.fisher.draws import Batch, draw_batch, evenly_spaced_timesteps, residual_weight
from fqdiff.fisher.moments import Squares, added, rows
from fqdiff.fisher.timesteps import Layout, Measured, Task, measure, tasks
from fqdiff.models.registry import output_axes
from fqdiff.rng import generator
from fqdiff.stages import fisher as module
from fqdiff.stages.fisher import fisher
from fqdiff.values import Checkpoint, Dataset, FisherEntry, FisherTable, predict_noise

SEED = 5
ROUNDINGS = 32 * torch.finfo(torch.float32).eps  # batches of other sizes add up in another order


def with_prediction(checkpoint: Checkpoint, prediction: str) -> Checkpoint:
    return replace(checkpoint, spec=replace(checkpoint.spec, prediction=prediction))


def one_at_a_time(
    checkpoint: Checkpoint, dataset: Dataset, kind: str, t: int, samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Independent oracle: squared gradients [samples, *shape] of parameters and of layers' outputs.

    Plain autograd in float64, one sample after the other, by the definitions in stages/fisher.py.
    """
    network = checkpoint.network().double().requires_grad_(True)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    for name, layer in layers(network).items():
        layer.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
    found: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = ({}, {})
    for n in range(samples):
        network.zero_grad()
        draw = generator(SEED, "fisher", t, n)
        image = dataset.train[int(torch.randint(len(dataset.train), (), generator=draw))].double() / 127.5 - 1
        noise = torch.randn(1, 8, 8, generator=draw).double()
        at = torch.tensor([t])
        x_t = add_noise(checkpoint.spec.noise_schedule(), image[None], noise[None], at)
        eps_pred = predict_noise(checkpoint.spec, network)(x_t, at)
        if kind == "true":
            v = torch.randn(1, 8, 8, generator=generator(SEED, "fisher target", t, n)).double()
            (eps_pred * v).sum().backward()
        else:
            (0.5 * (noise - eps_pred).square().sum()).backward()
        for name, p in network.named_parameters():
            found[0].setdefault(name, []).append(p.grad.square())
        for name, output in outputs.items():
            found[1].setdefault(name, []).append(output.grad[0].square())
    return tuple({name: torch.stack(squares) for name, squares in kind.items()} for kind in found)


def check_entry(entry: FisherEntry, k: int, squares: Tensor, axis: int) -> None:
    """Row k of ``entry`` against squared gradients [N, *shape] whose ``axis`` of shape counts channels."""
    diagonal = squares.mean(dim=0)
    each = squares.flatten(1).mean(dim=1)
    assert entry.numel == diagonal.numel()
    assert float(entry.mean[k]) == pytest.approx(float(diagonal.mean()), rel=2e-5)
    assert float(entry.maximum[k]) == pytest.approx(float(diagonal.max()), rel=1e-4)
    assert float(entry.standard_error[k]) == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-4)
    channels = diagonal.movedim(axis, 0).flatten(1).mean(dim=1) if diagonal.ndim > 1 else diagonal
    # A channel whose gradient is zero on paper (a bias of attention's keys) is rounding noise in float32.
    torch.testing.assert_close(entry.channel[k], channels, rtol=1e-4, atol=1e-9 * float(diagonal.max()))


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_fisher_equals_one_sample_at_a_time_in_float64(
    checkpoint: Checkpoint, dataset: Dataset, prediction: str, kind: str
) -> None:
    """Parameters, outputs of layers and single weights; two batches for each timestep.

    Rejects the square of a batch gradient, a mean over pixels, and x_t mistaken for the noise.
    """
    checkpoint = with_prediction(checkpoint, prediction)
    config = FisherConfig(kind, timesteps=3, samples=3, granularity="weight", bins=2)
    table = fisher(checkpoint, dataset, config, SEED, Context())
    assert table.kind == kind
    expected = [one_at_a_time(checkpoint, dataset, kind, t, 3) for t in (0, 500, 999)]
    for name, entry in table.entries.items():
        axis = 1 if "resample.weight" in name and name[5] in "456" else 0
        for k in range(3):
            check_entry(entry, k, expected[k][0][name], axis)
    assert table.activations.keys() == expected[0][1].keys()
    for name, entry in table.activations.items():
        last = name.rpartition(".")[2] in ("qkv", "out", "time", "linear1", "linear2")
        for k in range(3):
            check_entry(entry, k, expected[k][1][name], -1 if last else 0)
    assert [(one.first, one.last) for one in table.weights] == [(0, 0), (500, 999)]
    for one, members in zip(table.weights, ([0], [1, 2]), strict=True):
        for name, values in one.read().items():
            mean = torch.stack([expected[k][0][name].mean(dim=0) for k in members]).mean(dim=0)
            assert values.dtype == torch.float32
            torch.testing.assert_close(values.double(), mean, rtol=1e-3, atol=1e-5 * float(mean.max()))


def test_near_pure_noise_velocities_keep_their_digits(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """At t = T - 1 gradients carry w^2 = 2e-9, below float32's resolution of the noise, and squares w^4."""
    checkpoint = with_prediction(checkpoint, "v")
    weight = float(residual_weight(checkpoint.spec, torch.tensor([999])))
    assert weight**2 < 3e-9
    config = FisherConfig(timesteps=2, samples=2, granularity="weight", bins=2)
    table = fisher(checkpoint, dataset, config, SEED, Context())
    weights = table.weights[1].read()
    for name, entry in table.entries.items():
        assert 0 < float(entry.mean[1]) < 1e-3 * float(entry.mean[0])
        assert float(weights[name].double().mean()) == pytest.approx(float(entry.mean[1]), rel=1e-5)
    assert torch.equal(
        residual_weight(replace(checkpoint.spec, prediction="eps"), torch.tensor([0, 999])), torch.ones(2).double()
    )


class Linear(nn.Module):
    """eps_pred = W x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1)).view(x.shape)
        return out


def measured(network: nn.Module, batch: Batch, timesteps: int = 1, **changes: object) -> Measured:
    """Squares of one batch that was made by hand."""
    samples = range(len(batch.t) // timesteps)
    settings = {"true": False, "pairs": False, "outputs": False, "weights": True, "autocast": False, **changes}
    layout = Layout(output_axes(network), {})
    return measure(network, Task(tuple(range(timesteps)), (samples,)), lambda task, n: batch, layout, **settings)


def by_hand(x: Tensor, target: Tensor | None = None, model_noise: Tensor | None = None) -> Batch:
    t = torch.zeros(len(x), dtype=torch.long)
    empty = torch.zeros_like(x)
    return Batch(
        x,
        t,
        empty if target is None else target,
        torch.ones(len(x)).double(),
        empty if model_noise is None else model_noise,
    )


def test_the_empirical_fisher_of_a_linear_model_has_its_closed_form() -> None:
    """The gradient of sample n is -(noise_n - W x_n) x_n^T."""
    network = Linear()
    x, noise = torch.randn(2, 6, 1, 2, 2)
    found = measured(network, by_hand(x, noise), timesteps=2).parameters["layer.weight"]
    residual = (noise.flatten(1) - x.flatten(1) @ network.layer.weight.detach().T).double()
    squares = (residual[:, :, None] * x.flatten(1).double()[:, None, :]).square()
    for k, three in enumerate((slice(0, 3), slice(3, 6))):
        assert float(found.mean[k]) == pytest.approx(float(squares[three].mean()), rel=1e-5)
        torch.testing.assert_close(found.channel[k], squares[three].mean(dim=(0, 2)), rtol=1e-5, atol=0)
        error = squares[three].mean(dim=(1, 2)).std() / 3**0.5
        assert float(found.standard_error[k]) == pytest.approx(float(error), rel=1e-5)


def test_the_true_fisher_is_unbiased_and_its_standard_error_is_right() -> None:
    """For eps_pred = W x the diagonal of J^T J at W[i, j] is x_j^2, whatever i: many v come as near as they say."""
    x = torch.tensor([0.5, -1.0, 2.0, 3.0]).view(1, 1, 2, 2)
    drawn = torch.randn(4000, 1, 2, 2, generator=generator(0, "v"))
    found = measured(Linear(), by_hand(x.expand(4000, 1, 2, 2), model_noise=drawn), true=True)
    exact = x.double().square().view(1, 4).expand(4, 4)
    error = float(found.parameters["layer.weight"].standard_error)
    assert abs(float(found.parameters["layer.weight"].mean) - float(exact.mean())) < 3 * error
    # |v|^2 / 4 has variance 2 / 4; it multiplies the mean of x^2.
    assert error == pytest.approx(float(exact.mean()) * (0.5 / 4000) ** 0.5, rel=0.1)
    torch.testing.assert_close(found.weights["layer.weight"], exact, rtol=0.1, atol=0)


def test_the_true_fisher_over_all_unit_vectors_is_the_diagonal_of_gauss_newton(checkpoint: Checkpoint) -> None:
    """diag(J^T J) of the U-Net, J from torch.func: one v for each of 64 pixels."""
    x = torch.randn(1, 1, 8, 8, generator=generator(0, "x"))
    t = torch.tensor([300])
    units = torch.eye(64).view(64, 1, 8, 8)
    batch = replace(by_hand(x.expand(64, 1, 8, 8), model_noise=units), t=t.expand(64))
    found = measured(checkpoint.network(), batch, true=True)
    network = checkpoint.network().double()
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
        jacobian = jacrev(lambda weights: functional_call(network, weights, (x.double(), t)).flatten())(parameters)
    for name, j in jacobian.items():
        diagonal = j.square().sum(dim=0)
        torch.testing.assert_close(
            64 * found.weights[name], diagonal, rtol=1e-3, atol=1e-6 * float(diagonal.max()), msg=name
        )


def test_a_true_fisher_draws_standard_normal_targets(checkpoint: Checkpoint, dataset: Dataset) -> None:
    config = FisherConfig("true", timesteps=1, samples=64)
    batch = draw_batch(dataset.train, checkpoint.spec, [7], range(64), config, 0)
    assert abs(float(batch.model_noise.mean())) < 4 / 64
    assert float(batch.model_noise.var()) == pytest.approx(1, abs=4 * 2**0.5 / 64)
    assert not torch.equal(batch.model_noise[0], batch.model_noise[1])


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_parameter_has_a_row_at_every_timestep(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    assert fisher_table.entries.keys() == checkpoint.tensors.keys()
    assert fisher_table.activations.keys() == layers(checkpoint.network()).keys()
    assert fisher_table.timesteps.tolist() == list(range(1000))
    for name, entry in fisher_table.entries.items():
        assert entry.mean.shape == entry.maximum.shape == entry.standard_error.shape == (1000,)
        assert entry.numel == checkpoint.tensors[name].numel()
        assert bool((entry.maximum >= (1 - 1e-6) * entry.mean).all())
    assert fisher_table.activations["block4.resample"].block == "4"
    assert fisher_table.activations["block4.resample"].numel == 16 * 2 * 2


def test_what_is_not_asked_for_is_not_kept(checkpoint: Checkpoint, dataset: Dataset) -> None:
    config = FisherConfig(timesteps=2, samples=2, granularity="tensor", activations=False)
    table = fisher(checkpoint, dataset, config, 0, Context())
    assert not table.activations
    assert not table.weights
    assert {e.channel.shape for e in table.entries.values()} == {(2, 0)}
    full = fisher(checkpoint, dataset, replace(config, granularity="channel", activations=True), 0, Context())
    assert all(torch.equal(e.mean, full.entries[name].mean) for name, e in table.entries.items())


def random_squares(timesteps: int, samples: int) -> tuple[Squares, Tensor]:
    """What one batch leaves of gradients [G, S, 3, 2], and the squares themselves."""
    squares = torch.rand(timesteps, samples, 3, 2, generator=generator(0, "squares")).double()
    return Squares(squares.sum(dim=1), squares.flatten(2).sum(dim=2).flatten()), squares


def test_antithetic_pairs_are_one_observation_of_the_standard_error() -> None:
    """Rejects the error over single samples, which pairs make too small or too large."""
    found, squares = random_squares(2, 6)
    row = rows(found, torch.ones(2).double(), 0, pairs=True)
    pairs = squares.mean(dim=(2, 3)).view(2, 3, 2).mean(dim=2)
    torch.testing.assert_close(row.standard_error, pairs.std(dim=1) / 3**0.5)
    torch.testing.assert_close(row.mean, squares.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(("axis", "over"), [(0, 3), (1, 2), (-1, 2)])
def test_a_channel_is_the_mean_along_its_axis(axis: int, over: int) -> None:
    found, squares = random_squares(2, 4)
    scale = torch.tensor([1.0, 3.0]).double()
    row = rows(found, scale, axis, pairs=False)
    diagonal = squares.mean(dim=1) * torch.tensor([1.0, 9.0]).double()[:, None, None]
    torch.testing.assert_close(row.channel, diagonal.mean(dim=over - 1))
    torch.testing.assert_close(row.maximum, diagonal.flatten(1).amax(dim=1))


def test_batches_of_one_timestep_add_up_to_one() -> None:
    whole, squares = random_squares(1, 5)
    parts = [Squares(s.sum(dim=1), s.flatten(2).sum(dim=2).flatten()) for s in (squares[:, :2], squares[:, 2:])]
    joined = added(parts)
    torch.testing.assert_close(joined.elements, whole.elements)
    assert torch.equal(joined.samples, whole.samples)


# --- what must not matter --------------------------------------------------------------------------------------------


def numbers(table: FisherTable) -> dict[str, Tensor]:
    """Every number of ``table`` by a name of its own."""
    found = {}
    for what, entries in (("parameter", table.entries), ("output", table.activations)):
        for name, e in entries.items():
            found |= {f"{what} {name} {key}": getattr(e, key) for key in module.ROW_KEYS}
    for k, one in enumerate(table.weights):
        found |= {f"weight {k} {name}": values for name, values in one.read().items()}
    return found


def same(a: FisherTable, b: FisherTable) -> bool:
    first, second = numbers(a), numbers(b)
    return first.keys() == second.keys() and all(torch.equal(v, second[name]) for name, v in first.items())


@pytest.mark.parametrize("reduction", ["none", "both"])
@pytest.mark.parametrize("batch", [1, 3, 4, 7, 13])
def test_the_batch_size_does_not_matter(
    checkpoint: Checkpoint, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, batch: int, reduction: str
) -> None:
    """A timestep in several batches, several timesteps in one, antithetic pairs never cut."""
    config = FisherConfig(timesteps=3, samples=6, variance_reduction=reduction)
    whole = fisher(checkpoint, dataset, config, 0, Context())
    monkeypatch.setattr(module, "BATCH", batch)
    pieces = fisher(checkpoint, dataset, config, 0, Context())
    for name, entry in whole.entries.items():
        other = pieces.entries[name]
        torch.testing.assert_close(entry.mean, other.mean, rtol=ROUNDINGS, atol=0, msg=name)
        torch.testing.assert_close(entry.maximum, other.maximum, rtol=1e-5, atol=0)
        torch.testing.assert_close(entry.standard_error, other.standard_error, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("samples", "batch", "pairs", "cut"),
    [
        (2, 4, False, [((0, 1), [(0, 2)]), ((2,), [(0, 2)])]),
        (4, 4, False, [((0,), [(0, 4)]), ((1,), [(0, 4)]), ((2,), [(0, 4)])]),
        (5, 3, False, [((t,), [(0, 3), (3, 5)]) for t in range(3)]),
        (6, 5, True, [((t,), [(0, 4), (4, 6)]) for t in range(3)]),
        (4, 1, True, [((t,), [(0, 2), (2, 4)]) for t in range(3)]),
    ],
)  # fmt: skip
def test_work_is_cut_into_batches(
    samples: int, batch: int, pairs: bool, cut: Sequence[tuple[tuple[int, ...], list[tuple[int, int]]]]
) -> None:
    found = [(t.timesteps, [(b.start, b.stop) for b in t.batches]) for t in tasks([0, 1, 2], samples, batch, pairs)]
    assert found == cut


def test_the_number_of_threads_does_not_matter(
    checkpoint: Checkpoint, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    config = FisherConfig(timesteps=8, samples=3, granularity="weight", bins=2)
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tables.append(fisher(checkpoint, dataset, config, 0, Context()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(tables[0], tables[1])
    assert same(tables[0], tables[2])


def test_fisher_does_not_depend_on_held_out_images_or_the_global_generator(
    checkpoint: Checkpoint, dataset: Dataset
) -> None:
    config = FisherConfig("true", timesteps=2, samples=2)
    first = fisher(checkpoint, dataset, config, 0, Context())
    images = dataset.images.clone()
    images[dataset.held_out] = 0
    torch.manual_seed(99)
    second = fisher(checkpoint, replace(dataset, images=images), config, 0, Context())
    assert same(first, second)
    assert not same(first, fisher(checkpoint, dataset, config, 1, Context()))


def test_bfloat16_is_close_and_not_the_same(checkpoint: Checkpoint, dataset: Dataset) -> None:
    config = FisherConfig(timesteps=4, samples=4)
    full = fisher(checkpoint, dataset, config, 0, Context())
    half = fisher(checkpoint, dataset, replace(config, precision="bfloat16"), 0, Context())
    assert not same(full, half)
    for entries, others in ((full.entries, half.entries), (full.activations, half.activations)):
        for name, e in entries.items():
            assert others[name].mean.dtype == torch.float64
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(others[name].mean, e.mean, rtol=0.1, atol=0, msg=name)


# --- which samples ---------------------------------------------------------------------------------------------------


def test_timesteps_are_evenly_spaced_with_both_ends() -> None:
    assert evenly_spaced_timesteps(1000, 5).tolist() == [0, 250, 500, 749, 999]
    assert evenly_spaced_timesteps(10, 10).tolist() == list(range(10))
    with pytest.raises(ConfigError, match="11 timesteps"):
        evenly_spaced_timesteps(10, 11)


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_samples_are_drawn_by_timestep_and_number_alone(checkpoint: Checkpoint, dataset: Dataset, kind: str) -> None:
    config = FisherConfig(kind)
    both = draw_batch(dataset.train, checkpoint.spec, [10, 20], range(3), config, 0)
    last = draw_batch(dataset.train, checkpoint.spec, [20], range(1, 3), config, 0)
    for key in ("x_t", "t", "target", "weight", "model_noise"):
        assert torch.equal(getattr(both, key)[4:] if len(getattr(both, key)) else torch.empty(0), getattr(last, key))
    assert both.t.tolist() == [10, 10, 10, 20, 20, 20]


def drawn(checkpoint: Checkpoint, dataset: Dataset, reduction: str, timesteps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(images, noise) of four samples at each timestep, [T, 4, C, H, W]."""
    config = FisherConfig(samples=4, variance_reduction=reduction)
    spec = with_prediction(checkpoint, "eps").spec  # whose target is the noise
    batch = draw_batch(dataset.train, spec, timesteps, range(4), config, 0)
    a = checkpoint.spec.noise_schedule().alphas_cumprod[batch.t].float().view(-1, 1, 1, 1)
    images = (batch.x_t - (1 - a).sqrt() * batch.target) / a.sqrt()
    shape = (len(timesteps), 4, 1, 8, 8)
    return images.view(shape), batch.target.view(shape)


def test_antithetic_pairs_have_opposite_noise_and_one_image(checkpoint: Checkpoint, dataset: Dataset) -> None:
    images, noise = drawn(checkpoint, dataset, "antithetic", [100, 200])
    assert torch.equal(noise[:, 0::2], -noise[:, 1::2])
    torch.testing.assert_close(images[:, 0::2], images[:, 1::2], rtol=0, atol=1e-5)
    assert not torch.allclose(noise[:, 0], noise[:, 2], atol=0.1)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)


def test_common_samples_are_those_of_every_timestep(checkpoint: Checkpoint, dataset: Dataset) -> None:
    images, noise = drawn(checkpoint, dataset, "common", [100, 200])
    assert torch.equal(noise[0], noise[1])
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert not torch.allclose(noise[0, 0], -noise[0, 1], atol=0.1)


def test_both_is_both(checkpoint: Checkpoint, dataset: Dataset) -> None:
    _, noise = drawn(checkpoint, dataset, "both", [100, 200])
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[:, 0::2], -noise[:, 1::2])


@pytest.mark.parametrize(("samples", "reduction"), [(5, "antithetic"), (2, "both"), (7, "both")])
def test_antithetic_pairs_need_an_even_number(samples: int, reduction: str) -> None:
    with pytest.raises(ConfigError, match="in antithetic pairs"):
        FisherConfig(samples=samples, variance_reduction=reduction)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empirical", "true", "trajectory"])
def test_weights_that_are_not_finite_are_an_error(checkpoint: Checkpoint, dataset: Dataset, kind: str) -> None:
    name = "head.late.bias"
    broken = {**checkpoint.tensors, name: torch.full_like(checkpoint.tensors[name], float("nan"))}
    config = FisherConfig(kind, timesteps=1, samples=2, steps=2)
    with pytest.raises(NumericalError, match="NaN"):
        fisher(replace(checkpoint, tensors=broken), dataset, config, 0, Context())


def test_what_the_table_says_is_what_a_layer_gives(checkpoint: Checkpoint) -> None:
    """Channels of outputs lie on the axis where the layer puts them."""
    network = checkpoint.network()
    job = module.Job(checkpoint, torch.empty(0), FisherConfig(), 0, Context())
    seen: dict[str, int] = {}
    for name, layer in layers(network).items():
        layer.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output[0].shape[axis[name]]}))
    axis: Mapping[str, int] = job.layout.outputs
    network(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
    biases = {name: len(checkpoint.tensors[f"{name}.bias"]) for name in seen}
    assert seen == biases
