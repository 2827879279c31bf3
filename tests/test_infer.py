"""infer.py as a user runs it: its images, its files, refusals."""

import shutil
import subprocess
import sys
from pathlib import Path

from lab.checkpoint import load_model
from lab.data import to_uint8
from lab.errors import UserError

import numpy as np
import pytest
import torch
from helpers import assert_refused, command
from PIL import Image

import infer
from diffusion import sample
from scheduler import SAMPLERS


@pytest.mark.parametrize(
    "sampler", [("--eta", 0), ("--eta", 0.7, "--sampler", "dpm++"), ("--sampler", "ddpm")]
)
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
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_settings_reach_the_sampler(run_here, tiny_checkpoint, tmp_path, sampler, spacing):
    """The script's images are those of the same settings in the library."""
    eta = () if sampler == "ddpm" else ("--eta", 0.5)
    arguments = ("--ckpt", tiny_checkpoint, "--n", 3, "--steps", 7, "--seed", 5, "--save-npy", *eta)
    arguments += ("--sampler", sampler, "--spacing", spacing, "--out", "x.png")
    assert run_here("infer.py", *arguments).returncode == 0
    model, contents = load_model(tiny_checkpoint)
    config = contents["scheduler"] | {"timestep_spacing": spacing}
    scheduler = SAMPLERS[sampler](**config)
    scheduler.set_timesteps(7)
    step_arguments = {} if sampler == "ddpm" else {"eta": 0.5}
    x = sample(model, scheduler, torch.arange(3), (1, 28, 28), seed=5, **step_arguments)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), to_uint8(x).squeeze(1).numpy())


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_images_do_not_depend_on_the_number_of_threads(
    run_here, tiny_checkpoint, tmp_path, monkeypatch, sampler
):
    """DPM-Solver++ remembers its last step: each batch needs another scheduler."""
    arguments = ("--ckpt", tiny_checkpoint, "--n", 12, "--batch-size", 2, "--steps", 5)
    arrays = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        done = run_here(
            "infer.py", *arguments, "--sampler", sampler, "--save-npy", "--out", "x.png"
        )
        assert done.returncode == 0, done.stderr
        arrays.append(np.load(tmp_path / "x.npy"))
    np.testing.assert_array_equal(*arrays)


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
    (grid,) = tmp_path.glob("samples/**/tiny-ddim6-eta1-nrow5-n5-seed9.png")
    stem = grid.with_suffix("")
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
    assert_refused(run_here("infer.py", *arguments, "--n", 3), "files", "would not replace")
    assert len(list((tmp_path / "files").iterdir())) == 4
    (tmp_path / "files" / "2.png").touch()  # it is not called 000002.png
    assert_refused(run_here("infer.py", *arguments, "--n", 4), "files", "would not replace")


def test_save_png_is_not_the_folder_of_the_grid(run_here, tiny_checkpoint, tmp_path):
    """Else the grid would be one of the images: also where its name was not given."""
    (tmp_path / "checkpoints").mkdir()
    checkpoint = shutil.copy(tiny_checkpoint, tmp_path / "checkpoints")
    arguments = ("--ckpt", checkpoint, "--steps", 2, "--n", 3)
    for where in (["samples"], ["files", "--out", "files/x.png"]):
        done = run_here("infer.py", *arguments, "--save-png", *where)
        assert_refused(done, where[0], "choose another")
    assert not list(tmp_path.glob("*/*.png"))


def test_the_bar_counts_whole_images(run_here, tiny_checkpoint):
    arguments = ("--n", 7, "--batch-size", 4, "--steps", 3, "--out", "x.png")
    done = run_here("infer.py", "--ckpt", tiny_checkpoint, *arguments)
    assert "| 7/7 [" in done.stderr and "Warning" not in done.stderr


