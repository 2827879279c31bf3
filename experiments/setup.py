"""What was run, on which machine and with which checkpoints, and how do real images score?

The real-data reference is the score of as many real training images as a cell has. No sample can be
expected to score better. A Fréchet distance falls with the number of images n, also for real ones,
so there is a reference for each n.

Writes the tables of the settings, of the checkpoints and of the reference.
"""

from datetime import date

from experiments.common import Study
from experiments.estimates import Results
from experiments.grid import Subject
from experiments.tables import markdown_table, number

TITLE = "Setup"
TABLES = ("setup", "checkpoints", "reference")
FIGURES = {}


def run(study: Study) -> dict[str, str]:
    """Return the tables."""
    results = study.grid()
    if not study.process.is_first:
        return {}
    sizes = sorted({row["n"] for row in results.rows}, reverse=True)
    return {
        "setup": setup_table(results, study.command),
        "checkpoints": checkpoints_table(study.subjects),
        "reference": reference_table([study.reference(n) for n in sizes]),
    }


def setup_table(results: Results, command: str) -> str:
    """Return the settings of the grid. Kept cells may be of several machines or commits."""

    def every(column: str) -> str:
        return ", ".join(dict.fromkeys(str(row[column]) for row in results.rows))

    rows = results.rows
    processes = {f"{row['processes']} × {row['threads']}": None for row in rows}
    return markdown_table(
        ("", ""),
        [
            ("command", f"`{command}`"),
            ("date", date.today()),
            ("cells", f"{len(rows):,}"),
            ("images", f"{sum(row['n'] for row in rows):,}"),
            ("minutes of sampling", f"{sum(row['seconds'] for row in rows) / 60:.0f}"),
            ("device", every("device")),
            ("processes × threads", ", ".join(processes)),
            ("torch", every("torch")),
            ("commit", every("commit")),
        ],
    )


def checkpoints_table(subjects: list[Subject]) -> str:
    """Return what each checkpoint is."""
    rows = [(s.path, s.symbol, f"{s.training_images:,}", f"`{s.sha256[:12]}`") for s in subjects]
    return markdown_table(("checkpoint", "predicts", "training images", "SHA-256"), rows)


def reference_table(references: list[dict]) -> str:
    """Return the scores of real images, one row for each n."""

    def cell(score: dict, key: str, form: str) -> str:
        return f"{number(score[key], form)} ± {number(score[f'{key}_se'], form)}"

    columns = {
        "Fréchet distance": ("frechet", ".1f"),
        "KID": ("kid", ".1f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "mean confidence": ("confidence", ".3f"),
    }
    rows = [(f"{s['n']:,}", *(cell(s, *c) for c in columns.values())) for s in references]
    return markdown_table(("n", *columns), rows)
