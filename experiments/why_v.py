"""How wrong is the predicted x₀ in almost pure noise, for v- and for ε-prediction?

An ε-model predicts x₀ = (x_t − √(1−ᾱ) ε) / √ᾱ: an error of ε is divided by √ᾱ, which falls almost
to 0. A v-model predicts x₀ = √ᾱ x_t − √(1−ᾱ) v: no error grows (Salimans & Ho 2022,
arXiv:2202.00512).

Test images are noised to x_t, with the same noise for every t and model. The table has the root
mean square error of the predicted x₀ in the range of the model (black is −clip_sample_range, white
is clip_sample_range): with the network in float32 and under bfloat16 autocast, and before and after
the clipping to that range. Compare models of equal range only. A second measurement
counts the pixels of the predicted x₀ that the sampler clips at each step.

Writes a table of each and why-v.png.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.data import load_dataset, to_model_range
from lab.noise import image_noise
from lab.pictures import new_figure, save_figure

import torch
from torch import Tensor

from diffusion import sample
from experiments.common import Study
from experiments.grid import SHAPE, Subject
from experiments.tables import markdown_table

TITLE = "Why v"
TABLES = ("why-v", "clipped")
FIGURES = {"why-v.png": "Errors of the predicted clean image"}

TEST_IMAGES = 500  # at most
STEPS, IMAGES = 50, 100  # of the sampling whose clipped pixels are counted


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the tables."""
    T = min(subject.num_train_timesteps for subject in study.subjects)
    n, steps, timesteps = min(TEST_IMAGES, study.settings.n), min(STEPS, T), chosen_timesteps(T)
    calls = 2 * n * len(timesteps) + IMAGES * steps  # of each network
    if not study.begins({"why-v": calls * len(study.subjects)}) or not study.process.is_first:
        return {}
    device = study.process.device
    images = load_dataset("mnist", "test", study.settings.data_dir)[0][:n].to(device)
    errors, clipped = {}, {}
    for subject in study.subjects:
        study.bar.set_description(f"{subject.label}, why v")
        name = study.names[subject.label]
        errors[name] = prediction_errors(subject, images, timesteps)[::-1]
        clipped[name] = clipped_shares(subject, IMAGES, steps, device)
        study.bar.update(calls)
    draw_why_v(errors, clipped, study.out / "why-v.png")
    return {"why-v": errors_table(errors), "clipped": clipped_table(clipped)}


def chosen_timesteps(T: int) -> list[int]:
    """Return about 25 timesteps, descending: evenly spaced ones, and more of those next to T."""
    even = {round(i * (T - 1) / 20) for i in range(21)}
    late = {T - 1 - k for k in (0, 1, 2, 5, 10, 20) if k < T}
    return sorted(even | late, reverse=True)


@torch.inference_mode()
def prediction_errors(subject: Subject, images: Tensor, timesteps: Sequence[int]) -> list[dict]:
    """Measure how well x_0 is predicted from x_t.

    Args:
        images: (N, 1, 28, 28) uint8.
        timesteps: strictly descending.

    Returns:
        For each t: its SNR; the rms error over all pixels for the network in float32 and in
        bfloat16, before and after clipping; and the rms difference of the two ("rounding").
    """
    scheduler = subject.scheduler(clip_sample=False)
    bound = scheduler.config.clip_sample_range
    x0 = to_model_range(images, bound)
    noise = image_noise(0, torch.arange(len(x0), device=x0.device), 0, SHAPE)
    scheduler.set_timesteps(timesteps=timesteps)
    rows = []
    for t in timesteps:
        x_t = scheduler.add_noise(x0, noise, t)
        abar = scheduler.alphas_cumprod[t].item()
        row, predictions = {"t": t, "snr": abar / (1 - abar)}, {}
        for dtype in ("float32", "bfloat16"):
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                output = subject.model(x_t, torch.full((1,), t, device=x_t.device)).float()
            x = predictions[dtype] = scheduler.step(output, t, x_t).pred_original_sample
            row[dtype] = rms(x - x0)
            row[f"{dtype}_clipped"] = rms(x.clamp(-bound, bound) - x0)
        row["rounding"] = rms(predictions["bfloat16"] - predictions["float32"])
        rows.append(row)
    return rows


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def clipped_shares(subject: Subject, n: int, steps: int, device: torch.device) -> list[dict]:
    """Return the share of pixels of x_0 that DDIM (eta = 0) clips at each step, for n images."""
    scheduler, rows = subject.scheduler(), []
    scheduler.set_timesteps(steps)
    bound = scheduler.config.clip_sample_range

    def count(t: int, _x_t: Tensor, x0: Tensor) -> None:
        rows.append({"t": t, "share": (x0.abs() >= bound).float().mean().item()})

    indices = torch.arange(n, device=device)
    sample(subject.model, scheduler, indices, SHAPE, callback=count, eta=0.0)
    return rows


def errors_table(errors: Mapping[str, Sequence[dict]]) -> str:
    """Return the errors at the first, the middle and the last three t, ascending."""
    keys = ("float32", "bfloat16", "float32_clipped", "rounding")
    rows = []
    for name, by_t in errors.items():
        for r in (by_t[0], by_t[len(by_t) // 2], *by_t[-3:]):
            rows.append((name, r["t"], f"{r['snr']:.1e}", *(f"{r[key]:.3g}" for key in keys)))
    head = ("float32", "bfloat16", "float32, clipped", "bfloat16 − float32")
    return markdown_table(("", "t", "SNR", *head), rows)


def clipped_table(clipped: Mapping[str, Sequence[dict]]) -> str:
    """Return the share of clipped pixels at the first and at the last step."""
    rows = [
        (name, *(f"{by_step[i]['share']:.0%}" for i in (0, -1)))
        for name, by_step in clipped.items()
    ]
    return markdown_table(("pixels clipped", "at the first step", "at the last step"), rows)


def draw_why_v(
    errors: Mapping[str, Sequence[dict]], clipped: Mapping[str, Sequence[dict]], path: Path
) -> None:
    """Draw the errors of x_0, what bfloat16 adds to them, and the share that is clipped."""
    figure, axes = new_figure(1, 3, 13, 3.8)
    for i, (name, rows) in enumerate(errors.items()):
        t = [row["t"] for row in rows]
        for dtype, style in (("float32", "-"), ("bfloat16", ":")):
            y = [row[dtype] for row in rows]
            axes[0, 0].plot(t, y, style, color=f"C{i}", label=f"{name}, {dtype}")
        axes[0, 1].plot(t, [row["rounding"] for row in rows], color=f"C{i}", label=name)
        steps, shares = ([row[key] for row in clipped[name]] for key in ("t", "share"))
        axes[0, 2].plot(steps, shares, color=f"C{i}", label=name)
    axes[0, 0].set(yscale="log", ylabel="rms error of the predicted x₀, unclipped", xlabel="t")
    axes[0, 1].set(yscale="log", ylabel="rms bfloat16 − float32", xlabel="t")
    axes[0, 2].set(ylabel="share of pixels clipped, while sampling", xlabel="t", ylim=(0, 1))
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    save_figure(figure, path)
