"""A weight tensor as it is stored: which plain tensors it is made of, how many bytes they take, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError
from fqdiff.quant.codebooks import fit_codebook, looked_up, nearest_entry
from fqdiff.quant.formats import (
    Format,
    Grain,
    Granularity,
    PerElement,
    PerOutput,
    PerSplit,
    PerTensor,
    get_format,
    scales_of,
)
from fqdiff.quant.nested import bytes_read, interval_middles, plane_layout, split_codes
from fqdiff.quant.outputs import (
    INDEX,
    Layout,
    joined_layout,
    joined_parts,
    row_shapes,
    separated,
    separated_parts,
    together,
    with_rows_first,
)
from fqdiff.quant.packing import TRITS, pack, packed_bytes, unpack
from fqdiff.quant.positions import check_positions, index_bytes, pack_positions, unpack_positions
from fqdiff.quant.qparams import (
    QParams,
    check_finite,
    dequantize,
    fixed_zero_point,
    from_rows,
    group_count,
    group_rows,
)
from fqdiff.quant.ranges import FISHER, MIN_MAX, fitted_qparams
from fqdiff.quant.rounding import NEAREST, rounded


@dataclass(frozen=True)
class PackedTensor:
    """``parts``: ``data`` for a cast; else ``codes``, with ``codebook``, or with ``scale`` and, where groups have their own,
    ``zero_point``. Where single elements are kept, also ``kept``, their values, and ``kept_index``, which they are. Of output
    channels in two formats the parts of both, :mod:`fqdiff.quant.outputs`, and ``kept_index``, which are in the other format.
    """

    format: Format
    granularity: Grain
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]


def part_layout(
    shape: tuple[int, ...], fmt: Format, granularity: Grain
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every part that a tensor of ``shape`` is stored as."""
    if isinstance(granularity, PerElement):
        numel = torch.Size(shape).numel()
        if granularity.count >= numel:
            raise QuantizationError(f"{granularity.count} elements kept of {numel}", "keep fewer, or the whole tensor")
        return part_layout(shape, fmt, granularity.scales) | {
            "kept": (get_format(granularity.high).dtype, (granularity.count,)),
            "kept_index": (torch.uint8, (index_bytes(granularity.count, numel),)),
        }
    if isinstance(granularity, PerOutput):
        low, high = output_layouts(shape, fmt, granularity)
        size = index_bytes(granularity.count, shape[granularity.scales.axis])
        return joined_layout(low, high) | {INDEX: (torch.uint8, (size,))}
    if fmt.is_cast:
        return {"data": (fmt.dtype, shape)}
    groups = group_count(shape, granularity)
    stream = (packed_bytes(torch.Size(shape).numel(), fmt.bits),)
    codes = (fmt.dtype, stream if fmt.is_packed else shape)
    if fmt.kind == "codebook":
        return {"codes": codes, "codebook": (granularity.scale_dtype, (groups, 2 ** int(fmt.bits)))}
    planes = plane_layout(shape, fmt) if fmt.phase_bits else {"codes": codes}
    layout = {**planes, "scale": (granularity.scale_dtype, (groups,))}
    if fmt.has_zero_points:
        layout["zero_point"] = (torch.uint8, (packed_bytes(groups, fmt.bits),))
    return layout


def output_layouts(shape: tuple[int, ...], fmt: Format, granularity: PerOutput) -> tuple[Layout, Layout]:
    """Layouts of the output channels in ``fmt`` and of those in the other format, each as a tensor of its own."""
    axis = granularity.scales.axis
    if axis >= len(shape) or granularity.count >= shape[axis]:
        raise QuantizationError(
            f"{granularity.count} output channels of a tensor of shape {shape}", "fewer, or the whole tensor"
        )
    low, high = row_shapes(shape, axis, granularity.count)
    scales = with_rows_first(granularity.scales)
    return part_layout(low, fmt, scales), part_layout(high, get_format(granularity.high), scales)


def stored_bytes(shape: tuple[int, ...], fmt: Format, granularity: Grain) -> int:
    """Payload bytes of a tensor of ``shape``: codes, scales, zero points, codebooks, kept elements and their index."""
    layout = part_layout(shape, fmt, granularity)
    return sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in layout.values())


def read_bytes(shape: tuple[int, ...], fmt: Format, granularity: Grain) -> float:
    """Payload bytes that a use of the tensor reads, averaged over phases: all that are stored, where there are none."""
    layout = part_layout(shape, fmt, granularity)
    return bytes_read({part: dtype.itemsize * torch.Size(size).numel() for part, (dtype, size) in layout.items()}, fmt)


