"""scheduler.py held against the probability theory it implements, in float64, without a peer.

A step is affine in what goes in: x_{t-k} = a x_0 + b x_t + s z, where x_0 is what the network
predicts and z is the noise. `coefficients` reads a, b and s off the scheduler, and most claims are
then algebra on them: exact to rounding, with no sampling. Unless a test says otherwise, its
tolerance of 1e-12 is 2^-53 times the largest number of roundings involved, about 1000 (the product
that makes abar).
"""

import functools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import DDIMScheduler, DDPMScheduler

SCHEDULES = {
    "linear": dict(beta_schedule="linear"),
    "scaled_linear": dict(beta_schedule="scaled_linear"),
    "cosine": dict(beta_schedule="cosine"),
    "sigmoid": dict(beta_schedule="sigmoid"),
    "zero_snr": dict(beta_schedule="linear", rescale_betas_zero_snr=True),
}
F64 = torch.float64


@functools.cache  # tables of 1000 are made once, not once per hypothesis example
def make(cls, schedule, prediction_type="sample", **kwargs):
    kwargs = {"clip_sample": False, **kwargs}
    return cls(**SCHEDULES[schedule], prediction_type=prediction_type, **kwargs)


def coefficients(scheduler, t, **step_arguments):
    """(a, b, s) of x_{t-k} = a x_0 + b x_t + s z, by a step on unit vectors."""
    assert scheduler.prediction_type == "sample" and not scheduler.config["clip_sample"]
    x0, x_t, z = torch.eye(3, dtype=F64)
    return scheduler.step(x0, t, x_t, variance_noise=z, **step_arguments).prev_sample.tolist()


