"""metrics.py against torchmetrics, scipy, closed forms, brute force, and images of known quality.

The peers measure other features (Inception's); here they are given this network's, in float64.
"""

import json
import math

from lab.classifier import WEIGHTS, LeNet, features
from lab.errors import UserError

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import ROOT, assert_refused
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import metrics

DATA = str(ROOT / "data")
N = 500


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, cov, n, seed):
    """n points whose sample mean and covariance are these to rounding."""
    x = gaussian(seed, n, len(mean))
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def covariance(seed, d):
    a = gaussian(seed, d, d)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def score(images):
    return metrics.score(images, data_dir=DATA)


@pytest.fixture(scope="session")
def noise():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (N, 1, 28, 28), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="session")
def real_score(real_images):
    return score(real_images[:N])


@pytest.fixture(scope="session")
def reference():
    return metrics.reference(N, data_dir=DATA)


# ----------------------------------------------------------------------------- the Fréchet distance


def test_frechet_of_gaussians_with_diagonal_covariances_is_the_closed_form():
    d = 6
    std_a, std_b = gaussian(0, d).abs() + 0.2, gaussian(1, d).abs() + 0.2
    mean_a, mean_b = gaussian(2, d), gaussian(3, d)
    a = exactly(mean_a, std_a.square().diag(), 50, 4)
    b = exactly(mean_b, std_b.square().diag(), 80, 5)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert metrics.frechet_distance(a, b)[0] == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("d", [2, 5, 40])
def test_frechet_agrees_with_scipys_matrix_square_root(d):
    mean_a, mean_b, cov_a, cov_b = (
        gaussian(0, d),
        gaussian(1, d),
        covariance(2, d),
        covariance(3, d),
    )
    a, b = exactly(mean_a, cov_a, 100, 4), exactly(mean_b, cov_b, 130, 5)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * np.trace(root)
    assert metrics.frechet_distance(a, b)[0] == pytest.approx(expected.item(), rel=1e-8)
    assert metrics.frechet_distance(b, a)[0] == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_is_zero_for_the_same_points_and_finite_for_singular_covariances():
    points = gaussian(0, 300, 20)
    assert metrics.frechet_distance(points, points)[0] == pytest.approx(0, abs=1e-6)
    few, shift = points[:10], torch.full((20,), 3.0, dtype=torch.float64)  # rank 9 of 20
    assert metrics.frechet_distance(few, few)[0] == pytest.approx(0, abs=1e-5)
    assert metrics.frechet_distance(few, few + shift)[0] == pytest.approx(20 * 9, rel=1e-6)
    one = points[:1].repeat(10, 1)  # no spread: |mu - mu'|^2 + tr(C')
    expected = (one.mean(0) - points.mean(0)).square().sum() + points.T.cov().trace()
    assert metrics.frechet_distance(one, points)[0] == pytest.approx(expected.item(), rel=1e-6)


def error_by_definition(a, b, h=1e-4):
    """The error of the Fréchet distance by derivatives that are taken numerically.

    The distribution (1 - h) A + h (a point x) has the mean mu + h d and the covariance
    (1 - h) C + h (1 - h) d d', where d = x - mu.
    """
    mean, cov, cov_b = a.mean(0), a.T.cov(), b.T.cov()
    left, sizes, _ = torch.linalg.svd(cov_b)
    root = left * sizes.sqrt() @ left.T

    def distance(d, h):
        c = (1 - h) * cov + h * (1 - h) * d.outer(d)
        tr_root = torch.linalg.eigvalsh(root @ c @ root).clamp(min=0).sqrt().sum()
        return (mean + h * d - b.mean(0)).square().sum() + (c + cov_b).trace() - 2 * tr_root

    influence = [(distance(d, h) - distance(d, -h)) / (2 * h) for d in a - mean]
    return (torch.stack(influence).std() / len(a) ** 0.5).item()


@pytest.mark.parametrize(("n", "shift", "scale"), [(40, 0.7, 1.5), (200, 0.0, 0.4), (60, 3.0, 1.0)])
def test_the_error_of_the_frechet_distance_is_that_of_numerical_derivatives(n, shift, scale):
    a = exactly(gaussian(0, 5) * shift, scale * covariance(1, 5), n, 2).exp()  # skewed
    b = exactly(gaussian(3, 5), covariance(4, 5), 90, 5).exp()
    error = metrics.frechet_distance(a, b)[1]
    assert error == pytest.approx(error_by_definition(a, b), rel=1e-5)


