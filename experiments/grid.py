"""Cells of a grid: their images, their scores, and what is kept of both.

A cell is one setting of sampling: a checkpoint, a sampler, a number of steps, eta, a number of
images and a seed. Its images and its row of results.csv are kept in a folder, as NAME.npy and
NAME.json. A study that was stopped therefore goes on where it was, and a wider grid only adds to
it. Changed code makes the images or the scores again (see keys.py).
"""

import hashlib
import io
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from lab.checkpoint import load_model
from lab.data import to_uint8
from lab.device import device_name
from lab.distributed import Process
from lab.errors import UserError
from lab.files import write_atomically
from lab.threads import Crew

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from diffusion import Model, guided, sample
from experiments.keys import NETWORK, ROOT, images_key, metrics_key
from experiments.variances import SAMPLERS
from scheduler import PREDICTION_TYPES, DDIMScheduler, DDPMScheduler
from training.recipe import LENGTH

SHAPE = (1, 28, 28)  # the images that metrics.py scores

EXACT = "exact"  # the label of the exact denoiser, see denoiser.py

# Names of checkpoints beside mnist-v.pt, see `load_relatives`.
STUDENTS = r"(\d+)steps?"  # mnist-v-8steps.pt, of distill.py
SNAPSHOTS = r"step(\d+)"  # mnist-v-step1000.pt, of train.py --keep


@dataclass(frozen=True)
class Subject:
    """A model under study."""

    label: str  # its name in tables and in results.csv
    path: str
    sha256: str
    model: Model
    contents: dict  # of its checkpoint
    code: tuple[str, ...] = NETWORK  # where the code of the model starts, see keys.py
    folder: Path = Path()  # where its checkpoint lies
    labels: tuple[int, ...] = ()  # that the images ask for, in turn
    guidance_scale: float = 1.0  # only with labels
    batch_size: int = 1  # with smaller batches the model would waste time, if n allows larger ones

    @property
    def symbol(self) -> str:
        """The symbol of what the network predicts."""
        return PREDICTION_TYPES[self.contents["scheduler"]["prediction_type"]].symbol

    @property
    def title(self) -> str:
        return f"{self.symbol}-prediction ({self.label})"

    @property
    def training_images(self) -> int:
        """On how many images it was trained."""
        return self.contents["training"]["images"]

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler().num_train_timesteps

    def model_for(self, indices: Tensor) -> Model:
        """Return the model that makes these images: it knows the labels that they ask for."""
        asked = self.asked(indices)
        return self.model if asked is None else guided(self.model, asked, self.guidance_scale)

    def asked(self, indices: Tensor) -> Tensor | None:
        """Return the labels that these images ask for, (N,) int64, if the subject has labels."""
        if not self.labels:
            return None
        return torch.tensor(self.labels, device=indices.device)[indices % len(self.labels)]

    def scheduler(self, **changes: object) -> DDIMScheduler:
        """Return the scheduler of the checkpoint, for sampling with DDIM."""
        return DDIMScheduler(**self.contents["scheduler"] | changes)


@dataclass(frozen=True)
class Cell:
    """A setting of sampling."""

    model: str  # the label of the subject
    sha256: str  # of its checkpoint
    sampler: str  # a key of experiments.variances.SAMPLERS
    steps: int
    eta: float | None  # None for a sampler that has no eta
    n: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's files: all that decides its images except the code."""
        eta = "" if self.eta is None else f"-eta{self.eta!r}".removesuffix(".0")
        return f"{self.sha256[:12]}-{self.sampler}-{self.steps}steps{eta}-n{self.n}-seed{self.seed}"


def load_subjects(
    paths: Sequence[str | Path],
    device: torch.device,
    labels: Sequence[str] | None = None,
    are_students: bool = False,
) -> list[Subject]:
    """Load checkpoints.

    Args:
        labels: their labels (default: the file names, or the paths where file names are equal).
        are_students: whether students of distill.py are wanted. They have one number of steps only.

    Raises:
        UserError: as `load_model`; the images of a model cannot be scored; a file is there twice,
            is called exact.pt, or does not say on how many images it was trained.
    """
    stems, subjects = [Path(path).stem for path in paths], []
    if EXACT in stems:
        raise UserError(f"call {paths[stems.index(EXACT)]} something else: {EXACT} has a meaning")
    for i, path in enumerate(paths):
        model, contents = load_model(path, device)
        if tuple(contents["image_shape"]) != SHAPE:
            raise UserError(f"{path} makes images of {contents['image_shape']}, not of {SHAPE}")
        training = contents.get("training")
        if not isinstance(training, dict) or type(training.get("images")) is not int:
            raise UserError(f"{path} does not say on how many images it was trained")
        if "timesteps" in contents and not are_students:
            raise UserError(f"{path} is a student of distill.py: it has one number of steps only")
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if any(sha256 == other.sha256 for other in subjects):
            raise UserError(f"{path} is among the checkpoints twice")
        unique = stems.count(stems[i]) == 1
        label = stems[i] if unique else str(path)
        label = labels[i] if labels else label
        if not label.isprintable() or set("$|<") & set(label):
            raise UserError(f"call {path} something else: its name must fit into a table")
        folder = Path(path).resolve().parent
        subjects.append(Subject(label, shown(path), sha256, model, contents, folder=folder))
    return subjects


