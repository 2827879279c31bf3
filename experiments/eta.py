"""Does noise in the sampling steps help or harm: is η = 0 or η = 1 better?

For each checkpoint the smallest η of the grid meets the largest one, at every number of steps. Then
the ratio of the two Fréchet distances is compared with the ratio of the FIDs in table 1 of the DDIM
paper (Song et al. 2021, CIFAR-10). Above 1, noise harms. The ratio of the study's own short
trainings shows whether the length of the training matters; z is the difference of the two ratios.

Writes a table of the duels and a table of the ratios.
"""

from collections.abc import Sequence

from experiments.common import Study
from experiments.duels import duel_table
from experiments.estimates import Estimate, Results, quotient, z_score
from experiments.tables import captioned, markdown_table, signed, with_se
from experiments.trainings import ETAS, SCHEDULES, STEPS, Training, estimate_of, pick

TITLE = "Which η?"
TABLES = ("eta-duels", "eta-ratios")
FIGURES = {}

# Song et al. 2021, table 1: FID on CIFAR-10 at their eta = 0 and 1, which are also this lab's.
PAPER = {
    10: (13.36, 41.07),
    20: (6.84, 18.36),
    50: (4.67, 8.01),
    100: (4.16, 5.78),
    1000: (4.04, 4.73),
}


def run(study: Study) -> dict[str, str]:
    """Return the tables."""
    results = study.grid()
    trainings = pick(study.trainings, schedule=SCHEDULES[0], density="lognormal")
    trained = study.trained(trainings) if trainings else None
    low, high = study.extremes
    if not study.process.is_first or low == high:
        return {}
    duels = {"eta-duels": duels_table(results, low, high)}
    if (low, high) != (0, 1) or not PAPER.keys() & set(results.steps):
        return duels
    return duels | {"eta-ratios": ratios_table(results, trainings, trained)}


def duels_table(results: Results, low: float, high: float) -> str:
    """Return the duel of two etas for each model."""
    return "\n\n".join(
        captioned(results.title(label), duel_table(results, (label, low), (label, high)))
        for label in results.symbols
    )


def ratios_table(results: Results, trainings: Sequence[Training], trained: Results | None) -> str:
    """Return the distance at eta = 1 over that at eta = 0, ± standard error."""
    common = [steps for steps in PAPER if steps in results.steps]
    rows = [["the paper, FID", *(f"{b / a:.2f}" for a, b in (PAPER[s] for s in common))]]
    long: dict[str, dict[int, Estimate]] = {}
    for label, name in results.names.items():
        long[label] = {
            steps: quotient(*(results.estimate(label, steps, eta) for eta in reversed(ETAS)))
            for steps in common
        }
        rows.append([f"{name} here, Fréchet", *(with_se(r, ".2f") for r in long[label].values())])
    for pred, symbol in (("v", "v"), ("eps", "ε")) if trained else ():
        runs = pick(trainings, pred=pred)
        short = {
            steps: quotient(*(estimate_of(runs, trained, steps, eta) for eta in reversed(ETAS)))
            for steps in common
            if steps in STEPS
        }
        name = f"{symbol} of {runs[0].images:,} training images"
        rows.append([name, *(with_se(short[s], ".2f") if s in short else "" for s in common)])
        for label in (label for label, s in results.symbols.items() if s == symbol):
            z = {s: signed(z_score(long[label][s], short[s])) for s in short}
            name = f"z, {results.names[label]} here against that"
            rows.append([name, *(z.get(s, "") for s in common)])
    return markdown_table(["steps", *common], rows)
