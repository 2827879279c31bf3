"""Train a diffusion UNet on MNIST.

one CPU or GPU:   python train.py --pred v
a time budget:    python train.py --pred eps --minutes 10
other images:     python train.py --pred v --dataset fashion-mnist --out checkpoints/fashion-v.pt
several GPUs:     torchrun --nproc-per-node=8 train.py --pred v --batch-size 512
several nodes:    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d \\
                           --rdzv-endpoint=HOST:29500 train.py --pred v --batch-size 1024
after a stop:     python train.py --resume checkpoints/v.state.pt

It writes OUT.pt (the checkpoint for infer.py), OUT.state.pt (for --resume), OUT.jsonl (the log),
OUT.png (the loss curve) and sample grids. Ctrl-C saves and exits. A run that was stopped or killed
and then resumed ends with the same weights as an uninterrupted one, bit for bit on a CPU. This does
not hold for --minutes, which follows the clock.
"""

import argparse
import signal
import time
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

from lab import cli
from lab.data import DATASETS, load_dataset, to_uint8, to_unit_range
from lab.device import bfloat16_convolutions
from lab.distributed import Process, launch
from lab.errors import UserError
from lab.pictures import save_grid
from lab.recipe import Recipe
from lab.runs import PRED_OPTIONS, Meter, Run, RunFiles, read_state, stop_signals

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import sample, training_loss
from scheduler import BETA_SCHEDULES, DDIMScheduler

RECIPE = [field.name for field in fields(Recipe)]


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
    length.add_argument("--minutes", type=positive, help="length of the run in wall-clock minutes")
    main.add_argument("--seed", type=cli.number(int, 0, 2**31), help="seed of weights and noise")
    main.add_argument("--resume", metavar="FILE.state.pt", help="continue this run")

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
        "--save-every", type=natural, metavar="STEPS", help="steps between saves (default: epoch)"
    )
    where.add_argument(
        "--log-every", type=natural, default=50, metavar="STEPS", help="steps per line of the log"
    )

    how = p.add_argument_group("how")
    how.add_argument("--batch-size", type=natural, help="images per step, over all processes")
    how.add_argument("--lr", type=positive, help="peak learning rate of AdamW")
    how.add_argument(
        "--muon-lr",
        type=cli.number(float, 0),
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
        "--max-weight",
        type=cli.number(float, 1),
        help="eps only: upper bound of the loss weight 1/abar (1: unweighted)",
    )
    how.add_argument("--channels", type=cli.number(int, 2, 1024), help="width of the UNet, even")
    how.add_argument("--schedule", choices=BETA_SCHEDULES, help="noise schedule")
    how.add_argument("--zero-snr", action="store_true", help="rescale the schedule to abar_T = 0")
    how.add_argument("--timesteps", type=cli.number(int, 1, 100_000), help="T of the schedule")

    args = p.parse_args(argv)
    given = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    if args.channels % 2:
        p.error(f"--channels must be even, not {args.channels}")
    if not (args.epochs or args.steps or args.minutes):
        args.epochs = 5
    args.out = args.out or f"checkpoints/{args.pred}.pt"
    if Path(args.out).parent.resolve() == Path(args.samples).resolve():
        p.error("--samples must not be the folder of --out: two pictures would share a name")
    return args, {name for name, value in vars(given).items() if value is not None}


def take_over(args: argparse.Namespace, given: set[str], state: dict) -> None:
    """Replace the arguments that were not given by those of the run to resume.

    The run continues in the folder of its state, wherever it was written.

    Raises:
        UserError: an argument that was given contradicts the recipe of the run.
    """
    for name in sorted(given.intersection(RECIPE)):
        if getattr(args, name) != state["recipe"].get(name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {args.resume}, "
                f"whose run has {state['recipe'].get(name)}: leave it out"
            )
    kept = {name: getattr(args, name) for name in given}
    out = args.resume.removesuffix(".state.pt") + ".pt"
    vars(args).update(state["options"] | state["recipe"] | {"out": out} | kept)


# ------------------------------------------------------------------------------- now and then


@torch.inference_mode()
def validation_loss(run: Run, images: Tensor) -> float:
    """Return the loss of the EMA weights on these images; t and eps are the same in every run."""
    generator = torch.Generator(images.device).manual_seed(0)
    total = 0.0
    for batch in images.split(256):
        x0 = to_unit_range(batch)
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
    save_grid(path, to_uint8(x), nrow=8)


def log(run: Run, files: RunFiles, process: Process, **record: float) -> None:
    """Add a line to the log of the run and to its file."""
    head = {"step": run.step, "images": run.step * run.recipe.batch_size}
    run.log.append(head | record)
    if process.is_first:
        files.append_to_log(run.log[-1])


