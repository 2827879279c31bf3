"""experiments/keys.py: an edit that can change a result changes its key, and no other edit does."""

import ast

import pytest
from helpers import copy_lab

from experiments import guidance, keys
from experiments.keys import code_key, digest

START = ("formula:f",)
FORMULA = '''"""A module."""

from lab.constants import SCALE, unused
import tools

TABLE = {"a": 1.0, "b": 2.0}  # a comment


class Base:
    """A base."""

    power: int = 2


class Shape(Base):
    """A shape."""

    def area(self, x: float) -> float:
        """Return the area."""
        if x < 0:
            raise ValueError(f"x is {x}")
        return x**self.power


def f(x: float, factor: float = 3.0) -> float:
    """Return the result."""
    return helper(x) * factor * TABLE["a"] + Shape().area(x)


def helper(x):
    return SCALE * tools.double(x)


def another(x):
    return unused(x)
'''
FILES = {
    "formula.py": FORMULA,
    "tools.py": "def double(x):\n    return x + x\n\n\ndef triple(x):\n    return 3 * x\n",
    "lab/__init__.py": "",
    "lab/constants.py": "SCALE = 0.5\n\n\ndef unused(x):\n    return x\n",
}


def key_of(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return code_key(START, folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("formula.py", "Return the result.", "Return it.", False),
        ("formula.py", '        """Return the area."""\n', "", False),
        ("formula.py", "# a comment", "# another comment", False),
        ("formula.py", "x: float, factor: float", "x, factor: int", False),
        ("formula.py", "x is {x}", "x must not be negative", False),
        ("formula.py", "\n\n\ndef helper", "\n\n\n\n\ndef helper", False),
        ("formula.py", "return unused(x)", "return 2 * unused(x)", False),
        ("lab/constants.py", "return x", "return 2 * x", False),
        ("tools.py", "return 3 * x", "return 4 * x", False),
        ("formula.py", "helper(x) * factor", "helper(x) + factor", True),
        ("formula.py", "factor: float = 3.0", "factor: float = 3.5", True),
        ("formula.py", "power: int = 2", "power: int = 3", True),
        ("formula.py", "x**self.power", "x * self.power", True),
        ("formula.py", "if x < 0", "if x <= 0", True),
        ("formula.py", '"a": 1.0', '"a": 1.5', True),
        ("lab/constants.py", "SCALE = 0.5", "SCALE = 0.25", True),
        ("tools.py", "return x + x", "return x + x + 1", True),
    ],
)
def test_edits_of_code(tmp_path, file, old, new, changes):
    assert FILES[file].count(old) == 1
    edited = FILES | {file: FILES[file].replace(old, new)}
    before, after = (key_of(tmp_path / str(i), files) for i, files in enumerate((FILES, edited)))
    assert (before != after) == changes


def test_an_entry_of_a_dictionary_stands_alone(tmp_path):
    def key(folder, table):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "formula.py").write_text(f"TABLE = {table}\n\n\ndef g():\n    pass\n")
        return code_key(("formula:TABLE[a]",), tmp_path / folder)

    one, two = key("1", "{'a': g, 'b': 1}"), key("2", "{'a': g, 'b': 2, 'c': 3}")
    assert one == two != key("3", "{'a': len, 'b': 1}")


def test_a_name_that_is_not_defined_is_an_error(tmp_path):
    key_of(tmp_path, FILES)
    with pytest.raises(ValueError, match="does not define formula:g"):
        code_key(("formula:g",), tmp_path)


# ------------------------------------------------------------------------- the lab's own code

STARTS = {
    "ddim": keys.images_of("ddim"),
    "ddpm": keys.images_of("ddpm"),
    "dpm++": keys.images_of("dpm++"),
    "ddpm-large": keys.images_of("ddpm-large"),
    "ddpm-optimal": keys.images_of("ddpm-optimal"),
    "guided": keys.images_of("ddim", guidance.CODE),
    "score": keys.SCORES,
    "training": keys.TRAININGS,
}
IMAGES = {"ddim", "ddpm", "dpm++", "ddpm-large", "ddpm-optimal", "guided"}


