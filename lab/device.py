"""Devices: which one is used, and in which precision it computes."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from lab.errors import UserError, one_line

import torch


def pick_device(name: str) -> torch.device:
    """Return the torch device that `--device` names, ready for use.

    "auto" is CUDA if it is there, else MPS, else the CPU. Under torchrun every process uses the GPU
    of its own LOCAL_RANK.

    Raises:
        UserError: the device is unknown or cannot be used.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()  # a name can be well formed and its device missing
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used: {one_line(error)}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or, where the system tells it, of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which a network runs: bfloat16 on a CUDA GPU, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextlib.contextmanager
def bfloat16_convolutions() -> Iterator[None]:
    """Let a CPU multiply in bfloat16 inside convolutions of float32 tensors; sums stay float32.

    A training step then takes a seventh less time on a CPU with AMX, and no more on others.
    """
    convolution = torch.backends.mkldnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "bf16"
    try:
        yield
    finally:
        convolution.fp32_precision = before


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed memory. Other C libraries are left alone.

    A training step frees all that it allocated. If malloc returned those pages to the system, the
    next step would cause about 10,000 page faults, an eighth of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
