"""The files of a training run: their names, the log, the loss curve, and files of earlier runs."""

import contextlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError
from lab.files import only_process, samples_folder, write_atomically
from lab.pictures import new_figure, save_figure

STATE_FORMAT = "ddpm-ddim-lab training state 4"

STUDENTS = "-students"  # ends the name of a distillation


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, all named after its checkpoint.

    Args:
        checkpoint: such as checkpoints/v.pt.
        samples: the folder of the grids of all runs.
    """

    checkpoint: Path
    samples: Path

    @property
    def state(self) -> Path:
        return self.checkpoint.with_suffix(".state.pt")

    @property
    def log(self) -> Path:
        return self.checkpoint.with_suffix(".jsonl")

    @property
    def loss_curve(self) -> Path:
        return self.checkpoint.with_suffix(".png")

    @property
    def grid(self) -> Path:
        """The grid of the finished run."""
        return samples_folder(self.samples, self.checkpoint) / f"{self.checkpoint.stem}.png"

    def grid_of_epoch(self, epoch: int) -> Path:
        return self.grid.with_stem(f"{self.checkpoint.stem}-epoch{epoch:02d}")

    def of_student(self, steps: int) -> "RunFiles":
        """Return the files of a student of distill.py: of v-students.pt it is v-8steps.pt."""
        base = self.checkpoint.stem.removesuffix(STUDENTS)
        name = f"{base}-{steps}step{'s' if steps > 1 else ''}.pt"
        return RunFiles(self.checkpoint.with_name(name), self.samples)

    def keep_checkpoint(self, step: int) -> None:
        """Copy the checkpoint, as that of this step: v-step1000.pt."""
        kept = self.checkpoint.with_stem(f"{self.checkpoint.stem}-step{step}")
        write_atomically(kept, self.checkpoint.read_bytes())

    # ------------------------------------------------------------------------------- earlier runs

    def keep_earlier_run(self) -> str | None:
        """Rename the files of an earlier run: v.pt becomes v.1.pt, or v.2.pt if that is taken.

        A run that ended before its first step is not kept.

        Returns:
            A note for the user if there was an earlier run.
        """
        if not os.path.lexists(self.checkpoint) and step_of(self.state) == 0:
            self.state.unlink()
            self.log.unlink(missing_ok=True)
        earlier = self._existing()
        for number in itertools.count(1) if earlier else ():
            kept = RunFiles(
                self.checkpoint.with_stem(f"{self.checkpoint.stem}.{number}"), self.samples
            )
            new = {path: path.with_name(f"{a}.{number}{b}") for path, (a, b) in earlier.items()}
            if kept._existing() or any(map(os.path.lexists, new.values())):
                continue
            with contextlib.suppress(UserError), only_process(kept.state):
                for path in earlier:
                    os.replace(path, new[path])
                last = list(new.items())[-1]
                return f"files of an earlier run: {last[0]} is now {last[1]} and so on"
        return None

    def _existing(self) -> dict[Path, tuple[str, str]]:
        """Return the files of this run that are there; the checkpoint is the last one.

        The name of each is in two parts: a number goes between them when the file is kept.
        """
        stem = self.checkpoint.stem
        further = rf"({re.escape(stem)})(-epoch\d+\.png|-step\d+\.pt)"
        if stem.endswith(STUDENTS):
            further = rf"({re.escape(stem.removesuffix(STUDENTS))}-\d+steps?)(\.pt|\.png)"
        found = {}
        for path in sorted({*self.grid.parent.glob("*.png"), *self.checkpoint.parent.glob("*.pt")}):
            if match := re.fullmatch(further, path.name):
                found[path] = match[1], match[2]
        for path in (self.grid, self.loss_curve, self.log, self.state, self.checkpoint):
            if os.path.lexists(path):
                found[path] = stem, path.name.removeprefix(stem)
        return found

    def check_run(self, run: str) -> None:
        """Check that the log, the state and the checkpoints, where they exist, are of this run.

        Raises:
            UserError: a file belongs to another run, which resuming would overwrite.
        """
        from lab.checkpoint import load

        for path in self._existing():
            if path.suffix != ".pt":
                continue
            is_state = path == self.state
            owner = load(path, wanted=STATE_FORMAT) if is_state else load(path).get("training")
            if not isinstance(owner, dict) or owner.get("run") != run:
                raise UserError(f"{path} is of another run than the one to resume: move it")
        if self.log.exists():
            first = self.log.read_text(errors="replace").partition("\n")[0]
            owner = None
            with contextlib.suppress(ValueError, AttributeError):
                owner = json.loads(first).get("run")
            if owner not in (None, run):
                raise UserError(f"{self.log} is of another run than the one to resume: move it")

    # ------------------------------------------------------------------------------- log and curve

    def write_log(self, log: list[dict]) -> None:
        """Write the whole log, one JSON object per line."""
        write_atomically(self.log, "".join(f"{json.dumps(line)}\n" for line in log).encode())

    def append_to_log(self, line: dict) -> None:
        """Add one line to the log. If this fails, the next save writes the whole log."""
        with contextlib.suppress(OSError), open(self.log, "a") as file:
            file.write(f"{json.dumps(line)}\n")

    def draw_loss_curve(self, log: list[dict], loss: str) -> None:
        """Draw the training and the validation loss against the number of images seen.

        Both are means over the same distribution of timesteps. A training with labels leaves a
        tenth of them out; the validation leaves none out.

        Args:
            loss: what the loss is, for the axis.
        """
        figure, axes = new_figure(1, 1, 7, 4)
        ax = axes[0, 0]
        for key, style, label in (
            ("loss", "-", "training images, weights in training"),
            ("val_loss", "o-", "test images, moving average of the weights"),
        ):
            points = [(line["images"], line[key]) for line in log if key in line]
            if points:
                ax.plot(*zip(*points, strict=True), style, label=label, lw=1, ms=4)
        ax.set(xlabel="images seen", ylabel=loss)
        ax.set_yscale("log")
        if ax.lines:
            ax.legend()
        ax.grid(alpha=0.3, which="both")
        save_figure(figure, self.loss_curve)


def step_of(state: Path) -> int | None:
    """Return the step of a training state, or None if the file is not one."""
    from lab.checkpoint import load

    try:
        return load(state, "step", wanted=STATE_FORMAT)["step"]
    except UserError:
        return None
