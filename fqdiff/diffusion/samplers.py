"""Samplers: one generator function per algorithm.

Each yields ``(t, x)`` after every step, so that the caller owns progress, recording and stopping.
``predict_noise(x, t)`` takes x [B, C, H, W] and t [B] and returns eps_pred; ``draw_noise()`` returns the next step noise,
shaped like x (the caller owns the per-image generators).

``error_std(t)`` is the standard deviation of a random error of eps_pred, independent from pixel to pixel, as quantization
leaves it. A step carries it into x times the step's derivative by eps, where it does the work of step noise: so much less of that
is drawn that both together have the variance which the sampler asks for (PTQD, He et al. 2023, arXiv:2305.10657). Where clipping
changes x_0, less of the error gets there than is counted. A step without noise has nothing to absorb an error with.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fqdiff.configs import SampleConfig
from fqdiff.diffusion.schedule import NoiseSchedule
from fqdiff.errors import ConfigError

PredictNoise = Callable[[Tensor, Tensor], Tensor]
DrawNoise = Callable[[], Tensor]
ErrorStd = Callable[[int], float]


def no_error(t: int) -> float:
    """The error of a prediction that counts as exact."""
    return 0.0


def remaining_std(std: float, error: float) -> float:
    """Standard deviation of the step noise to draw beside an independent ``error``, so that both together have ``std``, or
    0 where the error alone has more.
    """
    return max(std**2 - error**2, 0.0) ** 0.5 if error else std


def sampling_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Decreasing timesteps, evenly spaced from T - 1 ("trailing" spacing; Lin et al. 2023, arXiv:2305.08891, table 2).

    Starting at T - 1 matters: it is the only timestep whose input the network has seen as (almost) pure noise.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ConfigError(
            f"{num_inference_steps} inference steps for a model of {num_train_timesteps} training timesteps",
            f"use 1 to {num_train_timesteps}",
        )
    stride = num_train_timesteps / num_inference_steps
    return [round(num_train_timesteps - i * stride) - 1 for i in range(num_inference_steps)]


def sampling_steps(schedule: NoiseSchedule, num_inference_steps: int) -> Iterator[tuple[int, float, float, bool]]:
    """(t, alphas_cumprod[t], alphas_cumprod of the next step, is it the last) for each step; the last one goes to 1."""
    timesteps = sampling_timesteps(schedule.num_train_timesteps, num_inference_steps)
    alphas_cumprod = [float(schedule.alphas_cumprod[t]) for t in timesteps] + [1.0]
    for i, t in enumerate(timesteps):
        yield t, alphas_cumprod[i], alphas_cumprod[i + 1], i == len(timesteps) - 1


def predict_image(x: Tensor, eps: Tensor, alpha_cumprod: float | Tensor, clip: bool) -> Tensor:
    """x_0 that x_t and eps_pred imply (Ho et al. 2020, eq. 15), clipped to the image range [-1, 1] if asked."""
    image: Tensor = (x - (1 - alpha_cumprod) ** 0.5 * eps) / alpha_cumprod**0.5
    return image.clamp(-1, 1) if clip else image


def ddpm(
    predict_noise: PredictNoise,
    x: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    draw_noise: DrawNoise,
    clip: bool = True,
    error_std: ErrorStd = no_error,
) -> Iterator[tuple[int, Tensor]]:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, eq. 6 and 7; algorithm 2 with clipped x_0)."""
    for t, abar, abar_next, last in sampling_steps(schedule, num_inference_steps):
        eps = predict_noise(x, torch.full((len(x),), t, device=x.device))
        image = predict_image(x, eps, abar, clip)
        alpha = abar / abar_next
        mean = abar_next**0.5 * (1 - alpha) / (1 - abar) * image + alpha**0.5 * (1 - abar_next) / (1 - abar) * x
        std = ((1 - alpha) * (1 - abar_next) / (1 - abar)) ** 0.5
        by_eps = (1 - alpha) / (alpha * (1 - abar)) ** 0.5
        std = remaining_std(std, by_eps * error_std(t))
        x = mean if last else mean + std * draw_noise()
        yield t, x


