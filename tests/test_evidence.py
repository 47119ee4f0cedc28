import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fqdiff.configs import ClassifierConfig, CompareConfig, FidConfig, PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError, LineageError, NumericalError
from fqdiff.evidence.digits import moved
from fqdiff.evidence.features import FeatureNetwork, as_rgb, inception_features, to_uint8, to_unit_range
from fqdiff.evidence.frechet import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    frechet_distance_of_features,
)
from fqdiff.evidence.kernel import kernel_distance
from fqdiff.rng import generator
from fqdiff.stages.classifier import classifier
from fqdiff.stages.compare import compare
from fqdiff.stages.fid import fid
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import sample
from fqdiff.store.inception import load_inception
from fqdiff.values import Checkpoint, Dataset, FidResult, SampleSet
from fqdiff.viz.grids import image_grid, labelled_rows

PIXELS = FeatureNetwork("pixels", "0" * 64, lambda images: images.float().flatten(1)[:, ::7])


# --- distance --------------------------------------------------------------------------------------------------------


def test_the_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    shift = torch.arange(5, dtype=torch.float64)
    a = FeatureStatistics(torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64), 10)
    b = FeatureStatistics(shift, torch.eye(5, dtype=torch.float64), 10)
    assert frechet_distance(a, b) == pytest.approx(30.0, rel=1e-12)


def test_the_distance_of_scaled_gaussians_is_known_on_paper() -> None:
    a = FeatureStatistics(torch.zeros(3, dtype=torch.float64), 4 * torch.eye(3, dtype=torch.float64), 10)
    b = FeatureStatistics(torch.zeros(3, dtype=torch.float64), 9 * torch.eye(3, dtype=torch.float64), 10)
    assert frechet_distance(a, b) == pytest.approx(3 * (3 - 2) ** 2, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(500, 20), (300, 84), (30, 64)])
def test_the_distance_agrees_with_clean_fid(n: int, d: int) -> None:
    """Also where the covariance is singular (n < d)."""
    from fqdiff.store.torchvision import import_torchvision

    import_torchvision()  # clean-fid imports it
    from cleanfid.fid import fid_from_feats

    g = generator(0, "features", n, d)
    a = torch.randn(n, d, generator=g).double() @ torch.randn(d, d, generator=g).double()
    b = torch.randn(n, d, generator=g).double() * 2 + 1
    ours = frechet_distance(feature_statistics(a), feature_statistics(b))
    assert ours == pytest.approx(float(fid_from_feats(a.numpy(), b.numpy())), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 64), (30, 20, 25), (50, 50, 10)])
def test_both_forms_of_the_distance_agree(n: int, m: int, d: int) -> None:
    g = generator(0, "forms", n)
    a, b = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g) + 1
    expected = frechet_distance(feature_statistics(a), feature_statistics(b))
    assert frechet_distance_of_features(a, b) == pytest.approx(expected, rel=1e-6)


def test_dead_features_and_equal_sets_are_no_trouble() -> None:
    a = torch.randn(50, 10)
    a[:, 3] = 0
    statistics = feature_statistics(a)
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-9)


def test_features_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NumericalError):
        feature_statistics(torch.tensor([[1.0], [float("inf")]]))


# --- images and features ---------------------------------------------------------------------------------------------


def test_the_range_is_mapped_alike_for_every_image() -> None:
    """A stretch per image would map this image's 0.5 to 1."""
    image = torch.full((1, 1, 2, 2), 0.5)
    assert to_uint8(image).unique().tolist() == [191]
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)
    assert to_uint8(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]


