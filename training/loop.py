"""What train.py and distill.py share: the training loop, and what is before and after it."""

import argparse
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from lab import cli
from lab.data import load_dataset, to_uint8
from lab.distributed import Process, launch
from lab.errors import UserError
from lab.files import only_process
from lab.pictures import save_grid

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import guided, sample
from scheduler import DDIMScheduler
from training.graph import make_step
from training.run import Meter, Run
from training.run_files import RunFiles

Data = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8 and labels (N,) int64

# -------------------------------------------------------------------------------- the training loop


def train(
    run: Run,
    args: argparse.Namespace,
    options: dict,
    files: RunFiles,
    process: Process,
    held_out: Data,
) -> int:
    """Train until the run ends or a signal stops it.

    Args:
        args: the options of `add_options`, and `resume` and `keep`.
        options: what the state keeps of them.
        held_out: images and labels for the validation loss.

    Returns:
        The exit code.
    """
    recipe, first = run.recipe, process.is_first
    save_every = args.save_every or run.steps_per_epoch
    model = torch.compile(run.model) if args.compile else run.model
    take_step = make_step(run, process.parallel(model), process)
    if first and args.resume is None:
        run.save_state(files, options)  # from now on --resume continues this run
    elif first:
        files.write_log(run.log)  # without what followed the saved step
        if run.step > 0:  # the checkpoint may be gone, or be of a later step
            run.save_checkpoint(files)
            keep_checkpoint(run, args, files)
    meter, saved_step, stop_every = Meter(), run.step, 1
    log_time = time.monotonic()
    started = log_time - run.elapsed
    signals: list[int] = []
    with (
        cli.handle_stop_signals(lambda number, _: signals.append(number)),
        progress_bar(run, process) as bar,
    ):
        while not run.finished:
            # ----- draw a batch, compute its loss (Algorithm 1), take a step along the gradient
            meter.add(*take_step())
            bar.update(recipe.batch_size)

            # ----- now and then, read the numbers back from the device
            log_due = len(meter) == args.log_every or run.wants_its_speed
            save_due = run.step % save_every == 0 or run.step in args.keep
            ask = process.world == 1 or run.step % stop_every == 0  # several agree once a second
            stop = ask and process.any(bool(signals))
            if not (log_due or save_due or run.stage_ends or stop):
                continue
            losses, norms = meter.read(process)  # it waits for the device: the clock is read next
            now = time.monotonic()
            steps_per_s = len(losses) / (now - log_time)
            run.elapsed, stop_every = process.agree((now - started, math.ceil(steps_per_s)))
            run.check_finite(losses, norms, f"{files.state} (step {saved_step})")
            line = run.add_to_log(
                loss=sum(losses) / len(losses),
                lr=run.lr,
                images_per_s=steps_per_s * recipe.batch_size,
                elapsed=run.elapsed,
            )
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            run.fit_to_the_clock()
            bar.total = run.total_steps * recipe.batch_size

            # ----- write the log, validate, save, draw
            save_due = save_due or stop or run.stage_ends
            if first:
                write_what_is_due(run, args, options, files, held_out, line, save_due)
            if save_due:
                saved_step = run.step
            if stop and not run.finished:
                if first:
                    tell_how_to_resume(run, files, process)
                return 128 + (signals[0] if signals else signal.SIGTERM)
            log_time = time.monotonic()

    if first:
        draw_and_tell(run, files)
    return 0


def write_what_is_due(
    run: Run,
    args: argparse.Namespace,
    options: dict,
    files: RunFiles,
    held_out: Data,
    line: dict,
    save_due: bool,
) -> None:
    """Write a line of the log. At the end of a stage validate, and draw; save where it is due."""
    files.append_to_log(line)
    if run.stage_ends:
        files.append_to_log(run.add_to_log(val_loss=validation_loss(run, *held_out)))
    if save_due:
        run.save(files, options)
        keep_checkpoint(run, args, files)
    if run.stage_ends and not run.finished:
        preview(run, run.grid_path(files))


