"""What a checkpoint does not hold the model's builder makes again, to the bit; the rest is counted by the byte."""

from __future__ import annotations

import copy
import io
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedsparse import run, weights
from fedsparse.core.space import ParamSpace
from fedsparse.job.assemble import assemble_problem
from fedsparse.job.resume import read_job
from fedsparse.models.vision import vit_digits
from fedsparse.simulation.checkpoint import AtomicCheckpointIO, read_checkpoint
from fedsparse.simulation.origin import Origin, opened

FAST = ["model=mlp", "logger=csv", "pictures=false", "calibration.head_steps=2", "calibration.batches=1"]
FAST += ["federation.num_clients=4", "federation.clients_per_round=1.0", "federation.local_steps=2"]
LORA = ["model=vit_digits", "partition=dirichlet01", "lora.dropout=0.0", "federation.cohort=1", "optimizer.lr=0.3"]


class Small(nn.Module):
    """A frozen layer, two names of one weight, and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.base, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.head.weight


def small(buffers=False):
    torch.manual_seed(0)
    net = Small()
    space = ParamSpace.of(net, lambda name: not name.startswith("base"))
    return net, space, Origin.of(net, space, fitted=["base.bias"], buffers=buffers)


def state_of(net, mask):
    return {"state_dict": {f"net.{name}": t for name, t in net.state_dict().items()} | {"mask": mask}, "epoch": 3}


def reloaded(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def some(row):
    row[[1, 5, 40]] += 1.0


def signs_and_nan(row):
    row[[0, 7]] = torch.tensor([float("nan"), -0.0])


def pruned(row):
    row += 1.0
    row[torch.arange(len(row)) % 4 > 0] = 0.0
    row[2] = -0.0


def everything(row):
    row += 1.0


@pytest.mark.parametrize(
    ("change", "trains", "base"),
    [(some, 9, "built"), (signs_and_nan, 9, "built"), (pruned, 25, "zero"), (everything, 25, None), (some, 60, None)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_written_is_read_bit_by_bit(change, trains, base):
    """Against the state dict itself; the file is read into a network that has just been built."""
    net, space, origin = small()
    row = space.read(net)
    change(row)
    space.write(net, row)
    with torch.no_grad():
        net.base.bias.add_(1)  # fitted before the rounds
        net.norm.running_mean.add_(1)
        net.norm.num_batches_tracked.add_(2)
    mask = torch.arange(space.size) < trains
    stored = reloaded(origin.packed(state_of(net, mask)))
    assert stored["left_out"]["base"] == base
    assert "net.base.weight" not in stored["state_dict"]
    _, _, built = small()
    built.check(stored)
    whole = built.whole(opened(stored, space))
    assert {*whole} == {"state_dict", "epoch"}
    assert torch.equal(whole["state_dict"].pop("mask"), mask)
    own = net.state_dict()
    assert {name: bits(t) for name, t in whole["state_dict"].items()} == {f"net.{n}": bits(t) for n, t in own.items()}


def test_buffers_stay_where_they_are_frozen():
    net, space, origin = small(buffers=True)
    stored = origin.packed(state_of(net, torch.arange(space.size) < 9))
    assert {*stored["state_dict"]} == {"net.base.bias"}
    assert {*origin.whole(opened(stored, space))["state_dict"]} == {*state_of(net, None)["state_dict"]}


@pytest.mark.parametrize("name", ["base.weight", "norm.weight"])
def test_another_network_than_was_built_is_refused_by_the_names_that_differ(name):
    net, space, origin = small()
    stored = origin.packed(state_of(net, torch.arange(space.size) < 9))
    other, space, _ = small()
    with torch.no_grad():
        other.get_parameter(name).view(-1)[-1] += 1e-6
    with pytest.raises(ValueError, match=rf"other weights than this run began with \({name} differ\).*put the file of"):
        Origin.of(other, space).check(stored)


def test_where_everything_trains_only_the_frozen_rest_is_compared():
    net, space, origin = small()
    stored = origin.packed(state_of(net, torch.ones(space.size, dtype=torch.bool)))
    other, space, _ = small()
    with torch.no_grad():
        other.norm.weight.add_(1)
    Origin.of(other, space).check(stored)
    with torch.no_grad():
        other.base.weight.add_(1)
    with pytest.raises(ValueError, match=r"\(base\.weight differ\)"):
        Origin.of(other, space).check(stored)


def test_bits_and_values_that_do_not_fit_are_damage(tmp_path):
    net, space, origin = small()
    stored = origin.packed(state_of(net, torch.arange(space.size) < 9))
    stored["left_out"]["values"] = torch.zeros(7)
    torch.save(stored, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged \(its values are not as many as its bits say\)"):
        read_checkpoint(tmp_path / "last.ckpt", space)


# whole runs


def held(folder):
    """Tensors of the last checkpoint's network and masks, without optimizer and ledger."""
    stored = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    left = stored["left_out"]
    row = {key: left[key] for key in ("differs", "values") if key in left}
    return stored["state_dict"] | {"mask": left["mask"]} | row


