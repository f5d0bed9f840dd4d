"""A run that learned nothing says so, with the share of clipped steps: counted here by norms of a plain loop."""

from __future__ import annotations

from typing import ClassVar

import torch

from fedsparse.federation.client.drift import GradientCorrection, NoCorrection
from fedsparse.job import summary as results

BASE = ["mask_rule=random", "pictures=false", "optimizer.clip_norm=0.6", "federation.local_steps=5"]


class Noting(NoCorrection):
    """Notes, before each step is clipped, the norm of every client's gradient over what trains."""

    norms: ClassVar[list[float]] = []

    def start(self, theta, clients, subspace):
        return Norms(self.norms, theta, subspace.mask)


class Norms(GradientCorrection):
    def __init__(self, norms, theta, mask):
        self.norms, self.cohort, self.mask = norms, len(theta), mask.expand_as(theta)

    def correct(self, rows):
        gradients = torch.cat([g.detach().reshape(self.cohort, -1) for g in rows.gradients], 1)
        trained = torch.cat([part.reshape(self.cohort, -1) for part in rows.parts(self.mask)], 1)
        self.norms.extend(float(g[marks].double().norm()) for g, marks in zip(gradients, trained, strict=True))


def test_clipped_steps_are_counted_whatever_the_cohort(run_in):
    found, noting = [], f"objective._target_={__name__}.Noting"
    for cohort in (1, 4):
        Noting.norms.clear()
        options = [f"federation.cohort={cohort}", "federation.clients_per_round=8"]
        summary, _ = run_in(f"k{cohort}", *BASE, noting, *options)
        assert len(Noting.norms) == 3 * 8 * 5
        assert summary["clipped_fraction"] == sum(norm > 0.6 for norm in Noting.norms) / (3 * 8 * 5)
        found.append(summary["clipped_fraction"])
    assert 0 < found[0] < 1
    assert found[0] == found[1]


def test_a_resume_goes_on_counting(run_in):
    whole, _ = run_in("whole", *BASE, "federation.rounds=4")
    _, folder = run_in("part", *BASE, "federation.rounds=2")
    from fedsparse import run

    again = run([f"resume={folder}", "federation.rounds=4"])
    assert again["clipped_fraction"] == whole["clipped_fraction"] > 0


def test_a_run_at_chance_says_so(run_in, capsys):
    idle = ["optimizer.lr=1e-9", "head.init=random", "optimizer.clip_norm=0.01", "federation.rounds=1"]
    summary, _ = run_in("idle", *BASE, *idle)
    assert summary["test/acc"] < summary["chance"] + 0.02
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"test accuracy {summary['test/acc']:.1%} is within two points of chance ({summary['chance']:.1%}, the largest "
        "class of the test split): 100% of the local steps were clipped at optimizer.clip_norm=0.01, at "
        "optimizer.lr=1e-09; try other values, or more rounds"
    ) in text


def test_a_run_that_learned_does_not(run_in, capsys):
    summary, _ = run_in("learns", "mask_rule=random", "pictures=false", "optimizer.clip_norm=null")
    assert summary["clipped_fraction"] is None
    assert "chance" not in capsys.readouterr().out


def test_chance_is_the_largest_class_of_the_test_split(run_in, monkeypatch):
    """Digits: 36 or 37 test images of each class but the largest."""
    from fedsparse.data.datasets import digits

    labels = digits().test.y.tolist()
    summary, _ = run_in("run", "mask_rule=random", "federation.rounds=1")
    assert summary["chance"] == max(labels.count(k) for k in range(10)) / len(labels)


def test_without_clipping_the_line_names_no_norm():
    line = results.at_chance({"test/acc": 0.1, "chance": 0.1, "clipped_fraction": None, "clip_norm": None, "lr": 0.1})
    assert "no local step was clipped at optimizer.clip_norm=null, at optimizer.lr=0.1" in line
    assert not results.at_chance({"test/acc": 0.1201, "chance": 0.1})
    assert not results.at_chance({})  # of a run before there was the figure


def test_where_something_stays_with_the_clients_their_own_models_are_compared_with_chance():
    facts = {"test/acc": 0.0, "chance": 0.1, "clipped_fraction": None, "clip_norm": None, "lr": 0.1}
    assert not results.at_chance(facts | {"personal/acc_mean": 0.9})
    assert results.at_chance(facts | {"personal/acc_mean": 0.11}).startswith("accuracy of clients' own models 11.0% is")
