"""Each metric of evidence/ against an independent reference: another library, or the formula written out in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import Tensor

from fqdiff.errors import DataError
from fqdiff.evidence.extrapolation import frechet_infinity
from fqdiff.evidence.frechet import feature_statistics, frechet_distance, frechet_distance_of_features
from fqdiff.evidence.frechet_bootstrap import _by_rows, frechet_draws, resampled_moments
from fqdiff.evidence.inception_score import inception_score, inception_score_draws
from fqdiff.evidence.kernel import block_distances, kernel_distance, kernel_draws
from fqdiff.evidence.neighbours import manifold_draws, manifold_values
from fqdiff.evidence.paired import feature_distance, image_mse, psnr, ssim
from fqdiff.evidence.resampling import draw_counts, mean_draws
from fqdiff.rng import generator


def normal(n: int, d: int, label: str, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=generator(0, "metrics", label)) + shift


def drawn(x: Tensor, counts: Tensor) -> Tensor:
    return x.repeat_interleave(counts.long(), dim=0)


def test_metrics_compute_where_features_are() -> None:
    # As on CUDA, which few machines have: meta tensors hold no values, and refuse to be mixed with others. What is left to
    # refuse is the value at the end.
    a = normal(40, 7, "a").to("meta")
    for compute in (lambda: block_distances(a, a, 10), lambda: manifold_values(a, a), lambda: inception_score(a)):
        with pytest.raises(RuntimeError, match="item"):
            compute()


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_the_kernel_distance_agrees_with_clean_fid() -> None:
    from fqdiff.store.torchvision import import_torchvision

    import_torchvision()  # clean-fid imports it
    from cleanfid.fid import kernel_distance as clean_fid_distance

    a, b = normal(120, 7, "a"), normal(120, 7, "b", 0.3)
    # One subset of all images: then its random order does not matter.
    expected = clean_fid_distance(a.double().numpy(), b.double().numpy(), num_subsets=1, max_subset_size=120)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    blocks = [
        clean_fid_distance(a[i:j].double().numpy(), b[i:j].double().numpy(), 1, 40) for i, j in ((0, 40), (40, 80))
    ]
    assert block_distances(a, b, 40)[:2].tolist() == pytest.approx(blocks, rel=1e-9)


def torch_fidelity(metric: str) -> Any:
    """A module of torch-fidelity's."""
    from fqdiff.store.torchvision import import_torchvision

    import_torchvision()  # torch-fidelity imports it
    return pytest.importorskip(f"torch_fidelity.metric_{metric}", reason="torch-fidelity is not installed")


def test_the_kernel_distance_is_that_of_torch_fidelity() -> None:
    a, b = normal(60, 5, "a"), normal(60, 5, "b", 0.3)
    # One subset of all images: then its random order does not matter.
    one = {"kid_subsets": 1, "kid_subset_size": 60, "verbose": False}
    found = torch_fidelity("kid").kid_features_to_metric(a.double(), b.double(), **one)
    assert kernel_distance(a, b) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-9)


