"""Score generated images against MNIST's test split, with the features of a small classifier.

score images:          python metrics.py samples.npy
several, and a file:   python metrics.py a.npy b.npy --json scores.json --pairs pairs.png
train the classifier:  python metrics.py --train

An array is uint8, of shape (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1). The measures:

Fréchet distance (LeNet features): lower is better
    Heusel et al. 2017, arXiv:1706.08500, eq. 6. It is not the FID of papers, which uses Inception's
    features. It falls as n grows, even for real images: compare equal n only.
KID (LeNet features): lower is better
    Binkowski et al. 2018, arXiv:1801.01401. It is unbiased, so it is near 0 for real images.
precision, recall: higher is better
    Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1-2, k = 3, with equally many real and generated
    images. Precision is the share of samples that look real, recall the share of real images that
    the samples cover. An outlier among the real images has a large ball, which can spoil precision:
    all-black images have a precision of 1.
density, coverage: higher is better
    Naeem et al. 2020, arXiv:2002.09797, k = 5, for the same images: precision and recall that
    outliers do not spoil. Density may exceed 1. Coverage is the share of real images with a sample
    nearby.
confidence, labels
    The mean of the classifier's largest digit probability, and how often it reads each digit.
agreement: higher is better
    How often it reads the digit that was asked for. Only with labels: those of --labels, or those
    that infer.py wrote beside the samples (x.labels.npy for x.npy).
pixels at 1 to 3, at 4 to 20
    The shares of these pixel values: a faint gray grain, which the classifier hardly sees. Compare
    them with those of real images.
novelty, copies
    The distance, in pixels, of each sample to the nearest training image, divided by the mean of
    that distance over test images read as the same digit (1s all look alike, 8s do not). Novelty is
    the mean of this ratio; copies is the share of samples closer than 95 % of those test images. A
    model that copies has a novelty near 0 and copies near 100 %. --pairs draws the closest pairs.

The real-data reference is the score of as many real training images (all 60,000 if n is larger). No
sample can be expected to score better. Its novelty is that of test images, because each training
image is its own nearest one. Everything runs on the CPU, and every subset is drawn from a fixed
seed: a score depends on the samples alone.

To add a measure x: compute x and its error x_se in `_fidelity` (from features), `_grain` (from
pixels) or `_novelty` (from distances to training images), describe it in `score`, and give it a row
in `format_table`.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from lab import cli
from lab.classifier import NO_DIGIT, WEIGHTS, features, load_classifier, train
from lab.data import load_dataset
from lab.errors import UserError
from lab.files import labels_file, write_atomically
from lab.pictures import save_png

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

MIN_SAMPLES = 100  # fewer samples say little about the spread of 84 features
TEST_NEAREST = 2000  # test images whose nearest training image is searched


# -------------------------------------------- the measures, on features (N, D), D > 1, of any kind


def frechet_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the Fréchet distance (Heusel 2017 eq. 6) and its standard error, in float64.

    The error is that of `a` alone, to first order: the standard deviation over the rows of their
    influence, divided by sqrt(N).

    Near its minimum the distance is not linear, and the error is too large: measured for real
    images, 1.5 times the spread over draws of 1,000; at distances above 20, 0.9 to 1.1 times.
    """
    distance, influence = frechet_influence(a, b)
    return distance, _standard_error(influence)


def frechet_change(before: Tensor, after: Tensor, b: Tensor) -> tuple[float, float]:
    """Return by how much the Fréchet distance to `b` grows, and the standard error of that.

    Args:
        before, after: (N, D), where row i of both was made from the same noise. Such rows have
            similar influences, so the difference is known better than either distance.
    """
    (old, old_influence), (new, new_influence) = (frechet_influence(a, b) for a in (before, after))
    return new - old, _standard_error(new_influence - old_influence)


