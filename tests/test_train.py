"""train.py as a user runs it: what it leaves, stopping and resuming, refusals."""

import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from lab import files
from lab.distributed import Process

import pytest
import torch
from helpers import ROOT, TINY, assert_refused, command

from training import loop
from training import run as runs
from unet import UNet


def final_state(path):
    """(EMA weights, model, optimizer tensors) of a finished run, by name."""
    state = torch.load(path, weights_only=True)
    tensors = {f"model.{k}": v for k, v in state["model"].items()}
    tensors |= {f"ema.{k}": v for k, v in state["ema"].items()}
    for i, optimizer in enumerate(state["optimizers"]):
        for j, entry in optimizer["state"].items():
            tensors |= {f"optimizer{i}.{j}.{k}": v for k, v in entry.items()}
    return tensors | {"generator": state["generator"]}


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------ the script


def test_a_short_run_leaves_what_it_says(run_here, data_dir, tmp_path):
    done = run_here("train.py", "--pred", "eps", *TINY, "--steps", 12, "--data", data_dir)
    assert done.returncode == 0, done.stderr
    for path in ("checkpoints/eps.pt", "samples/eps.png", "checkpoints/eps.png"):
        assert path in done.stdout
        assert (tmp_path / path).stat().st_size > 1000
    contents = torch.load(tmp_path / "checkpoints/eps.pt", weights_only=True)
    assert contents["scheduler"]["prediction_type"] == "epsilon"
    assert contents["training"]["step"] == 12
    log = read_log(tmp_path / "checkpoints/eps.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [5, 10, 12]
    assert log[0]["run"] == contents["training"]["run"] and log[0]["recipe"]["pred"] == "eps"
    assert all({"loss", "lr", "images_per_s"} <= line.keys() for line in log if "loss" in line)
    assert sum("val_loss" in line for line in log) == 1


@pytest.mark.slow
def test_the_files_of_earlier_runs_are_kept(run_here, data_dir, tmp_path):
    """A finished checkpoint survives any number of later starts, with its state, log and grids."""
    arguments = (*TINY, "--log-every", 1, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments, "--steps", 2, "--keep", 1, 2).returncode == 0
    suffixes = (".pt", ".state.pt", ".jsonl", ".png", "-step1.pt", "-step2.pt")
    kept = [torch.load(tmp_path / f"x-step{n}.pt", weights_only=True)["training"] for n in (1, 2)]
    assert [training["step"] for training in kept] == [1, 2]
    before = [(tmp_path / f"x{suffix}").read_bytes() for suffix in suffixes]
    grid = (tmp_path / "samples/_here/x.png").read_bytes()
    for start in (1, 2):
        done = run_here("train.py", *arguments, "--steps", 1, "--seed", start)
        assert f"x.{start}.pt" in done.stderr
        assert before == [(tmp_path / f"x.1{suffix}").read_bytes() for suffix in suffixes]
        assert grid == (tmp_path / "samples/_here/x.1.png").read_bytes()
    contents = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("x.1", "x.2")]
    assert [c["training"]["args"]["seed"] for c in contents] == [0, 1]


