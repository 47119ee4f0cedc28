"""Draw docs/images/methods/*.svg, a picture of each method: python docs/generate_method_pictures.py.

All numbers come from fqdiff's own functions on pretrained:mnist-small, so that the pictures are of what the methods do here.
Text and lines are of a grey that can be read on white and on black. Takes about a minute.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fqdiff.calibration.activations import observe
from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.ptqd import measure_correction
from fqdiff.calibration.schemes import chosen_steps
from fqdiff.calibration.temporal import interval_middles, range_ends
from fqdiff.configs import (
    ActivationConfig,
    CalibrateConfig,
    FisherConfig,
    PlanConfig,
    QuantizeConfig,
    TemporalConfig,
)
from fqdiff.context import Context
from fqdiff.models.registry import skip_boundaries
from fqdiff.quant.activation_formats import activation_qparams, fake_quantize, get_activation_format
from fqdiff.quant.activation_sites import activation_sites, watching
from fqdiff.quant.adaround import rectified_sigmoid, rounding_penalty
from fqdiff.quant.formats import PerChannel, get_format
from fqdiff.quant.packed import unpack_tensor
from fqdiff.quant.qparams import choose_qparams, dequantize, group_rows, quantize
from fqdiff.quant.rounding import rounded
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.stages.activations import quantize_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.fisher import fisher
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize as quantize_checkpoint
from fqdiff.stages.temporal_scales import learn_temporal_scales
from fqdiff.store.pretrained import open_model
from fqdiff.store.sources import dataset_config, load_dataset
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint
from fqdiff.viz.figures import COLOURS, despine, new_figure, render

FOLDER = Path(__file__).parent / "images" / "methods"
ORANGE, SKY, GREEN, BLUE, RED, PINK = COLOURS
INK = "#808080"
LAYER = "block3.res1.conv1"
T = 1000


# --- what is drawn from ----------------------------------------------------------------------------------------------


@cache
def checkpoint() -> Checkpoint:
    """The pretrained model; nobody looks at its previews here."""
    file = open_model("pretrained:mnist-small").model
    tensors = {name: unpack_tensor(packed) for name, packed in file.packed.items()}
    return Checkpoint(file.spec, tensors, None, torch.zeros(0, *file.spec.image_shape, dtype=torch.uint8))


@cache
def inputs() -> CalibrationSet:
    """Eight runs of the default calibration set."""
    return calibrate(checkpoint(), None, None, CalibrateConfig(samples=8), 0, Context())


@cache
def by_bits(bits: int) -> QuantizedCheckpoint:
    """The model in ``bits`` a weight, rounded to the nearest."""
    made = plan(checkpoint(), None, None, PlanConfig("uniform", low=f"int{bits}"), 0, Context())
    return quantize_checkpoint(checkpoint(), made, None, QuantizeConfig(), 0, Context())


def extremes(site: str, intervals: int, parts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The least and the largest number at ``site`` of the model on its calibration set, [K, G] each."""
    x, t = inputs().x_t, inputs().t
    index = interval_of(t, intervals, T)
    seen = observe(checkpoint().network(), {site: parts}, CalibrationInputs(x, t), index, intervals, keep_numbers=False)
    return seen[site].low, seen[site].high