def frechet_influence(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
    """Return the Fréchet distance and the influence of each row of `a`, (N,) float64.

    The influence of x is the derivative of the distance by h when the distribution of `a` becomes
    (1 - h) times itself plus h times the point x. A constant is left out.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    x, shift = a - a.mean(0), a.mean(0) - b.mean(0)
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # R = C_b^(1/2)
    # C_a C_b has the eigenvalues of the symmetric R C_a R: no general matrix root
    values, vectors = torch.linalg.eigh(root @ cov_a @ root)
    # distance = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (R C_a R)^(1/2))
    tr_root = values.clamp(min=0).sqrt().sum()
    distance = shift.square().sum() + cov_a.trace() + cov_b.trace() - 2 * tr_root
    # influence = 2 (mu_a - mu_b).x + x' (I - R (R C_a R)^(-1/2) R) x + constant, for x minus mu_a.
    # The inverse leaves out what is 0 but for rounding: no row has a part in those directions.
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    scaled = x @ root @ vectors[:, kept] / values[kept].pow(1 / 4)
    influence = 2 * x @ shift + x.square().sum(1) - scaled.square().sum(1)
    return distance.item(), influence


def kid(a: Tensor, b: Tensor, cubes_of_b: Tensor | None = None) -> tuple[float, float]:
    """Return KID and its standard error: unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3.

    Binkowski 2018; the estimator is Gretton et al. 2012, eq. 3. The error is that of `a` alone, to
    first order, as that of the Fréchet distance. The influence of x is twice w(x), the mean of
    k(x, y) over the other rows y of `a` minus its mean over `b`.

    With u = (x / sqrt(D), 1) the kernel is (u.v)^3, the inner product of the outer cubes of u and
    v. So a sum of k over pairs is one inner product of sums over samples: exact, and linear in N.

    Args:
        cubes_of_b: `sum_of_cubes(b)`, for a caller that compares many `a` with one `b`.
    """
    u, v = _with_one(a), _with_one(b)
    m, n = len(u), len(v)
    self_u, self_v = (rows.square().sum(1).pow(3) for rows in (u, v))  # k(x, x)
    total_u = sum_of_cubes(a)
    total_v = sum_of_cubes(b) if cubes_of_b is None else cubes_of_b
    k_vv = (total_v.square().sum() - self_v.sum()) / (n * (n - 1))
    k_uv = (total_u * total_v).sum() / (m * n)
    w = _times_cubes(u, total_u / (m - 1) - total_v / n) - self_u / (m - 1)
    # the mean of w is k_uu - k_uv
    return (w.mean() - k_uv + k_vv).item(), 2 * _standard_error(w)


def sum_of_cubes(x: Tensor) -> Tensor:
    """Return the sum of the outer cubes of the u of `kid`, for x (N, D), as ((D + 1)^2, D + 1)."""
    return sum(_squares(c).T @ c for c in _chunks(_with_one(x)))


def _with_one(x: Tensor) -> Tensor:
    """Return (x / sqrt(D), 1) for each row of x (N, D): (N, D + 1) float64."""
    return torch.cat([x.double() / x.shape[1] ** 0.5, x.new_ones(len(x), 1)], 1)


def _times_cubes(u: Tensor, cubes: Tensor) -> Tensor:
    """Return (N,): the inner product of the outer cube of each row of u and `cubes` (E * E, E)."""
    return torch.cat([(_squares(c) @ cubes * c).sum(1) for c in _chunks(u)])


def _squares(u: Tensor) -> Tensor:
    """Return the outer square of each row of u (N, E), as (N, E * E)."""
    return (u[:, :, None] * u[:, None, :]).flatten(1)


def _chunks(u: Tensor) -> tuple[Tensor, ...]:
    return u.split(50)  # 50 squares of E = 85 stay in a core's cache


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float, float, float]:
    """Return precision and recall with their standard errors (Kynkäänniemi 2019 eq. 1-2).

    Precision is the share of fakes inside the manifold of the reals, recall the reverse. The
    manifold of a set is the union of balls around its points. The radius of a ball is the distance
    to the k-th nearest point of the set.

    Returns:
        Precision, its standard error over the fakes, recall, its standard error over the reals.
        With other fakes, recall varies up to a third more than its standard error says.
    """
    real, fake = real.double(), fake.double()
    precise = (_balls_around(fake, real, k) > 0).double()
    found = (_balls_around(real, fake, k) > 0).double()
    return _mean_and_error(precise) + _mean_and_error(found)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float, float, float]:
    """Return density and coverage with their standard errors (Naeem et al. 2020).

    The ball of a real point has the distance to its k-th nearest real point as its radius. Density
    is the number of balls around a fake, divided by k. Coverage is the share of balls with a fake.

    Returns:
        Density, its standard error over the fakes, coverage, its standard error over the reals.
    """
    real, fake = real.double(), fake.double()
    nearest_fake = torch.cat([torch.cdist(r, fake).amin(1) for r in real.split(1000)])
    covered = (nearest_fake <= _radii(real, k)).double()
    return _mean_and_error(_balls_around(fake, real, k) / k) + _mean_and_error(covered)


def _balls_around(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Return (len(points),) float64: in how many balls of the centres each point lies."""
    radii = _radii(centres, k)
    return torch.cat(
        [(torch.cdist(p, centres) <= radii).sum(1) for p in points.split(1000)]
    ).double()


def _radii(points: Tensor, k: int) -> Tensor:
    """Return the distance of each point to its k-th nearest other point."""
    # the (k + 1)-th smallest: a point is its own nearest
    return torch.cat(
        [torch.cdist(p, points).kthvalue(k + 1, dim=1).values for p in points.split(1000)]
    )


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), _standard_error(values)


