"""Does noise in the sampling steps help or harm: is η = 0 or η = 1 better?

For each checkpoint the smallest η of the grid meets the largest one, at every number of steps. Then
the ratio of the two Fréchet distances is compared with the ratio of the FIDs in table 1 of the DDIM
paper (Song et al. 2021, CIFAR-10). Above 1, noise harms. The distance of as many real images is
taken from ours first: it would pull the ratio towards 1. A distance that is less than two standard
errors above it has no ratio.

Is a middle η better than both ends? The third table has the change of the Fréchet distance when it
takes the place of the smallest or of the largest η, with the same seeds and so from the same noise.

Two more variances of the noise have the mean of η = 1 (see variances.py): σ̂² = β, the last row of
that table 1, and σ*², the optimal variance of Analytic-DPM (Bao et al. 2022). They are compared
with every η of the grid from 5 to 50 steps, with one seed. The figure has the η that they amount to
at each timestep, η* = σ*² / β̃ and β / β̃.

Writes tables of the duels, the ratios, the changes and the variances, and eta-star.png.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from lab.data import load_dataset
from lab.distributed import Process
from lab.pictures import new_figure, save_figure

import torch
from torch import Tensor

from experiments.common import Study
from experiments.duels import duel_table
from experiments.estimates import Results, excess, quotient
from experiments.grid import Subject, by_setting, make_cells
from experiments.tables import best_in_bold, captioned, markdown_table, size_of, with_se
from experiments.variances import IMAGES, OptimalVariance

TITLE = "Which η?"
TABLES = ("eta-duels", "eta-ratios", "eta-changes", "eta-variances")
FIGURES = {"eta-star.png": "The optimal η at each timestep"}

VARIANCES = {"σ̂": "ddpm-large", "σ*": "ddpm-optimal"}  # the names of rows, and their samplers
FEWEST, MOST = 5, 50  # steps with these variances

# Song et al. 2021, table 1: FID on CIFAR-10 at their eta = 0 and 1, which are also this lab's.
PAPER = {
    10: (13.36, 41.07),
    20: (6.84, 18.36),
    50: (4.67, 8.01),
    100: (4.16, 5.78),
    1000: (4.04, 4.73),
}


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the tables."""
    results = study.grid()
    variances = measure_variances(study)
    low, high = study.extremes[0], study.extremes[-1]
    if not study.process.is_first:
        return {}
    tables = {"eta-variances": variances_tables(results, variances)} if variances else {}
    if low < high:
        tables["eta-duels"] = duels_table(results, low, high)
    if len(results.etas) > 2 and results.steps[-1] > 1:
        tables["eta-changes"] = changes_tables(study, results)
    if (low, high) == (0, 1) and PAPER.keys() & set(results.steps):
        real = {steps: study.reference(results.images(steps))["frechet"] for steps in results.steps}
        tables["eta-ratios"] = ratios_table(results, real)
    return tables


def duels_table(results: Results, low: float, high: float) -> str:
    """Return the duel of two etas for each model."""
    return "\n\n".join(
        captioned(results.title(label), duel_table(results, (label, low), (label, high)))
        for label in results.symbols
    )


def ratios_table(results: Results, real: Mapping[int, float]) -> str:
    """Return the distance at eta = 1 over that at eta = 0, above real images, ± standard error.

    Args:
        real: the distance of as many real images as a cell of this many steps has.
    """
    common = [steps for steps in PAPER if steps in results.steps]
    rows = [["the paper, FID", *(f"{b / a:.2f}" for a, b in (PAPER[s] for s in common))]]
    for label, name in results.names.items():
        ratios = [
            quotient(*(excess(results.estimate(label, steps, e), real[steps]) for e in (1.0, 0.0)))
            for steps in common
        ]
        rows.append([f"{name} here, Fréchet", *(with_se(r, ".2f") for r in ratios)])
    return markdown_table(["steps", *common], rows)


def changes_tables(study: Study, results: Results) -> str:
    """Return for each model the change of the distance when a middle eta replaces an end, ± SE."""
    low, *middle, high = results.etas
    pairs = list(product(middle, (low, high)))
    cells = by_setting(study.grid_cells)

    def row_of(label: str, steps: int) -> list[object]:
        changes = (study.change(*(cells[label, steps, e] for e in (b, a))) for a, b in pairs)
        return [steps, *(with_se(change, "+.1f") for change in changes)]

    head = ["steps", *(f"η = {a:g} instead of {b:g}" for a, b in pairs)]
    steps = [n for n in results.steps if n > 1]  # the last step adds no noise
    return "\n\n".join(
        captioned(results.title(label), markdown_table(head, [row_of(label, n) for n in steps]))
        for label in results.symbols
    )


# ------------------------------------------------------------------------------ other variances


