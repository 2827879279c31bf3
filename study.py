"""The study: what prediction type, sampler, number of steps and eta do to the samples.

all experiments:     python study.py
a first look:        python study.py --quick
some of them:        python study.py eta why-v
a wider grid:        python study.py --steps 4 8 16 32 --eta 0 0.1 1 --ckpt a.pt b.pt c.pt
several processes:   torchrun --nproc-per-node=2 -- study.py

Each experiment is a file in experiments/, whose docstring states its question. A run writes the
figures and results.csv (one row per cell), and it replaces the tables in STUDY.md. It
names the sections whose tables have changed: their text has to be read again. Without a STUDY.md
it writes one without text.

Samples and trainings are kept in the output folder, so a study that was stopped goes on where it
was, and a wider grid only adds to it. One bar counts the network calls of all that is left to do;
one call is for one image, and an image of a training counts as three.
"""

import argparse
import csv
import io
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

from lab import cli
from lab.classifier import load_classifier
from lab.data import load_dataset
from lab.distributed import Process, launch
from lab.errors import UserError
from lab.files import write_atomically

from tqdm import tqdm

from experiments import (
    calibration,
    copying,
    cost,
    eta,
    exact,
    guidance,
    interpolation,
    length,
    likelihood,
    prediction,
    ranges,
    same_noise,
    samplers,
    setup,
    steps,
    training,
    why_v,
)
from experiments.common import HEADLINE, LONG, Plan, Settings, Study
from experiments.grid import Cell, load_subjects
from experiments.tables import names, refresh, skeleton
from metrics import MIN_SAMPLES

ROOT = Path(__file__).resolve().parent

