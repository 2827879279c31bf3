"""Files that are either the old ones or the new ones, and never half of both."""

import os
import tempfile
from pathlib import Path

from lab.errors import UserError


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old or the new one whole.

    Raises:
        UserError: the file cannot be written (full disk, no permission). The old one is untouched.
    """
    path = Path(path)
    temporary = None
    if path.exists() and not path.is_file():  # such as a device: the rename would remove it
        raise UserError(f"cannot write {path}: it is not a regular file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is private, an ordinary one is not
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        kept = "; the previous one is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from None
