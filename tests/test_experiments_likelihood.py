"""experiments/likelihood.py: the terms of the bound, the inversion, and what is kept of them."""

import math
from dataclasses import replace
from itertools import pairwise, product

from lab.data import to_model_range
from lab.distributed import Process
from lab.noise import image_noise

import pytest
import torch
from helpers import copy_lab_with_edit
from scipy import stats
from torch.distributions import Normal, kl_divergence

from diffusion import sample
from experiments import likelihood
from experiments.common import Settings, Study
from experiments.estimates import Estimate
from experiments.grid import SHAPE, Subject
from experiments.keys import code_key
from experiments.likelihood import Inversion, Likelihood
from scheduler import PREDICTION_TYPES, DDIMScheduler, DDPMScheduler

F64 = torch.float64
CPU = torch.device("cpu")
ALONE = Process(CPU)
M, D = 0.1, 0.25  # mean and deviation of Gaussian data
BITS = 784 * math.log(2)  # nats per image, of one bit per dimension


def scheduler_of(prediction_type="sample", **changes):
    config = {"beta_schedule": "cosine", "num_train_timesteps": 20, "clip_sample": False}
    return DDPMScheduler(**config | {"prediction_type": prediction_type} | changes)


def subject_of(model, label="net", prediction_type="sample", **changes):
    config = {"beta_schedule": "cosine", "num_train_timesteps": 20, "clip_sample": True}
    contents = {"scheduler": config | {"prediction_type": prediction_type} | changes}
    return Subject(label, f"{label}.pt", label.ljust(64, "0"), model, contents)


def abar_at(scheduler, t):
    return 1.0 if t < 0 else scheduler.alphas_cumprod[t].item()


def gaussian_denoiser(scheduler):
    """Return the network E[x_0 | x_t] for data from N(M, D^2), in the scheduler's prediction."""

    def network(x_t, t):
        abar = scheduler.alphas_cumprod[t].to(x_t.dtype).view(-1, 1, 1, 1)
        x0 = M + abar.sqrt() * D**2 / (abar * D**2 + 1 - abar) * (x_t - abar.sqrt() * M)
        eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
        return {"epsilon": eps, "v_prediction": v, "sample": x0}[scheduler.prediction_type]

    return network


# --------------------------------------------------------------------------- Gaussian data: a bound


def test_the_divergence_of_gaussians_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean_q, mean_p = torch.randn(2, 100, generator=generator, dtype=F64)
    var_q, var_p = torch.rand(2, 100, generator=generator, dtype=F64) + 0.01
    wanted = kl_divergence(Normal(mean_q, var_q.sqrt()), Normal(mean_p, var_p.sqrt()))
    actual = likelihood.gaussian_kl(mean_q, var_q, mean_p, var_p)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


# Every term is a square of x_0 and the noise. So these four pairs, which have the moments of the
# Gaussian up to the second, give its exact mean.
PAIRS = torch.tensor(list(product((M - D, M + D), (-1, 1))), dtype=F64)


def gaussian_terms(scheduler):
    """Return the mean of L_T and, for each variance, of every L_t: in nats per pixel."""
    x0, noise = (column.view(-1, 1, 1, 1) for column in PAIRS.T)
    network = gaussian_denoiser(scheduler)
    steps = {"small": [], "large": []}
    for t in range(1, scheduler.num_train_timesteps):
        L_t = likelihood.step_terms(network, scheduler, x0, noise, torch.full((4,), t))
        for name in steps:
            steps[name].append(L_t[name].mean().item())
    return likelihood.prior_term(scheduler, x0).mean().item(), steps


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_terms_of_gaussian_data_are_those_of_the_true_reverse_step(prediction_type, schedule):
    """E KL = (V / s - 1 - log(beta~ / s)) / 2, where V = Var(x_{t-1} | x_t) and s is the variance.

    x_{t-1} and x_t are jointly Gaussian, so V = Var(x_{t-1}) - Cov^2 / Var(x_t).
    """
    config = {"beta_schedule": schedule, "beta_start": 0.01, "beta_end": 0.4}
    scheduler = scheduler_of(prediction_type, **config)
    prior, steps = gaussian_terms(scheduler)
    abar = abar_at(scheduler, 19)
    second_moment = abar * (M**2 + D**2) + 1 - abar
    assert prior == pytest.approx((second_moment - 1 - math.log(1 - abar)) / 2, rel=1e-9)
    for t in range(1, 20):
        a_t, a_s = abar_at(scheduler, t), abar_at(scheduler, t - 1)
        var_t, var_s = (a * D**2 + 1 - a for a in (a_t, a_s))
        V = var_s - a_t / a_s * var_s**2 / var_t
        beta = 1 - a_t / a_s
        tilde = beta * (1 - a_s) / (1 - a_t)
        for name, s in {"small": tilde, "large": beta}.items():
            wanted = (V / s - 1 - math.log(tilde / s)) / 2
            assert steps[name][t - 1] == pytest.approx(wanted, rel=1e-7), (name, t)


