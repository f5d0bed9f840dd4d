"""Clients that continue texts: steps against torch's own loss over all targets, figures against plain loops."""

from __future__ import annotations

import csv
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from composed import composed
from languages import qwen2, sequences
from safetensors.torch import load_file
from small import Small
from torch.nn import functional as F

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.core.targets import IGNORED, count, cross_entropy
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.rounds import LocalWork
from fedsparse.federation.client.drift import GradientCorrection
from fedsparse.federation.client.training import Clients, no_samples
from fedsparse.job.assemble import assemble
from fedsparse.models.language import LanguageModel
from fedsparse.models.lora import lora
from fedsparse.optim.sgdm import SparseSGDM
from fedsparse.simulation.evaluation import Evaluation, split_figures
from fedsparse.simulation.module import ClientModule
from fedsparse.simulation.own_models import OwnModels

pytest.importorskip("peft", reason="peft is in the extra lora")
LR = 0.5


def adapted():
    """Adapters whose B is not 0, so that A has a gradient; float64."""
    net = lora(LanguageModel(qwen2()), r=3, alpha=3, dropout=0.0).double().train()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return net


def space_of(net):
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    return ParamSpace.of(net, trains.__contains__)


def stepped(weigh, x, y, counts):
    """Rows after one step of plain SGD, and whether they took the stacked form."""
    net = adapted()
    space = space_of(net)
    clients = Clients(
        net,
        space,
        torch.ones(space.size, dtype=torch.bool),
        partial(SparseSGDM, lr=LR, momentum=0.0),
        lambda forward, x, y: cross_entropy(forward(x), y),
        no_samples,
        cohort=len(counts),
        per_sample=True,
        weigh=weigh,
    )
    before = clients.theta.detach().clone()
    batch = (x[0], y[0]) if len(counts) == 1 else (x, y)
    losses = clients.step(*batch, counts, GradientCorrection()).view(-1).tolist()
    formed = len(counts) > 1 and clients.rows.stacked is not None
    return (before - clients.theta.detach()) / LR, losses, formed


def by_torch(per, x, y, counts):
    """Each client's gradient of Hugging Face's mean over all targets, or of the mean over samples' means."""
    found, values = [], []
    for k, real in enumerate(counts):
        net = adapted()
        parameters = [p for p in net.parameters() if p.requires_grad]
        logits, targets = net(x[k, :real]), y[k, :real]
        each = [F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)]
        whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = whole if per == "token" else torch.stack(each).mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        values.append(loss.item())
    return torch.stack(found), values


@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("counts", [(4,), (3,), (4, 2, 3)], ids=["one", "one with padding", "stacked"])
def test_a_step_is_that_of_the_mean_over_targets_or_samples(per, counts):
    pairs = [sequences(4, seed=k) for k in range(len(counts))]
    x, y = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    found, losses, formed = stepped(count if per == "token" else None, x, y, counts)
    wanted, values = by_torch(per, x, y, counts)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    assert losses == pytest.approx(values, rel=1e-6)
    assert formed is (len(counts) > 1)


def test_the_two_means_are_two_numbers():
    x, y = (part.unsqueeze(0) for part in sequences(4))
    token, sample = (by_torch(per, x, y, (4,))[1][0] for per in ("token", "sample"))
    assert abs(token - sample) > 0.01


@pytest.mark.parametrize("counts", [(3,), (3, 2)], ids=["one", "stacked"])
def test_samples_without_a_target_give_no_gradient_and_no_nan(counts):
    """A batch of nothing else too: the padding of a cohort repeats a sample, whose targets do not count."""
    x, y = (part.expand(len(counts), *part.shape).clone() for part in sequences(3))
    y[-1] = IGNORED
    found, losses, _ = stepped(count, x, y, counts)
    assert bool(found.isfinite().all())
    assert not bool(found[-1].any())
    assert losses[-1] == 0


