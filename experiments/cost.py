"""How long does an image take?

The seconds of every cell of the grid are fitted by a line: a fixed cost per image, and a cost per
image and step. The table also shows how far a typical cell is from the line, and whether η changes
the time: the median over the numbers of steps of the time at the largest η over that at the
smallest.

Writes the table and time.png.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from lab.pictures import new_figure, save_figure

import numpy as np

from experiments.common import Study
from experiments.estimates import Results
from experiments.tables import markdown_table

TITLE = "Time"
TABLES = ("cost",)
FIGURES = {"time.png": "Milliseconds per image against the number of steps"}


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the table."""
    results = study.grid()
    if not study.process.is_first:
        return {}
    draw_time(results, study.out / "time.png")
    return {"cost": cost_table(results)}


def cost_table(results: Results) -> str:
    """Return the fitted line of each model, in milliseconds, and how well it fits."""
    low, high = results.etas[0], results.etas[-1]
    rows = []
    for label in results.symbols:
        mine = rows_of(results, label)
        a, b = fit_time(mine)
        off = statistics.median(abs((a + b * r["steps"]) * r["n"] / r["seconds"] - 1) for r in mine)
        ratio = statistics.median(
            results.at(label, steps, high)[0]["seconds"]
            / results.at(label, steps, low)[0]["seconds"]
            for steps in results.steps
        )
        rows.append((label, f"{1e3 * b:.2f}", f"{1e3 * a:.2f}", f"{off:.0%}", f"{ratio:.2f}"))
    head = (
        *("ms per image and step", "ms per image", "median deviation from the line"),
        f"time at η = {high:g} over η = {low:g}",
    )
    return markdown_table(("", *head), rows)


def rows_of(results: Results, label: str) -> list[dict]:
    return [row for row in results.rows if row["model"] == label]


def fit_time(rows: Sequence[dict]) -> tuple[float, float]:
    """Return a and b of the line a + b steps, in seconds per image, fitted to relative errors."""
    steps = np.array([row["steps"] for row in rows])
    seconds = np.array([row["seconds"] / row["n"] for row in rows])
    if len(set(steps)) < 2:
        return 0.0, float((seconds / steps).mean())
    b, a = np.polyfit(steps, seconds, 1, w=1 / seconds)
    return float(a), float(b)


def draw_time(results: Results, path: Path) -> None:
    """Draw milliseconds per image against steps, and the fitted lines."""
    figure, axes = new_figure(1, 1, 5.5, 3.8)
    ax = axes[0, 0]
    for i, label in enumerate(results.symbols):
        mine = rows_of(results, label)
        a, b = fit_time(mine)
        milliseconds = [1e3 * r["seconds"] / r["n"] for r in mine]
        ax.plot([r["steps"] for r in mine], milliseconds, "o", ms=3, color=f"C{i}")
        x = np.geomspace(results.steps[0], results.steps[-1], 50)
        start, step = (f"{1e3 * value:.2f} ms".replace("-", "−") for value in (a, b))
        name = f"{label}: {start} + {step} per step"
        ax.plot(x, 1e3 * (a + b * x), lw=1, color=f"C{i}", label=name)
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="milliseconds per image")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3, which="both")
    save_figure(figure, path)
