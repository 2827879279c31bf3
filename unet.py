"""A small time-conditioned UNet: eps, v or x_0 from (x_t, t).

    stem      pixel-unshuffle by `patch_size`, then a 3x3 convolution: 28x28x1 becomes 14x14xC
    down      per level: `num_blocks` residual blocks, whose outputs are kept as skips; then a
              strided convolution to the next level: half the size, channel_mults[i] * C channels
    middle    residual block, self-attention, residual block at the lowest size (7x7)
    up        per level: nearest-neighbour upsampling, then `num_blocks` residual blocks; each one
              first concatenates a skip
    head      GroupNorm, SiLU, a zero-initialised 3x3 convolution, pixel-shuffle back to 28x28x1

On a CPU an image costs as much time as its FLOPs. A classic UNet spends most of them at full
resolution, where digits have little detail. So the stem halves the size before the first block.
Parameters and FLOPs of a forward pass per 28x28x1 image (a multiply-add counts as two):

    channels      32      48      64      96      32 with patch_size 1, channel_mults (1, 2, 4)
    parameters  0.83M   1.87M   3.32M   7.45M   3.15M
    MFLOP          99     222     394     883     566

This module does not know the noise schedule: t is only a number to embed.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Return sine and cosine of t at dim/2 frequencies, (B,) -> (B, dim) (Vaswani et al. 2017)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to 0, so that a residual branch starts as the zero function."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def parts(channels: int, width: int) -> int:
    """Return a number of groups that divides the channels: channels // width, or less."""
    return math.gcd(channels, max(channels // width, 1))


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with groups of 8 channels, or of others where 8 does not divide them."""
    return nn.GroupNorm(parts(channels, 8), channels)


class ResBlock(nn.Module):
    """GroupNorm, SiLU and convolution, twice. The time scales and shifts the second GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embed_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Multi-head attention over all positions of a feature map, about 32 channels per head."""

    def __init__(self, channels: int):
        super().__init__()
        self.num_heads = parts(channels, 32)
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view in channels_last
        qkv = self.qkv(tokens).view(B, H * W, 3, self.num_heads, C // self.num_heads)
        h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """The network drawn in the module's docstring. `config` holds its arguments, JSON-able.

    Args:
        in_channels: channels of the image and of the prediction.
        channels: C, the width of the first level, an even number.
        channel_mults: the width of each level in units of C.
        num_blocks: residual blocks per level on the way down, and as many on the way up.
        patch_size: factor of the stem's pixel-unshuffle. 1 is the classic UNet at full resolution.
        attention: whether there is self-attention between the two middle blocks.
        num_classes: 0 for an unconditional model. Otherwise the labels are 0 .. num_classes-1, and
            num_classes is the null label for classifier-free guidance.

    Raises:
        ValueError: an argument is not a positive integer (num_classes may be 0), `channels` is odd,
            or there is no level.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 32,
        channel_mults: Sequence[int] = (1, 2),
        num_blocks: int = 2,
        patch_size: int = 2,
        attention: bool = True,
        num_classes: int = 0,
    ):
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "channels": channels,
            "channel_mults": list(channel_mults),
            "num_blocks": num_blocks,
            "patch_size": patch_size,
            "attention": attention,
            "num_classes": num_classes,
        }
        sizes = [in_channels, channels, *channel_mults, num_blocks, patch_size, num_classes + 1]
        if not channel_mults or channels % 2 or any(type(n) is not int or n < 1 for n in sizes):
            raise ValueError(
                "UNet takes positive integers, an even number of channels and at least one level, "
                f"not {self.config}"
            )
        widths = [channels * m for m in channel_mults]
        embed_dim = 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim) if num_classes else None
        self.stem = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(
                nn.ModuleList(ResBlock(width, width, embed_dim) for _ in range(num_blocks))
            )
            if i + 1 < len(widths):
                self.downsample.append(nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1))

        self.middle1 = ResBlock(widths[-1], widths[-1], embed_dim)
        self.attention = SelfAttention(widths[-1]) if attention else nn.Identity()
        self.middle2 = ResBlock(widths[-1], widths[-1], embed_dim)

        self.up = nn.ModuleList()
        below = widths[-1]  # channels that come from the level below
        for width in reversed(widths):
            inputs = [below + width] + [2 * width] * (num_blocks - 1)
            self.up.append(nn.ModuleList(ResBlock(n, width, embed_dim) for n in inputs))
            below = width

        self.norm_out = group_norm(widths[0])
        self.head = zero_init(nn.Conv2d(widths[0], in_channels * patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Predict eps, v or x_0, whichever the network was trained for.

        Args:
            x: x_t, (B, in_channels, H, W). H and W are multiples of patch_size.
            timesteps: (B,), or one for the whole batch: an int, or a tensor of shape () or (1,).
            labels: (B,) int64 classes. None is the null label. Only with num_classes > 0.

        Returns:
            (B, in_channels, H, W).

        Raises:
            ValueError: H or W is not a multiple of patch_size, or an unconditional model is given
                labels.
        """
        p = self.config["patch_size"]
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(
                f"image size {tuple(x.shape[-2:])} is not a multiple of patch_size {p}"
            )
        t = torch.as_tensor(timesteps, device=x.device).reshape(-1)
        embedding = self.time_embed(timestep_embedding(t, self.config["channels"]))
        if self.label_embed is not None:
            null = t.new_full((1,), self.config["num_classes"], dtype=torch.int64)
            embedding = embedding + self.label_embed(null if labels is None else labels)
        elif labels is not None:
            raise ValueError("labels were given to a model without classes (num_classes = 0)")
        embedding = F.silu(embedding)

        h = self.stem(F.pixel_unshuffle(x, p).contiguous(memory_format=torch.channels_last))
        skips = []
        for i, blocks in enumerate(self.down):
            if i:
                h = self.downsample[i - 1](h)
            for block in blocks:
                h = block(h, embedding)
                skips.append(h)
        h = self.middle2(self.attention(self.middle1(h, embedding)), embedding)
        for blocks in self.up:
            for block in blocks:
                skip = skips.pop()
                if h.shape[-2:] != skip.shape[-2:]:
                    h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
                h = block(torch.cat([h, skip], dim=1), embedding)
        h = self.head(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, p)
