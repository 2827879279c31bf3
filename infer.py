"""Sample images from a checkpoint, whatever its network predicts.

a grid:            python infer.py --ckpt checkpoints/mnist-v.pt --steps 50 --eta 0
DDPM's sampler:    python infer.py --ckpt checkpoints/mnist-eps.pt --steps 1000 --sampler ddpm
few steps:         python infer.py --ckpt checkpoints/mnist-v.pt --steps 10 --sampler dpm++
a film:            python infer.py --ckpt checkpoints/mnist-v.pt --gif
for metrics.py:    python infer.py --ckpt checkpoints/mnist-v.pt --n 2000 --save-npy
a digit you want:  python infer.py --ckpt checkpoints/mnist-v-labels.pt --label 7
a student:         python infer.py --ckpt checkpoints/mnist-v-labels-1step.pt
several processes: torchrun --nproc-per-node=2 -- infer.py --ckpt ... --n 50000 --save-npy
                   (without the -- torchrun would take --n as its own option)

The checkpoint knows what its network predicts, whether it has labels (train.py --labels), and, if
it is a student of distill.py, its timesteps. Image i depends only on the checkpoint, the settings,
the seed and i. It does not depend on the batch size or on the number of processes.
"""

import argparse
import contextlib
import io
import math
import os
import shutil
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from lab import cli
from lab.errors import UserError
from lab.files import (
    LABELS,
    labels_file,
    only_process,
    put_in_place,
    samples_folder,
    temporary_beside,
    write_atomically,
)

if TYPE_CHECKING:  # torch and what imports it are imported after --help has been answered
    from lab.distributed import Process

    from torch import Tensor

    from scheduler import DDPMScheduler

SAMPLERS = {"ddim": True, "ddpm": False, "dpm++": True}  # scheduler.SAMPLERS: whether it has eta
GRID_IMAGES = 1024  # the most that a grid shows
FILM_IMAGES, FILM_FRAMES = 16, 100


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = make_parser()
    args = p.parse_args(argv)
    if args.out and Path(args.out).with_suffix(".npy").name.endswith(LABELS):
        p.error(f"--out {args.out} would be mistaken for labels: choose another name")
    if args.eta is not None and not SAMPLERS[args.sampler]:
        p.error(f"--eta does not belong to --sampler {args.sampler}: leave it out")
    return args


def make_parser() -> cli.Parser:
    natural = cli.number(int, 1)
    p = cli.Parser(__doc__)
    p.add_argument(
        "--ckpt", required=True, metavar="FILE.pt", help="a checkpoint of train.py or distill.py"
    )
    p.add_argument("--n", type=natural, help="number of images (default: 64, or 8 per label)")
    p.add_argument(
        "--steps",
        type=natural,
        help="number of timesteps to visit (default: 50; a student's: its own)",
    )
    p.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="ddim",
        help="the reverse process; ddpm makes the same images as ddim with --eta 1, by DDPM's own "
        "formula; dpm++ is DPM-Solver++(2M), DDIM with an extrapolated x_0",
    )
    p.add_argument(
        "--eta",
        type=cli.number(float, 0, 1),
        help="noise of ddim and dpm++, sigma_t^2 = eta beta~_t: 0 is deterministic, 1 is DDPM "
        "(default: 1, with 50 steps as good as any for mnist-v and mnist-eps; a student's: 0, as "
        "it was trained). diffusers' eta is the square root of this one",
    )
    p.add_argument(
        "--label",
        nargs="+",
        metavar="CLASS",
        help="only with labels: the classes to sample, in turn, by number or name (default: all, "
        "one column each); 'none' samples without a label",
    )
    p.add_argument(
        "--guidance-scale",
        type=cli.number(float, 0, 100),
        default=1.0,
        help="only with labels: uncond + scale (cond - uncond), as in diffusers. 1 is no guidance; "
        "more gives clearer and less varied digits, and costs two network calls per step",
    )
    p.add_argument(
        "--spacing",
        choices=("leading", "linspace", "trailing"),
        help="which timesteps are visited: trailing starts at the noisiest one, leading ends at "
        "the cleanest, linspace does both (default: the checkpoint's)",
    )
    p.add_argument("--seed", type=cli.number(int, 0, 2**63 - 1), default=0, help="seed of noise")
    p.add_argument(
        "--batch-size",
        type=natural,
        help="images at a time in each process; on a CPU, in each of up to 8 threads (default: 64, "
        "on a CUDA GPU 4096, on others 256)",
    )
    p.add_argument(
        "--nrow",
        type=natural,
        help="images per row of the grid (default: 8; several labels: one column each)",
    )
    p.add_argument(
        "--out",
        type=cli.output_file(".png"),
        metavar="FILE.png",
        help="the grid (default: in samples/, named after the settings)",
    )
    p.add_argument(
        "--save-npy",
        action="store_true",
        help="also write OUT.npy: uint8, N x 28 x 28 (colour: x 3). With labels also "
        "OUT.labels.npy, for metrics.py",
    )
    p.add_argument("--save-png", metavar="DIR", help="also write one PNG file per image")
    p.add_argument(
        "--gif",
        action="store_true",
        help=f"also write OUT.gif: x_t beside the predicted x_0, for {FILM_IMAGES} images",
    )
    cli.add_device(p)
    return p


