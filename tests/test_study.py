"""study.py: closed forms for what it measures, and a whole small study, interrupted and resumed."""

import csv
import json
import math
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY, command

import metrics
import study
from data import to_unit_range
from sampling import image_noise, sample
from scheduler import DDIMScheduler


def subject(model, **config) -> study.Subject:
    scheduler = {"beta_schedule": "cosine"} | config
    return study.Subject("x", "x.pt", "0" * 64, model, {"scheduler": scheduler})


# ------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_errors_of_a_network_that_is_off_by_a_constant(prediction_type):
    """x_0 = (x_t - sqrt(1-abar) eps) / sqrt(abar) = sqrt(abar) x_t - sqrt(1-abar) v: an output that
    is wrong by e makes x_0 wrong by e sqrt((1-abar)/abar), and by e sqrt(1-abar)."""
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type=prediction_type)
    x0, noise = to_unit_range(images), image_noise(0, torch.arange(5), 0, study.SHAPE)

    def network(x_t, t):
        velocity = scheduler.get_velocity(x0, noise, t)
        return (noise if prediction_type == "epsilon" else velocity) + 0.01

    timesteps = [990, 500, 10]
    rows = study.prediction_errors(
        subject(network, prediction_type=prediction_type), images, timesteps
    )
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
    out = torch.zeros(study.SHAPE)
    out[..., :14] = 3
    rows = study.clipped_shares(
        subject(lambda x, t: out.expand_as(x), prediction_type="sample"), 4, 7, torch.device("cpu")
    )
    assert [row["share"] for row in rows] == [0.5] * 7


def test_slerp_stays_on_the_sphere_and_turns_evenly():
    a, b = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    b *= a.norm() / b.norm()
    path = study.slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    norms = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, a.norm().expand(5))
    turns = (path[1:] * path[:-1]).flatten(1).sum(1) / a.norm() ** 2
    torch.testing.assert_close(turns, turns[:1].expand(4))


def test_sampling_from_a_given_noise():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    images = torch.arange(3)
    for eta in (0.0, 1.0):
        drawn = sample(lambda x, t: 0.1 * x, scheduler, images, (1, 8, 8), eta=eta)
        x_T = image_noise(0, images, 0, (1, 8, 8))
        given = sample(lambda x, t: 0.1 * x, scheduler, images, (1, 8, 8), eta=eta, x_T=x_T)
        other = sample(lambda x, t: 0.1 * x, scheduler, images, (1, 8, 8), eta=eta, x_T=x_T + 1)
        one = sample(lambda x, t: 0.1 * x, scheduler, images[:1], (1, 8, 8), eta=eta, x_T=x_T[:1])
        assert torch.equal(drawn, given)
        assert torch.equal(one, given[:1])
        assert not torch.equal(drawn, other)


def test_interpolation_is_smooth_only_without_noise():
    """For data from N(0, I), whose E[eps | x_t] is sqrt(1-abar_t) x_t, eta = 1 forgets x_T."""
    abar = DDIMScheduler(beta_schedule="cosine").alphas_cumprod
    it = subject(lambda x, t: (1 - abar[t]).sqrt().float() * x, clip_sample=False)
    args = {"pairs": 4, "length": 6, "steps": 50, "device": torch.device("cpu")}
    pictures, smooth = study.interpolate(it, 0.0, **args)
    _, rough = study.interpolate(it, 1.0, **args)
    assert pictures.shape == (24, 1, 28, 28)
    # neighbours on a great circle between orthogonal noises are a fifth of a right angle apart
    assert smooth == pytest.approx(2 * math.sin(math.pi / 20) / math.sqrt(2), rel=0.05)
    assert rough == pytest.approx(1, rel=0.05)


def test_estimates():
    rows = [{"x": x, "x_se": 1.0} for x in (1.0, 2.0, 3.0)]
    e = study.estimate(rows, "x")
    assert (e.mean, e.runs) == (2, 3)
    assert e.se == pytest.approx(1 / math.sqrt(3))
    assert e.run_se == pytest.approx(1)
    assert e.margin == pytest.approx(2 * math.sqrt(1 + 1 / 3))
    wide = study.estimate([{"x": x, "x_se": 1.0} for x in (0.0, 10.0)], "x")
    assert wide.se == pytest.approx(5)  # the seeds differ by more than their errors say
    assert study.z_score(study.Estimate(1, 3, 1), study.Estimate(6, 4, 1)) == -1
    ratio = study.quotient(study.Estimate(6, 0.6, 1), study.Estimate(2, 0.2, 1))
    assert ratio.mean == 3 and ratio.se == pytest.approx(3 * math.sqrt(0.02))


