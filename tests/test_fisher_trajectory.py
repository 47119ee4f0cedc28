"""The Fisher diagonal of the whole sampler, against plain autograd through every unrolled step in float64."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from fqdiff.configs import FisherConfig
from fqdiff.context import Context
from fqdiff.diffusion.samplers import ddim, sampling_timesteps
from fqdiff.diffusion.schedule import noise_from_velocity
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.fisher import trajectory
from fqdiff.fisher.moments import jackknife_error, robust_weights
from fqdiff.fisher.trajectory import Runs, measure_runs, windows
from fqdiff.models.registry import output_axes
from fqdiff.rng import generator
from fqdiff.stages import fisher as module
from fqdiff.stages.fisher import fisher
from fqdiff.values import Checkpoint, Dataset, FisherTable, predict_noise

SEED = 3


@dataclass
class Unrolled:
    """J_s^T v of one run, float64: ``gradients`` [S, *shape] by parameter; ``clipped``: share of pixels that a clamp stops."""

    gradients: dict[str, Tensor]
    end: Tensor
    clipped: float


def unrolled(checkpoint: Checkpoint, run: int, steps: int, window: int) -> Unrolled:
    """Independent oracle: one graph through all steps, each with a copy of the weights of its own.

    DDIM as Song et al. 2021 write it, with eps from the clipped image.
    """
    spec, network = checkpoint.spec, checkpoint.network().double()
    draw = generator(SEED, "fisher trajectory", run)
    x = torch.randn(1, *spec.image_shape[0:3], generator=draw).double()
    timesteps = sampling_timesteps(1000, steps)
    abar = [float(spec.noise_schedule().alphas_cumprod[t]) for t in timesteps] + [1.0]
    weights = [
        {n: p.detach().clone().requires_grad_(True) for n, p in network.named_parameters()} for _ in range(steps)
    ]
    total = torch.zeros((), dtype=torch.float64)
    stopped = []
    ends = {cut.stop for cut in windows(steps, window)}
    for s, t in enumerate(timesteps):
        at = torch.tensor([t])
        output = functional_call(network, weights[s], (x, at))
        eps = output if spec.prediction == "eps" else noise_from_velocity(spec.noise_schedule(), x, output, at)
        image = (x - (1 - abar[s]) ** 0.5 * eps) / abar[s] ** 0.5
        stopped.append((image.abs() > 1).double().mean())
        image = image.clamp(-1, 1)
        eps = (x - abar[s] ** 0.5 * image) / (1 - abar[s]) ** 0.5
        x = abar[s + 1] ** 0.5 * image + (1 - abar[s + 1]) ** 0.5 * eps
        if s + 1 in ends:
            total = total + (x * torch.randn(1, *spec.image_shape, generator=draw).double()).sum()
            x = x.detach()
    total.backward()
    gradients = {n: torch.stack([w[n].grad for w in weights]) for n in weights[0]}
    return Unrolled(gradients, x[0], float(torch.stack(stopped).mean()))


def bold(checkpoint: Checkpoint, prediction: str) -> Checkpoint:
    """A model whose images leave [-1, 1] at many pixels, but not at all."""
    name = "head.output.weight"
    tensors = {**checkpoint.tensors, name: 30 * checkpoint.tensors[name]}
    return replace(checkpoint, tensors=tensors, spec=replace(checkpoint.spec, prediction=prediction))


def squares(found: Unrolled, steps: int, window: int) -> dict[str, Tensor]:
    """Squared gradients of the run: coherent within a window, windows summed."""
    return {
        name: torch.stack([g[cut.start : cut.stop].sum(dim=0).square() for cut in windows(steps, window)]).sum(dim=0)
        for name, g in found.gradients.items()
    }


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampler runs in float64: near a clamp, float32 may fall on the other side of it."""
    monkeypatch.setattr(trajectory, "moved", lambda images, device: images.double())
    network = Checkpoint.network
    monkeypatch.setattr(Checkpoint, "network", lambda self: network(self).double())


def runs_of(checkpoint: Checkpoint, runs: list[int], steps: int, window: int) -> Runs:
    network = checkpoint.network()
    return measure_runs(network, checkpoint.spec, runs, steps, window, output_axes(network), SEED)


def channel_mean(name: str, values: Tensor) -> Tensor:
    axis = 1 if "resample.weight" in name and name[5] in "456" else 0
    return values.movedim(axis, 0).flatten(1).mean(dim=1) if values.ndim > 1 else values


