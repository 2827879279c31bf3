"""At which noise levels does the network make the errors that count?

The exact denoiser (see denoiser.py) takes the place of the network in one range of log-SNR at a
time. Then the two change roles. The log-SNR, log(ᾱ / (1 − ᾱ)), rises while an image is made, so the
ranges are in the order in which sampling passes them. All cells of mixtures have seed 0, and so
the same noise. ± is the standard error.

Two papers compare deterministic sampling (an ODE, η = 0) with noisy sampling (an SDE, like η = 1).
Cao et al. 2023 (arXiv:2306.02063) find that noise helps against an error made early, and that
sampling without noise is better if the error is made at the end. Xu et al. 2023 (Restart,
arXiv:2306.14878) say that the noise contracts errors made before, while an ODE has the smaller
discretisation error.

One caution. At low noise the exact denoiser predicts the nearest training image, whatever the steps
before have made. So it also repairs errors that were made earlier.

Writes one table per checkpoint.
"""

import math
from itertools import pairwise

from lab.data import load_dataset

from experiments.common import Study
from experiments.denoiser import (
    EXACT,
    exact_subject,
    mixed_label,
    mixed_subject,
    timesteps_in_range,
)
from experiments.estimates import Results
from experiments.grid import Subject, make_cells
from experiments.tables import captioned, markdown_table, with_se

TITLE = "Where the network's error sits"
TABLES = ("ranges",)
FIGURES = {}

STEPS = 20
RANGES = list(pairwise((-math.inf, -3.0, -1.0, 1.0, 3.0, math.inf)))  # low < log-SNR <= high


def run(study: Study) -> dict[str, str]:
    """Return the table."""
    s = study.settings
    etas = list(dict.fromkeys(study.extremes))
    images = load_dataset("mnist", "train", s.data_dir)[0].to(study.process.device)
    blocks = []
    for subject in study.subjects:
        exact = exact_subject(images, subject)
        steps = [min(STEPS, subject.num_train_timesteps)]
        pairs = [(subject, exact), (exact, subject)]
        mixed = [mixed_subject(*pair, *bounds) for bounds in RANGES for pair in pairs]
        cells = make_cells(pairs[0], steps, etas, s.images, s.repetitions)
        cells += make_cells(mixed, steps, etas, lambda _: s.n)
        results = study.measure(cells, [*pairs[0], *mixed])
        if study.process.is_first:
            blocks.append(ranges_table(results, subject))
    return {"ranges": "\n\n".join(blocks)} if blocks else {}


def ranges_table(results: Results, subject: Subject) -> str:
    """Return the Fréchet distances of a network: one row per range, and one for everywhere.

    Args:
        results: the cells of the network, the exact denoiser and their mixtures, at one number of
            steps. Those of other networks may be among them.
    """
    steps = results.steps[0]
    pairs = {"exact here, network elsewhere": (subject.label, EXACT)}
    pairs |= {"network here, exact elsewhere": (EXACT, subject.label)}
    head = [f"{name}, η = {eta:g}" for name in pairs for eta in results.etas]

    def row_of(name: str, count: int, labels: list[str]) -> list[object]:
        settings = [(label, eta) for label in labels for eta in results.etas]
        return [name, count, *(with_se(results.estimate(label, steps, e)) for label, e in settings)]

    counts = steps_per_range(subject, steps)
    rows = [
        row_of(range_name(*bounds), count, [mixed_label(*p, *bounds) for p in pairs.values()])
        for bounds, count in zip(RANGES, counts, strict=True)
    ]
    rows.append(row_of("everywhere", steps, [inside for _, inside in pairs.values()]))
    return captioned(subject.title, markdown_table(("log-SNR", "steps", *head), rows))


def steps_per_range(subject: Subject, steps: int) -> list[int]:
    """Return how many of the steps of a sampling lie in each range."""
    scheduler = subject.scheduler()
    scheduler.set_timesteps(steps)
    in_ranges = [timesteps_in_range(scheduler, *bounds) for bounds in RANGES]
    return [in_range[scheduler.timesteps].sum().item() for in_range in in_ranges]


def range_name(low: float, high: float) -> str:
    """Return a range as text: "(−∞, −3]", "(−3, −1]", "(3, ∞)"."""
    end = "∞)" if high == math.inf else f"{high:g}]"
    return f"({'−∞' if low == -math.inf else f'{low:g}'}, {end}"