def test_time_is_fitted_by_a_line():
    rows = [{"steps": s, "n": 10, "seconds": 10 * (0.5 + 0.25 * s)} for s in (1, 5, 50, 1000)]
    assert study.fit_time(rows) == pytest.approx((0.5, 0.25))


def test_trainings_are_the_comparisons_that_the_report_makes():
    trainings = study.make_trainings(640, seeds=3)
    assert len(trainings) == len({t.name for t in trainings}) == 14
    assert {t.steps for t in trainings} == {10}
    base = [t for t in trainings if (t.schedule, t.density) == ("cosine", "lognormal")]
    runs = {(t.pred, t.weighted, t.seed) for t in base}
    assert runs == {(*p, s) for p in (("v", True), ("eps", True), ("eps", False)) for s in range(3)}
    assert base[-1].arguments()[-2:] == ["--max-weight", "1"]
    kinds = {(t.schedule, t.density) for t in trainings if (t.pred, t.seed) == ("v", 0)}
    assert len(kinds) == 6


def test_a_training_is_run_once_a_recipe_and_is_what_its_name_says(tmp_path, data_dir, monkeypatch):
    args = study.parse_args(["--out", str(tmp_path), "--data", str(data_dir)])
    place = study.Place(torch.device("cpu"), 1, 0)
    trainings = [study.Training("v", "linear0", "uniform", 5, 128)]
    (trained,) = study.run_trainings(trainings, place, args)
    config, training = trained.contents["scheduler"], trained.contents["training"]
    assert (config["beta_schedule"], config["rescale_betas_zero_snr"]) == ("linear", True)
    assert (training["step"], training["args"]["density"], training["args"]["seed"]) == (
        (2, "uniform", 5)
    )
    (written,) = tmp_path.glob(f"trainings/*/{trainings[0].name}.pt")
    first_time = written.stat().st_mtime_ns
    study.run_trainings(trainings, place, args)
    assert written.stat().st_mtime_ns == first_time
    monkeypatch.setattr(study, "recipe", lambda: "another")
    study.run_trainings(trainings, place, args)
    assert (tmp_path / "trainings/another" / written.name).exists()
    assert written.stat().st_mtime_ns == first_time


# ------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, tmp_path_factory, data_dir):
    """A v- and an eps-model of a few steps."""
    folder = tmp_path_factory.mktemp("eps")
    arguments = (*TINY, "--steps", 30, "--data", data_dir, "--pred", "eps", "--out", "eps.pt")
    subprocess.run(command("train.py", *arguments), cwd=folder, check=True, capture_output=True)
    return tiny_checkpoint, folder / "eps.pt"


@pytest.fixture(scope="module")
def quick(checkpoints, tmp_path_factory, data_dir):
    """The folder of a quick study, and its arguments."""
    folder = tmp_path_factory.mktemp("study")
    arguments = ("--quick", "--ckpt", *checkpoints, "--data", data_dir)
    done = subprocess.run(
        command("study.py", *arguments), cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "study" / "quick", arguments


def test_a_quick_study_writes_what_it_says(quick):
    out, _ = quick
    rows = list(csv.DictReader((out / "results.csv").open()))
    # two models, three step counts, two etas; 20 steps with two seeds
    assert len(rows) == 2 * (1 + 1 + 2) * 2
    assert {row["prediction"] for row in rows} == {"v", "ε"}
    for row in rows:
        assert int(row["n"]) == 100 and float(row["frechet_se"]) > 0 and float(row["seconds"]) > 0
        assert {"precision", "commit", "device", "seed"} <= set(row)
        measures = set(row) & {"kid", "precision", "recall", "confidence", "novelty", "copies"}
        assert len(measures) == 6 and all(float(row[f"{m}_se"]) >= 0 for m in measures)
    text = (out / "STUDY.md").read_text()
    for row in rows:
        if row["steps"] == "5":
            assert f"{float(row['frechet']):.1f} ± {8**0.5 * float(row['frechet_se']):.1f}" in text
    for name in ("steps", "images", "agreement", "time", "why-v", "interpolation", "pairs"):
        assert (out / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text


def test_a_cell_is_what_infer_makes(quick, run, checkpoints, tmp_path, data_dir):
    out, _ = quick
    (path,) = out.glob("cells/tiny-*-ddim5-eta1-n100-seed0.npy")
    arguments = ("--n", 100, "--steps", 5, "--eta", 1, "--save-npy", "--out", "x.png")
    assert run("infer.py", "--ckpt", checkpoints[0], *arguments).returncode == 0
    images = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(path), images)
    row = json.loads(path.with_suffix(".json").read_text())
    assert row["frechet"] == pytest.approx(metrics.score(images, data_dir=data_dir)["frechet"])


def test_an_interrupted_study_goes_on_and_two_processes_make_the_same(quick, run):
    """Take three cells away, one of them half: only those are made again, here by two processes."""
    out, arguments = quick
    before = {path: path.read_bytes() for path in sorted(out.glob("cells/*.npy"))}
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*")}
    lost = [path for path in before if "-ddim20-eta1-n100-seed1" in path.name]
    assert len(lost) == 2
    for path in lost:
        path.with_suffix(".json").unlink()
    lost[0].unlink()
    done = run("study.py", *arguments, "--out", out, processes=2)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in sorted(out.glob("cells/*.npy"))} == before
    lost_files = {p.with_suffix(s) for p in lost for s in (".npy", ".json")}
    for path, modified in times.items():
        assert (path.stat().st_mtime_ns == modified) == (path not in lost_files), path


