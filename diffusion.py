"""The method on one page: how a diffusion model is trained, and how it samples.

`training_loss` is Algorithm 1 of DDPM (Ho et al. 2020, arXiv:2006.11239) and `sample` is its
Algorithm 2. The numbers in the comments are the lines of those algorithms. The paper's network
predicts eps. Here it predicts eps, v or x_0: `scheduler.prediction_type` says which.

The loss differs from the paper's in three points. The first two let a short training see more of
what is hard to learn (see training/recipe.py). The third makes the gradient less noisy:

- t is drawn from any density, not only uniformly.
- The squared error of each image may have a weight that depends on t.
- The draws are stratified: the density is cut into n equally probable parts, and each of the n
  images of a batch has its t from another part.

Sampling differs from the paper in these points:

- Timesteps are 0-based: the paper's t = T, ..., 1 is t = T-1, ..., 0 here.
- It may visit any subset of the timesteps, with DDIM's eta (see scheduler.py).
- The predicted x_0 is clipped to the range of the data (see scheduler.py).
- The noise of an image depends only on the seed and its index (see lab/noise.py), so an image does
  not depend on the rest of its batch.
- A lone image is computed twice, because a batch of one is rounded differently.
- On a CUDA GPU the network runs in bfloat16.
- `guided` wraps a network with labels: it samples the digits that were asked for.

A model is any function (x_t (B, C, H, W), t (B,) or (1,)) -> (B, C, H, W).
"""

from collections.abc import Callable
from functools import partial

from lab.device import autocast
from lab.noise import image_noise

import torch
from torch import Tensor

from scheduler import DDPMScheduler
from unet import UNet

Model = Callable[[Tensor, Tensor], Tensor]

# ------------------------------------------------------------------------ Algorithm 1: training


def training_loss(
    model: Model,
    scheduler: DDPMScheduler,
    x0: Tensor,
    cdf: Tensor,
    loss_weights: Tensor,
    generator: torch.Generator,
    share: range | None = None,
) -> Tensor:
    """Return the loss of one training step: Algorithm 1 of DDPM, for any prediction type.

    Args:
        x0: (B, C, H, W) clean images in the range of the model, drawn from the data (line 2).
        cdf: (T,) cumulative distribution of the timesteps, float32.
        loss_weights: (T,) weights of the squared error, float32.
        generator: draws t and eps for the whole batch.
        share: the images of the batch that this process computes (default: all). Every process
            draws t and eps for the whole batch, so any number of processes takes the same step.

    Returns:
        A scalar over `share`: DDPM eq. 14, with a weight per timestep.
    """
    t = draw_timesteps(cdf, len(x0), generator)  # 3: t ~ p(t)
    eps = torch.randn(x0.shape, generator=generator, device=generator.device)  # 4: eps ~ N(0, I)
    if share is not None:
        x0, t, eps = (tensor[share.start : share.stop] for tensor in (x0, t, eps))

    x_t = scheduler.add_noise(x0, eps, t)  # sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target = prediction_target(scheduler, x0, eps, t)
    squared_error = (predict(model, x_t, t) - target).square().flatten(1).mean(1)
    return (loss_weights[t] * squared_error).mean()  # 5: its gradient is the caller's


def prediction_target(scheduler: DDPMScheduler, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return what the network should predict at x_t: eps, v or x_0, (B, C, H, W)."""
    if scheduler.prediction_type == "epsilon":
        return eps
    if scheduler.prediction_type == "v_prediction":
        return scheduler.get_velocity(x0, eps, t)
    return x0


def draw_timesteps(cdf: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n timesteps, (n,) int64, ascending: one from each of n equally probable parts.

    Args:
        cdf: (T,) cumulative distribution of the timesteps.
    """
    u = torch.arange(n, device=cdf.device) + torch.rand(n, generator=generator, device=cdf.device)
    return torch.searchsorted(cdf, (u / n).to(cdf.dtype)).clamp_(max=len(cdf) - 1)


# ------------------------------------------------------------------------ Algorithm 2: sampling


@torch.inference_mode()
def sample(
    model: Model,
    scheduler: DDPMScheduler,
    indices: Tensor,
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    x_T: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    **step_arguments: float,
) -> Tensor:
    """Return samples of the model: Algorithm 2 of DDPM over `scheduler.timesteps`.

    Args:
        scheduler: its class is the sampler. `DDPMScheduler` has the paper's step.
        indices: (B,) int64, which images to make, on the device to make them on. Image i depends
            only on the model, the scheduler, the step's arguments, the seed and i.
        shape: (C, H, W).
        x_T: (B, C, H, W), the start. Default: noise drawn from (seed, index).
        callback: is called as callback(t, x_t, pred_original_sample) at every step.
        step_arguments: what `scheduler.step` takes besides, such as eta.

    Returns:
        (B, C, H, W) float32, in the range of the model; `lab.data.to_uint8` makes pixels of them.
    """
    x_t = image_noise(seed, indices, 0, shape) if x_T is None else x_T  # 1: x_T ~ N(0, I)
    n = len(indices)
    if n == 1:  # a lone image would be computed by other kernels, which round differently
        indices, x_t = indices.repeat(2), x_t.expand(2, *shape)

    for k, t in enumerate(scheduler.timesteps.tolist(), start=1):  # 2: for t = T, ..., 1
        output = predict(model, x_t, torch.full((1,), t, device=x_t.device))

        z = partial(image_noise, seed, indices, k, shape)  # 3: z ~ N(0, I), drawn if it is needed
        x_prev, x0 = scheduler.step(output, t, x_t, variance_noise=z, **step_arguments)  # 4
        if callback is not None:
            callback(t, x_t[:n], x0[:n])
        x_t = x_prev
    return x_t[:n]  # 6: x_0


def guided(model: UNet, labels: Tensor, scale: float = 1.0) -> Model:
    """Return the model for images of these labels, with classifier-free guidance.

    The output is uncond + scale (cond - uncond), where cond is the output for the labels and uncond
    that for the null label (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with scale = 1 + w, as in
    diffusers). It is a model as any other: no sampler knows of it. The same formula is right for
    eps, v and x_0: for a given x_t each is an affine function of each other, and the weights of
    cond and uncond add up to 1.

    Args:
        model: a UNet with classes, called as (x_t, t, labels).
        labels: (B,) int64, on the device of the images; (1,) stands for any number of images.
        scale: 1 is no guidance (one pass). Otherwise both passes go in one batch.
    """

    def guided_model(x_t: Tensor, t: Tensor) -> Tensor:
        wanted = labels.expand(len(x_t))
        if scale == 1:
            return model(x_t, t, wanted)
        null = torch.full_like(wanted, model.config["num_classes"])
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t)).repeat(2)
        both = model(x_t.repeat(2, 1, 1, 1), t, torch.cat([wanted, null]))
        cond, uncond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    return guided_model


def predict(model: Model, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the network's output in float32. On a CUDA GPU the network runs in bfloat16."""
    with autocast(x_t.device):
        return model(x_t, t).float()
