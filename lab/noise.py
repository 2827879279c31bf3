"""Noise for every image, independent of batch size and number of processes."""

import math

import torch
from torch import Tensor


def image_noise(seed: int, indices: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Return N(0, I) noise that depends on (seed, image index, draw, pixel) and on nothing else.

    A counter-based generator: it hashes the four numbers with splitmix64 (Steele et al. 2014) and
    turns the bits into normal numbers (Box & Muller 1958). So image i has the same noise in any
    batch and on any process. A whole batch costs a few elementwise operations on its device.

    Args:
        seed: -2^63 ... 2^63 - 1.
        indices: (B,) int64, the index of each image. The noise is made on their device.
        draw: 0 for x_T, k for the noise of the k-th reverse step.
        shape: the shape of one image.

    Returns:
        (B, *shape) float32.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64: 2^64 over the golden ratio
    n = math.prod(shape)
    pairs = torch.arange(1, (n + 1) // 2 + 1, device=indices.device)
    key = _mix(torch.full_like(indices, seed))
    for number in (indices, torch.full_like(indices, draw)):
        key = _mix(key + number * golden)
    bits = _mix(key[:, None] + pairs * golden)
    u1 = ((bits >> 32 & 0xFFFFFFFF).float() + 0.5) * 2**-32  # in (0, 1]
    u2 = (bits & 0xFFFFFFFF).float() * 2**-32
    radius, angle = (-2 * u1.log()).sqrt_(), 2 * math.pi * u2
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.view(len(indices), -1)[:, :n].view(len(indices), *shape)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64, to int64 values read as 64 unsigned bits."""

    def xor_shift(x: Tensor, bits: int) -> Tensor:  # >> keeps the sign of int64: mask it away
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))

    x = xor_shift(x, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = xor_shift(x, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return xor_shift(x, 31)
