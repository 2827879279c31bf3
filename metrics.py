"""The yardstick: how near uint8 images are to MNIST's test split, as a small classifier sees them.

train the classifier:  python metrics.py
score images:          python metrics.py samples.npy
several, and more:     python metrics.py a.npy b.npy --json scores.json --pairs pairs.png

An array is uint8 and (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1). Its figures:

Fréchet distance (LeNet features)
    Heusel et al. 2017, arXiv:1706.08500, eq. 6. Not the FID of papers, whose features are
    Inception's. It falls with n even for real images: compare equal n only.
KID (LeNet features)
    Binkowski et al. 2018, arXiv:1801.01401. Unbiased, so near 0 for real images at every n.
precision, recall
    Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1-2, k = 3, equal numbers of both sides.
confidence, labels
    The mean of the classifier's largest probability of a digit, and the digits it reads.
novelty, copies
    Of each sample the distance (in pixels, not features) to the nearest training image, over the
    mean for test images read as the same digit: 1s all look alike, 8s don't. Novelty is the mean of
    that ratio, copies the share nearer than 95 % of those test images. A model that copies has a
    novelty near 0 and copies near 100 %; --pairs draws the closest pairs by that ratio.

The floor is the same figures for as many real training images (all 60,000 if n is more), which no
sample can be expected to beat; its novelty is that of test images, a training image being its own
nearest. All of it runs on the CPU and draws every subset from a fixed seed: figures depend on the
samples alone.
"""

import argparse
import hashlib
import io
import json
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cli
from checkpoint import save, write_atomically
from cli import UserError
from data import load_dataset

WEIGHTS = Path(__file__).parent / "checkpoints" / "lenet-mnist.pt"
MIN_ACCURACY = 0.992  # on the test split; a classifier below it is not written
MIN_SAMPLES = 100  # below it the spread of 84 features is mostly unseen
SUBSETS = 10  # left out in turn for the standard errors
TEST_NEAREST = 2000  # test images whose nearest training image is looked up
NO_DIGIT = 10  # the classifier's eleventh class


class LeNet(nn.Module):
    """LeNet-5's five layers (LeCun et al. 1998) with ReLU, max-pooling and wider convolutions.

    (N, 1, 28, 28) pixels in [0, 255], of any dtype, to (N, 11) float32 logits: ten digits and no
    digit at all. Its features are the 84 units before the last layer.

    A classifier of digits alone is free to put all else anywhere: one like this read noise as an 8
    with 98 % confidence and had it among the real images, at precision 1.0.
    """

    num_features = 84

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, padding=2)
        self.conv2 = nn.Conv2d(20, 40, 5)
        self.fc1 = nn.Linear(40 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, self.num_features)
        self.fc3 = nn.Linear(self.num_features, NO_DIGIT + 1)

    def features(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images.float().div(255))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc3(self.features(images))


# --------------------------------------------------------------------------------- the classifier