def test_the_error_of_the_frechet_distance_of_singular_covariances():
    a, b = gaussian(0, 10, 20) + 1, gaussian(1, 300, 20)
    a[:, 3] = b[:, 3] = b[:, 4] = 0  # features that are dead in both, and in one
    error = metrics.frechet_distance(a, b)[1]
    assert error == pytest.approx(error_by_definition(a, b, h=1e-3), rel=1e-3)
    assert metrics.frechet_distance(1e-9 * a, 1e-9 * b)[1] == pytest.approx(1e-18 * error)
    for one in (a[:1], torch.zeros(1, 20)):  # with and without rounding of the mean
        assert metrics.frechet_distance(one.repeat(10, 1), b)[1] < 1e-12


@pytest.mark.parametrize(("shift", "scale"), [(0.3, 1.0), (0.0, 1.6), (1.0, 0.5)])
def test_the_error_of_the_frechet_distance_is_the_spread_over_draws(shift, scale):
    reference = gaussian(0, 2000, 5)
    draws = [scale * gaussian(i, 200, 5) + shift for i in range(1, 201)]
    values, errors = zip(*(metrics.frechet_distance(a, reference) for a in draws), strict=True)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.15)
    assert np.std(errors) < 0.15 * np.mean(errors)  # the jackknife over ten blocks has 0.25


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_the_error_of_a_change_is_its_spread_over_draws(common):
    """It is smaller if the rows of both sets have most of their noise in common."""
    reference = gaussian(0, 2000, 5)
    changes, apart = [], []
    for i in range(1, 201):
        noise, before, after = gaussian(i, 3, 200, 5)
        before, after = (common * noise + (1 - common**2) ** 0.5 * x for x in (before, after))
        before, after = 1.2 * before + 0.5, 1.3 * after + 0.4
        changes.append(metrics.frechet_change(before, after, reference))
        (a, a_se), (b, b_se) = (metrics.frechet_distance(x, reference) for x in (before, after))
        assert changes[-1][0] == pytest.approx(b - a)
        apart.append(math.hypot(a_se, b_se))
    values, errors = zip(*changes, strict=True)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.15)
    assert np.mean(errors) == pytest.approx(np.mean(apart) * (1, 0.5)[common > 0], rel=0.15)


def test_a_change_of_images_is_that_of_their_features(real_images, noise):
    images = real_images[:100], noise[:100]
    before, after = (features(x)[0] for x in images)
    change, se = metrics.frechet_change_of(before, after, data_dir=DATA)
    scores = [metrics.score(x, data_dir=DATA)["frechet"] for x in images]
    assert change == pytest.approx(scores[1] - scores[0]) and se > 0
    assert metrics.frechet_change_of(before, before, data_dir=DATA) == (0, 0)


# ---------------------------------------------------------------------------------------------- KID