def abar_at(scheduler, t):
    return 1.0 if t < 0 else scheduler.alphas_cumprod[t].item()


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_kernels_compose_to_the_jump(schedule):
    """Chaining N(sqrt(alpha_t) x, beta_t) gives add_noise's mean and variance at every t."""
    scheduler = make(DDPMScheduler, schedule)
    mean, variance = 1.0, 0.0  # of x_t, for x_0 = 1
    zero, one = torch.zeros(1000, dtype=F64), torch.ones(1000, dtype=F64)
    signal = scheduler.add_noise(one, zero, torch.arange(1000)).tolist()
    sigma = scheduler.add_noise(zero, one, torch.arange(1000)).tolist()
    for t, beta in enumerate(scheduler.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert signal[t] == pytest.approx(mean, abs=1e-12)
        assert sigma[t] ** 2 == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_is_the_derivative_of_the_noise_angle(schedule):
    """v = d x / d phi on the circle x = cos(phi) x_0 + sin(phi) eps, where cos(phi)^2 = abar_t."""
    scheduler, t = make(DDPMScheduler, schedule), torch.tensor([0, 10, 500, 998, 999])
    x0, noise = gaussian(0, 5, 3), gaussian(1, 5, 3)
    phi = (
        torch.arccos(scheduler.alphas_cumprod[t].sqrt())[:, None]
        .expand(5, 3)
        .clone()
        .requires_grad_()
    )
    tangent = torch.autograd.grad((phi.cos() * x0 + phi.sin() * noise).sum(), phi)[0]
    # arccos near 1 multiplies its argument's 2^-53 by 1 / sin(phi), 150 at the start of cosine
    torch.testing.assert_close(scheduler.get_velocity(x0, noise, t), tangent, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- the DDPM posterior

JUMPS = [
    (0, -1),
    (1, 0),
    (10, 9),
    (500, 499),
    (999, 998),
    (999, 899),
    (500, 100),
    (50, 3),
    (999, 0),
]


@pytest.mark.parametrize("t, prev", JUMPS[1:])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_equals_brute_force_bayes(schedule, t, prev):
    """mu~ and beta~ against prior times likelihood on a grid of x_{t-k}: k = 1 and longer jumps.

    The prior is q(x_{t-k} | x_0), the likelihood q(x_t | x_{t-k}), both chained from one-step
    kernels here.
    """
    scheduler = make(DDPMScheduler, schedule)
    betas = scheduler.betas.tolist()
    scheduler.set_timesteps(timesteps=[t, prev])
    a, b, s = coefficients(scheduler, t)

    def chain(mean, variance, kernels):
        for beta in kernels:
            mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        return mean, variance

    for x0, offset in [(0.7, -1.0), (-0.3, 0.5), (1.0, 2.0)]:
        prior_mean, prior_var = chain(x0, 0.0, betas[: prev + 1])
        slope, likelihood_var = chain(1.0, 0.0, betas[prev + 1 : t + 1])
        x_t = slope * prior_mean + offset * math.sqrt(slope**2 * prior_var + likelihood_var)
        # The posterior's mean lies within 2 and its tails within 12 prior deviations. The grid's
        # step is a hundredth of the narrowest posterior's deviation: a sum over a Gaussian is then
        # exact to rounding.
        grid = prior_mean + math.sqrt(prior_var) * torch.linspace(-12, 12, 40_001, dtype=F64)
        log_p = -((grid - prior_mean) ** 2) / (2 * prior_var)
        log_p -= (x_t - slope * grid) ** 2 / (2 * likelihood_var)
        p = log_p.softmax(0)
        mean = (p * grid).sum().item()
        variance = (p * (grid - mean) ** 2).sum().item()
        assert a * x0 + b * x_t == pytest.approx(mean, abs=1e-10)  # 40,001 roundings: 1e-11
        assert s**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t, prev", JUMPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_large_adds_the_forward_kernels_variance(schedule, t, prev):
    """sigma^2 = beta of the jump, the mean is still mu~; the clean image gets no noise."""
    small = make(DDPMScheduler, schedule)
    large = make(DDPMScheduler, schedule, variance_type="fixed_large")
    for scheduler in (small, large):
        scheduler.set_timesteps(timesteps=[t, prev] if prev >= 0 else [t])
    variance = 0.0
    for beta in small.betas[prev + 1 : t + 1].tolist():
        variance = (1 - beta) * variance + beta
    a, b, s = coefficients(large, t)
    assert [a, b] == pytest.approx(coefficients(small, t)[:2], abs=1e-15)
    assert s**2 == pytest.approx(variance if prev >= 0 else 0.0, abs=1e-12)


@pytest.mark.parametrize("eta", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_last_step_returns_the_predicted_x0(schedule, eta):
    """x_0 itself, whatever the timestep it is reached from: a = 1, b = 0, and no noise."""
    scheduler = make(DDPMScheduler if eta is None else DDIMScheduler, schedule)
    arguments = {} if eta is None else {"eta": eta}
    for t in (0, 99, 999):
        scheduler.set_timesteps(timesteps=[t])
        assert coefficients(scheduler, t, **arguments) == [1.0, 0.0, 0.0]


# ----------------------------------------------------------------------- DDIM and the marginals

subsets = st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True).map(
    lambda ts: sorted(ts, reverse=True)
)


# derandomize: the same examples in every run, so that a failure is a change and not luck
@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), subsets, st.floats(0, 1), st.booleans())
def test_steps_with_the_true_x0_keep_the_marginals(schedule, timesteps, eta, is_variance):
    """x_t ~ q(x_t|x_0), stepped with the true x_0, is q(x_{t-k}|x_0): any timesteps, any eta.

    Of x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, the step a x_0 + b x_t + s z has the mean
    (a + b sqrt(abar_t)) x_0 and the variance b^2 (1 - abar_t) + s^2 (DDIM, lemma 1).
    """
    convention = "variance" if is_variance else "std"
    samplers = [
        (make(DDPMScheduler, schedule), {}),
        (make(DDIMScheduler, schedule, eta_convention=convention), {"eta": eta}),
        (
            make(DDIMScheduler, schedule, eta_convention=convention),
            {"eta": eta, "use_clipped_model_output": False},
        ),
    ]
    for scheduler, arguments in samplers:
        scheduler.set_timesteps(timesteps=timesteps)
        for t, prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
            a, b, s = coefficients(scheduler, t, **arguments)
            abar_t, abar_prev = abar_at(scheduler, t), abar_at(scheduler, prev)
            assert a + b * math.sqrt(abar_t) == pytest.approx(math.sqrt(abar_prev), abs=1e-12)
            assert b**2 * (1 - abar_t) + s**2 == pytest.approx(1 - abar_prev, abs=1e-12)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), subsets, st.floats(0, 1))
