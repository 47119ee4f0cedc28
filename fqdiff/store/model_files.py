"""The files of models: checkpoints, quantized ones, and the inputs that were recorded of one. Loaded, all are checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqdiff.models.registry import build, skip_boundaries
from fqdiff.quant.activations import SCALE, ZERO_POINT, Activation, check_activations, described_activations
from fqdiff.quant.container import SCHEMA, metadata, part_name
from fqdiff.quant.formats import Mixed, PerTensor, get_format, parse_granularity
from fqdiff.quant.noise_correction import check_noise_correction, noise_correction_of
from fqdiff.quant.packed import PackedTensor, check_layout, check_values, part_layout
from fqdiff.quant.phases import phase_count
from fqdiff.quant.timestep_bias import SUFFIX as TIMESTEP_BIAS
from fqdiff.quant.timestep_bias import check_tables
from fqdiff.store.fields import count, items, mapping, tensor_shape, text
from fqdiff.store.files import MAKE_AGAIN, read_tensors, readable, write_tensors
from fqdiff.store.payload import check_parameters, expect, expect_names, take
from fqdiff.values import (
    CalibrationSet,
    Checkpoint,
    ModelSpec,
    QuantizedCheckpoint,
    model_description,
    predict_noise,
)
from fqdiff.viz.grids import image_grid, png
from fqdiff.viz.plots import loss_curve


def _model_spec(meta: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The model that a file's metadata describes, which can be built, and whose parameters have ``shapes``."""
    if meta["schema"] != SCHEMA:
        raise ValueError(f"schema {str(meta['schema'])[:20]}; this fqdiff reads schema {SCHEMA}")
    model = mapping(meta["model"])
    spec = ModelSpec(mapping(model["architecture"]), text(model["schedule"]), text(model["prediction"]))
    network = build(spec.architecture, "meta")
    check_parameters(network, shapes)
    # Used once, so that a setting that is missing or unknown shows here.
    _ = spec.image_shape, spec.noise_schedule(), predict_noise(spec, network)
    return spec


def save_checkpoint(value: Checkpoint, directory: Path) -> None:
    """``model.safetensors``, with pictures of a few samples and of the loss."""
    meta = metadata(model_description(value.spec), {})
    write_tensors(directory / "model.safetensors", value.tensors, meta)
    history = {"preview": value.preview}
    if value.loss is not None:
        history["loss"] = value.loss
        (directory / "loss.png").write_bytes(loss_curve(value.loss, "training loss"))
    write_tensors(directory / "history.safetensors", history, {})
    (directory / "samples.png").write_bytes(png(image_grid(value.preview, 8)))


def load_checkpoint(directory: Path) -> Checkpoint:
    """Finite weights in float32 that fit the architecture beside them."""
    path = directory / "model.safetensors"
    tensors, meta = read_tensors(path)
    with readable(path, "a checkpoint"):
        spec = _model_spec(meta, {name: tuple(t.shape) for name, t in tensors.items()})
    for name in tensors:
        weights = take(tensors, path, name, torch.float32, tensors[name].ndim)
        expect(bool(torch.isfinite(weights).all()), path, f"'{name}' holds NaN or infinity")
    path = directory / "history.safetensors"
    history, _ = read_tensors(path)
    expect_names(history, path, "loss", "preview")
    preview = take(history, path, "preview", torch.uint8, 4)
    expect(preview.shape[1:] == spec.image_shape, path, f"previews of shape {tuple(preview.shape)}")
    loss = take(history, path, "loss", torch.float32, 1) if "loss" in history else None
    return Checkpoint(spec, tensors, loss, preview)


# --- inputs -----------------------------------------------------------------------------------------------------------


def save_calibration(value: CalibrationSet, directory: Path) -> None:
    """``calibration.safetensors``."""
    facts = {"schema": 1, "model": value.model, "num_train_timesteps": value.num_train_timesteps}
    tensors = {"x_t": value.x_t, "t": value.t}
    write_tensors(directory / "calibration.safetensors", tensors, {"fqdiff": json.dumps(facts, sort_keys=True)})


def load_calibration(directory: Path) -> CalibrationSet:
    """Recorded inputs of one model."""
    path = directory / "calibration.safetensors"
    tensors, facts = read_tensors(path)
    with readable(path, "a calibration set"):
        if facts["schema"] != 1:
            raise ValueError(f"schema {str(facts['schema'])[:20]}; this fqdiff reads schema 1")
        model, total = text(facts["model"]), count(facts["num_train_timesteps"])
    expect_names(tensors, path, "x_t", "t")
    half = "x_t" in tensors and tensors["x_t"].dtype == torch.float16
    x_t = take(tensors, path, "x_t", torch.float16 if half else torch.float32, 4)
    t = take(tensors, path, "t", torch.int64, 1)
    expect(len(t) == len(x_t), path, f"{len(x_t)} inputs with {len(t)} timesteps")
    expect(0 <= int(t.min()) <= int(t.max()) < total, path, f"timesteps beyond the model's {total}")
    expect(bool(torch.isfinite(x_t).all()), path, "inputs that are no numbers")
    return CalibrationSet(x_t, t, model, total)


