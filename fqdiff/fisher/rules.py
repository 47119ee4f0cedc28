"""Gradient of every single sample for a layer's parameters, from the layer's input and the gradient of its output.

A batched backward pass computes the same products and sums them over the batch at once; here the batch axis stays. What comes
out comes in pieces of a few samples that fit a processor's cache: squares are summed before the next piece is made.
Shapes: B samples, b samples of one piece, C in-channels, O out-channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

PIECE_BYTES = 2**20
WINDOW_BYTES = 2**20
# [b, *parameter shape], in the order of the samples; all together have B samples. Each may be written over by the next: fresh
# memory would cost more than what is computed in it.
Pieces = Iterator[Tensor]
Gradients = Mapping[str, Pieces]  # keyed by the parameter's name inside its module
Rule = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Gradients]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def per_sample(
    module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor, options: Mapping[str, object]
) -> Gradients:
    """Gradients of ``module``'s own parameters for an output gradient whose first axis is B.

    ``inputs`` are what its forward got by position, ``options`` by name.
    """
    dtype = next(module.parameters()).dtype  # under autocast, inputs and gradients come in several
    inputs = tuple(v.to(dtype) if v.is_floating_point() else v for v in inputs)
    rule = next((rule for kinds, rule in RULES if isinstance(module, kinds)), partial(by_vmap, options=options))
    gradients = rule(module, inputs, gradient.to(dtype))
    own = {name for name, _ in module.named_parameters()}
    return {name: pieces for name, pieces in gradients.items() if name in own}  # a layer may have no bias


def slices(batch: int, elements: int, most: int = 2**31) -> list[slice]:
    """``batch`` samples cut, ``most`` together, so that gradients of so many ``elements`` stay below PIECE_BYTES; or single."""
    step = max(1, min(most, PIECE_BYTES // (4 * max(1, elements))))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def linear(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Gradients:
    """W x + b at any number of positions: x [B, ..., C], gradient [B, ..., O]."""
    assert isinstance(module, nn.Linear)
    x, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (inputs[0], gradient))
    cuts = slices(len(g), module.weight.numel())
    return {"weight": (torch.bmm(g[cut].transpose(1, 2), x[cut]) for cut in cuts), "bias": iter([g.sum(dim=1)])}


def convolution(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Gradients:
    """Any convolution, transposed or not: x [B, C, ...], gradient [B, O, ...].

    A few samples at a time: their windows as the rows of matrices, multiplied while they are in the cache. Where those of one
    sample do not fit, or with groups, torch's own weight gradient, which takes half again as long on small layers.
    """
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    transposed = isinstance(module, TRANSPOSED)
    x = inputs[0]
    # A transposed convolution is the same sum with input and output in each other's place; so is its weight's shape.
    small, large = (x, gradient) if transposed else (gradient, x)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    large = F.pad(large, _sides(module), mode=mode)
    rows = small[0, 0].numel()
    if module.groups == 1 and 4 * rows * large.shape[1] * math.prod(module.kernel_size) <= WINDOW_BYTES:
        weight = by_windows(small, large, module.kernel_size, module.stride, module.dilation)
    else:
        weight = by_torch(small, large, module)
    return {"weight": weight, "bias": iter([gradient.flatten(2).sum(dim=2)])}


def by_windows(
    small: Tensor, large: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Pieces:
    """sum over p of small[b, i, p] * large[b, j, stride p + dilation k] as pieces [b, I, J, *kernel].

    ``small`` [B, I, *positions], ``large`` [B, J, ...], padded.
    """
    positions = small.shape[2:]
    left = small.movedim(1, -1).flatten(1, -2).transpose(1, 2)
    channels_last = large.movedim(1, -1).contiguous()
    steps = channels_last.stride()[1:-1]
    windows = channels_last.as_strided(
        (len(small), *positions, *kernel, large.shape[1]),
        (
            channels_last.stride(0),
            *(s * step for s, step in zip(stride, steps, strict=True)),
            *(d * step for d, step in zip(dilation, steps, strict=True)),
            1,
        ),
    )
    inputs, outputs = windows.shape[-1] * math.prod(kernel), left.shape[1]
    cuts = slices(len(left), outputs * inputs, WINDOW_BYTES // (4 * windows[0].numel()))
    most = cuts[0].stop
    rows, product = windows.new_empty(most, left.shape[2], inputs), left.new_empty(most, outputs, inputs)
    for cut in cuts:
        count = cut.stop - cut.start
        rows[:count].view_as(windows[cut]).copy_(windows[cut])
        torch.bmm(left[cut], rows[:count], out=product[:count])
        yield product[:count].view(count, outputs, *kernel, -1).movedim(-1, 2)


def by_torch(small: Tensor, large: Tensor, module: nn.Module) -> Pieces:
    """The same sums by torch's weight gradient, with groups if need be."""
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    layout = torch.channels_last if small.ndim == 4 else torch.contiguous_format
    small, large = small.contiguous(memory_format=layout), large.contiguous(memory_format=layout)
    none = [0] * len(module.kernel_size)
    for a, b in zip(small.split(1), large.split(1), strict=True):
        weight = module.weight
        yield torch.ops.aten.convolution_backward(
            a, b, weight, None, module.stride, none, module.dilation, False, none, module.groups, (False, True, False)
        )[1][None]


