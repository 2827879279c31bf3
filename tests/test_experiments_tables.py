"""experiments/tables.py, the tables of the experiments, and STUDY.md."""

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

from lab.distributed import Process
from lab.errors import UserError

import pytest
import torch
from helpers import ROOT

import study
from experiments import (
    calibration,
    copying,
    cost,
    eta,
    exact,
    guidance,
    length,
    prediction,
    ranges,
    samplers,
    setup,
    steps,
    training,
)
from experiments.common import Study
from experiments.estimates import Estimate, Results
from experiments.tables import (
    best_in_bold,
    markdown_table,
    names,
    number,
    refresh,
    skeleton,
    with_margin,
    with_se,
)
from experiments.trainings import STEPS, make_trainings

# ------------------------------------------------------------------------------- one table


def test_markdown_has_true_minus_signs():
    text = markdown_table(["", "z"], [["mnist-v, `--seed 3`", "-1.5"], ["2026-11-25", -2]])
    assert text.splitlines() == [
        "|  | z |",
        "| --- | ---: |",
        "| mnist-v, `--seed 3` | −1.5 |",
        "| 2026-11-25 | −2 |",
    ]


def test_numbers():
    assert number(1.26) == "1.3"
    assert number(math.nan) == "–"
    assert (number(math.inf), number(-math.inf, "+.1f")) == ("+∞", "−∞")
    assert with_se(Estimate(2, 0.25), ".2f") == "2.00 ± 0.25"
    assert with_margin(Estimate(2, 0.25)) == "2.0 ± 0.7"  # 2 sqrt(2) standard errors


@pytest.mark.parametrize(
    ("means", "bold"),
    [((2.0, 1.0, 1.01), [1]), ((1.0, 2.0, 1.00001), [0, 2]), ((1.0, 1.00001), []), ((1.0,), [])],
)
def test_the_smallest_mean_is_bold(means, bold):
    """So are all that differ from it by rounding only, but none if all of them do."""
    cells = best_in_bold([Estimate(mean, 0) for mean in means])
    assert [i for i, cell in enumerate(cells) if cell.startswith("**")] == bold
    assert [cell.strip("*") for cell in cells] == [f"{mean:.1f} ± 0.0" for mean in means]


# --------------------------------------------------------------------------------- STUDY.md

TEXT = """# The study

Text with a | pipe, and 3 − 2.

## 1. First

<!-- table one -->
| a |
<!-- end -->

Its text.

<!-- table two -->
<!-- end -->

## 2. Second

<!-- table three -->
old
<!-- end -->
"""


def test_refresh_replaces_tables_only():
    assert names(TEXT) == ["one", "two", "three"]
    text, changed = refresh(TEXT, {"one": "| b |", "two": "| c |", "unknown": "| d |"})
    assert changed == ["1. First"]
    assert text == TEXT.replace("| a |", "| b |").replace(
        "two -->\n<!-- end", "two -->\n| c |\n<!-- end"
    )
    assert refresh(text, {"one": "| b |", "two": "| c |"}) == (text, [])  # nothing is left to do


def test_refresh_names_the_sections_whose_tables_changed():
    assert refresh(TEXT, {"one": "| a |", "three": "new"})[1] == ["2. Second"]
    assert refresh(TEXT, {"one": "x", "two": "x", "three": "x"})[1] == ["1. First", "2. Second"]
    assert refresh(TEXT, {}) == (TEXT, [])


def test_refresh_never_touches_text_after_a_marker_without_end():
    broken = TEXT.replace("| a |\n<!-- end -->", "| a |")
    with pytest.raises(UserError, match="end"):
        refresh(broken, {"two": "| c |"})


def test_a_skeleton_has_a_place_for_every_table_and_figure():
    experiments = list(study.EXPERIMENTS.values())
    text = skeleton(experiments)
    assert names(text) == [name for module in experiments for name in module.TABLES]
    for module in experiments:
        assert f"## {module.TITLE}\n" in text
        assert all(f"({file})" in text for file in module.FIGURES)
    assert "How long does an image take?" in text


def test_names_of_tables_and_figures_are_unique():
    for kind in ("TABLES", "FIGURES"):
        all_names = [name for m in study.EXPERIMENTS.values() for name in getattr(m, kind)]
        assert len(all_names) == len(set(all_names))


# ------------------------------------------------------- the tables of all experiments, by rows

TEXT_COLUMNS = ("model", "sha256", "sampler", "prediction", "device", "torch", "commit")


def read_rows(path):
    """Return the rows of results.csv with the types that the study computes with."""

    def typed(column, value):
        if column in (*TEXT_COLUMNS, "metrics_key", "labels"):
            return value
        return float(value) if "." in value or "e" in value else int(value) if value else None

    with path.open(encoding="utf-8", newline="") as file:
        return [{c: typed(c, value) for c, value in row.items()} for row in csv.DictReader(file)]


def all_tables(grid, trained, trainings, variances, real):
    """Return every table that depends on nothing but the rows of cells."""
    best = {label: grid.at(label, *grid.best(label))[0] for label in grid.symbols}
    return {
        **steps.tables(grid),
        "eta-duels": eta.duels_table(grid, 0.0, 1.0),
        "eta-ratios": eta.ratios_table(grid, real),
        "eta-variances": eta.variances_tables(grid, variances) if variances else "",
        "prediction-duels": prediction.duels_table(grid, (0.0, 1.0)),
        "prediction-one-step": prediction.one_step_table(grid),
        "cost": cost.cost_table(grid),
        **training.tables(trainings, trained),
        "setup": setup.setup_table(grid, "python study.py"),
        "copying": copying.copying_table(best),
    }


class Missing(Exception):
    """A cell is not in results.csv."""


