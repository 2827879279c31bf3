"""At equal training, which prediction type and which noise schedule is best?

The study trains models of its own, all on the same number of images. The first table has v- and
ε-prediction over several training seeds; ± is a 95 % interval for a training with another seed. The
loss of ε is weighted by 1/ᾱ up to a bound, which makes it nearly the loss of v. In the last rows it
is not weighted: the difference is due to the weights of the loss, not to the parametrisation. With
one training seed ± is over the samples alone, and there is no z.

The other tables have v-prediction under three noise schedules, with training timesteps drawn by
log-SNR or uniformly, one training each (seed 0). There ± is a 95 % interval over the samples alone.
The z of two schedules therefore uses the standard error of one training from the first table.
"""

from collections.abc import Sequence
from itertools import combinations, product

from experiments.common import Study
from experiments.estimates import Estimate, Results, quotient, z_score
from experiments.tables import markdown_table, number, signed, with_margin
from experiments.trainings import (
    DENSITIES,
    ETAS,
    SCHEDULES,
    STEPS,
    Schedule,
    Training,
    estimate_of,
    pick,
)

TITLE = "Equal training: prediction types and schedules"
TABLES = ("training", "schedules", "densities", "schedule-z")
FIGURES = {}

HEAD = [f"{STEPS} steps, η = {eta:g}" for eta in ETAS]

Kinds = dict[tuple[Schedule, str], list[Estimate]]  # by schedule and density, one for each of ETAS


def run(study: Study) -> dict[str, str]:
    """Train and return the tables."""
    trainings = study.trainings
    if not trainings:
        return {}
    results = study.trained(trainings)
    return tables(trainings, results) if study.process.is_first else {}


def tables(trainings: Sequence[Training], results: Results) -> dict[str, str]:
    """Return the tables."""

    def distances(**wanted: object) -> list[Estimate]:
        runs = pick(trainings, **wanted)
        return [estimate_of(runs, results, STEPS, eta) for eta in ETAS]

    base = {"schedule": SCHEDULES[0], "density": "lognormal"}
    v, eps = (distances(pred=pred, **base) for pred in ("v", "eps"))
    plain = distances(pred="eps", weighted=False, **base)
    kinds = {
        (schedule, density): distances(pred="v", seed=0, schedule=schedule, density=density)
        for schedule, density in product(SCHEDULES, DENSITIES)
    }
    blocks = {
        "training": training_table(v, eps, plain),
        "schedules": schedules_table(kinds),
        "densities": densities_table(kinds),
    }
    if v[0].runs > 1:  # one training does not say how much another one differs
        blocks["schedule-z"] = schedule_z_table(kinds, [e.run_se for e in v])
    return blocks


def training_table(v: list[Estimate], eps: list[Estimate], plain: list[Estimate]) -> str:
    """Return the Fréchet distances of the prediction types at equal training."""

    def z(a: list[Estimate], b: list[Estimate]) -> list[str]:
        return [signed(z_score(*pair)) for pair in zip(a, b, strict=True)]

    rows = [
        ["v", *map(with_margin, v)],
        ["ε", *map(with_margin, eps)],
        ["z, v against ε", *z(v, eps)],
        ["ε, loss not weighted", *map(with_margin, plain)],
        ["z, v against that", *z(v, plain)],
    ]
    if v[0].runs == 1:
        rows = [row for row in rows if not row[0].startswith("z, ")]
    return markdown_table(["", *HEAD], rows)


def schedules_table(kinds: Kinds) -> str:
    """Return the Fréchet distances of v-prediction under each schedule and density."""
    rows = [
        [f"{schedule.title}, {DENSITIES[density]}", *map(with_margin, distances)]
        for (schedule, density), distances in kinds.items()
    ]
    return markdown_table(["", *HEAD], rows)


def densities_table(kinds: Kinds) -> str:
    """Return the distance with uniform t over that with log-SNR normal."""
    rows = []
    for schedule in SCHEDULES:
        pairs = zip(kinds[schedule, "uniform"], kinds[schedule, "lognormal"], strict=True)
        rows.append([schedule.title, *(number(quotient(a, b).mean) for a, b in pairs)])
    return markdown_table([" over ".join(reversed(DENSITIES.values())), *HEAD], rows)


def schedule_z_table(kinds: Kinds, spread: Sequence[float]) -> str:
    """Return the difference of each pair of schedules in its standard errors.

    Args:
        spread: the standard error of one training, for each of ETAS.
    """
    rows = []
    for density, (a, b) in product(DENSITIES, combinations(SCHEDULES, 2)):
        z = [
            z_score(Estimate(x.mean, se), Estimate(y.mean, se))
            for x, y, se in zip(kinds[a, density], kinds[b, density], spread, strict=True)
        ]
        rows.append([f"{DENSITIES[density]}: {a.title} against {b.title}", *map(signed, z)])
    return markdown_table(["z", *HEAD], rows)