def data_of(n=48):
    parts = [Split(*sequences(size, seed=seed)) for seed, size in enumerate((n, 12, 20))]
    return Dataset(*parts, classes=40, name="some")


def fitted(tmp_path, cohort=1, rounds=2, **options):
    net = adapted().float()
    parts = [np.arange(12) + 12 * k for k in range(4)]
    work = LocalWork(4, 3, None)
    client = partial(ClientModule, weigh=count)
    given = {"space": space_of(net), "count": 4, "cohort": cohort, "work": work, "client": client, "lr": 0.1}
    small = Small(net, data_of(), parts, **given | options)
    return small.fit(rounds, tmp_path)


def test_a_cohort_of_four_trains_as_one_by_one(tmp_path):
    one, four = (fitted(tmp_path, cohort) for cohort in (1, 4))
    torch.testing.assert_close(one.row, four.row, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.row, one.space.read(adapted().float()))


def figures_by_hand(net, split):
    """Mean over targets, its exp, and the share of sequences without a miss, by plain loops."""
    logits = net.eval()(split.x).double().log_softmax(-1)
    each, right = [], 0
    for row, targets in zip(logits, split.y.tolist(), strict=True):
        places = [(place, target) for place, target in enumerate(targets) if target != IGNORED]
        each += [-row[place, target].item() for place, target in places]
        right += all(int(row[place].argmax()) == target for place, target in places)
    return sum(each) / len(each), math.exp(sum(each) / len(each)), right / len(split.y)


