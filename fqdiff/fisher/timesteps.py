"""Fisher diagonal at fixed timesteps: one forward and one backward pass over noised images.

Shapes: G timesteps handled together, S samples of each, B samples of one batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqdiff.fisher.backward import ignore, per_sample_backward
from fqdiff.fisher.draws import Batch
from fqdiff.fisher.moments import Rows, Squares, added, rows, squares
from fqdiff.fisher.rules import Pieces

BATCH = 32  # samples of one backward pass, where memory allows


@dataclass(frozen=True)
class Layout:
    """What the reduction needs to know: the output-channel axis of every parameter and of every layer's output."""

    parameters: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class Task:
    """Some timesteps and their samples: several timesteps in one batch, or one timestep in several batches."""

    timesteps: tuple[int, ...]
    batches: tuple[range, ...]


@dataclass(frozen=True)
class Measured:
    """Of one task: rows of parameters and of layers' outputs; ``weights``: diagonals summed over the task's timesteps."""

    parameters: dict[str, Rows]
    outputs: dict[str, Rows]
    weights: dict[str, Tensor]
    elements: dict[str, int]  # of each layer's output, for one sample


def tasks(timesteps: Sequence[int], samples: int, batch: int, pairs: bool) -> list[Task]:
    """``timesteps`` cut so that a batch has about ``batch`` samples; antithetic pairs stay together."""
    if samples <= batch:
        together = batch // samples
        pieces = [tuple(timesteps[k : k + together]) for k in range(0, len(timesteps), together)]
        return [Task(piece, (range(samples),)) for piece in pieces]
    step = max(2, batch - batch % 2) if pairs else batch
    cuts = tuple(range(n, min(n + step, samples)) for n in range(0, samples, step))
    return [Task((t,), cuts) for t in timesteps]


def measure(
    network: nn.Module,
    task: Task,
    draw: Callable[[Task, range], Batch],
    layout: Layout,
    *,
    true: bool,
    pairs: bool,
    outputs: bool,
    weights: bool,
    autocast: bool,
) -> Measured:
    """The squares of one task, reduced; ``true`` takes the model's own noise for the residual."""
    device = next(network.parameters()).device
    groups = len(task.timesteps)
    measured = Measured({}, {}, {}, {})
    waiting: dict[tuple[str, bool], list[Squares]] = {}

    def collect(name: str, found: Squares, is_output: bool, scale: Tensor) -> None:
        """Reduce ``name`` as soon as all batches of the task have given theirs."""
        parts = waiting.setdefault((name, is_output), [])
        parts.append(found)
        if len(parts) < len(task.batches):
            return
        total = added(waiting.pop((name, is_output)))
        if is_output:
            measured.outputs[name] = rows(total, scale, layout.outputs[name], pairs)
            measured.elements[name] = total.elements[0].numel()
        else:
            measured.parameters[name] = rows(total, scale, layout.parameters[name], pairs)
            if weights:
                count = len(total.samples) // groups
                measured.weights[name] = torch.einsum("g,g...->...", scale.square() / count, total.elements.double())

    for samples in task.batches:
        batch = draw(task, samples)
        # The gradient's factor w, which falls to 1e-9 near t = T, is applied in float64 at the end.
        weight = batch.weight[:: len(samples)]
        scale = weight if true else weight.square()
        x_t, target, drawn = (moved(v, device) for v in (batch.x_t, batch.target, batch.model_noise))
        t = batch.t.to(device)

        def on_parameter(name: str, pieces: Pieces, size: int = len(t), scale: Tensor = scale) -> None:
            collect(name, squares(pieces, groups, size), False, scale)

        def on_output(name: str, gradient: Tensor, size: int = len(t), scale: Tensor = scale) -> None:
            collect(name, squares(iter([gradient]), groups, size), True, scale)

        def forward(x_t: Tensor = x_t, t: Tensor = t) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                output: Tensor = network(x_t, t)
            return output.float()

        def cotangent(output: Tensor, target: Tensor = target, drawn: Tensor = drawn) -> Tensor:
            return drawn if true else output - target

        per_sample_backward(network, forward, cotangent, on_parameter, on_output if outputs else ignore)
    return measured


def moved(images: Tensor, device: torch.device) -> Tensor:
    """``images`` on ``device``, in the memory layout that convolutions are quickest in."""
    return images.to(device, memory_format=torch.channels_last) if images.ndim == 4 else images.to(device)
