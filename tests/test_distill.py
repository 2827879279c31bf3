"""distill.py: the loss against known answers, and the script as a user runs it."""

import copy
import json
import signal
import subprocess

from lab.checkpoint import load_model
from lab.data import CLASSES
from lab.errors import UserError

import pytest
import torch
from helpers import assert_refused, command

import distill
from diffusion import sample
from scheduler import PREDICTION_TYPES, DDIMScheduler, DDPMScheduler
from unet import UNet

SHORT = ("--teacher-steps", 8, "--updates", 1, "--batch-size", 8, "--log-every", 1)


class Gains(torch.nn.Module):
    """A network whose output is gain[t] x_t."""

    def __init__(self, gain: torch.Tensor):
        super().__init__()
        self.gain = torch.nn.Parameter(gain.clone())

    def forward(self, x_t, t):
        return self.gain[t].view(-1, 1, 1, 1) * x_t


def gaussian(prediction_type: str, deviation: float) -> tuple[Gains, DDIMScheduler]:
    """Return the exact network for x_0 ~ N(0, deviation^2), and its scheduler.

    Then E[x_0 | x_t] = g x_t, with g = sqrt(abar) deviation^2 / (abar deviation^2 + 1 - abar).
    """
    scheduler = DDIMScheduler(
        beta_schedule="cosine", prediction_type=prediction_type, clip_sample=False
    )
    abar = scheduler.alphas_cumprod
    x0 = abar.sqrt() * deviation**2 / (abar * deviation**2 + 1 - abar)
    eps = (1 - abar.sqrt() * x0) / (1 - abar).sqrt()
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    gain = {"sample": x0, "epsilon": eps, "v_prediction": v}[prediction_type]
    return Gains(gain.float()), scheduler


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_student_of_the_exact_gaussian_network_finds_the_known_answer(prediction_type):
    """The student's N steps then lead where the teacher's 2N lead.

    With this teacher every jump is linear: x_s = k x_t, with k the product of two DDIM steps. So
    the student's x_0 must be (k - r) / c times x_t.
    """
    teacher, scheduler = gaussian(prediction_type, 0.5)
    N, abar = 4, scheduler.alphas_cumprod
    scheduler.set_timesteps(2 * N)
    timesteps = scheduler.timesteps
    coefficients = distill.jump_coefficients(abar, timesteps)
    student = Gains(torch.zeros(1000))
    weights, generator = torch.ones(1000), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    x0 = 0.5 * torch.randn(64, 1, 4, 4, generator=generator)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 400)
        arguments = (student, teacher, scheduler, timesteps, coefficients, x0, weights, generator)
        loss = distill.distillation_loss(*arguments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-6

    start = torch.randn(5, 1, 4, 4)
    ends = {}
    for name, network, visited in (
        ("teacher", teacher, timesteps),
        ("student", student, timesteps[::2]),
    ):
        scheduler.set_timesteps(timesteps=visited)
        ends[name] = sample(network, scheduler, torch.arange(5), (1, 4, 4), x_T=start, eta=0.0)
    torch.testing.assert_close(ends["student"], ends["teacher"], rtol=0, atol=5e-3)
    # and no student that makes DDIM's larger steps with the teacher's network does
    scheduler.set_timesteps(timesteps=timesteps[::2])
    lazy = sample(teacher, scheduler, torch.arange(5), (1, 4, 4), x_T=start, eta=0.0)
    assert (lazy - ends["teacher"]).abs().max() > 0.1


def test_coefficients_are_those_of_the_schedulers_steps():
    """x_s = r x_t + c x_0 is DDIM's step at eta = 0, also the last one, to the clean image."""
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(6)
    coefficients = distill.jump_coefficients(scheduler.alphas_cumprod, scheduler.timesteps)
    x_t, x0 = torch.randn(2, 3, 1, 4, 4)
    for j in range(3):
        for i, rows in ((2 * j, (0, 1)), (2 * j + 1, (2, 3))):
            r, c = coefficients[rows, j]
            wanted = scheduler.step(x0, scheduler.timesteps[i], x_t).prev_sample
            torch.testing.assert_close(r * x_t + c * x0, wanted, rtol=0, atol=1e-6)
    scheduler.set_timesteps(timesteps=scheduler.timesteps[::2])
    for j, t in enumerate(scheduler.timesteps):
        r, c, alpha, sigma = coefficients[4:, j]
        wanted = scheduler.step(x0, t, x_t).prev_sample
        torch.testing.assert_close(r * x_t + c * x0, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(alpha * x0 + sigma * x_t, scheduler.add_noise(x0, x_t, t))


def test_every_share_of_a_batch_has_the_whole_batchs_draws():
    """Two processes together take the step of one."""
    teacher, scheduler = gaussian("v_prediction", 0.5)
    scheduler.set_timesteps(4)
    coefficients = distill.jump_coefficients(scheduler.alphas_cumprod, scheduler.timesteps)
    student, x0, weights = Gains(torch.zeros(1000)), torch.randn(6, 1, 4, 4), torch.rand(1000)

    def loss(share):
        generator = torch.Generator().manual_seed(0)
        start = (student, teacher, scheduler, scheduler.timesteps, coefficients)
        return distill.distillation_loss(*start, x0, weights, generator, share)

    parts = (loss(range(0, 3)) + loss(range(3, 6))) / 2
    torch.testing.assert_close(parts, loss(None))


def test_a_teacher_of_other_classes_is_refused(train_split):
    network = UNet(channels=8, num_classes=5)
    config = dict(DDPMScheduler(prediction_type="v_prediction").config)
    source = {"unet": network.config, "scheduler": config, "image_shape": (1, 28, 28)}
    source |= {"weights": network.state_dict(), "classes": list("abcde")}
    with pytest.raises(UserError, match="five.pt has other classes than mnist"):
        distill.Distillation(distill.Recipe(), *train_split, source, "five.pt")
    ten = UNet(channels=8, num_classes=10)
    source |= {"unet": ten.config, "weights": ten.state_dict(), "classes": CLASSES["kmnist"]}
    with pytest.raises(UserError, match="ten.pt has other classes than mnist"):
        distill.Distillation(distill.Recipe(), *train_split, source, "ten.pt")
    distill.Distillation(
        distill.Recipe(), *train_split, source | {"classes": CLASSES["mnist"]}, "ten.pt"
    )


def test_only_the_student_moves(tiny_checkpoint, train_split):
    """In a round its teacher stays as it is, and in the next one it is the last student."""
    source = load_model(tiny_checkpoint)[1]
    recipe = distill.Recipe(teacher_steps=64, updates=1, batch_size=4)
    run = distill.Distillation(recipe, *train_split, source, "tiny.pt")

    def step():
        batch = run.next_batch()
        networks = {"teacher": run.teacher, "student": run.model, "ema": run.ema}
        before = {k: copy.deepcopy(network.state_dict()) for k, network in networks.items()}
        run.update(run.loss(run.model, *batch, run.generator))
        return before, {k: network.state_dict() for k, network in networks.items()}

    def same(a, b):
        return [torch.equal(a[name], b[name]) for name in a]

    before, after = step()
    for network in before.values():
        assert all(same(network, source["weights"]))
    assert all(same(after["teacher"], source["weights"]))
    assert sum(same(after["student"], source["weights"])) < 5
    assert sum(same(after["ema"], source["weights"])) < 5
    first_student = copy.deepcopy(after["ema"])
    before, after = step()
    for network in before.values():
        assert all(same(network, first_student))
    assert all(same(after["teacher"], first_student))


# ------------------------------------------------------------------------------------ the script


def students(folder) -> dict:
    return {n: torch.load(folder / f"x-{n}.pt", weights_only=True) for n in SIZES}


SIZES = ("4steps", "2steps", "1step")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, tiny_checkpoint, data_dir):
    """The folder of a short distillation that was never interrupted."""
    folder = tmp_path_factory.mktemp("distilled")
    arguments = ("--ckpt", tiny_checkpoint, *SHORT, "--data", data_dir, "--out", "x.pt")
    done = subprocess.run(
        command("distill.py", *arguments), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(f"x-{n}.pt" in done.stdout for n in SIZES)
    return folder


@pytest.mark.slow
def test_a_student_knows_its_timesteps(distilled, run_here, tmp_path):
    for n, contents in students(distilled).items():
        assert len(contents["timesteps"]) == int(n[0])
        assert contents["timesteps"][0] == 99  # T = 100
        assert (distilled / f"samples/_here/x-{n}.png").exists()
        assert contents["teacher"]["script"] == "train.py"
    assert contents["training"]["step"] == 3 + 4 + 5  # the fewer steps, the longer the round
    student = distilled / "x-2steps.pt"
    done = run_here("infer.py", "--ckpt", student, "--n", 3)
    assert done.returncode == 0 and "ddim2-eta0" in done.stdout
    assert run_here("infer.py", "--ckpt", student, "--n", 3, "--steps", 2).returncode == 0
    assert run_here("infer.py", "--ckpt", student, "--n", 3, "--eta", 0.5).returncode == 0
    for wrong in (("--steps", 4), ("--sampler", "ddpm"), ("--spacing", "leading")):
        assert_refused(run_here("infer.py", "--ckpt", student, *wrong), *map(str, wrong))
    log = [json.loads(line) for line in (distilled / "x-students.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "val_loss" in line] == [3, 7, 12]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_a_distillation_is_exact(
    distilled, tiny_checkpoint, run_here, data_dir, tmp_path, monkeypatch, step
):
    """Also if the stop is at the end of a round (3), and without the teacher's file."""
    steps, real = [], distill.distillation_loss

    def distillation_loss(*args):
        if torch.is_grad_enabled():  # not in the validation
            steps.append(None)
            if len(steps) == step:
                signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(distill, "distillation_loss", distillation_loss)
    (tmp_path / "teacher.pt").write_bytes(tiny_checkpoint.read_bytes())
    arguments = ("--ckpt", "teacher.pt", *SHORT, "--data", data_dir, "--out", "x.pt")
    done = run_here("distill.py", *arguments)
    assert done.returncode == 130 and "--resume=x-students.state.pt" in done.stdout
    (tmp_path / "teacher.pt").unlink()
    done = run_here("distill.py", "--resume", "x-students.state.pt")
    assert done.returncode == 0, done.stderr
    whole, ours = students(distilled), students(tmp_path)
    for n in SIZES:
        assert whole[n]["timesteps"] == ours[n]["timesteps"]
        for name, weight in whole[n]["weights"].items():
            assert torch.equal(weight, ours[n]["weights"][name]), (n, name)


@pytest.mark.slow
def test_two_processes_distil_as_one(tiny_checkpoint, data_dir, run, monkeypatch, tmp_path):
    """Equal to float32's rounding."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # which has no bfloat16
    weights = []
    for name, processes in (("one", 1), ("two", 2)):
        arguments = ("--ckpt", tiny_checkpoint, *SHORT, "--data", data_dir, "--out", f"{name}.pt")
        done = run("distill.py", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
        student = torch.load(tmp_path / f"{name}-1step.pt", weights_only=True)
        weights.append(student["weights"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_student_can_be_distilled_again(distilled, run_here, data_dir, tmp_path):
    """With its own timesteps, and with no others. Its first teacher stays the one that is named."""
    student = distilled / "x-4steps.pt"
    arguments = ("--ckpt", student, "--updates", 1, "--batch-size", 8, "--data", data_dir)
    done = run_here("distill.py", *arguments, "--out", "y.pt", "--student-steps", 2)
    assert done.returncode == 0, done.stderr
    ours = torch.load(tmp_path / "y-2steps.pt", weights_only=True)
    assert ours["timesteps"] == students(distilled)["2steps"]["timesteps"]
    assert ours["teacher"] == students(distilled)["2steps"]["teacher"]
    done = run_here("distill.py", *arguments, "--teacher-steps", 8)
    assert_refused(done, "--teacher-steps 8", "student of 4 steps")


@pytest.mark.slow
def test_students_of_an_earlier_run_are_kept(
    distilled, tiny_checkpoint, run_here, data_dir, tmp_path
):
    """And a state of one script is not continued by the other."""
    for path in distilled.glob("x*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = (tmp_path / "x-2steps.pt").read_bytes()
    arguments = ("--ckpt", tiny_checkpoint, *SHORT, "--data", data_dir, "--out", "x.pt")
    done = run_here("distill.py", *arguments, "--teacher-steps", 2, "--seed", 1)
    assert done.returncode == 0 and "earlier run" in done.stderr
    assert (tmp_path / "x-2steps.1.pt").read_bytes() == before
    assert (tmp_path / "x-students.1.state.pt").exists()
    assert not (tmp_path / "x-2steps.pt").exists()
    assert_refused(run_here("train.py", "--resume", "x-students.state.pt"), "distill.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--ckpt",)),
        (("--ckpt", "missing.pt"), ("missing.pt",)),
        (("--ckpt", "x.pt", "--teacher-steps", 48), ("48", "--teacher-steps", "halving")),
        (("--ckpt", "x.pt", "--teacher-steps", 4, "--student-steps", 4), ("halving",)),
        (("--ckpt", "x.pt", "--lr", "nan"), ("--lr",)),
        (("--resume", "x.state.pt"), ("-students.state.pt",)),
        (("--resume", "x-students.state.pt", "--ckpt", "y.pt"), ("leave out --ckpt",)),
    ],
)
def test_bad_arguments_of_distill(run_here, arguments, words):
    assert_refused(run_here("distill.py", *arguments), *words)


@pytest.mark.parametrize("student_steps", [3, 32, 64])
def test_student_steps_that_halving_does_not_reach_are_refused(
    tiny_checkpoint, run_here, student_steps
):
    """Also without --teacher-steps, whose default depends on the checkpoint."""
    arguments = ("--ckpt", tiny_checkpoint, "--student-steps", student_steps)
    assert_refused(run_here("distill.py", *arguments, "--out", "x.pt"), "halving", "32 steps")


def test_more_steps_than_timesteps_are_refused(tiny_checkpoint, run_here, data_dir):
    arguments = ("--ckpt", tiny_checkpoint, "--teacher-steps", 128, "--data", data_dir)
    assert_refused(run_here("distill.py", *arguments, "--out", "x.pt"), "--teacher-steps 128")


@pytest.mark.slow
def test_a_student_without_its_timesteps_is_refused(distilled, run_here, tmp_path):
    """And the study, which needs every number of steps, takes no student."""
    contents = torch.load(distilled / "x-2steps.pt", weights_only=True)
    for wrong in ([99, 99], [49, 99], [100, 49], [], "99", [99.5, 49]):
        torch.save(contents | {"timesteps": wrong}, tmp_path / "bad.pt")
        assert_refused(run_here("infer.py", "--ckpt", "bad.pt"), "bad.pt")
    del contents["timesteps"]
    torch.save(contents, tmp_path / "bad.pt")
    assert_refused(run_here("infer.py", "--ckpt", "bad.pt"), "without its timesteps")
    student = distilled / "x-2steps.pt"
    assert_refused(run_here("study.py", "--ckpt", student, "--out", "s"), "student of distill.py")


def test_a_teacher_that_does_not_say_what_it_has_learned(tiny_checkpoint, run_here, tmp_path):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    for training in ({}, {"args": None}, {"args": {"dataset": ["mnist"]}}, None):
        torch.save(contents | {"training": training}, tmp_path / "bad.pt")
        assert_refused(run_here("distill.py", "--ckpt", "bad.pt"), "bad.pt", "--dataset")


@pytest.mark.slow
def test_damaged_states_of_a_distillation_are_refused(distilled, run_here, tmp_path):
    state = torch.load(distilled / "x-students.state.pt", weights_only=True)
    source, recipe = state["source"], state["recipe"]
    for change in (
        {"source": None},
        {"source": {}},
        {"source": source | {"timesteps": [3, 2, 1]}},
        {"source": source | {"timesteps": 5}},
        {"source": source | {"image_shape": (1, 14, 14)}},
        {"recipe": recipe | {"teacher_steps": 7}},
        {"recipe": recipe | {"updates": -1}},
        {"recipe": recipe | {"student_steps": 8}},
        {"teacher": {}},
        {"step": 10**9},
    ):
        torch.save(state | change, tmp_path / "x-students.state.pt")
        done = run_here("distill.py", "--resume", "x-students.state.pt")
        fits = not {"teacher", "step"} & change.keys()
        assert_refused(done, "x-students.state.pt" if fits else "does not fit")
