"""study.py: its arguments and files, and a whole small study, interrupted and resumed."""

import csv
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_refused, command

import metrics
import study
from experiments import samplers
from experiments.grid import Cell

# --------------------------------------------------------------------------------- arguments


def test_default_paths_are_those_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert study.parse_args([]).out == ROOT / "results"
    assert study.parse_args(["--quick"]).out == ROOT / "results" / "quick"
    assert all((study.ROOT / path).exists() for path in study.CHECKPOINTS)
    assert study.parse_args([]).data == "data"


def test_experiments_run_in_the_order_of_the_report():
    assert study.parse_args([]).experiments == list(study.EXPERIMENTS)
    assert study.parse_args(["why-v", "eta"]).experiments == ["eta", "why-v"]
    args = study.parse_args(["eta", "--quick", "--n", "200"])
    assert (args.n, args.seeds, args.train_images) == (200, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ckpt", "nowhere.pt"], ["nowhere.pt"]),
        (["--ckpt", "TINY", "TINY"], ["twice"]),
        (["--ckpt", "TINY", "--steps", "101"], ["--steps 101", "100"]),
        (["--steps", "0"], ["--steps"]),
        (["--eta", "1.5"], ["--eta"]),
        (["--n", "99"], ["--n", "100"]),
        (["which"], ["which", "why-v"]),
    ],
)
def test_bad_input_is_refused(arguments, words, run_here, request):
    if "TINY" in arguments:
        tiny = str(request.getfixturevalue("tiny_checkpoint"))
        arguments = [tiny if a == "TINY" else a for a in arguments]
    assert_refused(run_here("study.py", *arguments), *words)


@pytest.mark.parametrize(
    ("experiment", "name", "words"),
    [("samplers", "tiny-2steps.pt", "student"), ("guidance", "tiny-labels.pt", "--labels")],
)
def test_what_does_not_belong_beside_a_checkpoint_is_refused_before_the_work(
    experiment, name, words, tiny_checkpoint, tmp_path, run_here, data_dir
):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    torch.save(contents, tmp_path / "tiny.pt")
    student = {"timesteps": [9, 3], "teacher": {"run": "other"}} if "steps" in name else {}
    torch.save(contents | student | {"note": 1}, tmp_path / name)
    options = ("--ckpt", tmp_path / "tiny.pt", "--steps", 1, "--data", data_dir, "--out", "out")
    assert_refused(run_here("study.py", "setup", experiment, *options), name, words)
    assert not list(tmp_path.glob("out/cells/*"))


def test_a_checkpoint_of_one_timestep_is_refused(tiny_checkpoint, tmp_path, run_here, data_dir):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    contents["scheduler"] = contents["scheduler"] | {"num_train_timesteps": 1}
    torch.save(contents, tmp_path / "tiny.pt")
    options = ("--ckpt", tmp_path / "tiny.pt", "--steps", 1, "--data", data_dir, "--out", "out")
    assert_refused(run_here("study.py", *options), "one timestep only")


# ------------------------------------------------------------------------------- results.csv


@pytest.mark.parametrize(
    "text", ["name;value\na;1\n", f'model,n\n"{"x" * 200_000}', "model\n1,2\n"]
)
def test_another_results_csv_is_refused_before_the_work(
    text, tiny_checkpoint, tmp_path, run_here, data_dir
):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "results.csv"
    path.write_text(text)
    options = ("--steps", 1, "--n", 100, "--ckpt", tiny_checkpoint, "--data", data_dir)
    assert_refused(run_here("study.py", "steps", *options, "--out", "out"), "results.csv")
    assert path.read_text() == text and not list(tmp_path.glob("out/cells/*"))


