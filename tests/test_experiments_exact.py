"""The exact denoiser, its mixtures with a network, and the two experiments that use them."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product

from lab.data import to_model_range, to_uint8
from lab.distributed import Process

import pytest
import torch
from helpers import copy_lab_with_edit
from tqdm import tqdm

import metrics
from experiments import denoiser, exact, grid, ranges
from experiments.common import MANY_SEEDS, Settings, Study
from experiments.denoiser import ExactDenoiser, exact_subject, mixed_subject, mixture
from experiments.estimates import Results
from experiments.grid import SHAPE, Cell, Subject
from experiments.keys import code_key, images_of
from scheduler import PREDICTION_TYPES, DDIMScheduler

ALONE = Process(torch.device("cpu"))


def pixels(n, *shape, seed=0):
    """Return n random images (1, *shape), half of their pixels black."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-255, 256, (n, 1, *shape), generator=generator)
    return images.clamp(min=0).to(torch.uint8)


def scheduler_of(prediction_type="sample", **changes):
    config = {"beta_schedule": "cosine", "prediction_type": prediction_type} | changes
    return DDIMScheduler(**config)


def subject_of(label="net", prediction_type="v_prediction", model=None, **changes):
    config = {"beta_schedule": "cosine", "prediction_type": prediction_type} | changes
    model = model or (lambda x, t: 0.1 * x)
    return Subject(label, f"{label}.pt", label.ljust(64, "0"), model, {"scheduler": config})


# --------------------------------------------------------------------------------- the denoiser


def posterior_mean(x_t, data, abar):
    """Return E[x_0 | x_t] in float64, one image at a time, by Bayes' rule."""
    means = []
    for x, a in zip(x_t.double(), abar, strict=True):
        likelihood = torch.distributions.Normal(a.sqrt() * data, (1 - a).sqrt())
        log_p = likelihood.log_prob(x).flatten(1).sum(1)
        p = (log_p - log_p.max()).exp()
        means.append((p.view(-1, 1, 1, 1) * data).sum(0) / p.sum())
    return torch.stack(means)