def test_many_small_steps_cost_what_the_channel_carries():
    """sum L_t -> (log(1 + D^2 SNR_0) - log(1 + D^2 SNR_T)) / 2, the information of x_t about x_0.

    The sum is above the integral, and the difference falls with the length of the steps.
    """
    excess = []
    for T in (50, 100):
        abar = torch.linspace(8, -8, T, dtype=F64).sigmoid()  # equal steps of log-SNR
        betas = 1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
        scheduler = scheduler_of("v_prediction", num_train_timesteps=T, trained_betas=betas)
        limit = (math.log1p(D**2 * math.exp(8)) - math.log1p(D**2 * math.exp(-8))) / 2
        excess.append(sum(gaussian_terms(scheduler)[1]["small"]) / limit - 1)
    assert 0 < excess[1] < 0.1
    assert excess[1] / excess[0] == pytest.approx(0.5, abs=0.05)


def test_the_posterior_of_the_last_step_is_x0():
    scheduler = scheduler_of()
    x0, x_t = torch.randn(2, 3, 1, 2, 2, dtype=F64)
    zero = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(likelihood.posterior_mean(scheduler, x0, x_t, zero), x0)


def test_zero_terminal_snr_has_no_prior_term():
    scheduler = scheduler_of("v_prediction", rescale_betas_zero_snr=True)
    prior, steps = gaussian_terms(scheduler)
    assert prior == 0
    assert all(math.isfinite(L_t) and L_t > 0 for terms in steps.values() for L_t in terms)


# ---------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize("bound", [1.0, 1.25])
def test_every_level_has_a_bin_of_its_own(bound):
    """Also 252 to 255, which `to_uint8` makes equal, are four different values of x_0."""
    levels = to_model_range(torch.arange(256), bound, F64)
    edges = likelihood.bin_edges(bound)
    assert (levels.diff() > 0).all() and (edges.diff() > 0).all()
    assert (edges[:-1] < levels).all() and (levels < edges[1:]).all()
    assert edges[[0, -1]].tolist() == [-math.inf, math.inf]
    black = 1 - 1 / 127.5  # the level 1 is at -black
    assert edges[1].item() == pytest.approx(-(bound + black) / 2)
    assert edges[252].item() == pytest.approx((251 / 127.5 - 1 + 252 / 127.5 - 1 + bound - 1) / 2)


