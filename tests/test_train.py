"""train.py: the recipe's parts against their formulas, and the script as a user runs it."""

import copy
import json
import math
import random
import signal
import subprocess
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, command

import train
from scheduler import DDPMScheduler
from unet import UNet


def final_state(path):
    """(EMA weights, model, optimizer tensors) of a finished run, by name."""
    state = torch.load(path, weights_only=True)
    tensors = {f"model.{k}": v for k, v in state["model"].items()}
    tensors |= {f"ema.{k}": v for k, v in state["ema"].items()}
    for i, optimizer in enumerate(state["optimizers"]):
        for j, entry in optimizer["state"].items():
            tensors |= {f"optimizer{i}.{j}.{k}": v for k, v in entry.items()}
    return tensors | {"generator": state["generator"]}


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------ the recipe


def test_overfits_one_batch():
    """With the data, the noise and the timesteps fixed, the loss goes to nearly nothing."""
    torch.manual_seed(0)
    model = UNet(channels=16)
    scheduler = DDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    optimizers = train.make_optimizers(model, lr=3e-3, muon_lr=0.02)
    x0 = torch.rand(8, 1, 28, 28).mul(2).sub(1)
    noise, t = torch.randn_like(x0), torch.linspace(0, 999, 8).long()
    losses = []
    for _ in range(60):
        loss = train.diffusion_loss(model, scheduler, torch.ones(1000), x0, noise, t)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    # It starts at E[v^2], between E[x_0^2] = 1/3 and E[eps^2] = 1.
    assert 0.3 < losses[0] < 1.1
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_zero_for_the_true_target(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x0, noise = torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6)
    t = torch.tensor([0, 10, 500, 999])
    velocity = scheduler.get_velocity(x0, noise, t)
    truth = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction_type]

    def loss(answer):
        return train.diffusion_loss(lambda x, t: answer, scheduler, torch.ones(1000), x0, noise, t)

    assert loss(truth) == 0
    # and the other targets are not taken for it
    assert all(loss(other) > 0.1 for other in (noise, velocity, x0) if other is not truth)


def test_loss_weights_make_the_error_of_eps_that_of_v():
    """Unbounded, the loss of any answer as eps is the mean square of its error in v."""
    scheduler = DDPMScheduler(beta_schedule="cosine", prediction_type="epsilon")
    abar = scheduler.alphas_cumprod
    x0, noise, answer = torch.randn(3, 4, 1, 6, 6, dtype=torch.float64)
    t = torch.tensor([0, 300, 700, 990])
    weights = train.loss_weights(abar, "epsilon", math.inf)
    loss = train.diffusion_loss(lambda x, t: answer.float(), scheduler, weights, x0, noise, t)
    a = abar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    predicted_x0 = (x_t - (1 - a).sqrt() * answer) / a.sqrt()
    error = scheduler.get_velocity(predicted_x0, answer, t) - scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(loss.double(), error.square().mean(), rtol=1e-5, atol=0)
    bounded = train.loss_weights(abar, "epsilon", 5.0)
    assert bounded.max() == 5
    assert torch.equal(bounded[abar > 0.2], weights[abar > 0.2])
    for other in ("v_prediction", "sample"):
        assert (train.loss_weights(abar, other, 5.0) == 1).all()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_lognormal_density_of_the_timesteps(zero_snr):
    """The log-SNR of the timesteps drawn is normal with mean -0.5 and deviation 1.5."""
    abar = DDPMScheduler(
        beta_schedule="cosine", prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr
    ).alphas_cumprod
    cdf = train.timestep_cdf(abar, "lognormal")
    assert cdf[-1] == 1
    assert (cdf.diff() >= 0).all()
    t = train.draw_timesteps(cdf.float(), 100_000, torch.Generator().manual_seed(0))
    log_snr = torch.logit(abar[t]).clamp(-20, 20)
    # Stratified, so the error is that of 1000 discrete timesteps, not of sampling.
    assert abs(log_snr.mean().item() + 0.5) < 0.02
    assert abs(log_snr.std().item() - 1.5) < 0.02
    inside = ((log_snr > -2) & (log_snr < 1)).double().mean().item()
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 0.01