def measure_variances(study: Study) -> dict[str, Results]:
    """Sample with the large and with the optimal variance, and draw the figure.

    Returns:
        The results of each of VARIANCES; an empty dictionary if no cell has FEWEST to MOST steps.
    """
    s, process = study.settings, study.process
    steps = [n for n in s.steps if FEWEST <= n <= MOST]
    if not steps:
        return {}
    images = load_dataset("mnist", "train", s.data_dir)[0][: s.n].to(process.device)
    measured_by = "experiments.eta:with_x0_errors"  # the errors decide the images of σ*
    informed = [replace(one, code=(*one.code, measured_by)) for one in study.subjects]
    number = min(len(images), IMAGES)
    results, calls = {}, {one.label: number * len(visited(one, steps)) for one in informed}
    if study.begins({f"{label}, errors of x_0": number for label, number in calls.items()}):
        study.bar.set_description("errors of x_0")
        informed = [with_x0_errors(one, images, steps, process) for one in informed]
        study.bar.update(sum(calls.values()))
    for name, subjects in (("σ̂", study.subjects), ("σ*", informed)):
        cells = make_cells(subjects, steps, [None], s.images, sampler=VARIANCES[name])
        results[name] = study.measure(cells, subjects)
    if process.is_first:
        draw_eta_star(informed, steps, study.out / "eta-star.png")
    return results


def with_x0_errors(
    subject: Subject, images: Tensor, steps: Sequence[int], process: Process
) -> Subject:
    """Return a subject whose config is that of `OptimalVariance`, for these numbers of steps.

    Every process measures the errors at its share of the timesteps.

    Args:
        images: (N, 1, 28, 28) uint8, on the device of the process. The first IMAGES are used.
    """
    scheduler, timesteps = subject.scheduler(), visited(subject, steps)
    errors = torch.zeros(len(timesteps), dtype=torch.float64)
    for i in process.share(len(timesteps)):
        t = timesteps[i]
        errors[i] = OptimalVariance.x0_error(subject.model, scheduler, images[:IMAGES], t)
    process.sum(errors)  # the errors of other processes are 0
    x0_errors = dict(zip(timesteps, errors.tolist(), strict=True))
    config = subject.contents["scheduler"] | {"x0_errors": x0_errors}
    return replace(subject, contents=subject.contents | {"scheduler": config})


def visited(subject: Subject, steps: Sequence[int]) -> list[int]:
    """Return the timesteps that a sampling in any of these numbers of steps visits, ascending."""
    scheduler, timesteps = subject.scheduler(), set()
    for n in steps:
        scheduler.set_timesteps(n)
        timesteps |= set(scheduler.timesteps.tolist())
    return sorted(timesteps)


def variances_tables(grid: Results, variances: Mapping[str, Results]) -> str:
    """Return Fréchet distance and KID of each model."""
    return "\n\n".join(
        captioned(f"{name}, {grid.title(label)}", variances_table(grid, variances, label, key))
        for key, name in (("frechet", "Fréchet distance"), ("kid", "KID"))
        for label in grid.symbols
    )


def variances_table(grid: Results, variances: Mapping[str, Results], label: str, key: str) -> str:
    """Return a measure of a model: one row per eta and variance, one column per step count."""
    columns, all_steps = [], variances["σ̂"].steps
    for steps in all_steps:
        column = [grid.estimate(label, steps, eta, key) for eta in grid.etas]
        size = size_of(grid.images(steps), column)
        column += [results.estimate(label, steps, None, key) for results in variances.values()]
        columns.append([size, *best_in_bold(column)])
    names = [
        "*n × seeds*",
        *(f"η = {eta:g}" for eta in grid.etas),
        *(f"{v}, 1 seed" for v in variances),
    ]
    return markdown_table(["steps", *all_steps], zip(names, *columns, strict=True))


def draw_eta_star(subjects: Sequence[Subject], steps: Sequence[int], path: Path) -> None:
    """Draw the eta of the optimal and of the large variance against t, one line per step count.

    Args:
        subjects: as returned by `with_x0_errors`.
    """
    figure, axes = new_figure(1, len(subjects), 4.6 * len(subjects), 3.8)
    ticks = (1, 1.2, 1.5, 2, 3, 4)
    for ax, subject in zip(axes[0], subjects, strict=True):
        scheduler = OptimalVariance(**subject.contents["scheduler"])
        for i, n in enumerate(steps):
            scheduler.set_timesteps(n)
            t = scheduler.timesteps.tolist()[:-1]  # the last step adds no noise
            small, optimal, large = zip(*map(scheduler.variances, t), strict=True)
            for variance, style, name in ((optimal, "o-", f"{n} steps"), (large, ":", None)):
                eta = [a / b for a, b in zip(variance, small, strict=True)]
                ax.plot(t, eta, style, ms=3, lw=1.2, color=f"C{i}", label=name)
        ax.axhline(1, color="grey", ls="--", lw=1)
        ax.plot([], [], ":", color="grey", label="σ̂")
        ax.set(yscale="log", xlabel="t", title=subject.title)
        ax.set_yticks(ticks, ticks)
        ax.set_yticks([], minor=True)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("η = variance of the noise / β̃")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
