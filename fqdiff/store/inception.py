"""Inception features through clean-fid: its resize and its 2015 TorchScript network."""

import os
import tempfile
import urllib.error
from pathlib import Path

import torch
from torch import Tensor

from fqdiff.errors import DataError
from fqdiff.evidence.features import FeatureNetwork, inception_features
from fqdiff.store.files import sha256_of

FILE = "inception-2015-12-05.pt"


def find_inception() -> Path | None:
    """The weights where clean-fid keeps them, in the system's temporary folder; None where they are not.

    Others may write to that folder, and the file can execute: it counts only if it belongs to this user.
    """
    path = Path(tempfile.gettempdir()) / FILE
    mine = path.is_file() and (not hasattr(os, "getuid") or path.stat().st_uid == os.getuid())
    return path if mine else None


def load_inception(weights: Path | None) -> FeatureNetwork:
    """The network in ``weights``, or clean-fid's own copy, downloaded if need be.

    The file is TorchScript, which can execute: it is only ever taken from a path the user gave or from clean-fid's download,
    never from an artifact. Raises DataError where it is missing or cannot be loaded.
    """
    from cleanfid.downloads_helper import check_download_inception
    from cleanfid.inception_torchscript import InceptionV3W

    path = weights or find_inception()
    if path is None:
        folder = Path(tempfile.mkdtemp())  # an interrupted download must not pass for the file
        try:
            path = Path(check_download_inception(fpath=str(folder)))
            os.replace(path, Path(tempfile.gettempdir()) / FILE)
            path = Path(tempfile.gettempdir()) / FILE
        except (OSError, urllib.error.URLError) as error:
            raise DataError(
                f"Inception weights cannot be downloaded ({error})",
                f"give --inception-weights {FILE}, or --features digits",
            ) from None
    if not path.is_file():
        raise DataError(
            f"no Inception weights at {path}", f"clean-fid's file is called {FILE}; or use --features digits"
        )
    digest = sha256_of(path)
    with tempfile.TemporaryDirectory() as folder_name:  # clean-fid wants a folder and its own file name
        (Path(folder_name) / FILE).symlink_to(path.resolve())
        try:
            network = InceptionV3W(folder_name, download=False, resize_inside=False)
        except (RuntimeError, AttributeError) as error:
            raise DataError(
                f"{path} is not clean-fid's Inception: {str(error).splitlines()[0]}", f"use {FILE}"
            ) from None

    def extract(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([inception_features(network, batch) for batch in images.split(50)])

    output = getattr(network.base, "output", None)

    def probabilities(images: Tensor, features: Tensor) -> Tensor:
        """By the last layer without its bias: so Salimans et al. made the Inception score of this network."""
        assert output is not None
        logits: Tensor = features @ output.weight.detach().T
        return logits.softmax(dim=1)

    return FeatureNetwork("inception-clean", digest, extract, probabilities=None if output is None else probabilities)
