"""What scheduler.py promises for any input: shapes, dtypes, randomness, purity, refusals.

hypothesis draws the inputs; `derandomize` makes it draw the same ones in every run, so that a
failure is a change of the code and not of luck.
"""

import copy
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scheduler as module
from scheduler import (
    BETA_SCHEDULES,
    ETA_CONVENTIONS,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    DDIMScheduler,
    DDPMScheduler,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INT_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
T = 100  # small tables: hypothesis makes many schedulers

quick = settings(derandomize=True, max_examples=60, deadline=None)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5)
dtypes = st.sampled_from(DTYPES)
prediction_types = st.sampled_from(PREDICTION_TYPES)
timesteps = st.integers(0, T - 1)
seeds = st.integers(0, 2**31)


def gaussian(seed, shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make(cls, **kwargs):
    return cls(T, beta_end=0.2, **kwargs)


# Every way to take a step: (class, step's arguments)
STEPS = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {}),
    (DDIMScheduler, {"eta": 0.5}),
    (DDIMScheduler, {"eta": 1.0, "use_clipped_model_output": False}),
]
steps = st.sampled_from(STEPS)


# ------------------------------------------------------------------------------ shapes and dtypes


@quick
@given(shapes, dtypes, st.sampled_from(["add_noise", "get_velocity"]), seeds)
def test_forward_keeps_shape_and_dtype_and_precision(shape, dtype, method, seed):
    """The result has x_0's shape and dtype, and is the float64 result to that dtype's precision."""
    scheduler = make(DDPMScheduler)
    x0, noise = gaussian(seed, shape, dtype), gaussian(seed + 1, shape, dtype)
    t = torch.randint(0, T, shape[:1], generator=torch.Generator().manual_seed(seed))
    actual = getattr(scheduler, method)(x0, noise, t)
    expected = getattr(scheduler, method)(x0.double(), noise.double(), t)
    assert actual.shape == x0.shape and actual.dtype == dtype
    # The coefficient, the product and the sum are each rounded: 3 halves of eps, on terms below max
    # + max, and float16 has no more than 6e-8 of resolution near 0.
    atol = 1.5 * torch.finfo(dtype).eps * (x0.abs().max() + noise.abs().max()).item() + 1.2e-7
    atol = atol if dtype != torch.float64 else 0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("cls, arguments", STEPS)
@quick
@given(shape=shapes, dtype=dtypes, output_dtype=dtypes, t=timesteps, seed=seeds)
def test_step_keeps_shape_and_dtype_and_precision(
    cls, arguments, prediction_type, clip, shape, dtype, output_dtype, t, seed
):
    """Both results have the sample's shape and dtype; half precision is rounded once, at last.

    The network's output may have another dtype, as under autocast.
    """
    scheduler = make(cls, prediction_type=prediction_type, clip_sample=clip)
    output = gaussian(seed, shape, output_dtype)
    x, z = gaussian(seed + 1, shape, dtype), gaussian(seed + 2, shape, dtype)
    actual = scheduler.step(output, t, x, variance_noise=z, **arguments)
    expected = scheduler.step(
        output.double(), t, x.double(), variance_noise=z.double(), **arguments
    )
    # The arithmetic is float32's (float64's): ten roundings of terms below 8 / sqrt(abar_t), an
    # epsilon-model's amplification. Then comes half of the dtype's own eps, relative to the result.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    abar = scheduler.alphas_cumprod[t].item() if prediction_type == "epsilon" else 1.0
    for result, reference in zip(actual, expected, strict=True):
        assert result.shape == x.shape and result.dtype == dtype
        torch.testing.assert_close(
            result.double(),
            reference,
            rtol=0.51 * torch.finfo(dtype).eps,
            atol=10 * 8 * arithmetic / math.sqrt(abar) + torch.finfo(dtype).smallest_normal,
        )


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_forward_keeps_the_samples_dtype_whatever_the_noise_has(method):
    x0, noise = gaussian(0, (4, 3), torch.bfloat16), gaussian(1, (4, 3))
    assert getattr(make(DDPMScheduler), method)(x0, noise, 50).dtype == torch.bfloat16