def test_default_names_differ_where_the_settings_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one = ["--ckpt", "checkpoints/v.pt"]
    labelled = {"classes": ["0", "1"], "scheduler": {"num_train_timesteps": 1000}}
    settings = (
        *(["--nrow", "4"], ["--eta", "0.1234567"], ["--eta", "0.1234568"]),
        *([], ["--steps", "5"], ["--eta", "0"], ["--sampler", "ddpm"], ["--sampler", "dpm++"]),
        *(
            ["--spacing", "leading"],
            ["--n", "65"],
            ["--seed", "1"],
            ["--ckpt", "a/v.pt"],
            ["--ckpt", "b/v.pt"],
        ),
        *(["--ckpt", "v.pt"], ["--ckpt", "checkpoints/w.pt"]),
        *(["--label", "1"], ["--label", "0", "1"], ["--label", "none"]),
        *(["--guidance-scale", "2"], ["--guidance-scale", "2", "--label", "1"]),
    )
    names = set()
    for arguments in settings:
        args = infer.parse_args([*one, *arguments])
        infer.fill_in(args, labelled)
        names.add(infer.default_output(args))
    assert len(names) == len(settings)


def test_a_short_schedule_has_its_own_default_of_steps():
    args = infer.parse_args(["--ckpt", "v.pt"])
    infer.fill_in(args, {"scheduler": {"num_train_timesteps": 20}})
    assert args.steps == 20


@pytest.mark.parametrize("name", ["x.npy", "x.gif"])
def test_a_folder_with_the_name_of_an_output_is_refused_before_sampling(
    run_here, tiny_checkpoint, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(infer.Sampler, "__call__", lambda *_: pytest.fail("it has sampled"))
    (tmp_path / name).mkdir()
    done = run_here("infer.py", "--ckpt", tiny_checkpoint, "--save-npy", "--gif", "--out", "x.png")
    assert_refused(done, name)


def test_the_array_survives_a_grid_that_cannot_be_written(
    run_here, tiny_checkpoint, tmp_path, monkeypatch
):
    def full_disk(*_):
        raise UserError("cannot write x.png: No space left on device")

    monkeypatch.setattr("lab.pictures.save_grid", full_disk)
    arguments = ("--n", 4, "--steps", 2, "--save-npy", "--out", "x.png")
    done = run_here("infer.py", "--ckpt", tiny_checkpoint, *arguments)
    assert done.returncode == 2 and "No space left" in done.stderr
    assert np.load(tmp_path / "x.npy").shape == (4, 28, 28)


@pytest.mark.slow
def test_output_that_breaks_loses_no_samples(tiny_checkpoint, tmp_path, monkeypatch):
    """As `infer.py --save-npy | true`."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    arguments = ("--ckpt", tiny_checkpoint, "--n", 4, "--steps", 2, "--save-npy", "--gif")
    process = subprocess.Popen(
        command("infer.py", *arguments, "--out", "x.png"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert np.load(tmp_path / "x.npy").shape == (4, 28, 28)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gif", "x.npy", "x.png"]


@pytest.mark.slow
def test_two_runs_with_one_name_do_not_mix(run_here, tiny_checkpoint, tmp_path):
    arguments = ("--ckpt", tiny_checkpoint, "--n", 60, "--steps", 10, "--batch-size", 2)
    wanted = []
    for seed in (1, 2):
        out = ("--save-npy", "--seed", seed, "--out", f"{seed}.png")
        assert run_here("infer.py", *arguments, *out).returncode == 0
        wanted.append(np.load(tmp_path / f"{seed}.npy"))
    processes = [
        subprocess.Popen(
            command("infer.py", *arguments, "--save-npy", "--seed", seed, "--out", "x.png"),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for seed in (1, 2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    found = np.load(tmp_path / "x.npy")
    assert any(np.array_equal(found, array) for array in wanted)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


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
        (["--ckpt", "TINY", "--sampler", "ddpm", "--eta", "0"], ["--eta", "ddpm"]),
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


# ---------------------------------------------------------------------------------------- labels


def test_no_array_has_the_name_of_the_labels_of_another(run_here, tiny_checkpoint, tmp_path):
    options = ("--ckpt", tiny_checkpoint, "--steps", 1, "--n", 2, "--save-npy")
    (tmp_path / "x.labels.npy").touch()  # of an earlier array x.npy
    assert run_here("infer.py", *options, "--out", "x.png").returncode == 0
    assert not (tmp_path / "x.labels.npy").exists()
    assert_refused(run_here("infer.py", *options, "--out", "x.labels.png"), "x.labels.png")


def test_images_that_are_not_finite_are_refused(run_here, tiny_checkpoint, tmp_path):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    weights = {name: 1e30 * w for name, w in contents["weights"].items()}
    torch.save(contents | {"weights": weights}, tmp_path / "x.pt")
    done = run_here("infer.py", "--ckpt", "x.pt", "--steps", 2, "--n", 2, "--out", "x.png")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: x.pt makes images that are not finite"
    assert not (tmp_path / "x.png").exists()


def test_the_grid_has_one_column_per_digit(run_here, labelled_checkpoint, tmp_path):
    arguments = ("--ckpt", labelled_checkpoint, "--steps", 2, "--save-npy", "--out", "x.png")
    done = run_here("infer.py", *arguments)
    assert done.returncode == 0, done.stderr
    labels = np.load(tmp_path / "x.labels.npy")
    assert labels.dtype == np.int64 and labels.tolist() == list(range(10)) * 8
    assert Image.open(tmp_path / "x.png").width == 2 * (10 * 30 + 2)  # ten columns
    every = np.load(tmp_path / "x.npy")
    # one digit alone: image 13 has the label 3 in both runs, so it is the same image
    assert run_here("infer.py", *arguments, "--label", 3, "--n", 14).returncode == 0
    assert set(np.load(tmp_path / "x.labels.npy")) == {3}
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy")[13], every[13])
    assert (np.load(tmp_path / "x.npy")[12] != every[12]).any()
    # without a label the checkpoint is an unconditional model, and the labels are not kept
    assert run_here("infer.py", *arguments, "--label", "none").returncode == 0
    assert len(np.load(tmp_path / "x.npy")) == 64


def test_a_new_array_never_stands_beside_old_labels(labelled_checkpoint, tmp_path, monkeypatch):
    """The disk is full when the labels are written."""
    monkeypatch.chdir(tmp_path)
    arguments = ("--ckpt", labelled_checkpoint, "--steps", 1, "--n", 2, "--save-npy")
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments), "--out", "x.png"])
    assert infer.main() == 0 and Path("x.labels.npy").exists()

    def fail(path, data):
        raise OSError("No space left on device")

    monkeypatch.setattr(infer, "write_atomically", fail)
    with pytest.raises(OSError, match="No space"):
        infer.main()
    assert not Path("x.labels.npy").exists()


def test_guidance_of_the_command_line(run_here, labelled_checkpoint, tmp_path):
    """At scale 0 the label does not matter; above 1 it matters more."""
    images = {}
    for scale in (0, 1, 4):
        for label in (3, 8):
            arguments = ("--ckpt", labelled_checkpoint, "--steps", 3, "--n", 2, "--label", label)
            arguments += ("--guidance-scale", scale, "--save-npy", "--out", "x.png")
            assert run_here("infer.py", *arguments).returncode == 0
            images[scale, label] = np.load(tmp_path / "x.npy").astype(float)
    gap = [abs(images[scale, 3] - images[scale, 8]).mean() for scale in (0, 1, 4)]
    assert gap[0] == 0 and gap[2] > gap[1] > 0


def test_the_names_of_the_classes_are_accepted():
    classes = ["t-shirt", "trouser", "bag"]
    assert infer.class_numbers(["Bag", "0", "trouser"], classes) == [2, 0, 1]
    assert infer.class_numbers(None, classes) == [0, 1, 2]
    assert infer.class_numbers(["none"], classes) == []
    for wrong in ("3", "-1", "shoe", "none"):
        with pytest.raises(infer.UserError, match="t-shirt, trouser, bag"):
            infer.class_numbers([wrong, "0"], classes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--label", 10), ("--label 10", "0, 1, 2")),
        (("--label", "seven"), ("--label seven",)),
        (("--guidance-scale", "nan"), ("--guidance-scale",)),
        (("--guidance-scale", -1), ("--guidance-scale",)),
        (("--guidance-scale", 2, "--label", "none"), ("--guidance-scale", "--label none")),
    ],
)
def test_bad_labels_are_refused(run_here, labelled_checkpoint, arguments, words):
    assert_refused(run_here("infer.py", "--ckpt", labelled_checkpoint, *arguments), *words)


def test_labels_need_a_checkpoint_with_labels(run_here, tiny_checkpoint):
    for arguments in (("--label", 7), ("--guidance-scale", 2)):
        done = run_here("infer.py", "--ckpt", tiny_checkpoint, *arguments)
        assert_refused(done, arguments[0], "tiny.pt", "--labels")
