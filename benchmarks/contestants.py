"""The contestants: this lab and its peers, all with the same interface.

    contestant = Contestant(images, batch_size, device)
    contestant.train_step(progress)     one optimizer step; progress in [0, 1] of the run
    contestant.sample(n, steps, eta)    (n, 1, 28, 28) in about [-1, 1], from the EMA weights, by
                                        DDIM. eta is each library's own: they agree at 0 and 1
    contestant.model                    the network in training

`images` are (N, 1, 28, 28) uint8 on the device. To add a peer, write its class and name it in
CONTESTANTS and in PEERS of __main__.py.
"""

import math

from lab.data import to_model_range
from lab.device import autocast
from lab.distributed import Process

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import sample
from scheduler import DDIMScheduler
from training.graph import make_step
from training.recipe import Recipe
from training.run import Training

SHAPE = (1, 28, 28)


class Ours:
    """A training run with the default recipe: the steps of train.py, the samples of infer.py."""

    def __init__(self, images: Tensor, batch_size: int, device: torch.device):
        self.run, self.device = Training(Recipe(batch_size=batch_size), images), device
        self.model = self.run.model
        self.ddim = DDIMScheduler(**self.run.scheduler.config)
        self.take_step = make_step(self.run, self.model, Process(device))

    def loss(self) -> Tensor:
        """Return the loss of the run's next batch."""
        run = self.run
        return run.loss(run.model, *run.next_batch(), run.generator)

    def train_step(self, progress: float = 0.0) -> None:
        self.take_step()

    def sample(self, n: int, steps: int, eta: float = 0.0) -> Tensor:
        self.ddim.set_timesteps(steps)
        return sample(self.run.ema, self.ddim, torch.arange(n, device=self.device), SHAPE, eta=eta)


class Diffusers:
    """The unconditional training example of diffusers, on its smallest sensible UNet."""

    def __init__(self, images: Tensor, batch_size: int, device: torch.device):
        import diffusers
        from diffusers.training_utils import EMAModel

        self.images, self.batch_size, self.device = images, batch_size, device
        self.model = diffusers.UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ).to(device)
        self.scheduler = diffusers.DDPMScheduler()
        self.ddim = diffusers.DDIMScheduler()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6
        )
        self.ema = EMAModel(self.model.parameters(), use_ema_warmup=True)

    def train_step(self, progress: float = 0.0) -> None:
        """Take a step; its learning rate falls along the cosine of the example."""
        x0 = to_model_range(draw(self.images, self.batch_size))
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),), device=self.device)
        with autocast(self.device):
            prediction = self.model(self.scheduler.add_noise(x0, noise, t), t).sample
        F.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = 0.5e-4 * (1 + math.cos(math.pi * progress))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    @torch.inference_mode()
    def sample(self, n: int, steps: int, eta: float = 0.0) -> Tensor:
        self.ddim.set_timesteps(steps)
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        x = torch.randn(n, *SHAPE, device=self.device)
        for t in self.ddim.timesteps:
            with autocast(self.device):
                prediction = self.model(x, t).sample
            x = self.ddim.step(prediction, t, x, eta=eta).prev_sample
        self.ema.restore(self.model.parameters())
        return x


class DDPMPytorch:
    """denoising-diffusion-pytorch, with the optimizer and the EMA of its Trainer."""

    def __init__(self, images: Tensor, batch_size: int, device: torch.device):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.images, self.batch_size, self.device = images, batch_size, device
        self.model = Unet(64, dim_mults=(1, 2, 4), channels=1)
        self.diffusion = GaussianDiffusion(
            self.model, image_size=28, timesteps=1000, sampling_timesteps=50
        ).to(device)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), 1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)

    def train_step(self, progress: float = 0.0) -> None:
        x0 = draw(self.images, self.batch_size).float() / 255
        with autocast(self.device):
            loss = self.diffusion(x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    @torch.inference_mode()
    def sample(self, n: int, steps: int, eta: float = 0.0) -> Tensor:
        """Return samples. They come with a progress bar, unless the environment has TQDM_DISABLE=1
        (tqdm's own switch), as in the processes of processes.Worker."""
        diffusion = self.ema.ema_model.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, True
        diffusion.ddim_sampling_eta = eta
        return diffusion.sample(batch_size=n) * 2 - 1


CONTESTANTS = {"ours": Ours, "diffusers": Diffusers, "ddpm-pytorch": DDPMPytorch}


def draw(images: Tensor, n: int) -> Tensor:
    """Return n images, drawn uniformly."""
    return images[torch.randint(len(images), (n,), device=images.device)]


def samples_at_a_time(device: torch.device) -> int:
    """Return how many images a contestant makes at once."""
    return 32 if device.type == "cpu" else 1024
