"""A strategy as a plug-in: what costs much and matters little goes low first, until a share of the weights is left."""

from collections.abc import Mapping

from torch import Tensor


def choose(
    tensors: Mapping[str, Tensor], importance: Mapping[str, float], settings: Mapping[str, str]
) -> dict[str, str]:
    """A format for each of ``tensors``, all weight tensors of the model by name, stem and head among them.

    ``importance``: Fisher value of each, the mean over its elements; empty where there is no table. ``settings``: what the user
    gave with ``--setting NAME=VALUE``, as text. Raise whatever says what is wrong: fqdiff shows it, and writes nothing.
    """
    share, high, low = float(settings.get("share", "0.25")), settings.get("high", "int8"), settings.get("low", "int4")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: the part of the weights that stays in {high}, from 0 to 1")
    if not importance:
        raise ValueError("this strategy reads Fisher values: run fqdiff fisher first")
    left = share * sum(t.numel() for t in tensors.values())
    chosen = {}
    for name in sorted(tensors, key=lambda name: importance[name], reverse=True):
        stays = tensors[name].numel() <= left
        left -= tensors[name].numel() if stays else 0
        chosen[name] = high if stays else low
    return chosen