@pytest.mark.parametrize("bound", [1.0, 1.25])
def test_the_probabilities_of_all_levels_add_up_to_1_and_are_those_of_scipy(bound):
    generator = torch.Generator().manual_seed(0)
    mean = (2 * torch.rand(50, 1, generator=generator, dtype=F64) - 1) * bound
    std = 10 ** (-3 * torch.rand(50, 1, generator=generator, dtype=F64))
    pixels = torch.arange(256, dtype=torch.uint8).expand(50, 256)
    log_p = likelihood.log_probability(pixels, mean, std, bound)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(50, dtype=F64), rtol=0, atol=1e-12)
    values = to_model_range(torch.arange(256), bound, F64).numpy()
    ends = (values[1:] + values[:-1]) / 2
    below = torch.from_numpy(stats.norm.cdf(ends, mean.numpy(), std.numpy()))
    wanted = below.diff(dim=1, prepend=torch.zeros_like(mean), append=torch.ones_like(mean))
    torch.testing.assert_close(log_p.exp(), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_level_far_from_the_mean_has_a_finite_cost(mirrored):
    """White and 254 where black is predicted, at 400 deviations: -log p is about 400^2 / 2."""
    pixels = torch.tensor([0, 1] if mirrored else [255, 254], dtype=torch.uint8)
    mean = torch.tensor(1.0 if mirrored else -1.0, dtype=F64)
    log_p = likelihood.log_probability(pixels, mean, torch.tensor(0.005, dtype=F64), 1.0)
    above = [stats.norm.logsf((2 - half / 255) / 0.005) for half in (1, 3)]  # the two lower ends
    wanted = [above[0], above[1] + math.log1p(-math.exp(above[0] - above[1]))]
    assert log_p.tolist() == pytest.approx(wanted, rel=1e-9)


# -------------------------------------------------------------------------- the whole of the bound


def fake_images(n=10_000, seed=0):
    """Return images of which the first ten differ, and the others repeat them."""
    generator = torch.Generator().manual_seed(seed)
    ten = torch.randint(0, 256, (10, *SHAPE), generator=generator, dtype=torch.uint8)
    return ten.repeat(n // 10, 1, 1, 1)


def test_who_knows_the_image_pays_for_the_prior_only():
    """With steps of tiny noise at the end: L_T is all that is left of the bound with beta~."""
    betas = [1e-9, 1e-9, 0.1, 0.3, 0.5]
    scheduler = scheduler_of(trained_betas=betas, num_train_timesteps=5, clip_sample=True)
    pixels = fake_images(10)
    x0 = to_model_range(pixels, 1.0, F64)

    def oracle(x_t, t):
        return x0.to(x_t.dtype)

    noise = torch.randn(x0.shape, dtype=F64)
    prior = likelihood.prior_term(scheduler, x0)
    for t in range(1, 5):
        L_t = likelihood.step_terms(oracle, scheduler, x0, noise, torch.full((10,), t))
        assert L_t["small"].abs().max() < 1e-9
        tilde, beta = (v[t].item() for v in likelihood.variances(scheduler).values())
        constant = 784 * (tilde / beta - 1 - math.log(tilde / beta)) / 2
        torch.testing.assert_close(L_t["large"], torch.full((10,), constant, dtype=F64))
    L_0 = likelihood.decoder_term(oracle, scheduler, pixels, noise)
    assert L_0.abs().max() < 1e-9
    abar = (1 - torch.tensor(betas, dtype=F64)).prod()
    wanted = (abar * x0.square() - abar - (1 - abar).log()).flatten(1).sum(1) / 2
    torch.testing.assert_close(prior, wanted)


def test_the_decoder_has_beta_tilde_of_the_second_step():
    """The image is predicted from x_t at t = 0, and clipped. Both variances are the same there."""
    scheduler = scheduler_of(clip_sample=True, clip_sample_range=1.25)
    seen = []

    def network(x_t, t):
        seen.append((x_t, t))
        return torch.full_like(x_t, 2.0)

    pixels, noise = fake_images(10)[:3], torch.randn(3, *SHAPE, dtype=F64)
    L_0 = likelihood.decoder_term(network, scheduler, pixels, noise)
    x0 = to_model_range(pixels, 1.25, F64)
    torch.testing.assert_close(seen[0][0], scheduler.add_noise(x0, noise, 0))
    assert seen[0][1].tolist() == [0, 0, 0]
    a_0, a_1 = abar_at(scheduler, 0), abar_at(scheduler, 1)
    small = (1 - a_1 / a_0) * (1 - a_0) / (1 - a_1)
    tables = likelihood.variances(scheduler)
    assert tables["small"][0].item() == tables["large"][0].item() == pytest.approx(small)
    assert tables["small"][1].item() == pytest.approx(small)
    assert tables["large"][1].item() == pytest.approx(1 - a_1 / a_0)
    mean, std = torch.full_like(x0, 1.25), torch.tensor(small, dtype=F64).sqrt()
    log_p = likelihood.log_probability(pixels, mean, std, 1.25)
    torch.testing.assert_close(L_0, -log_p.flatten(1).sum(1))


def test_clipping_counts_at_every_step():
    clipped = scheduler_of(clip_sample=True)
    x0, t = torch.full((1, *SHAPE), 0.5, dtype=F64), torch.tensor([5])
    terms = [
        likelihood.step_terms(lambda x, t, a=a: torch.full_like(x, a), clipped, x0, 0 * x0, t)
        for a in (1.0, 7.0)
    ]
    assert terms[0]["small"].item() == pytest.approx(terms[1]["small"].item())


# --------------------------------------------------------------------------------- the estimator


def test_the_density_is_the_share_of_each_term_for_normal_data():
    scheduler = scheduler_of("sample")

    def network(x_t, t):  # E[x_0 | x_t] for N(0, 1)
        return scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1) * x_t

    x0, noise = torch.tensor(list(product((-1.0, 1.0), (-1.0, 1.0))), dtype=F64).T
    x0, noise = x0.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)
    L = [
        likelihood.step_terms(network, scheduler, x0, noise, torch.full((4,), t))["small"].mean()
        for t in range(1, 20)
    ]
    p = likelihood.timestep_density(scheduler)
    assert p[0] == 0
    torch.testing.assert_close(p[1:], torch.stack(L) / sum(L))