@pytest.mark.parametrize("bound", [1.0, 1.25])
@pytest.mark.parametrize("by_convolution", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_it_is_the_posterior_mean_of_bayes(prediction_type, by_convolution, bound):
    """At every noise level, among them some where several images have weight."""
    images = pixels(7, 4, 6)
    scheduler = scheduler_of(prediction_type, clip_sample_range=bound)
    t = torch.tensor([0, 20, 200, 400, 500, 600, 700, 800, 850, 900, 950, 990, 998, 999])
    data = to_model_range(images, bound, torch.float64)
    noise = torch.randn(len(t), 1, 4, 6, generator=torch.Generator().manual_seed(1))
    x_t = scheduler.add_noise(data[torch.arange(len(t)) % 7].float(), noise, t)
    abar = scheduler.alphas_cumprod[t]
    x0 = posterior_mean(x_t, data, abar)
    nearest = (x0[:, None] - data).flatten(2).norm(dim=2).amin(1)
    assert (nearest > 0.1).sum() >= 4  # these are a mean of several images

    abar = abar.view(-1, 1, 1, 1)
    eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    wanted = {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction_type].float()
    model = ExactDenoiser(images, scheduler)
    assert model.by_convolution
    model.by_convolution = by_convolution
    torch.testing.assert_close(model(x_t, t), wanted, rtol=1e-4, atol=1e-4)
    for i in range(len(t)):  # one t for all images, as in sampling
        torch.testing.assert_close(model(x_t, t[i : i + 1])[i], wanted[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [300, 800, 950])
def test_two_images_have_a_closed_form(t):
    """x_0 is the middle + tanh(z) half the difference; z grows along the line that joins them."""
    images = pixels(2, 5, 5)
    scheduler = scheduler_of()
    a, b = to_model_range(images, 1.0, torch.float64)
    middle, half = (a + b) / 2, (a - b) / 2
    abar = scheduler.alphas_cumprod[t]
    places = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    x_t = abar.sqrt() * (middle + places * half)
    z = abar / (1 - abar) * half.square().sum() * places
    wanted = middle + torch.tanh(z) * half
    out = ExactDenoiser(images, scheduler)(x_t.float(), torch.tensor([t]))
    torch.testing.assert_close(out, wanted.float(), rtol=1e-4, atol=1e-5)


def test_at_low_noise_it_is_the_nearest_image():
    images = pixels(50, 28, 28)
    scheduler = scheduler_of(clip_sample_range=1.25)
    data = to_model_range(images, 1.25)
    x_t = 2 * torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    nearest = (x_t[:, None] - data).flatten(2).norm(dim=2).argmin(1)
    assert len(set(nearest.tolist())) > 5
    out = ExactDenoiser(images, scheduler)(x_t, torch.tensor([0]))
    torch.testing.assert_close(out, data[nearest], rtol=0, atol=1e-6)


def test_in_pure_noise_it_is_the_mean_of_all_images():
    images = pixels(9, 4, 4)
    scheduler = scheduler_of("v_prediction", rescale_betas_zero_snr=True)
    x_t = torch.randn(3, 1, 4, 4)
    v = ExactDenoiser(images, scheduler)(x_t, torch.tensor([999]))
    mean = to_model_range(images).mean(0)
    torch.testing.assert_close(v, -mean.expand_as(v), rtol=0, atol=1e-6)


def test_no_weight_is_below_the_smallest_normal_number(monkeypatch):
    """An Intel CPU multiplies by such numbers a hundred times slower."""
    seen = []
    monkeypatch.setattr(
        ExactDenoiser,
        "_weighted_sum",
        lambda self, w: seen.append(w) or torch.zeros(len(w), *SHAPE),
    )
    model = ExactDenoiser(pixels(500, 28, 28), scheduler_of())
    x_t = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    for t in range(300, 700, 20):
        model(x_t, torch.tensor([t]))
    weights = torch.cat(seen)
    assert ((weights > 0) & (weights < 1e-10)).any()  # small ones are there
    assert not ((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).any()


def test_neither_bfloat16_nor_the_size_of_the_batch_matters(monkeypatch):
    images, x_t = pixels(7, 4, 6), torch.randn(5, 1, 4, 6)
    model, t = ExactDenoiser(images, scheduler_of()), torch.tensor([900, 800, 700, 600, 500])
    whole = model(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x_t, t), whole)
    monkeypatch.setattr(denoiser, "BATCH", 2)
    torch.testing.assert_close(model(x_t, t), whole)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_its_samples_are_training_images(eta):
    images = pixels(20, 28, 28)
    subject = exact_subject(images, subject_of(clip_sample_range=1.25))
    cell = Cell("exact", subject.sha256, "ddim", 50, eta, 40, 0)
    samples, _ = grid.sample_cell(cell, subject, ALONE, 100)
    wanted = to_uint8(to_model_range(images, 1.25))  # 252 and more are white
    difference = (samples[:, None].int() - wanted.int()).abs().flatten(2).amax(2)
    assert (difference.amin(1) <= 1).all()
    assert len(set(difference.argmin(1).tolist())) > 10


def test_it_and_its_mixtures_get_larger_batches_than_a_network(monkeypatch, tmp_path):
    """A call of few images reads as many training images as one of BATCH."""
    network, sizes = subject_of(), {}
    alone = exact_subject(pixels(3, 28, 28), network)
    subjects = [network, alone, mixed_subject(network, alone, -1, 1)]

    def record(cell, subject, process, batch_size, progress=None):
        sizes.setdefault(cell.model, set()).add(batch_size)
        return torch.zeros(cell.n, *SHAPE, dtype=torch.uint8), 1.0

    monkeypatch.setattr(grid, "sample_cell", record)
    monkeypatch.setattr(grid, "keep", lambda *_: None)
    cells = [Cell(s.label, s.sha256, "ddim", 2, 0.0, 1000, 0) for s in subjects]
    for batch_size in (50, 300):
        bar = tqdm(disable=True)
        grid.run_cells(cells, subjects, ALONE, tmp_path, batch_size, "data", bar)
    assert [*sizes.values()] == [{50, 300}, {denoiser.BATCH, 300}, {denoiser.BATCH, 300}]


# --------------------------------------------------------------------------------- mixtures


def inside(x, t):
    return torch.ones_like(x)


def outside(x, t):
    return torch.zeros_like(x)


def test_a_mixture_uses_the_right_model_at_every_timestep():
    scheduler, x = scheduler_of(num_train_timesteps=200), torch.zeros(2, *SHAPE)
    model = mixture(inside, outside, scheduler, -1.0, 1.0)
    assert 1 < sum(model(x, torch.tensor([t])).mean().item() for t in range(200)) < 199
    for t, abar in enumerate(scheduler.alphas_cumprod.tolist()):
        wanted = float(-1 < math.log(abar / (1 - abar)) <= 1)
        assert (model(x, torch.tensor([t])) == wanted).all()
    both = torch.tensor([0, 100])  # each image has its own t
    assert model(x, both).amax((1, 2, 3)).tolist() == [0, 1]


def test_a_range_has_its_upper_end_but_not_its_lower():
    scheduler, x = scheduler_of(num_train_timesteps=10), torch.zeros(1, *SHAPE)
    log_snr = torch.logit(scheduler.alphas_cumprod).tolist()
    model = mixture(inside, outside, scheduler, log_snr[6], log_snr[3])
    shown = [model(x, torch.tensor([t])).mean().item() for t in range(10)]
    assert shown == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_step_lies_in_one_range(zero_snr):
    subject = subject_of(rescale_betas_zero_snr=zero_snr)
    counts = ranges.steps_per_range(subject, 20)
    assert sum(counts) == 20 and min(counts) > 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_mixture_of_a_network_and_the_exact_denoiser_predicts_the_same_kind(prediction_type):
    """The network predicts white, whatever its type. Where the range ends, it takes over."""
    white = scheduler_of(prediction_type)

    def network(x_t, t):
        a = white.alphas_cumprod[t].sqrt().float().view(-1, 1, 1, 1)
        s = (1 - a**2).sqrt()
        eps = (x_t - a) / s
        return eps if prediction_type == "epsilon" else a * eps - s

    subject = subject_of("net", prediction_type, network)
    images = pixels(5, 28, 28)
    exact_one = exact_subject(images, subject)

    def sampled(subject):
        cell = Cell(subject.label, subject.sha256, "ddim", 20, 0.0, 8, 0)
        return grid.sample_cell(cell, subject, ALONE, 100)[0]

    late = sampled(mixed_subject(subject, exact_one, 1.0, math.inf))
    assert ((late[:, None].int() - images.int()).abs().flatten(2).amax(2).amin(1) <= 1).all()
    assert (sampled(mixed_subject(subject, exact_one, -math.inf, 1.0)) >= 254).all()
    assert (sampled(mixed_subject(exact_one, subject, 1.0, math.inf)) >= 254).all()


# ---------------------------------------------------------------------------------- kept cells


def test_the_sha256_is_of_all_that_decides_the_model():
    images, subject = pixels(5, 28, 28), subject_of()
    model = exact_subject(images, subject)
    others = [
        exact_subject(255 - images, subject),
        exact_subject(images, subject_of(clip_sample_range=1.25)),
        exact_subject(images, subject_of(beta_schedule="linear")),
        mixed_subject(subject, model, -1, 1),
        mixed_subject(model, subject, -1, 1),
        mixed_subject(subject, model, -1, 3),
        mixed_subject(replace(subject, sha256="1" * 64), model, -1, 1),
        subject,
    ]
    assert len({s.sha256 for s in [model, *others]}) == len(others) + 1
    assert len({s.label for s in [model, *others[3:6]]}) == 4
    same = [exact_subject(images, subject_of("other", p)) for p in PREDICTION_TYPES]
    assert {s.sha256 for s in same} == {model.sha256}
    assert {s.label for s in same} == {"exact"}


EXACT_MODEL = exact_subject(pixels(2, 28, 28), subject_of())
CODE = {
    "network": subject_of().code,
    "exact": EXACT_MODEL.code,
    "mixture": mixed_subject(subject_of(), EXACT_MODEL, -1, 1).code,
}


def test_cells_of_networks_keep_their_key():
    start = "experiments.grid:sample_cell", "unet:UNet", "scheduler:SAMPLERS[ddim]"
    assert images_of("ddim", CODE["network"]) == images_of("ddim") == start


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("experiments/denoiser.py", ".softmax(1)", ".sigmoid()", {"exact", "mixture"}),
        ("experiments/denoiser.py", "square() / 2", "square()", {"exact", "mixture"}),
        ("experiments/denoiser.py", "low < log_snr", "low <= log_snr", {"mixture"}),
        ("experiments/grid.py", 'EXACT = "exact"', 'EXACT = "x"', set()),
        ("experiments/denoiser.py", "The best prediction of x_0 for", "For", set()),
        ("experiments/ranges.py", "STEPS = 10", "STEPS = 11", set()),
        ("lab/data.py", "div_(127.5)", "div_(128)", {"exact", "mixture"}),
        ("lab/noise.py", "2 * math.pi", "math.pi", {"exact", "mixture", "network"}),
        ("unet.py", "return F.pixel_shuffle", "return 2 * F.pixel_shuffle", {"network", "mixture"}),
    ],
)
def test_edits_that_change_the_keys_of_images(tmp_path, file, old, new, changed):
    copy_lab_with_edit(tmp_path, file, old, new)
    starts = {model: images_of("ddim", code) for model, code in CODE.items()}
    differ = {m for m, start in starts.items() if code_key(start) != code_key(start, tmp_path)}
    assert differ == changed


