"""Estimates with their errors, and the rows of a grid by setting.

Every figure of a row has a standard error over the images of its cell. Cells that were repeated
with other seeds give a second one: the spread between them. An estimate uses the larger.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over `runs` runs that differ in their seed only, and its standard error."""

    mean: float
    se: float
    runs: int = 1

    @property
    def run_se(self) -> float:
        """The standard error of a single run."""
        return self.se * math.sqrt(self.runs)

    @property
    def margin(self) -> float:
        """Half of the 95 % interval for a run with another seed.

        It covers both errors: that of this mean and that of the new run.
        """
        return 2 * math.hypot(self.run_se, self.se)


def estimate(rows: Sequence[dict], key: str) -> Estimate:
    """Return the mean of a figure over rows that differ in their seed only.

    The standard error of a run is the larger of two: the one over the images, and the standard
    deviation over the seeds.
    """
    values = [row[key] for row in rows]
    run_se = math.sqrt(statistics.fmean(row[f"{key}_se"] ** 2 for row in rows))
    if len(rows) > 1:
        run_se = max(run_se, statistics.stdev(values))
    return Estimate(statistics.fmean(values), run_se / math.sqrt(len(rows)), len(rows))


def z_score(a: Estimate, b: Estimate) -> float:
    """Return a - b in standard errors of the difference, for independent a and b.

    It is 0 for equal means, and infinite for different means without an error: the figures of
    images that are all the same have none.
    """
    d = difference(a, b)
    if d.se == 0:
        return math.copysign(math.inf, d.mean) if d.mean else 0.0
    return d.mean / d.se


def excess(e: Estimate, reference: float) -> Estimate:
    """Return by how much a distance is above that of real images; nan below two standard errors."""
    if e.mean - reference <= 2 * e.se:
        return Estimate(math.nan, math.nan)
    return Estimate(e.mean - reference, e.se, e.runs)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b, for independent a and b."""
    return Estimate(a.mean - b.mean, math.hypot(a.se, b.se))


def quotient(a: Estimate, b: Estimate) -> Estimate:
    """Return a / b, with its error to first order; nan if b is 0."""
    if b.mean == 0:
        return Estimate(math.nan, math.nan)
    return Estimate(a.mean / b.mean, math.hypot(a.se / b.mean, a.mean * b.se / b.mean**2))


def short_names(symbols: Mapping[str, str]) -> dict[str, str]:
    """Return a short name for each label: its symbol, or the label where symbols are equal."""
    counts = list(symbols.values())
    return {label: s if counts.count(s) == 1 else label for label, s in symbols.items()}


class Results:
    """The rows of a grid, all of one sampler, by model, steps and eta.

    Attributes:
        rows: one dictionary per cell, with the columns of results.csv.
        symbols: for each model's label the symbol of its prediction type.
        steps, etas: the values of the grid, ascending.
        n: images per cell at the fewest steps. Fréchet distances are compared at this n only.

    Raises:
        ValueError: there are rows of several samplers. Make one Results of each.
    """

    def __init__(self, rows: Sequence[dict]):
        if len({row["sampler"] for row in rows}) > 1:
            raise ValueError("these rows are of more than one sampler")
        self.rows = rows
        self.symbols = {row["model"]: row["prediction"] for row in rows}
        self.steps = sorted({row["steps"] for row in rows})
        self.etas = sorted({row["eta"] for row in rows if row["eta"] is not None})
        self._by_setting: dict[tuple, list[dict]] = {}
        for row in rows:
            self._by_setting.setdefault((row["model"], row["steps"], row["eta"]), []).append(row)
        self.n = self.images(self.steps[0]) if rows else 0

    @property
    def names(self) -> dict[str, str]:
        """A short name for each model's label."""
        return short_names(self.symbols)

    def title(self, label: str) -> str:
        """Return a model's title, for captions."""
        return f"{self.symbols[label]}-prediction ({label})"

    def at(self, label: str, steps: int, eta: float | None) -> list[dict]:
        """Return the rows of a setting: one per seed."""
        return self._by_setting[label, steps, eta]

    def estimate(self, label: str, steps: int, eta: float | None, key: str = "frechet") -> Estimate:
        """Return a figure of a setting."""
        return estimate(self.at(label, steps, eta), key)

    def images(self, steps: int) -> int:
        """Return the number of images per cell of this many steps."""
        return next(row["n"] for row in self.rows if row["steps"] == steps)

    def comparable(self, label: str) -> dict[tuple[int, float | None], Estimate]:
        """Return the Fréchet distances of a model's settings whose cells have n images."""
        return {
            (steps, eta): estimate(rows, "frechet")
            for (model, steps, eta), rows in self._by_setting.items()
            if model == label and rows[0]["n"] == self.n
        }

    def best(self, label: str) -> tuple[int, float | None]:
        """Return the steps and eta of a model's smallest Fréchet distance."""
        distances = self.comparable(label)
        return min(distances, key=lambda setting: distances[setting].mean)

    def cheapest(self, label: str) -> tuple[int, float | None]:
        """Return the fewest steps, with eta, that are not significantly worse than the best."""
        distances = self.comparable(label)
        best = distances[self.best(label)]
        tied = [s for s, e in distances.items() if e is best or z_score(e, best) < 2]
        return min(tied, key=lambda setting: (setting[0], distances[setting].mean))
