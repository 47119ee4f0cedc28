"""fqdiff makes diffusion models smaller, with evidence."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from torch import nn

__version__ = "0.1.0"


def load(
    ref_or_path: "str | os.PathLike[str]", *, store: "str | os.PathLike[str] | None" = None, cache: bool = False
) -> "nn.Module":
    """The network of a quantized model or a checkpoint, in eval mode, its weights held as they are stored.

    Each layer computes its float32 weights while it runs and lets them go; with ``cache`` they are kept from their first use.
    Outputs are those of the float32 network to the bit. The network's ``spec`` (a ModelSpec) tells the rest about the model:
    ``predict_noise(network.spec, network)``. There are no parameters to train; ``.to(device)`` moves it.

    ``ref_or_path``: a ``model.safetensors``, the folder of an artifact, or what a store calls it: name, id, prefix, KIND/ID or
    ``latest``. Text is a path if it ends in ``.safetensors`` or has a separator elsewhere than in KIND/ID (``./folder``), as
    is any ``Path``. ``store``: by default FQDIFF_STORE, else ``fqdiff-store``; hashes are checked.
    Raises ArtifactNotFound, AmbiguousRef, or ArtifactCorrupt where a file is damaged or no model of fqdiff's.
    """
    from fqdiff.store.loading import load_model  # imports torch, which takes seconds

    return load_model(ref_or_path, store, cache)
