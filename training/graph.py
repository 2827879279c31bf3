"""A training step, started operation by operation or, on a CUDA GPU, all at once.

A step consists of about 1,360 small operations on the GPU. To start them one by one takes longer
than to run them: 43 ms instead of 7 ms for 256 images on an H100, see benchmarks/README.md. A CUDA
graph starts all of them with one call. It repeats exactly the operations that were captured, on the
same memory. So what changes from step to step must be on the device: the indices of the images, the
learning rates, the weight of the EMA, and the state of the random generator.
"""

from collections.abc import Callable

from lab.device import bfloat16_convolutions
from lab.distributed import Process

import torch
from torch import Tensor, nn

from training.run import Run

Step = Callable[[], tuple[Tensor, Tensor]]  # returns the loss and the norm of the gradient


def make_step(run: Run, model: nn.Module, process: Process) -> Step:
    """Return a function that takes the next step of a run.

    Args:
        model: `run.model`, perhaps wrapped.

    Returns:
        A function that returns the loss and the norm of the gradient, still on the device. On a
        CUDA GPU it uses a graph, unless the model is wrapped (by torch.compile, or for several
        processes).
    """
    if process.device.type == "cuda" and model is run.model:
        return GraphedStep(run, model)
    share = process.share(run.recipe.batch_size)

    def step() -> tuple[Tensor, Tensor]:
        x0, labels = run.next_batch()
        with bfloat16_convolutions():
            loss = run.loss(model, x0, labels, run.generator, share)
            return loss.detach(), run.update(loss)

    return step


class GraphedStep:
    """A training step as a CUDA graph. Its first steps are taken without it.

    In those steps the libraries set themselves up, and the optimizers make their moments. A graph
    that had this in it would reset the moments in every step. When a run has new optimizers, as at
    each round of distill.py, a new graph is captured.
    """

    WARM_UP = 3

    def __init__(self, run: Run, model: nn.Module):
        self.run, self.model = run, model
        self.indices = torch.zeros(
            run.recipe.batch_size, dtype=torch.int64, device=run.images.device
        )
        self.optimizers: list | None = None
        self.side = torch.cuda.Stream() if self.indices.is_cuda else None  # of the first steps

    def __call__(self) -> tuple[Tensor, Tensor]:
        run = self.run
        self.indices.copy_(run.next_indices())
        if run.optimizers is not self.optimizers:
            self.optimizers, self.graph, self.warm_up = run.optimizers, None, self.WARM_UP
        run.set_rates()
        if self.warm_up:
            self.warm_up -= 1
            loss, norm = self.run_beside()
        else:
            if self.graph is None:
                self.graph, self.loss, self.norm = self.capture()
            self.graph.replay()
            loss, norm = self.loss.clone(), self.norm.clone()  # the next replay overwrites them
        run.step += 1
        return loss, norm

    def compute(self) -> tuple[Tensor, Tensor]:
        """Do all of a step that is done on the device."""
        run = self.run
        loss = run.loss(self.model, *run.batch(self.indices), run.generator)
        return loss.detach(), run.apply(loss)

    def run_beside(self) -> tuple[Tensor, Tensor]:
        """Compute a step on a stream of its own, as PyTorch asks for before a capture."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            result = self.compute()
        torch.cuda.current_stream().wait_stream(self.side)
        return result

    def capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Return the graph of a step, and where its loss and norm will be. Nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.run.generator)
        with torch.cuda.graph(graph):
            loss, norm = self.compute()
        return graph, loss, norm