def keep_checkpoint(run: Run, args: argparse.Namespace, files: RunFiles) -> None:
    """Copy the checkpoint if --keep asks for the one of this step."""
    if run.step in args.keep:
        files.keep_checkpoint(run.step)


def draw_and_tell(run: Run, files: RunFiles) -> None:
    """Draw the samples and the loss curve of a finished run, and print where its files are."""
    preview(run, run.grid_path(files))
    files.draw_loss_curve(run.log, run.loss_name)
    for path in run.checkpoints(files):
        if path.exists():  # after --resume with --out some have another name
            print(f"checkpoint  {path}")
    print(f"samples     {run.grid_path(files)}")
    print(f"loss curve  {files.loss_curve}\nlog         {files.log}")


@torch.inference_mode()
def validation_loss(run: Run, images: Tensor, labels: Tensor) -> float:
    """Return the loss of the EMA weights on these images; t and eps are the same in every run."""
    generator = torch.Generator(images.device).manual_seed(0)
    total = 0.0
    for batch, wanted in zip(images.split(256), labels.split(256), strict=True):
        wanted = None if run.labels is None else wanted
        loss = run.loss(run.ema, run.to_model_range(batch), wanted, generator)
        total += loss * len(batch)
    return (total / len(images)).item()


def preview(run: Run, path: Path) -> None:
    """Write a grid of samples of the EMA weights; with labels, one column per class."""
    timesteps, eta = run.preview_settings()
    scheduler = DDIMScheduler(**run.scheduler.config)
    scheduler.set_timesteps(**timesteps)
    classes = run.ema.config["num_classes"]
    indices = torch.arange(8 * (classes or 8), device=run.images.device)
    model = guided(run.ema, indices % classes) if classes else run.ema  # labels, no guidance
    shape = tuple(run.images.shape[1:])
    x = sample(model, scheduler, indices, shape, seed=run.recipe.seed, eta=eta)
    try:
        save_grid(path, to_uint8(x), nrow=classes or 8)
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
        desc=f"{run.title} on {process.device.type}",
    )


def tell_how_to_resume(run: Run, files: RunFiles, process: Process) -> None:
    """Print the command that continues a stopped run."""
    here = process.on_this_node
    several = ("torchrun", f"--nproc-per-node={here}", "--")
    launcher = several if process.world > 1 else ("python",)
    command = shlex.join([*launcher, sys.argv[0], f"--resume={files.state}"])
    nodes = "" if here == process.world else "\n(with torchrun's options for several nodes)"
    tqdm.write(
        f"stopped at step {run.step} of {run.total_steps}; continue with\n  {command}{nodes}"
    )


# --------------------------------------------------------------------------------- before the loop


