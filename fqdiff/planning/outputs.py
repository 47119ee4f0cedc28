"""Options that store some output channels of a tensor in a wider format than the others.

With a scale or a codebook for every channel, what a channel's error does hangs on its own format alone: channels are ordered by
what the wider format saves, and the best are taken, as many as any of SHARES says.
Shapes: O output channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from fqdiff.context import Context
from fqdiff.errors import QuantizationError
from fqdiff.planning.candidates import Importance, Option, header_bytes
from fqdiff.planning.knapsack import lower_hull
from fqdiff.quant.container import Description
from fqdiff.quant.elements import largest
from fqdiff.quant.formats import Format, PerChannel, PerGroup, PerOutput, get_format
from fqdiff.quant.outputs import channel_sums, counts_of
from fqdiff.quant.packed import pack_tensor, stored_bytes
from fqdiff.quant.qparams import LEAST_FLOAT16_SCALE

SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
OFFSET = 9_999_999  # digits of a place in the file, where their number matters to nothing but a line's length


def with_outputs(
    every: Mapping[str, Sequence[Option]],
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int],
    importance: Importance,
    weights: Mapping[str, Tensor],
    context: Context,
) -> dict[str, tuple[Option, ...]]:
    """Options of output channels in two formats for every parameter; only those that are worth their bytes.

    ``every``: options in one format, in every range. ``importance``, ``weights``: as
    :func:`fqdiff.planning.candidates.every_option` takes them. A channel's place in the order is by ``weights``, as
    :func:`fqdiff.quant.elements.choose_kept` will choose.
    """
    found = {}
    with context.progress(len(every), "channels", "tensor") as bar:
        for name, options in every.items():
            mixed: list[Option] = []
            if tensors[name].ndim >= 2:
                for span in dict.fromkeys(o.span for o in options):
                    for scales in dict.fromkeys(o.description[2] for o in options):
                        if isinstance(scales, PerChannel | PerGroup):
                            alike = [o for o in options if o.span == span and o.description[2] == scales]
                            casts = [o for o in options if o.description[1].is_cast]
                            mixed += in_pairs(
                                tensors[name], axes[name], importance[name], weights[name], alike, casts, scales, span
                            )
            found[name] = worth_it(name, options, mixed)
            bar.update()
    return found


def in_pairs(
    tensor: Tensor,
    axis: int,
    importance: Tensor,
    weight: Tensor,
    alike: Sequence[Option],
    casts: Sequence[Option],
    scales: PerChannel | PerGroup,
    span: str,
) -> Iterator[Option]:
    """Every pair of a narrow format of ``alike``, which share ``scales`` and the range, and a wider one, or a cast.

    But for those that cannot be packed: small scales that pass beside a larger one in the whole tensor may be all that a part
    has.
    """
    stored = {o.format: o.stored(tensor, weight) for o in (*alike, *casts)}
    each = importance if importance.ndim > 1 else importance.reshape([-1] + [1] * (tensor.ndim - 1)).movedim(0, axis)
    error = {name: (back - tensor).square() for name, back in stored.items()}
    predicted = {name: channel_sums(each * e, axis) for name, e in error.items()}
    ordered = {name: channel_sums(weight * e, axis) for name, e in error.items()}
    sizes = {o.format: o.bytes for o in (*alike, *casts)}
    safe = {name: has_large_scale(back, axis, get_format(name), scales) for name, back in stored.items()}
    shape, channels = tuple(tensor.shape), tensor.shape[axis]
    for low, high in permutations(stored, 2):
        if get_format(low).is_cast or sizes[low] >= sizes[high]:
            continue
        gain = ordered[low] - ordered[high]
        for count in counts_of(SHARES, channels):
            chosen = largest(gain, count)
            value = float(predicted[low].sum() + (predicted[high] - predicted[low])[chosen].sum())
            description: Description = (shape, get_format(low), PerOutput(count, high, scales))
            option = Option(description, span, alike[0].rounding, stored_bytes(*description), value)
            others = torch.ones(channels, dtype=torch.bool).index_fill(0, chosen, False)
            if (safe[low][others].any() and safe[high][chosen].any()) or can_be_packed(option, tensor, weight, chosen):
                yield option


def has_large_scale(back: Tensor, axis: int, fmt: Format, scales: PerChannel | PerGroup) -> Tensor:
    """Whether each output channel of ``back``, stored in ``fmt``, surely has a scale that float16 can hold alone, bool [O].

    No value is more than ``qmax`` steps from 0. Formats without scales are sure, and so are scales in float32.
    """
    if fmt.is_cast or fmt.kind == "codebook" or scales.scale_dtype != torch.float16:
        return torch.ones(back.shape[axis], dtype=torch.bool)
    return back.movedim(axis, 0).flatten(1).abs().amax(dim=1) > fmt.qmax * LEAST_FLOAT16_SCALE


def can_be_packed(option: Option, tensor: Tensor, weight: Tensor, chosen: Tensor) -> bool:
    """Whether ``tensor`` can, with the ``chosen`` output channels in the wider format."""
    _, fmt, granularity = option.description
    try:
        pack_tensor(tensor, fmt, granularity, option.span, option.rounding, weight, chosen)
    except QuantizationError:
        return False
    return True


def worth_it(name: str, options: Sequence[Option], mixed: Sequence[Option]) -> tuple[Option, ...]:
    """Those of ``mixed`` that a linear relaxation would ever take beside ``options``."""
    both = (*options, *mixed)
    values = np.array([o.value for o in both])
    costs = np.array([o.bytes + header_bytes(name, o.description, OFFSET) for o in both], dtype=float)
    return tuple(both[j] for j in sorted(lower_hull(values, costs)) if j >= len(options))
