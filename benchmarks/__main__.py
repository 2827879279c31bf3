"""Measure this lab beside what people would use instead.

all parts but `quality`:  python -m benchmarks
some parts:               python -m benchmarks train sample --rounds 4
how good digits get:      python -m benchmarks quality --minutes 10 --peers diffusers

Run it in the repository's folder, or from anywhere with PYTHONPATH set to that folder. The parts:

  train      images per second, FLOP/s, memory, and where the time of a training step goes
  sample     images per second with 50 DDIM steps
  scheduler  microseconds of `step` and `add_noise`
  startup    seconds until infer.py answers --help and until it has made an image
  scale      cost against training steps, images and sampling steps; 2 processes against 1
  busy       how threads should wait, on the machine as it is and with one busy process more
  quality    scores of 1,000 images after equal training time

`train`, `sample` and `quality` compare with two peers of requirements-dev.txt. Their networks have
the usual size for MNIST, and they are trained as in their tutorials:

  diffusers     UNet2DModel 32-64-64, two layers per block, attention at 14x14 and 7x7, with the
                DDPM and DDIM schedulers
  ddpm-pytorch  denoising-diffusion-pytorch's Unet(64, dim_mults=(1, 2, 4)) and GaussianDiffusion

In every round each contestant has one turn, and medians over the rounds are compared. So whatever
slows the machine down slows all contestants, though not equally. To train and to sample, each
contestant has a process of its own. The results are printed as tables in Markdown.
"""

import argparse
import importlib
from pathlib import Path

from lab import cli

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("train", "sample", "scheduler", "startup", "scale", "busy", "quality")  # benchmarks/parts/
PEERS = ("diffusers", "ddpm-pytorch")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments; `parts` in the order of PARTS, `peers` a list of names."""
    natural = cli.number(int, 1)
    p = cli.Parser(__doc__)
    p.prog = "python -m benchmarks"
    p.add_argument("parts", nargs="*", metavar="PART", help="what to measure (all but quality)")
    p.add_argument("--rounds", type=natural, default=5, help="turns of each contestant")
    p.add_argument("--batch-size", type=natural, default=64, help="images per training step")
    p.add_argument("--alone", action="store_true", help="train, sample: leave out the peers")
    p.add_argument(
        "--json",
        type=cli.output_file(".json"),
        metavar="FILE.json",
        help="also write the figures to this file, after every part",
    )
    cli.add_device(p)
    cli.add_data(p)
    p.set_defaults(data=str(ROOT / "data"))
    quality = p.add_argument_group("options of quality")
    quality.add_argument(
        "--minutes",
        type=cli.number(float, 0, open_low=True),
        default=10.0,
        help="training time of each contestant",
    )
    quality.add_argument("--pred", choices=("v", "eps", "x0"), default="v", help="of ours")
    quality.add_argument("--seed", type=cli.number(int, 0, 2**31), default=0, help="of training")
    quality.add_argument(
        "--eta", type=cli.number(float, 0, 1), nargs="+", default=[0.0, 1.0], help="of sampling"
    )
    quality.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=argparse.SUPPRESS,
        help="train these too, each for as long (no name: both)",
    )
    args = p.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        p.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    asked = args.parts or [part for part in PARTS if part != "quality"]
    args.parts = [part for part in PARTS if part in asked]
    args.peers = (args.peers or list(PEERS)) if hasattr(args, "peers") else []
    args.data = Path(args.data).resolve()  # child processes run in other folders
    return args


def main() -> int:
    args = parse_args()
    from benchmarks.bench import Bench  # with torch, after --help has been answered

    with Bench(args) as bench:
        print(bench.where)
        for part in args.parts:
            importlib.import_module(f"benchmarks.parts.{part}").measure(bench)
            if args.json:
                bench.write_json(args.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