def _sides(module: nn.Module) -> list[int]:
    """What to add before and after each spatial axis, last axis first, as F.pad takes it."""
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    one_side = [0] * len(module.kernel_size) if module.padding == "valid" else [int(p) for p in module.padding]
    return [side for p in reversed(one_side) for side in (p, p)]


def group_norm(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Gradients:
    """Per-channel scale and shift after normalising each group: [B, C, ...]."""
    assert isinstance(module, nn.GroupNorm)
    normal = F.group_norm(inputs[0], module.num_groups, eps=module.eps)
    shape = (*gradient.shape[:2], -1)  # [B, C] has no further axes
    return {
        "weight": iter([(gradient * normal).reshape(shape).sum(dim=2)]),
        "bias": iter([gradient.reshape(shape).sum(dim=2)]),
    }


def layer_norm(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Gradients:
    """Elementwise scale and shift after normalising the last axes: [B, ..., *normalized_shape]."""
    assert isinstance(module, nn.LayerNorm)
    normal = F.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
    shape = (len(gradient), -1, *module.normalized_shape)
    return {
        "weight": iter([(gradient * normal).reshape(shape).sum(dim=1)]),
        "bias": iter([gradient.reshape(shape).sum(dim=1)]),
    }


def embedding(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Gradients:
    """Row i collects the gradients of the places that looked it up: indices [B, ...], gradient [B, ..., D]."""
    assert isinstance(module, nn.Embedding)
    shape = module.weight.shape
    index = inputs[0].reshape(len(gradient), -1, 1).expand(-1, -1, shape[1])
    g = gradient.reshape(index.shape)
    if module.padding_idx is not None:
        g = g * (index != module.padding_idx)
    cuts = slices(len(g), shape.numel())
    return {"weight": (g.new_zeros(len(g[cut]), *shape).scatter_add_(1, index[cut], g[cut]) for cut in cuts)}


def by_vmap(
    module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor, options: Mapping[str, object]
) -> Gradients:
    """Any other module: its forward is repeated for each sample under vmap, and differentiated. Correct, not quick."""
    whole = isinstance(module, nn.MultiheadAttention)  # it reads its children's parameters itself
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=whole)}

    def one(single: tuple[Tensor, ...], g: Tensor) -> dict[str, Tensor]:
        def forward(weights: dict[str, Tensor]) -> Tensor:
            output = functional_call(module, weights, tuple(v[None] for v in single), dict(options))
            first: Tensor = output[0] if isinstance(output, tuple) else output
            return first

        pull = vjp(forward, parameters)[1]
        found: dict[str, Tensor] = pull(g[None])[0]
        return found

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel
        result: Mapping[str, Tensor] = vmap(one)(inputs, gradient)
    return {name: iter([g]) for name, g in result.items()}


RULES: tuple[tuple[tuple[type[nn.Module], ...], Rule], ...] = (
    ((nn.Linear,), linear),
    ((*CONVOLUTIONS, *TRANSPOSED), convolution),
    ((nn.GroupNorm,), group_norm),
    ((nn.LayerNorm,), layer_norm),
    ((nn.Embedding,), embedding),
)
