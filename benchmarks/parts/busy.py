"""How threads should wait: OMP_WAIT_POLICY on the machine as it is and with one busy process more.

An OpenMP thread that waits for the others can sleep (`passive`) or spin (`active`). Without the
variable, it spins for some milliseconds and then sleeps; this is the default of the scripts.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from statistics import median

from benchmarks.bench import Bench
from benchmarks.contestants import samples_at_a_time
from benchmarks.measure import clock

POLICIES = {"passive": "passive", "active": "active", "not set": None}
STEPS, BATCHES = 60, 4
SPIN = """
import os, sys, threading
end_with_parent = lambda: (sys.stdin.read(), os._exit(0))
threading.Thread(target=end_with_parent, daemon=True).start()
while True:
    pass
"""


def measure(bench: Bench) -> None:
    """Print the rows of the part `busy`; it takes half of the rounds."""
    images = BATCHES * samples_at_a_time(bench.device)
    surroundings = {"as it is": contextlib.nullcontext, "with one busy process": busy_process}
    for machine, beside in surroundings.items():
        with beside():
            training, sampling = seconds(bench, max(1, bench.rounds // 2))
        for what, times in (
            (f"{STEPS} training steps", training),
            (f"{images} images of 50 steps", sampling),
        ):
            bench.row(f"machine {machine}: {what}, s", times, columns=tuple(POLICIES))


def seconds(bench: Bench, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of training and of sampling, per policy.

    Every turn has a process of its own, which ends with it: the threads of an `active` process that
    has nothing to do would go on spinning, beside the next one.
    """
    training = {name: [] for name in POLICIES}
    sampling = {name: [] for name in POLICIES}
    orders = (("train", STEPS, training), ("sample", BATCHES, sampling))
    for _ in range(rounds):
        for name, policy in POLICIES.items():
            with bench.start("ours", OMP_WAIT_POLICY=policy) as worker:
                for order, times, into in orders:
                    worker(order, 1)  # warm up
                    into[name].append(clock(partial(worker, order, times), bench.device))
    return tuple({n: median(s) for n, s in times.items()} for times in (training, sampling))


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """Keep one core busy with a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE)
    try:
        time.sleep(1)  # Python's own start is over then
        yield process
    finally:
        process.kill()
        process.communicate()
