"""Microseconds of `step` and `add_noise`, ours and those of diffusers."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.contestants import SHAPE
from benchmarks.measure import in_turns, repeat
from scheduler import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerOutput

CALLS = 100  # per turn


def measure(bench: Bench) -> None:
    """Print the rows of the part `scheduler`; it takes four times the rounds."""
    for B in (64, 1024):
        x, output = (torch.randn(B, *SHAPE, device=bench.device) for _ in range(2))
        t = torch.randint(1000, (B,), device=bench.device)
        for cls in (DDIMScheduler, DDPMScheduler):
            pair = schedulers(cls)
            asked = (B, cls) == (64, DDIMScheduler)
            steps = {name: partial(s.step, output, 499, x) for name, s in pair.items()}
            row(bench, f"{cls.__name__}.step, batch {B}", steps, "at most 0.5 x" if asked else "")
            noises = {name: partial(s.add_noise, x, output, t) for name, s in pair.items()}
            row(bench, f"{cls.__name__}.add_noise, batch {B}", noises)
        cls = DPMSolverMultistepScheduler
        walks = {name: partial(next, walk(s, output, x)) for name, s in schedulers(cls).items()}
        row(bench, f"{cls.__name__}.step, batch {B}", walks)


def schedulers(cls: type[DDPMScheduler]) -> dict:
    """Return our scheduler of a class and that of diffusers, both set to 50 steps."""
    import diffusers

    peer = getattr(diffusers, cls.__name__)(timestep_spacing="trailing")
    pair = {"ours": cls(), "diffusers": peer}
    for scheduler in pair.values():
        scheduler.set_timesteps(50)
    return pair


def walk(scheduler, output: Tensor, x: Tensor) -> Iterator[SchedulerOutput]:
    """Yield the results of steps, in one sampling loop after another.

    A multistep scheduler remembers its last step. So it cannot be timed at one timestep only.
    """
    while True:
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps.tolist():
            yield scheduler.step(output, t, x)


def row(bench: Bench, what: str, calls: dict[str, Callable], target: str = "") -> None:
    """Print the microseconds of one call."""
    works = {name: partial(repeat, call, CALLS) for name, call in calls.items()}
    seconds = in_turns(works, 4 * bench.rounds, bench.device)
    bench.row(
        f"{what}, microseconds", {name: s / CALLS * 1e6 for name, s in seconds.items()}, target
    )