def fill_in(args: argparse.Namespace, contents: dict) -> None:
    """Give each argument that was not given the value that suits the checkpoint.

    Raises:
        UserError: an argument that was given does not suit the checkpoint.
    """
    timesteps, classes = contents.get("timesteps"), contents.get("classes", [])
    if timesteps is not None:  # a student: it knows one way to sample
        wrong = []
        if args.steps not in (None, len(timesteps)):
            wrong.append(f"--steps {args.steps}")
        if args.sampler != "ddim":
            wrong.append(f"--sampler {args.sampler}")
        if args.spacing:
            wrong.append(f"--spacing {args.spacing}")
        if wrong:
            raise UserError(
                f"{wrong[0]} does not suit {args.ckpt}, a student of {len(timesteps)} "
                f"step{'s' if len(timesteps) > 1 else ''} for --sampler ddim: leave it out"
            )
        args.steps = len(timesteps)
    args.steps = args.steps or min(50, contents["scheduler"]["num_train_timesteps"])
    if args.eta is None:
        args.eta = 1.0 if timesteps is None else 0.0
    if not classes and (args.label is not None or args.guidance_scale != 1):
        option = "--guidance-scale" if args.label is None else "--label"
        raise UserError(f"{option} cannot be used: {args.ckpt} was trained without --labels")
    if args.label == ["none"] and args.guidance_scale != 1:
        raise UserError("--guidance-scale needs a label: leave out --label none")
    args.label_name = "" if args.label is None else f"-label{'-'.join(args.label)}"
    args.label_numbers = class_numbers(args.label, classes)
    columns = len(args.label_numbers) if len(args.label_numbers) > 1 else 8
    args.nrow_name = f"-nrow{args.nrow}" if args.nrow else ""
    args.nrow = args.nrow or columns
    args.n = args.n or 8 * columns


def class_numbers(wanted: list[str] | None, classes: list[str]) -> list[int]:
    """Return the numbers of the classes: all of them if None, and none of them for "none".

    Raises:
        UserError: there is no such class.
    """
    if wanted is None or wanted == ["none"]:
        return list(range(len(classes))) if wanted is None else []
    numbers = {name.lower(): i for i, name in enumerate(classes)}
    numbers |= {str(i): i for i in range(len(classes))}
    for label in wanted:
        if label.lower() not in numbers:
            raise UserError(f"--label {label}: the classes are {', '.join(classes)}")
    return [numbers[label.lower()] for label in wanted]


class Sampler:
    """A model with all the settings of its samples. Arguments not given are filled in.

    Raises:
        UserError: the checkpoint cannot be used, or not with these arguments.
    """

    def __init__(self, args: argparse.Namespace, process: "Process"):
        from lab.checkpoint import load_model

        import torch

        from scheduler import SAMPLERS as schedulers

        self.path = args.ckpt
        self.model, contents = load_model(args.ckpt, process.device)
        fill_in(args, contents)
        self.shape = tuple(contents["image_shape"])
        self.device, self.seed = process.device, args.seed
        self.step_arguments = {"eta": args.eta} if SAMPLERS[args.sampler] else {}
        self.labels = torch.tensor(args.label_numbers, device=process.device)
        self.guidance_scale = args.guidance_scale
        config = contents["scheduler"]
        if args.spacing:
            config["timestep_spacing"] = args.spacing
        try:
            self.scheduler: DDPMScheduler = schedulers[args.sampler](**config)
            if "timesteps" in contents:
                self.scheduler.set_timesteps(timesteps=contents["timesteps"])
            else:
                self.scheduler.set_timesteps(args.steps)
        except ValueError as error:
            raise UserError(f"--steps {args.steps}: {error}") from None

    def labels_of(self, indices: "Tensor") -> "Tensor":
        """Return the labels of these images: the wanted classes in turn."""
        return self.labels[indices % len(self.labels)]

    def __call__(self, indices: range, callback=None) -> "Tensor":
        """Return images `indices`: (B, C, H, W) uint8 on the CPU."""
        from lab.data import to_uint8

        import torch

        from diffusion import guided, sample

        numbers, model = torch.arange(indices.start, indices.stop, device=self.device), self.model
        if len(self.labels):
            model = guided(model, self.labels_of(numbers), self.guidance_scale)
        x = sample(
            model,
            copy(self.scheduler),  # DPM-Solver++ remembers its last step, and batches run together
            numbers,
            self.shape,
            seed=self.seed,
            callback=callback,
            **self.step_arguments,
        )
        if not x.isfinite().all():
            raise UserError(f"{self.path} makes images that are not finite")
        return to_uint8(x).cpu()


