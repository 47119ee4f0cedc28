"""Quantize the activations of a model whose weights are quantized: its file gets the scales, and needs no calibration data."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from fqdiff.calibration.activations import Observed, observe, passes
from fqdiff.calibration.inputs import CalibrationInputs, every_timestep
from fqdiff.calibration.ranges import activation_range
from fqdiff.configs import ActivationConfig
from fqdiff.context import Context
from fqdiff.errors import LineageError
from fqdiff.models.registry import build, first_layer, skip_boundaries, temporal_layers
from fqdiff.quant.activation_formats import ActivationFormat, get_activation_format, softmax_format
from fqdiff.quant.activation_sites import OUTPUT, activation_sites, channel_parts, site_boundaries
from fqdiff.quant.activations import Activation
from fqdiff.quant.qparams import QParams
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.values import CalibrationSet, Checkpoint, ModelSpec, Plan, QuantizedCheckpoint


def quantize_planned_activations(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    plan: Plan | None,
    config: ActivationConfig,
    seed: int,
    context: Context,
) -> QuantizedCheckpoint:
    """:func:`quantize_activations`, in the formats that ``plan`` has for single sites."""
    formats = {} if plan is None else plan.activations
    return quantize_activations(checkpoint, model, calibration, config, seed, context, formats)


def quantize_activations(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    calibration: CalibrationSet | None,
    config: ActivationConfig,
    seed: int,
    context: Context,
    formats: Mapping[str, str] = MappingProxyType({}),
) -> QuantizedCheckpoint:
    """``model`` with quantized activations, their ranges taken from what it computes on ``calibration``.

    ``formats`` by site go over ``config.format``. With ``config.every_timestep`` ranges of what depends on t alone are those
    of all timesteps instead.

    The weights are the quantized ones, as in Q-Diffusion: ranges are those that sampling will meet, but for the errors of
    the activations themselves. Nothing is random. Raises LineageError where the calibration set is missing or of another
    model than ``checkpoint``, the activations are quantized already, or a noise correction rests on them; ConfigError where an
    interval of timesteps holds no input.
    """
    if model.activations:
        raise LineageError("the activations of this model are quantized already", "start from its plan")
    wanted = planned_activations(model.spec, config, formats)
    if model.noise_correction is not None:
        raise LineageError("what this model predicts is corrected for activations as they are", "start from its plan")
    if config.dynamic:
        return replace(model, activations=wanted)
    if calibration is None:
        raise LineageError("ranges of activations without a calibration set", "fqdiff calibrate, or --dynamic")
    calibration.check_model(checkpoint)
    parts = scale_parts(model.spec, {site: a.granularity for site, a in wanted.items()})
    network = model.network().to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    timed = temporal_layers(build(model.spec.architecture, "meta")) if config.every_timestep else set()
    recorded = CalibrationInputs(calibration.x_t.float(), calibration.t)
    split = (
        (recorded, {site: p for site, p in parts.items() if site not in timed}),
        (every_timestep(model.spec), {site: p for site, p in parts.items() if site in timed}),
    )
    observed = [(inputs, sites) for inputs, sites in split if sites]
    keep = config.range != "min-max"
    total = sum(len(passes(sites, config.intervals, len(inputs), keep)) * len(inputs) for inputs, sites in observed)
    found: dict[str, Observed] = {}
    with context.progress(total, "activations", "input") as bar:
        for inputs, sites in observed:
            index = interval_of(inputs.t, config.intervals, calibration.num_train_timesteps)
            found |= observe(network, sites, inputs, index, config.intervals, keep, bar.update)
    made: dict[str, Activation] = {}
    with context.progress(len(wanted), "ranges", "site") as bar:
        for site, activation in wanted.items():
            fmt, seen = get_activation_format(activation.format), found.pop(site)
            rows = []
            for k in range(config.intervals):
                nothing = torch.empty(seen.low.shape[1], 0)
                weighted = seen.weighted(k) if keep else [(nothing, nothing)]
                sizes = [len(numbers) for numbers, _ in weighted]
                ends = zip(weighted, seen.low[k].split(sizes), seen.high[k].split(sizes), strict=True)
                rows.append(
                    _joined([activation_range(*part, low, high, fmt, config.range) for part, low, high in ends])
                )
            made[site] = _with_scales(activation, fmt, rows)
            bar.update()
    return replace(model, activations=made)


def _joined(parts: list[QParams]) -> QParams:
    return QParams(torch.cat([p.scale for p in parts]), torch.cat([p.zero_point for p in parts]))


def _with_scales(activation: Activation, fmt: ActivationFormat, rows: list[QParams]) -> Activation:
    scale, zero_point = torch.stack([r.scale for r in rows]), torch.stack([r.zero_point for r in rows])
    return replace(activation, scale=scale, zero_point=zero_point if fmt.has_zero_points else None)


def planned_activations(
    spec: ModelSpec, config: ActivationConfig, by_site: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Activation]:
    """Format and granularity of every site that ``config`` quantizes, without scales; formats ``by_site`` go before its own.

    Raises LineageError where ``by_site`` has sites that the network has not.
    """
    network = build(spec.architecture, "meta")
    sites = activation_sites(network)
    borders = site_boundaries(sites, skip_boundaries(network)) if config.split_skips else {}
    if not by_site.keys() <= sites.keys():
        raise LineageError(
            "the plan's activations are of another model", "make a plan for this checkpoint: fqdiff plan"
        )
    formats = {**by_site, first_layer(network): config.first, OUTPUT: config.last}
    if not config.temporal:
        formats |= dict.fromkeys(temporal_layers(network), "")
    found: dict[str, Activation] = {}
    for site in sites:
        name = formats.get(site, config.format)
        if site.endswith(".softmax"):
            name = softmax_format(config.softmax, get_activation_format(name).bits).name
        split = config.granularity == "tensor" and site in borders
        if name:
            found[site] = Activation(name, "split" if split else config.granularity)
    return found


def scale_parts(spec: ModelSpec, granularities: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """How many neighbouring channels share each scale, for sites with their granularities."""
    network = build(spec.architecture, "meta")
    sites = activation_sites(network)
    borders = site_boundaries(sites, skip_boundaries(network))
    return {site: channel_parts(how, sites[site], borders.get(site)) for site, how in granularities.items()}
