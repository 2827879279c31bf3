"""cli.py: what the scripts' arguments may be."""

import argparse
import platform
import subprocess
import sys

import pytest

import checkpoint
import cli


@pytest.mark.parametrize("text", ["x.png", "new/folder/x.png", "there.png"])
def test_output_file_takes(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").touch()
    assert cli.output_file(".png")(text) == text


@pytest.mark.parametrize("text", ["x.jpg", "x", "folder.png", "file/x.png", "file/new/x.png"])
def test_output_file_refuses(tmp_path, monkeypatch, text):
    """Another suffix, a folder, a path below a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError):
        cli.output_file(".png")(text)


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "device").symlink_to("/dev/full")
    with pytest.raises(cli.UserError, match="not a regular file"):
        checkpoint.write_atomically(tmp_path / "device", b"x")
    assert (tmp_path / "device").is_symlink()


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (cli.number(int, 1), {"1": 1, "70": 70}, ["0", "-1", "1.5", "x", "", "inf"]),
        (cli.number(float, 0, 1), {"0": 0, "1": 1, "3e-1": 0.3}, ["-0.1", "1.1", "nan", "inf"]),
        (cli.number(float, 0, open_low=True), {"1e-9": 1e-9}, ["0", "-1", "nan", "inf"]),
    ],
)
def test_number(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


PAGE_FAULTS = """
import resource
import torch
import cli

cli.pick_device("cpu")
torch.ones(128 * 2**18)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(64 * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs are left alone")
def test_a_cpu_keeps_freed_memory():
    """64 MiB of the 128 freed ones: given back, they would be 16,384 page faults again."""
    command = [sys.executable, "-c", PAGE_FAULTS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(printed.stdout) < 500
