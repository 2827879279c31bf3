"""Which sampler is best at equal network calls?

A step of any sampler calls the network once, so samplers are compared at equal numbers of steps.
Every checkpoint samples with DDPM, and with DDIM and DPM-Solver++(2M) at η = 0 and 1, at those
numbers of steps of the study that lie between 2 and 50. The cells of DDIM are those of the grid.
The best of each column is bold; ± is a 95 % interval for a run with another seed.

Some rows must agree up to rounding. DDPM with the variance β̃ is DDIM at η = 1. DPM-Solver++ takes
its first and its last step as DDIM does, so at 2 steps it is DDIM.

Writes a table of Fréchet distances per checkpoint and samplers.png.
"""

from collections.abc import Mapping
from pathlib import Path

from lab.pictures import new_figure, save_figure

from experiments.common import Study
from experiments.estimates import Results
from experiments.figures import draw_estimates, eta_colours
from experiments.grid import make_cells
from experiments.tables import best_in_bold, captioned, markdown_table

TITLE = "Which sampler?"
TABLES = ("samplers",)
FIGURES = {"samplers.png": "Fréchet distance against the number of steps, one line per sampler"}

STEPS = range(2, 51)  # after one step no sampler has done anything of its own
LINES = {  # the sampler and the eta of each line
    "DDIM, η = 0": ("ddim", 0.0),
    "DDIM, η = 1": ("ddim", 1.0),
    "DDPM": ("ddpm", None),
    "DPM-Solver++, η = 0": ("dpm++", 0.0),
    "DPM-Solver++, η = 1": ("dpm++", 1.0),
}
FORMATS = {"ddim": "o-", "ddpm": "x:", "dpm++": "s--"}  # of the lines of the figure


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the table."""
    s = study.settings
    steps = [number for number in s.steps if number in STEPS]
    if not steps:
        return {}
    results = {}
    for name, (sampler, eta) in LINES.items():
        cells = make_cells(study.subjects, steps, [eta], s.images, s.repetitions, sampler)
        results[name] = study.measure(cells, study.subjects)
    if not study.process.is_first:
        return {}
    draw_samplers(results, study.reference(s.n), study.out / "samplers.png")
    return tables(results)


def tables(results: Mapping[str, Results]) -> dict[str, str]:
    """Return a table for each model.

    Args:
        results: for each of LINES its rows. The models and the steps are those of the first.
    """
    first = next(iter(results.values()))
    blocks = [captioned(first.title(m), samplers_table(results, m)) for m in first.symbols]
    return {"samplers": "\n\n".join(blocks)}


def samplers_table(results: Mapping[str, Results], label: str) -> str:
    """Return the Fréchet distances of a model: one row per sampler, one column per step count."""
    first = next(iter(results.values()))
    columns = []
    for steps in first.steps:
        column = [results[name].estimate(label, steps, eta) for name, (_, eta) in LINES.items()]
        size = f"*{first.images(steps):,} × {column[0].runs}*"
        columns.append([size, *best_in_bold(column)])
    names = ["*n × seeds*", *LINES]
    return markdown_table(["steps", *first.steps], zip(names, *columns, strict=True))


def draw_samplers(results: Mapping[str, Results], reference: dict, path: Path) -> None:
    """Draw the Fréchet distance against steps: a panel for each model, a line for each sampler."""
    first = next(iter(results.values()))
    figure, axes = new_figure(1, len(first.symbols), 4.6 * len(first.symbols), 3.8)
    colours = eta_colours((0.0, 1.0)) | {None: "black"}
    for ax, label in zip(axes[0], first.symbols, strict=True):
        for name, (sampler, eta) in LINES.items():
            estimates = [results[name].estimate(label, steps, eta) for steps in first.steps]
            draw_estimates(ax, first.steps, estimates, colours[eta], name, FORMATS[sampler])
        ax.axhline(reference["frechet"], color="grey", ls="--", lw=1, label="real images")
        ax.set(xscale="log", yscale="log", xlabel="steps", title=first.title(label))
        ax.set_xticks(first.steps, first.steps)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3, which="both")
    low, high = (f(ax.get_ylim()[i] for ax in axes[0]) for i, f in enumerate((min, max)))
    for ax in axes[0]:
        ax.set_ylim(low, high)
    axes[0, 0].set_ylabel("Fréchet distance (LeNet features)")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
