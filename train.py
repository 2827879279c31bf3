"""Train a diffusion UNet on MNIST.

one CPU or GPU:   python train.py --pred v
a time budget:    python train.py --pred eps --minutes 10
several GPUs:     torchrun --nproc-per-node=8 train.py --pred v --batch-size 512
several nodes:    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d \\
                           --rdzv-endpoint=HOST:29500 train.py --pred v --batch-size 1024
after a stop:     python train.py --resume checkpoints/v.state.pt

Writes <out>.pt (what infer.py needs: EMA weights and configuration), <out>.state.pt (what
--resume needs), <out>.jsonl (a line a log interval), <out>.png (the loss curve) and sample grids.
Ctrl-C saves and leaves. A run of given --epochs or --steps that was stopped, or killed, and resumed
ends with the same weights, bit for bit on a CPU, as one that never was.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cli
from cli import UserError
from data import DATASETS, load_dataset, to_uint8, to_unit_range
from sampling import sample, save_grid
from scheduler import BETA_SCHEDULES, DDIMScheduler, DDPMScheduler
from unet import UNet

PREDICTION_TYPES = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
# Where a run takes place, not what it computes.
MAY_CHANGE_ON_RESUME = {"resume", "device", "data", "compile"}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and the names of those that stood on the command line."""
    natural, positive = cli.number(int, 1), cli.number(float, 0, open_low=True)
    p = cli.Parser(__doc__)
    p.add_argument(
        "--pred", choices=PREDICTION_TYPES, default="v", help="what the network predicts"
    )
    length = p.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=natural, help="length of the run (default: 5 epochs)")
    length.add_argument("--steps", type=natural, help="its length in optimizer steps instead")
    length.add_argument("--minutes", type=positive, help="its length in wall-clock time instead")
    p.add_argument("--batch-size", type=natural, default=64, help="over all processes")
    p.add_argument("--lr", type=positive, default=3e-3, help="peak learning rate of AdamW")
    p.add_argument(
        "--muon-lr",
        type=cli.number(float, 0),
        default=0.02,
        help="peak learning rate of Muon, which updates the hidden weight matrices; 0: AdamW does",
    )
    p.add_argument("--warmup", type=natural, default=100, help="steps; at most a fifth of the run")
    p.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    p.add_argument("--ema", type=cli.number(float, 0, 1), default=0.999, help="decay a step")
    p.add_argument(
        "--density",
        choices=("lognormal", "uniform"),
        default="lognormal",
        help="of the training timesteps: log-SNR from N(-0.5, 1.5^2), or t uniform",
    )
    p.add_argument(
        "--max-weight",
        type=cli.number(float, 1),
        default=5.0,
        help="of the loss of eps, which is weighted by 1 / abar up to this; 1: not weighted",
    )
    p.add_argument(
        "--channels", type=cli.number(int, 2, 1024), default=32, help="width of the UNet, even"
    )
    p.add_argument("--schedule", choices=BETA_SCHEDULES, default="cosine", help="of the betas")
    p.add_argument("--zero-snr", action="store_true", help="rescale the betas to abar_T = 0")
    p.add_argument("--timesteps", type=cli.number(int, 1, 100_000), default=1000, help="T")
    p.add_argument("--dataset", choices=DATASETS, default="mnist", help="what to learn")
    p.add_argument("--data", default="data", metavar="DIR", help="where the dataset is, or will be")
    p.add_argument("--seed", type=cli.number(int, 0, 2**31), default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    p.add_argument("--compile", action="store_true", help="torch.compile: for a GPU (untried)")
    p.add_argument(
        "--out",
        type=cli.output_file(".pt"),
        metavar="FILE.pt",
        help="the checkpoint (default: checkpoints/<pred>.pt)",
    )
    p.add_argument("--samples", default="samples", metavar="DIR", help="where the grids go")
    p.add_argument("--save-every", type=natural, metavar="N", help="steps (default: an epoch)")
    p.add_argument("--log-every", type=natural, default=50, metavar="N", help="steps")
    p.add_argument("--resume", metavar="FILE.state.pt", help="go on from here, with its arguments")
    args = p.parse_args(argv)
    given = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    if args.channels % 2:
        p.error(f"--channels must be even, not {args.channels}")
    if not (args.epochs or args.steps or args.minutes):
        args.epochs = 5
    args.out = args.out or f"checkpoints/{args.pred}.pt"
    if Path(args.out).parent.resolve() == Path(args.samples).resolve():
        p.error("--samples must not be --out's folder: grid and loss curve would share a name")
    return args, {name for name, value in vars(given).items() if value is not None}


# ------------------------------------------------------------------------------------ the recipe


def timestep_cdf(alphas_cumprod: Tensor, density: str) -> Tensor:
    """The (T,) cumulative distribution that training timesteps are drawn from.

    "lognormal": log-SNR_t = log(abar_t / (1 - abar_t)) is normal with mean -0.5 and deviation 1.5,
    so most images are seen where a digit's shape is decided: there the network has most to learn
    (Karras et al. 2022, section 5; Kingma & Gao 2023). The two numbers are measured: see
    benchmarks/recipe.md. "uniform": DDPM, algorithm 1.
    """
    if density == "uniform":
        return torch.arange(1, len(alphas_cumprod) + 1, dtype=torch.float64) / len(alphas_cumprod)
    log_snr = torch.logit(alphas_cumprod)
    cdf = torch.special.ndtr(-(log_snr + 0.5) / 1.5)  # log-SNR falls as t grows
    return cdf / cdf[-1]


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, max_weight: float) -> Tensor:
    """The (T,) weights of the squared error: for eps min(1 / abar_t, max_weight), otherwise 1.

    The same predicted x_0 has sqrt(abar_t) times as much error in eps as in v. So eps's loss,
    unweighted, all but ignores the nearly pure noise in which a digit begins (Salimans & Ho 2022,
    section 4). The bound is measured: see benchmarks/recipe.md.
    """
    if prediction_type == "epsilon":
        return (1 / alphas_cumprod).clamp(max=max_weight)
    return torch.ones_like(alphas_cumprod)


