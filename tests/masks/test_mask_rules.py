"""The contract of every mask rule. To add a rule: a subclass of MaskRule, a YAML, and a row in RULES."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import composed
from hydra.utils import instantiate
from torch import nn
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Evidence, Exploration, Gradual, Mask, MaskRule, Sparsity, Thinning, Updates, choose, rules
from fedsparse.masks.thinning import shrunk, thin

CONF = Path(__file__).parents[2] / "conf"


class Distance(MaskRule):
    """A user's rule, three lines."""

    def scores(self, evidence):
        return (evidence.row - 0.5).square()


def configured(option):
    """The rule of a YAML, as it stands."""
    return lambda file: instantiate(composed(f"mask_rule={option}").mask_rule)


RULES = {  # name: (how to build it, whether it keeps exactly k)
    "least_sensitive": (lambda file: rules.Fisher(largest=False), True),
    "most_sensitive": (lambda file: rules.Fisher(largest=True), True),
    "batch_form": (lambda file: rules.Fisher(largest=True, fisher="batch"), True),
    "model_labels": (lambda file: rules.Fisher(largest=True, labels="model"), True),
    "talos": (lambda file: rules.Talos(), True),
    "talos_logprob": (lambda file: rules.Talos(score="logprob"), True),
    "highest_magnitude": (lambda file: rules.Magnitude(largest=True), True),
    "lowest_magnitude": (lambda file: rules.Magnitude(largest=False), True),
    "autoflip": (lambda file: rules.AutoFLIP("robust"), True),  # with minmax every tensor's best score is 1
    "autoflip_refined": (lambda file: rules.AutoFLIP("rank", refine=True), True),
    "snip": (configured("snip"), True),
    "synflow": (lambda file: rules.SynFlow(20), True),
    "movement": (lambda file: rules.Movement(), True),
    "random": (lambda file: rules.Random(), True),
    "dense": (lambda file: rules.Dense(), False),
    "from_file": (lambda file: rules.FromFile(file), False),
    "of a user": (lambda file: Distance(), True),
}
EXACT = [name for name, (_, exact) in RULES.items() if exact]
ALWAYS = ["head.*"]
LARGEST = {"least_sensitive": False, "most_sensitive": True, "talos": False}
LARGEST |= {"lowest_magnitude": False, "highest_magnitude": True}


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layers = {"body": nn.Linear(5, 12), "act": nn.Tanh(), "mid": nn.Linear(12, 9), "head": nn.Linear(9, 3)}
        return nn.Sequential(OrderedDict(layers))


@pytest.fixture
def mask_file(net, tmp_path):
    space = ParamSpace.of(net)
    row = torch.from_numpy(np.random.default_rng([8]).random(space.size) < 0.4) | space.where(ALWAYS)
    Mask.of(space, row, ratio="0.6").save(tmp_path / "given.safetensors")
    return tmp_path / "given.safetensors"


def build(name, net, file, sparsity, seed=0):
    """Gather what a rule needs as a run does, of two batches and two learning rounds, and choose."""
    rule, space, generator = RULES[name][0](str(file)), ParamSpace.of(net), torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([6])
    batches = [(torch.from_numpy(rng.normal(size=(9, 5))).float(), torch.from_numpy(rng.integers(0, 3, 9)))] * 2
    observed = updates = None
    if isinstance(rule.calibration, Thinning):
        observed = thinned(rule, net, space, sparsity, batches, generator)
    elif rule.calibration:
        observed = sum(rule.observe(net, space, x, y, loss=losses, generator=generator) for x, y in batches)
    if rule.need(Exploration):
        observed = torch.from_numpy(rng.normal(size=space.size)).square()
    if need := rule.need(Updates):
        updates = learned(rule, need, space, rng)
    return space, choose(rule, Evidence(space, space.read(net), sparsity, generator, observed, updates))


def thinned(rule, net, space, sparsity, batches, generator):
    """Give up in rounds: of the network alone as often as the rule wants, else once."""
    thinning, row, left = rule.calibration, space.read(net), None
    rounds = thinning.rounds or 1
    for round in range(rounds):
        space.write(net, shrunk(row, left, thinning.shrink))
        seen = batches if thinning.clients else batches[:1]
        scores = sum(rule.observe(net, space, x, y, loss=losses, generator=generator) for x, y in seen)
        space.write(net, row)
        left = thin(scores, left, space, sparsity, largest=rule.largest, power=(round + 1) / rounds)
    return left


def learned(rule, need, space, rng):
    """Two learning rounds of three clients."""
    gathered = None
    for _ in range(2):
        change, start = (torch.from_numpy(rng.normal(size=(3, space.size))).float() for _ in range(2))
        rows = rule.of_update(change, start)
        assert rows.shape == change.shape
        gathered = need.gather(gathered, rows.double().mean(0))
    return gathered


