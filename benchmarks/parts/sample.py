"""Images per second with 50 DDIM steps."""

from functools import partial

from benchmarks.bench import Bench
from benchmarks.contestants import samples_at_a_time
from benchmarks.measure import in_turns

BATCHES = {"ours": 4, "diffusers": 1, "ddpm-pytorch": 1}  # per turn


def measure(bench: Bench) -> None:
    """Print the row of the part `sample`; it takes half of the rounds."""
    n = samples_at_a_time(bench.device)
    works = {name: partial(w, "sample", BATCHES[name]) for name, w in bench.workers.items()}
    seconds = in_turns(works, max(1, bench.rounds // 2), bench.device)
    rates = {name: BATCHES[name] * n / s for name, s in seconds.items()}
    bench.row(f"sampling, 50 DDIM steps, {n} at a time, images/s", rates, "at least 8 x")
