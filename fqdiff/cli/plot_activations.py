"""``fqdiff plot activations``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.plot import ImageFormat, Output, image_formats, save_pictures
from fqdiff.cli.session import STORE_OPTIONS, Session, common, only_input
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqdiff.calibration.activations import Observed
    from fqdiff.viz.activations import SiteNumbers, SkipNumbers

EXAMPLE = "Example: fqdiff plot activations --format svg"
PICTURES = ("boxes", "histograms", "skips")


@common(*STORE_OPTIONS)
def activations(
    session: Session,
    ref: Annotated[
        str | None,
        typer.Argument(help="Calibration set: name, id or prefix.", show_default="the latest", metavar="REF"),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="Draw only this layer, or operand of attention; may be given again.", show_default="all"),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of timesteps, at most.")] = 10,
    picture: Annotated[
        list[str] | None,
        typer.Option(help=f"Draw only this one of {', '.join(PICTURES)}; may be given again.", show_default="all"),
    ] = None,
    image_format: ImageFormat = "both",
    output: Output = None,
) -> None:
    """Draw what layers are given while the model samples: boxes and histograms by timestep, skips by channel."""
    import torch

    from fqdiff.calibration.activations import observe, passes, timestep_groups
    from fqdiff.calibration.inputs import CalibrationInputs
    from fqdiff.models.registry import skip_boundaries
    from fqdiff.quant.activation_sites import activation_sites, site_boundaries
    from fqdiff.viz.activations import boxes_over_time, histograms_over_time, skip_channels
    from fqdiff.viz.figures import render

    formats = image_formats(image_format)
    chosen = list(dict.fromkeys(picture or PICTURES))
    for name in chosen:
        if name not in PICTURES:
            raise ConfigError(f"unknown picture '{name}'", f"one of: {', '.join(PICTURES)}")
    manifest = session.resolve(ref, ("calibration",))
    source = only_input(session, manifest, "checkpoint")
    checkpoint, value = session.runner.load(source), session.runner.load(manifest)
    value.check_model(checkpoint)
    network = checkpoint.network().to(session.device)
    sites = activation_sites(network)
    for name in site or []:
        if name not in sites:
            raise ConfigError(f"no site is called '{name}'", f"such as {', '.join(list(sites)[:3])}")
    wanted = {name: (sites[name],) for name in (site or sites)}
    borders = {n: at for n, at in site_boundaries(sites, skip_boundaries(network)).items() if n in wanted}
    if "skips" in chosen and not borders:
        if picture:
            raise ConfigError("none of these sites is given a joined skip", "leave --picture skips or --site out")
        chosen.remove("skips")
    inputs = CalibrationInputs(value.x_t.float(), value.t)
    index, timesteps = timestep_groups(inputs.t, groups)
    by_channel = {name: (1,) * sites[name] for name in borders}
    of_time = {"boxes": boxes_over_time, "histograms": histograms_over_time}
    rounds = len(passes(wanted, len(timesteps), len(inputs))) if of_time.keys() & set(chosen) else 0
    rounds += len(passes(by_channel, 1, len(inputs))) if "skips" in chosen else 0
    label = f"calibration {manifest.id} of checkpoint {source.id}"
    files: dict[str, bytes] = {}
    with session.progress(rounds * len(inputs), "activations", "input") as bar:
        over_time: Mapping[str, SiteNumbers] = {}
        if of_time.keys() & set(chosen):
            over_time = _by_time(observe(network, wanted, inputs, index, len(timesteps), tick=bar.update))
        for name in chosen:
            if name == "skips":
                found = observe(network, by_channel, inputs, torch.zeros_like(index), 1, tick=bar.update)
                figure = skip_channels(_by_channel(found, borders), label)
            else:
                figure = of_time[name](over_time, timesteps.numpy(), label)
            files |= {f"{name}.{one}": render(figure, one) for one in formats}
    save_pictures(session, "calibration", manifest.id, chosen, files, output)


def _by_time(found: "Mapping[str, Observed]") -> "dict[str, SiteNumbers]":
    from fqdiff.viz.activations import SiteNumbers

    return {
        name: SiteNumbers(
            [part.flatten().double().numpy() for (part,) in seen.numbers],
            seen.low[:, 0].double().numpy(),
            seen.high[:, 0].double().numpy(),
        )
        for name, seen in found.items()
    }


def _by_channel(found: "Mapping[str, Observed]", borders: "Mapping[str, int]") -> "dict[str, SkipNumbers]":
    from fqdiff.viz.activations import SkipNumbers

    return {
        name: SkipNumbers(
            seen.numbers[0][0].double().numpy(),
            seen.low[0].double().numpy(),
            seen.high[0].double().numpy(),
            borders[name],
        )
        for name, seen in found.items()
    }
