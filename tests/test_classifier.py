"""lab/classifier.py: the shipped classifier, and how another one is trained."""

from lab import classifier
from lab.errors import UserError

import pytest
import torch


@pytest.mark.slow
def test_the_shipped_weights_are_small_accurate_and_say_so(data_dir):
    assert classifier.WEIGHTS.stat().st_size <= 2**20
    right = classifier.accuracy(classifier.load_classifier(), data_dir)
    assert right >= 0.992
    stated = torch.load(classifier.WEIGHTS, weights_only=True)["test_accuracy"]
    assert right == pytest.approx(stated, abs=2e-4)  # another machine may round two images over


def test_features_and_probabilities_are_of_the_documented_form(real_images):
    feats, probs = classifier.features(real_images[:1200])
    assert feats.shape == (1200, 84) and probs.shape == (1200, 10)
    assert feats.dtype == probs.dtype == torch.float32
    assert feats.min() >= 0 and probs.min() >= 0 and probs.sum(1).max() <= 1 + 1e-6
    one_by_one = torch.cat([classifier.features(image[None])[0] for image in real_images[:5]])
    torch.testing.assert_close(feats[:5], one_by_one, rtol=1e-4, atol=1e-4)


@pytest.fixture
def few_images(monkeypatch, train_split):
    few = train_split[0][:640], train_split[1][:640]
    monkeypatch.setattr(classifier, "load_dataset", lambda *_: few)


@pytest.mark.slow
def test_training_writes_what_loads_and_repeats_itself(tmp_path, few_images, monkeypatch):
    monkeypatch.setattr(classifier, "MIN_ACCURACY", 0)
    states = []
    for name, seed in (("a.pt", 0), ("b.pt", 0), ("c.pt", 1)):
        right = classifier.train(tmp_path / name, epochs=2, seed=seed)
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["test_accuracy"] == right and saved["seed"] == seed
        states.append(classifier.load_classifier(tmp_path / name).state_dict())
    a, b, c = (torch.cat([t.flatten() for t in state.values()]) for state in states)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_a_poor_classifier_is_not_written(tmp_path, few_images):
    weights = tmp_path / "weights.pt"
    weights.write_text("precious")
    with pytest.raises(UserError, match=r"below 99\.2%"):
        classifier.train(weights, epochs=1)
    assert weights.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_the_training_images_stay_in_range_and_non_digits_are_seen_as_such(train_split):
    torch.manual_seed(0)
    digits = classifier.jitter(train_split[0][:301])
    assert digits.shape == (301, 1, 28, 28) and digits.min() >= 0 and digits.max() <= 255.001
    others = classifier.non_digits(digits)
    assert others.shape == (300, 1, 28, 28) and others.min() >= 0 and others.max() <= 255.001
    blocks, whole = others[200:].flatten(1), digits[200:300].flatten(1)
    torch.testing.assert_close(blocks.sort(1).values, whole.sort(1).values)  # the same pixels
    assert (blocks != whole).any(1).all()
    read = classifier.features(others.round().to(torch.uint8))[1]
    assert (read.max(1).values < 0.5).double().mean() > 0.9