def load_relatives(subject: Subject, ending: str, device: torch.device) -> dict[int, Subject]:
    """Load the checkpoints that lie beside that of a subject and are named after it.

    Args:
        ending: what follows the subject's name and "-", a regular expression with a number in
            parentheses: `STUDENTS` or `SNAPSHOTS`.

    Returns:
        The checkpoints by that number, ascending.

    Raises:
        UserError: as `load_subjects`; one of them does not belong to the subject.
    """
    stem, found = Path(subject.path).stem, {}
    for path in subject.folder.glob("*.pt"):
        if match := re.fullmatch(f"{re.escape(stem)}-{ending}", path.stem):
            if int(match[1]) in found:
                raise UserError(f"{path} and {found[int(match[1])]} have one number: move one away")
            found[int(match[1])] = path
    numbers = sorted(found)
    paths = [found[number] for number in numbers]
    loaded = load_subjects(paths, device, are_students=ending == STUDENTS)
    relatives = dict(zip(numbers, loaded, strict=True))
    for number, relative in relatives.items():
        check_relative(relative, subject)
        steps = len(relative.contents.get("timesteps", ()))
        if ending == STUDENTS and steps != number:
            raise UserError(f"{relative.path} is a student of {steps} steps: rename it")
    return relatives


def check_relative(relative: Subject, subject: Subject) -> None:
    """Check that a student is one of this subject's, or that a snapshot has the subject's recipe.

    A snapshot may come from another run with the same recipe. That run may be longer or shorter.

    Raises:
        UserError: it does not.
    """
    is_student = "timesteps" in relative.contents
    mine, of = subject.contents["training"], relative.contents
    try:
        if is_student:
            belongs = of["teacher"]["run"] == mine["run"]
        else:
            belongs = without_length(of["training"]["args"]) == without_length(mine["args"])
    except (AttributeError, KeyError, TypeError):  # a file that does not say where it comes from
        belongs = False
    if not belongs:
        kind = "student" if is_student else "snapshot"
        raise UserError(f"{relative.path} is no {kind} of {subject.path}: move it away")


def without_length(recipe: dict) -> dict:
    """Return the arguments of a training but those that set its length."""
    return {name: value for name, value in recipe.items() if name not in LENGTH}


def shown(path: str | Path) -> str:
    """Return a path as it is shown: relative to the repository, if it lies in there."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else path)


def make_cells(
    subjects: Iterable[Subject],
    steps: Iterable[int],
    etas: Iterable[float | None],
    n: Callable[[int], int],
    seeds: Callable[[int], int] = lambda steps: 1,
    sampler: str = "ddim",
) -> list[Cell]:
    """Return the cells of a grid, with n(steps) images for each of seeds(steps) seeds."""
    return [
        Cell(subject.label, subject.sha256, sampler, s, eta, n(s), seed)
        for s, subject, eta in product(steps, subjects, etas)
        for seed in range(seeds(s))
    ]


def by_setting(cells: Iterable[Cell]) -> dict[tuple[str, int, float | None], list[Cell]]:
    """Return the cells of each setting, by model, steps and eta: one per seed."""
    found: dict[tuple[str, int, float | None], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.steps, cell.eta), []).append(cell)
    return found


# ---------------------------------------------------------------------------------- sampling


def sample_cell(
    cell: Cell,
    subject: Subject,
    process: Process,
    batch_size: int,
    progress: Callable[[int], None] = lambda image_steps: None,
) -> tuple[Tensor, float]:
    """Make the images of a cell. Every process makes its share.

    Returns:
        (n, 1, 28, 28) uint8 on the CPU, the same on every process, and the seconds it took.
    """
    crew = Crew(process.device)

    def report(_t: int, x_t: Tensor, _x0: Tensor) -> None:
        crew.report(progress, len(x_t) * process.world)

    def make(numbers: range) -> Tensor:
        indices = torch.arange(numbers.start, numbers.stop, device=process.device)
        model, scheduler = subject.model_for(indices), scheduler_of(cell, subject)
        arguments = {} if cell.eta is None else {"eta": cell.eta}
        x = sample(model, scheduler, indices, SHAPE, seed=cell.seed, callback=report, **arguments)
        return to_uint8(x).cpu()

    pixels = torch.zeros(cell.n, *SHAPE, dtype=torch.uint8)
    began = time.perf_counter()
    batches = crew.split(process.share(cell.n), batch_size)
    for numbers, images in zip(batches, crew.map(make, batches), strict=True):
        pixels[numbers.start : numbers.stop] = images
    process.sum(pixels)  # the rows of other processes are 0
    return pixels, time.perf_counter() - began


def scheduler_of(cell: Cell, subject: Subject) -> DDPMScheduler:
    """Return the scheduler of a cell, with its timesteps. A student brings its timesteps along."""
    scheduler = SAMPLERS[cell.sampler](**subject.contents["scheduler"])
    timesteps = subject.contents.get("timesteps")
    scheduler.set_timesteps(None if timesteps else cell.steps, timesteps=timesteps)
    return scheduler


def run_cells(
    cells: Sequence[Cell],
    subjects: Sequence[Subject],
    process: Process,
    folder: Path,
    batch_size: int,
    data_dir: str,
    bar: tqdm,
) -> None:
    """Sample and score cells, and keep them. All processes must call this.

    Args:
        bar: counts network calls (of one image).
    """
    by_sha256, warm = {subject.sha256: subject for subject in subjects}, set()
    for cell in cells:
        subject = by_sha256[cell.sha256]
        size = max(batch_size, subject.batch_size)
        bar.set_description(f"{cell.model}, {cell.steps} steps")
        if cell.sha256 not in warm:  # a network's first calls prepare its kernels
            few = replace(cell, steps=1, n=min(cell.n, size * process.world))
            sample_cell(few, subject, process, size)
            warm.add(cell.sha256)
        pixels, seconds = sample_cell(cell, subject, process, size, bar.update)
        if process.is_first:
            key = images_key(cell.sampler, process.device.type, subject.code)
            facts = {"images_key": key, "prediction": subject.symbol, "seconds": seconds}
            facts |= {"images_per_s": cell.n / seconds} | describe(process)
            keep(folder, cell, subject, pixels, facts, data_dir)


def describe(process: Process) -> dict:
    """Return what a measured time depends on, and the commit ("unknown" without git)."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # git is not installed
        git = ""
    return {
        "device": device_name(process.device),
        "processes": process.world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git or "unknown",
    }