def test_eta_scales_beta_tilde(schedule, timesteps, eta):
    """sigma^2 = eta beta~ by "variance", the default, and eta^2 beta~ by "std"; beta~ is DDPM's.

    So the two agree at 0 and 1, and "variance" at eta is "std" at sqrt(eta) in all its
    coefficients.
    """
    default = make(DDIMScheduler, schedule)
    std = make(DDIMScheduler, schedule, eta_convention="std")
    posterior = make(DDPMScheduler, schedule)
    assert default.config["eta_convention"] == "variance"
    for scheduler in (default, std, posterior):
        scheduler.set_timesteps(timesteps=timesteps)
    for t in timesteps:
        beta_tilde = coefficients(posterior, t)[2] ** 2
        assert coefficients(default, t, eta=eta)[2] ** 2 == pytest.approx(
            eta * beta_tilde, abs=1e-15
        )
        assert coefficients(std, t, eta=eta)[2] ** 2 == pytest.approx(
            eta**2 * beta_tilde, abs=1e-15
        )
        for variance_eta, std_eta in [(0.0, 0.0), (1.0, 1.0), (eta, math.sqrt(eta))]:
            expected = coefficients(std, t, eta=std_eta)
            # sqrt(1 - abar_{t-k} - sigma^2) turns 2^-53 into 1e-8 where the difference is almost 0
            assert coefficients(default, t, eta=variance_eta) == pytest.approx(expected, abs=3e-8)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), subsets)
def test_ddim_at_eta_1_has_the_ddpm_posteriors_coefficients(schedule, timesteps):
    """Over any timesteps: DDIM section 4.1, "eta = 1 is DDPM"."""
    ddim, ddpm = make(DDIMScheduler, schedule), make(DDPMScheduler, schedule)
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(timesteps=timesteps)
    for t in timesteps:
        # b is the root of a difference that is almost 0 near zero SNR: there 2^-53 becomes 1e-8
        expected = coefficients(ddpm, t)
        assert coefficients(ddim, t, eta=1.0) == pytest.approx(expected, abs=3e-8)


def toy_model(x, t):
    """A smooth function of x and t, in place of a network."""
    return 1.5 * torch.tanh(0.8 * x + 0.1 * torch.sin(5 * x) - t / 2000)


@pytest.mark.parametrize("S", [1000, 50])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_at_eta_1_is_ddpm_along_the_chain(schedule, prediction_type, clip, S):
    """All T steps (and 50 of them) with the same noise give the same samples, clipped or not."""
    arguments = dict(prediction_type=prediction_type, clip_sample=clip)
    ddpm = make(DDPMScheduler, schedule, **arguments)
    ddim = make(DDIMScheduler, schedule, **arguments)
    ddpm.set_timesteps(S)
    ddim.set_timesteps(S)
    x = y = gaussian(0, 8)
    noise, largest = gaussian(1, 1000, 8), 1.0
    for t in ddpm.timesteps.tolist():
        x = ddpm.step(toy_model(x, t), t, x, variance_noise=noise[t]).prev_sample
        y = ddim.step(toy_model(y, t), t, y, eta=1.0, variance_noise=noise[t]).prev_sample
        largest = max(largest, x.abs().max().item())
    # an unclipped epsilon-model starts with x_0 = x_T / sqrt(abar_T), up to 20,000 times x_T
    torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * largest)


def test_ddim_at_eta_1_needs_the_clipped_eps():
    """use_clipped_model_output=True, our default, makes eta = 1 DDPM when x_0 is clipped."""
    ddpm, ddim = DDPMScheduler(), DDIMScheduler()
    x, output, noise = gaussian(0, 64), gaussian(1, 64), gaussian(2, 64)
    expected = ddpm.step(output, 500, x, variance_noise=noise).prev_sample
    default = ddim.step(output, 500, x, 1.0, variance_noise=noise).prev_sample
    unclipped_eps = ddim.step(output, 500, x, 1.0, False, variance_noise=noise).prev_sample
    torch.testing.assert_close(default, expected, rtol=0, atol=1e-12)
    assert (unclipped_eps - expected).abs().max() > 1e-3