def default_output(args: argparse.Namespace) -> Path:
    """Return a file name that no other settings have."""
    name = f"{Path(args.ckpt).stem}-{args.sampler}{args.steps}"
    name += f"-eta{shortest(args.eta)}" if SAMPLERS[args.sampler] else ""
    name += f"-{args.spacing}" if args.spacing else ""
    name += args.label_name
    name += f"-guidance{shortest(args.guidance_scale)}" if args.guidance_scale != 1 else ""
    name += args.nrow_name
    return samples_folder("samples", args.ckpt) / f"{name}-n{args.n}-seed{args.seed}.png"


def shortest(number: float) -> str:
    """Return the shortest text that gives the number back: "0.3", "1"."""
    return repr(float(number)).removesuffix(".0")


def main() -> int:
    args = parse_args()
    from datetime import timedelta

    from lab.distributed import launch

    with launch(args.device, timeout=timedelta(days=1)) as process:
        sampler = Sampler(args, process)
        out = Path(args.out or default_output(args))
        if args.save_png and out.parent.resolve() == Path(args.save_png).resolve():
            raise UserError(f"--save-png {args.save_png} is the folder of {out}: choose another")
        with one_writer(args.save_png, process):
            written = write_images(sampler, args, out, process)
        if args.gif and process.is_first:
            film = out.with_suffix(".gif")
            write_film(sampler, args.n, film)
            written.append(f"film    {film} (x_t beside the predicted x_0)")
        if process.is_first:
            print("\n".join(written))
    return 0


def one_writer(png_dir: str | None, process: "Process") -> contextlib.AbstractContextManager:
    """Refuse a second run that would mix its files with those of this one in --save-png DIR."""
    if png_dir and process.is_first:
        return only_process(Path(png_dir))
    return contextlib.nullcontext()


def write_images(
    sampler: Sampler, args: argparse.Namespace, out: Path, process: "Process"
) -> list[str]:
    """Sample the images into one array on disk, at constant memory, and draw the grid from it.

    Every process writes its own rows of the array. Without --save-npy it is deleted in the end.

    Returns:
        What was written, one line per kind of file.
    """
    check_room(args, out, math.prod(sampler.shape))
    array = Path(os.path.realpath(out.with_suffix(".npy")))
    part = process.agree(temporary_beside(array))  # a different name for each run
    try:
        if process.is_first:
            write_header(part, array_shape(args.n, sampler.shape))
        process.barrier()
        write_rows(part, sampler, args, out, process)
        process.barrier()
        return put_files(part, array, sampler, args, out) if process.is_first else []
    finally:
        if process.is_first:
            part.unlink(missing_ok=True)


