"""benchmarks/bench.py: that its contestants do the work they are timed at, and what it writes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402

import cli  # noqa: E402


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_contestants_train_and_sample(name):
    """Steps move most of the parameters, and samples are finite images."""
    torch.manual_seed(0)
    image = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    contestant = bench.CONTESTANTS[name](image, 4, torch.device("cpu"))
    before = [p.clone() for p in contestant.model.parameters()]
    for _ in range(3):
        contestant.train_step()
    moved = [
        (a - b).abs().max() > 0 for a, b in zip(contestant.model.parameters(), before, strict=True)
    ]
    assert sum(moved) > len(moved) / 2  # zero-initialised branches wake up one after another
    x = contestant.sample(2, 2)
    assert x.shape == (2, 1, 28, 28) and x.isfinite().all() and x.std() > 0


def test_a_worker_does_its_orders_or_says_that_it_cannot():
    worker = bench.Worker("ours", 4, torch.device("cpu"))
    idle, trained = worker("train", 0), worker("train", 2)
    assert 0 < idle < trained  # GB: activations and gradients
    with pytest.raises(cli.UserError, match="ours did not come through"):
        worker("fly", 1)
    assert worker.process.wait() != 0


def test_in_turns_takes_the_median_and_leaves_the_first_round_out(monkeypatch):
    times = iter([100, 200, 1, 10, 3, 30, 2, 20])
    monkeypatch.setattr(bench, "clock", lambda work, device: next(times))
    seconds = bench.in_turns({"a": None, "b": None}, 3, torch.device("cpu"))
    assert seconds == {"a": 2, "b": 20}


def test_a_table_and_its_json(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/bench.py", "scheduler", "--rounds", "1"]
        + ["--json", tmp_path / "x.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == 8 and done.stdout.count("\n| ") == 10  # and the head of the table
    for row in rows:
        ours, peer = row["values"]["ours"], row["values"]["diffusers"]
        assert ours > 0 and row["ours_over"]["diffusers"] == pytest.approx(ours / peer)


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.parse_args(["speed"])
    assert ended.value.code == 2 and "no part 'speed'" in capsys.readouterr().err


def test_peers_are_none_all_or_those_named():
    peers = [bench.parse_args(given).peers for given in ([], ["--peers"], ["--peers", "diffusers"])]
    assert peers == [[], ["diffusers", "ddpm-pytorch"], ["diffusers"]]
