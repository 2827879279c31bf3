"""scheduler.py held against diffusers, element by element.

diffusers computes its tables in float32 and offers no other way: even `trained_betas` are cast. So
it is asked three times, and each time the tolerance follows from what is left to differ:

    stock      diffusers as it comes. Its float32 tables set the tolerance.
    float32    diffusers' own code with float64 tables, float32 samples: a few roundings of 2^-24.
    float64    the same with float64 samples: a few roundings of 2^-53.

The float64 tables are built by diffusers' own constructor, which is handed a `torch` whose float32
is float64 (`Float64Torch`); nothing of ours flows into the oracle.

diffusers takes t - T // S for DDIM's previous timestep, so loops are compared only where that is
the next timestep of the list: `leading` and `trailing` with S dividing T. The other cases have
tests of their own.
"""

import math
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

from scheduler import TIMESTEP_SPACINGS, DDIMScheduler, DDPMScheduler

ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")

# Ours by name, theirs by the arguments that make it.
SCHEDULES = {
    "linear": dict(beta_schedule="linear"),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012),
    "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
    "sigmoid": dict(beta_schedule="sigmoid"),
    "sigmoid, steep": dict(beta_schedule="sigmoid", beta_start=0.002, beta_end=0.05),
}
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SHAPE = (3, 2, 4, 4)


class Float64Torch:
    """`torch` as diffusers' modules see it while they build their tables: float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)

    def linspace(self, *args, dtype=torch.float64):  # the sigmoid schedule leaves dtype out
        return torch.linspace(*args, dtype=dtype)


def peer_of(module, stock=False, **kwargs):
    """diffusers' DDPMScheduler or DDIMScheduler, with float64 tables unless stock."""
    cls = module.DDPMScheduler if module is ddpm else module.DDIMScheduler
    if stock:
        return cls(**kwargs)
    with mock.patch.object(module, "torch", Float64Torch()):
        peer = cls(**kwargs)
    assert peer.alphas_cumprod.dtype == torch.float64
    return peer


def ours_of(cls, name, **kwargs):
    """Our scheduler by the name in SCHEDULES; `cosine` is given to ours by that very name."""
    arguments = dict(SCHEDULES[name], **kwargs)
    if name == "cosine":
        arguments["beta_schedule"] = "cosine"
    return cls(**arguments)


