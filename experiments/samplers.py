"""With k network calls, which sampler is best?

A step of any sampler calls the network once, so samplers are compared at equal numbers of steps.
Every checkpoint samples with DDIM, whose η = 1 is DDPM, and with DPM-Solver++(2M). Its students
(see distill.py) are beside them where they lie beside the checkpoint: they sample with DDIM, at
η = 0 and with a little noise between the steps, η = 0.3. The exact denoiser (see denoiser.py) shows
what DDIM reaches without the error of a network. ± is a 95 % interval for a run with another seed.

Some rows must agree up to rounding. DPM-Solver++ takes its first and its last step as DDIM does, so
at 1 and 2 steps it is DDIM. The last step adds no noise, so at 1 step η makes no difference.

All rows start from the same noise, so the errors of two rows have much in common. "Not
significantly worse" is z < 2 for the change of the distance, which leaves that out. The best of
several rows is a little lucky.

Writes a table of Fréchet distances per checkpoint, with the best of each column in bold; a table of
the best sampler at each number of calls; one of the changes from DDIM to DPM-Solver++;
samplers.png; and students.png, the same noise with the checkpoint and with its students.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from lab.data import load_dataset
from lab.pictures import new_figure, save_figure

from torch import Tensor

from experiments.common import Study
from experiments.denoiser import exact_subject
from experiments.estimates import Estimate, z_score
from experiments.figures import draw_estimates, draw_panels, draw_reference, eta_colours
from experiments.grid import STUDENTS, Cell, Subject, load_relatives, make_cells
from experiments.tables import best_in_bold, captioned, markdown_table, with_margin, with_se

TITLE = "Which sampler, with k network calls?"
TABLES = ("samplers", "calls", "sampler-changes")
FIGURES = {
    "samplers.png": "Fréchet distance against the number of steps, one line per sampler",
    "students.png": "The same noise, by each checkpoint and by its students",
}
SHOWN = 10  # images of a panel of students.png


@dataclass(frozen=True)
class Line:
    """A row of the table and a line of the figure."""

    who: str  # "network", "students" or "exact"
    sampler: str
    eta: float
    form: str  # of the line in the figure


LINES = {
    "DDIM, η = 0": Line("network", "ddim", 0.0, "o-"),
    "DDIM, η = 1 (DDPM)": Line("network", "ddim", 1.0, "o-"),
    "DPM-Solver++, η = 0": Line("network", "dpm++", 0.0, "s--"),
    "DPM-Solver++, η = 1": Line("network", "dpm++", 1.0, "s--"),
    "students, η = 0": Line("students", "ddim", 0.0, "*-"),
    "students, η = 0.3": Line("students", "ddim", 0.3, "*-"),
    "exact denoiser, η = 0": Line("exact", "ddim", 0.0, "-"),
    "exact denoiser, η = 1": Line("exact", "ddim", 1.0, "--"),
}

CHANGES = (  # the second line is compared with the first
    ("DDIM, η = 0", "DPM-Solver++, η = 0"),
    ("DDIM, η = 1 (DDPM)", "DPM-Solver++, η = 1"),
)

# of one checkpoint, by line and number of calls
Distances = dict[tuple[str, int], Estimate]
Cells = dict[tuple[str, int], list[Cell]]  # one per seed


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the tables."""
    s = study.settings
    device = study.process.device
    images = load_dataset("mnist", "train", s.data_dir)[0].to(device)
    students = {one.label: load_relatives(one, STUDENTS, device) for one in study.subjects}
    measured, cells = {}, {}
    for one in study.subjects:
        measured[one.label], cells[one.label] = measure(study, one, students[one.label], images)
    if not study.process.is_first:
        return {}
    if panels := students_panels(study, students):
        draw_panels(panels, SHOWN, 4, 0.6, study.out / "students.png")
    draw_samplers(measured, study.titles, study.reference(s.n), study.out / "samplers.png")
    blocks = [captioned(study.titles[label], samplers_table(d)) for label, d in measured.items()]
    tables = {"samplers": "\n\n".join(blocks), "calls": calls_table(study, measured, cells)}
    if max(s.calls) > 2:
        tables["sampler-changes"] = changes_table(study, cells)
    return tables


def measure(
    study: Study, subject: Subject, students: Mapping[int, Subject], images: Tensor
) -> tuple[Distances, Cells]:
    """Return the Fréchet distances of one checkpoint and their cells. All processes call this.

    Args:
        students: of this checkpoint, by their number of steps.
        images: the training images, which the exact denoiser knows.
    """
    s = study.settings
    calls = [k for k in s.calls if k <= subject.num_train_timesteps]
    families = {
        "network": dict.fromkeys(calls, subject),
        "students": students,
        "exact": dict.fromkeys(calls, exact_subject(images, subject)),
    }
    distances, cells = {}, {}
    for name, line in LINES.items():
        family = {k: one for k, one in families[line.who].items() if k in calls}
        found = {k: cells_of(study, one, k, line) for k, one in family.items()}
        results = study.measure([c for row in found.values() for c in row], list(family.values()))
        cells |= {(name, k): row for k, row in found.items()}
        if study.process.is_first:
            for k, one in family.items():
                distances[name, k] = results.estimate(one.label, k, line.eta)
    return distances, cells


def cells_of(study: Study, subject: Subject, k: int, line: Line) -> list[Cell]:
    """Return the cells of a line at k calls: one per seed, all with n images, to be compared."""
    s = study.settings
    return make_cells([subject], [k], [line.eta], lambda _: s.n, s.repetitions, line.sampler)


