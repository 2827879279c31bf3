"""The study: how prediction type, number of steps and eta change what is generated.

all of it:           python study.py
a first look:        python study.py --quick
a wider grid:        python study.py --steps 4 8 16 32 --eta 0 0.1 1 --ckpt a.pt b.pt c.pt
several processes:   torchrun --nproc-per-node=2 -- study.py

Samples every cell of the grid {checkpoint} x {steps} x {eta}, scores it with metrics.py, and writes
<out>/results.csv (a row a cell), <out>/STUDY.md (tables, figures, findings) and the figures. It
also trains models of its own, all on the same number of images: both prediction types with several
seeds, and three noise schedules. Finished cells stay in <out>/cells under the checkpoint's hash and
their settings, finished trainings in <out>/trainings under the hash of train.py and unet.py and
theirs: a study that was stopped goes on where it was, and a wider grid only adds to it.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from functools import cache, cached_property
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import cli
import metrics
from checkpoint import load_model, write_atomically
from cli import UserError
from data import load_dataset, to_uint8, to_unit_range
from sampling import image_noise, make_grid, sample
from scheduler import DDIMScheduler
from unet import UNet

FULL = {
    "steps": (1, 2, 3, 5, 10, 20, 50, 100, 250, 1000),
    "eta": (0.0, 0.2, 0.5, 1.0),
    "n": 1000,
    "seeds": 3,
    "train_images": 64_000,
    "out": "study",
}
QUICK = {
    "steps": (1, 5, 20),
    "eta": (0.0, 1.0),
    "n": 100,
    "seeds": 2,
    "train_images": 0,
    "out": "study/quick",
}
HEADLINE = (10, 20, 50)  # the step counts whose cells are repeated with every seed
PATH = 11  # images from one noise to another, in the interpolations
LONG = 250  # cells of more steps than this have --n-long images
TRAINED_STEPS, TRAINED_ETAS = (10, 50), (0.0, 1.0)  # the grid of the study's own trainings
SHAPE = (1, 28, 28)  # what the yardstick sees
SYMBOLS = {"epsilon": "ε", "v_prediction": "v", "sample": "x₀"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    natural, enough = cli.number(int, 1), cli.number(int, metrics.MIN_SAMPLES)
    p = cli.Parser(__doc__)
    p.add_argument(
        "--ckpt",
        nargs="+",
        default=["checkpoints/mnist-v.pt", "checkpoints/mnist-eps.pt"],
        metavar="FILE.pt",
        help="any number of what train.py writes",
    )
    p.add_argument("--quick", action="store_true", help="a small grid: 1 to 3 minutes on 2 cores")
    p.add_argument("--steps", type=natural, nargs="+", help="(default: ten from 1 to 1000)")
    p.add_argument("--eta", type=cli.number(float, 0, 1), nargs="+", help="(default: 0 .2 .5 1)")
    p.add_argument("--n", type=enough, help="images a cell (default: 1000)")
    p.add_argument(
        "--n-long",
        type=enough,
        help=f"images a cell of more than {LONG} steps (default: --n on a GPU, a quarter on a CPU)",
    )
    p.add_argument(
        "--seeds",
        type=natural,
        help=f"of sampling, at {', '.join(map(str, HEADLINE))} steps, and of training (default: 3)",
    )
    p.add_argument(
        "--train-images",
        type=cli.number(int, 0),
        help="the length of each of the study's own trainings; 0: none (default: 64000)",
    )
    p.add_argument("--batch-size", type=natural, default=100, help="images at a time, in sampling")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    p.add_argument("--data", default="data", metavar="DIR", help="where MNIST is, or will be")
    p.add_argument("--out", metavar="DIR", help="(default: study, or study/quick with --quick)")
    args = p.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.steps, args.eta = sorted(set(args.steps)), sorted(set(args.eta))
    return args


# ------------------------------------------------------------------------- where the study is made


@dataclass(frozen=True)
class Place:
    """This process among its fellows."""

    device: torch.device
    world: int
    rank: int

    def agree(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def describe(self) -> dict:
        """What a figure's seconds depend on, and the commit."""
        gpu = self.device.type == "cuda"
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else processor(),
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": git.stdout.strip() or "unknown",
        }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Subject:
    """A checkpoint under study."""

    label: str
    path: str
    sha256: str
    model: UNet
    contents: dict

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.contents["scheduler"]["prediction_type"]]

    @property
    def title(self) -> str:
        return f"{self.symbol}-prediction ({self.label})"

    def scheduler(self, **changes) -> DDIMScheduler:
        return DDIMScheduler(**self.contents["scheduler"] | changes)


@dataclass(frozen=True)
class Cell:
    """An entry of the grid: what is sampled."""

    model: str  # the subject's label
    sha256: str
    steps: int
    eta: float
    n: int
    seed: int

    @property
    def name(self) -> str:
        return (
            f"{self.model}-{self.sha256[:12]}-ddim{self.steps}-eta{self.eta:g}"
            f"-n{self.n}-seed{self.seed}"
        )


def load_subjects(paths: Sequence[str], device: torch.device) -> list[Subject]:
    """The checkpoints, labelled by their file names, or by their paths where names are equal.

    Raises:
        UserError: as `load_model`; images that the yardstick can't see; the same file twice.
    """
    stems, subjects = [Path(path).stem for path in paths], []
    for path, stem in zip(paths, stems, strict=True):
        model, contents = load_model(path, device)
        if tuple(contents["image_shape"]) != SHAPE:
            raise UserError(f"{path} makes images of {contents['image_shape']}, not of {SHAPE}")
        unique = stems.count(stem) == 1
        label = stem if unique else str(Path(path).with_suffix("")).replace("/", "-")
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if any(sha256 == other.sha256 for other in subjects):
            raise UserError(f"{path} is among the checkpoints twice")
        subjects.append(Subject(label, path, sha256, model, contents))
    return subjects


def make_cells(
    subjects: Iterable[Subject],
    steps: Iterable[int],
    etas: Iterable[float],
    n: Callable[[int], int],
    seeds: Callable[[int], int],
) -> list[Cell]:
    """The product of them all, with n(steps) images of each of seeds(steps) seeds."""
    return [
        Cell(subject.label, subject.sha256, s, eta, n(s), seed)
        for s, subject, eta in product(steps, subjects, etas)
        for seed in range(seeds(s))
    ]