def test_fid_is_that_of_torch_fidelity() -> None:
    a, b = normal(200, 9, "a").double(), 1.4 * normal(200, 9, "b", 0.3).double()
    one, other = (torch_fidelity("fid").fid_features_to_statistics(x) for x in (a, b))
    expected = torch_fidelity("fid").fid_statistics_to_metric(one, other, verbose=False)
    assert frechet_distance_of_features(a, b) == pytest.approx(next(iter(expected.values())), rel=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    """Generated images come first there: real ones in their place would swap the two values."""
    real, fake = normal(150, 4, "real").double(), 0.7 * normal(140, 4, "fake", 0.4).double()
    for function in ("calculate_precision_recall_full", "calculate_precision_recall_part"):
        precision, recall = getattr(torch_fidelity("prc"), function)(fake, real, 3)
        assert precision != pytest.approx(recall, abs=0.05)
        assert manifold_values(real, fake)[:2] == pytest.approx((precision, recall), abs=1e-6)


def test_the_inception_score_is_that_of_torch_fidelity() -> None:
    """On the same logits, all images in one split."""
    logits = 3 * normal(200, 10, "logits")
    found = torch_fidelity("isc").isc_features_to_metric(logits, splits=1, shuffle=False)
    assert inception_score(logits.double().softmax(dim=1)) == pytest.approx(found["inception_score_mean"], rel=1e-6)


def test_sets_of_different_sizes_need_no_subsets_and_equal_distributions_have_distance_zero_on_average() -> None:
    """Rejects the biased estimate, whose mean is above 0 by 2 E k(x, x) / N."""
    g = generator(0, "kernel null")
    distances = [kernel_distance(torch.randn(30, 4, generator=g), torch.randn(45, 4, generator=g)) for _ in range(400)]
    mean, error = np.mean(distances), np.std(distances) / 20
    assert abs(mean) < 3 * error


def test_the_blocks_variance_is_that_of_their_mean() -> None:
    g = generator(0, "blocks")
    pairs = [(torch.randn(100, 3, generator=g), 1.3 * torch.randn(100, 3, generator=g)) for _ in range(100)]
    blocks = torch.stack([block_distances(a, b, 20) for a, b in pairs])
    assert float((blocks.var(dim=1) / 5).mean()) == pytest.approx(float(blocks.mean(dim=1).var()), rel=0.35)
    with pytest.raises(DataError, match="two of them"):
        block_distances(*pairs[0], 60)


def test_a_resample_of_the_kernel_distance_leaves_pairs_of_one_image_out() -> None:
    a, b = normal(25, 3, "a").double(), normal(25, 3, "b", 0.5).double()
    counts, other = draw_counts(25, 3, generator(0, "a")), draw_counts(25, 3, generator(0, "b"))
    draws = kernel_draws(a, counts, [(b, other)])

    def within(x: Tensor, w: Tensor) -> float:
        pairs = [
            (float(w[i] * w[j]), float((x[i] @ x[j] / 3 + 1) ** 3)) for i in range(25) for j in range(25) if i != j
        ]
        return sum(weight * k for weight, k in pairs) / sum(weight for weight, _ in pairs)

    for r in range(3):
        across = float(((drawn(a, counts[r]) @ drawn(b, other[r]).T / 3 + 1) ** 3).mean())
        assert float(draws[r, 0]) == pytest.approx(within(a, counts[r]) + within(b, other[r]) - 2 * across, rel=1e-9)


# --- precision, recall, density, coverage ----------------------------------------------------------------------------


def brute_force(real: np.ndarray, fake: np.ndarray) -> list[float]:
    """Kynkäänniemi et al. 2019, eq. 1 and 2 with k = 3; Naeem et al. 2020, eq. 3 and 4 with k = 5; one point at a time."""

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(x: np.ndarray, points: np.ndarray, k: int) -> int:
        return sum(np.linalg.norm(x - p) <= radius(points, i, k) for i, p in enumerate(points))

    precision = np.mean([inside(y, real, 3) > 0 for y in fake])
    recall = np.mean([inside(x, fake, 3) > 0 for x in real])
    density = np.mean([inside(y, real, 5) / 5 for y in fake])
    coverage = np.mean([min(np.linalg.norm(y - x) for y in fake) <= radius(real, i, 5) for i, x in enumerate(real)])
    return [float(v) for v in (precision, recall, density, coverage)]


def test_the_manifold_metrics_agree_with_brute_force() -> None:
    real, fake = normal(30, 3, "real"), 0.6 * normal(26, 3, "fake", 0.4)
    expected = brute_force(real.double().numpy(), fake.double().numpy())
    assert list(manifold_values(real, fake)) == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0
    assert len(set(expected)) == 4


def test_equal_sets_have_full_precision_recall_and_coverage() -> None:
    x = normal(300, 4, "x")
    precision, recall, density, coverage = manifold_values(x, x)
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    assert density == pytest.approx(6 / 5)  # each ball holds its own image and five others
    assert manifold_values(x, x + 100) == (0.0, 0.0, 0.0, 0.0)


def test_a_resample_of_the_manifolds_keeps_the_radii_and_drops_what_was_not_drawn() -> None:
    real, fake = normal(40, 2, "real").double(), normal(40, 2, "fake", 0.7).double()
    counts, other = draw_counts(40, 2, generator(0, "r")), draw_counts(40, 2, generator(0, "f"))
    found = manifold_draws(real, counts, fake, other)
    d = torch.cdist(real, fake)
    narrow, wide = (torch.cdist(real, real).sort().values[:, k, None] for k in (3, 5))
    reach = torch.cdist(fake, fake).sort().values[:, 3]
    for r in range(2):
        rows, columns = torch.arange(40).repeat_interleave(counts[r]), torch.arange(40).repeat_interleave(other[r])
        part = d[rows][:, columns]
        assert float(found.precision[r]) == pytest.approx(float((part <= narrow[rows]).any(dim=0).double().mean()))
        assert float(found.recall[r]) == pytest.approx(float((part <= reach[columns]).any(dim=1).double().mean()))
        assert float(found.density[r]) == pytest.approx(float((part <= wide[rows]).sum() / (5 * 40)))
        assert float(found.coverage[r]) == pytest.approx(float((part <= wide[rows]).any(dim=1).double().mean()))


def test_too_few_images_for_neighbours_are_an_error() -> None:
    with pytest.raises(DataError, match="5 images have no 5 neighbours"):
        manifold_values(torch.zeros(5, 2), torch.zeros(9, 2))


# --- inception score -------------------------------------------------------------------------------------------------


def test_the_inception_score_is_the_exponent_of_the_mean_divergence() -> None:
    p = torch.randn(50, 6, generator=generator(0, "scores")).softmax(dim=1)
    q = p.double().numpy()
    expected = np.exp(np.mean([sum(q[i] * np.log(q[i] / q.mean(axis=0))) for i in range(50)]))
    assert inception_score(p) == pytest.approx(expected, rel=1e-6)
    counts = draw_counts(50, 1, generator(0, "draw"))
    assert float(inception_score_draws(p, counts)) == pytest.approx(inception_score(drawn(p, counts[0])), rel=1e-9)


def test_the_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.eye(7).repeat(3, 1)) == pytest.approx(7)
    assert inception_score(torch.eye(7)[:1].repeat(9, 1)) == pytest.approx(1)
    assert inception_score(torch.full((9, 7), 1 / 7)) == pytest.approx(1)


