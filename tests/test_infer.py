"""infer.py as a user runs it, the per-image noise, and the refusal of bad checkpoints."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import checkpoint
from checkpoint import load_model
from data import to_uint8
from sampling import image_noise, make_grid, sample
from scheduler import DDIMScheduler, DDPMScheduler

# -------------------------------------------------------------------------------- per-image noise


def test_image_noise_is_standard_normal():
    """Moments and a Kolmogorov-Smirnov test on 784,000 values; the seed is fixed."""
    z = image_noise(7, torch.arange(1000), 0, (1, 28, 28)).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("what", ["seed", "image", "draw", "pixel"])
def test_image_noise_is_independent_across(what):
    """Neighbouring seeds, images, draws and pixels are uncorrelated, in value and in square."""
    images = torch.arange(2000)
    a = image_noise(3, images, 5, (1, 10, 10))
    b = {
        "seed": lambda: image_noise(4, images, 5, (1, 10, 10)),
        "image": lambda: image_noise(3, images + 1, 5, (1, 10, 10)),
        "draw": lambda: image_noise(3, images, 6, (1, 10, 10)),
        "pixel": lambda: a.flatten(1).roll(1, dims=1).view_as(a),
    }[what]()
    for f in (lambda x: x, lambda x: x**2 - 1):
        x, y = f(a).flatten().double(), f(b).flatten().double()
        assert abs(stats.pearsonr(x.numpy(), y.numpy()).statistic) < 4 / len(x) ** 0.5


def test_image_noise_depends_on_its_four_numbers_only():
    whole = image_noise(1, torch.arange(10), 2, (3, 5, 5))
    assert torch.equal(whole[4:7], image_noise(1, torch.arange(4, 7), 2, (3, 5, 5)))
    assert whole.shape == (10, 3, 5, 5)


# --------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_sample_recovers_gaussian_data(scheduler_class):
    """With the optimal denoiser of N(m, s^2), the loop returns m and s: 20,000 pixels, 5 errors."""
    m, s = 0.3, 0.5
    scheduler = scheduler_class(200, beta_schedule="cosine", clip_sample=False)
    scheduler.set_timesteps(200)

    def eps(x, t):  # E[eps | x_t] = sqrt(1 - abar) (x_t - sqrt(abar) m) / (abar s^2 + 1 - abar)
        abar = scheduler.alphas_cumprod[t].item()
        return (1 - abar) ** 0.5 * (x - abar**0.5 * m) / (abar * s**2 + 1 - abar)

    eta = {"eta": 0.5} if scheduler_class is DDIMScheduler else {}
    x = sample(eps, scheduler, torch.arange(50), (1, 20, 20), **eta)
    assert abs(x.mean() - m) < 5 * s / 20_000**0.5 + 0.003
    assert abs(x.std() - s) < 5 * s / 40_000**0.5 + 0.01  # 0.01: 200 steps are not infinitely many


def test_make_grid_puts_every_image_in_its_place():
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 3, 4)
    grid = make_grid(images, nrow=2, pad=1)
    assert grid.shape == (1, 3 * 4 + 1, 2 * 5 + 1)
    for i in range(5):
        row, column = divmod(i, 2)
        cell = grid[0, row * 4 + 1 : row * 4 + 4, column * 5 + 1 : column * 5 + 5]
        assert (cell == i + 1).all()
    assert grid.sum() == images.sum()


# ------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("sampler", [("--eta", 0), ("--eta", 0.7), ("--sampler", "ddpm")])
def test_images_do_not_depend_on_the_batch_size(run, tiny_checkpoint, tmp_path, sampler):
    arrays = []
    for batch_size in (1, 4, 11, 64):
        out = tmp_path / f"b{batch_size}.png"
        arguments = ("--ckpt", tiny_checkpoint, "--n", 12, "--steps", 8, "--save-npy", *sampler)
        done = run("infer.py", *arguments, "--batch-size", batch_size, "--out", out)
        assert done.returncode == 0, done.stderr
        arrays.append(np.load(out.with_suffix(".npy")))
    assert arrays[0].shape == (12, 28, 28)
    assert arrays[0].dtype == np.uint8
    assert arrays[0].std() > 1
    assert len(np.unique(arrays[0].reshape(12, -1), axis=0)) == 12
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_settings_reach_the_sampler(run_here, tiny_checkpoint, tmp_path, sampler, spacing):
    """The script's images are those of the same settings in the library."""
    eta = ("--eta", 0.5) if sampler == "ddim" else ()
    arguments = ("--ckpt", tiny_checkpoint, "--n", 3, "--steps", 7, "--seed", 5, "--save-npy", *eta)
    arguments += ("--sampler", sampler, "--spacing", spacing, "--out", "x.png")
    assert run_here("infer.py", *arguments).returncode in (0, None)
    model, contents = load_model(tiny_checkpoint)
    config = contents["scheduler"] | {"timestep_spacing": spacing}
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler](**config)
    scheduler.set_timesteps(7)
    x = sample(model, scheduler, torch.arange(3), (1, 28, 28), seed=5, eta=0.5)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), to_uint8(x).squeeze(1).numpy())


def test_images_do_not_depend_on_the_number_of_processes(run, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--n", 7, "--steps", 5, "--eta", 1, "--save-npy")
    for processes in (1, 2):
        out = tmp_path / f"p{processes}.png"
        done = run("infer.py", *arguments, "--out", out, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("grid  ") == 1
    one, two = (np.load(tmp_path / f"p{n}.npy") for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_every_output_is_there_and_of_the_same_images(run, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--n", 5, "--steps", 6, "--nrow", 5)
    done = run("infer.py", *arguments, "--save-npy", "--save-png", "files", "--gif", "--seed", 9)
    assert done.returncode == 0, done.stderr
    stem = tmp_path / "samples" / "tiny-ddim6-eta1-seed9"
    array = np.load(f"{stem}.npy")
    files = sorted((tmp_path / "files").iterdir())
    assert len(files) == 5
    for path, image in zip(files, array, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(path)), image)
    grid = np.array(Image.open(f"{stem}.png"))[::2, ::2]  # every pixel is shown as 2 x 2
    np.testing.assert_array_equal(grid[2:30, 2:30], array[0])
    film = Image.open(f"{stem}.gif")
    assert film.n_frames >= 6
    assert sorted(p.name for p in stem.parent.iterdir()) == [
        f"{stem.name}.{suffix}" for suffix in ("gif", "npy", "png")
    ]


def test_save_png_does_not_mix_two_runs(run_here, refused, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--steps", 2, "--save-png", "files", "--out", "x.png")
    for n in (3, 3, 4):  # again, and more: every file is replaced
        assert run_here("infer.py", *arguments, "--n", n).returncode in (0, None)
    refused(run_here("infer.py", *arguments, "--n", 2), "files", "would not replace")
    assert len(list((tmp_path / "files").iterdir())) == 4


def test_the_bar_counts_whole_images(run, tiny_checkpoint):
    arguments = ("--n", 7, "--batch-size", 4, "--steps", 3, "--out", "x.png")
    done = run("infer.py", "--ckpt", tiny_checkpoint, *arguments)
    assert "| 7/7 [" in done.stderr and "Warning" not in done.stderr


def test_the_checkpoint_says_what_the_network_predicts(tiny_checkpoint):
    _, contents = checkpoint.load_model(tiny_checkpoint)
    assert contents["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--ckpt"]),
        (["--ckpt", "missing.pt"], ["missing.pt", "No such file"]),
        (["--ckpt", "."], ["cannot read"]),
        (["--ckpt", "TINY", "--steps", "0"], ["--steps", "0"]),
        (["--ckpt", "TINY", "--steps", "101"], ["--steps 101", "[1, 100]"]),
        (["--ckpt", "TINY", "--eta", "1.5"], ["--eta", "1.5"]),
        (["--ckpt", "TINY", "--eta", "nan"], ["--eta", "nan"]),
        (["--ckpt", "TINY", "--n", "-3"], ["--n", "-3"]),
        (["--ckpt", "TINY", "--n", "many"], ["--n", "many"]),
        (["--ckpt", "TINY", "--batch-size", "0"], ["--batch-size"]),
        (["--ckpt", "TINY", "--spacing", "even"], ["--spacing", "even", "trailing"]),
        (["--ckpt", "TINY", "--sampler", "ddpm", "--eta", "0"], ["--eta", "ddim"]),
        (["--ckpt", "TINY", "--out", "a.jpg"], ["--out", ".png"]),
        (["--ckpt", "TINY", "--out", "/dev/null/a.png"], ["/dev/null"]),
        (["--ckpt", "TINY", "--n", "9" * 15], ["no room", "9" * 15]),
        (["--ckpt", "TINY", "--device", "abacus"], ["--device", "abacus"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(run_here, refused, tiny_checkpoint, arguments, words):
    arguments = [str(tiny_checkpoint) if a == "TINY" else a for a in arguments]
    refused(run_here("infer.py", *arguments), *words)


def test_help_does_not_import_torch(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run("infer.py", "--help")
    assert done.returncode == 0
    assert "--eta" in done.stdout


# -------------------------------------------------------------------- checkpoints of ill will


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def hostile(tmp_path, good):
    """File contents by kind, each of which must be refused."""
    target = tmp_path / "boom"
    whole = good.read_bytes()
    contents = torch.load(good, weights_only=True)

    def saved(thing):
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        return buffer.getvalue()

    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(target)))
        archive.writestr("archive/version", "3\n")
    flipped = bytearray(whole)
    flipped[40:4000] = bytes(3960)
    nan = {k: torch.full_like(v, float("nan")) for k, v in contents["weights"].items()}
    return target, {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "random bytes": np.random.default_rng(0).bytes(5000),
        "overwritten": bytes(flipped),
        "pickle bomb": pickle.dumps(Bomb(target)),
        "zipped bomb": zipped.getvalue(),
        "saved bomb": saved(Bomb(target)),
        "not a dictionary": saved([1, 2]),
        "another format": saved({"weights": {}}),
        "no weights": saved({k: v for k, v in contents.items() if k != "weights"}),
        "weights that do not fit": saved(contents | {"unet": contents["unet"] | {"channels": 64}}),
        "a huge network": saved(contents | {"unet": contents["unet"] | {"channels": 10**6}}),
        "NaN weights": saved(contents | {"weights": nan}),
        "no such schedule": saved(contents | {"scheduler": {"beta_schedule": "odd"}}),
        "no image": saved(contents | {"image_shape": (1, 0, 0)}),
    }


def test_hostile_checkpoints_are_refused_without_running_them(tiny_checkpoint, tmp_path):
    from cli import UserError

    target, kinds = hostile(tmp_path, tiny_checkpoint)
    path = tmp_path / "hostile.pt"
    for kind, content in kinds.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"hostile\.pt") as caught:
            checkpoint.load_model(path)
        assert "\n" not in str(caught.value), kind
    assert not target.exists()
    pickle.loads(kinds["pickle bomb"]).close()  # the bomb does go off where it is let
    assert target.exists()


@pytest.mark.parametrize("kind", ["truncated", "random bytes", "saved bomb"])
def test_the_script_refuses_them_in_one_line(run, refused, tiny_checkpoint, tmp_path, kind):
    _, kinds = hostile(tmp_path, tiny_checkpoint)
    (tmp_path / "bad.pt").write_bytes(kinds[kind])
    refused(run("infer.py", "--ckpt", "bad.pt"), "bad.pt")


def test_the_shipped_checkpoints_load(run):
    from conftest import ROOT

    for name, prediction_type in (("v", "v_prediction"), ("eps", "epsilon")):
        path = ROOT / "checkpoints" / f"mnist-{name}.pt"
        _, contents = checkpoint.load_model(path)
        assert contents["scheduler"]["prediction_type"] == prediction_type
        assert path.stat().st_size <= 6e6
