"""What several figures share: the colour of each eta, estimates with bars, panels of images."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from lab.pictures import load_matplotlib, make_grid, new_figure, save_figure

from torch import Tensor

from experiments.estimates import Estimate


def eta_colours(etas: Sequence[float]) -> dict[float, tuple]:
    """Return a colour for each eta, from dark (0) to bright (1)."""
    colour = load_matplotlib().colormaps["plasma"]
    return {eta: colour(0.85 * eta) for eta in etas}


def draw_estimates(
    ax, steps: Sequence[int], estimates: Sequence[Estimate], colour, label: str, fmt: str = "o-"
) -> None:
    """Draw a line of estimates against steps. Error bars are two standard errors."""
    ax.errorbar(
        steps,
        [e.mean for e in estimates],
        [2 * e.se for e in estimates],
        fmt=fmt,
        ms=3,
        lw=1.2,
        capsize=2,
        color=colour,
        label=label,
    )


def draw_reference(ax, reference: Mapping[str, float]) -> None:
    """Draw the Fréchet distance of real images, as a horizontal line."""
    ax.axhline(reference["frechet"], color="grey", ls="--", lw=1, label="real images")


def draw_panels(
    panels: Mapping[tuple[str, str], Tensor],
    columns: int,
    width: float,
    height: float,
    path: Path,
    ticks: Sequence[object] = (),
    xlabel: str = "",
) -> None:
    """Draw a matrix of panels of images.

    Args:
        panels: (N, 1, 28, 28) uint8 images by (row, column): the titles of the panel. A place
            without images stays empty.
        columns: images per row of a panel.
        width, height: of a panel, in inches.
        ticks: a label for each column of images.
        xlabel: what the ticks are.
    """
    rows, titles = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    size = 0.6 + width * len(titles), 0.5 + height * len(rows)
    figure, axes = new_figure(len(rows), len(titles), *size)
    for ax, (row, title) in zip(axes.flat, product(rows, titles), strict=True):
        ax.set_ylabel(row if title == titles[0] else "")
        ax.set_title(title if row == rows[0] else "", fontsize=9)
        ax.tick_params(length=0)
        ax.set_yticks([])
        if (row, title) not in panels:
            ax.set_xticks([])
            ax.set_frame_on(False)
            continue
        ax.set_xticks([16 + 30 * k for k in range(len(ticks))], ticks, fontsize=7)
        ax.imshow(make_grid(panels[row, title], columns)[0], cmap="gray", vmin=0, vmax=255)
    if xlabel:
        figure.supxlabel(xlabel, fontsize=9)
    save_figure(figure, path)
