"""lab/data.py: the real files, their SHA-256, and what is refused."""

import shutil

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


def test_ranges_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = data.to_unit_range(pixels)
    assert unit.min() == -1
    assert unit.max() == 1
    assert torch.equal(data.to_uint8(unit), pixels)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


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
