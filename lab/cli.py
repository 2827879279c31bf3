"""Error messages and argument types shared by the scripts.

Nothing here imports torch, so `--help` answers at once.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lab.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; it prints its description as it is written."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its code.

    An error that the user or the system (a full disk) can solve becomes one line and exit code 2.
    Ctrl-C becomes exit code 130.
    """
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


def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False) -> Callable:
    """Return an argparse type: a finite int or float in [low, high], or (low, high] if open_low."""

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
    """Return an argparse type: a path that ends in `suffix` and can be written to."""

    def parse(text: str) -> str:
        path = Path(text)
        if path.suffix != suffix:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {suffix}")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{text} exists and is not a file")
        folder = next(p for p in path.absolute().parents if p.exists())
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"{folder} is not a folder")
        return text

    return parse


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device to a parser. `lab.distributed.launch` reads it."""
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, ... (auto: the first GPU that is there, else the CPU)",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --data to a parser."""
    parser.add_argument(
        "--data",
        default="data",
        metavar="DIR",
        help="folder of the data sets; what is missing is downloaded into it",
    )
