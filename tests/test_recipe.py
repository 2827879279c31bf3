"""training/recipe.py: densities of the timesteps and weights of the loss."""

import math

import pytest
import torch

from diffusion import draw_timesteps, training_loss
from scheduler import DDPMScheduler
from training.recipe import loss_weights, timestep_cdf


def test_loss_weights_make_the_error_of_eps_that_of_v():
    """Without a bound, the loss of any answer as eps is the mean square of its error in v."""
    scheduler = DDPMScheduler(beta_schedule="cosine")
    abar = scheduler.alphas_cumprod
    x0, answer = torch.randn(2, 4, 1, 6, 6)
    weights = loss_weights(abar, "epsilon", math.inf)
    cdf, generator = timestep_cdf(abar, "uniform"), torch.Generator().manual_seed(0)
    t = draw_timesteps(cdf, 4, generator)
    eps = torch.randn(x0.shape, generator=generator)
    generator.manual_seed(0)
    loss = training_loss(lambda x, t: answer, scheduler, x0, cdf, weights, generator)
    a = abar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    predicted_x0 = (x_t - (1 - a).sqrt() * answer) / a.sqrt()
    answer_v = a.sqrt() * answer - (1 - a).sqrt() * predicted_x0
    error = answer_v - (a.sqrt() * eps - (1 - a).sqrt() * x0)
    torch.testing.assert_close(loss.double(), error.square().mean(), rtol=1e-5, atol=0)
    bounded = loss_weights(abar, "epsilon", 5.0)
    assert bounded.max() == 5
    assert torch.equal(bounded[abar > 0.2], weights[abar > 0.2])
    for other in ("v_prediction", "sample"):
        assert (loss_weights(abar, other, 5.0) == 1).all()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_lognormal_density_of_the_timesteps(zero_snr):
    """The log-SNR of the drawn timesteps is normal with mean -0.5 and standard deviation 1.5."""
    abar = DDPMScheduler(
        beta_schedule="cosine", prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr
    ).alphas_cumprod
    cdf = timestep_cdf(abar, "lognormal")
    assert cdf[-1] == 1
    assert (cdf.diff() >= 0).all()
    t = draw_timesteps(cdf.float(), 100_000, torch.Generator().manual_seed(0))
    log_snr = torch.logit(abar[t]).clamp(-20, 20)
    # The draws are stratified, so the error is that of 1000 discrete timesteps, not of sampling.
    assert abs(log_snr.mean().item() + 0.5) < 0.02
    assert abs(log_snr.std().item() - 1.5) < 0.02
    inside = ((log_snr > -2) & (log_snr < 1)).double().mean().item()
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 0.01


def test_a_share_of_the_images_has_low_noise():
    """The distribution is that of both normal ones together, and their shares are as asked."""
    abar = DDPMScheduler(10_000, beta_schedule="cosine").alphas_cumprod
    t = draw_timesteps(timestep_cdf(abar, "lognormal", 0.25).float(), 100_000, torch.Generator())
    log_snr = torch.logit(abar[t])
    for x in (-2.0, -0.5, 1.0, 3.0, 5.0, 7.0):
        main, low_noise = (
            0.5 * (1 + math.erf((x - m) / s / 2**0.5)) for m, s in ((-0.5, 1.5), (5, 2))
        )
        below = (log_snr < x).double().mean().item()
        assert below == pytest.approx(0.75 * main + 0.25 * low_noise, abs=2e-3)


def test_uniform_density():
    cdf = timestep_cdf(torch.linspace(0.99, 0.01, 8, dtype=torch.float64), "uniform")
    assert cdf.tolist() == [i / 8 for i in range(1, 9)]
