"""lab/cli.py: which arguments are accepted."""

import argparse

from lab import cli

import pytest


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
