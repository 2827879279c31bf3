"""Train a diffusion UNet on MNIST.

one CPU or GPU:   python train.py --pred v
a time budget:    python train.py --pred eps --minutes 10
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
import math
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

from lab import cli
from lab.data import DATASETS, load_dataset, to_uint8
from lab.device import bfloat16_convolutions
from lab.distributed import Process, launch
from lab.errors import UserError
from lab.files import only_process
from lab.pictures import save_grid
from lab.recipe import Recipe
from lab.run_files import RunFiles
from lab.runs import PRED_OPTIONS, Meter, Run, read_state

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import sample, training_loss
from scheduler import BETA_SCHEDULES, DDIMScheduler

RECIPE = [field.name for field in fields(Recipe)]
LENGTH = ("epochs", "steps", "minutes")
WELL_MIXED = 0.01  # abar_T above it: x_T still shows the image, and N(0, I) is the wrong start


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Return the arguments, and the names of those that were given on the command line."""
    natural, positive = cli.number(int, 1), cli.number(float, 0, open_low=True)
    p = cli.Parser(__doc__)
    p.set_defaults(**asdict(Recipe()))

    main = p.add_argument_group("what to train")
    main.add_argument(
        "--pred",
        choices=PRED_OPTIONS,
        help="what the network predicts: v, the noise eps, or the clean image x0",
    )
    main.add_argument("--dataset", choices=DATASETS, help="what to learn")
    length = main.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=natural, help="length of the run (default: 5 epochs)")
    length.add_argument("--steps", type=natural, help="length of the run in optimizer steps")
    length.add_argument(
        "--minutes",
        type=cli.number(float, 0, 1e6, open_low=True),
        help="length of the run in wall-clock minutes",
    )
    main.add_argument("--seed", type=cli.number(int, 0, 2**31), help="seed of weights and noise")
    main.add_argument(
        "--resume", metavar="FILE.state.pt", help="continue the run saved in this file"
    )

    where = p.add_argument_group("where")
    where.add_argument(
        "--out",
        type=cli.output_file(".pt"),
        metavar="FILE.pt",
        help="the checkpoint (default: checkpoints/<pred>.pt)",
    )
    where.add_argument("--samples", default="samples", metavar="DIR", help="folder of the grids")
    cli.add_data(where)
    cli.add_device(where)
    where.add_argument("--compile", action="store_true", help="torch.compile, for a GPU (untried)")
    where.add_argument(
        "--save-every",
        type=natural,
        metavar="STEPS",
        help="steps between saves (default: an epoch)",
    )
    where.add_argument(
        "--keep",
        type=natural,
        nargs="+",
        default=[],
        metavar="STEP",
        help="also keep the checkpoint of these steps, as OUT-step<STEP>.pt",
    )
    where.add_argument(
        "--log-every", type=natural, default=50, metavar="STEPS", help="steps per line of the log"
    )

    how = p.add_argument_group("how")
    how.add_argument("--batch-size", type=natural, help="images per step, over all processes")
    how.add_argument("--lr", type=positive, help="peak learning rate of AdamW")
    how.add_argument(
        "--muon-lr",
        type=cli.number(float, 0, 1e30),
        help="peak learning rate of Muon, which updates the hidden weight matrices "
        "(0: AdamW updates all)",
    )
    how.add_argument("--warmup", type=natural, help="steps of warm-up, at most a fifth of the run")
    how.add_argument("--clip", type=positive, help="upper bound of the gradient norm")
    how.add_argument("--ema", type=cli.number(float, 0, 1), help="EMA decay per step")
    how.add_argument(
        "--density",
        choices=("lognormal", "uniform"),
        help="how timesteps are drawn: log-SNR from N(-0.5, 1.5^2), or t uniformly",
    )
    how.add_argument(
        "--low-noise",
        type=cli.number(float, 0, 1),
        help="lognormal only: share of the images with log-SNR from N(5, 2^2) instead",
    )
    how.add_argument(
        "--max-weight",
        type=cli.number(float, 1),
        help="eps only: upper bound of the loss weight 1/abar (1: unweighted)",
    )
    how.add_argument("--channels", type=cli.number(int, 2, 1024), help="width of the UNet, even")
    how.add_argument("--schedule", choices=BETA_SCHEDULES, help="noise schedule")
    how.add_argument("--zero-snr", action="store_true", help="rescale the schedule to abar_T = 0")
    how.add_argument("--timesteps", type=cli.number(int, 1, 100_000), help="T of the schedule")
    how.add_argument(
        "--clip-sample-range",
        type=cli.number(float, 1, 10),
        help="the range of x_0: black is minus this, white is this, the gray between in (-1, 1)",
    )

    args = p.parse_args(argv)
    given = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    if args.channels % 2:
        p.error(f"--channels must be even, not {args.channels}")
    if not (args.epochs or args.steps or args.minutes):
        args.epochs = 5
    args.out = args.out or f"checkpoints/{args.pred}.pt"
    if args.out.endswith(".state.pt"):
        p.error(f"--out {args.out} would be mistaken for a training state: choose another name")
    files = RunFiles(Path(args.out), Path(args.samples))
    if files.grid.resolve() == files.loss_curve.resolve():
        p.error(f"--samples {args.samples} would give two pictures of {args.out} the same name")
    return args, {name for name, value in vars(given).items() if value is not None}