@quick
@given(shapes, st.sampled_from(INT_DTYPES), timesteps, seeds)
def test_every_form_of_a_timestep_means_the_same(shape, int_dtype, t, seed):
    """A Python int, 0-d, (1,) and (B,), in any integer dtype; a (B,) of its own per sample."""
    scheduler = make(DDPMScheduler)
    x0, noise = gaussian(seed, shape), gaussian(seed + 1, shape)
    for method in (scheduler.add_noise, scheduler.get_velocity):
        expected = method(x0, noise, t)
        for size in ((), (1,), shape[:1]):
            actual = method(x0, noise, torch.full(size, t, dtype=int_dtype))
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        each = torch.randint(0, T, shape[:1], generator=torch.Generator().manual_seed(seed))
        alone = [method(x[None], n[None], int(i)) for x, n, i in zip(x0, noise, each, strict=True)]
        actual = method(x0, noise, each.to(int_dtype))
        torch.testing.assert_close(actual, torch.cat(alone), rtol=0, atol=0)


def test_empty_batches_pass():
    """B = 0 is a shape like any other, in both processes."""
    x = torch.zeros(0, 1, 4, 4)
    assert make(DDPMScheduler).add_noise(x, x, torch.zeros(0, dtype=torch.int64)).shape == x.shape
    assert make(DDPMScheduler).step(x, 5, x).prev_sample.shape == x.shape
    assert make(DDIMScheduler).step(x, 5, x, eta=0.5).prev_sample.shape == x.shape


@quick
@given(steps, timesteps, st.sampled_from([torch.int32, torch.int64]))
def test_step_takes_an_int_or_a_0d_tensor(step, t, int_dtype):
    """`for t in scheduler.timesteps` works like `for t in scheduler.timesteps.tolist()`."""
    cls, arguments = step
    scheduler = make(cls)
    x, output, z = (gaussian(i, (2, 3)) for i in range(3))
    expected = scheduler.step(output, t, x, variance_noise=z, **arguments)
    tensor = torch.tensor(t, dtype=int_dtype)
    actual = scheduler.step(output, tensor, x, variance_noise=z, **arguments)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@quick
