"""``fqdiff size``: where the bytes of a model file are."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import STORE_OPTIONS, Session, common
from fqdiff.cli.show import BLOCKS, artifact_data, mebibytes, table

if TYPE_CHECKING:
    from torch import Tensor

    from fqdiff.quant.activations import Activation
    from fqdiff.quant.container import Description
    from fqdiff.quant.noise_correction import NoiseCorrection
    from fqdiff.values import Model

Row = dict[str, str | int | float]
TIMESTEP_BIAS = "timestep_bias"
ACTIVATION_SCALES = "activation_scales"
NOISE_CORRECTION = "noise_correction"
ADDED = (TIMESTEP_BIAS, ACTIVATION_SCALES, NOISE_CORRECTION)
RARE = (*ADDED, "kept_elements", "index")  # kinds that few models have any of


@common(*STORE_OPTIONS)
def size(
    session: Session,
    ref: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint or quantized model: name, id or prefix; or a path, of a file or an artifact's folder.",
            show_default="the latest",
            metavar="REF",
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Tensor by tensor instead of block by block.")] = False,
) -> None:
    """Show where the bytes of a model file are, to the last one."""
    from fqdiff.models.registry import build, parameter_blocks
    from fqdiff.store.loading import FILE, HINT, file_at, is_path
    from fqdiff.store.model_files import read_model

    model: Model
    if ref is not None and is_path(ref):
        file = file_at(Path(ref))
        model, about, title = read_model(file, HINT), {}, str(file)
    else:
        manifest = session.resolve(ref, ("quantized", "checkpoint"))
        model, about = session.runner.load(manifest), artifact_data(session.store, manifest)
        file = session.store.directory(manifest.kind, manifest.id) / FILE
        title = f"{manifest.kind} {manifest.id}"
    blocks = parameter_blocks(build(model.spec.architecture, "meta"))
    by_tensor = tensor_rows(model.described, blocks, getattr(model, "timestep_bias", {}))
    by_tensor += activation_rows(getattr(model, "activations", {}))
    by_tensor += correction_rows(getattr(model, "noise_correction", None))
    file_bytes = file.stat().st_size
    whole = total({"block": "file"}, by_tensor)
    kinds = {kind: int(whole[kind]) for kind in payload_kinds()} | {"header": file_bytes - int(whole["bytes"])}
    data = {
        **about,
        "file": str(file),
        "file_bytes": file_bytes,
        "weights": whole["weights"],
        "bits_per_weight": 8 * file_bytes / int(whole["weights"]),
        "kinds": kinds,
        "blocks": block_rows(by_tensor),
        "tensors": by_tensor,
    }
    rows = by_tensor if tensors else block_rows(by_tensor)
    session.result(data, lambda: size_text(title, rows, whole, file_bytes))


def payload_kinds() -> list[str]:
    """Kinds of stored bytes but for the header."""
    from fqdiff.quant.container import PART_KINDS

    return [*PART_KINDS.values(), *ADDED]


def tensor_rows(
    described: "Mapping[str, Description]", blocks: Mapping[str, str], tables: "Mapping[str, Tensor]"
) -> list[Row]:
    """Every parameter, how it is stored, and its payload bytes by kind, in the order of the model.

    A layer's table of biases by timestep counts with its bias.
    """
    from fqdiff.quant.container import bytes_by_kind

    rows: list[Row] = []
    for name in blocks:
        shape, fmt, granularity = described[name]
        kinds = bytes_by_kind(described[name])
        if name.removesuffix(".bias") in tables:
            kinds[TIMESTEP_BIAS] = tables[name.removesuffix(".bias")].nbytes
        how: Row = {"tensor": name, "block": blocks[name], "format": fmt.name, "granularity": str(granularity)}
        payload, weights = sum(kinds.values()), prod(shape)
        bits: Row = {"bits_per_weight": 8 * payload / weights}
        rows.append(how | {"weights": weights} | dict.fromkeys(payload_kinds(), 0) | kinds | {"bytes": payload} | bits)
    return rows


def activation_rows(activations: "Mapping[str, Activation]") -> list[Row]:
    """Every site whose activation scales are in the file, with their bytes; no weight is behind them."""
    from fqdiff.models.unet import block_of
    from fqdiff.quant.activation_sites import OUTPUT

    rows: list[Row] = []
    for site, activation in activations.items():
        count = sum(tensor.nbytes for tensor in activation.tensors.values())
        block = "head" if site == OUTPUT else block_of(site)
        how: Row = {"tensor": f"{site} (activation)", "block": block, "format": activation.format}
        sizes: Row = {"weights": 0, **dict.fromkeys(payload_kinds(), 0), ACTIVATION_SCALES: count, "bytes": count}
        rows.append({**how, "granularity": activation.granularity, **sizes, "bits_per_weight": 0.0})
    return [row for row in rows if row["bytes"]]


def correction_rows(correction: "NoiseCorrection | None") -> list[Row]:
    """The tables of a noise correction, which are float32 and belong to the network's output."""
    rows: list[Row] = []
    for name, tensor in (correction.tensors if correction is not None else {}).items():
        how: Row = {"tensor": name, "block": "head", "format": "float32", "granularity": "tensor"}
        sizes: Row = {**dict.fromkeys(payload_kinds(), 0), NOISE_CORRECTION: tensor.nbytes, "bytes": tensor.nbytes}
        rows.append({**how, "weights": 0, **sizes, "bits_per_weight": 0.0})
    return rows


def block_rows(rows: list[Row]) -> list[Row]:
    """The rows of :func:`tensor_rows` summed over each block."""
    blocks = sorted({str(r["block"]) for r in rows}, key=lambda b: BLOCKS.index(b) if b in BLOCKS else len(BLOCKS))
    return [total({"block": b}, [r for r in rows if r["block"] == b]) for b in blocks]


def total(label: Row, rows: list[Row]) -> Row:
    """``label`` with the sums of ``rows``."""
    sums = {key: sum(int(r[key]) for r in rows) for key in ("weights", *payload_kinds(), "bytes")}
    return label | sums | {"bits_per_weight": 8 * sums["bytes"] / sums["weights"]}


def size_text(name: str, rows: list[Row], whole: Row, file_bytes: int) -> str:
    """The table for people: what the model is called, rows, header, and the whole file."""
    words = [key for key in ("tensor", "block", "format", "granularity") if key in rows[0]]
    kinds = [kind for kind in payload_kinds() if kind not in RARE or whole[kind]]
    numbers = ["weights", *kinds, "bytes"]

    def line(row: Row, bits: float) -> list[str]:
        return [*(str(row.get(w, "")) for w in words), *(f"{row[n]:,}" for n in numbers), f"{bits:.3f}"]

    header = file_bytes - int(whole["bytes"])
    weights = int(whole["weights"])
    blank = [""] * (len(words) + len(numbers) - 2)
    cells = [line(row, float(row["bits_per_weight"])) for row in rows]
    cells.append(["header", *blank, f"{header:,}", f"{8 * header / weights:.3f}"])
    cells.append(["file", *line({**whole, "bytes": file_bytes}, 8 * file_bytes / weights)[1:]])
    title = f"{name}: {mebibytes(file_bytes)}, {8 * file_bytes / weights:.3f} bits per weight"
    return "\n".join([title, table([n.replace("_", " ") for n in (*words, *numbers, "bits/weight")], cells)])