def raise_if_not_finite(
    run: Run,
    losses: list[float],
    norms: list[float],
    lr: float,
    files: RunFiles,
    saved_step: int | None,
) -> None:
    """Raise a UserError, with the last good checkpoint, if a loss or weight is not finite."""
    problem = run.what_is_not_finite(losses, norms)
    if problem is not None:
        good = "none" if saved_step is None else f"{files.state} (step {saved_step})"
        raise UserError(f"{problem}, learning rate {lr:.3g}; last good checkpoint: {good}")


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
    state = read_state(args.resume) if args.resume else None
    if state is not None:
        take_over(args, given, state)
    with launch(args.device, backend="nccl", timeout=timedelta(minutes=30)) as process:
        if args.batch_size % process.world:
            raise UserError(
                f"--batch-size {args.batch_size} does not split over {process.world} processes"
            )
        if process.is_first:  # it downloads what is missing, and the others wait
            load_dataset(args.dataset, "train", args.data)
        process.barrier()
        images, held_out = (
            load_dataset(args.dataset, split, args.data)[0].to(process.device)
            for split in ("train", "test")
        )
        run = Run(Recipe(**{name: getattr(args, name) for name in RECIPE}), images)
        note = run.load(state) if state is not None else None
        if note and process.is_first:
            tqdm.write(f"note: {note}")
        return train(run, args, process, held_out[:2048])


def train(run: Run, args: argparse.Namespace, process: Process, held_out: Tensor) -> int:
    """Train until the run ends or a signal stops it. Returns the exit code."""
    recipe, files, samples = run.recipe, RunFiles(Path(args.out)), Path(args.samples)
    options = {k: v for k, v in vars(args).items() if k not in RECIPE and k != "resume"}
    save_every = args.save_every or run.steps_per_epoch
    if process.is_first:
        samples.mkdir(parents=True, exist_ok=True)  # an error comes now, not after an epoch
        for note in files.keep_earlier_run() if not args.resume else ():
            tqdm.write(note)
        files.write_log(run.log)

    model = torch.compile(run.model) if args.compile else run.model
    model, share = process.parallel(model), process.share(recipe.batch_size)
    meter, saved_step = Meter(), run.step if args.resume else None
    log_time = time.monotonic()
    started = log_time - run.elapsed
    with stop_signals() as signals, progress_bar(run, process) as bar:
        while not run.finished:
            # ----- draw images, compute the loss of Algorithm 1, take a step along its gradient
            x0, lr = to_unit_range(run.next_images()), recipe.lr * run.lr_factor
            with bfloat16_convolutions():
                loss = training_loss(
                    model, run.scheduler, x0, run.cdf, run.loss_weights, run.generator, share
                )
                norm = run.update(loss)  # the weights and their moving average
            meter.add(loss, norm)
            bar.update(recipe.batch_size)

            # ----- now and then, read the numbers back from the device
            log_due = len(meter) == args.log_every or (recipe.minutes and run.step == 5)
            save_due = run.step % save_every == 0
            stop_now = signals and process.world == 1  # several processes agree on it at a log
            if not (log_due or save_due or run.epoch_ends or stop_now):
                continue
            run.elapsed, stop = process.max(time.monotonic() - started, bool(signals))
            images_per_s = len(meter) * recipe.batch_size / (time.monotonic() - log_time)
            losses, norms = meter.read(process)
            raise_if_not_finite(run, losses, norms, lr, files, saved_step)
            loss = sum(losses) / len(losses)
            record = {"loss": loss, "lr": lr, "images_per_s": images_per_s, "elapsed": run.elapsed}
            log(run, files, process, **record)
            run.fit_to_the_clock()
            bar.total = run.total_steps * recipe.batch_size
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

            # ----- validate, save, draw
            if run.epoch_ends:
                log(run, files, process, val_loss=validation_loss(run, held_out))
            if save_due or stop or run.finished:
                saved_step = run.step
                if process.is_first:
                    run.save(files, options)
            if run.epoch_ends and not run.finished and process.is_first:
                epoch = run.step // run.steps_per_epoch
                preview(run, samples / f"{files.checkpoint.stem}-epoch{epoch:02d}.png", steps=20)
            if stop and not run.finished:
                if process.is_first:
                    tqdm.write(f"stopped at step {run.step} of {run.total_steps}; continue with")
                    tqdm.write(f"  python train.py --resume {files.state}")
                return 128 + (signals[0] if signals else signal.SIGTERM)
            log_time = time.monotonic()

    if process.is_first:
        grid = samples / f"{files.checkpoint.stem}.png"
        preview(run, grid, steps=50)
        files.draw_loss_curve(run.log, recipe.density)
        print(f"checkpoint  {files.checkpoint}\nsamples     {grid}")
        print(f"loss curve  {files.loss_curve}\nlog         {files.log}")
    return 0


if __name__ == "__main__":
    cli.run(main)
