"""Noise schedules, the forward process and the reverse steps of DDPM and DDIM.

The notation is that of Ho et al. 2020 (DDPM, arXiv:2006.11239) and Song et al. 2021 (DDIM,
arXiv:2010.02502). Timesteps are 0-based, t = 0 .. T-1. The clean image is t = -1, with abar = 1.

    alpha_t = 1 - beta_t,    abar_t = alpha_0 alpha_1 ... alpha_t

    one step    q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I)                  DDPM eq. 2
    the jump    q(x_t | x_0)     = N(sqrt(abar_t) x_0, (1 - abar_t) I)                 DDPM eq. 4
    posterior   q(x_{t-1} | x_t, x_0) = N(mu~_t, beta~_t I)                            DDPM eq. 6-7
    v-target    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0        Salimans & Ho 2022, section 4

Conventions. Samples are float tensors of any shape (B, ...), scaled to [-1, 1] or, if black and
white are pushed out, to +-clip_sample_range. Noise and model outputs have the shape of the samples.
Tables are computed in float64. A step multiplies by Python floats that are read from the tables, so
it is a few elementwise operations on the sample's device and never waits for the device. float16
and bfloat16 samples are stepped in float32 and returned in their own dtype.

Names and semantics follow diffusers, with four deliberate differences. The previous timestep is
the one that really comes next in `timesteps`; diffusers assumes t - T // S. The default spacing is
"trailing". DDIM's eta scales the variance, and its eps is derived from the clipped x_0 (see
`DDIMScheduler`).

A schedule must end in nearly pure noise, because sampling starts there. linear, scaled_linear and
sigmoid betas are made for T = 1000. With T = 100 the last abar is still 0.36 (scaled_linear: 0.48):
then use the cosine schedule or `rescale_betas_zero_snr`.

To add a noise schedule, edit `make_betas` and BETA_SCHEDULES. To add a sampler, write a subclass
with its own `step`, and add it to SAMPLERS here and in infer.py (study: LINES in samplers.py).

    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model(x, t), t, x, eta=0.0).prev_sample
"""

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "cosine", "sigmoid")
VARIANCE_TYPES = ("fixed_small", "fixed_large")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
ETA_CONVENTIONS = ("variance", "std")


class PredictionType(NamedTuple):
    """The names of what a network predicts; its key in PREDICTION_TYPES is diffusers' name."""

    option: str  # the value of --pred
    symbol: str  # in tables and figures


PREDICTION_TYPES = {
    "v_prediction": PredictionType("v", "v"),
    "epsilon": PredictionType("eps", "ε"),
    "sample": PredictionType("x0", "x₀"),
}

Noise = Tensor | Callable[[], Tensor]  # the noise of a step, or a function that draws it


class Config(dict):
    """The arguments of a scheduler: a dictionary whose entries are attributes, too."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None


class SchedulerOutput(NamedTuple):
    """The result of a reverse step. Both tensors have the sample's shape and dtype."""

    prev_sample: Tensor  # x_{t-k}, the input of the next step
    pred_original_sample: Tensor  # the x_0 predicted at this step, clipped if clip_sample


