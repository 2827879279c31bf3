"""How much of the error of the samples is due to the steps, and how much to the network?

For the training images the best prediction of x₀ is known (see denoiser.py). An exact denoiser that
computes it takes the place of the network, with the schedule of the first checkpoint, and the same
steps and noise. What is left in its samples is the error of the steps. So the gap between the exact
denoiser and real images is about the steps' error, and the gap between a network and the exact
denoiser is about the network's error. Only about: Fréchet distances do not add up, and at low noise
the exact denoiser repairs what earlier steps did wrong (see ranges.py).

Does noise correct errors of the network? Then the largest η has a lead over the smallest one with
the network, and less of a lead with the exact denoiser, which makes no error. A second table has
both leads. Their difference is small, so there are ten seeds at 10 and 20 steps.

The exact denoiser makes copies of training images, which Fréchet distance and KID do not punish. A
third table has novelty and copies (see copying.py), where test images score 1 and 5 %. The first
table has ± a 95 % interval for a run with another seed, the others ± the standard error.

Writes the tables, and exact.png for the smallest and the largest η.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from lab.data import load_dataset
from lab.pictures import new_figure, save_figure

from experiments.common import HEADLINE, LONG, Study
from experiments.denoiser import EXACT, exact_subject
from experiments.estimates import Results, difference, short_names, z_score
from experiments.figures import draw_estimates, draw_reference
from experiments.tables import markdown_table, signed, size_of, with_margin, with_se

TITLE = "The exact denoiser: the steps' error alone"
TABLES = ("exact", "exact-leads", "exact-copies")
FIGURES = {"exact.png": "Fréchet distance of the exact denoiser and of the networks against steps"}


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the tables."""
    s, device = study.settings, study.process.device
    steps = [n for n in s.steps if n <= LONG]  # every step reads all training images
    networks = study.grid()
    if not steps:
        return {}
    images = load_dataset("mnist", "train", s.data_dir)[0].to(device)
    subject = exact_subject(images, study.subjects[0])
    exact = study.measure(study.cells_of([subject], steps), [subject])
    if not study.process.is_first:
        return {}
    results = joined(exact, networks)
    draw_exact(results, study.extremes, study.reference(results.n), study.out / "exact.png")
    return tables(results)


def joined(exact: Results, networks: Results) -> Results:
    """Return the results of the exact denoiser, and those of the networks at its settings."""
    settings = set(product(exact.steps, exact.etas))
    rows = [row for row in networks.rows if (row["steps"], row["eta"]) in settings]
    return Results([*exact.rows, *rows])


def tables(results: Results) -> dict[str, str]:
    """Return the tables."""
    headline = [n for n in results.steps if n in HEADLINE]
    tables = {"exact": distances_table(results)}
    if headline and len(results.etas) > 1:
        tables["exact-leads"] = leads_table(results, headline)
    return tables | {"exact-copies": copies_table(results, (headline or results.steps)[-1])}


def names(results: Results) -> Mapping[str, str]:
    """Return the name of each model. v, ε and x_0 are the same for the exact denoiser."""
    networks = {label: s for label, s in results.symbols.items() if label != EXACT}
    return {EXACT: EXACT} | short_names(networks)


def distances_table(results: Results) -> str:
    """Return the Fréchet distances: one row per model and eta, one column per number of steps."""
    columns = []
    for steps in results.steps:
        settings = product(names(results), results.etas)
        column = [results.estimate(label, steps, eta) for label, eta in settings]
        columns.append([size_of(results.images(steps), column), *map(with_margin, column)])
    heads = [f"{name}, η = {e:g}" for name, e in product(names(results).values(), results.etas)]
    rows = zip(["*n × seeds*", *heads], *columns, strict=True)
    return markdown_table(["steps", *results.steps], rows)


def leads_table(results: Results, all_steps: Sequence[int]) -> str:
    """Return the lead of the largest eta over the smallest: a row for each model.

    For each network, z is its lead minus that of the exact denoiser, in standard errors.
    """
    low, high = results.etas[0], results.etas[-1]
    columns = []
    for steps in all_steps:
        ends = {
            label: [results.estimate(label, steps, eta) for eta in (low, high)]
            for label in names(results)
        }
        leads = {label: difference(*pair) for label, pair in ends.items()}
        networks = [lead for label, lead in leads.items() if label != EXACT]
        zs = [signed(z_score(lead, leads[EXACT])) for lead in networks]
        size = size_of(results.images(steps), ends[EXACT])
        columns.append([size, *map(with_se, leads.values()), *zs])
    heads = ["*n × seeds*", *names(results).values()]
    heads += [f"z, {name} against exact" for name in names(results).values() if name != EXACT]
    title = f"lead of η = {high:g} over η = {low:g}"
    return markdown_table(
        [title, *(f"{s} steps" for s in all_steps)], zip(heads, *columns, strict=True)
    )


def copies_table(results: Results, steps: int) -> str:
    """Return novelty and copies of each model and eta at one number of steps."""
    forms = {"novelty": ".2f", "copies": ".1%"}
    rows = [
        (
            f"{name}, η = {eta:g}",
            *(with_se(results.estimate(label, steps, eta, key), f) for key, f in forms.items()),
        )
        for (label, name), eta in product(names(results).items(), results.etas)
    ]
    return markdown_table((f"{steps} steps", *forms), rows)


def draw_exact(results: Results, etas: list[float], reference: dict, path: Path) -> None:
    """Draw Fréchet distance against steps: one panel per eta, one line per model.

    Error bars are two standard errors.
    """
    figure, axes = new_figure(1, len(etas), 4.6 * len(etas), 4)
    for ax in axes[0, 1:]:
        ax.sharey(axes[0, 0])
    steps = [s for s in results.steps if results.images(s) == results.n]
    for ax, eta in zip(axes[0], etas, strict=True):
        for i, (label, name) in enumerate(names(results).items()):
            distances = [results.estimate(label, s, eta) for s in steps]
            colour = "black" if label == EXACT else f"C{i - 1}"
            name = f"{name} denoiser" if label == EXACT else f"{name}-network"
            draw_estimates(ax, steps, distances, colour, name)
        draw_reference(ax, reference)
        ax.set(xscale="log", yscale="log", xlabel="steps", title=f"η = {eta:g}")
        ax.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("Fréchet distance (LeNet features)")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