def sample_cell(
    cell: Cell, subject: Subject, place: Place, batch_size: int, progress: Callable[[int], None]
) -> tuple[Tensor, float]:
    """The cell's (n, 1, 28, 28) uint8 images, on every process, and the seconds they took."""
    scheduler = subject.scheduler()
    scheduler.set_timesteps(cell.steps)
    pixels = torch.zeros(cell.n, *SHAPE, dtype=torch.uint8)
    began = time.perf_counter()
    first, end = (cell.n * rank // place.world for rank in (place.rank, place.rank + 1))
    for images in torch.arange(first, end, device=place.device).split(batch_size):
        x = sample(
            subject.model,
            scheduler,
            images,
            SHAPE,
            seed=cell.seed,
            eta=cell.eta,
            callback=lambda _t, x_t, _x0: progress(len(x_t) * place.world),
        )
        pixels[images.cpu()] = to_uint8(x).cpu()
    if place.world > 1:
        dist.all_reduce(pixels)  # each process filled in its own rows
    return pixels, time.perf_counter() - began


def run_cells(
    cells: Sequence[Cell],
    subjects: Sequence[Subject],
    place: Place,
    args: argparse.Namespace,
) -> list[dict]:
    """Every cell's row, on rank 0; samples and scores those that are not kept yet."""
    folder, by_label = Path(args.out) / "cells", {s.label: s for s in subjects}
    kept = place.agree([(folder / f"{cell.name}.json").exists() for cell in cells])
    costs = [cell.n * cell.steps for cell in cells]
    description, warm = place.describe(), set()
    with tqdm(
        total=sum(costs),
        initial=sum(cost for cost, done in zip(costs, kept, strict=True) if done),
        unit="image-step",
        unit_scale=True,
        smoothing=0.02,
        disable=place.rank > 0,
    ) as bar:
        for i, (cell, done) in enumerate(zip(cells, kept, strict=True), start=1):
            if done:
                continue
            subject = by_label[cell.model]
            bar.set_description(f"cell {i}/{len(cells)}: {cell.model}, eta {cell.eta:g}")
            if cell.model not in warm:  # a network's first call prepares its kernels
                once = replace(cell, steps=1, n=min(cell.n, args.batch_size * place.world))
                sample_cell(once, subject, place, args.batch_size, lambda _: None)
                warm.add(cell.model)
            pixels, seconds = sample_cell(cell, subject, place, args.batch_size, bar.update)
            if place.rank == 0:
                buffer = io.BytesIO()
                np.save(buffer, pixels.squeeze(1).numpy())
                write_atomically(folder / f"{cell.name}.npy", buffer.getbuffer())
                row = asdict(cell) | {"prediction": subject.symbol, "seconds": seconds}
                row |= {"images_per_s": cell.n / seconds} | description
                write_json(folder / f"{cell.name}.json", row | scored(pixels, args.data))
    if place.rank:
        return []
    return [read_row(folder, cell, args.data) for cell in cells]


def scored(images: Tensor, data_dir: str) -> dict:
    """metrics.score, and which yardstick's it is."""
    return metrics.score(images, data_dir=data_dir) | {"yardstick": yardstick()}


@cache
def yardstick() -> str:
    """What a score depends on besides the images: metrics.py and its classifier."""
    return fingerprint(Path(metrics.__file__), metrics.WEIGHTS)


def recipe() -> str:
    """What a training depends on besides its settings: train.py and the network."""
    return fingerprint(*(Path(__file__).with_name(name) for name in ("train.py", "unet.py")))


def fingerprint(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def read_row(folder: Path, cell: Cell, data_dir: str) -> dict:
    """A kept cell's row; scored anew if the yardstick has changed since."""
    path = folder / f"{cell.name}.json"
    try:
        row = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and the study makes it again") from None
    if row["yardstick"] != yardstick():
        row |= scored(read_images(folder, cell), data_dir)
        write_json(path, row)
    return row


def read_images(folder: Path, cell: Cell) -> Tensor:
    return metrics.read_samples(folder / f"{cell.name}.npy")


def write_json(path: Path, contents: object) -> None:
    write_atomically(path, (json.dumps(contents, indent=1) + "\n").encode())


# ------------------------------------------------------------------------ the study's own trainings


@dataclass(frozen=True)
class Training:
    """A model that the study trains, on as many images as every other."""

    pred: str
    schedule: str
    density: str
    seed: int
    images: int
    weighted: bool = True  # eps's loss, as train.py's default has it

    @property
    def name(self) -> str:
        kind = f"{self.pred}-{self.schedule}-{self.density}{'' if self.weighted else '-plain'}"
        return f"{kind}-{self.images}-seed{self.seed}"

    @property
    def steps(self) -> int:
        return max(1, self.images // 64)

    def arguments(self) -> list[str]:
        schedule, zero_snr = self.schedule.removesuffix("0"), self.schedule.endswith("0")
        return [
            *("--pred", self.pred, "--schedule", schedule, "--density", self.density),
            *("--seed", str(self.seed), "--steps", str(self.steps), "--batch-size", "64"),
            *(["--zero-snr"] if zero_snr else []),
            *([] if self.weighted else ["--max-weight", "1"]),
        ]


SCHEDULES = {"cosine": "cosine", "linear": "linear", "linear0": "linear, zero SNR"}
DENSITIES = {"lognormal": "log-SNR normal", "uniform": "t uniform"}


def make_trainings(images: int, seeds: int) -> list[Training]:
    """Both prediction types with every seed, and eps with its loss unweighted; with seed 0, v under
    each schedule and density.

    A schedule is two things: which noise levels training sees, if t is uniform, and which ones
    sampling visits. With "lognormal" the first is the same for all of them.
    """
    both = [
        Training(p, "cosine", "lognormal", s, images) for s in range(seeds) for p in ("v", "eps")
    ]
    plain = [replace(t, weighted=False) for t in both if t.pred == "eps"]
    others = [Training("v", s, d, 0, images) for s, d in product(SCHEDULES, DENSITIES)]
    return both + plain + [training for training in others if training not in both]


def run_trainings(
    trainings: Sequence[Training], place: Place, args: argparse.Namespace
) -> list[Subject]:
    """Train those that are not there yet, each rank its share, and load them all."""
    folder = Path(args.out) / "trainings" / recipe()
    mine = trainings[place.rank :: place.world]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    for i, training in enumerate(mine, start=1):
        path = folder / f"{training.name}.pt"
        if is_complete(path, training):
            continue
        state = path.with_suffix(".state.pt")
        fresh = [*training.arguments(), "--out", str(path), "--samples", str(folder / "samples")]
        how = ["--resume", str(state)] if state.exists() else fresh
        tqdm.write(f"training {i} of {len(mine)}: {training.name}")
        ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is train.py's: it saves
        try:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("train.py")), *how]
                + ["--device", str(place.device), "--data", args.data],
                env=environment,
            )
        finally:
            signal.signal(signal.SIGINT, ours)
        if done.returncode == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        if done.returncode:
            raise UserError(f"training {training.name} failed: see above")
    if place.world > 1:
        dist.barrier()
    return load_subjects([str(folder / f"{t.name}.pt") for t in trainings], place.device)


def is_complete(path: Path, training: Training) -> bool:
    """A run writes its checkpoint at every epoch, too: is this the last?"""
    if not path.exists():
        return False
    return load_model(path)[1]["training"]["step"] == training.steps


# ----------------------------------------------------------------------- what no cell of it can say


@torch.inference_mode()
def prediction_errors(subject: Subject, images: Tensor, timesteps: Sequence[int]) -> list[dict]:
    """How well x_0 is predicted from x_t, with the network in float32 and under bfloat16 autocast.

    For each t, over all pixels of images (N, 1, 28, 28) uint8, the noise being the same for every
    t and subject: the root mean square error of the predicted x_0 for x_0 in [-1, 1], before and
    after clipping, and that of bfloat16's prediction against float32's ("rounding").
    """
    x0 = to_unit_range(images)
    noise = image_noise(0, torch.arange(len(x0), device=x0.device), 0, SHAPE)
    scheduler = subject.scheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    rows = []
    for t in timesteps:
        x_t = scheduler.add_noise(x0, noise, t)
        pred = {}
        for dtype in ("float32", "bfloat16"):
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                output = subject.model(x_t, t)
            pred[dtype] = scheduler.step(output.float(), t, x_t).pred_original_sample
        rows.append({"t": t, "snr": snr(scheduler, t)})
        for dtype, x in pred.items():
            rows[-1][dtype] = rms(x - x0)
            rows[-1][f"{dtype}_clipped"] = rms(x.clamp(-1, 1) - x0)
        rows[-1]["rounding"] = rms(pred["bfloat16"] - pred["float32"])
    return rows


