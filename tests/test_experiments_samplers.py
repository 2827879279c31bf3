"""experiments/samplers.py: which cells it asks for, its tables and its figure, by fake rows."""

from dataclasses import replace

from lab.distributed import Process

import pytest
import torch

import metrics
from experiments import figures, samplers
from experiments.common import Settings, Study
from experiments.estimates import Estimate, Results
from experiments.grid import Subject, make_cells

CONFIG = {"scheduler": {"prediction_type": "v_prediction"}}
SUBJECTS = [Subject(label, f"{label}.pt", label * 64, None, CONFIG) for label in "ab"]
SETTINGS = Settings((1, 2), (2, 20, 2000), (0.0, 1.0), 100, 100, 3, 0, 100, "data", None)
OFFSETS = {("ddim", 0.0): 4, ("ddim", 1.0): 3, ("ddpm", None): 3, ("dpm++", 0.0): 2}


def distance_of(cell):
    """1000 / steps + the offset of the line, + 10 for model b; a tenth of that for a student."""
    distance = 1000 / cell.steps + OFFSETS.get((cell.sampler, cell.eta), 1)
    distance += 10 * (cell.model == "b")
    return (distance / 10 if "steps" in cell.model else distance) * (cell.model != "exact")


def fake_change(before, after, data_dir):
    """The change of the distance, with an error that depends on the seed."""
    assert (before.steps, before.seed) == (after.steps, after.seed)
    return distance_of(after) - distance_of(before), 0.3 + 0.1 * before.seed


def student_of(subject, steps):
    return replace(subject, label=f"{subject.label}-{steps}steps", sha256=f"{steps}" * 64)


