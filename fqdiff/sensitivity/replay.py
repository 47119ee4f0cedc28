"""The same input through a network again and again, each time with one weight tensor changed."""

from types import TracebackType
from typing import Any

from torch import nn


class Replay:
    """Inside, layers that come before any changed parameter give what they gave in the first pass, and compute nothing.

    The result is the same to the bit: their inputs and weights are. One input; a layer is any module with parameters and
    without parts. Half the work on average, since the average tensor sits in the middle.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.layers = [m for m in network.modules() if next(m.parameters(), None) is not None and not [*m.children()]]
        self.outputs: list[Any] = []
        self.first: dict[int, int] = {}  # of each parameter: the number of the first call that may use it
        self.skipped = 0
        self.calls = 0

    def __enter__(self) -> "Replay":
        for layer in self.layers:
            layer.forward = self._replaying(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            del layer.forward

    def changing(self, parameter: str) -> None:
        """The next pass has only ``parameter`` changed. Of one that no layer owns, nothing can be skipped."""
        self.calls = 0
        self.skipped = self.first.get(id(dict(self.network.named_parameters())[parameter]), 0)

    def _replaying(self, layer: nn.Module) -> Any:
        forward = layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            number = self.calls
            self.calls += 1
            if number < self.skipped:
                return self.outputs[number]
            found = forward(*args, **kwargs)
            if number == len(self.outputs):
                self.outputs.append(found)
                for parameter in layer.parameters():
                    self.first.setdefault(id(parameter), number)
            return found

        return call