def snr(scheduler: DDIMScheduler, t: int) -> float:
    abar = scheduler.alphas_cumprod[t].item()
    return abar / (1 - abar)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def clipped_shares(subject: Subject, n: int, steps: int, device: torch.device) -> list[dict]:
    """The share of the predicted x_0's pixels that the sampler clips, at each step of n images."""
    scheduler, rows = subject.scheduler(), []
    scheduler.set_timesteps(steps)

    def count(t: int, _x_t: Tensor, x0: Tensor) -> None:
        rows.append({"t": t, "share": (x0.abs() >= 1).float().mean().item()})  # ±1 only if clipped

    sample(subject.model, scheduler, torch.arange(n, device=device), SHAPE, callback=count)
    return rows


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """From noise a (weight 0) to b (weight 1) along the great circle: (len(weights), *a.shape)."""
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))  # Shoemake 1985
    w = weights.view(-1, *[1] * a.ndim)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def interpolate(
    subject: Subject, eta: float, pairs: int, length: int, steps: int, device: torch.device
) -> tuple[Tensor, float]:
    """Images along `pairs` paths between two x_T, and how smooth the paths are.

    Every image has a sampling noise of its own where eta > 0, as any two samples have.

    Returns:
        (pairs * length, 1, 28, 28) uint8, and the mean distance of neighbours on a path over that
        of two ends of different paths: 1 if x_T decides nothing, 1 / (length - 1) on a straight
        line at best.
    """
    scheduler = subject.scheduler()
    scheduler.set_timesteps(steps)
    ends = image_noise(0, torch.arange(2 * pairs, device=device), 0, SHAPE)
    weights = torch.linspace(0, 1, length, device=device)
    paths = [slerp(a, b, weights) for a, b in zip(ends[:pairs], ends[pairs:], strict=True)]
    images = torch.arange(pairs * length, device=device)
    x = torch.cat(
        [
            sample(subject.model, scheduler, i, SHAPE, eta=eta, x_T=start)
            for i, start in zip(images.split(length), paths, strict=True)
        ]
    )
    path = x.view(pairs, length, -1)
    near = (path[:, 1:] - path[:, :-1]).norm(dim=-1).mean()
    starts = path[:, 0]
    far = torch.cdist(starts, starts).sum() / (pairs * (pairs - 1))
    return to_uint8(x).cpu(), (near / far).item()


def agreement(folder: Path, cells: Sequence[Cell]) -> dict[tuple[str, int, float], float]:
    """The share of seed 0's images that read as the same digit as those of the most steps.

    DDIM section 5.2: at eta = 0 an image's x_T decides what it will be, whatever the steps.
    """
    digits = {
        (c.model, c.steps, c.eta): metrics.features(read_images(folder, c))[1].argmax(1)
        for c in cells
        if c.seed == 0
    }
    longest = max(steps for _, steps, _ in digits)
    shares = {}
    for (model, steps, eta), these in digits.items():
        pairs = zip(these.tolist(), digits[model, longest, eta].tolist(), strict=False)
        shares[model, steps, eta] = statistics.fmean(a == b for a, b in pairs)
    return shares


# ---------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    """A mean over `runs` cells that differ in their seed only; se is the mean's standard error."""

    mean: float
    se: float
    runs: int

    @property
    def run_se(self) -> float:
        """The standard error of one run."""
        return self.se * math.sqrt(self.runs)

    @property
    def margin(self) -> float:
        """How far another seed's figure should be off, at most, 19 times in 20: both err."""
        return 2 * math.hypot(self.run_se, self.se)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.se:.1f}"


def estimate(rows: Sequence[dict], key: str) -> Estimate:
    """Of the samples' own standard error and the spread of the seeds, the larger is believed."""
    values = [row[key] for row in rows]
    run_se = math.sqrt(statistics.fmean(row[f"{key}_se"] ** 2 for row in rows))
    if len(rows) > 1:
        run_se = max(run_se, statistics.stdev(values))
    return Estimate(statistics.fmean(values), run_se / math.sqrt(len(rows)), len(rows))


def z_score(a: Estimate, b: Estimate) -> float:
    """a - b in standard errors of the difference; the two taken as independent."""
    return (a.mean - b.mean) / math.hypot(a.se, b.se)


def quotient(a: Estimate, b: Estimate) -> Estimate:
    """a / b, its error to first order."""
    ratio = a.mean / b.mean
    return Estimate(ratio, abs(ratio) * math.hypot(a.se / a.mean, b.se / b.mean), 1)


def versus(a: Estimate, b: Estimate) -> str:
    """ "8.0 ± 0.9 against 11.4 ± 1.1, lower (z = −2.4)": ± are the means' standard errors."""
    z = z_score(a, b)
    verdict = "not told apart" if abs(z) < 2 else "lower" if z < 0 else "higher"
    return f"{a} against {b}, {verdict} (z = {z:+.1f})"


Results = dict[tuple[str, int, float], list[dict]]  # (model, steps, eta): a row a seed


def by_setting(rows: Iterable[dict]) -> Results:
    results: Results = {}
    for row in rows:
        results.setdefault((row["model"], row["steps"], row["eta"]), []).append(row)
    return results


# ----------------------------------------------------------------------------------------- figures


def new_figure(rows: int, columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())


def eta_colours(etas: Sequence[float]) -> dict[float, tuple]:
    import matplotlib

    return {eta: matplotlib.colormaps["plasma"](0.85 * eta) for eta in etas}


def draw_steps(
    results: Results, subjects: Sequence[Subject], floors: dict, n: int, path: Path
) -> None:
    """Fréchet distance (cells of n images only) and KID against steps, a line an eta."""
    figure, axes = new_figure(2, len(subjects), 4.6 * len(subjects), 7)
    etas = sorted({eta for _, _, eta in results})
    for column, subject in enumerate(subjects):
        for row, (key, name) in enumerate(
            [("frechet", "Fréchet distance (LeNet features)"), ("kid", "KID (LeNet features)")]
        ):
            ax = axes[row, column]
            for eta, colour in eta_colours(etas).items():
                points = [
                    (steps, estimate(rows, key))
                    for (model, steps, e), rows in sorted(results.items())
                    if (model, e) == (subject.label, eta) and (key == "kid" or rows[0]["n"] == n)
                ]
                x, y = [p[0] for p in points], [p[1] for p in points]
                errors = [2 * e.se for e in y]
                ax.errorbar(
                    x,
                    [e.mean for e in y],
                    errors,
                    fmt="o-",
                    ms=3,
                    lw=1.2,
                    capsize=2,
                    color=colour,
                    label=f"η = {eta:g}",
                )
            if key == "frechet":
                ax.axhline(floors[n]["frechet"], color="grey", ls="--", lw=1, label="real images")
            else:
                ax.axhspan(0, 2 * floors[n]["kid_se"], color="grey", alpha=0.3, label="real images")
            ax.set(xscale="log", xlabel="steps", ylabel=name if column == 0 else "")
            ax.set_yscale("log") if key == "frechet" else ax.set_yscale("symlog", linthresh=10)
            ax.set_title(subject.title if row == 0 else "")
            ax.grid(alpha=0.3, which="both")
        axes[0, column].legend(fontsize=8)
    for row in axes:
        low, high = (f(ax.get_ylim()[i] for ax in row) for i, f in enumerate((min, max)))
        low = max(low, -10)  # a KID's error bar may go far below 0
        for ax in row:
            ax.set_ylim(low, high)
    save_figure(figure, path)