def test_the_figures_of_an_evaluation_are_means_over_targets(tmp_path):
    tests = [np.arange(5) + 5 * k for k in range(4)]
    evaluation = Evaluation(tests)
    small = fitted(tmp_path, callbacks=[evaluation], data={"tests": tests})
    loss, perplexity, right = figures_by_hand(small.net, small.dataset.test)
    found = evaluation.figures
    assert found["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["test/perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found["test/acc"] == pytest.approx(right)
    assert found["client/acc_mean"] == pytest.approx(right)  # parts of equal size
    assert {"val/loss", "val/acc", "val/perplexity"} <= set(found)


def test_own_models_are_evaluated_by_targets_too(tmp_path):
    net = adapted()
    names = space_of(net).names
    space = ParamSpace.of(net, set(names).__contains__, ["*.lora_B.*"])
    tests = [np.arange(5) + 5 * k for k in range(4)]
    parts = [np.arange(12) + 12 * k for k in range(4)]
    options = {"space": space, "count": 4, "work": LocalWork(4, 3, None), "client": partial(ClientModule, weigh=count)}
    small = Small(net, data_of(), parts, **options, data={"tests": tests}, lr=0.1)
    own = OwnModels(small.rounds)
    small.callbacks = [own]
    small.fit(1, tmp_path)
    each = []
    for client, part in enumerate(tests):
        row = small.federation.server.rows[0].clone()
        values = small.federation.restored([client], row.unsqueeze(0), small.federation.clients.local)[0]
        space.write(net, values)
        test = small.dataset.test
        each.append(figures_by_hand(net, Split(test.x[part], test.y[part])))
    assert own.figures["personal/loss"] == pytest.approx(sum(loss for loss, _, _ in each) / 4, rel=1e-6)
    assert own.figures["personal/acc_mean"] == pytest.approx(sum(right for _, _, right in each) / 4)


def test_losses_by_sample_and_perplexity_by_target_of_two_models_by_hand():
    losses = torch.tensor([[1.0, 3.0], [4.0, 8.0]])
    scores = {"correct": torch.tensor([[True, False], [False, False]]), "losses": losses}
    scores |= {"targets": torch.tensor([3, 1]), "weights": torch.ones(2)}
    found = split_figures("val", scores)
    assert found["val/loss"] == 4.0
    assert found["val/perplexity"] == pytest.approx(math.exp((3 * 2.0 + 6.0) / 4))
    assert found["val/acc"] == 0.25
    overflowed = split_figures("val", scores | {"losses": losses * 1000})
    assert overflowed["val/perplexity"] == math.inf


FAST = ["model=qwen_tiny", "data=docs_answers", "data.max_records=12", "data.clients_per_department=1"]
FAST += ["head.init=random", "partition=natural", "federation.num_clients=4", "federation.clients_per_round=4"]
FAST += ["federation.local_steps=2", "data.batch_size=2", "data.max_length=40", "optimizer.lr=0.5", "pictures=false"]
FAST += ["logger=csv", "calibration.cache=null", "federation.rounds=2"]


def ran(folder, *options):
    summary = run([*FAST, "lora.dropout=0.0", *options, f"hydra.run.dir={folder}"])
    return summary, load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "fedsa",
        "flora",
        *(pytest.param(m, marks=pytest.mark.soak) for m in ("local", "fedit", "ffa", "fedex", "residual", "hfl")),
    ],
)
def test_every_method_trains_a_language_model_stacked_as_one_by_one(tmp_path, method):
    (one, alone), (four, stacked) = (
        ran(tmp_path / str(k), f"method={method}", f"federation.cohort={k}") for k in (1, 4)
    )
    assert four["cohort"] == 4
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, stacked[name], rtol=1e-5, atol=1e-5)
    assert one["bytes_up"] == four["bytes_up"]
    factors = 2 * 3 * 8 * 128  # of A, and as many of B: q and v of three layers, rank 8, in = out = 128
    sent = {"local": 0, "fedsa": factors, "ffa": factors, "hfl": factors}.get(method, 2 * factors)
    assert one["bytes_up"] == 2 * 4 * (48 + 4 * sent)  # rounds, clients, header, float32
    with (tmp_path / "1" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["test/perplexity"]) == pytest.approx(math.exp(float(last["test/loss"])), rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, there = ran(whole, "method=fedsa", "federation.rounds=3")
    ran(cut, "method=fedsa", "federation.rounds=1")
    run([f"resume={cut}", "federation.rounds=3"])
    again = load_file(cut / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in there.items())
    keys = ("test/loss", "personal/loss", "bytes_total", "global_sha256")
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    assert [one[key] for key in keys] == [other[key] for key in keys]


TEXTS = ["model=qwen_tiny", "data=plain_texts", "partition=natural", "federation.num_clients=1", "head.init=random"]
MODEL = ["model=qwen_tiny", "federation.num_clients=1", "head.init=random"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([*TEXTS, "head.init=probe"], "head.init=probe prepares a head of classes.*set head.init=random"),
        ([*TEXTS, "partition=dirichlet"], "the targets are sequences.*set partition=natural or iid"),
        ([*TEXTS, "data.loss_per=word"], "data.loss_per is 'word'; it must be token or sample"),
        ([*TEXTS, "model=bert_tiny"], "the next token of each place and the model tells the class of a text"),
        ([*TEXTS, "data.max_length=300"], "data.max_length=299: the model takes at most 256 tokens"),
        ([*TEXTS, "model.base_dtype=bfloat16"], "is torch.bfloat16; clients train float32"),
        ([*TEXTS, "model.trainable=[net.lm_head.*]"], "model.trainable=net.lm_head.* matches no parameter"),
        ([*MODEL, "data=digits"], "this data is images and the model takes text; choose data=docs_answers"),
        (
            [*MODEL, "data=stdlib_docs"],
            "the class of a text and the model tells the next token.*choose model=bert_tiny",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, options, line):
    (tmp_path / "one.txt").write_text("Here is a sentence of eight words, again. " * 200, encoding="utf-8")
    root = [f"data.root={tmp_path}"] if "data=plain_texts" in options else []
    with pytest.raises(ValueError, match=line) as caught:
        assemble(composed(*options, *root, "mask_rule=dense", "logger=csv"))
    assert "\n" not in str(caught.value)
