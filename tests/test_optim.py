"""training/optim.py: learning rate, moving average, Muon and the choice of optimizer."""

import pytest
import torch

from training.optim import (
    Muon,
    ema_decay,
    learning_rate_factor,
    make_optimizers,
    orthogonalize,
    update_ema,
)
from unet import UNet


def test_learning_rate():
    factors = [learning_rate_factor(step, 1000, 100) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert all(b > a for a, b in zip(factors[:99], factors[1:100], strict=True))
    assert all(b < a for a, b in zip(factors[100:], factors[101:], strict=False))
    assert factors[500] == pytest.approx(0.5)
    assert factors[1000] == pytest.approx(0, abs=1e-12)
    # a short run still warms up
    assert learning_rate_factor(2, 10, 100) == pytest.approx(0.8)


def test_ema():
    """Unrolled by hand; the warm-up forgets the random start at once."""
    model, ema = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    expected = ema.weight.detach().double()
    for step in range(20):
        torch.nn.init.normal_(model.weight)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        update_ema(ema, model, torch.tensor(1 - ema_decay(step, 0.7)))
    torch.testing.assert_close(ema.weight.double(), expected, rtol=0, atol=1e-6)
    assert ema_decay(0, 0.999) == 0.1
    assert ema_decay(10**6, 0.999) == 0.999


def test_orthogonalize():
    """The singular values come near 1 and the singular vectors stay: the oracle is the SVD."""
    shapes = [(8, 8), (8, 40), (40, 8), (6, 20), (5, 5)]
    generator = torch.Generator().manual_seed(0)
    matrices = [10.0**i * torch.randn(s, generator=generator) for i, s in enumerate(shapes, -3)]
    for G, X in zip(matrices, orthogonalize(matrices), strict=True):
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        singular = torch.diagonal(U.mT @ X @ Vh.mT)
        well_posed = S.max() * 0.05 < S
        # Jordan's coefficients do not converge: they leave singular values within about (0.7, 1.2).
        assert singular[well_posed].min() > 0.6
        assert singular[well_posed].max() < 1.3
        torch.testing.assert_close(U @ torch.diag(singular) @ Vh, X, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(12, 4, 3, 3), (36, 3, 2, 2)])  # wide and tall as a matrix
def test_muon_matches_torchs(shape):
    """torch.optim.Muon on the 2-D view of a convolution takes the same step."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    ours = torch.nn.Parameter(weight.clone(memory_format=torch.channels_last))
    theirs = torch.nn.Parameter(weight.flatten(1).clone())
    muon = Muon([ours], lr=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95)
    for _ in range(3):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient, gradient.flatten(1)
        muon.step()
        reference.step()
    # torch's iterates in bfloat16 (8 bits): 3 steps of 0.1 with entries of about 1/6 to 1/3
    difference = ours.detach().flatten(1) - theirs.detach()
    assert difference.abs().max() < 0.02
    assert (ours.detach() - weight).abs().mean() > 0.02  # and it did move


def test_every_parameter_has_one_optimizer():
    model = UNet(channels=8)
    optimizers = make_optimizers(model, 1e-3, 0.02)
    ids = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    assert len(make_optimizers(model, 1e-3, 0.0)) == 1
    muon = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    assert "middle1.conv1.weight" in names and "attention.qkv.weight" in names
    assert all(name.endswith("weight") for name in names)
    assert not [n for n in names if "embed" in n or "scale_shift" in n or n[:4] in ("stem", "head")]