def make_betas(
    beta_schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float
) -> Tensor:
    """Return the (T,) float64 betas of a named schedule.

    linear             Ho et al. 2020, section 4
    scaled_linear      linear in sqrt(beta); Rombach et al. 2022 (latent diffusion)
    squaredcos_cap_v2  abar(s) = cos^2((s + 0.008) / 1.008 pi/2), beta at most 0.999;
      (or cosine)      Nichol & Dhariwal 2021, eq. 17; beta_start and beta_end are not used
    sigmoid            sigmoid(-6 .. 6) scaled to beta_start .. beta_end; Xu et al. 2022 (GeoDiff)
    """
    T, f64 = num_train_timesteps, torch.float64
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, T, dtype=f64)
    if beta_schedule == "scaled_linear":
        if min(beta_start, beta_end) < 0:  # its root would be complex
            raise ValueError(f"every beta must lie in (0, 1), not {min(beta_start, beta_end):g}")
        return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=f64) ** 2
    if beta_schedule in ("squaredcos_cap_v2", "cosine"):
        s = torch.arange(T + 1, dtype=f64) / T
        abar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    if beta_schedule == "sigmoid":
        return torch.linspace(-6, 6, T, dtype=f64).sigmoid() * (beta_end - beta_start) + beta_start
    raise _unknown("beta_schedule", beta_schedule, BETA_SCHEDULES)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas with abar_{T-1} = 0 exactly and the same abar_0 (Lin et al. 2023, algorithm 1).

    sqrt(abar) is shifted so that it ends at 0, then scaled so that its start does not change. The
    last beta becomes 1. Takes and returns (T,) float64. T must be at least 2.
    """
    abar_sqrt = (1 - betas).cumprod(0).sqrt()
    first, last = abar_sqrt[0].clone(), abar_sqrt[-1].clone()
    abar = ((abar_sqrt - last) * first / (first - last)) ** 2
    alphas = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return 1 - alphas


def checked_betas(betas: Tensor, rescale_to_zero_snr: bool) -> Tensor:
    """Check that (T,) betas lie in (0, 1). Return them, rescaled on request.

    Raises:
        ValueError: a beta lies outside (0, 1), or there is only one to rescale.
    """
    # A schedule that already ends at zero SNR has a last beta of 1. Rescaling keeps it.
    inside = betas[:-1] if rescale_to_zero_snr and betas[-1] == 1 else betas
    # The test is on 1 - beta: a beta so small that 1 - beta rounds to 1 counts as 0.
    if not ((1 - inside > 0) & (1 - inside < 1)).all():
        raise ValueError(
            f"every beta must lie in (0, 1), but they span "
            f"[{betas.min().item():g}, {betas.max().item():g}]"
        )
    if not rescale_to_zero_snr:
        return betas
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr needs num_train_timesteps >= 2, not 1")
    return rescale_zero_terminal_snr(betas)


class DDPMScheduler:
    """The diffusion process and its ancestral sampler (Ho et al. 2020, algorithm 2).

    Args:
        num_train_timesteps: T >= 1. It may be left out if `trained_betas` is given.
        beta_start, beta_end: first and last beta of the linear, scaled_linear and sigmoid
            schedules.
        beta_schedule: one of BETA_SCHEDULES, see `make_betas`.
        trained_betas: (T,) betas to use instead of a named schedule.
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample" (x_0).
        variance_type: the variance of the noise that a step adds. "fixed_small" is beta~_t,
            "fixed_large" is beta_t: the lower and the upper bound of DDPM section 3.2.
        clip_sample, clip_sample_range: whether the predicted x_0 is clipped to [-range, range].
        timestep_spacing: how S of the T timesteps are chosen, see `set_timesteps`.
        rescale_betas_zero_snr: make abar_{T-1} = 0, see `rescale_zero_terminal_snr`. Epsilon-
            prediction is then refused: its x_0 would be a division by 0.

    Attributes:
        betas, alphas, alphas_cumprod: (T,) float64 on the CPU.
        timesteps: (S,) int64, strictly descending; all T of them until `set_timesteps` is called.
        num_inference_steps: S, or None until `set_timesteps` is called.
        init_noise_sigma: 1.0, the standard deviation of x_T.
        config: the constructor's arguments, JSON-able. `DDPMScheduler(**config)` makes a copy.

    Raises:
        ValueError: a name is unknown, T < 1, `trained_betas` is not (T,), a beta lies outside
            (0, 1), clip_sample_range is not positive, abar = 0 before T-1, abar < 1e-76 at T-1 with
            epsilon-prediction, or there is only one beta to rescale.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        *,
        trained_betas: Sequence[float] | Tensor | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "trailing",
        rescale_betas_zero_snr: bool = False,
    ):
        if trained_betas is not None:
            trained_betas = torch.as_tensor(_plain(trained_betas), dtype=torch.float64)
            if trained_betas.ndim != 1:
                raise ValueError(f"trained_betas must be (T,), not {tuple(trained_betas.shape)}")
            trained_betas = trained_betas.tolist()
            if num_train_timesteps not in (1000, len(trained_betas)):  # 1000: left at its default
                raise ValueError(
                    f"num_train_timesteps is {num_train_timesteps} "
                    f"but trained_betas has {len(trained_betas)} values"
                )
            num_train_timesteps = len(trained_betas)
        num_train_timesteps = _int("num_train_timesteps", num_train_timesteps, 1)
        for name, value, allowed in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("prediction_type", prediction_type, tuple(PREDICTION_TYPES)),
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ):
            if value not in allowed:
                raise _unknown(name, value, allowed)
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be > 0, not {clip_sample_range}")

        if trained_betas is None:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        else:
            betas = torch.tensor(trained_betas, dtype=torch.float64)
        betas = checked_betas(betas, rescale_betas_zero_snr)

        self.config = Config(
            num_train_timesteps=num_train_timesteps,
            beta_start=float(beta_start),
            beta_end=float(beta_end),
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_sample=bool(clip_sample),
            clip_sample_range=float(clip_sample_range),
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=bool(rescale_betas_zero_snr),
        )
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        if (self.alphas_cumprod[:-1] == 0).any():
            raise ValueError("the betas are too large: abar reaches 0 before the last timestep")
        if prediction_type == "epsilon" and self.alphas_cumprod[-1] < 1e-76:  # float32 ends at 1e38
            raise ValueError(
                f"prediction_type 'epsilon' cannot start from abar_T = {self.alphas_cumprod[-1]:g} "
                "(it would divide by its root): use 'v_prediction' or 'sample' with this schedule"
            )
        self._abar = self.alphas_cumprod.tolist()
        self._forward_tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._visit(range(num_train_timesteps - 1, -1, -1))
        self.num_inference_steps: int | None = None
        self.init_noise_sigma = 1.0

    @classmethod
    def from_config(cls, config: Mapping, **changes) -> Self:
        """Return a scheduler with the arguments of another one's config, such as diffusers'.

        Arguments that this class does not know are left out.
        """
        known = {name for c in cls.__mro__ for name in inspect.signature(c.__init__).parameters}
        return cls(**{k: v for k, v in (dict(config) | changes).items() if k in known})

    def __len__(self) -> int:
        """Return T."""
        return self.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample. (Loops for diffusers call this; here no scaling is needed.)"""
        return sample

    # ---------------------------------------------------------------- which timesteps are visited

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the timesteps that the reverse process visits: S of them, or a given list.

        The spacings, after Lin et al. 2023, table 2, for T = 1000 and S = 10:

            leading   t = floor(T/S) i                    900, 800, ..., 100, 0
            linspace  S rounded points from 0 to T-1      999, 888, ..., 111, 0
            trailing  t = round(T - i T/S) - 1            999, 899, ..., 199, 99

        Sampling starts from pure noise, which is T-1. Only linspace (S >= 2) and trailing start
        there. There are always exactly S timesteps, strictly descending, within [0, T).

        Args:
            num_inference_steps: S, 1 <= S <= T.
            device: the device of `self.timesteps`. The maths does not need it.
            timesteps: instead of S, any strictly descending subset of 0 .. T-1.

        Raises:
            ValueError: both or neither are given, S is out of range, or the list is empty, not
                strictly descending or out of range.
        """
        T = self.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give exactly one of num_inference_steps and timesteps")
        if timesteps is not None:
            timesteps = torch.as_tensor(_plain(timesteps)).tolist()
            is_list = isinstance(timesteps, list) and timesteps
            if not is_list or not all(type(t) is int for t in timesteps):
                raise ValueError(f"timesteps must be a non-empty list of ints, not {timesteps}")
            if any(a <= b for a, b in zip(timesteps, timesteps[1:], strict=False)):
                raise ValueError(f"timesteps must be strictly descending, not {timesteps}")
            if timesteps[0] >= T or timesteps[-1] < 0:
                raise ValueError(f"timesteps must lie in [0, {T}), not {timesteps}")
            self._visit(timesteps, device)
            return

        S = _int("num_inference_steps", num_inference_steps, 1, T)
        spacing = self.config["timestep_spacing"]
        # Python's round, like numpy's, rounds halves to even. `stride` has the rounding error of
        # np.arange(T, 0, -T/S), so "trailing" equals diffusers' even where a half depends on it.
        stride = T - (T - T / S)
        if spacing == "leading":
            ascending = [i * (T // S) for i in range(S)]
        elif spacing == "linspace":
            ascending = [round(i * ((T - 1) / max(S - 1, 1))) for i in range(S)]
        else:
            ascending = [round(T - i * stride) - 1 for i in reversed(range(S))]
        self._visit(ascending[::-1], device)

    def _visit(self, timesteps: Sequence[int], device: torch.device | str | None = None) -> None:
        self.timesteps = torch.tensor(list(timesteps), dtype=torch.int64, device=device)
        self.num_inference_steps = len(timesteps)
        self._previous = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """Return the next timestep in `self.timesteps`, or -1 (the clean image) after the last.

        Raises:
            ValueError: the timestep is not one of `self.timesteps`.
        """
        t = timestep
        if hasattr(t, "ndim"):  # a tensor, or a number or an array of numpy
            if t.ndim:
                raise ValueError(f"a step has one timestep, not an array of shape {tuple(t.shape)}")
            t = t.item()
        if t not in self._previous:
            raise ValueError(
                f"timestep {timestep} is not among the {len(self._previous)} timesteps in use, "
                f"{self._brief()}: see set_timesteps"
            )
        return self._previous[t]

    def _brief(self) -> str:
        ts = [str(t) for t in self._previous]
        return ", ".join(ts if len(ts) <= 5 else [*ts[:3], "...", ts[-1]])

    # --------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM eq. 4).

        Args:
            original_samples, noise: x_0 and eps, both (B, ...) and floats.
            timesteps: integers in [0, T), of shape (), (1,) or (B,). Their range is checked on the
                CPU only: on an accelerator the check would have to wait for the device.

        Returns:
            x_t, with the shape, dtype and device of x_0.

        Raises:
            ValueError: shapes do not match, samples are not floats, or timesteps are not integers
                or are out of range.
        """
        sqrt_abar, sqrt_one_minus_abar = self._forward(original_samples, noise, timesteps)
        noise = noise.to(original_samples.dtype)
        return sqrt_abar * original_samples + sqrt_one_minus_abar * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, section 4).

        Arguments, result and errors are those of `add_noise`. `sample` is x_0.
        """
        sqrt_abar, sqrt_one_minus_abar = self._forward(sample, noise, timesteps)
        return sqrt_abar * noise.to(sample.dtype) - sqrt_one_minus_abar * sample

    def get_original_sample(
        self, model_output: Tensor, sample: Tensor, timesteps: Tensor | int
    ) -> Tensor:
        """Return the predicted x_0 at x_t, clipped if clip_sample; each image has its own t.

        Args:
            model_output: the network's eps, v or x_0 (`prediction_type`), (B, ...).
            sample: x_t, (B, ...).
            timesteps: t in [0, T), an int or an integer tensor (B,) or ().

        Returns:
            x_0, (B, ...): DDPM eq. 15 for eps, Salimans & Ho 2022, section 4, for v.

        Raises:
            ValueError: as `add_noise`.
        """
        _check_same_shape("model_output", model_output, "sample", sample)
        sqrt_abar, sqrt_one_minus_abar = self._forward(sample, model_output, timesteps)
        if self.prediction_type == "epsilon":
            x0 = (sample - sqrt_one_minus_abar * model_output) / sqrt_abar
        elif self.prediction_type == "v_prediction":
            x0 = sqrt_abar * sample - sqrt_one_minus_abar * model_output
        else:
            x0 = model_output
        bound = self.config["clip_sample_range"]
        return x0.clamp(-bound, bound) if self.config["clip_sample"] else x0

    def _forward(self, x0: Tensor, noise: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), shaped to broadcast against (B, ...)."""
        _check_same_shape("noise", noise, "the samples", x0)
        if not x0.is_floating_point():
            raise ValueError(f"the samples must be floats, not {x0.dtype}")
        t = torch.as_tensor(_plain(timesteps))
        if t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, not {t.dtype}")
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, *x0.shape[:1])):
            raise ValueError(
                f"timesteps must have shape (), (1,) or ({', '.join(map(str, x0.shape[:1]))},) "
                f"for samples of shape {tuple(x0.shape)}, not {tuple(t.shape)}"
            )
        if t.device.type == "cpu" and t.numel() and not 0 <= t.min() <= t.max() < len(self._abar):
            raise ValueError(
                f"timesteps must lie in [0, {len(self._abar)}), "
                f"not [{t.min().item()}, {t.max().item()}]"
            )
        key = (x0.device, x0.dtype)
        if key not in self._forward_tables:  # float64 to the end, then one rounding to x0's dtype
            abar = self.alphas_cumprod
            self._forward_tables[key] = tuple(
                c.sqrt().to(x0.dtype).to(x0.device) for c in (abar, 1 - abar)
            )
        t = t.to(x0.device, torch.int64)  # a uint8 index would be a mask
        if x0.ndim:  # a 0-d index would make a view, which stays bound to inference_mode
            t = t.view(-1, *[1] * (x0.ndim - 1))
        return tuple(table[t] for table in self._forward_tables[key])

    # --------------------------------------------------------------------------- reverse process

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | None = None,
        variance_noise: Noise | None = None,
    ) -> SchedulerOutput:
        """Sample q(x_{t-k} | x_t, x_0) = N(mu~_t, beta~_t I) with the predicted x_0 (DDPM eq. 6-7).

        Args:
            model_output: the network's eps, v or x_0 (`prediction_type`) at x_t, (B, ...).
            timestep: t, an int or 0-d tensor among `self.timesteps`.
            sample: x_t, (B, ...).
            generator: draws the noise of the step. The last step adds none: its result is x_0.
            variance_noise: the noise (B, ...) to use instead, or a function that returns it. The
                function is called only if the step adds noise.

        Raises:
            ValueError: the timestep is not one of those in use, shapes do not match, tensors are
                not floats, or both a generator and noise are given.
        """
        self._check_step(model_output, sample, generator, variance_noise)
        abar_t, abar_prev = self._abar_pair(timestep)
        # alpha and beta of the jump from x_{t-k} to x_t; for k = 1 they are alpha_t and beta_t
        alpha_t = abar_t / abar_prev
        beta_t = 1 - alpha_t
        x_t = _at_least_float32(sample)
        x0 = self._pred_original_sample(model_output, abar_t, x_t)
        mean = (math.sqrt(abar_prev) * beta_t / (1 - abar_t)) * x0  # mu~_t, DDPM eq. 7
        mean.add_(x_t, alpha=math.sqrt(alpha_t) * (1 - abar_prev) / (1 - abar_t))
        if self.config["variance_type"] == "fixed_small" or abar_prev == 1:
            beta_t *= (1 - abar_prev) / (1 - abar_t)  # beta~_t, DDPM eq. 7; 0 at the last step
        return self._add_variance(mean, x0, beta_t, sample, generator, variance_noise)

    def _abar_pair(self, timestep: int | Tensor) -> tuple[float, float]:
        """Return abar at this timestep and at the next one in use (1 for the clean image)."""
        prev = self.previous_timestep(timestep)
        return self._abar[int(timestep)], self._abar[prev] if prev >= 0 else 1.0

    def _pred_original_sample(self, model_output: Tensor, abar_t: float, x_t: Tensor) -> Tensor:
        """Return the predicted x_0, clipped if clip_sample."""
        if self.prediction_type == "epsilon":  # DDPM eq. 15
            x0 = (x_t * (1 / math.sqrt(abar_t))).sub_(
                model_output, alpha=math.sqrt(1 - abar_t) / math.sqrt(abar_t)
            )
        elif self.prediction_type == "v_prediction":  # Salimans & Ho 2022, section 4
            x0 = (x_t * math.sqrt(abar_t)).sub_(model_output, alpha=math.sqrt(1 - abar_t))
        else:
            x0 = model_output.to(x_t.dtype, copy=True)
        if self.config["clip_sample"]:
            x0.clamp_(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x0

    @staticmethod
    def _check_step(model_output, sample, generator, variance_noise) -> None:
        _check_same_shape("model_output", model_output, "sample", sample)
        for name, x in (("model_output", model_output), ("sample", sample)):
            if not x.is_floating_point():
                raise ValueError(f"{name} must be floats, not {x.dtype}")
        if isinstance(variance_noise, Tensor):
            _check_same_shape("variance_noise", variance_noise, "sample", sample)
        if variance_noise is not None and generator is not None:
            raise ValueError("give one of generator and variance_noise, not both")

    @staticmethod
    def _add_variance(mean, x0, variance, sample, generator, variance_noise) -> SchedulerOutput:
        """Draw from N(mean, variance I), in the sample's dtype. Overwrites `mean`."""
        if variance > 0:
            if callable(variance_noise):
                variance_noise = variance_noise()
            elif variance_noise is None:
                device = sample.device if generator is None else generator.device
                variance_noise = torch.randn(
                    sample.shape, generator=generator, dtype=mean.dtype, device=device
                )
            mean.add_(variance_noise.to(mean.device), alpha=math.sqrt(variance))
        return SchedulerOutput(mean.to(sample.dtype), x0.to(sample.dtype))


class DDIMScheduler(DDPMScheduler):
    """DDIM (Song et al. 2021): the training of DDPM, with a reverse process for each eta in [0, 1].

    eta = 0 is deterministic. eta = 1 is DDPM ("fixed_small") over the timesteps in use. The
    variance of the noise is

        eta_convention = "variance"   sigma_t^2 = eta beta~_t        the convention of this lab
                         "std"        sigma_t   = eta sqrt(beta~_t)  DDIM eq. 16 and diffusers

    The two agree at 0 and 1. "variance" at eta equals "std" at sqrt(eta).

    Args: those of `DDPMScheduler`, and eta_convention. `variance_type` is not used.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        *,
        eta_convention: str = "variance",
        **kwargs,
    ):
        super().__init__(num_train_timesteps, beta_start, beta_end, beta_schedule, **kwargs)
        if eta_convention not in ETA_CONVENTIONS:
            raise _unknown("eta_convention", eta_convention, ETA_CONVENTIONS)
        self.config["eta_convention"] = eta_convention

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: torch.Generator | None = None,
        variance_noise: Noise | None = None,
    ) -> SchedulerOutput:
        """Return x_{t-k} from the predicted x_0 and eps (DDIM eq. 12), with the noise of eta.

        Args: those of `DDPMScheduler.step`, and
            eta: in [0, 1].
            use_clipped_model_output: derive eps from the clipped x_0, so that x_0 and eps still add
                up to x_t. Only then is eta = 1 the DDPM posterior. diffusers' default is False.

        Raises:
            ValueError: as `DDPMScheduler.step`, and if eta lies outside [0, 1].
        """
        self._check_step(model_output, sample, generator, variance_noise)
        abar_t, abar_prev = self._abar_pair(timestep)
        variance, direction = self._variance_and_direction(abar_t, abar_prev, eta)
        x_t = _at_least_float32(sample)
        x0 = self._pred_original_sample(model_output, abar_t, x_t)
        # DDIM eq. 12: x_{t-k} = sqrt(abar_{t-k}) x_0 + sqrt(1 - abar_{t-k} - sigma^2) eps + sigma z
        if use_clipped_model_output:
            mean = self._mean(x0, x_t, abar_t, abar_prev, direction)
        else:
            mean = math.sqrt(abar_prev) * x0
            mean.add_(self._pred_epsilon(model_output, abar_t, x_t), alpha=direction)
        return self._add_variance(mean, x0, variance, sample, generator, variance_noise)

    def _variance_and_direction(
        self, abar_t: float, abar_prev: float, eta: float
    ) -> tuple[float, float]:
        """Return sigma_t^2 and sqrt(1 - abar_{t-k} - sigma_t^2), the factor of eps."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {eta}")
        posterior_variance = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)  # beta~_t
        scale = eta if self.config["eta_convention"] == "variance" else eta**2
        variance = scale * posterior_variance
        return variance, math.sqrt(max(1 - abar_prev - variance, 0))

    @staticmethod
    def _mean(x0: Tensor, x_t: Tensor, abar_t: float, abar_prev: float, direction: float) -> Tensor:
        """Return sqrt(abar_{t-k}) x_0 + direction eps, with the eps that leads from x_0 to x_t.

        eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t), so this is a sum of x_0 and x_t.
        """
        k = direction / math.sqrt(1 - abar_t)
        mean = (math.sqrt(abar_prev) - k * math.sqrt(abar_t)) * x0
        return mean.add_(x_t, alpha=k)

    def _pred_epsilon(self, model_output: Tensor, abar_t: float, x_t: Tensor) -> Tensor:
        """Return the network's eps, which the clipping of x_0 does not change."""
        model_output = model_output.to(x_t.dtype)  # half precision would round each product
        if self.prediction_type == "epsilon":
            return model_output
        if self.prediction_type == "v_prediction":  # eps = sqrt(abar) v + sqrt(1 - abar) x_t
            return math.sqrt(abar_t) * model_output + math.sqrt(1 - abar_t) * x_t
        return (x_t - math.sqrt(abar_t) * model_output) / math.sqrt(1 - abar_t)


