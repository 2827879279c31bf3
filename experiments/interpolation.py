"""Does a path between two starts x_T become a smooth path of images?

At η = 0 an image is a continuous function of x_T (DDIM, section 5.3). Pairs of starts are joined by
spherical interpolation, and every point of a path is sampled. For η > 0 every image has its own
noise in the steps, as any two samples have.

The table has the mean distance of neighbours on a path over the mean distance of unrelated images.
It is 1 if x_T decides nothing, and at best 0.1 for paths of 11 images: a straight line.

Writes the table and interpolation.png.
"""

from collections.abc import Mapping
from itertools import product

from lab.data import to_uint8
from lab.noise import image_noise

import torch
from torch import Tensor

from diffusion import sample
from experiments.common import Study
from experiments.figures import draw_panels
from experiments.grid import SHAPE, Subject
from experiments.tables import markdown_table, number

TITLE = "Interpolation"
TABLES = ("interpolation",)
FIGURES = {"interpolation.png": "Paths between two starts"}

PAIRS, LENGTH, STEPS = 8, 11, 50  # paths, images per path, steps of sampling
SHOWN = 3  # paths per panel of the figure


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the table."""
    steps = min(STEPS, *(subject.num_train_timesteps for subject in study.subjects))
    settings = list(product(study.settings.etas, study.subjects))
    calls = PAIRS * LENGTH * steps  # of the network, at each setting
    if not study.begins({"interpolation": calls * len(settings)}) or not study.process.is_first:
        return {}
    panels, smoothness = {}, {}
    for eta, subject in settings:
        study.bar.set_description(f"{subject.label}, interpolation")
        images, smooth = interpolate(subject, eta, PAIRS, LENGTH, steps, study.process.device)
        study.bar.update(calls)
        panels[f"η = {eta:g}", subject.title] = images[: SHOWN * LENGTH]
        smoothness[study.names[subject.label], eta] = smooth
    draw_panels(panels, LENGTH, 4.2, 0.42 * SHOWN, study.out / "interpolation.png")
    return {"interpolation": smoothness_table(smoothness)}


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Go from a (weight 0) to b (weight 1) along the great circle (Shoemake 1985).

    Returns:
        (len(weights), *a.shape).
    """
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    w = weights.view(-1, *[1] * a.ndim)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def interpolate(
    subject: Subject, eta: float, pairs: int, length: int, steps: int, device: torch.device
) -> tuple[Tensor, float]:
    """Sample the images along `pairs` paths between two starts.

    Returns:
        (pairs * length, 1, 28, 28) uint8, and the mean distance of neighbours on a path over that
        of the ends of different paths (nan if all ends are the same).
    """
    scheduler = subject.scheduler()
    scheduler.set_timesteps(steps)
    ends = image_noise(0, torch.arange(2 * pairs, device=device), 0, SHAPE)
    weights = torch.linspace(0, 1, length, device=device)
    paths = [slerp(a, b, weights) for a, b in zip(ends[:pairs], ends[pairs:], strict=True)]
    indices = torch.arange(pairs * length, device=device)
    x = torch.cat(
        [
            sample(subject.model, scheduler, i, SHAPE, eta=eta, x_T=start)
            for i, start in zip(indices.split(length), paths, strict=True)
        ]
    )
    path = x.view(pairs, length, -1)
    near = (path[:, 1:] - path[:, :-1]).norm(dim=-1).mean()
    starts = path[:, 0]
    far = torch.cdist(starts, starts).sum() / (pairs * (pairs - 1))
    return to_uint8(x).cpu(), (near / far).item()


def smoothness_table(smoothness: Mapping[tuple[str, float], float]) -> str:
    """Return the ratio of distances: one row per model, one column per eta."""
    names, etas = (list(dict.fromkeys(key[i] for key in smoothness)) for i in (0, 1))
    rows = [(name, *(number(smoothness[name, eta], ".2f") for eta in etas)) for name in names]
    return markdown_table(["", *(f"η = {eta:g}" for eta in etas)], rows)