def pack_tensor(
    x: Tensor,
    fmt: Format,
    granularity: Grain,
    span: str = MIN_MAX,
    rounding: str = NEAREST,
    weight: Tensor | None = None,
    kept: Tensor | None = None,
) -> PackedTensor:
    """``x`` in ``fmt``: a cast, or rounded to the grid of :func:`fitted_qparams` or to a codebook, and packed.

    ``weight``, shaped like ``x``, tells how much each error counts; it is read for a ``span`` of "fisher" alone. ``kept``:
    increasing int64 positions, in row-major order, of the elements that a :class:`PerElement` keeps, or the output channels that
    a :class:`PerOutput` stores in its other format; see :func:`fqdiff.quant.elements.choose_kept`. Raises
    QuantizationError where ``x`` is not finite, or a cast or a scale overflows.
    """
    shape = tuple(x.shape)
    if isinstance(granularity, PerElement):
        assert kept is not None
        return _pack_with_kept(x, fmt, granularity, span, rounding, weight, kept)
    if isinstance(granularity, PerOutput):
        assert kept is not None
        scales, axis = with_rows_first(granularity.scales), granularity.scales.axis
        weights = (None, None) if weight is None else separated(weight, axis, kept)
        formats = (fmt, get_format(granularity.high))
        both = [
            pack_tensor(rows, each, scales, span, rounding, own)
            for rows, each, own in zip(separated(x, axis, kept), formats, weights, strict=True)
        ]
        return join_outputs(both[0], both[1], kept, PackedTensor(fmt, granularity, shape, {}))
    if fmt.is_cast:
        check_finite(x)  # so that what is not finite afterwards has overflowed
        data = x.to(fmt.dtype, copy=True)  # never the caller's own memory: the packed model stands alone
        if not torch.isfinite(data).all():
            raise QuantizationError(
                f"values up to {float(x.abs().max()):.3g} in {fmt.name}", "they overflow; use bfloat16"
            )
        return PackedTensor(fmt, PerTensor(), shape, {"data": data.contiguous()})
    if fmt.kind == "codebook":
        return _pack_by_codebook(x, fmt, granularity, weight if span == FISHER else None)
    qparams = fitted_qparams(x, fmt, granularity, span, weight)
    codes = rounded(x, qparams, fmt, granularity, rounding)
    whole = pack(codes, fmt.bits) if fmt.is_packed else codes
    planes = split_codes(codes, fmt) if fmt.phase_bits else {"codes": whole}
    parts = {**planes, "scale": qparams.scale.to(granularity.scale_dtype)}
    if fmt.has_zero_points:
        parts["zero_point"] = pack(qparams.zero_point, fmt.bits)
    return PackedTensor(fmt, granularity, shape, parts)


def join_outputs(low: PackedTensor, high: PackedTensor, positions: Tensor, form: PackedTensor) -> PackedTensor:
    """One tensor like ``form``, with its output channels at ``positions`` as ``high`` stores them, and the others as ``low``."""
    assert isinstance(form.granularity, PerOutput)
    index = pack_positions(positions, form.shape[form.granularity.scales.axis])
    return replace(form, parts=joined_parts(low.parts, high.parts) | {INDEX: index})


def separate_outputs(packed: PackedTensor) -> tuple[PackedTensor, PackedTensor, Tensor]:
    """The inverse of :func:`join_outputs`: both tensors, and the positions."""
    granularity, shape = packed.granularity, packed.shape
    assert isinstance(granularity, PerOutput)
    axis, high = granularity.scales.axis, get_format(granularity.high)
    shapes = row_shapes(shape, axis, granularity.count)
    parts = separated_parts(packed.parts, *output_layouts(shape, packed.format, granularity))
    grains = [PerTensor() if fmt.is_cast else with_rows_first(granularity.scales) for fmt in (packed.format, high)]
    return (
        PackedTensor(packed.format, grains[0], shapes[0], parts[0]),
        PackedTensor(high, grains[1], shapes[1], parts[1]),
        unpack_positions(packed.parts[INDEX], granularity.count, shape[axis]),
    )


def _pack_with_kept(
    x: Tensor,
    fmt: Format,
    granularity: PerElement,
    span: str,
    rounding: str,
    weight: Tensor | None,
    kept: Tensor,
) -> PackedTensor:
    """Kept elements are 0 to the grid of the others: every format holds it, and no range has to reach out for it."""
    check_finite(x)
    high = get_format(granularity.high)
    values = pack_tensor(x.flatten()[kept], high, PerTensor()).parts["data"]
    rest = x.flatten().index_fill(0, kept, 0.0).view(x.shape)
    if fmt.kind == "codebook":  # where 0 is a number like any other: it must not pull an entry
        told = weight if weight is not None and span == FISHER else torch.ones_like(x)
        weight = told.flatten().index_fill(0, kept, 0.0).view(x.shape)
        span = FISHER
    packed = pack_tensor(rest, fmt, granularity.scales, span, rounding, weight)
    parts = {**packed.parts, "kept": values, "kept_index": pack_positions(kept, x.numel())}
    return PackedTensor(fmt, granularity, packed.shape, parts)


