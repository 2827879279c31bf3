"""The reverse loop, the noise that makes every image its own, and pictures of the result."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import write_atomically
from scheduler import DDIMScheduler, DDPMScheduler


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), on int64 taken as 64 bits."""

    def xor_shift(x: Tensor, bits: int) -> Tensor:  # >> is arithmetic on int64: mask the sign away
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))

    x = xor_shift(x, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = xor_shift(x, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return xor_shift(x, 31)


def image_noise(seed: int, images: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """N(0, I) noise that depends on (seed, image number, draw, pixel) and nothing else.

    A counter-based generator: the splitmix64 hash of the four numbers, then Box & Muller 1958. So
    image i is the same in any batch, on any number of processes, and a whole batch costs a few
    elementwise operations on its device.

    Args:
        seed: any 64-bit integer.
        images: (B,) int64 image numbers; the noise is drawn on their device.
        draw: which draw of this image it is: 0 is x_T, k the noise of the k-th reverse step.
        shape: of one image.

    Returns:
        (B, *shape) float32.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64: 2^64 over the golden ratio
    n = math.prod(shape)
    pairs = torch.arange(1, (n + 1) // 2 + 1, device=images.device)
    key = _mix(torch.full_like(images, seed))
    for number in (images, torch.full_like(images, draw)):
        key = _mix(key + number * golden)
    bits = _mix(key[:, None] + pairs * golden)
    u1 = ((bits >> 32 & 0xFFFFFFFF).float() + 0.5) * 2**-32  # in (0, 1]
    u2 = (bits & 0xFFFFFFFF).float() * 2**-32
    radius, angle = (-2 * u1.log()).sqrt_(), 2 * math.pi * u2
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.view(len(images), -1)[:, :n].view(len(images), *shape)


@torch.inference_mode()
def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    images: Tensor,
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    eta: float = 0.0,
    x_T: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run the reverse process from x_T ~ N(0, I) over `scheduler.timesteps`.

    Args:
        model: (x_t (B, *shape), t (1,)) -> what the scheduler's prediction_type says.
        scheduler: a DDIMScheduler, or a DDPMScheduler for the ancestral sampler (eta is not used).
        images: (B,) int64 numbers of the images to make, on the device to make them on. Image i
            depends on the model, the scheduler, eta, seed and i only.
        shape: (C, H, W).
        x_T: (B, *shape), to start from instead of noise drawn for (seed, image).
        callback: called as callback(t, x_t, pred_original_sample) at every step.

    Returns:
        (B, *shape) float32 in about [-1, 1].
    """
    n = len(images)
    x = image_noise(seed, images, 0, shape) if x_T is None else x_T
    if n == 1:  # a lone image would go through other kernels, which round differently
        images, x = images.repeat(2), x.expand(2, *shape)
    steps = scheduler.timesteps.tolist()
    ddim = isinstance(scheduler, DDIMScheduler)
    noisy = eta > 0 if ddim else True
    for k, t in enumerate(steps, start=1):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            output = model(x, torch.full((1,), t, device=x.device))
        last = k == len(steps)
        noise = image_noise(seed, images, k, shape) if noisy and not last else None
        kwargs = {"variance_noise": noise} | ({"eta": eta} if ddim else {})
        prev_sample, pred_original_sample = scheduler.step(output, t, x, **kwargs)
        if callback is not None:
            callback(t, x[:n], pred_original_sample[:n])
        x = prev_sample
    return x[:n]


def make_grid(images: Tensor, nrow: int, pad: int = 2) -> Tensor:
    """Tile (N, C, H, W) uint8 images, nrow to a row, into one (C, H', W') image, black between."""
    N, C, H, W = images.shape
    ncol = -(-N // nrow)
    cells = images.new_zeros(nrow * ncol, C, H + pad, W + pad)
    cells[:N, :, :H, :W] = images
    grid = cells.view(ncol, nrow, C, H + pad, W + pad).permute(2, 0, 3, 1, 4)
    return torch.nn.functional.pad(
        grid.reshape(C, ncol * (H + pad), nrow * (W + pad)), (pad, 0, pad, 0)
    )


def to_pil(image: Tensor, scale: int = 1):
    """A (1 or 3, H, W) uint8 tensor as a PIL image, every pixel scaled to scale x scale."""
    from PIL import Image

    pixels = image.cpu().permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_grid(path: str | Path, images: Tensor, nrow: int, scale: int = 2) -> None:
    """Write (N, C, H, W) uint8 images as one PNG.

    Raises:
        UserError: the file can't be written.
    """
    buffer = io.BytesIO()
    to_pil(make_grid(images, nrow), scale).save(buffer, format="PNG")
    write_atomically(path, buffer.getbuffer())
