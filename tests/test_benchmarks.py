"""benchmarks/: the contestants do the work that is timed, and the tables hold the figures."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from lab.errors import UserError

import numpy as np
import pytest
import torch
from helpers import ROOT

from benchmarks import measure
from benchmarks.__main__ import PARTS, PEERS, parse_args
from benchmarks.bench import Bench
from benchmarks.contestants import CONTESTANTS, Ours
from benchmarks.parts.busy import busy_process
from benchmarks.parts.scheduler import schedulers, walk
from benchmarks.processes import Worker, python
from benchmarks.shares import shares
from scheduler import DPMSolverMultistepScheduler

CPU = torch.device("cpu")


@pytest.fixture
def image() -> torch.Tensor:
    """Four copies of a white image."""
    return torch.full((4, 1, 28, 28), 255, dtype=torch.uint8)


# ------------------------------------------------------------------------------- the contestants


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_contestants_train_and_sample(name, image):
    """Steps move most of the parameters, and samples are finite images."""
    torch.manual_seed(0)
    contestant = CONTESTANTS[name](image, 4, CPU)
    before = [p.clone() for p in contestant.model.parameters()]
    for _ in range(3):
        contestant.train_step()
    moved = [
        (a - b).abs().max() > 0 for a, b in zip(contestant.model.parameters(), before, strict=True)
    ]
    assert sum(moved) > len(moved) / 2  # zero-initialised branches wake up one after another
    x = contestant.sample(2, 2)
    assert x.shape == (2, 1, 28, 28)
    assert x.isfinite().all()
    assert x.std() > 0


def test_our_step_is_that_of_a_run(image):
    """After the same steps, the benchmark's network has the same weights as train.py's loop."""
    from lab.device import bfloat16_convolutions

    from diffusion import training_loss
    from training.recipe import Recipe
    from training.run import Training

    ours, run = Ours(image, 4, CPU), Training(Recipe(batch_size=4), image)
    for _ in range(2):
        ours.train_step()
        with bfloat16_convolutions():
            x0 = run.next_batch()[0]
            run.update(
                training_loss(
                    run.model, run.scheduler, x0, run.cdf, run.loss_weights, run.generator
                )
            )
    for a, b in zip(ours.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shares_add_up_and_leave_no_hook_behind(image):
    ours = Ours(image, 4, CPU)
    of_parts = shares(ours, 3, warm_up=2)
    assert set(of_parts) == {"forward", "backward", "optimizer", "rest"}
    assert all(share > 0 for share in of_parts.values())
    assert math.isclose(sum(of_parts.values()), 1)
    assert ours.run.step == 5
    hooked = [ours.model._forward_hooks, ours.model._forward_pre_hooks]
    hooked += [p._post_accumulate_grad_hooks for p in ours.model.parameters()]
    for optimizer in ours.run.optimizers:
        hooked += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    assert not any(hooked)


class Sleeper(torch.optim.SGD):
    """An optimizer that only waits."""

    def step(self) -> None:
        time.sleep(0.2)


@pytest.mark.parametrize("part", ["forward", "backward", "optimizer"])
def test_a_part_that_waits_gets_the_largest_share(image, part):
    ours = Ours(image, 4, CPU)
    if part == "forward":
        ours.model.stem.register_forward_hook(lambda *_: time.sleep(0.2))
    elif part == "backward":
        next(ours.model.parameters()).register_hook(lambda _: time.sleep(0.2))
    else:
        sleeper = Sleeper([torch.nn.Parameter(torch.zeros(1))])
        sleeper.param_groups[0] |= {"peak_lr": 0.0, "lr": torch.zeros(())}
        ours.run.optimizers.append(sleeper)
    of_parts = shares(ours, 2, warm_up=1)
    assert max(of_parts, key=of_parts.get) == part, of_parts


# ------------------------------------------------------------------------------------ measuring


def test_in_turns_takes_the_median_and_drops_the_first_round(monkeypatch):
    times = iter([100, 200, 1, 10, 3, 30, 2, 20])
    monkeypatch.setattr(measure, "clock", lambda work, device: next(times))
    assert measure.in_turns({"a": None, "b": None}, 3, CPU) == {"a": 2, "b": 20}


def test_in_turns_calls_each_work_once_per_round():
    calls = []
    works = {name: partial(calls.append, name) for name in "ab"}
    assert set(measure.in_turns(works, 2, CPU)) == {"a", "b"}
    assert calls == list("ababab")


def test_a_walk_is_one_sampling_loop_after_another():
    """Ours and that of diffusers, which loses count if a loop does not begin with set_timesteps."""
    output, x = torch.randn(2, 2, 1, 4, 4)
    for scheduler in schedulers(DPMSolverMultistepScheduler).values():
        steps = walk(scheduler, output, x)
        first, second = ([next(steps).prev_sample for _ in range(50)] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        scheduler.set_timesteps(50)
        alone = scheduler.step(output, scheduler.timesteps[0].item(), x).prev_sample
        assert torch.equal(first[0], alone)


@pytest.mark.slow
def test_python_returns_the_output_or_says_what_failed():
    assert python("-c", "print(1)") == "1\n"
    assert python("-c", "import os; print(os.environ['OMP_NUM_THREADS'])", threads=2) == "2\n"
    with pytest.raises(UserError, match="failed: ZeroDivisionError"):
        python("-c", "1 / 0")


@pytest.mark.slow
def test_a_worker_follows_its_orders_or_says_that_it_cannot(data_dir, capfd):
    with Worker("ours", 4, CPU, data_dir) as worker:
        worker("train", 0)
        idle = worker.peak_memory
        worker("train", 2)
        assert 0 < idle < worker.peak_memory  # GB: activations and gradients
        with pytest.raises(UserError, match="the process of ours failed"):
            worker("fly", 1)
        assert worker.process.wait() != 0
    assert "KeyError: 'fly'" in capfd.readouterr().err


@pytest.mark.slow
def test_a_peer_trains_for_a_time_and_makes_images_without_a_bar(data_dir, tmp_path, capfd):
    with Worker("ddpm-pytorch", 4, CPU, data_dir) as worker:
        assert worker("train_for", 0.001) == 1
        worker("write_samples", 1.0, str(tmp_path / "x.npy"), 4, 2)
    images = np.load(tmp_path / "x.npy")
    assert images.shape == (4, 28, 28)
    assert images.dtype == np.uint8
    assert images.std() > 0
    assert "sampling loop" not in capfd.readouterr().err


@pytest.mark.slow
def test_the_busy_process_is_busy_and_ends():
    with busy_process() as process:
        assert process.poll() is None
        if Path("/proc").exists():
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            assert int(state[11]) > 0  # ticks of CPU time
    assert process.poll() is not None


# ---------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_a_table_and_its_json(tmp_path):
    """It also runs from another folder, if Python is told where the package is."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "scheduler", "--rounds", "1", "--json", "x.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == 10
    assert done.stdout.count("\n| ") == 12  # with the head of the table
    for row in rows:
        ours, peer = row["values"]["ours"], row["values"]["diffusers"]
        assert ours > 0
        assert row["ratios"]["diffusers"] == pytest.approx(ours / peer)