def test_kept_cells_are_those_of_the_code_of_their_model(tmp_path, monkeypatch):
    """A change of the denoiser's code makes its cells again, and no cell of a network."""
    subjects = [subject_of(), EXACT_MODEL]
    cells = grid.make_cells(subjects, [2], [0.0], lambda _: 10)
    scored = {"n": 10, "metrics_key": "now"}
    monkeypatch.setattr(grid, "score", lambda *args: scored)
    monkeypatch.setattr(grid, "metrics_key", lambda: "now")
    grid.run_cells(cells, subjects, ALONE, tmp_path, 100, "data", tqdm(disable=True))

    def kept():
        return [grid.is_kept(tmp_path, c, s, ALONE) for c, s in zip(cells, subjects, strict=True)]

    assert kept() == [True, True]
    key = grid.images_key
    changed = {EXACT_MODEL.code: "another"}
    monkeypatch.setattr(grid, "images_key", lambda *args: changed.get(args[2]) or key(*args))
    assert kept() == [True, False]


# ------------------------------------------------------------------------------ the experiments

SETTINGS = Settings((1, 5, 20, 50, 500), (4,), (0.0, 0.5, 1.0), 100, 100, 2, 0, 100, "data", None)


class FakeStudy(Study):
    """A study whose rows are made up: no error of the exact denoiser but 1000 / steps."""

    def measure(self, cells, subjects):
        assert {cell.model for cell in cells} <= {subject.label for subject in subjects}
        self.rows |= dict.fromkeys(cells)
        rows = [vars(cell) | {"prediction": "v"} for cell in cells]
        for row in rows:
            row["prediction"] = "ε" if row["model"] == "eps" else "v"
            row |= {"frechet": 1000 / row["steps"] + 9 * row["eta"], "frechet_se": 0.5}
            row |= {"novelty": 0.0, "novelty_se": 0.0, "copies": 1.0, "copies_se": 0.0}
            if row["model"] != "exact":
                row["frechet"] += len(row["model"])
                row |= {"novelty": 1.0, "copies": 0.05, "copies_se": 0.01}
        return Results(rows if self.process.is_first else [])

    def features_of(self, cell):
        """Stand in for features: what `fake_change` needs to know of them."""
        return cell

    def reference(self, n):
        assert n == 100
        return {"frechet": 2.5}