def csv_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_other_cells_stay_after_a_part_of_the_experiments(tmp_path):
    path = tmp_path / "results.csv"

    def row_of(seed, frechet, eta=0.5):
        cell = Cell("a", "0" * 64, "ddpm" if eta is None else "ddim", 5, eta, 100, seed)
        return cell, {field: getattr(cell, field) for field in vars(cell)} | {
            "frechet": frechet,
            "labels": [1, 2],
        }

    study.write_csv(path, dict([row_of(0, 1.0), row_of(1, 2.0, None)]), complete=True)
    assert [row["eta"] for row in csv_of(path)] == ["0.5", ""]
    assert csv_of(path)[0]["labels"] == "1 2"
    study.write_csv(path, dict([row_of(2, 3.0), row_of(1, 9.0, None)]), complete=False)
    rows = [(row["seed"], row["frechet"]) for row in csv_of(path)]
    assert rows == [("0", "1.0"), ("1", "9.0"), ("2", "3.0")]
    cell, row = row_of(2, 3.0)
    study.write_csv(path, {cell: row | {"new": 1}}, complete=False)  # a measure was added
    assert [row["new"] for row in csv_of(path)] == ["", "", "1"]
    study.write_csv(path, dict([row_of(2, 4.0)]), complete=True)  # of a narrower grid
    assert [row["frechet"] for row in csv_of(path)] == ["1.0", "9.0", "4.0"]
    study.write_csv(path, {}, complete=False)
    assert len(csv_of(path)) == 3


def test_rows_of_a_checkpoint_go_when_all_experiments_have_another_of_its_name(tmp_path):
    path = tmp_path / "results.csv"

    def rows_of(model, sha256, seed):
        cell = Cell(model, sha256 * 64, "ddim", 5, 1.0, 100, seed)
        return {cell: {field: getattr(cell, field) for field in vars(cell)}}

    def rows():
        return [(row["model"], row["sha256"][0], row["seed"]) for row in csv_of(path)]

    study.write_csv(path, rows_of("a", "0", 1) | rows_of("b", "0", 1), complete=True)
    study.write_csv(path, rows_of("a", "1", 2), complete=False)
    assert rows() == [("a", "0", "1"), ("b", "0", "1"), ("a", "1", "2")]
    study.write_csv(path, rows_of("a", "1", 3), complete=True)
    assert rows() == [("b", "0", "1"), ("a", "1", "2"), ("a", "1", "3")]


# -------------------------------------------------------------------------- a whole small study


CELLS = 52  # of a quick study


