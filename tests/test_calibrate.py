"""Two stages, as the original had them: calibrate, then train with the mask of a file."""

from __future__ import annotations

import json

import pytest
import torch

from fedsparse import calibrate, run
from fedsparse.masks import Mask

FAST = ["model=mlp", "logger=csv", "federation.rounds=2", "calibration.head_steps=4", "pictures=false"]


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """Calibrate in a folder: ``calibrated("name", ...)`` -> (facts, folder)."""
    monkeypatch.chdir(tmp_path)

    def go(name, *overrides):
        return calibrate.run([*FAST, f"hydra.run.dir={tmp_path / name}", *overrides]), tmp_path / name

    return go


@pytest.fixture(scope="module")
def at_090(tmp_path_factory):
    """Facts and folder of one calibration, for tests that leave it as it is."""
    place = tmp_path_factory.mktemp("calibrated")
    options = ["sparsity=s90", f"calibration.cache={place / 'cache'}", f"hydra.run.dir={place / 'mask'}"]
    return calibrate.run([*FAST, *options]), place / "mask"


def test_the_mask_file_is_what_training_would_have_chosen(at_090, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts, folder = at_090
    whole = run([*FAST, "sparsity=s90", f"hydra.run.dir={tmp_path / 'whole'}"])
    assert (
        Mask.load(folder / "mask.safetensors").to_bytes() == Mask.load(tmp_path / "whole/mask.safetensors").to_bytes()
    )
    two = run([*FAST, "mask_rule=from_file", f"mask_rule.path={folder}/mask.safetensors", "hydra.run.dir=two"])
    assert two["global_sha256"] == whole["global_sha256"]
    assert two["sparsity"] == whole["sparsity"] == facts["sparsity"] == 0.9
    assert two["trainable_fraction"] == facts["trainable_fraction"]


def test_it_leaves_mask_picture_and_facts_and_trains_nothing(calibrated):
    facts, folder = calibrated("mask", "mask_rule=talos", "calibration.rounds=3", "pictures=true")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names - {"run.log"} == {"mask.safetensors", "mask.png", "calibration.json", "partition.png"}
    assert json.loads((folder / "calibration.json").read_text()) == {k: v for k, v in facts.items() if k != "folder"}
    assert len(facts["mask_overlap_rounds"]) == 2
    first, second = facts["mask_overlap_rounds"]
    assert 0 < first < second < 1  # each round freezes more of what trained
    assert facts["bytes_up"] == 0 < facts["bytes_setup_up"]


def test_talos_at_the_end_trains_as_many_as_any_other_rule(calibrated):
    talos, _ = calibrated("a", "mask_rule=talos", "calibration.rounds=3")
    random, _ = calibrated("b", "mask_rule=random")
    assert talos["trainable_fraction"] == random["trainable_fraction"]


def test_own_masks_are_compared(calibrated):
    facts, folder = calibrated("own", "mask.owner=client", "mask_rule=most_sensitive")
    assert 0 < facts["mask_overlap_clients"] < 1
    assert (folder / "client_masks.safetensors").is_file()


def test_another_sparsity_beside_a_file_is_refused_and_its_own_is_not(at_090, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, folder = at_090
    use = [*FAST, "mask_rule=from_file", f"mask_rule.path={folder}/mask.safetensors"]
    with pytest.raises(ValueError, match=r"has sparsity.ratio=0.9; leave out sparsity.ratio=0.5"):
        run([*use, "sparsity.ratio=0.5", "hydra.run.dir=other"])
    with pytest.raises(ValueError, match="leave out sparsity=s50"):
        run([*use, "sparsity=s50", "hydra.run.dir=another"])
    assert run([*use, "sparsity=s90", "hydra.run.dir=same"])["sparsity"] == 0.9


def test_a_folder_that_holds_a_calibration_is_not_written_over(calibrated):
    _, folder = calibrated("mask")
    before = (folder / "mask.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        calibrated("mask", "sparsity=s50")
    assert (folder / "mask.safetensors").read_bytes() == before


def test_a_second_run_takes_head_and_mask_from_the_cache_and_ends_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run([*FAST, "hydra.run.dir=a"])
    assert len(list((tmp_path / "runs/.prepared").iterdir())) == 2
    monkeypatch.setattr("fedsparse.job.prepare.prepare_head", lambda *_: pytest.fail("the head was prepared again"))
    monkeypatch.setattr("fedsparse.job.prepare.calibrate", lambda *_: pytest.fail("calibrated again"))
    second = run([*FAST, "hydra.run.dir=b", "calibration.cache=runs/.prepared"])
    assert second["global_sha256"] == first["global_sha256"]
    assert second["bytes_total"] == first["bytes_total"]


def test_a_frozen_head_is_never_sent_and_does_not_move(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_ = run([*FAST, "hydra.run.dir=a", "head.init=closed_form", "exchange=full"])
    shut = run([*FAST, "hydra.run.dir=b", "head.init=closed_form", "exchange=full", "head.frozen=true"])
    clients_rounds, head = 10 * 2, 64 * 10 + 10
    assert open_["bytes_up"] - shut["bytes_up"] == 4 * head * clients_rounds
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert not torch.equal(a["head.weight"], b["head.weight"])
    start = calibrate.run([*FAST, "hydra.run.dir=c", "head.init=closed_form", "mask_rule=random"])
    assert start["bytes_setup_up"] > 0
    with pytest.raises(ValueError, match=r"head.frozen=true leaves nothing"):
        run([*FAST, "hydra.run.dir=d", "head.frozen=true", "model.trainable=head"])
