"""diffusion.py: Algorithm 1 and Algorithm 2 against closed forms, and what a sample depends on."""

from types import SimpleNamespace

from lab.noise import image_noise

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diffusion import draw_timesteps, guided, sample, training_loss
from scheduler import PREDICTION_TYPES, SAMPLERS, DDIMScheduler, DDPMScheduler
from unet import UNet

UNIFORM = torch.arange(1, 1001) / 1000


def cosine(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="cosine", prediction_type=prediction_type)


def draws(n: int, shape: tuple, seed: int = 0, cdf=UNIFORM):
    """Return the t and eps that `training_loss` draws: first t, then eps."""
    generator = torch.Generator().manual_seed(seed)
    t = draw_timesteps(cdf, n, generator)
    return t, torch.randn(n, *shape, generator=generator)


def loss_of(answer, scheduler, x0, weights=None, **kwargs) -> torch.Tensor:
    """Return the training loss of a network that gives this answer."""
    weights = torch.ones(1000) if weights is None else weights
    generator = torch.Generator().manual_seed(0)
    return training_loss(lambda x, t: answer, scheduler, x0, UNIFORM, weights, generator, **kwargs)


# ----------------------------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_zero_for_the_true_target(prediction_type):
    scheduler, x0 = cosine(prediction_type), torch.randn(4, 1, 6, 6)
    t, eps = draws(4, (1, 6, 6))
    velocity = scheduler.get_velocity(x0, eps, t)
    targets = {"epsilon": eps, "v_prediction": velocity, "sample": x0}
    truth = targets[prediction_type]
    assert loss_of(truth, scheduler, x0) == 0
    # and the other two targets are not accepted in its place
    assert all(
        loss_of(other, scheduler, x0) > 0.1 for other in targets.values() if other is not truth
    )


def test_the_network_sees_x_t_and_t():
    scheduler, x0, seen = cosine("epsilon"), torch.randn(5, 1, 4, 4), []

    def network(x_t, t):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    generator = torch.Generator().manual_seed(0)
    loss = training_loss(network, scheduler, x0, UNIFORM, torch.ones(1000), generator)
    t, eps = draws(5, (1, 4, 4))
    abar = scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    assert torch.equal(seen[0][1], t)
    torch.testing.assert_close(seen[0][0], abar.sqrt() * x0 + (1 - abar).sqrt() * eps)
    torch.testing.assert_close(loss, eps.square().mean())


def test_the_shares_of_a_batch_add_up_to_the_batch():
    """Several processes take the step of one: each computes its rows of the same draws."""
    scheduler, x0 = cosine("v_prediction"), torch.randn(6, 1, 4, 4)
    weights = torch.linspace(1, 3, 1000)

    def loss(share):
        generator = torch.Generator().manual_seed(0)
        network = lambda x, t: x * t.view(-1, 1, 1, 1) / 1000  # noqa: E731
        return training_loss(network, scheduler, x0, UNIFORM, weights, generator, share)

    parts = [loss(range(2 * i, 2 * i + 2)) for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(None))
    assert len({part.item() for part in parts}) == 3