# --- quantized --------------------------------------------------------------------------------------------------------


def save_quantized(value: QuantizedCheckpoint, directory: Path) -> None:
    """``model.safetensors``."""
    write_model(value, directory / "model.safetensors")


def load_quantized(directory: Path) -> QuantizedCheckpoint:
    """A model as it is packed."""
    return read_model(directory / "model.safetensors")


def write_model(value: QuantizedCheckpoint, path: Path) -> None:
    """The model file that :func:`read_model` reads; equal values give equal bytes."""
    tensors = {part_name(name, part): t for name, p in value.packed.items() for part, t in p.parts.items()}
    tensors |= {layer + TIMESTEP_BIAS: table for layer, table in value.timestep_bias.items()}
    tensors |= {site + suffix: t for site, a in value.activations.items() for suffix, t in a.tensors.items()}
    tensors |= value.noise_correction.tensors if value.noise_correction is not None else {}
    write_tensors(path, tensors, quantized_metadata(value))


def quantized_metadata(value: QuantizedCheckpoint) -> dict[str, str]:
    """What the header of ``value``'s file says beside its tensors."""
    return metadata(model_description(value.spec), value.described, described_activations(value.activations))


def read_model(path: Path, hint: str = MAKE_AGAIN) -> QuantizedCheckpoint:
    """The model in a file of casts and scaled tensors, everything in it checked. Raises ArtifactCorrupt."""
    tensors, meta = read_tensors(path, hint)
    with readable(path, "a model", hint):
        packed = {name: _packed_tensor(name, facts, tensors) for name, facts in mapping(meta["quantized"]).items()}
        tables = {
            name.removesuffix(TIMESTEP_BIAS): tensors.pop(name) for name in [*tensors] if name.endswith(TIMESTEP_BIAS)
        }
        activations = _activations(items(meta.get("activations", [])), tensors)
        correction = noise_correction_of(tensors)
        for name in correction.tensors if correction is not None else ():
            tensors.pop(name)
        casts = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        for name, tensor in tensors.items():
            if tensor.dtype not in casts or name in packed:
                raise ValueError(f"'{name}' is {tensor.dtype}, and no format says how to read it")
            fmt = get_format(casts[tensor.dtype])
            packed[name] = PackedTensor(fmt, PerTensor(), tuple(tensor.shape), {"data": tensor})
        spec = _model_spec(meta, {name: p.shape for name, p in packed.items()})
        network, total = build(spec.architecture, "meta"), spec.noise_schedule().num_train_timesteps
        phase_count((p.format for p in packed.values()), total)
        check_tables(network, tables, total)
        check_activations(network, activations, total, skip_boundaries(network))
        if correction is not None:
            check_noise_correction(network, correction, total)
        return QuantizedCheckpoint(spec, packed, tables, activations, correction)


def _activations(described: list[Any], tensors: dict[str, Tensor]) -> dict[str, Activation]:
    """The activations that ``described`` lists; their scales are taken out of ``tensors``."""
    found: dict[str, Activation] = {}
    for each in described:
        given = mapping(each)
        if given.keys() != {"format", "granularity", "dynamic", "sites"} or type(given["dynamic"]) is not bool:
            raise ValueError("activations are described by format, granularity, dynamic and sites")
        for site in map(text, items(given["sites"])):
            if site in found:
                raise ValueError(f"the activation of '{site[:100]}' is described twice")
            scale = None if given["dynamic"] else tensors.pop(site + SCALE)
            zero_point = None if given["dynamic"] else tensors.pop(site + ZERO_POINT, None)
            found[site] = Activation(text(given["format"]), text(given["granularity"]), scale, zero_point)
    return found


def _packed_tensor(name: str, facts: Any, tensors: dict[str, Tensor]) -> PackedTensor:
    """The scaled tensor that ``facts`` describe; its parts are taken out of ``tensors``."""
    given = mapping(facts)
    fmt, granularity = get_format(text(given["format"])), parse_granularity(text(given["granularity"]))
    shape = tensor_shape(given["shape"])
    mere_cast = fmt.is_cast and not isinstance(granularity, Mixed)
    if mere_cast or given.keys() != {"format", "granularity", "shape"}:
        raise ValueError(f"'{name}' is described as {fmt.name} by {len(given)} fields")
    parts = {part: tensors.pop(part_name(name, part)) for part in part_layout(shape, fmt, granularity)}
    packed = PackedTensor(fmt, granularity, shape, parts)
    check_layout(packed)
    check_values(packed)
    return packed
