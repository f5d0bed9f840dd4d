"""Which checkpoint is resumed from: whole, of this model, and the newest of those."""

from __future__ import annotations

import pytest
import torch

from fedsparse.core.folder import LAST, PREVIOUS
from fedsparse.core.space import ParamSpace
from fedsparse.simulation.checkpoint import choose_checkpoint, read_checkpoint

SPACE = ParamSpace(["a.weight", "a.bias"], [torch.Size([2, 3]), torch.Size([2])])
WHOLE = {"net.a.weight": torch.ones(2, 3), "net.a.bias": torch.zeros(2)}


def save(path, state):
    torch.save({"state_dict": state, "epoch": 7}, path)
    return path


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"net.a.weight": torch.ones(2, 3)}, r"is of another model: a\.bias differ$"),
        (WHOLE | {"net.a.weight": torch.ones(3, 2)}, r"is of another model: a\.weight differ$"),
        ({}, r"is of another model: a\.weight, a\.bias differ$"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_names_that_differ(tmp_path, state, named):
    with pytest.raises(ValueError, match=named):
        read_checkpoint(save(tmp_path / LAST, state), SPACE)


def test_what_the_model_has_beside_the_space_is_not_compared(tmp_path):
    found = read_checkpoint(save(tmp_path / LAST, WHOLE | {"net.b": torch.ones(9)}), SPACE)
    assert (found["epoch"], sorted(found["state_dict"])) == (7, ["net.a.bias", "net.a.weight", "net.b"])


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    assert choose_checkpoint(tmp_path, SPACE) == (None, [])
    save(tmp_path / PREVIOUS, WHOLE)
    assert choose_checkpoint(tmp_path, SPACE) == (tmp_path / PREVIOUS, [])
    save(tmp_path / LAST, WHOLE)
    assert choose_checkpoint(tmp_path, SPACE) == (tmp_path / LAST, [])
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:200])
    path, (complaint,) = choose_checkpoint(tmp_path, SPACE)
    assert path == tmp_path / PREVIOUS
    assert complaint.startswith(f"the checkpoint {tmp_path / LAST} is damaged (")
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged .*is damaged .*no whole checkpoint is left to resume from"):
        choose_checkpoint(tmp_path, SPACE)


def test_it_holds_nothing_of_the_clients_that_train_together(run_in):
    """A float32 model of 4810 numbers, and a mask of bytes; rows or momentum of five clients would be as much each."""
    options = ["mask_rule=dense", "federation.rounds=1", "federation.cohort=5", "pictures=false"]
    _, folder = run_in("run", *options)
    assert (folder / "checkpoints" / LAST).stat().st_size < 2 * 4 * 4810