@pytest.mark.parametrize("n", [2, 7])
def test_the_estimate_of_the_sum_is_unbiased(n, monkeypatch):
    """Over 400 seeds the mean is the sum of any f(t), within four standard errors."""
    scheduler = scheduler_of(num_train_timesteps=5)
    f = torch.tensor([math.nan, 3.0, 1.0, 4.0, 1.5], dtype=F64)  # t = 0 is never drawn
    p, estimates = likelihood.timestep_density(scheduler), []
    for seed in range(400):
        monkeypatch.setattr(likelihood, "SEED", seed)
        t = likelihood.choose_timesteps(scheduler, n)
        assert (t.diff() >= 0).all()
        estimates.append((f[t] / p[t]).mean().item())
    spread = torch.tensor(estimates).std().item() / math.sqrt(len(estimates))
    assert abs(sum(estimates) / len(estimates) - f[1:].sum().item()) < 4 * spread


def test_many_images_estimate_the_full_sum():
    """All images are gray and the error of x_0 is known: 1,000 draws give the sum to 1 %."""
    errors = torch.linspace(0.0, 0.4, 20, dtype=F64)
    subject = subject_of(lambda x, t: 0.2 + errors[t].to(x.dtype).view(-1, 1, 1, 1) + 0 * x)
    scheduler = DDPMScheduler(**subject.contents["scheduler"])
    images = torch.full((10_000, *SHAPE), 153, dtype=torch.uint8)  # x_0 = 0.2
    places = torch.arange(200)
    table = Likelihood(subject, 200).measure(images, places, CPU, lambda n: None)
    columns = dict(zip(Likelihood.columns, table.T, strict=True))
    tilde, beta = likelihood.variances(scheduler).values()
    abar = scheduler.alphas_cumprod
    for name, s in {"small": tilde, "large": beta}.items():
        c = abar[:-1].sqrt() * beta[1:] / (1 - abar[1:])
        ratio = tilde[1:] / s[1:]
        L = (c.square() * errors[1:].square() / s[1:] + ratio - 1 - ratio.log()) / 2
        wanted = L.sum().item() / math.log(2)
        assert columns[f"steps, {name}"].mean().item() == pytest.approx(wanted, rel=0.01)


def test_a_row_has_the_terms_of_its_image_in_bits_per_dimension():
    """Each image, in a random order, with its own noise, its own t, and 1 / p(t)."""
    network = gaussian_denoiser(scheduler_of())
    subject, images = subject_of(network), fake_images()
    scheduler, calls = DDPMScheduler(**subject.contents["scheduler"]), []
    places = torch.tensor([4, 0, 11])
    table = Likelihood(subject, 12).measure(images, places, CPU, calls.append)
    assert calls == [3, 3] and table.dtype == F64
    chosen, t = likelihood.choose_images(12), likelihood.choose_timesteps(scheduler, 12)
    p = likelihood.timestep_density(scheduler)
    assert len(set(chosen.tolist())) == 12 and chosen.tolist() != sorted(chosen.tolist())
    for row, place in zip(table, places.tolist(), strict=True):
        index = chosen[place : place + 1]
        x0, mine = to_model_range(images[index], 1.0, F64), t[place : place + 1]
        noises = [image_noise(likelihood.SEED, index, draw, SHAPE) for draw in (0, 1)]
        L_t = likelihood.step_terms(network, scheduler, x0, noises[0], mine)
        L_0 = likelihood.decoder_term(network, scheduler, images[index], noises[1])
        wanted = [likelihood.prior_term(scheduler, x0).item() / BITS]
        wanted += [L_t[name].item() / p[mine].item() / BITS for name in ("small", "large")]
        wanted += [L_0.item() / BITS]
        assert row.tolist() == pytest.approx([mine.item(), *wanted], rel=1e-4)