def nearest(images: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance of each image to its nearest one in `pool`, and its index.

    Args:
        images, pool: (N, 1, 28, 28) and (M, 1, 28, 28) uint8.

    Returns:
        (N,) float32 distances for pixels in [0, 1], exactly 0 for a copy, and (N,) int64 indices.
    """
    x = images.flatten(1).float()
    best = torch.full((len(x),), math.inf)
    index = torch.zeros(len(x), dtype=torch.long)
    step = 5000
    for start in tqdm(range(0, len(pool), step), desc="nearest", leave=False, disable=None):
        y = pool[start : start + step].flatten(1).float()
        norm = y.square().sum(1)
        for lo in range(0, len(x), 1000):
            rows = slice(lo, lo + 1000)
            # |x - y|^2 - |x|^2, rounded by float32: precise enough to choose by
            least, which = torch.addmm(norm, x[rows], y.T, alpha=-2).min(1)
            closer = least < best[rows]
            best[rows] = torch.where(closer, least, best[rows])
            index[rows] = torch.where(closer, which + start, index[rows])
    for lo in range(0, len(x), 1000):
        rows = slice(lo, lo + 1000)
        best[rows] = (x[rows] - pool[index[rows]].flatten(1)).norm(dim=1) / 255
    return best, index


def _draw(total: int, n: int) -> Tensor:
    """Draw n of range(total), always the same. MNIST's files and users' arrays have an order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


# ---------------------------------------------------------------------------------------- a score


def as_images(array: np.ndarray | Tensor) -> Tensor:
    """Return a (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1) uint8 array as (N, 1, 28, 28).

    Raises:
        UserError: another shape or dtype, or fewer than MIN_SAMPLES images.
    """
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if shape[1:] not in ((28, 28), (1, 28, 28), (28, 28, 1)):
        raise UserError(
            f"an array of shape {shape}; it must be (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1)"
        )
    if dtype != "uint8":
        raise UserError(
            f"{dtype} pixels; they must be uint8 in 0 to 255: scale and round them first"
        )
    if len(array) < MIN_SAMPLES:
        raise UserError(f"{len(array)} images; at least {MIN_SAMPLES} are needed")
    images = torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array.cpu()
    return images.reshape(-1, 1, 28, 28)


def score(
    images: np.ndarray | Tensor,
    *,
    asked: Tensor | None = None,
    weights: str | Path = WEIGHTS,
    data_dir: str | Path = "data",
) -> dict:
    """Score images against MNIST's test split.

    Args:
        images: a uint8 array that `as_images` accepts.
        asked: (N,) int64, the digits that were asked for.

    Returns:
        A dict of Python numbers, JSON-able. Keys that end in `_se` are standard errors over the
        samples; recall_se and coverage_se are over the test images.

        n, n_test, n_manifold   images scored, test images, images per side in precision and recall
        frechet, frechet_se     Fréchet distance (LeNet features)
        kid, kid_se             KID (LeNet features)
        precision, precision_se, recall, recall_se   in [0, 1]
        density, density_se     >= 0, about 1 for real images
        coverage, coverage_se   in [0, 1]
        confidence, confidence_se   mean of the largest probability of a digit, in [0, 1]
        agreement, agreement_se     share read as the digit asked for; only with `asked`
        labels                  10 counts
        label_entropy, label_entropy_se   entropy of their shares, in bits, at most log2(10)
        nearest, nearest_se     mean distance to the nearest training image, pixels in [0, 1]
        novelty, novelty_se     mean of that distance relative to test images of the same digit
        copies, copies_se       share closer than 95 % of test images read as the same digit
        pixels_1_3, pixels_1_3_se, pixels_4_20, pixels_4_20_se   shares of these pixel values
    """
    where = {"weights": weights, "data_dir": data_dir}
    return score_and_pairs(as_images(images), asked=asked, **where)[0]


def score_and_pairs(
    images: Tensor,
    *,
    asked: Tensor | None = None,
    weights: str | Path = WEIGHTS,
    data_dir: str | Path = "data",
) -> tuple[dict, tuple[Tensor, Tensor, Tensor]]:
    """Return the score of images (N, 1, 28, 28) uint8, and a block for `save_pairs`."""
    feats, probs = features(images, load_classifier(weights))
    train_images = _images("train", data_dir)
    distances, index = nearest(images, train_images)
    novelty, relative = _novelty(distances, probs.argmax(1), weights, data_dir)
    figures = _fidelity(feats, probs, weights, data_dir) | novelty | _grain(images)
    return figures | agreement(probs, asked), (images, relative, train_images[index])


def reference(
    n: int,
    *,
    asked: bool = False,
    weights: str | Path = WEIGHTS,
    data_dir: str | Path = "data",
) -> dict:
    """Return the real-data reference: the score of n random training images, at most all 60,000.

    Its novelty is that of test images, because each training image is its own nearest one.

    Args:
        asked: whether to include the agreement with the images' labels.
    """
    train_images = _images("train", data_dir)
    drawn = _draw(len(train_images), n)
    images = train_images[drawn]
    digits = load_dataset("mnist", "train", data_dir)[1][drawn] if asked else None
    distances, labels, _ = _test_distances(weights, data_dir)
    novelty, _ = _novelty(distances, labels, weights, data_dir)
    feats, probs = features(images, load_classifier(weights))
    figures = _fidelity(feats, probs, weights, data_dir) | novelty | _grain(images)
    return figures | agreement(probs, digits)


def frechet_change_of(
    before: Tensor,
    after: Tensor,
    *,
    weights: str | Path = WEIGHTS,
    data_dir: str | Path = "data",
) -> tuple[float, float]:
    """Return `frechet_change` of the features of two sets of images, against the test split.

    Args:
        before, after: (N, 84), where row i of both belongs to an image made from the same noise.
        weights: the classifier whose features they are.
    """
    return frechet_change(before, after, _test_features(weights, data_dir))


def _fidelity(feats: Tensor, probs: Tensor, weights: str | Path, data_dir: str | Path) -> dict:
    test = _test_features(weights, data_dir)
    n, m = len(feats), min(len(feats), len(test))
    frechet, frechet_se = frechet_distance(feats, test)
    kid_value, kid_se = kid(feats, test, _test_cubes(weights, data_dir))
    # equally many of both, as in the paper: a denser set has smaller balls
    pair = test[_draw(len(test), m)], feats[_draw(n, m)]
    precision, precision_se, recall, recall_se = precision_recall(*pair)
    density, density_se, coverage, coverage_se = density_coverage(*pair)
    confidence, labels = probs.max(1)
    counts = labels.bincount(minlength=NO_DIGIT)
    surprisal = -(counts.double() / n).log2()[labels]  # in bits; the entropy is its mean
    return {
        "n": n,
        "n_test": len(test),
        "n_manifold": m,
        "frechet": frechet,
        "frechet_se": frechet_se,
        "kid": kid_value,
        "kid_se": kid_se,
        "precision": precision,
        "precision_se": precision_se,
        "recall": recall,
        "recall_se": recall_se,
        "density": density,
        "density_se": density_se,
        "coverage": coverage,
        "coverage_se": coverage_se,
        "confidence": confidence.mean().item(),
        "confidence_se": _standard_error(confidence),
        "labels": counts.tolist(),
        "label_entropy": surprisal.mean().item(),
        "label_entropy_se": _standard_error(surprisal),
    }


def agreement(probs: Tensor, asked: Tensor | None) -> dict:
    """Return the share of images that are read as the digit asked for, and its standard error.

    Args:
        probs: (N, 10) probabilities of the digits.
        asked: (N,) int64; without it the result is empty.
    """
    if asked is None:
        return {}
    share, share_se = _mean_and_error((probs.argmax(1) == asked).double())
    return {"agreement": share, "agreement_se": share_se}


def _grain(images: Tensor) -> dict:
    """Return the shares of pixels that are nearly black, with their standard errors."""
    figures = {}
    for low, high in ((1, 3), (4, 20)):
        name = f"pixels_{low}_{high}"
        share = ((images >= low) & (images <= high)).flatten(1).double().mean(1)
        figures |= {name: share.mean().item(), f"{name}_se": _standard_error(share)}
    return figures


def _novelty(
    distances: Tensor, labels: Tensor, weights: str | Path, data_dir: str | Path
) -> tuple[dict, Tensor]:
    """Return nearest, novelty and copies of a score, and the distances relative to test images."""
    test_distances, test_labels, _ = _test_distances(weights, data_dir)
    by_digit = [test_distances[test_labels == digit] for digit in range(NO_DIGIT)]
    if not all(map(len, by_digit)):
        raise UserError(f"{weights} reads no test image as some digit: it is not well trained")
    relative = distances / torch.stack([d.mean() for d in by_digit])[labels]
    close = distances < torch.stack([d.quantile(0.05) for d in by_digit])[labels]
    figures = {
        "nearest": distances.mean().item(),
        "nearest_se": _standard_error(distances),
        "novelty": relative.mean().item(),
        "novelty_se": _standard_error(relative),
        "copies": close.double().mean().item(),
        "copies_se": _standard_error(close.double()),
    }
    return figures, relative


@lru_cache
def _images(split: str, data_dir: str | Path) -> Tensor:
    return load_dataset("mnist", split, data_dir)[0]


@lru_cache
def _test_features(weights: str | Path, data_dir: str | Path) -> Tensor:
    return features(_images("test", data_dir), load_classifier(weights))[0]


@lru_cache
def _test_cubes(weights: str | Path, data_dir: str | Path) -> Tensor:
    return sum_of_cubes(_test_features(weights, data_dir))


@lru_cache
def _test_distances(weights: str | Path, data_dir: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for test images: distance to the nearest training image, digit read, its index."""
    images = _test_sample(data_dir)
    distances, index = nearest(images, _images("train", data_dir))
    return distances, features(images, load_classifier(weights))[1].argmax(1), index


def _test_sample(data_dir: str | Path) -> Tensor:
    test = _images("test", data_dir)
    return test[_draw(len(test), TEST_NEAREST)]


# ------------------------------------------------------------------------------- the command line


def read_samples(path: str | Path) -> Tensor:
    """Return the images (N, 1, 28, 28) uint8 of a .npy file.

    Raises:
        UserError: the file cannot be read or does not hold such images.
    """
    array = read_array(path)
    try:
        return as_images(array)
    except UserError as error:
        raise UserError(f"{path} holds {error}") from None


def read_array(path: str | Path) -> np.ndarray:
    """Return the array of a .npy file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    # a damaged header can make numpy's parser raise any exception
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["damaged"])[0]
        raise UserError(f"cannot read {path} as a .npy array: {reason}") from None


def read_labels(path: str | Path, n: int) -> Tensor:
    """Return the labels (n,) int64 of a .npy file, each in 0 to 9.

    Raises:
        UserError: the file cannot be read or does not hold so many such labels.
    """
    array = read_array(path)
    if array.dtype.kind not in "iu" or array.shape != (n,):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}; {n} integers are needed, "
            "one per image"
        )
    if not ((array >= 0) & (array < NO_DIGIT)).all():
        raise UserError(f"{path} holds labels outside of 0 to {NO_DIGIT - 1}")
    return torch.from_numpy(array.astype(np.int64))