def test_timesteps_are_stratified():
    """n draws take exactly one from each n-th of the distribution."""
    T = 1000
    cdf = torch.arange(1, T + 1) / T
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(T)
    for _ in range(200):
        t = draw_timesteps(cdf, 50, generator)
        assert torch.equal(t // (T // 50), torch.arange(50))
        counts += torch.bincount(t, minlength=T)
    assert counts.min() > 0  # 10 draws of each are expected


# ----------------------------------------------------------------------------------- Algorithm 2


@pytest.mark.parametrize(
    ("sampler", "arguments"), [("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.5}), ("ddpm", {})]
)
def test_sample_recovers_gaussian_data(sampler, arguments):
    """With the optimal denoiser of N(m, s^2) the samples have mean m and deviation s."""
    m, s = 0.3, 0.5
    scheduler = SAMPLERS[sampler](200, beta_schedule="cosine", clip_sample=False)
    scheduler.set_timesteps(200)

    def eps(x, t):  # E[eps | x_t] = sqrt(1 - abar) (x_t - sqrt(abar) m) / (abar s^2 + 1 - abar)
        abar = scheduler.alphas_cumprod[t].item()
        return (1 - abar) ** 0.5 * (x - abar**0.5 * m) / (abar * s**2 + 1 - abar)

    x = sample(eps, scheduler, torch.arange(50), (1, 20, 20), **arguments)
    # 20,000 pixels and 5 standard errors; 0.003 and 0.01 allow for 200 steps being finitely many
    assert abs(x.mean() - m) < 5 * s / 20_000**0.5 + 0.003
    assert abs(x.std() - s) < 5 * s / 40_000**0.5 + 0.01


def test_the_noise_of_every_step_is_the_image_s():
    """Step k adds draw k of the image's noise, and the last step adds none."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    indices, x = torch.arange(5, 8), None
    made = sample(lambda x, t: 0 * x, scheduler, indices, (1, 4, 4), seed=2, eta=1.0)
    x = image_noise(2, indices, 0, (1, 4, 4))
    for k, t in enumerate(scheduler.timesteps.tolist(), start=1):
        z = image_noise(2, indices, k, (1, 4, 4))
        x = scheduler.step(0 * x, t, x, eta=1.0, variance_noise=z).prev_sample
    torch.testing.assert_close(made, x, rtol=0, atol=0)


def test_sampling_from_a_given_noise():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    indices, shape = torch.arange(3), (1, 8, 8)

    def run(indices, eta, **start):
        return sample(lambda x, t: 0.1 * x, scheduler, indices, shape, eta=eta, **start)

    for eta in (0.0, 1.0):
        x_T = image_noise(0, indices, 0, shape)
        drawn = run(indices, eta)
        assert torch.equal(drawn, run(indices, eta, x_T=x_T))
        assert torch.equal(drawn[:1], run(indices[:1], eta, x_T=x_T[:1]))
        assert not torch.equal(drawn, run(indices, eta, x_T=x_T + 1))


def test_the_callback_sees_x_t_and_the_predicted_x0():
    scheduler = DDIMScheduler(prediction_type="sample")
    scheduler.set_timesteps(4)
    seen = []
    sample(
        lambda x, t: torch.full_like(x, 0.25),
        scheduler,
        torch.arange(1),
        (1, 4, 4),
        callback=lambda t, x_t, x0: seen.append((t, x_t, x0)),
    )
    assert [t for t, _, _ in seen] == scheduler.timesteps.tolist()
    assert torch.equal(seen[0][1], image_noise(0, torch.arange(1), 0, (1, 4, 4)))
    assert all(x_t.shape == x0.shape == (1, 1, 4, 4) for _, x_t, x0 in seen)
    assert all((x0 == 0.25).all() for _, _, x0 in seen)


# ------------------------------------------------------------------------------ a GPU without a GPU


def fake_mode() -> FakeTensorMode:
    """Return a mode whose new tensors have no contents; reading one back to Python raises.

    So device "cuda" needs no GPU. Real tensors, such as a scheduler's tables, may take part.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def unet_on_cuda() -> UNet:
    with torch.device("cuda"):
        return UNet(channels=8)


class CudaGenerator:
    """A stand-in for torch.Generator("cuda"), which cannot be made without CUDA."""

    device = torch.device("cuda")


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # autocast says so
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_training_step_stays_on_the_gpu(monkeypatch, prediction_type):
    """Forward pass and loss: every tensor is on the device, and nothing is read back."""
    scheduler = cosine(prediction_type)
    for name in ("rand", "randn"):
        draw = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, d=draw, generator, **k: d(*a, **k))
    devices = []

    def network(x_t, t):
        devices.extend((x_t.device.type, t.device.type))
        return model(x_t, t)

    with fake_mode():
        model = unet_on_cuda()
        x0, cdf, weights = (
            torch.zeros(shape, device="cuda") for shape in ((4, 1, 28, 28), (1000,), (1000,))
        )
        loss = training_loss(network, scheduler, x0, cdf, weights, CudaGenerator())
        assert devices == ["cuda", "cuda"] and loss.device.type == "cuda"
        assert loss.shape == () and loss.dtype == torch.float32
        with pytest.raises(DataDependentOutputException):
            loss.item()  # so a read-back inside the step would have raised, too


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_sampling_stays_on_the_gpu(prediction_type):
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type=prediction_type)
    scheduler.set_timesteps(3)
    timesteps, devices = scheduler.timesteps.tolist(), []
    scheduler.timesteps = SimpleNamespace(tolist=lambda: timesteps)  # the mode would hide them
    with fake_mode():
        x = sample(
            unet_on_cuda(),
            scheduler,
            torch.arange(4, device="cuda"),
            (1, 28, 28),
            eta=0.5,
            callback=lambda t, x_t, x0: devices.extend((x_t.device.type, x0.device.type)),
        )
    assert x.device.type == "cuda" and x.shape == (4, 1, 28, 28) and x.dtype == torch.float32
    assert devices == ["cuda"] * 6


# -------------------------------------------------------------------------------------- guidance


def labelled_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(channels=8, num_classes=3).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn_like(p))  # the head starts at zero
    return unet


