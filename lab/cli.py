"""What all scripts share: output that cannot fail, stopping, error messages, argument types.

Nothing here imports torch, so `infer.py --help` answers at once.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from lab.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent

# parts of torch's messages: of CUDA and MPS, of the CPU, of Windows
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")


# ---------------------------------------------------------------------------------- output, signals


class UnbreakableStream:
    """A text stream that goes on in silence when it can no longer write.

    A broken pipe or a full disk under a terminal log must not end a training.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._silent_from_now_on():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silent_from_now_on():
            self._stream.flush()

    @contextlib.contextmanager
    def _silent_from_now_on(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            nowhere = open(os.devnull, "w")  # noqa: SIM115 - it stays open to the end
            with contextlib.suppress(OSError, ValueError):
                # what is still buffered, and what libraries print, must not fail either
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = nowhere

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let nothing that happens to stdout and stderr raise: see `UnbreakableStream`.

    A character that the encoding lacks is written as "?". A missing stream is replaced.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 - it stays open to the end
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, UnbreakableStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a process to stop: Ctrl-C, a kill, a lost connection.

    SIGHUP is left out if it is ignored already, which is how nohup asks for it.
    """
    # not all of them exist on Windows; batch systems send the last three before they kill
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


@contextlib.contextmanager
def handle_stop_signals(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Have a handler called for the signals that ask a process to stop."""
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stopped(SystemExit):
    """A signal asked the process to stop. The exit code is 128 + the number of the signal."""


def raise_stopped(number: int, _frame: object) -> NoReturn:
    for other in stop_signals():  # torchrun sends a second one: it must not interrupt the clean-up
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(128 + number)


def is_script(main_file: str | None) -> bool:
    """Return whether the running program is a script of this lab, not its user's or pytest."""
    folders = (ROOT, ROOT / "benchmarks")
    return main_file is not None and Path(main_file).resolve().parent in folders


if is_script(getattr(sys.modules["__main__"], "__file__", None)):
    # There is nothing to lose while the imports run: Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its code.

    An error that the user or the system (a full disk) can solve becomes one line and exit code 2.
    """
    with unbreakable_output(), handle_stop_signals(raise_stopped):
        try:
            sys.exit(main())
        except UserError as error:
            print(f"error: {one_line(error, 1000)}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            problem = problem_of(error)
            if problem is None:
                raise
            print(f"error: {problem}: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror or error}".replace("\n", " "), file=sys.stderr)
            sys.exit(2)


def problem_of(error: MemoryError | RuntimeError) -> str | None:
    """Return what the user can solve, or None if the error is a fault of the program."""
    text, kind = str(error), type(error)
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return "out of memory"
    if kind.__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        return "torch.compile does not work here, use --no-compile"
    if "closed by peer" in text or kind.__name__.startswith("Dist"):  # its message says why
        return "another process of this run has ended"
    return None


# ---------------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors; it prints its description as it is written."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def number(
    kind: type, low: float, high: float | None = None, *, open_low: bool = False
) -> Callable:
    """Return an argparse type: an int or float in [low, high], or in (low, high] if open_low.

    Without `high` an int is at most 2^62, and a float is finite.
    """
    limit = high if high is not None else 2**62 if kind is int else sys.float_info.max
    if high is None:
        span = f"{'>' if open_low else '>='} {low:g}"
    else:
        span = f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    wanted = f"{'an integer' if kind is int else 'a number'} {span}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if high is None and value > limit:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not low <= value <= limit or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


def output_file(suffix: str) -> Callable:
    """Return an argparse type: a path that ends in `suffix`. Its folder may be missing."""

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


def as_command_line(arguments: dict) -> list[str]:
    """Return the command line that gives these arguments."""
    words = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return words
