"""Duels: two settings against each other at every number of steps."""

from experiments.estimates import Results, z_score
from experiments.tables import markdown_table, signed, with_se

Side = tuple[str, float]  # the label of a model, and eta


def duel_table(results: Results, a: Side, b: Side) -> str:
    """Return Fréchet distance and KID of two sides at every number of steps, ± standard errors.

    z is the difference in standard errors of the difference. It is negative where the first side is
    better. At |z| < 2 the two are not significantly different.
    """
    sides = side_names(results, a, b)
    rows = []
    for steps in results.steps:
        row = [str(steps)]
        for key in ("frechet", "kid"):
            pair = [results.estimate(label, steps, eta, key) for label, eta in (a, b)]
            row += [*map(with_se, pair), signed(z_score(*pair))]
        rows.append(row)
    head = [f"{key}, {name}" for key in ("Fréchet", "KID") for name in (*sides, "z")]
    return markdown_table(["steps", *head], rows)


def side_names(results: Results, a: Side, b: Side) -> list[str]:
    """Return what two sides are called: by eta if they are of the same model, else by the model."""
    if a[0] == b[0]:
        return [f"η = {eta:g}" for _, eta in (a, b)]
    return [results.names[label] for label, _ in (a, b)]