def kid_by_definition(x, y):
    """Gretton et al. 2012, eq. 3, with every pair written out."""
    m, n = len(x), len(y)
    k = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3  # noqa: E731
    k_xx, k_yy = k(x, x), k(y, y)
    within_x = (k_xx.sum() - k_xx.trace()) / (m * (m - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (n * (n - 1))
    return (within_x + within_y - 2 * k(x, y).mean()).item()


def test_kid_is_its_definition_for_unequal_numbers_and_in_chunks():
    x, y = gaussian(0, 1234, 7), 1.3 * gaussian(1, 77, 7) + 0.2
    assert metrics.kid(x, y)[0] == pytest.approx(kid_by_definition(x, y), rel=1e-9)
    assert metrics.kid(y, x)[0] == pytest.approx(kid_by_definition(x, y), rel=1e-9)


def test_kid_is_unbiased():
    """Mean 0 over draws from one distribution, where the biased estimator's is 60 errors off."""
    draws = [metrics.kid(gaussian(2 * i, 30, 4), gaussian(2 * i + 1, 40, 4))[0] for i in range(300)]
    mean, error = np.mean(draws), np.std(draws) / len(draws) ** 0.5
    assert abs(mean) < 3 * error
    assert error < 0.05  # so that the mean means something


@pytest.mark.parametrize("shift", [0.3, 1.0])
def test_kids_standard_error_is_the_spread_over_draws(shift):
    reference = gaussian(0, 2000, 5)
    values, errors = zip(
        *(metrics.kid(gaussian(i, 200, 5) + shift, reference) for i in range(1, 101)), strict=True
    )
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.2)
    assert np.std(errors) < 0.2 * np.mean(errors)


def test_kids_standard_error_is_that_of_a_jackknife_over_single_points():
    x, y = gaussian(0, 205, 3), gaussian(1, 50, 3) + 0.5
    left_out = [kid_by_definition(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(205)]
    expected = (np.sum((left_out - np.mean(left_out)) ** 2) * 204 / 205) ** 0.5
    assert metrics.kid(x, y)[1] == pytest.approx(expected, rel=0.01)


def test_kids_standard_error_is_its_definition_for_unequal_numbers_and_in_chunks():
    x, y = gaussian(0, 205, 7), 1.3 * gaussian(1, 77, 7) + 0.2
    k = lambda a, b: (a @ b.T / 7 + 1) ** 3  # noqa: E731
    to_others = (k(x, x).sum(1) - k(x, x).diagonal()) / 204
    expected = 2 * (to_others - k(x, y).mean(1)).std() / 205**0.5
    assert metrics.kid(x, y)[1] == pytest.approx(expected.item(), rel=1e-9)


def test_the_order_of_samples_changes_no_error():
    x, y = gaussian(0, 400, 5) + 0.5, gaussian(1, 400, 5)
    for measure in (metrics.frechet_distance, metrics.kid):
        assert measure(x[x.sum(1).argsort()], y) == pytest.approx(measure(x, y), rel=1e-9)


# ----------------------------------------------------------------------- precision, recall, nearest


def test_precision_and_recall_of_points_counted_by_hand():
    real = torch.tensor([[-1.0], [1.0], [2.0], [10.0]])  # to the next: 2, 1, 1, 8
    fake = torch.tensor([[0.0], [0.5], [21.0], [40.0]])  # 0.5, 0.5, 19, 19
    precision, _, recall, _ = metrics.precision_recall(real, fake, k=1)
    assert precision == 2 / 4  # the reals reach from -3 to 18
    assert recall == 3 / 4  # the fakes reach from -0.5 to 1 and from 2 to 59: edges count


def test_precision_and_recall_use_the_third_neighbour_and_do_not_mix_the_two_up():
    real = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])  # 3rd neighbours 6, 5, 3, 5, 9
    fake = torch.tensor([[18.5], [18.6], [18.7], [18.8], [19.5]])  # the last is out of 10's reach
    assert metrics.precision_recall(real, fake)[::2] == (4 / 5, 0)
    assert metrics.precision_recall(fake, real)[::2] == (0, 4 / 5)


def test_precision_and_recall_are_those_of_all_pairs():
    real, fake = gaussian(0, 1100, 4), 1.5 * gaussian(1, 1050, 4)

    def share(points, centres):
        radii = torch.cdist(centres, centres).sort(1).values[:, 3]
        return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()

    expected = share(fake, real), share(real, fake)
    assert 0.3 < expected[0] < expected[1] < 1
    assert metrics.precision_recall(real, fake)[::2] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.7, 1.5])
def test_the_standard_errors_of_precision_and_recall_are_the_spread_over_draws(scale):
    real = gaussian(0, 400, 4)
    draws = [metrics.precision_recall(real, scale * gaussian(i, 400, 4)) for i in range(1, 61)]
    precision, precision_se, recall, recall_se = np.array(draws).T
    assert 0.3 < precision.mean() < 0.99 and 0.3 < recall.mean() < 0.99
    assert precision.std() == pytest.approx(precision_se.mean(), rel=0.25)
    assert 0.9 < recall.std() / recall_se.mean() < 1.4  # as documented


