"""This lab beside what people would use instead, everything measured in the same run.

the whole table:  python benchmarks/bench.py                     about 15 minutes on two CPU cores
parts of it:      python benchmarks/bench.py train scheduler
good digits:      python benchmarks/bench.py --time-to-quality 10 [--peers [NAME ...]]

The peers, from requirements-dev.txt: networks of MNIST's size, trained as their tutorials do:

    diffusers    UNet2DModel 32-64-64 with two layers a block, attention at 14x14 and 7x7, and the
                 DDPM and DDIM schedulers
    ddpm-pytorch denoising-diffusion-pytorch's Unet(64, dim_mults=(1, 2, 4)) and GaussianDiffusion

The parts take turns, a round of each at a time, and medians over the rounds are compared: a machine
whose other work slows it down slows all alike. In training and sampling each contestant has its own
process.
"""

import argparse
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import metrics  # noqa: E402
import train  # noqa: E402
from checkpoint import write_atomically  # noqa: E402
from data import load_dataset, to_uint8, to_unit_range  # noqa: E402
from sampling import sample  # noqa: E402
from scheduler import DDIMScheduler, DDPMScheduler  # noqa: E402
from unet import UNet  # noqa: E402

SHAPE = (1, 28, 28)


# -------------------------------------------------------------- the contestants, with one interface