def test_identity_is_counted_against_the_most_steps(tmp_path, monkeypatch):
    """Image i shows digit i at 9 steps, and at 3 steps too but for a fifth of the images."""
    digits = {9: torch.arange(100) % 10, 3: (torch.arange(100) + (torch.arange(100) < 20)) % 10}
    cells = [study.Cell("m", "0" * 64, steps, 0.0, 100, 0) for steps in (3, 9)]
    monkeypatch.setattr(study, "read_images", lambda folder, cell: digits[cell.steps])
    monkeypatch.setattr(
        metrics, "features", lambda x: (None, torch.nn.functional.one_hot(x, 10).float())
    )
    assert study.agreement(tmp_path, cells) == {("m", 3, 0.0): 0.8, ("m", 9, 0.0): 1.0}


def test_what_is_said_of_training_is_what_the_ratios_show():
    def said(long, brief):
        keys = ("v", 10), ("v", 50)
        sides = [
            {k: study.Estimate(x, 0.05, 1) for k, x in zip(keys, xs, strict=True)}
            for xs in (long, brief)
        ]
        return study.what_training_does(*sides)

    assert "not that the training was too short" in said([0.5, 0.9], [0.9, 0.9])
    assert "helps less" in said([0.9, 0.9], [0.9, 0.5])
    assert said([0.9, 0.5], [0.5, 0.9]) == said([0.9, 0.9], [0.9, 0.9])
    assert study.what_training_does({("v", 20): study.Estimate(1, 1, 1)}, {}) == ""


def test_schedule_findings_are_what_the_distances_show():
    kinds = {(s, "lognormal"): [study.Estimate(10, 1, 1)] * 2 for s in study.SCHEDULES}
    kinds |= {(s, "uniform"): [study.Estimate(20, 1, 1)] * 2 for s in study.SCHEDULES}
    kinds["linear", "uniform"] = [study.Estimate(20, 1, 1), study.Estimate(30, 1, 1)]
    text = study.schedule_findings(kinds, [2, 2])
    assert "divided by 2.0 to 3.0" in text
    assert "log-SNR normal:** not told apart (largest |z| of 6: 0.0)" in text
    assert "t uniform:** “cosine” beats “linear” by up to 3.5; “linear, zero SNR” beats" in text
    assert "“linear” beats" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ckpt", "nowhere.pt"], ["nowhere.pt"]),
        (["--ckpt", "TINY", "TINY"], ["twice"]),
        (["--ckpt", "TINY", "--steps", "101"], ["--steps 101", "100"]),
        (["--ckpt", "TINY", "--steps", "0"], ["--steps"]),
        (["--ckpt", "TINY", "--eta", "1.5"], ["--eta"]),
        (["--ckpt", "TINY", "--n", "99"], ["--n", "100"]),
    ],
)
def test_bad_input_is_refused(arguments, words, run_here, refused, tiny_checkpoint):
    given = [str(tiny_checkpoint) if a == "TINY" else a for a in arguments]
    refused(run_here("study.py", *given), *words)


def test_long_cells_alone_are_compared_with_one_another(
    run_here, checkpoints, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "LONG", 1)
    arguments = ("--ckpt", *checkpoints, "--data", data_dir, "--train-images", 0)
    arguments += ("--steps", 2, 3, "--eta", 0, "--n", 120, "--n-long", 100)
    assert run_here("study.py", *arguments).returncode == 0
    with (tmp_path / "study" / "results.csv").open() as file:
        assert [row["n"] for row in csv.DictReader(file)] == ["100"] * 4
