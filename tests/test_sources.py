"""Where images come from: files that are right, wrong, missing or hostile."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fqdiff.configs import DatasetConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError
from fqdiff.store import sources
from fqdiff.store.codecs import CODECS
from fqdiff.store.sources import dataset_config, default_dataset, image_channels, load_dataset, open_source, parse_idx
from fqdiff.store.torchvision import import_torchvision
from fqdiff.values import Dataset
from tests.attacker import little_memory
from tests.test_store import same

TRAIN, TEST = 7, 3


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


def idx(values: np.ndarray) -> bytes:
    """``values`` as an IDX file."""
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return b"\0\0\x08" + bytes([values.ndim]) + sizes + values.tobytes()


def mnist_files(train: int = TRAIN, test: int = TEST) -> dict[str, bytes]:
    return {
        f"{part}-{what}": idx(random_bytes(n, *shape) % 10 if not shape else random_bytes(n, *shape))
        for part, n in (("train", train), ("t10k", test))
        for what, shape in (("images-idx3-ubyte", (28, 28)), ("labels-idx1-ubyte", ()))
    }


def put_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FQDIFF_DATA on a machine without a network."""

    def offline() -> None:
        raise OSError("no network")

    monkeypatch.setenv("FQDIFF_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sources, "import_torchvision", offline)
    return tmp_path / "data"


def dataset(name: str, size: int = 32) -> Dataset:
    return load_dataset(dataset_config(name, size), 0, Context())


@pytest.fixture(scope="module")
def mnist5k() -> Dataset:
    return dataset("mnist5k")


# --- IDX files -------------------------------------------------------------------------------------------------------


def test_idx_files_give_their_values() -> None:
    values = random_bytes(3, 4, 5)
    assert torch.equal(parse_idx(idx(values), "x"), torch.from_numpy(values))


GOOD = idx(random_bytes(3, 4, 5))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x0d" + GOOD[3:],  # floats
        b"\x01" + GOOD[1:],
        b"\0\0\x08\0",
        b"\0\0\x08\x09" + GOOD[4:],
        GOOD[:10],
        GOOD[:16],
        GOOD[:-1],
        GOOD + b"\0",
        b"\0\0\x08\x03" + b"\xff" * 12,
        b"\x1f\x8b" + GOOD,
        b"<html>404</html>",
    ],
)
def test_idx_files_with_bad_magic_or_size_are_refused_by_name(content: bytes) -> None:
    with pytest.raises(DataError, match="train-images"):
        parse_idx(content, "train-images")


def test_mnist_is_read_from_fqdiff_data(data: Path) -> None:
    files = mnist_files()
    put_files(data / "MNIST" / "raw", files)
    value = dataset("mnist", 28)
    assert torch.equal(value.train[:, 0], parse_idx(files["train-images-idx3-ubyte"], ""))
    assert torch.equal(value.reference[:, 0], parse_idx(files["t10k-images-idx3-ubyte"], ""))
    assert value.labels is not None
    assert torch.equal(value.labels[TRAIN:], parse_idx(files["t10k-labels-idx1-ubyte"], "").long())


def test_fashion_mnist_has_a_folder_of_its_own(data: Path) -> None:
    put_files(data / "FashionMNIST" / "raw", mnist_files())
    assert len(dataset("fashion-mnist").images) == TRAIN + TEST


def test_gzipped_and_raw_files_of_either_spelling_give_one_data_set_and_fingerprint(data: Path) -> None:
    raw = put_files(data / "MNIST" / "raw", mnist_files())
    first, config = dataset("mnist"), dataset_config("mnist", 32)
    for name, content in mnist_files().items():
        (raw / name).unlink()
        (raw / f"{name.replace('-idx', '.idx')}.gz").write_bytes(gzip.compress(content))
    assert dataset_config("mnist", 32) == config
    assert same(dataset("mnist"), first)


@pytest.mark.parametrize(
    "damage",
    [
        {"train-images-idx3-ubyte": GOOD},
        {"train-images-idx3-ubyte": mnist_files()["train-labels-idx1-ubyte"]},
        {"train-labels-idx1-ubyte": mnist_files()["train-images-idx3-ubyte"]},
        {"t10k-labels-idx1-ubyte": mnist_files()["train-labels-idx1-ubyte"]},
        {"t10k-images-idx3-ubyte": idx(random_bytes(3, 32, 32))},
        mnist_files(train=0),
    ],
)
def test_idx_files_that_do_not_belong_together_are_refused(damage: dict[str, bytes], data: Path) -> None:
    put_files(data / "MNIST" / "raw", mnist_files() | damage)
    with pytest.raises(DataError, match="MNIST"):
        dataset("mnist")


