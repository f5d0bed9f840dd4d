"""Clients trained again from a run folder: the bits that they sent in the run."""

import pytest
import torch
from noted import noted

from fedsparse import run
from fedsparse.core.folder import CHECKPOINTS, PREVIOUS, TRAJECTORY
from fedsparse.landscape.replay import load, local_row

SMALL = ["model=mlp", "model.hidden=8", "mask_rule=random", "logger=csv", "pictures=false", "calibration.cache=null"]
SMALL += ["federation.rounds=3", "federation.cohort=1", "calibration.head_steps=2", "federation.num_clients=6"]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Run, and note what each client ended each round with -> the folder, and {(round, client): values (n,)}."""

    def go(*options):
        with noted(monkeypatch) as values:
            run([*SMALL, *options, f"hydra.run.dir={tmp_path / 'run'}"])
        return tmp_path / "run", values

    return go


@pytest.mark.parametrize(
    "options",
    [[], ["objective=fedprox"], ["objective=scaffold", "mask_rule=dense"], ["mask.owner=client"],
     ["objective=scaffold", "federation.store=file"],
     ["model.local=[head.*]"], ["exchange=topk", "mask_rule=dense"], ["trainer.precision=bf16-mixed"],
     ["trainer.precision=16-mixed"], ["trainer.precision=64-true"]],
    ids=["masked", "fedprox", "scaffold", "own masks", "stored in files", "local", "topk", "bf16", "half", "double"],
)  # fmt: skip
def test_a_client_of_the_last_round_has_the_bits_that_it_had(recorded, options):
    folder, values = recorded(*options)
    models = load(folder)
    assert models.round == 3
    network = models.assembly.problem.net
    assert torch.equal(models.assembly.problem.space.read(network), models.global_row)
    taking_part = [client for number, client in values if number == 2]
    assert taking_part
    for client in taking_part:
        row = local_row(models, client)
        assert torch.equal(row[models.mask], values[2, client])
        assert torch.equal(row[~models.mask], models.global_row[~models.mask])
    (idle, *_) = set(range(6)) - set(taking_part)
    assert not torch.equal(local_row(models, idle), models.global_row)
    assert torch.equal(models.assembly.problem.space.read(network), models.global_row)  # which no replay has changed


def test_a_client_of_a_cohort_is_trained_again_alone_to_rounding(recorded):
    folder, values = recorded("federation.cohort=3")
    models = load(folder)
    taking_part = [client for number, client in values if number == 2]
    assert len(taking_part) >= 3
    for client in taking_part:
        torch.testing.assert_close(local_row(models, client)[models.mask], values[2, client], rtol=1e-4, atol=1e-6)


def test_the_mean_of_the_local_changes_is_the_step_of_the_global_model(recorded):
    folder, _ = recorded("trajectory=global")
    models, before = load(folder), load(folder, round=2)
    chosen = models.assembly.course.phased.sample(2)
    weight = torch.tensor([len(models.assembly.problem.parts[client]) for client in chosen], dtype=torch.float64)
    changes = torch.stack([(local_row(models, client) - before.global_row).double() for client in chosen])
    step = (weight.unsqueeze(1) * changes).sum(0) / weight.sum()
    torch.testing.assert_close(before.global_row + step.float(), models.global_row, rtol=0, atol=1e-7)


@pytest.mark.parametrize("owner", ["global", "client"])
def test_of_an_earlier_round_by_the_trajectory(recorded, owner):
    folder, values = recorded("trajectory=global", f"mask.owner={owner}")
    (folder / CHECKPOINTS / PREVIOUS).unlink()
    for number in (1, 2, 3):
        models = load(folder, round=number)
        for client in [client for closed, client in values if closed == number - 1]:
            assert torch.equal(local_row(models, client)[models.mask], values[number - 1, client])


def test_an_exploration_ends_without_models_of_its_clients(recorded):
    folder, values = recorded("trajectory=global", "mask_rule=autoflip", "explore.steps=2")
    assert load(folder).round == 4
    with pytest.raises(ValueError, match=r"clients explore in round 1, and end it without a model; take a later round"):
        local_row(load(folder, round=1), 0)
    client = next(client for number, client in values if number == 2)
    assert torch.equal(local_row(load(folder), client)[load(folder).mask], values[2, client])


def test_a_run_that_stopped_early_has_the_rounds_that_it_closed(recorded):
    stop = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=1e-6"]
    folder, values = recorded(*stop, "federation.rounds=9", "trajectory=global")
    models = load(folder)
    assert 1 < models.round < 9
    client = next(client for number, client in values if number == models.round - 1)
    assert torch.equal(local_row(models, client)[models.mask], values[models.round - 1, client])


def test_what_cannot_be_trained_again_is_refused_in_a_line(recorded):
    folder, _ = recorded("objective=scaffold", "mask_rule=dense", "trajectory=global")
    models = load(folder)
    with pytest.raises(ValueError, match=r"client:9 is none of the 6 clients, 0 to 5"):
        local_row(models, 9)
    with pytest.raises(
        ValueError, match=r"cannot be trained again in round 2: objective=scaffold .* trajectory.clients=\[0\]"
    ):
        local_row(load(folder, round=2), 0)
    (folder / TRAJECTORY).unlink()
    with pytest.raises(ValueError, match=r"keeps no global model after 1 rounds; a run with trajectory=global"):
        load(folder, round=1)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"holds no finished run"):
        load(folder)


@pytest.mark.parametrize(
    "options",
    [["objective=scaffold", "mask_rule=dense"], ["model.local=[head.*]"], ["exchange=topk", "mask_rule=dense"]],
    ids=["scaffold", "local", "topk"],
)
def test_clients_that_were_kept_have_their_bits_in_every_round(recorded, options):
    """Of top-k what was kept is the client's model, of which it sent a part."""
    every = ["federation.clients_per_round=1.0", "trajectory=global", "trajectory.clients=[0,1,2]"]
    folder, values = recorded(*options, *every)
    (folder / CHECKPOINTS / PREVIOUS).unlink()
    chosen = [(number, client) for number, client in values if client in (0, 1, 2)]
    assert {number for number, _ in chosen} == {0, 1, 2}
    for number, client in chosen:
        models = load(folder, round=number + 1)
        row = local_row(models, client)
        assert torch.equal(row[models.mask], values[number, client])
        assert torch.equal(row[~models.mask], models.global_row[~models.mask])