def test_grey_becomes_rgb_and_four_channels_are_refused() -> None:
    assert as_rgb(torch.zeros(2, 1, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(DataError, match="4 image channels"):
        as_rgb(torch.zeros(2, 4, 4, 4))


class StandIn(nn.Module):
    """TorchScript with the interface of NVIDIA's 2015 Inception: ``layers`` on images scaled to [-1, 1)."""

    class Layers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x, (32, 64)).mean(dim=1).flatten(1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = StandIn.Layers()
        self.output = nn.Linear(2048, 1008)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return self.layers(x)


def test_inception_features_go_through_clean_fids_loader_and_resize(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.jit.script(StandIn()).save(str(path))
    network = load_inception(path)
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    features = network.extract(images)
    assert (network.name, features.shape, len(network.sha256)) == ("inception-clean", (3, 2048), 64)
    bicubic = Image.fromarray(images[1, 0].numpy().astype(np.float32), mode="F").resize(
        (299, 299), Image.Resampling.BICUBIC
    )
    pixels = torch.from_numpy(np.asarray(bicubic).clip(0, 255).copy())[None, None].expand(1, 3, -1, -1)
    assert torch.allclose(features[1], StandIn.Layers()((pixels - 128) / 128)[0], atol=1e-5)


def test_the_inception_score_is_of_the_last_layer_without_its_bias(tmp_path: Path) -> None:
    """As Salimans et al. made it; a network without that layer has none."""
    stand_in = StandIn()
    torch.jit.script(stand_in).save(str(tmp_path / "weights.pt"))
    network = load_inception(tmp_path / "weights.pt")
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    assert network.probabilities is not None
    features = network.extract(images)
    expected = (features.double() @ stand_in.output.weight.double().detach().T).softmax(dim=1)
    assert torch.allclose(network.probabilities(images, features).double(), expected, atol=1e-6)
    del stand_in.output
    torch.jit.script(stand_in).save(str(tmp_path / "headless.pt"))
    assert load_inception(tmp_path / "headless.pt").probabilities is None


def test_inception_sees_pixels_from_0_to_255() -> None:
    seen = []
    inception_features(lambda x: seen.append(x) or x.flatten(1), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    assert (float(seen[0].min()), float(seen[0].max()), seen[0].shape) == (255.0, 255.0, (1, 3, 299, 299))


def test_missing_and_wrong_inception_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Inception weights at"):
        load_inception(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(DataError, match="is not clean-fid's Inception"):
        load_inception(tmp_path / "text.pt")


def test_images_are_moved_no_further_than_asked() -> None:
    images = torch.zeros(200, 1, 32, 32) - 1
    images[:, :, 14:18, 14:18] = 1
    draw = torch.Generator().manual_seed(0)
    assert torch.allclose(moved(images, 0.0, 0.0, 0.0, draw), images, atol=1e-5)
    light = moved(images, 0.125, 0.0, 0.0, draw) + 1
    place = torch.arange(32) + 0.5
    down = (light.sum(dim=(1, 3)) * place).sum(dim=1) / light.sum(dim=(1, 2, 3)) - 16
    across = (light.sum(dim=(1, 2)) * place).sum(dim=1) / light.sum(dim=(1, 2, 3)) - 16
    for shift in (down, across):
        assert 3 < float(shift.abs().max()) <= 4.01
        assert abs(float(shift.mean())) < 0.6
    assert not torch.allclose(down, across, atol=0.5)
    larger = moved(images, 0.0, 0.0, 0.5, draw).add(1).sum(dim=(1, 2, 3)) / 32
    assert float(larger.min()) < 0.6
    assert float(larger.max()) > 2
    assert torch.allclose(
        moved(images, 0.0, 180.0, 0.0, draw).add(1).sum(dim=(1, 2, 3)) / 32, torch.ones(200), atol=0.1
    )


def test_the_classifier_learns_and_is_deterministic(dataset: Dataset) -> None:
    bright = torch.arange(60)[:, None, None, None] % 3 * 100 + torch.randint(0, 50, (60, 1, 8, 8))
    easy = Dataset("easy", bright.to(torch.uint8), dataset.labels, dataset.held_out)
    first, second = (classifier(easy, ClassifierConfig(epochs=30, batch_size=10), 0, Context()) for _ in range(2))
    assert first.accuracy == 1.0
    assert first.feature_network().sha256 == second.feature_network().sha256
    assert first.feature_network().extract(easy.images).shape == (60, 84)
    assert (
        first.feature_network().sha256
        != classifier(easy, ClassifierConfig(epochs=1), 0, Context()).feature_network().sha256
    )


def test_a_data_set_without_labels_has_no_digits_features(dataset: Dataset) -> None:
    unlabelled = Dataset("plain", dataset.images, None, dataset.held_out)
    with pytest.raises(DataError, match="no labels"):
        classifier(unlabelled, ClassifierConfig(), 0, Context())


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [SampleConfig(steps=4, count=11), SampleConfig(steps=4, eta=0.7, count=11), SampleConfig("ddpm", 30, count=11)],
)
def test_image_k_is_the_same_at_any_batch_size(checkpoint: Checkpoint, config: SampleConfig) -> None:
    sets = [sample(checkpoint, config, 3, Context(batch_size=b)).images for b in (1, 4, 100)]
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], sets[2])


def test_a_longer_run_starts_with_the_same_images(checkpoint: Checkpoint) -> None:
    short = sample(checkpoint, SampleConfig(steps=4, count=5), 0, Context()).images
    long = sample(checkpoint, SampleConfig(steps=4, count=9), 0, Context()).images
    assert torch.equal(short, long[:5])
    assert not torch.equal(long[0], long[1])


def test_another_seed_gives_other_images(checkpoint: Checkpoint) -> None:
    one, other = (sample(checkpoint, SampleConfig(steps=4, count=3), seed, Context()).images for seed in (0, 1))
    assert not torch.equal(one, other)


def test_a_quantized_model_is_sampled_from_its_packed_tensors_alone(checkpoint: Checkpoint) -> None:
    """Poison: with NaN in every full-precision weight, sampling the packed model still gives the same images."""
    weights = {name: t.clone() for name, t in checkpoint.tensors.items()}
    source = Checkpoint(checkpoint.spec, weights, checkpoint.loss, checkpoint.preview)
    low = plan(source, None, None, PlanConfig("uniform", low="int4"), 0, Context())
    packed = quantize(source, low, None, QuantizeConfig(), 0, Context())
    before = sample(packed, SampleConfig(steps=4, count=4), 0, Context()).images
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    assert torch.equal(sample(packed, SampleConfig(steps=4, count=4), 0, Context()).images, before)
    assert not torch.equal(sample(checkpoint, SampleConfig(steps=4, count=4), 0, Context()).images, before)
    with pytest.raises(NumericalError, match="NaN"):
        sample(source, SampleConfig(steps=4, count=4), 0, Context())


def test_a_float32_plan_changes_no_pixel(checkpoint: Checkpoint) -> None:
    same = quantize(
        checkpoint,
        plan(checkpoint, None, None, PlanConfig("uniform", low="float32"), 0, Context()),
        None,
        QuantizeConfig(),
        0,
        Context(),
    )
    config = SampleConfig(steps=4, count=4)
    assert torch.equal(sample(same, config, 0, Context()).images, sample(checkpoint, config, 0, Context()).images)


# --- fid -------------------------------------------------------------------------------------------------------------


def run_fid(samples: SampleSet, dataset: Dataset, baseline: SampleSet | None = None, **config: int) -> FidResult:
    return fid(samples, dataset, PIXELS, baseline, FidConfig(resamples=20, **config), 0, Context())


def test_fid_takes_equal_numbers_of_held_out_images(dataset: Dataset) -> None:
    samples = SampleSet(dataset.train.clone(), 4)
    result = run_fid(samples, dataset)
    expected = frechet_distance(
        feature_statistics(PIXELS.extract(dataset.reference[:20])),
        feature_statistics(PIXELS.extract(dataset.train[:20])),
    )
    assert (result.n, result.seed, result.features) == (20, 4, "pixels")
    assert result.fid == pytest.approx(expected, rel=1e-9)
    assert result.reference == "noise, 20 of 20 held-out images"


def test_the_reference_itself_has_distance_zero_and_no_difference(dataset: Dataset) -> None:
    samples = SampleSet(dataset.reference.clone(), 0)
    result = run_fid(samples, dataset, baseline=samples)
    assert result.fid == pytest.approx(0.0, abs=1e-6)
    assert (result.difference, result.interval, result.image_error) == (0.0, (0.0, 0.0), 0.0)
    assert {m.metric for m in result.measures} == {"fid", "kid", "precision", "recall", "density", "coverage"}


def test_judging_one_model_and_comparing_two_say_the_same(dataset: Dataset) -> None:
    """Rejects resamples or intervals of fid's own: every value and interval is the one of a comparison, to the bit."""
    base = SampleSet(dataset.train[:20].clone(), 3)
    model = SampleSet((base.images * 0.7).to(torch.uint8), 3)
    alone = fid(model, dataset, PIXELS, base, FidConfig(resamples=40), 5, Context())
    both = compare(dataset, PIXELS, base, None, [model], [], CompareConfig(resamples=40), 5, Context())
    assert {(m.metric, m.of): m for m in alone.measures} == {
        (m.metric, m.of): m for m in both.measures if m.metric not in ("image_mse", "psnr", "ssim", "feature_distance")
    }
    pair = both.pair("fid", "model1", "baseline")
    assert (alone.difference, alone.interval) == (pair.difference, (pair.low, pair.high))
    assert alone.image_error == pytest.approx(both.measure("image_mse", "model1").value, rel=1e-5)
    assert alone.measure("fid").low < alone.fid < alone.measure("fid").high
    assert alone.fid_infinity is None  # 20 images are too few to extrapolate from


def test_fid_is_extrapolated_where_there_are_enough_images() -> None:
    images = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=generator(0, "many"))
    many = Dataset("many", images, None, torch.arange(300) >= 150)
    result = run_fid(SampleSet(images[:150], 0), many)
    assert result.fid_infinity is not None
    assert result.fid_infinity < result.fid


def test_the_image_error_is_taken_between_images_of_the_same_noise(dataset: Dataset) -> None:
    black, grey = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    grey[:10] = 51  # 0.4 in units of [-1, 1]
    result = run_fid(SampleSet(grey, 0), dataset, baseline=SampleSet(black, 0))
    assert result.image_error == pytest.approx(0.08, rel=1e-5)


def test_a_part_of_the_reference_is_drawn_at_random_and_always_the_same(dataset: Dataset) -> None:
    """Sources sorted by label: the first half of the held-out images would be half of the classes."""
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(-1, 1, 8, 8)
    ordered = Dataset("ordered", images, None, dataset.held_out)
    one, other = (run_fid(SampleSet(images[:10].clone(), seed), ordered) for seed in (0, 1))
    assert one.reference == "ordered, 10 of 20 held-out images"
    assert one.reference_mean == other.reference_mean
    assert one.reference_mean != pytest.approx(float(images[40:50].double().mean()) / 127.5 - 1, abs=1e-3)


def test_more_images_than_there_are_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="21 images asked for; there are 40 samples and 20 held-out"):
        run_fid(SampleSet(dataset.train, 0), dataset, count=21)


