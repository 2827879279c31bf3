"""Fixtures of the tests of scripts: the data set, ways to run a script, a small checkpoint."""

import importlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

# One thread per process, here and in the scripts that tests start: set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

if hasattr(signal, "SIGHUP"):  # nohup makes every process ignore it, but some tests send it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from lab import cli  # noqa: E402
from lab.data import load_dataset  # noqa: E402

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from helpers import ROOT, TINY, command  # noqa: E402


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def data_dir(shared_folder) -> Path:
    """The folder of the real MNIST. The first test that needs it downloads it."""
    with FileLock(shared_folder / "data.lock"):
        load_dataset("mnist", "train", ROOT / "data")
    return ROOT / "data"


@pytest.fixture(scope="session")
def train_split(data_dir):
    """MNIST's training images and labels."""
    return load_dataset("mnist", "train", data_dir)


@pytest.fixture(scope="session")
def real_images(data_dir):
    """MNIST's test images, in a random order."""
    images, _ = load_dataset("mnist", "test", data_dir)
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def run(tmp_path):
    """Run a script in an empty folder, in a process of its own; returns the finished process."""

    def run(script: str, *args: object, processes: int = 1) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(script, *args, processes=processes),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Run a script in an empty folder, in this process, which saves 5 s of imports."""

    def run_here(script: str, *args: object) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.run(importlib.import_module(script.removesuffix(".py")).main)
        return subprocess.CompletedProcess(args, ended.value.code or 0, *capsys.readouterr())

    return run_here


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_folder, data_dir) -> Path:
    """A v-model after a few steps, as train.py writes it."""
    return train_tiny(shared_folder, data_dir, "v")


@pytest.fixture(scope="session")
def tiny_eps_checkpoint(shared_folder, data_dir) -> Path:
    """An eps-model after a few steps, as train.py writes it."""
    return train_tiny(shared_folder, data_dir, "eps")


@pytest.fixture(scope="session")
def labelled_checkpoint(shared_folder, data_dir) -> Path:
    """A v-model with labels after a few steps, as train.py writes it."""
    return train_tiny(shared_folder, data_dir, "v", "--labels")


def train_tiny(shared_folder: Path, data_dir: Path, pred: str, *further: str) -> Path:
    """Train a small model, once for all processes of pytest-xdist."""
    folder = shared_folder / "-".join(("tiny", pred, *further))
    out = folder / ("tiny.pt" if pred == "v" else f"{pred}.pt")
    arguments = (*TINY, "--steps", 30, "--data", data_dir, "--pred", pred, "--out", out, *further)
    with FileLock(f"{folder}.lock"):
        if not out.exists():
            folder.mkdir()
            subprocess.run(
                command("train.py", *arguments), cwd=folder, check=True, capture_output=True
            )
    return out
