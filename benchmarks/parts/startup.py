"""How long a user waits for infer.py, beside `import torch`, which no script can avoid."""

import tempfile
from functools import partial

from benchmarks.bench import Bench
from benchmarks.measure import in_turns
from benchmarks.processes import ROOT, python


def measure(bench: Bench) -> None:
    """Print the rows of the part `startup`."""
    with tempfile.TemporaryDirectory() as folder:
        image = ("--ckpt", ROOT / "checkpoints/mnist-v.pt", "--steps", 20, "--n", 1)
        image += ("--out", f"{folder}/x.png", "--device", bench.args.device)
        works = {
            "import torch": partial(python, "-c", "import torch"),
            "--help": partial(python, ROOT / "infer.py", "--help"),
            "first image": partial(python, ROOT / "infer.py", *image),
        }
        seconds = in_turns(works, bench.rounds, bench.device)
    unit = seconds["import torch"]
    bench.row("python -c 'import torch', s", {"ours": unit})
    bench.row("infer.py --help, s", {"ours": seconds["--help"]}, "under 1 s")
    bench.row(
        "time to first image, 20 steps, s",
        {"ours": seconds["first image"]},
        f"at most {1.5 * unit + 1:.1f}",
        f"{seconds['first image'] / unit:.2f} x import torch",
    )
