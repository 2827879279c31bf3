"""Sample images from a checkpoint of either kind.

a grid:            python infer.py --ckpt checkpoints/mnist-v.pt --steps 50 --eta 0
DDPM's sampler:    python infer.py --ckpt checkpoints/mnist-eps.pt --steps 1000 --sampler ddpm
the film:          python infer.py --ckpt checkpoints/mnist-v.pt --gif
for measuring:     python infer.py --ckpt checkpoints/mnist-v.pt --n 50000 --save-npy
several processes: torchrun --nproc-per-node=2 -- infer.py --ckpt ... --n 50000 --save-npy
                   (the -- keeps torchrun from taking --n for an option of its own)

The checkpoint knows what its network predicts. Image i depends only on the checkpoint, the
settings, the seed and i: not on the batch size nor on the number of processes.
"""

import argparse
import io
import math
import os
import shutil
from pathlib import Path

import cli
from cli import UserError

GRID_IMAGES = 1024  # the most that a grid shows
FILM_IMAGES = 16


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    natural = cli.number(int, 1)
    p = cli.Parser(__doc__)
    p.add_argument("--ckpt", required=True, metavar="FILE.pt", help="what train.py wrote")
    p.add_argument("--n", type=natural, default=64, help="how many images")
    p.add_argument("--steps", type=natural, default=50, help="how many timesteps are visited")
    p.add_argument(
        "--sampler", choices=("ddim", "ddpm"), default="ddim", help="the reverse process"
    )
    p.add_argument(
        "--eta",
        type=cli.number(float, 0, 1),
        help="ddim's noise, sigma_t^2 = eta beta~_t: 0 is deterministic, 1 is DDPM (default: 1, "
        "the best here at 20 and 50 steps)",
    )
    p.add_argument(
        "--spacing",
        choices=("leading", "linspace", "trailing"),
        help="which timesteps are visited (default: the checkpoint's)",
    )
    p.add_argument("--seed", type=cli.number(int, 0, 2**63 - 1), default=0, help="of all noise")
    p.add_argument(
        "--batch-size",
        type=natural,
        help="images at a time, of each process (default: 256, on a CUDA GPU 4096)",
    )
    p.add_argument("--nrow", type=natural, default=8, help="images in a row of the grid")
    p.add_argument(
        "--out",
        type=cli.output_file(".png"),
        metavar="FILE.png",
        help="the grid (default: named by the settings in samples/)",
    )
    p.add_argument(
        "--save-npy",
        action="store_true",
        help="also <out>.npy: uint8, N x 28 x 28 (x 3 for colour)",
    )
    p.add_argument("--save-png", metavar="DIR", help="also one file an image")
    p.add_argument(
        "--gif",
        action="store_true",
        help=f"also <out>.gif: x_t beside the predicted x_0, the first {FILM_IMAGES} images",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    args = p.parse_args(argv)
    if args.sampler == "ddpm" and args.eta is not None:
        p.error("--eta belongs to --sampler ddim; the ddpm sampler has none")
    args.eta = 1.0 if args.eta is None else args.eta
    return args


def _is_stale(file: Path, n: int) -> bool:
    return not file.stem.isdecimal() or int(file.stem) >= n


def main() -> int:
    args = parse_args()
    import numpy as np
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from checkpoint import load_model, write_atomically
    from data import to_uint8
    from sampling import make_grid, sample, save_grid, to_pil
    from scheduler import DDIMScheduler, DDPMScheduler

    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = cli.pick_device(args.device)
    batch_size = args.batch_size or (4096 if device.type == "cuda" else 256)
    model, contents = load_model(args.ckpt, device)
    shape = tuple(contents["image_shape"])
    config = contents["scheduler"] | ({"timestep_spacing": args.spacing} if args.spacing else {})
    try:
        scheduler = (DDIMScheduler if args.sampler == "ddim" else DDPMScheduler)(**config)
        scheduler.set_timesteps(args.steps)
    except ValueError as error:
        raise UserError(f"--steps {args.steps}: {error}") from None

    name = f"{Path(args.ckpt).stem}-{args.sampler}{args.steps}"
    name += f"-eta{args.eta:g}" if args.sampler == "ddim" else ""
    out = Path(args.out or f"samples/{name}-seed{args.seed}.png")
    png_dir = Path(args.save_png) if args.save_png else None

    # The images go to a file as they are made, each process filling in its rows: constant memory,
    # and whoever wants to show them reads them there. Without --save-npy it is deleted in the end.
    part = out.with_suffix(".npy.part")
    pixels_shape = (*shape[1:], shape[0])[: 2 if shape[0] == 1 else 3]  # H x W (x C)
    try:
        for folder in filter(None, (out.parent, png_dir)):
            folder.mkdir(parents=True, exist_ok=True)
        if args.n * math.prod(pixels_shape) > shutil.disk_usage(out.parent).free:
            raise UserError(f"{out.parent} has no room for --n {args.n} images")
        if png_dir and any(_is_stale(file, args.n) for file in png_dir.glob("*.png")):
            raise UserError(f"--save-png {png_dir} holds images that this run would not replace")
        if rank == 0:
            with open(part, "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (args.n, *pixels_shape)}
                np.lib.format.write_array_header_1_0(file, header)
        if world > 1:
            dist.init_process_group("gloo")
            dist.barrier()
        with open(part, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            first_row, row_bytes = file.tell(), math.prod(pixels_shape)
            begin, end = (args.n * r // world for r in (rank, rank + 1))
            bar = tqdm(total=end - begin, unit="img", desc=name, disable=rank > 0)
            steps_done = 0

            def progress(_t: int, x_t: torch.Tensor, _x0: torch.Tensor) -> None:
                nonlocal steps_done  # of single images
                steps_done += len(x_t)
                bar.update(steps_done // args.steps - bar.n)

            for first in range(begin, end, batch_size):
                images = torch.arange(first, min(first + batch_size, end), device=device)
                x = sample(
                    model,
                    scheduler,
                    images,
                    shape,
                    seed=args.seed,
                    eta=args.eta,
                    callback=progress,
                )
                x = to_uint8(x).cpu()
                pixels = x.permute(0, 2, 3, 1).reshape(-1, *pixels_shape)
                file.seek(first_row + first * row_bytes)
                file.write(pixels.numpy().tobytes())
                if png_dir:
                    for i, image in enumerate(x, start=first):
                        to_pil(image).save(png_dir / f"{i:06d}.png")
            bar.close()
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank == 0:
            stored = np.load(part, mmap_mode="r")[:GRID_IMAGES]
            grid = torch.tensor(stored).view(-1, *shape[1:], shape[0]).permute(0, 3, 1, 2)
            save_grid(out, grid, min(args.nrow, len(grid)))
            print(f"grid    {out}" + (f" (the first {len(grid)})" if len(grid) < args.n else ""))
            if args.save_npy:
                os.replace(part, out.with_suffix(".npy"))
                print(f"array   {out.with_suffix('.npy')} {(args.n, *pixels_shape)} uint8")
            if png_dir:
                print(f"images  {png_dir}/ ({args.n} files)")
    finally:
        if rank == 0:
            part.unlink(missing_ok=True)

    if rank == 0 and args.gif:
        frames = []

        def film(t: int, x_t: torch.Tensor, x0: torch.Tensor) -> None:
            pair = [make_grid(to_uint8(x), 4) for x in (x_t, x0)]
            frames.append(to_pil(torch.cat(pair, dim=2), scale=3))

        images = torch.arange(min(args.n, FILM_IMAGES), device=device)
        sample(model, scheduler, images, shape, seed=args.seed, eta=args.eta, callback=film)
        shown = frames[:: -(-len(frames) // 100)] + [frames[-1]] * 12  # at most 100, then a rest
        buffer = io.BytesIO()
        shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=80, loop=0)
        write_atomically(out.with_suffix(".gif"), buffer.getbuffer())
        print(f"film    {out.with_suffix('.gif')} (x_t beside the predicted x_0)")
    return 0


if __name__ == "__main__":
    cli.run(main)
