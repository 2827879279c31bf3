"""The classifier whose features metrics.py compares: a LeNet for MNIST."""

from functools import lru_cache
from pathlib import Path

from lab.checkpoint import save
from lab.data import load_dataset
from lab.errors import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

WEIGHTS = Path(__file__).parent.parent / "checkpoints" / "lenet-mnist.pt"
MIN_ACCURACY = 0.992  # on the test split; a classifier below it is not written
NO_DIGIT = 10  # the eleventh class


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU, max-pooling and wider convolutions.

    It maps (N, 1, 28, 28) pixels in [0, 255], of any dtype, to (N, 11) float32 logits: ten digits,
    and "no digit". Its features are the 84 units before the last layer.

    Without the eleventh class the features of other images could lie anywhere. Such a classifier
    read noise as an 8 with 98 % confidence, and noise had a precision of 1.0.
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


def train(
    path: str | Path = WEIGHTS,
    *,
    data_dir: str | Path = "data",
    seed: int = 0,
    epochs: int = 10,
    batch_size: int = 128,
) -> float:
    """Train a LeNet on MNIST's training split, write it to `path` and return its test accuracy.

    The test split is used once, after the last step. Nothing is selected on it.

    Raises:
        UserError: the accuracy is below MIN_ACCURACY, or `path` cannot be written. The old file at
            `path` is then untouched.
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
    """Move each image by a random affine map: up to 2 pixels, and a matrix within I +- 0.15."""
    spread = torch.tensor([0.15, 0.15, 2 / 14])  # the unit of a shift is half the width, 14 pixels
    maps = torch.eye(2, 3) + spread * torch.empty(len(images), 2, 3).uniform_(-1, 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def non_digits(digits: Tensor) -> Tensor:
    """Turn digits (N, 1, 28, 28) float in [0, 255] into images that show no digit.

    A third each: faint digits in noise of any strength, averages of four digits, and digits whose
    7 x 7 blocks have changed places. N is rounded down to a multiple of 3.
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
    """Return the accuracy of `net` on MNIST's test split, in [0, 1]."""
    images, labels = load_dataset("mnist", "test", data_dir)
    return (features(images, net)[1].argmax(1) == labels).double().mean().item()


@lru_cache
def load_classifier(path: str | Path = WEIGHTS) -> LeNet:
    """Return the classifier in a file that `train` wrote, on the CPU.

    Raises:
        UserError: the file is missing or is not such a file.
    """
    net = LeNet()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("its weights are not finite")
    except FileNotFoundError:
        raise UserError(
            f"there is no classifier {path}; `python metrics.py --train` trains one"
        ) from None
    except Exception as error:  # hostile bytes can raise any exception in the unpickler
        reason = str(error).partition("\n")[0].partition(". ")[0]  # torch's goes on for ten lines
        raise UserError(f"{path} is not a classifier of metrics.py: {reason}") from None
    return net.eval().requires_grad_(False)


def features(images: Tensor, classifier: LeNet | None = None) -> tuple[Tensor, Tensor]:
    """Return the features and the digit probabilities of images (N, 1, 28, 28) uint8.

    Args:
        classifier: default `load_classifier()`.

    Returns:
        Features (N, 84), >= 0, and probabilities (N, 10), both float32. The probabilities of a row
        and that of "no digit", which is left out, add up to 1.
    """
    net = load_classifier() if classifier is None else classifier
    with torch.no_grad():
        feats = torch.cat([net.features(chunk) for chunk in images.split(1000)])
        return feats, net.fc3(feats).softmax(1)[:, :NO_DIGIT]