def test_a_baseline_of_another_seed_is_resampled_apart_as_the_noise_floor_of_a_comparison(dataset: Dataset) -> None:
    """Rejects pairing what shares no noise: of equal images the interval would be nothing."""
    base, other = SampleSet(dataset.train[:20].clone(), 3), SampleSet(dataset.train[:20].clone(), 4)
    found = run_fid(base, dataset, baseline=other)
    compared = compare(dataset, PIXELS, base, other, [base], [], CompareConfig(resamples=20), 0, Context())
    floor = compared.pair("fid", "floor", "baseline")
    assert found.interval is not None
    assert (found.difference, found.image_error) == (0.0, None)
    assert found.interval == pytest.approx((floor.low, floor.high))
    assert found.interval[1] > 0


def test_a_baseline_of_too_few_images_is_refused(dataset: Dataset) -> None:
    with pytest.raises(LineageError, match="a baseline of 19 images for 20 samples"):
        run_fid(SampleSet(dataset.train, 0), dataset, baseline=SampleSet(dataset.train[:19], 0))


def test_kid_over_blocks_is_their_mean_with_students_interval(dataset: Dataset) -> None:
    """By hand, and the same for a comparison; the real images are mixed, whatever their order."""
    samples = SampleSet(dataset.train[:20].clone(), 0)
    (found,) = run_fid(samples, dataset).kid_blocks
    mixed = PIXELS.extract(dataset.reference)[torch.randperm(20, generator=generator(0, "blocks"))]
    ours = PIXELS.extract(samples.images)
    blocks = np.array([kernel_distance(mixed[k : k + 2], ours[k : k + 2]) for k in range(0, 20, 2)])
    error = blocks.std(ddof=1) / 10**0.5
    assert (found.metric, found.of, found.value) == ("kid_blocks", "model1", pytest.approx(blocks.mean()))
    assert found.standard_error == pytest.approx(error)
    assert found.high - found.value == pytest.approx(2.262157 * error, rel=1e-6)
    compared = compare(dataset, PIXELS, samples, None, [samples], [], CompareConfig(resamples=20), 0, Context())
    assert [(m.of, m.value) for m in compared.kid_blocks] == [("baseline", found.value), ("model1", found.value)]


def test_images_of_another_shape_are_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="samples of shape"):
        run_fid(SampleSet(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), 0), dataset)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_grid_shows_every_pixel_in_its_place() -> None:
    images = torch.arange(6 * 4, dtype=torch.uint8).view(6, 1, 2, 2)
    grid = np.asarray(image_grid(images, columns=3, scale=1))
    assert grid.shape == (2 * 3 + 1, 3 * 3 + 1)
    assert np.array_equal(grid[4:6, 7:9], images[5, 0].numpy())
    assert np.asarray(image_grid(images.expand(-1, 3, -1, -1), 3, 2)).shape == (14, 20, 3)


def test_labelled_rows_stack_under_their_labels() -> None:
    picture = labelled_rows(
        [("one", torch.zeros(4, 1, 8, 8, dtype=torch.uint8)), ("two", torch.zeros(4, 3, 8, 8, dtype=torch.uint8))]
    )
    assert picture.width == 3 * (4 * 9 + 1)
    assert picture.height == 2 * (24 + 3 * 10)


def test_no_stage_imports_matplotlibs_window_system() -> None:
    assert "matplotlib.pyplot" not in sys.modules