def test_the_standard_error_is_that_of_neighbours():
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=F64)
    plain = likelihood.estimate(5 + 2 * noise)
    assert plain.mean == pytest.approx(5, abs=0.1)
    assert plain.se == pytest.approx(2 / math.sqrt(4000), rel=0.05)
    trend = torch.linspace(0, 100, 4000, dtype=F64)  # known differences between the parts of p(t)
    assert likelihood.estimate(trend + 2 * noise).se == pytest.approx(plain.se, rel=1e-3)
    two = torch.tensor([1.0, 2.0], dtype=F64).repeat_interleave(2)  # equal pairs
    assert likelihood.estimate(two).se == 0
    assert likelihood.estimate(torch.tensor([1.0, 3.0, 9.0], dtype=F64)).mean == pytest.approx(
        13 / 3
    )


# ------------------------------------------------------------------------------------- inversion


def round_trip(network, scheduler, x0):
    x_T = likelihood.encode(network, scheduler, x0)
    return x_T, likelihood.decode(network, scheduler, x_T)


def steps_scheduler(steps, prediction_type="epsilon", **changes):
    scheduler = scheduler_of(prediction_type, **{"num_train_timesteps": 1000} | changes)
    scheduler.set_timesteps(steps)
    return scheduler


X0 = torch.linspace(-1, 1, 5, dtype=F64).view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_constant_velocity_is_inverted_exactly(steps):
    """With a constant eps, x / sqrt(abar) is a straight line in sqrt((1 - abar) / abar)."""
    scheduler, eps = steps_scheduler(steps), torch.randn(5, 1, 1, 1, dtype=F64)
    x_T, back = round_trip(lambda x, t: eps, scheduler, X0)
    abar = abar_at(scheduler, 999)
    torch.testing.assert_close(x_T, math.sqrt(abar) * X0 + math.sqrt(1 - abar) * eps)
    torch.testing.assert_close(back, X0, rtol=0, atol=1e-9)


def round_trip_factor(scheduler):
    """Return what one round trip multiplies x_0 - M by, for the denoiser of N(M, D^2).

    With y = (x - sqrt(abar) M) / sqrt(abar) and s = sqrt((1 - abar) / abar), a step adds
    eps = s / (D^2 + s^2) y times the change of s, with eps of the timestep of the call.
    """
    ts = scheduler.timesteps.tolist()[::-1]
    s = [math.sqrt(1 / abar_at(scheduler, t) - 1) for t in ts]
    slope = [u / (D**2 + u**2) for u in s]
    # the clean image, as the network sees it at the smallest timestep, has another abar
    first = abar_at(scheduler, ts[0])
    offset = s[0] * slope[0] / math.sqrt(first)
    up = [1 + offset, *(1 + (s[i + 1] - s[i]) * slope[i] for i in range(len(s) - 1))]
    down = [1 + ([0.0, *s][i] - s[i]) * slope[i] for i in range(len(s))]
    return math.prod(up) * math.prod(down)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_round_trip_of_a_linear_network_is_known(prediction_type):
    """And all prediction types encode alike."""
    scheduler = steps_scheduler(7, prediction_type)
    network, factor = gaussian_denoiser(scheduler), round_trip_factor(scheduler)
    _, (a, b) = round_trip(network, scheduler, torch.tensor([0.3, 0.7], dtype=F64).view(2, 1, 1, 1))
    assert ((b - a) / 0.4).item() == pytest.approx(factor, rel=1e-9)
    x_T = likelihood.encode(network, scheduler, X0)
    other = steps_scheduler(7, "epsilon")
    torch.testing.assert_close(x_T, likelihood.encode(gaussian_denoiser(other), other, X0))


def test_a_short_trip_leaves_out_nearly_pure_noise():
    subject = subject_of(gaussian_denoiser(scheduler_of()))
    whole, short = (Inversion(subject, 8, 10, is_short).scheduler for is_short in (False, True))
    left_out = whole.timesteps[~torch.isin(whole.timesteps, short.timesteps)]
    log_snr = torch.logit(whole.alphas_cumprod, eps=1e-30)
    assert (
        len(left_out) and (log_snr[left_out] <= -6).all() and (log_snr[short.timesteps] > -6).all()
    )
    assert Inversion(subject, 8, 10, True).calls == 2 * len(short.timesteps) < 20
    assert Inversion(subject, 8, 10, True).name != Inversion(subject, 8, 10).name
    noisy = subject_of(gaussian_denoiser(scheduler_of()), trained_betas=[0.9999] * 20)
    assert Inversion(noisy, 8, 10, True).scheduler.timesteps.tolist() == [1]


