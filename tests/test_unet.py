"""unet.py: shapes, what the output depends on, and the figures of its docstring."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import unet
from unet import UNet


def awake(model: UNet) -> UNet:
    """Zero-initialised layers given random weights, so that everything has an effect."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if not p.any():
            p.data.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (2, 2), (30, 26), (64, 6)])
def test_any_even_size_and_channel_count(channels, size):
    model = awake(UNet(in_channels=channels, channels=8))
    x = torch.randn(2, channels, *size)
    assert model(x, torch.tensor([3, 900])).shape == x.shape


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 1, "channel_mults": (1, 2, 4)},
        {"patch_size": 4, "channel_mults": (2,), "num_blocks": 1},
        {"attention": False},
        {"channels": 24},
        {"channels": 50},  # 100 at the lower level, which no head of about 32 divides
    ],
)
def test_config_makes_a_twin(config):
    model = awake(UNet(**{"channels": 8, **config}))
    twin = UNet(**json.loads(json.dumps(model.config)))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(x, 5), twin.eval()(x, 5))


def test_starts_as_zero_and_every_parameter_learns():
    model = UNet(channels=8, num_classes=10)
    x, t, labels = torch.randn(4, 1, 28, 28), torch.arange(4) * 100, torch.arange(4)
    assert not model(x, t, labels).any()
    awake(model)(x, t, labels).square().sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_attention_is_over_positions():
    """Vaswani et al. 2017, eq. 1, written out for 2 heads of 32 channels."""
    attention = awake(unet.SelfAttention(64))
    x = torch.randn(2, 64, 3, 5)
    tokens = attention.norm(x).flatten(2).mT  # (B, positions, channels)
    q, k, v = (h.unflatten(2, (2, 32)).transpose(1, 2) for h in attention.qkv(tokens).chunk(3, 2))
    h = (q @ k.mT / 32**0.5).softmax(-1) @ v
    expected = x + attention.out(h.transpose(1, 2).flatten(2)).mT.unflatten(2, (3, 5))
    torch.testing.assert_close(attention(x), expected)


def test_depends_on_its_own_image_and_time_only():
    model = awake(UNet(channels=8))
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([0, 500, 999])
    y = model(x, t)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1]), y[i : i + 1])
    assert (model(x, 0)[1] - model(x, 999)[1]).abs().max() > 1e-3
    torch.testing.assert_close(model(x, 7), model(x, torch.full((3,), 7)))


def test_labels():
    model = awake(UNet(channels=8, num_classes=10))
    x = torch.randn(2, 1, 28, 28)
    null = model(x, 5, torch.tensor([10, 10]))
    torch.testing.assert_close(model(x, 5), null)
    assert (model(x, 5, torch.tensor([3, 3])) - null).abs().max() > 1e-3
    with pytest.raises(ValueError, match="labels"):
        UNet(channels=8)(x, 5, torch.tensor([3, 3]))


@pytest.mark.parametrize(
    "config",
    [
        {"channels": 7},
        {"channels": 0},
        {"channel_mults": ()},
        {"num_blocks": 0},
        {"patch_size": -2},
    ],
)
def test_refusals(config):
    with pytest.raises(ValueError, match="UNet takes"):
        UNet(**config)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        UNet(channels=8)(torch.randn(1, 1, 27, 28), 0)


def test_the_docstrings_table_of_parameters_and_flops():
    rows = {
        line.split()[0]: line.split()[1:6] for line in unet.__doc__.splitlines() if line.strip()
    }
    classic = {"patch_size": 1, "channel_mults": (1, 2, 4)}
    for i, config in enumerate([{"channels": c} for c in (32, 48, 64, 96)] + [classic]):
        model = UNet(**config)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 1, 28, 28), 0)
        assert rows["parameters"][i] == f"{parameters:.2f}M"
        # torch's versions do not all count attention alike
        assert float(rows["MFLOP"][i]) == pytest.approx(counter.get_total_flops() / 1e6, rel=0.005)


def test_the_embedding_is_that_of_the_transformer():
    """Vaswani et al. 2017, section 3.5: sine and cosine of t / 10000^(2 i / dim)."""
    t, dim = torch.tensor([0, 3, 999]), 8
    embedding = unet.timestep_embedding(t, dim)
    for i in range(dim // 2):
        angle = t / 10_000 ** (2 * i / dim)
        torch.testing.assert_close(embedding[:, i], angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(embedding[:, i + dim // 2], angle.sin(), rtol=0, atol=1e-4)
