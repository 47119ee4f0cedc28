"""Packed tensors that can be trained: what they stand for, to the bit, with gradients for codes, scales and codebooks.

Codes have no gradient. Behind each stands a float32 weight that it is the nearest code of, and rounding passes the gradient on
to that weight as if it did nothing (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432); scales get the
gradient of learned step sizes (Esser et al. 2020, arXiv:1902.08153, eq. 3), which is what that leads to. Casts are rounded so
too. Zero points stay: moving one by a step moves all weights of its group by a step.

Shapes: G groups of weights that share a scale or a codebook, n weights in each, K entries of a codebook.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fqdiff.quant.codebooks import looked_up, nearest_entry
from fqdiff.quant.formats import PerOutput, scales_of
from fqdiff.quant.outputs import channel_order, in_order, separated
from fqdiff.quant.packed import PackedTensor, join_outputs, separate_outputs, unpack_tensor
from fqdiff.quant.packing import pack, unpack
from fqdiff.quant.qparams import QParams, fixed_zero_point, from_rows, group_rows, quantize
from fqdiff.quant.straight_through import straight_through


class _Looked(torch.autograd.Function):
    """Entries of ``codebook`` [G, K] that ``weight`` [G, n] is nearest to; the gradient goes to both."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, codebook: Tensor) -> Tensor:
        codes = nearest_entry(weight, codebook)
        ctx.save_for_backward(codes)
        ctx.entries = codebook.shape[1]
        return looked_up(codes, codebook)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (codes,) = ctx.saved_tensors
        (gradient,) = gradients
        by_entry = gradient.new_zeros(len(gradient), ctx.entries).scatter_add_(1, codes, gradient)
        return gradient, by_entry


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` float32 as ``dtype`` stores it, in float32, with the gradient of ``x``."""
    if dtype == torch.float32:
        return x
    return straight_through(x, x.detach().to(dtype).float())


class TrainableTensor(nn.Module):
    """One packed tensor without kept elements. Calling it gives its values, float32; :meth:`packed` the tensor with just these.

    ``weight``: what is rounded, shaped as the values are, for a cast, or [G, n]. ``grid``: scale [G] or codebook [G, K]; None for
    casts and float8, whose scale stays. ``step``: how far apart neighbouring values are, on average.
    """

    def __init__(self, tensor: Tensor, packed: PackedTensor) -> None:
        super().__init__()
        fmt, granularity = packed.format, scales_of(packed.granularity)
        self.start = packed
        self.granularity = granularity
        self.grid: nn.Parameter | None = None
        if fmt.is_cast:
            self.weight = nn.Parameter(tensor.clone())
            self.step = float(tensor.abs().mean()) / 8
            return
        self.weight = nn.Parameter(group_rows(tensor, granularity).clone())
        if fmt.kind == "codebook":
            codebook = packed.parts["codebook"].float()
            self.grid = nn.Parameter(codebook.clone())
            self.step = float(codebook.diff(dim=1).mean())
            return
        scale = packed.parts["scale"].float()
        if fmt.has_zero_points:
            zero_point = unpack(packed.parts["zero_point"], fmt.bits, (len(scale),))
        else:
            zero_point = fixed_zero_point(fmt, len(scale), scale.device)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        if fmt.kind == "float":
            self.step = float(tensor.abs().mean()) / 8
        else:
            self.grid = nn.Parameter(scale.clone())
            self.step = float(scale.abs().mean())

    def stored_grid(self) -> Tensor:
        """Scales or codebook as they are stored: rounded to their dtype, scales neither 0 nor turned, entries in order."""
        dtype = self.granularity.scale_dtype
        if self.grid is None:
            return self.get_buffer("scale")
        if self.start.format.kind == "codebook":
            return as_stored(self.grid.sort(dim=1).values, dtype)
        first = self.get_buffer("scale")
        bounded = torch.maximum(self.grid * first.sign(), first.abs() / 8) * first.sign()
        return as_stored(bounded, dtype)

    def forward(self) -> Tensor:
        fmt = self.start.format
        if fmt.is_cast:
            return as_stored(self.weight, fmt.dtype)
        grid = self.stored_grid()
        if fmt.kind == "codebook":
            rows: Tensor = _Looked.apply(self.weight, grid)  # type: ignore[no-untyped-call]
        else:
            scale, zero_point = grid[:, None], self.get_buffer("zero_point")[:, None].float()
            if fmt.kind == "float":
                inside = (self.weight / scale).clamp(-fmt.qmax, fmt.qmax)
                codes = inside.detach().to(fmt.dtype).float()
            else:
                inside = torch.minimum(torch.maximum(self.weight / scale, -zero_point), fmt.qmax - zero_point)
                codes = inside.detach().round()
            rows = straight_through(inside, codes) * scale
        return from_rows(rows, self.start.shape, self.granularity)

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """The tensor in its format, byte for byte as large as before."""
        fmt, granularity, shape = self.start.format, self.granularity, self.start.shape
        if fmt.is_cast:
            return PackedTensor(fmt, granularity, shape, {"data": self.weight.detach().to(fmt.dtype, copy=True)})
        grid, parts = self.stored_grid().detach(), dict(self.start.parts)
        values = from_rows(self.weight.detach(), shape, granularity)
        if fmt.kind == "codebook":
            rows = nearest_entry(self.weight.detach(), grid).to(torch.uint8)
            parts["codes"] = pack(from_rows(rows, shape, granularity), fmt.bits)
            parts["codebook"] = grid.to(parts["codebook"].dtype)
        else:
            codes = quantize(values, QParams(grid, self.get_buffer("zero_point")), fmt, granularity)
            parts["codes"] = pack(codes, fmt.bits) if fmt.is_packed else codes
            parts["scale"] = grid.to(parts["scale"].dtype)
        return PackedTensor(fmt, granularity, shape, parts)


class TrainableOutputs(nn.Module):
    """A packed tensor with output channels in two formats, each part of it as a :class:`TrainableTensor`."""

    def __init__(self, tensor: Tensor, packed: PackedTensor) -> None:
        super().__init__()
        assert isinstance(packed.granularity, PerOutput)
        self.start, self.axis = packed, packed.granularity.scales.axis
        low, high, positions = separate_outputs(packed)
        # The plan's, which training leaves alone.
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("order", channel_order(positions, tensor.shape[self.axis]), persistent=False)
        parts = separated(tensor, self.axis, positions)
        self.low, self.high = (trainable_rows(x, part) for x, part in zip(parts, (low, high), strict=True))

    def forward(self) -> Tensor:
        return in_order(self.low(), self.high(), self.axis, self.get_buffer("order"))

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """The tensor in its formats, byte for byte as large as before."""
        return join_outputs(self.low.packed(), self.high.packed(), self.get_buffer("positions"), self.start)


Trainable = TrainableTensor | TrainableOutputs


def rows_of(module: Trainable) -> tuple[TrainableTensor, ...]:
    """What ``module`` is made of, each in one format."""
    return (module,) if isinstance(module, TrainableTensor) else (module.low, module.high)


def trainable(tensor: Tensor, packed: PackedTensor) -> Trainable:
    """``packed`` ready to be trained, starting from ``tensor``, the float32 weights that it was made of."""
    if isinstance(packed.granularity, PerOutput):
        return TrainableOutputs(tensor, packed)
    return trainable_rows(tensor, packed)


def trainable_rows(tensor: Tensor, packed: PackedTensor) -> TrainableTensor:
    """:func:`trainable` of a tensor in one format.

    Where rounding was not to nearest (SQuant), or ranges cut weights off, its codes are not the nearest ones: then it starts
    from the values that are stored, so that training begins at the model as it is.
    """
    start = TrainableTensor(tensor, packed)
    values = unpack_tensor(packed)
    return start if torch.equal(start().detach(), values) else TrainableTensor(values, packed)
