"""How far models are from a baseline's, timestep by timestep and along the sampler's runs.

Both see what no distance between sets of images can: every model gets the same inputs, and the same noise.

Shapes: K timesteps, S noised images at each, R runs of the sampler, L its steps, B resamples, C channels, H W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fqdiff.configs import CompareConfig, SampleConfig
from fqdiff.context import Context
from fqdiff.diffusion.samplers import run_sampler
from fqdiff.errors import NumericalError
from fqdiff.evidence.comparison import Resampled
from fqdiff.evidence.decisions import half_width
from fqdiff.evidence.resampling import draw_counts, mean_draws, widened
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import Inputs, draw_inputs, graded_timesteps
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.sensitivity.measure import outputs
from fqdiff.values import Curve, Model, Point, error_std, predict_noise

RUNS = 8  # in one batch; fixed, so that results do not depend on the machine
Measured = tuple[
    tuple[Curve, ...], dict[str, Resampled]
]  # of each model: its curve, and its mean with the draws of it, by role


def comparable(model: Model, baseline: Model) -> bool:
    """Whether x_t and the output mean the same for both: one noise schedule, one kind of output, one image shape."""
    a, b = model.spec, baseline.spec
    same_time = a.architecture["num_train_timesteps"] == b.architecture["num_train_timesteps"]
    return same_time and (a.schedule, a.prediction, a.image_shape) == (b.schedule, b.prediction, b.image_shape)


def noise_error(
    baseline: Model,
    models: Mapping[str, Model],
    images: Tensor,
    config: CompareConfig,
    seed: int,
    context: Context,
    ledger: Ledger,
) -> Measured:
    """1/2 |eps_q - eps|^2, summed over pixels, of each of ``models`` by role against ``baseline``, over timesteps.

    ``images`` uint8 [N, C, H, W], held out. All models get the same K x S inputs, and each resample draws the same ones for
    all of them, timestep by timestep: inputs of different timesteps are independent. Raises NumericalError by role.
    """
    spec, count = baseline.spec, config.error_inputs
    timesteps, weights = graded_timesteps(spec.noise_schedule().num_train_timesteps, config.error_timesteps)
    inputs = draw_inputs(images, spec, timesteps, weights, count, seed, "compare")
    values = ledger.rows("noise_error", len(models), len(timesteps), count)
    reference: Tensor | None = None
    for number in ledger.units("noise error", len(models), "model"):
        role, model = list(models.items())[number]
        if reference is None:
            reference = _outputs("baseline", baseline, inputs, context)
        delta = _outputs(role, model, inputs, context) - reference
        values[number] = 0.5 * delta.square().flatten(1).sum(dim=1).view(len(timesteps), count)
    counts = [draw_counts(count, config.resamples, generator(seed, "noise error", t)) for t in timesteps.tolist()]
    draws = [
        torch.stack([mean_draws(row, drawn) for row, drawn in zip(rows, counts, strict=True)], dim=1) for rows in values
    ]
    return _measured([*models], timesteps, weights, values.mean(dim=2), draws, count, config.level)


def divergence(
    baseline: Model,
    models: Mapping[str, Model],
    config: CompareConfig,
    run_seed: int,
    seed: int,
    context: Context,
    ledger: Ledger,
) -> Measured:
    """Mean squared distance of x from ``baseline``'s own run, before the first and after every step of the sampler.

    Run k starts from the noise of image k of samples with ``run_seed``, and gets its step noise: of those samples it is the run
    itself. Each resample draws the same runs for all models. The mean is over the L steps, without the start, where
    all are equal. Raises NumericalError by role.
    """
    runs = config.trajectories
    sampling = SampleConfig(config.sampler, config.steps, config.eta, runs)
    values = ledger.rows("divergence", len(models), runs, config.steps + 1)
    batches = torch.arange(runs).split(RUNS)
    for number in ledger.units("sampler runs", len(batches), "step", config.steps):
        members = batches[number].tolist()
        roles = {"baseline": baseline, **models}
        every = [_states(role, model, sampling, run_seed, members, context) for role, model in roles.items()]
        for step, states in enumerate(zip(*every, strict=True)):
            for k, x in enumerate(states[1:]):
                values[k, members, step] = (x - states[0]).square().flatten(1).mean(dim=1)
            if step:
                ledger.step()
    counts = draw_counts(runs, config.resamples, generator(seed, "sampler runs")).double()
    steps = torch.arange(config.steps + 1)
    weights = (steps > 0).double() / config.steps
    draws = [counts @ rows / runs for rows in values]
    return _measured([*models], steps, weights, values.mean(dim=1), draws, runs, config.level)


def _outputs(role: str, model: Model, inputs: Inputs, context: Context) -> Tensor:
    """What the model of ``role`` makes of ``inputs``, in units of the noise, float64 [N, C, H, W]."""
    try:
        return outputs(_network(model, context), inputs, context.device)
    except NumericalError as error:
        raise NumericalError(f"{role}: {error.message}", error.hint) from None


def _network(model: Model, context: Context) -> nn.Module:
    network: nn.Module = model.network().to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _states(
    role: str, model: Model, sampling: SampleConfig, seed: int, members: Sequence[int], context: Context
) -> Iterator[Tensor]:
    """x of the runs ``members``, float64 [R, C, H, W] on the CPU: the start, then after each step."""
    spec, generators = model.spec, [generator(seed, "image", k) for k in members]
    network = _network(model, context)

    def draw_noise() -> Tensor:
        noise = torch.stack([torch.randn(spec.image_shape, generator=g) for g in generators])
        return noise.to(context.device, memory_format=torch.channels_last)

    x = draw_noise()
    yield x.cpu().double()
    steps = run_sampler(predict_noise(spec, network), x, spec.noise_schedule(), sampling, draw_noise, error_std(model))
    while True:
        with torch.inference_mode():  # not around the yield: it would hold for the caller, too
            t, x = next(steps, (-1, x))
        if t < 0:
            return
        if not torch.isfinite(x).all():
            raise NumericalError(f"x of {role} holds NaN or infinity after timestep {t}", "check the model's plan")
        yield x.cpu().double()


def _measured(
    roles: Sequence[str],
    at: Tensor,
    weights: Tensor,
    values: Tensor,
    draws: Sequence[Tensor],
    samples: int,
    level: float,
) -> Measured:
    """A curve through the points ``at`` [P] for each role's row of ``values`` [M, P], and its mean with that of each resample.

    ``draws``: what resamples made of each row, [B, P]. Resample b drew the same samples for all roles: their means are paired.
    Samples are few: errors have samples - 1 degrees of freedom. Over independent timesteps it is more, and intervals are wide.
    """
    curves, means = [], {}
    for role, row, drawn in zip(roles, values, draws, strict=True):
        wide = widened(drawn, row, samples)
        mean = means[role] = Resampled(float(row @ weights), wide @ weights, samples - 1)
        half = half_width(mean.standard_error, level, mean.freedom)
        points = zip(at.tolist(), weights.tolist(), row.tolist(), wide.std(dim=0).tolist(), strict=True)
        ends = mean.value - half, mean.value + half
        curves.append(Curve(role, samples, tuple(Point(*p) for p in points), mean.value, mean.standard_error, *ends))
    return tuple(curves), means
