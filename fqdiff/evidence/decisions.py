"""From a difference and its standard error to a verdict: p-values, Holm's correction, and the N that would tell."""

import math
from collections.abc import Sequence
from statistics import NormalDist

from fqdiff.errors import NumericalError

POWER = 0.8
VERDICTS = ("better", "worse", "not worse", "not better", "not distinguishable")
MOST_IMAGES = 10**12  # more than anyone will make: the models are equal as far as can be told


def half_width(standard_error: float, level: float) -> float:
    """Half the width of the normal interval of ``level``, e.g. 0.95."""
    return NormalDist().inv_cdf(0.5 + level / 2) * standard_error


def p_value(difference: float, standard_error: float) -> float:
    """Two-sided p-value of no difference, the estimate taken for normal. 1 where both are 0: nothing differs at all.

    Raises NumericalError for NaN.
    """
    if not (math.isfinite(difference) and math.isfinite(standard_error)):
        raise NumericalError(f"a difference of {difference} +- {standard_error}", "look at the images and features")
    if difference == 0:
        return 1.0
    return math.erfc(abs(difference) / standard_error / math.sqrt(2)) if standard_error > 0 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): at most ``level`` of all families of tests hold a single false finding.

    The k-th smallest of m is multiplied by m - k + 1 and is at least the one before it.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for done, k in enumerate(order):
        largest = max(largest, min(1.0, p_values[k] * (len(p_values) - done)))
        adjusted[k] = largest
    return adjusted


def holm_shares(p_values: Sequence[float], alpha: float) -> list[float]:
    """What each p-value must not exceed under :func:`holm`, for a family at ``alpha``: this over how many are not told before it.

    All that are not told have the same to reach, that of the smallest of them.
    """
    shares, told = [0.0] * len(p_values), 0
    for k in sorted(range(len(p_values)), key=p_values.__getitem__):
        shares[k] = alpha / (len(p_values) - told)
        told += p_values[k] <= shares[k]
    return shares


def images_needed(difference: float, standard_error: float, images: int, level: float) -> int | None:
    """With how many images a difference as large as this one would be found in ``POWER`` of all tries at ``level``.

    ``level`` of this one test: of a family 1 minus its share of :func:`holm_shares`. What is not told at it needs more than
    ``images``. The standard error is taken to fall as 1 / sqrt(N). None where the difference is 0, or it would be a trillion.
    """
    if difference == 0:
        return None
    normal = NormalDist()
    ratio = (normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(POWER)) * standard_error / abs(difference)
    needed = images * ratio**2
    return max(2, math.ceil(needed)) if needed < MOST_IMAGES else None


def verdict(gain: float, p: float, level: float, beyond: bool) -> str:
    """What may be said of a model against another. ``gain``: the difference, positive where it is good; ``p`` adjusted.

    ``beyond``: whether the one with the better value was quantized from a model whose value is less good, by more than chance.
    That is no merit: it moved away from what it is to reproduce, and by chance towards the reference.
    """
    if p > 1 - level:
        return "not distinguishable"
    if gain > 0:
        return "not worse" if beyond else "better"
    return "not better" if beyond else "worse"