def format_table(columns: dict[str, dict]) -> str:
    """Return scores as a text table, one column per score."""

    def error(key: str, digits: int):
        return lambda s: f"{s[key]:.{digits}f} ± {s[key + '_se']:.{digits}f}" if key in s else "-"

    def percent(key: str):
        return lambda s: f"{100 * s[key]:.2f} ± {100 * s[key + '_se']:.2f}"

    def share(digit: int):
        return lambda s: f"{100 * s['labels'][digit] / s['n']:.1f}"

    rows = {
        "n": lambda s: f"{s['n']:,}",
        "Fréchet distance (LeNet features)": error("frechet", 2),
        "KID (LeNet features)": error("kid", 2),
        "precision": error("precision", 3),
        "recall": error("recall", 3),
        "density": error("density", 3),
        "coverage": error("coverage", 3),
        "  images per side": lambda s: f"{s['n_manifold']:,}",
        "confidence": error("confidence", 4),
        "agreement with the labels": error("agreement", 3),
        "labels' entropy, of 3.32 bits": error("label_entropy", 3),
        **{f"  read as {digit}, %": share(digit) for digit in range(10)},
        "nearest training image": error("nearest", 3),
        "novelty (test images: 1)": error("novelty", 3),
        "copies (test images: 0.05)": error("copies", 3),
        "pixels at 1 to 3, %": percent("pixels_1_3"),
        "pixels at 4 to 20, %": percent("pixels_4_20"),
    }
    if not any("agreement" in s for s in columns.values()):
        del rows["agreement with the labels"]
    first = max(map(len, rows))
    widths = [max(len(name), 17) for name in columns]
    lines = [["", *columns], *([name, *map(cell, columns.values())] for name, cell in rows.items())]
    return "\n".join(
        f"{name:{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True))
        for name, *cells in lines
    )