def draw_matrix(
    folder: Path, cells: Sequence[Cell], subjects: Sequence[Subject], path: Path, count: int = 4
) -> None:
    """The first `count` images of seed 0: a column a step count, a panel an eta and a subject."""
    etas, steps = sorted({c.eta for c in cells}), sorted({c.steps for c in cells})
    of = {(c.model, c.eta, c.steps): c for c in cells if c.seed == 0}
    width = max(0.45 * len(steps), 2.2)
    figure, axes = new_figure(
        len(etas), len(subjects), 0.6 + width * len(subjects), 0.5 + 0.55 * count * len(etas)
    )
    for (i, eta), (j, subject) in product(enumerate(etas), enumerate(subjects)):
        columns = [read_images(folder, of[subject.label, eta, s])[:count] for s in steps]
        tiles = torch.stack(columns, dim=1).flatten(0, 1)  # row by row: an image at all steps
        ax = axes[i, j]
        ax.imshow(make_grid(tiles, len(steps))[0], cmap="gray", vmin=0, vmax=255)
        ax.set_xticks([16 + 30 * k for k in range(len(steps))], steps, fontsize=7)
        ax.set_yticks([])
        ax.set_ylabel(f"η = {eta:g}" if j == 0 else "")
        ax.set_title(subject.title if i == 0 else "", fontsize=9)
        ax.tick_params(length=0)
    figure.supxlabel("steps", fontsize=9)
    save_figure(figure, path)


def draw_agreement(shares: dict, subjects: Sequence[Subject], path: Path) -> None:
    """The share of images that keep their digit, against steps."""
    figure, axes = new_figure(1, len(subjects), 4.6 * len(subjects), 3.4)
    steps, etas = (sorted({setting[i] for setting in shares}) for i in (1, 2))
    for ax, subject in zip(axes[0], subjects, strict=True):
        for eta, colour in eta_colours(etas).items():
            y = [shares[subject.label, s, eta] for s in steps]
            ax.plot(steps, y, "o-", ms=3, lw=1.2, color=colour, label=f"η = {eta:g}")
        ax.axhline(0.1, color="grey", ls="--", lw=1, label="chance")
        ax.set(xscale="log", xlabel="steps", ylim=(0, 1.05))
        ax.set_title(subject.title, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"same digit as at {steps[-1]} steps")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)


def fit_time(rows: Sequence[dict]) -> tuple[float, float]:
    """a + b steps, seconds an image, fitted to relative errors."""
    steps = np.array([row["steps"] for row in rows])
    seconds = np.array([row["seconds"] / row["n"] for row in rows])
    if len(set(steps)) < 2:
        return 0.0, float((seconds / steps).mean())
    b, a = np.polyfit(steps, seconds, 1, w=1 / seconds)
    return float(a), float(b)


def draw_time(rows: Sequence[dict], subjects: Sequence[Subject], path: Path) -> None:
    """Seconds an image against steps, and the fitted line."""
    figure, axes = new_figure(1, 1, 5.5, 3.8)
    ax = axes[0, 0]
    for i, subject in enumerate(subjects):
        mine = [row for row in rows if row["model"] == subject.label]
        a, b = fit_time(mine)
        x = np.geomspace(min(r["steps"] for r in mine), max(r["steps"] for r in mine), 50)
        ax.plot(
            [r["steps"] for r in mine],
            [1e3 * r["seconds"] / r["n"] for r in mine],
            "o",
            ms=3,
            color=f"C{i}",
        )
        label = f"{subject.label}: {1e3 * a:.2f} ms + {1e3 * b:.2f} ms a step"
        ax.plot(x, 1e3 * (a + b * x), lw=1, color=f"C{i}", label=label.replace("-0", "−0"))
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="milliseconds an image")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3, which="both")
    save_figure(figure, path)


def draw_why_v(errors: dict, clipped: dict, symbols: dict[str, str], path: Path) -> None:
    """Errors of the predicted x_0, what bfloat16 adds to them, and the share that is clipped."""
    figure, axes = new_figure(1, 3, 13, 3.8)
    for i, (label, rows) in enumerate(errors.items()):
        t, name = [row["t"] for row in rows], f"{symbols[label]} ({label})"
        for dtype, style in (("float32", "-"), ("bfloat16", ":")):
            y = [row[dtype] for row in rows]
            axes[0, 0].plot(t, y, style, color=f"C{i}", label=f"{name}, {dtype}")
        axes[0, 1].plot(t, [row["rounding"] for row in rows], color=f"C{i}", label=name)
        shares = clipped[label]
        axes[0, 2].plot(
            [row["t"] for row in shares],
            [row["share"] for row in shares],
            color=f"C{i}",
            label=name,
        )
    axes[0, 0].set(yscale="log", ylabel="rms error of the predicted x₀, unclipped", xlabel="t")
    axes[0, 1].set(yscale="log", ylabel="rms bfloat16 − float32", xlabel="t")
    axes[0, 2].set(ylabel="share of pixels clipped, while sampling", xlabel="t", ylim=(0, 1))
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    save_figure(figure, path)


def draw_interpolation(
    pictures: dict[tuple[str, float], Tensor],
    subjects: Sequence[Subject],
    length: int,
    path: Path,
    shown: int = 3,
) -> None:
    """`shown` paths for each eta and subject."""
    etas = sorted({eta for _, eta in pictures})
    figure, axes = new_figure(
        len(etas), len(subjects), 0.6 + 4.2 * len(subjects), 0.3 + 0.42 * shown * len(etas)
    )
    for (i, eta), (j, subject) in product(enumerate(etas), enumerate(subjects)):
        ax = axes[i, j]
        tiles = pictures[subject.label, eta][: shown * length]
        ax.imshow(make_grid(tiles, length)[0], cmap="gray", vmin=0, vmax=255)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_ylabel(f"η = {eta:g}" if j == 0 else "")
        ax.set_title(subject.title if i == 0 else "", fontsize=9)
    save_figure(figure, path)


def draw_closest(folder: Path, cells: Sequence[Cell], data_dir: str, path: Path) -> None:
    """The images of each cell that come closest to a training image, and test images that do."""
    blocks = {
        f"{c.model}, {c.steps} steps, eta {c.eta:g}: samples": metrics.score_and_pairs(
            read_images(folder, c), data_dir=data_dir
        )[1]
        for c in cells
    }
    blocks["test images"] = metrics.pairs_of_test_images(data_dir=data_dir)
    metrics.save_pairs(path, blocks)


