"""Do runs with other seeds differ as much as the printed errors say?

A run prints its standard error, which it estimates from its own images. Here some settings are
sampled with many seeds: 20, or 3 if the study has fewer than three seeds. If the errors are right,
their mean is the standard deviation over the seeds, so the ratio of the two is 1. A ratio above 1
means that the printed errors are too small. ± of the deviation and of the ratio is one standard
error, as for normal numbers.

The last column is about the 95 % intervals for a run with another seed. Each run's interval is
compared with the result of every other run. About 5 % should lie outside. A run is part of many
comparisons, so this share varies more than that of as many independent ones.

Writes the table. Settings with other steps or η than the study's are left out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations

from experiments.common import Study
from experiments.estimates import Estimate, Results, estimate, short_names
from experiments.grid import Subject, make_cells
from experiments.tables import markdown_table, with_se

TITLE = "Are the printed errors right?"
TABLES = ("calibration",)
FIGURES = {}

SEEDS, FEW_SEEDS = 20, 3  # per setting; few if the study has fewer than three
MEASURES = {"Fréchet distance": "frechet", "KID": "kid"}


def run(study: Study) -> dict[str, str]:
    """Return the table."""
    s, results = study.settings, {}
    seeds = SEEDS if s.seeds >= 3 else FEW_SEEDS
    for name, (subject, steps, eta) in settings(study.subjects, s.steps, s.etas).items():
        cells = make_cells([subject], [steps], [eta], s.images, lambda _: seeds)
        results[name] = study.measure(cells, [subject])
    if not study.process.is_first or not results:
        return {}
    return {"calibration": calibration_table(results)}


def settings(
    subjects: Sequence[Subject], steps: Sequence[int], etas: Sequence[float]
) -> dict[str, tuple[Subject, int, float]]:
    """Return the subject, the steps and the eta of each setting, by its name.

    Args:
        steps, etas: those of the study. Settings with others are left out.
    """
    eps = next((subject for subject in subjects if subject.symbol == "ε"), subjects[-1])
    wanted = [(eps, 10, 1.0), (subjects[0], 5, 0.0), (subjects[0], 10, 1.0)]
    names = short_names({subject.label: subject.symbol for subject in subjects})
    return {
        f"{names[subject.label]}, {number} steps, η = {eta:g}": (subject, number, eta)
        for subject, number, eta in wanted
        if number in steps and eta in etas
    }


def calibration_table(results: Mapping[str, Results]) -> str:
    """Return the table: one row per setting and measure.

    Args:
        results: by the name of each setting, its rows: one per seed.
    """
    table = []
    for name, result in results.items():
        for measure, key in MEASURES.items():
            error, spread, ratio = calibration(result.rows, key)
            out, pairs = outside(result.rows, key)
            share = f"{out} of {pairs} ({out / pairs:.1%})"
            size = f"{result.n:,} × {len(result.rows)}"
            cells = [f"{error:.2f}", with_se(spread, ".2f"), with_se(ratio, ".2f"), share]
            table.append([f"{name}: {measure}", size, *cells])
    head = ["", "n × seeds", "mean printed error", "standard deviation over seeds", "ratio"]
    return markdown_table([*head, "outside the 95 % interval"], table)


def calibration(rows: Sequence[dict], key: str) -> tuple[float, Estimate, Estimate]:
    """Return the mean printed error, the standard deviation over the rows, and deviation / error.

    The standard deviation s of k normal numbers has a standard error of s / sqrt(2 (k - 1)).
    """
    error = statistics.fmean(row[f"{key}_se"] for row in rows)
    spread = statistics.stdev(row[key] for row in rows)
    spread_se = spread / math.sqrt(2 * (len(rows) - 1))
    ratio = Estimate(spread / error, spread_se / error) if error else Estimate(math.nan, math.nan)
    return error, Estimate(spread, spread_se), ratio


def outside(rows: Sequence[dict], key: str) -> tuple[int, int]:
    """Return how many pairs (a, b) have b outside the interval of a, and the number of pairs."""
    pairs = list(permutations(rows, 2))
    out = sum(abs(a[key] - b[key]) > estimate([a], key).margin for a, b in pairs)
    return out, len(pairs)