def array_shape(n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the shape of the array of n images (C, H, W): (n, H, W), in colour (n, H, W, C)."""
    C, H, W = shape
    return (n, H, W) if C == 1 else (n, H, W, C)


def write_header(part: Path, shape: tuple[int, ...]) -> None:
    """Begin the .npy file of a uint8 array of this shape."""
    import numpy as np

    with open(part, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)


def skip_header(file: io.BufferedIOBase) -> int:
    """Move to the first byte of the array in a .npy file, and return where it is."""
    import numpy as np

    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


def write_rows(
    part: Path, sampler: Sampler, args: argparse.Namespace, out: Path, process: "Process"
) -> None:
    """Sample the images of this process, and write them to their rows and to --save-png."""
    from lab.pictures import save_png, to_pil
    from lab.threads import Crew

    mine, crew = process.share(args.n), Crew(sampler.device)
    batch_size = args.batch_size or {"cuda": 4096, "cpu": 64}.get(sampler.device.type, 256)
    batches = crew.split(mine, batch_size)
    with open(part, "r+b") as file, progress_bar(len(mine), args, out, process) as bar:

        def make(indices: range) -> "Tensor":
            return sampler(indices, lambda _t, x_t, _x0: crew.report(bar.advance, len(x_t)))

        file.seek(skip_header(file) + mine.start * math.prod(sampler.shape))
        for indices, images in zip(batches, crew.map(make, batches), strict=True):
            file.write(images.permute(0, 2, 3, 1).numpy().tobytes())
            if args.save_png:
                for i, image in zip(indices, images, strict=True):
                    save_png(Path(args.save_png) / f"{i:06d}.png", to_pil(image))
        file.flush()
        os.fsync(file.fileno())


def put_files(
    part: Path, array: Path, sampler: Sampler, args: argparse.Namespace, out: Path
) -> list[str]:
    """Draw the grid of the finished array, and put the files that were asked for in place.

    Returns:
        As `write_images`.
    """
    from lab.pictures import save_grid

    import numpy as np
    import torch

    C, H, W = sampler.shape
    shown = min(args.n, GRID_IMAGES)
    with open(part, "rb") as file:
        skip_header(file)
        pixels = np.frombuffer(file.read(shown * C * H * W), np.uint8)
    written = [f"grid    {out}" + (f" (the first {shown})" if shown < args.n else "")]
    if args.save_npy:  # before the grid: it is not lost if the grid cannot be written
        labels_file(out).unlink(missing_ok=True)  # those of an earlier array of this name
        put_in_place(part, array)
        shape = array_shape(args.n, sampler.shape)
        written.append(f"array   {out.with_suffix('.npy')} {shape} uint8")
        if len(sampler.labels):
            buffer = io.BytesIO()
            np.save(buffer, sampler.labels_of(torch.arange(args.n)).cpu().numpy())
            write_atomically(labels_file(out), buffer.getvalue())
            written.append(f"labels  {labels_file(out)}")
    grid = torch.tensor(pixels).view(shown, H, W, C).permute(0, 3, 1, 2)
    save_grid(out, grid, min(args.nrow, shown))
    if args.save_png:
        written.append(f"images  {Path(args.save_png)}/ ({args.n} files)")
    return written


def check_room(args: argparse.Namespace, out: Path, row_bytes: int) -> None:
    """Make the folders of the output, and check that the files can be written there.

    Raises:
        UserError: the images do not fit on the disk, or would mix with those of another run.
    """
    png_dir = Path(args.save_png) if args.save_png else None
    for folder in filter(None, (out.parent, png_dir)):
        folder.mkdir(parents=True, exist_ok=True)
    further = [out.with_suffix(".npy"), labels_file(out)] if args.save_npy else []
    for path in [*further, out.with_suffix(".gif")] if args.gif else further:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} exists and is not a file")
    if args.n * row_bytes > shutil.disk_usage(out.parent).free:
        raise UserError(f"{out.parent} has no room for --n {args.n} images")
    if png_dir and any(is_stale(file, args.n) for file in png_dir.glob("*.png")):
        raise UserError(f"--save-png {png_dir} holds images that this run would not replace")


def is_stale(file: Path, n: int) -> bool:
    """Return whether a PNG file is none of the n that this run writes."""
    is_number = file.stem.isascii() and file.stem.isdecimal()
    return not is_number or int(file.stem) >= n or file.stem != f"{int(file.stem):06d}"


def progress_bar(total: int, args: argparse.Namespace, out: Path, process: "Process"):
    """Return a bar over images that advances by sampling steps."""
    from tqdm import tqdm

    class Bar(tqdm):
        steps_done = 0  # of single images

        def advance(self, images: int) -> None:
            self.steps_done += images
            self.update(self.steps_done // args.steps - self.n)

    return Bar(total=total, unit="img", desc=out.stem, disable=not process.is_first)


def write_film(sampler: Sampler, n: int, path: Path) -> None:
    """Write an animation of the reverse process: x_t beside the predicted x_0."""
    from lab.data import to_uint8
    from lab.pictures import make_grid, to_pil

    import torch

    frames = []

    def film(_t: int, x_t: "Tensor", x0: "Tensor") -> None:
        pair = [make_grid(to_uint8(x), 4) for x in (x_t, x0)]
        frames.append(to_pil(torch.cat(pair, dim=2), scale=3))

    sampler(range(min(n, FILM_IMAGES)), film)
    shown = frames[:: -(-len(frames) // FILM_FRAMES)] + [frames[-1]] * 12  # the end stays a while
    buffer = io.BytesIO()
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=80, loop=0)
    write_atomically(path, buffer.getbuffer())


if __name__ == "__main__":
    cli.run(main)
