"""What several test files use."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ("--channels", "8", "--batch-size", "16", "--timesteps", "100", "--log-every", "5")


def command(script: str, *args: object, processes: int = 1) -> list[str]:
    """Return the command line of a script, under torchrun if there are several processes."""
    torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone")
    launcher = (*torchrun, "--") if processes > 1 else ()
    return [sys.executable, *launcher, str(ROOT / script), *map(str, args)]


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a finished process gave one line with these words, and exit code 2."""
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def copy_lab(folder: Path) -> None:
    """Copy the modules of the lab, without its tests and benchmarks."""
    for room in ("", "lab/", "training/", "experiments/"):
        for path in ROOT.glob(f"{room}*.py"):
            (folder / room).mkdir(exist_ok=True)
            shutil.copy(path, folder / room)


def copy_lab_with_edit(folder: Path, file: str, old: str, new: str) -> None:
    """Copy the modules of the lab; in one file, replace a text that stands there once."""
    copy_lab(folder)
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