def test_the_error_of_the_inversion_falls_with_the_length_of_the_steps():
    """Euler's method is of first order: twice the steps, a quarter of the squared error."""

    def error(steps):
        abar = torch.linspace(20, -8, 800, dtype=F64).sigmoid()  # equal steps of log-SNR
        betas = 1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
        changes = {"trained_betas": betas, "num_train_timesteps": 800}
        scheduler = steps_scheduler(steps, "v_prediction", **changes)
        _, back = round_trip(gaussian_denoiser(scheduler), scheduler, X0)
        return (back - X0).square().mean().item()

    errors = [error(steps) for steps in (100, 200, 400)]
    assert errors[0] < 0.1
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.25)


def test_encoding_calls_the_network_at_the_current_timestep_and_first_at_the_smallest():
    scheduler, calls = steps_scheduler(4), []

    def network(x_t, t):
        calls.append((t.item(), x_t))
        return 0.3 * x_t

    x_T = likelihood.encode(network, scheduler, X0)
    assert [t for t, _ in calls] == [249, 249, 499, 749]
    assert torch.equal(calls[0][1], X0)
    calls.clear()
    likelihood.decode(network, scheduler, x_T)
    assert [t for t, _ in calls] == [999, 749, 499, 249]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_decoding_is_sampling_with_eta_0(prediction_type):
    scheduler = steps_scheduler(6, prediction_type)
    ddim = DDIMScheduler(**scheduler.config)
    ddim.set_timesteps(6)
    network, x_T = gaussian_denoiser(scheduler), torch.randn(3, *SHAPE, dtype=F64)
    wanted = sample(lambda x, t: 1.1 * network(x, t), ddim, torch.arange(3), SHAPE, x_T=x_T)
    actual = likelihood.decode(lambda x, t: 1.1 * network(x, t), scheduler, x_T)
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=1e-3, atol=1e-3)


def test_pure_noise_without_any_image_can_be_inverted():
    scheduler = steps_scheduler(500, "v_prediction", rescale_betas_zero_snr=True)
    x_T, back = round_trip(gaussian_denoiser(scheduler), scheduler, X0)
    assert x_T.isfinite().all() and back.isfinite().all()


def test_the_errors_are_those_of_images_in_0_to_1_and_of_pixels():
    """x_0 is not clipped, but pixels are: white that comes back brighter has no error as uint8."""
    images = torch.full((10_000, *SHAPE), 255, dtype=torch.uint8)
    images[:, :, :14] = 153  # x_0 = 0.2
    bound, calls = 1.25, []

    def brighter(x_t, t):  # half of the pixels are 0.1 too bright, the others 0.02
        return torch.cat([torch.full_like(x_t[:, :, :14], 0.22), x_t[:, :, 14:] * 0 + 1.35], dim=2)

    subject = subject_of(brighter, clip_sample_range=bound)
    table = Inversion(subject, 8, 5).measure(images, torch.arange(3), CPU, calls.append)
    assert sum(calls) == 3 * Inversion(subject, 8, 5).calls and table.shape == (3, 2)
    error, as_uint8 = table[0].tolist()
    assert error == pytest.approx(
        (0.02**2 + 0.1**2) / 2 / 2.5**2, rel=1e-4
    )  # white is 2.5 above black
    assert as_uint8 == pytest.approx((3 / 255) ** 2 / 2)  # (0.22 + 1) * 127.5 = 155.55: 156


# ----------------------------------------------------------------------------------- what is kept


