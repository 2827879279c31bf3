"""Distil a model into students that sample in 16, 8, 4, 2 and 1 steps.

from 32 steps to 1:  python distill.py --ckpt checkpoints/mnist-v.pt
then sample:         python infer.py --ckpt checkpoints/mnist-v-4steps.pt
several GPUs:        torchrun --nproc-per-node=8 distill.py --ckpt checkpoints/mnist-v.pt
after a stop:        python distill.py --resume checkpoints/mnist-v-students.state.pt

This is progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, algorithm 2). In each round
a student learns to do in one step of DDIM (eta = 0) what its teacher does in two. It starts as a
copy of its teacher, and it is the teacher of the next round.

Of a checkpoint v.pt it writes the students v-16steps.pt, ..., v-2steps.pt, v-1step.pt. Each of them
knows its timesteps: infer.py needs no other argument. It also writes v-students.state.pt (for
--resume), v-students.jsonl (the log), v-students.png (the loss curve) and a sample grid of each
student. Ctrl-C saves and exits.

Every prediction type can be distilled, but v is made for it. In nearly pure noise, where the first
step starts, an eps-student must express x_0 as a tiny difference of x_t and eps: its error is
divided by sqrt(abar_t). In the study every eps-student was worse than the eps-model itself with as
many steps.
"""

import argparse
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path

from lab import cli
from lab.checkpoint import build_model, load_model
from lab.data import CLASSES, DATASETS
from lab.errors import UserError

import torch
from torch import Tensor