@pytest.mark.parametrize("cut", [slice(0, 15), slice(0, -9), slice(0, 0)])
def test_a_broken_gzip_file_is_named(cut: slice, data: Path) -> None:
    raw = put_files(data / "MNIST" / "raw", mnist_files())
    packed = gzip.compress((raw / "train-images-idx3-ubyte").read_bytes())
    (raw / "train-images-idx3-ubyte").unlink()
    (raw / "train-images-idx3-ubyte.gz").write_bytes(packed[cut])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        dataset("mnist")
    (raw / "train-images-idx3-ubyte.gz").write_bytes(packed[:100] + bytes(100) + packed[200:])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        dataset("mnist")


def test_a_gzip_bomb_is_refused_without_memory(data: Path) -> None:
    raw = put_files(data / "MNIST" / "raw", mnist_files())
    (raw / "train-images-idx3-ubyte").unlink()
    with gzip.open(raw / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(bytes(2**20))
    with little_memory(200 * 2**20), pytest.raises(DataError, match="holds more than"):
        dataset("mnist")


def test_files_that_change_after_the_recipe_was_made_are_refused(data: Path) -> None:
    raw = put_files(data / "MNIST" / "raw", mnist_files())
    config = dataset_config("mnist", 32)
    put_files(raw, {"t10k-labels-idx1-ubyte": idx(np.zeros(TEST, np.uint8))})
    with pytest.raises(DataError, match="changed"):
        load_dataset(config, 0, Context())


# --- what is missing -------------------------------------------------------------------------------------------------


def test_missing_mnist_names_folder_variable_and_the_way_without_a_network(data: Path) -> None:
    with pytest.raises(DataError) as error:
        dataset_config("mnist", 32)
    for part in (str(data / "MNIST" / "raw"), "FQDIFF_DATA", "mnist5k", "no network"):
        assert part in str(error.value)


def test_missing_cifar_says_so(data: Path) -> None:
    with pytest.raises(DataError, match="cifar10"):
        dataset_config("cifar10", 32)


def test_without_mnist_the_default_is_mnist5k_and_its_line_says_why(data: Path) -> None:
    config, line = default_dataset(32)
    assert config.name == "mnist5k"
    assert "mnist5k" in line
    assert "no network" in line


def test_with_mnist_the_default_is_mnist(data: Path) -> None:
    put_files(data / "MNIST" / "raw", mnist_files())
    config, line = default_dataset(32)
    assert (config.name, str(data) in line) == ("mnist", True)


@pytest.mark.parametrize("name", ["imagenet", "", "MNIST", "folder"])
def test_an_unknown_data_set_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="mnist5k"):
        open_source(name)


def test_torchvision_and_its_data_sets_import_here() -> None:
    module = import_torchvision()
    assert callable(module.datasets.MNIST)
    assert callable(module.datasets.utils.download_url)


# --- splits and sizes ------------------------------------------------------------------------------------------------


def test_mnist5k_has_5000_images_4000_to_train_and_1000_held_out(mnist5k: Dataset) -> None:
    assert mnist5k.images.shape == (5000, 1, 32, 32)
    assert (len(mnist5k.train), len(mnist5k.reference)) == (4000, 1000)
    assert mnist5k.labels is not None
    assert mnist5k.labels.bincount().tolist() == [500] * 10


@pytest.mark.parametrize("name", ["mnist5k", "mnist", "folder"])
def test_training_and_held_out_images_never_overlap_and_are_all(name: str, data: Path, mnist5k: Dataset) -> None:
    put_files(data / "MNIST" / "raw", mnist_files())
    pictures = [Image.fromarray(random_bytes(8 + i, 9)) for i in range(20)]
    values = {
        "mnist5k": lambda: mnist5k,
        "mnist": lambda: dataset("mnist"),
        "folder": lambda: dataset(put_pictures(data / "pictures", {f"{i}.png": p for i, p in enumerate(pictures)})),
    }
    value = values[name]()
    train, held_out = ({image.numpy().tobytes() for image in images} for images in (value.train, value.reference))
    assert train
    assert held_out
    assert not train & held_out
    assert len(value.train) + len(value.reference) == len(value.images)