def test_timesteps_are_stratified():
    """n draws put exactly one in each n-th of the distribution; uniform covers all of [0, T)."""
    T = 1000
    cdf = train.timestep_cdf(torch.linspace(0.99, 0.01, T, dtype=torch.float64), "uniform").float()
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(T)
    for _ in range(200):
        t = train.draw_timesteps(cdf, 50, generator)
        assert torch.equal(t // (T // 50), torch.arange(50))
        counts += torch.bincount(t, minlength=T)
    assert counts.min() > 0  # each expected 10 times


def test_learning_rate():
    factors = [train.learning_rate_factor(step, 1000, 100) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert all(b > a for a, b in zip(factors[:99], factors[1:100], strict=True))
    assert all(b < a for a, b in zip(factors[100:], factors[101:], strict=False))
    assert factors[500] == pytest.approx(0.5)
    assert factors[1000] == pytest.approx(0, abs=1e-12)
    # a short run still warms up
    assert train.learning_rate_factor(2, 10, 100) == pytest.approx(0.8)


def test_ema():
    """Unrolled by hand; the warm-up forgets the random start at once."""
    model, ema = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    expected = ema.weight.detach().double()
    for step in range(20):
        torch.nn.init.normal_(model.weight)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        train.update_ema(ema, model, train.ema_decay(step, 0.7))
    torch.testing.assert_close(ema.weight.double(), expected, rtol=0, atol=1e-6)
    assert train.ema_decay(0, 0.999) == 0.1
    assert train.ema_decay(10**6, 0.999) == 0.999


def test_orthogonalize():
    """The singular values come near 1 and the singular vectors stay: the oracle is the SVD."""
    shapes = [(8, 8), (8, 40), (40, 8), (6, 20), (5, 5)]
    generator = torch.Generator().manual_seed(0)
    matrices = [10.0**i * torch.randn(s, generator=generator) for i, s in enumerate(shapes, -3)]
    for G, X in zip(matrices, train.orthogonalize(matrices), strict=True):
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        singular = torch.diagonal(U.mT @ X @ Vh.mT)
        well_posed = S.max() * 0.05 < S
        # Jordan's coefficients do not converge: they leave singular values within about (0.7, 1.2).
        assert singular[well_posed].min() > 0.6
        assert singular[well_posed].max() < 1.3
        torch.testing.assert_close(U @ torch.diag(singular) @ Vh, X, rtol=0, atol=1e-3)


def test_muon_matches_torchs():
    """torch.optim.Muon on the 2-D view of a convolution takes the same step."""
    torch.manual_seed(0)
    weight = torch.randn(12, 4, 3, 3)
    ours = torch.nn.Parameter(weight.clone(memory_format=torch.channels_last))
    theirs = torch.nn.Parameter(weight.flatten(1).clone())
    muon = train.Muon([ours], lr=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95)
    for _ in range(3):
        gradient = torch.randn(12, 4, 3, 3)
        ours.grad, theirs.grad = gradient, gradient.flatten(1)
        muon.step()
        reference.step()
    # torch's iterates in bfloat16 (8 bits): 3 steps of 0.1 with entries of about 1/6
    difference = ours.detach().flatten(1) - theirs.detach()
    assert difference.abs().max() < 0.01
    assert (ours.detach() - weight).abs().mean() > 0.02  # and it did move


def test_optimize_clips_the_gradient_and_scales_the_learning_rate():
    """The first step's moment buffers hold the gradient that the optimizers were given."""
    model = UNet(channels=8)
    optimizers = train.make_optimizers(model, lr=3e-3, muon_lr=0.02)
    loss = 1e3 * (model(torch.randn(4, 1, 28, 28), 500) - 1).square().mean()
    settings = {"clip": 0.5, "lr_factor": 0.1, "decay": 0.9}
    norm = train.optimize(loss, model, copy.deepcopy(model), optimizers, **settings)
    adamw, muon = ([o.state[p] for g in o.param_groups for p in g["params"]] for o in optimizers)
    given = [s["exp_avg"] / (1 - 0.9) for s in adamw]
    given += [s["momentum_buffer"] / (1 - 0.95) for s in muon]
    assert norm > 10
    assert sum(g.square().sum() for g in given).sqrt().item() == pytest.approx(0.5, rel=1e-4)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([3e-4, 2e-3])
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_convolutions_round_the_operands_and_nothing_else():
    """Float32 as ever, on a CPU without bfloat16; or, to float32's precision, the convolution in
    float64 of operands that were rounded to bfloat16."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 32, 14, 14), torch.randn(32, 32, 3, 3)
    rounded = F.conv2d(x.bfloat16().double(), weight.bfloat16().double()).float()
    before = F.conv2d(x, weight)
    with train.bfloat16_convolutions():
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
        inside = F.conv2d(x, weight)
    with pytest.raises(KeyError), train.bfloat16_convolutions():
        raise KeyError
    assert torch.equal(before, F.conv2d(x, weight))
    assert (before - rounded).abs().max() > 0.02
    if not torch.equal(inside, before):
        torch.testing.assert_close(inside, rounded, rtol=0, atol=2e-4)


def test_a_run_steps_in_bfloat16_and_previews_in_float32(monkeypatch, run_here, data_dir, tmp_path):
    precisions = {}

    def spy(name):
        function = getattr(train, name)

        def wrapper(*args, **kwargs):
            precisions.setdefault(name, torch.backends.mkldnn.conv.fp32_precision)
            return function(*args, **kwargs)

        monkeypatch.setattr(train, name, wrapper)

    for name in ("diffusion_loss", "optimize", "sample"):
        spy(name)
    done = run_here("train.py", *TINY, "--steps", 1, "--data", data_dir, "--out", "b.pt")
    assert done.returncode in (0, None)
    assert precisions["diffusion_loss"] == precisions["optimize"] == "bf16"
    assert precisions["sample"] != "bf16"


def test_what_is_not_finite_is_said_with_its_step():
    model, fine = UNet(channels=8), torch.ones(3)
    bad = torch.tensor([1, float("nan"), 1])
    assert train.what_is_not_finite(model, fine, fine, 10) is None
    for losses, norms in ((bad, fine), (fine, bad)):
        assert "nan" in train.what_is_not_finite(model, losses, norms, 10)
        assert "step 12" in train.what_is_not_finite(model, losses, norms, 10)
    model.head.bias.data[0] = float("inf")
    assert "weights" in train.what_is_not_finite(model, fine, fine, 10)


def test_every_parameter_has_one_optimizer():
    model = UNet(channels=8)
    optimizers = train.make_optimizers(model, 1e-3, 0.02)
    ids = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    assert len(train.make_optimizers(model, 1e-3, 0.0)) == 1


# ------------------------------------------------------------------------------------ the script


def test_a_short_run_leaves_what_it_says(run, data_dir, tmp_path):
    done = run("train.py", "--pred", "eps", *TINY, "--steps", 12, "--data", data_dir)
    assert done.returncode == 0, done.stderr
    for path in ("checkpoints/eps.pt", "samples/eps.png", "checkpoints/eps.png"):
        assert path in done.stdout
        assert (tmp_path / path).stat().st_size > 1000
    contents = torch.load(tmp_path / "checkpoints/eps.pt", weights_only=True)
    assert contents["scheduler"]["prediction_type"] == "epsilon"
    assert contents["training"]["step"] == 12
    log = read_log(tmp_path / "checkpoints/eps.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [5, 10, 12]
    assert all({"loss", "lr", "images_per_s"} <= line.keys() for line in log if "loss" in line)
    assert sum("val_loss" in line for line in log) == 1


def test_an_earlier_runs_checkpoint_is_kept(run_here, data_dir, tmp_path):
    arguments = (*TINY, "--log-every", 1, "--data", data_dir, "--out", "x.pt")
    assert run_here("train.py", *arguments, "--steps", 2).returncode in (0, None)
    suffixes = (".pt", ".state.pt", ".jsonl")
    before = [(tmp_path / f"x{suffix}").read_bytes() for suffix in suffixes]
    done = run_here("train.py", *arguments, "--steps", 1)
    assert before == [(tmp_path / f"x.previous{suffix}").read_bytes() for suffix in suffixes]
    assert (tmp_path / "x.pt").read_bytes() != before[0]
    assert "x.previous.pt" in done.stdout


def test_ema_of_a_run_is_the_recursion_over_its_weights(monkeypatch, data_dir, tmp_path):
    """The script's EMA, unrolled from the weights that it saved at every step."""
    states = []
    save = train.checkpoint.save

    def record(path, contents):
        if "optimizers" in contents:
            copies = ({k: v.clone() for k, v in contents[m].items()} for m in ("model", "ema"))
            states.append(tuple(copies))
        save(path, contents)

    monkeypatch.setattr(train.checkpoint, "save", record)
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "--steps", "6", "--save-every", "1", "--data", str(data_dir)]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert train.main() == 0
    signal.signal(signal.SIGINT, handlers[0])
    signal.signal(signal.SIGTERM, handlers[1])
    assert len(states) == 6
    for step in range(1, 6):
        decay = (1 + step) / (10 + step)
        for name, weight in states[step][0].items():
            expected = decay * states[step - 1][1][name] + (1 - decay) * weight
            torch.testing.assert_close(states[step][1][name], expected, rtol=0, atol=1e-6)


def start(tmp_path, *args):
    return subprocess.Popen(
        command("train.py", *args),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(state_path, step, process):
    """Until the training state on disk is of this step or a later one: always a whole file."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if state_path.exists():
            found = torch.load(state_path, weights_only=True)["step"]
            if found >= step:
                return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"no training state of step {step} in 120 s")


RUN = (*TINY, "--steps", 60, "--save-every", 7, "--seed", 3, "--out", "r.pt")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data_dir):
    """The run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *RUN, "--data", data_dir)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


def assert_same_run(ours, reference):
    a, b = final_state(ours / "r.state.pt"), final_state(reference / "r.state.pt")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    shipped = [torch.load(f / "r.pt", weights_only=True)["weights"] for f in (ours, reference)]
    assert all(torch.equal(shipped[0][name], shipped[1][name]) for name in shipped[1])
    logs = [read_log(folder / "r.jsonl") for folder in (ours, reference)]
    val_losses = [[line for line in log if "val_loss" in line] for log in logs]
    assert val_losses[0] == val_losses[1]
    steps = [line["step"] for line in logs[0] if "loss" in line]
    assert steps == sorted(set(steps))  # no step is told twice


def test_resume_after_sigkill_is_exact(whole_run, tmp_path, data_dir):
    """Killed at two random moments and resumed: bit-identical model, EMA, optimizers and RNG."""
    arguments = (*RUN, "--data", data_dir)
    for wanted in (7, 28):
        process = start(tmp_path, *arguments)
        wait_for_step(tmp_path / "r.state.pt", wanted, process)
        time.sleep(random.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with open(tmp_path / "r.jsonl", "a") as file:
            file.write('{"step": 9, "lo')  # as a full disk may leave it
        arguments = ("--resume", "r.state.pt", "--data", data_dir)
    process = start(tmp_path, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(number, code, whole_run, tmp_path, data_dir, run):
    process = start(tmp_path, *RUN, "--data", data_dir)
    wait_for_step(tmp_path / "r.state.pt", 7, process)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "--resume r.state.pt" in output
    stopped_at = torch.load(tmp_path / "r.state.pt", weights_only=True)["step"]
    assert f"stopped at step {stopped_at} of 60" in output
    assert run("train.py", "--resume", "r.state.pt", "--data", data_dir).returncode == 0
    assert_same_run(tmp_path, whole_run)


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(run, refused, tmp_path, data_dir):
    arguments = (*TINY, "--save-every", 1, "--warmup", 1, "--data", data_dir, "--out", "n.pt")
    done = run("train.py", *arguments, "--steps", 50, "--lr", 1e30, "--muon-lr", 1e30)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the ")
    assert "learning rate" in last
    assert "last good checkpoint: n.state.pt (step " in last
    assert "Traceback" not in done.stderr
    weights = torch.load(tmp_path / "n.state.pt", weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


def test_two_processes_take_the_step_of_one(monkeypatch, run, tmp_path, data_dir):
    """torchrun with two processes on the same global batch: equal to float32's rounding."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # which has no bfloat16
    arguments = (*TINY, "--steps", 8, "--log-every", 1, "--muon-lr", 0, "--data", data_dir)
    for name, processes in (("one", 1), ("two", 2)):
        done = run("train.py", *arguments, "--out", f"{name}.pt", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("checkpoint  ") == 1  # rank 0 alone speaks
    logs = [read_log(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (
        torch.load(tmp_path / f"{n}.pt", weights_only=True)["weights"] for n in ("one", "two")
    )
    start = UNet(channels=8).state_dict()
    for name in one:
        # AdamW divides by |g| in its first steps, so where g is nearly 0 rounding is magnified:
        # the bound is on the whole tensor, relative to a step's size.
        moved = (one[name] - two[name]).norm() / one[name].numel() ** 0.5
        assert moved < 2e-4, name
    assert start.keys() == one.keys()


def test_minutes_fit_the_schedule_to_the_clock(run, tmp_path, data_dir):
    done = run("train.py", *TINY, "--minutes", 0.1, "--data", data_dir, "--out", "m.pt")
    assert done.returncode == 0, done.stderr
    log = [line for line in read_log(tmp_path / "m.jsonl") if "loss" in line]
    assert 5 < log[-1]["elapsed"] < 12  # 6 s, on a machine that may be busy with other things
    assert log[-1]["lr"] < 0.2 * max(line["lr"] for line in log)
    before = (tmp_path / "m.state.pt").read_bytes()
    assert run("train.py", "--resume", "m.state.pt", "--data", data_dir).returncode == 0
    assert (tmp_path / "m.state.pt").read_bytes() == before  # its time is up: not a step more


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, data_dir, run):
    """A limit on the size of files stands in for the full disk: the write fails half-way."""
    arguments = (*TINY, "--steps", 8, "--save-every", 4, "--data", data_dir, "--out", "d.pt")
    assert run("train.py", *arguments).returncode == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("d.pt", "d.state.pt")}
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        f"sys.argv[0] = 'train.py'; sys.path.insert(0, {str(ROOT)!r});"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [*command("x")[:1], "-c", limited, *map(str, arguments), "--seed", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: cannot write d.pt")
    assert "the previous one is untouched" in last
    assert "Traceback" not in done.stderr
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert not list(tmp_path.glob(".d*"))  # no half-written file is left behind


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pred", "score"], ["--pred", "score", "eps"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--epochs", "1", "--steps", "5"], ["--steps", "--epochs"]),
        (["--minutes", "-1"], ["--minutes"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--ema", "1.5"], ["--ema", "1.5"]),
        (["--channels", "7"], ["--channels", "even"]),
        (["--batch-size", "60001"], ["--batch-size", "60001", "60000"]),
        (["--schedule", "quadratic"], ["--schedule", "quadratic", "cosine"]),
        (["--pred", "eps", "--zero-snr"], ["epsilon", "v_prediction"]),
        (["--dataset", "cifar"], ["--dataset", "cifar"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--out", "model.ckpt"], ["--out", ".pt"]),
        (["--out", "samples/x.pt"], ["--samples", "--out"]),
        (["--resume", "missing.state.pt"], ["missing.state.pt", "No such file"]),
        (["--out", "/dev/null/x.pt", "--steps", "1"], ["/dev/null"]),
        (["--samples", "/dev/null/x", "--steps", "1"], ["/dev/null/x"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(run_here, refused, data_dir, arguments, words):
    refused(run_here("train.py", *arguments, "--data", data_dir), *words)


def test_resume_refuses_what_contradicts_it(run_here, refused, tiny_checkpoint, data_dir):
    state = tiny_checkpoint.with_suffix(".state.pt")
    refused(run_here("train.py", "--resume", state, "--batch-size", 32), "--batch-size 32", "16")
    refused(run_here("train.py", "--resume", state, "--pred", "eps"), "--pred eps", "v")
    refused(run_here("train.py", "--resume", tiny_checkpoint), "tiny.pt", "optimizers")


def test_a_run_goes_on_where_its_state_lies(run_here, refused, tiny_checkpoint, data_dir, tmp_path):
    """Moved, or an earlier run's that was kept: what it left elsewhere is not overwritten."""
    state = tiny_checkpoint.with_suffix(".state.pt")
    before = {path: path.read_bytes() for path in tiny_checkpoint.parent.glob("*.*")}
    (tmp_path / "moved.state.pt").write_bytes(state.read_bytes())
    done = run_here("train.py", "--resume", "moved.state.pt", "--data", data_dir)
    assert done.returncode in (0, None) and "moved.pt" in done.stdout
    assert (tmp_path / "moved.jsonl").exists() and (tmp_path / "samples/moved.png").exists()
    assert before == {path: path.read_bytes() for path in tiny_checkpoint.parent.glob("*.*")}
    (tmp_path / "state.pt").write_bytes(state.read_bytes())
    refused(run_here("train.py", "--resume", "state.pt"), "state.pt", ".state.pt")


def test_a_state_of_another_type_of_device_draws_its_noise_anew(
    run_here, tiny_checkpoint, data_dir, tmp_path
):
    """A generator's state is 16 bytes on CUDA."""
    state = torch.load(tiny_checkpoint.with_suffix(".state.pt"), weights_only=True)
    state |= {"generator": torch.zeros(16, dtype=torch.uint8), "step": 28}
    torch.save(state, tmp_path / "x.state.pt")
    done = run_here("train.py", "--resume", "x.state.pt", "--data", data_dir)
    assert done.returncode in (0, None) and "another type of device" in done.stdout
    assert torch.load(tmp_path / "x.state.pt", weights_only=True)["step"] == 30
