"""Image grids and PNG files."""

import io
import os
from pathlib import Path

from lab.files import write_atomically

import torch
from torch import Tensor


def make_grid(images: Tensor, nrow: int, pad: int = 2) -> Tensor:
    """Tile (N, C, H, W) uint8 images, `nrow` per row, into one (C, H', W') image on black."""
    N, C, H, W = images.shape
    rows = -(-N // nrow)
    cells = images.new_zeros(nrow * rows, C, H + pad, W + pad)
    cells[:N, :, :H, :W] = images
    grid = cells.view(rows, nrow, C, H + pad, W + pad).permute(2, 0, 3, 1, 4)
    return torch.nn.functional.pad(
        grid.reshape(C, rows * (H + pad), nrow * (W + pad)), (pad, 0, pad, 0)
    )


def to_pil(image: Tensor, scale: int = 1):
    """Return a (1 or 3, H, W) uint8 tensor as a PIL image; each pixel becomes scale x scale."""
    from PIL import Image

    pixels = image.cpu().permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_png(path: str | Path, picture) -> None:
    """Write a PIL image as a PNG file.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getbuffer())


def save_grid(path: str | Path, images: Tensor, nrow: int, scale: int = 2) -> None:
    """Write (N, C, H, W) uint8 images as one PNG grid.

    Raises:
        UserError: the file cannot be written.
    """
    save_png(path, to_pil(make_grid(images, nrow), scale))


def load_matplotlib():
    """Return matplotlib, for pictures without a screen, whatever MPLBACKEND says."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib


def new_figure(rows: int, columns: int, width: float, height: float):
    """Return a matplotlib figure of width x height inches and its (rows, columns) axes."""
    load_matplotlib()
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure as a PNG file and close it.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, buffer.getbuffer())