def take_over(args: argparse.Namespace, given: set[str], state: dict) -> str | None:
    """Replace the arguments that were not given by those of the run to resume.

    The run continues in the folder of its state, wherever it was written. Its length may change.

    Returns:
        A note for the user if the length changes.

    Raises:
        UserError: an argument that was given contradicts the recipe of the run, or the stored ones
            cannot be used.
    """
    out = args.resume.removesuffix(".state.pt") + ".pt"
    try:
        arguments = state["options"] | state["recipe"]
        if set(state["recipe"]) != set(RECIPE) or not set(arguments) <= set(vars(args)):
            raise UserError("they are not those of this version")
        stored, _ = parse_args(cli.as_command_line(arguments | {"out": out}))
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(f"{args.resume} holds unusable arguments: {error}") from None
    for name in sorted(given.intersection(RECIPE).difference(LENGTH)):
        if getattr(args, name) != getattr(stored, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {args.resume}, "
                f"whose run has {getattr(stored, name)}: leave it out"
            )
    note, length = None, {name: getattr(args, name) for name in LENGTH}
    if given.intersection(LENGTH) and length != {name: getattr(stored, name) for name in LENGTH}:
        vars(stored).update(length)
        note = (
            "the length of the run changes: from here on the learning rate falls to 0 along the "
            "line of the new length, so the result is not that of one run of this length"
        )
    vars(args).update(vars(stored) | {name: getattr(args, name) for name in given})
    return note


def check_schedule(run: Run) -> str | None:
    """Return a note if the schedule does not end in nearly pure noise."""
    abar_T = run.scheduler.alphas_cumprod[-1].item()
    if abar_T <= WELL_MIXED:
        return None
    return (
        f"abar_T is {abar_T:.2g}, but sampling starts from pure noise, which is abar_T = 0: "
        "use --schedule cosine, --zero-snr or more --timesteps"
    )


# ------------------------------------------------------------------------------- now and then


@torch.inference_mode()
def validation_loss(run: Run, images: Tensor) -> float:
    """Return the loss of the EMA weights on these images; t and eps are the same in every run."""
    generator = torch.Generator(images.device).manual_seed(0)
    total = 0.0
    for batch in images.split(256):
        x0 = run.to_model_range(batch)
        loss = training_loss(run.ema, run.scheduler, x0, run.cdf, run.loss_weights, generator)
        total += loss * len(batch)
    return (total / len(images)).item()


def preview(run: Run, path: Path, steps: int) -> None:
    """Write a grid of 64 samples of the EMA weights."""
    scheduler = DDIMScheduler(**run.scheduler.config)
    scheduler.set_timesteps(min(steps, run.recipe.timesteps))
    indices = torch.arange(64, device=run.images.device)
    shape = tuple(run.images.shape[1:])
    x = sample(run.ema, scheduler, indices, shape, seed=run.recipe.seed, eta=1.0)
    try:
        save_grid(path, to_uint8(x), nrow=8)
    except UserError as error:  # a picture is not worth a training
        tqdm.write(f"note: {error}", file=sys.stderr)


def progress_bar(run: Run, process: Process) -> tqdm:
    return tqdm(
        total=run.total_steps * run.recipe.batch_size,
        initial=run.step * run.recipe.batch_size,
        unit="img",
        unit_scale=True,
        disable=not process.is_first,
        smoothing=0.05,
        desc=f"{run.recipe.pred} on {process.device.type}",
    )


# ----------------------------------------------------------------------------------- the script