# --- Fréchet distances of resamples ----------------------------------------------------------------------------------


def test_updated_moments_are_those_of_the_drawn_rows() -> None:
    x = normal(40, 5, "x", 1000.0)  # far from 0: sums of squares alone would lose the variance
    counts = draw_counts(40, 3, generator(0, "draw"))
    mean, covariance = resampled_moments(x, counts)
    for r in range(3):
        expected = feature_statistics(drawn(x, counts[r]))
        assert torch.allclose(mean[r], expected.mean, rtol=1e-12)
        assert torch.allclose(covariance[r], expected.covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (20, 30)])
def test_distances_of_resamples_are_those_of_the_drawn_rows(n: int, d: int) -> None:
    """By moments, and where there are more features than images row by row."""
    real, one, other = normal(n, d, "real"), normal(n, d, "one", 0.2), 1.5 * normal(n, d, "other")
    real[:, 0] = one[:, 0] = other[:, 0] = 0  # a dead feature: singular covariances
    counts = [draw_counts(n, 4, generator(0, label)) for label in ("real", "one", "other")]
    draws = frechet_draws(real, counts[0], [(one, counts[1]), (other, counts[2])])
    for r in range(4):
        drawn_real = drawn(real, counts[0][r])
        expected = [
            frechet_distance_of_features(drawn_real, drawn(x, c[r])) for x, c in ((one, counts[1]), (other, counts[2]))
        ]
        assert draws[r].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(draws, _by_rows(real, counts[0], [(one, counts[1]), (other, counts[2])]), rtol=1e-6)