@given(shapes, st.permutations(range(5)), steps, seeds)
def test_memory_layout_does_not_matter(shape, order, step, seed):
    """Transposed (and so channels_last) inputs give the values contiguous ones give."""
    cls, arguments = step
    scheduler, shape = make(cls), [*shape, *[2] * (5 - len(shape))]
    inputs = [gaussian(seed + i, shape) for i in range(3)]
    strided = [
        x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
        for x in inputs
    ]
    results = [
        scheduler.step(output, 50, x, variance_noise=z, **arguments)
        for output, x, z in (inputs, strided)
    ]
    torch.testing.assert_close(results[1].prev_sample, results[0].prev_sample, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ round trips


@quick
@given(shapes, prediction_types, st.sampled_from(BETA_SCHEDULES), timesteps, seeds)
def test_the_true_output_leads_back_to_x0(shape, prediction_type, beta_schedule, t, seed):
    """add_noise, then a step with the true eps, v or x_0: pred_original_sample is x_0."""
    x0, noise = gaussian(seed, shape), gaussian(seed + 1, shape)
    for cls in (DDPMScheduler, DDIMScheduler):
        scheduler = cls(
            T, 1e-3, 0.2, beta_schedule, prediction_type=prediction_type, clip_sample=False
        )
        outputs = {"epsilon": noise, "sample": x0}
        outputs["v_prediction"] = scheduler.get_velocity(x0, noise, t)
        x_t = scheduler.add_noise(x0, noise, t)
        actual = scheduler.step(outputs[prediction_type], t, x_t).pred_original_sample
        # eps: rounding x_t, 2^-53, is divided by sqrt(abar_T), 5e-4 for the cosine schedule of 100
        # steps
        torch.testing.assert_close(actual, x0, rtol=0, atol=1e-11)


@quick
@given(prediction_types, timesteps, st.floats(0.1, 3), seeds)
def test_pred_original_sample_is_clipped_to_the_range(prediction_type, t, clip_range, seed):
    """With clip_sample it is the unclipped one, clamped; the default range is 1."""
    x, output = gaussian(seed, (4, 5)), gaussian(seed + 1, (4, 5))
    for cls in (DDPMScheduler, DDIMScheduler):
        free = make(cls, prediction_type=prediction_type, clip_sample=False)
        clipped = make(cls, prediction_type=prediction_type, clip_sample_range=clip_range)
        default = make(cls, prediction_type=prediction_type)
        x0 = free.step(output, t, x).pred_original_sample
        for scheduler, limit in [(clipped, clip_range), (default, 1.0)]:
            actual = scheduler.step(output, t, x).pred_original_sample
            torch.testing.assert_close(actual, x0.clamp(-limit, limit), rtol=0, atol=0)


CONFIGS = [
    {},
    dict(num_train_timesteps=30, beta_start=0.01, beta_end=0.3, beta_schedule="scaled_linear"),
    dict(beta_schedule="cosine", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    dict(trained_betas=[0.1, 0.2, 0.3], prediction_type="sample", timestep_spacing="leading"),
    dict(
        trained_betas=torch.tensor([0.1, 0.5]),
        prediction_type="sample",
        rescale_betas_zero_snr=True,
    ),
    dict(variance_type="fixed_large", clip_sample=False, timestep_spacing="linspace"),
    dict(clip_sample_range=2.5, beta_schedule="sigmoid"),
]


@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_config_makes_a_twin_through_json(cls, kwargs):
    """config is the constructor's arguments, JSON-able; the twin takes the same step."""
    if cls is DDIMScheduler:
        kwargs = {**kwargs, "eta_convention": "std"}
    scheduler = cls(**kwargs)
    twin = cls(**json.loads(json.dumps(scheduler.config)))
    assert twin.config == scheduler.config
    assert {k: scheduler.config[k] for k in kwargs if k != "trained_betas"} == {
        k: v for k, v in kwargs.items() if k != "trained_betas"
    }
    assert torch.equal(twin.betas, scheduler.betas)
    assert torch.equal(twin.alphas_cumprod, scheduler.alphas_cumprod)
    x, output, z = (gaussian(i, (2, 3)) for i in range(3))
    arguments = {"eta": 0.3} if cls is DDIMScheduler else {}
    for each in (scheduler, twin):
        each.set_timesteps(2)
    t = scheduler.timesteps[0]
    a, b = (s.step(output, t, x, variance_noise=z, **arguments) for s in (scheduler, twin))
    assert torch.equal(a.prev_sample, b.prev_sample)


def test_config_names_every_constructor_argument():
    """All of DDPMScheduler's, and for DDIM eta_convention too: a checkpoint forgets none."""
    ddpm = {
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        *("prediction_type", "variance_type", "clip_sample", "clip_sample_range"),
        *("timestep_spacing", "rescale_betas_zero_snr"),
    }
    assert set(DDPMScheduler().config) == ddpm
    assert set(DDIMScheduler().config) == ddpm | {"eta_convention"}


def test_defaults():
    """What the documentation and checkpoints rely on."""
    config = DDIMScheduler().config
    assert config["num_train_timesteps"] == 1000
    assert (config["beta_start"], config["beta_end"]) == (1e-4, 0.02)
    assert (config["beta_schedule"], config["prediction_type"]) == ("linear", "epsilon")
    assert (config["variance_type"], config["eta_convention"]) == ("fixed_small", "variance")
    assert (config["clip_sample"], config["clip_sample_range"]) == (True, 1.0)
    assert (config["timestep_spacing"], config["rescale_betas_zero_snr"]) == ("trailing", False)
    assert DDPMScheduler().timesteps.tolist() == list(range(999, -1, -1))
    assert DDPMScheduler().timesteps.dtype == torch.int64


def test_trained_betas_are_the_tables():
    """A list or a tensor; their length is T, given or left out."""
    betas = [0.1, 0.2, 0.5]
    for scheduler in (
        DDPMScheduler(trained_betas=betas),
        DDPMScheduler(3, trained_betas=torch.tensor(betas, dtype=torch.float64)),
    ):
        assert scheduler.num_train_timesteps == 3
        assert scheduler.betas.tolist() == betas
        assert scheduler.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.36], rel=1e-15)


# ------------------------------------------------------------------------------------- randomness


def noise_of(scheduler, t, x, arguments, **kwargs):
    """The step's result with an output of zeros: x and the noise, nothing else."""
    return scheduler.step(torch.zeros_like(x), t, x, **arguments, **kwargs).prev_sample


