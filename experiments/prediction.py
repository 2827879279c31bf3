"""Which prediction type gives better samples at the same number of steps: v or ε?

The checkpoints of the study meet in pairs, in the order in which they were given, at the smallest
and at the largest η of the grid.

After one step an image is no more than the x₀ that was predicted from pure noise. The best guess
there is the mean of all digits, so that row does not rank samplers. A second table shows how sure
the classifier is of such an image.

Writes a table of the duels and a table of the confidence after one step.
"""

from collections.abc import Sequence
from itertools import pairwise, product

from experiments.common import Study
from experiments.duels import duel_table
from experiments.estimates import Results
from experiments.tables import captioned, markdown_table, with_se

TITLE = "Which prediction type?"
TABLES = ("prediction-duels", "prediction-one-step")
FIGURES = {}


def run(study: Study) -> dict[str, str]:
    """Return the tables."""
    results = study.grid()
    if not study.process.is_first:
        return {}
    tables = {}
    if len(study.subjects) > 1:
        tables["prediction-duels"] = duels_table(results, study.extremes)
    if 1 in results.steps:
        tables["prediction-one-step"] = one_step_table(results)
    return tables


def duels_table(results: Results, etas: Sequence[float]) -> str:
    """Return the duel of each pair of models, at each eta."""
    names = results.names
    return "\n\n".join(
        captioned(
            f"{names[a]} or {names[b]}, at η = {eta:g}?",
            duel_table(results, (a, eta), (b, eta)),
        )
        for (a, b), eta in product(pairwise(names), dict.fromkeys(etas))
    )


def one_step_table(results: Results) -> str:
    """Return the classifier's mean confidence after one step, where eta makes no difference."""
    confidences = [
        (name, with_se(results.estimate(label, 1, results.etas[0], "confidence"), ".2f"))
        for label, name in results.names.items()
    ]
    return markdown_table(("", "mean confidence after one step"), confidences)
