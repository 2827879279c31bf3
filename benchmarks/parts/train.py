"""Images per second in training, FLOP/s, memory, and where the time of a step goes."""

from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import Bench
from benchmarks.contestants import CONTESTANTS, SHAPE, Ours
from benchmarks.measure import in_turns, repeat

STEPS = {"ours": 20, "diffusers": 2, "ddpm-pytorch": 1}  # per turn: a second or two
PRODUCTS = 3  # matrix products per turn


def measure(bench: Bench) -> None:
    """Print the rows of the part `train`."""
    size, dtype = (8192, torch.bfloat16) if bench.device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    works = {name: partial(w, "train", STEPS[name]) for name, w in bench.workers.items()}
    works["product"] = partial(repeat, lambda: a @ b, PRODUCTS)
    seconds = in_turns(works, bench.rounds, bench.device)
    memory = {name: worker.peak_memory for name, worker in bench.workers.items()}
    peak = PRODUCTS * 2 * size**3 / seconds.pop("product")
    rates = {name: STEPS[name] * bench.batch_size / s for name, s in seconds.items()}
    bench.row("training, images/s", rates, "at least 8 x")

    networks(bench)
    product = f"FLOP/s of a {size} x {size} {str(dtype)[6:]} matrix product"
    compute(bench, rates["ours"] / bench.batch_size, peak, product)

    shares = bench.workers["ours"]("shares", 150)
    bench.row(
        "share of a training step outside forward, backward and optimizer",
        {"ours": shares.pop("rest")},
        "at most 0.05",
        ", ".join(f"{part} {share:.3f}" for part, share in shares.items()),
    )
    bench.row("training, peak memory of the process, GB", memory, "at most 1.5")


def networks(bench: Bench) -> None:
    """Print the size of each network and its FLOPs, without a gradient."""
    parameters, flops = {}, {}
    x = torch.randn(8, *SHAPE, device=bench.device)
    t = torch.randint(1000, (8,), device=bench.device)
    for name in bench.workers:
        model = CONTESTANTS[name](bench.images, bench.batch_size, bench.device).model
        parameters[name] = sum(p.numel() for p in model.parameters()) / 1e6
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t)
        flops[name] = counter.get_total_flops() / len(x) / 1e6
    bench.row("parameters, millions", parameters)
    bench.row("forward pass, MFLOP per image", flops)


def compute(bench: Bench, steps_per_s: float, peak: float, product: str) -> None:
    """Print how near our training step and its convolutions come to the machine's FLOP/s.

    Args:
        steps_per_s: training steps per second.
        peak: FLOP/s of the matrix product, which `product` describes.
    """
    with FlopCounterMode(display=False) as counter:
        Ours(bench.images, bench.batch_size, bench.device).train_step()
    step_flops = counter.get_total_flops()
    achieved = step_flops * steps_per_s
    bench.row(
        f"FLOP/s of a training step / {product}",
        {"ours": achieved / peak},
        "at least 0.75",
        f"{achieved / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s",
    )
    if bench.device.type == "cpu":
        by_operation = counter.get_flop_counts()["Global"].items()
        flops = sum(n for operation, n in by_operation if "convolution" in str(operation))
        convolving, step = bench.workers["ours"]("convolutions", 10)
        bench.row(
            f"FLOP/s of the step's convolutions / {product}",
            {"ours": flops / convolving / peak},
            note=f"{flops / step_flops:.3f} of the FLOPs, {convolving / step:.2f} of the time",
        )