def test_density_and_coverage_agree_with_the_authors():
    """`prdc` is the implementation of Naeem et al.; it also has precision and recall."""
    from prdc import compute_prdc

    real, fake = gaussian(0, 300, 6), 0.7 * gaussian(1, 300, 6) + 0.5
    theirs = compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    density, _, coverage, _ = metrics.density_coverage(real, fake)
    precision, _, recall, _ = metrics.precision_recall(real, fake, k=5)
    assert density == pytest.approx(theirs["density"], abs=1e-12)
    assert coverage == pytest.approx(theirs["coverage"], abs=1e-12)
    assert precision == pytest.approx(theirs["precision"], abs=1e-12)
    assert recall == pytest.approx(theirs["recall"], abs=1e-12)


def test_density_and_coverage_of_points_counted_by_hand():
    """On a line, k = 1: the balls of 0, 1 and 10 have the radii 1, 1 and 9."""
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.5], [3.0], [-5.0]])
    density, _, coverage, _ = metrics.density_coverage(real, fake, k=1)
    assert density == pytest.approx((2 + 1 + 0) / 3)  # 0.5 lies in two balls, 3 in one
    assert coverage == pytest.approx(3 / 3)
    assert metrics.density_coverage(real, fake[1:], k=1)[2] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_images_in_the_ball_of_an_outlier_have_no_coverage():
    """All-black images may have a precision of 1. Density and coverage show what they are."""
    black = score(torch.zeros(1000, 1, 28, 28, dtype=torch.uint8))
    real = metrics.reference(1000, data_dir=DATA)
    assert black["coverage"] < 0.01 < 0.8 < real["coverage"]
    assert black["density"] < 0.3 * real["density"]


def test_nearest_is_that_of_all_pairs(real_images, train_split):
    images, pool = real_images[:1050].clone(), train_split[0][:5600].clone()
    # copies of noise: the sums of its squares are beyond float32's integers, and get rounded
    generator = torch.Generator().manual_seed(0)
    pool[5560:] = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=generator)
    images[1010:] = pool[5560:]
    distances, index = metrics.nearest(images, pool)
    squared = torch.cdist(images.flatten(1).double(), pool.flatten(1).double()).square()
    assert torch.equal(index, squared.argmin(1))
    expected = squared.min(1).values.clamp(min=0).sqrt() / 255
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-6)
    assert (distances[1010:] == 0).all()  # exactly


# ------------------------------------------------------------------------------ with the classifier


class InFloat64(nn.Module):
    """The network's features as torchmetrics wants them of a `feature` module."""

    num_features = LeNet.num_features

    def forward(self, images):
        return features(images)[0].double()


@pytest.fixture(scope="session")
def two_sets(real_images, train_split):
    worse = train_split[0][: 2 * N].clone()
    worse[:, :, 10:14] = 0  # digits with a gap
    return real_images[: 2 * N], worse