def start(
    make_run: Callable[[Tensor, Tensor], Run],
    args: argparse.Namespace,
    options: dict,
    files: RunFiles,
    state: dict | None,
    notes: Iterable[str | None],
) -> int:
    """Prepare the process and the data, make the run or load its state, and train.

    Args:
        make_run: returns a new run on these images (N, C, H, W) uint8 and labels (N,).
        args: the options of `add_options`, and `batch_size`, `dataset`, `resume`, `keep` and
            perhaps `minutes`.
        options: what the state keeps of them.
        state: of the run to go on with, or None.
        notes: for the user.

    Returns:
        The exit code.
    """
    notes = list(notes)
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
            (images, labels), held_out = (
                [x.to(process.device) for x in load_dataset(args.dataset, split, args.data)]
                for split in ("train", "test")
            )
            run = make_run(images, labels)
            if state is not None:
                notes.append(run.load(state))
            if process.is_first:
                files.grid.parent.mkdir(parents=True, exist_ok=True)  # or fail now, not later
                if state is not None:
                    files.check_run(run.id)
                else:
                    notes.append(files.keep_earlier_run())
                for note in filter(None, [*notes, *run.notes()]):
                    tqdm.write(f"note: {note}", file=sys.stderr)
            held_out = [x[:: max(1, len(x) // 2048)][:2048] for x in held_out]
            return train(run, args, options, files, process, held_out)


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that both scripts have: where a run takes place, and what it keeps."""
    natural = cli.number(int, 1)
    group.add_argument("--samples", default="samples", metavar="DIR", help="folder of the grids")
    cli.add_data(group)
    cli.add_device(group)
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="use torch.compile. On one GPU leave it out: the CUDA graph of a step, which is used "
        "otherwise, is faster",
    )
    group.add_argument(
        "--save-every",
        type=natural,
        metavar="STEPS",
        help="steps between saves (default: an epoch)",
    )
    group.add_argument(
        "--log-every", type=natural, default=50, metavar="STEPS", help="steps per line of the log"
    )


def add_optimizer_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the recipe that both scripts have."""
    natural, positive = cli.number(int, 1), cli.number(float, 0, 1e30, open_low=True)
    group.add_argument("--batch-size", type=natural, help="images per step, over all processes")
    group.add_argument("--lr", type=positive, help="peak learning rate of AdamW")
    group.add_argument(
        "--muon-lr",
        type=cli.number(float, 0, 1e30),
        help="peak learning rate of Muon, which updates the hidden weight matrices "
        "(0: AdamW updates all)",
    )
    group.add_argument("--warmup", type=natural, help="steps of warm-up, at most a fifth of all")
    group.add_argument("--clip", type=positive, help="upper bound of the gradient norm")
    group.add_argument("--ema", type=cli.number(float, 0, 1), help="EMA decay per step")
    group.add_argument(
        "--max-weight",
        type=cli.number(float, 1),
        help="eps only: upper bound of the loss weight 1/abar (1: unweighted)",
    )


def given_arguments(parser: cli.Parser, argv: list[str] | None) -> set[str]:
    """Return the names of the arguments that were given on the command line."""
    nothing = {action.dest: None for action in parser._actions}
    given = parser.parse_args(argv, argparse.Namespace(**nothing))
    return {name for name, value in vars(given).items() if value is not None}


def take_over(
    args: argparse.Namespace,
    given: set[str],
    state: dict,
    parse_args: Callable[[list[str]], tuple[argparse.Namespace, set[str]]],
    out: str,
    may_change: tuple[str, ...] = (),
) -> str | None:
    """Replace the arguments that were not given by those of the run to resume.

    The run continues in the folder of its state, wherever it was written.

    Args:
        parse_args: of the script.
        out: the value of --out that belongs to the state.
        may_change: the options that set the length of the run. Giving one replaces all of them.

    Returns:
        A note for the user if the length changes.

    Raises:
        UserError: an argument that was given contradicts the recipe of the run, or the stored ones
            cannot be used.
    """
    try:
        recipe = set(state["recipe"])
        arguments = state["options"] | state["recipe"]
        if not set(arguments) <= set(vars(args)):
            raise UserError("they are not those of this version")
        stored, _ = parse_args(cli.as_command_line(arguments | {"out": out}))
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(f"{args.resume} holds unusable arguments: {error}") from None
    for name in sorted(given.intersection(recipe).difference(may_change)):
        if getattr(args, name) != getattr(stored, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {args.resume}, "
                f"whose run has {getattr(stored, name)}: leave it out"
            )
    note, length = None, {name: getattr(args, name) for name in may_change}
    if given.intersection(may_change) and any(v != getattr(stored, n) for n, v in length.items()):
        vars(stored).update(length)
        note = (
            "the length of the run changes: from here on the learning rate falls to 0 along the "
            "line of the new length, so the result is not that of one run of this length"
        )
    vars(args).update(vars(stored) | {name: getattr(args, name) for name in given})
    return note
