"""training/graph.py: a step that is captured and replayed is the step that is taken otherwise."""

from dataclasses import replace
from types import SimpleNamespace

from lab.checkpoint import load_model
from lab.device import bfloat16_convolutions
from lab.distributed import Process

import pytest
import torch
from test_diffusion import CudaGenerator, fake_mode
from test_run import TINY, images
from torch._subclasses.fake_tensor import DataDependentOutputException

import distill
from training.graph import GraphedStep, make_step
from training.optim import Muon
from training.run import Training
from unet import UNet

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Stub(GraphedStep):
    """A graph for devices that have none. It repeats what it captured, on the same memory."""

    def run_beside(self):
        with bfloat16_convolutions():
            return self.compute()

    def capture(self):
        self.captures = getattr(self, "captures", 0) + 1
        loss, norm = torch.zeros(()), torch.zeros(())
        rates = [group["lr"] for o in self.run.optimizers for group in o.param_groups]

        class Graph:
            @staticmethod
            def replay():
                mine = [group["lr"] for o in self.run.optimizers for group in o.param_groups]
                assert all(a is b for a, b in zip(rates, mine, strict=True))
                for place, value in zip((loss, norm), self.run_beside(), strict=True):
                    place.copy_(value)

        return Graph, loss, norm


def train(run, step, steps):
    """Return losses and gradient norms (steps, 2), and the EMA weights after these steps."""
    figures = torch.stack([torch.stack(step()) for _ in range(steps)])
    assert run.step == steps
    return [figures, *run.ema.parameters()]


def plain_step(run):
    def step():
        with bfloat16_convolutions():
            loss = run.loss(run.model, *run.next_batch(), run.generator)
            return loss.detach(), run.update(loss)

    return step


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def training(device="cpu"):
    labels = torch.arange(10, device=device)
    return Training(replace(TINY, labels=True), images().to(device), labels)


def test_a_replayed_step_is_the_step():
    """Images, labels, noise, learning rates and the EMA's weight are those of each step."""
    expected = train(run := training(), plain_step(run), 12)
    run = training()
    step = Stub(run, run.model)
    assert_same(train(run, step, 12), expected, rtol=0, atol=0)
    assert step.captures == 1


def test_each_round_of_a_distillation_has_its_own_graph(tiny_checkpoint, train_split):
    source = load_model(tiny_checkpoint)[1]
    recipe = distill.Recipe(teacher_steps=64, student_steps=16, updates=5, batch_size=4)

    def distillation():
        return distill.Distillation(recipe, *train_split, source, "tiny.pt")

    expected = train(run := distillation(), plain_step(run), 10)
    run = distillation()
    step = Stub(run, run.model)
    assert_same(train(run, step, 10), expected, rtol=0, atol=0)
    assert step.captures == 2


def test_without_a_gpu_no_step_is_graphed():
    run = training()
    step = make_step(run, run.model, Process(torch.device("cpu")))
    assert not isinstance(step, GraphedStep)
    assert_same(train(run, step, 3), train(run := training(), plain_step(run), 3))


def test_the_batch_and_the_update_stay_on_the_gpu(monkeypatch):
    """What is captured reads nothing back. No GPU is needed: the tensors have no contents.

    The loss is in test_diffusion.py. The backward pass and torch's AdamW need a GPU, so the
    gradients are made here, and AdamW is left out.
    """
    draw = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, generator, **k: draw(*a, **k))
    run = training()
    with fake_mode():
        with torch.device("cuda"):
            run.model, run.ema = (UNet(**run.model.config) for _ in range(2))
        run.ema.requires_grad_(False)
        for name in ("images", "labels", "ema_weight"):
            setattr(run, name, torch.zeros_like(getattr(run, name), device="cuda"))
        run.generator = CudaGenerator()
        muon = [p for name, p in run.model.named_parameters() if "conv" in name and p.ndim == 4]
        run.optimizers = [Muon(muon, torch.zeros((), device="cuda"))]
        run.optimizers[0].param_groups[0]["peak_lr"] = 0.02

        def backward():
            for p in run.model.parameters():
                p.grad = torch.zeros_like(p)

        for _ in range(2):  # the first makes the moments
            x0, labels = run.batch(torch.zeros(4, dtype=torch.int64, device="cuda"))
            run.set_rates()
            norm = run.apply(SimpleNamespace(backward=backward))
            for result in (x0[0, 0, 0, 0], labels[0], norm):
                assert result.device.type == "cuda"
                with pytest.raises(DataDependentOutputException):
                    result.item()


@needs_a_gpu
def test_a_graph_on_a_gpu_takes_the_same_steps():
    """The network runs in bfloat16, and the sums of a GPU have no fixed order."""
    device = torch.device("cuda")
    expected = train(run := training(device), plain_step(run), 12)
    run = training(device)
    step = make_step(run, run.model, Process(device))
    assert isinstance(step, GraphedStep)
    found = train(run, step, 12)
    assert step.graph is not None
    assert_same(found, expected, rtol=0.02, atol=0.01)


@needs_a_gpu
def test_rounds_on_a_gpu(tiny_checkpoint, train_split):
    source = load_model(tiny_checkpoint)[1]
    recipe = distill.Recipe(teacher_steps=64, student_steps=16, updates=5, batch_size=4)
    split = [x.to("cuda") for x in train_split]
    expected, found = (
        train(run := distill.Distillation(recipe, *split, source, "tiny.pt"), kind(run), 10)
        for kind in (plain_step, lambda run: GraphedStep(run, run.model))
    )
    assert_same(found, expected, rtol=0.02, atol=0.01)