def fake_change(before, after, data_dir):
    """A change of the distance that depends on the models, and by 1 on the seed."""
    assert (before.steps, before.eta, before.seed) == (after.steps, after.eta, after.seed)
    return len(after.model) - len(before.model) + after.eta + after.seed, 0.3


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "frechet_change_of", fake_change)
    images = pixels(3, 28, 28), torch.zeros(3, dtype=torch.int64)
    for module in (exact, ranges):
        monkeypatch.setattr(module, "load_dataset", lambda *_: images)
    subjects = [subject_of("net"), subject_of("eps", "epsilon")]
    return FakeStudy(replace(SETTINGS, out=tmp_path), ALONE, subjects, "python study.py")


def test_exact_asks_for_its_cells_and_the_grid(study):
    exact.run(study)
    mine = [cell for cell in study.rows if cell.model == "exact"]
    assert {(c.steps, c.eta) for c in mine} == {(s, e) for s in (1, 5, 20, 50) for e in (0, 0.5, 1)}
    assert len(mine) == 3 * (1 + 1 + 2 + 2)
    assert set(study.rows) - set(mine) == set(study.grid_cells)


def test_exact_has_a_row_per_model_and_eta(study):
    tables = exact.run(study)
    assert set(tables) == set(exact.TABLES)
    assert tables["exact"].splitlines() == [
        "| steps | 1 | 5 | 20 | 50 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| *n × seeds* | *100 × 1* | *100 × 1* | *100 × 2* | *100 × 2* |",
        "| exact, η = 0 | 1000.0 ± 1.4 | 200.0 ± 1.4 | 50.0 ± 1.2 | 20.0 ± 1.2 |",
        "| exact, η = 0.5 | 1004.5 ± 1.4 | 204.5 ± 1.4 | 54.5 ± 1.2 | 24.5 ± 1.2 |",
        "| exact, η = 1 | 1009.0 ± 1.4 | 209.0 ± 1.4 | 59.0 ± 1.2 | 29.0 ± 1.2 |",
        "| v, η = 0 | 1003.0 ± 1.4 | 203.0 ± 1.4 | 53.0 ± 1.2 | 23.0 ± 1.2 |",
        "| v, η = 0.5 | 1007.5 ± 1.4 | 207.5 ± 1.4 | 57.5 ± 1.2 | 27.5 ± 1.2 |",
        "| v, η = 1 | 1012.0 ± 1.4 | 212.0 ± 1.4 | 62.0 ± 1.2 | 32.0 ± 1.2 |",
        "| ε, η = 0 | 1003.0 ± 1.4 | 203.0 ± 1.4 | 53.0 ± 1.2 | 23.0 ± 1.2 |",
        "| ε, η = 0.5 | 1007.5 ± 1.4 | 207.5 ± 1.4 | 57.5 ± 1.2 | 27.5 ± 1.2 |",
        "| ε, η = 1 | 1012.0 ± 1.4 | 212.0 ± 1.4 | 62.0 ± 1.2 | 32.0 ± 1.2 |",
    ]
    assert tables["exact-leads"].splitlines() == [
        "| lead of η = 1 over η = 0 | 20 steps | 50 steps |",
        "| --- | ---: | ---: |",
        "| *n × seeds* | *100 × 2* | *100 × 2* |",
        "| exact | −9.0 ± 0.5 | −9.0 ± 0.5 |",
        "| v | −9.0 ± 0.5 | −9.0 ± 0.5 |",
        "| ε | −9.0 ± 0.5 | −9.0 ± 0.5 |",
        "| z, v against exact | +0.0 | +0.0 |",
        "| z, ε against exact | +0.0 | +0.0 |",
    ]
    lines = tables["exact-copies"].splitlines()
    assert lines[0] == "| 50 steps | novelty | copies |"
    assert lines[2] == "| exact, η = 0 | 0.00 ± 0.00 | 100.0% ± 0.0% |"
    assert lines[-1] == "| ε, η = 1 | 1.00 ± 0.00 | 5.0% ± 0.7% |"
    assert (study.out / "exact.png").stat().st_size > 5000


