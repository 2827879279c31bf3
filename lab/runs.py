"""A training run: what decides it, what it keeps between two steps, and its files."""

import copy
import json
import math
import uuid
from dataclasses import asdict
from pathlib import Path

from lab import checkpoint
from lab.data import to_model_range
from lab.distributed import Process
from lab.errors import UserError, one_line
from lab.optim import Muon, ema_decay, learning_rate_factor, make_optimizers, update_ema
from lab.recipe import Recipe, loss_weights, timestep_cdf
from lab.run_files import STATE_FORMAT, RunFiles

import torch
from torch import Tensor, nn

from scheduler import PREDICTION_TYPES, DDPMScheduler
from unet import UNet

STATE_KEYS = (
    *("run", "recipe", "options", "step", "elapsed", "log"),
    *("model", "ema", "optimizers", "generator"),
)
PRED_OPTIONS = {p.option: name for name, p in PREDICTION_TYPES.items()}  # --pred to prediction_type


class Run:
    """A training run between two steps; `save` writes it to a file, `load` goes on from one.

    Args:
        recipe: what decides the weights.
        images: (N, C, H, W) uint8, the training images, on the device to train on.

    Attributes:
        id: a name of this run that no other run has.
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
                clip_sample_range=recipe.clip_sample_range,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        abar, prediction_type = self.scheduler.alphas_cumprod, self.scheduler.prediction_type
        self.cdf = timestep_cdf(abar, recipe.density, recipe.low_noise).float().to(device)
        self.loss_weights = loss_weights(abar, prediction_type, recipe.max_weight)
        self.loss_weights = self.loss_weights.float().to(device)

        torch.manual_seed(recipe.seed)
        self.model = UNet(in_channels=images.shape[1], channels=recipe.channels)
        self.model = self.model.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(self.model, recipe.lr, recipe.muon_lr)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

        self.id = uuid.uuid4().hex
        self.step, self.elapsed = 0, 0.0
        self.log: list[dict] = []
        self.add_to_log(run=self.id, recipe=asdict(recipe))
        self.steps_per_epoch = len(images) // recipe.batch_size
        # The length of a --minutes run is a first guess, see `fit_to_the_clock`.
        self.total_steps = recipe.steps or (recipe.epochs or 1000) * self.steps_per_epoch
        self._order: tuple[int, Tensor] | None = None

    # ------------------------------------------------------------------------------------- a step

    def next_images(self) -> Tensor:
        """Return the x_0 of this step: (B, C, H, W) float32, in the range of the model.

        Every epoch shows each image once. The order is a function of (seed, epoch), so a resumed
        run continues it.
        """
        epoch, i = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            indices = torch.randperm(len(self.images), generator=shuffle)
            self._order = epoch, indices.to(self.images.device)
        B = self.recipe.batch_size
        return self.to_model_range(self.images[self._order[1][i * B : (i + 1) * B]])

    def to_model_range(self, images: Tensor) -> Tensor:
        return to_model_range(images, self.recipe.clip_sample_range)

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
        if self.recipe.minutes is not None and self.elapsed > 1e-6 * self.step > 0:
            left = self.recipe.minutes * 60 - self.elapsed
            self.total_steps = self.step + max(0, round(left / (self.elapsed / self.step)))

    def check_finite(
        self, losses: list[float], norms: list[float], lr: float, last_good: str
    ) -> None:
        """Raise a UserError if a loss or gradient of the last steps, or a weight, is not finite."""
        problem = None
        first = self.step - len(losses) + 1
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
            if problem is None and not math.isfinite(loss + norm):
                problem = f"the loss is {loss} and the norm of the gradient {norm} at step {step}"
        weights = torch.stack([p.isfinite().all() for p in self.model.parameters()])
        if problem is None and not weights.all():
            problem = f"the weights are no longer finite after step {self.step}"
        if problem is not None:
            raise UserError(f"{problem}, learning rate {lr:.3g}; last good state: {last_good}")

    # -------------------------------------------------------------------------------- save, load

    def add_to_log(self, **entries: object) -> dict:
        """Add a line to the log and return it."""
        line = {"step": self.step, "images": self.step * self.recipe.batch_size} | entries
        self.log.append(line)
        return line

    def save(self, files: RunFiles, options: dict) -> None:
        """Write the model checkpoint, the training state and the log.

        Args:
            options: further arguments of the script, which a resumed run takes over.

        Raises:
            UserError: a file cannot be written.
        """
        training = {
            "run": self.id,
            "args": asdict(self.recipe),
            "step": self.step,
            "images": self.step * self.recipe.batch_size,
            "elapsed": self.elapsed,
        }
        shape = tuple(self.images.shape[1:])
        checkpoint.save_model(files.checkpoint, self.ema, self.scheduler, shape, training)
        self.save_state(files, options)

    def save_state(self, files: RunFiles, options: dict) -> None:
        """Write the training state and the log: all of `save` but the model checkpoint."""
        state = {
            "format": STATE_FORMAT,
            "run": self.id,
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
        files.write_log(self.log)

    def load(self, state: dict) -> str | None:
        """Go on from a training state that `read_state` returned; its recipe must be this run's.

        Returns:
            A note for the user, if the run cannot continue bit for bit.

        Raises:
            UserError: the state does not fit this run.
        """
        note = None
        try:
            for module, name in ((self.model, "model"), (self.ema, "ema")):
                module.load_state_dict(state[name])
                if not all(p.isfinite().all() for p in module.parameters()):
                    raise ValueError(f"the weights of its {name} are not finite")
            for optimizer, loaded in zip(self.optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, loaded)
            self.id, self.log = str(state["run"]), checked_log(state["log"])
            self.step, self.elapsed = state["step"], float(state["elapsed"])
            if type(self.step) is not int or not 0 <= self.step < 2**62:
                raise ValueError(f"step {self.step!r:.50}")
            if not 0 <= self.elapsed < 1e12:
                raise ValueError(f"step {self.step} after {self.elapsed} seconds")
            if len(state["generator"]) == len(self.generator.get_state()):
                self.generator.set_state(state["generator"])
            else:
                self.generator.manual_seed(self.recipe.seed + self.step)
                note = "the state is from another type of device: t and eps get a new seed"
        except Exception as error:  # a damaged state can make torch raise any exception
            raise UserError(f"the training state does not fit: {one_line(error)}") from None
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


def checked_log(log: object) -> list[dict]:
    """Return the lines of a log.

    Raises:
        ValueError: it is not what `Run.add_to_log` makes.
    """
    numbers = ("step", "images", "loss", "val_loss")
    for line in log if isinstance(log, list) else [None]:
        if not isinstance(line, dict) or not {"step", "images"} <= line.keys():
            raise ValueError(f"{line!r:.50} is not a line of a log")
        if not all(type(line[key]) in (int, float) for key in numbers if key in line):
            raise ValueError(f"{line!r:.50} is not a line of a log")
        if not all(abs(line[key]) < 2**62 for key in numbers if key in line):
            raise ValueError(f"{line!r:.50} is not a line of a log")
        json.dumps(line)  # or a TypeError
    return log


def load_optimizer(optimizer: torch.optim.Optimizer, loaded: dict) -> None:
    """Load the moments of an optimizer. Its settings stay: the recipe decides them.

    Raises:
        ValueError: the moments are not those of the optimizer's parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": loaded["state"], "param_groups": groups})
    is_muon = isinstance(optimizer, Muon)
    wanted = {"momentum_buffer"} if is_muon else {"step", "exp_avg", "exp_avg_sq"}
    for p, moments in optimizer.state.items():
        if set(moments) != wanted:
            raise ValueError(f"its optimizer holds {', '.join(map(str, moments))}")
        for name, moment in moments.items():
            if moment.shape != (() if name == "step" else p.shape) or not moment.isfinite().all():
                raise ValueError(f"{name} of its optimizer does not fit the parameter")


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
