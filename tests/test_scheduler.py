"""These tests hold scheduler.py against probability theory, diffusers and what it promises."""

import contextlib
import functools
import itertools
import json
import math
import re
from itertools import pairwise, product
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import (
    BETA_SCHEDULES,
    ETA_CONVENTIONS,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    make_betas,
)

F32, F64 = torch.float32, torch.float64
PREDICTIONS = list(PREDICTION_TYPES)
BOTH = [DDPMScheduler, DDIMScheduler]
# `derandomize` draws the same examples in every run, so only a change of the code makes a failure.
examples = functools.partial(settings, derandomize=True, deadline=None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(seed, *shape, dtype=F64):
    """Draw in float64 and cast, so that all dtypes see the same numbers."""
    return torch.randn(shape, generator=seeded(seed), dtype=F64).to(dtype)


def assert_close(actual, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def paired(*axes):
    """Pair the values of the axes; a shorter axis starts again with its first value."""
    longest = max(map(len, axes))
    return list(itertools.islice(zip(*map(itertools.cycle, axes), strict=False), longest))


def toy_model(x, t):
    """Return a smooth function of x and t with values in (-1.5, 1.5), in place of a network."""
    return 1.5 * torch.tanh(0.8 * x + 0.1 * torch.sin(5 * x) - t / 2000)


def abar_at(scheduler, t):
    return 1.0 if t < 0 else scheduler.alphas_cumprod[t].item()


# ==== 1. First principles: closed forms and brute-force Bayes, in float64 =========================
#
# A step is affine: x_{t-k} = a x_0 + b x_t + s z, where x_0 is what the network predicts and z is
# the noise. `coefficients` reads a, b and s from one step, so most tests are algebra and need no
# sampling. Where no comment justifies a tolerance of 1e-12, it is 2^-53 times the largest number of
# roundings, about 1000 (the product that makes abar).

NAMED = ["linear", "scaled_linear", "cosine", "sigmoid"]
SCHEDULES = [*NAMED, "zero_snr"]
JUMPS = [(1, 0), (10, 9), (500, 499), (999, 998), (999, 899), (500, 100), (50, 3), (999, 0)]
SAMPLERS = {  # name: class, arguments of the constructor, arguments of step
    "ddpm": (DDPMScheduler, {}, {}),
    "ddpm, fixed_large": (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "ddim, eta 0": (DDIMScheduler, {}, {"eta": 0.0}),
    "ddim, eta 0.5": (DDIMScheduler, {}, {"eta": 0.5}),
    "ddim, eta 1": (DDIMScheduler, {}, {"eta": 1.0}),
}
schedules = st.sampled_from(SCHEDULES)
descending = functools.partial(sorted, reverse=True)
subsets = st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True).map(descending)


@functools.cache  # hypothesis would make the tables of 1000 timesteps for each example
def make(cls, schedule, prediction_type="sample", clip_sample=False, **kwargs):
    if schedule == "zero_snr":
        schedule, kwargs["rescale_betas_zero_snr"] = "linear", True
    kwargs |= dict(prediction_type=prediction_type, clip_sample=clip_sample)
    return cls(beta_schedule=schedule, **kwargs)


def coefficients(scheduler, t, **step_arguments):
    """Return a, b and s of x_{t-k} = a x_0 + b x_t + s z from a step on unit vectors."""
    assert scheduler.prediction_type == "sample" and not scheduler.config["clip_sample"]
    x0, x_t, z = torch.eye(3, dtype=F64)
    return scheduler.step(x0, t, x_t, variance_noise=z, **step_arguments).prev_sample.tolist()


def chain(mean, variance, betas):
    """Pass a Gaussian's mean and variance through the kernels N(sqrt(1 - beta) x, beta)."""
    for beta in betas:
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    return mean, variance


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_kernels_compose_to_the_jump(schedule):
    """The chain of one-step kernels has the mean and the variance of add_noise at every t."""
    scheduler = make(DDPMScheduler, schedule)
    moments = [(1.0, 0.0)]  # of x_t, for x_0 = 1
    for beta in scheduler.betas.tolist():
        moments.append(chain(*moments[-1], [beta]))
    mean, variance = torch.tensor(moments[1:], dtype=F64).T
    zero, one, t = torch.zeros(1000, dtype=F64), torch.ones(1000, dtype=F64), torch.arange(1000)
    assert_close(scheduler.add_noise(one, zero, t), mean, atol=1e-12)
    assert_close(scheduler.add_noise(zero, one, t) ** 2, variance, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_is_the_derivative_of_the_noise_angle(schedule):
    """On the circle x = cos(phi) x_0 + sin(phi) eps with cos(phi)^2 = abar_t, v is dx / dphi."""
    scheduler, t = make(DDPMScheduler, schedule), torch.tensor([0, 10, 500, 998, 999])
    x0, noise = gaussian(0, 5, 3), gaussian(1, 5, 3)
    phi = scheduler.alphas_cumprod[t].sqrt().arccos()[:, None].repeat(1, 3).requires_grad_()
    (tangent,) = torch.autograd.grad((phi.cos() * x0 + phi.sin() * noise).sum(), phi)
    # arccos near 1 multiplies its argument's 2^-53 by 1 / sin(phi), 150 at the start of cosine
    assert_close(scheduler.get_velocity(x0, noise, t), tangent, atol=1e-12)


@pytest.mark.parametrize("schedule, jump", paired(SCHEDULES, JUMPS), ids=str)
def test_posterior_equals_brute_force_bayes(schedule, jump):
    """A step has the moments of prior q(x_{t-k} | x_0) times likelihood q(x_t | x_{t-k})."""
    scheduler, (t, prev) = make(DDPMScheduler, schedule), jump
    betas = scheduler.betas.tolist()
    scheduler.set_timesteps(timesteps=[t, prev])
    a, b, s = coefficients(scheduler, t)
    for x0, offset in [(0.7, -1.0), (-0.3, 0.5), (1.0, 2.0)]:
        prior_mean, prior_var = chain(x0, 0.0, betas[: prev + 1])
        slope, likelihood_var = chain(1.0, 0.0, betas[prev + 1 : t + 1])
        x_t = slope * prior_mean + offset * math.sqrt(slope**2 * prior_var + likelihood_var)
        # They are multiplied on a grid of x_{t-k}. The posterior's mean lies within 2 and its tails
        # within 12 prior deviations. The grid's step is a hundredth of the narrowest posterior's
        # deviation: a sum over a Gaussian is then exact to rounding.
        grid = prior_mean + math.sqrt(prior_var) * torch.linspace(-12, 12, 40_001, dtype=F64)
        log_p = -((grid - prior_mean) ** 2) / (2 * prior_var)
        log_p -= (x_t - slope * grid) ** 2 / (2 * likelihood_var)
        p = log_p.softmax(0)
        mean = (p * grid).sum().item()
        variance = (p * (grid - mean) ** 2).sum().item()
        assert a * x0 + b * x_t == pytest.approx(mean, abs=1e-10)  # 40,001 roundings: 1e-11
        assert s**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("schedule, jump", paired(SCHEDULES, [*JUMPS, (2, 1)]), ids=str)
def test_fixed_large_has_the_forward_kernels_variance(schedule, jump):
    """The mean is mu~ as ever, and beta_t is the true variance for x_0 ~ N(0, 1)."""
    default, (t, prev) = make(DDPMScheduler, schedule), jump
    large = make(DDPMScheduler, schedule, variance_type="fixed_large")
    default.set_timesteps(timesteps=[t, prev])
    large.set_timesteps(timesteps=[t, prev])
    sqrt_alpha, beta = chain(1.0, 0.0, large.betas[prev + 1 : t + 1].tolist())
    a, b, s = coefficients(large, t)
    assert [a, b] == pytest.approx(coefficients(default, t)[:2], abs=1e-15)
    assert s**2 == pytest.approx(beta, abs=1e-12)
    # For x_0 ~ N(0, 1) the best denoiser is x_0 = sqrt(abar_t) x_t, and the true reverse kernel has
    # the mean sqrt(alpha_t) x_t (DDPM section 3.2). Rounding 1 - beta, 0.001 at the end of cosine,
    # costs a factor of 1000.
    assert a * math.sqrt(abar_at(large, t)) + b == pytest.approx(sqrt_alpha, abs=1e-11)


@examples(max_examples=200)
@given(schedules, subsets, st.floats(0, 1), st.sampled_from(ETA_CONVENTIONS))
def test_steps_with_the_true_x0_keep_the_marginals(schedule, timesteps, eta, convention):
    """A step with the true x_0 takes q(x_t | x_0) to q(x_{t-k} | x_0), for any eta (DDIM, lemma 1).

    The last step, from any timestep, returns x_0 itself.
    """
    ddpm = make(DDPMScheduler, schedule)
    ddim = make(DDIMScheduler, schedule, eta_convention=convention)
    flags = {"eta": eta, "use_clipped_model_output": False}
    for scheduler, arguments in [(ddpm, {}), (ddim, {"eta": eta}), (ddim, flags)]:
        scheduler.set_timesteps(timesteps=timesteps)
        for t, prev in pairwise([*timesteps, -1]):
            a, b, s = coefficients(scheduler, t, **arguments)
            abar_t, abar_prev = abar_at(scheduler, t), abar_at(scheduler, prev)
            # the moments after the step, from x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
            assert a + b * math.sqrt(abar_t) == pytest.approx(math.sqrt(abar_prev), abs=1e-12)
            assert b**2 * (1 - abar_t) + s**2 == pytest.approx(1 - abar_prev, abs=1e-12)
            assert prev >= 0 or (a, b, s) == (1, 0, 0)


@examples(max_examples=100)
@given(schedules, subsets, st.floats(0, 1))
def test_eta_scales_the_posterior_variance(schedule, timesteps, eta):
    """The variance is eta beta~ by default and eta^2 beta~ by "std"; eta = 1 is DDPM.

    "variance" at eta has the coefficients of "std" at sqrt(eta).
    """
    ddpm, default = (make(cls, schedule) for cls in BOTH)
    std = make(DDIMScheduler, schedule, eta_convention="std")
    for scheduler in (default, std, ddpm):
        scheduler.set_timesteps(timesteps=timesteps)
    for t in timesteps:
        posterior = coefficients(ddpm, t)
        for scheduler, scale in [(default, eta), (std, eta**2)]:
            variance = coefficients(scheduler, t, eta=eta)[2] ** 2
            assert variance == pytest.approx(scale * posterior[2] ** 2, abs=1e-15)
            # b is the root of 1 - abar_{t-k} - sigma^2: where this is almost 0, 2^-53 becomes 1e-8
            assert coefficients(scheduler, t, eta=1.0) == pytest.approx(posterior, abs=3e-8)
        for variance_eta, std_eta in [(0.0, 0.0), (eta, math.sqrt(eta))]:
            expected = coefficients(std, t, eta=std_eta)
            assert coefficients(default, t, eta=variance_eta) == pytest.approx(expected, abs=3e-8)


@pytest.mark.parametrize("schedule, S", [("linear", 1000), ("cosine", 50)])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_at_eta_1_is_ddpm_along_the_chain(prediction_type, clip, schedule, S):
    """The same noise gives the same samples, if eps is re-derived from a clipped x_0."""
    ddpm, ddim = (make(cls, schedule, prediction_type, clip) for cls in BOTH)
    ddpm.set_timesteps(S)
    ddim.set_timesteps(S)
    x = y = gaussian(0, 8)
    noise, largest, misses = gaussian(1, 1000, 8), 1.0, []
    for t in ddpm.timesteps.tolist():
        z = noise[t]
        eps_as_is = ddim.step(toy_model(x, t), t, x, 1.0, False, variance_noise=z).prev_sample
        x = ddpm.step(toy_model(x, t), t, x, variance_noise=z).prev_sample
        y = ddim.step(toy_model(y, t), t, y, 1.0, variance_noise=z).prev_sample
        largest = max(largest, x.abs().max().item())
        misses.append((eps_as_is - x).abs().max().item())
    # an unclipped epsilon-model starts with x_0 = x_T / sqrt(abar_T), up to 20,000 times x_T
    atol = 1e-9 * largest
    assert_close(x, y, atol=atol)
    assert max(misses) > 1e-3 if clip else max(misses) < atol


@pytest.mark.parametrize("schedule, t", paired(NAMED, [0, 1, 100, 500, 900, 999, 999, 0]))
def test_eps_v_and_x0_of_one_denoiser_give_one_step(schedule, t):
    """A denoiser's x_0, eps and v lead to the same x_{t-1} and the same x_0."""
    x_t, x0 = gaussian(0, 64), 1.2 * gaussian(1, 64)  # a third of these x_0 lie outside [-1, 1]
    noise = gaussian(2, 64)
    abar = abar_at(make(DDPMScheduler, schedule), t)
    eps = (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    v = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
    samplers = [(DDPMScheduler, {})]
    for eta, use_clipped in product([0.0, 0.4, 1.0], [False, True]):
        samplers.append((DDIMScheduler, {"eta": eta, "use_clipped_model_output": use_clipped}))
    for clip, (cls, arguments) in product([False, True], samplers):
        results = []
        for prediction_type, output in [("sample", x0), ("epsilon", eps), ("v_prediction", v)]:
            scheduler = make(cls, schedule, prediction_type, clip)
            scheduler.set_timesteps(1000)
            results.append(scheduler.step(output, t, x_t, variance_noise=noise, **arguments))
        # eps loses 2^-53 / sqrt(abar), at worst 1e-16 x 20,000 (cosine's end), when it is turned
        # into x_0, and eps itself is x_t / 0.006 at the start of cosine
        assert_close(results[1], results[0], atol=5e-11)
        assert_close(results[2], results[0], atol=5e-11)


@pytest.mark.parametrize("schedule", NAMED)
def test_zero_snr_ends_at_zero_and_keeps_the_start(schedule):
    """The last abar is 0 and the last beta 1, exactly; abar_0 stays (Lin et al., algorithm 1)."""
    for T in (2, 3, 50, 1000):
        arguments = dict(beta_schedule=schedule, prediction_type="v_prediction")
        plain = DDPMScheduler(T, **arguments)
        rescaled = DDPMScheduler(T, **arguments, rescale_betas_zero_snr=True)
        assert (rescaled.alphas_cumprod[-1].item(), rescaled.betas[-1].item()) == (0, 1)
        assert abar_at(rescaled, 0) == pytest.approx(abar_at(plain, 0), rel=1e-12)
        assert (rescaled.alphas_cumprod.diff() < 0).all()
        assert ((rescaled.betas[:-1] > 0) & (rescaled.betas[:-1] < 1)).all()
        # sqrt(abar) is an affine function of what it was
        before, after = plain.alphas_cumprod.sqrt(), rescaled.alphas_cumprod.sqrt()
        expected = (before - before[-1]) * (before[0] / (before[0] - before[-1]))
        assert_close(after, expected, atol=1e-12)


@pytest.mark.parametrize("S", [1, 50, 1000])
def test_first_step_at_zero_snr(S):
    """From pure noise x_0 is -v and eps is x_T, so the step adds noise to -v."""
    x_T, v, z, x0 = (gaussian(i, 32) for i in range(4))
    ddpm, ddim = (make(cls, "zero_snr", "v_prediction") for cls in BOTH)
    ddpm.set_timesteps(S)
    ddim.set_timesteps(S)
    abar_prev = abar_at(ddpm, ddpm.previous_timestep(999))
    signal, sigma = math.sqrt(abar_prev), math.sqrt(1 - abar_prev)
    for actual, noise in [
        (ddpm.step(v, 999, x_T, variance_noise=z), z),
        (ddim.step(v, 999, x_T, eta=0.0), x_T),
        (ddim.step(v, 999, x_T, eta=0.0, use_clipped_model_output=False), x_T),
        (ddim.step(v, 999, x_T, eta=1.0, variance_noise=z), z),
    ]:
        assert_close(actual.pred_original_sample, -v)
        assert_close(actual.prev_sample, sigma * noise - signal * v, atol=1e-12)
    assert_close(ddpm.add_noise(x0, z, 999), z)
    assert_close(ddpm.get_velocity(x0, z, 999), -x0)


# -------------------------------------------------------------------- sampling a known distribution
#
# For data N(M, D^2) the best denoiser is known: E[x_0 | x_t] = M + gain (x_t - sqrt(abar_t) M),
# with gain = sqrt(abar_t) D^2 / (abar_t D^2 + 1 - abar_t). It is affine in x_t, so mean and
# variance pass through a whole chain in closed form, and what is left of an error is
# discretisation, not chance.

M, D = 0.5, 0.25
NAMES = list(SAMPLERS)
MODELS = [*product(NAMED, ["epsilon", "v_prediction"]), ("zero_snr", "v_prediction")]


def best_output(scheduler, x_t, t):
    """Return eps or v of the best denoiser for N(M, D^2), as the scheduler expects it."""
    abar = abar_at(scheduler, t)
    signal, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    x0 = M + signal * D**2 / (abar * D**2 + 1 - abar) * (x_t - signal * M)
    eps = (x_t - signal * x0) / sigma
    return eps if scheduler.prediction_type == "epsilon" else signal * eps - sigma * x0


def exact_chain(scheduler, S, mean, variance, **step_arguments):
    """Return the samples' mean and deviation in closed form, given mean and variance of x_T."""
    scheduler.set_timesteps(S)
    x, z = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    for t in scheduler.timesteps.tolist():
        output = best_output(scheduler, x, t)
        y = scheduler.step(output, t, x, variance_noise=z, **step_arguments).prev_sample.tolist()
        offset, slope, sigma = y[0], y[1] - y[0], y[2] - y[0]
        mean, variance = offset + slope * mean, slope**2 * variance + sigma**2
    return mean, math.sqrt(variance)


# each schedule meets two samplers, and each sampler two schedules
@pytest.mark.parametrize(
    "schedule, sampler", paired(SCHEDULES, NAMES) + paired(SCHEDULES, NAMES[2:] + NAMES[:2])
)
def test_error_falls_as_the_steps_grow(schedule, sampler):
    """From x_T ~ q(x_T) the samples' distance to N(M, D^2) falls to almost 0 as S grows."""
    cls, constructor, step_arguments = SAMPLERS[sampler]
    scheduler = make(cls, schedule, "v_prediction", **constructor)
    abar_T = abar_at(scheduler, 999)
    errors = []
    # with fewer than 50 steps fixed_large's surplus of noise happens to hide other errors
    few = () if sampler == "ddpm, fixed_large" else (5, 10, 20)
    for S in (*few, 50, 100, 200, 500, 1000):
        start = math.sqrt(abar_T) * M, abar_T * D**2 + 1 - abar_T
        mean, deviation = exact_chain(scheduler, S, *start, **step_arguments)
        errors.append(math.hypot(mean - M, deviation - D))  # Wasserstein-2, of two Gaussians
    assert all(more > less for more, less in pairwise(errors))
    assert errors[-1] < 0.004  # 1.6 % of D; the largest, DDPM's on the linear schedule, is 0.0037
    # First order in 1/S: ten times the steps bring the error down by 8 to 10, or by 6.6 to 8.4 with
    # noise, which is not in that regime yet. A wrong coefficient would leave a floor.
    assert errors[-1] < errors[-4] / 6.5
    # DDPM section 3.2: beta~ is too little noise for spread-out data, beta too much
    assert (deviation > D) == (sampler == "ddpm, fixed_large")


@pytest.mark.parametrize(
    "model, sampler", paired(MODELS, ["ddpm", "ddim, eta 0", "ddim, eta 1"]), ids=str
)
def test_sampling_returns_the_data_distribution(model, sampler):
    """20,000 samples after all T steps from N(0, 1) have the mean M and the deviation D."""
    cls, constructor, step_arguments = SAMPLERS[sampler]
    scheduler = make(cls, *model, **constructor)
    scheduler.set_timesteps(1000)
    n, generator = 20_000, seeded(1)
    x = torch.randn(n, generator=generator, dtype=F64)
    for t in scheduler.timesteps.tolist():
        output = best_output(scheduler, x, t)
        x = scheduler.step(output, t, x, generator=generator, **step_arguments).prev_sample
    # Allowed are 4.5 standard errors, D / sqrt(n) and D / sqrt(2 n), and a bias of 0.004, which the
    # test above justifies, plus D sqrt(abar_T) M, for q(x_T) has the mean sqrt(abar_T) M and the
    # start has not.
    start_error = D * math.sqrt(abar_at(scheduler, 999)) * M
    assert abs(x.mean().item() - M) < 4.5 * D / math.sqrt(n) + 0.004 + start_error
    assert abs(x.std().item() - D) < 4.5 * D / math.sqrt(2 * n) + 0.004
    # Against the chain's exact moments there is no bias to allow for.
    mean, deviation = exact_chain(scheduler, 1000, 0.0, 1.0, **step_arguments)
    assert abs(mean - M) < 0.004 + start_error
    assert abs(x.mean().item() - mean) < 4.5 * D / math.sqrt(n)
    assert abs(x.std().item() - deviation) < 4.5 * D / math.sqrt(2 * n)


# ==== 2. Against diffusers, element by element ====================================================
#
# diffusers computes its tables in float32, and casts even `trained_betas`. Its own constructor is
# therefore given a `torch` whose float32 is float64 (`Float64Torch`): nothing of ours flows into
# the peer. Then float64 samples differ by a few roundings of 2^-53 and float32 samples by a few of
# 2^-24. A stock peer is diffusers as it comes; there its tables set the tolerance.
#
# DDIM's previous timestep is t - T // S in diffusers. Steps and loops are compared where that is
# the next timestep of the list: `leading`, and `trailing` with S dividing T.

PEER_SCHEDULES = {
    "linear": dict(beta_schedule="linear"),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012),
    "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
    "cosine": dict(beta_schedule="cosine"),  # our second name of squaredcos_cap_v2
    "sigmoid": dict(beta_schedule="sigmoid"),
    "sigmoid, steep": dict(beta_schedule="sigmoid", beta_start=0.002, beta_end=0.05),
}
ROUNDING = {F32: 2.0**-24, F64: 2.0**-53}
SHAPE = (3, 2, 4, 4)


class Float64Torch:
    """diffusers' modules see this as `torch` while they build tables: float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)

    def linspace(self, *args, dtype=F64):  # the sigmoid schedule leaves dtype out
        return torch.linspace(*args, dtype=dtype)


def peer_of(cls, stock=False, **arguments):
    """Make diffusers' scheduler of that class name, with float64 tables unless it is stock."""
    family = cls.__name__.removesuffix("Scheduler").lower()
    module = pytest.importorskip(f"diffusers.schedulers.scheduling_{family}")
    patched = mock.patch.object(module, "torch", Float64Torch())
    with contextlib.nullcontext() if stock else patched:
        peer = getattr(module, cls.__name__)(**arguments)
    assert peer.alphas_cumprod.dtype == (F32 if stock else F64)
    return peer


@functools.cache
def ours_and_peer(cls, schedule="linear", stock=False, **arguments):
    """Make our scheduler and diffusers' from the same arguments."""
    arguments = {**PEER_SCHEDULES[schedule], **arguments}
    ours = cls(**arguments)
    arguments.pop("eta_convention", None)  # only ours has it
    if schedule == "cosine":
        arguments["beta_schedule"] = "squaredcos_cap_v2"
    return ours, peer_of(cls, stock, **arguments)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", PEER_SCHEDULES)
def test_tables_and_forward_process_equal_diffusers(schedule, zero_snr):
    """The tables, and x_t and v at every timestep, follow diffusers' formulas in float64."""
    arguments = dict(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    for T in (2, 37, 1000):
        ours, peer = ours_and_peer(DDPMScheduler, schedule, num_train_timesteps=T, **arguments)
        # Both are float64 with the operations in another order: betas are differences of numbers
        # near 1, so their error is absolute, and 1000 factors of 2^-53 each sum up to 1e-13.
        assert_close(ours.betas, peer.betas, rtol=1e-11, atol=1e-13)
        assert_close(ours.alphas, peer.alphas, rtol=1e-11, atol=1e-13)
        # Where cos^2 nears its zero, rounding its argument costs 2^-53 / 1e-3 = 1e-13 of abar.
        assert_close(ours.alphas_cumprod, peer.alphas_cumprod, rtol=1e-11, atol=1e-16)
        x0, noise = gaussian(0, T, 1, 2, 2), gaussian(1, T, 1, 2, 2)
        for t in (torch.arange(T), torch.tensor([T // 2])):
            # abar differs by 1e-13 at most, and sqrt(1 - abar), 0.006 at least, by
            # 1e-13 / (2 x 0.006). It multiplies numbers below 4.
            assert_close(ours.add_noise(x0, noise, t), peer.add_noise(x0, noise, t), atol=4e-11)
            v = peer.get_velocity(x0, noise, t)
            assert_close(ours.get_velocity(x0, noise, t), v, atol=4e-11)


@pytest.mark.parametrize("schedule", PEER_SCHEDULES)
def test_tables_and_forward_process_equal_stock_diffusers(schedule):
    """Tables, x_t and v agree to the digits that diffusers' float32 tables have."""
    for zero_snr in (False, True):
        arguments = dict(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
        ours, peer = ours_and_peer(DDPMScheduler, schedule, stock=True, **arguments)
        # A float32 product of 1000 factors: 1000 x 2^-24 = 6e-5 relative at worst, and abar <= 1.
        assert_close(ours.alphas_cumprod.float(), peer.alphas_cumprod, atol=6e-5)
        # A rescaled beta is 1 - a ratio of neighbours in that product, which share their errors but
        # for a few 2^-24 (2e-6 is 30 of them), until the subtraction leaves few digits as abar
        # nears 0.
        head = slice(0, 900) if zero_snr else slice(None)
        assert_close(ours.betas[head].float(), peer.betas[head], rtol=1e-5, atol=2e-6)
    ours, peer = ours_and_peer(DDPMScheduler, schedule, stock=True)
    x0, noise = (gaussian(i, 1000, 1, 2, 2, dtype=F32) for i in range(2))
    for t in (torch.arange(1000), torch.tensor([617])):
        # Their abar is off by 2^-24 near 1, so sqrt(1 - abar) by 2^-24 / (2 sqrt(1 - abar)): 5e-6
        # where cosine starts with 1 - abar = 4e-5. Elsewhere their product of 1000 factors may be
        # off by 6e-5, its root by 3e-5. Both multiply numbers below 4.
        assert_close(ours.add_noise(x0, noise, t), peer.add_noise(x0, noise, t), atol=1.2e-4)
        assert_close(ours.get_velocity(x0, noise, t), peer.get_velocity(x0, noise, t), atol=1.2e-4)


@pytest.mark.parametrize("T", [1000, 999, 128, 37])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_equal_diffusers(spacing, T):
    """The timesteps agree for every S; diffusers' trailing may have a surplus -1 at its end."""
    ours, peer = ours_and_peer(DDPMScheduler, num_train_timesteps=T, timestep_spacing=spacing)
    surplus = ([], [-1]) if spacing == "trailing" else ([],)
    for S in range(1, T + 1):
        ours.set_timesteps(S)
        peer.set_timesteps(S)
        theirs = peer.timesteps.tolist()
        assert theirs[S:] in surplus
        assert ours.timesteps.tolist() == theirs[:S], f"S={S}"


def ddim_kind(convention, eta, use_clipped):
    """Our "std" is diffusers' eta, and our "variance" at eta is theirs at sqrt(eta)."""
    ours = {"eta": eta, "use_clipped_model_output": use_clipped}
    theirs = {**ours, "eta": eta if convention == "std" else math.sqrt(eta)}
    return DDIMScheduler, {"eta_convention": convention}, ours, theirs


# name: class, our constructor's arguments, our step's and diffusers' step's
KINDS = {f"ddpm {v}": (DDPMScheduler, {"variance_type": v}, {}, {}) for v in VARIANCE_TYPES}
for axes in product(ETA_CONVENTIONS, [0.0, 0.3, 1.0], [False, True]):
    KINDS["ddim {} {} {}".format(*axes)] = ddim_kind(*axes)
FORMATS = [("leading", F64), ("trailing", F64), ("trailing", F32)]
# The cosine schedule's abar_T of 2e-9 is the hardest case for epsilon. Zero terminal SNR is refused
# for epsilon.
STEP_CASES = [
    (schedule, zero_snr, prediction_type)
    for schedule, zero_snr in [("linear", False), ("cosine", False), ("scaled_linear", True)]
    for prediction_type in PREDICTIONS
    if not (zero_snr and prediction_type == "epsilon")
]


@functools.cache
def inputs_at(t, abar, prediction_type, dtype):
    """Return x_t and a network's output that is off by 0.3: some of its x_0 are clipped."""
    x0 = gaussian(3 * t, *SHAPE).clamp(-1.5, 1.5)
    noise = gaussian(3 * t + 1, *SHAPE)
    signal, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    x_t, v = signal * x0 + sigma * noise, signal * noise - sigma * x0
    true_output = {"epsilon": noise, "v_prediction": v, "sample": x0}[prediction_type]
    output = true_output + 0.3 * gaussian(3 * t + 2, *SHAPE)
    return output.to(dtype), x_t.to(dtype)


@pytest.mark.parametrize("clip_range", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_diffusers(kind, clip_range):
    """With the same generator, prev_sample and pred_original_sample agree at every step."""
    cls, constructor, ours_step, peer_step = KINDS[kind]
    clipping = dict(clip_sample=bool(clip_range), clip_sample_range=clip_range or 1.0)
    for (schedule, zero_snr, prediction_type), (spacing, dtype) in product(STEP_CASES, FORMATS):
        arguments = dict(prediction_type=prediction_type, timestep_spacing=spacing)
        arguments |= dict(rescale_betas_zero_snr=zero_snr, **clipping, **constructor)
        ours, peer = ours_and_peer(cls, schedule, **arguments)
        ours.set_timesteps(10)
        peer.set_timesteps(10)
        for t in ours.timesteps.tolist():
            abar = abar_at(ours, t)
            output, x_t = inputs_at(t, abar, prediction_type, dtype)
            prev, x0 = ours.step(output, t, x_t, generator=seeded(t), **ours_step)
            expected = peer.step(output, t, x_t, generator=seeded(t), **peer_step)
            # fifty roundings of numbers below 8; an epsilon-model divides them by sqrt(abar)
            atol = 50 * 8 * ROUNDING[dtype]
            atol /= math.sqrt(abar) if prediction_type == "epsilon" else 1
            assert_close(x0, expected.pred_original_sample, atol=atol)
            # eta = 1 at zero SNR: 1 - abar_{t-k} - sigma^2 is 0 in truth and 2^-53 after rounding,
            # and then comes the root, 1e-8, times eps; in float64 that is what is left to differ.
            atol += 1e-7 if abar < 1e-8 and ours_step.get("eta") == 1 else 0
            if cls is DDPMScheduler and ours.previous_timestep(t) == -1 and t > 0:
                # diffusers adds noise unless t == 0, so also to a trailing list's result; DDPM
                # algorithm 2 does not
                assert_close(prev, x0)
            else:
                assert_close(prev, expected.prev_sample, atol=atol)


# The loops start from the same x_T and draw the same noise. An epsilon-model's first step divides
# rounding errors by sqrt(abar_T), 0.006 for the linear schedule (clipping then forgets most of it);
# later steps damp errors or keep them. 1e-9 and 1e-3 leave a factor of over 10 to what that gives.
LOOP_TOLERANCE = {F64: 1e-9, F32: 1e-3}
DDPM_LOOPS = [("leading", 50, F32), ("leading", 10, F64), ("leading", 1000, F64)]
DDIM_LOOPS = [("leading", 50, F64), ("trailing", 40, F64), ("trailing", 40, F32)]
LOOPS = paired(list(KINDS)[:2], DDPM_LOOPS) + paired(list(KINDS)[2:], DDIM_LOOPS)


def sample_with(scheduler, S, dtype, model=toy_model, **step_arguments):
    """Run the plain sampling loop, with our scheduler or with diffusers'."""
    scheduler.set_timesteps(S)
    x, generator = gaussian(7, *SHAPE, dtype=dtype), seeded(8)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model(x, t), t, x, generator=generator, **step_arguments).prev_sample
    return x


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind, loop", LOOPS, ids=str)
def test_loops_equal_diffusers(kind, loop, clip):
    """A whole chain with the same noise leads to the same samples."""
    cls, constructor, ours_step, peer_step = KINDS[kind]
    spacing, S, dtype = loop
    for prediction_type in PREDICTIONS:
        arguments = dict(prediction_type=prediction_type, clip_sample=clip, **constructor)
        ours, peer = ours_and_peer(cls, timestep_spacing=spacing, **arguments)
        actual = sample_with(ours, S, dtype, **ours_step)
        expected = sample_with(peer, S, dtype, **peer_step)
        scale = max(1.0, expected.abs().max().item())
        assert_close(actual, expected, atol=LOOP_TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_loops_equal_stock_diffusers(prediction_type):
    """A user who changes from diffusers to this scheduler gets the same picture in float32."""
    for cls, flags in [(DDPMScheduler, {}), (DDIMScheduler, {"use_clipped_model_output": True})]:
        arguments = dict(prediction_type=prediction_type, timestep_spacing="leading")
        ours, peer = ours_and_peer(cls, stock=True, **arguments)
        # Their tables' 6e-5 (see above) passes through an epsilon-model's first step, where
        # clipping hides it.
        assert_close(sample_with(ours, 50, F32), sample_with(peer, 50, F32, **flags), atol=2e-3)


@pytest.mark.parametrize(
    "spacing, S", [("linspace", 10), ("linspace", 7), ("trailing", 7), ("trailing", 30)]
)
def test_ddim_equals_diffusers_on_the_sub_schedule(spacing, S):
    """diffusers agrees on a schedule of S betas that has only these S uneven timesteps.

    On the schedule of all T betas it takes wrong previous timesteps.
    """
    flags = dict(eta=0.5, use_clipped_model_output=True)
    ours, peer = ours_and_peer(DDIMScheduler, timestep_spacing=spacing, eta_convention="std")
    actual, misled = (sample_with(scheduler, S, F64, **flags) for scheduler in (ours, peer))
    ts = ours.timesteps.tolist()[::-1]
    abar = ours.alphas_cumprod[ts]
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    peer = peer_of(DDIMScheduler, num_train_timesteps=S, trained_betas=betas.tolist())
    expected = sample_with(peer, S, F64, lambda x, i: toy_model(x, ts[i]), **flags)
    assert_close(actual, expected, atol=LOOP_TOLERANCE[F64])
    assert (misled - expected).abs().max() > 1e-3


# ==== 3. Promises for any input: shapes, dtypes, timesteps, randomness, purity, errors ============

INT_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
T = 100  # small tables: hypothesis makes many schedulers
STEPS = [  # every way to take a step: class, arguments of step
    (DDPMScheduler, {}),
    (DDIMScheduler, {}),
    (DDIMScheduler, {"eta": 0.5}),
    (DDIMScheduler, {"eta": 1.0, "use_clipped_model_output": False}),
]
NOISY_STEPS = [STEPS[0], *STEPS[2:]]

quick = examples(max_examples=60)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
prediction_types = st.sampled_from(PREDICTIONS)
timesteps = st.integers(0, T - 1)
seeds = st.integers(0, 2**31)
steps = st.sampled_from(STEPS)


def small(cls, **kwargs):
    return cls(T, beta_end=0.2, **kwargs)


@quick
@given(shapes, dtypes, dtypes, st.sampled_from(["add_noise", "get_velocity"]), seeds)
def test_forward_keeps_shape_dtype_and_precision(shape, dtype, noise_dtype, method, seed):
    """The result has x_0's shape and dtype, and is the float64 result to that dtype's precision."""
    scheduler = small(DDPMScheduler)
    forward = getattr(scheduler, method)
    x0, noise = gaussian(seed, *shape, dtype=dtype), gaussian(seed + 1, *shape, dtype=noise_dtype)
    t = torch.randint(0, T, shape[:1], generator=seeded(seed))
    expected = forward(x0.double(), noise.to(dtype).double(), t)
    actual = forward(x0, noise, t)
    assert actual.shape == x0.shape and actual.dtype == dtype
    # The coefficient, the product and the sum are each rounded: 3 halves of eps, on terms below max
    # + max, and float16 has no more than 6e-8 of resolution near 0.
    atol = 1.5 * torch.finfo(dtype).eps * (x0.abs().max() + noise.abs().max()).item() + 1.2e-7
    assert_close(actual.double(), expected, atol=atol if dtype != F64 else 0)
    # the coefficients are float64's, rounded once
    one, zero, t = torch.ones(T, dtype=dtype), torch.zeros(T, dtype=dtype), torch.arange(T)
    abar = scheduler.alphas_cumprod
    assert_close(scheduler.add_noise(one, zero, t), abar.sqrt().to(dtype))
    assert_close(scheduler.add_noise(zero, one, t), (1 - abar).sqrt().to(dtype))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("cls, arguments", STEPS)
@examples(max_examples=30)
@given(st.booleans(), shapes, dtypes, dtypes, timesteps, seeds)
def test_step_keeps_shape_dtype_and_precision(
    cls, arguments, prediction_type, clip, shape, dtype, output_dtype, t, seed
):
    """Both results have the sample's shape and dtype, and only the results are rounded to it.

    The network's output may have another dtype, as under autocast.
    """
    scheduler = small(cls, prediction_type=prediction_type, clip_sample=clip)
    output = gaussian(seed, *shape, dtype=output_dtype)
    x, z = (gaussian(seed + i, *shape, dtype=dtype) for i in (1, 2))
    results = scheduler.step(output, t, x, variance_noise=z, **arguments)
    output, x64, z = output.double(), x.double(), z.double()
    expected = scheduler.step(output, t, x64, variance_noise=z, **arguments)
    # The arithmetic is float32's (float64's): ten roundings of terms below 8 / sqrt(abar_t), an
    # epsilon-model's amplification. Then comes half of the dtype's own eps, relative to the result.
    arithmetic = torch.finfo(torch.promote_types(dtype, F32)).eps
    abar = abar_at(scheduler, t) if prediction_type == "epsilon" else 1.0
    atol = 10 * 8 * arithmetic / math.sqrt(abar) + torch.finfo(dtype).smallest_normal
    for result, reference in zip(results, expected, strict=True):
        assert result.shape == x.shape and result.dtype == dtype
        assert_close(result.double(), reference, rtol=0.51 * torch.finfo(dtype).eps, atol=atol)


@quick
@given(shapes, st.sampled_from(INT_DTYPES), timesteps, seeds)
def test_every_form_of_a_timestep_means_the_same(shape, int_dtype, t, seed):
    """An int, a 0-d, a (1,) and a (B,) tensor give one result; a step takes the first two."""
    scheduler = small(DDPMScheduler)
    x0, noise = gaussian(seed, *shape), gaussian(seed + 1, *shape)
    each = torch.randint(0, T, shape[:1], generator=seeded(seed))  # one timestep for each sample
    for method in (scheduler.add_noise, scheduler.get_velocity):
        expected = method(x0, noise, t)
        for size in ((), (1,), shape[:1]):
            assert_close(method(x0, noise, torch.full(size, t, dtype=int_dtype)), expected)
        alone = [method(x[None], n[None], int(i)) for x, n, i in zip(x0, noise, each, strict=True)]
        assert_close(method(x0, noise, each.to(int_dtype)), torch.cat(alone))
    for cls, arguments in STEPS:
        step = functools.partial(small(cls).step, variance_noise=noise, **arguments)
        assert_close(step(noise, torch.tensor(t, dtype=int_dtype), x0), step(noise, t, x0))


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (0,), ()], ids=str)
def test_empty_batches_and_single_numbers_pass(shape):
    """A batch may be empty, and a sample may have no dimension."""
    x, t = torch.zeros(shape), torch.zeros(shape[:1], dtype=torch.int64)
    assert small(DDPMScheduler).add_noise(x, x, t).shape == shape
    for cls, arguments in STEPS:
        assert small(cls).step(x, 5, x, **arguments).prev_sample.shape == shape


@quick
@given(shapes, st.permutations(range(5)), steps, seeds)
def test_memory_layout_does_not_matter(shape, order, step, seed):
    """Transposed inputs, channels_last too, give the values that contiguous ones give."""
    cls, arguments = step
    scheduler, shape = small(cls), [*shape, *[2] * (5 - len(shape))]
    inputs = [gaussian(seed + i, *shape) for i in range(3)]
    back = torch.tensor(order).argsort().tolist()
    strided = [x.permute(order).contiguous().permute(back) for x in inputs]
    expected, actual = (
        scheduler.step(output, 50, x, variance_noise=z, **arguments).prev_sample
        for output, x, z in (inputs, strided)
    )
    assert_close(actual, expected)


def test_results_are_on_the_device_of_the_samples():
    """The device "meta", which holds no data, takes the place of an accelerator."""
    cpu, meta, t = torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), torch.tensor([9])
    for cls, arguments in NOISY_STEPS:
        scheduler = small(cls)
        for kwargs in ({"timesteps": [50]}, {"num_inference_steps": 10}):
            scheduler.set_timesteps(device="meta", **kwargs)
            assert scheduler.timesteps.is_meta
        for x, each in [(cpu, 9), (cpu, t), (meta, 9), (meta, t), (meta, t.to("meta"))]:
            assert scheduler.add_noise(x, x, each).device == x.device
            assert scheduler.get_velocity(x, x, each).device == x.device
        for noise in ({}, {"generator": seeded(0)}, {"variance_noise": cpu}):
            results = scheduler.step(meta, 99, meta, **arguments, **noise)
            assert all(result.is_meta for result in results)


@quick
@given(prediction_types, st.sampled_from(BETA_SCHEDULES), timesteps, st.floats(0.1, 3), seeds)
def test_the_true_output_leads_back_to_x0(prediction_type, beta_schedule, t, clip_range, seed):
    """After add_noise, a step with the true eps, v or x_0 predicts x_0, clipped if clip_sample."""
    x0, noise = 2 * gaussian(seed, 4, 5), gaussian(seed + 1, 4, 5)
    clipping = [(dict(clip_sample=False), math.inf), ({}, 1.0)]
    clipping.append((dict(clip_sample_range=clip_range), clip_range))
    for cls, (kwargs, limit) in product(BOTH, clipping):
        scheduler = cls(T, 1e-3, 0.2, beta_schedule, prediction_type=prediction_type, **kwargs)
        v = scheduler.get_velocity(x0, noise, t)
        output = {"epsilon": noise, "v_prediction": v, "sample": x0}[prediction_type]
        actual = scheduler.step(output, t, scheduler.add_noise(x0, noise, t)).pred_original_sample
        # eps: rounding x_t, 2^-53, is divided by sqrt(abar_T), 5e-4 for cosine with 100 steps
        assert_close(actual, x0.clamp(-limit, limit), atol=1e-11)


CONFIGS = [
    {},
    dict(num_train_timesteps=30, beta_start=0.01, beta_end=0.3, beta_schedule="scaled_linear"),
    dict(beta_schedule="cosine", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    dict(trained_betas=[0.1, 0.2, 0.3], prediction_type="sample", timestep_spacing="leading"),
    dict(trained_betas=[0.1, 1.0], prediction_type="sample", rescale_betas_zero_snr=True),
    dict(variance_type="fixed_large", clip_sample=False, timestep_spacing="linspace"),
    dict(clip_sample_range=2.5, beta_schedule="sigmoid"),
]


@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
def test_config_makes_a_twin_through_json(kwargs):
    """config has the constructor's arguments and survives JSON; the twin takes the same step."""
    x, output, z = (gaussian(i, 2, 3) for i in range(3))
    for cls, extra in [(DDPMScheduler, {}), (DDIMScheduler, {"eta_convention": "std"})]:
        scheduler = cls(**kwargs, **extra)
        twin = cls(**json.loads(json.dumps(scheduler.config)))
        assert twin.config == scheduler.config == scheduler.config | kwargs | extra
        assert_close(twin.betas, scheduler.betas)
        assert_close(twin.alphas_cumprod, scheduler.alphas_cumprod)
        scheduler.set_timesteps(2)
        twin.set_timesteps(2)
        t, arguments = scheduler.timesteps[0], {"eta": 0.3} if extra else {}
        expected = scheduler.step(output, t, x, variance_noise=z, **arguments)
        assert_close(twin.step(output, t, x, variance_noise=z, **arguments), expected)


def test_config_and_defaults():
    """config names every argument, and the defaults are those that checkpoints rely on."""
    expected = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    expected |= dict(beta_schedule="linear", trained_betas=None, rescale_betas_zero_snr=False)
    expected |= dict(prediction_type="epsilon", variance_type="fixed_small")
    expected |= dict(clip_sample=True, clip_sample_range=1.0, timestep_spacing="trailing")
    assert DDPMScheduler().config == expected
    assert DDIMScheduler().config == {**expected, "eta_convention": "variance"}


@pytest.mark.parametrize("T", [(), (3,)], ids=["T left out", "T given"])
def test_trained_betas_are_the_tables(T):
    """The betas are a list or a tensor of any float dtype, and their number is T."""
    betas = [0.1, 0.2, 0.5]
    for given_betas in (betas, torch.tensor(betas, dtype=F64)):
        scheduler = DDPMScheduler(*T, trained_betas=given_betas)
        assert scheduler.num_train_timesteps == 3
        assert scheduler.betas.tolist() == scheduler.config["trained_betas"] == betas
        assert scheduler.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.36], rel=1e-15)
    in_float32 = torch.tensor(betas, dtype=F32)
    assert_close(DDPMScheduler(*T, trained_betas=in_float32).betas, in_float32.double())


def assert_timesteps(scheduler, expected):
    """Each timestep leads to the next one in the list, and the last one to -1, the clean image."""
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.timesteps.dtype == torch.int64
    assert [scheduler.previous_timestep(t) for t in expected] == [*expected[1:], -1]


@pytest.mark.parametrize("num_train", [1000, 997, 361, 37, 7, 3, 2, 1])
def test_exactly_S_strictly_descending_timesteps_in_range(num_train):
    """For every spacing and every S in 1..T, set_timesteps gives S descending timesteps."""
    for spacing in TIMESTEP_SPACINGS:
        scheduler = DDIMScheduler(num_train, timestep_spacing=spacing)
        for S in range(1, num_train + 1):
            scheduler.set_timesteps(S)
            ts = scheduler.timesteps.tolist()
            assert len(ts) == S
            assert ts[0] < num_train and ts[-1] >= 0
            assert all(a > b for a, b in pairwise(ts))
            if spacing == "trailing" or (spacing == "linspace" and S > 1):
                assert ts[0] == num_train - 1  # sampling starts from pure noise
            if spacing in ("leading", "linspace"):
                assert ts[-1] == 0
            if num_train < 500 or S in (1, 2, 7, 30, 61, 300, 999, 1000):
                assert_timesteps(scheduler, ts)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_given_timesteps_are_taken_as_they_are(form):
    """Any strictly descending list, tuple or tensor will do; at first there are all T timesteps."""
    scheduler, everything = small(DDIMScheduler), list(range(T - 1, -1, -1))
    assert_timesteps(scheduler, everything)
    for ts in ([99, 40, 7, 0], [99], [0], everything):
        scheduler.set_timesteps(timesteps=form(ts))
        assert_timesteps(scheduler, ts)


def noise_of(scheduler, t, x, arguments, **kwargs):
    """Take a step with an output of zeros: the result depends on x and the noise only."""
    return scheduler.step(torch.zeros_like(x), t, x, **arguments, **kwargs).prev_sample


@quick
@given(st.sampled_from(NOISY_STEPS), dtypes, seeds)
def test_the_same_generator_gives_the_same_noise(step, dtype, seed):
    """Only the generator's seed decides the noise; without a generator, torch.manual_seed does."""
    cls, arguments = step
    scheduler, x = small(cls), gaussian(0, 2, 3, dtype=dtype)
    state = torch.get_rng_state()
    first, again, other = (
        noise_of(scheduler, 50, x, arguments, generator=seeded(s)) for s in (seed, seed, seed + 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is as it was
    # the noise is one randn of the sample's shape, in the dtype of the arithmetic
    z = torch.randn(2, 3, generator=seeded(seed), dtype=torch.promote_types(dtype, F32))
    assert torch.equal(noise_of(scheduler, 50, x, arguments, variance_noise=z), first)
    torch.manual_seed(seed)
    assert torch.equal(noise_of(scheduler, 50, x, arguments), first)
    assert not torch.equal(noise_of(scheduler, 50, x, arguments), first)


def test_steps_without_noise_draw_none():
    """eta = 0, the default, and every last step leave the generator alone and ignore a noise."""
    x, output, generator = gaussian(0, 2, 3), gaussian(1, 2, 3), seeded(0)
    state, z = generator.get_state(), torch.full_like(x, 1e6)
    cases = [(small(DDPMScheduler, variance_type=v), 0, {}) for v in VARIANCE_TYPES]
    for t, arguments in [(50, {}), (50, {"eta": 0.0}), (0, {"eta": 1.0})]:
        cases.append((small(DDIMScheduler), t, arguments))
    for scheduler, t, arguments in cases:
        result = scheduler.step(output, t, x, generator=generator, **arguments).prev_sample
        assert torch.equal(generator.get_state(), state)
        other = scheduler.step(output, t, x, variance_noise=z, **arguments).prev_sample
        assert torch.equal(result, other)


@quick
@given(steps, dtypes, prediction_types, st.booleans(), st.sampled_from([0, 50]))
def test_inputs_and_tables_are_never_modified(step, dtype, prediction_type, clip, t):
    """Results share no memory with inputs, with tables or with each other."""
    cls, arguments = step
    scheduler = small(cls, prediction_type=prediction_type, clip_sample=clip)
    output, x, z = (3 * gaussian(i, 2, 3, dtype=dtype) for i in range(3))
    index = torch.tensor([t, t])
    tables = [scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod]
    inputs = [output, x, z, index, *tables]
    before = [each.clone() for each in inputs]
    results = [
        *scheduler.step(output, t, x, variance_noise=z, **arguments),
        scheduler.add_noise(x, z, index),
        scheduler.add_noise(x, z, t),
        scheduler.get_velocity(x, z, index),
    ]
    copies = [each.clone() for each in results]
    for i, result in enumerate(results):
        result.fill_(7)
        assert_close(results[i + 1 :], copies[i + 1 :])
    assert_close(inputs, before)
    assert_close(scheduler.add_noise(x, z, index), copies[2])


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("cls, arguments", STEPS)
def test_gradients_flow_through_a_step(cls, arguments, prediction_type):
    """Autograd's derivatives of both results are the numerical ones; guidance needs them."""
    output, x, z = (gaussian(i, 2, 3) for i in range(3))
    inputs = (output.requires_grad_(), x.requires_grad_())
    # gradcheck's own tolerances; its differences of 1e-6 stay clear of the clip's kinks for these
    # seeds
    for clip, t in product([False, True], [0, 50, 99]):
        scheduler = small(cls, prediction_type=prediction_type, clip_sample=clip)
        step = functools.partial(scheduler.step, timestep=t, variance_noise=z, **arguments)
        assert all(result.requires_grad for result in step(output, sample=x))  # else not checked
        assert torch.autograd.gradcheck(lambda o, x, step=step: tuple(step(o, sample=x)), inputs)


def test_gradients_flow_through_the_forward_process():
    """add_noise and get_velocity have derivatives by x_0 and by the noise."""
    scheduler, t = small(DDPMScheduler), torch.tensor([3, 70])
    inputs = (gaussian(0, 2, 3).requires_grad_(), gaussian(1, 2, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda x0, noise: scheduler.add_noise(x0, noise, t), inputs)
    assert torch.autograd.gradcheck(lambda x0, noise: scheduler.get_velocity(x0, noise, t), inputs)


@pytest.mark.parametrize("t", [5, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 6])])
def test_training_works_after_inference_mode(t):
    """Autograd accepts tables that were cached under inference_mode."""
    scheduler, x = small(DDPMScheduler), gaussian(0, 2, 3)
    with torch.inference_mode():
        scheduler.add_noise(x, x, t)
    leaf = x.clone().requires_grad_()
    scheduler.add_noise(leaf, x, t).sum().backward()
    assert leaf.grad is not None


X, INDEX = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
NAN, INF = math.nan, math.inf
TWO_NOISES = {"variance_noise": X, "generator": seeded(0)}
CHOICES = dict(beta_schedule=BETA_SCHEDULES, prediction_type=PREDICTIONS)
CHOICES |= dict(variance_type=VARIANCE_TYPES, timestep_spacing=TIMESTEP_SPACINGS)
CHOICES |= dict(eta_convention=ETA_CONVENTIONS)


def making(*args, cls=DDPMScheduler, **kwargs):
    return lambda: cls(*args, **kwargs)


def choosing(*args, **kwargs):
    return lambda: small(DDPMScheduler).set_timesteps(*args, **kwargs)


def noising(x=X, noise=X, t=INDEX, method="add_noise"):
    return lambda: getattr(small(DDPMScheduler), method)(x, noise, t)


def stepping(output=X, t=50, x=X, cls=DDPMScheduler, S=T, **kwargs):
    def call():
        scheduler = small(cls)
        scheduler.set_timesteps(S)
        scheduler.step(output, t, x, **kwargs)

    return call


zero_snr = functools.partial(making, rescale_betas_zero_snr=True)
# The call, and words of its message: what is wrong, the values allowed, the value given.
ERRORS = [
    (making(cls=DDIMScheduler, **{name: given}), " | ".join([name, *allowed, repr(given)]))
    for (name, allowed), given in product(CHOICES.items(), ["quad", None])
]
ERRORS += [
    (lambda: make_betas("quad", 5, 0.1, 0.2), " | ".join([*BETA_SCHEDULES, "'quad'"])),
    (making(trained_betas=[0.1], beta_schedule="quad"), "beta_schedule | 'quad'"),
    *[(making(n), f"num_train_timesteps | int | {n!r}") for n in (0, -5, 10.0, True, "1000")],
    (making(5, 0.0, 0.5), "beta | (0, 1) | [0, 0.5]"),
    (making(5, 0.1, 1.0), "beta | (0, 1) | [0.1, 1]"),
    (making(5, 0.1, 1.5), "beta | (0, 1) | [0.1, 1.5]"),
    (making(5, -0.1, 0.5), "beta | (0, 1) | [-0.1, 0.5]"),
    (making(5, NAN, 0.5), "beta | (0, 1) | nan"),
    (making(5, 0.0, 0.5, "scaled_linear"), "beta | (0, 1) | [0, 0.5]"),
    (making(5, -0.1, 0.5, "scaled_linear"), "beta | (0, 1) | -0.1"),
    (making(5, 0.1, 1.5, "sigmoid"), "beta | (0, 1) | 1.49"),
    (making(trained_betas=[0.1, 0.0]), "beta | (0, 1) | [0, 0.1]"),
    (making(trained_betas=[1e-18, 0.1]), "beta | (0, 1) | 1e-18"),  # 1 - 1e-18 is 1 in float64
    (making(trained_betas=[0.1, 1.0]), "beta | (0, 1) | [0.1, 1]"),
    (making(trained_betas=[0.1, NAN]), "beta | (0, 1) | nan"),
    (making(5, trained_betas=[0.1, 0.2]), "trained_betas | 5 | 2 values"),
    (making(trained_betas=[]), "num_train_timesteps | >= 1 | 0"),
    (making(trained_betas=[[0.1], [0.2]]), "trained_betas | (T,) | (2, 1)"),
    (making(trained_betas=0.1), "trained_betas | (T,) | ()"),
    (making(1000, 0.9, 0.9, prediction_type="sample"), "betas | abar | 0 | last timestep"),
    *[(making(clip_sample_range=x), f"clip_sample_range | > 0 | {x}") for x in (0, -1.0, NAN)],
    (zero_snr(), "'epsilon' | 'v_prediction' | 'sample'"),
    (zero_snr(1, prediction_type="sample"), "rescale_betas_zero_snr | >= 2 | 1"),
    (zero_snr(trained_betas=[0.1, 1.5], prediction_type="sample"), "beta | (0, 1) | [0.1, 1.5]"),
    *[(choosing(n), f"num_inference_steps | [1, 100] | {n}") for n in (101, 0, -3, 10.0, True)],
    (choosing(2, timesteps=[3, 1]), "one of | num_inference_steps | timesteps"),
    (choosing(), "one of | num_inference_steps | timesteps"),
    *[(choosing(timesteps=ts), f"strictly descending | {ts}") for ts in ([1, 3], [3, 3])],
    *[(choosing(timesteps=ts), f"[0, 100) | {ts}") for ts in ([100, 3], [3, -1])],
    *[(choosing(timesteps=ts), f"list of ints | {ts}") for ts in ([], [3.0, 1.0], [[3], [1]], 3)],
    (noising(noise=X[:2]), "noise | (2, 1, 2, 2) | (4, 1, 2, 2)"),
    (noising(noise=X[:1]), "noise | (1, 1, 2, 2) | (4, 1, 2, 2)"),
    (noising(noise=X[:2], method="get_velocity"), "noise | (2, 1, 2, 2) | (4, 1, 2, 2)"),
    (noising(x=INDEX, noise=INDEX), "floats | int64"),
    (noising(t=INDEX[:3]), "timesteps | (1,) | (4,) | (3,)"),
    (noising(t=INDEX[:, None]), "timesteps | (1,) | (4,) | (4, 1)"),
    *[(noising(t=t), "timesteps | integers | float32") for t in (3.0, INDEX.float())],
    (noising(t=INDEX.bool()), "timesteps | integers | bool"),
    *[(noising(t=t), "timesteps | [0, 100) | 100") for t in (100, INDEX + 100)],
    *[(noising(t=t), "timesteps | [0, 100) | -1") for t in (-1, INDEX - 1)],
    (noising(t=INDEX + 100, method="get_velocity"), "timesteps | [0, 100) | 100"),
    *[(stepping(t=t), f"timestep {t} | 100 timesteps") for t in (100, -1, 50.5)],
    (stepping(S=10), "timestep 50 | 10 timesteps | 99, 89, 79, ..., 9"),
    *[(stepping(cls=c, S=2), "timestep 50 | 2 timesteps | 99, 49: see") for c in BOTH],
    (stepping(X[:2]), "model_output | (2, 1, 2, 2) | (4, 1, 2, 2)"),
    (stepping(X.reshape(1, 4, 2, 2)), "model_output | (1, 4, 2, 2) | (4, 1, 2, 2)"),
    (stepping(X[:, :, :1]), "model_output | (4, 1, 1, 2) | (4, 1, 2, 2)"),
    (stepping(X[:2], cls=DDIMScheduler), "model_output | (2, 1, 2, 2) | (4, 1, 2, 2)"),
    (stepping(variance_noise=X[:1]), "variance_noise | (1, 1, 2, 2) | (4, 1, 2, 2)"),
    *[(stepping(cls=c, **TWO_NOISES), "one of | generator | variance_noise") for c in BOTH],
    *[(stepping(cls=DDIMScheduler, eta=e), f"eta | [0, 1] | {e}") for e in (-0.1, 1.01, NAN, INF)],
]


@pytest.mark.parametrize("call, words", ERRORS, ids=[words for _, words in ERRORS])
def test_errors_name_the_value_and_what_is_allowed(call, words):
    """The message of the ValueError is one sentence with the value given and those allowed."""
    with pytest.raises(ValueError) as info:
        call()
    assert type(info.value) is ValueError
    message = str(info.value)
    assert [word for word in words.split(" | ") if word not in message] == [], message
    assert "\n" not in message and not re.search(r"[.!?] +[A-Z]", message), "more than one sentence"
    assert len(message) < 200


def test_a_refused_call_changes_nothing():
    """After a refused set_timesteps the old timesteps are still in use."""
    scheduler = small(DDPMScheduler)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.tolist()
    for arguments in ({"num_inference_steps": T + 1}, {"timesteps": [1, 3]}, {"timesteps": [T]}):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(**arguments)
    assert_timesteps(scheduler, before)


# ---------------------------------------------------------------------- DPM-Solver++(2M)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(
    ("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)], ids=["ODE", "SDE"]
)
@pytest.mark.parametrize(("steps", "prediction_type"), paired([4, 10, 25], PREDICTIONS))
def test_dpm_solver_is_that_of_diffusers(algorithm, eta, steps, prediction_type):
    """A whole loop. diffusers keeps its tables in float32: relative errors of about 1e-6."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        algorithm_type=algorithm,
        solver_type="midpoint",
        final_sigmas_type="zero",
        euler_at_final=True,
        timestep_spacing="trailing",
    )
    ours = DPMSolverMultistepScheduler(
        beta_schedule="cosine", prediction_type=prediction_type, clip_sample=False
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = y = gaussian(0, 2, 3)
    for k, t in enumerate(ours.timesteps.tolist()):
        z = gaussian(k + 1, 2, 3)
        x = ours.step(toy_model(x, t), t, x, eta=eta, variance_noise=z).prev_sample
        y = theirs.step(toy_model(y, t), t, y, variance_noise=z).prev_sample
        assert_close(x, y, atol=2e-5 * y.abs().max().item())


def gaussian_ode_error(cls, steps: int, m: float = 0.3, s: float = 0.5) -> float:
    """Return the error of the ODE's solution at t = 50 from t = 900, for data from N(m, s^2).

    Its exact solution keeps (x_t - sqrt(abar) m) / sqrt(abar s^2 + 1 - abar).
    """
    scheduler = cls(beta_schedule="cosine", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(timesteps=[round(900 - i * 850 / steps) for i in range(steps + 1)])
    first, *_, last = timesteps = scheduler.timesteps.tolist()
    start = x = torch.tensor([1.7], dtype=F64)
    for t in timesteps[:-1]:
        a = abar_at(scheduler, t)
        denoised = m + s**2 * math.sqrt(a) / (a * s**2 + 1 - a) * (x - math.sqrt(a) * m)
        x = scheduler.step(denoised, t, x).prev_sample
    a, b = abar_at(scheduler, first), abar_at(scheduler, last)
    scale = math.sqrt((b * s**2 + 1 - b) / (a * s**2 + 1 - a))
    exact = math.sqrt(b) * m + scale * (start - math.sqrt(a) * m)
    return (x - exact).abs().item()


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    """Twice as many steps divide the error by 4, and by 2."""
    for cls, wanted in ((DPMSolverMultistepScheduler, 4), (DDIMScheduler, 2)):
        errors = [gaussian_ode_error(cls, steps) for steps in (20, 40, 80, 160)]
        ratios = [a / b for a, b in pairwise(errors)]
        assert ratios == pytest.approx([wanted] * 3, rel=0.06)
    assert gaussian_ode_error(DPMSolverMultistepScheduler, 20) < 0.25 * gaussian_ode_error(
        DDIMScheduler, 20
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("convention", ETA_CONVENTIONS)
def test_dpm_solver_without_the_extrapolation_is_ddim(eta, convention):
    """If x_0 is predicted the same at every step there is nothing to extrapolate."""
    config = {
        "prediction_type": "sample",
        "eta_convention": convention,
        "timestep_spacing": "linspace",
    }
    ours, ddim = DPMSolverMultistepScheduler(**config), DDIMScheduler(**config)
    x = y = gaussian(0, 2, 3)
    output = 0.5 * torch.ones(2, 3, dtype=F64)
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(6)
    for k, t in enumerate(ours.timesteps.tolist()):
        z = gaussian(k + 1, 2, 3)
        x = ours.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        y = ddim.step(output, t, y, eta=eta, variance_noise=z).prev_sample
        assert torch.equal(x, y)


def test_dpm_solver_extrapolates_neither_first_nor_last_nor_across_loops():
    """The first step has no earlier prediction, and the step to the clean image returns x_0."""
    config = {"prediction_type": "sample", "clip_sample": False}
    ours, ddim = DPMSolverMultistepScheduler(**config), DDIMScheduler(**config)
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(timesteps=[900, 500, 100])
    for loop in range(2):  # the second one does not remember the first
        x = gaussian(loop, 2, 3)
        outputs = [gaussian(10 + 3 * loop + k, 2, 3) for k in range(3)]
        first = ours.step(outputs[0], 900, x)
        assert torch.equal(first.prev_sample, ddim.step(outputs[0], 900, x).prev_sample)
        second = ours.step(outputs[1], 500, x)
        assert not torch.equal(second.prev_sample, ddim.step(outputs[1], 500, x).prev_sample)
        assert torch.equal(second.pred_original_sample, outputs[1])
        assert torch.equal(ours.step(outputs[2], 100, x).prev_sample, outputs[2])


def test_dpm_solver_starts_from_zero_terminal_snr():
    """There lambda is minus infinity: the second step, too, is DDIM's."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ours, ddim = DPMSolverMultistepScheduler(**config), DDIMScheduler(**config)
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(4)
    x = y = gaussian(0, 2, 3)
    for t in ours.timesteps.tolist()[:2]:
        x = ours.step(toy_model(x, t), t, x).prev_sample
        y = ddim.step(toy_model(y, t), t, y).prev_sample
        assert torch.equal(x, y)


# ---------------------------------------------------------------------- as a library beside others


def test_arrays_and_numbers_of_numpy_are_accepted():
    """Negative strides, too, which torch refuses."""
    betas = np.linspace(0.3, 0.1, 10)[::-1]
    scheduler = DDIMScheduler(np.int64(10), trained_betas=betas)
    assert scheduler.config["trained_betas"] == betas.tolist()
    assert json.loads(json.dumps(scheduler.config)) == scheduler.config
    scheduler.set_timesteps(np.int32(4))
    assert len(scheduler.timesteps) == 4
    scheduler.set_timesteps(timesteps=np.arange(10)[::-3])
    assert scheduler.timesteps.tolist() == [9, 6, 3, 0]
    x = torch.ones(4, 2)
    wanted = scheduler.add_noise(x, x, torch.tensor([9, 6, 3, 0]))
    assert torch.equal(scheduler.add_noise(x, x, np.arange(10)[::-3]), wanted)
    step = scheduler.step(x, 6, x)
    for t in (np.int64(6), np.array(6), torch.tensor(6)):
        assert torch.equal(scheduler.step(x, t, x).prev_sample, step.prev_sample)


@pytest.mark.parametrize(
    ("output", "t", "sample", "words"),
    [
        (torch.ones(2, 3), torch.tensor([5, 5]), torch.ones(2, 3), "one timestep, not an array"),
        (torch.ones(2, 3), torch.tensor([5]), torch.ones(2, 3), "one timestep, not an array"),
        (torch.ones(2, 3), np.array([5, 5]), torch.ones(2, 3), "one timestep, not an array"),
        (torch.ones(2, 3), 5, torch.ones(2, 3, dtype=torch.uint8), "sample must be floats"),
        (torch.ones(2, 3).long(), 5, torch.ones(2, 3), "model_output must be floats"),
    ],
)
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_steps_of_several_timesteps_or_of_integers_are_refused(cls, output, t, sample, words):
    with pytest.raises(ValueError, match=words):
        cls().step(output, t, sample)


def test_what_a_loop_for_diffusers_touches():
    scheduler = DDIMScheduler(beta_schedule="cosine")
    assert scheduler.num_inference_steps is None
    scheduler.set_timesteps(7)
    x = torch.randn(2, 3)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(x, 5) is x
    assert scheduler.config.num_train_timesteps == len(scheduler) == 1000
    assert scheduler.num_inference_steps == 7
    with pytest.raises(AttributeError, match="no 'colour'"):
        _ = scheduler.config.colour


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_from_config_takes_diffusers_and_leaves_out_what_it_does_not_know(name):
    theirs = getattr(diffusers, name)(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample_range=2.0
    )
    ours = {"DDIMScheduler": DDIMScheduler, "DDPMScheduler": DDPMScheduler}[name]
    scheduler = ours.from_config(theirs.config, timestep_spacing="linspace")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.clip_sample_range == 2.0
    assert scheduler.config.timestep_spacing == "linspace"
    torch.testing.assert_close(
        scheduler.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-7
    )
    assert ours.from_config(DDIMScheduler(eta_convention="std").config).num_train_timesteps == 1000


def test_variance_noise_may_be_a_function_that_is_called_only_where_noise_is_added():
    x, z = torch.randn(2, 3), torch.randn(2, 3)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(timesteps=[500, 100])
    wanted = scheduler.step(x, 500, x, eta=0.5, variance_noise=z)
    given = scheduler.step(x, 500, x, eta=0.5, variance_noise=lambda: z)
    assert torch.equal(given.prev_sample, wanted.prev_sample)

    def never():
        raise AssertionError

    scheduler.step(x, 500, x, eta=0.0, variance_noise=never)
    scheduler.step(x, 100, x, eta=1.0, variance_noise=never)  # the last step adds none
    with pytest.raises(ValueError, match="not both"):
        scheduler.step(x, 500, x, variance_noise=never, generator=torch.Generator())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample", [True, False])
def test_original_sample_of_every_image_is_that_of_its_own_step(prediction_type, clip_sample):
    """`get_original_sample` takes a timestep per image; `step` takes one for all."""
    scheduler = DDPMScheduler(
        beta_schedule="cosine",
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        clip_sample_range=1.25,
    )
    x_t, output = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 300, 700, 990])
    x0 = scheduler.get_original_sample(output, x_t, t)
    for i in range(4):
        wanted = scheduler.step(output[i : i + 1], t[i], x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(x0[i : i + 1], wanted, rtol=1e-12, atol=1e-12)
    assert (x0.abs() <= 1.25).all() == clip_sample or prediction_type == "sample"
    with pytest.raises(ValueError, match="timesteps must lie in"):
        scheduler.get_original_sample(output, x_t, torch.tensor([0, 1, 2, 1000]))
    with pytest.raises(ValueError, match="model_output has shape"):
        scheduler.get_original_sample(output[:, :, 1:], x_t, t)


def test_the_longest_schedule_of_epsilon_stays_within_float32():
    """1 / sqrt(abar_T) must be a float32: linear betas reach its end at about 17,500 timesteps."""
    scheduler = DDIMScheduler(17_000, beta_schedule="linear", prediction_type="epsilon")
    scheduler.set_timesteps(2)
    x = torch.ones(1, 1, 2, 2)
    assert torch.isfinite(scheduler.step(x, 16_999, x).pred_original_sample).all()
    with pytest.raises(ValueError, match="abar_T = "):
        DDIMScheduler(18_000, beta_schedule="linear", prediction_type="epsilon")
    DDIMScheduler(18_000, beta_schedule="linear", prediction_type="v_prediction")
