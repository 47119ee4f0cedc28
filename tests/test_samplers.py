"""The samplers against diffusers' schedulers, and against the exact solution where there is one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fqdiff.diffusion.samplers import ddim, ddpm, dpm_solver_plus_plus
from fqdiff.diffusion.schedule import NoiseSchedule, make_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SHAPE = (3, 1, 8, 8)


def predict(x: Tensor, t: Tensor) -> Tensor:
    """No good predictor, but one that depends on x, on t and on the neighbouring pixels, and that clipping has to act on."""
    return torch.tanh(1.3 * x + 0.2 * x.roll(1, dims=-1)) * (1 + 0.1 * torch.sin(t.float() / 50).view(-1, 1, 1, 1))


def of_diffusers(
    kind: type[Any], schedule: NoiseSchedule, steps: int, start: Tensor, step: dict[str, Any], **settings: Any
) -> Iterator[tuple[int, Tensor]]:
    """Timestep and x after each of its steps; ``step`` goes to every call of its ``step``."""
    scheduler = kind(trained_betas=schedule.betas.numpy(), timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, torch.full((len(x),), int(t))), t, x, **step).prev_sample
        yield int(t), x


def assert_same(ours: Iterator[tuple[int, Tensor]], theirs: Iterator[tuple[int, Tensor]]) -> None:
    """To the float32 that diffusers keeps its schedules in."""
    count = 0
    for (t, x), (other_t, other) in zip(ours, theirs, strict=True):
        assert t == other_t
        torch.testing.assert_close(x, other, rtol=1e-4, atol=2e-4)
        count += 1
    assert count > 1


@pytest.fixture
def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


# Without clipping, the cosine schedule's first x_0 is of order 1e4: float32 has no digits left for the comparison.
@pytest.mark.parametrize(("schedule", "clip"), [("linear", True), ("linear", False), ("cosine", True)])
@pytest.mark.parametrize("steps", [2, 3, 10, 14, 15, 16, 20, 50])
def test_dpm_solver_is_that_of_diffusers(start: Tensor, schedule: str, clip: bool, steps: int) -> None:
    """Below and above 15 steps, where diffusers treats the last step differently. Its thresholding at 1 is clipping.

    Rejects a last step of second order, and the correction with 1 / r in place of 1 / (2 r).
    """
    table = make_schedule(schedule, 1000)
    theirs = of_diffusers(
        DPMSolverMultistepScheduler, table, steps, start, {},
        algorithm_type="dpmsolver++", solver_order=2, thresholding=clip, sample_max_value=1.0,
    )  # fmt: skip
    assert_same(dpm_solver_plus_plus(predict, start, table, steps, clip), theirs)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers(start: Tensor, clip: bool, eta: float) -> None:
    table, one, other = make_schedule("linear", 1000), torch.Generator(), torch.Generator()
    step = {"eta": eta, "use_clipped_model_output": True, "generator": other}
    theirs = of_diffusers(DDIMScheduler, table, 20, start, step, clip_sample=clip)
    assert_same(ddim(predict, start, table, 20, lambda: torch.randn(SHAPE, generator=one), eta, clip), theirs)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [20, 100])
def test_ddpm_is_that_of_diffusers(start: Tensor, schedule: str, steps: int) -> None:
    table, one, other = make_schedule(schedule, 1000), torch.Generator(), torch.Generator()
    theirs = of_diffusers(DDPMScheduler, table, steps, start, {"generator": other}, clip_sample=True)
    assert_same(ddpm(predict, start, table, steps, lambda: torch.randn(SHAPE, generator=one)), theirs)


def test_two_steps_of_dpm_solver_are_two_of_ddim(start: Tensor) -> None:
    """Both are of first order: one is the first, the other the last."""
    table = make_schedule("cosine", 1000)
    for (_, x), (_, other) in zip(
        dpm_solver_plus_plus(predict, start, table, 2), ddim(predict, start, table, 2, lambda: start), strict=True
    ):
        torch.testing.assert_close(x, other, rtol=1e-5, atol=1e-6)


def error_at_499(sampler: Callable[..., Iterator[tuple[int, Tensor]]], steps: int) -> float:
    """Of a run from t = 999 with images N(0, 1/4): the exact x_t is x_T sqrt(var_t / var_T), var = abar / 4 + 1 - abar."""
    schedule = make_schedule("linear", 1000)

    def variance(t: int | Tensor) -> Tensor:
        return 1 - 0.75 * schedule.alphas_cumprod[t]

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        return x * ((1 - schedule.alphas_cumprod[t]).sqrt() / variance(t)).view(-1, 1, 1, 1)

    x = start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t, reached in sampler(perfect, start, schedule, steps):
        if t == 499:
            return abs(float(x - start * (variance(499) / variance(999)).sqrt()))
        x = reached
    raise AssertionError("no step starts at 499")


def test_dpm_solver_is_of_second_order_where_ddim_is_of_first() -> None:
    """Twice as many steps: a quarter of the error, or half of it."""

    def ddim_steps(*arguments: Any) -> Iterator[tuple[int, Tensor]]:
        return ddim(*arguments, lambda: torch.zeros(1), clip=False)

    def solver_steps(*arguments: Any) -> Iterator[tuple[int, Tensor]]:
        return dpm_solver_plus_plus(*arguments, clip=False)

    for sampler, order in ((ddim_steps, 1), (solver_steps, 2)):
        coarse, fine = (error_at_499(sampler, n) for n in (100, 200))
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert error_at_499(solver_steps, 20) < error_at_499(ddim_steps, 20) / 3