@quick
@given(st.sampled_from([s for s in STEPS if s[1] != {} or s[0] is DDPMScheduler]), dtypes, seeds)
def test_the_same_generator_gives_the_same_noise(step, dtype, seed):
    """A seed decides the step, another seed decides otherwise, and the global RNG is left alone."""
    cls, arguments = step
    scheduler, x = make(cls), gaussian(0, (2, 3), dtype)
    state = torch.get_rng_state()
    results = [
        noise_of(scheduler, 50, x, arguments, generator=torch.Generator().manual_seed(s))
        for s in (seed, seed, seed + 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), state)
    # the noise is drawn in the dtype of the arithmetic, as one randn of the sample's shape
    drawn = torch.promote_types(dtype, torch.float32)
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=drawn)
    if dtype == drawn:
        assert torch.equal(noise_of(scheduler, 50, x, arguments, variance_noise=z), results[0])


@pytest.mark.parametrize("cls, arguments", [STEPS[0], STEPS[2]])
def test_without_a_generator_the_global_rng_decides(cls, arguments):
    """torch.manual_seed makes a step repeatable, and a second step differs."""
    scheduler, x, results = make(cls), gaussian(0, (2, 3)), []
    for _ in range(2):
        torch.manual_seed(3)
        results += [noise_of(scheduler, 50, x, arguments) for _ in range(2)]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


def test_steps_without_noise_draw_none():
    """eta = 0 and every last step leave the generator as it was, and ignore the variance_noise."""
    x, output, generator = (
        gaussian(0, (2, 3)),
        gaussian(1, (2, 3)),
        torch.Generator().manual_seed(0),
    )
    state = generator.get_state()
    cases = [(make(DDIMScheduler), 50, {"eta": 0.0}), (make(DDIMScheduler), 0, {"eta": 1.0})]
    cases += [(make(DDPMScheduler, variance_type=v), 0, {}) for v in VARIANCE_TYPES]
    for scheduler, t, arguments in cases:
        result = scheduler.step(output, t, x, generator=generator, **arguments).prev_sample
        assert torch.equal(generator.get_state(), state)
        z = torch.full_like(x, 1e6)
        other = scheduler.step(output, t, x, variance_noise=z, **arguments).prev_sample
        assert torch.equal(result, other)


# ----------------------------------------------------------------------------- purity and autograd


@quick
@given(steps, dtypes, prediction_types, st.booleans(), st.sampled_from([0, 50]))
def test_inputs_are_never_modified(step, dtype, prediction_type, clip, t):
    """Nor do results share memory with them: writing into a result leaves the inputs alone."""
    cls, arguments = step
    scheduler = make(cls, prediction_type=prediction_type, clip_sample=clip)
    inputs = [3 * gaussian(i, (2, 3), dtype) for i in range(3)]
    output, x, z = inputs
    index = torch.tensor([t, t])
    before = [each.clone() for each in (*inputs, index)]
    results = [
        *scheduler.step(output, t, x, variance_noise=z, **arguments),
        scheduler.add_noise(x, z, index),
        scheduler.add_noise(x, z, t),
        scheduler.get_velocity(x, z, index),
    ]
    copies = [each.clone() for each in results]
    for i, result in enumerate(results):  # nor do they share memory with each other
        result.fill_(7)
        assert all(
            torch.equal(a, b) for a, b in zip(results[i + 1 :], copies[i + 1 :], strict=True)
        )
    for now, then in zip((*inputs, index), before, strict=True):
        assert torch.equal(now, then)
    again = scheduler.add_noise(x, z, index)  # nor with the cached tables
    assert torch.equal(again, copies[2])


def test_tables_are_not_changed_by_use():
    """A whole loop later betas and alphas_cumprod are what they were, and a twin agrees."""
    scheduler, x = make(DDIMScheduler), gaussian(0, (2, 3))
    tables = copy.deepcopy((scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod))
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.add_noise(x, x, t), t, x, eta=0.5).prev_sample
    for now, then in zip(
        (scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod), tables, strict=True
    ):
        assert torch.equal(now, then)


