"""experiments/: cells and what is kept of them, estimates, trainings, and what is measured."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

from lab import cli
from lab.data import to_model_range, to_uint8
from lab.distributed import Process
from lab.errors import UserError
from lab.noise import image_noise

import numpy as np
import pytest
import torch
from tqdm import tqdm

import metrics
from diffusion import sample
from experiments import cost, grid, interpolation, same_noise, trainings, why_v
from experiments.common import LONG, Plan, Settings, Study
from experiments.estimates import Estimate, Results, estimate, quotient, short_names, z_score
from experiments.grid import SHAPE, Cell, Subject
from experiments.trainings import SCHEDULES, Schedule, Training, make_trainings, pick
from scheduler import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

CPU = torch.device("cpu")
ALONE = Process(CPU)
NO_BAR = tqdm(disable=True)


def subject(model, label="x", **config) -> Subject:
    scheduler = {"beta_schedule": "cosine", "prediction_type": "epsilon"} | config
    return Subject(label, f"{label}.pt", "0" * 64, model, {"scheduler": scheduler})


# --------------------------------------------------------------------------------- cells


def linear(x, t):
    return 0.1 * x


CELL = Cell("x", "0" * 64, "ddim", 5, 1.0, 7, 3)


@pytest.mark.parametrize(
    ("sampler", "eta", "scheduler"),
    [
        ("ddim", 0.5, DDIMScheduler),
        ("ddpm", None, DDPMScheduler),
        ("dpm++", 0.5, DPMSolverMultistepScheduler),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_cell_is_the_sample_of_its_fields(sampler, eta, scheduler, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cell = replace(CELL, sampler=sampler, eta=eta)
    steps = []
    images, seconds = grid.sample_cell(cell, subject(linear), ALONE, 2, steps.append)
    reverse = scheduler(beta_schedule="cosine")
    reverse.set_timesteps(5)
    arguments = {} if eta is None else {"eta": eta}
    wanted = sample(linear, reverse, torch.arange(7), SHAPE, seed=3, **arguments)
    assert torch.equal(images, to_uint8(wanted))
    assert seconds > 0
    assert sum(steps) == 7 * 5


def test_the_share_of_a_process_is_its_part_of_the_cell():
    class Second(Process):
        def sum(self, tensor):
            return tensor  # alone: what the first process makes stays 0

    whole, _ = grid.sample_cell(CELL, subject(linear), ALONE, 100)
    part, _ = grid.sample_cell(CELL, subject(linear), Second(CPU, world=2, rank=1), 100)
    assert torch.equal(part[3:], whole[3:])
    assert not part[:3].any()


def test_a_cell_is_named_by_all_that_decides_its_images():
    changes = {"sampler": "ddpm", "steps": 6, "eta": 0.12345678, "n": 8, "seed": 4}
    changes |= {"sha256": "1" * 64}
    others = [replace(CELL, **{field: value}) for field, value in changes.items()]
    others += [replace(CELL, eta=0.12345679), replace(CELL, eta=None)]
    assert len({cell.name for cell in [CELL, *others]}) == len(others) + 1
    assert replace(CELL, model="renamed").name == CELL.name
    assert CELL.name == "000000000000-ddim-5steps-eta1-n7-seed3"


def test_make_cells_is_the_product():
    subjects = [subject(linear, "a"), subject(linear, "b")]
    cells = grid.make_cells(
        subjects, (1, 10), (0.0, 1.0), lambda s: 100 * s, lambda s: 3 if s == 10 else 1
    )
    assert len(cells) == len(set(cells)) == 2 * 2 * (1 + 3)
    assert {(c.n, c.steps) for c in cells} == {(100, 1), (1000, 10)}
    assert {c.sampler for c in cells} == {"ddim"}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run cells in a folder; returns the rows, and what was sampled and scored for them."""
    done = {"sampled": [], "scored": 0}
    original = grid.sample_cell

    def sample_cell(cell, *args):
        done["sampled"] += [cell.seed] if len(args) == 4 else []  # the warm-up has no bar
        return original(cell, *args)

    def score(images, data_dir, asked=None):
        done["scored"] += 1
        return {"n": len(images), "frechet": float(images.float().mean())}

    monkeypatch.setattr(grid, "sample_cell", sample_cell)
    monkeypatch.setattr(metrics, "score", score)

    def measure(cells):
        done.update(sampled=[], scored=0)
        subjects = [subject(linear)]
        missing = grid.missing_cells(cells, subjects, ALONE, tmp_path)
        grid.run_cells(missing, subjects, ALONE, tmp_path, 100, "data", NO_BAR)
        rows = grid.read_rows(cells, subjects, tmp_path, "data")
        return rows, done["sampled"], done["scored"]

    return measure