def canvas(columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A transparent figure whose lines and texts are neither black nor white."""
    figure = new_figure(7.2, 2.6)
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(1, columns, k + 1) for k in range(columns)]
    for each in axes:
        each.patch.set_alpha(0)
        despine(each)
        each.tick_params(which="both", colors=INK, labelsize=8)
        for side in each.spines.values():
            side.set_color(INK)
    return figure, axes


def labelled(axes: Axes, x: str, y: str, title: str = "", legend: str = "best") -> None:
    """Names for both axes, and the legend of what has a label."""
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.set_title(title, color=INK, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc=legend)


# --- one picture each ------------------------------------------------------------------------------------------------


def linear() -> Figure:
    """The staircase of 4-bit codes over the weights of one output channel."""
    weight = checkpoint().tensors[f"{LAYER}.weight"][:1]
    fmt, by_channel = get_format("int4"), PerChannel(0)
    qparams = choose_qparams(weight, fmt, by_channel)
    low, high = float(weight.min()), float(weight.max())
    x = torch.linspace(low, high, 600).view(1, -1, 1, 1)
    stairs = dequantize(quantize(x, qparams, fmt, by_channel), qparams, by_channel)
    figure, (left, right) = canvas(2)
    left.hist(weight.flatten().numpy(), bins=40, color=SKY)
    for level in dequantize(torch.arange(16, dtype=torch.uint8).view(1, -1, 1, 1), qparams, by_channel).flatten():
        left.axvline(float(level), color=ORANGE, linewidth=0.8)
    labelled(left, "weight w", "weights", f"one channel of {LAYER}: 16 levels")
    right.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--", label="w")
    right.plot(x.flatten(), stairs.flatten(), color=ORANGE, linewidth=1.4, label="Q(w), int4")
    labelled(right, "weight w", "stored as")
    return figure


def squant() -> Figure:
    """Sums of rounding errors, channel by channel, of both roundings."""
    weight, by_channel, fmt = checkpoint().tensors[f"{LAYER}.weight"], PerChannel(0), get_format("int4")
    qparams = choose_qparams(weight, fmt, by_channel)
    exact = group_rows(weight, by_channel) / qparams.scale[:, None] + qparams.zero_point[:, None]
    figure, axes = canvas(2)
    for name, colour in (("nearest", SKY), ("squant", ORANGE)):
        error = group_rows(rounded(weight, qparams, fmt, by_channel, name), by_channel).float() - exact
        axes[0].plot(error.sum(dim=1).numpy(), color=colour, linewidth=1.2, label=name)
        kernels = error.reshape(len(error), -1, 9).sum(dim=2).flatten()
        axes[1].hist(kernels.numpy(), bins=61, range=(-3, 3), histtype="step", color=colour, label=name)
    labelled(axes[0], f"output channel of {LAYER}", "sum of errors, in steps")
    labelled(axes[1], "sum of a kernel's nine errors, in steps", "kernels")
    return figure


def ptq4dm() -> Figure:
    """Which timesteps are recorded: ndtc by default, with skew, and uniform."""
    figure, (axes,) = canvas()
    kinds = (
        ("ndtc: a normal at 0.4 of spread 0.4, cut off", CalibrateConfig("ndtc", samples=2000, steps=T), ORANGE),
        ("ndtc with --skew 4", CalibrateConfig("ndtc", samples=2000, steps=T, location=0.1, skew=4.0), GREEN),
        ("uniform", CalibrateConfig("uniform", samples=1, steps=T, timesteps=500), BLUE),
    )
    for label, config, colour in kinds:
        share = (T - 1 - chosen_steps(config, 0).flatten().double()) / T
        axes.hist(share.numpy(), bins=40, range=(0, 1), density=True, histtype="step", color=colour, label=label)
    labelled(axes, "t / T, from image to noise", "density of inputs")
    return figure


def q_diffusion() -> Figure:
    """What a rounding is learned by, and the ranges of the two parts of each joined skip."""
    figure, (left, right) = canvas(2)
    v = torch.linspace(-12, 6, 300)
    left.plot(v, rectified_sigmoid(v), color=BLUE, label="h(V)")
    for beta, style in ((20.0, "-"), (6.0, "--"), (2.0, ":")):
        penalty = torch.stack([rounding_penalty(h, beta) for h in rectified_sigmoid(v)])
        left.plot(v, penalty, color=ORANGE, linestyle=style, linewidth=1, label=f"1 - |2h - 1|^{beta:g}")
    labelled(left, "V of a weight", "share of a step up", legend="center left")
    network = checkpoint().network()
    for row, (site, border) in enumerate(skip_boundaries(network).items()):
        channels = activation_sites(network)[site]
        (low,), (high,) = extremes(site, 1, (border, channels - border))
        for part, (colour, name) in enumerate(((SKY, "h"), (ORANGE, "skip"))):
            ends = float(low[part]), float(high[part])
            right.barh(
                row + 0.2 - 0.4 * part, ends[1] - ends[0], 0.35, ends[0], color=colour, label=None if row else name
            )
    right.set_yticks(range(3), list(skip_boundaries(network)))
    labelled(right, "range of what the layer is given", "")
    return figure


def ptqd() -> Figure:
    """The error of a 2-bit model's output over the output, with the line that is taken out."""
    rows = interval_of(inputs().t, 10, T) == 1
    x, t = inputs().x_t[rows], inputs().t[rows]
    with torch.no_grad():
        exact, stored = (m.network()(x, t) for m in (checkpoint(), by_bits(2)))
    found = measure_correction(checkpoint().network(), by_bits(2).network(), CalibrationInputs(x, t), 1, T)
    slope, bias = float(found.slope[0]), float(found.bias[0, 0])
    some = torch.linspace(0, exact.numel() - 1, 250).long()
    figure, (left, right) = canvas(2)
    left.scatter(exact.flatten()[some], (stored - exact).flatten()[some], s=3, color=SKY)
    ends = torch.tensor([float(exact.min()), float(exact.max())])
    left.plot(ends, slope * ends + bias, color=ORANGE, label=f"k = {slope:.2f}, b = {bias:+.2f}")
    labelled(left, "output of the full-precision model", "error, int2 weights", "t from 100 to 199")
    for label, outputs, colour in (
        ("as predicted", stored, SKY),
        ("corrected", (stored - bias) / (1 + slope), ORANGE),
    ):
        right.hist((outputs - exact).flatten().numpy(), bins=60, histtype="step", color=colour, label=label)
    labelled(right, "error", "numbers")
    return figure


@cache
def by_interval() -> QuantizedCheckpoint:
    """Activations of two sites, in 20 intervals of timesteps, min-max."""
    config = ActivationConfig("int8", range="min-max", intervals=20, split_skips=False)
    made = quantize_activations(checkpoint(), by_bits(8), inputs(), config, 0, Context())
    return replace(made, activations={site: made.activations[site] for site in SITES})


SITES = ("block1.res1.conv2", "block6.res2.conv2")


def tdq() -> Figure:
    """The table of scales that calibration found, and the function of time that is fitted to it."""
    learned = learn_temporal_scales(checkpoint(), by_interval(), inputs(), TemporalConfig(), 0, Context())
    figure, axes = canvas(2)
    for each, site in zip(axes, SITES, strict=True):
        for model, colour, style, label in (
            (by_interval(), SKY, "o", "at 20 timesteps"),
            (learned, ORANGE, "-", "s(t), for 50 intervals"),
        ):
            scale = model.activations[site].scale
            assert scale is not None
            at = interval_middles(len(scale), T)
            each.plot(at, scale[:, 0], style, markersize=3, color=colour, linewidth=1.4, label=label)
        labelled(each, "t", "scale s", site)
    return figure


def tfmq() -> Figure:
    """The range of each interval of timesteps, and the one range that would have to do for all."""
    figure, axes = canvas(2)
    for each, site in zip(axes, SITES, strict=True):
        below, above = range_ends(by_interval().activations[site])[:, 0].T
        at, width = interval_middles(20, T), T / 20
        each.bar(at, above + below, 0.8 * width, -below, color=SKY, label="K = 20 ranges")
        for end in (-float(below.max()), float(above.max())):
            each.axhline(end, color=ORANGE, linewidth=1.2)
        each.plot([], [], color=ORANGE, label="one range")
        labelled(each, "t", "numbers", site)
    return figure


def repq() -> Figure:
    """Softmax outputs, and where the sixteen codes of two formats lie among them."""
    seen: list[Tensor] = []
    network = checkpoint().network()
    with watching(network, ["block2.attention.softmax"], lambda site, x: seen.append(x)), torch.inference_mode():
        network(inputs().x_t[:32], inputs().t[:32])
    numbers = seen[0].flatten()
    numbers = numbers[torch.linspace(0, len(numbers) - 1, 20_000).long()]
    figure, (axes,) = canvas()
    axes.hist(numbers.clamp(min=1e-6).log10().numpy(), bins=80, color=SKY, label="block2.attention.softmax")
    high = float(seen[0].max())
    top = axes.get_ylim()[1]
    grid = torch.logspace(-6, 0, 20_000) * high
    for row, (name, colour, label) in enumerate(
        (("uint4", BLUE, "uniform, 4 bits"), ("logsqrt2_4", ORANGE, "log sqrt 2, 4 bits"))
    ):
        fmt = get_activation_format(name)
        qparams = activation_qparams(torch.tensor([0.0]), torch.tensor([high]), fmt)
        levels = fake_quantize(grid.clone(), qparams.scale, qparams.zero_point, fmt).unique()
        levels = levels[levels > 0].log10()
        axes.plot(
            levels, torch.full_like(levels, top * (1.08 + 0.09 * row)), "|", color=colour, markersize=9, label=label
        )
    axes.set_xlim(-6, 0)
    labelled(axes, "log10 of a softmax output", "numbers")
    return figure


def fisher_budget() -> Figure:
    """Every weight tensor: its Fisher information, and how many bits the best plan of 4.25 a weight gives it."""
    dataset = load_dataset(dataset_config("mnist5k", 32), 0, Context())
    config = FisherConfig(timesteps=20, samples=8, activations=False)
    table = fisher(checkpoint(), dataset, config, 0, Context())
    budget = PlanConfig("budget", target_bpw=4.25, granularity="tensor,channel,group-near:64", scale="float16")
    chosen = [e for e in plan(checkpoint(), table, None, budget, 0, Context()).entries if len(e.shape) >= 2]
    figure, (axes,) = canvas()
    value = [float(table.entries[e.parameter].mean.mean()) for e in chosen]
    bits, size = [e.code_bits for e in chosen], [torch.Size(e.shape).numel() for e in chosen]
    for least, most, area, colour in ((0, 5_000, 15, SKY), (5_000, 50_000, 40, GREEN), (50_000, 10**9, 90, ORANGE)):
        some = [k for k, count in enumerate(size) if least <= count < most]
        words = f"{least:,} weights or more" if least else f"under {most:,} weights"
        axes.scatter(
            [value[k] for k in some], [bits[k] for k in some], s=area, color=colour, alpha=0.8, lw=0, label=words
        )
    axes.set_xscale("log")
    labelled(axes, "mean Fisher information of a weight of the tensor", "bits of its codes")
    return figure


PICTURES: Mapping[str, Callable[[], Figure]] = {
    "linear": linear,
    "squant": squant,
    "ptq4dm": ptq4dm,
    "q-diffusion": q_diffusion,
    "ptqd": ptqd,
    "tdq": tdq,
    "tfmq": tfmq,
    "repq": repq,
    "fisher": fisher_budget,
}


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        path.write_bytes(render(draw(), "svg"))
        print(f"{path.relative_to(FOLDER.parent.parent)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
