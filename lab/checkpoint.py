"""Files of tensors: model checkpoints and training states.

A model checkpoint is a dictionary of plain values and tensors:

    format       FORMAT
    unet         the arguments of unet.UNet
    scheduler    the arguments of scheduler.DDPMScheduler, among them the prediction type
    image_shape  (C, H, W)
    weights      the EMA weights: the UNet's state dict, float32
    training     how it was made: the script and its arguments, step, images, elapsed (seconds)
    classes      only of a network with labels: the names of the labels 0, 1, ...
    timesteps    only of a student of distill.py: the timesteps that it knows, descending
    teacher      only of a student: the entry "training" of its first teacher

A training state is another such dictionary, with a format of its own (see training/run.py).
"""

import io
import warnings
from pathlib import Path

from lab.errors import UserError, one_line
from lab.files import write_atomically

import torch

from scheduler import DDPMScheduler
from unet import UNet

FORMAT = "ddpm-ddim-lab checkpoint 1"


def save(path: str | Path, contents: dict) -> None:
    """Write a dictionary with `torch.save`, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: str | Path, *keys: str, wanted: str = FORMAT) -> dict:
    """Read a file that `save` wrote, onto the CPU, without running any code in it.

    Args:
        keys: what the dictionary must contain.
        wanted: its "format".

    Raises:
        UserError: the file is missing, unreadable, truncated, or not of this format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused anyway
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # hostile bytes can raise any exception in the unpickler
        raise UserError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}); nothing in it was run"
        ) from None
    if not isinstance(contents, dict) or contents.get("format") != wanted:
        found = contents.get("format") if isinstance(contents, dict) else None
        raise UserError(f"{path} has the format {found!r:.100}, but {wanted!r} is needed")
    missing = [key for key in keys if key not in contents]
    if missing:
        raise UserError(f"{path} is not the right kind of file: it has no {', '.join(missing)}")
    return contents


def save_model(
    path: str | Path,
    unet: UNet,
    scheduler: DDPMScheduler,
    image_shape: tuple,
    training: dict,
    **facts: object,
) -> None:
    """Write a model checkpoint. `facts` are its further entries.

    Raises:
        UserError: the file cannot be written.
    """
    weights = {name: w.detach().cpu().contiguous() for name, w in unet.state_dict().items()}
    contents = {
        "format": FORMAT,
        "unet": unet.config,
        "scheduler": dict(scheduler.config),  # a plain one: only such can be read back safely
        "image_shape": tuple(image_shape),
        "weights": weights,
        "training": training,
    }
    save(path, contents | facts)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[UNet, dict]:
    """Return the UNet of a model checkpoint, in eval mode on `device`, and the whole dictionary.

    Its "unet" and "scheduler" then have all arguments, also those left out in the file, and its
    "timesteps" are a list.

    Raises:
        UserError: as `load`, and if the weights do not fit the network or are not finite.
    """
    contents = load(path, "unet", "scheduler", "image_shape", "weights")
    model, scheduler = build_model(contents, path, device)
    full = {"unet": model.config, "scheduler": dict(scheduler.config)}
    if "timesteps" in contents:
        full["timesteps"] = scheduler.timesteps.tolist()
    return model, contents | full


def build_model(
    contents: dict, path: str | Path, device: torch.device | str = "cpu"
) -> tuple[UNet, DDPMScheduler]:
    """Return the UNet of the contents of a checkpoint, and its scheduler.

    The UNet is as `load_model` returns it. The scheduler of a student visits its timesteps.

    Args:
        path: the file that an error names.

    Raises:
        UserError: as `load_model`.
    """
    try:
        # On the meta device a hostile configuration cannot allocate memory.
        check_size(contents)
        with torch.device("meta"):
            unet = UNet(**contents["unet"])
        # also from half or double; a copy, so that two networks of one dictionary share nothing
        weights = {n: w.to(torch.float32, copy=True) for n, w in contents["weights"].items()}
        unet.load_state_dict(weights, assign=True)
        scheduler = DDPMScheduler(**contents["scheduler"])
        if "timesteps" in contents:
            scheduler.set_timesteps(timesteps=contents["timesteps"])
        elif "teacher" in contents:
            raise ValueError("it is a student of distill.py without its timesteps")
        check_classes(contents)
        check_image_shape(contents["image_shape"], unet)
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # a damaged dictionary can make torch raise any exception
        raise UserError(f"{path} does not hold a usable model: {one_line(error)}") from None
    unet.requires_grad_(False).eval()
    return unet.to(device, memory_format=torch.channels_last), scheduler


def check_classes(contents: dict) -> None:
    """Raise a ValueError if the names of the classes are not those of the network's labels."""
    classes, labels = contents.get("classes", []), contents["unet"].get("num_classes", 0)
    if not isinstance(classes, list) or not all(type(name) is str for name in classes):
        raise ValueError(f"{classes!r:.50} are not names of classes")
    if len(classes) != labels:
        raise ValueError(f"it has {len(classes)} names for {labels} classes")


def check_image_shape(shape: tuple[int, int, int], unet: UNet) -> None:
    """Raise a ValueError if the network cannot make images of this shape (C, H, W)."""
    channels, height, width = shape
    patch = unet.config["patch_size"]
    fits = channels == unet.config["in_channels"] and height % patch == width % patch == 0
    if any(type(n) is not int or n < 1 for n in shape) or not fits or height * width > 2**20:
        raise ValueError(f"its network cannot make images of shape {tuple(shape)}")
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels are neither gray nor colour")


def check_size(contents: dict) -> None:
    """Raise a ValueError if the network or the schedule would be absurdly large to build."""
    blocks = len(contents["unet"]["channel_mults"]) * contents["unet"]["num_blocks"]
    if blocks > len(contents["weights"]):
        raise ValueError(f"it has {len(contents['weights'])} weights for {blocks} blocks")
    if contents["scheduler"].get("num_train_timesteps", 0) > 1_000_000:
        raise ValueError("its schedule has more than a million timesteps")
