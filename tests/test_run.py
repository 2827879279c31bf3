"""training/run.py: one step of a run, and what it keeps between two steps."""

import math
from dataclasses import replace

from lab import checkpoint
from lab.distributed import Process
from lab.errors import UserError

import pytest
import torch

from diffusion import training_loss
from training.optim import ema_decay
from training.recipe import Recipe
from training.run import Meter, Training, read_state
from training.run_files import RunFiles

TINY = Recipe(batch_size=4, channels=8, timesteps=100, steps=20, seed=3)


def images(n: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)


def step(run: Training) -> torch.Tensor:
    loss = run.loss(run.model, *run.next_batch(), run.generator)
    run.update(loss)
    return loss.detach()


@pytest.mark.slow
def test_it_overfits_one_batch():
    """With the same data, noise and timesteps in every step, the loss falls to nearly nothing."""
    run = Training(replace(TINY, channels=16, batch_size=8, steps=60, lr=3e-3, warmup=1), images(8))
    x0, losses = torch.rand(8, 1, 28, 28).mul(2).sub(1), []
    weights = torch.ones(100)
    for _ in range(60):
        run.generator.manual_seed(0)
        loss = training_loss(run.model, run.scheduler, x0, run.cdf, weights, run.generator)
        run.update(loss)
        losses.append(loss.item())
    # It starts at E[v^2], which lies between E[x_0^2] = 1/3 and E[eps^2] = 1.
    assert 0.3 < losses[0] < 1.1
    assert losses[-1] < 0.15 * losses[0]


def test_an_epoch_shows_every_image_once():
    run = Training(replace(TINY, batch_size=5), images(20))
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(4):
            seen += run.next_batch()[0].flatten(1).sum(1).tolist()
            run.step += 1
        assert run.stage_ends
        epochs.append(seen)
    wanted = run.to_model_range(images(20)).flatten(1).sum(1).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(wanted)
    assert epochs[0] != epochs[1]


def test_update_clips_the_gradient_and_scales_the_learning_rate():
    """The moment buffers after the first step hold the gradient that the optimizers received."""
    run = Training(replace(TINY, clip=0.5, warmup=4, lr=3e-3, muon_lr=0.02), images())
    loss = 1e3 * (run.model(torch.randn(4, 1, 28, 28), 50) - 1).square().mean()
    norm = run.update(loss)
    adamw, muon = (
        [o.state[p] for g in o.param_groups for p in g["params"]] for o in run.optimizers
    )
    received = [s["exp_avg"] / (1 - 0.9) for s in adamw]
    received += [s["momentum_buffer"] / (1 - 0.95) for s in muon]
    assert norm > 10
    assert sum(g.square().sum() for g in received).sqrt().item() == pytest.approx(0.5, rel=1e-4)
    rates = [o.param_groups[0]["lr"] for o in run.optimizers]
    assert rates == pytest.approx([3e-3 / 4, 0.02 / 4])  # the first of four steps of warm-up
    assert all(p.grad is None for p in run.model.parameters())
    assert run.step == 1


def test_the_moving_average_is_the_recursion_over_the_weights():
    run = Training(TINY, images())
    expected = {name: w.clone() for name, w in run.ema.state_dict().items()}
    for i in range(5):
        step(run)
        decay = ema_decay(i, TINY.ema)
        for name, weight in run.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
    for name, weight in run.ema.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pred", ["v", "eps", "x0"])
def test_a_loaded_run_takes_the_same_steps(tmp_path, pred):
    whole = Training(replace(TINY, pred=pred), images())
    first = Training(whole.recipe, images())
    for _ in range(3):
        step(whole)
        step(first)
    files = RunFiles(tmp_path / "x.pt", tmp_path / "samples")
    first.add_to_log(loss=0.5)
    first.save(files, {"samples": "here"})
    state = read_state(files.state, "train.py")
    assert state["options"] == {"samples": "here"} and state["recipe"]["pred"] == pred
    second = Training(Recipe(**state["recipe"]), images())
    assert second.load(state) is None
    assert second.step == 3 and second.id == first.id and second.log == first.log
    assert second.log[-1] == {"step": 3, "images": 12, "loss": 0.5}
    for _ in range(4):  # into the next epoch
        assert torch.equal(step(whole), step(second))
    for a, b in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    _, contents = checkpoint.load_model(files.checkpoint)
    assert contents["training"]["images"] == 12 and contents["training"]["args"]["seed"] == 3


def test_a_state_from_another_type_of_device_gets_a_new_seed(tmp_path):
    """The state of a CUDA generator has 16 bytes."""
    run, files = Training(TINY, images()), RunFiles(tmp_path / "x.pt", tmp_path / "samples")
    run.save(files, {})
    state = read_state(files.state, "train.py") | {
        "generator": torch.zeros(16, dtype=torch.uint8),
        "step": 7,
    }
    assert "another type of device" in run.load(state)
    assert run.generator.initial_seed() == TINY.seed + 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {}}, "does not fit"),
        ({"optimizers": []}, "does not fit"),
        ({"step": None}, "does not fit"),
        ({"generator": 5}, "does not fit"),
        ({"step": -1}, "step -1"),
        ({"elapsed": math.nan}, "nan seconds"),
        ({"log": [{"step": 1, "images": 1, "loss": "low"}]}, "not a line of a log"),
        ({"log": 5}, "not a line of a log"),
    ],
)
def test_states_that_do_not_fit_are_refused_in_one_line(tmp_path, change, words):
    run, files = Training(TINY, images()), RunFiles(tmp_path / "x.pt", tmp_path / "samples")
    run.save(files, {})
    with pytest.raises(UserError, match=words) as caught:
        run.load(read_state(files.state, "train.py") | change)
    assert "\n" not in str(caught.value)


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    old = {"format": checkpoint.FORMAT, "args": {}, "step": 1, "model": {}}
    checkpoint.save(tmp_path / "x.state.pt", old)
    with pytest.raises(UserError, match="format.*is needed"):
        read_state(tmp_path / "x.state.pt", "train.py")


