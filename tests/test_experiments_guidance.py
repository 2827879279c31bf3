"""experiments/guidance.py, by fake rows and by images of known digits."""

import re
from dataclasses import replace

from lab.distributed import Process
from lab.errors import UserError

import pytest
import torch

from diffusion import guided
from experiments import grid, guidance
from experiments.common import Settings, Study
from experiments.estimates import Results
from experiments.grid import Cell, Subject, make_cells

ALONE = Process(torch.device("cpu"))
CONFIG = {"scheduler": {"prediction_type": "v_prediction"}}
SETTINGS = Settings((1, 50), (4,), (0.0, 1.0), 100, 100, 1, 0, 100, "data", None)
CONTENTS = CONFIG | {"classes": [str(digit) for digit in range(10)]}
LABELLED = Subject("net-labels", "net-labels.pt", "1" * 64, None, CONTENTS)


class FakeStudy(Study):
    """A study whose precision is a tenth of the scale."""

    def measure(self, cells, subjects):
        self.rows |= dict.fromkeys(cells)
        scales = {s.label: s.guidance_scale if s.labels else 0 for s in subjects}
        rows = [vars(cell) | {"prediction": "v"} for cell in cells]
        for row in rows:
            row |= {"frechet": 5.0 + row["eta"], "frechet_se": 0.5, "recall": 0.5, "recall_se": 0}
            row |= {"precision": scales[row["model"]] / 10, "precision_se": 0.01}
            if scales[row["model"]]:
                row |= {"agreement": 0.9, "agreement_se": 0.01}
        return Results(rows if self.process.is_first else [])

    def images_of(self, cell: Cell):
        return torch.zeros(100, 1, 28, 28, dtype=torch.uint8)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Beside net.pt lies net-labels.pt; nothing lies beside other.pt."""
    (tmp_path / "net-labels.pt").touch()
    monkeypatch.setattr(guidance, "load_subjects", lambda paths, device: [LABELLED] * len(paths))
    subjects = [
        Subject(label, f"{label}.pt", "0" * 64, None, CONFIG, folder=tmp_path)
        for label in ("net", "other")
    ]
    settings = replace(SETTINGS, out=tmp_path / "out")
    settings.out.mkdir()
    return FakeStudy(settings, ALONE, subjects, "python study.py")


def test_the_table_has_a_row_per_scale_and_eta(study):
    lines = guidance.run(study)["guidance"].splitlines()
    assert lines[0] == "**v-prediction (net-labels)**"
    assert lines[2] == "|  | Fréchet distance | precision | recall | agreement |"
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        *("| no label, η = 0", *(f"| scale {s}, η = 0" for s in ("1", "1.5", "2", "4", "8"))),
        *("| no label, η = 1", *(f"| scale {s}, η = 1" for s in ("1", "1.5", "2", "4", "8"))),
    ]
    assert lines[4].endswith("| 5.0 ± 0.5 | 0.000 ± 0.010 | 0.500 ± 0.000 | – |")
    assert lines[-1].endswith("| 6.0 ± 0.5 | 0.800 ± 0.010 | 0.500 ± 0.000 | 0.900 ± 0.010 |")
    assert (study.out / "guidance.png").stat().st_size > 5000
    assert (study.out / "guided-digits.png").stat().st_size > 5000
    assert len({cell.sha256 for cell in study.rows}) == 6 == len({c.model for c in study.rows})


def test_the_students_stand_below_their_teacher(study, monkeypatch):
    students = {k: replace(LABELLED, label=f"net-labels-{k}steps") for k in (4, 16)}
    monkeypatch.setattr(guidance, "load_relatives", lambda *_: students)
    study.settings = replace(study.settings, calls=(1, 4))
    assert guidance.run(study)["labelled-students"].splitlines() == [
        "**v-prediction (net-labels)**",
        "",
        "| steps | 1 | 4 |",
        "| --- | ---: | ---: |",
        "| the model: Fréchet distance | 5.0 ± 0.5 | 5.0 ± 0.5 |",
        "| its students: Fréchet distance | – | 5.0 ± 0.5 |",
        "| the model: recall | 0.500 ± 0.000 | 0.500 ± 0.000 |",
        "| its students: recall | – | 0.500 ± 0.000 |",
        "| the model: agreement | 0.900 ± 0.010 | 0.900 ± 0.010 |",
        "| its students: agreement | – | 0.900 ± 0.010 |",
    ]
    names = {cell.model for cell in study.rows if cell.steps in (1, 4)}
    assert names == {"net-labels, scale 1", "net-labels-4steps, scale 1"}


def test_without_students_there_is_no_table_of_them(study, monkeypatch):
    monkeypatch.setattr(guidance, "load_relatives", lambda *_: {})
    assert guidance.run(study).keys() == {"guidance"}
    monkeypatch.setattr(guidance, "load_relatives", lambda *_: {1: LABELLED})  # not among calls
    assert guidance.run(study).keys() == {"guidance"}
    assert {cell.steps for cell in study.rows} == {20}


def test_without_a_checkpoint_with_labels_there_is_no_table(study):
    study.subjects = study.subjects[1:]
    assert guidance.run(study) == {} == study.rows


def test_a_network_that_knows_no_labels_is_refused(study, monkeypatch):
    unlabelled = replace(LABELLED, contents=CONFIG)
    monkeypatch.setattr(guidance, "load_subjects", lambda paths, device: [unlabelled] * len(paths))
    with pytest.raises(UserError, match="net-labels.pt was trained without --labels"):
        guidance.run(study)


def test_a_guided_cell_is_the_sample_of_the_guided_model():
    """Image i asks for digit i % 10, whatever the batch that it is in."""

    def network(x, t, labels):
        return 0.01 * x * (labels.view(-1, 1, 1, 1) + 1)

    network.config = {"num_classes": 10}
    config = {"beta_schedule": "cosine", "prediction_type": "epsilon"}
    subject = replace(LABELLED, model=network, contents={"scheduler": config})
    asking = guidance.asking(subject, 2.0)
    (cell,) = make_cells([asking], [3], [0.0], lambda _: 13)
    images, _ = grid.sample_cell(cell, asking, ALONE, batch_size=5)
    indices = torch.arange(13)
    scheduler = asking.scheduler()
    scheduler.set_timesteps(3)
    model = guided(network, indices % 10, 2.0)
    x = guidance_sample(model, scheduler, indices)
    assert torch.equal(images, grid.to_uint8(x))
    other = guided(network, indices % 10, 1.0)
    assert not torch.equal(images, grid.to_uint8(guidance_sample(other, scheduler, indices)))


def guidance_sample(model, scheduler, indices):
    return grid.sample(model, scheduler, indices, grid.SHAPE, seed=0, eta=0.0)


def test_the_row_of_a_cell_knows_how_many_digits_are_those_asked_for(monkeypatch, tmp_path):
    """Images and scores are kept apart, so a row that is scored again must know what was asked."""
    seen = []

    def score(images, asked, data_dir):
        seen.append(asked)
        return {} if asked is None else {"agreement": 0.5}

    monkeypatch.setattr(grid.metrics, "score", score)
    asking = guidance.asking(LABELLED, 2.0)
    images = torch.zeros(12, 1, 28, 28, dtype=torch.uint8)
    (cell,), (plain,) = (make_cells([s], [3], [0.0], lambda _: 12) for s in (asking, LABELLED))
    monkeypatch.setattr(grid, "read_images", lambda *_: images)
    grid.keep(tmp_path, cell, asking, images, {"images_key": "1"}, "data")
    grid.keep(tmp_path, plain, LABELLED, images, {"images_key": "1"}, "data")
    monkeypatch.setattr(grid, "metrics_key", lambda: "another")
    assert grid.read_row(tmp_path, cell, asking, "data")["agreement"] == 0.5
    assert "agreement" not in grid.read_row(tmp_path, plain, LABELLED, "data")
    assert [None if asked is None else asked.tolist() for asked in seen] == 2 * [
        [*range(10), 0, 1],
        None,
    ]


# ----------------------------------------------------------- checkpoints beside a checkpoint


def test_relatives_are_named_after_the_checkpoint(tmp_path, monkeypatch):
    for name in ("a", "a-8steps", "a-1step", "a-16steps.1", "a-step100", "ab-4steps", "b-2steps"):
        (tmp_path / f"{name}.pt").touch()
    asked = []

    def load(paths, device, are_students):
        asked.append(are_students)
        steps = [int(re.search(r"-(?:step)?(\d+)", path.stem)[1]) for path in paths]
        contents = [{"timesteps": [*range(n)]} for n in steps]
        return [
            replace(LABELLED, path=p.name, contents=c) for p, c in zip(paths, contents, strict=True)
        ]

    monkeypatch.setattr(grid, "check_relative", lambda relative, subject: None)
    monkeypatch.setattr(grid, "load_subjects", load)
    subject = Subject("a", "a.pt", "0" * 64, None, CONFIG, folder=tmp_path)
    students = grid.load_relatives(subject, grid.STUDENTS, ALONE.device)
    assert {k: s.path for k, s in students.items()} == {1: "a-1step.pt", 8: "a-8steps.pt"}
    assert list(students) == [1, 8]
    snapshots = grid.load_relatives(subject, grid.SNAPSHOTS, ALONE.device)
    assert {k: s.path for k, s in snapshots.items()} == {100: "a-step100.pt"}
    assert asked == [True, False]
    (tmp_path / "a-8step.pt").touch()
    with pytest.raises(UserError, match="have one number"):
        grid.load_relatives(subject, grid.STUDENTS, ALONE.device)


def test_a_student_whose_name_says_another_number_of_steps_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a-5steps.pt").touch()
    monkeypatch.setattr(grid, "check_relative", lambda relative, subject: None)
    student = replace(LABELLED, path="a-5steps.pt", contents={"timesteps": [7, 3]})
    monkeypatch.setattr(grid, "load_subjects", lambda *args, **options: [student])
    subject = Subject("a", "a.pt", "0" * 64, None, CONFIG, folder=tmp_path)
    with pytest.raises(UserError, match="a-5steps.pt is a student of 2 steps"):
        grid.load_relatives(subject, grid.STUDENTS, ALONE.device)


def test_relatives_that_belong_to_another_checkpoint_are_refused():
    """As after a new training, where the students and snapshots are still those of the old one."""
    mine = {"run": "1", "args": {"seed": 0, "steps": None, "minutes": 4.3}}
    subject = replace(LABELLED, contents=CONFIG | {"training": mine})
    student = {"timesteps": [7, 3], "teacher": mine, "training": {"run": "9", "args": {}}}
    snapshot = {"training": mine | {"run": "2"}}  # the same command, run again
    shorter = {"training": {"run": "1", "args": {"seed": 0, "steps": 9}}}  # then resumed for longer
    for contents in (student, snapshot, shorter):
        grid.check_relative(replace(LABELLED, contents=contents), subject)
    for contents in (
        student | {"teacher": mine | {"run": "2"}},
        {"training": {"run": "2", "args": {"seed": 1}}},
        {"training": {"run": "2", "args": "seed 0"}},
        {"timesteps": [7, 3], "training": mine},  # it does not say whose student it is
        {},
    ):
        with pytest.raises(UserError, match="move it away"):
            grid.check_relative(replace(LABELLED, contents=contents), subject)


def test_a_student_is_sampled_at_its_own_timesteps():
    seen = []

    def network(x, t):
        seen.append(int(t))
        return 0.1 * x

    config = {"beta_schedule": "cosine", "prediction_type": "epsilon"}
    student = replace(LABELLED, model=network, contents={"scheduler": config, "timesteps": [7, 3]})
    (cell,) = make_cells([student], [2], [0.0], lambda _: 4)
    grid.sample_cell(cell, student, ALONE, batch_size=4)
    assert seen == [7, 3]


def test_students_are_refused_where_they_are_not_wanted(monkeypatch, tmp_path):
    path = tmp_path / "s-2steps.pt"
    path.touch()
    contents = {"image_shape": (1, 28, 28), "timesteps": [7, 3], "training": {"images": 8}}
    monkeypatch.setattr(grid, "load_model", lambda path, device: (None, contents))
    with pytest.raises(UserError, match="student"):
        grid.load_subjects([path], ALONE.device)
    (student,) = grid.load_subjects([path], ALONE.device, are_students=True)
    assert student.label == "s-2steps" and student.folder == tmp_path
