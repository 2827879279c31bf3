"""Scores of 1,000 images after equal training time. One run each: seeds differ, see recipe.md."""

import itertools
import json
import tempfile
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.processes import ROOT, python

SCORES = {"frechet": "Fréchet distance (LeNet features)", "confidence": "mean confidence"}


def measure(bench: Bench) -> None:
    """Print the rows of the part `quality`."""
    args = bench.args
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = ours(bench, folder)
        for peer in args.peers:
            arrays |= samples_of_peer(bench, peer, folder)
        report = folder / "scores.json"
        options = ("--json", report, "--data", args.data)
        python(ROOT / "metrics.py", *arrays.values(), *options)
        report = json.loads(report.read_text())
    scores = {key: report["scores"][str(array)] for key, array in arrays.items()}
    reference = report["references"]["1000"]
    for eta, (key, label) in itertools.product(args.eta, SCORES.items()):
        bench.row(
            f"{args.minutes:g} minutes of training ({args.pred}), 50 steps, eta {eta:g}: {label}",
            {name: score[key] for (name, e), score in scores.items() if e == eta},
            note=f"standard error of ours {scores['ours', eta][key + '_se']:.2g}, "
            f"real images {reference[key]:.3g}",
        )


def ours(bench: Bench, folder: Path) -> dict[tuple[str, float], Path]:
    """Run train.py and infer.py; return the arrays of images by contestant and eta."""
    args, out, device = bench.args, folder / "ours.pt", ("--device", bench.args.device)
    options = ("--pred", args.pred, "--minutes", args.minutes, "--seed", args.seed, "--out", out)
    options += ("--batch-size", args.batch_size, "--samples", folder / "samples")
    python(ROOT / "train.py", *options, "--data", args.data, *device)
    arrays = {}
    for eta in args.eta:
        array = folder / f"ours-eta{eta:g}.npy"
        options = ("--ckpt", out, "--n", 1000, "--steps", 50, "--eta", eta, "--save-npy")
        options += ("--batch-size", 100, "--out", array.with_suffix(".png"))
        python(ROOT / "infer.py", *options, *device)
        arrays["ours", eta] = array
    return arrays


def samples_of_peer(bench: Bench, peer: str, folder: Path) -> dict[tuple[str, float], Path]:
    """Train a peer for as long; return its arrays of images by contestant and eta."""
    arrays = {(peer, eta): folder / f"{peer}-eta{eta:g}.npy" for eta in bench.args.eta}
    with bench.start(peer, seed=bench.args.seed) as worker:
        worker("train_for", bench.args.minutes)
        for (_, eta), array in arrays.items():
            worker("write_samples", eta, str(array))
    return arrays
