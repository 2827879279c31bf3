"""How long must a model be trained, and does noise matter less as the network improves?

`train.py --keep` keeps the EMA weights of a run at some of its steps. Where such checkpoints lie
beside a checkpoint of the study, they are sampled as it is. All rows have seed 0 only: rows with
more seeds would differ from the others by more than the training. They are of the same recipe and
seed of training. Only in the finished model has the learning rate fallen to 0. So its gain has two
causes: more images, and the lower rate. ± is a 95 % interval for a run with another seed of
sampling.

Even real images have a distance above 0. What is above theirs is the excess. The exponent says how
it falls from the row before: as images^exponent. The last column divides the excess at η = 1 by
that at η = 0. ± of both is the standard error. They are left out where an excess is less than two
standard errors. The distance of real images counts as known.

Karras et al. 2022 (arXiv:2206.00364, figure 5) find that noise helps one network and harms a better
one, on the same data. So the ratio should rise as the training goes on.

Writes one table per checkpoint and length.png.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from lab.pictures import new_figure, save_figure

from experiments.common import Study
from experiments.estimates import Estimate, excess, quotient
from experiments.figures import draw_estimates, draw_reference, eta_colours
from experiments.grid import SNAPSHOTS, Subject, load_relatives, make_cells
from experiments.tables import captioned, markdown_table, with_margin, with_se

TITLE = "How long trained?"
TABLES = ("length",)
FIGURES = {"length.png": "Fréchet distance against the number of training images"}

STEPS = 50

Lengths = dict[int, dict[float, Estimate]]  # distances, by training images and eta


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the table; nothing if no checkpoint has others beside it."""
    measured = {s.label: measure(study, s, study.extremes) for s in study.subjects}
    measured = {label: lengths for label, lengths in measured.items() if lengths}
    if not measured:
        return {}
    titles, reference = study.titles, study.reference(study.settings.n)
    draw_lengths(measured, titles, reference, study.out / "length.png")
    blocks = [
        captioned(titles[label], length_table(lengths, reference["frechet"]))
        for label, lengths in measured.items()
    ]
    return {"length": "\n\n".join(blocks)}


def measure(study: Study, subject: Subject, etas: list[float]) -> Lengths:
    """Return the distances of a checkpoint and of those before it.

    All processes must call this. The result is empty if there are none before it, and on all
    processes but the first.
    """
    s = study.settings
    snapshots = load_relatives(subject, SNAPSHOTS, study.process.device)
    if not snapshots:
        return {}
    every = [*snapshots.values(), subject]
    steps = min(STEPS, subject.num_train_timesteps)
    results = study.measure(make_cells(every, [steps], etas, s.images), every)
    if not study.process.is_first:
        return {}
    return {
        one.training_images: {eta: results.estimate(one.label, steps, eta) for eta in etas}
        for one in every
    }


def length_table(lengths: Lengths, reference: float) -> str:
    """Return one row per number of training images.

    Args:
        reference: the distance of real images.
    """
    etas = list(next(iter(lengths.values())))
    head = ["training images"]
    for eta in etas:
        head += [f"η = {eta:g}", "exponent"]
    if len(etas) > 1:
        head.append(f"η = {etas[-1]:g} over η = {etas[0]:g}")
    before, rows = None, []
    for images, distances in sorted(lengths.items()):
        row, above = [f"{images:,}"], {eta: excess(e, reference) for eta, e in distances.items()}
        for eta in etas:
            slope = exponent(before and (before[0], before[1][eta]), (images, above[eta]))
            row += [with_margin(distances[eta]), with_se(slope, ".2f")]
        if len(etas) > 1:
            row.append(with_se(quotient(above[etas[-1]], above[etas[0]]), ".2f"))
        before = images, above
        rows.append(row)
    return markdown_table(head, rows)


def exponent(a: tuple[int, Estimate] | None, b: tuple[int, Estimate]) -> Estimate:
    """Return p of y ~ x^p through two points (x, y), with its error to first order.

    It is nan without a first point.
    """
    if a is None:
        return Estimate(math.nan, math.nan)
    (x_a, y_a), (x_b, y_b) = a, b
    ratio, length = quotient(y_b, y_a), math.log(x_b / x_a)
    return Estimate(math.log(ratio.mean) / length, ratio.se / ratio.mean / length)


def draw_lengths(
    measured: Mapping[str, Lengths], titles: Mapping[str, str], reference: dict, path: Path
) -> None:
    """Draw distance against training images: a panel for each model, a line for each eta."""
    figure, axes = new_figure(1, len(measured), 4.6 * len(measured), 3.8)
    for ax, (label, lengths) in zip(axes[0], measured.items(), strict=True):
        images = sorted(lengths)
        etas = list(lengths[images[0]])
        for eta, colour in eta_colours(etas).items():
            draw_estimates(ax, images, [lengths[i][eta] for i in images], colour, f"η = {eta:g}")
        draw_reference(ax, reference)
        ax.set(xscale="log", yscale="log", xlabel="training images", title=titles[label])
        ax.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("Fréchet distance (LeNet features)")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