def test_leads_have_many_seeds_where_steps_are_few(study):
    study.settings = replace(study.settings, seeds=3, etas=(0.0, 1.0))
    exact.run(study)
    for steps, seeds in ((5, 1), (20, MANY_SEEDS), (50, 3)):
        cells = [cell for cell in study.rows if cell.steps == steps]
        assert {(c.model, c.eta) for c in cells} == set(product(("exact", "net", "eps"), (0, 1)))
        assert len(cells) == 3 * 2 * seeds


def test_a_lead_is_a_difference_with_the_error_of_both():
    """Network: 9 - 5 = 4 with error sqrt(0.3^2 + 0.4^2). Exact: 3 - 2 = 1 with error 0.5."""
    frechet = {("net", 0.0): 9, ("net", 1.0): 5, ("exact", 0.0): 3, ("exact", 1.0): 2}
    rows = [
        {"model": model, "sampler": "ddim", "prediction": "v", "steps": 20, "eta": eta, "n": 100}
        | {"frechet": float(value), "frechet_se": 0.4 if eta else 0.3}
        for (model, eta), value in frechet.items()
    ]
    lines = exact.leads_table(Results(rows), [20]).splitlines()
    assert lines[3:] == [
        "| exact | 1.0 ± 0.5 |",
        "| v | 4.0 ± 0.5 |",
        f"| z, v against exact | {3 / 0.5**0.5:+.1f} |",
    ]


