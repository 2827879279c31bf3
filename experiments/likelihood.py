"""How many bits does a test image cost, and does it survive a trip to noise and back?

Timesteps are 0-based, as everywhere in this lab: t = T-1, ..., 0. Here x is the image, and all of
x_{T-1}, ..., x_0 are noisy.

**Bits per dimension.** The variational bound (DDPM, Ho et al. 2020, eq. 5) says how many bits an
image costs at most:

    -log p(x) <= L_T + sum of L_t over t = 1 ... T-1 + L_0

    L_T   KL(q(x_{T-1} | x) || N(0, I)), at the noisiest timestep
    L_t   KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), the step from t to t-1         DDPM eq. 8
    L_0   -log p(x | x_0), the step from t = 0 to the image                          DDPM eq. 13

Both variances of DDPM section 3.2 are measured, beta~_t and beta_t. At t = 0, where beta~ is 0,
both take the beta~ of t = 1, as in improved-diffusion. The predicted image is clipped, as in
sampling.

L_0 needs a probability for each of the 256 levels of a pixel. It is the Gaussian of the last step,
integrated from the midpoint below the level to the midpoint above. The levels are those in the
range of the model (`to_model_range`), where black and white may stand apart. The bins of 0 and 255
reach to infinity. So the 256 probabilities add up to 1, and bits of models with different ranges
can be compared.

Every image has one t. p(t) is the share of L_t in the sum if the data were N(0, 1), and L_t / p(t)
estimates the sum. The draws are stratified: p(t) is cut into n equally probable parts, and each of
the n images has its t from another part. The images are in a random order, because MNIST's first
5,000 test images are cleaner than the others. The standard error comes from the differences of
neighbours: images 2i and 2i + 1. It is too large rather than too small, because the two have
different t.

**Inversion** (DDIM, Song et al. 2021, section 5.4). DDIM with eta = 0 solves an ODE. Its steps can
also go up, from the image to noise:

    x_u = sqrt(abar_u) x^ + sqrt(1 - abar_u) eps^,    x^ and eps^ predicted at x_t, u > t

The timesteps are those of sampling (trailing: 999, 899, ..., 99 for 10 steps). The first step
starts at the clean image. The network has no timestep for it, so it is called at the smallest one
in use (99 for 10 steps). It gives eps^, and x^ is the image. Then the usual steps go down again. x^
is not clipped in either direction. The error is the mean square over the pixels, in units in which
the range of the model has length 1: its black is 0, its white is 1. Rows:

    mean      ± its standard error over the images
    median    a few images have most of the error
    uint8     the mean after rounding both images to pixels / 255: it cuts off what lies beyond
              black and white, but counts an error between them more if the range is wider
    short     the mean of a trip without the timesteps whose log-SNR is below -6: an eps-network
              divides by sqrt(abar_t), which is 0.05 there and 5e-5 at t = 999

The network runs in float32 here, also on a GPU. Per-image results are kept in out/likelihood.

Writes a table of bits, one of the bits in ranges of log-SNR = log(abar / (1 - abar)), one of the
inversion errors, and likelihood.png.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from lab.data import load_dataset, to_model_range, to_uint8
from lab.noise import image_noise
from lab.pictures import new_figure, save_figure

import torch
from torch import Tensor

from diffusion import Model, draw_timesteps
from experiments.common import Study
from experiments.denoiser import timesteps_in_range
from experiments.estimates import Estimate
from experiments.grid import SHAPE, Subject, read_json, write_json
from experiments.keys import code_key, digest
from experiments.ranges import range_name
from experiments.tables import markdown_table, with_se
from scheduler import DDPMScheduler

TITLE = "Likelihood and inversion"
TABLES = ("likelihood", "likelihood-ranges", "inversion")
FIGURES = {"likelihood.png": "Bits per dimension that sampling has spent, against log-SNR"}

F64 = torch.float64
SHORT_TRIP = -6.0  # the least log-SNR of a short trip
SEED = 0
TEST_IMAGES = 10_000
RANGES = list(pairwise((-math.inf, -3.0, 0.0, 3.0, 6.0, math.inf)))  # low < log-SNR <= high
VARIANCES = {"small": "σ² = β̃", "large": "σ² = β"}

# Song et al. 2021, table 2: reconstruction error on CIFAR-10 by number of steps
PAPER = {
    10: 0.014,
    20: 0.0065,
    50: 0.0023,
    100: 0.0009,
    200: 0.0004,
    500: 0.0001,
    1000: 0.0001,
}

Progress = Callable[[int], object]  # is told the number of images after each call of the network


def run(study: Study) -> dict[str, str]:
    """Draw the figure and return the tables."""
    s = study.settings
    n, all_steps = min(2 * s.n, TEST_IMAGES), [steps for steps in PAPER if steps <= s.steps[-1]]
    bounds = [Likelihood(subject, n) for subject in study.subjects]
    trips = [
        Inversion(subject, min(s.images(steps) // 4, TEST_IMAGES), steps, is_short)
        for subject in study.subjects
        for steps in all_steps
        for is_short in (False, True)
    ]
    results = measure([*bounds, *trips], study)
    if not study.process.is_first:
        return {}
    terms = {study.names[m.subject.label]: r for m, r in zip(bounds, results, strict=False)}
    schedulers = {study.names[subject.label]: subject.scheduler() for subject in study.subjects}
    draw_bits(terms, schedulers, study.out / "likelihood.png")
    tables = {"likelihood": bits_table(terms), "likelihood-ranges": ranges_table(terms, schedulers)}
    if trips:
        tables["inversion"] = inversion_table(study.names, trips, results[len(bounds) :])
    return tables


# ------------------------------------------------------------------------- the variational bound


@dataclass(frozen=True)
class Likelihood:
    """The terms of the bound for n test images: one t per image, in bits per dimension."""

    subject: Subject
    n: int

    columns: ClassVar = (
        *("t", "prior"),
        *("steps, small", "steps, large"),  # L_t / p(t)
        "decoder",
    )
    calls: ClassVar = 2  # of the network, per image

    @property
    def name(self) -> str:
        return f"{self.subject.sha256[:12]}-bits-n{self.n}"

    def measure(
        self, images: Tensor, places: Tensor, device: torch.device, progress: Progress
    ) -> Tensor:
        """Return the columns of the images at these places among the n, (B, columns) float64."""
        model, scheduler = self.subject.model, DDPMScheduler(**self.subject.contents["scheduler"])
        indices, t = choose_images(self.n)[places], choose_timesteps(scheduler, self.n)[places]
        pixels = images[indices]
        x0 = to_model_range(pixels, scheduler.config.clip_sample_range, F64)
        noise = [image_noise(SEED, indices.to(device), draw, SHAPE) for draw in (0, 1)]
        steps = step_terms(model, scheduler, x0, noise[0], t)
        progress(len(places))
        decoder = decoder_term(model, scheduler, pixels, noise[1])
        progress(len(places))
        weights = 1 / timestep_density(scheduler)[t]
        terms = [prior_term(scheduler, x0), *(weights * L for L in steps.values())]
        nats = torch.stack([*terms, decoder])
        return torch.cat([t[None], nats / (math.log(2) * x0[0].numel())]).T


def choose_images(n: int) -> Tensor:
    """Return the indices of n test images, in a random order, (n,) int64."""
    return torch.randperm(TEST_IMAGES, generator=torch.Generator().manual_seed(SEED))[:n]


def timestep_density(scheduler: DDPMScheduler) -> Tensor:
    """Return p(t), (T,) float64: the share of L_t for data from N(0, 1); 0 at t = 0.

    With beta~_t, L_t is the squared error of x_0 times half the difference of the SNRs (Kingma et
    al. 2021, arXiv:2107.00630). For N(0, 1) the best squared error is 1 - abar_t.
    """
    abar = scheduler.alphas_cumprod
    snr = abar / (1 - abar)
    p = torch.zeros_like(abar)
    p[1:] = (snr[:-1] - snr[1:]) * (1 - abar[1:])
    return p / p.sum()


def choose_timesteps(scheduler: DDPMScheduler, n: int) -> Tensor:
    """Return one t from each of n equally probable parts, ascending, (n,) int64."""
    cdf = timestep_density(scheduler)[1:].cumsum(0)
    return 1 + draw_timesteps(cdf, n, torch.Generator().manual_seed(SEED))


def prior_term(scheduler: DDPMScheduler, x0: Tensor) -> Tensor:
    """Return L_T of each image in nats, (B,) float64."""
    abar = scheduler.alphas_cumprod[-1]
    kl = gaussian_kl(abar.sqrt() * x0, 1 - abar, torch.zeros((), dtype=F64), torch.ones_like(abar))
    return kl.flatten(1).sum(1)


def step_terms(
    model: Model, scheduler: DDPMScheduler, x0: Tensor, noise: Tensor, t: Tensor
) -> dict[str, Tensor]:
    """Return L_t of each image in nats, (B,) float64, for each of VARIANCES.

    Args:
        x0: (B, C, H, W) float64 images in the range of the model, on the CPU.
        noise: (B, C, H, W), on the device of the model.
        t: (B,) int64, 1 or more, on the CPU.
    """
    variance = {name: v[t].view(-1, 1, 1, 1) for name, v in variances(scheduler).items()}
    x_t, predicted = predict_x0(model, scheduler, x0, noise, t)
    true_mean = posterior_mean(scheduler, x0, x_t, t)  # of q(x_{t-1} | x_t, x_0)
    mean = posterior_mean(scheduler, predicted, x_t, t)  # of p(x_{t-1} | x_t)
    return {
        name: gaussian_kl(true_mean, variance["small"], mean, v).flatten(1).sum(1)
        for name, v in variance.items()
    }


def decoder_term(model: Model, scheduler: DDPMScheduler, pixels: Tensor, noise: Tensor) -> Tensor:
    """Return L_0 of each image in nats, (B,) float64. It is the same for all of VARIANCES.

    Args:
        pixels: (B, C, H, W) uint8, on the CPU.
        noise: (B, C, H, W), on the device of the model.
    """
    bound = scheduler.config.clip_sample_range
    x0, t = to_model_range(pixels, bound, F64), torch.zeros(len(pixels), dtype=torch.int64)
    _, mean = predict_x0(model, scheduler, x0, noise, t)  # of the last step: abar is 1 after it
    std = variances(scheduler)["small"][0].sqrt()
    return -log_probability(pixels, mean, std, bound).flatten(1).sum(1)


def predict_x0(
    model: Model, scheduler: DDPMScheduler, x0: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_t and the x_0 predicted from it, float64 on the CPU."""
    t = t.to(noise.device)
    x_t = scheduler.add_noise(x0.to(noise.device, noise.dtype), noise, t)
    predicted = scheduler.get_original_sample(model(x_t, t), x_t, t)
    return x_t.cpu().double(), predicted.cpu().double()