def test_counts_are_those_of_drawing_with_replacement() -> None:
    counts = draw_counts(50, 400, generator(0, "draw"))
    assert counts.sum(dim=1).unique().tolist() == [50]
    assert float((counts == 0).double().mean()) == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)
    assert torch.equal(draw_counts(50, 3, generator(0, "draw")), counts[:3])
    values = normal(50, 1, "values")[:, 0]
    assert float(mean_draws(values, counts)[7]) == pytest.approx(float(drawn(values, counts[7]).mean()), rel=1e-6)


def test_extrapolation_takes_the_bias_away() -> None:
    """Equal Gaussians: the distance is 0, but that of 400 images is not."""
    real, fakes = normal(40_000, 8, "many"), [normal(400, 8, f"few {k}") for k in range(8)]
    plain = [frechet_distance(feature_statistics(real), feature_statistics(x)) for x in fakes]
    found = [frechet_infinity(real, x, generator(0, "subsets", k)) for k, x in enumerate(fakes)]
    assert abs(np.mean(found)) < 0.35 * np.mean(plain)
    with pytest.raises(DataError, match="more than five times"):
        frechet_infinity(real, fakes[0][:30], generator(0, "subsets"))


# --- paired metrics --------------------------------------------------------------------------------------------------


def pictures(label: str, n: int = 3, channels: int = 1, side: int = 20) -> Tensor:
    return torch.randint(
        0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator(0, "pictures", label)
    )


def test_ssim_is_that_of_wang_and_others() -> None:
    """Written out with numpy and scipy: an 11 x 11 Gaussian window where it fits, C1 = (0.01 L)^2, C2 = (0.03 L)^2."""
    a = pictures("a", channels=3)
    b = (0.7 * a.float() + 0.3 * pictures("b", channels=3).float()).to(torch.uint8)
    grid = np.mgrid[-5:6, -5:6]
    window = np.exp(-(grid**2).sum(axis=0) / (2 * 1.5**2))
    window /= window.sum()

    def mean(z: np.ndarray) -> np.ndarray:
        return convolve2d(z, window, mode="valid")

    for k, value in enumerate(ssim(a, b)):
        per_channel = []
        for x, y in zip(a[k].double().numpy(), b[k].double().numpy(), strict=True):
            mx, my = mean(x), mean(y)
            vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            per_channel.append(np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))
        assert float(value) == pytest.approx(np.mean(per_channel), rel=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 3)


def test_ssim_of_small_images_takes_the_largest_window_that_fits() -> None:
    a, b = pictures("a", side=8), pictures("b", side=8)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 3)
    assert float(ssim(a, b).abs().max()) < 0.8
    assert torch.allclose(ssim(a, b), ssim(b, a))


def test_image_error_and_psnr_are_those_of_paper() -> None:
    black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    grey = black.clone()
    grey[0] = 51  # 0.4 in units of [-1, 1]: a fifth of the range
    assert image_mse(black, grey).tolist() == pytest.approx([0.16, 0.0])
    decibel = psnr(black, grey)
    assert float(decibel[0]) == pytest.approx(20 * np.log10(5), rel=1e-6)
    one_level = black.clone()
    one_level[1, 0, 2, 2] = 1
    assert float(decibel[1]) == pytest.approx(float(psnr(black, one_level)[1]), rel=1e-6)


def test_the_feature_distance_is_euclidean() -> None:
    assert feature_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).tolist() == [5.0]
