"""Adapters merged into frozen weights, against dense products of what the clients computed."""

from __future__ import annotations

import csv

import pytest
import torch
from composed import composed
from noted import noted
from safetensors.torch import load_file

from fedsparse import run
from fedsparse.job.assemble import assemble
from fedsparse.landscape.options import Options
from fedsparse.landscape.replay import load, local_row
from fedsparse.landscape.scale import scaled
from fedsparse.landscape.scene import Scene
from fedsparse.models.vision import vit_digits
from fedsparse.simulation.checkpoint import read_checkpoint

CLIENTS, SCALE = 3, 2.0
FAST = ["model=vit_digits", "logger=csv", "pictures=false", "federation.num_clients=3", "optimizer.lr=0.3"]
FAST += ["federation.clients_per_round=1.0", "federation.local_steps=3", "calibration.head_steps=1"]
FAST += ["partition=dirichlet01", "federation.cohort=1", "lora.dropout=0.0"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Run, and note what each client ended each round with -> the folder, and {(round, client): values (n,)}."""

    def go(*options):
        with noted(monkeypatch) as values:
            run([*FAST, *options, f"hydra.run.dir={tmp_path / 'run'}"])
        return tmp_path / "run", values

    return go


def products(folder, values, number=0):
    """Mean update of every layer, and the update of the mean factors, in float64."""
    problem = load(folder).assembly.problem
    sizes = torch.tensor([len(part) for part in problem.parts], dtype=torch.float64)
    shares = sizes / sizes.sum()
    clients = [problem.space.unflatten(values[number, client].double()) for client in range(CLIENTS)]
    middle = {name: sum(w * c[name] for w, c in zip(shares, clients, strict=True)) for name in clients[0]}

    def dense(tensors, layer):
        return SCALE * tensors[f"{layer}.lora_B.default.weight"] @ tensors[f"{layer}.lora_A.default.weight"]

    layers = [name for name, _ in problem.net.named_modules() if name.endswith("qkv")]
    ideal = {layer: sum(w * dense(c, layer) for w, c in zip(shares, clients, strict=True)) for layer in layers}
    return ideal, {layer: dense(middle, layer) for layer in layers}


def merged(folder, layer):
    """What was added to a frozen weight."""
    before = vit_digits(10, 1, seed=0).get_parameter(f"{layer}.weight").detach().double()
    return load_file(folder / "model.safetensors")[f"{layer}.base_layer.weight"].double() - before


def test_flora_merges_the_mean_update_and_starts_anew(trained):
    folder, values = trained("method=flora", "federation.rounds=1")
    tensors = load_file(folder / "model.safetensors")
    ideal, _ = products(folder, values)
    for layer, wanted in ideal.items():
        torch.testing.assert_close(merged(folder, layer), wanted, rtol=0, atol=1e-6)
        assert float(wanted.abs().max()) > 1e-3
        assert not bool(tensors[f"{layer}.lora_B.default.weight"].any())
        down = tensors[f"{layer}.lora_A.default.weight"]
        bound = down.shape[1] ** -0.5
        assert 0.9 * bound < float(down.abs().max()) <= bound


def test_fedex_merges_what_the_mean_factors_lack(trained):
    folder, values = trained("method=fedex", "federation.rounds=1", "federation.local_steps=20")
    ideal, of_means = products(folder, values)
    tensors = load_file(folder / "model.safetensors")
    for layer, wanted in ideal.items():
        adapter = (
            SCALE
            * tensors[f"{layer}.lora_B.default.weight"].double()
            @ tensors[f"{layer}.lora_A.default.weight"].double()
        )
        torch.testing.assert_close(adapter, of_means[layer], rtol=0, atol=1e-6)
        torch.testing.assert_close(merged(folder, layer) + adapter, wanted, rtol=0, atol=1e-6)
        assert float((wanted - of_means[layer]).abs().max()) > 5e-6


def test_rounds_add_up(trained):
    """After two rounds of FLoRA the frozen weights hold both means: the second one began from a fresh adapter."""
    folder, values = trained("method=flora", "federation.rounds=2")
    first, second = (products(folder, values, number)[0] for number in (0, 1))
    for layer in first:
        torch.testing.assert_close(merged(folder, layer), first[layer] + second[layer], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_fresh_factors_differ_by_round_and_seed_alone(tmp_path):
    downs = []
    for rounds, seed in ((1, 0), (2, 0), (1, 1), (1, 0)):
        folder = tmp_path / f"{len(downs)}"
        run([*FAST, "method=flora", f"federation.rounds={rounds}", f"seed={seed}", f"hydra.run.dir={folder}"])
        downs.append(load_file(folder / "model.safetensors")["blocks.0.attn.qkv.lora_A.default.weight"])
    assert torch.equal(downs[0], downs[3])
    assert not torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])


@pytest.mark.slow  # it starts processes
@pytest.mark.parametrize("method", ["flora", pytest.param("fedex", marks=pytest.mark.soak)])
def test_resume_and_processes_change_no_bit(tmp_path, method):
    found = []
    for name, options in (("whole", []), ("two", ["trainer.devices=2"])):
        run([*FAST, f"method={method}", "federation.rounds=3", *options, f"hydra.run.dir={tmp_path / name}"])
        found.append(tmp_path / name)
    run([*FAST, f"method={method}", "federation.rounds=2", f"hydra.run.dir={tmp_path / 'part'}"])
    run([f"resume={tmp_path / 'part'}", "federation.rounds=3"])
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for folder in (tmp_path / "two", tmp_path / "part"):
        again = load_file(folder / "model.safetensors")
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert (folder / "traffic.csv").read_text() == (tmp_path / "whole" / "traffic.csv").read_text()


def down(folder):
    with (folder / "metrics.csv").open() as file:
        return [int(float(row["bytes_down"])) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_what_is_merged_travels_down_as_factors(tmp_path):
    """All clients take part in every round, so each gets the factors of the round before: of three, rank 8 each."""
    for method in ("fedit", "fedex", "flora"):
        run([*FAST, f"method={method}", "federation.rounds=3", f"hydra.run.dir={tmp_path / method}"])
    net = vit_digits(10, 1, seed=0)
    wide, high, layers = net.embed_dim, 3 * net.embed_dim, len(net.blocks)
    stacked = 4 * layers * CLIENTS * 8 * (wide + high)  # bytes of the factors of all three clients
    own = 4 * layers * 8 * (wide + high)  # of the mean adapter, which FLoRA does not send
    fedit, fedex, flora = (down(tmp_path / method) for method in ("fedit", "fedex", "flora"))
    assert fedex == [fedit[0], fedit[1] + CLIENTS * stacked, fedit[2] + 2 * CLIENTS * stacked]
    saved = [a - b for a, b in zip(fedex[1:], flora[1:], strict=True)]
    # a message with some coordinates has their positions too, which the whole row needs not
    assert CLIENTS * own * 0.95 < saved[0] <= CLIENTS * own
    assert saved[1] == pytest.approx(2 * saved[0], rel=0.01)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["lora=none"], "merging=flora merges adapters of which both factors are averaged: set lora=r8"),
        (["model.local=[*lora_B*]"], "merging=flora merges adapters of which both factors are averaged"),
        (["topology=departments", "topology.of=3"], "merging changes the one model of all clients: set topology=flat"),
        (["trajectory=global"], "trajectory=global keeps what trains, and merging changes the rest"),
        (["server=fedadam"], "set server=fedavg, with server.lr=1.0 and neither momentum nor weight decay"),
        (["server.lr=0.9"], "set server=fedavg, with server.lr=1.0"),
        (["server=fedavgm"], "set server=fedavg, with server.lr=1.0"),
        (["aggregation=median"], "alone: set aggregation=weighted_mean"),
        (["aggregation=fednova"], "alone: set aggregation=weighted_mean"),
        (["exchange=topk"], "set exchange=full or exchange=masked, with one mask for all clients"),
        (["exchange=pattern", "exchange.names=[*lora_A*]"], "set exchange=full or exchange=masked"),
        (["objective=scaffold"], "and control variates shift them: set objective=none or objective=fedprox"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, line):
    for method in ("flora", "fedex"):
        with pytest.raises(ValueError, match=line.replace("flora", method)):
            run([*FAST[:-1], f"method={method}", *options, f"hydra.run.dir={tmp_path}"])


def test_own_masks_go_where_every_round_begins_anew(tmp_path, monkeypatch):
    """What a client's mask leaves out has not moved: B is 0 there, so that the stack is exact; a mean of A is not."""
    own = ["mask.owner=client", "mask_rule=random", "exchange=masked", "federation.rounds=1"]
    with noted(monkeypatch) as values:
        run([*FAST, "method=flora", *own, f"hydra.run.dir={tmp_path / 'flora'}"])
    ideal, _ = products(tmp_path / "flora", whole_of(tmp_path / "flora", values))
    for layer, wanted in ideal.items():
        torch.testing.assert_close(merged(tmp_path / "flora", layer), wanted, rtol=0, atol=1e-6)
        assert float(wanted.abs().max()) > 1e-4
    with pytest.raises(ValueError, match="set exchange=full or exchange=masked, with one mask for all clients"):
        run([*FAST, "method=fedex", *own, f"hydra.run.dir={tmp_path / 'fedex'}"])


def whole_of(folder, values):
    """Write what trains somewhere into the row that training began with."""
    problem = assemble(composed(*FAST, "method=flora")).problem
    union = read_checkpoint(folder / "checkpoints/last.ckpt", problem.space)["state_dict"]["mask"]
    start = problem.space.read(problem.net)
    return {key: start.masked_scatter(union, row) for key, row in values.items()}


def test_what_takes_frozen_weights_as_constant_is_refused(tmp_path):
    """A client's row trained beside other frozen weights than the last ones: its loss beside these would be no loss."""
    run([*FAST, "method=flora", "federation.rounds=2", f"hydra.run.dir={tmp_path}"])
    line = "merges adapters into frozen weights after each round"
    with pytest.raises(ValueError, match=line):
        Scene.of(tmp_path, Options())
    with pytest.raises(ValueError, match=line):
        local_row(load(tmp_path), 0)
    with pytest.raises(ValueError, match=line):
        scaled(tmp_path)