def test_a_table_begins_where_the_columns_change(capsys):
    with Bench(parse_args(["scheduler", "--device", "cpu"])) as bench:
        bench.row("speed", {"ours": 8.0, "diffusers": 2.0}, "at least 3", "a note")
        bench.row("size", {"ours": 0.5})
        bench.row("time", {"passive": 1.0, "active": 4.0}, columns=("passive", "active"))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| what | ours | diffusers | ddpm-pytorch | ours / other | target | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| speed | 8 | 2 |  | 4 | at least 3 | a note |",
        "| size | 0.5 |  |  |  |  |  |",
        "",
        "| what | passive | active | passive / other | target | note |",
        "| --- | --- | --- | --- | --- | --- |",
        "| time | 1 | 4 | 0.25 |  |  |",
    ]
    assert [row["ratios"] for row in bench.rows] == [{"diffusers": 4.0}, {}, {"active": 0.25}]


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match="there is no part 'speed': choose from train, sample"):
        parse_args(["speed"])


def test_parts_run_in_their_order_and_quality_only_if_named():
    assert parse_args([]).parts == list(PARTS[:-1])
    assert parse_args(["quality", "scale", "train"]).parts == ["train", "scale", "quality"]


def test_every_part_has_a_file_and_a_line_of_help(capsys):
    files = {file.stem for file in (ROOT / "benchmarks/parts").glob("[!_]*.py")}
    assert files == set(PARTS)
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in (*PARTS, *PEERS))


def test_peers_are_none_all_or_those_named():
    peers = [parse_args(given).peers for given in ([], ["--peers"], ["--peers", "diffusers"])]
    assert peers == [[], ["diffusers", "ddpm-pytorch"], ["diffusers"]]
    assert set(CONTESTANTS) == {"ours", *PEERS}


def test_every_prediction_type_can_be_asked_for():
    from training.run import PRED_OPTIONS

    for pred in PRED_OPTIONS:
        assert parse_args(["--pred", pred]).pred == pred
