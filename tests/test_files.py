"""lab/files.py: atomic writes, temporary files, the lock, folders of pictures."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from lab import files
from lab.errors import UserError
from lab.files import only_process, samples_folder, temporary_beside, write_atomically

import pytest
from helpers import ROOT


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "device").symlink_to("/dev/full")
    with pytest.raises(UserError, match="not a regular file"):
        write_atomically(tmp_path / "device", b"x")
    assert (tmp_path / "device").is_symlink()
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/real").write_text("old")
    (tmp_path / "link").symlink_to("disk/real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/real").read_text() == "new"
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_permissions_stay(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"first")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    write_atomically(path, b"second")
    assert path.read_text() == "second" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_fsync_of_the_folder_is_no_failed_write(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_text() == "x"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the previous one is untouched"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_no_litter(tmp_path, monkeypatch):
    def interrupt(number):
        raise SystemExit(143)

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(SystemExit):
        write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []


def test_the_litter_of_a_killed_process_is_removed_and_that_of_a_running_one_is_not(tmp_path):
    path = tmp_path / "file"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=1)
    mine = temporary_beside(path)
    old = mine.with_name(mine.name.replace(str(os.getpid()), dead.stdout.decode().strip()))
    running = mine.with_name(mine.name.replace(str(os.getpid()), str(os.getppid())))
    other = tmp_path / ".another.tmp"
    for litter in (old, running, other):
        litter.write_text("half a fi")
    files._remove_litter.cache_clear()  # as in a new process
    write_atomically(path, b"x")
    assert sorted(tmp_path.iterdir()) == sorted([path, running, other])


def test_litter_that_cannot_be_removed_is_left(tmp_path, monkeypatch):
    """As in a shared folder where only the owner of a file may remove it."""
    path, unlink = tmp_path / "file", Path.unlink
    litter = temporary_beside(path).with_name(f".file.{files._HOST}.{2**22 + 1}.tmp")
    litter.touch()

    def refuse(self, *args, **options):
        if self == litter:
            raise PermissionError
        unlink(self, *args, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    files._remove_litter.cache_clear()
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x" and litter.exists()


HOLD = """
import sys
from pathlib import Path
from lab.files import only_process

with only_process(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_ends_or_is_killed(tmp_path):
    path = tmp_path / "v.pt"
    for end in ("kill", "close"):
        first = subprocess.Popen(
            [sys.executable, "-c", HOLD, path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert first.stdout.readline() == "locked\n"
        wanted = pytest.raises(UserError, match=rf"v\.pt is in use by process {first.pid} on ")
        with wanted, only_process(path):
            raise AssertionError
        first.kill() if end == "kill" else first.stdin.close()
        first.wait()
        with only_process(path):
            pass
    assert os.listdir(tmp_path) == []


def test_file_systems_without_locks_are_used_without(tmp_path, monkeypatch):
    import filelock

    def acquire(self, timeout):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with only_process(tmp_path / "v.pt"):
        pass


def test_pictures_of_different_folders_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = ("checkpoints/v.pt", "v.pt", "a/v.pt", "b/v.pt", "a/b/v.pt", "/elsewhere/v.pt")
    folders = [samples_folder("samples", path) for path in checkpoints]
    assert folders[0] == files.Path("samples")
    assert len(set(folders)) == len(folders)
    assert all(folder.parts[0] == "samples" for folder in folders)
    assert samples_folder("s", "a/../checkpoints/v.pt") == files.Path("s")