@pytest.mark.filterwarnings("ignore:.*scores tie:UserWarning")  # a path of single weights has one flow
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("name", EXACT)
def test_exactly_k_of_the_counted_coordinates_train(name, ratio, net, mask_file):
    space, mask = build(name, net, mask_file, Sparsity(ratio, always_train=ALWAYS))
    counted = ~space.where(ALWAYS)
    assert int(mask.row(space)[counted].sum()) == math.floor((1 - ratio) * int(counted.sum()) + 0.5)
    assert mask.metadata["ratio"] == str(ratio)


@pytest.mark.parametrize("name", RULES)
def test_always_train_always_trains_and_the_rule_is_named(name, net, mask_file):
    space, mask = build(name, net, mask_file, Sparsity(0.8, always_train=ALWAYS))
    assert mask.row(space)[space.where(ALWAYS)].all()
    assert mask.metadata["rule"] == type(RULES[name][0](str(mask_file))).__name__


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_deterministic_and_leaves_the_network_alone(name, net, mask_file):
    before = [p.clone() for p in net.parameters()]
    first, second = (build(name, net, mask_file, Sparsity(0.8, always_train=ALWAYS))[1] for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_every_tensor_keeps_its_share_and_the_total_is_exact(name, net, mask_file):
    space, mask = build(name, net, mask_file, Sparsity(0.8, min_density=0.15, always_train=ALWAYS))
    counted = {n: marks for n, marks in mask.tensors.items() if not n.startswith("head.")}
    assert sum(int(m.sum()) for m in counted.values()) == math.floor(0.2 * 189 + 0.5)
    assert all(int(m.sum()) >= math.ceil(0.15 * m.numel()) for m in counted.values())


@pytest.mark.parametrize("name", EXACT)
def test_scope_tensor_counts_tensor_by_tensor(name, net, mask_file):
    _, mask = build(name, net, mask_file, Sparsity(0.7, scope="tensor", always_train=ALWAYS))
    for tensor, marks in mask.tensors.items():
        share = 1.0 if tensor.startswith("head.") else 1 - 0.7
        assert int(marks.sum()) == math.floor(share * marks.numel() + 0.5)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", EXACT)
def test_unit_output_takes_whole_rows_with_their_bias(name, scope, net, mask_file):
    space, mask = build(name, net, mask_file, Sparsity(0.5, unit="output", scope=scope, always_train=ALWAYS))
    for layer in ("body", "mid"):
        weight, bias = mask.tensors[f"{layer}.weight"], mask.tensors[f"{layer}.bias"]
        assert torch.equal(weight, bias[:, None].expand_as(weight))
    counted = ~space.where(ALWAYS)
    taken, budget = int(mask.row(space)[counted].sum()), math.floor(0.5 * int(counted.sum()) + 0.5)
    assert 0 < taken <= budget
    assert taken > budget - (13 if scope == "global" else 19)  # the next unit (of 13) did not fit; 6 and 13 by tensor


@pytest.mark.parametrize("name", RULES)
def test_a_mask_survives_its_file(name, net, mask_file, tmp_path):
    space, mask = build(name, net, mask_file, Sparsity(0.8, always_train=ALWAYS))
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert torch.equal(loaded.row(space), mask.row(space))
    assert loaded.metadata == mask.metadata


def test_updates_are_summed_or_the_last_is_kept():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    for keep, expected in (("sum", [1.5, 1.0]), ("last", [0.5, -1.0])):
        assert Updates(keep).gather(None, first) is first
        assert Updates(keep).gather(first, second).tolist() == expected


def test_what_did_not_train_is_zero_or_the_mean_size_of_the_others():
    mean = torch.tensor([-3.0, 1.0])
    assert (Updates().elsewhere(mean), Updates(absent="mean").elsewhere(mean)) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("need", "options", "says"),
    [
        (Updates, {"keep": "all"}, r"^Updates\.keep is 'all'; it must be sum or last$"),
        (Updates, {"absent": "nan"}, r"^Updates\.absent is 'nan'; it must be zero or mean$"),
        (Thinning, {"shrink": 1.5}, r"^Thinning\.shrink is 1\.5; it must be"),
        (Thinning, {"rounds": 0}, r"^Thinning\.rounds is 0; it must be a whole number of 1 or more$"),
    ],
)
def test_needs_that_cannot_be_meant_are_refused(need, options, says):
    with pytest.raises(ValueError, match=says):
        need(**options)


def test_random_follows_its_generator(net, mask_file):
    sparsity = Sparsity(0.5)
    masks = [build("random", net, mask_file, sparsity, seed)[1] for seed in (0, 1)]
    assert masks[0].overlap(masks[1]) < 0.6  # about 1/3 by chance
    space = ParamSpace.of(net)
    assert choose(rules.Random(), Evidence(space, space.read(net), sparsity)).to_bytes() == masks[0].to_bytes()