def gaussian(seed, *shape, dtype=torch.float64):
    """Drawn in float64 whatever the dtype, so that all dtypes see the same numbers."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


# ---------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("T", [1000, 37, 2])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_equal_diffusers_code_in_float64(name, zero_snr, T):
    """betas and alphas_cumprod are diffusers' formulas, computed in float64."""
    extra = dict(num_train_timesteps=T, rescale_betas_zero_snr=zero_snr)
    ours = ours_of(DDPMScheduler, name, prediction_type="v_prediction", **extra)
    peer = peer_of(ddpm, **SCHEDULES[name], **extra)
    assert ours.betas.dtype == ours.alphas.dtype == ours.alphas_cumprod.dtype == torch.float64
    # Both are float64 with the operations in another order: betas are differences of numbers near
    # 1, so their error is absolute, and 1000 factors of 2^-53 each sum up to 1e-13 at most.
    torch.testing.assert_close(ours.betas, peer.betas, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours.alphas, peer.alphas, rtol=1e-11, atol=1e-13)
    # Where cos^2 nears its zero at t = T, rounding its argument costs 2^-53 / 1e-3 = 1e-13 of abar.
    torch.testing.assert_close(ours.alphas_cumprod, peer.alphas_cumprod, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_equal_stock_diffusers_to_float32(name, zero_snr):
    """The same against the tables diffusers users have, to the digits those have."""
    ours = ours_of(
        DDPMScheduler, name, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr
    )
    peer = peer_of(ddpm, stock=True, **SCHEDULES[name], rescale_betas_zero_snr=zero_snr)
    # A float32 product of up to 1000 factors: 1000 x 2^-24 = 6e-5 relative at worst, and abar <= 1.
    torch.testing.assert_close(ours.alphas_cumprod.float(), peer.alphas_cumprod, rtol=0, atol=6e-5)
    # A rescaled beta is 1 - a ratio of neighbours in that product, which share their errors but for
    # a few 2^-24 (2e-6 is 30 of them), until the subtraction leaves few digits as abar nears 0.
    head = slice(0, 900) if zero_snr else slice(None)
    torch.testing.assert_close(ours.betas[head].float(), peer.betas[head], rtol=1e-5, atol=2e-6)


def test_trained_betas_equal_diffusers():
    """trained_betas replace the named schedule."""
    betas = torch.linspace(0.001, 0.3, 40, dtype=torch.float64).tolist()
    ours, peer = DDPMScheduler(trained_betas=betas), peer_of(ddpm, trained_betas=betas)
    torch.testing.assert_close(ours.betas, peer.betas, rtol=0, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod, peer.alphas_cumprod, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_forward_equals_diffusers_in_float64(method, name, zero_snr):
    """x_t and v at every one of the 1000 timesteps, each with its own x_0 and eps."""
    ours = ours_of(
        DDPMScheduler, name, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr
    )
    peer = peer_of(ddpm, **SCHEDULES[name], rescale_betas_zero_snr=zero_snr)
    x0, noise, t = gaussian(0, 1000, 1, 2, 2), gaussian(1, 1000, 1, 2, 2), torch.arange(1000)
    actual, expected = getattr(ours, method)(x0, noise, t), getattr(peer, method)(x0, noise, t)
    # abar differs by 1e-13 at most, and sqrt(1 - abar), 0.006 at least, by 1e-13 / (2 x 0.006). It
    # multiplies numbers below 4.
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-11)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_forward_equals_stock_diffusers_in_float32(method, name):
    """The same in float32, against diffusers as it comes."""
    ours = ours_of(DDPMScheduler, name)
    peer = peer_of(ddpm, stock=True, **SCHEDULES[name])
    x0 = gaussian(0, 1000, 1, 2, 2, dtype=torch.float32)
    noise = gaussian(1, 1000, 1, 2, 2, dtype=torch.float32)
    t = torch.arange(1000)
    actual, expected = getattr(ours, method)(x0, noise, t), getattr(peer, method)(x0, noise, t)
    assert actual.dtype == torch.float32
    # Their abar is off by 2^-24 near 1, so sqrt(1 - abar) by 2^-24 / (2 sqrt(1 - abar)): 5e-6 where
    # cosine starts with 1 - abar = 4e-5. Elsewhere their product of 1000 factors may be off by
    # 6e-5, its root by 3e-5. Both multiply numbers below 4.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("stock", [False, True])
def test_add_noise_accepts_one_timestep_for_all(stock):
    """A (1,) timestep broadcasts over the batch, as in diffusers."""
    x0, noise, t = gaussian(0, *SHAPE), gaussian(1, *SHAPE), torch.tensor([617])
    actual = DDPMScheduler().add_noise(x0, noise, t)
    expected = peer_of(ddpm, stock=stock).add_noise(x0, noise, t)
    # 617 float32 factors: 617 x 2^-24 = 4e-5 relative in stock abar
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 if stock else 1e-12)


# ------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("T", [1000, 999, 128, 37])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_timesteps_equal_diffusers(spacing, T):
    """The same list for every S in 1..T."""
    ours, peer = (cls(T, timestep_spacing=spacing) for cls in (DDPMScheduler, ddpm.DDPMScheduler))
    for S in range(1, T + 1):
        ours.set_timesteps(S)
        peer.set_timesteps(S)
        assert ours.timesteps.tolist() == peer.timesteps.tolist(), f"S={S}"


@pytest.mark.parametrize("T", [1000, 999, 128, 37])
def test_trailing_timesteps_equal_diffusers(T):
    """The same for `trailing`, but for the one timestep too many, -1, that diffusers may return.

    It is left out here and has a test below.
    """
    ours, peer = (
        cls(T, timestep_spacing="trailing") for cls in (DDPMScheduler, ddpm.DDPMScheduler)
    )
    for S in range(1, T + 1):
        ours.set_timesteps(S)
        peer.set_timesteps(S)
        theirs = peer.timesteps.tolist()
        assert theirs[S:] in ([], [-1])
        assert ours.timesteps.tolist() == theirs[:S], f"S={S}"


@pytest.mark.parametrize("T", [1000, 999, 997, 361, 37, 7, 3, 2, 1])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_exactly_S_strictly_descending_timesteps_in_range(spacing, T):
    """The promise of set_timesteps, for every S in 1..T, without a peer."""
    scheduler = DDPMScheduler(T, timestep_spacing=spacing)
    for S in range(1, T + 1):
        scheduler.set_timesteps(S)
        ts = scheduler.timesteps.tolist()
        assert len(ts) == S
        assert ts[0] < T and ts[-1] >= 0
        assert all(a > b for a, b in pairwise(ts))
        if spacing == "trailing" or (spacing == "linspace" and S > 1):
            assert ts[0] == T - 1  # sampling starts from pure noise
        if spacing in ("leading", "linspace"):
            assert ts[-1] == 0