def test_frechet_agrees_with_torchmetrics(two_sets):
    peer = FrechetInceptionDistance(feature=InFloat64())
    for images, real in zip(two_sets, (True, False), strict=True):
        for chunk in images.split(300):
            peer.update(chunk, real=real)
    a, b = (features(images)[0] for images in two_sets)
    ours = metrics.frechet_distance(a, b)[0]
    assert ours > 10
    # torchmetrics returns float32
    assert ours == pytest.approx(peer.compute().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Metric")  # that it keeps all features
def test_kid_agrees_with_torchmetrics(two_sets):
    peer = KernelInceptionDistance(feature=InFloat64(), subsets=1, subset_size=2 * N)
    for images, real in zip(two_sets, (True, False), strict=True):
        peer.update(images, real=real)
    a, b = (features(images)[0] for images in two_sets)
    assert metrics.kid(b, a)[0] == pytest.approx(peer.compute()[0].item(), rel=1e-5)


def test_real_test_images_score_as_real(real_score, reference):
    assert set(real_score) == set(reference)
    assert real_score["n"] == reference["n"] == real_score["n_manifold"] == N
    assert real_score["n_test"] == 10_000
    for s in (real_score, reference):
        assert 0 < s["frechet"] < 15
        assert abs(s["kid"]) < 4 * s["kid_se"]
        assert s["precision"] > 0.8 and s["recall"] > 0.8
        assert s["confidence"] > 0.98
        assert s["label_entropy"] == pytest.approx(np.log2(10), abs=0.05)
        assert s["novelty"] == pytest.approx(1, abs=0.05)
        assert s["copies"] == pytest.approx(0.05, abs=0.03)
        assert sum(s["labels"]) == N


def test_noise_scores_as_nothing_like_digits(noise, reference):
    s = score(noise)
    assert s["frechet"] > 100 * reference["frechet"]
    assert s["kid"] > 50 * s["kid_se"]
    assert s["precision"] < 0.01 and s["recall"] < 0.01
    assert s["confidence"] < 0.1
    assert s["novelty"] > 1.5 and s["copies"] == 0


@pytest.mark.slow
def test_one_image_repeated_has_no_diversity(real_images, reference):
    s = score(real_images[:1].repeat(N, 1, 1, 1))
    assert s["frechet"] > 50 * reference["frechet"] and s["frechet_se"] < 1e-6
    assert s["kid"] > 10
    assert s["precision"] in (0, 1) and s["recall"] < 0.01
    assert sorted(s["labels"]) == [0] * 9 + [N]
    assert s["label_entropy"] == 0
    assert all(np.isfinite(value) for key, value in s.items() if key != "labels")


@pytest.mark.slow
def test_training_images_without_a_digit_are_copies_and_lack_it(train_split, reference):
    images, labels = train_split
    s = score(images[labels != 7][:N])
    assert s["frechet"] > 3 * reference["frechet"]
    assert s["kid"] > 1.5 * s["kid_se"]
    assert s["precision"] > 0.8
    assert s["recall"] < reference["recall"] - 0.03
    assert s["labels"][7] <= 3 and min(s["labels"][:7] + s["labels"][8:]) > 20
    shares = np.array([count for count in s["labels"] if count]) / N
    assert s["label_entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert s["label_entropy"] == pytest.approx(np.log2(9), abs=0.06)
    assert s["nearest"] == 0 and s["novelty"] == 0 and s["copies"] == 1


@pytest.mark.slow
def test_novelty_is_per_digit(real_images):
    """1s are near one another everywhere: real ones must not look copied."""
    ones = real_images[features(real_images)[1].argmax(1) == 1][:200]
    s = score(ones)
    assert s["nearest"] < 3.2
    assert s["novelty"] == pytest.approx(1, abs=0.1)
    assert s["copies"] < 0.15


@pytest.mark.slow
def test_noise_on_some_of_the_images_moves_every_figure_the_right_way(real_images, real_score):
    images = real_images[:N].clone()
    images[: N // 4] = torch.randint(0, 256, (N // 4, 1, 28, 28), dtype=torch.uint8)
    s = score(images)
    assert s["frechet"] > 5 * real_score["frechet"]
    assert s["kid"] > real_score["kid"] + 4 * s["kid_se"]
    assert s["precision"] == pytest.approx(0.75 * real_score["precision"], abs=0.03)
    assert s["confidence"] == pytest.approx(0.75 * real_score["confidence"], abs=0.03)
    assert s["novelty"] > real_score["novelty"]


@pytest.mark.slow
def test_a_score_does_not_depend_on_shape_container_or_run(real_images, real_score):
    images = real_images[:N]
    for same in (images[:, 0], images.permute(0, 2, 3, 1), images.numpy(), images[:, 0].numpy()):
        assert torch.equal(metrics.as_images(same), images)
    backwards = images.flip(0).numpy()[::-1]  # a negative stride, which torch does not take
    assert score(backwards) == real_score
    shuffled = score(images.flip(0))
    for key in ("frechet", "kid", "precision", "recall", "confidence", "labels", "novelty"):
        assert shuffled[key] == pytest.approx(real_score[key], rel=1e-4)
    json.dumps(real_score)


@pytest.mark.slow
def test_standard_errors_of_mnists_features_are_the_spread_over_draws(two_sets):
    """Draws of 500 from 1,000 digits with a gap, against the test split."""
    feats, test = features(two_sets[1])[0], metrics._test_features(WEIGHTS, DATA)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(feats), (500,), generator=generator) for _ in range(100)]
    values, errors = np.array([metrics.frechet_distance(feats[i], test) for i in draws]).T
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.2)
    assert np.std(errors) < 0.15 * np.mean(errors)


def test_the_reference_stops_at_the_pool_of_real_images(monkeypatch, train_split):
    whole = metrics._images
    few = train_split[0][:300]
    monkeypatch.setattr(metrics, "_images", lambda s, d: few if s == "train" else whole(s, d))
    assert metrics.reference(5000, data_dir=DATA)["n"] == 300