def test_magnitude_by_hand():
    space, row = ParamSpace(["w"], [torch.Size([4])]), torch.tensor([-3.0, 1.0, 2.0, -0.5])
    assert choose(rules.Magnitude(largest=True), Evidence(space, row, Sparsity(0.5))).row(space).tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert choose(rules.Magnitude(largest=False), Evidence(space, row, Sparsity(0.5))).row(space).tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_dense_ignores_the_ratio(net, mask_file):
    assert build("dense", net, mask_file, Sparsity(0.99))[1].density == 1


def test_the_two_fisher_rules_take_opposite_ends(net, mask_file):
    sparsity = Sparsity(0.5, always_train=ALWAYS)
    space, least = build("least_sensitive", net, mask_file, sparsity)
    most = build("most_sensitive", net, mask_file, sparsity)[1].row(space)
    assert int((least.row(space) & most)[~space.where(ALWAYS)].sum()) == 1  # n = 189: each takes 95


def test_from_file_takes_the_file_whatever_the_ratio(net, mask_file):
    given = Mask.load(mask_file)
    mask = build("from_file", net, mask_file, Sparsity(0.99, always_train=ALWAYS))[1]
    assert mask.overlap(given) == 1
    assert mask.metadata == {"rule": "FromFile", "ratio": "0.6"}
    other = ParamSpace(["body.weight"], [torch.Size([12, 5])])
    with pytest.raises(ValueError, match="made for another model: extra body.bias"):
        choose(rules.FromFile(str(mask_file)), Evidence(other, torch.zeros(60), Sparsity()))


def test_from_file_says_when_always_train_adds_to_it(net, mask_file):
    with pytest.warns(UserWarning, match="freezes [0-9]+ coordinates"):
        space, mask = build("from_file", net, mask_file, Sparsity(0.5, always_train="mid.*"))
    assert mask.row(space)[space.where("mid.*")].all()


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"mask_rule\.path"):
        rules.FromFile(None)
    with pytest.raises(ValueError, match=r"calibration\.fisher is 'exact'; it must be sample or batch"):
        rules.Fisher(largest=True, fisher="exact")
    with pytest.raises(ValueError, match=r"calibration\.labels is 'truth'; it must be data or model"):
        rules.Fisher(largest=True, labels="truth")
    with pytest.raises(ValueError, match=r"mask_rule\.chunk"):
        rules.Fisher(largest=True, chunk=0)


def test_a_rule_without_its_methods_says_so(net):
    space = ParamSpace.of(net)
    with pytest.raises(NotImplementedError, match=r"MaskRule has no scores\(\)"):
        choose(MaskRule(), Evidence(space, space.read(net), Sparsity()))
    with pytest.raises(NotImplementedError, match=r"no observe\(\)"):
        MaskRule().observe(net, space, torch.zeros(1, 5), torch.zeros(1), loss=losses)
    with pytest.raises(NotImplementedError, match=r"no of_update\(\)"):
        MaskRule().of_update(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("name", [name for name, (make, _) in RULES.items() if make("file").needs])
def test_a_rule_whose_evidence_is_missing_says_so(name, net, mask_file):
    space, rule = ParamSpace.of(net), RULES[name][0](str(mask_file))
    missing = "all must train at first" if name == "movement" else "^evidence.observed is None; for a rule that needs"
    with pytest.raises(ValueError, match=missing) as caught:
        choose(rule, Evidence(space, space.read(net), Sparsity()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((CONF / "mask_rule").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_rule_of_the_configuration_instantiates(path):
    config = composed(f"mask_rule={path.stem}", "calibration.fisher=batch", "calibration.labels=model")
    if path.stem == "from_file":
        config.mask_rule.path = "mask.safetensors"
    rule = instantiate(config.mask_rule)
    assert isinstance(rule, MaskRule)
    assert rule.largest == LARGEST.get(path.stem, rule.largest)
    if path.stem.endswith("_sensitive"):
        assert (rule.fisher, rule.labels) == ("batch", "model")


@pytest.mark.parametrize("path", sorted((CONF / "sparsity").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sparsity_of_the_configuration_instantiates(path):
    sparsity = instantiate(composed(f"sparsity={path.stem}").sparsity)
    if path.stem == "shira":
        assert sparsity == Sparsity(scope="shira", rank=8, always_train="head.*")
        return
    if path.stem == "gradual80":
        assert sparsity == Sparsity(0.8, always_train="head.*", schedule=Gradual(0.0, begin=0, every=1, steps=10))
        return
    assert sparsity == replace(Sparsity(int(path.stem[1:]) / 100), always_train="head.*")
