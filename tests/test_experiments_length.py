"""experiments/length.py, by fake rows."""

import math
from dataclasses import replace

from lab.distributed import Process

import pytest
import torch

from experiments import length
from experiments.common import Settings, Study
from experiments.estimates import Estimate, Results, excess
from experiments.grid import Subject

SETTINGS = Settings((1, 50), (4,), (0.0, 0.5, 1.0), 100, 100, 1, 0, 100, "data", None)


def subject_of(label, images):
    contents = {
        "scheduler": {"prediction_type": "v_prediction"},
        "training": {"images": images},
    }
    return Subject(label, f"{label}.pt", label.ljust(64, "0"), None, contents)


class FakeStudy(Study):
    """A study whose distance is 5 + 1000 / images; + 10 more at eta = 0, also by images."""

    def measure(self, cells, subjects):
        images = {s.label: s.contents["training"]["images"] for s in subjects}
        self.rows |= dict.fromkeys(cells)
        rows = [vars(cell) | {"prediction": "v", "frechet_se": 0.0} for cell in cells]
        for row in rows:
            far = 1000 if row["eta"] else 10_000
            row["frechet"] = 5 + far / images[row["model"]]
        return Results(rows if self.process.is_first else [])

    def reference(self, n):
        assert n == 100
        return {"frechet": 5.0}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Model a has two snapshots, model b has none."""
    snapshots = {1: subject_of("a-step1", 100), 4: subject_of("a-step4", 400)}
    monkeypatch.setattr(length, "load_relatives", lambda s, *_: snapshots if s.label == "a" else {})
    settings = replace(SETTINGS, out=tmp_path)
    subjects = [subject_of("a", 1000), subject_of("b", 1000)]
    return FakeStudy(settings, Process(torch.device("cpu")), subjects, "python study.py")


def test_the_cells_are_those_before_and_the_last_at_the_extremes_of_eta(study):
    """With one seed, also where the grid has several."""
    study.settings = replace(study.settings, seeds=3)
    length.run(study)
    assert {c.seed for c in study.rows} == {0}
    assert {(c.model, c.steps, c.eta) for c in study.rows} == {
        (model, 50, eta) for model in ("a", "a-step1", "a-step4") for eta in (0.0, 1.0)
    }
    assert {c for c in study.rows if c.model == "a"} < set(study.grid_cells)


def test_the_table_has_a_row_per_length_with_exponents_and_ratios(study):
    assert length.run(study)["length"].splitlines() == [
        "**v-prediction (a)**",
        "",
        "| training images | η = 0 | exponent | η = 1 | exponent | η = 1 over η = 0 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 100 | 105.0 ± 0.0 | – | 15.0 ± 0.0 | – | 0.10 ± 0.00 |",
        "| 400 | 30.0 ± 0.0 | −1.00 ± 0.00 | 7.5 ± 0.0 | −1.00 ± 0.00 | 0.10 ± 0.00 |",
        "| 1,000 | 15.0 ± 0.0 | −1.00 ± 0.00 | 6.0 ± 0.0 | −1.00 ± 0.00 | 0.10 ± 0.00 |",
    ]
    assert (study.out / "length.png").stat().st_size > 5000


def test_the_exponent_is_the_slope_of_the_logarithms():
    e = length.exponent((10, Estimate(8.0, 0.8)), (40, Estimate(1.0, 0.2)))
    assert e.mean == pytest.approx(-1.5)
    assert e.se == pytest.approx(math.hypot(0.1, 0.2) / math.log(4))
    assert math.isnan(length.exponent(None, (10, Estimate(1.0, 0.1))).mean)
    unknown = excess(Estimate(3.0, 0.6), 2.0)  # less than two errors above real images
    assert math.isnan(unknown.mean)
    assert math.isnan(length.exponent((10, Estimate(1.0, 0.1)), (20, unknown)).mean)
    assert math.isnan(length.exponent((10, unknown), (20, Estimate(1.0, 0.1))).mean)
    assert excess(Estimate(3.0, 0.4), 2.0) == Estimate(1.0, 0.4)


def test_without_snapshots_there_is_no_table(study):
    study.subjects = study.subjects[1:]
    assert length.run(study) == {} == study.rows


def test_another_process_writes_nothing(study):
    study.process = Process(torch.device("cpu"), world=2, rank=1)
    assert length.run(study) == {}
    assert len(study.rows) == 6 and not list(study.out.iterdir())