def main() -> int:
    args, given = parse_args()
    notes, state = [], None
    if args.resume is not None:
        state = read_state(args.resume)
        notes.append(take_over(args, given, state))
    files = RunFiles(Path(args.out), Path(args.samples))
    with launch(args.device, backend="nccl", timeout=timedelta(minutes=30)) as process:
        if args.batch_size % process.world:
            raise UserError(
                f"--batch-size {args.batch_size} does not split over {process.world} processes"
            )
        lock = only_process(files.state, says=files.checkpoint)
        with lock if process.is_first else nullcontext():
            if process.is_first:  # it downloads what is missing, and the others wait
                load_dataset(args.dataset, "train", args.data)
            process.barrier()
            images, held_out = (
                load_dataset(args.dataset, split, args.data)[0].to(process.device)
                for split in ("train", "test")
            )
            run = Run(Recipe(**{name: getattr(args, name) for name in RECIPE}), images)
            if state is not None:
                notes.append(run.load(state))
            notes.append(check_schedule(run))
            if process.is_first:
                files.grid.parent.mkdir(parents=True, exist_ok=True)  # or fail now, not later
                if state is not None:
                    files.check_run(run.id)
                else:
                    notes.append(files.keep_earlier_run())
                for note in filter(None, notes):
                    tqdm.write(f"note: {note}", file=sys.stderr)
            return train(run, args, files, process, held_out[:2048])


def train(
    run: Run, args: argparse.Namespace, files: RunFiles, process: Process, held_out: Tensor
) -> int:
    """Train until the run ends or a signal stops it. Returns the exit code."""
    recipe, first = run.recipe, process.is_first
    options = {k: v for k, v in vars(args).items() if k not in (*RECIPE, "out", "resume")}
    save_every = args.save_every or run.steps_per_epoch
    model = torch.compile(run.model) if args.compile else run.model
    model, share = process.parallel(model), process.share(recipe.batch_size)
    if first and args.resume is None:
        run.save_state(files, options)  # from now on --resume continues this run
    elif first:
        files.write_log(run.log)  # without what followed the saved step
    meter, saved_step, stop_every = Meter(), run.step, 1
    log_time = time.monotonic()
    started = log_time - run.elapsed
    signals: list[int] = []
    with (
        cli.handle_stop_signals(lambda number, _: signals.append(number)),
        progress_bar(run, process) as bar,
    ):
        while not run.finished:
            # ----- draw images, compute the loss of Algorithm 1, take a step along its gradient
            x0, lr = run.next_images(), recipe.lr * run.lr_factor
            with bfloat16_convolutions():
                loss = training_loss(
                    model, run.scheduler, x0, run.cdf, run.loss_weights, run.generator, share
                )
                norm = run.update(loss)  # the weights and their moving average
            meter.add(loss, norm)
            bar.update(recipe.batch_size)

            # ----- now and then, read the numbers back from the device
            log_due = len(meter) == args.log_every or (recipe.minutes and run.step == 5)
            save_due = run.step % save_every == 0 or run.step in args.keep
            ask = process.world == 1 or run.step % stop_every == 0  # several agree once a second
            stop = ask and process.any(bool(signals))
            if not (log_due or save_due or run.epoch_ends or stop):
                continue
            now = time.monotonic()
            steps_per_s = len(meter) / (now - log_time)
            run.elapsed, stop_every = process.agree((now - started, math.ceil(steps_per_s)))
            losses, norms = meter.read(process)
            run.check_finite(losses, norms, lr, f"{files.state} (step {saved_step})")
            line = run.add_to_log(
                loss=sum(losses) / len(losses),
                lr=lr,
                images_per_s=steps_per_s * recipe.batch_size,
                elapsed=run.elapsed,
            )
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            run.fit_to_the_clock()
            bar.total = run.total_steps * recipe.batch_size

            # ----- write the log, validate, save, draw
            if first:
                files.append_to_log(line)
            if run.epoch_ends:
                line = run.add_to_log(val_loss=validation_loss(run, held_out))
                if first:
                    files.append_to_log(line)
            if save_due or stop or run.finished:
                saved_step = run.step
                if first:
                    run.save(files, options)
                if first and run.step in args.keep:
                    files.keep_checkpoint(run.step)
            if run.epoch_ends and not run.finished and first:
                preview(run, files.grid_of_epoch(run.step // run.steps_per_epoch), steps=20)
            if stop and not run.finished:
                if first:
                    tell_how_to_resume(run, files, process)
                return 128 + (signals[0] if signals else signal.SIGTERM)
            log_time = time.monotonic()

    if first:
        preview(run, files.grid, steps=50)
        files.draw_loss_curve(run.log, recipe.density)
        print(f"checkpoint  {files.checkpoint}\nsamples     {files.grid}")
        print(f"loss curve  {files.loss_curve}\nlog         {files.log}")
    return 0


def tell_how_to_resume(run: Run, files: RunFiles, process: Process) -> None:
    """Print the command that continues a stopped run."""
    several = ("torchrun", f"--nproc-per-node={process.world}", "--")
    launcher = several if process.world > 1 else ("python",)
    command = shlex.join([*launcher, sys.argv[0], f"--resume={files.state}"])
    tqdm.write(f"stopped at step {run.step} of {run.total_steps}; continue with\n  {command}")


if __name__ == "__main__":
    cli.run(main)
