"""What the parts of a benchmark share: the settings, the contestants' processes, the tables."""

import argparse
import json
import os
from datetime import date
from functools import cached_property

from lab.data import load_dataset
from lab.device import device_name, pick_device
from lab.files import write_atomically

import torch
from torch import Tensor

from benchmarks.contestants import CONTESTANTS
from benchmarks.processes import Worker


class Bench:
    """A benchmark under way. It is a context manager: its end ends the contestants' processes.

    Attributes:
        rows: the figures so far, one dictionary per row of a table.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.batch_size, self.rounds = args, args.batch_size, args.rounds
        self.device = pick_device(args.device)
        self.rows: list[dict] = []
        self._columns: tuple[str, ...] = ()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.__dict__.get("workers", {}).values():  # none were started: no workers
            worker.close()

    @cached_property
    def where(self) -> str:
        """The date, the machine and the settings, in one line."""
        parts = [str(date.today()), f"torch {torch.__version__}", device_name(self.device)]
        if self.device.type == "cpu":
            parts.append(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")
        if hasattr(os, "getloadavg"):
            parts.append(f"load average before {os.getloadavg()[0]:.1f}")
        return ", ".join([*parts, f"batch {self.batch_size}, {self.rounds} rounds"])

    @cached_property
    def images(self) -> Tensor:
        """The training images of MNIST: (60000, 1, 28, 28) uint8, on the device."""
        return load_dataset("mnist", "train", self.args.data)[0].to(self.device)

    @cached_property
    def workers(self) -> dict[str, Worker]:
        """A process per contestant, from the first use to the end of the benchmark."""
        names = ["ours"] if self.args.alone else list(CONTESTANTS)
        return {name: self.start(name) for name in names}

    def start(self, name: str, seed: int = 0, **environment: str | None) -> Worker:
        """Start a contestant in a process of its own; see `Worker`."""
        return Worker(name, self.batch_size, self.device, self.args.data, seed, **environment)

    def row(
        self,
        what: str,
        values: dict[str, float],
        target: str = "",
        note: str = "",
        columns: tuple[str, ...] = tuple(CONTESTANTS),
    ) -> None:
        """Keep a row and print it. Where its columns differ from the last row's, a table begins.

        Args:
            values: a figure for some or all columns. The first column is divided by each other.
            target: what the figure of the first column should be, as text.
        """
        first, *others = columns
        if columns != self._columns:
            head = ["what", *columns, f"{first} / other", "target", "note"]
            print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
            self._columns = columns
        ratios = {name: values[first] / values[name] for name in others if name in values}
        self.rows.append(
            {"what": what, "values": values, "ratios": ratios, "target": target, "note": note}
        )
        cells = [f"{values[name]:.4g}" if name in values else "" for name in columns]
        cells.append(", ".join(f"{ratio:.3g}" for ratio in ratios.values()))
        print("| " + " | ".join([what, *cells, target, note]) + " |", flush=True)

    def write_json(self, path: str) -> None:
        """Write the figures so far.

        Raises:
            UserError: the file cannot be written.
        """
        report = {"where": self.where, "rows": self.rows}
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