def _pack_by_codebook(x: Tensor, fmt: Format, granularity: Granularity, weight: Tensor | None) -> PackedTensor:
    check_finite(x)
    rows = group_rows(x, granularity)
    if weight is None and isinstance(granularity, PerSplit):  # where rows may end in zeros that are no weights
        weight = torch.ones_like(x)
    weights = None if weight is None else group_rows(weight, granularity)
    codebook = fit_codebook(rows, weights, 2 ** int(fmt.bits)).to(granularity.scale_dtype)
    if not torch.isfinite(codebook).all():
        raise QuantizationError(
            f"values up to {float(x.abs().max()):.3g} in a codebook of {granularity.scale_dtype}", "use --scale float32"
        )
    codes = nearest_entry(rows, codebook.float()).to(torch.uint8)  # to the entries as they are stored
    stream = pack(from_rows(codes, tuple(x.shape), granularity), fmt.bits)
    return PackedTensor(fmt, granularity, tuple(x.shape), {"codes": stream, "codebook": codebook})


def check_layout(packed: PackedTensor) -> None:
    """Raise QuantizationError unless the parts have the dtypes and shapes that the format asks for."""
    layout = part_layout(packed.shape, packed.format, packed.granularity)
    got = {name: (t.dtype, tuple(t.shape)) for name, t in packed.parts.items()}
    if got != layout:
        raise QuantizationError(f"stored parts {got} of a {packed.format.name} tensor", f"expected {layout}")


def check_values(packed: PackedTensor) -> None:
    """Raise QuantizationError for parts that no packing makes: for the reader of a file that a stranger may have written."""
    fmt, parts = packed.format, packed.parts
    if isinstance(packed.granularity, PerOutput):
        check_positions(parts[INDEX], packed.granularity.count, packed.shape[packed.granularity.scales.axis])
        for each in separate_outputs(packed)[:2]:
            check_values(each)
        return
    if isinstance(packed.granularity, PerElement):
        check_positions(parts["kept_index"], packed.granularity.count, torch.Size(packed.shape).numel())
        if not torch.isfinite(parts["kept"].float()).all():
            raise QuantizationError("kept elements that are no numbers")
    if fmt.is_cast:
        return
    if fmt.kind == "codebook":
        if not torch.isfinite(parts["codebook"].float()).all():
            raise QuantizationError("a codebook whose entries are no numbers")
        return
    scale = parts["scale"].float()
    turned = fmt.is_integer and fmt.symmetric  # the only scales that may be negative
    if not torch.isfinite(scale).all() or not scale.all() or (not turned and bool((scale < 0).any())):
        raise QuantizationError(f"scales of a {fmt.name} tensor that are 0, negative or no numbers")
    if fmt.kind == "ternary" and int(parts["codes"].max()) >= 3**TRITS:
        raise QuantizationError(f"byte {int(parts['codes'].max())} is not {TRITS} codes of three values")
    if fmt.kind == "float" and not torch.isfinite(parts["codes"].float()).all():
        raise QuantizationError(f"codes of a {fmt.name} tensor that are no numbers")


def unpack_tensor(packed: PackedTensor, phase: int | None = None) -> Tensor:
    """The float32 values that ``packed`` stands for; the parts are checked against the layout first.

    With a ``phase``, those that it stands for in this phase of the timesteps; else with all bits.
    """
    check_layout(packed)
    if isinstance(packed.granularity, PerOutput):
        low, high, positions = separate_outputs(packed)
        return together(unpack_tensor(low), unpack_tensor(high), packed.granularity.scales.axis, positions)
    fmt, parts, granularity = packed.format, packed.parts, scales_of(packed.granularity)
    if isinstance(packed.granularity, PerElement):
        own = {name: part for name, part in parts.items() if name in part_layout(packed.shape, fmt, granularity)}
        values = unpack_tensor(PackedTensor(fmt, granularity, packed.shape, own), phase)
        values = values.clone() if fmt.is_cast else values  # a cast to float32 is the stored part itself
        kept = unpack_positions(parts["kept_index"], packed.granularity.count, values.numel())
        values.view(-1)[kept] = parts["kept"].float()
        return values
    if fmt.is_cast:
        return parts["data"].float()
    if fmt.kind == "codebook":
        codes = group_rows(unpack(parts["codes"], fmt.bits, packed.shape), granularity)
        return from_rows(looked_up(codes, parts["codebook"].float()), packed.shape, granularity)
    scale = parts["scale"].float()
    if fmt.has_zero_points:
        zero_point = unpack(parts["zero_point"], fmt.bits, (len(scale),))
    else:
        zero_point = fixed_zero_point(fmt, len(scale), scale.device)
    if fmt.phase_bits:
        bits = int(fmt.bits) if phase is None else fmt.phase_bits[phase]
        codes = interval_middles(parts, fmt, bits, packed.shape)
    else:
        codes = unpack(parts["codes"], fmt.bits, packed.shape) if fmt.is_packed else parts["codes"]
    return dequantize(codes, QParams(scale, zero_point), granularity)
