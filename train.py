"""Train a diffusion UNet on MNIST.

one CPU or GPU:   python train.py --pred v
a time budget:    python train.py --pred eps --minutes 10
digits on demand: python train.py --pred v --labels --out checkpoints/v-labels.pt
DDPM's own loss:  python train.py --pred eps --schedule linear --density uniform --max-weight 1 \\
                           --clip-sample-range 1
other images:     python train.py --pred v --dataset fashion-mnist --out checkpoints/fashion-v.pt
several GPUs:     torchrun --nproc-per-node=8 train.py --pred v --batch-size 512
several nodes:    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d \\
                           --rdzv-endpoint=HOST:29500 train.py --pred v --batch-size 1024
after a stop:     python train.py --resume checkpoints/v.state.pt
a longer run:     python train.py --resume checkpoints/v.state.pt --epochs 10

It writes OUT.pt (the checkpoint for infer.py), OUT.state.pt (for --resume), OUT.jsonl (the log),
OUT.png (the loss curve) and sample grids. The files of an earlier run are kept as OUT.1.pt and so
on. Ctrl-C saves and exits. A run that was stopped or killed and then resumed ends with the same
weights as an uninterrupted one, bit for bit on a CPU, if its length is given in epochs or steps and
does not change.
"""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from lab import cli
from lab.data import DATASETS
from lab.errors import UserError

from scheduler import BETA_SCHEDULES
from training.loop import add_optimizer_options, add_options, given_arguments, start, take_over
from training.recipe import LENGTH, Recipe
from training.run import PRED_OPTIONS, Training, read_state
from training.run_files import STUDENTS, RunFiles

RECIPE = [field.name for field in fields(Recipe)]


def main() -> int:
    args, given = parse_args()
    state, note = None, None
    if args.resume is not None:
        state = read_state(args.resume, Training.script)
        out = args.resume.removesuffix(".state.pt") + ".pt"
        note = take_over(args, given, state, parse_args, out, may_change=LENGTH)
    else:
        check_effect(args, given)
    recipe = Recipe(**{name: getattr(args, name) for name in RECIPE})
    options = {k: v for k, v in vars(args).items() if k not in (*RECIPE, "out", "resume")}

    def make_run(images, labels) -> Training:
        return Training(recipe, images, labels)

    files = RunFiles(Path(args.out), Path(args.samples))
    return start(make_run, args, options, files, state, [note])


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Return the arguments, and the names of those that were given on the command line."""
    p = make_parser()
    args = p.parse_args(argv)
    given = given_arguments(p, argv)
    if args.channels % 2:
        p.error(f"--channels must be even, not {args.channels}")
    if not (args.epochs or args.steps or args.minutes):
        args.epochs = 5
    args.out = args.out or f"checkpoints/{args.pred}.pt"
    if args.out.endswith(".state.pt"):
        p.error(f"--out {args.out} would be mistaken for a training state: choose another name")
    if Path(args.out).stem.endswith(STUDENTS):
        p.error(f"--out {args.out} would be mistaken for a run of distill.py: choose another name")
    files = RunFiles(Path(args.out), Path(args.samples))
    if files.grid.resolve() == files.loss_curve.resolve():
        p.error(f"--samples {args.samples} would give two pictures of {args.out} the same name")
    return args, given


def check_effect(args: argparse.Namespace, given: set[str]) -> None:
    """Check that every option that was given has an effect.

    Raises:
        UserError: one has no effect beside the others.
    """
    if "low_noise" in given and args.density == "uniform":
        raise UserError("--low-noise has no effect with --density uniform: leave it out")
    if "max_weight" in given and args.pred != "eps":
        raise UserError(f"--max-weight has no effect with --pred {args.pred}: leave it out")


def make_parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    p.set_defaults(**asdict(Recipe()))
    add_run(p.add_argument_group("what to train"))
    add_places(p.add_argument_group("where"))
    add_recipe(p.add_argument_group("how"))
    return p


def add_run(main: argparse._ArgumentGroup) -> None:
    """Add what is trained, how long, and with which seed."""
    natural = cli.number(int, 1)
    main.add_argument(
        "--pred",
        choices=PRED_OPTIONS,
        help="what the network predicts: v, the noise eps, or the clean image x0",
    )
    main.add_argument("--dataset", choices=DATASETS, help="what to learn")
    main.add_argument(
        "--labels",
        action="store_true",
        help="also train on the labels: infer.py --label 7 can then ask for a 7",
    )
    length = main.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=natural, help="length of the run (default: 5 epochs)")
    length.add_argument("--steps", type=natural, help="length of the run in optimizer steps")
    length.add_argument(
        "--minutes",
        type=cli.number(float, 0, 1e6, open_low=True),
        help="length of the run in wall-clock minutes",
    )
    main.add_argument(
        "--seed", type=cli.number(int, 0, 2**31), help="seed of weights, order and noise"
    )
    main.add_argument(
        "--resume",
        metavar="FILE.state.pt",
        help="continue the run saved in this file. Of what decides the weights, only the length "
        "may change",
    )


def add_places(where: argparse._ArgumentGroup) -> None:
    """Add the files of the run, the device, and how often it saves."""
    where.add_argument(
        "--out",
        type=cli.output_file(".pt"),
        metavar="FILE.pt",
        help="the checkpoint (default: checkpoints/<pred>.pt)",
    )
    add_options(where)
    where.add_argument(
        "--keep",
        type=cli.number(int, 1),
        nargs="+",
        default=[],
        metavar="STEP",
        help="also keep the checkpoint of these steps, as OUT-step<STEP>.pt",
    )


def add_recipe(how: argparse._ArgumentGroup) -> None:
    """Add the optimizers, the density of t, the network and the noise schedule."""
    add_optimizer_options(how)
    how.add_argument(
        "--density",
        choices=("lognormal", "uniform"),
        help="how timesteps are drawn: log-SNR = log(abar / (1 - abar)) from N(-0.5, 1.5^2), which "
        "prefers middle noise; or t uniformly, as in DDPM",
    )
    how.add_argument(
        "--low-noise",
        type=cli.number(float, 0, 1),
        help="lognormal only: share of the images with log-SNR from N(5, 2^2) instead: low noise",
    )
    how.add_argument("--channels", type=cli.number(int, 2, 1024), help="width of the UNet, even")
    how.add_argument(
        "--schedule",
        choices=BETA_SCHEDULES,
        help="noise schedule; squaredcos_cap_v2 is diffusers' name of cosine",
    )
    how.add_argument(
        "--zero-snr",
        action="store_true",
        help="rescale the schedule to abar_T = 0, pure noise (not for eps)",
    )
    how.add_argument(
        "--timesteps",
        type=cli.number(int, 1, 100_000),
        help="T of the schedule; with another T than 1000 use cosine",
    )
    how.add_argument(
        "--clip-sample-range",
        type=cli.number(float, 1, 10),
        help="the range of x_0: black becomes minus this, white this, and gray stays in (-1, 1). "
        "Above 1, small errors of black and white pixels do not show in the image",
    )


if __name__ == "__main__":
    cli.run(main)