# --------------------------------------------------------------------------------- kept cells


def missing_cells(
    cells: Sequence[Cell], subjects: Sequence[Subject], process: Process, folder: Path
) -> list[Cell]:
    """Return the cells that are not kept yet. All processes must call this."""
    by_sha256 = {subject.sha256: subject for subject in subjects}
    missing = [c for c in cells if not is_kept(folder, c, by_sha256[c.sha256], process)]
    return process.agree(missing)


def is_kept(folder: Path, cell: Cell, subject: Subject, process: Process) -> bool:
    """Return whether the images of a cell are there, made by the code of today."""
    row = read_json(folder / f"{cell.name}.json")
    key = images_key(cell.sampler, process.device.type, subject.code)
    return row.get("images_key") == key and (folder / f"{cell.name}.npy").exists()


def keep(
    folder: Path, cell: Cell, subject: Subject, pixels: Tensor, facts: dict, data_dir: str
) -> None:
    """Score the images of a cell and write both; the row is written last."""
    (folder / f"{cell.name}.json").unlink(missing_ok=True)  # that of other images
    buffer = io.BytesIO()
    np.save(buffer, pixels.squeeze(1).numpy())
    write_atomically(folder / f"{cell.name}.npy", buffer.getbuffer())
    write_json(folder / f"{cell.name}.json", facts | score(pixels, subject, data_dir))


def read_rows(
    cells: Sequence[Cell], subjects: Sequence[Subject], folder: Path, data_dir: str
) -> list[dict]:
    """Return the rows of kept cells."""
    by_sha256 = {subject.sha256: subject for subject in subjects}
    return [read_row(folder, cell, by_sha256[cell.sha256], data_dir) for cell in cells]


def read_row(folder: Path, cell: Cell, subject: Subject, data_dir: str) -> dict:
    """Return the row of a kept cell. Its images are scored again if metrics.py has changed."""
    path = folder / f"{cell.name}.json"
    row = read_json(path)
    if row.get("metrics_key") != metrics_key():
        row |= score(read_images(folder, cell), subject, data_dir)
        write_json(path, row)
    return asdict(cell) | {column: value for column, value in row.items() if column != "images_key"}


def read_images(folder: Path, cell: Cell) -> Tensor:
    """Return the images of a kept cell, (n, 1, 28, 28) uint8."""
    return metrics.read_samples(folder / f"{cell.name}.npy")


def score(images: Tensor, subject: Subject, data_dir: str) -> dict:
    asked = subject.asked(torch.arange(len(images)))
    return metrics.score(images, asked=asked, data_dir=data_dir) | {"metrics_key": metrics_key()}


def read_json(path: Path) -> dict:
    """Return the contents of a file; an empty dictionary if it is missing or damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def write_json(path: Path, contents: dict) -> None:
    write_atomically(path, (json.dumps(contents, indent=1) + "\n").encode())