@torch.inference_mode()
def test_guidance_mixes_the_outputs_with_and_without_the_label():
    """uncond + scale (cond - uncond), in one call of twice as many images."""
    unet, x_t = labelled_unet(), torch.randn(4, 1, 8, 8)
    t, labels = torch.tensor([500]), torch.tensor([0, 1, 2, 1])
    cond, uncond = unet(x_t, t, labels), unet(x_t, t)
    assert (cond - uncond).abs().mean() > 1e-3
    for scale in (0.0, 0.5, 1.0, 3.0):
        wanted = uncond + scale * (cond - uncond)
        got = guided(unet, labels, scale)(x_t, t)
        assert torch.equal(guided(unet, labels, scale)(x_t, 500), got)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    sizes = []
    unet.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    guided(unet, labels, 2.0)(x_t, t)
    guided(unet, labels, 1.0)(x_t, t)
    assert sizes == [8, 4]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guidance_is_the_same_for_every_prediction_type_and_sampler(sampler, prediction_type):
    """The output of one network, expressed as eps, v or x_0, is guided to the same images."""

    class Network:
        config = {"num_classes": 3}

        def __init__(self, scheduler):
            self.scheduler = scheduler

        def __call__(self, x_t, t, labels):
            t = t.expand(len(x_t))
            abar = self.scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
            x0 = 0.1 * (labels.view(-1, 1, 1, 1) - 1) + 0.2 * abar * x_t
            eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
            v = self.scheduler.get_velocity(x0, eps, t)
            return {"sample": x0, "epsilon": eps, "v_prediction": v}[prediction_type]

    def images(kind):
        scheduler = SAMPLERS[sampler](100, beta_schedule="cosine", prediction_type=kind)
        scheduler.set_timesteps(5)
        model = guided(Network(scheduler), torch.tensor([0, 1, 2, 2]), 2.0)
        return sample(model, scheduler, torch.arange(4), (1, 4, 4), seed=1)

    ours = images(prediction_type)
    prediction_type = "sample"
    torch.testing.assert_close(ours, images("sample"), rtol=0, atol=1e-4)


def test_a_lone_image_is_guided_as_in_a_batch():
    unet, scheduler = labelled_unet(), DDIMScheduler(beta_schedule="cosine")
    scheduler.set_timesteps(3)
    labels = torch.tensor([0, 1, 2])
    together = sample(guided(unet, labels, 2.0), scheduler, torch.arange(3), (1, 8, 8))
    for i in range(3):
        alone = guided(unet, labels[i : i + 1], 2.0)
        lone = sample(alone, scheduler, torch.arange(i, i + 1), (1, 8, 8))
        torch.testing.assert_close(lone[0], together[i], rtol=0, atol=1e-5)
