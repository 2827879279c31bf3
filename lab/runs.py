"""A training run: what decides it, what it keeps between two steps, and its files."""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import checkpoint
from lab.distributed import Process
from lab.errors import UserError, first_line
from lab.files import write_atomically
from lab.optim import ema_decay, learning_rate_factor, make_optimizers, update_ema
from lab.pictures import new_figure, save_figure
from lab.recipe import Recipe, loss_weights, timestep_cdf

import torch
from torch import Tensor, nn

from scheduler import PREDICTION_TYPES, DDPMScheduler
from unet import UNet

STATE_FORMAT = "ddpm-ddim-lab training state 2"
STATE_KEYS = [
    "recipe",
    "options",
    "step",
    "elapsed",
    "log",
    "model",
    "ema",
    "optimizers",
    "generator",
]
PRED_OPTIONS = {p.option: name for name, p in PREDICTION_TYPES.items()}  # --pred to prediction_type


class Run:
    """A training run between two steps; `save` writes it to a file, `load` goes on from one.

    Args:
        recipe: what decides the weights.
        images: (N, C, H, W) uint8, the training images, on the device to train on.

    Attributes:
        model, ema: the UNet in training and the moving average of its weights.
        step, total_steps: optimizer steps so far, and in the whole run.
        elapsed: seconds of training so far.
        log: one dictionary per line of the log file.

    Raises:
        UserError: the recipe contradicts itself or does not fit the images.
    """

    def __init__(self, recipe: Recipe, images: Tensor):
        if recipe.batch_size > len(images):
            raise UserError(
                f"--batch-size {recipe.batch_size} is more than the {len(images)} images"
            )
        self.recipe, self.images, device = recipe, images, images.device
        try:
            self.scheduler = DDPMScheduler(
                recipe.timesteps,
                beta_schedule=recipe.schedule,
                prediction_type=PRED_OPTIONS[recipe.pred],
                rescale_betas_zero_snr=recipe.zero_snr,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        abar, prediction_type = self.scheduler.alphas_cumprod, self.scheduler.prediction_type
        self.cdf = timestep_cdf(abar, recipe.density).float().to(device)
        self.loss_weights = loss_weights(abar, prediction_type, recipe.max_weight)
        self.loss_weights = self.loss_weights.float().to(device)

        torch.manual_seed(recipe.seed)
        self.model = UNet(in_channels=images.shape[1], channels=recipe.channels)
        self.model = self.model.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(self.model, recipe.lr, recipe.muon_lr)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

        self.step, self.elapsed, self.log = 0, 0.0, []
        self.steps_per_epoch = len(images) // recipe.batch_size
        # The length of a --minutes run is a first guess, see `fit_to_the_clock`.
        self.total_steps = recipe.steps or (recipe.epochs or 1000) * self.steps_per_epoch
        self._order: tuple[int, Tensor] | None = None

    # ------------------------------------------------------------------------------------- a step

    def next_images(self) -> Tensor:
        """Return the (B, C, H, W) uint8 images of this step; every epoch shows each image once.

        The order is a function of (seed, epoch), so a resumed run continues it.
        """
        epoch, i = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            indices = torch.randperm(len(self.images), generator=shuffle)
            self._order = epoch, indices.to(self.images.device)
        B = self.recipe.batch_size
        return self.images[self._order[1][i * B : (i + 1) * B]]

    @property
    def lr_factor(self) -> float:
        """The learning rate of this step, as a factor of its peak."""
        return learning_rate_factor(self.step, self.total_steps, self.recipe.warmup)

    def update(self, loss: Tensor) -> Tensor:
        """Take one step: gradient, clipping, optimizers, moving average.

        Returns:
            The norm of the gradient, still on the device.
        """
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self.lr_factor
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.ema, self.model, ema_decay(self.step, self.recipe.ema))
        self.step += 1
        return norm

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def epoch_ends(self) -> bool:
        """Whether the last step ended an epoch, or the run."""
        return self.step % self.steps_per_epoch == 0 or self.finished

    def fit_to_the_clock(self) -> None:
        """Set the length of a --minutes run, and so its learning rate, by its speed so far."""
        if self.recipe.minutes is not None and self.step:
            left = self.recipe.minutes * 60 - self.elapsed
            self.total_steps = self.step + max(0, round(left / (self.elapsed / self.step)))

    def what_is_not_finite(self, losses: list[float], norms: list[float]) -> str | None:
        """Say which of the last steps had a loss or gradient that is not finite, or None."""
        first = self.step - len(losses) + 1
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
            if not math.isfinite(loss + norm):
                return f"the loss is {loss} and the norm of the gradient {norm} at step {step}"
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            return f"the weights are no longer finite after step {self.step}"
        return None

    # -------------------------------------------------------------------------------- save, load

    def save(self, files: "RunFiles", options: dict) -> None:
        """Write the model checkpoint and the training state.

        Args:
            options: further arguments of the script, which a resumed run takes over.

        Raises:
            UserError: a file cannot be written.
        """
        training = {
            "args": asdict(self.recipe),
            "step": self.step,
            "images": self.step * self.recipe.batch_size,
            "elapsed": self.elapsed,
        }
        shape = tuple(self.images.shape[1:])
        checkpoint.save_model(files.checkpoint, self.ema, self.scheduler, shape, training)
        state = {
            "format": STATE_FORMAT,
            "recipe": asdict(self.recipe),
            "options": options,
            "step": self.step,
            "elapsed": self.elapsed,
            "log": self.log,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }
        checkpoint.save(files.state, state)

    def load(self, state: dict) -> str | None:
        """Go on from a training state that `read_state` returned; its recipe must be this run's.

        Returns:
            A note for the user, if the run cannot continue bit for bit.

        Raises:
            UserError: the state does not fit this run.
        """
        note = None
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, optimizer_state in zip(
                self.optimizers, state["optimizers"], strict=True
            ):
                optimizer.load_state_dict(optimizer_state)
            self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
            self.log = list(state["log"])
            if len(state["generator"]) == len(self.generator.get_state()):
                self.generator.set_state(state["generator"])
            else:
                self.generator.manual_seed(self.recipe.seed + self.step)
                note = "the state is from another type of device: t and eps get a new seed"
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the training state does not fit: {first_line(error)}") from None
        self.fit_to_the_clock()
        return note


