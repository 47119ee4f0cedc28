"""Which single elements of a tensor are kept in another format than the rest."""

from torch import Tensor

from fqdiff.errors import ConfigError
from fqdiff.quant.formats import Format, Grain, PerElement
from fqdiff.quant.packed import pack_tensor, unpack_tensor
from fqdiff.quant.ranges import FISHER

BY_FISHER, BY_RISE = "fisher", "rise"


def choose_kept(x: Tensor, fmt: Format, granularity: Grain, weight: Tensor | None, by: str) -> Tensor | None:
    """Positions of the elements that ``granularity`` keeps, increasing int64 [count]; None where it keeps none.

    ``weight``: Fisher values, shaped like ``x``. ``by`` "fisher": those of the largest. "rise": those of the largest Fisher
    value times squared error, see :func:`rise`. Of equals the first. Raises ConfigError without ``weight``.
    """
    if not isinstance(granularity, PerElement):
        return None
    if weight is None:
        raise ConfigError("elements kept without Fisher values of single weights", "fqdiff fisher --granularity weight")
    return largest(weight if by == BY_FISHER else rise(x, fmt, granularity, weight), granularity.count)


def rise(x: Tensor, fmt: Format, granularity: PerElement, weight: Tensor) -> Tensor:
    """What each element would do in ``fmt``: Fisher value times squared error, by ranges of the least sum of these.

    By min-max ranges outliers would err least of all, and everything else for their sake.
    """
    packed = pack_tensor(x, fmt, granularity.scales, FISHER, weight=weight)
    return weight * (unpack_tensor(packed) - x).square()


def largest(values: Tensor, count: int) -> Tensor:
    """Row-major positions of the ``count`` largest, increasing; of equals the first."""
    return values.flatten().sort(descending=True, stable=True).indices[:count].sort().values
