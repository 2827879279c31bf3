"""lab/checkpoint.py: files that must be refused, and the shipped ones."""

import io
import pickle
import zipfile

from lab import checkpoint
from lab.errors import UserError

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_refused


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def hostile(tmp_path, good):
    """Return file contents by kind, each of which must be refused."""
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
        "one NaN": saved(
            contents | {"weights": contents["weights"] | {"head.bias": nan["head.bias"]}}
        ),
        "no such schedule": saved(contents | {"scheduler": {"beta_schedule": "odd"}}),
        "no image": saved(contents | {"image_shape": (1, 0, 0)}),
        "an odd image": saved(contents | {"image_shape": (1, 27, 27)}),
        "an image of words": saved(contents | {"image_shape": ("one", "two", "three")}),
        "weights of words": saved(contents | {"weights": {"stem.weight": "heavy"}}),
    }


def test_hostile_checkpoints_are_refused_without_running_them(tiny_checkpoint, tmp_path):
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
def test_the_script_refuses_them_in_one_line(run_here, tiny_checkpoint, tmp_path, kind):
    _, kinds = hostile(tmp_path, tiny_checkpoint)
    (tmp_path / "bad.pt").write_bytes(kinds[kind])
    assert_refused(run_here("infer.py", "--ckpt", "bad.pt"), "bad.pt")


SHIPPED = {  # prediction type, number of classes, number of steps of a student
    "mnist-v": ("v_prediction", 0, None),
    "mnist-eps": ("epsilon", 0, None),
    "mnist-v-labels": ("v_prediction", 10, None),
    "mnist-v-labels-1step": ("v_prediction", 10, 1),
    "mnist-v-4steps": ("v_prediction", 0, 4),
    "mnist-v-1step": ("v_prediction", 0, 1),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_checkpoints_load(name):
    _, contents = checkpoint.load_model(ROOT / "checkpoints" / f"{name}.pt")
    steps = len(contents["timesteps"]) if "timesteps" in contents else None
    prediction_type = contents["scheduler"]["prediction_type"]
    assert (prediction_type, len(contents.get("classes", [])), steps) == SHIPPED[name]


def test_the_shipped_files_are_small():
    names = [*SHIPPED, "lenet-mnist"]
    sizes = [(ROOT / "checkpoints" / f"{name}.pt").stat().st_size for name in names]
    assert max(sizes) <= 6e6 and sum(sizes) <= 24e6


def test_the_checkpoint_says_what_the_network_predicts(tiny_checkpoint):
    _, contents = checkpoint.load_model(tiny_checkpoint)
    assert contents["scheduler"]["prediction_type"] == "v_prediction"


def test_what_the_file_leaves_out_is_filled_in(tiny_checkpoint, tmp_path):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    few = {"beta_schedule": "cosine", "num_train_timesteps": 100}
    changes = {"scheduler": few, "timesteps": torch.tensor([9, 3]), "teacher": {}}
    torch.save(contents | changes, tmp_path / "x.pt")
    _, loaded = checkpoint.load_model(tmp_path / "x.pt")
    assert loaded["scheduler"]["prediction_type"] == "epsilon"  # diffusers' default
    assert loaded["timesteps"] == [9, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_load_as_float32(tiny_checkpoint, tmp_path, dtype):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    weights = {name: w.to(dtype) for name, w in contents["weights"].items()}
    torch.save(contents | {"weights": weights}, tmp_path / "x.pt")
    unet, _ = checkpoint.load_model(tmp_path / "x.pt")
    assert all(torch.equal(w, weights[name].float()) for name, w in unet.state_dict().items())


def test_the_reason_of_a_refusal_is_whole(tiny_checkpoint, tmp_path):
    contents = torch.load(tiny_checkpoint, weights_only=True)
    del contents["weights"]["head.bias"]
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: .head\.bias"):
        checkpoint.load_model(tmp_path / "x.pt")