def read_state(path: str | Path) -> dict:
    """Return the contents of a training state.

    Raises:
        UserError: the file cannot be read or is not a training state of this version.
    """
    if not str(path).endswith(".state.pt"):
        raise UserError(f"{path} does not end in .state.pt, as every training state does")
    return checkpoint.load(path, *STATE_KEYS, wanted=STATE_FORMAT)


# ------------------------------------------------------------------------------- files of a run


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, named after its checkpoint."""

    checkpoint: Path

    @property
    def state(self) -> Path:
        return self.checkpoint.with_suffix(".state.pt")

    @property
    def log(self) -> Path:
        return self.checkpoint.with_suffix(".jsonl")

    @property
    def loss_curve(self) -> Path:
        return self.checkpoint.with_suffix(".png")

    def keep_earlier_run(self) -> list[str]:
        """Give the files of an earlier run a second name, which this run does not overwrite.

        Returns:
            One note per file that was kept.
        """
        notes, stem = [], self.checkpoint.stem
        for path in (self.checkpoint, self.state, self.log):
            if path.exists():
                previous = path.with_name(path.name.replace(stem, f"{stem}.previous", 1))
                previous.unlink(missing_ok=True)
                try:
                    os.link(
                        path, previous
                    )  # the first save then replaces only one of the two names
                except OSError:  # a file system without links
                    shutil.copyfile(path, previous)
                notes.append(f"note: {path} of an earlier run is kept as {previous}")
        return notes

    def write_log(self, log: list[dict]) -> None:
        """Write the whole log, one JSON object per line."""
        write_atomically(self.log, "".join(f"{json.dumps(r)}\n" for r in log).encode())

    def append_to_log(self, record: dict) -> None:
        """Add one line to the log.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with open(self.log, "a") as file:
                file.write(f"{json.dumps(record)}\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log}: {error.strerror}") from None

    def draw_loss_curve(self, log: list[dict], density: str) -> None:
        """Draw the training and the validation loss against the number of images seen.

        Both draw their timesteps from the same density, so the two lines can be compared.
        """
        figure, axes = new_figure(1, 1, 7, 4)
        ax = axes[0, 0]
        for key, style, label in (
            ("loss", "-", "training images, weights in training"),
            ("val_loss", "o-", "test images, moving average of the weights"),
        ):
            points = [(record["images"], record[key]) for record in log if key in record]
            if points:
                ax.plot(*zip(*points, strict=True), style, label=label, lw=1, ms=4)
        ax.set(xlabel="images seen", ylabel=f"loss (t drawn from the {density} density)")
        ax.set_yscale("log")
        if ax.lines:
            ax.legend()
        ax.grid(alpha=0.3, which="both")
        save_figure(figure, self.loss_curve)


# --------------------------------------------------------------------------- what a loop needs


class Meter:
    """Losses and gradient norms since the last log. They stay on the device until `read`."""

    def __init__(self):
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss.detach())
        self.norms.append(norm)

    def read(self, process: Process) -> tuple[list[float], list[float]]:
        """Return the losses, averaged over the processes, and the norms; then start again."""
        losses = process.sum(torch.stack(self.losses)).div_(process.world).tolist()
        norms = torch.stack(self.norms).tolist()
        self.losses, self.norms = [], []
        return losses, norms


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, instead of ending the process."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: received.append(n)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