@pytest.mark.parametrize("t", [0, 50, 99])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("cls, arguments", STEPS)
def test_gradients_flow_through_a_step(cls, arguments, prediction_type, clip, t):
    """Autograd's derivatives of both results are the numerical ones; guidance needs them."""
    scheduler = make(cls, prediction_type=prediction_type, clip_sample=clip)
    output, x, z = (gaussian(i, (2, 3)) for i in range(3))

    def step(output, x):
        return tuple(scheduler.step(output, t, x, variance_noise=z, **arguments))

    # gradcheck's own tolerances; its differences of 1e-6 stay clear of the clip's kinks for these
    # seeds
    inputs = (output.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(step, inputs)


def test_gradients_flow_through_the_forward_process():
    """Into x_0 and the noise, for add_noise and get_velocity."""
    scheduler, t = make(DDPMScheduler), torch.tensor([3, 70])
    inputs = (gaussian(0, (2, 3)).requires_grad_(), gaussian(1, (2, 3)).requires_grad_())
    assert torch.autograd.gradcheck(lambda x0, noise: scheduler.add_noise(x0, noise, t), inputs)
    assert torch.autograd.gradcheck(lambda x0, noise: scheduler.get_velocity(x0, noise, t), inputs)


@pytest.mark.parametrize(
    "t", [5, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 6])], ids=str
)
def test_training_works_after_inference_mode(t):
    """Tables cached under inference_mode do not become tensors that autograd refuses later."""
    scheduler, x = make(DDPMScheduler), gaussian(0, (2, 3))
    with torch.inference_mode():
        scheduler.add_noise(x, x, t)
    leaf = x.clone().requires_grad_()
    scheduler.add_noise(leaf, x, t).sum().backward()
    assert leaf.grad is not None


# --------------------------------------------------------------------------------------- refusals

X = torch.zeros(4, 1, 2, 2)
INDEX = torch.zeros(4, dtype=torch.int64)


def ddpm(*args, **kwargs):
    return lambda: DDPMScheduler(*args, **kwargs)


def at(*args, **kwargs):
    return lambda: make(DDPMScheduler).set_timesteps(*args, **kwargs)


def noising(x=X, noise=X, t=INDEX):
    return lambda: make(DDPMScheduler).add_noise(x, noise, t)


def stepping(output=X, t=50, x=X, cls=DDPMScheduler, S=None, **kwargs):
    def call():
        scheduler = make(cls)
        if S is not None:
            scheduler.set_timesteps(S)
        scheduler.step(output, t, x, **kwargs)

    return call


def ddim_at(eta):
    return stepping(cls=DDIMScheduler, eta=eta)


