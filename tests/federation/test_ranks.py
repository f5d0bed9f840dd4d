"""Clients with adapters of different ranks: against PEFT at each rank alone, dense products, and bytes by hand."""

from __future__ import annotations

import pytest
import torch
from composed import composed
from noted import noted
from plain import replay
from safetensors.torch import load_file
from small import Small, small_data, small_net, uneven_parts
from torch.nn import functional as F

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.ranks import rank_masks, ranks_of_clients
from fedsparse.federation.server import Departments, GlobalMixing
from fedsparse.federation.server.mixing import RankedMixing
from fedsparse.job.assemble import assemble
from fedsparse.landscape.replay import load
from fedsparse.masks.bitmaps import pack, unpack
from fedsparse.models.lora import Adapter, adapters, lora
from fedsparse.models.vision import vit_digits

RANKS = (2, 3)
A, B = "1.lora_A.default.weight", "1.lora_B.default.weight"


def adapted(r, alpha, seed=0):
    return lora(small_net(seed=seed), r=r, alpha=alpha, dropout=0.0, targets=["1"])


def space_of(net):
    return ParamSpace.of(net, lambda name: "lora" in name)


def by_peft(small, rounds):
    """Each of two clients alone, on a network of its own rank: A and B after so many rounds."""
    found, wide = [], adapted(3, 6)
    for client, rank in enumerate(RANKS):
        net = adapted(rank, 2 * rank)  # the scale is 2 for both
        net.get_parameter(A).data.copy_(wide.get_parameter(A).data[:rank])
        factors, x, y = [net.get_parameter(A), net.get_parameter(B)], small.dataset.train.x, small.dataset.train.y
        for number, clients in enumerate(replay(small.plan, rounds)):
            optimizer = torch.optim.SGD(factors, lr=small.lr, momentum=small.momentum)
            for batch in clients[list(small.plan.sample(number)).index(client)][0]:
                optimizer.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
        found.append([factor.detach() for factor in factors])
    return found


@pytest.mark.parametrize("cohort", [1, 2])
def test_a_department_of_a_smaller_rank_trains_as_peft_at_that_rank(tmp_path, cohort):
    net = adapted(3, 6)
    small = Small(net, small_data(), uneven_parts(clients=2), count=2, cohort=cohort, space=space_of(net))
    masks = rank_masks(adapters(net), small.space, RANKS)
    start = small.row
    small.module.set_mask(masks.any(0), torch.stack([pack(mask) for mask in masks]))
    small.given["exchange"] = Exchange(masks.any(0), small.space.local, small.module.own_masks)
    small.given["topology"] = Departments([0, 1], 2)
    expected = by_peft(small, 3)
    rows = small.fit(3, tmp_path).federation.server.rows
    for row, (a, b), rank in zip(rows, expected, RANKS, strict=True):
        tensors = small.space.unflatten(row)
        torch.testing.assert_close(tensors[A][:rank], a, rtol=0, atol=1e-12)
        torch.testing.assert_close(tensors[B][:, :rank], b, rtol=0, atol=1e-12)
        assert not bool(tensors[B][:, rank:].any())
        assert torch.equal(tensors[A][rank:], small.space.unflatten(start)[A][rank:])
        assert bool(tensors[B].any())


def test_masks_by_hand():
    space = ParamSpace(["q.A", "q.B", "head"], [torch.Size([2, 3]), torch.Size([2, 2]), torch.Size([1])])
    found = rank_masks({"q": Adapter("q.A", "q.B", 1.0)}, space, [1, 2])
    assert found.int().tolist() == [[1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1], [1] * 11]
    mixed = RankedMixing(GlobalMixing(1.0), found)(torch.stack([torch.zeros(11), torch.ones(11)]), 0).rows
    assert mixed.tolist() == [[0.5, 0.5, 0.5, 0, 0, 0, 0.5, 0, 0.5, 0, 0.5], [0.5] * 11]


FAST = ["model=vit_digits", "logger=csv", "pictures=false", "federation.num_clients=3", "optimizer.lr=0.3"]
FAST += ["federation.clients_per_round=1.0", "federation.local_steps=3", "calibration.head_steps=1"]
FAST += ["lora.dropout=0.0", "lora.ranks=[1,4,2]", "exchange=masked"]
SCALE = 16 / 4  # alpha over the largest rank


def traffic(folder):
    lines = [line.split(",") for line in (folder / "traffic.csv").read_text().splitlines()]
    return lines[0], lines[1:]


