"""SHiRA: exact counts layer by layer, and the mask at work in PEFT's own tuner."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from fedsparse.core.space import ParamSpace
from fedsparse.masks import Evidence, Mask, Sparsity, choose, select
from fedsparse.masks.rules import Magnitude

# PEFT's SHiRA layer on newer versions of torch
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


class Small(nn.Module):
    """Two linear layers of one shape, so that a mask given to the wrong one would show; a norm, a token and a head."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 12))
        layers = {"fc": nn.Linear(12, 12), "norm": nn.LayerNorm(12), "act": nn.Tanh(), "last": nn.Linear(12, 12)}
        self.body = nn.Sequential(OrderedDict(layers))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(x + self.token))


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Small()


def mask_of(net, rank=2, always="head.*"):
    space = ParamSpace.of(net)
    sparsity = Sparsity(scope="shira", rank=rank, always_train=always)
    return choose(Magnitude(largest=True), Evidence(space, space.read(net), sparsity))


def test_every_linear_layer_trains_as_many_as_lora_has(net):
    mask = mask_of(net)
    ones = {name: int(tensor.sum()) for name, tensor in mask.tensors.items()}
    trained = {name: number for name, number in ones.items() if number}
    assert trained == {"body.fc.weight": 48, "body.last.weight": 48, "head.weight": 36, "head.bias": 3}
    assert mask.metadata == {"rule": "Magnitude", "scope": "shira", "rank": "2"}
    for name in ("body.fc.weight", "body.last.weight"):  # the largest of this layer, not of the model
        size = net.get_parameter(name).detach().abs()
        assert size[mask.tensors[name]].min() > size[~mask.tensors[name]].max()


def test_a_rank_that_does_not_fit_names_the_layer_and_the_largest():
    space = ParamSpace(["a.weight", "b.weight", "b.bias"], [torch.Size(s) for s in ([8, 8], [4, 6], [4])])
    scores = torch.arange(92.0)
    assert int(select(scores, space, Sparsity(scope="shira", rank=2), largest=True).sum()) == 32 + 20
    with pytest.raises(
        ValueError, match=r"rank=3 wants 3 \* \(6 \+ 4\) = 30 weights of b\.weight, which has 24; .* 2$"
    ):
        select(scores, space, Sparsity(scope="shira", rank=3), largest=True)
    full = select(scores, space, Sparsity(scope="shira", rank=4, always_train="b.*"), largest=True)
    assert full.all()  # 4 * (8 + 8) is all there is
    with pytest.raises(ValueError, match="needs linear layers"):
        select(scores, space, Sparsity(scope="shira", rank=1, always_train="*"), largest=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scope": "shira"}, "rank"),
        ({"scope": "shira", "rank": 0}, "rank"),
        ({"scope": "shira", "rank": 1.5}, "rank"),
        ({"scope": "shira", "rank": True}, "rank"),
        ({"rank": 8}, "rank=8 is read with sparsity.scope=shira only"),
        ({"scope": "shira", "rank": 8, "unit": "output"}, "unit"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, named):
    with pytest.raises(ValueError, match=rf"^sparsity\.{named}") as caught:
        Sparsity(**options)
    assert "\n" not in str(caught.value)


def train(model, steps=3):
    x, y = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()


@pytest.mark.parametrize("named", [True, False])
def test_peft_trains_exactly_the_coordinates_of_the_mask(net, named):
    peft = pytest.importorskip("peft")
    mask = mask_of(net)
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    model = peft.get_peft_model(net, mask.export_shira(2, net if named else None))
    train(model)
    after = model.merge_and_unload().state_dict()
    assert set(after) == set(before)
    moved = {name: after[name] != before[name] for name in before}
    assert {name: marks.tolist() for name, marks in moved.items()} == {n: t.tolist() for n, t in mask.tensors.items()}


def test_by_name_the_order_of_the_tensors_does_not_matter(net):
    peft = pytest.importorskip("peft")
    mask = mask_of(net)
    shuffled = Mask(dict(reversed(mask.tensors.items())))
    before = net.body.fc.weight.detach().clone()
    model = peft.get_peft_model(net, shuffled.export_shira(2, net))
    train(model)
    assert torch.equal(model.merge_and_unload().body.fc.weight != before, mask.tensors["body.fc.weight"])


def test_another_network_is_refused(net):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="does not fit the network that PEFT wraps"):
        peft.get_peft_model(net, mask_of(net).export_shira(2, Small()))
    net.body.last = nn.Linear(12, 5)
    with pytest.raises(ValueError, match=r"does not fit .* body\.last differs"):
        peft.get_peft_model(net, mask_of(Small()).export_shira(2))


def test_any_other_mask_is_refused_with_its_counts(net):
    space, row = ParamSpace.of(net), ParamSpace.of(net).read(net)
    whole = Mask.of(space, torch.ones(space.size, dtype=torch.bool))
    for mask, rank, text in (
        (mask_of(net), 3, "body.fc.weight has 48 of 144, body.fc.bias has 0 of 12, needed 72"),
        (choose(Magnitude(largest=True), Evidence(space, row, Sparsity(0.5, always_train="head.*"))), 2, "needed 48"),
        (whole, 2, "token has 12 of 12, needed 0"),
    ):
        with pytest.raises(ValueError, match=f"no SHiRA mask of rank {rank} .*{text}") as caught:
            mask.export_shira(rank)
        assert "\n" not in str(caught.value)
    tensors = mask_of(net).tensors
    for name in ("token", "body.norm.bias", "body.fc.bias"):
        extra = Mask({**tensors, name: torch.arange(tensors[name].numel()).view_as(tensors[name]) == 0})
        with pytest.raises(ValueError, match=rf"{name} has 1 of 12"):
            extra.export_shira(2)
    with pytest.raises(ValueError, match=r"body\.last\.weight has 0 of 144"):
        Mask({**tensors, "body.last.weight": torch.zeros(12, 12, dtype=torch.bool)}).export_shira(2)
