"""What the command-line scripts share: how they refuse, and the kinds of number they take.

No torch here, so that `--help` answers at once.
"""

import argparse
import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right: said in one line, exit code 2, no traceback."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses in one line; its description is printed as it is written."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help tells more)", file=sys.stderr)
        sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main. What the user or the system (a full disk) can put right becomes one line
    and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False) -> Callable:
    """An argparse type: a finite int or float in [low, high], or (low, high] with open_low."""

    def parse(text: str):
        span = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        wanted = f"{'an integer' if kind is int else 'a number'} in {span}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not low <= value <= high or (open_low and value == low) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


def output_file(suffix: str) -> Callable:
    """An argparse type: a path that ends in `suffix` and that a file can be written to."""

    def parse(text: str) -> str:
        path = Path(text)
        if path.suffix != suffix:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {suffix}")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{text} is there and is not a file")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"{folder} is not a folder")
        return text

    return parse


def pick_device(name: str):
    """The torch device of `--device`, ready for use; "auto": CUDA, else MPS, else the CPU.

    Under torchrun each process takes the GPU of its own LOCAL_RANK.
    """
    import torch

    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)  # a name can be well formed and the device still not there
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed; others are left alone.

    A training step frees all that it allocated. Given back to the system, those pages would be
    about 10,000 page faults of the next step, and an eighth of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
