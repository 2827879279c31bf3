"""The exact denoiser: the best prediction of x_0, without a network, and mixtures with a network.

The networks are trained to predict the mean E[x_0 | x_t] over the training images x_i. For these
images it is known (Bayes' rule):

    E[x_0 | x_t] = sum_i w_i x_i,    w = softmax_i(-|x_t - sqrt(abar_t) x_i|^2 / (2 (1 - abar_t)))

The exact denoiser computes it. Its samples have no error of a network, only the error of the steps.
It knows nothing but the training images, so with enough steps its samples are training images.
"""

import hashlib
import json

from lab.data import to_model_range

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Model
from experiments.grid import EXACT, Subject
from scheduler import DDPMScheduler

# Smaller weights count as 0: 60,000 of them add up to float32's rounding. So few images are left at
# low noise, and no subnormal numbers, which slow an Intel CPU down a hundred times.
SMALLEST_WEIGHT = 1e-12
# Images at a time: all of them share one reading of the training images, 188 MB, so more images
# take less time each. The weights of so many for 60,000 training images take 60 MB.
BATCH = 250


class ExactDenoiser:
    """The best prediction of x_0 for the given data, as eps, v or x_0: a model as any other.

    The square of the formula above is multiplied out. Then |x_t|^2 is the same for all images and
    cancels, |x_i|^2 is computed once, and x_t . x_i is one matrix product. float32 is enough: its
    rounding changes the logits most at low noise, where a single image has all the weight.

    Args:
        images: (N, C, H, W) uint8, on the device to compute on. As floats they take four times as
            much memory: 188 MB for MNIST.
        scheduler: gives abar, the prediction type and clip_sample_range, the range of the data.
    """

    def __init__(self, images: Tensor, scheduler: DDPMScheduler):
        bound = scheduler.config.clip_sample_range
        self.data = torch.empty(images.shape, device=images.device)
        for x0, pixels in zip(self.data.split(1000), images.split(1000), strict=True):
            x0.copy_(to_model_range(pixels, bound))
        self.half_squares = self.data.flatten(1).norm(dim=1).square() / 2
        abar = scheduler.alphas_cumprod  # float64, which Apple's GPUs do not have
        tables = abar.sqrt(), (1 - abar).sqrt(), abar.sqrt() / (1 - abar)
        tables = (table.float().to(images.device) for table in tables)
        self.sqrt_abar, self.sqrt_one_minus_abar, self.logit_scale = tables
        self.prediction_type = scheduler.prediction_type
        # An image as the kernel of a convolution: up to twice as fast as a matrix product on a CPU.
        # On a GPU it would be rounded to TF32.
        self.by_convolution = images.device.type == "cpu"

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict eps, v or x_0 from x_t (B, C, H, W) and t (B,) or (1,)."""
        with torch.autocast(x_t.device.type, enabled=False):  # bfloat16 would round the logits
            pairs = zip(x_t.split(BATCH), t.expand(len(x_t)).split(BATCH), strict=True)
            return torch.cat([self._predict(x.float(), t) for x, t in pairs])

    def _predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        sqrt_abar = self.sqrt_abar[t][:, None]
        logits = self._inner_products(x_t).addcmul_(sqrt_abar, self.half_squares, value=-1)
        weights = logits.mul_(self.logit_scale[t][:, None]).softmax(1)
        x0 = self._weighted_sum(F.threshold_(weights, SMALLEST_WEIGHT, 0.0))

        a, s = (c[t].view(-1, 1, 1, 1) for c in (self.sqrt_abar, self.sqrt_one_minus_abar))
        eps = (x_t - a * x0) / s  # the noise that leads from x_0 to x_t
        if self.prediction_type == "epsilon":
            return eps
        return a * eps - s * x0 if self.prediction_type == "v_prediction" else x0

    def _inner_products(self, x: Tensor) -> Tensor:
        """Return the inner product of each image with each image of the data, (B, N)."""
        if self.by_convolution:
            return F.conv2d(x, self.data).flatten(1)
        return x.flatten(1) @ self.data.flatten(1).T

    def _weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the sums of the data with these weights (B, N), as images (B, C, H, W)."""
        if self.by_convolution:
            used, data = weights.any(0).nonzero().squeeze(1), self.data
            if 2 * len(used) < len(data):  # at low noise few images have weight
                weights, data = weights[:, used], data[used]
            return F.conv_transpose2d(weights[:, :, None, None], data)
        return (weights @ self.data.flatten(1)).view(-1, *self.data.shape[1:])


def mixture(
    inside: Model, outside: Model, scheduler: DDPMScheduler, low: float, high: float
) -> Model:
    """Return the model that is `inside` where low < log-SNR <= high, and `outside` elsewhere.

    Both must predict the same: eps, v or x_0.
    """
    in_range = timesteps_in_range(scheduler, low, high)

    def mixed(x_t: Tensor, t: Tensor) -> Tensor:
        here = in_range[t.cpu()]
        if here.all():
            return inside(x_t, t)
        if not here.any():
            return outside(x_t, t)
        here = here.view(-1, 1, 1, 1).to(x_t.device)
        return torch.where(here, inside(x_t, t), outside(x_t, t))

    return mixed


def timesteps_in_range(scheduler: DDPMScheduler, low: float, high: float) -> Tensor:
    """Return for each timestep whether low < log(abar / (1 - abar)) <= high, (T,) bool."""
    log_snr = torch.logit(scheduler.alphas_cumprod, eps=1e-30)  # finite also in pure noise
    return (low < log_snr) & (log_snr <= high)


# ---------------------------------------------------------------------- as models under study


def exact_subject(images: Tensor, subject: Subject) -> Subject:
    """Return the exact denoiser of images (N, 1, 28, 28) uint8, with the scheduler of a subject.

    Its sha256 is that of the images and of the scheduler's config. The prediction type is left out,
    because it makes no difference to x_0.
    """
    scheduler = subject.scheduler()
    facts = json.dumps(scheduler.config | {"prediction_type": None}, sort_keys=True)
    sha256 = hashlib.sha256(images.cpu().numpy().tobytes() + facts.encode()).hexdigest()
    contents = {"scheduler": subject.contents["scheduler"]}
    model = ExactDenoiser(images, scheduler)
    code = ("experiments.denoiser:ExactDenoiser",)
    return Subject(EXACT, "", sha256, model, contents, code, batch_size=BATCH)


def mixed_subject(outside: Subject, inside: Subject, low: float, high: float) -> Subject:
    """Return `outside`, with `inside` in its place where low < log-SNR <= high.

    Both have the same scheduler.
    """
    parts = (outside.sha256, inside.sha256, low, high)
    return Subject(
        mixed_label(outside.label, inside.label, low, high),
        "",
        hashlib.sha256(repr(parts).encode()).hexdigest(),
        mixture(inside.model, outside.model, outside.scheduler(), low, high),
        outside.contents,
        ("experiments.denoiser:mixture", *outside.code, *inside.code),
        batch_size=max(outside.batch_size, inside.batch_size),
    )


def mixed_label(outside: str, inside: str, low: float, high: float) -> str:
    """Return the label of a mixture."""
    return f"{outside}, {inside} at log-SNR {low:g} to {high:g}"