def pairs_of_test_images(
    *, weights: str | Path = WEIGHTS, data_dir: str | Path = "data"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block for `save_pairs`: test images, which nobody copied, for comparison."""
    distances, labels, index = _test_distances(weights, data_dir)
    _, relative = _novelty(distances, labels, weights, data_dir)
    return _test_sample(data_dir), relative, _images("train", data_dir)[index]


def save_pairs(
    path: str | Path, blocks: dict[str, tuple[Tensor, Tensor, Tensor]], count: int = 16
) -> None:
    """Write a PNG of the closest pairs: each image above its nearest training image.

    Args:
        blocks: for each caption: images (N, 1, 28, 28) uint8, their relative distances (N,), and
            their nearest training images (N, 1, 28, 28).
        count: pairs per block.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image, ImageDraw

    scale, gap, head = 2, 4, 20
    cell = 28 * scale + gap
    height = head + 2 * cell + gap
    picture = Image.new("L", (count * cell + gap, len(blocks) * height), 255)
    draw = ImageDraw.Draw(picture)
    for block, (caption, (images, distances, nearest_images)) in enumerate(blocks.items()):
        order = distances.argsort()[:count]
        span = f"{distances[order[0]]:.2f} to {distances[order[-1]]:.2f}"
        text = f"{caption} closest to a training image, which is below (novelty {span})"
        draw.text((gap, block * height + gap), text, fill=0)
        for row, tiles in enumerate((images[order], nearest_images[order])):
            for column, tile in enumerate(tiles):
                tile = Image.fromarray(tile[0].numpy()).resize((28 * scale,) * 2, Image.NEAREST)
                picture.paste(tile, (gap + column * cell, block * height + head + row * cell))
    save_png(path, picture)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = cli.Parser(__doc__)
    p.add_argument(
        "samples", nargs="*", metavar="FILE.npy", help=f"at least {MIN_SAMPLES} images to score"
    )
    p.add_argument(
        "--train",
        action="store_true",
        help="train the classifier of --weights again, in a few minutes. This replaces the file. "
        "Scores of two classifiers cannot be compared",
    )
    p.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE.npy",
        help="the digits that were asked for, one file per array (default: FILE.labels.npy beside "
        "FILE.npy, if it is there)",
    )
    p.add_argument(
        "--json",
        type=cli.output_file(".json"),
        metavar="FILE.json",
        help="also write the scores to this file",
    )
    p.add_argument(
        "--pairs",
        type=cli.output_file(".png"),
        metavar="FILE.png",
        help="also draw the samples closest to training images",
    )
    p.add_argument(
        "--weights",
        type=Path,
        default=WEIGHTS,
        metavar="FILE.pt",
        help="the classifier",
    )
    cli.add_data(p)
    args = p.parse_args(argv)
    if args.train and (args.samples or args.labels or args.json or args.pairs):
        p.error("--train scores no images: give --weights and --data only")
    if not args.train and not args.samples:
        p.error("which images? Give at least one FILE.npy, such as infer.py --save-npy writes")
    if len(set(args.samples)) < len(args.samples):
        p.error("an array is there twice")
    if args.labels is not None and len(args.labels) != len(args.samples):
        p.error(f"{len(args.labels)} --labels for {len(args.samples)} arrays")
    if args.train:
        try:
            cli.output_file(".pt")(str(args.weights))
        except argparse.ArgumentTypeError as error:
            p.error(f"argument --weights: {error}")
    return args


