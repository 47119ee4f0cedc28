import math

import pytest
import torch

from fqdiff.diffusion.samplers import ddim, ddpm, sampling_timesteps
from fqdiff.diffusion.schedule import (
    add_noise,
    loss_weight,
    make_schedule,
    noise_from_velocity,
    regression_target,
    velocity,
)
from fqdiff.errors import ConfigError


def test_linear_schedule_has_the_published_values() -> None:
    alphas_cumprod = make_schedule("linear", 1000).alphas_cumprod
    assert float(alphas_cumprod[0]) == pytest.approx(0.9999, rel=1e-9)
    assert float(alphas_cumprod[499]) == pytest.approx(0.0785872, rel=1e-5)
    assert float(alphas_cumprod[999]) == pytest.approx(4.0358298e-5, rel=1e-6)


def test_cosine_schedule_follows_its_formula() -> None:
    alphas_cumprod = make_schedule("cosine", 1000).alphas_cumprod

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 250, 700):
        assert float(alphas_cumprod[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_every_schedule_ends_in_noise(name: str, steps: int) -> None:
    alphas_cumprod = make_schedule(name, steps).alphas_cumprod
    assert alphas_cumprod[-1] < 1e-3
    assert bool((alphas_cumprod[1:] < alphas_cumprod[:-1]).all())


def test_velocity_and_noise_are_two_views_of_one_thing() -> None:
    schedule = make_schedule("cosine", 100)
    x, noise = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 10, 50, 90, 98])
    x_t = add_noise(schedule, x, noise, t)
    assert torch.allclose(noise_from_velocity(schedule, x_t, velocity(schedule, x, noise, t), t), noise)


def test_sampling_timesteps_start_at_the_end_of_training() -> None:
    assert sampling_timesteps(1000, 5) == [999, 799, 599, 399, 199]
    assert sampling_timesteps(4, 4) == [3, 2, 1, 0]
    with pytest.raises(ConfigError, match="5 inference steps"):
        sampling_timesteps(4, 5)


def test_a_perfect_noise_predictor_recovers_the_image_with_ddim() -> None:
    schedule = make_schedule("linear", 1000)
    image = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * image) / (1 - abar).sqrt()

    *_, (t, x) = ddim(predict, torch.randn_like(image), schedule, 7, lambda: torch.zeros_like(image))
    assert t == sampling_timesteps(1000, 7)[-1]
    assert torch.allclose(x, image, atol=1e-9)


def test_ddim_with_full_eta_is_ddpm() -> None:
    schedule = make_schedule("linear", 50)
    start = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    noises = torch.randn(50, 2, 1, 4, 4, dtype=torch.float64)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    one, other = iter(noises), iter(noises)
    for a, b in zip(
        ddpm(predict, start, schedule, 10, lambda: next(one), clip=False),
        ddim(predict, start, schedule, 10, lambda: next(other), eta=1.0, clip=False),
        strict=True,
    ):
        assert a[0] == b[0]
        assert torch.allclose(a[1], b[1])


def test_ddpm_without_clipping_is_the_published_update() -> None:
    """Ho et al. 2020, algorithm 2, line 4; a sampler that forgot the posterior's x_0 term fails."""
    schedule = make_schedule("linear", 20)
    start, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    (t, x), *_ = ddpm(lambda x, t: torch.sin(x), start, schedule, 20, lambda: noise, clip=False)
    beta, abar, before = schedule.betas[19], schedule.alphas_cumprod[19], schedule.alphas_cumprod[18]
    mean = (start - beta / (1 - abar).sqrt() * torch.sin(start)) / (1 - beta).sqrt()
    assert t == 19
    assert torch.allclose(x, mean + (beta * (1 - before) / (1 - abar)).sqrt() * noise)


def test_the_last_step_adds_no_noise() -> None:
    schedule = make_schedule("linear", 20)
    draws = []

    def draw() -> torch.Tensor:
        draws.append(1)
        return torch.randn(1, 1, 2, 2)

    list(ddpm(lambda x, t: x, torch.randn(1, 1, 2, 2), schedule, 20, draw))
    assert len(draws) == 19


@pytest.mark.parametrize(("prediction", "t"), [(p, t) for p in ("eps", "v") for t in (0, 300, 700, 998)])
def test_min_snr_counts_an_image_error_min_snr_times_at_every_timestep(prediction: str, t: int) -> None:
    schedule = make_schedule("cosine", 1000)
    x_0, noise, error = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([t])
    a, s = schedule.alphas_cumprod[t].sqrt(), (1 - schedule.alphas_cumprod[t]).sqrt()
    x_t = add_noise(schedule, x_0, noise, at)
    wrong_noise = (x_t - a * (x_0 + error)) / s  # what a network says that takes the image for x_0 + error
    wrong = wrong_noise if prediction == "eps" else a * wrong_noise - s * (x_0 + error)
    target, _ = regression_target(schedule, prediction, x_0, noise, at)
    loss = (loss_weight(schedule, prediction, "min-snr", at, x_t) * (wrong - target).square()).sum()
    snr = (a / s) ** 2
    torch.testing.assert_close(loss, snr.clamp(max=5) * error.square().sum())