def samplers_table(distances: Distances) -> str:
    """Return one row per line and one column per number of calls.

    The exact denoiser is no sampler that one can use for new images, so it is never bold.
    """
    calls = sorted({k for _, k in distances})
    lines = [name for name in LINES if any((name, k) in distances for k in calls)]
    columns = []
    for k in calls:
        usable = [name for name in lines if (name, k) in distances and LINES[name].who != "exact"]
        bold = best_in_bold([distances[name, k] for name in usable])
        texts = {name: with_margin(distances[name, k]) for name in lines if (name, k) in distances}
        texts |= dict(zip(usable, bold, strict=True))
        columns.append([texts.get(name, "–") for name in lines])
    return markdown_table(["network calls", *calls], zip(lines, *columns, strict=True))


def calls_table(study: Study, measured: Mapping[str, Distances], cells: Mapping[str, Cells]) -> str:
    """Return what to use with k calls: one row per k, and two columns per checkpoint."""
    head = ["network calls"]
    for label in measured:
        head += [f"{study.names[label]}: use", "Fréchet distance"]
    rows = []
    for k in sorted({k for distances in measured.values() for _, k in distances}):
        row = [k]
        for label, distances in measured.items():
            best = advice(distances, k, partial(is_worse, study, cells[label], k))
            row += [", or ".join(best), with_margin(distances[best[0], k])] if best else ["–", "–"]
        rows.append(row)
    return markdown_table(head, rows)


def changes_table(study: Study, cells: Mapping[str, Cells]) -> str:
    """Return the change of the distance from DDIM to DPM-Solver++, from the same noise, ± SE.

    There is a row for each model and eta. With 1 and 2 calls the two are one sampler.
    """
    calls, rows = [k for k in study.settings.calls if k > 2], []
    for (label, found), names in product(cells.items(), CHANGES):
        pairs = [[found.get((name, k)) for name in names] for k in calls]
        changes = [with_se(study.change(*pair), "+.1f") if all(pair) else "–" for pair in pairs]
        rows.append([f"{study.names[label]}, η = {LINES[names[0]].eta:g}", *changes])
    return markdown_table(["network calls", *calls], rows)


def is_worse(study: Study, cells: Cells, k: int, name: str, best: str) -> bool:
    """Return whether a line is significantly worse than the best one at k calls."""
    return z_score(study.change(cells[best, k], cells[name, k]), Estimate(0.0, 0.0)) >= 2


def advice(distances: Distances, k: int, is_worse: Callable[[str, str], bool]) -> list[str]:
    """Return the best line at k calls, and after it those that are not worse.

    A line that agrees with an earlier one up to rounding is the same sampler, and is left out.
    """
    usable: dict[str, Estimate] = {}
    for name, line in LINES.items():
        e = distances.get((name, k))
        if e is None or line.who == "exact":
            continue
        if not any(math.isclose(e.mean, other.mean, rel_tol=1e-4) for other in usable.values()):
            usable[name] = e
    if not usable:  # k is more than the model has timesteps
        return []
    best, *others = sorted(usable, key=lambda name: usable[name].mean)
    return [best, *(name for name in others if not is_worse(name, best))]


def students_panels(
    study: Study, students: Mapping[str, Mapping[int, Subject]]
) -> dict[tuple[str, str], Tensor]:
    """Return the first images, without noise in the steps, of checkpoints and of their students.

    They are by row and column of the figure. Equal numbers of steps are in one row.

    Args:
        students: of each checkpoint's label, by their number of steps.
    """
    s, panels = study.settings, {}
    calls = sorted({k for found in students.values() for k in found if k in s.calls})
    teachers = [subject for subject in study.subjects if students[subject.label]]
    for subject, k in product(teachers, calls):
        name, row = study.names[subject.label], "1 step" if k == 1 else f"{k} steps"
        shown = {name: subject} if k <= subject.num_train_timesteps else {}
        if k in students[subject.label]:
            shown[f"{name}, students"] = students[subject.label][k]
        for column, one in shown.items():
            cell = make_cells([one], [k], [0.0], lambda _: s.n)[0]
            panels[row, column] = study.images_of(cell)[:SHOWN]
    return panels


def draw_samplers(
    measured: Mapping[str, Distances], titles: Mapping[str, str], reference: dict, path: Path
) -> None:
    """Draw the Fréchet distance against steps: a panel for each model, a line for each sampler."""
    figure, axes = new_figure(1, len(measured), 4.6 * len(measured), 4.2)
    colours = eta_colours(sorted({line.eta for line in LINES.values()}))
    for ax, (label, distances) in zip(axes[0], measured.items(), strict=True):
        for name, line in LINES.items():
            calls = sorted(k for n, k in distances if n == name)
            if calls:
                colour = "black" if line.who == "exact" else colours[line.eta]
                estimates = [distances[name, k] for k in calls]
                draw_estimates(ax, calls, estimates, colour, name, line.form)
        draw_reference(ax, reference)
        every = sorted({k for _, k in distances})
        ax.set(xscale="log", yscale="log", xlabel="network calls", title=titles[label])
        ax.set_xticks(every, every)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3, which="both")
    low, high = (f(ax.get_ylim()[i] for ax in axes[0]) for i, f in enumerate((min, max)))
    for ax in axes[0]:
        ax.set_ylim(low, high)
    axes[0, 0].set_ylabel("Fréchet distance (LeNet features)")
    drawn = {}  # the lines of all panels: only some models have students
    for ax in axes[0]:
        drawn |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    names = [name for name in (*LINES, "real images") if name in drawn]
    axes[0, -1].legend([drawn[name] for name in names], names, fontsize=7)
    save_figure(figure, path)