# ------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class Findings:
    """What STUDY.md is written from."""

    args: argparse.Namespace
    subjects: list[Subject]
    rows: list[dict]
    floors: dict[int, dict]  # n: metrics.floor(n)
    shares: dict  # see agreement()
    errors: dict[str, list[dict]]  # by subject, see prediction_errors()
    clipped: dict[str, list[dict]]  # by subject, see clipped_shares()
    smooth: dict[tuple[str, float], float]  # by subject and eta, see interpolate()
    trainings: list[Training]
    trained_rows: list[dict]

    @cached_property
    def results(self) -> Results:
        return by_setting(self.rows)

    def estimate(self, subject: Subject, steps: int, eta: float, key: str = "frechet") -> Estimate:
        return estimate(self.results[subject.label, steps, eta], key)

    @cached_property
    def trained_results(self) -> Results:
        return by_setting(self.trained_rows)

    def trained(self, steps: int, eta: float, **wanted: object) -> Estimate:
        """The Fréchet distance of the study's own trainings that are what is wanted."""
        wanted = {"weighted": True} | wanted
        runs = [t for t in self.trainings if all(getattr(t, k) == v for k, v in wanted.items())]
        return estimate([self.trained_results[t.name, steps, eta][0] for t in runs], "frechet")

    @property
    def extremes(self) -> tuple[float, float]:
        return self.args.eta[0], self.args.eta[-1]

    def comparable(self, subject: Subject) -> dict[tuple[int, float], Estimate]:
        """The Fréchet distances of a subject's cells of --n images."""
        return {
            (s, e): estimate(rows, "frechet")
            for (label, s, e), rows in self.results.items()
            if label == subject.label and rows[0]["n"] == self.args.n
        }

    def best(self, subject: Subject) -> tuple[int, float]:
        """Steps and eta of the least of them."""
        cells = self.comparable(subject)
        return min(cells, key=lambda setting: cells[setting].mean)


def say(text: str) -> str:
    """A paragraph on one line, however it is broken here."""
    return " ".join(text.split())


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {say(line)}" for line in lines)


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(f: Findings) -> str:
    """STUDY.md, with true minus signs."""
    blocks = [
        *introduction(f),
        *the_answer(f),
        *steps_and_eta(f),
        *which_eta(f),
        *which_prediction(f),
        *same_noise(f),
        *cost(f),
        *why_v(f),
        *smoothness(f),
        *copying(f),
        *(schedules(f) if f.trainings else ()),
    ]
    return re.sub(r"(?<![\w-])-(?=\d)", "−", "\n\n".join(blocks) + "\n")


def introduction(f: Findings) -> list[str]:
    row, floor = f.rows[0], f.floors[f.args.n]
    count, minutes = sum(r["n"] for r in f.rows), sum(r["seconds"] for r in f.rows) / 60
    world = row["processes"]
    at_long = "".join(
        f", {other['frechet']:.1f} ± {other['frechet_se']:.1f} at n = {n:,},"
        for n, other in f.floors.items()
        if n != f.args.n
    )
    launcher = "python" if world == 1 else f"torchrun --nproc-per-node={world} --"
    checkpoints = [
        (s.path, s.symbol, f"{s.contents['training']['images']:,}", f"`{s.sha256[:12]}`")
        for s in f.subjects
    ]
    return [
        "# The study",
        say(f"""What prediction type, number of steps and η do to what is generated, on MNIST:
        {len(f.rows)} cells, {count:,} images, {minutes:.0f} minutes of sampling, by"""),
        "```bash\n" + " ".join([launcher, "study.py", *sys.argv[1:]]) + "\n```",
        say(f"""on {date.today()}: {row["device"]}, {world} × {row["threads"]} threads, torch
        {row["torch"]}, commit {row["commit"]}. [results.csv](results.csv) has a row a cell."""),
        markdown_table(("checkpoint", "predicts", "trained on, images", "SHA-256"), checkpoints),
        say(f"""Distances are of this lab's own small classifier
        ([metrics.py](../metrics.py)), not Inception's: to be read against each other and against
        the floor, real training images, which have {floor["frechet"]:.1f} ±
        {floor["frechet_se"]:.1f} at n = {f.args.n:,}{at_long} and a KID of {floor["kid"]:.1f} ±
        {floor["kid_se"]:.1f}. A Fréchet distance falls with n: compare equal n. η is the variance's
        share, σₜ² = η β̃ₜ: the square of the DDIM paper's η."""),
        say("""± is a figure's standard error where nothing else is said, z a difference over its
        own. What is not told apart has |z| < 2; of twenty comparisons of equals one is expected
        beyond."""),
    ]


def the_answer(f: Findings) -> list[str]:
    """Which prediction type, how many steps, which eta."""
    lines, best = [], {}
    low, high = f.extremes
    for subject in f.subjects:
        cells = f.comparable(subject)
        top = f.best(subject)
        tied = [k for k in cells if k == top or z_score(cells[k], cells[top]) < 2]
        cheap = min(tied, key=lambda k: (k[0], cells[k].mean))
        rate = statistics.fmean(r["images_per_s"] for r in f.results[subject.label, *cheap])
        line = f"""**{subject.title}: {cheap[0]} steps at η = {cheap[1]:g}**, the fewest that can't
            be told from its best: Fréchet distance {cells[cheap]}, {rate:.3g} images/s"""
        if cheap != top:
            line += f"; its best, {top[0]} steps at η = {top[1]:g}, has {cells[top]}"
        lines.append(line + ".")
        best[subject.label] = cells[top]
    for a, b in pairwise(f.subjects):
        lines.append(
            f"""**{a.symbol} or {b.symbol}?** Each at its best:
            {versus(best[a.label], best[b.label])}. At equal steps and η = {high:g}, better:
            {winners(f, (a, high), (b, high))} steps."""
        )
    if low < high:
        said = "; ".join(f"{s.symbol}: {winners(f, (s, low), (s, high))}" for s in f.subjects)
        lines.append(f"**η = {low:g} or {high:g}?** Better, by Fréchet distance: {said} steps.")
    reasons = why(f)
    if reasons:
        lines.append(f"**Why?** {' '.join(reasons)}")
    return ["## The answer", bullets(lines)]


def why(f: Findings) -> list[str]:
    """Reasons for what was found: each only if the figures show what it explains."""
    low, high = f.extremes
    z = [(k, v) for s in f.subjects for k, v in z_scores(f, (s, low), (s, high)).items()]
    low_wins, high_wins = ([k for k, v in z if sign * v >= 2] for sign in (-1, 1))
    reasons = []
    if low_wins and high_wins and max(low_wins) < min(high_wins):
        reasons.append(
            f"""Where η = {low:g} is better, steps are few and so long that noise makes them worse;
            where η = {high:g} is, noise lets later steps draw anew what the network got wrong
            (section 2)."""
        )
    last = {s.symbol: f.errors[s.label][-1]["float32"] for s in f.subjects}
    if {"v", "ε"} <= set(last) and last["v"] < last["ε"]:
        reasons.append(
            f"""v's predicted x₀ stays sound in pure noise, where ε's is an error divided by almost
            0: {last["v"]:.2g} against {last["ε"]:.2g} off, before clipping (section 6)."""
        )
    return reasons