def test_mnist15k_adds_test_digits_and_holds_out_the_same_images_of_mnist5k(data: Path, mnist5k: Dataset) -> None:
    put_files(data / "MNIST" / "raw", {k: v for k, v in mnist_files().items() if k.startswith("t10k")})
    joined = dataset("mnist15k")
    assert torch.equal(joined.images[:5000], mnist5k.images)
    assert torch.equal(joined.held_out[:5000], mnist5k.held_out)
    more = len(joined.images) - 5000
    assert 0 < int(joined.held_out[5000:].sum()) == round(0.4 * more) < more


def test_the_split_does_not_change_with_the_seed_or_size(mnist5k: Dataset) -> None:
    other = load_dataset(dataset_config("mnist5k", 16), 7, Context())
    assert torch.equal(other.held_out, mnist5k.held_out)


def test_size_32_only_pads(data: Path) -> None:
    put_files(data / "MNIST" / "raw", mnist_files())
    large, original = dataset("mnist", 32).images, dataset("mnist", 28).images
    assert torch.equal(large[:, :, 2:30, 2:30], original)
    assert large.sum() == original.sum()


def test_size_16_averages_areas_of_two_by_two(data: Path) -> None:
    put_files(data / "MNIST" / "raw", mnist_files())
    small, large = dataset("mnist", 16).images, dataset("mnist", 32).images
    means = large.float().unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert small.shape == (TRAIN + TEST, 1, 16, 16)
    assert torch.equal(small, means.round().to(torch.uint8))