class DPMSolverMultistepScheduler(DDIMScheduler):
    """DPM-Solver++(2M): DDIM with an extrapolated x_0 (Lu et al. 2022, arXiv:2211.01095).

    DDIM treats the predicted x_0 as constant during a step. It is not: it moves while the noise
    falls. This sampler extrapolates it, along a line in lambda = log(sqrt(abar) / sqrt(1 - abar)),
    from the last two predictions D' and D to the middle of the step:

        D~ = D + (D - D') h / (2 h'),    h and h': how much lambda changes in this and the last step

    The rest is the step of DDIM from x_t, with D~ in place of x_0. eta = 0 is the solver of the
    ODE, eta = 1 that of the SDE. The error of eta = 0 falls with the square of the step's length,
    DDIM's with the length itself. The first step has no D', and in the last step h is
    infinite: both are steps of DDIM.

    It remembers D' between two steps, so one scheduler serves one sampling loop at a time.

    Args: those of `DDIMScheduler`.
    """

    _last: tuple[int, Tensor] | None = None  # the last step's timestep and its D

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        variance_noise: Noise | None = None,
    ) -> SchedulerOutput:
        """Return x_{t-k} from x_t and the predictions of this and the last step.

        Args: those of `DDIMScheduler.step`, but for use_clipped_model_output, which is always on.

        Returns:
            pred_original_sample is D, which is not extrapolated.

        Raises:
            ValueError: as `DDIMScheduler.step`.
        """
        self._check_step(model_output, sample, generator, variance_noise)
        abar_t, abar_prev = self._abar_pair(timestep)
        variance, direction = self._variance_and_direction(abar_t, abar_prev, eta)
        x_t = _at_least_float32(sample)
        D = self._pred_original_sample(model_output, abar_t, x_t)
        x0, last, self._last = D, self._last, (int(timestep), D)
        if last is not None and self._previous.get(last[0]) == int(timestep) and abar_prev < 1:
            h = _half_log_snr(abar_prev) - _half_log_snr(abar_t)
            last_h = _half_log_snr(abar_t) - _half_log_snr(self._abar[last[0]])
            x0 = D + (D - last[1]) * (h / (2 * last_h))
        mean = self._mean(x0, x_t, abar_t, abar_prev, direction)
        return self._add_variance(mean, D, variance, sample, generator, variance_noise)


SAMPLERS = {  # by the value of --sampler
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


def _half_log_snr(abar: float) -> float:
    """Return log(sqrt(abar) / sqrt(1 - abar)); -inf for pure noise."""
    return 0.5 * (math.log(abar) - math.log1p(-abar)) if abar > 0 else -math.inf


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return an int of Python or numpy as Python's, if it lies in [low, high]."""
    wanted = f"an int >= {low}" if high is None else f"an int in [{low}, {high}]"
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
    return number


def _plain(values: object) -> object:
    """Return an array of numpy as a list: torch refuses negative strides."""
    return (
        values.tolist() if hasattr(values, "tolist") and not isinstance(values, Tensor) else values
    )


def _check_same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} but {other_name} {tuple(other.shape)}: "
            "they must be the same"
        )


def _unknown(name: str, value: object, allowed: Sequence[str]) -> ValueError:
    return ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
