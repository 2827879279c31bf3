"""lab/noise.py: that the noise is normal, and what it depends on."""

from lab.noise import image_noise

import pytest
import torch
from scipy import stats


def test_image_noise_is_standard_normal():
    """Moments and a Kolmogorov-Smirnov test on 784,000 values; the seed is fixed."""
    z = image_noise(7, torch.arange(1000), 0, (1, 28, 28)).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("what", ["seed", "image", "draw", "pixel"])
def test_image_noise_is_independent_across(what):
    """Neighbouring seeds, images, draws and pixels are uncorrelated, in value and in square."""
    images = torch.arange(2000)
    a = image_noise(3, images, 5, (1, 10, 10))
    b = {
        "seed": lambda: image_noise(4, images, 5, (1, 10, 10)),
        "image": lambda: image_noise(3, images + 1, 5, (1, 10, 10)),
        "draw": lambda: image_noise(3, images, 6, (1, 10, 10)),
        "pixel": lambda: a.flatten(1).roll(1, dims=1).view_as(a),
    }[what]()
    for f in (lambda x: x, lambda x: x**2 - 1):
        x, y = f(a).flatten().double(), f(b).flatten().double()
        assert abs(stats.pearsonr(x.numpy(), y.numpy()).statistic) < 4 / len(x) ** 0.5


def test_image_noise_depends_on_its_four_numbers_only():
    whole = image_noise(1, torch.arange(10), 2, (3, 5, 5))
    assert torch.equal(whole[4:7], image_noise(1, torch.arange(4, 7), 2, (3, 5, 5)))
    assert whole.shape == (10, 3, 5, 5)
