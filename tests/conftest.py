"""What the tests of the scripts share: the dataset, a way to run a script, a small checkpoint."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One thread a process, here and in the scripts that are run: set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import cli  # noqa: E402
from data import load_dataset  # noqa: E402

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
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """As `run`, but in this process: for what ends before it trains, without 5 s of imports."""

    def run_here(script: str, *args: object) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.run(importlib.import_module(script.removesuffix(".py")).main)
        return subprocess.CompletedProcess(args, ended.value.code, *capsys.readouterr())

    return run_here


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