def test_trailing_is_right_where_an_arange_with_a_float_stride_is_not():
    """For 62 of the S in 1..1000 the usual formula returns one timestep too many; ours does not.

    The formula is written out here, so that the test outlives a repair in diffusers.
    """
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    broken = []
    for S in range(1, 1001):
        naive = np.round(np.arange(1000, 0, -1000 / S)).astype(int) - 1
        if len(naive) != S:
            broken.append(S)
            assert naive.tolist()[-1] == -1
            scheduler.set_timesteps(S)
            assert len(scheduler.timesteps) == S and scheduler.timesteps[-1] >= 0
    assert len(broken) == 62
    assert broken[:6] == [61, 103, 121, 122, 201, 206]


# --------------------------------------------------------------------------------- reverse steps


def true_output(prediction_type, x0, noise, abar):
    """What a perfect network would return, worked out here rather than by get_velocity."""
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    return {"epsilon": noise, "v_prediction": a * noise - b * x0, "sample": x0}[prediction_type]


def inputs_at(t, abar, prediction_type, dtype):
    """x_t and a network's output that is off by 0.3: some of its x_0 are clipped, some are not."""
    x0 = gaussian(3 * t, *SHAPE).clamp(-1.5, 1.5)
    noise = gaussian(3 * t + 1, *SHAPE)
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
    output = true_output(prediction_type, x0, noise, abar) + 0.3 * gaussian(3 * t + 2, *SHAPE)
    return output.to(dtype), x_t.to(dtype)


def tolerance(dtype, abar, prediction_type):
    """Fifty roundings of numbers below 8; an epsilon-model's are divided by sqrt(abar)."""
    return 50 * 8 * ROUNDING[dtype] / (math.sqrt(abar) if prediction_type == "epsilon" else 1)


# The cosine schedule's abar_T of 2e-9 is the hardest case for epsilon; zero terminal SNR is refused
# for epsilon, so it appears with the two others.
STEP_CASES = [
    (name, zero_snr, prediction_type)
    for name, zero_snr in [("linear", False), ("cosine", False), ("scaled_linear", True)]
    for prediction_type in ("epsilon", "v_prediction", "sample")
    if not (zero_snr and prediction_type == "epsilon")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name, zero_snr, prediction_type", STEP_CASES)
def test_ddpm_step_equals_diffusers(
    name, zero_snr, prediction_type, spacing, variance_type, clip, dtype
):
    """prev_sample and pred_original_sample of every step of S = 20, the same generator for both."""
    arguments = dict(
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=clip,
        clip_sample_range=1.0,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_snr,
    )
    ours = ours_of(DDPMScheduler, name, **arguments)
    peer = peer_of(ddpm, **SCHEDULES[name], **arguments)
    ours.set_timesteps(20)
    peer.set_timesteps(20)
    for t in ours.timesteps.tolist():
        abar = ours.alphas_cumprod[t].item()
        output, x_t = inputs_at(t, abar, prediction_type, dtype)
        actual = ours.step(output, t, x_t, generator=torch.Generator().manual_seed(t))
        expected = peer.step(output, t, x_t, generator=torch.Generator().manual_seed(t))
        atol = tolerance(dtype, abar, prediction_type)
        torch.testing.assert_close(
            actual.pred_original_sample, expected.pred_original_sample, rtol=0, atol=atol
        )
        if ours.previous_timestep(t) == -1 and t > 0:
            # diffusers adds noise unless t == 0, so also to a trailing list's result; DDPM
            # algorithm 2 does not
            torch.testing.assert_close(
                actual.prev_sample, actual.pred_original_sample, rtol=0, atol=0
            )
        else:
            torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("use_clipped", [False, True], ids=["eps as is", "eps re-derived"])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name, zero_snr, prediction_type", STEP_CASES)
def test_ddim_step_equals_diffusers(
    name, zero_snr, prediction_type, spacing, clip, use_clipped, dtype
):
    """Every step of S = 20 for eta 0, 0.3 and 1, in both conventions of eta.

    Our "std" is theirs; our "variance" at eta is theirs at sqrt(eta).
    """
    arguments = dict(
        prediction_type=prediction_type,
        clip_sample=clip,
        clip_sample_range=1.0,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_snr,
    )
    peer = peer_of(ddim, **SCHEDULES[name], **arguments)
    peer.set_timesteps(20)
    for convention, theirs in [("std", lambda eta: eta), ("variance", math.sqrt)]:
        ours = ours_of(DDIMScheduler, name, eta_convention=convention, **arguments)
        ours.set_timesteps(20)
        for t, eta in [(t, eta) for t in ours.timesteps.tolist() for eta in (0.0, 0.3, 1.0)]:
            abar = ours.alphas_cumprod[t].item()
            output, x_t = inputs_at(t, abar, prediction_type, dtype)
            actual = ours.step(
                output, t, x_t, eta, use_clipped, generator=torch.Generator().manual_seed(t)
            )
            expected = peer.step(
                output, t, x_t, theirs(eta), use_clipped, torch.Generator().manual_seed(t)
            )
            atol = tolerance(dtype, abar, prediction_type)
            torch.testing.assert_close(
                actual.pred_original_sample, expected.pred_original_sample, rtol=0, atol=atol
            )
            # eta = 1 at zero SNR: 1 - abar_{t-k} - sigma^2 is 0 in truth and 2^-53 after rounding,
            # and then comes the root, 1e-8, times eps; in float64 that is what is left to differ.
            atol += 1e-7 if abar < 1e-8 and eta == 1 else 0
            torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=0, atol=atol)


