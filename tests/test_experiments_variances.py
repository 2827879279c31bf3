"""experiments/variances.py, and its rows in experiments/eta.py."""

import functools
import math
from dataclasses import replace
from itertools import pairwise

from lab.data import to_uint8
from lab.distributed import Process

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_experiments import ALONE, CELL, CPU, linear, row, subject

import metrics
from diffusion import sample
from experiments import eta, grid
from experiments.common import MANY_SEEDS, Settings, Study
from experiments.estimates import Results
from experiments.grid import SHAPE
from experiments.variances import IMAGES, OptimalVariance, large_variance
from scheduler import DDIMScheduler, DDPMScheduler

F64 = torch.float64
D = 0.25  # the deviation of Gaussian data, whose mean is M
M = 0.1
subsets = st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True).map(
    lambda ts: sorted(ts, reverse=True)
)


large = functools.cache(large_variance)  # hypothesis would make its tables for each example


def abar_at(scheduler, t):
    return 1.0 if t < 0 else scheduler.alphas_cumprod[t].item()


# ---------------------------------------------------------------------------- the large variance


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.sampled_from(["linear", "cosine"]), st.sampled_from(["epsilon", "v_prediction"]), subsets)
def test_ddpm_with_the_large_variance_is_sigma_hat_of_the_ddim_paper(schedule, prediction, ts):
    """x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma(1)^2) eps + sigma-hat z, at any timesteps.

    That is DDIM eq. 12 with sigma(1) of eq. 16 in the direction and sigma-hat in the noise. eps is
    derived from the clipped x_0, as everywhere in this lab.
    """
    config = {"variance_type": "fixed_small", "prediction_type": prediction}  # as in checkpoints
    scheduler = large(beta_schedule=schedule, **config)
    scheduler.set_timesteps(timesteps=ts)
    generator = torch.Generator().manual_seed(0)
    output, x_t, z = torch.randn(3, 50, generator=generator, dtype=F64)
    for t, s in pairwise([*ts, -1]):
        actual = scheduler.step(output, t, x_t, variance_noise=z).prev_sample
        a_t, a_s = abar_at(scheduler, t), abar_at(scheduler, s)
        x0 = scheduler.get_original_sample(output, x_t, t)
        eps = (x_t - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
        sigma_1 = math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        sigma_hat = math.sqrt(1 - a_t / a_s) if s >= 0 else 0.0
        wanted = math.sqrt(a_s) * x0 + math.sqrt(max(1 - a_s - sigma_1**2, 0)) * eps + sigma_hat * z
        torch.testing.assert_close(actual, wanted, atol=1e-9, rtol=0)


# -------------------------------------------------------------------------- the optimal variance


def gaussian_error(scheduler, t):
    """Return V_t, the variance of x_0 given x_t, for data from N(M, D^2)."""
    abar = abar_at(scheduler, t)
    return D**2 * (1 - abar) / (abar * D**2 + 1 - abar)


def gaussian_denoiser(scheduler):
    """Return the network E[x_0 | x_t] for data from N(M, D^2), in the scheduler's prediction."""

    def network(x_t, t):
        abar = scheduler.alphas_cumprod[t].to(x_t.dtype)
        x0 = M + abar.sqrt() * D**2 / (abar * D**2 + 1 - abar) * (x_t - abar.sqrt() * M)
        eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
        if scheduler.prediction_type == "epsilon":
            return eps
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0

    return network


def optimal(timesteps, error, **config):
    """Return the sampler with the V_t that error(scheduler, t) returns."""
    config = {"beta_schedule": "cosine", "clip_sample": False} | config
    plain = DDPMScheduler(**config)
    errors = {t: error(plain, t) for t in timesteps[:-1]}  # the last step needs none
    scheduler = OptimalVariance(**config, x0_errors=errors)
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.sampled_from(["linear", "cosine"]), subsets)
def test_for_gaussian_data_the_optimal_variance_is_that_of_the_true_reverse_step(schedule, ts):
    """x_s and x_t are jointly Gaussian: Var(x_s | x_t) = Var(x_s) - Cov(x_s, x_t)^2 / Var(x_t)."""
    scheduler = optimal(ts, gaussian_error, beta_schedule=schedule)
    for t, s in pairwise(ts):
        a_t, a_s = abar_at(scheduler, t), abar_at(scheduler, s)
        var_t, var_s = (a * D**2 + 1 - a for a in (a_t, a_s))
        covariance = math.sqrt(a_t / a_s) * var_s
        small, best, large = scheduler.variances(t)
        assert best == pytest.approx(var_s - covariance**2 / var_t, rel=1e-6)
        assert small < best < large


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_with_the_optimal_variance_few_steps_keep_the_marginals_of_gaussian_data(prediction_type):
    """From x_T ~ q(x_T) every x_s has the mean and variance of q(x_s); beta~ and beta do not."""
    ts = [999, 600, 300, 50]
    scheduler = optimal(ts, gaussian_error, prediction_type=prediction_type)
    network = gaussian_denoiser(scheduler)
    a_t = abar_at(scheduler, ts[0])
    mean, variance = math.sqrt(a_t) * M, a_t * D**2 + 1 - a_t
    x, z = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    for t, s in pairwise([*ts, -1]):
        output = network(x, torch.tensor(t))
        offset, up, noisy = scheduler.step(output, t, x, variance_noise=z).prev_sample.tolist()
        mean, variance = offset + (up - offset) * mean, (up - offset) ** 2 * variance
        variance += (noisy - offset) ** 2
        a_s = abar_at(scheduler, s)
        if s < 0:  # no noise: the variance of E[x_0 | x_t] alone
            assert noisy == offset
            break
        assert mean == pytest.approx(math.sqrt(a_s) * M, abs=1e-9)
        assert variance == pytest.approx(a_s * D**2 + 1 - a_s, abs=1e-9)