@pytest.mark.parametrize(("steps", "window"), [(4, 0), (5, 2), (3, 1)])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.usefixtures("in_float64")
def test_runs_equal_autograd_through_the_unrolled_sampler(
    checkpoint: Checkpoint, prediction: str, steps: int, window: int
) -> None:
    """Whole and in windows, clamps included; two runs in one batch."""
    checkpoint = bold(checkpoint, prediction)
    found = runs_of(checkpoint, [0, 7], steps, window)
    expected = [unrolled(checkpoint, run, steps, window) for run in (0, 7)]
    assert all(0.5 < e.clipped < 0.95 for e in expected), "clamps decide nothing here"
    whole = [squares(e, steps, window) for e in expected]
    norms = [float(sum(s.sum() for s in w.values())) for w in whole]
    assert found.norms.tolist() == pytest.approx(norms, rel=1e-6)
    for name in checkpoint.tensors:
        for r in range(2):
            step = expected[r].gradients[name].square()
            small = 1e-9 * float(step.max())  # gradients are added in float32
            wanted = torch.stack([channel_mean(name, s) for s in step])
            torch.testing.assert_close(found.step[name][r], wanted, rtol=1e-5, atol=small)
            torch.testing.assert_close(found.largest[name][r], step.flatten(1).amax(dim=1), rtol=1e-5, atol=small)
            wanted = channel_mean(name, whole[r][name])
            torch.testing.assert_close(found.total[name][r], wanted, rtol=1e-5, atol=small)
        shares = torch.stack([w[name] / n for w, n in zip(whole, norms, strict=True)]).sum(dim=0)
        torch.testing.assert_close(found.elements[name], shares, rtol=1e-5, atol=1e-9 * float(shares.max()))


def test_the_steps_are_those_of_the_sampler(checkpoint: Checkpoint) -> None:
    """The oracle's run ends where ``ddim`` ends, clipped as it clips."""
    draw = generator(SEED, "fisher trajectory", 0)
    x = torch.randn(1, *checkpoint.spec.image_shape, generator=draw)
    predict = predict_noise(checkpoint.spec, checkpoint.network())
    *_, (_, end) = ddim(predict, x, checkpoint.spec.noise_schedule(), 6, lambda: torch.zeros(1))
    torch.testing.assert_close(unrolled(checkpoint, 0, 6, 0).end.float(), end[0].detach(), rtol=1e-3, atol=1e-4)


def test_effects_of_one_weight_add_up_coherently(checkpoint: Checkpoint) -> None:
    """Rejects the sum of the steps' squares, which only windows of one step have."""
    for window, alike in ((0, False), (1, True)):
        found = runs_of(checkpoint, [0, 1], 4, window)
        ratio = [float(found.total[n].sum() / found.step[n].sum()) for n in found.total if not n.endswith("qkv.bias")]
        assert all(r == pytest.approx(1, rel=1e-6) for r in ratio) == alike
    assert max(ratio) < 1 + 1e-6


@pytest.mark.parametrize(
    ("steps", "window", "cut"),
    [
        (5, 0, [(0, 5)]), (5, 5, [(0, 5)]), (5, 2, [(0, 1), (1, 3), (3, 5)]), (4, 2, [(0, 2), (2, 4)]),
        (2, 1, [(0, 1), (1, 2)]),
    ],
)  # fmt: skip
def test_the_odd_window_is_the_first_where_there_is_only_noise(
    steps: int, window: int, cut: list[tuple[int, int]]
) -> None:
    assert [(w.start, w.stop) for w in windows(steps, window)] == cut


# --- the robust mean -------------------------------------------------------------------------------------------------


def test_the_robust_mean_is_the_geometric_mean_times_the_mean_share() -> None:
    """Ten runs that span eight decades: the largest does not decide."""
    rng = np.random.default_rng(0)
    each = np.exp(rng.normal(size=(10, 3)) + 8 * rng.normal(size=(10, 1)))
    norms = each.sum(axis=1)
    expected = np.exp(np.log(norms).mean()) * (each / norms[:, None]).mean(axis=0)
    found = torch.einsum("n,nk->k", robust_weights(torch.tensor(norms)), torch.tensor(each))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    equal = torch.full((4,), 5.0).double()
    torch.testing.assert_close(robust_weights(equal), torch.full((4,), 0.25).double())


def test_the_jackknife_leaves_out_one_run_at_a_time() -> None:
    rng = np.random.default_rng(1)
    values, norms = np.exp(rng.normal(size=(6, 4))), np.exp(3 * rng.normal(size=6))

    def robust(kept: list[int]) -> np.ndarray:
        n = norms[kept]
        mean: np.ndarray = np.exp(np.log(n).mean()) * (values[kept] / n[:, None]).mean(axis=0)
        return mean

    left_out = np.array([robust([k for k in range(6) if k != n]) for n in range(6)])
    expected = np.sqrt(5 / 6 * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(jackknife_error(torch.tensor(values), torch.tensor(norms)).numpy(), expected, rtol=1e-12)


def test_of_runs_of_equal_norm_the_jackknife_is_the_plain_standard_error() -> None:
    values, norms = torch.rand(8, 2, generator=generator(0, "values")).double(), torch.ones(8).double()
    torch.testing.assert_close(jackknife_error(values, norms), values.std(dim=0) / 8**0.5)


# --- the table -------------------------------------------------------------------------------------------------------


CONFIG = FisherConfig("trajectory", samples=5, steps=3, granularity="weight")


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint, dataset: Dataset) -> FisherTable:
    return fisher(checkpoint, dataset, CONFIG, SEED, Context())