def names_of(a: tuple[Subject, float], b: tuple[Subject, float]) -> list[str]:
    """What two columns of the grid are called side by side: by what they differ in."""
    if a[0] is b[0]:
        return [f"η = {eta:g}" for _, eta in (a, b)]
    return [s.symbol if a[0].symbol != b[0].symbol else s.label for s, _ in (a, b)]


def z_scores(f: Findings, a: tuple[Subject, float], b: tuple[Subject, float]) -> dict[int, float]:
    """a's Fréchet distance less b's, in standard errors, at every step count."""
    return {k: z_score(f.estimate(a[0], k, a[1]), f.estimate(b[0], k, b[1])) for k in f.args.steps}


def winners(f: Findings, a: tuple[Subject, float], b: tuple[Subject, float]) -> str:
    """At which step counts a's Fréchet distance is below b's, and b's below a's, |z| >= 2."""
    names = names_of(a, b)
    groups: dict[str, list[str]] = {names[0]: [], names[1]: [], "not told apart": []}
    for steps, z in z_scores(f, a, b).items():
        groups["not told apart" if abs(z) < 2 else names[z > 0]].append(str(steps))
    return ", ".join(f"{name} at {' '.join(at)}" for name, at in groups.items() if at)


def duel(f: Findings, a: tuple[Subject, float], b: tuple[Subject, float]) -> str:
    """Two (subject, eta) at every step count: both distances and their difference's z."""
    rows = []
    for steps in f.args.steps:
        row = [steps]
        for key in ("frechet", "kid"):
            pair = [f.estimate(subject, steps, eta, key) for subject, eta in (a, b)]
            row += [*pair, f"{z_score(*pair):+.1f}"]
        rows.append(row)
    head = [f"{key}, {name}" for key in ("Fréchet", "KID") for name in (*names_of(a, b), "z")]
    return markdown_table(["steps", *head], rows)


def steps_and_eta(f: Findings) -> list[str]:
    """The form of the DDIM paper's table 1."""
    blocks = [
        "## 1. Steps and η",
        say("""Fréchet distance (LeNet features): ± is what another seed's figure should be within,
        19 times in 20: two standard errors of the difference. The best of each column in bold."""),
    ]
    for key, name in (("frechet", "Fréchet distance"), ("kid", "KID (unbiased: any n compare)")):
        for subject in f.subjects:
            columns = []
            for steps in f.args.steps:
                column = [f.estimate(subject, steps, eta, key) for eta in f.args.eta]
                best = min(e.mean for e in column)
                tied = all(e.mean == best for e in column)  # after one step no noise is added
                n = f.results[subject.label, steps, f.args.eta[0]][0]["n"]
                columns.append([f"*{n:,} × {column[0].runs}*"])
                for e in column:
                    cell = f"{e.mean:.1f} ± {e.margin:.1f}"
                    columns[-1].append(f"**{cell}**" if e.mean == best and not tied else cell)
            names = ["*n × seeds*", *(f"η = {eta:g}" for eta in f.args.eta)]
            blocks += [
                f"**{name}, {subject.symbol}-prediction** ({subject.label})",
                markdown_table(["steps", *f.args.steps], zip(names, *columns, strict=True)),
            ]
    return [
        *blocks,
        "![Fréchet distance and KID against steps](steps.png)",
        f"Fréchet distances of n = {f.args.n:,}; bars are two standard errors.",
    ]


# Song et al. 2021, table 1: FID on CIFAR-10 at their eta 0 and 1, where it is also this lab's
PAPER = {
    10: (13.36, 41.07),
    20: (6.84, 18.36),
    50: (4.67, 8.01),
    100: (4.16, 5.78),
    1000: (4.04, 4.73),
}


def which_eta(f: Findings) -> list[str]:
    low, high = f.extremes
    if low == high:
        return []
    blocks = ["## 2. Which η?"]
    for s in f.subjects:
        sides = (s, low), (s, high)
        blocks += [
            f"**{s.symbol}-prediction.** Better: {winners(f, *sides)} steps.",
            duel(f, *sides),
        ]
    common = [k for k in PAPER if k in f.args.steps]
    if (low, high) != (0, 1) or not common:
        return blocks
    rows, helps = [["the paper, FID", *(f"{b / a:.2f}" for a, b in map(PAPER.get, common))]], []
    long_ratios, short_ratios = {}, {}
    for s in f.subjects:
        long = {k: quotient(f.estimate(s, k, 1.0), f.estimate(s, k, 0.0)) for k in common}
        rows.append([f"{s.symbol} here, Fréchet", *map(short, long.values())])
        at = [str(k) for k, r in long.items() if r.mean + 2 * r.se < 1]
        helps += [f"{s.symbol} at {' '.join(at)} steps"] if at else []
        long_ratios |= {(s.symbol, k): r for k, r in long.items()}
    for symbol, pred in (("v", "v"), ("ε", "eps")) if f.trainings else ():
        of = {"pred": pred, "schedule": "cosine", "density": "lognormal"}
        brief = {
            k: quotient(f.trained(k, 1.0, **of), f.trained(k, 0.0, **of))
            for k in common
            if k in TRAINED_STEPS
        }
        name = f"{symbol} of {f.args.train_images:,} training images"
        rows.append([name, *(short(brief[k]) if k in brief else "" for k in common)])
        short_ratios |= {(symbol, k): r for k, r in brief.items()}
    blocks += [
        say("""The distance at η = 1 over that at η = 0, beside the DDIM paper's (Song et al. 2021,
        table 1, CIFAR-10): above 1, noise harms."""),
        markdown_table(["steps", *common], rows),
    ]
    if helps:
        blocks.append(
            say(f"""In the paper noise harms at every number of steps, most at few. Here it helps,
            by more than the noise of the measurement, {" and ".join(helps)}. The likely reason is
            whose errors are the larger, the steps' or the network's: ours is small. At η = 0 what
            the network gets wrong early stays in the image; noise overwrites it, and later steps
            draw it anew (Karras et al. 2022, section 4, on their churn).
            {what_training_does(long_ratios, short_ratios)}""")
        )
    return blocks


def short(ratio: Estimate) -> str:
    return f"{ratio.mean:.2f} ± {ratio.se:.2f}"


def what_training_does(long: dict, brief: dict) -> str:
    """Whether noise helps more or less after a longer training, by (symbol, steps)."""
    z = [z_score(long[key], brief[key]) for key in long.keys() & brief.keys()]
    if not z:
        return ""
    if max(z) < 2 and min(z) <= -2:
        return """It is not that the training was too short: after a longer one noise takes away a
        larger share of the distance, nowhere a smaller one. What it can't mend, the errors of the
        last steps, seems to be learned soonest."""
    if min(z) > -2 and max(z) >= 2:
        return "After a longer training it helps less, as in Karras et al. 2022."
    return "What a longer training changes of it does not show."