def train(
    path: str | Path = WEIGHTS,
    *,
    data_dir: str | Path = "data",
    seed: int = 0,
    epochs: int = 10,
    batch_size: int = 128,
) -> float:
    """Train a LeNet on MNIST's training split, write it to `path` and return its test accuracy.

    The test split is looked at once, after the last step: nothing is selected on it.

    Raises:
        UserError: an accuracy below MIN_ACCURACY, or a path that can't be written. What stood at
            `path` still does.
    """
    images, labels = load_dataset("mnist", "train", data_dir)
    torch.manual_seed(seed)
    net = LeNet()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", unit="step", disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))[: len(images) // batch_size * batch_size]
            for index in order.split(batch_size):
                digits = jitter(images[index])
                others = non_digits(digits[: batch_size // 5])
                targets = torch.cat([labels[index], torch.full((len(others),), NO_DIGIT)])
                loss = F.cross_entropy(net(torch.cat([digits, others])), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    right = accuracy(net, data_dir)
    if right < MIN_ACCURACY:
        raise UserError(
            f"{right:.2%} on the test split, below {MIN_ACCURACY:.1%}: {path} not written"
        )
    save(path, {"state_dict": net.state_dict(), "test_accuracy": right, "seed": seed})
    return right


def jitter(images: Tensor) -> Tensor:
    """Each image under a random affine map of its own: a shift of up to 2 pixels, and I +- 0.15."""
    spread = torch.tensor([0.15, 0.15, 2 / 14])  # a shift's unit is half the width, 14 pixels
    maps = torch.eye(2, 3) + spread * torch.empty(len(images), 2, 3).uniform_(-1, 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def non_digits(digits: Tensor) -> Tensor:
    """What is no digit any more, from N digits (N, 1, 28, 28) float in [0, 255], N rounded to 3s.

    A third each: faint digits in noise of any strength, averages of four digits, and digits whose
    7 x 7 blocks have changed places.
    """
    faint, blends, blocks = digits[: len(digits) // 3 * 3].chunk(3)
    fade = 0.3 * torch.rand(len(faint), 1, 1, 1)
    strength = 255 * torch.rand(len(faint), 1, 1, 1)
    faint = fade * faint + (1 - fade) * strength * torch.rand_like(faint)
    blends = torch.stack([blends.roll(i, 0) for i in range(4)]).mean(0)
    blocks = F.unfold(blocks, 7, stride=7)  # (N / 3, 49, 16)
    places = torch.rand(len(blocks), 1, 16).argsort(2).expand_as(blocks)
    blocks = F.fold(blocks.gather(2, places), 28, 7, stride=7)
    return torch.cat([faint, blends, blocks])


def accuracy(net: LeNet, data_dir: str | Path = "data") -> float:
    """The share of MNIST's test split that `net` reads right, in [0, 1]."""
    images, labels = load_dataset("mnist", "test", data_dir)
    return (features(images, net)[1].argmax(1) == labels).double().mean().item()


@lru_cache
def load_classifier(path: str | Path = WEIGHTS) -> LeNet:
    """The classifier of a file that `train` wrote, on the CPU.

    Raises:
        UserError: a file that is not there or is not such a file.
    """
    net = LeNet()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except FileNotFoundError:
        raise UserError(f"there is no classifier {path}: `python metrics.py` trains it") from None
    except Exception as error:  # unpickling hostile bytes can raise anything
        reason = str(error).partition("\n")[0].partition(". ")[0]  # torch's goes on for ten lines
        raise UserError(f"{path} is not a classifier of metrics.py: {reason}") from None
    return net.eval().requires_grad_(False)


def features(images: Tensor, classifier: LeNet | None = None) -> tuple[Tensor, Tensor]:
    """What the classifier, load_classifier()'s unless given, makes of images (N, 1, 28, 28) uint8.

    Returns:
        The features (N, 84), >= 0, and the digits' probabilities (N, 10), both float32. What a row
        of these lacks to 1 is the probability of no digit.
    """
    net = load_classifier() if classifier is None else classifier
    with torch.no_grad():
        feats = torch.cat([net.features(chunk) for chunk in images.split(1000)])
        return feats, net.fc3(feats).softmax(1)[:, :NO_DIGIT]


# -------------------------------------------- the measures, on features (N, D), D > 1, of any kind


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Heusel 2017 eq. 6: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^(1/2)
    # C_a C_b has the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2): no general matrix root
    tr_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * tr_root).item()


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Binkowski 2018: MMD^2 for k(x, y) = (x.y / D + 1)^3, unbiased, and its standard error.

    The estimator is Gretton et al. 2012, eq. 3; the error is that of `a` alone. With
    u = (x / sqrt(D), 1) the kernel is (u.v)^3, the inner product of the outer cubes of u and v: a
    sum of k over pairs is then one inner product of sums over samples, exact and linear in N.
    """
    u, v = (torch.cat([x.double() / x.shape[1] ** 0.5, x.new_ones(len(x), 1)], 1) for x in (a, b))
    m, n = len(u), len(v)
    parts = [u[index] for index in _subsets(m)]
    sums = torch.stack([_sum_of_cubes(part) for part in parts])
    selfs = torch.stack([_self_kernels(part) for part in parts])
    total_v = _sum_of_cubes(v)
    k_vv = (total_v.square().sum() - _self_kernels(v)) / (n * (n - 1))

    def mmd2(total_u: Tensor, self_u: Tensor, m: int) -> float:
        k_uu = (total_u.square().sum() - self_u) / (m * (m - 1))
        k_uv = (total_u * total_v).sum() / (m * n)
        return (k_uu + k_vv - 2 * k_uv).item()

    total_u, self_u = sums.sum(0), selfs.sum()
    left_out = [
        mmd2(total_u - sums[i], self_u - selfs[i], m - len(part)) for i, part in enumerate(parts)
    ]
    return mmd2(total_u, self_u, m), _jackknife(left_out)


def _sum_of_cubes(u: Tensor) -> Tensor:
    """Sum over the rows of u (N, E) of their outer cubes, (E * E, E)."""
    # 50 squares of E = 85 stay in a core's cache
    return sum((c[:, :, None] * c[:, None, :]).flatten(1).T @ c for c in u.split(50))


def _self_kernels(u: Tensor) -> Tensor:
    return u.square().sum(1).pow(3).sum()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float, float, float]:
    """Kynkäänniemi 2019 eq. 1-2: the shares of fakes in the reals' manifold and of the reverse.

    A set's manifold is the union of balls around its points, each as wide as the distance to the
    point's k-th neighbour in the set.

    Returns:
        Precision, its standard error over the fakes, recall, and its, which takes the reals to be
        independent: fakes that are drawn anew move recall by up to a third more than it says.
    """
    real, fake = real.double(), fake.double()
    precise, found = _within(fake, real, k), _within(real, fake, k)
    return (
        *(precise.mean().item(), _standard_error(precise)),
        *(found.mean().item(), _standard_error(found)),
    )


def _within(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """1 for a point in the centres' manifold, 0 for one outside: (len(points),) float64."""
    # the (k + 1)-th smallest: a point is its own nearest
    radii = torch.cat(
        [torch.cdist(c, centres).kthvalue(k + 1, dim=1).values for c in centres.split(1000)]
    )
    inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(1000)]
    return torch.cat(inside).double()


def nearest(images: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean distance from each image to the nearest of `pool`, and that one's index.

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
            # |x - y|^2 - |x|^2: enough to choose by, though float32 rounds it
            least, which = torch.addmm(norm, x[rows], y.T, alpha=-2).min(1)
            closer = least < best[rows]
            best[rows] = torch.where(closer, least, best[rows])
            index[rows] = torch.where(closer, which + start, index[rows])
    for lo in range(0, len(x), 1000):
        rows = slice(lo, lo + 1000)
        best[rows] = (x[rows] - pool[index[rows]].flatten(1)).norm(dim=1) / 255
    return best, index


def _subsets(n: int) -> tuple[Tensor, ...]:
    """SUBSETS disjoint random sets of indices that make up range(n)."""
    return _draw(n, n).tensor_split(SUBSETS)


def _draw(total: int, n: int) -> Tensor:
    """n of range(total), the same at every call: MNIST's files and users' arrays have an order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]


def _jackknife(values: Sequence[float]) -> float:
    """The standard error, from B estimates that each leave out one of B subsets (Efron 1981)."""
    values = torch.tensor(values, dtype=torch.float64)
    return ((len(values) - 1) * values.var(correction=0)).sqrt().item()


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


# ---------------------------------------------------------------------------------------- a score


def as_images(array: np.ndarray | Tensor) -> Tensor:
    """A (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1) uint8 array as (N, 1, 28, 28).

    Raises:
        UserError: any other shape or dtype, or fewer than MIN_SAMPLES images.
    """
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if shape[1:] not in ((28, 28), (1, 28, 28), (28, 28, 1)):
        raise UserError(
            f"an array of shape {shape}, where (N, 28, 28), (N, 1, 28, 28) or (N, 28, 28, 1) "
            "is wanted"
        )
    if dtype != "uint8":
        raise UserError(
            f"{dtype} pixels, where uint8 in 0 to 255 is wanted: scale and round them first"
        )
    if len(array) < MIN_SAMPLES:
        raise UserError(f"{len(array)} images, where at least {MIN_SAMPLES} are needed")
    images = torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array.cpu()
    return images.reshape(-1, 1, 28, 28)


def score(
    images: np.ndarray | Tensor, *, weights: str | Path = WEIGHTS, data_dir: str | Path = "data"
) -> dict:
    """Every figure of `images`, a uint8 array that `as_images` takes, against MNIST's test split.

    Returns:
        A dict of Python numbers, JSON-able. `*_se` are standard errors over the samples, recall's
        over the test images: the test split is the same for every score.

        n, n_test, n_manifold   images scored, test images, images each way in precision and recall
        frechet, frechet_se     Fréchet distance (LeNet features)
        kid, kid_se             KID (LeNet features)
        precision, precision_se, recall, recall_se   in [0, 1]
        confidence, confidence_se   mean of the largest probability of a digit, in [0, 1]
        labels                  10 counts
        label_entropy, label_entropy_se   of their shares, in bits, at most log2(10)
        nearest, nearest_se     mean distance to the nearest training image, pixels in [0, 1]
        novelty, novelty_se     mean of that distance over its digit's mean for test images
        copies, copies_se       share nearer than 95 % of test images read as the same digit
    """
    return score_and_pairs(as_images(images), weights=weights, data_dir=data_dir)[0]


def score_and_pairs(
    images: Tensor, *, weights: str | Path = WEIGHTS, data_dir: str | Path = "data"
) -> tuple[dict, tuple[Tensor, Tensor, Tensor]]:
    """`score` of images (N, 1, 28, 28) uint8, and a block of `save_pairs`."""
    feats, probs = features(images, load_classifier(weights))
    train_images = _images("train", data_dir)
    distances, index = nearest(images, train_images)
    novelty, relative = _novelty(distances, probs.argmax(1), weights, data_dir)
    figures = _fidelity(feats, probs, weights, data_dir) | novelty
    return figures, (images, relative, train_images[index])


def floor(n: int, *, weights: str | Path = WEIGHTS, data_dir: str | Path = "data") -> dict:
    """The score of n random training images, of all 60,000 if n is more; novelty: test images'."""
    train_images = _images("train", data_dir)
    images = train_images[_draw(len(train_images), n)]
    distances, labels, _ = _test_distances(weights, data_dir)
    novelty, _ = _novelty(distances, labels, weights, data_dir)
    return _fidelity(*features(images, load_classifier(weights)), weights, data_dir) | novelty


def _fidelity(feats: Tensor, probs: Tensor, weights: str | Path, data_dir: str | Path) -> dict:
    test = _test_features(weights, data_dir)
    n, m = len(feats), min(len(feats), len(test))
    parts = _subsets(n)
    others = [torch.cat(parts[:i] + parts[i + 1 :]) for i in range(SUBSETS)]
    kid_value, kid_se = kid(feats, test)
    # as many of each, as in the paper: a denser set has smaller balls
    precision, precision_se, recall, recall_se = precision_recall(
        test[_draw(len(test), m)], feats[_draw(n, m)]
    )
    confidence, labels = probs.max(1)
    counts = labels.bincount(minlength=NO_DIGIT)
    surprisal = -(counts.double() / n).log2()[labels]  # of each label, in bits; entropy is its mean
    return {
        "n": n,
        "n_test": len(test),
        "n_manifold": m,
        "frechet": frechet_distance(feats, test),
        "frechet_se": _jackknife([frechet_distance(feats[index], test) for index in others]),
        "kid": kid_value,
        "kid_se": kid_se,
        "precision": precision,
        "precision_se": precision_se,
        "recall": recall,
        "recall_se": recall_se,
        "confidence": confidence.mean().item(),
        "confidence_se": _standard_error(confidence),
        "labels": counts.tolist(),
        "label_entropy": surprisal.mean().item(),
        "label_entropy_se": _standard_error(surprisal),
    }


def _novelty(
    distances: Tensor, labels: Tensor, weights: str | Path, data_dir: str | Path
) -> tuple[dict, Tensor]:
    """A score's last six figures, and the distances over their digit's mean for test images."""
    test_distances, test_labels, _ = _test_distances(weights, data_dir)
    by_digit = [test_distances[test_labels == digit] for digit in range(NO_DIGIT)]
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
def _test_distances(weights: str | Path, data_dir: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Of TEST_NEAREST test images the distance to a training image, the digit read, its index."""
    images = _test_sample(data_dir)
    distances, index = nearest(images, _images("train", data_dir))
    return distances, features(images, load_classifier(weights))[1].argmax(1), index


def _test_sample(data_dir: str | Path) -> Tensor:
    test = _images("test", data_dir)
    return test[_draw(len(test), TEST_NEAREST)]


# ------------------------------------------------------------------------------- the command line


def read_samples(path: str | Path) -> Tensor:
    """The images of a .npy file, (N, 1, 28, 28) uint8; a UserError names the file that won't do."""
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    # whatever a damaged header makes numpy's parser raise, the file is no array
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["damaged"])[0]
        raise UserError(f"cannot read {path} as a .npy array: {reason}") from None
    try:
        return as_images(array)
    except UserError as error:
        raise UserError(f"{path} holds {error}") from None


def format_table(columns: dict[str, dict]) -> str:
    """Scores side by side, a column each, under their names."""

    def error(key: str, digits: int):
        return lambda s: f"{s[key]:.{digits}f} ± {s[key + '_se']:.{digits}f}"

    def share(digit: int):
        return lambda s: f"{100 * s['labels'][digit] / s['n']:.1f}"

    rows = {
        "n": lambda s: f"{s['n']:,}",
        "Fréchet distance (LeNet features)": error("frechet", 2),
        "KID (LeNet features)": error("kid", 2),
        "precision": error("precision", 3),
        "recall": error("recall", 3),
        "  images each way": lambda s: f"{s['n_manifold']:,}",
        "confidence": error("confidence", 4),
        "labels' entropy, of 3.32 bits": error("label_entropy", 3),
        **{f"  read as {digit}, %": share(digit) for digit in range(10)},
        "nearest training image": error("nearest", 3),
        "novelty (1 as test images)": error("novelty", 3),
        "copies (0.05 as test images)": error("copies", 3),
    }
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
    """A block of `save_pairs` for test images: how close two different people's digits come."""
    distances, labels, index = _test_distances(weights, data_dir)
    _, relative = _novelty(distances, labels, weights, data_dir)
    return _test_sample(data_dir), relative, _images("train", data_dir)[index]


def save_pairs(
    path: str | Path, blocks: dict[str, tuple[Tensor, Tensor, Tensor]], count: int = 16
) -> None:
    """Write a PNG of each block's `count` closest pairs, each image above its training image.

    Args:
        path: where to.
        blocks: for each caption (N, 1, 28, 28) uint8 images, their relative distances (N,), and the
            training images (N, 1, 28, 28) nearest to them.
        count: pairs of a block.

    Raises:
        UserError: the file can't be written.
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
        text = f"{caption} closest to a training image, that image below (novelty {span})"
        draw.text((gap, block * height + gap), text, fill=0)
        for row, tiles in enumerate((images[order], nearest_images[order])):
            for column, tile in enumerate(tiles):
                tile = Image.fromarray(tile[0].numpy()).resize((28 * scale,) * 2, Image.NEAREST)
                picture.paste(tile, (gap + column * cell, block * height + head + row * cell))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getbuffer())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = cli.Parser(__doc__)
    p.add_argument("samples", nargs="*", metavar="FILE.npy", help="images to score; none: train")
    p.add_argument(
        "--json",
        type=cli.output_file(".json"),
        metavar="FILE.json",
        help="write the figures there as well",
    )
    p.add_argument(
        "--pairs",
        type=cli.output_file(".png"),
        metavar="FILE.png",
        help="draw the closest pairs there",
    )
    p.add_argument(
        "--weights",
        type=Path,
        default=WEIGHTS,
        metavar="FILE.pt",
        help="the classifier, to read or write",
    )
    p.add_argument("--data", default="data", metavar="DIR", help="where MNIST is, or will be")
    args = p.parse_args(argv)
    if not args.samples and (args.json or args.pairs):
        p.error("--json and --pairs need samples to score")
    if not args.samples:
        try:
            cli.output_file(".pt")(str(args.weights))
        except argparse.ArgumentTypeError as error:
            p.error(f"argument --weights: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.samples:
        began = time.perf_counter()
        print(f"training the classifier {args.weights}: a few minutes", flush=True)
        right = train(args.weights, data_dir=args.data)
        seconds = time.perf_counter() - began
        print(f"wrote {args.weights}: {right:.2%} of the test split right, {seconds:.0f} s")
        return 0
    sets = {path: read_samples(path) for path in args.samples}
    where = {"weights": args.weights, "data_dir": args.data}
    scores, blocks = {}, {}
    for path, images in sets.items():
        scores[path], blocks[f"{path}: samples"] = score_and_pairs(images, **where)
    sizes = sorted({s["n"] for s in scores.values()})
    floors = {n: floor(n, **where) for n in sizes}
    sha256 = hashlib.sha256(args.weights.read_bytes()).hexdigest()
    print(f"against MNIST's test split, 10,000 images, seen by {args.weights} ({sha256[:8]})\n")
    print(format_table(scores | {f"floor, n {s['n']:,}": s for s in floors.values()}))
    print(
        "\n± is the standard error over the samples, recall's over the test images. The Fréchet\n"
        "distance falls with n: compare equal n only. The floor is real training images, with the\n"
        "novelty of test images."
    )
    if args.json:
        report = {"weights": str(args.weights), "sha256": sha256}
        report |= {"scores": scores, "floors": floors}
        write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    if args.pairs:
        blocks["test images"] = pairs_of_test_images(**where)
        save_pairs(args.pairs, blocks)
    return 0


if __name__ == "__main__":
    cli.run(main)
