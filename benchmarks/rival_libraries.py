"""What optimum-quanto and SDNQ make of a network: the bytes of the file they save, and the weights they compute with.

Both are optional: ``pip install -c constraints.txt 'fqdiff[bench]'``. The package itself never imports them.

Sizes are those of the safetensors file with the state dict of the quantized network, as the README of either library saves it:
codes, scales, zero points, whatever was kept, and the header. The JSON that each wants beside it (a quantization map or
config) is not counted.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fqdiff.store.torchvision import import_torchvision

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Quantized:
    """A network that a library quantized.

    ``network`` computes with the library's own modules; ``content``: the file; ``weights``: every parameter as the library
    dequantizes it, float32, keyed by parameter name; ``touched``: the names of those it quantized.
    """

    network: nn.Module
    content: bytes
    weights: Mapping[str, Tensor]
    touched: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One way to call a library; ``options`` are plain data, the keyword arguments of :func:`quanto` or :func:`sdnq`."""

    library: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


def quantized(network: nn.Module, setting: Setting) -> Quantized:
    """``setting`` applied to a copy of ``network``."""
    return {"optimum-quanto": quanto, "sdnq": sdnq}[setting.library](network, **setting.options)


def quanto(
    network: nn.Module,
    weights: str,
    optimizer: str = "",
    exclude: Iterable[str] = (),
    dtype: str = "float32",
) -> Quantized:
    """A copy of ``network`` by optimum-quanto: weights only, frozen.

    ``weights``: qint2, qint4, qint8, qfloat8 or another of its types; ``optimizer``: hqq, or empty for its default (min-max,
    absmax for 8 bits); 0.2.7's hqq fails on a layer with one output channel. ``exclude``: patterns of modules to leave alone;
    ``dtype``: of the network it is given, and so of scales and of all that is kept. It groups by itself, by 128, 96, 64 or 32
    weights where that divides; that is no option.
    """
    import_torchvision()  # huggingface_hub's relatives import it, and fail beside a CPU build of torch
    from optimum.quanto import HqqOptimizer, QModuleMixin, freeze, qtypes, quantize

    made = copy.deepcopy(network).to(DTYPES[dtype]).eval()
    chosen = {"": None, "hqq": HqqOptimizer}[optimizer]
    quantize(made, weights=qtypes[weights], optimizer=None if chosen is None else chosen(), exclude=list(exclude))
    with torch.no_grad():  # its packed weights refuse inference_mode
        freeze(made)
        found = {name: p.detach().float() for name, p in made.named_parameters() if type(p.data) is Tensor}
        modules = {name: m for name, m in made.named_modules() if isinstance(m, QModuleMixin) and m.frozen}
        found |= {f"{name}.weight": m.weight.dequantize().float() for name, m in modules.items()}
    return Quantized(made, _file(made), _ordered(network, found), tuple(f"{name}.weight" for name in modules))


def sdnq(network: nn.Module, dtype: str = "float32", group_transposed: bool = True, **options: Any) -> Quantized:
    """A copy of ``network`` by SDNQ, weights only; ``options`` are those of its ``SDNQConfig``.

    ``dtype``: of the network it is given, and so of all that is kept. ``group_transposed``: False for one group of input
    channels in transposed convolutions, which sdnq 0.2.8 cannot split (it reshapes the axis of the output channels).
    """
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # compiling changes no result and takes minutes
    import_torchvision()
    from sdnq import SDNQConfig, sdnq_post_load_quant
    from sdnq.dequantizer import dequantize_sdnq_model

    made = copy.deepcopy(network).to(DTYPES[dtype]).eval()
    if not group_transposed:
        transposed = [name for name, m in made.named_modules() if isinstance(m, nn.ConvTranspose2d)]
        options = {**options, "modules_quant_config": {f"{name}.weight": {"group_size": -1} for name in transposed}}
    # The seed is that of its random SVD.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = sdnq_post_load_quant(made, quantization_config=SDNQConfig(**options), torch_dtype=DTYPES[dtype])
        plain = dequantize_sdnq_model(copy.deepcopy(made))
    touched = tuple(f"{name}.weight" for name, m in made.named_modules() if hasattr(m, "sdnq_dequantizer"))
    found = {name: p.detach().float() for name, p in plain.named_parameters()}
    return Quantized(made, _file(made), _ordered(network, found), touched)