def which_prediction(f: Findings) -> list[str]:
    blocks = []
    for (a, b), eta in product(pairwise(f.subjects), sorted(set(f.extremes))):
        sides = (a, eta), (b, eta)
        title = f"**{' or '.join(names_of(*sides))}, at η = {eta:g}?**"
        blocks += [f"{title} Better: {winners(f, *sides)} steps.", duel(f, *sides)]
    if blocks and 1 in f.args.steps:
        sure = ", ".join(
            f"{s.symbol}'s {f.estimate(s, 1, f.args.eta[0], 'confidence').mean:.2f}"
            for s in f.subjects
        )
        blocks.append(
            say(f"""After one step an image is no more than the x₀ predicted from pure noise, of
            which the best guess is the mean of all digits: that row ranks no samplers (the
            classifier's mean confidence: {sure}).""")
        )
    return ["## 3. Which prediction type?", *blocks] if blocks else []


def same_noise(f: Findings) -> list[str]:
    """Does x_T keep its digit over step counts? DDIM section 5.2."""
    longest, steps = f.args.steps[-1], f.args.steps[:-1]
    rows = [
        (f"{s.symbol}, η = {eta:g}", *(f"{f.shares[s.label, k, eta]:.0%}" for k in steps))
        for s, eta in product(f.subjects, f.args.eta)
    ]
    n = min(row["n"] for row in f.rows)
    return [
        "## 4. The same noise",
        "![The same noise at every setting](images.png)",
        say(f"""Four images: a row of a panel is one x_T, a column a number of steps. Below, the
        share of images that the classifier reads as the same digit as at {longest} steps (about 10
        % by chance; two standard errors are at most {100 / math.sqrt(n):.0f} points). At η = 0,
        DDIM's section 5.2 says, x_T decides what an image will be."""),
        markdown_table(["steps", *steps], rows),
        "![The share that keeps its digit](agreement.png)",
    ]


def cost(f: Findings) -> list[str]:
    lines = []
    for subject in f.subjects:
        mine = [row for row in f.rows if row["model"] == subject.label]
        a, b = fit_time(mine)
        off = statistics.median(abs((a + b * r["steps"]) * r["n"] / r["seconds"] - 1) for r in mine)
        lines.append(
            f"""{subject.label}: {1e3 * b:.2f} ms an image and step, {1e3 * a:.2f} ms an image; half
            of the cells are within {off:.0%} of the line. η costs nothing that shows."""
        )
    return ["## 5. Time", "![Milliseconds an image against steps](time.png)", bullets(lines)]