NAN = float("nan")
# What is done, and what the message has to say: the value given and the values allowed.
REFUSALS = {
    # unknown names
    "beta_schedule": (ddpm(beta_schedule="quad"), ["beta_schedule", "'quad'", *BETA_SCHEDULES]),
    "prediction_type": (
        ddpm(prediction_type="eps"),
        ["prediction_type", "'eps'", *PREDICTION_TYPES],
    ),
    "variance_type": (ddpm(variance_type="learned"), ["'learned'", *VARIANCE_TYPES]),
    "spacing": (ddpm(timestep_spacing="even"), ["timestep_spacing", "'even'", *TIMESTEP_SPACINGS]),
    "eta_convention": (
        lambda: DDIMScheduler(eta_convention="sigma"),
        ["eta_convention", "'sigma'", *ETA_CONVENTIONS],
    ),
    "None for a name": (ddpm(beta_schedule=None), ["beta_schedule", "None", *BETA_SCHEDULES]),
    "make_betas": (lambda: module.make_betas("quad", 5, 0.1, 0.2), ["'quad'", *BETA_SCHEDULES]),
    # T
    "T = 0": (ddpm(0), ["num_train_timesteps", ">= 1", "0"]),
    "T < 0": (ddpm(-5), ["num_train_timesteps", ">= 1", "-5"]),
    "T is a float": (ddpm(10.0), ["num_train_timesteps", "int", "10.0"]),
    "T is a bool": (ddpm(True), ["num_train_timesteps", "int", "True"]),
    "T is a str": (ddpm("1000"), ["num_train_timesteps", "int", "'1000'"]),
    # betas
    "beta = 0": (ddpm(5, 0.0, 0.5), ["beta", "(0, 1)", "[0, 0.5]"]),
    "beta = 1": (ddpm(5, 0.1, 1.0), ["beta", "(0, 1)", "[0.1, 1]"]),
    "beta > 1": (ddpm(5, 0.1, 1.5), ["beta", "(0, 1)", "1.5"]),
    "beta < 0": (ddpm(5, -0.1, 0.5), ["beta", "(0, 1)", "-0.1"]),
    "beta is NaN": (ddpm(5, NAN, 0.5), ["beta", "(0, 1)", "nan"]),
    "scaled beta = 0": (ddpm(5, 0.0, 0.5, "scaled_linear"), ["beta", "(0, 1)", "[0, 0.5]"]),
    "scaled beta < 0": (ddpm(5, -0.1, 0.5, "scaled_linear"), ["beta", "(0, 1)", "-0.1"]),
    "sigmoid beta > 1": (ddpm(5, 0.1, 1.5, "sigmoid"), ["beta", "(0, 1)", "1.49"]),
    "trained beta = 0": (ddpm(trained_betas=[0.1, 0.0]), ["beta", "(0, 1)", "[0, 0.1]"]),
    "trained beta = 0 to float64": (ddpm(trained_betas=[1e-18, 0.1]), ["beta", "(0, 1)", "1e-18"]),
    "trained beta = 1": (ddpm(trained_betas=[0.1, 1.0]), ["beta", "(0, 1)", "[0.1, 1]"]),
    "trained beta is NaN": (ddpm(trained_betas=[0.1, NAN]), ["beta", "(0, 1)", "nan"]),
    "trained betas too few": (
        ddpm(5, trained_betas=[0.1, 0.2]),
        ["trained_betas", "5", "2 values"],
    ),
    "trained betas of none": (ddpm(trained_betas=[]), [">= 1", "0"]),
    "trained betas 2-d": (ddpm(trained_betas=[[0.1], [0.2]]), ["trained_betas", "(T,)", "(2, 1)"]),
    "trained betas 0-d": (ddpm(trained_betas=0.1), ["trained_betas", "(T,)", "()"]),
    # clipping and zero SNR
    "clip range = 0": (ddpm(clip_sample_range=0), ["clip_sample_range", "> 0", "not 0"]),
    "clip range < 0": (ddpm(clip_sample_range=-1.0), ["clip_sample_range", "> 0", "-1.0"]),
    "clip range is NaN": (ddpm(clip_sample_range=NAN), ["clip_sample_range", "> 0", "nan"]),
    "eps at zero SNR": (
        ddpm(rescale_betas_zero_snr=True),
        ["'epsilon'", "'v_prediction'", "'sample'"],
    ),
    "zero SNR too early": (
        ddpm(1000, 0.9, 0.9, prediction_type="sample"),
        ["betas", "abar", "0", "last timestep"],
    ),
    "zero SNR of T = 1": (
        ddpm(1, rescale_betas_zero_snr=True, prediction_type="sample"),
        ["rescale_betas_zero_snr", ">= 2", "1"],
    ),
    # set_timesteps
    "S > T": (at(T + 1), ["num_inference_steps", f"[1, {T}]", f"{T + 1}"]),
    "S = 0": (at(0), ["num_inference_steps", f"[1, {T}]", "not 0"]),
    "S < 0": (at(-3), ["num_inference_steps", f"[1, {T}]", "-3"]),
    "S is a float": (at(10.0), ["num_inference_steps", "int", "10.0"]),
    "S is a bool": (at(True), ["num_inference_steps", "int", "True"]),
    "S and timesteps": (at(2, timesteps=[3, 1]), ["one of", "num_inference_steps", "timesteps"]),
    "neither": (at(), ["one of", "num_inference_steps", "timesteps"]),
    "list ascending": (at(timesteps=[1, 3]), ["strictly descending", "[1, 3]"]),
    "list repeating": (at(timesteps=[3, 3]), ["strictly descending", "[3, 3]"]),
    "list too high": (at(timesteps=[T, 3]), [f"[0, {T})", f"[{T}, 3]"]),
    "list too low": (at(timesteps=[3, -1]), [f"[0, {T})", "[3, -1]"]),
    "list empty": (at(timesteps=[]), ["non-empty", "[]"]),
    "list of floats": (at(timesteps=[3.0, 1.0]), ["ints", "[3.0, 1.0]"]),
    "list of lists": (at(timesteps=[[3], [1]]), ["ints", "[[3], [1]]"]),
    "list is an int": (at(timesteps=3), ["list of ints", "not 3"]),
    # add_noise and get_velocity
    "noise shape": (noising(noise=X[:2]), ["noise", "(2, 1, 2, 2)", "(4, 1, 2, 2)"]),
    "noise broadcasts": (noising(noise=X[:1]), ["noise", "(1, 1, 2, 2)", "(4, 1, 2, 2)"]),
    "t of another batch": (noising(t=INDEX[:3]), ["timesteps", "(3,)", "(1,)", "(4,)"]),
    "t of two dims": (noising(t=INDEX[:, None]), ["timesteps", "(4, 1)", "(4,)"]),
    "t is a float": (noising(t=3.0), ["timesteps", "integers", "float"]),
    "t is a float tensor": (noising(t=INDEX.float()), ["timesteps", "integers", "float32"]),
    "t is a bool tensor": (noising(t=INDEX.bool()), ["timesteps", "integers", "bool"]),
    "samples of integers": (noising(x=INDEX, noise=INDEX), ["floats", "int64"]),
    "t too high": (noising(t=INDEX + T), ["timesteps", f"[0, {T})", f"{T}"]),
    "t too low": (noising(t=INDEX - 1), ["timesteps", f"[0, {T})", "-1"]),
    "one t too high": (noising(t=T), ["timesteps", f"[0, {T})", f"{T}"]),
    "one t too low": (noising(t=-1), ["timesteps", f"[0, {T})", "-1"]),
    "velocity's noise": (
        lambda: make(DDPMScheduler).get_velocity(X, X[:2], INDEX),
        ["noise", "(2, 1, 2, 2)", "(4, 1, 2, 2)"],
    ),
    "velocity's t": (
        lambda: make(DDPMScheduler).get_velocity(X, X, INDEX + T),
        ["timesteps", f"[0, {T})", f"{T}"],
    ),
    # step
    "t not in the list": (
        stepping(t=50, S=10),
        ["timestep 50", "10 timesteps", "99, 89, 79, ..., 9"],
    ),
    "t not in a short list": (stepping(t=50, S=2), ["timestep 50", "2 timesteps", "99, 49"]),
    "t beyond T": (stepping(t=T), [f"timestep {T}", f"{T} timesteps"]),
    "t = -1": (stepping(t=-1), ["timestep -1", f"{T} timesteps"]),
    "t between two": (stepping(t=50.5), ["timestep 50.5", f"{T} timesteps"]),
    "ddim: t not in the list": (stepping(t=50, S=2, cls=DDIMScheduler), ["timestep 50", "99, 49"]),
    "output shape": (stepping(output=X[:2]), ["model_output", "(2, 1, 2, 2)", "(4, 1, 2, 2)"]),
    "output broadcasts": (stepping(output=X[:, :, :1]), ["model_output", "(4, 1, 1, 2)"]),
    "step's noise shape": (stepping(variance_noise=X[:1]), ["variance_noise", "(1, 1, 2, 2)"]),
    "generator and noise": (
        stepping(variance_noise=X, generator=torch.Generator()),
        ["one of", "generator", "variance_noise"],
    ),
    "ddim: output shape": (
        stepping(output=X[:2], cls=DDIMScheduler),
        ["model_output", "(2, 1, 2, 2)"],
    ),
    "ddim: generator and noise": (
        stepping(variance_noise=X, generator=torch.Generator(), cls=DDIMScheduler),
        ["one of", "generator", "variance_noise"],
    ),
    "eta < 0": (ddim_at(-0.1), ["eta", "[0, 1]", "-0.1"]),
    "eta > 1": (ddim_at(1.01), ["eta", "[0, 1]", "1.01"]),
    "eta is NaN": (ddim_at(NAN), ["eta", "[0, 1]", "nan"]),
    "eta is infinite": (ddim_at(math.inf), ["eta", "[0, 1]", "inf"]),
}