def draw_timesteps(cdf: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n timesteps by inverse transform, stratified: one from each n-th of the distribution."""
    u = torch.arange(n, device=cdf.device) + torch.rand(n, generator=generator, device=cdf.device)
    return torch.searchsorted(cdf, (u / n).to(cdf.dtype)).clamp_(max=len(cdf) - 1)


def learning_rate_factor(step: int, total_steps: int, warmup: int) -> float:
    """Linear warm-up, times a line from 1 to 0 over the run (Defazio et al. 2023)."""
    warmup = max(1, min(warmup, total_steps // 5))
    return min(1.0, (step + 1) / warmup) * (1 - min(1.0, step / total_steps))


def ema_decay(step: int, decay: float) -> float:
    """The decay with its warm-up: early on, the average spans about a tenth of the run so far."""
    return min(decay, (1 + step) / (10 + step))


def orthogonalize(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """About U V^T of every matrix G = U S V^T: Newton-Schulz (Jordan et al. 2024).

    Their X <- (a I + b A + c A^2) X with A = X X^T, but every iterate is P X_0 with P a polynomial
    in A_0. So P and A = P A_0 P are iterated, which are m x m for an m x n or an n x m matrix, n at
    least m; and all matrices of one m at once. Not in TF32, whose rounding makes small eigenvalues
    of A negative, which then grow.
    """
    wide = [G if len(G) <= len(G.mT) else G.mT for G in matrices]
    same_m = defaultdict(list)
    for i, X in enumerate(wide):
        same_m[len(X)].append(i)

    def polynomial(A: Tensor) -> Tensor:
        identity = torch.eye(A.shape[-1], device=A.device)
        return torch.baddbmm(3.4445 * identity - 4.7750 * A, A, A, alpha=2.0315)

    for members in same_m.values():
        A = torch.stack([wide[i] @ wide[i].mT for i in members])
        squared_norm = A.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14)[:, None, None]
        A = A / squared_norm
        P = Q = polynomial(A)
        for _ in range(steps - 1):
            A = Q @ A @ Q
            Q = polynomial(A)
            P = Q @ P
        for i, P_i in zip(members, P * squared_norm.rsqrt(), strict=True):
            wide[i] = P_i @ wide[i]
    return [X if X.shape == G.shape else X.mT for X, G in zip(wide, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalised (Jordan et al. 2024).

    For weights of two or more dimensions, a convolution's taken as the matrix (out, in * k * k).
    torch.optim.Muon takes only 2-D parameters, one at a time.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            directions = orthogonalize([update.flatten(1) for update in updates])
            for p, direction in zip(params, directions, strict=True):
                rows, columns = direction.shape
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                p.add_(direction.view(p.shape), alpha=-scale)


def make_models(device: torch.device, **config) -> tuple[UNet, UNet]:
    """A UNet to train and its EMA, which starts as a copy."""
    model = UNet(**config).to(device, memory_format=torch.channels_last)
    return model, copy.deepcopy(model).requires_grad_(False).eval()


def make_optimizers(model: UNet, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden weights of convolutions and attention; AdamW for stem, head, the time's
    and the label's way in, norms and biases."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        embeds = "embed" in name or "scale_shift" in name
        outer = embeds or name.startswith(("stem", "head"))
        (hidden if p.ndim >= 2 and not outer and muon_lr else rest).append(p)
    optimizers = [torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def draw_batch(
    images: Tensor,
    index: Tensor,
    cdf: Tensor,
    generator: torch.Generator,
    world: int = 1,
    rank: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, noise and timesteps of this rank's share of a global batch.

    Every rank draws for the whole batch, from one generator, and takes its slice: any number of
    processes takes the same step.
    """
    t = draw_timesteps(cdf, len(index), generator)
    noise = torch.randn(len(index), *images.shape[1:], generator=generator, device=generator.device)
    index, noise, t = (tensor.tensor_split(world)[rank] for tensor in (index, noise, t))
    return to_unit_range(images[index]), noise, t


def training_target(scheduler: DDPMScheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer at x_t."""
    if scheduler.prediction_type == "epsilon":
        return noise
    return (
        scheduler.get_velocity(x0, noise, t) if scheduler.prediction_type == "v_prediction" else x0
    )


def diffusion_loss(
    model: nn.Module,
    scheduler: DDPMScheduler,
    weights: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """The mean squared error of the prediction (DDPM eq. 14, for any target), each image's times
    the weight of its t."""
    x_t = scheduler.add_noise(x0, noise, t)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=x0.device.type == "cuda"):
        prediction = model(x_t, t)
    target = training_target(scheduler, x0, noise, t)
    errors = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return (weights[t] * errors).mean()


@contextlib.contextmanager
def bfloat16_convolutions() -> Iterator[None]:
    """Let a CPU's convolutions of float32 tensors multiply in bfloat16; they add up in float32.

    A training step is a seventh faster on a CPU with AMX, and no slower on others.
    """
    convolution = torch.backends.mkldnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "bf16"
    try:
        yield
    finally:
        convolution.fp32_precision = before


def optimize(
    loss: Tensor,
    model: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    clip: float,
    lr_factor: float,
    decay: float,
) -> Tensor:
    """Backward, clipping, the optimizers, the EMA: a step. Returns the gradient's norm, unread."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        optimizer.step()
        optimizer.zero_grad()
    update_ema(ema, model, decay)
    return norm


@torch.inference_mode()
def validation_loss(
    model: nn.Module, scheduler: DDPMScheduler, weights: Tensor, images: Tensor
) -> float:
    """The loss on these images with t uniform; noise and timesteps are the same in every run."""
    generator = torch.Generator().manual_seed(0)
    T, losses = scheduler.num_train_timesteps, []
    for batch in images.split(256):
        x0 = to_unit_range(batch)
        uniform = torch.arange(1, T + 1) / T
        t = draw_timesteps(uniform, len(x0), generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        losses.append(diffusion_loss(model, scheduler, weights, x0, noise, t) * len(x0))
    return (sum(losses) / len(images)).item()


def what_is_not_finite(
    model: nn.Module, losses: Tensor, norms: Tensor, last_step: int
) -> str | None:
    """Say which loss or gradient norm since `last_step`, or else the weights, is not finite."""
    for k, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), start=1):
        if not math.isfinite(loss + norm):
            return f"the loss is {loss} and the gradient's norm {norm} at step {last_step + k}"
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        return f"the weights are no longer finite after step {last_step + len(losses)}"
    return None


# ------------------------------------------------------------------------------------- the script


def resume(args: argparse.Namespace, given: set[str]) -> dict:
    """Read the training state, and put its arguments in place of those not given.

    The run goes on where the state lies, wherever it was written.
    """
    keys = ("args", "step", "elapsed", "model", "ema", "optimizers", "generator")
    state = checkpoint.load(args.resume, *keys)
    if not args.resume.endswith(".state.pt"):
        raise UserError(f"{args.resume} does not end in .state.pt, as a training state does")
    stored = state["args"] | {"out": args.resume.removesuffix(".state.pt") + ".pt"}
    if set(stored) != set(vars(args)):
        raise UserError(f"{args.resume} was written by another version of train.py")
    for name in sorted(given - MAY_CHANGE_ON_RESUME):
        if getattr(args, name) != stored.get(name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {args.resume}, "
                f"whose run has {stored.get(name)}: leave it out"
            )
    keep = {name: getattr(args, name) for name in MAY_CHANGE_ON_RESUME & (given | {"resume"})}
    vars(args).update(stored | keep)
    return state


def read_log(path: Path) -> list[dict]:
    """The log's records; a line that a crash or a full disk cut short is left out."""
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def draw_loss_curve(log_path: Path, picture_path: Path) -> None:
    """Training and validation loss against images seen, from the log.

    Only the first has its timesteps drawn by `--density`: the two need not agree.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_log(log_path)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(record["images"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points, strict=True), style, label=key, lw=1, ms=4) if points else None
    axes.set(xlabel="images seen", ylabel="loss", yscale="log")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=120)
    plt.close(figure)


def main() -> int:
    args, given = parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    state = resume(args, given) if args.resume else None
    device = cli.pick_device(args.device)
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} does not split over {world} processes")
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        return train(args, state, device, world, rank)
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(
    args: argparse.Namespace, state: dict | None, device: torch.device, world: int, rank: int
) -> int:
    out = Path(args.out)
    state_path, log_path = out.with_suffix(".state.pt"), out.with_suffix(".jsonl")
    samples = Path(args.samples)
    say = tqdm.write if rank == 0 else lambda *_: None

    # ----- data, on the device as uint8. Rank 0 fetches it, the others wait and then read it.
    if world > 1:
        if rank == 0:
            load_dataset(args.dataset, "train", args.data)
        dist.barrier()
    images = load_dataset(args.dataset, "train", args.data)[0].to(device)
    held_out = load_dataset(args.dataset, "test", args.data)[0][:2048].to(device)
    shape = tuple(images.shape[1:])
    if args.batch_size > len(images):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(images)} images")
    steps_per_epoch = len(images) // args.batch_size
    total_steps = args.steps or (args.epochs or 1000) * steps_per_epoch  # --minutes fits it below
    save_every = args.save_every or steps_per_epoch

    # ----- model, optimizers, randomness
    try:
        scheduler = DDPMScheduler(
            args.timesteps,
            beta_schedule=args.schedule,
            prediction_type=PREDICTION_TYPES[args.pred],
            rescale_betas_zero_snr=args.zero_snr,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    torch.manual_seed(args.seed)
    model, ema = make_models(device, in_channels=shape[0], channels=args.channels)
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    generator = torch.Generator(device).manual_seed(args.seed)
    cdf = timestep_cdf(scheduler.alphas_cumprod, args.density).float().to(device)
    weights = loss_weights(scheduler.alphas_cumprod, scheduler.prediction_type, args.max_weight)
    weights = weights.float().to(device)
    step, elapsed = 0, 0.0
    if state is not None:
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer_state)
            if len(state["generator"]) == len(generator.get_state()):
                generator.set_state(state["generator"])
            else:  # of another type of device
                generator.manual_seed(args.seed + state["step"])
                say(f"note: {args.resume} is of another type of device: its noise is drawn anew")
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = cli.first_line(error)
            raise UserError(f"{args.resume} does not fit this run: {reason}") from None
        step, elapsed = state["step"], state["elapsed"]
    forward = torch.compile(model) if args.compile else model
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(forward)

    # ----- files
    if rank == 0:
        samples.mkdir(parents=True, exist_ok=True)  # or fail now, not after an epoch
        for path in (out, state_path, log_path) if state is None else ():
            if path.exists():  # an earlier run's, perhaps a better one's
                previous = path.with_name(path.name.replace(out.stem, f"{out.stem}.previous", 1))
                previous.unlink(missing_ok=True)
                try:
                    os.link(path, previous)  # the first save then replaces one of its two names
                except OSError:  # a filesystem without links
                    shutil.copyfile(path, previous)
                say(f"note: an earlier run's {path} is now {previous}")
        kept = []
        if state is not None and log_path.exists():
            kept = [record for record in read_log(log_path) if record["step"] <= step]
        lines = "".join(f"{json.dumps(record)}\n" for record in kept)
        checkpoint.write_atomically(log_path, lines.encode())

    def log(**record: float) -> None:
        if rank:
            return
        line = json.dumps({"step": step, "images": step * args.batch_size} | record)
        try:
            with open(log_path, "a") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise UserError(f"cannot write {log_path}: {error.strerror}") from None

    def save() -> None:
        if rank:
            return
        training = {
            "args": {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME},
            "step": step,
            "images": step * args.batch_size,
            "elapsed": elapsed,
        }
        model_contents = checkpoint.model_checkpoint(ema, scheduler, shape, training)
        checkpoint.save(out, model_contents)
        state_contents = {
            "format": checkpoint.FORMAT,
            "args": vars(args),
            "step": step,
            "elapsed": elapsed,
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": generator.get_state(),
        }
        checkpoint.save(state_path, state_contents)

    def preview(path: Path, steps: int) -> None:
        if rank:
            return
        ddim = DDIMScheduler(**scheduler.config)
        ddim.set_timesteps(min(steps, args.timesteps))
        x = sample(ema, ddim, torch.arange(64, device=device), shape, seed=args.seed, eta=1.0)
        save_grid(path, to_uint8(x), nrow=8)

    # ----- signals: finish the step, save, leave
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))

    def steps_to_the_budget() -> int:
        """How long the run will be, at the speed it has had, by --minutes."""
        return step + max(0, round((args.minutes * 60 - elapsed) / (elapsed / step)))

    if args.minutes is not None and step:
        total_steps = steps_to_the_budget()
    started, log_started = time.monotonic() - elapsed, time.monotonic()
    log_step = step
    losses = torch.zeros(args.log_every, device=device)  # read once a log interval: no sync a step
    norms = torch.zeros_like(losses)
    permutation_epoch, factor, saved_step = -1, 0.0, step if state else None
    with tqdm(
        total=total_steps * args.batch_size,
        initial=step * args.batch_size,
        unit="img",
        unit_scale=True,
        disable=rank > 0,
        smoothing=0.05,
        desc=f"{args.pred} on {device.type}",
    ) as bar:
        while step < total_steps:
            # ----- the step
            epoch, i = divmod(step, steps_per_epoch)
            if epoch != permutation_epoch:  # a function of (seed, epoch): a resumed run has it too
                shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
                permutation = torch.randperm(len(images), generator=shuffle).to(device)
                permutation_epoch = epoch
            index = permutation[i * args.batch_size : (i + 1) * args.batch_size]
            x0, noise, t = draw_batch(images, index, cdf, generator, world, rank)
            factor = learning_rate_factor(step, total_steps, args.warmup)
            with bfloat16_convolutions():
                loss = diffusion_loss(forward, scheduler, weights, x0, noise, t)
                norm = optimize(
                    loss,
                    model,
                    ema,
                    optimizers,
                    clip=args.clip,
                    lr_factor=factor,
                    decay=ema_decay(step, args.ema),
                )
            losses[step - log_step], norms[step - log_step] = loss.detach(), norm
            step += 1
            bar.update(args.batch_size)

            # ----- now and then
            epoch_ends = step % steps_per_epoch == 0 or step == total_steps
            save_due = step % save_every == 0 or step == total_steps
            stop = bool(signals) and world == 1  # several ranks agree on it at the log interval
            first_fit = args.minutes is not None and step == 5
            if step - log_step == args.log_every or first_fit or epoch_ends or save_due or stop:
                now = time.monotonic()
                elapsed = now - started
                window = losses[: step - log_step], norms[: step - log_step]
                stop_flag = torch.tensor([float(len(signals) > 0), elapsed], device=device)
                if world > 1:
                    dist.all_reduce(window[0], dist.ReduceOp.SUM)
                    window[0].div_(world)
                    dist.all_reduce(stop_flag, dist.ReduceOp.MAX)
                stop, elapsed = bool(stop_flag[0]), stop_flag[1].item()
                problem = what_is_not_finite(model, *window, log_step)
                if problem is not None:
                    good = "none" if saved_step is None else f"{state_path} (step {saved_step})"
                    raise UserError(
                        f"{problem}, learning rate {args.lr * factor:.3g}; "
                        f"last good checkpoint: {good}"
                    )
                mean_loss = window[0].mean().item()
                rate = (step - log_step) * args.batch_size / (now - log_started)
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                log(loss=mean_loss, lr=args.lr * factor, images_per_s=rate, elapsed=elapsed)
                if args.minutes is not None:  # fit the length, and so the schedules, to the clock
                    total_steps = steps_to_the_budget()
                    epoch_ends = epoch_ends or step == total_steps
                    bar.total = total_steps * args.batch_size
                if epoch_ends:
                    val_loss = validation_loss(ema, scheduler, weights, held_out)
                    log(val_loss=val_loss)
                    bar.set_postfix(loss=f"{mean_loss:.4f}", val=f"{val_loss:.4f}", refresh=False)
                if save_due or stop or step == total_steps:
                    save()
                    saved_step = step
                if epoch_ends and step < total_steps:
                    preview(samples / f"{out.stem}-epoch{step // steps_per_epoch:02d}.png", 20)
                if stop and step < total_steps:
                    say(f"stopped at step {step} of {total_steps}; go on with")
                    say(f"  python train.py --resume {state_path}")
                    return 128 + (signals[0] if signals else signal.SIGTERM)
                log_started, log_step = time.monotonic(), step

    if rank == 0:
        preview(samples / f"{out.stem}.png", 50)
        curve = out.with_suffix(".png")
        draw_loss_curve(log_path, curve)
        say(f"checkpoint  {out}\nsamples     {samples / out.stem}.png\nloss curve  {curve}")
        say(f"log         {log_path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
