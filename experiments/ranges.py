"""At which noise levels does the network make the errors that count?

The exact denoiser (see denoiser.py) takes the place of the network in one range of log-SNR at a
time. Then the two change roles. The log-SNR, log(ᾱ / (1 − ᾱ)), rises while an image is made, so the
ranges are in the order in which sampling passes them.

A mixture has the same noise as the model that it differs from in one range only, and so most of its
images are nearly the same. This makes the change of the Fréchet distance more certain than the
distances: their errors have most of it in common, and it cancels. ± is the standard error.

Two papers compare deterministic sampling (an ODE, η = 0) with noisy sampling (an SDE, like η = 1).
Cao et al. 2023 (arXiv:2306.02063) find that noise helps against an error made early, and that
sampling without noise is better if the error is made at the end. Xu et al. 2023 (Restart,
arXiv:2306.14878) say that the noise contracts errors made before, while an ODE has the smaller
discretisation error.

One caution. At low noise the exact denoiser predicts the nearest training image, whatever the steps
before have made. So it also repairs errors that were made earlier.

Writes two tables per checkpoint: the distances, and their changes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product

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
from experiments.grid import Cell, Subject, by_setting, make_cells
from experiments.tables import captioned, markdown_table, with_se

TITLE = "Where the network's error sits"
TABLES = ("ranges", "ranges-changes")
FIGURES = {}

STEPS = 10  # with 20 the networks are nearer to the exact denoiser, see exact.py
RANGES = list(pairwise((-math.inf, -3.0, -1.0, 1.0, math.inf)))  # low < log-SNR <= high

Text = Callable[[str, str, float], str]  # of a model, a mixture that changes it, and eta


def run(study: Study) -> dict[str, str]:
    """Return the tables."""
    s = study.settings
    images = load_dataset("mnist", "train", s.data_dir)[0].to(study.process.device)
    blocks: dict[str, list[str]] = {}
    for subject in study.subjects:
        exact = exact_subject(images, subject)
        steps = min(STEPS, subject.num_train_timesteps)
        pairs = [(subject, exact), (exact, subject)]
        mixed = [mixed_subject(*pair, *bounds) for bounds in RANGES for pair in pairs]
        models = [subject, exact, *mixed]
        cells = make_cells(models, [steps], study.extremes, s.images, s.repetitions)
        results = study.measure(cells, models)
        if study.process.is_first:
            for name, table in tables(study, cells, results, subject).items():
                blocks.setdefault(name, []).append(captioned(subject.title, table))
    return {name: "\n\n".join(texts) for name, texts in blocks.items()}


def tables(
    study: Study, cells: Sequence[Cell], results: Results, subject: Subject
) -> dict[str, str]:
    """Return the tables of a network, without captions.

    Args:
        cells, results: of the network, the exact denoiser and their mixtures, at one number of
            steps.
    """
    steps, found = results.steps[0], by_setting(cells)

    def distance(_model: str, mixture: str, eta: float) -> str:
        return with_se(results.estimate(mixture, steps, eta))

    def changed(model: str, mixture: str, eta: float) -> str:
        pair = found[model, steps, eta], found[mixture, steps, eta]
        return with_se(study.change(*pair), "+.1f")

    return {
        "ranges": ranges_table(subject, steps, results.etas, distance),
        "ranges-changes": ranges_table(subject, steps, results.etas, changed),
    }


def ranges_table(subject: Subject, steps: int, etas: Sequence[float], text: Text) -> str:
    """Return a table of the mixtures: one row per range, and one for everywhere."""
    roles = {"exact here, network elsewhere": (subject.label, EXACT)}
    roles |= {"network here, exact elsewhere": (EXACT, subject.label)}

    def row_of(name: str, count: int, pairs: Iterable[tuple[str, str]]) -> list[object]:
        return [name, count, *(text(*pair, eta) for pair, eta in product(pairs, etas))]

    rows = []
    for bounds, count in zip(RANGES, steps_per_range(subject, steps), strict=True):
        pairs = [(model, mixed_label(model, other, *bounds)) for model, other in roles.values()]
        rows.append(row_of(range_name(*bounds), count, pairs))
    rows.append(row_of("everywhere", steps, roles.values()))
    head = [f"{name}, η = {eta:g}" for name, eta in product(roles, etas)]
    return markdown_table(("log-SNR", "steps", *head), rows)


def steps_per_range(subject: Subject, steps: int) -> list[int]:
    """Return how many of the steps of a sampling lie in each range."""
    scheduler = subject.scheduler()
    scheduler.set_timesteps(steps)
    in_ranges = [timesteps_in_range(scheduler, *bounds) for bounds in RANGES]
    return [in_range[scheduler.timesteps].sum().item() for in_range in in_ranges]


def range_name(low: float, high: float) -> str:
    """Return a range as text: "(−∞, −3]", "(−3, −1]", "(1, ∞)"."""
    end = "∞)" if high == math.inf else f"{high:g}]"
    return f"({'−∞' if low == -math.inf else f'{low:g}'}, {end}"