@pytest.mark.parametrize("cohort", [1, 3])
def test_flora_merges_the_mean_update_of_all_ranks(tmp_path, monkeypatch, cohort):
    with noted(monkeypatch) as values:
        run([*FAST, "method=flora", "federation.rounds=2", f"federation.cohort={cohort}", f"hydra.run.dir={tmp_path}"])
    problem = load(tmp_path).assembly.problem
    sizes = torch.tensor([len(part) for part in problem.parts], dtype=torch.float64)
    before, after = vit_digits(10, 1, seed=0), load_file(tmp_path / "model.safetensors")
    layers = [name for name, _ in problem.net.named_modules() if name.endswith("qkv")]
    for layer in layers:
        wanted = before.get_parameter(f"{layer}.weight").detach().double()
        for (_, client), row in values.items():
            tensors, rank = problem.space.unflatten(row.double()), (1, 4, 2)[client]
            up = tensors[f"{layer}.lora_B.default.weight"]
            assert not bool(up[:, rank:].any())
            assert bool(up[:, :rank].any(0).all())
            product = up[:, :rank] @ tensors[f"{layer}.lora_A.default.weight"][:rank]
            wanted = wanted + SCALE * sizes[client] / sizes.sum() * product
        torch.testing.assert_close(after[f"{layer}.base_layer.weight"].double(), wanted, rtol=0, atol=2e-6)


def test_bytes_are_those_of_each_rank(tmp_path):
    """A client of rank r sends r (in + out) values of each layer, and the head; down come all of them, and the head."""
    run([*FAST, "method=flora", "federation.rounds=2", f"hydra.run.dir={tmp_path}"])
    net = vit_digits(10, 1, seed=0)
    wide, layers, head = net.embed_dim, len(net.blocks), sum(p.numel() for p in net.head.parameters())
    names, rows = traffic(tmp_path)
    sent = {(row[names.index("client")], int(row[names.index("up_values")])) for row in rows}
    assert sent == {(f"{client}", 4 * (layers * rank * 4 * wide + head)) for client, rank in enumerate((1, 4, 2))}
    received = [int(row[names.index("down_values")]) for row in rows if row[0] == "2"]
    assert received == [4 * (layers * (1 + 4 + 2) * 4 * wide + head)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["local", "fedsa"])
def test_what_keeps_b_goes_with_ranks_and_a_resume_changes_no_bit(tmp_path, method):
    whole = run([*FAST, f"method={method}", "federation.rounds=3", f"hydra.run.dir={tmp_path / 'whole'}"])
    run([*FAST, f"method={method}", "federation.rounds=1", f"hydra.run.dir={tmp_path / 'part'}"])
    again = run([f"resume={tmp_path / 'part'}", "federation.rounds=3"])
    for key in ("global_sha256", "personal/acc_mean", "bytes_up"):
        assert again[key] == whole[key]
    masks = unpack(load_file(tmp_path / "whole" / "client_masks.safetensors")["bitmaps"], 10**9)
    assert len({int(mask.sum()) for mask in masks}) == 3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["method=fedit"],
            "lora.ranks and method=fedit, or another that averages B, would give a client columns",
        ),
        (["method=ffa"], "set method=flora, fedsa or local, or topology=departments, each with one rank"),
        (["method=fedex"], "set exchange=full or exchange=masked, with one mask for all clients"),
        (
            ["method=flora", "lora.ranks=[1,2]"],
            "lora.ranks lists 2 ranks, and there are 3 clients, as there",
        ),
        (["method=fedit", "topology=departments", "topology.of=2"], "lists 3 ranks, and there are 2 departments"),
        (["method=flora", "lora.ranks=[1,0,2]"], "lora.ranks is 0; it must be a whole number of 1 or more"),
        (["method=flora", "lora.ranks=4"], "lora.ranks is 4; it must be null or a list of ranks"),
        (["method=flora", "lora.ranks=[1,2,999]"], "lora.r is 999; it must be a whole number from 1 to"),
        (["method=flora", "mask.owner=client"], "lora.ranks say what each client trains: set mask.owner=global"),
        (["method=flora", "exchange=full"], "mask.owner=client and lora.ranks need exchange=masked"),
        (["method=flora", "sparsity.mode=prune"], "needs mask.owner=global and lora.ranks=null"),
    ],
)
def test_ranks_that_cannot_be_are_refused(tmp_path, options, line):
    with pytest.raises(ValueError, match=line):
        run([*FAST, *options, f"hydra.run.dir={tmp_path}"])


def test_departments_each_have_a_rank():
    assert ranks_of_clients([8, 4], [0, 1, 1], named=True) == (8, 4, 4)
    assert ranks_of_clients([4, 4], [0, 1, 1], named=True) == ()


def test_departments_of_one_rank_each_may_average_b_and_mix():
    typed = [option for option in FAST if not option.startswith(("lora.ranks", "federation.num_clients"))]
    typed += ["federation.num_clients=4", "topology=departments", "topology.of=[0,0,1,1]", "lora.ranks=[2,4]"]
    method = assemble(composed(*typed, "method=fedit", "exchange=masked", "mixing=clusters")).method
    assert method.ranks == (2, 2, 4, 4)
    assert isinstance(method.mixing, RankedMixing)
    assert bool((method.mixing.marks[0] < method.mixing.marks[1]).any())
    assert bool(method.mixing.marks[1].all())
