"""A training run: what it keeps between two steps, and how that is saved and loaded."""

import copy
import json
import math
import uuid
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lab import checkpoint
from lab.data import CLASSES, to_model_range
from lab.distributed import Process
from lab.errors import UserError, one_line

import torch
from torch import Tensor, nn

from diffusion import training_loss
from scheduler import PREDICTION_TYPES, DDPMScheduler
from training.optim import Muon, ema_decay, learning_rate_factor, make_optimizers, update_ema
from training.recipe import LABEL_DROPOUT, Recipe, loss_weights, timestep_cdf
from training.run_files import STATE_FORMAT, RunFiles
from unet import UNet

STATE_KEYS = (
    *("script", "run", "recipe", "options", "step", "elapsed", "log"),
    *("model", "ema", "optimizers", "generator"),
)
WELL_MIXED = 0.01  # abar_T above it: x_T still shows the image, and N(0, I) is the wrong start
PRED_OPTIONS = {p.option: name for name, p in PREDICTION_TYPES.items()}  # --pred to prediction_type


class Run(ABC):
    """A run between two steps; `save` writes it to a file, `load` goes on from one.

    `Training` below fits a network to the data; distill.py fits a student to its teacher.

    Args:
        recipe: what decides the weights: `batch_size`, `lr`, `muon_lr`, `warmup`, `clip`, `ema`,
            `dataset`, `seed`, and what the subclass needs.
        images: (N, C, H, W) uint8, the training images, on the device to train on.
        labels: (N,) int64, their classes. They are used if the network has classes.
        scheduler: of the network.
        model: the network. It is trained in place.
        total_steps: optimizer steps of the whole run.

    Attributes:
        id: a name of this run that no other run has.
        ema: the moving average of the weights.
        step, total_steps: optimizer steps so far, and in the whole run.
        lr: AdamW's learning rate in the last step.
        elapsed: seconds of training so far.
        log: one dictionary per line of the log file.

    Raises:
        UserError: the recipe does not fit the images.
    """

    script: str  # whose run it is

    def __init__(
        self,
        recipe,
        images: Tensor,
        labels: Tensor | None,
        scheduler: DDPMScheduler,
        model: UNet,
        total_steps: int,
    ):
        if recipe.batch_size > len(images):
            raise UserError(
                f"--batch-size {recipe.batch_size} is more than the {len(images)} images"
            )
        device = images.device
        self.recipe, self.images, self.scheduler = recipe, images, scheduler
        self.model = model.to(device, memory_format=torch.channels_last)
        self.labels = labels if model.config["num_classes"] else None
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ema_weight = torch.zeros((), device=device)  # of the new weights, in this step
        self.optimizers = make_optimizers(self.model, recipe.lr, recipe.muon_lr)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

        self.id = uuid.uuid4().hex
        self.step, self.total_steps, self.elapsed, self.lr = 0, total_steps, 0.0, 0.0
        self.log: list[dict] = []
        self.add_to_log(run=self.id, recipe=asdict(recipe))
        self.steps_per_epoch = len(images) // recipe.batch_size
        self._order: tuple[int, Tensor] | None = None

    # ------------------------------------------------------------------------------------- a step

    def next_indices(self) -> Tensor:
        """Return which images this step has, (B,) int64.

        An epoch shows each image at most once: what does not fill a batch is left out. The order is
        a function of (seed, epoch), so a resumed run continues it.
        """
        epoch, i = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            indices = torch.randperm(len(self.images), generator=shuffle)
            self._order = epoch, indices.to(self.images.device)
        B = self.recipe.batch_size
        return self._order[1][i * B : (i + 1) * B]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return these images as x_0, (B, C, H, W) in the range of the model, and labels (B,).

        A tenth of the labels become the null label, so that the network also learns to do without
        (Ho & Salimans 2022, algorithm 1).
        """
        x0, labels = self.to_model_range(self.images[indices]), None
        if self.labels is not None:
            u = torch.rand(len(x0), generator=self.generator, device=self.generator.device)
            null = self.model.config["num_classes"]
            labels = self.labels[indices].masked_fill(u < LABEL_DROPOUT, null)
        return x0, labels

    def next_batch(self) -> tuple[Tensor, Tensor | None]:
        """Return x_0 and the labels of this step, see `batch`."""
        return self.batch(self.next_indices())

    def to_model_range(self, images: Tensor) -> Tensor:
        return to_model_range(images, self.scheduler.config.clip_sample_range)

    @abstractmethod
    def loss(
        self,
        model: nn.Module,
        x0: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        share: range | None = None,
    ) -> Tensor:
        """Return the loss of a batch, as `diffusion.training_loss` does.

        Args:
            model: `self.model`, perhaps wrapped, or `self.ema`.
            labels: (B,) int64 or None.
        """

    @property
    def schedule(self) -> tuple[int, int]:
        """The step and the length that the learning rate and the moving average follow."""
        return self.step, self.total_steps

    @property
    def lr_factor(self) -> float:
        """The learning rate of this step, as a factor of its peak."""
        return learning_rate_factor(*self.schedule, self.recipe.warmup)

    def update(self, loss: Tensor) -> Tensor:
        """Take one step: gradient, clipping, optimizers, moving average.

        Returns:
            The norm of the gradient, still on the device.
        """
        self.set_rates()
        norm = self.apply(loss)
        self.step += 1
        return norm

    def set_rates(self) -> None:
        """Write the learning rates and the EMA's weight of this step where `apply` reads them."""
        self.lr = self.recipe.lr * self.lr_factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(group["peak_lr"] * self.lr_factor)
        self.ema_weight.fill_(1 - ema_decay(self.schedule[0], self.recipe.ema))

    def apply(self, loss: Tensor) -> Tensor:
        """Do all of `update` that is done on the device."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(self.ema, self.model, self.ema_weight)
        return norm

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    @abstractmethod
    def stage_ends(self) -> bool:
        """Whether the last step ended an epoch (distill.py: a round), or the run."""

    def fit_to_the_clock(self) -> None:  # noqa: B027 - most runs have no time budget
        """Set the length of a run that has a time budget by its speed so far."""

    def check_finite(self, losses: list[float], norms: list[float], last_good: str) -> None:
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
            raise UserError(f"{problem}, learning rate {self.lr:.3g}; last good state: {last_good}")

    # -------------------------------------------------------------------------------- save, load

    def add_to_log(self, **entries: object) -> dict:
        """Add a line to the log and return it."""
        line = {"step": self.step, "images": self.step * self.recipe.batch_size} | entries
        self.log.append(line)
        return line

    title: str  # for the progress bar
    loss_name: str  # for the loss curve
    wants_its_speed = False  # whether the loop should measure it now

    def notes(self) -> list[str]:
        """Return notes for the user."""
        return []

    @abstractmethod
    def checkpoint_path(self, files: RunFiles) -> Path:
        """Return where the model checkpoint goes at this step."""

    def checkpoints(self, files: RunFiles) -> list[Path]:
        """Return the model checkpoints of the finished run."""
        return [self.checkpoint_path(files)]

    @abstractmethod
    def grid_path(self, files: RunFiles) -> Path:
        """Return where the sample grid goes at this step."""

    @abstractmethod
    def preview_settings(self) -> tuple[dict, float]:
        """Return the arguments of `set_timesteps`, and eta, for the sample grid of this step."""

    def facts(self) -> dict:
        """Return what the checkpoint holds besides (see lab/checkpoint.py)."""
        return {}

    def save(self, files: RunFiles, options: dict) -> None:
        """Write the model checkpoint, the training state and the log.

        Args:
            options: further arguments of the script, which a resumed run takes over.

        Raises:
            UserError: a file cannot be written.
        """
        self.save_checkpoint(files)
        self.save_state(files, options)

    def save_checkpoint(self, files: RunFiles) -> None:
        """Write the model checkpoint."""
        training = {
            "script": self.script,
            "run": self.id,
            "args": asdict(self.recipe),
            "step": self.step,
            "images": self.step * self.recipe.batch_size,
            "elapsed": self.elapsed,
        }
        shape = tuple(self.images.shape[1:])
        path, facts = self.checkpoint_path(files), self.facts()
        checkpoint.save_model(path, self.ema, self.scheduler, shape, training, **facts)

    def save_state(self, files: RunFiles, options: dict) -> None:
        """Write the training state and the log: all of `save` but the model checkpoint."""
        state = {
            "format": STATE_FORMAT,
            "script": self.script,
            "run": self.id,
            "recipe": asdict(self.recipe),
            "options": options,
            "step": self.step,
            "elapsed": self.elapsed,
            "log": self.log,
            **{name: module.state_dict() for name, module in self.modules().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            **self.further_state(),
        }
        checkpoint.save(files.state, state)
        files.write_log(self.log)

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks that a state holds."""
        return {"model": self.model, "ema": self.ema}

    def further_state(self) -> dict:
        """Return what else a state holds."""
        return {}

    def load(self, state: dict) -> str | None:
        """Go on from a training state that `read_state` returned; its recipe must be this run's.

        Returns:
            A note for the user, if the run cannot continue bit for bit.

        Raises:
            UserError: the state does not fit this run.
        """
        note = None
        try:
            for name, module in self.modules().items():
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
        if self.step > self.total_steps:
            raise UserError(
                f"the training state does not fit: it is at step {self.step}, and the run ends at "
                f"step {self.total_steps}"
            )
        return note