def why_v(f: Findings) -> list[str]:
    """The numerical-stability claim of Salimans & Ho 2022, in numbers."""
    rows = []
    for s in f.subjects:
        by_t = f.errors[s.label]
        for r in (by_t[0], by_t[len(by_t) // 2], *by_t[-3:]):
            keys = ("float32", "bfloat16", "float32_clipped", "rounding")
            rows.append((s.symbol, r["t"], f"{r['snr']:.1e}", *(f"{r[key]:.3g}" for key in keys)))
    head = ("", "t", "SNR", "float32", "bfloat16", "float32, clipped", "bfloat16 − float32")
    last = {s.symbol: f.errors[s.label][-1] for s in f.subjects}
    blocks = [
        "## 6. Why v",
        "![Errors of the predicted clean image](why-v.png)",
        say("""The rms error of the predicted x₀ (pixels in [−1, 1]), before clipping, of test
        images, all with the same noise; the network in float32 and under bfloat16 autocast."""),
        markdown_table(head, rows),
        say("""An ε-model's x₀ is (x_t − √(1−ᾱ) ε) / √ᾱ: what is wrong with ε is divided by √ᾱ,
        which the cosine schedule takes almost to 0. A v-model's is √ᾱ x_t − √(1−ᾱ) v: no error
        grows (Salimans & Ho 2022)."""),
    ]
    if {"v", "ε"} <= set(last):
        eps, v = last["ε"], last["v"]
        blocks.append(
            say(f"""Measured at t = {eps["t"]}: ε's error is {eps["float32"] / v["float32"]:.2g}
            times v's in float32, and what bfloat16 adds to it {eps["rounding"] / v["rounding"]:.2g}
            times. Clipping brings ε's {eps["float32"]:.3g} down to {eps["float32_clipped"]:.2g} (v:
            {v["float32"]:.2g}): it is what makes an ε-model usable from pure noise, at the price of
            a first step that says little.""")
        )
    clipped = "; ".join(
        f"{s.symbol} {f.clipped[s.label][0]['share']:.0%} and {f.clipped[s.label][-1]['share']:.0%}"
        for s in f.subjects
    )
    return [*blocks, f"Pixels clipped while sampling, at the first and the last step: {clipped}."]


def smoothness(f: Findings) -> list[str]:
    rows = [
        (s.symbol, *(f"{f.smooth[s.label, eta]:.2f}" for eta in f.args.eta)) for s in f.subjects
    ]
    return [
        "## 7. Interpolation",
        "![Paths between two noises](interpolation.png)",
        say(f"""Slerp between two x_T in {PATH} images; where η > 0 every image has sampling noise
        of its own. The distance of neighbours on a path over that of unrelated images: 1 where x_T
        decides nothing, {1 / (PATH - 1):g} on a straight line."""),
        markdown_table(["", *(f"η = {eta:g}" for eta in f.args.eta)], rows),
    ]


def copying(f: Findings) -> list[str]:
    """Novelty, precision, recall and the digits of each subject's best cell of --n images."""
    columns = {"real images": f.floors[f.args.n]}
    for subject in f.subjects:
        steps, eta = f.best(subject)
        name = f"{subject.label}, {steps} steps, η = {eta:g}"
        columns[name] = f.results[subject.label, steps, eta][0]
    figures = {
        "novelty": ("novelty", ".2f"),
        "copies": ("copies", ".1%"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "mean confidence": ("confidence", ".3f"),
        "entropy of the digits, of 3.32 bits": ("label_entropy", ".3f"),
    }
    rows = [
        (name, *(f"{s[key]:{form}} ± {2 * s[key + '_se']:{form}}" for s in columns.values()))
        for name, (key, form) in figures.items()
    ]
    return [
        "## 8. Is it copying?",
        say("""Each model's best cell, seed 0. Novelty is the distance to the nearest training image
        over that of test images (1: as new as they are); copies are the share nearer than 95 % of
        test images (5 % by chance); ± two standard errors over the samples."""),
        markdown_table(["", *columns], rows),
        "![The samples closest to a training image](pairs.png)",
        say("""Of each the 16 images that come closest, above the training image that they come
        closest to; and the same for test images, which nobody copied."""),
    ]


def schedules(f: Findings) -> list[str]:
    """Prediction types over training seeds, and the noise schedules."""
    settings = list(product(TRAINED_STEPS, TRAINED_ETAS))
    head = ["", *(f"{steps} steps, η = {eta:g}" for steps, eta in settings)]

    def estimates(**wanted: object) -> list[Estimate]:
        return [f.trained(*setting, **wanted) for setting in settings]

    def cells(row: list[Estimate]) -> list[str]:
        return [f"{e.mean:.1f} ± {e.margin:.1f}" for e in row]

    base = {"schedule": "cosine", "density": "lognormal"}
    v, eps = (estimates(pred=pred, **base) for pred in ("v", "eps"))
    plain = estimates(pred="eps", weighted=False, **base)
    kinds = {
        (s, d): estimates(pred="v", seed=0, schedule=s, density=d)
        for s, d in product(SCHEDULES, DENSITIES)
    }
    rows = [[f"{SCHEDULES[s]}, {DENSITIES[d]}", *cells(e)] for (s, d), e in kinds.items()]

    def z(a: list[Estimate], b: list[Estimate]) -> list[str]:
        return [f"{z_score(*pair):+.1f}" for pair in zip(a, b, strict=True)]

    return [
        "## 9. Equal training: prediction types and schedules",
        say(f"""Models of {f.args.train_images:,} training images each, Fréchet distance at
        n = {f.args.n:,}. First over {v[0].runs} training seeds: ± is what another training's figure
        should be within. ε's loss is weighted by 1/ᾱ up to 5, which makes it nearly v's loss; and,
        in the last rows, it is not: what that changes is not the parametrisation's doing."""),
        markdown_table(
            head,
            [
                *(["v", *cells(v)], ["ε", *cells(eps)], ["z, v against ε", *z(v, eps)]),
                ["ε, loss not weighted", *cells(plain)],
                ["z, v against that", *z(v, plain)],
            ],
        ),
        say("""Then v-prediction under three noise schedules, with training timesteps drawn by
        log-SNR or uniformly, one training each: ± is of the samples alone; what another training
        would change is seen above."""),
        markdown_table(head, rows),
        schedule_findings(kinds, [e.run_se for e in v]),
    ]


def schedule_findings(kinds: dict[tuple[str, str], list[Estimate]], spread: Sequence[float]) -> str:
    """What (schedule, density) does to the distance at several settings of sampling.

    `spread` is the standard error of one training at each setting.
    """
    gains = [
        uniform.mean / lognormal.mean
        for s in SCHEDULES
        for lognormal, uniform in zip(kinds[s, "lognormal"], kinds[s, "uniform"], strict=True)
    ]
    lines = [
        f"""**How t is drawn in training:** by log-SNR, the distance is that of uniform t divided by
        {min(gains):.1f} to {max(gains):.1f}."""
    ]
    for density, name in DENSITIES.items():
        z = {
            (a, b, i): (kinds[a, density][i].mean - kinds[b, density][i].mean) / (2**0.5 * se)
            for a, b in combinations(SCHEDULES, 2)
            for i, se in enumerate(spread)
        }
        most: dict[tuple[str, str], float] = {}  # by (worse, better), of those told apart
        for (a, b, _), value in z.items():
            worse, better = (a, b) if value > 0 else (b, a)
            if abs(value) >= 3:
                most[worse, better] = max(abs(value), most.get((worse, better), 0))
        verdict = (
            "; ".join(
                f"“{SCHEDULES[better]}” beats “{SCHEDULES[worse]}” by up to {value:.1f}"
                for (worse, better), value in most.items()
            )
            + " standard errors of a training"
            if most
            else f"not told apart (largest |z| of {len(z)}: {max(map(abs, z.values())):.1f})"
        )
        lines.append(f"**The schedule, with {name}:** {verdict}.")
    return bullets(lines)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """A row a cell; a list (the label counts) with spaces between."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        writer.writerow(flat)
    write_atomically(path, buffer.getvalue().encode())


# -------------------------------------------------------------------------------------- the script


def main() -> int:
    args = parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = Place(cli.pick_device(args.device), world, rank)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        return study(args, place)
    except KeyboardInterrupt:
        tqdm.write(
            f"stopped; what is finished is in {args.out}: the same command goes on from there"
        )
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()


def study(args: argparse.Namespace, place: Place) -> int:
    out, device = Path(args.out), place.device
    subjects = load_subjects(args.ckpt, device)
    n_long = args.n_long or (
        args.n if device.type == "cuda" else max(args.n // 4, metrics.MIN_SAMPLES)
    )
    if args.steps[0] > LONG:
        args.n = n_long  # no shorter cell is there to be compared with
    for subject in subjects:
        T = subject.scheduler().num_train_timesteps
        if args.steps[-1] > T:
            raise UserError(f"--steps {args.steps[-1]} is more than the {T} of {subject.path}")
    if place.rank == 0:
        for split in ("train", "test"):
            load_dataset("mnist", split, args.data)  # fetched, if need be, before anything is spent
        metrics.load_classifier()
        (out / "cells").mkdir(parents=True, exist_ok=True)
    place.agree(None)

    cells = make_cells(
        subjects,
        args.steps,
        args.eta,
        n=lambda steps: n_long if steps > LONG else args.n,
        seeds=lambda steps: args.seeds if steps in HEADLINE else 1,
    )
    rows = run_cells(cells, subjects, place, args)
    trainings = make_trainings(args.train_images, args.seeds) if args.train_images else []
    trained_subjects = run_trainings(trainings, place, args) if trainings else []
    trained_cells = make_cells(
        trained_subjects, TRAINED_STEPS, TRAINED_ETAS, lambda _: args.n, lambda _: 1
    )
    trained_rows = run_cells(trained_cells, trained_subjects, place, args)
    if place.rank:
        return 0

    results, real = by_setting(rows), load_dataset("mnist", "test", args.data)[0]
    floors = {n: metrics.floor(n, data_dir=args.data) for n in {args.n, n_long}}
    T = min(s.scheduler().num_train_timesteps for s in subjects)
    close = {T - 1 - k for k in (0, 1, 2, 5, 10, 20) if k < T}  # to pure noise: where ε fails
    timesteps = sorted({round(i * (T - 1) / 20) for i in range(21)} | close, reverse=True)
    errors, clipped, pictures, smooth = {}, {}, {}, {}
    for subject in tqdm(subjects, desc="predictions and interpolations"):
        by_t = prediction_errors(subject, real[: min(500, args.n)].to(device), timesteps)
        errors[subject.label] = by_t[::-1]
        clipped[subject.label] = clipped_shares(subject, 100, min(50, T), device)
        for eta in args.eta:
            pictures[subject.label, eta], smooth[subject.label, eta] = interpolate(
                subject, eta, pairs=8, length=PATH, steps=min(50, T), device=device
            )
    shares = agreement(out / "cells", cells)
    symbols = {s.label: s.symbol for s in subjects}

    draw_steps(results, subjects, floors, args.n, out / "steps.png")
    draw_matrix(out / "cells", cells, subjects, out / "images.png")
    draw_agreement(shares, subjects, out / "agreement.png")
    draw_time(rows, subjects, out / "time.png")
    draw_why_v(errors, clipped, symbols, out / "why-v.png")
    draw_interpolation(pictures, subjects, PATH, out / "interpolation.png")
    write_csv(out / "results.csv", rows + trained_rows)
    findings = Findings(
        args, subjects, rows, floors, shares, errors, clipped, smooth, trainings, trained_rows
    )
    best = {(s.label, *findings.best(s)) for s in subjects}
    best_cells = [c for c in cells if c.seed == 0 and (c.model, c.steps, c.eta) in best]
    draw_closest(out / "cells", best_cells, args.data, out / "pairs.png")
    text = report(findings)
    write_atomically(out / "STUDY.md", text.encode())
    print(f"report   {out / 'STUDY.md'}\nresults  {out / 'results.csv'} ({len(cells)} cells)")
    print("figures  " + ", ".join(path.name for path in sorted(out.glob("*.png"))))
    return 0


if __name__ == "__main__":
    cli.run(main)
