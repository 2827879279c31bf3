"""Where the time of a training step goes, measured with torch's hooks and its profiler."""

import time
from collections import defaultdict

from lab.device import bfloat16_convolutions
from lab.distributed import Process

import torch

from benchmarks.contestants import Ours
from benchmarks.measure import repeat
from training.run import Meter

LOG_EVERY = 50  # steps between two readings of the losses, as in train.py


class Laps:
    """A stopwatch: `lap(part)` adds the time since the last lap to that part."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


def shares(ours: Ours, steps: int, warm_up: int = LOG_EVERY) -> dict[str, float]:
    """Return which share of the training steps is "forward", "backward", "optimizer" and "rest".

    `steps` training steps are measured, after `warm_up` that are not. As in train.py, the losses
    are kept and read at every log. What train.py does besides is left out: its progress bar, and
    writing the log. On a GPU these are the times of starting the work, not of doing it, and the
    steps are those without a CUDA graph.
    """
    run, laps, meter, process = ours.run, Laps(), Meter(), Process(ours.device)
    hooks = [
        run.model.register_forward_pre_hook(lambda *_: laps.lap("rest")),
        run.model.register_forward_hook(lambda *_: laps.lap("forward")),
    ]
    for p in run.model.parameters():  # the last gradient to arrive ends the backward pass
        hooks.append(p.register_post_accumulate_grad_hook(lambda _: laps.lap("backward")))
    for optimizer in run.optimizers:
        hooks.append(optimizer.register_step_pre_hook(lambda *_: laps.lap("rest")))
        hooks.append(optimizer.register_step_post_hook(lambda *_: laps.lap("optimizer")))

    for step in range(warm_up + steps):
        if step == warm_up:
            laps.restart()
        with bfloat16_convolutions():
            loss = ours.loss()
            laps.lap("rest")  # `update` begins with the backward pass
            norm = run.update(loss)
        meter.add(loss, norm)
        if len(meter) == LOG_EVERY:
            run.check_finite(*meter.read(process), "none")
        laps.lap("rest")
    for hook in hooks:
        hook.remove()
    total = sum(laps.seconds.values())
    return {part: seconds / total for part, seconds in laps.seconds.items()}


def convolution_seconds(ours: Ours, steps: int) -> tuple[float, float]:
    """Return CPU seconds per training step: in convolutions, both ways, and in all operations."""
    with torch.profiler.profile() as profiler:
        repeat(ours.train_step, steps)
    times = {e.key: e.self_cpu_time_total / steps / 1e6 for e in profiler.key_averages()}
    convolving = sum(s for name, s in times.items() if name.startswith("aten::") and "conv" in name)
    return convolving, sum(times.values())