def test_the_mean_is_that_of_eta_1_and_the_noise_may_come_from_anywhere():
    ts = [999, 500, 20]
    scheduler = optimal(ts, gaussian_error, clip_sample=True)
    ddim = DDIMScheduler(beta_schedule="cosine")
    ddim.set_timesteps(timesteps=ts)
    output, x_t, z = torch.randn(3, 4, 2)
    zero = torch.zeros_like(z)
    for t in ts:
        mean, x0 = scheduler.step(output, t, x_t, variance_noise=zero)
        wanted = ddim.step(output, t, x_t, eta=1.0, variance_noise=zero)
        torch.testing.assert_close(mean, wanted.prev_sample)
        torch.testing.assert_close(x0, wanted.pred_original_sample)
    drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    from_tensor = scheduler.step(output, 500, x_t, variance_noise=drawn).prev_sample
    from_function = scheduler.step(output, 500, x_t, variance_noise=lambda: drawn).prev_sample
    from_generator = scheduler.step(output, 500, x_t, generator=generator).prev_sample
    assert torch.equal(from_tensor, from_function) and torch.equal(from_tensor, from_generator)
    with pytest.raises(ValueError, match="generator"):
        scheduler.step(output, 500, x_t, generator=generator, variance_noise=z)


def pixels_of(x0):
    """Return pixels, not rounded, that `to_model_range` maps to x_0."""
    return (x0.to(F64) + 1) * 127.5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_error_of_a_perfect_network_is_the_variance_of_x0(prediction_type):
    """And it equals the estimate of Analytic-DPM, (1 - abar) / abar (1 - E|eps|^2 / d)."""
    config = {"beta_schedule": "cosine", "prediction_type": prediction_type, "clip_sample": False}
    scheduler = DDPMScheduler(**config)
    network = gaussian_denoiser(scheduler)
    x0 = M + D * torch.randn(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t in (900, 500, 100):
        measured = OptimalVariance.x0_error(network, scheduler, pixels_of(x0), t)
        wanted, abar = gaussian_error(scheduler, t), abar_at(scheduler, t)
        # the mean of n = 392,000 squares of Gaussians errs by sqrt(2 / n) = 0.23 %
        assert measured == pytest.approx(wanted, rel=0.01)
        gamma = (1 - abar) / (abar * D**2 + 1 - abar)  # E|E[eps | x_t]|^2 / d
        assert wanted == pytest.approx((1 - abar) / abar * (1 - gamma), rel=1e-9)


def test_the_error_is_that_of_the_clipped_prediction_of_the_first_images():
    """A network whose x_0 is 3 is clipped to 1; images beyond the first IMAGES are not used."""
    scheduler = DDPMScheduler(beta_schedule="cosine", prediction_type="sample")
    images = torch.full((IMAGES + 9, *SHAPE), 127.5, dtype=F64)  # x_0 = 0
    images[IMAGES:] = 0
    error = OptimalVariance.x0_error(lambda x, t: torch.full_like(x, 3), scheduler, images, 500)
    assert error == pytest.approx(1)


@pytest.mark.parametrize("data", ["bits", "ramp", "constant"])
def test_the_optimal_variance_of_data_in_range_lies_between_the_bounds_of_ddpm(data):
    """beta~ <= sigma*^2 <= beta (DDPM section 3.2); it is beta~ if x_0 is known."""
    values = torch.tensor({"bits": [-1, 1], "ramp": [-1, -0.5, 0, 0.5, 1], "constant": [0.5]}[data])
    generator = torch.Generator().manual_seed(0)
    x0 = values[torch.randint(0, len(values), (100, *SHAPE), generator=generator)]
    config = {"beta_schedule": "cosine", "prediction_type": "sample"}
    plain = DDPMScheduler(**config)

    def network(x_t, t):  # E[x_0 | x_t] for pixels that take these values equally often
        abar = plain.alphas_cumprod[t].float()
        distance = x_t[..., None] - abar.sqrt() * values
        weights = (-(distance**2) / (2 * (1 - abar))).softmax(-1)
        return (weights * values).sum(-1)

    def error(scheduler, t):
        return OptimalVariance.x0_error(network, plain, pixels_of(x0), t)

    scheduler = optimal([999, 700, 400, 100, 10], error, **config)
    for t in (999, 700, 400, 100):
        small, best, large = scheduler.variances(t)
        # float32 errs by less than 1e-6, the mean over 78,400 pixels by 0.4 %
        assert small * (1 - 1e-6) <= best <= large * 1.005
        if data == "constant":
            assert best == pytest.approx(small, rel=1e-6)


# ----------------------------------------------------------------------------------- the study


def test_a_cell_of_a_variance_is_its_sample():
    it = eta.with_x0_errors(subject(linear), torch.zeros(3, *SHAPE), [5], ALONE)
    samplers = {
        "ddpm-large": (subject(linear), large_variance(beta_schedule="cosine")),
        "ddpm-optimal": (it, OptimalVariance(**it.contents["scheduler"])),
    }
    made = []
    for name, (model, scheduler) in samplers.items():
        scheduler.set_timesteps(5)
        images, _ = grid.sample_cell(replace(CELL, sampler=name, eta=None), model, ALONE, 4)
        wanted = sample(linear, scheduler, torch.arange(7), SHAPE, seed=3)
        assert torch.equal(images, to_uint8(wanted))
        made.append(images)
    assert not torch.equal(*made)


def test_errors_are_measured_at_all_timesteps_of_all_step_counts_once(monkeypatch):
    measured = []

    def x0_error(model, scheduler, images, t):
        measured.append(t)
        return t / 1000

    monkeypatch.setattr(OptimalVariance, "x0_error", x0_error)
    it = eta.with_x0_errors(subject(linear), torch.zeros(3, *SHAPE), [5, 10], ALONE)
    tenths = list(range(99, 1000, 100))
    assert measured == tenths  # 5 steps visit every second one of them
    assert it.contents["scheduler"]["x0_errors"] == {t: t / 1000 for t in tenths}


def test_every_process_measures_its_share_of_the_errors(monkeypatch):
    class Second(Process):
        def sum(self, tensor):
            return tensor  # alone: what the first process measures stays 0

    monkeypatch.setattr(OptimalVariance, "x0_error", lambda model, scheduler, images, t: t / 1000)
    it = eta.with_x0_errors(
        subject(linear), torch.zeros(3, *SHAPE), [4], Second(CPU, world=2, rank=1)
    )
    assert it.contents["scheduler"]["x0_errors"] == {249: 0, 499: 0, 749: 0.749, 999: 0.999}


def test_a_middle_eta_is_compared_with_both_ends_at_the_seeds_that_they_share(monkeypatch):
    """The ends have ten seeds, the middle has three: 0, 1 and 2, whose mean is 1."""

    def change(before, after, data_dir):
        assert (before.model, before.steps, before.seed) == (after.model, after.steps, after.seed)
        return 100 * (after.eta - before.eta) + after.seed, 0.3

    monkeypatch.setattr(metrics, "frechet_change_of", change)
    monkeypatch.setattr(Study, "features_of", lambda self, cell: cell)
    sizes = Settings((1, 5, 20), (), (0.0, 0.5, 1.0), 100, 100, 3, 0, 100, "data", None)
    study = Study(sizes, ALONE, [subject(linear)], "python study.py")
    cells = study.grid_cells
    assert {len([c for c in cells if (c.steps, c.eta) == (20, e)]) for e in (0, 1)} == {MANY_SEEDS}
    results = Results([vars(cell) | {"prediction": "v"} for cell in cells])
    assert eta.changes_tables(study, results).splitlines()[2:] == [
        "| steps | η = 0.5 instead of 0 | η = 0.5 instead of 1 |",
        "| --- | ---: | ---: |",
        "| 5 | +50.0 ± 0.3 | −50.0 ± 0.3 |",
        "| 20 | +51.0 ± 0.6 | −49.0 ± 0.6 |",
    ]


def test_the_features_of_a_cell_are_computed_once(monkeypatch):
    """Section 2 compares each cell with up to four others."""
    asked = []

    def images_of(self, cell):
        asked.append(cell)
        return torch.zeros(2, *SHAPE, dtype=torch.uint8)

    monkeypatch.setattr(Study, "images_of", images_of)
    sizes = Settings((5,), (), (0.0, 1.0), 100, 100, 1, 0, 100, "data", None)
    study = Study(sizes, ALONE, [subject(linear)], "python study.py")
    for cell in study.grid_cells * 2:
        assert study.features_of(cell).shape == (2, 84)
    assert asked == study.grid_cells
    assert study.features_of(asked[0]) is study.features_of(asked[0])


def test_the_table_of_variances_has_a_row_for_each():
    def rows(sampler, eta, *distances):
        steps = dict(zip((2, 5, 100), distances, strict=True))
        figures = {s: row("a", s, eta, f, sampler=sampler) for s, f in steps.items() if f}
        return [r | {"kid": r["frechet"], "kid_se": 1.0} for r in figures.values()]

    plain = Results(rows("ddim", 0.0, 9.0, 8.0, 7.0) + rows("ddim", 1.0, 9.0, 6.0, 3.0))
    variances = {
        "σ̂": Results(rows("ddpm-large", None, None, 50.0, 2.0)),
        "σ*": Results(rows("ddpm-optimal", None, None, 5.0, 4.0)),
    }
    lines = eta.variances_table(plain, variances, "a", "frechet").splitlines()
    assert lines[0] == "| steps | 5 | 100 |"
    assert lines[3:] == [
        "| η = 0 | 8.0 ± 2.8 | 7.0 ± 2.8 |",
        "| η = 1 | 6.0 ± 2.8 | 3.0 ± 2.8 |",
        "| σ̂, 1 seed | 50.0 ± 2.8 | **2.0 ± 2.8** |",
        "| σ*, 1 seed | **5.0 ± 2.8** | 4.0 ± 2.8 |",
    ]