def variances(scheduler: DDPMScheduler) -> dict[str, Tensor]:
    """Return beta~_t ("small") and beta_t ("large"), each (T,) float64; beta~_1 at t = 0."""
    abar, beta = scheduler.alphas_cumprod, scheduler.betas
    small = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])  # DDPM eq. 7
    return {name: torch.cat([small[:1], v]) for name, v in (("small", small), ("large", beta[1:]))}


def posterior_mean(scheduler: DDPMScheduler, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the mean mu~_t of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
    abar, beta = scheduler.alphas_cumprod, scheduler.betas
    abar_prev = torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    of_x0 = abar_prev.sqrt() * beta / (1 - abar)
    of_x_t = (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar)
    of_x0, of_x_t = (table[t].view(-1, 1, 1, 1) for table in (of_x0, of_x_t))
    return of_x0 * x0 + of_x_t * x_t


def gaussian_kl(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> Tensor:
    """Return KL(N(mean_q, var_q) || N(mean_p, var_p)) elementwise, in nats."""
    ratio = var_q / var_p
    return ((mean_q - mean_p).square() / var_p + ratio - 1 - ratio.log()) / 2


def log_probability(pixels: Tensor, mean: Tensor, std: Tensor, bound: float) -> Tensor:
    """Return the log of N(mean, std^2) integrated over the bins of pixels (DDPM eq. 13).

    Args:
        pixels: levels from 0 to 255, integers.
        mean: of the shape of the pixels, float64, in the range of the model.
        bound: clip_sample_range, the range of the model.
    """
    edges, level = bin_edges(bound), pixels.long()
    low, high = (edges[level] - mean) / std, (edges[level + 1] - mean) / std
    # Phi(high) - Phi(low), mirrored to the left tail: there Phi is small and its log is exact
    is_right = low + high > 0
    low, high = torch.where(is_right, -high, low), torch.where(is_right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + (-torch.expm1(log_low - log_high)).log()


def bin_edges(bound: float) -> Tensor:
    """Return the ends of the bins of the 256 levels in the range of the model, (257,) float64."""
    levels = to_model_range(torch.arange(256), bound, F64)
    infinity = torch.tensor([math.inf], dtype=F64)
    return torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])


# ------------------------------------------------------------------------------------- inversion


@dataclass(frozen=True)
class Inversion:
    """The errors of n test images after encoding and decoding them in a number of steps.

    A short trip turns round before nearly pure noise: it leaves out log-SNRs below SHORT_TRIP.
    """

    subject: Subject
    n: int
    steps: int
    is_short: bool = False

    columns: ClassVar = ("error", "error, uint8")

    @property
    def calls(self) -> int:
        """The number of calls of the network, per image."""
        return 2 * len(self.scheduler.timesteps)

    @property
    def name(self) -> str:
        kind = "short-inversion" if self.is_short else "inversion"
        return f"{self.subject.sha256[:12]}-{kind}-{self.steps}steps-n{self.n}"

    @property
    def scheduler(self) -> DDPMScheduler:
        """The scheduler of the trip. It does not clip."""
        scheduler = DDPMScheduler(**self.subject.contents["scheduler"] | {"clip_sample": False})
        scheduler.set_timesteps(self.steps)
        if self.is_short:
            is_visited = timesteps_in_range(scheduler, SHORT_TRIP, math.inf)
            is_visited[scheduler.timesteps[-1]] = True  # one is left, whatever the schedule
            visited = scheduler.timesteps[is_visited[scheduler.timesteps]]
            scheduler.set_timesteps(timesteps=visited)
        return scheduler

    def measure(
        self, images: Tensor, places: Tensor, device: torch.device, progress: Progress
    ) -> Tensor:
        """Return the columns of the images at these places among the n, (B, columns) float64."""
        scheduler = self.scheduler
        pixels = images[choose_images(self.n)[places]].to(device)
        x0 = to_model_range(pixels, scheduler.config.clip_sample_range)

        def model(x_t: Tensor, t: Tensor) -> Tensor:
            progress(len(x_t))
            return self.subject.model(x_t, t)

        back = decode(model, scheduler, encode(model, scheduler, x0))
        span = 2 * scheduler.config.clip_sample_range
        errors = (back - x0) / span, (to_uint8(back).float() - to_uint8(x0).float()) / 255
        return torch.stack([e.cpu().double().square().flatten(1).mean(1) for e in errors], dim=1)


def encode(model: Model, scheduler: DDPMScheduler, x0: Tensor) -> Tensor:
    """Return x_T of images (B, C, H, W), by steps of DDIM (eta = 0) up the timesteps in use."""
    up = scheduler.timesteps.tolist()[::-1]
    _, eps = predict_both(model, scheduler, x0, up[0])
    x_t = scheduler.add_noise(x0, eps, up[0])  # abar is 1 at the start: x_0 is the image itself
    for t, target in pairwise(up):
        x_t = scheduler.add_noise(*predict_both(model, scheduler, x_t, t), target)
    return x_t


def decode(model: Model, scheduler: DDPMScheduler, x_T: Tensor) -> Tensor:
    """Return the images of x_T, by steps of DDIM (eta = 0) down the timesteps in use."""
    down, x_t = scheduler.timesteps.tolist(), x_T
    for t, target in pairwise(down):
        x_t = scheduler.add_noise(*predict_both(model, scheduler, x_t, t), target)
    return predict_both(model, scheduler, x_t, down[-1])[0]


def predict_both(
    model: Model, scheduler: DDPMScheduler, x_t: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    """Return the predicted x_0 and the eps that leads from it to x_t: the two terms of DDIM eq. 12.

    `add_noise` with both makes the step of eta = 0, to any timestep.
    """
    output = model(x_t, torch.full((1,), t, device=x_t.device))
    x0 = scheduler.get_original_sample(output, x_t, t)
    abar = scheduler.alphas_cumprod[t].item()
    return x0, (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)


# --------------------------------------------------------------------------------- kept results


def measure(
    measurements: Sequence[Likelihood | Inversion], study: Study
) -> list[dict[str, Tensor]]:
    """Make the measurements that are not kept yet. All processes must call this.

    Returns:
        The columns of each, (n,) float64, on the first process of a study; else an empty list.
    """
    process, folder = study.process, study.out / "likelihood"
    images = load_dataset("mnist", "test", study.settings.data_dir)[0]
    keys = [key_of(m, process.device) for m in measurements]
    pairs = list(zip(measurements, keys, strict=True))
    found = [read_json(folder / f"{m.name}.json").get("key") for m in measurements]
    kept = process.agree([a == b for a, b in zip(found, keys, strict=True)])
    missing = [pair for pair, done in zip(pairs, kept, strict=True) if not done]
    if not study.begins({m.name: m.n * m.calls for m, _ in missing}):
        return []
    for m, key in missing:
        study.bar.set_description(f"{m.subject.label}, {type(m).__name__.lower()}")
        columns = measure_one(m, images, study, lambda n: study.bar.update(n * process.world))
        if process.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{m.name}.json", {"key": key} | columns)
    return [read_columns(folder, m) for m in measurements] if process.is_first else []


def key_of(measurement: Likelihood | Inversion, device: torch.device) -> str:
    """Return what a measurement depends on besides its checkpoint and its settings."""
    start = f"experiments.likelihood:{type(measurement).__name__}"
    return digest(code_key((start, *measurement.subject.code)), device.type)


@torch.inference_mode()
def measure_one(
    measurement: Likelihood | Inversion, images: Tensor, study: Study, progress: Progress
) -> dict[str, list[float]]:
    """Return the columns of a measurement. Every process makes its share of the images.

    Args:
        images: all test images, (N, 1, 28, 28) uint8.
    """
    process, batch_size = study.process, study.settings.batch_size
    share = process.share(measurement.n)
    table = torch.zeros(measurement.n, len(measurement.columns), dtype=F64)
    for places in torch.arange(share.start, share.stop).split(batch_size):
        table[places] = measurement.measure(images, places, process.device, progress)
    process.sum(table)  # the rows of other processes are 0
    return dict(zip(measurement.columns, table.T.tolist(), strict=True))


def read_columns(folder: Path, measurement: Likelihood | Inversion) -> dict[str, Tensor]:
    kept = read_json(folder / f"{measurement.name}.json")
    return {column: torch.tensor(kept[column], dtype=F64) for column in measurement.columns}


# ----------------------------------------------------------------------------- tables and figure

Terms = Mapping[str, Mapping[str, Tensor]]  # the columns of Likelihood, by the name of the model


def estimate(values: Tensor) -> Estimate:
    """Return the mean of values whose neighbours are draws from nearly the same distribution.

    The expected square of their difference is the sum of their variances, or more if their means
    differ.
    """
    pairs = values[: len(values) // 2 * 2].view(-1, 2)
    variance = pairs.diff(dim=1).square().mean().item() / 2
    return Estimate(values.mean().item(), math.sqrt(variance / len(values)))


def bits_table(terms: Terms) -> str:
    """Return bits per dimension: one row per model and variance, the bound and its three parts."""
    rows = []
    for name, columns in terms.items():
        for key, variance in VARIANCES.items():
            parts = [columns[c] for c in ("prior", f"steps, {key}", "decoder")]
            bits = [estimate(v) for v in (sum(parts), *parts)]
            rows.append((f"{name}, {variance}", *(with_se(e, ".3f") for e in bits)))
    return markdown_table(("", "bits per dimension", "L_T", "sum of L_t", "L_0"), rows)


def ranges_table(terms: Terms, schedulers: Mapping[str, DDPMScheduler]) -> str:
    """Return the bits in each range of log-SNR and in L_0, and their share, with beta~."""
    rows = []
    for name, columns in terms.items():
        steps, decoder = columns["steps, small"], columns["decoder"]
        total = (columns["prior"] + steps + decoder).mean().item()
        t, row = columns["t"].long(), []
        inside = [timesteps_in_range(schedulers[name], *bounds)[t] for bounds in RANGES]
        for values in (*(steps * here for here in inside), decoder):
            e = estimate(values)
            row.append(f"{with_se(e, '.3f')} ({e.mean / total:.0%})")
        rows.append((name, *row))
    return markdown_table(("log-SNR", *(range_name(*b) for b in RANGES), "L_0"), rows)


def inversion_table(
    names: Mapping[str, str],
    trips: Sequence[Inversion],
    results: Sequence[Mapping[str, Tensor]],
) -> str:
    """Return the errors in units of 10⁻⁴: one column per number of steps."""
    all_steps = list(dict.fromkeys(trip.steps for trip in trips))
    images = {trip.steps: trip.n for trip in trips}
    rows = [
        ["*n*", *(f"*{images[steps]}*" for steps in all_steps)],
        ["the paper, CIFAR-10", *(f"{1e4 * PAPER[steps]:g}" for steps in all_steps)],
    ]
    for label, name in names.items():
        mine = [(t, r) for t, r in zip(trips, results, strict=True) if t.subject.label == label]
        whole, short = (
            [r for t, r in mine if t.is_short == is_short] for is_short in (False, True)
        )
        plain, rounded = Inversion.columns
        rows += [
            [f"{name}, mean", *(readable(estimate(1e4 * r[plain])) for r in whole)],
            [f"{name}, median", *(f"{1e4 * r[plain].median():.3g}" for r in whole)],
            [f"{name}, uint8", *(readable(estimate(1e4 * r[rounded])) for r in whole)],
            [f"{name}, short", *(readable(estimate(1e4 * r[plain])) for r in short)],
        ]
    return markdown_table(["error × 10⁴, by steps", *all_steps], rows)


def readable(e: Estimate) -> str:
    """Return an error ± its standard error, to as many decimals as the standard error needs."""
    if e.mean >= 1e4:
        return with_se(e, ".1e")
    forms = {1: ".0f", 0.1: ".1f", 0.01: ".2f"}
    return with_se(e, next((form for least, form in forms.items() if e.se >= least), ".3f"))


def draw_bits(terms: Terms, schedulers: Mapping[str, DDPMScheduler], path: Path) -> None:
    """Draw the bits spent from noise up to each log-SNR; the dotted line at the end is L_0."""
    figure, axes = new_figure(1, 1, 6.4, 4.2)
    ax = axes[0, 0]
    for i, (name, columns) in enumerate(terms.items()):
        x, y = spent(columns, schedulers[name])
        total = y[-1] + columns["decoder"].mean()
        ax.plot(x, y, lw=1.4, color=f"C{i}", label=f"{name}: {total:.2f}")
        ax.plot([x[-1], x[-1]], [y[-1], total], "o:", ms=3, lw=1.4, color=f"C{i}")
    ax.set(xlabel="log-SNR (noise → image)", ylabel="bits per dimension spent so far")
    ax.set_xlim(left=-10)  # nothing is spent below
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_figure(figure, path)


def spent(columns: Mapping[str, Tensor], scheduler: DDPMScheduler) -> tuple[Tensor, Tensor]:
    """Return the log-SNR after each step, and the bits of L_T and of the steps up to there."""
    log_snr = torch.logit(scheduler.alphas_cumprod, eps=1e-30)  # finite also in pure noise
    t, bits = columns["t"].long(), columns["steps, small"] / len(columns["t"])
    L_t = torch.bincount(t, bits, minlength=len(log_snr))[1:]  # for t = 1 ... T-1
    return log_snr[:-1].flip(0), columns["prior"].mean() + L_t.flip(0).cumsum(0)
