"""Adapters: what PEFT computes with the same factors, what trains and travels, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedsparse import run
from fedsparse.export import export
from fedsparse.export import load as load_export
from fedsparse.federation.trajectory import read_row
from fedsparse.models.lora import lora
from fedsparse.models.vision import vit_digits

peft = pytest.importorskip("peft", reason="peft is in the extra lora")

IN, OUT = 64, 192  # of the qkv layers of vit_digits
FAST = ["logger=csv", "pictures=false", "federation.rounds=1", "federation.num_clients=4", "calibration.cache=null"]
FAST += ["federation.clients_per_round=2", "federation.local_steps=2", "calibration.head_steps=1"]
FEEDBACK = ["exchange.feedback=1.0", "aggregation=coordinate_mean", "aggregation.denominator=participants"]
VIT = ["model=vit_digits", "lora=r8", "lora.targets=[qkv]"]


def adapted(**options):
    net = vit_digits(10, 1, seed=0) if "net" not in options else options.pop("net")
    return lora(net, **{"targets": ["qkv"], "head": "head.*", **options})


def inputs(count=3):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_at_the_start_the_model_is_the_base():
    net, base = adapted().eval(), vit_digits(10, 1, seed=0).eval()
    torch.testing.assert_close(net(inputs()), base(inputs()), rtol=0, atol=0)


def test_what_trains_are_factors_and_head():
    net = adapted(r=4)
    trains = {name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad}
    blocks = len(net.blocks)
    factors = {name: shape for name, shape in trains.items() if "lora" in name}
    assert sorted(factors.values()) == sorted([(4, net.embed_dim), (3 * net.embed_dim, 4)] * blocks)
    assert set(trains) - set(factors) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3 / 2), (True, 3 / 2**0.5)])
def test_a_layer_adds_the_scaled_product(rslora, scale):
    net = nn.Sequential()
    net.q = nn.Linear(5, 7)
    weight, x = net.q.weight.detach().clone(), torch.randn(4, 5)
    lora(net, r=2, alpha=3, dropout=0.0, targets=["q"], rslora=rslora)
    a, b = net.q.lora_A.default.weight, net.q.lora_B.default.weight
    nn.init.normal_(b)
    torch.testing.assert_close(net.q(x), x @ (weight + scale * b @ a).T + net.q.base_layer.bias)


def test_logits_are_those_of_peft_with_the_same_factors():
    """PeftModel, made by get_peft_model from a configuration of its own, with our tensors under its names."""
    net = adapted(r=4, alpha=8).eval()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["qkv"])
    theirs = peft.get_peft_model(vit_digits(10, 1, seed=0), config).eval()
    own = {f"base_model.model.{name}": tensor for name, tensor in net.state_dict().items()}
    assert not theirs.load_state_dict(own, strict=False).unexpected_keys
    assert torch.equal(theirs(inputs()), net(inputs()))
    assert not torch.equal(net(inputs()), vit_digits(10, 1, seed=0).eval()(inputs()))


def test_the_seed_decides_the_factors_and_nothing_else():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, other, third = (adapted(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    differ = {name.rpartition(".default")[0] for name in one if not torch.equal(one[name], third[name])}
    assert differ
    assert all(name.endswith("lora_A") for name in differ)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["mask_rule=random"],
        ["mask_rule=dense", "exchange=topk", *FEEDBACK],
        ["mask_rule=dense", "objective=fedprox"],
        ["mask_rule=dense", "aggregation=median"],
        ["mask_rule=dense", "model.local=[head.*]"],
        ["mask_rule=dense", "federation.cohort=2", "lora.dropout=0.0"],
        ["mask_rule=dense", "model=bert_tiny", "data=stdlib_docs", "data.max_length=16", "lora.targets=[query,value]"],
    ],
    ids=["mask", "topk", "fedprox", "median", "local head", "stacked", "bert"],
)
def test_adapters_train_with_every_other_part(tmp_path, options):
    summary = run([*VIT, *FAST, *options, f"hydra.run.dir={tmp_path}"])
    end = load_file(tmp_path / "model.safetensors")
    assert summary["rounds"] == 1
    assert any(bool(end[name].any()) for name in end if "lora_B" in name)
    if "model=bert_tiny" not in options:
        base = vit_digits(10, 1, seed=0).state_dict()
        frozen = {name: name.replace(".base_layer", "") for name in end if "lora" not in name and "head" not in name}
        assert frozen
        assert all(torch.equal(end[name], base[before]) for name, before in frozen.items())


def test_stacked_clients_train_as_one_by_one(tmp_path):
    rows = []
    for cohort in (1, 2):
        folder = tmp_path / str(cohort)
        run(
            [
                *VIT,
                *FAST,
                "mask_rule=dense",
                "lora.dropout=0.0",
                f"federation.cohort={cohort}",
                f"hydra.run.dir={folder}",
            ]
        )
        rows.append(load_file(folder / "model.safetensors"))
    for name, tensor in rows[0].items():
        torch.testing.assert_close(tensor, rows[1][name], rtol=1e-5, atol=1e-6)


def test_only_adapters_and_head_travel(tmp_path):
    run([*VIT, *FAST, "mask_rule=dense", f"hydra.run.dir={tmp_path}"])
    tensors = load_file(tmp_path / "model.safetensors")
    travels = sum(tensor.numel() for name, tensor in tensors.items() if "lora" in name or name.startswith("head."))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bytes_up"] == 2 * (48 + 4 * travels)  # two clients, a header of 48 bytes, float32


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"targets": ["q_proj"]}, "lora.targets=q_proj matches no linear layer of the model; it has .*qkv"),
        ({"targets": []}, "lora.targets is empty; it must be null or a list"),
        ({"r": 0}, "lora.r is 0; it must be a whole number of 1 or more"),
        ({"r": 500}, "lora.r is 500; it must be a whole number from 1 to"),
        ({"alpha": 0}, "lora.alpha is 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"rslora": "maybe"}, "lora.rslora is 'maybe'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options, line):
    with pytest.raises(ValueError, match=line):
        adapted(**options)


def rows_after(tmp_path, method, rounds=1):
    folder = tmp_path / method
    some = ["model=vit_digits", f"method={method}", f"federation.rounds={rounds}", "trajectory=global"]
    run([*FAST, *some, f"hydra.run.dir={folder}"])
    tensors = load_file(folder / "model.safetensors")
    return tensors, [read_row(folder / "trajectory.safetensors", closed) for closed in (0, rounds)]


def test_residual_goes_nine_tenths_of_the_way(tmp_path):
    _, (start, mean) = rows_after(tmp_path, "fedit")
    _, (again, damped) = rows_after(tmp_path, "residual")
    assert torch.equal(start, again)
    torch.testing.assert_close(damped, start + 0.9 * (mean - start), rtol=1e-5, atol=1e-7)
    assert not torch.equal(damped, mean)


def test_hfl_drops_b_and_so_learns_no_update(tmp_path):
    """As the original's departments, whose test scores its own files show unchanged."""
    tensors, (start, end) = rows_after(tmp_path, "hfl", rounds=3)
    assert not torch.equal(start, end)
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert ups
    assert not any(bool(up.any()) for up in ups)


def test_an_export_is_the_plain_model_with_the_adapters_added(tmp_path):
    """Weights by hand: the frozen ones plus 2 B A; what loads them knows of no adapter."""
    run([*FAST, "model=vit_digits", "method=fedit", "optimizer.lr=0.3", f"hydra.run.dir={tmp_path}"])
    trained = load_file(tmp_path / "model.safetensors")
    export(tmp_path, ["safetensors"])
    net = load_export(tmp_path / "export")
    assert {name for name, _ in net.named_parameters()} == {name for name, _ in vit_digits(10, 1).named_parameters()}
    for name, weight in net.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" not in trained:
            assert torch.equal(weight, trained[name.replace("qkv.bias", "qkv.base_layer.bias")])
            continue
        down, up = (trained[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
        assert bool(up.any())
        torch.testing.assert_close(weight, trained[f"{layer}.base_layer.weight"] + 2 * up @ down)