# --------------------------------------------------------------------------------- the command line


def score_files(*args):
    metrics.main([*map(str, args), "--data", DATA])


@pytest.mark.slow
def test_the_table_the_json_and_the_picture(tmp_path, capsys, real_images, real_score, reference):
    np.save(tmp_path / "samples.npy", real_images[:N, 0].numpy())
    score_files(
        tmp_path / "samples.npy", "--json", tmp_path / "s.json", "--pairs", tmp_path / "p.png"
    )
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["scores"][str(tmp_path / "samples.npy")] == real_score
    assert report["references"] == {str(N): reference}
    assert "Fréchet distance (LeNet features)" in out and "FID" not in out
    assert f"{real_score['frechet']:.2f} ± {real_score['frechet_se']:.2f}" in out
    assert f"real, n {N}" in out
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and picture.width > 28 * 16
        assert np.asarray(picture).std() > 0


def test_the_picture_shows_the_closest_pair_first(tmp_path, train_split):
    images, others = train_split[0][:20], train_split[0][20:40]
    distances = torch.linspace(2, 1, 20)  # the last is the closest
    metrics.save_pairs(tmp_path / "p.png", {"set": (images, distances, others)}, count=3)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    tile = lambda row: picture[20 + 60 * row :, 4:][:56:2, :56:2]  # noqa: E731
    assert np.array_equal(tile(0), images[19, 0].numpy())
    assert np.array_equal(tile(1), others[19, 0].numpy())


ZEROS = np.zeros((200, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (ZEROS[:0], "0 images"),
        (np.zeros(0, np.uint8), r"shape \(0,\)"),
        (ZEROS[:99], "99 images; at least 100"),
        (ZEROS.astype(np.float32), "float32 pixels"),
        (ZEROS.astype(np.int64), "int64 pixels"),
        (ZEROS[:, :27], r"shape \(200, 27, 28\)"),
        (np.zeros((200, 3, 28, 28), np.uint8), r"shape \(200, 3, 28, 28\)"),
        (np.uint8(3), r"shape \(\)"),
        (np.array([{}, 1], dtype=object), "allow_pickle"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype}{list(value.shape)}",
)
def test_arrays_that_are_refused_in_one_line_that_names_the_file(tmp_path, array, reason):
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=reason) as refusal:
        score_files(tmp_path / "bad.npy")
    assert "bad.npy" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("cut", [0, 5, 40, 90, 1000, -1])
def test_damaged_files_are_refused(tmp_path, cut):
    np.save(tmp_path / "whole.npy", ZEROS)
    (tmp_path / "bad.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cannot read .*bad\.npy"):
        score_files(tmp_path / "bad.npy")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_garbled_headers_are_refused(tmp_path):
    np.save(tmp_path / "whole.npy", ZEROS)
    whole = (tmp_path / "whole.npy").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(200):
        garbled = bytearray(whole)
        garbled[draw.integers(0, 90)] = draw.integers(0, 256)
        (tmp_path / "bad.npy").write_bytes(garbled)
        try:
            images = metrics.read_samples(tmp_path / "bad.npy")
        except UserError as refusal:
            assert "\n" not in str(refusal)
        else:
            assert images.shape == (200, 1, 28, 28)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "several.npz", a=ZEROS)
    (tmp_path / "text.npy").write_text("hello")
    for path in ("several.npz", "text.npy", "missing.npy", "."):
        with pytest.raises(UserError, match="cannot read"):
            score_files(tmp_path / path)
    np.save(tmp_path / "good.npy", ZEROS)
    (tmp_path / "tuple.pt").write_bytes(b"\x85.")  # a pickle that takes from an empty stack
    for path in ("missing.pt", "text.npy", "good.npy", "several.npz", "tuple.pt", "."):
        with pytest.raises(UserError, match="classifier") as refusal:
            score_files(tmp_path / "good.npy", "--weights", tmp_path / path)
        assert "\n" not in str(refusal.value)


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, run_here):
    np.save(tmp_path / "float.npy", ZEROS.astype(np.float32))
    assert_refused(run_here("metrics.py", "float.npy"), "float.npy", "uint8")
    torch.save({"format": "a network"}, tmp_path / "mine.pt")
    assert_refused(run_here("metrics.py", "--train", "--weights", "mine.pt"), "mine.pt")
    assert torch.load(tmp_path / "mine.pt") == {"format": "a network"}
    before = WEIGHTS.read_bytes()
    assert_refused(run_here("metrics.py"), "FILE.npy")  # it does not train without being told
    assert_refused(run_here("metrics.py", "--train", "--json", "scores.json"), "--train")
    assert_refused(run_here("metrics.py", "--train", "float.npy"), "--train")
    bad_place = ("--train", "--weights", "/dev/null/x.pt")
    assert_refused(run_here("metrics.py", *bad_place), "--weights", "/dev/null")
    assert WEIGHTS.read_bytes() == before


