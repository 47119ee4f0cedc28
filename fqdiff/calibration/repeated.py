"""One step that is done over and over on inputs of the same shapes: on CUDA it is captured once as a graph, and replayed.

A step of training launches hundreds or thousands of kernels of some microseconds each. Launched one by one from Python they take
far longer than what they compute; as a graph they follow one another at once. On other devices a step is just done.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EAGER = 3  # steps done as they come before the capture: libraries choose kernels and allocate what they keep


def set_rate(group: dict[str, Any], rate: float) -> None:
    """The learning rate of an optimizer's parameter group: a tensor in place, where a graph reads it, else a number."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class Repeated:
    """``step(*inputs)`` returns a loss, and changes parameters and the state of its optimizer in place.

    Every call is one step. On CUDA inputs are copied to where the graph reads them, numbers as tensors of one element; so
    ``step`` must not read values back, and its optimizer has to be capturable. The loss that is returned is
    overwritten by the next call.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device) -> None:
        self.step = step
        self.device = device
        self.done = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.empty(0)

    def __call__(self, *inputs: Tensor | float) -> Tensor:
        if self.device.type != "cuda":
            return self.step(*inputs)
        given = [x if isinstance(x, Tensor) else torch.tensor(x) for x in inputs]
        if not self.done:
            self.inputs = tuple(x.to(self.device, copy=True) for x in given)
        for own, new in zip(self.inputs, given, strict=True):
            own.copy_(new)
        self.done += 1
        if self.done <= EAGER:
            return self._beside()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.step(*self.inputs).detach()
        self.graph.replay()
        return self.loss

    def _beside(self) -> Tensor:
        """One step as it comes, on a stream of its own, as captures are."""
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = self.step(*self.inputs).detach()
        current.wait_stream(stream)
        return loss