SETTINGS = Settings((1, 20), (4,), (0.0, 1.0), 10, 10, 1, 0, 6, "data", None)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two networks, whose calls are counted."""
    monkeypatch.setattr(likelihood, "load_dataset", lambda *_: (fake_images(), None))
    calls = []

    def subject(label, prediction_type):
        config = DDPMScheduler(num_train_timesteps=20, prediction_type=prediction_type).config
        inner = gaussian_denoiser(DDPMScheduler(**config | {"beta_schedule": "cosine"}))

        def model(x_t, t):
            calls.append(label)
            return inner(x_t, t)

        return subject_of(model, label, prediction_type)

    subjects = [subject("a", "v_prediction"), subject("b", "epsilon")]
    it = Study(replace(SETTINGS, out=tmp_path), ALONE, subjects, "python study.py")
    it.calls = calls
    return it


def test_results_are_kept_until_the_checkpoint_the_settings_or_the_code_change(study, monkeypatch):
    def measured(*measurements):
        study.calls.clear()
        likelihood.measure(measurements, study)
        return bool(study.calls)

    a = study.subjects[0]
    first = likelihood.measure([Likelihood(a, 20), Inversion(a, 6, 3)], study)
    again = likelihood.measure([Likelihood(a, 20), Inversion(a, 6, 3)], study)
    assert [list(r) for r in first] == [list(Likelihood.columns), list(Inversion.columns)]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[c], other[c]) and one[c].dtype == F64 for c in one)
    assert not measured(Likelihood(a, 20), Inversion(a, 6, 3))
    renamed = replace(a, label="c", path="elsewhere.pt")
    assert not measured(Likelihood(renamed, 20), Inversion(renamed, 6, 3))
    other = replace(a, sha256="1" * 64)
    assert measured(Likelihood(other, 20)) and measured(Inversion(other, 6, 3))
    for m in (Likelihood(a, 22), Inversion(a, 8, 3), Inversion(a, 6, 4)):
        assert measured(m) and not measured(m)
    monkeypatch.setattr(likelihood, "code_key", lambda names: "another")
    assert measured(Likelihood(a, 20)) and not measured(Likelihood(a, 20))
    damaged = study.out / "likelihood" / f"{Likelihood(a, 20).name}.json"
    damaged.write_text("{")
    assert measured(Likelihood(a, 20))


def test_the_key_has_the_device_and_the_model():
    a = Likelihood(subject_of(None), 20)
    exact = Likelihood(replace(a.subject, code=("experiments.denoiser:ExactDenoiser",)), 20)
    keys = {likelihood.key_of(m, torch.device(d)) for m in (a, exact) for d in ("cpu", "cuda")}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("experiments/likelihood.py", "ratio - 1 - ratio.log()", "ratio - 1", {"Likelihood"}),
        ("experiments/likelihood.py", "SEED = 0", "SEED = 1", {"Likelihood", "Inversion"}),
        ("experiments/likelihood.py", "pairwise(up)", "pairwise(up[1:])", {"Inversion"}),
        ("experiments/likelihood.py", "(back - x0) / span", "back - x0", {"Inversion"}),
        ("experiments/likelihood.py", "Draw the bits", "Show the bits", set()),
        ("experiments/likelihood.py", '"σ² = β̃"', '"beta~"', set()),
        ("scheduler.py", "sqrt_abar * sample - sqrt", "sqrt_abar * sample + sqrt", "both"),
        ("lab/data.py", "alpha=clip_sample_range - 1", "alpha=clip_sample_range", "both"),
        ("lab/noise.py", "2 * math.pi", "math.pi", {"Likelihood"}),
        ("diffusion.py", "u / n", "u * n", {"Likelihood"}),
        ("unet.py", "return F.pixel_shuffle", "return 2 * F.pixel_shuffle", "both"),
        ("metrics.py", "MIN_SAMPLES = 100", "MIN_SAMPLES = 99", set()),
    ],
)
def test_edits_that_change_the_keys(tmp_path, file, old, new, changed):
    copy_lab_with_edit(tmp_path, file, old, new)
    both = {"Likelihood", "Inversion"}
    starts = {name: (f"experiments.likelihood:{name}", "unet:UNet") for name in both}
    differ = {n for n, start in starts.items() if code_key(start) != code_key(start, tmp_path)}
    assert differ == (both if changed == "both" else changed)


def test_every_process_measures_its_share(study):
    class Second(Process):
        def sum(self, tensor):
            return tensor  # alone: what the first process measures stays 0

        def agree(self, value):
            return [False] * len(value)

    for m in (Likelihood(study.subjects[0], 20), Inversion(study.subjects[0], 20, 3)):
        whole = likelihood.measure_one(m, fake_images(), study, lambda n: None)
        study.process, told = Second(CPU, world=2, rank=1), []
        part = likelihood.measure_one(m, fake_images(), study, told.append)
        assert sum(told) == 10 * m.calls
        for column in m.columns:
            assert part[column][:10] == [0] * 10
            assert part[column][10:] == pytest.approx(whole[column][10:], rel=1e-4)
        assert likelihood.measure([m], study) == [] and not list(study.out.iterdir())
        study.process = ALONE


# ------------------------------------------------------------------------------ tables and figure


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_the_experiment_has_its_tables_and_its_figure(study):
    tables = likelihood.run(study)
    assert set(tables) == set(likelihood.TABLES)
    assert (study.out / "likelihood.png").stat().st_size > 5000
    bits = [cells(line) for line in tables["likelihood"].splitlines()[2:]]
    assert [row[0] for row in bits] == ["v, σ² = β̃", "v, σ² = β", "ε, σ² = β̃", "ε, σ² = β"]
    for row in bits:
        total, *parts = (float(cell.split(" ± ")[0]) for cell in row[1:])
        assert total == pytest.approx(sum(parts), abs=0.002)
    lines = [cells(line) for line in tables["likelihood-ranges"].splitlines()]
    assert lines[0] == ["log-SNR", "(−∞, −3]", "(−3, 0]", "(0, 3]", "(3, 6]", "(6, ∞)", "L_0"]
    for line, row in zip(lines[2:], bits[::2], strict=True):
        total = sum(float(cell.split(" ± ")[0]) for cell in line[1:])
        prior = float(row[2].split(" ± ")[0])
        assert total + prior == pytest.approx(float(row[1].split(" ± ")[0]), abs=0.005)
    trips = [cells(line) for line in tables["inversion"].splitlines()]
    assert trips[0] == ["error × 10⁴, by steps", "10", "20"]
    assert trips[2] == ["*n*", "*2*", "*2*"]
    assert trips[3] == ["the paper, CIFAR-10", "140", "65"]
    rows = ["mean", "median", "uint8", "short"]
    assert [row[0] for row in trips[4:]] == [f"{name}, {row}" for name in "vε" for row in rows]


def test_it_asks_for_what_the_settings_say(study, monkeypatch):
    asked = []
    monkeypatch.setattr(likelihood, "measure", lambda m, study: asked.extend(m))
    study.process = Process(CPU, world=2, rank=1)
    study.settings = replace(study.settings, steps=(1, 5, 250), n=1000, n_long=250)
    assert likelihood.run(study) == {}
    bounds = [m for m in asked if isinstance(m, Likelihood)]
    assert [(m.subject.label, m.n) for m in bounds] == [("a", 2000), ("b", 2000)]
    trips = [m for m in asked if isinstance(m, Inversion) and m.subject.label == "a"]
    wanted = [(10, 250), (20, 250), (50, 250), (100, 250), (200, 250)]
    for is_short in (False, True):
        assert [(m.steps, m.n) for m in trips if m.is_short == is_short] == wanted
    study.settings = replace(study.settings, steps=(1, 1000), n=20_000)
    asked.clear()
    likelihood.run(study)
    assert max(m.n for m in asked) == 10_000 and asked[2].n == 5000
    long = {m.steps: m.n for m in asked[2:]}
    assert (long[500], long[1000]) == (62, 62)


def test_few_steps_leave_out_the_inversion(study):
    study.settings = replace(study.settings, steps=(1, 5))
    assert set(likelihood.run(study)) == {"likelihood", "likelihood-ranges"}


def test_the_bits_spent_rise_to_the_bound_without_the_decoder():
    scheduler = scheduler_of()
    t = likelihood.choose_timesteps(scheduler, 40)
    columns = {"t": t.double(), "prior": torch.full((40,), 0.5, dtype=F64)}
    columns["steps, small"] = torch.arange(40, dtype=F64)
    x, y = likelihood.spent(columns, scheduler)
    log_snr = torch.logit(scheduler.alphas_cumprod)
    torch.testing.assert_close(x, log_snr[:-1].flip(0))  # after the step to t - 1
    assert (y.diff() >= 0).all() and y[-1].item() == pytest.approx(0.5 + 19.5)
    after_10 = columns["steps, small"][t >= 10].sum().item() / 40  # the steps 19 -> 18 ... 10 -> 9
    assert y[x <= log_snr[9]][-1].item() == pytest.approx(0.5 + after_10)


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [
        (6.5e9, 1e8, "6.5e+09 ± 1.0e+08"),
        (214.4, 50.2, "214 ± 50"),
        (74.12, 0.31, "74.1 ± 0.3"),
        (9.04, 0.031, "9.04 ± 0.03"),
        (0.0312, 0.0044, "0.031 ± 0.004"),
        (0.0, 0.0, "0.000 ± 0.000"),
        (math.nan, math.nan, "–"),
    ],
)
def test_errors_of_all_sizes_can_be_read(mean, se, text):
    assert likelihood.readable(Estimate(mean, se)) == text