def _file(network: nn.Module) -> bytes:
    """The safetensors file of the state dict of ``network``."""
    return save({name: t.contiguous() for name, t in network.state_dict().items()})


def _ordered(network: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``found`` in the order of the parameters of ``network``; raises KeyError if one is missing."""
    return {name: found[name].contiguous() for name, _ in network.named_parameters()}


ENDS = ("stem*", "head*")


def quanto_settings() -> list[Setting]:
    """Every type of weight, with and without the first and last layers; kept tensors and scales in float32 or float16."""
    made = []
    kinds = [(name, "") for name in ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qint4", "qint2")]
    for weights, optimizer in [*kinds, ("qint4", "hqq"), ("qint2", "hqq")]:
        for left_alone, exclude in (("", ()), ("all but head.output", ("head.output",)), ("ends kept", ENDS)):
            if left_alone == "all but head.output" and optimizer != "hqq":
                continue  # only HQQ refuses that layer
            for dtype in DTYPES:
                label = ", ".join(part for part in (weights, optimizer, left_alone, dtype) if part)
                options = {"weights": weights, "optimizer": optimizer, "exclude": list(exclude), "dtype": dtype}
                made.append(Setting("optimum-quanto", label, options))
    return made


RECOMMENDED = (
    *("int8", "int7", "int6", "uint5", "uint4", "uint3", "uint2"),
    *("float8_e4m3fn", "float6_e3m2fn", "float5_e2m2fn", "float4_e2m1fn", "float3_e1m1fn", "float2_e1m0fn"),
)


def sdnq_settings() -> list[Setting]:
    """Its defaults; every width it recommends, with convolutions; then what makes its file small, and its other methods.

    ``groups``: as it groups input channels by itself; ``rows``: one group. Large layers only, unless ``all layers`` is said.
    """
    made: dict[str, dict[str, Any]] = {
        "int8, defaults": {},
        "uint4, defaults": {"weights_dtype": "uint4"},
        "uint4, groups, transposed convolutions too": {"weights_dtype": "uint4", "quant_conv": True},
    }
    convolutions = {"quant_conv": True, "group_transposed": False}
    rows = {**convolutions, "group_size": -1}
    for name in RECOMMENDED:
        made[f"{name}, groups"] = {"weights_dtype": name, **convolutions}
        if name[-1] not in "78" and "float8" not in name:  # there all groups are rows
            made[f"{name}, rows"] = {"weights_dtype": name, **rows}
    everywhere = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}
    methods: dict[str, dict[str, Any]] = {"SVD of rank 32": {"use_svd": True}}
    for covered, most in (
        ("all layers", everywhere),
        ("all layers but the ends", {**everywhere, "modules_to_not_convert": ["stem", "head"]}),
    ):
        methods |= {
            covered: most,
            f"{covered}, groups": {**most, "group_size": 0},
            f"{covered}, Hadamard": {**most, "use_hadamard": True},
            f"{covered}, SVD of rank 4": {**most, "use_svd": True, "svd_rank": 4},
            f"{covered}, codebooks": {**most, "use_codebook": True},
            f"{covered}, dynamic": {**most, "use_dynamic_quantization": True},
            f"{covered}, dynamic codebooks": {**most, "use_dynamic_quantization": True, "use_codebook": True},
        }
    for name in ("uint6", "uint5", "uint4", "uint3", "uint2"):
        small = {"weights_dtype": name, "dtype": "float16", "scale_dtype": "uint8", **rows}
        for label, options in methods.items():
            made[f"{name}, float16, uint8 scales, {label}"] = {**small, **options}
    made["int3, float16, float8 scales, all layers"] = {
        **{"weights_dtype": "int3", "dtype": "float16", "scale_dtype": "float8_e4m3fn"},
        **{**rows, **everywhere},
    }
    made["int2, float16, float8 scales, all layers"] = {
        **made["int3, float16, float8 scales, all layers"],
        "weights_dtype": "int2",
    }
    for threshold in (0.1, 0.03):
        made[f"uint2, float16, uint8 scales, all layers, dynamic codebooks to a loss of {threshold}"] = {
            **{"weights_dtype": "uint2", "dtype": "float16", "scale_dtype": "uint8", **rows},
            **methods["all layers, dynamic codebooks"],
            "dynamic_loss_threshold": threshold,
        }
    return [Setting("sdnq", label, options) for label, options in made.items()]