EXPERIMENTS = {  # in the order of STUDY.md
    "setup": setup,
    "steps": steps,
    "eta": eta,
    "samplers": samplers,
    "prediction": prediction,
    "likelihood": likelihood,
    "same-noise": same_noise,
    "cost": cost,
    "why-v": why_v,
    "interpolation": interpolation,
    "copying": copying,
    "training": training,
    "length": length,
    "exact": exact,
    "ranges": ranges,
    "guidance": guidance,
    "calibration": calibration,
}
CHECKPOINTS = ("checkpoints/mnist-v.pt", "checkpoints/mnist-eps.pt")
FULL = {
    "steps": (1, 2, 3, 5, 10, 20, 50, 100),
    "calls": (1, 2, 4, 8, 16, 32, 64),
    "eta": (0.0, 0.2, 0.5, 1.0),
    "n": 1000,
    "seeds": 3,
    "train_images": 64_000,
    "out": ROOT / "results",
}
# left out by --quick, unless it is asked for by name
NOT_QUICK = {"ranges", "length", "guidance", "calibration"}
QUICK = {
    "steps": (1, 5, 20),
    "calls": (4, 16),
    "eta": (0.0, 1.0),
    "n": 100,
    "seeds": 2,
    "train_images": 0,
    "out": ROOT / "results" / "quick",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    natural, images = cli.number(int, 1), cli.number(int, MIN_SAMPLES, 10**7)
    titles = (f"    {name:14} {experiment.TITLE}" for name, experiment in EXPERIMENTS.items())
    p = cli.Parser("\n".join([__doc__, "The experiments:\n", *titles]))
    p.add_argument(
        "experiments",
        nargs="*",
        metavar="EXPERIMENT",
        help="which ones, of those above (default: all)",
    )
    p.add_argument(
        "--ckpt",
        nargs="+",
        metavar="FILE.pt",
        help=f"checkpoints of train.py, any number (default: {' '.join(CHECKPOINTS)})",
    )
    p.add_argument("--quick", action="store_true", help="a small grid: 1 to 3 minutes on 2 cores")
    p.add_argument(
        "--steps", type=natural, nargs="+", help="numbers of steps (default: eight from 1 to 100)"
    )
    p.add_argument(
        "--eta", type=cli.number(float, 0, 1), nargs="+", help="values of eta (default: 0 .2 .5 1)"
    )
    p.add_argument(
        "--calls",
        type=natural,
        nargs="+",
        help="network calls at which samplers are compared (default: powers of two up to 64)",
    )
    p.add_argument("--n", type=images, help="images per cell (default: 1000)")
    p.add_argument(
        "--n-long",
        type=images,
        help=f"images per cell of more than {LONG} steps (default: --n on a GPU, else a quarter)",
    )
    p.add_argument(
        "--seeds",
        type=cli.number(int, 1, 1000),
        help="seeds of sampling, at "
        f"{', '.join(map(str, HEADLINE))} steps, and seeds of training (default: 3)",
    )
    p.add_argument(
        "--train-images",
        type=cli.number(int, 0),
        help="length of each of the study's own trainings; 0: no trainings (default: 64000)",
    )
    p.add_argument(
        "--batch-size",
        type=natural,
        help="images at a time, in sampling; on a CPU, in each of up to 8 threads (default: 50, "
        "on a GPU 100; for the exact denoiser 250)",
    )
    cli.add_device(p)
    cli.add_data(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder (default: results, or results/quick with --quick)",
    )
    args = p.parse_args(argv)
    for name in args.experiments:
        if name not in EXPERIMENTS:
            p.error(f"there is no experiment {name!r}: choose from {', '.join(EXPERIMENTS)}")
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    wanted = args.experiments or EXPERIMENTS.keys() - (NOT_QUICK if args.quick else set())
    args.experiments = [name for name in EXPERIMENTS if name in wanted]
    return args


def make_study(args: argparse.Namespace, process: Process) -> Study:
    """Return the study that the arguments describe.

    Raises:
        UserError: a checkpoint cannot be used, or not with this number of steps.
    """
    on_gpu = process.device.type == "cuda"
    settings = Settings(
        steps=tuple(sorted(set(args.steps))),
        calls=tuple(sorted(set(args.calls))),
        etas=tuple(sorted(set(args.eta))),
        n=args.n,
        n_long=args.n_long or (args.n if on_gpu else max(args.n // 4, MIN_SAMPLES)),
        seeds=args.seeds,
        train_images=args.train_images,
        batch_size=args.batch_size or (50 if process.device.type == "cpu" else 100),
        data_dir=args.data,
        out=args.out,
    )
    paths = args.ckpt or [ROOT / path for path in CHECKPOINTS]
    subjects = load_subjects(paths, process.device)
    for subject in subjects:
        T, most = subject.num_train_timesteps, settings.steps[-1]
        if T == 1:
            raise UserError(f"{subject.path} has one timestep only: there is nothing to compare")
        if most > T:
            raise UserError(f"--steps {most} is more than the {T} of {subject.path}")
    world = process.world
    launcher = "python" if world == 1 else f"torchrun --nproc-per-node={world} --"
    return Study(
        settings, process, subjects, f"{launcher} {shlex.join(['study.py', *sys.argv[1:]])}"
    )


def main() -> int:
    args = parse_args()
    with launch(args.device, timeout=timedelta(days=1)) as process:
        try:
            return run(args, process)
        except cli.Stopped:
            tqdm.write(f"stopped; {args.out} has what is finished: the same command goes on")
            raise


def run(args: argparse.Namespace, process: Process) -> int:
    began = time.time()
    study = make_study(args, process)
    report = study.out / "STUDY.md"
    if process.is_first:  # what is missing is noticed before the work, and downloaded
        for split in ("train", "test"):
            load_dataset("mnist", split, args.data)
        load_classifier()
        refresh(read_report(report), {})
        read_csv(study.out / "results.csv")
        (study.out / "cells").mkdir(parents=True, exist_ok=True)
    process.barrier()

    plan = Plan.of(study)
    for name in args.experiments:  # it loads every checkpoint, so a bad one is noticed now
        EXPERIMENTS[name].run(plan)
    tables: dict[str, str] = {}
    with work_bar(sum(plan.missing.values()), process) as study.bar:
        for name in args.experiments:
            tables |= EXPERIMENTS[name].run(study)
    if process.is_first:
        write_results(study, args, tables, began)
    return 0


def write_results(
    study: Study, args: argparse.Namespace, tables: dict[str, str], began: float
) -> None:
    """Write results.csv and STUDY.md, and print what this run has written.

    Args:
        began: the time when it began, in seconds since the epoch.
    """
    table, report = study.out / "results.csv", study.out / "STUDY.md"
    complete = len(args.experiments) == len(EXPERIMENTS) and args.train_images > 0
    write_csv(table, study.rows, complete)
    is_new = not report.exists()
    text, changed = refresh(read_report(report), tables)
    write_atomically(report, text.encode(errors="backslashreplace"))  # a path may hold any byte

    ran = [EXPERIMENTS[name] for name in args.experiments]
    figures = sorted(file for module in ran for file in module.FIGURES)
    drawn = [file for file in figures if is_newer(study.out / file, began)]
    print(f"report   {report}\nresults  {table} ({len(study.rows)} cells measured or read)")
    print(f"figures  {', '.join(drawn) or 'none'}")
    for name in tables.keys() - set(names(text)):
        print(f"note     {report} has no place for the table {name}: add <!-- table {name} -->")
    if is_new:
        return
    if old := [name for module in ran for name in module.TABLES if name not in tables]:
        print(f"note     not measured with these options, and left as before: {', '.join(old)}")
    for heading in changed:
        print(f"changed  tables of “{heading}”: read its text again")


def work_bar(calls: int, process: Process) -> tqdm:
    """Return a bar over so many network calls. The first process shows it, if there are any."""
    hidden = not process.is_first or not calls
    return tqdm(total=calls, unit="call", unit_scale=True, smoothing=0.02, disable=hidden)


def is_newer(path: Path, began: float) -> bool:
    """Return whether a file was written after a time (a file system may drop its fractions)."""
    return path.exists() and path.stat().st_mtime >= int(began)


def read_report(path: Path) -> str:
    """Return STUDY.md, or one without text if there is none."""
    if path.exists():
        return read_text(path)
    return skeleton(EXPERIMENTS.values())


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: move it away") from None


def identity(line: dict) -> tuple[str, ...]:
    """Return what tells a line of results.csv from others: its cell."""
    return tuple(str(line[field.name]) for field in fields(Cell))


def read_csv(path: Path) -> dict[tuple[str, ...], dict]:
    """Return the lines of results.csv by their cells; none if there is no file.

    Raises:
        UserError: it is not a file that `write_csv` wrote. It would be lost.
    """
    if not path.exists():
        return {}
    try:
        lines = list(csv.DictReader(io.StringIO(read_text(path)), strict=True))
        found = {identity(line): line for line in lines}
        # csv marks a missing field, and one too many, with None
        is_whole = not any(None in (*line, *line.values()) for line in lines)
        is_mine = is_whole and len(found) == len(lines)
    except (csv.Error, KeyError):  # a column of the cells is missing
        is_mine = False
    if not is_mine:
        raise UserError(f"{path} is not a results.csv of the study: move it away")
    return found


def write_csv(path: Path, rows: dict[Cell, dict], complete: bool) -> None:
    """Write one line per cell; a list (the counts of the digits) with spaces between.

    Lines of the file whose cells are not in `rows` stay.

    Args:
        complete: whether all experiments ran. Then lines of other checkpoints with the same names
            go.
    """
    new: dict[tuple[str, ...], dict] = {}
    for cell, row in rows.items():
        flat = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        flat = {k: "" if v is None else v for k, v in flat.items()}
        new[identity(asdict(cell) | {"eta": "" if cell.eta is None else cell.eta})] = flat
    old = read_csv(path)  # lines keep their place
    files = {cell.model: cell.sha256 for cell in rows} if complete else {}
    lines = {i: x for i, x in old.items() if x["sha256"] == files.get(x["model"], x["sha256"])}
    lines |= new
    if not lines:
        return
    buffer = io.StringIO()
    # the order of the columns is that of the newest line
    columns = dict.fromkeys(column for line in reversed(lines.values()) for column in line)
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    write_atomically(path, buffer.getvalue().encode())


if __name__ == "__main__":
    cli.run(main)
