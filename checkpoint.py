"""The one file format: atomic writes, distrustful reads.

A model checkpoint is a dictionary of plain values and tensors,

    format       FORMAT
    unet         the constructor's arguments of unet.UNet
    scheduler    those of scheduler.DDPMScheduler, the prediction type among them
    image_shape  (C, H, W)
    weights      the EMA weights, the state dict of the UNet, float32
    training     how it came about: the arguments of train.py, step, images, elapsed (s)

and a training state, which train.py alone writes and reads, is such a dictionary with more in it.
"""

import io
import os
import tempfile
from pathlib import Path

import torch

from cli import UserError, first_line
from scheduler import DDPMScheduler
from unet import UNet

FORMAT = "ddpm-ddim-lab checkpoint 1"


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old or the new one whole.

    Raises:
        UserError: it can't be written (a full disk, no permission); what stood there still does.
    """
    path = Path(path)
    temporary = None
    if path.exists() and not path.is_file():  # a device, say, which the rename would take away
        raise UserError(f"cannot write {path}: it is not a regular file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is 0600, an ordinary one is not
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        kept = "; the previous one is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from None


def save(path: str | Path, contents: dict) -> None:
    """`torch.save` through `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: str | Path, *keys: str, map_location: torch.device | str = "cpu") -> dict:
    """Read a checkpoint without running any code in it, and see that it has `keys`.

    Raises:
        UserError: missing, unreadable, truncated, not a checkpoint of this lab.
    """
    try:
        contents = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # unpickling hostile bytes can raise anything
        raise UserError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}); nothing in it was run"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this lab (format {FORMAT!r})")
    missing = [key for key in keys if key not in contents]
    if missing:
        raise UserError(
            f"{path} is not the kind of checkpoint wanted: it has no {', '.join(missing)}"
        )
    return contents


def model_checkpoint(
    unet: UNet, scheduler: DDPMScheduler, image_shape: tuple, training: dict
) -> dict:
    """The contents of a model checkpoint; its weights are copies on the CPU."""
    return {
        "format": FORMAT,
        "unet": unet.config,
        "scheduler": scheduler.config,
        "image_shape": tuple(image_shape),
        "weights": {name: w.detach().cpu().contiguous() for name, w in unet.state_dict().items()},
        "training": training,
    }


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[UNet, dict]:
    """The UNet of a model checkpoint, in eval mode on `device`, and the checkpoint's contents.

    Raises:
        UserError: as `load`, and weights that do not fit the architecture or are not finite.
    """
    contents = load(path, "unet", "scheduler", "image_shape", "weights")
    try:
        # On the meta device a hostile configuration can't allocate: the tensors are the file's own.
        with torch.device("meta"):
            unet = UNet(**contents["unet"])
        unet.load_state_dict(contents["weights"], assign=True)
        DDPMScheduler(**contents["scheduler"])
        channels, height, width = contents["image_shape"]
        if channels != unet.config["in_channels"] or not 0 < height * width <= 2**20:
            raise ValueError(f"image_shape {contents['image_shape']}")
        if not all(w.isfinite().all() for w in contents["weights"].values()):
            raise ValueError("weights that are not finite")
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} does not hold a usable model: {first_line(error)}") from None
    unet = unet.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return unet, contents
