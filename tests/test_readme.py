"""README.md and the other documents: their links lead where they say."""

import ast
import re

import pytest
from helpers import ROOT

DOCUMENTS = ("README.md", "results/STUDY.md", "benchmarks/README.md", "benchmarks/recipe.md")


def definitions(path) -> dict[str, int]:
    """Return the line of every function, class and method (as Class.method) of a module."""
    lines = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    lines[f"{node.name}.{method.name}"] = method.lineno
                    lines.setdefault(method.name, method.lineno)
    return lines


def anchors(path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_where_they_say(document):
    """A link to a line is `[`name`](file.py#Lline)`: the line defines that name."""
    wrong = []
    path = ROOT / document
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            wrong.append(f"{target} does not exist")
        elif file.suffix == ".md":
            wrong += [f"{target} is no heading"] if anchor and anchor not in anchors(file) else []
        elif anchor and definitions(file)[text.strip("`")] != int(anchor.removeprefix("L")):
            wrong.append(f"{text} is at line {definitions(file)[text.strip('`')]}, not {anchor}")
    assert not wrong, wrong


def test_the_files_of_the_readme_are_there():
    tree = re.search(r"## The files\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
