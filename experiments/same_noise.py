"""Does the same start x_T give the same digit at every number of steps?

At η = 0 the sampler is deterministic. The DDIM paper (Song et al. 2021, section 5.2) found that x_T
then decides what an image shows, however many steps are taken. Here the images of seed 0, which
have the same x_T at every setting, are read by the classifier. The table has the share that reads
as the same digit as at the largest number of steps, which would be about 10 % by chance.

Writes the table, the shares as a figure (agreement.png) and some of the images (images.png).
"""

import statistics
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from lab.classifier import features
from lab.pictures import new_figure, save_figure

import torch
from torch import Tensor

from experiments.common import Study
from experiments.figures import draw_panels, eta_colours
from experiments.grid import Subject
from experiments.tables import markdown_table

TITLE = "The same noise"
TABLES = ("same-noise",)
FIGURES = {
    "images.png": "The same noise at every setting",
    "agreement.png": "The share of images that keep their digit",
}

SHOWN = 4  # images per panel of images.png

Setting = tuple[str, int, float]  # the label of a model, steps, eta


def run(study: Study) -> dict[str, str]:
    """Draw the figures and return the table."""
    study.grid()
    if not study.process.is_first:
        return {}
    s = study.settings
    settings = product([subject.label for subject in study.subjects], s.steps, s.etas)
    images = {setting: study.images(*setting) for setting in settings}
    shares, compared = agreement(images)
    draw_images(images, study.subjects, study.out / "images.png")
    if len(s.steps) == 1:  # nothing to compare with
        return {}
    draw_agreement(shares, study.subjects, study.out / "agreement.png")
    return {"same-noise": agreement_table(shares, compared, study.names)}


def agreement(images: Mapping[Setting, Tensor]) -> tuple[dict[Setting, float], dict[int, int]]:
    """Return how many images read as the same digit as at the largest number of steps.

    Returns:
        The share of each setting, in [0, 1], and for each number of steps how many images were
        compared: the settings may have different numbers of images.
    """
    digits = {setting: features(x)[1].argmax(1) for setting, x in images.items()}
    longest = max(steps for _, steps, _ in digits)
    shares, compared = {}, {}
    for (label, steps, eta), these in digits.items():
        pairs = list(zip(these.tolist(), digits[label, longest, eta].tolist(), strict=False))
        shares[label, steps, eta] = statistics.fmean(a == b for a, b in pairs)
        compared[steps] = len(pairs)
    return shares, compared


def agreement_table(
    shares: Mapping[Setting, float], compared: Mapping[int, int], names: Mapping[str, str]
) -> str:
    """Return the shares: one row per model and eta, one column per number of steps but the last.

    Args:
        names: a short name for each model's label.
    """
    steps, etas = (sorted({setting[i] for setting in shares}) for i in (1, 2))
    rows = [["*images compared*", *(f"*{compared[s]:,}*" for s in steps[:-1])]]
    for label, eta in product(names, etas):
        row = [f"{shares[label, s, eta]:.0%}" for s in steps[:-1]]
        rows.append([f"{names[label]}, η = {eta:g}", *row])
    return markdown_table(["steps", *steps[:-1]], rows)


def draw_images(images: Mapping[Setting, Tensor], subjects: list[Subject], path: Path) -> None:
    """Draw the first images: one panel per eta and model, one column per number of steps."""
    steps, etas = (sorted({setting[i] for setting in images}) for i in (1, 2))
    panels = {}
    for eta, subject in product(etas, subjects):
        columns = [images[subject.label, s, eta][:SHOWN] for s in steps]
        panels[f"η = {eta:g}", subject.title] = torch.stack(columns, dim=1).flatten(0, 1)
    width = max(0.45 * len(steps), 2.2)
    draw_panels(panels, len(steps), width, 0.55 * SHOWN, path, ticks=steps, xlabel="steps")


def draw_agreement(shares: Mapping[Setting, float], subjects: list[Subject], path: Path) -> None:
    """Draw the shares against the number of steps, one line per eta."""
    figure, axes = new_figure(1, len(subjects), 4.6 * len(subjects), 3.4)
    steps, etas = (sorted({setting[i] for setting in shares}) for i in (1, 2))
    for ax, subject in zip(axes[0], subjects, strict=True):
        for eta, colour in eta_colours(etas).items():
            y = [shares[subject.label, s, eta] for s in steps]
            ax.plot(steps, y, "o-", ms=3, lw=1.2, color=colour, label=f"η = {eta:g}")
        ax.axhline(0.1, color="grey", ls="--", lw=1, label="chance")
        ax.set(xscale="log", xlabel="steps", ylim=(0, 1.05))
        ax.set_title(subject.title, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"same digit as at {steps[-1]} steps")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path)