class Replay(Study):
    """A study that measures nothing: it reads results.csv."""

    def measure(self, cells, subjects):
        try:
            return Results([self.rows[key_of(vars(cell))] for cell in cells])
        except KeyError as missing:
            raise Missing(str(missing)) from None

    def images_of(self, cell):
        return torch.zeros(100, 1, 28, 28, dtype=torch.uint8)


def key_of(row):
    return tuple(row[column] for column in ("model", "sampler", "steps", "eta", "n", "seed"))


def grid_of(replay, rows):
    """Return the results of the grid; rows of other experiments are left out."""
    wanted = {key_of(vars(cell)) for cell in replay.grid_cells}
    return Results([row for row in rows if key_of(row) in wanted])


@pytest.fixture
def replay(tmp_path, monkeypatch, data_dir):
    """The shipped study, of shipped checkpoints and of those beside them that its rows name."""
    rows = read_rows(ROOT / "results" / "results.csv")
    args = study.parse_args([])
    args.out, args.data = tmp_path, str(data_dir)
    replay = study.make_study(args, Process(torch.device("cpu")))
    replay = Replay(**vars(replay) | {"rows": {key_of(row): row for row in rows}})

    def relatives(subject, ending, device):
        found = {}
        for model, sha256 in {row["model"]: row["sha256"] for row in rows}.items():
            label = model.removesuffix(", scale 1")  # as guidance.py asks students for digits
            if match := re.fullmatch(f"{re.escape(subject.label)}-{ending}", label):
                number = int(match[1])
                contents = subject.contents | {"training": {"images": 512 * number}}
                found[number] = replace(subject, label=label, sha256=sha256, contents=contents)
        return dict(sorted(found.items()))

    for module in (samplers, length, guidance):
        monkeypatch.setattr(module, "load_relatives", relatives)
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    for module in (samplers, exact, ranges):
        monkeypatch.setattr(module, "load_dataset", lambda *_: images)
    return replay


def replayed(experiment, replay):
    """Return the tables of an experiment; they must be empty if cells are missing."""
    try:
        return dict.fromkeys(experiment.TABLES, "") | experiment.run(replay)
    except Missing:
        return dict.fromkeys(experiment.TABLES, "")


@pytest.mark.slow
def test_the_tables_of_the_shipped_study_are_those_of_its_rows(replay):
    """No number was typed: only the setup has more than the rows know."""
    rows = list(replay.rows.values())
    trainings = make_trainings(64_000, 3)
    trained_names = {t.name for t in trainings}
    labels = {Path(path).stem for path in study.CHECKPOINTS}
    shipped = [row for row in rows if row["model"] in labels]
    grid = grid_of(replay, shipped)
    trained = Results([row for row in rows if row["model"] in trained_names])
    assert grid.rows and trained.rows
    variances = {
        name: Results([row for row in shipped if row["sampler"] == sampler])
        for name, sampler in eta.VARIANCES.items()
    }
    measured = all(results.rows for results in variances.values())  # else the table is empty
    real = {steps: replay.reference(grid.images(steps))["frechet"] for steps in grid.steps}
    tables = all_tables(grid, trained, trainings, variances if measured else {}, real)
    for experiment in (samplers, length, exact, ranges, guidance, calibration):
        tables |= replayed(experiment, replay)
    for name in ("setup", "copying", "calls", "sampler-changes", "ranges-changes"):
        del tables[name]  # they need more than rows
    text = (ROOT / "results" / "STUDY.md").read_text(encoding="utf-8")
    assert set(names(text)) == {n for m in study.EXPERIMENTS.values() for n in m.TABLES}
    assert refresh(text, tables) == (text, [])


def test_one_training_does_not_say_how_much_another_one_differs():
    trainings = make_trainings(640, 1)
    rows = flat_rows({t.name: "v" for t in trainings}, (STEPS,), 5.0)
    tables = training.tables(trainings, Results(rows))
    assert "schedule-z" not in tables and "z, " not in tables["training"]


MEASURES = ("frechet", "kid", "precision", "recall", "confidence", "novelty", "copies")


def flat_rows(models, step_counts, value):
    """Return the rows of cells whose images are all the same: no figure has a standard error."""
    figures = {m: value for m in (*MEASURES, "label_entropy")}
    return [
        {"model": model, "sampler": "ddim", "prediction": symbol, "steps": s, "eta": e, "n": 100}
        | {"seconds": 1.0, "images_per_s": 100.0, "processes": 1, "threads": 1, "device": "x"}
        | {"torch": "2", "commit": "unknown"}
        | figures
        | {f"{name}_se": 0.0 for name in figures}
        for model, symbol in models.items()
        for s in step_counts
        for e in (0.0, 1.0)
    ]


@pytest.mark.parametrize(("value", "other"), [(0.0, 0.0), (5.0, 7.0), (0.0, 7.0)])
def test_images_that_are_all_the_same_break_no_table(value, other):
    rows = flat_rows({"a": "v"}, (1, 10, 50), value) + flat_rows({"b": "ε"}, (1, 10, 50), other)
    trainings = make_trainings(640, 2)
    trained = Results(flat_rows({t.name: "v" for t in trainings}, (STEPS,), value))
    several = [row | {"eta": None} for row in rows if row["steps"] > 1 and row["eta"] == 0]
    variances = {
        name: Results([row | {"sampler": sampler} for row in several])
        for name, sampler in eta.VARIANCES.items()
    }
    tables = all_tables(Results(rows), trained, trainings, variances, dict.fromkeys((1, 10, 50), 1))
    assert all("nan" not in table and "inf" not in table for table in tables.values())
    assert ("−∞" in tables["prediction-duels"]) == (value != other)
