"""lab/cli.py: output that cannot fail, signals, and which arguments are accepted."""

import argparse
import io
import signal
import subprocess
import sys
import time

from lab import cli
from lab.errors import UserError

import pytest
from helpers import command

NEEDS_CKPT = ("infer.py", "distill.py")


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
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("[gloo/pair.cc:534] Connection closed by peer"), "another process"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("unsupported memory_format"), None),
    ],
)
def test_only_what_the_user_can_solve_is_one_line(error, words, capsys):
    def main():
        raise error

    if words is None:
        with pytest.raises(RuntimeError):
            cli.run(main)
        return
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [UserError("a\nb"), FileNotFoundError(2, "No such file", "a\nb"), OSError("a\nb")]
)
def test_an_error_is_one_line_even_if_a_name_has_two(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit):
        cli.run(main)
    message = capsys.readouterr().err
    assert message.startswith("error: a b") and message.count("\n") == 1


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


def test_a_number_without_an_upper_bound_is_still_finite():
    assert cli.number(float, 0)("1e300") == 1e300
    for kind, text in ((int, "9" * 30), (int, "9" * 5000), (float, "1e999")):
        with pytest.raises(argparse.ArgumentTypeError, match=r"too large|is not"):
            cli.number(kind, 0)(text)


def test_a_command_line_gives_its_arguments_back():
    arguments = {"save_every": 5, "zero_snr": True, "compile": False, "resume": None, "lr": -1.5}
    wanted = ["--save-every=5", "--zero-snr", "--lr=-1.5"]
    assert cli.as_command_line(arguments) == wanted


# ---------------------------------------------------------------------------------- output, signals


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [Broken(), None])
def test_output_that_breaks_is_ignored(monkeypatch, stream):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    with cli.unbreakable_output():
        for _ in range(2):
            print("one line", flush=True)
            print("another", file=sys.stderr, flush=True)
    assert sys.stdout is stream


def test_a_character_that_the_encoding_lacks_is_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with cli.unbreakable_output():
        print("η = 1")
    assert raw.getvalue() == b"? = 1\n"


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in cli.stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.SIGHUP in cli.stop_signals()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_script_after_its_clean_up(number):
    cleaned = []

    def main():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)  # torchrun's second signal does not disturb it
            cleaned.append(True)

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 128 + number and cleaned == [True]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "infer.py", "distill.py", "metrics.py", "study.py"])
def test_ctrl_c_during_the_imports_is_no_traceback(script, tmp_path):
    """From the import of lab.cli on. Before it, Python starts, and answers in its own ways."""
    python, *rest = command(script, "--ckpt" if script in NEEDS_CKPT else "--data", "none")
    for delay in (0.0, 0.25, 0.85):
        process = subprocess.Popen(
            [python, "-X", "importtime", *rest],  # it writes a line to stderr after every import
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process.stderr as errors:
            assert any(line.split()[-1:] == ["lab.cli"] for line in errors)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            assert "Traceback" not in errors.read()
        assert process.wait() in (130, 2)  # 2: it had refused its arguments already


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "infer.py", "distill.py", "metrics.py", "study.py"])
def test_help_in_ascii(script, monkeypatch, run):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run(script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr
