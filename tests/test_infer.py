"""infer.py as a user runs it: its images, its files, refusals."""

from lab.checkpoint import load_model
from lab.data import to_uint8

import numpy as np
import pytest
import torch
from helpers import assert_refused
from PIL import Image

from diffusion import sample
from scheduler import SAMPLERS


@pytest.mark.parametrize("sampler", [("--eta", 0), ("--eta", 0.7), ("--sampler", "ddpm")])
def test_images_do_not_depend_on_the_batch_size(run_here, tiny_checkpoint, tmp_path, sampler):
    arrays = []
    for batch_size in (1, 4, 11, 64):
        out = tmp_path / f"b{batch_size}.png"
        arguments = ("--ckpt", tiny_checkpoint, "--n", 12, "--steps", 8, "--save-npy", *sampler)
        done = run_here("infer.py", *arguments, "--batch-size", batch_size, "--out", out)
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
    assert run_here("infer.py", *arguments).returncode == 0
    model, contents = load_model(tiny_checkpoint)
    config = contents["scheduler"] | {"timestep_spacing": spacing}
    scheduler = SAMPLERS[sampler](**config)
    scheduler.set_timesteps(7)
    step_arguments = {"eta": 0.5} if sampler == "ddim" else {}
    x = sample(model, scheduler, torch.arange(3), (1, 28, 28), seed=5, **step_arguments)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), to_uint8(x).squeeze(1).numpy())


@pytest.mark.slow
def test_images_do_not_depend_on_the_number_of_processes(run, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--n", 7, "--steps", 5, "--eta", 1, "--save-npy")
    for processes in (1, 2):
        out = tmp_path / f"p{processes}.png"
        done = run("infer.py", *arguments, "--out", out, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("grid  ") == 1
    one, two = (np.load(tmp_path / f"p{n}.npy") for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_every_output_is_there_and_of_the_same_images(run_here, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--n", 5, "--steps", 6, "--nrow", 5, "--seed", 9)
    done = run_here(
        "infer.py", *arguments, "--save-npy", "--save-png", "files", "--gif", "--seed", 9
    )
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


def test_save_png_does_not_mix_two_runs(run_here, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--steps", 2, "--save-png", "files", "--out", "x.png")
    for n in (3, 3, 4):  # again, and more: every file is replaced
        assert run_here("infer.py", *arguments, "--n", n).returncode == 0
    assert_refused(run_here("infer.py", *arguments, "--n", 2), "files", "would not replace")
    assert len(list((tmp_path / "files").iterdir())) == 4


def test_the_bar_counts_whole_images(run_here, tiny_checkpoint):
    arguments = ("--n", 7, "--batch-size", 4, "--steps", 3, "--out", "x.png")
    done = run_here("infer.py", "--ckpt", tiny_checkpoint, *arguments)
    assert "| 7/7 [" in done.stderr and "Warning" not in done.stderr


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
def test_refusals(run_here, tiny_checkpoint, arguments, words):
    arguments = [str(tiny_checkpoint) if a == "TINY" else a for a in arguments]
    assert_refused(run_here("infer.py", *arguments), *words)


def test_help_does_not_import_torch(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run("infer.py", "--help")
    assert done.returncode == 0
    assert "--eta" in done.stdout
