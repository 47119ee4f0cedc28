"""How messages call what a sweep's file says, and where in it what they refuse comes from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fqdiff.errors import ConfigError

MOST_CELLS = 10_000


def in_words(settings: Mapping[str, object]) -> str:
    """``ratio 0.1, low int8``; settings of a table in ``settings`` after its name: ``activations.range mse``."""
    from fqdiff.sweep.settings import flat, plain

    return ", ".join(f"{name} {plain(value)}" for name, value in flat(settings).items())


@contextmanager
def blaming(where: str) -> Iterator[None]:
    """What is refused meanwhile, with ``where`` in the file it comes from before it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.hint) from None
