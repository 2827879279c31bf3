"""Files that are never half written, never mixed up, and leave no litter."""

import contextlib
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lab.errors import UserError

LABELS = ".labels.npy"  # ends the name of a file of labels

# The name of a temporary file tells whose it is: .<name>.<host>.<process>.tmp
_HOST = re.sub(r"[^\w-]", "_", platform.node()) or "host"


def temporary_beside(path: Path) -> Path:
    """Return a name for a temporary file or folder beside `path`, different in each process.

    Those of processes that were killed before they could remove them are removed.
    """
    _remove_litter(path.absolute().parent)
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


@cache  # once per folder: it may hold very many files
def _remove_litter(folder: Path) -> None:
    pattern = re.compile(rf"\..+\.{re.escape(_HOST)}\.(\d+)\.tmp")
    for path in folder.glob(".*.tmp"):
        match = pattern.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # it may be another user's
                    path.unlink()


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere asking could end the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is there and belongs to somebody else
        return True
    return process != os.getpid()


def labels_file(path: str | Path) -> Path:
    """Return the file of the labels of an array of images: x.labels.npy for x.npy (or x.png).

    No array can have this name: infer.py refuses it.
    """
    return Path(path).with_suffix(LABELS)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old or the new one whole.

    A link stays a link: the file that it leads to is written. An existing file keeps its
    permissions.

    Raises:
        UserError: the file cannot be written (full disk, no permission). The old one is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        kept = "; the previous one is untouched" if target.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from None
    except BaseException:  # such as a signal
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a finished temporary file to `target`, with the permissions of an older `target`.

    Raises:
        OSError: `target` is not a regular file, or the rename fails.
    """
    if target.exists():
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):  # such as a device: the rename would remove it
            raise OSError(None, "it is not a regular file", str(target))
        os.chmod(temporary, stat.S_IMODE(mode))
    os.replace(temporary, target)
    with contextlib.suppress(OSError):  # not every file system, and not Windows, can do this
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)


@contextlib.contextmanager
def only_process(path: Path, says: Path | None = None) -> Iterator[None]:
    """Hold a lock on the file or folder `path` while the block runs. A crash releases it.

    Args:
        says: the path to name in the error, if it is another one.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    from filelock import FileLock, Timeout

    real = Path(os.path.realpath(path))  # two links to one file are one file
    real.parent.mkdir(parents=True, exist_ok=True)
    name = real.parent / f".{real.name}.lock"
    lock = FileLock(name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = ""
        with contextlib.suppress(OSError):
            owner = name.read_text().strip()
        raise UserError(f"{says or path} is in use by {owner or 'another process'}") from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        with contextlib.suppress(OSError):
            name.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        name.unlink(missing_ok=True)  # who has opened it already tries again: filelock looks
        lock.release()


def samples_folder(samples: str | Path, checkpoint: str | Path) -> Path:
    """Return the folder for pictures of a checkpoint: a different one for each of its folders.

    Pictures of checkpoints/v.pt go to samples/, those of a/v.pt to samples/a/, those of a
    checkpoint in the current folder to samples/_here/, and those of one elsewhere to
    samples/_root/<its folder>. If `samples` is outside of the current folder, all are elsewhere.
    """
    folder, here = Path(checkpoint).absolute().parent.resolve(), Path.cwd()
    if not folder.is_relative_to(here) or not Path(samples).resolve().is_relative_to(here):
        return Path(samples, "_root", folder.relative_to(folder.anchor))
    if folder == here / "checkpoints":
        return Path(samples)
    return Path(samples, "_here" if folder == here else folder.relative_to(here))
