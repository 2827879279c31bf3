"""lab/pictures.py: grids and figures."""

import os
import subprocess
import sys

from lab.pictures import make_grid

import torch
from helpers import ROOT


def test_make_grid_puts_every_image_in_its_place():
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 3, 4)
    grid = make_grid(images, nrow=2, pad=1)
    assert grid.shape == (1, 3 * 4 + 1, 2 * 5 + 1)
    for i in range(5):
        row, column = divmod(i, 2)
        cell = grid[0, row * 4 + 1 : row * 4 + 4, column * 5 + 1 : column * 5 + 5]
        assert (cell == i + 1).all()
    assert grid.sum() == images.sum()


def test_figures_are_drawn_whatever_the_environment_says():
    code = "from lab.pictures import new_figure; new_figure(1, 1, 1, 1)"
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