class Ours:
    """What train.py and infer.py run, at their defaults."""

    def __init__(self, images: Tensor, batch_size: int, device: torch.device):
        args, _ = train.parse_args([])
        self.images, self.batch_size, self.device, self.args = images, batch_size, device, args
        prediction_type = train.PREDICTION_TYPES[args.pred]
        config = {"beta_schedule": args.schedule, "prediction_type": prediction_type}
        self.scheduler, self.ddim = DDPMScheduler(**config), DDIMScheduler(**config)
        self.model, self.ema = train.make_models(device, channels=args.channels)
        self.optimizers = train.make_optimizers(self.model, args.lr, args.muon_lr)
        self.generator = torch.Generator(device).manual_seed(0)
        abar = self.scheduler.alphas_cumprod
        self.cdf = train.timestep_cdf(abar, args.density).float().to(device)
        self.weights = train.loss_weights(abar, prediction_type, args.max_weight).float().to(device)

    def train_step(self, progress: float = 0.0) -> None:
        index = torch.randint(len(self.images), (self.batch_size,), device=self.device)
        x0, noise, t = train.draw_batch(self.images, index, self.cdf, self.generator)
        settings = {"clip": self.args.clip, "lr_factor": 0.1, "decay": self.args.ema}
        with train.bfloat16_convolutions():
            loss = train.diffusion_loss(self.model, self.scheduler, self.weights, x0, noise, t)
            train.optimize(loss, self.model, self.ema, self.optimizers, **settings)

    def sample(self, n: int, steps: int, eta: float = 0.0) -> Tensor:
        self.ddim.set_timesteps(steps)
        return sample(self.ema, self.ddim, torch.arange(n, device=self.device), SHAPE, eta=eta)


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
        """`progress` in [0, 1] of the run: the cosine decay of the example."""
        index = torch.randint(len(self.images), (self.batch_size,), device=self.device)
        x0 = to_unit_range(self.images[index])
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
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
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
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
        index = torch.randint(len(self.images), (self.batch_size,), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.diffusion(self.images[index].float() / 255)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    @torch.inference_mode()
    def sample(self, n: int, steps: int, eta: float = 0.0) -> Tensor:
        diffusion = self.ema.ema_model.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, True
        diffusion.ddim_sampling_eta = eta
        with patch(
            "denoising_diffusion_pytorch.denoising_diffusion_pytorch.tqdm", lambda x, **_: x
        ):
            return diffusion.sample(batch_size=n) * 2 - 1


CONTESTANTS = {"ours": Ours, "diffusers": Diffusers, "ddpm-pytorch": DDPMPytorch}


# ------------------------------------------------------------------------------------- measuring


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's part of it included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The median seconds of each, one call of each a round, after one that does not count."""
    seconds = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            elapsed = clock(work, device)
            if i:
                seconds[name].append(elapsed)
    return {name: median(values) for name, values in seconds.items()}


def child(*command: object, threads: int | None = None, cwd: Path | None = None) -> str:
    """Run a Python process to its end; returns what it printed."""
    env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=env
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise cli.UserError(f"{' '.join(map(str, command))} failed: {reason}")
    return done.stdout


def peak_memory() -> float:
    """Of this process so far, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # there ru_maxrss would include the parent's, until exec
        kb = next(s.split()[1] for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(kb) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes, on a Mac


def loop(work: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


class Worker:
    """A contestant in a process of its own, and so with its own heap: ours as the scripts have it,
    the peers' as their users have it (see cli.keep_freed_memory)."""

    def __init__(self, name: str, batch_size: int, device: torch.device):
        command = [sys.executable, __file__, "--worker", name]
        command += ["--batch-size", str(batch_size), "--device", str(device)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.name, self.process = name, subprocess.Popen(command, **pipes, text=True)

    def __call__(self, order: str, times: int) -> float:
        """Have it "train" so many steps or "sample" so many batches; its peak memory so far, GB."""
        print(order, times, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise cli.UserError(f"{self.name} did not come through: see above")
        return float(answer)


def work(args: argparse.Namespace) -> None:
    """What a Worker's process does, until its orders end."""
    ours = args.worker == "ours"
    device = cli.pick_device(args.device) if ours else torch.device(args.device)
    images = load_dataset("mnist", "train", ROOT / "data")[0].to(device)
    torch.manual_seed(0)
    contestant = CONTESTANTS[args.worker](images, args.batch_size, device)
    n = samples_at_a_time(device)
    orders = {"train": contestant.train_step, "sample": partial(contestant.sample, n, 50)}
    for order, times in map(str.split, sys.stdin):
        clock(loop(orders[order], int(times)), device)
        print(peak_memory(), flush=True)


def samples_at_a_time(device: torch.device) -> int:
    return 32 if device.type == "cpu" else 1024


def bench_train(bench: "Bench") -> None:
    """Images a second, the machine's limit, and where a step's time goes."""
    device, B = bench.device, bench.batch_size
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    calls = {"ours": 20, "diffusers": 2, "ddpm-pytorch": 1}
    works = {name: partial(w, "train", calls[name]) for name, w in bench.workers.items()}
    seconds = in_turns(works | {"matmul": loop(lambda: a @ b, 3)}, bench.rounds, device)
    rates = {name: calls[name] * B / seconds[name] for name in works}
    bench.row("training, images/s", rates, "at least 8 x")

    size_of, flops_of = {}, {}
    x, t = torch.randn(8, *SHAPE, device=device), torch.randint(1000, (8,), device=device)
    contestants = {name: CONTESTANTS[name](bench.images, B, device) for name in works}
    for name, contestant in contestants.items():
        size_of[name] = sum(p.numel() for p in contestant.model.parameters()) / 1e6
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            contestant.model(x, t)
        flops_of[name] = counter.get_total_flops() / len(x) / 1e6
    bench.row("parameters, millions", size_of, "")
    bench.row("a forward pass, MFLOP an image", flops_of, "")

    with FlopCounterMode(display=False) as counter:
        contestants["ours"].train_step()
    achieved = counter.get_total_flops() * rates["ours"] / B
    peak = 3 * 2 * size**3 / seconds["matmul"]
    product = f"a {size}^2 {str(dtype)[6:]} matrix product's"
    bench.row(
        f"FLOP/s of a training step over {product}",
        {"ours": achieved / peak},
        "at least 0.75",
        note=f"{achieved / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s",
    )
    if device.type == "cpu":
        by_operation = counter.get_flop_counts()["Global"].items()
        flops = sum(n for operation, n in by_operation if "convolution" in str(operation))
        convolving, step = convolutions_seconds(contestants["ours"])
        bench.row(
            f"FLOP/s of its convolutions over {product}",
            {"ours": flops / convolving / peak},
            "",
            note=f"{flops / counter.get_total_flops():.3f} of the work, "
            f"{convolving / step:.2f} of the time",
        )

    printed = child(__file__, "--worker", "shares", "--device", bench.args.device, cwd=ROOT)
    shares = json.loads(printed.splitlines()[-1])
    bench.row(
        "share of a training step outside forward, backward and optimizer",
        {"ours": shares.pop("rest")},
        "at most 0.05",
        note=", ".join(f"{name} {share:.3f}" for name, share in shares.items()),
    )
    memory = {name: worker("train", 0) for name, worker in bench.workers.items()}
    bench.row("training, peak memory of the process, GB", memory, "at most 1.5")


def convolutions_seconds(ours: Ours, steps: int = 10) -> tuple[float, float]:
    """CPU seconds of a training step: of its convolutions both ways, and of all operations."""
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            ours.train_step()
    times = {e.key: e.self_cpu_time_total / steps / 1e6 for e in profiler.key_averages()}
    convolving = sum(
        time for name, time in times.items() if name.startswith("aten::") and "conv" in name
    )
    return convolving, sum(times.values())


def worker_shares(device: str) -> None:
    """Run train.py itself for 200 steps, a stopwatch on its parts; print their shares as JSON."""
    spent, sums = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}, []

    def timed(part: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - started
            return result

        return wrapper

    def at_log(*args) -> str | None:  # called at every log interval, just after its clock
        sums.append((time.perf_counter(), dict(spent)))
        return finite(*args)

    UNet.forward = timed("forward", UNet.forward)
    Tensor.backward = timed("backward", Tensor.backward)
    for optimizer in (torch.optim.AdamW, train.Muon):
        optimizer.step = timed("optimizer", optimizer.step)
    finite, train.what_is_not_finite = train.what_is_not_finite, at_log
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", "--steps", "200", "--device", device]
        sys.argv += ["--out", f"{folder}/x.pt", "--samples", f"{folder}/samples"]
        train.main()
    (t0, before), (t1, after) = sums[0], sums[-1]
    shares = {part: (after[part] - before[part]) / (t1 - t0) for part in spent}
    print(json.dumps(shares | {"rest": 1 - sum(shares.values())}))


def bench_sample(bench: "Bench") -> None:
    """Images a second at 50 DDIM steps."""
    n = samples_at_a_time(bench.device)
    calls = {"ours": 4, "diffusers": 1, "ddpm-pytorch": 1}
    works = {name: partial(w, "sample", calls[name]) for name, w in bench.workers.items()}
    seconds = in_turns(works, max(1, bench.rounds // 2), bench.device)
    rates = {name: calls[name] * n / s for name, s in seconds.items()}
    label = f"sampling, 50 DDIM steps, {n} at a time, images/s"
    bench.row(label, rates, "at least 8 x")


def bench_scheduler(bench: "Bench") -> None:
    """Microseconds of `step` and `add_noise`."""
    import diffusers

    for B in (64, 1024):
        x, output = (torch.randn(B, *SHAPE, device=bench.device) for _ in range(2))
        t = torch.randint(1000, (B,), device=bench.device)
        for cls in (DDIMScheduler, DDPMScheduler):
            name = cls.__name__
            peer = getattr(diffusers, name)(timestep_spacing="trailing")
            pair = {"ours": cls(), "diffusers": peer}
            for scheduler in pair.values():
                scheduler.set_timesteps(50)
            step = {name: loop(partial(s.step, output, 499, x), 100) for name, s in pair.items()}
            noise = {
                name: loop(partial(s.add_noise, x, output, t), 100) for name, s in pair.items()
            }
            for method, works in (("step", step), ("add_noise", noise)):
                seconds = in_turns(works, 4 * bench.rounds, bench.device)
                micros = {name: s / 100 * 1e6 for name, s in seconds.items()}
                asked = (B, cls, method) == (64, DDIMScheduler, "step")
                target = "at most 0.5 x" if asked else ""
                bench.row(f"{name}.{method}, batch {B}, microseconds", micros, target)


def bench_startup(bench: "Bench") -> None:
    """What a user waits for, in units of `import torch`."""
    with tempfile.TemporaryDirectory() as folder:
        first = (ROOT / "infer.py", "--ckpt", ROOT / "checkpoints/mnist-v.pt", "--steps", 20)
        first = (*first, "--n", 1, "--out", f"{folder}/x.png", "--device", bench.args.device)
        works = {
            "import torch": lambda: child("-c", "import torch"),
            "--help": lambda: child(ROOT / "infer.py", "--help"),
            "first image": lambda: child(*first),
        }
        seconds = in_turns(works, bench.rounds, bench.device)
    unit = seconds["import torch"]
    bench.row("python -c 'import torch', s", {"ours": unit}, "")
    bench.row("infer.py --help, s", {"ours": seconds["--help"]}, "under 1 s")
    bench.row(
        "time to first image, 20 steps, s",
        {"ours": seconds["first image"]},
        f"at most {1.5 * unit + 1:.1f}",
        note=f"{seconds['first image'] / unit:.2f} x import torch",
    )


def bench_scale(bench: "Bench") -> None:
    """Cost against epochs, n and steps; two processes of one thread against one of two."""
    ours = Ours(bench.images, bench.batch_size, bench.device)
    works = {f"{k} training steps": loop(ours.train_step, k) for k in (10, 20, 40)}
    works |= {
        f"{n} images": lambda n=n: [ours.sample(64, 10) for _ in range(n // 64)]
        for n in (64, 128, 256)
    }
    works |= {f"{s} sampling steps": lambda s=s: ours.sample(64, s) for s in (10, 20, 40)}
    seconds = in_turns(works, bench.rounds, bench.device)
    for kind in ("training steps", "images", "sampling steps"):
        times = {int(name.split()[0]): s for name, s in seconds.items() if name.endswith(kind)}
        (n0, t0), *_, (n1, t1) = times.items()
        bench.row(
            f"cost of {n1 // n0} x the {kind}, over that of one",
            {"ours": t1 / t0},
            f"about {n1 // n0}",
            note=", ".join(f"{n}: {s:.2f} s" for n, s in times.items()),
        )
    if bench.device.type != "cpu":
        return

    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--")
    ways = {"1 process x 2 threads": ((), 2), "2 processes x 1 thread": (launcher, 1)}
    rates: dict[str, dict] = {"training": {}, "sampling": {}}
    with tempfile.TemporaryDirectory() as folder:
        for way, (launch, threads) in ways.items():
            arguments = ("--steps", 120, "--log-every", 20, "--out", f"{folder}/x.pt")
            arguments += ("--samples", f"{folder}/samples", "--data", ROOT / "data")
            child(*launch, ROOT / "train.py", *arguments, threads=threads)
            log = map(json.loads, Path(folder, "x.jsonl").read_text().splitlines())
            rates["training"][way] = median(
                r["images_per_s"] for r in log if r.get("step", 0) > 20 and "images_per_s" in r
            )
            times = {}
            for n in (256, 1280):  # their difference has no start-up in it
                arguments = ("--ckpt", ROOT / "checkpoints/mnist-v.pt", "--n", n, "--steps", 20)
                arguments += ("--out", f"{folder}/x.png")
                started = time.perf_counter()
                child(*launch, ROOT / "infer.py", *arguments, threads=threads)
                times[n] = time.perf_counter() - started
            rates["sampling"][way] = 1024 / (times[1280] - times[256])
    for kind, by_way in rates.items():
        one, two = by_way.values()
        bench.row(
            f"{kind}: 2 processes x 1 thread over 1 process x 2 threads",
            {"ours": two / one},
            "at least 0.9",
            note=f"{two:.0f} and {one:.0f} images/s",
        )


PARTS = {
    "train": bench_train,
    "sample": bench_sample,
    "scheduler": bench_scheduler,
    "startup": bench_startup,
    "scale": bench_scale,
}


def time_to_quality(bench: "Bench", minutes: float) -> None:
    """Train each for the same wall-clock; score 1,000 images of 50 steps for every eta."""
    pred, seed, etas, arrays = bench.args.pred, bench.args.seed, bench.args.eta, {}
    with tempfile.TemporaryDirectory() as folder:
        out, device = Path(folder, "ours.pt"), ("--device", bench.args.device)
        arguments = ("--pred", pred, "--minutes", minutes, "--seed", seed, "--out", out)
        arguments += ("--samples", f"{folder}/samples", "--data", ROOT / "data")
        child(ROOT / "train.py", *arguments, *device)
        for eta in etas:
            arguments = ("--ckpt", out, "--n", 1000, "--steps", 50, "--eta", eta, "--save-npy")
            arguments += ("--batch-size", 100, "--out", f"{folder}/{eta}.png")
            child(ROOT / "infer.py", *arguments, *device)
            arrays["ours", eta] = np.load(f"{folder}/{eta}.npy")
    for name in bench.args.peers:
        torch.manual_seed(seed)
        peer = CONTESTANTS[name](bench.images, bench.batch_size, bench.device)
        started, budget = time.monotonic(), 60 * minutes
        while (elapsed := time.monotonic() - started) < budget:
            peer.train_step(elapsed / budget)
        for eta in etas:
            images = torch.cat([to_uint8(peer.sample(100, 50, eta)) for _ in range(10)])
            arrays[name, eta] = images.squeeze(1).cpu().numpy()
    floor = metrics.floor(1000, data_dir=ROOT / "data")
    scores = {key: metrics.score(array, data_dir=ROOT / "data") for key, array in arrays.items()}
    labels = {"frechet": "Fréchet distance (LeNet features)", "confidence": "confidence"}
    for eta, (key, label) in itertools.product(etas, labels.items()):
        bench.row(
            f"{minutes:g} minutes of training ({pred}), 50 steps, eta {eta:g}: {label}",
            {name: s[key] for (name, e), s in scores.items() if e == eta},
            "",
            note=f"standard error {scores['ours', eta][key + '_se']:.2g}; "
            f"real images {floor[key]:.3g}",
        )


class Bench:
    """The rows measured so far, and what the parts share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.batch_size, self.rounds = args, args.batch_size, args.rounds
        self.device = cli.pick_device(args.device)
        self.images = load_dataset("mnist", "train", ROOT / "data")[0].to(self.device)
        self.rows: list[dict] = []

    @cached_property
    def workers(self) -> dict[str, Worker]:
        return {
            name: Worker(name, self.batch_size, self.device)
            for name in CONTESTANTS
            if name == "ours" or not self.args.alone
        }

    def row(
        self,
        what: str,
        values: dict[str, float],
        target: str,
        *,
        note: str = "",
    ) -> None:
        """Keep a row of the table and print it. `target` is what it should be, or ""."""
        ratios = {name: values["ours"] / value for name, value in values.items() if name != "ours"}
        self.rows.append(
            {"what": what, "values": values, "ours_over": ratios, "target": target, "note": note}
        )
        cells = [f"{values[name]:.4g}" if name in values else "" for name in CONTESTANTS]
        cells.append(", ".join(f"{r:.3g} x" for r in ratios.values()))
        print("| " + " | ".join([what, *cells, target, note]) + " |", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    natural = cli.number(int, 1)
    p = cli.Parser(__doc__)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    p.add_argument("--batch-size", type=natural, default=64, help="of training, for all alike")
    p.add_argument("--rounds", type=natural, default=5, help="how often the turns go round")
    p.add_argument("--alone", action="store_true", help="without the peers' networks")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    p.add_argument(
        "--json",
        type=cli.output_file(".json"),
        metavar="FILE.json",
        help="write the figures there as well",
    )
    quality = p.add_argument_group("time to quality, instead of the table")
    quality.add_argument(
        "--time-to-quality",
        type=cli.number(float, 0, open_low=True),
        metavar="MINUTES",
        help="train for MINUTES and score 1,000 images",
    )
    quality.add_argument("--pred", choices=train.PREDICTION_TYPES, default="v", help="of ours")
    quality.add_argument("--seed", type=cli.number(int, 0, 2**31), default=0, help="of training")
    quality.add_argument(
        "--eta", type=cli.number(float, 0, 1), nargs="+", default=[0, 1], help="of sampling"
    )
    peers = [name for name in CONTESTANTS if name != "ours"]
    quality.add_argument(
        "--peers",
        nargs="*",
        choices=peers,
        default=argparse.SUPPRESS,
        help=f"these too, for as long; without names: {' and '.join(peers)}",
    )
    p.add_argument("--worker", help=argparse.SUPPRESS)  # what a child process of this script does
    args = p.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        p.error(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    args.peers = (args.peers or peers) if hasattr(args, "peers") else []
    return args


def main() -> int:
    args = parse_args()
    if args.worker == "shares":
        worker_shares(args.device)
        return 0
    if args.worker:
        work(args)
        return 0
    bench = Bench(args)
    threads = f"{torch.get_num_threads()} threads" if bench.device.type == "cpu" else ""
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor()
    header = f"{date.today()}, torch {torch.__version__}, {bench.device} {where} {threads}".strip()
    print(f"{header}, batch {bench.batch_size}\n")
    print("| what | " + " | ".join(CONTESTANTS) + " | ours over theirs | target | |")
    print("|" + " --- |" * (len(CONTESTANTS) + 4))
    if args.time_to_quality:
        time_to_quality(bench, args.time_to_quality)
    else:
        for part in args.parts or PARTS:
            PARTS[part](bench)
    if args.json:
        report = {"where": header, "rows": bench.rows}
        write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    cli.run(main)