CELLS = [replace(CELL, n=100, seed=seed) for seed in range(3)]


def test_finished_cells_are_kept(measure, tmp_path):
    rows, sampled, scored = measure(CELLS[:2])
    assert (sampled, scored) == ([0, 1], 2)
    assert [(row["seed"], row["sampler"], row["n"]) for row in rows] == [
        (0, "ddim", 100),
        (1, "ddim", 100),
    ]
    assert "images_key" not in rows[0]
    again, sampled, scored = measure(CELLS)  # a wider grid only adds to it
    assert (sampled, scored) == ([2], 1)
    assert again[:2] == rows
    (tmp_path / f"{CELLS[0].name}.json").write_text("{")  # damaged
    (tmp_path / f"{CELLS[1].name}.npy").unlink()
    assert measure(CELLS)[1:] == ([0, 1], 2)
    renamed, sampled, _ = measure([replace(CELLS[0], model="x")])
    assert sampled == []


def test_changed_code_makes_what_it_made_again(measure, monkeypatch):
    rows, _, _ = measure(CELLS)
    monkeypatch.setattr(grid, "metrics_key", lambda: "another way to score")
    again, sampled, scored = measure(CELLS)
    assert (sampled, scored) == ([], 3)
    assert [row["metrics_key"] for row in again] == ["another way to score"] * 3
    assert [row["seconds"] for row in again] == [row["seconds"] for row in rows]
    assert measure(CELLS)[1:] == ([], 0)
    monkeypatch.setattr(grid, "images_key", lambda *_: "another sampler")
    assert measure(CELLS)[1:] == ([0, 1, 2], 3)


