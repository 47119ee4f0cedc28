"""Plain data from a file, checked: each function returns its argument as what its name says, or raises ValueError."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
TEXT_LIMIT = 10_000
COUNT_LIMIT = 2**63
NUMBER_LIMIT = 1e300
AXES_LIMIT = 8
ELEMENT_LIMIT = 2**40


def text(value: Any, limit: int = TEXT_LIMIT) -> str:
    """A string of at most ``limit`` characters that can be written as UTF-8."""
    if not isinstance(value, str) or len(value) > limit:
        raise _not(value, "text")
    value.encode()  # half a surrogate pair is a ValueError, as it would be when printed
    return value


def printable(value: str) -> str:
    """``value`` as :func:`text` takes it: bytes of a path that are no UTF-8 written out, and cut where it is very long."""
    return value.encode("utf-8", "backslashreplace").decode()[:TEXT_LIMIT]


def count(value: Any) -> int:
    """A whole number from 0 that fits 64 bits."""
    if type(value) is not int or not 0 <= value < COUNT_LIMIT:
        raise _not(value, "a count")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) < NUMBER_LIMIT:  # NaN is not less than anything
        raise _not(value, "a number")
    return float(value)


def items(value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise _not(value, "a list")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """A table."""
    if not isinstance(value, dict):
        raise _not(value, "a table")
    return value


def tensor_shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor that could exist: few axes, none empty, and a product that does not overflow."""
    shape = tuple(count(n) for n in items(value)[: AXES_LIMIT + 1])
    if len(shape) > AXES_LIMIT or not 0 < math.prod(shape) <= ELEMENT_LIMIT:
        raise _not(value, "a shape")
    return shape


def interval(value: Any) -> tuple[float, float]:
    """Two numbers."""
    low, high = items(value)
    return number(low), number(high)


def record(kind: type[T], value: Any) -> T:
    """A dataclass from a table that has its fields and no others, each checked by its type; tuples of dataclasses too."""
    given = mapping(value)
    wrong = {f.name for f in fields(kind)} ^ given.keys()  # type: ignore[arg-type]
    if wrong:
        raise ValueError(f"fields missing or unknown: {', '.join(sorted(wrong)[:3])}")
    return kind(**{name: _reader(hint)(given[name]) for name, hint in get_type_hints(kind).items()})


def _reader(hint: Any) -> Callable[[Any], Any]:
    if hint in READERS:
        return READERS[hint]
    if get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
        kind: type[Any] = get_args(hint)[0]
        return lambda value: tuple(record(kind, element) for element in items(value))
    return READERS[hint]


def _or_none(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else read(value)


def _not(value: Any, what: str) -> ValueError:
    return ValueError(f"{str(value)[:50]!r} is not {what}")


READERS: Mapping[Any, Callable[[Any], Any]] = {
    str: text,
    int: count,
    float: number,
    str | None: _or_none(text),
    int | None: _or_none(count),
    float | None: _or_none(number),
    tuple[int, ...]: tensor_shape,
    tuple[float, float] | None: _or_none(interval),
}