@pytest.mark.parametrize("clip_range", [0.5, 2.0])
def test_clip_sample_range_equals_diffusers(clip_range):
    """The range other than 1."""
    arguments = dict(clip_sample_range=clip_range, timestep_spacing="leading")
    for ours, peer in [
        (DDPMScheduler(**arguments), peer_of(ddpm, **arguments)),
        (DDIMScheduler(**arguments), peer_of(ddim, **arguments)),
    ]:
        ours.set_timesteps(20)
        peer.set_timesteps(20)
        output, x_t = inputs_at(500, ours.alphas_cumprod[500].item(), "epsilon", torch.float64)
        actual = ours.step(output, 500, x_t, generator=torch.Generator().manual_seed(0))
        expected = peer.step(output, 500, x_t, generator=torch.Generator().manual_seed(0))
        x0 = expected.pred_original_sample
        assert (x0.abs() == clip_range).any() and (x0.abs() < clip_range).any()  # not vacuous
        torch.testing.assert_close(actual.pred_original_sample, x0, rtol=0, atol=1e-13)
        if isinstance(ours, DDIMScheduler):  # theirs leaves eps unclipped by default, ours does not
            expected = peer.step(output, 500, x_t, use_clipped_model_output=True)
        torch.testing.assert_close(actual.prev_sample, expected.prev_sample, rtol=0, atol=1e-13)


# --------------------------------------------------------------------------------------- loops


def toy_model(x, t):
    """A smooth function of x and t with outputs in (-1.5, 1.5), in place of a network."""
    return 1.5 * torch.tanh(0.8 * x + 0.1 * torch.sin(5 * x) - t / 2000)


def sample_with(scheduler, S, dtype, **step_arguments):
    """The plain sampling loop; works with ours and theirs."""
    scheduler.set_timesteps(S)
    x = gaussian(7, *SHAPE, dtype=dtype)
    generator = torch.Generator().manual_seed(8)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(toy_model(x, t), t, x, generator=generator, **step_arguments).prev_sample
    return x


# The loops start from the same x_T and draw the same noise. An epsilon-model's first step divides
# rounding errors by sqrt(abar_T), 0.006 for the linear schedule (clipping then forgets most of it);
# later steps damp errors or keep them. 1e-9 and 1e-3 leave a factor of over 10 to what that gives.
LOOP_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "S, dtype",
    [(50, torch.float32), (10, torch.float64), (50, torch.float64), (1000, torch.float64)],
)
def test_ddpm_loop_equals_diffusers(S, prediction_type, variance_type, clip, dtype):
    """A whole chain, with `leading` spacing, whose last timestep is 0, where both add no noise."""
    arguments = dict(
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=clip,
        timestep_spacing="leading",
    )
    actual = sample_with(DDPMScheduler(**arguments), S, dtype)
    expected = sample_with(peer_of(ddpm, **arguments), S, dtype)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOOP_TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("use_clipped", [False, True], ids=["eps as is", "eps re-derived"])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing, S", [("leading", 50), ("trailing", 40)])
