"""Bias correction: rounding W to Q(W) shifts the mean of every layer's output, and its bias takes the shift back.

b <- b - E[(Q(W) - W) x], for each output channel, over calibration inputs and positions (Nagel et al. 2019, arXiv:1906.04721,
section 4.2). The x are those of the full-precision network: a layer answers for its own rounding, and one pass serves all
layers. x of the quantized network, layer by layer, gave nearly the same; matching E[Q(W) x_q] with E[W x] there, so that a
layer also makes up for those before it, left a larger error of the predicted noise (docs/results/bias-correction.md).
Shapes: B batch, K intervals of timesteps, O output channels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fqdiff.calibration.inputs import CalibrationInputs, sampler_inputs
from fqdiff.calibration.requirements import check_bias_intervals
from fqdiff.configs import QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import QuantizationError
from fqdiff.quant.packed import PackedTensor, pack_tensor, unpack_tensor
from fqdiff.quant.timestep_bias import DTYPE, LAYERS, channel_axis, interval_of
from fqdiff.values import Checkpoint


@dataclass(frozen=True)
class Shifts:
    """Sums of a layer's output errors (Q(W) - W) x: ``total`` float64 [K, O], each the mean over positions; ``count`` [K]."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """Over all inputs, [O]."""
        return self.total.sum(dim=0) / self.count.sum()

    @property
    def interval_means(self) -> Tensor:
        """Over the inputs of each interval, [K, O]."""
        return self.total / self.count[:, None]


def correct_bias(
    checkpoint: Checkpoint, packed: Mapping[str, PackedTensor], config: QuantizeConfig, seed: int, context: Context
) -> tuple[dict[str, PackedTensor], dict[str, Tensor]]:
    """``packed`` with corrected biases, in the formats that they had, and tables by timestep, empty unless asked for.

    A table, float16 [K, O] keyed by layer, holds what the mean over an interval of timesteps asks for beyond the bias as it
    is stored. Layers without a bias, and layers whose weights lost nothing, stay as they are.
    Raises ConfigError where an interval would hold no calibration input.
    """
    spec, device = checkpoint.spec, context.device
    network = checkpoint.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    errors = weight_errors(network, checkpoint, packed)
    if not errors:
        return dict(packed), {}
    by_timestep = config.bias_correction == "timestep"
    intervals = config.bias_intervals if by_timestep else 1
    forwards = 2 * config.calibration_images * config.calibration_steps
    with context.progress(forwards, "bias correction", "input") as bar:
        inputs = sampler_inputs(
            spec, network, config.calibration_images, config.calibration_steps, seed, device, bar.update
        )
        total = spec.noise_schedule().num_train_timesteps
        if by_timestep:
            check_bias_intervals(inputs.t, config, total)
        shifts = output_shifts(network, errors, inputs, intervals, total, bar.update)
    corrected, tables = dict(packed), {}
    for name, shift in shifts.items():
        key = f"{name}.bias"
        bias = checkpoint.tensors[key].double()
        stored = pack_tensor((bias - shift.mean).float(), packed[key].format, packed[key].granularity)
        corrected[key] = stored
        if by_timestep:
            tables[name] = _as_table(name, bias - shift.interval_means - unpack_tensor(stored).double())
    return corrected, tables


def _as_table(name: str, values: Tensor) -> Tensor:
    table = values.to(DTYPE)
    if not torch.isfinite(table).all():
        raise QuantizationError(
            f"timestep biases of '{name}' up to {float(values.abs().max()):.3g}", "they overflow float16; use more bits"
        )
    return table


def weight_errors(
    network: nn.Module, checkpoint: Checkpoint, packed: Mapping[str, PackedTensor]
) -> dict[str, nn.Module]:
    """Copies of the layers that rounding changed and that have a bias: weight Q(W) - W, no bias, float64."""
    found: dict[str, nn.Module] = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, LAYERS) or layer.bias is None:
            continue
        exact = checkpoint.tensors[f"{name}.weight"]
        error = unpack_tensor(packed[f"{name}.weight"]).double() - exact.double()
        if error.any():
            twin = copy.deepcopy(layer).double()
            twin.weight.data = error.to(layer.weight.device)
            twin.bias = None
            found[name] = twin
    return found


def output_shifts(
    network: nn.Module,
    errors: Mapping[str, nn.Module],
    inputs: CalibrationInputs,
    intervals: int,
    num_train_timesteps: int,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Shifts]:
    """Output of each layer of ``errors`` on what the layer of that name in ``network`` is given, by interval of t.

    The layers of ``errors`` are linear: they take the sum of a chunk's inputs, in float64, not one by one. Memory does not
    grow with the number of inputs.
    """
    device = next(network.parameters()).device
    shifts: dict[str, Shifts] = {}
    index = torch.zeros(0, dtype=torch.int64)  # the interval of each sample of the chunk on its way

    def add(name: str, x: Tensor) -> None:
        present, part = index.unique(return_inverse=True)
        sums = torch.zeros(len(present), *x.shape[1:], dtype=torch.float64, device=device)
        sums.index_add_(0, part.to(device), x.double())
        output = errors[name](sums).movedim(channel_axis(errors[name]), 1)  # [present, O, ...]
        rows = output.reshape(*output.shape[:2], -1).mean(dim=2).cpu()
        if name not in shifts:
            zeros = torch.zeros(intervals, rows.shape[1], dtype=torch.float64)
            shifts[name] = Shifts(zeros, torch.zeros(intervals, dtype=torch.float64))
        shifts[name].total.index_add_(0, present, rows)
        shifts[name].count.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))

    with watching(network, errors, add), torch.inference_mode():
        for x_t, t in inputs.chunks():
            index = interval_of(t, intervals, num_train_timesteps)
            network(x_t.to(device), t.to(device))
            tick(len(t))
    return shifts


@contextmanager
def watching(network: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, ``see`` gets the name and the input of each layer of ``names`` whenever it is called."""

    def watch(name: str) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            see(name, arguments[0])

        return network.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