def labels_of(args: argparse.Namespace, sets: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the labels that belong to each set of samples, or None if there are none."""
    beside = [labels_file(path) for path in sets]
    files = args.labels or [path if path.exists() else None for path in beside]
    pairs = zip(sets.items(), files, strict=True)
    return {path: file and read_labels(file, len(images)) for (path, images), file in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.train:
        if args.weights.exists():
            load_classifier(args.weights)  # another kind of file is not replaced
        began = time.perf_counter()
        print(f"training the classifier {args.weights}, for a few minutes", flush=True)
        right = train(args.weights, data_dir=args.data)
        seconds = time.perf_counter() - began
        print(f"wrote {args.weights}: test accuracy {right:.2%}, {seconds:.0f} s")
        return 0
    sets = {path: read_samples(path) for path in args.samples}
    where = {"weights": args.weights, "data_dir": args.data}
    asked = labels_of(args, sets)
    scores, blocks = {}, {}
    for path, images in sets.items():
        figures = score_and_pairs(images, asked=asked[path], **where)
        scores[path], blocks[f"{path}: samples"] = figures
    sizes = sorted({s["n"] for s in scores.values()})
    has_labels = any(labels is not None for labels in asked.values())
    references = {n: reference(n, asked=has_labels, **where) for n in sizes}
    sha256 = hashlib.sha256(args.weights.read_bytes()).hexdigest()
    try:
        if args.json:
            report = {"weights": str(args.weights), "sha256": sha256}
            report |= {"scores": scores, "references": references}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
        if args.pairs:
            blocks["test images"] = pairs_of_test_images(**where)
            save_pairs(args.pairs, blocks)
    finally:  # also if a file could not be written
        print_scores(args.weights, sha256, scores, references)
    return 0


def print_scores(weights: Path, sha256: str, scores: dict, references: dict[int, dict]) -> None:
    """Print the table of the scores, with the real-data reference of each number of images."""
    print(f"against the 10,000 test images of MNIST; classifier {weights} ({sha256[:8]})\n")
    print(format_table(scores | {f"real, n {s['n']:,}": s for s in references.values()}))
    print(
        "\n± is the standard error over the samples (recall and coverage: over the test images).\n"
        "The Fréchet distance falls as n grows: compare equal n only. The column 'real' is the\n"
        "score of real training images; its novelty is that of test images."
    )


if __name__ == "__main__":
    cli.run(main)
