"""Files that are never half written, never mixed up, and leave no litter."""

import contextlib
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from lab.errors import UserError

# The name of a temporary file tells whose it is: .<name>.<host>.<process>.tmp
_HOST = re.sub(r"[^\w-]", "_", platform.node()) or "host"


def temporary_beside(path: Path) -> Path:
    """Return a name for a temporary file or folder beside `path`, different in each process.

    Those of processes that were killed before they could remove them are removed.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_HOST)}\.(\d+)\.tmp")
    for other in path.parent.glob(".*.tmp"):
        match = pattern.fullmatch(other.name)
        if match and not _is_running(int(match[1])):
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere asking could end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there and belongs to somebody else
        return True
    return process != os.getpid()


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
            raise OSError(None, "it is not a regular file")
        os.chmod(temporary, stat.S_IMODE(mode))
    os.replace(temporary, target)
    with contextlib.suppress(OSError):  # not every file system, and not Windows, can do this
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)


@contextlib.contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Hold a lock on the name `path` while the block runs. A crash releases it.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    lock = FileLock(name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = ""
        with contextlib.suppress(OSError):
            owner = name.read_text().strip()
        raise UserError(f"{path} is in use by {owner or 'another process'}") from None
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        with contextlib.suppress(OSError):
            name.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        name.unlink(missing_ok=True)  # before the release: nobody can have taken it in between
        lock.release()


def samples_folder(samples: str | Path, checkpoint: str | Path) -> Path:
    """Return the folder for pictures of a checkpoint: a different one for each of its folders.

    Pictures of checkpoints/v.pt go to samples/, those of a/v.pt to samples/a/, and those of a
    checkpoint in the current folder to samples/here/.
    """
    folder = Path(checkpoint).resolve().parent
    here = Path.cwd()
    if folder == here / "checkpoints":
        return Path(samples)
    if folder == here:
        return Path(samples, "here")
    below = folder.relative_to(here if folder.is_relative_to(here) else folder.anchor)
    return Path(samples, below)
