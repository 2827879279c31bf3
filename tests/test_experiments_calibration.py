"""experiments/calibration.py: which cells it asks for, and its table, by rows that are made up."""

import math
from dataclasses import replace

from lab.distributed import Process

import numpy as np
import pytest
import torch

from experiments import calibration
from experiments.common import Settings, Study
from experiments.estimates import Results
from experiments.grid import Subject

V, EPS = (
    Subject(symbol, f"{symbol}.pt", symbol * 64, None, {"scheduler": {"prediction_type": kind}})
    for symbol, kind in (("v", "v_prediction"), ("e", "epsilon"))
)
SETTINGS = Settings((1, 5, 10, 20), (4,), (0.0, 0.5, 1.0), 100, 100, 3, 0, 100, "data", None)


class FakeStudy(Study):
    """A study whose Fréchet distances are the seeds, and whose KID is ten times as large."""

    def measure(self, cells, subjects):
        assert {cell.model for cell in cells} == {subject.label for subject in subjects}
        self.rows |= dict.fromkeys(cells)
        rows = [vars(cell) | {"prediction": "v", "frechet": cell.seed} for cell in cells]
        for row in rows:
            row |= {"frechet_se": 1.0, "kid": 10 * row["seed"], "kid_se": 80.0 + row["seed"]}
        return Results(rows if self.process.is_first else [])


@pytest.fixture
def study():
    return FakeStudy(SETTINGS, Process(torch.device("cpu")), [V, EPS], "python study.py")


def asked(study):
    return {(c.model, c.steps, c.eta) for c in study.rows}


def test_three_settings_have_twenty_seeds_which_the_grid_shares(study):
    calibration.run(study)
    assert asked(study) == {("e", 10, 1.0), ("v", 5, 0.0), ("v", 10, 1.0)}
    assert len(study.rows) == 3 * 20 and {c.seed for c in study.rows} == set(range(20))
    shared = {c.name for c in study.rows} & {c.name for c in study.grid_cells}
    assert len(shared) == 10 + 1 + 10  # the grid has ten seeds at 10 steps, one at 5


def test_a_small_study_has_three_seeds_and_those_settings_that_it_has(study):
    study.settings = replace(SETTINGS, steps=(1, 5, 20), etas=(0.0, 1.0), seeds=2)
    calibration.run(study)
    assert asked(study) == {("v", 5, 0.0)}
    assert len(study.rows) == 3


def test_without_its_settings_nothing_is_measured(study):
    study.settings = replace(SETTINGS, etas=(0.5,))
    assert calibration.run(study) == {} == study.rows


@pytest.mark.parametrize(("subjects", "model"), [([EPS, V], "e"), ([V], "v"), ([V, V, EPS], "e")])
def test_the_setting_of_10_steps_is_that_of_the_first_model_of_epsilon(subjects, model):
    (first, *others) = calibration.settings(subjects, (5, 10, 20), (0.0, 1.0)).values()
    assert (first[0].label, *first[1:]) == (model, 10, 1.0)
    assert all(subject is subjects[0] for subject, _, _ in others)


def test_another_process_shares_the_work_and_writes_nothing(study):
    study.process = Process(torch.device("cpu"), world=2, rank=1)
    assert calibration.run(study) == {}
    assert len(study.rows) == 3 * 20


def test_the_table(study):
    """Of 0 to 19 the standard deviation is sqrt(35), with an error of that / sqrt(38).

    The intervals are ± sqrt(8) times 1 and 80 to 99. Seeds that are 3 or more apart lie outside;
    ten times their difference is at most 190, and less than 226.
    """
    table = calibration.run(study)["calibration"].splitlines()
    assert table[:5] == [
        "|  | n × seeds | mean printed error | standard deviation over seeds | ratio "
        "| outside the 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| ε, 10 steps, η = 1: Fréchet distance | 100 × 20 | 1.00 | 5.92 ± 0.96 | 5.92 ± 0.96 "
        "| 306 of 380 (80.5%) |",
        "| ε, 10 steps, η = 1: KID | 100 × 20 | 89.50 | 59.16 ± 9.60 | 0.66 ± 0.11 "
        "| 0 of 380 (0.0%) |",
        "| v, 5 steps, η = 0: Fréchet distance | 100 × 20 | 1.00 | 5.92 ± 0.96 | 5.92 ± 0.96 "
        "| 306 of 380 (80.5%) |",
    ]
    assert [line.split(":")[0] for line in table[6:]] == ["| v, 10 steps, η = 1"] * 2


def test_each_interval_is_that_of_its_own_run():
    rows = [{"x": 0.0, "x_se": 1.0}, {"x": 10.0, "x_se": 4.0}]
    assert calibration.outside(rows, "x") == (1, 2)  # 10 is outside 0 ± 2.8, 0 within 10 ± 11.3


def test_right_errors_have_a_ratio_of_1_and_5_percent_outside():
    draw = np.random.default_rng(0)
    rows = [{"x": x, "x_se": 2.0} for x in draw.normal(7, 2, 200)]
    error, spread, ratio = calibration.calibration(rows, "x")
    assert error == 2
    assert spread.se == pytest.approx(2 / 398**0.5, rel=0.2)
    assert abs(spread.mean - 2) < 3 * spread.se
    assert (ratio.mean, ratio.se) == pytest.approx((spread.mean / 2, spread.se / 2))
    out, pairs = calibration.outside(rows, "x")
    assert out / pairs == pytest.approx(0.0455, abs=0.02)


def test_images_that_are_all_the_same_have_no_ratio():
    rows = [{"x": 7.0, "x_se": 0.0}] * 3
    error, spread, ratio = calibration.calibration(rows, "x")
    assert error == spread.mean == 0 and math.isnan(ratio.mean)
    assert calibration.outside(rows, "x") == (0, 6)