def test_a_recipe_that_contradicts_itself_is_refused():
    for change, words in (
        ({"batch_size": 11}, "--batch-size 11 is more than the 10 images"),
        ({"pred": "eps", "zero_snr": True}, "epsilon"),
    ):
        with pytest.raises(UserError, match=words):
            Training(replace(TINY, **change), images())


def test_the_length_of_a_run():
    assert Training(replace(TINY, steps=None, epochs=3), images()).total_steps == 3 * 2
    run = Training(replace(TINY, steps=None, minutes=1.0), images())
    run.step, run.elapsed = 10, 20.0
    run.fit_to_the_clock()  # 40 of 60 seconds are left, at 2 seconds per step
    assert run.total_steps == 30
    run.elapsed = 70.0
    run.fit_to_the_clock()
    assert run.finished


def test_what_is_not_finite_is_reported_with_its_step():
    run = Training(TINY, images())
    run.step, run.lr = 13, 0.1
    fine, bad = [1.0, 1.0, 1.0], [1.0, math.nan, 1.0]
    run.check_finite(fine, fine, "x")
    for losses, norms in ((bad, fine), (fine, bad)):
        with pytest.raises(
            UserError, match=r"nan.*step 12, learning rate 0\.1; last good state: x"
        ):
            run.check_finite(losses, norms, "x")
    run.model.head.bias.data[0] = math.inf
    with pytest.raises(UserError, match="weights are no longer finite after step 13"):
        run.check_finite(fine, fine, "x")


def test_the_meter_returns_what_was_added_and_starts_again():
    meter = Meter()
    for i in range(3):
        meter.add(torch.tensor(float(i), requires_grad=True), torch.tensor(10.0 + i))
    assert len(meter) == 3
    assert meter.read(Process(torch.device("cpu"))) == ([0, 1, 2], [10, 11, 12])
    assert len(meter) == 0


# ---------------------------------------------------------------------------------------- labels


def test_a_tenth_of_the_labels_is_replaced_by_the_null_label():
    pixels, labels = images(2000), torch.arange(2000) % 10
    pixels[:, 0, 0, 0] = labels.to(torch.uint8) + 1  # each image shows its label
    run = Training(replace(TINY, batch_size=1000, labels=True), pixels, labels)
    assert run.model.config["num_classes"] == 10
    shown, wanted = [], []
    for _ in range(20):
        x0, given = run.next_batch()
        shown.append(((x0[:, 0, 0, 0] + 1) * 127.5).round().long() - 1)
        wanted.append(given)
        run.step += 1
    shown, wanted = torch.cat(shown), torch.cat(wanted)
    dropped = wanted == 10
    assert torch.equal(wanted[~dropped], shown[~dropped])
    assert abs(dropped.double().mean().item() - 0.1) < 4 * (0.09 / 20_000) ** 0.5
    assert torch.bincount(shown[dropped], minlength=10).min() > 100  # of every digit


@pytest.mark.slow
def test_the_network_learns_what_the_labels_tell():
    """Two constant images, and the label says which. In pure noise only the label can tell."""
    pixels = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    labels = torch.arange(64) % 2
    pixels[labels == 1] = 255
    recipe = replace(TINY, batch_size=32, steps=60, labels=True, warmup=1, density="uniform")
    run = Training(recipe, pixels, labels)
    for _ in range(60):
        step(run)
    x_t, t = torch.randn(4, 1, 28, 28), torch.tensor([99])
    with torch.inference_mode():
        means = [
            run.scheduler.get_original_sample(run.model(x_t, t, label), x_t, 99).mean().item()
            for label in (torch.zeros(4).long(), torch.ones(4).long())
        ]
    assert means[0] < -0.7 and means[1] > 0.7


def test_a_labelled_run_is_saved_with_the_names_of_its_classes(tmp_path):
    run = Training(replace(TINY, labels=True, dataset="kmnist"), images(), torch.arange(10))
    files = RunFiles(tmp_path / "x.pt", tmp_path / "samples")
    step(run)
    run.save(files, {})
    contents = checkpoint.load_model(files.checkpoint)[1]
    assert contents["classes"][:3] == ["o", "ki", "su"] and len(contents["classes"]) == 10
    contents["classes"] = contents["classes"][:9]
    checkpoint.save(tmp_path / "bad.pt", contents)
    with pytest.raises(UserError, match="9 names for 10 classes"):
        checkpoint.load_model(tmp_path / "bad.pt")