def test_new_images_never_stand_beside_an_old_row(measure, monkeypatch):
    """The code is edited, the study is stopped while it scores, and the edit is taken back."""
    measure(CELLS[:1])
    with monkeypatch.context() as edited:
        edited.setattr(grid, "images_key", lambda *_: "another sampler")
        edited.setattr(metrics, "score", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            measure(CELLS[:1])
    assert measure(CELLS[:1])[1] == [0]  # sampled again


def test_kept_images_are_an_array_for_metrics(measure, tmp_path):
    measure(CELLS[:1])
    array = np.load(tmp_path / f"{CELLS[0].name}.npy")
    assert (array.shape, array.dtype) == ((100, 28, 28), np.uint8)
    wanted, _ = grid.sample_cell(CELLS[0], subject(linear), ALONE, 100)
    assert torch.equal(grid.read_images(tmp_path, CELLS[0]), wanted)
    row = json.loads((tmp_path / f"{CELLS[0].name}.json").read_text())
    assert row["images_key"] == grid.images_key("ddim", "cpu")


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    assert grid.describe(ALONE)["commit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert grid.describe(ALONE)["commit"] == "unknown"


def test_checkpoints_have_different_labels(tiny_checkpoint, tmp_path):
    copies = [tmp_path / name / "tiny.pt" for name in ("a", "b")]
    contents = torch.load(tiny_checkpoint, weights_only=True)
    for i, path in enumerate(copies):
        path.parent.mkdir()
        torch.save(contents | {"note": i}, path)
    labels = [s.label for s in grid.load_subjects(copies, CPU)]
    assert len(set(labels)) == 2 and all(label.endswith("tiny.pt") for label in labels)
    assert grid.load_subjects(copies[:1], CPU)[0].label == "tiny"
    assert grid.load_subjects(copies, CPU, ["one", "two"])[1].label == "two"
    copies.append(copies[1].with_suffix(".bak"))
    torch.save(contents | {"note": 2}, copies[2])
    assert len({s.label for s in grid.load_subjects(copies, CPU)}) == 3
    with pytest.raises(UserError, match="twice"):
        grid.load_subjects([copies[0], copies[0]], CPU)


@pytest.mark.parametrize("name", ["a|b", "a\nb", "a$x$", "a<b", "a\udcff"])
def test_names_that_would_break_a_table_or_a_figure_are_refused(name, tiny_checkpoint, tmp_path):
    path = tmp_path / f"{name}.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    with pytest.raises(UserError, match="something else"):
        grid.load_subjects([path], CPU)


def test_no_checkpoint_is_called_as_the_exact_denoiser(tiny_checkpoint):
    with pytest.raises(UserError, match=r"exact\.pt"):
        grid.load_subjects([tiny_checkpoint, "exact.pt"], CPU)


@pytest.mark.parametrize("training", [None, {}, {"images": "many"}])
def test_a_checkpoint_must_say_how_long_it_was_trained(training, tiny_checkpoint, tmp_path):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    torch.save(contents | {"training": training}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt does not say on how many images"):
        grid.load_subjects([tmp_path / "x.pt"], CPU)


def test_paths_of_the_repository_are_shown_without_the_machine():
    assert grid.shown(grid.ROOT / "checkpoints" / "x.pt") == "checkpoints/x.pt"
    assert grid.shown("/elsewhere/x.pt") == "/elsewhere/x.pt"


def test_long_cells_have_fewer_images():
    s = Settings((1, LONG, LONG + 1), (1,), (0.0,), 1000, 250, 3, 0, 100, "data", None)
    assert [s.images(steps) for steps in s.steps] == [1000, 1000, 250]
    assert [s.repetitions(steps) for steps in (5, 10, 1000)] == [1, 3, 1]


def test_the_ends_of_eta_have_many_seeds_where_steps_are_few():
    s = Settings((5, 10), (1,), (0.0, 0.5, 1.0), 100, 100, 3, 0, 100, "data", None)
    assert [s.grid_repetitions(steps, 1.0) for steps in (5, 10, 20, 50)] == [1, 10, 10, 3]
    assert s.grid_repetitions(10, 0.0) == 10 and s.grid_repetitions(10, 0.5) == 3
    assert replace(s, seeds=2).grid_repetitions(10, 0.0) == 2  # a study with few seeds
    assert replace(s, seeds=12).grid_repetitions(10, 0.0) == 12


# -------------------------------------------------------------------------------- estimates


def test_estimates():
    rows = [{"x": x, "x_se": 1.0} for x in (1.0, 2.0, 3.0)]
    e = estimate(rows, "x")
    assert (e.mean, e.runs) == (2, 3)
    assert e.se == pytest.approx(1 / math.sqrt(3))
    assert e.run_se == pytest.approx(1)
    assert e.margin == pytest.approx(2 * math.sqrt(1 + 1 / 3))
    wide = estimate([{"x": x, "x_se": 1.0} for x in (0.0, 10.0)], "x")
    assert wide.se == pytest.approx(5)  # the seeds differ by more than their errors say


def test_z_scores_and_quotients():
    assert z_score(Estimate(1, 3), Estimate(6, 4)) == -1
    assert z_score(Estimate(1, 0), Estimate(1, 0)) == 0
    assert z_score(Estimate(1, 0), Estimate(2, 0)) == -math.inf
    ratio = quotient(Estimate(6, 0.6), Estimate(2, 0.2))
    assert ratio.mean == 3 and ratio.se == pytest.approx(3 * math.sqrt(0.02))
    assert quotient(Estimate(0, 0.5), Estimate(2, 0.2)) == Estimate(0, 0.25)
    assert math.isnan(quotient(Estimate(1, 1), Estimate(0, 1)).mean)


def row(model, steps, eta, frechet, n=100, seed=0, sampler="ddim", se=1.0):
    return {"model": model, "prediction": "v", "sampler": sampler, "steps": steps, "eta": eta} | {
        "n": n,
        "seed": seed,
        "frechet": frechet,
        "frechet_se": se,
    }


def test_results_find_the_best_and_the_cheapest():
    results = Results(
        [row("a", 5, 0.0, 9.0), row("a", 10, 0.0, 6.5), row("a", 20, 0.0, 6.0, seed=0)]
        + [row("a", 20, 0.0, 5.0, seed=1), row("a", 1000, 0.0, 1.0, n=25)]
        + [row("a", 20, 1.0, 8.5)]
    )
    assert (results.steps, results.etas, results.n) == ([5, 10, 20, 1000], [0.0, 1.0], 100)
    assert results.estimate("a", 20, 0.0).mean == 5.5
    assert results.best("a") == (20, 0.0)  # 1000 steps have another n
    assert results.cheapest("a") == (10, 0.0)  # 9.0 is significantly worse
    with pytest.raises(ValueError, match="sampler"):
        Results([row("a", 5, 0.0, 9.0), row("a", 5, None, 9.0, sampler="ddpm")])
    assert Results([]).rows == []


def test_short_names():
    assert short_names({"mnist-v": "v", "mnist-eps": "ε"}) == {"mnist-v": "v", "mnist-eps": "ε"}
    assert short_names({"a": "v", "b": "v", "c": "ε"}) == {"a": "a", "b": "b", "c": "ε"}


def test_time_is_fitted_by_a_line():
    rows = [{"steps": s, "n": 10, "seconds": 10 * (0.5 + 0.25 * s)} for s in (1, 5, 50, 1000)]
    assert cost.fit_time(rows) == pytest.approx((0.5, 0.25))
    assert cost.fit_time(rows[:1]) == pytest.approx((0, 0.75))


# --------------------------------------------------------------------------------- the plan


def study_in(folder, **settings):
    made = Settings((5,), (4,), (0.0, 1.0), 100, 100, 2, 640, 100, "data", folder)
    return Study(replace(made, **settings), ALONE, [subject(linear)], "python study.py")


def test_a_plan_counts_the_missing_cells_once_and_samples_none(measure, tmp_path):
    it = study_in(tmp_path)
    (tmp_path / "cells").mkdir()
    plan = Plan.of(it)
    for cells in (CELLS[:2], CELLS[1:]):
        assert not plan.measure(cells, it.subjects).rows
    assert plan.missing == {cell.name: 100 * 5 for cell in CELLS}
    assert not list((tmp_path / "cells").iterdir())
    with tqdm(total=sum(plan.missing.values())) as it.bar:
        for cells in (CELLS[:2], CELLS[1:]):
            assert len(it.measure(cells, it.subjects).rows) == len(cells)
    assert it.bar.n == it.bar.total == 3 * 100 * 5
    again = Plan.of(it)
    again.measure(CELLS, it.subjects)
    assert not again.missing


def test_a_plan_counts_the_missing_trainings_with_their_samples(tmp_path):
    it = study_in(tmp_path)
    plan = Plan.of(it)
    assert not plan.trained(it.trainings).rows
    calls = 3 * 640 + 100 * 20 * 2  # to train, and to sample
    assert plan.missing == {training.name: calls for training in it.trainings}


@pytest.mark.parametrize("experiment", [why_v, interpolation])
def test_the_bar_counts_the_calls_of_what_is_not_kept(experiment, tmp_path, data_dir, monkeypatch):
    """Every call of the network with one image is counted, before the work and during it."""
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return torch.nn.functional.conv2d(x, torch.full((1, 1, 1, 1), 0.1))

    monkeypatch.setattr(interpolation, "STEPS", 4)
    it = study_in(tmp_path, data_dir=str(data_dir))
    it.subjects = [subject(counted), subject(counted, "y")]
    plan = Plan.of(it)
    assert experiment.run(plan) == {} and not calls
    with tqdm(total=sum(plan.missing.values())) as it.bar:
        experiment.run(it)
    assert sum(calls) == it.bar.n == it.bar.total


# -------------------------------------------------------------------------------- trainings


def test_trainings_are_the_comparisons_of_the_tables():
    all_of_them = make_trainings(640, seeds=3)
    assert len(all_of_them) == len({t.name for t in all_of_them}) == 14
    assert {t.steps for t in all_of_them} == {10}
    base = [t for t in all_of_them if (t.schedule, t.density) == (SCHEDULES[0], "lognormal")]
    runs = {(t.pred, t.weighted, t.seed) for t in base}
    assert runs == {(*p, s) for p in (("v", True), ("eps", True), ("eps", False)) for s in range(3)}
    assert base[-1].arguments()[-2:] == ["--max-weight", "1"]
    kinds = {(t.schedule, t.density) for t in all_of_them if (t.pred, t.seed) == ("v", 0)}
    assert len(kinds) == 6
    assert [t.seed for t in pick(all_of_them, pred="eps")] == [0, 1, 2]
    assert not any(t.weighted for t in pick(all_of_them, weighted=False))


def test_zero_snr_is_a_field_and_no_name():
    plain, zero = (
        Training("v", Schedule("linear", zero_snr=zero), "uniform", 0, 640)
        for zero in (False, True)
    )
    assert "--zero-snr" in zero.arguments() and "--zero-snr" not in plain.arguments()
    assert zero.name == "v-linear-zero-snr-uniform-640-seed0"
    assert Training("v", Schedule("x0"), "uniform", 0, 640).arguments()[3] == "x0"


@pytest.mark.slow
def test_a_training_is_run_once_and_is_what_its_name_says(tmp_path, data_dir, monkeypatch):
    mine = [Training("v", Schedule("linear", zero_snr=True), "uniform", 5, 128)]
    (missing,) = trainings.missing_trainings(mine, ALONE, tmp_path)
    bar = tqdm(total=missing.calls)
    trainings.run_trainings([missing], ALONE, tmp_path, str(data_dir), bar)
    assert bar.n == bar.total == 3 * 128
    (trained,) = trainings.load_trained(mine, ALONE, tmp_path)
    assert trained.label == mine[0].name
    config, training = trained.contents["scheduler"], trained.contents["training"]
    assert (config["beta_schedule"], config["rescale_betas_zero_snr"]) == ("linear", True)
    assert training["step"] == 2
    assert (training["args"]["density"], training["args"]["seed"]) == ("uniform", 5)
    (written,) = [p for p in tmp_path.glob("*.pt") if not p.name.endswith(".state.pt")]
    assert written.name.startswith(mine[0].name)

    assert not trainings.missing_trainings(mine, ALONE, tmp_path)
    monkeypatch.setattr(trainings, "training_key", lambda *args: "another")
    assert trainings.missing_trainings(mine, ALONE, tmp_path) == mine


@pytest.mark.skipif(sys.platform == "win32", reason="it has no signals")
def test_a_stop_while_a_training_begins_is_a_stop(tmp_path, monkeypatch):
    """The child has no handler yet and dies of the signal: that is no failed training."""
    begin = subprocess.Popen

    def popen(*args, **options):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return begin([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setattr(trainings.subprocess, "Popen", popen)
    with pytest.raises(cli.Stopped) as stopped:
        trainings.run_trainings(TWO[:1], ALONE, tmp_path, "data", tqdm(disable=True))
    assert stopped.value.code == 128 + signal.SIGTERM


TWO = [Training("v", Schedule("linear"), "uniform", seed, 128) for seed in (5, 6)]


def run_instead(monkeypatch, code: str) -> list[subprocess.Popen]:
    """Have Python code run in place of train.py; return the processes that will have run it."""
    begin, children = subprocess.Popen, []

    def popen(command, **options):
        children.append(begin([sys.executable, "-c", code, *command], **options))
        return children[-1]

    monkeypatch.setattr(trainings.subprocess, "Popen", popen)
    return children


def test_a_training_is_told_nothing_of_torchrun(tmp_path, monkeypatch):
    """It is a process of its own, also if the study has several."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "KEPT"):
        monkeypatch.setenv(name, "2")
    run_instead(monkeypatch, "import os; print(*os.environ)")
    trainings.run_trainings(TWO[:1], ALONE, tmp_path, "data", tqdm(disable=True))
    (log,) = tmp_path.glob("*.log")
    told = log.read_text().split()
    assert "KEPT" in told and not {"WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"} & set(told)


def test_trainings_run_side_by_side_and_share_the_threads(tmp_path, monkeypatch):
    """Each of the two waits for the other one, and says how many threads it may use."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    code = f"""
import os, pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / f"{{os.getpid()}}.here").touch()
while len(list(folder.glob("*.here"))) < 2:
    time.sleep(0.01)
print(os.environ["OMP_NUM_THREADS"])"""
    run_instead(monkeypatch, code)
    bar = tqdm(total=sum(t.calls for t in TWO))
    trainings.run_trainings(TWO, ALONE, tmp_path, "data", bar)
    assert bar.n == bar.total
    assert [log.read_text() for log in tmp_path.glob("*.log")] == ["2\n", "2\n"]


def test_a_failed_training_names_its_log_and_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    code = """
import sys, time
if "5" in sys.argv:
    sys.exit("a disk is full")
time.sleep(60)"""
    children = run_instead(monkeypatch, code)
    with pytest.raises(UserError, match="-seed5 failed: see (.*)") as failed:
        trainings.run_trainings(TWO, ALONE, tmp_path, "data", tqdm(disable=True))
    assert "a disk is full" in Path(str(failed.value).split(": see ")[1]).read_text()
    assert all(child.returncode for child in children)


# --------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_errors_of_a_network_that_is_off_by_a_constant(prediction_type):
    """x_0 = (x_t - sqrt(1-abar) eps) / sqrt(abar) = sqrt(abar) x_t - sqrt(1-abar) v.

    So an output that is wrong by e makes x_0 wrong by e sqrt((1-abar)/abar) for eps and by
    e sqrt(1-abar) for v.
    """
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type=prediction_type)
    x0, noise = to_model_range(images), image_noise(0, torch.arange(5), 0, SHAPE)

    def network(x_t, t):
        velocity = scheduler.get_velocity(x0, noise, t)
        return (noise if prediction_type == "epsilon" else velocity) + 0.01

    timesteps = [990, 500, 10]
    it = subject(network, prediction_type=prediction_type)
    rows = why_v.prediction_errors(it, images, timesteps)
    for t, row in zip(timesteps, rows, strict=True):
        abar = scheduler.alphas_cumprod[t].item()
        wanted = 0.01 * math.sqrt(1 - abar)
        if prediction_type == "epsilon":
            wanted /= math.sqrt(abar)
        assert row["t"] == t
        assert row["snr"] == pytest.approx(abar / (1 - abar))
        assert row["float32"] == pytest.approx(wanted, rel=1e-2)
        assert row["float32_clipped"] <= row["float32"]
        assert row["rounding"] == 0  # this network has nothing that autocast would round


def test_clipped_shares_count_the_pixels_beyond_the_range():
    """A network whose x_0 is 3 on the left half and 0 on the right."""
    out = torch.zeros(SHAPE)
    out[..., :14] = 3
    it = subject(lambda x, t: out.expand_as(x), prediction_type="sample")
    rows = why_v.clipped_shares(it, 4, 7, CPU)
    assert [row["share"] for row in rows] == [0.5] * 7


@pytest.mark.parametrize("T", [1, 4, 1000])
def test_chosen_timesteps_are_descending_and_within_the_schedule(T):
    timesteps = why_v.chosen_timesteps(T)
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == T - 1 and timesteps[-1] == 0


def test_slerp_stays_on_the_sphere_and_turns_evenly():
    a, b = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    b *= a.norm() / b.norm()
    path = interpolation.slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    norms = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, a.norm().expand(5))
    turns = (path[1:] * path[:-1]).flatten(1).sum(1) / a.norm() ** 2
    torch.testing.assert_close(turns, turns[:1].expand(4))


def test_interpolation_is_smooth_only_without_noise():
    """For data from N(0, I), whose E[eps | x_t] is sqrt(1-abar_t) x_t, eta = 1 forgets x_T."""
    abar = DDIMScheduler(beta_schedule="cosine").alphas_cumprod
    it = subject(lambda x, t: (1 - abar[t]).sqrt().float() * x, clip_sample=False)
    arguments = {"pairs": 4, "length": 6, "steps": 50, "device": CPU}
    pictures, smooth = interpolation.interpolate(it, 0.0, **arguments)
    _, rough = interpolation.interpolate(it, 1.0, **arguments)
    assert pictures.shape == (24, 1, 28, 28)
    # neighbours on a great circle between orthogonal noises are a fifth of a right angle apart
    assert smooth == pytest.approx(2 * math.sin(math.pi / 20) / math.sqrt(2), rel=0.05)
    assert rough == pytest.approx(1, rel=0.05)
    constant = subject(lambda x, t: torch.zeros_like(x), prediction_type="sample")
    _, undefined = interpolation.interpolate(constant, 0.0, **arguments)
    assert "–" in interpolation.smoothness_table({("x", 0.0): undefined})


def test_agreement_is_counted_against_the_most_steps(monkeypatch):
    """Image i shows digit i at 9 steps, and at 3 steps too but for a fifth of the images."""
    digits = {9: torch.arange(100) % 10, 3: (torch.arange(120) + (torch.arange(120) < 20)) % 10}
    one_hot = torch.nn.functional.one_hot
    monkeypatch.setattr(same_noise, "features", lambda x: (None, one_hot(x, 10).float()))
    images = {("m", steps, 0.0): x for steps, x in digits.items()}
    shares, compared = same_noise.agreement(images)
    assert shares == {("m", 3, 0.0): 0.8, ("m", 9, 0.0): 1.0}
    assert compared == {3: 100, 9: 100}  # as many as both have
    table = same_noise.agreement_table(shares, compared, {"m": "v"})
    assert "| *images compared* | *100* |" in table and "| v, η = 0 | 80% |" in table