@pytest.mark.parametrize("call, words", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_say_what_was_given_and_what_is_allowed(call, words):
    """A ValueError of one sentence; the message names both, so that it can be acted on."""
    with pytest.raises(ValueError) as info:
        call()
    assert type(info.value) is ValueError
    message = str(info.value)
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"
    assert "\n" not in message and not re.search(r"[.!?] +[A-Z]", message), "more than one sentence"
    assert len(message) < 200


def test_a_refused_call_changes_nothing():
    """After a refused set_timesteps the old timesteps are still in use."""
    scheduler = make(DDPMScheduler)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.tolist()
    for arguments in ({"num_inference_steps": T + 1}, {"timesteps": [1, 3]}, {"timesteps": [T]}):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == before
    assert [scheduler.previous_timestep(t) for t in before] == [*before[1:], -1]


@pytest.mark.parametrize("form", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_custom_timesteps_are_taken_as_given(form):
    """Any strictly descending subset, as a list, tuple or tensor; one timestep is enough."""
    scheduler = make(DDIMScheduler)
    for ts in ([99, 40, 7, 0], [99], [0], list(range(T - 1, -1, -1))):
        scheduler.set_timesteps(timesteps=form(ts))
        assert scheduler.timesteps.tolist() == ts
        assert scheduler.timesteps.dtype == torch.int64
