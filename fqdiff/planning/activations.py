"""Formats of activations by site: the same for all, or a wider one where the Fisher information of layer outputs is highest.

An error of what a layer is given passes through the layer into what it puts out. With F the Fisher information there, averaged
over timesteps and channels, the sites are put in the order of F; an error costs the more, the higher F is. What attention
multiplies goes by the layer that made it, or, for the softmax, by the layer behind.
"""

from collections.abc import Mapping

from torch import nn

from fqdiff.configs import PlanConfig
from fqdiff.errors import ConfigError, LineageError
from fqdiff.models.registry import first_layer
from fqdiff.quant.activation_sites import OUTPUT, activation_sites, is_operand
from fqdiff.values import FisherTable


def activation_formats(network: nn.Module, fisher: FisherTable | None, config: PlanConfig) -> dict[str, str]:
    """The format of every site of ``network`` but x_t and the network's output, whose formats ``quantize`` is told.

    The share ``config.activation_ratio`` of them whose layers have the highest Fisher information, rounded, is in
    ``config.wide_activations``; ties go by name. Raises ConfigError where the table has none of layer outputs, LineageError
    where it has that of other layers.
    """
    sites = [site for site in activation_sites(network) if site not in (first_layer(network), OUTPUT)]
    formats = dict.fromkeys(sites, config.activations)
    if not config.activation_ratio:
        return formats
    if fisher is None or not fisher.activations:
        raise ConfigError(
            "no Fisher values of layer outputs to choose activations by",
            "fqdiff fisher, without --no-activations, and of no trajectory",
        )
    scores = site_scores(sites, fisher)
    wide = sorted(sites, key=lambda site: (-scores[site], site))[: round(config.activation_ratio * len(sites))]
    return formats | dict.fromkeys(wide, config.wide_activations)


def site_scores(sites: list[str], fisher: FisherTable) -> Mapping[str, float]:
    """The mean Fisher information of the output of each site's layer."""
    found = {}
    for site in sites:
        layer = layer_of(site)
        if layer not in fisher.activations:
            raise LineageError(f"the Fisher table has no output of '{layer}'", "run fqdiff fisher on this checkpoint")
        found[site] = float(fisher.activations[layer].mean.mean())
    return found


def layer_of(site: str) -> str:
    """The layer by whose output a site is judged: the one that is given it; of attention's operands see above."""
    if not is_operand(site):
        return site
    attention, _, operand = site.rpartition(".")
    return f"{attention}.{'out' if operand == 'softmax' else 'qkv'}"
