"""How things are timed."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes, the device's part of it included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each work. Every round calls each once; the first is dropped."""
    seconds = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            elapsed = clock(work, device)
            if i:
                seconds[name].append(elapsed)
    return {name: median(values) for name, values in seconds.items()}


def repeat(work: Callable[[], object], times: int) -> None:
    """Call `work` so many times."""
    for _ in range(times):
        work()


def peak_memory() -> float:
    """Return the most memory that this process has had so far, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss includes the parent's peak there, from before the exec
        kb = next(s.split()[1] for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(kb) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
