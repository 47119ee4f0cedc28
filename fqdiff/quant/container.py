"""The file of a quantized model: which tensors it holds, under which names, and its exact size before it is written.

Layout of a safetensors file: 8 bytes of header length, the JSON header padded with spaces to a multiple of 8, the tensors.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fqdiff.quant.formats import Format, Grain, Mixed
from fqdiff.quant.outputs import HIGH
from fqdiff.quant.packed import part_layout

SCHEMA = 1
METADATA_KEY = "fqdiff"  # one key only: safetensors writes several in an order that changes from run to run
Stored = tuple[torch.dtype, tuple[int, ...]]
Description = tuple[tuple[int, ...], Format, Grain]  # shape, format, granularity of one parameter

# safetensors' names of the dtypes used here, in the order in which it lays tensors out (largest alignment first).
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
}


# What the parts of a tensor count as, in the order in which sizes are listed.
PART_KINDS = {
    "codes": "codes",
    "scale": "scales",
    "zero_point": "zero_points",
    "codebook": "codebooks",
    "data": "kept",
    "kept": "kept_elements",
    "kept_index": "index",
}


def part_name(parameter: str, part: str) -> str:
    """Name of a stored tensor: a cast keeps its parameter's name, codes and scales add theirs."""
    return parameter if part == "data" else f"{parameter}.{part}"


def stored_tensors(parameters: Mapping[str, Description]) -> dict[str, Stored]:
    """dtype and shape of every tensor in the file."""
    return {
        part_name(name, part): stored
        for name, (shape, fmt, granularity) in parameters.items()
        for part, stored in part_layout(shape, fmt, granularity).items()
    }


def bytes_by_kind(parameter: Description) -> dict[str, int]:
    """Payload bytes of one parameter by kind, see PART_KINDS; planes of codes count as codes."""
    sizes: dict[str, int] = {}
    for part, (dtype, shape) in part_layout(*parameter).items():
        kind = PART_KINDS["codes" if part.startswith("plane") else part.removeprefix(HIGH)]
        sizes[kind] = sizes.get(kind, 0) + dtype.itemsize * torch.Size(shape).numel()
    return sizes


def metadata(
    model: Mapping[str, Any], parameters: Mapping[str, Description], activations: Sequence[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """What the header says beside the tensors: the model, and how each tensor that is no mere cast is to be read.

    ``activations``: how they are quantized, as plain data; the header is silent about them where nothing is.
    """
    described = {
        name: {"format": fmt.name, "granularity": str(granularity), "shape": list(shape)}
        for name, (shape, fmt, granularity) in parameters.items()
        if not fmt.is_cast or isinstance(granularity, Mixed)
    }
    content = {"schema": SCHEMA, "model": model, "quantized": described}
    if activations:
        content["activations"] = list(activations)
    return {METADATA_KEY: json.dumps(content, sort_keys=True, separators=(",", ":"))}


def model_bytes(model: Mapping[str, Any], parameters: Mapping[str, Description]) -> int:
    """Size of the file of ``model`` with its ``parameters`` stored as described, header included, to the byte."""
    return file_bytes(stored_tensors(parameters), metadata(model, parameters))


def file_bytes(tensors: Mapping[str, Stored], meta: Mapping[str, str]) -> int:
    """Size of the safetensors file that holds ``tensors`` and ``meta``, header included, to the byte."""
    order = list(DTYPE_NAMES)
    header: dict[str, Any] = {"__metadata__": dict(meta)}
    offset = 0
    for name in sorted(tensors, key=lambda n: (order.index(tensors[n][0]), n)):
        dtype, shape = tensors[name]
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8 + offset