@pytest.mark.parametrize("size", [28, 32, 16])
def test_every_size_can_be_stored(size: int, data: Path, tmp_path: Path) -> None:
    put_files(data / "MNIST" / "raw", mnist_files())
    put_files(data / "CIFAR10", {"cifar-10-binary.tar.gz": cifar()})
    for name in ("mnist", "cifar10", "mnist5k"):
        value = dataset(name, size)
        CODECS["dataset"].save(value, tmp_path)
        assert same(CODECS["dataset"].load(tmp_path), value)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def cifar(batches: int = 5, change: Callable[[bytes], bytes] = lambda content: content) -> bytes:
    """The binary release with two images in each batch; record k is its label k and bytes k."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        names = [*(f"data_batch_{k}.bin" for k in range(1, batches + 1)), "test_batch.bin"]
        for number, name in enumerate(names):
            records = [bytes([2 * number + i]) + random_bytes(3, 32, 32).tobytes() for i in (0, 1)]
            content = change(b"".join(records))
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar_is_read_from_its_binary_release(data: Path) -> None:
    put_files(data / "CIFAR10", {"cifar-10-binary.tar.gz": cifar()})
    value = dataset("cifar10", 32)
    assert torch.equal(value.images, torch.from_numpy(random_bytes(3, 32, 32)).expand(12, 3, 32, 32))
    assert value.labels is not None
    assert value.labels.tolist() == list(range(12))
    assert value.held_out.tolist() == [False] * 10 + [True] * 2


@pytest.mark.parametrize(
    "content",
    [b"", b"no tar", cifar()[:2000], cifar(batches=4), cifar(change=lambda c: c[:-1]), cifar(change=lambda c: b"")],
    ids=["empty", "no tar", "truncated", "a batch missing", "short batches", "empty batches"],
)
def test_a_broken_cifar_archive_is_an_error_that_says_what_to_remove(content: bytes, data: Path) -> None:
    put_files(data / "CIFAR10", {"cifar-10-binary.tar.gz": content})
    with pytest.raises(DataError) as error:
        dataset("cifar10", 32)
    assert "remove" in error.value.hint


# --- folders ---------------------------------------------------------------------------------------------------------


def put_pictures(folder: Path, pictures: dict[str, Image.Image]) -> str:
    """The name of a data set of ``pictures``."""
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    return f"folder:{folder}"


def picture(mode: str) -> Image.Image:
    return Image.fromarray(random_bytes(8, 8, 3)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1), ("LA", 2), ("CMYK", 3)]
)
def test_images_of_one_mode_load_with_its_channels(mode: str, channels: int, tmp_path: Path) -> None:
    ending = "tif" if mode == "CMYK" else "png"
    name = put_pictures(tmp_path / "x", {f"{i}.{ending}": picture(mode) for i in range(3)})
    value = dataset(name, 8)
    assert value.images.shape == (3, channels, 8, 8)
    assert image_channels(dataset_config(name, 8)) == channels
    if mode in ("L", "RGB", "RGBA"):
        expected = torch.from_numpy(np.array(picture(mode))).reshape(8, 8, channels).permute(2, 0, 1)
        assert torch.equal(value.images[0], expected)


def test_images_are_taken_from_subfolders_in_order_and_cut_to_their_central_square(tmp_path: Path) -> None:
    wide, tall = random_bytes(8, 12), random_bytes(10, 8)
    name = put_pictures(tmp_path / "x", {"b.PNG": Image.fromarray(tall), "a/1.png": Image.fromarray(wide)})
    (tmp_path / "x" / "notes.txt").write_text("no image")
    value = dataset(name, 8)
    assert torch.equal(value.images[:, 0], torch.from_numpy(np.stack([wide[:, 2:10], tall[1:9]])))


def test_mixed_channels_are_an_error_that_names_the_odd_file(tmp_path: Path) -> None:
    name = put_pictures(tmp_path / "x", {"a.png": picture("RGB"), "b.png": picture("L"), "c.png": picture("RGB")})
    with pytest.raises(DataError, match=r"b\.png"):
        dataset(name, 8)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    name = put_pictures(tmp_path / "x", {"a.png": deep, "b.png": deep})
    with pytest.raises(DataError, match=r"a\.png .*I;16"):
        dataset(name, 8)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_a_corrupt_image_is_named(ending: str, tmp_path: Path) -> None:
    name = put_pictures(tmp_path / "x", {f"{c}.{ending}": picture("RGB").resize((64, 64)) for c in "abc"})
    path = tmp_path / "x" / f"b.{ending}"
    good = path.read_bytes()
    for content in (b"", b"no image", good[: len(good) // 2], good[:40] + bytes(len(good) - 80) + good[-40:]):
        path.write_bytes(content)
        try:
            value = dataset(name, 8)
        except DataError as error:
            assert f"b.{ending}" in error.message  # noqa: PT017 (some decoders repair some damage)
        else:
            assert value.images.shape == (3, 3, 8, 8)
            assert content not in (b"", b"no image")


def test_any_damage_to_an_image_is_a_named_error_or_none(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    name = put_pictures(tmp_path / "x", {"a.png": picture("RGB"), "b.png": picture("P")})
    path = tmp_path / "x" / "b.png"
    good = path.read_bytes()
    for _ in range(300):
        content = bytearray(good)
        content[draw.integers(len(good))] = draw.integers(256)
        path.write_bytes(content)
        try:
            dataset(name, 8)
        except DataError as error:
            assert "b.png" in error.message  # noqa: PT017 (no error is fine too)


def test_an_image_that_would_unpack_to_gigabytes_is_refused(tmp_path: Path) -> None:
    name = put_pictures(tmp_path / "x", {"a.png": picture("L"), "b.png": Image.new("1", (20_000, 20_000))})
    assert (tmp_path / "x" / "b.png").stat().st_size < 2**20
    with little_memory(), pytest.raises(DataError, match=r"b\.png"):
        dataset(name, 8)


@pytest.mark.parametrize("files", [{}, {"one.png": picture("L")}], ids=["empty", "one image"])
def test_a_folder_with_too_few_images_is_refused(files: dict[str, Image.Image], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=f"{len(files)} images under"):
        dataset(put_pictures(tmp_path / "x", files), 8)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        dataset(f"folder:{tmp_path / 'none'}", 8)


def test_the_fingerprint_of_a_folder_covers_names_and_pixels(tmp_path: Path) -> None:
    def fingerprint() -> DatasetConfig:
        return dataset_config(name, 8)

    name = put_pictures(tmp_path / "x", {"a.png": picture("L"), "b.png": picture("L")})
    first = fingerprint()
    (tmp_path / "x" / "a.png").rename(tmp_path / "x" / "c.png")
    renamed = fingerprint()
    put_pictures(tmp_path / "x", {"c.png": Image.new("L", (8, 8))})
    assert len({first.content, renamed.content, fingerprint().content}) == 3


def test_paths_that_are_no_utf_8_are_no_obstacle(tmp_path: Path) -> None:
    name = put_pictures(tmp_path / "x\udcff", {"a.png": picture("L"), "b\udcff.png": picture("L")})
    value = dataset(name, 8)
    CODECS["dataset"].save(value, tmp_path)
    assert same(CODECS["dataset"].load(tmp_path), value)
    assert len(value.images) == 2
