"""experiments/samplers.py: which cells it asks for, its table and its figure, by fake rows."""

from dataclasses import replace

from lab.distributed import Process

import pytest
import torch

from experiments import samplers
from experiments.common import Settings, Study
from experiments.estimates import Results
from experiments.grid import Subject

CONFIG = {"scheduler": {"prediction_type": "v_prediction"}}
SUBJECTS = [Subject(label, f"{label}.pt", label * 64, None, CONFIG) for label in "ab"]
SETTINGS = Settings((1, 2, 20, 50, 100), (0.0, 0.2, 1.0), 100, 100, 3, 0, 100, "data", None)
OFFSETS = {("ddim", 0.0): 4, ("ddim", 1.0): 3, ("ddpm", None): 3, ("dpm++", 0.0): 2}


class FakeStudy(Study):
    """A study whose distances are 1000 / steps + the offset of the line, + 10 for model b."""

    def measure(self, cells, subjects):
        assert subjects == SUBJECTS
        self.rows |= dict.fromkeys(cells)
        rows = [vars(cell) | {"prediction": "v", "frechet_se": 0.5} for cell in cells]
        for row in rows:
            row["frechet"] = 1000 / row["steps"] + OFFSETS.get((row["sampler"], row["eta"]), 1)
            row["frechet"] += 10 * (row["model"] == "b")
        return Results(rows if self.process.is_first else [])

    def reference(self, n):
        assert n == 100
        return {"frechet": 5.0}


@pytest.fixture
def study(tmp_path):
    process = Process(torch.device("cpu"))
    return FakeStudy(replace(SETTINGS, out=tmp_path), process, SUBJECTS, "python study.py")


def test_every_line_has_its_cells_and_those_of_ddim_are_the_grids(study):
    samplers.run(study)
    cells = list(study.rows)
    assert {(c.sampler, c.eta) for c in cells} == set(samplers.LINES.values())
    assert {c.steps for c in cells} == {2, 20, 50}
    assert len(cells) == 2 * 5 * (1 + 3 + 3)  # models, lines, steps and seeds
    assert {c for c in cells if c.sampler == "ddim"} < set(study.grid_cells)


def test_the_table_has_a_row_per_sampler_and_the_best_in_bold(study):
    table = samplers.run(study)["samplers"]
    first, second = table.split("\n\n**v-prediction (b)**\n\n")
    assert first.splitlines() == [
        "**v-prediction (a)**",
        "",
        "| steps | 2 | 20 | 50 |",
        "| --- | ---: | ---: | ---: |",
        "| *n × seeds* | *100 × 1* | *100 × 3* | *100 × 3* |",
        "| DDIM, η = 0 | 504.0 ± 1.4 | 54.0 ± 1.2 | 24.0 ± 1.2 |",
        "| DDIM, η = 1 | 503.0 ± 1.4 | 53.0 ± 1.2 | 23.0 ± 1.2 |",
        "| DDPM | 503.0 ± 1.4 | 53.0 ± 1.2 | 23.0 ± 1.2 |",
        "| DPM-Solver++, η = 0 | 502.0 ± 1.4 | 52.0 ± 1.2 | 22.0 ± 1.2 |",
        "| DPM-Solver++, η = 1 | **501.0 ± 1.4** | **51.0 ± 1.2** | **21.0 ± 1.2** |",
    ]
    assert "| DDPM | 513.0 ± 1.4 |" in second
    assert (study.out / "samplers.png").stat().st_size > 5000


def test_without_steps_in_range_nothing_is_measured(study):
    study.settings = replace(study.settings, steps=(1, 100))
    assert samplers.run(study) == {} == study.rows


def test_another_process_shares_the_work_and_writes_nothing(study):
    study.process = Process(torch.device("cpu"), world=2, rank=1)
    assert samplers.run(study) == {}
    assert len(study.rows) == 2 * 5 * (1 + 3 + 3)
    assert not list(study.out.iterdir())