def length(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_a_masked_run_stores_what_has_changed_and_two_bits_a_coordinate(run_in):
    _, folder = run_in("run", *FAST, "federation.rounds=2", fast=False)
    before = assemble_problem(read_job(folder).cfg).net.state_dict()
    after = load_file(folder / "model.safetensors")
    changed = sum(int(np.count_nonzero(before[name].numpy() != after[name].numpy())) for name in after)
    total = sum(tensor.numel() for tensor in after.values())
    assert 0 < changed < total / 2
    assert length(held(folder)) == 4 * changed + 2 * -(-total // 8)


@pytest.mark.parametrize("options", [["mask_rule=dense"], ["mask_rule=dense", "model.trainable=head"]])
def test_where_everything_trains_that_is_stored_and_a_bit_a_coordinate(run_in, options):
    _, folder = run_in("run", *FAST, *options, "federation.rounds=1", fast=False)
    total = assemble_problem(read_job(folder).cfg).space.size
    assert length(held(folder)) == 4 * total + -(-total // 8)
    whole = weights(folder)
    after = load_file(folder / "model.safetensors")
    assert {name: bits(t) for name, t in whole.items()} == {name: bits(t) for name, t in after.items()}


RUNS = {
    "default": [],
    "prune": ["sparsity.mode=prune", "sparsity.ratio=0.8", "mask_rule=random"],
    "moving masks": ["mask_rule=random", "sparsity=gradual80", "sparsity.schedule.steps=2"],
    "own masks": ["mask.owner=client"],
    "head alone": ["model.trainable=head"],
    "frozen head": ["head.frozen=true", "head.init=closed_form"],
    "batch norm": ["model=resnet_small", "federation.cohort=1", "model.trainable=head"],
    "frozen batch norm": ["model=resnet_small", "federation.cohort=1", "federation.buffers=frozen", "mask_rule=random"],
    "departments": ["topology=departments", "topology.of=2"],
}
ADAPTED = {name: [*LORA, f"method={name}"] for name in ("fedit", "fedex", "flora")}
QUICK = ("default", "frozen head")
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS | ADAPTED if name not in QUICK]


def same_end(one, two):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert {name for name in first if bits(first[name]) != bits(second[name])} == set()


@pytest.mark.parametrize("name", [*QUICK, *LONG])
def test_a_resume_comes_to_the_same_bits_from_files_of_now_and_of_before(run_in, name):
    options = [*FAST, *(RUNS | ADAPTED)[name]]
    _, whole = run_in("whole", *options, "federation.rounds=4", fast=False)
    _, part = run_in("part", *options, "federation.rounds=2", fast=False)
    end, stored = load_file(part / "model.safetensors"), weights(part)
    assert {name: bits(t) for name, t in stored.items()} == {name: bits(t) for name, t in end.items()}
    old = as_before(part, stored)
    for folder in (part, old):
        run([f"resume={folder}", "federation.rounds=4"])
        same_end(whole, folder)
    again = torch.load(old / "checkpoints/last.ckpt", weights_only=True)
    assert "left_out" in again
    assert {n: bits(t) for n, t in weights(old).items()} == {n: bits(t) for n, t in weights(whole).items()}


def as_before(folder, state):
    """A copy of a run folder as it was written before: a checkpoint has all of the network, merged weights too."""
    old = folder.with_name("old")
    shutil.copytree(folder, old)
    for name in ("last.ckpt", "last.previous.ckpt"):
        (old / "checkpoints" / name).unlink()
    checkpoint = read_checkpoint(folder / "checkpoints/last.ckpt", assemble_problem(read_job(folder).cfg).space)
    checkpoint["state_dict"] |= {f"net.{name}": tensor for name, tensor in state.items()}
    rounds = checkpoint["callbacks"]["FederatedRounds"]
    if rounds["merging"] is not None:
        del rounds["merging"]["layers"]
    del checkpoint["left_out"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, old / "checkpoints/last.ckpt")
    return old


def test_a_resume_beside_another_file_of_weights_is_refused(run_in, tmp_path):
    """One number of one frozen tensor is another, in a file that was put in the old one's place."""
    file, net = tmp_path / "m.safetensors", vit_digits(pretrained=False, seed=5)
    save_file(net.state_dict(), file)
    options = [*FAST, "model=vit_digits", f"model.checkpoint={file}", "model.trainable=head", "federation.rounds=1"]
    _, folder = run_in("run", *options, fast=False)
    other = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other["blocks.1.mlp.fc1.weight"][3, 4] += 1e-3
    save_file(other, file)
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()}
    line = r"other weights than this run began with \(blocks\.1\.mlp\.fc1\.weight differ\)"
    with pytest.raises(ValueError, match=line):
        run([f"resume={folder}", "federation.rounds=2"])
    with pytest.raises(ValueError, match=line):
        weights(folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()} == before
    save_file(net.state_dict(), file)
    run([f"resume={folder}", "federation.rounds=2"])


def test_a_checkpoint_is_chosen_by_name(run_in):
    _, folder = run_in("run", *FAST, "federation.rounds=3", fast=False)
    _, short = run_in("short", *FAST, "federation.rounds=2", fast=False)
    last, previous, two = weights(folder), weights(folder, "previous"), load_file(short / "model.safetensors")
    assert all(torch.equal(previous[name], two[name]) for name in two)
    assert not all(torch.equal(last[name], two[name]) for name in two)
    with pytest.raises(ValueError, match="^checkpoint"):
        weights(folder, "first")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"holds no checkpoints/best\.ckpt"):
        weights(folder, "best")


def test_a_file_that_leaves_something_out_is_not_taken_for_a_whole_one(run_in):
    _, folder = run_in("run", *FAST, "federation.rounds=1", fast=False)
    with pytest.raises(ValueError, match=r"load it by fedsparse\.weights"):
        AtomicCheckpointIO().load_checkpoint(folder / "checkpoints/last.ckpt")


def test_a_packed_checkpoint_leaves_the_given_one_as_it_was():
    net, space, origin = small()
    whole = state_of(net, torch.arange(space.size) < 9)
    before = copy.deepcopy(whole)
    origin.packed(whole)
    assert whole.keys() == before.keys()
    assert all(torch.equal(whole["state_dict"][name], t) for name, t in before["state_dict"].items())