def test_ddim_loop_equals_diffusers(spacing, S, prediction_type, eta, clip, use_clipped, dtype):
    """A whole chain, in both conventions of eta."""
    arguments = dict(prediction_type=prediction_type, clip_sample=clip, timestep_spacing=spacing)
    flags = dict(use_clipped_model_output=use_clipped)
    peer = peer_of(ddim, **arguments)
    for convention, theirs in [("std", eta), ("variance", math.sqrt(eta))]:
        ours = DDIMScheduler(**arguments, eta_convention=convention)
        actual = sample_with(ours, S, dtype, eta=eta, **flags)
        expected = sample_with(peer, S, dtype, eta=theirs, **flags)
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=LOOP_TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loops_equal_stock_diffusers(prediction_type):
    """What a user sees who swaps diffusers for ours: float32 throughout, the same picture."""
    arguments = dict(prediction_type=prediction_type, timestep_spacing="leading")
    # Their tables' 6e-5 (see above) passes through an epsilon-model's first step, where clipping
    # hides it.
    expected = sample_with(peer_of(ddpm, stock=True, **arguments), 50, torch.float32)
    actual = sample_with(DDPMScheduler(**arguments), 50, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
    flags = dict(use_clipped_model_output=True)
    expected = sample_with(peer_of(ddim, stock=True, **arguments), 50, torch.float32, **flags)
    actual = sample_with(DDIMScheduler(**arguments), 50, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


# ----------------------------------------------------- where diffusers' previous timestep is wrong


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("S", [1, 2, 7, 30, 61, 300, 999, 1000])
def test_previous_timestep_is_the_one_that_comes_next(S, spacing, cls):
    """For S that divide T and S that do not; the last one leads to the clean image, -1."""
    scheduler = cls(timestep_spacing=spacing)
    scheduler.set_timesteps(S)
    ts = scheduler.timesteps.tolist()
    assert [scheduler.previous_timestep(t) for t in ts] == [*ts[1:], -1]
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [*ts[1:], -1]


def test_previous_timestep_of_all_T_and_of_a_list_of_ones_own():
    """Before set_timesteps it is t - 1; of a custom list, its next entry; a new list takes over."""
    scheduler = DDPMScheduler(10)
    assert [scheduler.previous_timestep(t) for t in range(10)] == list(range(-1, 9))
    scheduler.set_timesteps(timesteps=[9, 4, 3, 1])
    assert [scheduler.previous_timestep(t) for t in (9, 4, 3, 1)] == [4, 3, 1, -1]
    scheduler.set_timesteps(2)
    assert [scheduler.previous_timestep(t) for t in (9, 4)] == [4, -1]


@pytest.mark.parametrize("spacing, S", [("linspace", 10), ("linspace", 7), ("trailing", 7)])
def test_ddim_steps_land_on_the_next_timesteps_noise_level(spacing, S):
    """With the true eps, a step from x_t is the noised x_0 at the timestep that comes next.

    This is what t - T // S gets wrong: diffusers lands on another noise level, which is asserted
    too.
    """
    arguments = dict(clip_sample=False, timestep_spacing=spacing)
    ours, peer = DDIMScheduler(**arguments), peer_of(ddim, **arguments)
    ours.set_timesteps(S)
    peer.set_timesteps(S)
    x0, noise = gaussian(0, *SHAPE), gaussian(1, *SHAPE)
    misses = []
    ts = ours.timesteps.tolist()
    for t, following in pairwise(ts):
        x_t = ours.add_noise(x0, noise, t)
        expected = ours.add_noise(x0, noise, following)
        # x_0 = (x_t - ...) / sqrt(abar_T) multiplies 2^-53 by 157
        torch.testing.assert_close(
            ours.step(noise, t, x_t).prev_sample, expected, rtol=0, atol=1e-12
        )
        misses.append((peer.step(noise, t, x_t).prev_sample - expected).abs().max().item())
    assert max(misses) > 1e-3


@pytest.mark.parametrize("spacing, S", [("linspace", 10), ("trailing", 7), ("trailing", 30)])
def test_ddim_equals_diffusers_ddim_on_a_schedule_of_its_own(spacing, S):
    """Ours over S uneven timesteps is diffusers' over all timesteps of the sub-schedule they make.

    abar at the S timesteps defines S betas; with those as trained_betas diffusers' t - 1 is right.
    """
    ours = DDIMScheduler(timestep_spacing=spacing, eta_convention="std")
    ours.set_timesteps(S)
    ts = ours.timesteps.tolist()
    abar = ours.alphas_cumprod[ts[::-1]]
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    peer = peer_of(ddim, num_train_timesteps=S, trained_betas=betas.tolist())
    peer.set_timesteps(S)
    x = y = gaussian(7, *SHAPE)
    for i, t in enumerate(ts):
        flags = dict(eta=0.5, use_clipped_model_output=True)
        generators = [torch.Generator().manual_seed(i) for _ in range(2)]
        x = ours.step(toy_model(x, t), t, x, generator=generators[0], **flags).prev_sample
        y = peer.step(toy_model(y, t), S - 1 - i, y, generator=generators[1], **flags).prev_sample
    torch.testing.assert_close(x, y, rtol=0, atol=1e-9)  # as LOOP_TOLERANCE
