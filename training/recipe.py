"""The recipe of a training: all that decides the weights, and which timesteps count how much."""

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = ("epochs", "steps", "minutes")  # the arguments of a recipe that set its length
LABEL_DROPOUT = 0.1  # share of the training images that get the null label


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of a training. Its defaults are those of train.py."""

    pred: str = "v"
    epochs: int | None = None  # one of LENGTH is set
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    lr: float = 3e-3
    muon_lr: float = 0.02
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.999
    density: str = "lognormal"
    low_noise: float = 0.1
    max_weight: float = 5.0
    channels: int = 32
    schedule: str = "cosine"
    zero_snr: bool = False
    clip_sample_range: float = 1.25
    labels: bool = False
    timesteps: int = 1000
    dataset: str = "mnist"
    seed: int = 0


def timestep_cdf(alphas_cumprod: Tensor, density: str, low_noise: float = 0.0) -> Tensor:
    """Return the (T,) cumulative distribution that training draws its timesteps from.

    "uniform" is DDPM's. "lognormal" draws log-SNR_t = log(abar_t / (1 - abar_t)) from
    N(-0.5, 1.5^2): most images then have the noise levels at which the shape of a digit is decided.
    There the network has most to learn (Karras et al. 2022, section 5; Kingma & Gao 2023). A share
    `low_noise` of the images has its log-SNR from N(5, 2^2) instead. Without it the nearly clean
    images are hardly trained, and they cost most bits of the variational bound. The numbers were
    found by measurement, see benchmarks/recipe.md.
    """
    if density == "uniform":
        return torch.arange(1, len(alphas_cumprod) + 1, dtype=torch.float64) / len(alphas_cumprod)
    log_snr = torch.logit(alphas_cumprod)  # it falls as t grows
    cdf = (1 - low_noise) * torch.special.ndtr(-(log_snr + 0.5) / 1.5)
    cdf += low_noise * torch.special.ndtr(-(log_snr - 5) / 2)
    return cdf / cdf[-1]


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, max_weight: float) -> Tensor:
    """Return the (T,) weights of the squared error: min(1 / abar_t, max_weight) for eps, else 1.

    The same error of x_0 is multiplied by sqrt(abar_t) when it is measured in eps instead of in v.
    So the unweighted loss of eps hardly counts the nearly pure noise in which a digit begins
    (Salimans & Ho 2022, section 4). The bound was found by measurement, see benchmarks/recipe.md.
    """
    if prediction_type == "epsilon":
        return (1 / alphas_cumprod).clamp(max=max_weight)
    return torch.ones_like(alphas_cumprod)
