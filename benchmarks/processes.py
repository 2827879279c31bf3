"""Child processes: whole scripts, and contestants that take orders."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lab.errors import UserError

import torch

ROOT = Path(__file__).resolve().parent.parent


def python(*command: object, threads: int | None = None) -> str:
    """Run a Python process to its end and return what it printed.

    Raises:
        UserError: it failed.
    """
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    line = [sys.executable, *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(line)} failed: {reason}")
    return done.stdout


class Worker:
    """A contestant in a process of its own, and so with its own memory and threads.

    Ours has the setting that lab/ makes for every script (lab.device.keep_freed_memory). A peer has
    what its users have. As a context manager it ends with its block.

    Args:
        environment: variables that this process gets on top. None removes one.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        device: torch.device,
        data: Path,
        seed: int = 0,
        **environment: str | None,
    ):
        settings = {"name": name, "batch_size": batch_size, "device": str(device)}
        settings |= {"data": str(data), "seed": seed}
        quiet = {"TQDM_DISABLE": "1", "KINETO_LOG_LEVEL": "99"}  # no bars, no profiler log
        env = os.environ | quiet | environment
        self.name, self.peak_memory = name, 0.0  # GB
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={key: value for key, value in env.items() if value is not None},
        )

    def __call__(self, order: str, *arguments: object) -> object:
        """Give an order of worker.py, wait for its end, and return its result.

        Raises:
            UserError: the process has ended.
        """
        try:
            print(json.dumps([order, *arguments]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(f"the process of {self.name} failed, see above")
        result, self.peak_memory = json.loads(answer)
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
