"""The process of a contestant. processes.Worker starts it and gives it orders.

An order is a line of JSON on standard input: [name, argument, ...]. The answer is a line of JSON on
standard output: [result, peak memory in GB].
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.contestants import CONTESTANTS, samples_at_a_time
from benchmarks.measure import peak_memory, repeat
from benchmarks.shares import convolution_seconds, shares


def main() -> int:
    from lab.data import load_dataset
    from lab.device import pick_device

    settings = json.loads(sys.argv[1])
    ours = settings["name"] == "ours"
    device = pick_device(settings["device"]) if ours else torch.device(settings["device"])
    images = load_dataset("mnist", "train", settings["data"])[0].to(device)
    torch.manual_seed(settings["seed"])
    contestant = CONTESTANTS[settings["name"]](images, settings["batch_size"], device)
    orders = orders_of(contestant, device)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        result = orders[name](*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(json.dumps([result, peak_memory()]), flush=True)
    return 0


def orders_of(contestant: object, device: torch.device) -> dict[str, Callable]:
    """Return what a contestant can be told to do."""
    make_images = partial(contestant.sample, samples_at_a_time(device), 50)
    return {
        "train": partial(repeat, contestant.train_step),  # so many steps
        "sample": partial(repeat, make_images),  # so many batches
        "shares": partial(shares, contestant),  # see shares.py
        "convolutions": partial(convolution_seconds, contestant),
        "train_for": partial(train_for, contestant),
        "write_samples": partial(write_samples, contestant),
    }


def train_for(contestant: object, minutes: float) -> int:
    """Train for so long and return the number of steps."""
    started, steps = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        contestant.train_step(progress)
        steps += 1
    return steps


def write_samples(
    contestant: object, eta: float, path: str, n: int = 1000, steps: int = 50
) -> None:
    """Write n images of DDIM as an array for metrics.py, made 100 at a time."""
    from lab.data import to_uint8

    sizes = [min(100, n - first) for first in range(0, n, 100)]
    images = torch.cat([to_uint8(contestant.sample(size, steps, eta)) for size in sizes])
    np.save(Path(path), images.squeeze(1).cpu().numpy())


if __name__ == "__main__":
    from lab import cli

    cli.run(main)