@pytest.fixture(scope="module")
def quick(tiny_checkpoint, tiny_eps_checkpoint, tmp_path_factory, data_dir):
    """The folder of a quick study, its arguments, what it printed, and its bar."""
    out = tmp_path_factory.mktemp("study") / "out"
    checkpoints = (tiny_checkpoint, tiny_eps_checkpoint)
    arguments = ("--quick", "--ckpt", *checkpoints, "--data", data_dir, "--out", out)
    done = subprocess.run(
        command("study.py", *arguments), cwd=out.parent, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return out, arguments, done.stdout, done.stderr


@pytest.mark.slow
def test_a_quick_study_writes_what_it_says(quick):
    out, _, printed, _ = quick
    rows = csv_of(out / "results.csv")
    # DDIM: two models and the exact denoiser; three step counts, two etas; 20 steps with two seeds
    # two further variances of DDPM at 5 and 20 steps; 4 and 16 calls by four lines of each network
    # and two of the exact denoiser
    assert len(rows) == CELLS == 3 * (1 + 1 + 2) * 2 + 2 * (1 + 1) * 2 + 2 * (2 * 4 + 2)
    assert {row["prediction"] for row in rows} == {"v", "ε"}
    samplers = {"ddim", "dpm++", "ddpm-large", "ddpm-optimal"}
    assert {row["sampler"] for row in rows} == samplers
    for row in rows:
        assert int(row["n"]) == 100 and float(row["frechet_se"]) > 0 and float(row["seconds"]) > 0
        assert {"precision", "commit", "device", "seed", "metrics_key"} <= set(row)
        measures = set(row) & {"kid", "precision", "recall", "confidence", "novelty", "copies"}
        assert len(measures) == 6 and all(float(row[f"{m}_se"]) >= 0 for m in measures)
    text = (out / "STUDY.md").read_text(encoding="utf-8")
    for row in rows:
        if row["steps"] == "5":
            assert f"{float(row['frechet']):.1f} ± {8**0.5 * float(row['frechet_se']):.1f}" in text
    for name in (
        "steps",
        "eta-star",
        "samplers",
        "images",
        "agreement",
        "time",
        "likelihood",
        "why-v",
        "interpolation",
        "pairs",
        "exact",
    ):
        assert (out / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text and f"{name}.png" in printed
    assert "changed" not in printed  # there was no text to read again


@pytest.mark.slow
def test_one_bar_is_over_all_the_work(quick):
    """Its total is known at the start, and what was done adds up to it."""
    shown = re.findall(r"(\d+)%\|[^|]*\| *(\S+)/(\S+) \[", quick[-1])
    assert len({total for _, _, total in shown}) == 1
    percent, done, total = shown[-1]
    assert percent == "100" and done == total


@pytest.mark.slow
def test_a_cell_is_what_infer_makes(quick, run, tiny_checkpoint, tmp_path, data_dir):
    out, *_ = quick
    sha256 = csv_of(out / "results.csv")[0]["sha256"]
    path = out / "cells" / f"{sha256[:12]}-ddim-5steps-eta1-n100-seed0.npy"
    arguments = ("--n", 100, "--steps", 5, "--eta", 1, "--save-npy", "--out", "x.png")
    assert run("infer.py", "--ckpt", tiny_checkpoint, *arguments).returncode == 0
    images = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(path), images)
    row = json.loads(path.with_suffix(".json").read_text())
    assert row["frechet"] == pytest.approx(metrics.score(images, data_dir=data_dir)["frechet"])


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_two_processes_make_the_same(quick, run):
    """Take two cells away, one of them half: only those are made again, here by two processes."""
    out, arguments, *_ = quick
    before = {path: path.read_bytes() for path in sorted(out.glob("cells/*.npy"))}
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*")}
    networks = {r["sha256"][:12] for r in csv_of(out / "results.csv") if r["model"] != "exact"}
    lost = [p for p in before if "-ddim-20steps-eta1-n100-seed1" in p.name]
    lost = [p for p in lost if p.name[:12] in networks]
    assert len(lost) == 2
    for path in lost:
        path.with_suffix(".json").unlink()
    lost[0].unlink()
    done = run("study.py", "steps", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in sorted(out.glob("cells/*.npy"))} == before
    lost_files = {p.with_suffix(s) for p in lost for s in (".npy", ".json")}
    for path, modified in times.items():
        assert (path.stat().st_mtime_ns == modified) == (path not in lost_files), path
    assert len(csv_of(out / "results.csv")) == CELLS


@pytest.mark.slow
def test_a_run_refreshes_tables_and_names_their_sections(quick, run_here):
    out, arguments, *_ = quick
    report = out / "STUDY.md"
    written = report.read_text(encoding="utf-8")
    mine = written.replace("## Which η?", "## 2. My heading\n\nMy text.")
    stale = mine.replace("*n × seeds*", "*stale*").replace("Fréchet, η = 0", "stale")
    stale = stale.replace("| DDIM, η = 1 (DDPM) |", "| stale |")
    report.write_text(stale, encoding="utf-8")
    done = run_here("study.py", "steps", "eta", "samplers", "exact", *arguments)
    assert done.returncode == 0, done.stderr
    assert report.read_text(encoding="utf-8") == mine
    assert "changed  tables of “Steps and η”" in done.stdout
    assert "changed  tables of “2. My heading”" in done.stdout
    assert f"changed  tables of “{samplers.TITLE}”" in done.stdout
    assert "changed  tables of “The exact denoiser: the steps' error alone”" in done.stdout
    report.write_text(mine.replace("<!-- end -->", "", 1), encoding="utf-8")
    assert_refused(run_here("study.py", "cost", *arguments), "STUDY.md", "end")