@pytest.mark.usefixtures("in_float64")
def test_the_table_is_the_robust_mean_of_the_runs(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Per step in ``entries``, from small t to large; for the whole run in ``trajectory`` and ``weights``."""
    table = fisher(checkpoint, dataset, CONFIG, SEED, Context())
    assert table.timesteps.tolist() == sampling_timesteps(1000, 3)[::-1] == [332, 666, 999]
    assert (table.kind, table.samples, dict(table.activations)) == ("trajectory", 5, {})
    runs = [unrolled(checkpoint, n, 3, 0) for n in range(5)]
    whole = [squares(run, 3, 0) for run in runs]
    norms = torch.stack([sum(s.sum() for s in w.values()) for w in whole])
    votes = norms.log().mean().exp() / (5 * norms)
    (one,) = table.weights
    assert (one.first, one.last) == (332, 999)
    single = one.read()
    for name, entry in table.entries.items():
        steps = torch.stack([r.gradients[name].square() for r in runs]).flip(1)  # [N, S, *shape]
        mean = torch.einsum("n,ns...->s...", votes, steps)
        small = 1e-9 * float(mean.max())
        torch.testing.assert_close(entry.mean, mean.flatten(1).mean(dim=1), rtol=1e-5, atol=small)
        channels = torch.stack([channel_mean(name, m) for m in mean])
        torch.testing.assert_close(entry.channel, channels, rtol=1e-5, atol=small)
        largest = steps.flatten(2).amax(dim=2).amax(dim=0)
        torch.testing.assert_close(entry.maximum, largest, rtol=1e-5, atol=1e-9 * float(largest.max()))
        error = jackknife_error(steps.flatten(2).mean(dim=2), norms)
        torch.testing.assert_close(entry.standard_error, error, rtol=1e-5, atol=small)

        total = torch.stack([w[name] for w in whole])
        robust = torch.einsum("n,n...->...", votes, total)
        small = 1e-9 * float(robust.max())
        found = table.trajectory[name]
        torch.testing.assert_close(single[name].double(), robust, rtol=1e-5, atol=small)
        torch.testing.assert_close(found.channel, channel_mean(name, robust), rtol=1e-5, atol=small)
        torch.testing.assert_close(
            found.samples, total.flatten(1).mean(dim=1), rtol=1e-5, atol=1e-9 * float(total.max())
        )
        assert found.mean == pytest.approx(float(robust.mean()), rel=1e-5, abs=small)
        assert found.maximum == pytest.approx(float(robust.max()), rel=1e-5)
        error = jackknife_error(total.flatten(1).mean(dim=1), norms)
        assert found.standard_error == pytest.approx(float(error), rel=1e-5, abs=small)
        assert (found.block, found.numel) == (entry.block, entry.numel)


@pytest.mark.parametrize("together", [1, 3])
def test_how_many_runs_are_done_together_does_not_matter(
    checkpoint: Checkpoint, dataset: Dataset, table: FisherTable, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(module, "RUNS_TOGETHER", together)
    other = fisher(checkpoint, dataset, CONFIG, SEED, Context())
    assert [u.members for u in module.units(checkpoint.spec, CONFIG)] == [(0, 1, 2, 3), (4,)]
    for name, entry in table.entries.items():
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(other.entries[name].mean, entry.mean, rtol=1e-5, atol=0)
            assert other.trajectory[name].mean == pytest.approx(table.trajectory[name].mean, rel=1e-5)


def test_the_number_of_threads_does_not_matter(checkpoint: Checkpoint, dataset: Dataset, table: FisherTable) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = fisher(checkpoint, dataset, CONFIG, SEED, Context())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(e.channel, other.entries[name].channel) for name, e in table.entries.items())
    assert all(torch.equal(e.channel, other.trajectory[name].channel) for name, e in table.trajectory.items())
    assert all(torch.equal(v, other.weights[0].read()[name]) for name, v in table.weights[0].read().items())


def test_a_trajectory_without_channels_has_none(checkpoint: Checkpoint, dataset: Dataset) -> None:
    config = replace(CONFIG, granularity="tensor", samples=2)
    table = fisher(checkpoint, dataset, config, SEED, Context())
    assert {e.channel.shape for e in table.entries.values()} == {(3, 0)}
    assert {e.channel.shape for e in table.trajectory.values()} == {(0,)}
    assert not table.weights


def test_a_run_that_is_clipped_everywhere_is_an_error(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Each image is white whatever the weights do: no share of nothing."""
    clipped = replace(
        checkpoint,
        spec=replace(checkpoint.spec, prediction="eps"),
        tensors={**checkpoint.tensors, "head.output.bias": torch.tensor([-1e6])},
    )
    with pytest.raises(NumericalError, match="no gradient at all"):
        fisher(clipped, dataset, FisherConfig("trajectory", samples=2, steps=2), SEED, Context())


def test_more_steps_than_timesteps_are_refused(checkpoint: Checkpoint, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="1001 inference steps"):
        fisher(checkpoint, dataset, FisherConfig("trajectory", samples=2, steps=1001), SEED, Context())
    with pytest.raises(ConfigError, match="window is 6"):
        FisherConfig("trajectory", steps=5, window=6)