# ------------------------------------------------------------------------- labels and faint pixels


@pytest.mark.slow
def test_scores_are_printed_even_if_they_cannot_be_written(tmp_path, capsys, train_split):
    np.save(tmp_path / "a.npy", train_split[0][:100].squeeze(1).numpy())
    with pytest.raises(UserError, match="nowhere"):
        metrics.main([str(tmp_path / "a.npy"), "--json", "/proc/nowhere.json", "--data", DATA])
    assert "Fréchet distance" in capsys.readouterr().out


@pytest.mark.slow
def test_agreement_is_the_share_read_as_the_digit_asked_for(train_split):
    images, digits = (x[:N] for x in train_split)
    read = features(images, metrics.load_classifier(WEIGHTS))[1].argmax(1)
    asked = read.clone()
    asked[:50] = (asked[:50] + 1) % 10
    s = metrics.score(images, asked=asked, data_dir=DATA)
    assert s["agreement"] == 1 - 50 / N
    assert s["agreement_se"] == pytest.approx((0.9 * 0.1 / (N - 1)) ** 0.5)
    assert metrics.score(images, asked=digits, data_dir=DATA)["agreement"] > 0.98
    assert "agreement" not in metrics.score(images, data_dir=DATA)


def test_shares_of_faint_pixels():
    images = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    for i, level in enumerate((1, 3, 4, 20, 21, 255)):
        images[: 100 * (i % 2 + 1), 0, i] = level  # a row of 28 pixels, in a half or in all images
    grain = metrics._grain(images)
    assert grain["pixels_1_3"] == pytest.approx((0.5 + 1) / 28)
    assert grain["pixels_4_20"] == pytest.approx((0.5 + 1) / 28)
    deviation = 0.5 / 28 * (200 / 199) ** 0.5
    assert grain["pixels_1_3_se"] == pytest.approx(deviation / 200**0.5)


@pytest.mark.slow
def test_labels_beside_the_samples_are_found(tmp_path, capsys, train_split):
    images, digits = (x[:200] for x in train_split)
    np.save(tmp_path / "a.npy", images[:, 0].numpy())
    score_files(tmp_path / "a.npy")
    assert "agreement" not in capsys.readouterr().out
    np.save(tmp_path / "a.labels.npy", digits.numpy())
    score_files(tmp_path / "a.npy", "--json", tmp_path / "s.json")
    assert "agreement with the labels" in capsys.readouterr().out
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["scores"][str(tmp_path / "a.npy")]["agreement"] > 0.97
    assert report["references"]["200"]["agreement"] > 0.97
    np.save(tmp_path / "other.npy", (digits.numpy() + 1) % 10)
    score_files(
        tmp_path / "a.npy", "--labels", tmp_path / "other.npy", "--json", tmp_path / "s.json"
    )
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["scores"][str(tmp_path / "a.npy")]["agreement"] < 0.03


@pytest.mark.parametrize(
    "labels", [np.zeros(199, np.int64), np.zeros(200), np.full(200, 10), np.full(200, -1)]
)
def test_labels_that_do_not_fit_are_refused(run_here, tmp_path, labels):
    np.save(tmp_path / "a.npy", ZEROS)
    np.save(tmp_path / "labels.npy", labels)
    done = run_here("metrics.py", "a.npy", "--labels", "labels.npy", "--data", DATA)
    assert_refused(done, "labels.npy")


def test_an_array_that_is_there_twice_is_refused(run_here):
    assert_refused(run_here("metrics.py", "a.npy", "a.npy", "--data", DATA), "twice")
