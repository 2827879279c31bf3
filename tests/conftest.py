"""What the tests of the scripts share: the dataset, a way to run a script, a small checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import load_dataset

ROOT = Path(__file__).parent.parent
TINY = ("--channels", "8", "--batch-size", "16", "--timesteps", "100", "--log-every", "5")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real MNIST, downloaded at the first test that needs it."""
    load_dataset("mnist", "train", ROOT / "data")
    return ROOT / "data"


def command(script: str, *args: object, processes: int = 1) -> list[str]:
    """The command line of a script, under torchrun for several processes."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--standalone",
        "--",
    ]
    launcher = torchrun if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, args)]


@pytest.fixture
def run(tmp_path):
    """Run a script in an empty folder, one thread a process; returns the finished process."""

    def run(script: str, *args: object, processes: int = 1) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(script, *args, processes=processes),
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def refused():
    """Assert that a finished process refused in one line, with exit code 2 and no traceback."""

    def refused(done: subprocess.CompletedProcess, *words: str) -> None:
        lines = [line for line in done.stderr.splitlines() if line]
        assert done.returncode == 2, done.stderr
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert all(word in lines[0] for word in words), lines[0]

    return refused


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, data_dir) -> Path:
    """A v-model of a few steps, as train.py leaves it."""
    folder = tmp_path_factory.mktemp("tiny")
    arguments = (*TINY, "--steps", 30, "--data", data_dir, "--out", "tiny.pt")
    subprocess.run(command("train.py", *arguments), cwd=folder, check=True, capture_output=True)
    return folder / "tiny.pt"