from diffusion import Model, draw_timesteps, predict, prediction_target
from scheduler import DDPMScheduler
from training.loop import add_optimizer_options, add_options, given_arguments, start, take_over
from training.optim import make_optimizers
from training.recipe import loss_weights
from training.run import Run, read_state
from training.run_files import STUDENTS, RunFiles


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of the students, besides the teacher."""

    teacher_steps: int = 32
    student_steps: int = 1
    updates: int = 300
    batch_size: int = 64
    lr: float = 1e-3
    muon_lr: float = 0.005
    warmup: int = 50
    clip: float = 1.0
    ema: float = 0.99
    max_weight: float = 5.0
    dataset: str = "mnist"
    seed: int = 0


RECIPE = [field.name for field in fields(Recipe)]


def main() -> int:
    args, given = parse_args()
    state, note = None, None
    if args.resume is not None:
        state = read_state(args.resume, Distillation.script)
        out = args.resume.removesuffix(f"{STUDENTS}.state.pt") + ".pt"
        note = take_over(args, given, state, parse_args, out)
        source = state.get("source")
        if not isinstance(source, dict):
            raise UserError(f"{args.resume} does not hold its first teacher")
    else:
        source = load_model(args.ckpt)[1]
        args.out = args.out or args.ckpt
        own_steps = len(source.get("timesteps", ()))
        args.teacher_steps = args.teacher_steps or own_steps or Recipe.teacher_steps
    args.dataset = args.dataset or dataset_of(source, args.ckpt)
    check_halving(args.teacher_steps, args.student_steps)
    recipe = Recipe(**{name: getattr(args, name) for name in RECIPE})
    options = {k: v for k, v in vars(args).items() if k not in (*RECIPE, "out", "resume")}

    def make_run(images: Tensor, labels: Tensor) -> Distillation:
        return Distillation(recipe, images, labels, source, args.resume or args.ckpt)

    out = Path(args.out)
    files = RunFiles(out.with_stem(f"{out.stem}{STUDENTS}"), Path(args.samples))
    return start(make_run, args, options, files, state, [note])


def dataset_of(contents: dict, path: str) -> str:
    """Return the data set that a checkpoint has learned.

    Raises:
        UserError: it does not say so.
    """
    try:
        dataset = contents["training"]["args"]["dataset"]
    except (KeyError, TypeError):
        dataset = None
    if not isinstance(dataset, str):
        raise UserError(f"{path} does not say what it has learned: give --dataset")
    return dataset


# ----------------------------------------------------------- Algorithm 2 of Salimans & Ho 2022


def distillation_loss(
    student: Model,
    teacher: Model,
    scheduler: DDPMScheduler,
    timesteps: Tensor,
    coefficients: Tensor,
    x0: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    share: range | None = None,
) -> Tensor:
    """Return how far one step of the student is from two steps of its teacher, for a batch.

    Args:
        scheduler: of both networks.
        timesteps: (2N,) int64, descending: the teacher's. Every second one is the student's.
        coefficients: (8, N), see `jump_coefficients`.
        x0: (B, C, H, W) images of the data, in the range of the model.
        weights: (T,) weights of the squared error, float32.
        generator: draws t and eps for the whole batch.
        share: the images of the batch that this process computes (default: all).

    Returns:
        A scalar over `share`: the weighted squared error of what the network predicts.
    """
    N = len(timesteps) // 2
    even = torch.arange(1, N + 1, device=x0.device) / N
    j = draw_timesteps(even, len(x0), generator)  # a timestep of the student
    eps = torch.randn(x0.shape, generator=generator, device=generator.device)
    if share is not None:
        x0, j, eps = (tensor[share.start : share.stop] for tensor in (x0, j, eps))
    t, middle = timesteps[2 * j], timesteps[2 * j + 1]
    r1, c1, r2, c2, r, c, alpha, sigma = coefficients[:, j].view(8, -1, 1, 1, 1)

    x_t = scheduler.add_noise(x0, eps, t)
    with torch.no_grad():  # two steps of the teacher: from t to the middle, and on to s
        x = r1 * x_t + c1 * scheduler.get_original_sample(predict(teacher, x_t, t), x_t, t)
        x_s = r2 * x + c2 * scheduler.get_original_sample(predict(teacher, x, middle), x, middle)
    x0_target = (x_s - r * x_t) / c  # the x_0 that leads from x_t to x_s in one step
    eps_target = (x_t - alpha * x0_target) / sigma

    target = prediction_target(scheduler, x0_target, eps_target, t)
    squared_error = (predict(student, x_t, t) - target).square().flatten(1).mean(1)
    return (weights[t] * squared_error).mean()


def jump_coefficients(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Return r and c of the jumps x_s = r x_t + c x_0 that DDIM makes at eta = 0 (DDIM eq. 12).

    Args:
        alphas_cumprod: (T,) float64.
        timesteps: (2N,) int64 on the CPU, descending. After the last one abar is 1.

    Returns:
        (8, N) float32. For each timestep t of the student: r and c of the teacher's first step, r
        and c of its second one, r and c of the step of the student, sqrt(abar_t), sqrt(1-abar_t).
    """
    abar = torch.cat([alphas_cumprod[timesteps], alphas_cumprod.new_ones(1)])
    start, middle, end = abar[:-1:2], abar[1::2], abar[2::2]
    rows = []
    for a, b in ((start, middle), (middle, end), (start, end)):
        r = ((1 - b) / (1 - a)).sqrt()
        rows += [r, b.sqrt() - r * a.sqrt()]
    return torch.stack([*rows, start.sqrt(), (1 - start).sqrt()]).float()


# -------------------------------------------------------------------------------------- the run


