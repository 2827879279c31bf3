"""Keys of kept results: what an image, a score or a training depends on.

The study keeps its images, scores and trainings between two runs. Each of them has a key, which is
a hash of all that it depends on besides its settings: the code that computes it, the weights that
it uses, the type of the device. If the key changes, the result is computed again.

The code is read as a syntax tree. It starts from named functions and classes and takes in, from
this repository, the definition of every name that they use. So an edited formula changes the key.
An edited comment, docstring, type annotation or error message does not, nor does a new sampler in
scheduler.py change the key of an old one.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lab.classifier import WEIGHTS

from experiments.variances import VARIANTS

ROOT = Path(__file__).resolve().parent.parent

NETWORK = ("unet:UNet",)  # where the code of a checkpoint's model starts
SCORES = ("metrics:score",)
TRAININGS = ("training.loop:train", "training.run:Training", "training.recipe:Recipe")

# Modules and definitions that handle results, but cannot change them. MNIST is in the list because
# its files are checked against their SHA-256, and SAMPLERS because only one entry of it counts.
PLUMBING = (
    "lab.checkpoint",
    "lab.cli",
    "lab.data:load_dataset",
    "lab.distributed",
    "lab.errors",
    "lab.files",
    "lab.pictures",
    "lab.threads",
    "experiments.variances:SAMPLERS",
    "training.loop:draw_and_tell",
    "training.loop:preview",
    "training.loop:progress_bar",
    "training.loop:tell_how_to_resume",
    "training.loop:validation_loss",
    "training.loop:write_what_is_due",
    "training.run:Meter",
    "training.run_files",
    "scheduler:SAMPLERS",
)


def images_of(sampler: str, model: tuple[str, ...] = NETWORK) -> tuple[str, ...]:
    """Return where the code of images starts: that of their sampler and of their model."""
    table = "experiments.variances:VARIANTS" if sampler in VARIANTS else "scheduler:SAMPLERS"
    return "experiments.grid:sample_cell", *model, f"{table}[{sampler}]"


def images_key(sampler: str, device_type: str, model: tuple[str, ...] = NETWORK) -> str:
    """Return the key of images; their settings and their checkpoint's SHA-256 are not in it.

    Args:
        model: where the code of the model starts.
    """
    return digest(code_key(images_of(sampler, model)), device_type)


@cache
def metrics_key() -> str:
    """Return the key of a score; the images are not in it."""
    return digest(code_key(SCORES), WEIGHTS.read_bytes())


def training_key(arguments: Iterable[str], device_type: str) -> str:
    """Return the key of a training of train.py with these arguments."""
    return digest(code_key(TRAININGS), device_type, *arguments)


def digest(*parts: str | bytes) -> str:
    """Return 12 hexadecimal digits that identify the parts."""
    hashes = (hashlib.sha256(p.encode() if isinstance(p, str) else p).digest() for p in parts)
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:12]


# ------------------------------------------------------------------------------ the key of code


@cache
def code_key(names: tuple[str, ...], root: Path = ROOT) -> str:
    """Return a hash of some definitions and of all that they use, see `definitions`."""
    found = definitions(names, root)
    return digest(*(part for name in sorted(found) for part in (name, found[name])))


def definitions(names: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return some definitions, and every definition in the repository that they use, as text.

    PLUMBING is left out, and what only PLUMBING uses.

    Args:
        names: where to start. "module:name" is a function, a class or a constant, and
            "module:name[key]" is one entry of a dictionary that is written out.
        root: the folder of the modules.

    Raises:
        ValueError: a module does not define a name.
    """
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        module = name.partition(":")[0]
        if name not in found and name not in PLUMBING and module not in PLUMBING:
            node = _definition(name, root)
            found[name] = canonical(node)
            todo += _used_names(node, module, root)
    return found


def canonical(node: object) -> str:
    """Write a syntax tree as text.

    What cannot change a result is left out: positions, comments, docstrings, annotations, and what
    is raised. Empty fields are left out, too, because they depend on the version of Python.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in _fields(node) if value not in (None, []))
    return f"{type(node).__name__}({', '.join(f'{n}={canonical(v)}' for n, v in fields)})"


def _fields(node: ast.AST) -> Iterable[tuple[str, object]]:
    """Yield the fields of a node that can change a result."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_comment", "kind") or isinstance(node, ast.Raise):
            continue
        if name == "body" and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = value[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_text and isinstance(first.value.value, str):
                value = value[1:]
        yield name, value


def _walk(node: object) -> Iterable[ast.AST]:
    """Yield a node and all nodes below it, without those that `canonical` leaves out."""
    if isinstance(node, list):
        for item in node:
            yield from _walk(item)
    elif isinstance(node, ast.AST):
        yield node
        for _, value in _fields(node):
            yield from _walk(value)


def _file(module: str, root: Path) -> Path:
    return root / f"{module.replace('.', '/')}.py"


@cache
def _read_module(module: str, root: Path) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return the top-level definitions of a module, and what its imports bind.

    An import of a module of the repository is bound to "module", and one of a name to
    "module:name". Other imports are left out.
    """
    tree = ast.parse(_file(module, root).read_text(encoding="utf-8"))
    defined: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                defined[target.id] = node
    imports: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "level", 0):
            continue  # the repository has no relative imports
        for alias in node.names:
            bound = alias.asname or alias.name
            if isinstance(node, ast.Import):
                if _file(alias.name, root).exists():
                    imports[bound] = alias.name
            elif _file(f"{node.module}.{alias.name}", root).exists():
                imports[bound] = f"{node.module}.{alias.name}"
            elif _file(node.module, root).exists():
                imports[bound] = f"{node.module}:{alias.name}"
    return defined, imports


def _definition(name: str, root: Path) -> ast.AST:
    """Return the syntax tree of "module:name" or "module:name[key]"."""
    module, _, wanted = name.partition(":")
    wanted, _, key = wanted.removesuffix("]").partition("[")
    node = _read_module(module, root)[0].get(wanted)
    if key and isinstance(getattr(node, "value", None), ast.Dict):
        entries = zip(node.value.keys, node.value.values, strict=True)
        node = next((v for k, v in entries if getattr(k, "value", None) == key), None)
    if node is None:
        raise ValueError(f"{_file(module, root)} does not define {name}")
    return node


def _used_names(node: ast.AST, module: str, root: Path) -> list[str]:
    """Return the definitions of the repository that a definition of `module` names."""
    defined, imports = _read_module(module, root)
    names = []
    for n in _walk(node):
        if isinstance(n, ast.Name) and n.id in defined:
            names.append(f"{module}:{n.id}")
        elif isinstance(n, ast.Name) and ":" in imports.get(n.id, ""):
            names.append(imports[n.id])
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
            target = imports.get(n.value.id, ":")
            if ":" not in target:
                names.append(f"{target}:{n.attr}")
    return names
