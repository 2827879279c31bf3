"""Tables in markdown, and the file that they stand in.

STUDY.md is written by a person. Its tables stand between two markers:

    <!-- table NAME -->
    | steps | 10 | 20 |
    ...
    <!-- end -->

A run of the study replaces what is between them, and nothing else.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

from lab.errors import UserError

from experiments.estimates import Estimate

BLOCK = re.compile(r"(<!-- table (\S+) -->\n)((?:(?!<!--).)*?)(<!-- end -->)", re.DOTALL)


# --------------------------------------------------------------------------------- one table


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table whose first column is text and whose other columns are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)  # true minus signs


def captioned(caption: str, table: str) -> str:
    return f"**{caption}**\n\n{table}"


def number(value: float, form: str = ".1f") -> str:
    """Return a number in this format; "+∞", "−∞", or "–" if it is not defined."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    return format(value, form)


def with_se(e: Estimate, form: str = ".1f") -> str:
    """Return the mean ± its standard error; "–" if it is not defined. Only the mean gets a +."""
    if math.isnan(e.mean):
        return "–"
    return f"{number(e.mean, form)} ± {number(e.se, form.removeprefix('+'))}"


def with_margin(e: Estimate, form: str = ".1f") -> str:
    """Return the mean ± half of the 95 % interval for a run with another seed."""
    return f"{number(e.mean, form)} ± {number(e.margin, form)}"


def best_in_bold(column: Sequence[Estimate]) -> list[str]:
    """Return each mean ± its margin. The smallest is bold, unless all are equal.

    Means that differ by rounding only, as those of DDPM and of DDIM at eta = 1, are equal.
    """
    best = min(e.mean for e in column)
    equal = [math.isclose(e.mean, best, rel_tol=1e-4) for e in column]
    marks = ["**" if is_best and not all(equal) else "" for is_best in equal]
    return [f"{mark}{with_margin(e)}{mark}" for mark, e in zip(marks, column, strict=True)]


def signed(z: float) -> str:
    return number(z, "+.1f")


def size_of(images: int, column: Sequence[Estimate]) -> str:
    """Return the images per cell, and the seeds of a column: "*1,000 × 3*", "*1,000 × 3 to 10*"."""
    few, many = (f(e.runs for e in column) for f in (min, max))
    return f"*{images:,} × {few}*" if few == many else f"*{images:,} × {few} to {many}*"


# ---------------------------------------------------------------------------------- STUDY.md


def refresh(text: str, tables: Mapping[str, str]) -> tuple[str, list[str]]:
    """Replace the tables in a text.

    Args:
        tables: the new tables by their names. Those whose names the text does not have are left
            out, and so are tables of the text that are not given.

    Returns:
        The new text, and the headings of the sections whose tables have changed.

    Raises:
        UserError: a marker has no end.
    """
    if len(BLOCK.findall(text)) != len(re.findall("<!-- table ", text)):
        raise UserError("STUDY.md has a table marker without its <!-- end -->")
    changed = []

    def replace(block: re.Match) -> str:
        start, name, old, end = block.groups()
        new = f"{tables[name]}\n" if tables.get(name) else ""
        if name not in tables or new == old:
            return block[0]
        changed.append(heading_at(text, block.start()))
        return f"{start}{new}{end}"

    return BLOCK.sub(replace, text), list(dict.fromkeys(changed))


def names(text: str) -> list[str]:
    """Return the names of the tables in a text."""
    return [name for _, name, _, _ in BLOCK.findall(text)]


def heading_at(text: str, position: int) -> str:
    """Return the heading of the section that a position of the text lies in."""
    headings = re.findall(r"^#+ (.*)$", text[:position], re.MULTILINE)
    return headings[-1] if headings else "before the first heading"


def skeleton(experiments: Iterable[ModuleType]) -> str:
    """Return a STUDY.md without prose: a section for each experiment, its tables still empty."""
    blocks = ["# The study", "[results.csv](results.csv) has one row per cell."]
    for module in experiments:
        question = " ".join(module.__doc__.partition("\n\n")[0].split())
        blocks += [f"## {module.TITLE}", question]
        blocks += [f"<!-- table {name} -->\n<!-- end -->" for name in module.TABLES]
        blocks += [f"![{caption}]({file})" for file, caption in module.FIGURES.items()]
    return "\n\n".join(blocks) + "\n"