class FakeStudy(Study):
    """A study whose distances are those of `distance_of`."""

    def measure(self, cells, subjects):
        assert {cell.model for cell in cells} == {subject.label for subject in subjects}
        self.rows |= dict.fromkeys(cells)
        figures = {"prediction": "v", "frechet_se": 0.5}
        rows = [vars(cell) | figures | {"frechet": distance_of(cell)} for cell in cells]
        return Results(rows if self.process.is_first else [])

    def reference(self, n):
        assert n == 100
        return {"frechet": 5.0}

    def images_of(self, cell):
        assert cell in self.rows
        pixels = torch.zeros(100, 1, 28, 28, dtype=torch.uint8)
        return pixels + (cell.model == "a")

    def change(self, before, after):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "frechet_change_of", fake_change)
            patch.setattr(self, "features_of", lambda cell: cell)
            return super().change(before, after)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Model a has students of 2 and of 8 steps, model b has none."""
    monkeypatch.setattr(samplers, "load_dataset", lambda *_: (torch.zeros(3, 1, 28, 28), None))
    exact = Subject("exact", "", "e" * 64, None, CONFIG)
    monkeypatch.setattr(samplers, "exact_subject", lambda images, subject: exact)
    students = {steps: student_of(SUBJECTS[0], steps) for steps in (2, 8)}
    monkeypatch.setattr(
        samplers, "load_relatives", lambda subject, *_: students if subject.label == "a" else {}
    )
    process = Process(torch.device("cpu"))
    return FakeStudy(replace(SETTINGS, out=tmp_path), process, SUBJECTS, "python study.py")


def test_every_line_has_its_cells(study):
    samplers.run(study)
    cells = list(study.rows)
    networks = [c for c in cells if c.model in "ab"]
    lines = [line for line in samplers.LINES.values() if line.who == "network"]
    assert {(c.sampler, c.eta) for c in networks} == {(line.sampler, line.eta) for line in lines}
    assert {c.steps for c in networks} == {2, 20}  # 2000 are more than the timesteps
    assert len(networks) == 2 * 4 * (1 + 3)  # models, lines, seeds at 2 and at 20 steps
    assert {c for c in networks if c.steps == 2 and c.sampler == "ddim"} < set(study.grid_cells)
    students = [c for c in cells if "steps" in c.model]
    assert {(c.model, c.steps, c.eta) for c in students} == {("a-2steps", 2, e) for e in (0, 0.3)}
    assert {(c.steps, c.eta) for c in cells if c.model == "exact"} == {
        (steps, eta) for steps in (2, 20) for eta in (0, 1)
    }


def test_the_table_has_a_row_per_line_and_the_best_in_bold(study):
    table = samplers.run(study)["samplers"]
    first, second = table.split("\n\n**v-prediction (b)**\n\n")
    assert first.splitlines() == [
        "**v-prediction (a)**",
        "",
        "| network calls | 2 | 20 |",
        "| --- | ---: | ---: |",
        "| DDIM, η = 0 | 504.0 ± 1.4 | 54.0 ± 1.2 |",
        "| DDIM, η = 1 (DDPM) | 503.0 ± 1.4 | 53.0 ± 1.2 |",
        "| DPM-Solver++, η = 0 | 502.0 ± 1.4 | 52.0 ± 1.2 |",
        "| DPM-Solver++, η = 1 | 501.0 ± 1.4 | **51.0 ± 1.2** |",
        "| students, η = 0 | 50.4 ± 1.4 | – |",
        "| students, η = 0.3 | **50.1 ± 1.4** | – |",
        "| exact denoiser, η = 0 | 0.0 ± 1.4 | 0.0 ± 1.2 |",
        "| exact denoiser, η = 1 | 0.0 ± 1.4 | 0.0 ± 1.2 |",
    ]
    assert "| DDIM, η = 1 (DDPM) | 513.0 ± 1.4 |" in second and "students" not in second
    assert (study.out / "samplers.png").stat().st_size > 5000


def test_the_advice_names_the_best_and_what_is_not_significantly_worse(study):
    assert samplers.run(study)["calls"].splitlines() == [
        "| network calls | a: use | Fréchet distance | b: use | Fréchet distance |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 2 | students, η = 0.3, or students, η = 0 | 50.1 ± 1.4"
        " | DPM-Solver++, η = 1 | 511.0 ± 1.4 |",
        "| 20 | DPM-Solver++, η = 1 | 51.0 ± 1.2 | DPM-Solver++, η = 1 | 61.0 ± 1.2 |",
    ]


def test_the_change_from_ddim_to_dpm_solver_is_between_cells_of_the_same_noise(study):
    """The errors of the seeds 0, 1 and 2 at 20 steps are 0.3, 0.4 and 0.5."""
    assert samplers.run(study)["sampler-changes"].splitlines() == [
        "| network calls | 20 | 2000 |",
        "| --- | ---: | ---: |",
        "| a, η = 0 | −2.0 ± 0.2 | – |",
        "| a, η = 1 | −2.0 ± 0.2 | – |",
        "| b, η = 0 | −2.0 ± 0.2 | – |",
        "| b, η = 1 | −2.0 ± 0.2 | – |",
    ]
    study.settings = replace(study.settings, calls=(1, 2))  # where they are one sampler
    assert "sampler-changes" not in samplers.run(study)


def test_the_same_noise_is_shown_with_the_checkpoint_and_its_students(study):
    samplers.run(study)
    students = {s.label: samplers.load_relatives(s) for s in study.subjects}
    panels = samplers.students_panels(study, students)
    assert {key: int(images.max()) for key, images in panels.items()} == {
        ("2 steps", "a"): 1,
        ("2 steps", "a, students"): 0,
    }
    assert (study.out / "students.png").stat().st_size > 3000


def test_models_with_different_students_share_the_rows_of_the_picture(study, monkeypatch):
    """Rows ascend, and a place without a student stays empty."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    samplers.run(study)
    a, b = study.subjects
    students = {"a": {20: student_of(a, 20)}, "b": {2: student_of(b, 2)}}
    for subject, k in ((a, 20), (b, 2)):
        cells = make_cells([student_of(subject, k)], [k], [0.0], lambda _: 100)
        study.measure(cells, [student_of(subject, k)])
    panels = samplers.students_panels(study, students)
    assert list(dict.fromkeys(row for row, _ in panels)) == ["2 steps", "20 steps"]
    names = ["a", "a, students", "b", "b, students"]
    assert [name for _, name in panels if name in names[:2]] == ["a", "a", "a, students"]
    figures.draw_panels(panels, 10, 1, 1, study.out / "x.png")
    axes = drawn[-1].axes
    assert [ax.get_title() for ax in axes[:4]] == names
    assert [ax.get_ylabel() for ax in axes[::4]] == ["2 steps", "20 steps"]
    empty = [not ax.images and not ax.get_frame_on() for ax in axes]
    assert empty == [False, True, False, False, False, False, False, True]


def test_lines_that_are_one_sampler_are_named_once():
    distances = {
        ("DDIM, η = 1 (DDPM)", 4): Estimate(20.0002, 1.0),
        ("DPM-Solver++, η = 1", 4): Estimate(20.0, 1.0),
        ("DDIM, η = 0", 4): Estimate(22.9, 1.0),
        ("exact denoiser, η = 0", 4): Estimate(1.0, 0.1),
        ("DDIM, η = 0", 8): Estimate(2.0, 0.1),
    }
    best = "DDIM, η = 1 (DDPM)"
    assert samplers.advice(distances, 4, lambda name, best: True) == [best]
    assert samplers.advice(distances, 4, lambda name, best: False) == [best, "DDIM, η = 0"]


def test_a_model_of_few_timesteps_has_no_advice_for_more_calls(study):
    measured = {
        "a": {("DDIM, η = 0", 8): Estimate(2.0, 0.1)},
        "b": {("DDIM, η = 0", 4): Estimate(3.0, 0.1)},
    }
    lines = samplers.calls_table(study, measured, {"a": {}, "b": {}}).splitlines()
    assert lines[2].startswith("| 4 | – | – | DDIM, η = 0 | 3.0")
    assert lines[3].endswith(" | – | – |")


def test_another_process_shares_the_work_and_writes_nothing(study):
    study.process = Process(torch.device("cpu"), world=2, rank=1)
    assert samplers.run(study) == {}
    assert len(study.rows) == 2 * 4 * (1 + 3) + 2 + 2 * (1 + 3)
    assert not list(study.out.iterdir())