@pytest.mark.slow
def test_a_run_steps_in_bfloat16_and_previews_in_float32(monkeypatch, run_here, data_dir, tmp_path):
    precisions = {}

    def spy(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            precisions.setdefault(name, torch.backends.mkldnn.conv.fp32_precision)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    spy(runs, "training_loss")
    spy(loop, "sample")
    done = run_here("train.py", *TINY, "--steps", 1, "--data", data_dir, "--out", "b.pt")
    assert done.returncode == 0
    assert precisions["training_loss"] == "bf16"
    assert precisions["sample"] != "bf16"


def start(tmp_path, *args):
    return subprocess.Popen(
        command("train.py", *args),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(state_path, step, process):
    """Until the training state on disk is of this step or a later one: always a whole file."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if state_path.exists():
            found = torch.load(state_path, weights_only=True)["step"]
            if found >= step:
                return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"no training state of step {step} in 120 s")


RUN = (*TINY, "--steps", 60, "--save-every", 7, "--seed", 3, "--out", "r.pt")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data_dir):
    """The run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *RUN, "--data", data_dir)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


def assert_same_run(ours, reference):
    a, b = final_state(ours / "r.state.pt"), final_state(reference / "r.state.pt")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    shipped = [torch.load(f / "r.pt", weights_only=True)["weights"] for f in (ours, reference)]
    assert all(torch.equal(shipped[0][name], shipped[1][name]) for name in shipped[1])
    logs = [read_log(folder / "r.jsonl") for folder in (ours, reference)]
    val_losses = [[line for line in log if "val_loss" in line] for log in logs]
    assert val_losses[0] == val_losses[1]
    steps = [line["step"] for line in logs[0] if "loss" in line]
    assert steps == sorted(set(steps))  # no step is told twice


@pytest.mark.slow
def test_resume_after_sigkill_is_exact(whole_run, tmp_path, data_dir):
    """Killed at two random moments and resumed: bit-identical model, EMA, optimizers and RNG."""
    arguments = (*RUN, "--data", data_dir)
    for wanted in (7, 28):
        process = start(tmp_path, *arguments)
        wait_for_step(tmp_path / "r.state.pt", wanted, process)
        time.sleep(random.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with open(tmp_path / "r.jsonl", "a") as file:
            file.write('{"step": 9, "lo')  # as a full disk may leave it
        arguments = ("--resume", "r.state.pt", "--data", data_dir)
    process = start(tmp_path, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_run(tmp_path, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_leaves(number, code, whole_run, tmp_path, data_dir, run):
    process = start(tmp_path, *RUN, "--data", data_dir)
    wait_for_step(tmp_path / "r.state.pt", 7, process)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "--resume=r.state.pt" in output
    stopped_at = torch.load(tmp_path / "r.state.pt", weights_only=True)["step"]
    assert f"stopped at step {stopped_at} of 60" in output
    assert run("train.py", "--resume", "r.state.pt", "--data", data_dir).returncode == 0
    assert_same_run(tmp_path, whole_run)


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(run_here, tmp_path, data_dir):
    arguments = (*TINY, "--save-every", 1, "--warmup", 1, "--data", data_dir, "--out", "n.pt")
    done = run_here("train.py", *arguments, "--steps", 50, "--lr", 1e30, "--muon-lr", 1e30)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the ")
    assert "learning rate" in last
    assert "last good state: n.state.pt (step " in last
    assert "Traceback" not in done.stderr
    weights = torch.load(tmp_path / "n.state.pt", weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(monkeypatch, run, tmp_path, data_dir):
    """torchrun with two processes on the same global batch: equal to float32's rounding."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # which has no bfloat16
    arguments = (*TINY, "--steps", 8, "--log-every", 1, "--muon-lr", 0, "--data", data_dir)
    for name, processes in (("one", 1), ("two", 2)):
        done = run("train.py", *arguments, "--out", f"{name}.pt", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("checkpoint  ") == 1  # rank 0 alone speaks
    logs = [read_log(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (
        torch.load(tmp_path / f"{n}.pt", weights_only=True)["weights"] for n in ("one", "two")
    )
    start = UNet(channels=8).state_dict()
    for name in one:
        # AdamW divides by |g| in its first steps, so where g is nearly 0 rounding is magnified:
        # the bound is on the whole tensor, relative to a step's size.
        moved = (one[name] - two[name]).norm() / one[name].numel() ** 0.5
        assert moved < 2e-4, name
    assert start.keys() == one.keys()


@pytest.mark.slow
def test_minutes_fit_the_schedule_to_the_clock(run, tmp_path, data_dir):
    done = run("train.py", *TINY, "--minutes", 0.1, "--data", data_dir, "--out", "m.pt")
    assert done.returncode == 0, done.stderr
    log = [line for line in read_log(tmp_path / "m.jsonl") if "loss" in line]
    assert 5 < log[-1]["elapsed"] < 12  # 6 s, on a machine that may be busy with other things
    assert log[-1]["lr"] < 0.2 * max(line["lr"] for line in log)
    before = (tmp_path / "m.state.pt").read_bytes()
    assert run("train.py", "--resume", "m.state.pt", "--data", data_dir).returncode == 0
    assert (tmp_path / "m.state.pt").read_bytes() == before  # its time is up: not a step more


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, data_dir, run_here):
    """A limit on the size of files stands in for the full disk: the write fails half-way."""
    arguments = (*TINY, "--steps", 8, "--save-every", 4, "--data", data_dir, "--out", "d.pt")
    assert run_here("train.py", *arguments).returncode == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("d.pt", "d.state.pt")}
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        f"sys.argv[0] = 'train.py'; sys.path.insert(0, {str(ROOT)!r});"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "--resume", "d.state.pt", "--steps", "12"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: cannot write d.pt")
    assert "the previous one is untouched" in last
    assert "Traceback" not in done.stderr
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert not list(tmp_path.glob(".d*"))  # no half-written file is left behind


# ------------------------------------------------------------------------------ nothing is lost


def stop_at_step(monkeypatch, step: int, number: int) -> None:
    """Have the run receive a signal during this step."""
    calls, real = [], runs.training_loss

    def training_loss(*args):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(runs, "training_loss", training_loss)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_printed_command_continues_the_run(monkeypatch, run_here, data_dir, tmp_path, number):
    """It is quoted for the shell, and the file in it exists."""
    stop_at_step(monkeypatch, 3, number)
    arguments = (*TINY, "--steps", 5, "--data", data_dir, "--out", "my 'best' runs/v.pt")
    done = run_here("train.py", *arguments)
    assert done.returncode == 128 + number
    (line,) = [line for line in done.stdout.splitlines() if "--resume" in line]
    python, script, *rest = shlex.split(line)
    (resume,) = rest
    assert (python, script, resume[:9]) == ("python", "train.py", "--resume=")
    assert torch.load(tmp_path / resume[9:], weights_only=True)["step"] == 3
    assert run_here(script, resume).returncode == 0
    assert torch.load(tmp_path / resume[9:], weights_only=True)["step"] == 5


@pytest.mark.slow
def test_the_speed_counts_what_the_device_has_still_to_do(
    run_here, data_dir, tmp_path, monkeypatch
):
    """On a GPU a step only starts the work. It is done when the losses have been read."""
    read = loop.Meter.read

    def wait_and_read(meter, process):
        time.sleep(0.3)
        return read(meter, process)

    monkeypatch.setattr(loop.Meter, "read", wait_and_read)
    arguments = (*TINY, "--steps", 2, "--log-every", 1, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments).returncode == 0
    log = [line for line in read_log(tmp_path / "x.jsonl") if "loss" in line]
    assert len(log) == 2 and all(line["images_per_s"] < 16 / 0.3 for line in log)
    assert log[0]["elapsed"] > 0.3


@pytest.mark.slow
def test_a_finished_run_can_be_extended(run_here, data_dir, tmp_path):
    arguments = (*TINY, "--steps", 4, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments).returncode == 0
    done = run_here("train.py", "--resume", "x.state.pt", "--steps", 8)
    assert done.returncode == 0 and "the length of the run changes" in done.stderr
    state = torch.load(tmp_path / "x.state.pt", weights_only=True)
    assert state["step"] == state["recipe"]["steps"] == 8
    rates = [line["lr"] for line in read_log(tmp_path / "x.jsonl") if "loss" in line]
    assert rates[-1] > 0 and state["recipe"]["epochs"] is None
    again = run_here("train.py", "--resume", "x.state.pt", "--steps", 8)
    assert again.returncode == 0 and "length" not in again.stderr
    before = {path: path.read_bytes() for path in tmp_path.glob("x*")}
    done = run_here("train.py", "--resume", "x.state.pt", "--steps", 7)
    assert done.returncode == 2 and "is at step 8" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("x*")} == before


@pytest.mark.slow
def test_resuming_writes_what_is_missing(run_here, data_dir, tmp_path):
    """As after a crash between the state and the copy that --keep asks for."""
    arguments = (*TINY, "--steps", 2, "--keep", 2, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments).returncode == 0
    names = ("x.pt", "x-step2.pt")
    before = [(tmp_path / name).read_bytes() for name in names]
    for name in names:
        (tmp_path / name).unlink()
    assert run_here("train.py", "--resume", "x.state.pt").returncode == 0
    assert [(tmp_path / name).read_bytes() for name in names] == before


@pytest.mark.slow
def test_the_state_of_another_run_is_not_overwritten_by_resuming(run_here, data_dir, tmp_path):
    arguments = (*TINY, "--steps", 2, "--data", data_dir)
    for name in ("a", "b"):
        assert run_here("train.py", *arguments, "--out", f"{name}.pt").returncode == 0
    for name in ("b.pt", "b.jsonl"):
        (tmp_path / name).unlink()
    before = (tmp_path / "b.state.pt").read_bytes()
    more = ("--resume", "a.state.pt", "--steps", 3, "--data", data_dir, "--out", "b.pt")
    done = run_here("train.py", *more)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: b.state.pt is of another run")
    assert (tmp_path / "b.state.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["log", "checkpoint"])
def test_files_of_another_run_are_not_overwritten_by_resuming(run_here, data_dir, tmp_path, kind):
    """Somebody put an old state back beside the files of a newer run."""
    arguments = (*TINY, "--steps", 2, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments).returncode == 0
    old = (tmp_path / "x.state.pt").read_bytes()
    assert run_here("train.py", *arguments, "--seed", 1).returncode == 0
    (tmp_path / "x.state.pt").write_bytes(old)
    path = tmp_path / {"log": "x.pt", "checkpoint": "x.jsonl"}[kind]
    path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("x*")}
    done = run_here("train.py", "--resume", "x.state.pt", "--steps", 3)
    assert done.returncode == 2
    assert "is of another run than the one to resume" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("x*")} == before


@pytest.mark.parametrize(
    "options",
    [("--pred", "v", "--max-weight", 5), ("--density", "uniform", "--low-noise", 0.1)],
)
def test_options_without_effect_are_refused(run_here, options):
    """Also if the value is the default: it was typed, so something is expected of it."""
    assert_refused(run_here("train.py", *options), options[2], "no effect")


@pytest.mark.parametrize(
    "change",
    [{"channels": 7}, {"lr": "fast"}, {"batch_size": -1}, {"colour": 3}, {"minutes": 1e308}, 5],
    ids=str,
)
def test_states_with_absurd_arguments_are_refused(run_here, tiny_checkpoint, tmp_path, change):
    state = torch.load(tiny_checkpoint.with_suffix(".state.pt"), weights_only=True)
    state["recipe"] = state["recipe"] | change if isinstance(change, dict) else change
    torch.save(state, tmp_path / "x.state.pt")
    assert_refused(run_here("train.py", "--resume", "x.state.pt"), "x.state.pt", "unusable")


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}],
    ids=str,
)
def test_what_a_launcher_left_in_the_environment_is_named(monkeypatch, run_here, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for script, *arguments in (("train.py",), ("infer.py", "--ckpt", "x.pt")):
        assert_refused(run_here(script, *arguments), "WORLD_SIZE", "torchrun")


def test_a_local_world_size_that_is_no_number_is_left_out(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "abc")
    assert Process(torch.device("cpu"), world=3).on_this_node == 3


def test_processes_that_cannot_connect_are_one_line(monkeypatch, run_here):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", port)
        assert_refused(run_here("infer.py", "--ckpt", "x.pt"), "cannot connect", port)


@pytest.mark.slow
def test_a_schedule_that_does_not_end_in_noise_is_pointed_out(run_here, data_dir):
    arguments = (*TINY, "--steps", 1, "--data", data_dir, "--out", "x.pt")
    done = run_here("train.py", *arguments, "--schedule", "linear")
    assert done.returncode == 0 and "abar_T is 0.36" in done.stderr
    assert "abar_T" not in run_here("train.py", *arguments).stderr


@pytest.mark.slow
def test_a_run_killed_before_its_first_save_is_not_mistaken_for_an_earlier_one(
    run_here, data_dir, tmp_path
):
    arguments = (*TINY, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments, "--steps", 2, "--seed", 1).returncode == 0
    finished = (tmp_path / "x.pt").read_bytes()
    process = start(tmp_path, *arguments, "--steps", 100_000, "--seed", 2)
    while not (tmp_path / "x.1.pt").exists() or not (tmp_path / "x.state.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert (tmp_path / "x.1.pt").read_bytes() == finished
    files._remove_litter.cache_clear()  # as in a new process
    assert run_here("train.py", "--resume", "x.state.pt", "--steps", 3).returncode == 0
    training = torch.load(tmp_path / "x.pt", weights_only=True)["training"]
    assert (training["args"]["seed"], training["step"]) == (2, 3)
    assert read_log(tmp_path / "x.jsonl")[0]["run"] == training["run"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".x")]


@pytest.mark.slow
def test_a_second_training_with_the_same_name_is_refused(run_here, data_dir, tmp_path):
    arguments = (*TINY, "--data", data_dir, "--out", "x.pt")
    first = start(tmp_path, *arguments, "--steps", 100_000, "--save-every", 1)
    wait_for_step(tmp_path / "x.state.pt", 1, first)
    second = run_here("train.py", *arguments, "--steps", 1)
    assert_refused(second, "x.pt is in use by process", str(first.pid))
    third = run_here("train.py", "--resume", "x.state.pt")
    assert_refused(third, "x.pt is in use by process", str(first.pid))
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 143
    step = torch.load(tmp_path / "x.state.pt", weights_only=True)["step"]
    assert run_here("train.py", "--resume", "x.state.pt", "--steps", step).returncode == 0


@pytest.mark.slow
def test_a_broken_pipe_does_not_end_a_run(tmp_path, data_dir):
    """As `train.py 2>&1 | tee log` after tee has died."""
    process = start(tmp_path, *RUN, "--data", data_dir)
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert torch.load(tmp_path / "r.state.pt", weights_only=True)["step"] == 60
    assert (tmp_path / "samples/_here/r.png").exists()


@pytest.mark.slow
def test_several_processes_see_a_stop_within_seconds(tmp_path, data_dir):
    """Also between two lines of the log."""
    arguments = (*TINY, "--log-every", 100_000, "--steps", 100_000, "--data", data_dir)
    process = subprocess.Popen(
        command("train.py", *arguments, "--out", "x.pt", processes=2),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "x.state.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in errors
    assert "torchrun --nproc-per-node=2 -- " in output
    assert torch.load(tmp_path / "x.state.pt", weights_only=True)["step"] > 0
    assert (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(("here", "words"), [(4, ["=4 --"]), (2, ["=2 --", "several nodes"])])
def test_the_command_to_resume_counts_the_processes_of_a_node(monkeypatch, capsys, here, words):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    run = SimpleNamespace(step=1, total_steps=9)
    process = Process(torch.device("cpu"), world=4)
    loop.tell_how_to_resume(run, SimpleNamespace(state="x.state.pt"), process)
    told = capsys.readouterr().out
    assert all(word in told for word in words)
    assert ("several nodes" in told) == (here < 4)


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pred", "score"], ["--pred", "score", "eps"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--epochs", "1", "--steps", "5"], ["--steps", "--epochs"]),
        (["--minutes", "-1"], ["--minutes"]),
        (["--minutes", "1e308"], ["--minutes", "1e308"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--ema", "1.5"], ["--ema", "1.5"]),
        (["--channels", "7"], ["--channels", "even"]),
        (["--batch-size", "60001"], ["--batch-size", "60001", "60000"]),
        (["--schedule", "quadratic"], ["--schedule", "quadratic", "cosine"]),
        (["--pred", "eps", "--zero-snr"], ["epsilon", "v_prediction"]),
        (["--pred", "eps", "--schedule", "linear", "--timesteps", "20000"], ["epsilon", "abar_T"]),
        (["--dataset", "cifar"], ["--dataset", "cifar"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--out", "model.ckpt"], ["--out", ".pt"]),
        (["--out", "a/x.pt", "--samples", "."], ["--samples", "same name"]),
        (["--out", "x.state.pt"], ["--out", "training state"]),
        (["--muon-lr", "1e300"], ["--muon-lr"]),
        (["--lr", "1e39"], ["--lr"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--resume", "missing.state.pt"], ["missing.state.pt", "No such file"]),
        (["--out", "/dev/null/x.pt", "--steps", "1"], ["/dev/null"]),
        (["--samples", "/dev/null/x", "--steps", "1"], ["/dev/null/x"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(run_here, data_dir, arguments, words):
    assert_refused(run_here("train.py", *arguments, "--data", data_dir), *words)


@pytest.mark.slow
def test_compile_without_a_compiler_is_refused(run, monkeypatch, data_dir):
    monkeypatch.setenv("CXX", "/nonexistent")
    done = run("train.py", "--pred", "v", "--steps", 1, "--compile", "--data", data_dir)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "--no-compile" in last and "compiler" in last


def test_resume_refuses_what_contradicts_it(run_here, tiny_checkpoint, data_dir):
    state = tiny_checkpoint.with_suffix(".state.pt")
    assert_refused(
        run_here("train.py", "--resume", state, "--batch-size", 32), "--batch-size 32", "16"
    )
    assert_refused(run_here("train.py", "--resume", state, "--pred", "eps"), "--pred eps", "v")
    assert_refused(run_here("train.py", "--resume", tiny_checkpoint), "tiny.pt", ".state.pt")


@pytest.mark.slow
def test_resume_may_change_where_and_how_often_files_are_written(
    run_here, tiny_checkpoint, data_dir, tmp_path
):
    """The recipe stays; the rest of the arguments are the stored ones unless they are given."""
    arguments = (*TINY, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments, "--steps", 8, "--save-every", 4).returncode == 0
    state = torch.load(tmp_path / "x.state.pt", weights_only=True)
    torch.save(state | {"step": 4, "log": []}, tmp_path / "x.state.pt")
    changed = ("--samples", "elsewhere", "--log-every", 2, "--save-every", 3)
    assert run_here("train.py", "--resume", "x.state.pt", *changed).returncode == 0
    assert (tmp_path / "elsewhere/_here/x.png").exists()
    log = read_log(tmp_path / "x.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [6, 8]


def test_a_run_goes_on_where_its_state_lies(run_here, tiny_checkpoint, data_dir, tmp_path):
    """A state was moved: the files that the run left in its old folder are not overwritten."""
    state = tiny_checkpoint.with_suffix(".state.pt")
    before = {path: path.read_bytes() for path in tiny_checkpoint.parent.glob("*.*")}
    (tmp_path / "moved.state.pt").write_bytes(state.read_bytes())
    done = run_here("train.py", "--resume", "moved.state.pt", "--data", data_dir)
    assert done.returncode == 0 and "moved.pt" in done.stdout
    assert (tmp_path / "moved.jsonl").exists() and (tmp_path / "samples/_here/moved.png").exists()
    assert before == {path: path.read_bytes() for path in tiny_checkpoint.parent.glob("*.*")}
    (tmp_path / "state.pt").write_bytes(state.read_bytes())
    assert_refused(run_here("train.py", "--resume", "state.pt"), "state.pt", ".state.pt")


@pytest.mark.slow
def test_a_state_of_another_type_of_device_is_continued_with_a_note(
    run_here, tiny_checkpoint, data_dir, tmp_path
):
    """The state of a CUDA generator has 16 bytes."""
    state = torch.load(tiny_checkpoint.with_suffix(".state.pt"), weights_only=True)
    state |= {"generator": torch.zeros(16, dtype=torch.uint8), "step": 28}
    torch.save(state, tmp_path / "x.state.pt")
    done = run_here("train.py", "--resume", "x.state.pt", "--data", data_dir)
    assert done.returncode == 0 and "another type of device" in done.stderr
    assert torch.load(tmp_path / "x.state.pt", weights_only=True)["step"] == 30


@pytest.mark.slow
def test_files_that_are_not_the_runs_are_renamed_and_not_lost(run_here, data_dir, tmp_path):
    """Also where a checkpoint was moved away, or where a numbered name is taken in part."""
    arguments = (*TINY, "--steps", 2, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments).returncode == 0
    (tmp_path / "x.pt").rename(tmp_path / "best.pt")
    (tmp_path / "x.1.jsonl").write_text("mine")
    state = (tmp_path / "x.state.pt").read_bytes()
    assert run_here("train.py", *arguments).returncode == 0
    assert (tmp_path / "x.1.jsonl").read_text() == "mine"
    assert (tmp_path / "x.2.state.pt").read_bytes() == state
    assert (tmp_path / "x.2.jsonl").exists()


@pytest.mark.slow
def test_a_failed_preview_costs_nothing(run_here, data_dir, tmp_path, monkeypatch):
    def save_grid(*args, **kwargs):
        raise loop.UserError("cannot write x.png: No space left on device")

    monkeypatch.setattr(loop, "save_grid", save_grid)
    done = run_here("train.py", *TINY, "--steps", 2, "--data", data_dir, "--out", "x.pt")
    assert done.returncode == 0 and "note: cannot write x.png" in done.stderr
    assert (tmp_path / "x.pt").exists()


def test_an_empty_resume_is_no_new_run(run_here):
    assert_refused(run_here("train.py", "--resume", ""), ".state.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shape", "nan", "settings", "ema"])
def test_damaged_optimizers_and_weights_are_refused(run_here, tiny_checkpoint, tmp_path, kind):
    """Settings of the optimizers are the recipe's, whatever the state says."""
    state = torch.load(tiny_checkpoint.with_suffix(".state.pt"), weights_only=True)
    moments = state["optimizers"][0]["state"][0]
    if kind == "shape":
        moments["exp_avg"] = torch.zeros(3)
    elif kind == "nan":
        moments["exp_avg_sq"].fill_(float("nan"))
    elif kind == "settings":
        state["optimizers"][0]["param_groups"][0] |= {"eps": "small", "peak_lr": None}
    else:
        state["ema"]["head.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "x.state.pt")
    done = run_here("train.py", "--resume", "x.state.pt")
    assert done.returncode == (0 if kind == "settings" else 2), done.stderr
    if kind != "settings":
        assert_refused(done, "does not fit")