# ------------------------------------------------------------------------------ parametrisations


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("t", [0, 1, 100, 500, 900, 999])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_eps_v_and_x0_of_one_denoiser_give_one_step(schedule, t, clip):
    """A denoiser's x_0, and the eps and v that follow from it, lead to one x_{t-1} and one x_0."""
    x_t, x0 = gaussian(0, 64), 1.2 * gaussian(1, 64)  # a third of these x_0 lie outside [-1, 1]
    noise = gaussian(2, 64)
    abar = make(DDPMScheduler, schedule).alphas_cumprod[t].item()
    eps = (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    v = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
    samplers = [
        (DDPMScheduler, {}),
        *[
            (DDIMScheduler, {"eta": eta, "use_clipped_model_output": use_clipped})
            for eta in (0.0, 0.4, 1.0)
            for use_clipped in (False, True)
        ],
    ]
    for cls, arguments in samplers:
        outputs = []
        for prediction_type, output in [("sample", x0), ("epsilon", eps), ("v_prediction", v)]:
            scheduler = make(cls, schedule, prediction_type, clip_sample=clip)
            scheduler.set_timesteps(1000)
            outputs.append(scheduler.step(output, t, x_t, variance_noise=noise, **arguments))
        for other in outputs[1:]:
            for actual, expected in zip(other, outputs[0], strict=True):
                # eps loses 2^-53 / sqrt(abar), at worst 1e-16 x 20,000 (cosine's end), when it is
                # turned into x_0, and eps itself is x_t / 0.006 at the start of cosine
                torch.testing.assert_close(actual, expected, rtol=0, atol=5e-11)


# -------------------------------------------------------------------------------- zero terminal SNR


@pytest.mark.parametrize("T", [2, 3, 50, 1000])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_snr_ends_at_zero_and_keeps_the_start(beta_schedule, T):
    """abar_T = 0 and beta_T = 1 exactly, abar_0 as before, abar still falls (Lin, algorithm 1)."""
    arguments = dict(beta_schedule=beta_schedule, prediction_type="v_prediction")
    plain = DDPMScheduler(T, **arguments)
    rescaled = DDPMScheduler(T, **arguments, rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[-1].item() == 0.0
    assert rescaled.betas[-1].item() == 1.0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(
        plain.alphas_cumprod[0].item(), rel=1e-12
    )
    assert (rescaled.alphas_cumprod.diff() < 0).all()
    assert ((rescaled.betas[:-1] > 0) & (rescaled.betas[:-1] < 1)).all()
    # sqrt(abar) is an affine function of what it was
    before, after = plain.alphas_cumprod.sqrt(), rescaled.alphas_cumprod.sqrt()
    expected = (before - before[-1]) * (before[0] / (before[0] - before[-1]))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("S", [1, 50, 1000])
def test_first_step_at_zero_snr(S):
    """From pure noise, x_0 = -v and eps = x_T: the step is the noised -v at the next level."""
    x_T, v, z = gaussian(0, 32), gaussian(1, 32), gaussian(2, 32)
    ddpm = make(DDPMScheduler, "zero_snr", "v_prediction")
    ddim = make(DDIMScheduler, "zero_snr", "v_prediction")
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
        torch.testing.assert_close(actual.pred_original_sample, -v, rtol=0, atol=0)
        torch.testing.assert_close(
            actual.prev_sample, sigma * noise - signal * v, rtol=0, atol=1e-12
        )
    x0 = gaussian(3, 32)
    torch.testing.assert_close(ddpm.add_noise(x0, z, 999), z, rtol=0, atol=0)
    torch.testing.assert_close(ddpm.get_velocity(x0, z, 999), -x0, rtol=0, atol=0)


# -------------------------------------------------------------------- sampling a known distribution
#
# For data N(M, D^2) the best denoiser is known: E[x_0 | x_t] = M + gain (x_t - sqrt(abar_t) M),
# with gain = sqrt(abar_t) D^2 / (abar_t D^2 + 1 - abar_t). It is affine in x_t, so mean and
# variance pass through a whole chain in closed form, and what is left of an error is
# discretisation, not chance.

M, D = 0.5, 0.25


def best_output(scheduler, x_t, t):
    """eps, v or x_0 of the best denoiser for N(M, D^2), whatever the scheduler wants."""
    abar = abar_at(scheduler, t)
    signal, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    x0 = M + signal * D**2 / (abar * D**2 + 1 - abar) * (x_t - signal * M)
    eps = (x_t - signal * x0) / sigma
    v = signal * eps - sigma * x0
    return {"epsilon": eps, "v_prediction": v, "sample": x0}[scheduler.prediction_type]


def exact_chain(scheduler, S, mean, variance, **step_arguments):
    """Mean and deviation of the samples, given mean and variance of x_T, in closed form."""
    scheduler.set_timesteps(S)
    x, z = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    for t in scheduler.timesteps.tolist():
        output = best_output(scheduler, x, t)
        y = scheduler.step(output, t, x, variance_noise=z, **step_arguments).prev_sample.tolist()
        offset, slope, sigma = y[0], y[1] - y[0], y[2] - y[0]
        mean, variance = offset + slope * mean, slope**2 * variance + sigma**2
    return mean, math.sqrt(variance)


SAMPLERS = {
    "ddpm": (DDPMScheduler, {}, {}),
    "ddpm, fixed_large": (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "ddim, eta 0": (DDIMScheduler, {}, {"eta": 0.0}),
    "ddim, eta 0.5": (DDIMScheduler, {}, {"eta": 0.5}),
    "ddim, eta 1": (DDIMScheduler, {}, {"eta": 1.0}),
}
MODELS = [
    (schedule, prediction_type)
    for schedule in SCHEDULES
    for prediction_type in ("epsilon", "v_prediction")
    if (schedule, prediction_type) != ("zero_snr", "epsilon")  # refused: it would divide by 0
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_falls_as_the_steps_grow(schedule, sampler):
    """Exact: from x_T ~ q(x_T), the samples' distance to N(M, D^2) falls as S grows, to almost 0.

    The distance is Wasserstein-2, between Gaussians sqrt((mean error)^2 + (deviation error)^2).
    fixed_large is asked from S = 50 up: with fewer steps its surplus of noise happens to hide other
    errors.
    """
    cls, constructor, step_arguments = SAMPLERS[sampler]
    scheduler = make(cls, schedule, "v_prediction", **constructor)
    abar_T = abar_at(scheduler, 999)
    errors = []
    few = () if sampler == "ddpm, fixed_large" else (5, 10, 20)
    for S in (*few, 50, 100, 200, 500, 1000):
        start = math.sqrt(abar_T) * M, abar_T * D**2 + 1 - abar_T
        mean, deviation = exact_chain(scheduler, S, *start, **step_arguments)
        errors.append(math.hypot(mean - M, deviation - D))
    assert all(more > less for more, less in pairwise(errors))
    assert errors[-1] < 0.004  # 1.6 % of D; the largest, DDPM's on the linear schedule, is 0.0037
    # First order in 1/S: ten times the steps bring the error down by 8 to 10, or by 6.6 to 8.4 with
    # noise, which is not in that regime yet. A wrong coefficient would leave a floor.
    assert errors[-1] < errors[-4] / 6.5
    # DDPM section 3.2: beta~ is too little noise for spread-out data, beta too much
    assert (deviation > D) == (sampler == "ddpm, fixed_large")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_large_is_exact_for_standard_normal_data(schedule):
    """For x_0 ~ N(0, 1) beta_t is the true variance of x_{t-1} | x_t (DDPM section 3.2).

    The best denoiser is x_0 = sqrt(abar_t) x_t; the true reverse kernel is N(sqrt(alpha_t) x_t,
    beta_t).
    """
    scheduler = make(DDPMScheduler, schedule, variance_type="fixed_large")
    scheduler.set_timesteps(1000)
    for t in (1, 2, 10, 500, 998, 999):
        a, b, s = coefficients(scheduler, t)
        beta = scheduler.betas[t].item()
        slope = a * math.sqrt(abar_at(scheduler, t)) + b
        # 1 - beta, 0.001 at the end of cosine, has lost a factor of 1000 to its rounding
        assert slope == pytest.approx(math.sqrt(1 - beta), abs=1e-11)
        assert s**2 == pytest.approx(beta, abs=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim, eta 0", "ddim, eta 1"])
@pytest.mark.parametrize("schedule, prediction_type", MODELS)
def test_sampling_returns_the_data_distribution(schedule, prediction_type, sampler):
    """20,000 samples, all T steps, from N(0, 1): their mean is M and their deviation D.

    Allowed are 4.5 standard errors, D / sqrt(n) and D / sqrt(2 n), and a bias of 0.004, which the
    test above justifies, plus D sqrt(abar_T) M, for q(x_T) has the mean sqrt(abar_T) M and the
    start has not.
    """
    cls, constructor, step_arguments = SAMPLERS[sampler]
    scheduler = make(cls, schedule, prediction_type, **constructor)
    scheduler.set_timesteps(1000)
    n, generator = 20_000, torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=generator, dtype=F64)
    for t in scheduler.timesteps.tolist():
        output = best_output(scheduler, x, t)
        x = scheduler.step(output, t, x, generator=generator, **step_arguments).prev_sample
    start_error = D * math.sqrt(abar_at(scheduler, 999)) * M
    assert abs(x.mean().item() - M) < 4.5 * D / math.sqrt(n) + 0.004 + start_error
    assert abs(x.std().item() - D) < 4.5 * D / math.sqrt(2 * n) + 0.004
    # Against the chain's exact moments there is no bias to allow for.
    mean, deviation = exact_chain(scheduler, 1000, 0.0, 1.0, **step_arguments)
    assert abs(mean - M) < 0.004 + start_error
    assert abs(x.mean().item() - mean) < 4.5 * D / math.sqrt(n)
    assert abs(x.std().item() - deviation) < 4.5 * D / math.sqrt(2 * n)
