"""The study's own trainings: short ones, all on the same number of images.

They are runs of train.py, and are kept like the cells (see keys.py).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from lab import cli
from lab.checkpoint import load_model
from lab.distributed import Process
from lab.errors import UserError
from lab.threads import Crew

from tqdm import tqdm

from experiments.estimates import Estimate, Results, estimate
from experiments.grid import Subject, load_subjects
from experiments.keys import ROOT, training_key

BATCH_SIZE = 64
CALLS = 3  # a training image takes as long as 3 calls of the network: backward costs two
STEPS, ETAS = 20, (0.0, 1.0)  # how the trained models are sampled
AT_ONCE = 4  # trainings; each needs a gigabyte of memory


@dataclass(frozen=True)
class Schedule:
    """A noise schedule, with or without zero terminal SNR (Lin et al. 2023)."""

    beta_schedule: str
    zero_snr: bool = False

    @property
    def title(self) -> str:
        return self.beta_schedule + (", zero SNR" if self.zero_snr else "")


SCHEDULES = (Schedule("cosine"), Schedule("linear"), Schedule("linear", zero_snr=True))
DENSITIES = {"lognormal": "log-SNR normal", "uniform": "t uniform"}  # how training draws t


@dataclass(frozen=True)
class Training:
    """A model that the study trains."""

    pred: str
    schedule: Schedule
    density: str
    seed: int
    images: int
    weighted: bool = True  # whether the loss of eps has the weights that are train.py's default

    @property
    def name(self) -> str:
        zero_snr = "-zero-snr" if self.schedule.zero_snr else ""
        plain = "" if self.weighted else "-plain"
        kind = f"{self.pred}-{self.schedule.beta_schedule}{zero_snr}-{self.density}{plain}"
        return f"{kind}-{self.images}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return max(1, self.images // BATCH_SIZE)

    @property
    def calls(self) -> int:
        """The number of calls of the network (with one image) that take as long."""
        return CALLS * BATCH_SIZE * self.steps

    def arguments(self) -> list[str]:
        """Return the arguments of train.py that decide the weights."""
        schedule = self.schedule.beta_schedule
        return [
            *("--pred", self.pred, "--schedule", schedule, "--density", self.density),
            *("--seed", str(self.seed), "--steps", str(self.steps)),
            *("--batch-size", str(BATCH_SIZE)),
            *(["--zero-snr"] if self.schedule.zero_snr else []),
            *([] if self.weighted else ["--max-weight", "1"]),
        ]


def make_trainings(images: int, seeds: int) -> list[Training]:
    """Return the study's trainings.

    With every seed: v, eps, and eps with its loss unweighted. With seed 0: v with each schedule
    and each density.

    A schedule decides two things: which noise levels training sees, if t is drawn uniformly, and
    which noise levels sampling visits. With "lognormal" the first is the same for all schedules.
    """
    cosine = SCHEDULES[0]
    both = [
        Training(pred, cosine, "lognormal", seed, images)
        for seed in range(seeds)
        for pred in ("v", "eps")
    ]
    plain = [replace(t, weighted=False) for t in both if t.pred == "eps"]
    others = [Training("v", s, d, 0, images) for s, d in product(SCHEDULES, DENSITIES)]
    return both + plain + [training for training in others if training not in both]


def pick(trainings: Iterable[Training], **wanted: object) -> list[Training]:
    """Return the trainings with these values of their fields; weighted ones if not said."""
    wanted = {"weighted": True} | wanted
    return [t for t in trainings if all(getattr(t, k) == v for k, v in wanted.items())]


def estimate_of(
    trainings: Iterable[Training], results: Results, steps: int, eta: float
) -> Estimate:
    """Return the Fréchet distance of trainings that differ in their seed only."""
    return estimate([results.at(t.name, steps, eta)[0] for t in trainings], "frechet")


# ---------------------------------------------------------------------------------- training


def run_trainings(
    trainings: Sequence[Training], process: Process, folder: Path, data_dir: str, bar: tqdm
) -> None:
    """Train models. All processes must call this.

    Every process trains its share of the models. On a CPU it trains several at a time: two of them
    with one thread each make 1.4 times as many steps as one after the other with two threads.

    Args:
        bar: counts network calls, see `Training.calls`.

    Raises:
        UserError: a training failed.
        Stopped: a signal stopped them. They have saved their states, if they had begun.
    """
    mine = [trainings[i] for i in process.share(len(trainings))]
    threads = Crew(process.device).threads
    at_once = max(1, min(threads, AT_ONCE, len(mine)))
    waiting, running, signals = list(enumerate(mine, start=1)), {}, []
    with cli.handle_stop_signals(lambda number, _frame: signals.append(number)):
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    i, training = waiting.pop(0)
                    bar.write(f"training {i} of {len(mine)}: {training.name}")
                    path = path_of(training, process, folder)
                    child = start(training, path, process, data_dir, threads // at_once)
                    running[child] = training, path
                time.sleep(0.5)
                bar.refresh()  # its clock
                if signals:
                    raise cli.Stopped(128 + signals[0])
                for child in [child for child in running if child.poll() is not None]:
                    training, path = running.pop(child)
                    if child.returncode:
                        log = path.with_suffix(".log")
                        raise UserError(f"training {training.name} failed: see {log}")
                    bar.update(training.calls * process.world)
        finally:  # what still runs saves its state
            for child in running:
                child.send_signal(signals[0] if signals else signal.SIGTERM)
            for child in running:
                child.wait()
    process.barrier()


def load_trained(trainings: Sequence[Training], process: Process, folder: Path) -> list[Subject]:
    """Load the models of trainings that are kept."""
    paths = [path_of(training, process, folder) for training in trainings]
    return load_subjects(paths, process.device, [t.name for t in trainings])


def missing_trainings(
    trainings: Sequence[Training], process: Process, folder: Path
) -> list[Training]:
    """Return the trainings that are not kept yet. All processes must call this."""
    return process.agree([t for t in trainings if not is_complete(path_of(t, process, folder), t)])


def path_of(training: Training, process: Process, folder: Path) -> Path:
    """Return the checkpoint of a training."""
    key = training_key(tuple(training.arguments()), process.device.type)
    return folder / f"{training.name}-{key}.pt"


def is_complete(path: Path, training: Training) -> bool:
    """Return whether a training has ended: it writes its checkpoint at every epoch, too."""
    return path.exists() and load_model(path)[1]["training"]["step"] == training.steps


def start(
    training: Training, path: Path, process: Process, data_dir: str, threads: int
) -> subprocess.Popen:
    """Start train.py, from its last saved state if there is one. Its output goes to NAME.log."""
    state = path.with_suffix(".state.pt")
    new = [*training.arguments(), f"--out={path}", f"--samples={path.parent / 'samples'}"]
    how = [f"--resume={state}"] if state.exists() else new
    where = [f"--device={process.device}", f"--data={data_dir}"]
    several = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE")  # what torchrun tells its processes
    environment = {k: v for k, v in os.environ.items() if k not in several}
    if process.device.type == "cpu":
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(ROOT / "train.py"), *how, *where]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)
