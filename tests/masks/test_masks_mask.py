"""The mask as a file, a message and a row."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Mask

NAMES = ["token", *(f"blocks.{i}.fc.{leaf}" for i in range(12) for leaf in ("weight", "bias")), "head.bias"]
SPACE = ParamSpace(NAMES, [torch.Size([1, 3]), *[torch.Size([2, 3]), torch.Size([2])] * 12, torch.Size([4])])


def random_row(seed):
    return torch.from_numpy(np.random.default_rng([seed]).random(SPACE.size) < 0.3)


def test_a_row_comes_back_and_the_mask_is_a_copy():
    row = random_row(0)
    expected = row.clone()
    mask = Mask.of(SPACE, row, rule="Random")
    row[:] = True
    assert torch.equal(mask.row(SPACE), expected)
    assert mask.metadata == {"rule": "Random"}


def test_density_and_layers_by_hand():
    mask = Mask(
        {
            "b.weight": torch.tensor([[True, False], [False, False]]),
            "b.bias": torch.tensor([True, True]),
            "a.x.weight": torch.tensor([False]),
            "token": torch.tensor([True]),
        }
    )
    assert mask.density == 4 / 8
    assert list(mask.by_layer().items()) == [("b", 3 / 6), ("a.x", 0.0), ("token", 1.0)]


def test_overlap_by_hand():
    a = Mask({"w": torch.tensor([True, True, False, False]), "v": torch.tensor([True])})
    b = Mask({"w": torch.tensor([False, True, True, False]), "v": torch.tensor([True])})
    none = Mask({"w": torch.zeros(4, dtype=torch.bool), "v": torch.tensor([False])})
    assert a.overlap(b) == 2 / 4
    assert (a.overlap(a), a.overlap(none), none.overlap(none)) == (1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="missing v"):
        Mask({"w": torch.zeros(4, dtype=torch.bool)}).overlap(a)
    with pytest.raises(ValueError, match="of another shape w"):
        Mask({"w": torch.zeros(2, dtype=torch.bool), "v": torch.tensor([False])}).overlap(a)


def test_a_file_keeps_tensors_metadata_and_the_order_of_the_network(tmp_path):
    mask = Mask.of(SPACE, random_row(1), rule="Random", ratio="0.7")
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(str(tmp_path / "mask.safetensors"))
    assert torch.equal(loaded.row(SPACE), mask.row(SPACE))
    assert loaded.metadata == {"rule": "Random", "ratio": "0.7"}
    assert list(loaded.by_layer().items()) == list(mask.by_layer().items())
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]
    plain = safetensors.torch.load_file(tmp_path / "mask.safetensors")
    assert set(plain) == set(NAMES)
    assert all(tensor.dtype == torch.bool for tensor in plain.values())


@pytest.mark.parametrize("metadata", [None, {"order": "["}, {"order": '["x"]'}, {"order": "[1, 2]"}, {"order": "3"}])
def test_a_mask_made_by_others_loads(tmp_path, metadata):
    tensors = {"a.weight": torch.tensor([[True], [False]]), "s": torch.tensor(True)}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", metadata)
    assert {n: t.tolist() for n, t in Mask.load(tmp_path / "m.safetensors").tensors.items()} == {
        "a.weight": [[True], [False]],
        "s": True,
    }


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    target = tmp_path / "mask.safetensors"
    Mask.of(SPACE, random_row(2)).save(target)
    before = target.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Mask.of(SPACE, random_row(3)).save(target)
    assert target.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_older_file_is_replaced_whole_and_never_rewritten(tmp_path):
    target = tmp_path / "mask.safetensors"
    Mask.of(SPACE, random_row(2)).save(target)
    before = target.read_bytes()
    with target.open("rb") as reader:  # still the old file, as a kill in the middle of the write would leave it
        Mask.of(SPACE, random_row(3)).save(target)
        assert reader.read() == before
    assert target.read_bytes() != before


def assert_refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        Mask.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_masks_are_refused_in_one_line(tmp_path):
    path = tmp_path / "mask.safetensors"
    assert_refused(path, "no mask file at")
    assert_refused(tmp_path, "no mask file at")
    Mask.of(SPACE, random_row(4)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"abc", whole[:-3], whole[:40], whole[20:], pickle.dumps({"w": 1})):
        path.write_bytes(damaged)
        assert_refused(path, "damaged")
    path.write_bytes(whole[:-1] + b"\x07")
    assert_refused(path, "must hold bool tensors")
    safetensors.torch.save_file({f"w{i}": torch.zeros(2) for i in range(6)}, path)
    assert_refused(path, r"not w0, w1, w2, w3 and 2 more")


def test_a_mask_holds_bool_tensors_only():
    with pytest.raises(ValueError, match="not bool: w"):
        Mask({"w": torch.ones(3)})


def test_a_mask_of_another_model_names_what_differs():
    other = ParamSpace(["token", "blocks.0.fc.weight", "new"], [torch.Size(s) for s in ([1, 3], [3, 3], [1])])
    with pytest.raises(ValueError, match="made for another model") as caught:
        Mask.of(SPACE, random_row(5)).row(other)
    text = str(caught.value)
    assert "missing new;" in text
    assert "extra blocks.0.fc.bias, blocks.1.fc.weight, blocks.1.fc.bias, blocks.2.fc.weight and 20 more" in text
    assert "of another shape blocks.0.fc.weight (mask (2, 3), model (3, 3))" in text
    assert "\n" not in text


def test_the_order_of_the_tensors_does_not_matter_to_a_row():
    mask = Mask.of(SPACE, random_row(6))
    shuffled = Mask(dict(reversed(mask.tensors.items())))
    assert torch.equal(shuffled.row(SPACE), mask.row(SPACE))


def test_the_message_is_a_bitmap_of_eight_coordinates_a_byte():
    bits = [True, False, False, False, False, False, False, True, True]
    mask = Mask({"w": torch.tensor(bits[:6]).view(2, 3), "v": torch.tensor(bits[6:])})
    assert mask.to_bytes() == bytes([0b10000001, 0b10000000])
    assert len(Mask.of(SPACE, random_row(7)).to_bytes()) == -(-SPACE.size // 8)