def test_exact_without_few_steps_has_no_table(study):
    study.settings = replace(study.settings, steps=(500,))
    assert exact.run(study) == {}
    assert {cell.model for cell in study.rows} == {"net", "eps"}


def test_ranges_has_both_directions_and_everywhere(study):
    blocks = ranges.run(study)["ranges"].split("\n\n")
    assert [block for block in blocks if block.startswith("**")] == [
        "**v-prediction (net)**",
        "**ε-prediction (eps)**",
    ]
    lines = blocks[1].splitlines()
    names = ["(−∞, −3]", "(−3, −1]", "(−1, 1]", "(1, ∞)", "everywhere"]
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
    assert [row[0] for row in table] == names
    assert sum(int(row[1]) for row in table[:-1]) == int(table[-1][1]) == 10
    assert lines[0].endswith(
        "| exact here, network elsewhere, η = 0 | exact here, network elsewhere, η = 1 "
        "| network here, exact elsewhere, η = 0 | network here, exact elsewhere, η = 1 |"
    )
    assert table[-1][2:] == ["100.0 ± 0.4", "109.0 ± 0.4", "103.0 ± 0.4", "112.0 ± 0.4"]
    first = 100 + len("net, exact at log-SNR -inf to -3")
    assert table[0][2] == f"{first:.1f} ± 0.4"


ROLES = (("net", "exact"), ("exact", "net"))  # the model that is changed, and the other one


def test_changes_are_between_cells_of_the_same_noise(study):
    """The first two columns change the network, the others the exact denoiser."""
    lines = ranges.run(study)["ranges-changes"].split("\n\n")[1].splitlines()
    first = [cell.strip() for cell in lines[2].strip("| ").split(" | ")]
    grown = [len(denoiser.mixed_label(a, b, -math.inf, -3)) - len(a) for a, b in ROLES]
    # seeds 0 and 1 differ by 1: a standard deviation of 0.7, over sqrt(2)
    assert first[2:] == [f"+{n + eta + 0.5:.1f} ± 0.5" for n in grown for eta in (0, 1)]
    everywhere = [cell.strip() for cell in lines[-1].strip("| ").split(" | ")]
    assert everywhere[2:] == ["+2.5 ± 0.5", "+3.5 ± 0.5", "−1.5 ± 0.5", "−0.5 ± 0.5"]


def test_ranges_asks_for_its_cells(study):
    ranges.run(study)
    cells = list(study.rows)
    assert {(c.steps, c.n) for c in cells} == {(10, 100)} and {c.eta for c in cells} == {0.0, 1.0}
    mixed = [c for c in cells if " at log-SNR " in c.model]
    assert len(mixed) == len({c.name for c in mixed}) == 2 * 2 * 4 * 2 * 2
    assert {c.seed for c in mixed} == {0, 1}
    # exact, net and eps with both seeds: exact is the same for both networks
    assert len(cells) - len(mixed) == 3 * 2 * 2


def test_another_process_shares_the_work_and_writes_nothing(study):
    study.process = Process(torch.device("cpu"), world=2, rank=1)
    assert exact.run(study) == ranges.run(study) == {}
    mine = Counter(c.steps == 10 for c in study.rows if c.model == "exact")
    assert mine == {False: 3 * (1 + 1 + 2 + 2), True: 2 * 2}  # of exact.py, and of ranges.py
    assert not list(study.out.iterdir())


@pytest.mark.slow
def test_its_samples_of_mnist_are_copies(train_split, data_dir):
    subject = exact_subject(train_split[0], subject_of())
    cell = Cell("exact", subject.sha256, "ddim", 20, 0.0, 100, 0)
    images, _ = grid.sample_cell(cell, subject, ALONE, 100)
    score = metrics.score(images, data_dir=data_dir)
    assert score["novelty"] < 0.1 and score["copies"] > 0.95
