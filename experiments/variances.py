"""Two further variances of DDPM's noise, as samplers of the grid: the large and the optimal one.

Let s be the timestep after t among those in use, and beta = 1 - abar_t / abar_s. The step of DDIM
is x_s = c x_0 + k x_t + sigma z, where x_0 is what the network predicts, and (DDIM eq. 12)

    c = sqrt(abar_s) - sqrt(1 - abar_s - eta beta~_t) sqrt(abar_t / (1 - abar_t)),
    sigma^2 = eta beta~_t,    beta~_t = beta (1 - abar_s) / (1 - abar_t)

Both samplers have the mean of eta = 1, which is DDPM's: c = sqrt(abar_s) beta / (1 - abar_t). They
differ from it in sigma. The last step adds no noise, as always.

"ddpm-large": sigma^2 = beta. It is sigma-hat of the DDIM paper (section 5, appendix D.3). Only the
noise is larger: c and k stay those of eta = 1.

"ddpm-optimal": the variance of Analytic-DPM (Bao et al. 2022, arXiv:2201.06503, theorem 1; section
4 for a subset of the timesteps). Given x_0 and x_t, the true x_s is c x_0 + k x_t + sqrt(beta~_t) z
(DDPM eq. 7). So it misses the mean of the step by c (x_0 - x^_0) + sqrt(beta~_t) z, where x^_0 is
the prediction. The best variance is the mean square of this over d pixels: it minimises the KL
divergence of the step from the true one.

    sigma*_t^2 = beta~_t + c^2 V_t,    V_t = E|x_0 - x^_0|^2 / d

The same holds for any eta, with its c and with eta beta~_t in place of beta~_t. V_t is measured on
training images. For a perfect network it is the mean variance of x_0 given x_t, and equals
(1 - abar_t) / abar_t (1 - E|eps^|^2 / d). Bao et al. estimate that. We do not, because it divides
by abar_t. Moreover, V_t itself is also right for a prediction that is clipped or imperfect (as in
Bao et al. 2022b, arXiv:2206.07309).

The best linear prediction has V_t <= 1 - abar_t if the pixels have a variance of at most 1. A
prediction that is at least as good therefore gives beta~_t <= sigma*_t^2 <= beta: DDPM section 3.2.
"""

from collections.abc import Callable, Mapping

from lab.data import to_model_range
from lab.noise import image_noise

import torch
from torch import Tensor

from diffusion import Model, predict
from scheduler import SAMPLERS as BASIC_SAMPLERS
from scheduler import DDPMScheduler, Noise, SchedulerOutput

IMAGES = 500  # at most this many training images for an estimate


def large_variance(**config: object) -> DDPMScheduler:
    """Return DDPM's sampler with the variance beta, whatever the config says."""
    return DDPMScheduler(**config | {"variance_type": "fixed_large"})


class OptimalVariance(DDPMScheduler):
    """DDPM's sampler with the optimal variance sigma*_t^2.

    Args: those of `DDPMScheduler`, and
        x0_errors: V_t for every timestep in use but the last, as measured by `x0_error`.
    """

    def __init__(self, *args, x0_errors: Mapping[int, float], **kwargs):
        super().__init__(*args, **kwargs)
        self.config["x0_errors"] = x0_errors

    @staticmethod
    @torch.inference_mode()
    def x0_error(model: Model, scheduler: DDPMScheduler, images: Tensor, t: int) -> float:
        """Return V_t: the mean squared error of the predicted (and clipped) x_0 at x_t.

        Args:
            scheduler: that of the model, of any class.
            images: (N, C, H, W) uint8, on the device of the model. The first IMAGES are used.
        """
        x0 = to_model_range(images[:IMAGES], scheduler.config["clip_sample_range"])
        noise = image_noise(0, torch.arange(len(x0), device=x0.device), 0, x0.shape[1:])
        x_t = scheduler.add_noise(x0, noise, t)
        output = predict(model, x_t, torch.full((1,), t, device=x_t.device))
        return (scheduler.get_original_sample(output, x_t, t) - x0).square().mean().item()

    def variances(self, timestep: int) -> tuple[float, float, float]:
        """Return beta~_t, sigma*_t^2 and beta of a step that is not the last."""
        abar_t, abar_prev = self._abar_pair(timestep)
        beta = 1 - abar_t / abar_prev
        small = beta * (1 - abar_prev) / (1 - abar_t)
        c_squared = abar_prev * (beta / (1 - abar_t)) ** 2
        return small, small + c_squared * self.config["x0_errors"][int(timestep)], beta

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | None = None,
        variance_noise: Noise | None = None,
    ) -> SchedulerOutput:
        """Sample N(mu~_t, sigma*_t^2 I). Arguments and errors are those of `DDPMScheduler.step`."""
        self._check_step(model_output, sample, generator, variance_noise)
        is_last = self.previous_timestep(timestep) < 0
        variance = 0.0 if is_last else self.variances(timestep)[1]
        none = torch.zeros_like(sample)
        mean, x0 = super().step(model_output, timestep, sample, variance_noise=none)
        return self._add_variance(mean, x0, variance, sample, generator, variance_noise)


VARIANTS = {"ddpm-large": large_variance, "ddpm-optimal": OptimalVariance}
SAMPLERS: dict[str, Callable[..., DDPMScheduler]] = BASIC_SAMPLERS | VARIANTS
