"""Precision by timestep: a network whose tensors are read with more bits in some phases of the timesteps than in others.

K phases have equal width: t in [0, T) is in phase floor(t K / T). Shapes: B batch.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fqdiff.errors import QuantizationError
from fqdiff.quant.formats import Format
from fqdiff.quant.modules import PackedParameter
from fqdiff.quant.timestep_bias import interval_of


def phase_count(formats: Iterable[Format], num_train_timesteps: int) -> int:
    """The one number of phases that ``formats`` have, 1 where none has any. Raises QuantizationError for several, or over T."""
    counts = {len(fmt.phase_bits) for fmt in formats if fmt.phase_bits}
    if len(counts) > 1 or any(count > num_train_timesteps for count in counts):
        raise QuantizationError(
            f"tensors with {' and '.join(map(str, sorted(counts)))} phases of {num_train_timesteps} timesteps",
            "one number of phases for all of them",
        )
    return counts.pop() if counts else 1


class PhasedNetwork(nn.Module):
    """Joined to a network's class: ``network(x, t)`` reads its packed parameters as the phase of t [B] says.

    Samples of a batch that are in different phases go through the network phase by phase. Raises QuantizationError for t
    outside of [0, T).
    """

    phases_of_timesteps: tuple[int, int]  # K, T

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases, total = self.phases_of_timesteps
        if len(t) and (int(t.min()) < 0 or int(t.max()) >= total):
            raise QuantizationError(f"timesteps {int(t.min())} to {int(t.max())} of a model that has {total}")
        phase = interval_of(t, phases, total)
        present = phase.unique().tolist()
        if len(present) > 1:
            output = None
            for each in present:
                rows = (phase == each).nonzero().flatten()
                part: Tensor = self(x[rows], t[rows])  # not forward: hooks that look at t are to see these samples
                output = part.new_empty((len(x), *part.shape[1:])) if output is None else output
                output[rows] = part
            assert output is not None
            return output
        for module in self.modules():
            if isinstance(module, PackedParameter):
                module.phase = present[0] if present else None
        result: Tensor = super().forward(x, t)
        return result


@functools.cache
def _phased_class(kind: type[Any]) -> type[Any]:
    """``kind`` as a :class:`PhasedNetwork`; a class, and no hook, so that copies of a network know their own parameters."""
    return type(f"Phased{kind.__name__}", (PhasedNetwork, kind), {})


def use_phases(network: nn.Module, phases: int, num_train_timesteps: int) -> None:
    """From now on ``network``, which holds packed parameters, reads them by the phase of t."""
    network.__class__ = _phased_class(type(network))  # type: ignore[arg-type]  # types are hashable
    network.phases_of_timesteps = phases, num_train_timesteps  # type: ignore[assignment]
