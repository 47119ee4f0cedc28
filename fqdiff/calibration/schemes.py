"""Which steps of a sampler's run are recorded for calibration.

A step is counted from the start of the run: 0 sees pure noise, S - 1 gives the image. Shapes: N runs, m inputs kept of each, S
steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fqdiff.configs import THIRDS, CalibrateConfig, third_of
from fqdiff.errors import NumericalError, require
from fqdiff.rng import generator

LEAST_SHARE = 1e-3  # of a skew-normal's draws must fall on [0, 1), or drawing again would take forever


def chosen_steps(config: CalibrateConfig, seed: int, mass: Tensor | None = None) -> Tensor:
    """int64 [N, m]: the steps kept of each of ``config.samples`` runs; those of run k depend on (seed, k) alone.

    ``mass`` float64 [S]: for the scheme ``fisher``, the Fisher information at each step's timestep. Drawn steps may repeat.
    Raises ConfigError where a run has too few steps.
    """
    steps, kept, runs = config.steps, config.timesteps, config.samples
    if config.scheme in ("uniform", *THIRDS):
        among = third_of(config.scheme, steps) if config.scheme in THIRDS else range(steps)
        require(
            kept <= len(among),
            f"{kept} timesteps of {len(among)} sampler steps",
            "use fewer --timesteps, or more --steps",
        )
        even = torch.tensor([among[(2 * i + 1) * len(among) // (2 * kept)] for i in range(kept)])
        return even.expand(runs, kept)
    generators = (generator(seed, "calibration steps", k) for k in range(runs))
    if config.scheme == "ndtc":
        return torch.stack([ndtc_steps(config, draw) for draw in generators])
    assert mass is not None
    share = fisher_shares(mass).cumsum(dim=0)
    places = [torch.rand(kept, dtype=torch.float64, generator=draw) * share[-1] for draw in generators]
    # A place on a border belongs to the step above it, so that steps without mass are never drawn.
    return torch.searchsorted(share, torch.stack(places), right=True).clamp(max=steps - 1)


def fisher_shares(mass: Tensor) -> Tensor:
    """``mass`` [S] with a sum of 1. Raises NumericalError where it is negative, no number, or 0 everywhere."""
    if not ((mass >= 0) & torch.isfinite(mass)).all() or not mass.sum() > 0:
        raise NumericalError("the Fisher information of the sampler's timesteps is NaN, negative or 0", "fqdiff fisher")
    return mass / mass.sum()


def ndtc_steps(config: CalibrateConfig, draw: torch.Generator) -> Tensor:
    """Steps [m] whose share t / T of the timesteps comes from a skew-normal on [0, 1) (PTQ4DM: Shang et al. 2023).

    What falls outside is drawn again: clamped, it would pile up on the first and the last timestep. ``skew`` 0 is a normal;
    0.4 and 0.4 are location and spread of the published script.
    """
    found: list[float] = []
    for share in skew_normal(config, draw):
        if 0 <= share < 1:
            found.append(share)
            if len(found) == config.timesteps:
                break
    return config.steps - 1 - (torch.tensor(found, dtype=torch.float64) * config.steps).long()


def skew_normal(config: CalibrateConfig, draw: torch.Generator) -> Iterator[float]:
    """Draws of location + spread (d |u| + sqrt(1 - d^2) v), u and v standard normal, d = skew / sqrt(1 + skew^2).

    Azzalini's skew-normal (1985). Raises ConfigError where hardly any falls on [0, 1).
    """
    d = config.skew / (1 + config.skew**2) ** 0.5
    for _ in range(int(config.timesteps / LEAST_SHARE) + 1):
        u, v = torch.randn(2, dtype=torch.float64, generator=draw).tolist()
        yield config.location + config.spread * (d * abs(u) + (1 - d * d) ** 0.5 * v)
    require(
        False,
        f"hardly anything of a skew-normal at {config.location} of spread {config.spread} and skew {config.skew} is in [0, 1)",
        "move --location between 0 and 1",
    )