class Training(Run):
    """A run of train.py: it fits a UNet to the images (Algorithm 1 of DDPM).

    Args:
        recipe: what decides the weights.
        images, labels: the training set, as in `Run`.

    Raises:
        UserError: the recipe contradicts itself or does not fit the images.
    """

    script = "train.py"

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor | None = None):
        try:
            scheduler = DDPMScheduler(
                recipe.timesteps,
                beta_schedule=recipe.schedule,
                prediction_type=PRED_OPTIONS[recipe.pred],
                rescale_betas_zero_snr=recipe.zero_snr,
                clip_sample_range=recipe.clip_sample_range,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        torch.manual_seed(recipe.seed)
        num_classes = len(CLASSES[recipe.dataset]) if recipe.labels else 0
        model = UNet(images.shape[1], recipe.channels, num_classes=num_classes)
        # The length of a --minutes run is a first guess, see `fit_to_the_clock`.
        steps_per_epoch = len(images) // recipe.batch_size
        steps = recipe.steps or (recipe.epochs or 1000) * steps_per_epoch
        super().__init__(recipe, images, labels, scheduler, model, steps)
        abar, prediction_type = scheduler.alphas_cumprod, scheduler.prediction_type
        self.cdf = timestep_cdf(abar, recipe.density, recipe.low_noise).float().to(images.device)
        self.loss_weights = loss_weights(abar, prediction_type, recipe.max_weight)
        self.loss_weights = self.loss_weights.float().to(images.device)
        self.title = recipe.pred
        self.loss_name = f"loss (t drawn from the {recipe.density} density)"

    def notes(self) -> list[str]:
        abar_T = self.scheduler.alphas_cumprod[-1].item()
        if abar_T <= WELL_MIXED:
            return []
        return [
            f"abar_T is {abar_T:.2g}, but sampling starts from pure noise, which is abar_T = 0: "
            "use --schedule cosine, --zero-snr or more --timesteps"
        ]

    def loss(self, model, x0, labels, generator, share=None) -> Tensor:
        if labels is not None:
            share_of_labels = labels if share is None else labels[share.start : share.stop]
            model = partial(model, labels=share_of_labels)
        return training_loss(
            model, self.scheduler, x0, self.cdf, self.loss_weights, generator, share
        )

    @property
    def stage_ends(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.finished

    @property
    def wants_its_speed(self) -> bool:
        return self.recipe.minutes is not None and self.step == 5

    def fit_to_the_clock(self) -> None:
        if self.recipe.minutes is None or self.step == 0:
            return
        if self.elapsed > 1e-6 * self.step:  # else a damaged state has lost its time
            left = self.recipe.minutes * 60 - self.elapsed
            self.total_steps = self.step + max(0, round(left / (self.elapsed / self.step)))

    def checkpoint_path(self, files: RunFiles) -> Path:
        return files.checkpoint

    def grid_path(self, files: RunFiles) -> Path:
        epoch = self.step // self.steps_per_epoch
        return files.grid if self.finished else files.grid_of_epoch(epoch)

    def preview_settings(self) -> tuple[dict, float]:
        steps = 50 if self.finished else 20
        return {"num_inference_steps": min(steps, self.recipe.timesteps)}, 1.0

    def facts(self) -> dict:
        return {"classes": CLASSES[self.recipe.dataset]} if self.recipe.labels else {}


def read_state(path: str | Path, script: str) -> dict:
    """Return the contents of a training state.

    Raises:
        UserError: the file cannot be read or is not a training state of this version and script.
    """
    if not str(path).endswith(".state.pt"):
        raise UserError(f"{path} does not end in .state.pt, as every training state does")
    state = checkpoint.load(path, *STATE_KEYS, wanted=STATE_FORMAT)
    if state["script"] != script:
        raise UserError(f"{path} is not a state of {script} but of {state['script']!r:.50}")
    return state


def checked_log(log: object) -> list[dict]:
    """Return the lines of a log.

    Raises:
        ValueError: it is not what `Run.add_to_log` makes.
    """
    numbers = ("step", "images", "loss", "val_loss")
    for line in log if isinstance(log, list) else [None]:
        is_line = isinstance(line, dict) and {"step", "images"} <= line.keys()
        known = [line[key] for key in numbers if key in line] if is_line else []
        if not is_line or not all(type(x) in (int, float) and abs(x) < 2**62 for x in known):
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
