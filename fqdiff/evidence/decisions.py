"""From a difference and its standard error to a verdict: p-values, Holm's correction, and the N that would tell."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from statistics import NormalDist

from scipy.special import stdtr, stdtrit

from fqdiff.errors import NumericalError

POWER = 0.8
VERDICTS = ("better", "worse", "not worse", "not better", "not distinguishable")
MOST_IMAGES = 10**12  # more than anyone will make: the models are equal as far as can be told


def quantile(share: float, freedom: float = math.inf) -> float:
    """What a normal value falls below in ``share`` of all tries, or one of Student's t with so many degrees of ``freedom``."""
    return NormalDist().inv_cdf(share) if math.isinf(freedom) else float(stdtrit(freedom, share))


def half_width(standard_error: float, level: float, freedom: float = math.inf) -> float:
    """Half the width of the interval of ``level``, e.g. 0.95: the normal one, or Student's where the error has ``freedom``."""
    return quantile(0.5 + level / 2, freedom) * standard_error


def p_value(difference: float, standard_error: float, freedom: float = math.inf) -> float:
    """Two-sided p-value of no difference, the estimate taken for normal. 1 where both are 0: nothing differs at all.

    ``freedom``: of a standard error from few samples, which makes the ratio one of Student's t.
    Raises NumericalError for NaN.
    """
    if not (math.isfinite(difference) and math.isfinite(standard_error)):
        raise NumericalError(f"a difference of {difference} +- {standard_error}", "look at the images and features")
    if difference == 0:
        return 1.0
    if standard_error == 0:
        return 0.0
    ratio = abs(difference) / standard_error
    return math.erfc(ratio / math.sqrt(2)) if math.isinf(freedom) else float(2 * stdtr(freedom, -ratio))


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


def images_needed(
    difference: float, standard_error: float, images: int, level: float, freedom: float = math.inf
) -> int | None:
    """With how many images a difference as large as this one would be found in ``POWER`` of all tries at ``level``.

    ``level`` of this one test: of a family 1 minus its share of :func:`holm_shares`. What is not told at it needs more than
    ``images``. The standard error is taken to fall as 1 / sqrt(N), and where it has ``freedom`` to have N - 1.
    None where the difference is 0, or it would be a trillion.
    """
    if difference == 0:
        return None

    def needed(freedom: float) -> float:
        """By the quantiles of ``freedom``; the more of it, the fewer."""
        ratio = (quantile(0.5 + level / 2, freedom) + quantile(POWER, freedom)) * standard_error / abs(difference)
        return images * ratio**2

    normal = needed(math.inf)
    if normal >= MOST_IMAGES:
        return None
    enough = max(2, math.ceil(normal))
    if math.isinf(freedom):
        return enough
    return bisect_left(range(MOST_IMAGES), True, lo=enough, key=lambda n: needed(n - 1) <= n)


def interval_verdict(gain: float, low: float, high: float) -> str:
    """:func:`verdict` of a quantized model against its full precision, from the interval of their difference alone: one test."""
    if low <= 0 <= high:
        return "not distinguishable"
    return "not worse" if gain > 0 else "worse"


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
