"""Cost against training steps, images and sampling steps; two processes against one."""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.bench import Bench
from benchmarks.contestants import Ours
from benchmarks.measure import in_turns, repeat
from benchmarks.processes import ROOT, python

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--")


def measure(bench: Bench) -> None:
    """Print the rows of the part `scale`."""
    sizes(bench)
    if bench.device.type == "cpu":
        processes(bench)


def sizes(bench: Bench) -> None:
    """Print what four times the work costs."""
    ours = Ours(bench.images, bench.batch_size, bench.device)
    kinds = {
        "training steps": {k: partial(repeat, ours.train_step, k) for k in (10, 20, 40)},
        "images": {
            k: partial(repeat, partial(ours.sample, 64, 10), k // 64) for k in (64, 128, 256)
        },
        "sampling steps": {k: partial(ours.sample, 64, k) for k in (10, 20, 40)},
    }
    works = {f"{k} {kind}": work for kind, sized in kinds.items() for k, work in sized.items()}
    seconds = in_turns(works, bench.rounds, bench.device)
    for kind, sized in kinds.items():
        times = {k: seconds[f"{k} {kind}"] for k in sized}
        few, many = min(times), max(times)
        bench.row(
            f"cost of {many} {kind} / cost of {few}",
            {"ours": times[many] / times[few]},
            f"about {many // few}",
            ", ".join(f"{k}: {s:.2f} s" for k, s in times.items()),
        )


def processes(bench: Bench) -> None:
    """Print the speed of train.py and infer.py in two processes of one thread each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = {"one": ((), 2), "two": (TORCHRUN, 1)}  # launcher and threads per process
        training = {way: training_rate(bench, folder, *how) for way, how in ways.items()}
        sampling = {way: sampling_rate(folder, *how) for way, how in ways.items()}
    for kind, rates in (("training", training), ("sampling", sampling)):
        bench.row(
            f"{kind}: speed of 2 processes x 1 thread / 1 process x 2 threads",
            {"ours": rates["two"] / rates["one"]},
            "at least 0.9",
            f"{rates['two']:.0f} and {rates['one']:.0f} images/s",
        )


def training_rate(bench: Bench, folder: Path, launcher: tuple, threads: int) -> float:
    """Return the images per second that train.py logs, without its first steps."""
    arguments = ("--steps", 120, "--log-every", 20, "--out", folder / "x.pt", "--device", "cpu")
    arguments += ("--samples", folder / "samples", "--data", bench.args.data)
    python(*launcher, ROOT / "train.py", *arguments, threads=threads)
    log = map(json.loads, (folder / "x.jsonl").read_text().splitlines())
    return median(r["images_per_s"] for r in log if r["step"] > 20 and "images_per_s" in r)


def sampling_rate(folder: Path, launcher: tuple, threads: int) -> float:
    """Return the images per second of infer.py. Its start-up cancels in a difference."""
    seconds = {}
    for n in (256, 1280):
        arguments = ("--ckpt", ROOT / "checkpoints/mnist-v.pt", "--n", n, "--steps", 20)
        arguments += ("--out", folder / "x.png", "--device", "cpu")
        started = time.perf_counter()
        python(*launcher, ROOT / "infer.py", *arguments, threads=threads)
        seconds[n] = time.perf_counter() - started
    return 1024 / (seconds[1280] - seconds[256])