def ddim_update(
    x: Tensor, eps: Tensor, abar: float | Tensor, abar_next: float | Tensor, std: float = 0.0, clip: bool = True
) -> Tensor:
    """Where one DDIM step takes x_t, before its step noise (Song et al. 2021, eq. 12).

    eps is recomputed from the clipped image, so that x stays on the line between image and noise. ``abar`` may be tensors that
    x is broadcast with, one number for each image.
    """
    image = predict_image(x, eps, abar, clip)
    eps = (x - abar**0.5 * image) / (1 - abar) ** 0.5
    moved: Tensor = abar_next**0.5 * image + (1 - abar_next - std**2) ** 0.5 * eps
    return moved


def ddim(
    predict_noise: PredictNoise,
    x: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    draw_noise: DrawNoise,
    eta: float = 0.0,
    clip: bool = True,
    error_std: ErrorStd = no_error,
) -> Iterator[tuple[int, Tensor]]:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta = 0 is deterministic; eta = 1 is DDPM."""
    for t, abar, abar_next, last in sampling_steps(schedule, num_inference_steps):
        eps = predict_noise(x, torch.full((len(x),), t, device=x.device))
        std = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = ddim_update(x, eps, abar, abar_next, std, clip)
        if std > 0 and not last:
            by_eps = (1 - abar_next - std**2) ** 0.5 - (abar_next * (1 - abar) / abar) ** 0.5
            x = x + remaining_std(std, by_eps * error_std(t)) * draw_noise()
        yield t, x


def dpm_solver_plus_plus(
    predict_noise: PredictNoise, x: Tensor, schedule: NoiseSchedule, num_inference_steps: int, clip: bool = True
) -> Iterator[tuple[int, Tensor]]:
    """DPM-Solver++ (2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order with one prediction per step.

    lambda = log(alpha / sigma), alpha = sqrt(abar), sigma = sqrt(1 - abar). The first step is of first order, for there is no
    image before it; so is the last, whose h is infinite: it ends at the image predicted. Deterministic: no step noise.
    """
    before: tuple[float, Tensor] | None = None  # lambda and image of the step before
    for t, abar, abar_next, last in sampling_steps(schedule, num_inference_steps):
        eps = predict_noise(x, torch.full((len(x),), t, device=x.device))
        image = predict_image(x, eps, abar, clip)
        if last:
            x = image
        else:
            here = half_log_snr(abar)
            h = half_log_snr(abar_next) - here
            ahead = image  # D_i of the algorithm: the image extrapolated to the middle of the step
            if before is not None:
                ahead = image + h / (2 * (here - before[0])) * (image - before[1])
            x = ((1 - abar_next) / (1 - abar)) ** 0.5 * x - abar_next**0.5 * math.expm1(-h) * ahead
            before = here, image
        yield t, x


def half_log_snr(alpha_cumprod: float) -> float:
    """lambda = log(alpha / sigma) at one timestep."""
    return 0.5 * (math.log(alpha_cumprod) - math.log1p(-alpha_cumprod))


def run_sampler(
    predict: PredictNoise,
    x: Tensor,
    schedule: NoiseSchedule,
    config: SampleConfig,
    draw_noise: DrawNoise,
    error: ErrorStd = no_error,
) -> Iterator[tuple[int, Tensor]]:
    """``(t, x)`` after every step of the sampler that ``config`` names."""
    if config.sampler == "ddpm":
        return ddpm(predict, x, schedule, config.steps, draw_noise, error_std=error)
    if config.sampler == "dpm++":
        return dpm_solver_plus_plus(predict, x, schedule, config.steps)
    return ddim(predict, x, schedule, config.steps, draw_noise, config.eta, error_std=error)