@pytest.fixture(scope="module")
def before():
    return {result: code_key(names) for result, names in STARTS.items()}


def keys_after(folder, module, edit):
    """Return the keys of a copy of the lab, with the syntax tree of a module edited."""
    copy_lab(folder)
    path = folder / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    edit(tree)
    path.write_text(ast.unparse(tree))  # which drops all comments
    return {result: code_key(names, folder) for result, names in STARTS.items()}


def find(tree, name):
    """Return the definition "function" or "Class.method"."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


@pytest.mark.parametrize(
    ("module", "name", "changed"),
    [
        ("diffusion", "sample", IMAGES),
        ("diffusion", "training_loss", {"training"}),
        ("scheduler", "make_betas", IMAGES | {"training"}),
        ("scheduler", "DDPMScheduler.step", IMAGES | {"training"}),
        ("diffusion", "guided", {"guided"}),
        ("scheduler", "DDIMScheduler.step", {"ddim", "dpm++", "guided"}),  # which inherits from it
        ("scheduler", "DPMSolverMultistepScheduler.step", {"dpm++"}),
        ("unet", "UNet.forward", IMAGES | {"training"}),
        ("lab.noise", "image_noise", IMAGES),
        ("lab.data", "to_uint8", IMAGES),
        ("lab.data", "to_model_range", {"training", "ddpm-optimal"}),  # which knows real images
        ("lab.data", "load_dataset", set()),
        ("training.optim", "Muon.step", {"training"}),
        ("training.run", "Run.next_batch", {"training"}),
        ("lab.pictures", "make_grid", set()),
        ("lab.classifier", "LeNet.features", {"score"}),
        ("lab.classifier", "train", set()),
        ("metrics", "kid", {"score"}),
        ("metrics", "save_pairs", set()),
        ("training.loop", "train", {"training"}),
        ("training.loop", "preview", set()),
        ("experiments.grid", "sample_cell", IMAGES),
        ("experiments.grid", "read_row", set()),
        ("experiments.variances", "large_variance", {"ddpm-large"}),
        ("experiments.variances", "OptimalVariance.step", {"ddpm-optimal"}),
        ("experiments.variances", "OptimalVariance.x0_error", {"ddpm-optimal"}),
        ("experiments.eta", "with_x0_errors", set()),
    ],
)
def test_edits_of_the_lab(tmp_path, before, module, name, changed):
    def edit(tree):
        find(tree, name).body.append(ast.parse("print()").body[0])

    after = keys_after(tmp_path, module, edit)
    assert {result for result in STARTS if after[result] != before[result]} == changed


@pytest.mark.parametrize("module", ["diffusion", "scheduler", "unet", "metrics", "training.loop"])
def test_no_docstring_and_no_comment_of_the_lab_matters(tmp_path, before, module):
    def edit(tree):
        for node in ast.walk(tree):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            if isinstance(node, kinds) and ast.get_docstring(node):
                node.body[0].value.value = "Another text."

    assert keys_after(tmp_path, module, edit) == before


def test_a_new_sampler_does_not_touch_the_others(tmp_path, before):
    def edit(tree):
        samplers = next(
            node
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "SAMPLERS"
        )
        samplers.value.keys.append(ast.Constant("new"))
        samplers.value.values.append(ast.Name("DDIMScheduler"))

    assert keys_after(tmp_path, "scheduler", edit) == before


def test_keys_hold_more_than_the_code():
    assert keys.images_key("ddim", "cpu") != keys.images_key("ddim", "cuda")
    arguments = ["--pred", "v"]
    training = keys.training_key(arguments, "cpu")
    assert training == keys.training_key(list(arguments), "cpu")
    assert training != keys.training_key(arguments, "cuda")
    assert training != keys.training_key(["--pred", "eps"], "cpu")
    assert digest("ab", "c") != digest("a", "bc")
