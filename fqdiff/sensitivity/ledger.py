"""Numbers that fill up one unit of work at a time, saved now and then, so that a killed run goes on where it stopped."""

import time
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from fqdiff.context import Bar, Context, Part, SilentBar
from fqdiff.errors import ConfigError


class Ledger:
    """Named float64 tensors, and how many units of each kind of work have gone into them."""

    def __init__(self, context: Context, stop_requested: Callable[[], bool]) -> None:
        self.context = context
        self.stop_requested = stop_requested
        saved = context.parts.load("state")
        self._saved = dict(saved.tensors) if saved is not None else {}
        self._done = dict(saved.data) if saved is not None else {}
        self._rows: dict[str, Tensor] = {}
        self._last_save = time.monotonic()
        self._bar: Bar = SilentBar()

    def rows(self, name: str, *shape: int) -> Tensor:
        """The tensor called ``name``, to be filled in place: as saved, or zeros. Raises ConfigError for another shape."""
        found = self._rows.get(name, self._saved.get(name))
        if found is not None and (tuple(found.shape) != shape or found.dtype != torch.float64):
            raise ConfigError(
                f"the saved '{name}' of shape {tuple(found.shape)} is of another recipe", "start over with --force"
            )
        self._rows[name] = torch.zeros(shape, dtype=torch.float64) if found is None else found
        return self._rows[name]

    def units(self, label: str, total: int, unit: str, steps: int = 1) -> Generator[int, None, None]:
        """The numbers of those of ``total`` units that are still to do. One counts as done when the next is asked for.

        Of units of several ``steps`` the progress bar counts those: call :meth:`step` after each.

        Raises KeyboardInterrupt, with all that is done saved, where a stop was requested.
        """
        done = self._done.get(label, 0)
        if not isinstance(done, int) or not 0 <= done <= total:
            raise ConfigError(f"the saved part has {done} of {total} {label}", "start over with --force")
        with self.context.progress(total * steps, label, unit) as self._bar:
            self._bar.update(done * steps)
            for number in range(done, total):
                yield number
                self._done[label] = number + 1
                if steps == 1:
                    self.step()
                stopping = self.stop_requested()
                if stopping or time.monotonic() - self._last_save >= self.context.save_interval:
                    self.save()
                if stopping:
                    raise KeyboardInterrupt

    def step(self) -> None:
        """One step of the unit under way is done."""
        self._bar.update()

    def save(self) -> None:
        """Keep everything."""
        tensors = {**self._saved, **self._rows}
        self.context.parts.save("state", Part({k: v.clone() for k, v in tensors.items()}, dict(self._done)))
        self._last_save = time.monotonic()
