"""What does guidance gain, and what does it cost? Do labels help a network to sample in few steps?

A model trained with labels is asked for the digits 0, 1, ..., 9 in turn, at several guidance scales
(see `guided` in diffusion.py). Scale 1 is no guidance. The first row of each η is the same network
without a label. Agreement is the share of images that the classifier reads as the digit asked for.
± is the standard error.

The checkpoint is the one named after a checkpoint of the study: mnist-v-labels.pt beside
mnist-v.pt. A second table has the same network and its students (mnist-v-labels-4steps.pt, see
distill.py) in few steps of DDIM, at η = 0 and scale 1.

Writes both tables for each checkpoint; guidance.png; and guided-digits.png, the same noise at some
scales.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from lab.errors import UserError
from lab.pictures import new_figure, save_figure

from torch import Tensor

from experiments.common import Study
from experiments.estimates import Estimate, Results, estimate
from experiments.figures import draw_estimates, draw_panels, eta_colours
from experiments.grid import (
    NETWORK,
    STUDENTS,
    Subject,
    load_relatives,
    load_subjects,
    make_cells,
)
from experiments.tables import captioned, markdown_table, with_se

TITLE = "Guidance"
TABLES = ("guidance", "labelled-students")
FIGURES = {
    "guidance.png": "Fréchet distance, precision, recall and agreement against the scale",
    "guided-digits.png": "The same noise at several guidance scales",
}

STEPS = 20
SCALES = (1.0, 1.5, 2.0, 4.0, 8.0)
SHOWN = ("1", "2", "4", "8")  # in guided-digits.png
DIGITS = tuple(range(10))
MEASURES = {  # what a table calls them, and how it shows them
    "frechet": ("Fréchet distance", ".1f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "agreement": ("agreement", ".3f"),
}
NO_LABEL = "no label"
CODE = (*NETWORK, "experiments.grid:Subject", "diffusion:guided")  # of the model, see keys.py

Figures = dict[tuple[float, str], dict[str, Estimate]]  # by eta and row, then by measure


def run(study: Study) -> dict[str, str]:
    """Draw the figures and return the tables; nothing if there is no checkpoint with labels."""
    blocks, students, panels = {}, {}, {}
    for labelled in load_labelled(study):
        blocks[labelled.title] = measure(study, labelled, panels)
        students[labelled.title] = measure_students(study, labelled)
    if not study.process.is_first or not blocks:
        return {}
    draw_guidance(blocks, study.out / "guidance.png")
    draw_panels(panels, 2 * len(DIGITS), 6, 0.6, study.out / "guided-digits.png")
    tables = {
        "guidance": [captioned(title, guidance_table(f)) for title, f in blocks.items()],
        "labelled-students": [captioned(t, students_table(r)) for t, r in students.items() if r],
    }
    return {name: "\n\n".join(parts) for name, parts in tables.items() if parts}


def load_labelled(study: Study) -> list[Subject]:
    """Load the networks with labels that lie beside the checkpoints.

    Raises:
        UserError: as `load_subjects`; one of them was trained without labels.
    """
    paths = [s.folder / f"{Path(s.path).stem}-labels.pt" for s in study.subjects]
    loaded = load_subjects([path for path in paths if path.exists()], study.process.device)
    for one in loaded:
        if "classes" not in one.contents:
            raise UserError(f"{one.path} was trained without --labels: move it away")
    return loaded


def measure(study: Study, labelled: Subject, panels: dict[tuple[str, str], Tensor]) -> Figures:
    """Return the figures of a network with labels. All processes must call this.

    It adds the first images of the smallest eta to the panels, by row and column of a figure.
    """
    s = study.settings
    rows = {NO_LABEL: labelled} | {f"{scale:g}": asking(labelled, scale) for scale in SCALES}
    steps = [min(STEPS, labelled.num_train_timesteps)]
    cells = make_cells(rows.values(), steps, study.extremes, lambda _: s.n)
    results = study.measure(cells, list(rows.values()))
    if not study.process.is_first:
        return {}
    figures: Figures = {}
    for cell in cells:
        row = next(name for name, one in rows.items() if one.label == cell.model)
        figures[cell.eta, row] = {
            m: results.estimate(cell.model, cell.steps, cell.eta, m)
            for m in MEASURES
            if row != NO_LABEL or m != "agreement"
        }
        if cell.eta == study.extremes[0] and row in SHOWN:
            panels[f"scale {row}", labelled.label] = study.images_of(cell)[: 2 * len(DIGITS)]
    return figures


def measure_students(study: Study, labelled: Subject) -> dict[str, Results]:
    """Return the results of a network with labels and of its students, in few steps at η = 0.

    There are none if it has no students of these numbers of steps. All processes must call this.
    """
    s = study.settings
    calls = [k for k in s.calls if k <= labelled.num_train_timesteps]
    students = load_relatives(labelled, STUDENTS, study.process.device)
    families = {
        "the model": {k: asking(labelled, 1.0) for k in calls},
        "its students": {k: asking(one, 1.0) for k, one in students.items() if k in calls},
    }
    if not all(families.values()):
        return {}
    measured = {}
    for name, family in families.items():
        cells = [
            cell
            for k, one in family.items()
            for cell in make_cells([one], [k], [0.0], lambda _: s.n)  # all are compared
        ]
        measured[name] = study.measure(cells, list(family.values()))
    return measured


def asking(labelled: Subject, scale: float) -> Subject:
    """Return the network as it is asked for all digits in turn, with this guidance scale."""
    return replace(
        labelled,
        label=f"{labelled.label}, scale {scale:g}",
        sha256=hashlib.sha256(repr((labelled.sha256, DIGITS, scale)).encode()).hexdigest(),
        code=CODE,
        labels=DIGITS,
        guidance_scale=scale,
    )


def guidance_table(figures: Figures) -> str:
    """Return one row per scale and eta, one column per measure."""
    rows = []
    for (eta, row), measured in sorted(figures.items(), key=lambda item: item[0][0]):
        name = row if row == NO_LABEL else f"scale {row}"
        forms = {key: form for key, (_, form) in MEASURES.items()}
        texts = (with_se(measured[m], form) if m in measured else "–" for m, form in forms.items())
        rows.append([f"{name}, η = {eta:g}", *texts])
    return markdown_table(["", *(name for name, _ in MEASURES.values())], rows)


def students_table(measured: Mapping[str, Results]) -> str:
    """Return distance, recall and agreement: rows are families, columns are step counts."""
    steps = sorted({k for results in measured.values() for k in results.steps})
    rows = []
    for key, (family, results) in product(("frechet", "recall", "agreement"), measured.items()):
        name, form = MEASURES[key]
        texts = {row["steps"]: with_se(estimate([row], key), form) for row in results.rows}
        rows.append([f"{family}: {name}", *(texts.get(k, "–") for k in steps)])
    return markdown_table(["steps", *steps], rows)


def draw_guidance(blocks: Mapping[str, Figures], path: Path) -> None:
    """Draw every measure against the scale: a row per checkpoint, a line per eta."""
    figure, axes = new_figure(len(blocks), len(MEASURES), 3 * len(MEASURES), 2.9 * len(blocks))
    for row, (title, figures) in zip(axes, blocks.items(), strict=True):
        etas = sorted({eta for eta, _ in figures})
        for ax, (key, (name, _)) in zip(row, MEASURES.items(), strict=True):
            for eta, colour in eta_colours(etas).items():
                estimates = [figures[eta, f"{scale:g}"][key] for scale in SCALES]
                draw_estimates(ax, SCALES, estimates, colour, f"η = {eta:g}")
            ax.set(xlabel="guidance scale", title=name)
            ax.grid(alpha=0.3)
        row[0].set_ylabel(title, fontsize=8)
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
