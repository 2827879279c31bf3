"""How does the quality of the samples depend on the number of steps and on η?

Every checkpoint samples with DDIM at every number of steps and every η of the grid. The tables have
the form of table 1 of the DDIM paper (Song et al. 2021, arXiv:2010.02502): one row per η, one
column per number of steps, the best of each column in bold. ± is a 95 % interval for a run with
another seed.

Writes one table of Fréchet distances and one of KIDs per checkpoint, the best setting of each
checkpoint, and steps.png.
"""

import statistics
from pathlib import Path

from lab.pictures import new_figure, save_figure

from experiments.common import Study
from experiments.estimates import Results
from experiments.figures import draw_estimates, draw_reference, eta_colours
from experiments.tables import best_in_bold, captioned, markdown_table, size_of, with_se

TITLE = "Steps and η"
TABLES = ("best", "steps-frechet", "steps-kid")
FIGURES = {"steps.png": "Fréchet distance and KID against the number of steps"}

MEASURES = {"frechet": "Fréchet distance", "kid": "KID"}


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the tables."""
    results = study.grid()
    if not study.process.is_first:
        return {}
    draw_steps(results, study.reference(results.n), study.out / "steps.png")
    return tables(results)


def tables(results: Results) -> dict[str, str]:
    """Return the tables."""
    return {"best": best_table(results)} | {
        f"steps-{key}": "\n\n".join(
            captioned(f"{name}, {results.title(label)}", steps_table(results, label, key))
            for label in results.symbols
        )
        for key, name in MEASURES.items()
    }


def best_table(results: Results) -> str:
    """Return each model's best setting, and the cheapest that is not significantly worse."""
    rows = []
    for label in results.symbols:
        for what, (steps, eta) in (
            ("the best", results.best(label)),
            ("the fewest steps not significantly worse", results.cheapest(label)),
        ):
            rate = statistics.fmean(row["images_per_s"] for row in results.at(label, steps, eta))
            distance = with_se(results.estimate(label, steps, eta))
            rows.append((f"{label}: {what}", steps, f"{eta:g}", distance, f"{rate:.3g}"))
    return markdown_table(("", "steps", "η", "Fréchet distance ± SE", "images/s"), rows)


def steps_table(results: Results, label: str, key: str) -> str:
    """Return a measure of a model: one row per eta, one column per number of steps."""
    columns = []
    for steps in results.steps:
        column = [results.estimate(label, steps, eta, key) for eta in results.etas]
        columns.append([size_of(results.images(steps), column), *best_in_bold(column)])
    names = ["*n × seeds*", *(f"η = {eta:g}" for eta in results.etas)]
    return markdown_table(["steps", *results.steps], zip(names, *columns, strict=True))


def draw_steps(results: Results, reference: dict, path: Path) -> None:
    """Draw Fréchet distance (at equal n) and KID against steps, one line per eta."""
    labels = list(results.symbols)
    figure, axes = new_figure(2, len(labels), 4.6 * len(labels), 7)
    for j, label in enumerate(labels):
        for ax, key in zip(axes[:, j], MEASURES, strict=True):
            draw_lines(ax, results, label, key)
            if key == "frechet":
                draw_reference(ax, reference)
                ax.set_yscale("log")
            else:
                span = 2 * reference["kid_se"]
                ax.axhspan(0, span, color="grey", alpha=0.3, label="real images")
                ax.set_yscale("symlog", linthresh=10)
            ylabel = f"{MEASURES[key]} (LeNet features)" if j == 0 else ""
            ax.set(xscale="log", xlabel="steps", ylabel=ylabel)
            ax.grid(alpha=0.3, which="both")
        axes[0, j].set_title(results.title(label))
        axes[0, j].legend(fontsize=8)
    for row in axes:
        low, high = (f(ax.get_ylim()[i] for ax in row) for i, f in enumerate((min, max)))
        for ax in row:
            ax.set_ylim(max(low, -10), high)  # the error bar of a KID may go far below 0
    save_figure(figure, path)


def draw_lines(ax, results: Results, label: str, key: str) -> None:
    """Draw a measure of a model against steps."""
    steps = [s for s in results.steps if key == "kid" or results.images(s) == results.n]
    for eta, colour in eta_colours(results.etas).items():
        estimates = [results.estimate(label, s, eta, key) for s in steps]
        draw_estimates(ax, steps, estimates, colour, f"η = {eta:g}")