class Distillation(Run):
    """All rounds of a distillation: in each the student halves the timesteps of its teacher.

    A round begins when its first images are chosen: the student of the last round (its EMA weights)
    becomes the teacher, and the new student starts as a copy of it.

    Args:
        recipe: what decides the weights.
        images, labels: the training set, as in `Run`.
        source: the contents of the checkpoint of the first teacher.
        path: its file, for errors.

    Attributes:
        teacher: the teacher of this round.
        timesteps: (2N,) int64, the teacher's.
        sizes: the numbers of timesteps of all students.
        ends: the step at which each round ends.

    Raises:
        UserError: the teacher cannot take so many steps.
    """

    script = "distill.py"
    loss_name = "loss against the teacher of each round"

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor, source: dict, path: str):
        model, scheduler = build_model(source, path, images.device)
        self.teacher, _ = build_model(source, path, images.device)
        if tuple(source["image_shape"]) != tuple(images.shape[1:]):
            raise UserError(f"{path} makes images of another shape than those of {recipe.dataset}")
        classes = CLASSES[recipe.dataset]
        if model.config["num_classes"] and source.get("classes", classes) != classes:
            raise UserError(f"{path} has other classes than {recipe.dataset}")
        self.source = source
        self.all_timesteps = teacher_timesteps(scheduler, recipe, source.get("timesteps"), path)
        rounds = (recipe.teacher_steps // recipe.student_steps).bit_length() - 1
        self.sizes = [recipe.teacher_steps >> k for k in range(1, rounds + 1)]
        self.ends = list(accumulate(recipe.updates * length(n) for n in self.sizes))
        model.train().requires_grad_(True)
        super().__init__(recipe, images, labels, scheduler, model, self.ends[-1])
        weights = loss_weights(
            scheduler.alphas_cumprod, scheduler.prediction_type, recipe.max_weight
        )
        self.loss_weights = weights.float().to(images.device)
        self.title = f"{recipe.teacher_steps} to {recipe.student_steps} steps"
        self.set_round(0)

    def set_round(self, number: int) -> None:
        """Prepare the loss of a round, 0 for the first."""
        self.round = number
        self.student_timesteps = self.all_timesteps[:: 2 ** (number + 1)].tolist()
        timesteps = self.all_timesteps[:: 2**number]
        coefficients = jump_coefficients(self.scheduler.alphas_cumprod, timesteps)
        self.timesteps = timesteps.to(self.images.device)
        self.coefficients = coefficients.to(self.images.device)

    def next_indices(self) -> Tensor:
        """Return what `Run.next_indices` does, and begin a round where one begins."""
        if self.step in (0, *self.ends):
            for network in (self.teacher, self.model):
                network.load_state_dict(self.ema.state_dict())
            self.optimizers = make_optimizers(self.model, self.recipe.lr, self.recipe.muon_lr)
            self.set_round(bisect_right(self.ends, self.step))
        return super().next_indices()

    def loss(self, model, x0, labels, generator, share=None) -> Tensor:
        teacher: Model = self.teacher
        if labels is not None:
            labels = labels if share is None else labels[share.start : share.stop]
            model, teacher = (partial(network, labels=labels) for network in (model, teacher))
        return distillation_loss(
            model,
            teacher,
            self.scheduler,
            self.timesteps,
            self.coefficients,
            x0,
            self.loss_weights,
            generator,
            share,
        )

    @property
    def schedule(self) -> tuple[int, int]:
        begin = self.ends[self.round - 1] if self.round else 0
        return self.step - begin, self.ends[self.round] - begin

    @property
    def stage_ends(self) -> bool:
        return self.step in self.ends

    def checkpoint_path(self, files: RunFiles) -> Path:
        return files.of_student(self.sizes[self.round]).checkpoint

    def checkpoints(self, files: RunFiles) -> list[Path]:
        return [files.of_student(n).checkpoint for n in self.sizes]

    def grid_path(self, files: RunFiles) -> Path:
        return files.of_student(self.sizes[self.round]).grid

    def preview_settings(self) -> tuple[dict, float]:
        return {"timesteps": self.student_timesteps}, 0.0

    def facts(self) -> dict:
        teacher = self.source.get("teacher", self.source.get("training"))
        facts = {"timesteps": self.student_timesteps, "teacher": teacher}
        return facts | {k: self.source[k] for k in ("classes",) if k in self.source}

    def modules(self) -> dict:
        return super().modules() | {"teacher": self.teacher}

    def further_state(self) -> dict:
        return {"source": self.source}

    def load(self, state: dict) -> str | None:
        note = super().load(state)
        self.set_round(bisect_left(self.ends, self.step))  # at its end a round is not over yet
        return note


def length(steps: int) -> int:
    """Return how long the round of a student of this many steps is, in units of `updates`.

    The fewer steps, the more a student has to learn: 1 for 16 and more, 2 for 8, ..., 5 for one.
    (The paper takes twice as many updates for 2 steps and for 1 step as for the others.)
    """
    return max(1, 5 - (steps.bit_length() - 1))


def teacher_timesteps(
    scheduler: DDPMScheduler, recipe: Recipe, known: list[int] | None, path: str
) -> Tensor:
    """Return the (2N,) int64 timesteps of the first teacher, descending.

    Args:
        known: the timesteps of a teacher that is a student itself.

    Raises:
        UserError: it cannot take so many steps.
    """
    n = recipe.teacher_steps
    if known is not None:
        if len(known) % n:
            raise UserError(
                f"--teacher-steps {n}: {path} is a student of {len(known)} steps, which are all "
                "that it knows"
            )
        return torch.tensor(known[:: len(known) // n])
    teacher = DDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    try:
        teacher.set_timesteps(n)
    except ValueError as error:
        raise UserError(f"--teacher-steps {n}: {error}") from None
    return teacher.timesteps


# ----------------------------------------------------------------------------------- arguments


def check_halving(teacher_steps: int, student_steps: int) -> None:
    """Check that halving leads from the first number of steps to the second.

    Raises:
        UserError: it does not.
    """
    ratio, rest = divmod(teacher_steps, student_steps)
    if rest or ratio < 2 or ratio & (ratio - 1):
        raise UserError(
            f"halving must lead from the teacher's {teacher_steps} steps (--teacher-steps) to the "
            f"student's {student_steps} (--student-steps)"
        )


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """Return the arguments, and the names of those that were given on the command line."""
    natural = cli.number(int, 1)
    p = cli.Parser(__doc__)
    p.set_defaults(**asdict(Recipe()) | {"teacher_steps": None, "dataset": None, "keep": []})

    main = p.add_argument_group("what to distil")
    main.add_argument("--ckpt", metavar="FILE.pt", help="the teacher, a checkpoint of train.py")
    main.add_argument(
        "--teacher-steps",
        type=cli.number(int, 2, 2**16),
        help="steps of the first teacher (default: 32; all those of a teacher that is a student)",
    )
    main.add_argument("--student-steps", type=natural, help="steps of the last student")
    main.add_argument(
        "--updates",
        type=natural,
        help="optimizer steps in the round of a student of 16 steps or more; 2, 3, 4 and 5 times "
        "as many for 8, 4, 2 and 1 steps",
    )
    main.add_argument("--seed", type=cli.number(int, 0, 2**31), help="seed of order, t and noise")
    main.add_argument(
        "--resume", metavar="FILE-students.state.pt", help="continue the run saved in this file"
    )

    where = p.add_argument_group("where")
    where.add_argument(
        "--out",
        type=cli.output_file(".pt"),
        metavar="FILE.pt",
        help="the students are FILE-16steps.pt and so on (default: as --ckpt)",
    )
    where.add_argument(
        "--dataset", choices=DATASETS, help="what the teacher has learned (default: as it says)"
    )
    add_options(where)

    add_optimizer_options(p.add_argument_group("how, in each round"))

    args = p.parse_args(argv)
    if args.ckpt is None and args.resume is None:
        p.error("--ckpt FILE.pt is needed: the teacher")
    if args.resume is not None and not args.resume.endswith(f"{STUDENTS}.state.pt"):
        p.error(f"--resume {args.resume} does not end in {STUDENTS}.state.pt")
    if args.resume is not None and args.ckpt is not None:
        p.error("--resume goes on with the teacher of the run: leave out --ckpt")
    if args.teacher_steps is not None:
        check_halving(args.teacher_steps, args.student_steps)
    return args, given_arguments(p, argv)


if __name__ == "__main__":
    cli.run(main)
