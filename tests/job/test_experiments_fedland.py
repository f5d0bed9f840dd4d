"""Fedland's settings: each composes to what its source says and runs on files of the real formats; the central twin."""

from __future__ import annotations

import image_files
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from test_experiments import composed

from fedsparse.core.seeding import Purpose
from fedsparse.data.balance import Balance
from fedsparse.job.assemble import assemble
from fedsparse.job.config import check

pytestmark = pytest.mark.slow

IMBALANCED = [1, 1, 0.7, 0.5, 0.05]
SETTINGS = {  # data, model, partition, clients, rounds, server, shares of a client's even part
    "mnist": ("mnist", "fednet_mlp", "iid", 5, 60, "fedavg", [1] * 5),
    "cifar10": ("cifar10", "fednet", "iid", 5, 60, "fedavg", [1] * 5),
    "cifar10_fedopt": ("cifar10", "fednet", "iid", 5, 60, "fedadam", [1] * 5),
    "cifar10_imbalanced": ("cifar10", "fednet", "ratios", 5, 60, "fedavg", IMBALANCED),
    "cifar10_noniid": ("cifar10", "fednet", "ratios", 5, 60, "fedavg", [1, 1, 1, 1, 0.95]),
    "cifar10_noniid_imbalanced": ("cifar10", "fednet", "ratios", 5, 60, "fedavg", IMBALANCED),
    "cifar10_two": ("cifar10", "resnet_small", "iid", 2, 30, "fedavg", [1, 1]),
    "cifar10_two_noniid_imbalanced": ("cifar10", "resnet_small", "ratios", 2, 30, "fedavg", [0.66, 0.2]),
    "cifar10_three": ("cifar10", "resnet_small", "ratios", 3, 30, "fedavg", [0.99, 0.198, 0.099]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_its_settings_are(name):
    cfg, choices = composed(f"experiment=fedland_{name}")
    check(cfg)
    data, model, partition, clients, rounds, server, shares = SETTINGS[name]
    chosen = [choices[group] for group in ("data", "model", "partition", "server", "mask_rule", "optimizer")]
    assert chosen == [data, model, partition, server, "dense", "sgdm"]
    federation, optimizer = cfg.federation, cfg.optimizer
    assert (federation.num_clients, federation.clients_per_round, federation.rounds) == (clients, 1.0, rounds)
    assert (federation.local_epochs, federation.local_steps, cfg.data.batch_size) == (5, None, 32)
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.clip_norm) == (0.01, 0.5, 0, None)
    assert (cfg.head.init, federation.weight, cfg.exchange._partial_) == ("random", "held", True)
    labels = np.repeat(np.arange(10), 4500)  # of CIFAR-10 without its validation images
    parts = instantiate(cfg.partition)(labels, num_clients=clients, seed=0)
    assert [len(part) * clients / len(labels) for part in parts] == pytest.approx(shares, abs=1e-4)


def test_the_classes_of_its_clients():
    wanted = {
        "cifar10_noniid": [np.ones(10)] * 2 + [np.exp(-0.5 * k) for k in (np.arange(10), np.arange(10)[::-1])],
        "cifar10_imbalanced": [np.ones(10)] * 5,
    }
    wanted["cifar10_noniid"] += [np.exp(-0.7 * np.arange(10))]
    for name, rows in wanted.items():
        given = composed(f"experiment=fedland_{name}")[0].partition.class_ratios
        for ratios, row in zip(given, rows, strict=True):
            assert np.array(ratios) / sum(ratios) == pytest.approx(row / row.sum(), abs=1e-4)


def test_fedopt_is_adam_with_fedns_numbers():
    server = composed("experiment=fedland_cifar10_fedopt")[0].server
    assert (server.lr, list(server.betas), server.tau) == (0.01, [0.9, 0.99], 1e-4)
    typed, _ = composed("experiment=fedland_cifar10_noniid", "server=fedadam", "server.tau=1e-4")
    assert typed.server == server


FEW = ["federation.rounds=2", "federation.local_epochs=1", "logger=csv", "pictures=false"]


@pytest.mark.parametrize("name", ["mnist", "cifar10_fedopt", "cifar10_noniid_imbalanced", "cifar10_three"])
@pytest.mark.filterwarnings(image_files.CHANGED)
def test_it_runs_on_files_of_the_real_format(run_in, tmp_path, name):
    image_files.write_mnist(tmp_path / "files", train=400)
    image_files.write_cifar10(tmp_path / "files", per_batch=150)
    summary, _ = run_in(name, f"experiment=fedland_{name}", f"data.root={tmp_path / 'files'}", *FEW, fast=False)
    assert summary["dropped_updates"] == 0
    assert (summary["rounds"], summary["head"], summary["trainable_fraction"]) == (2, "random", 1.0)
    assert summary["client_steps"] > 2 * SETTINGS[name][3]


DIGITS = ("iid", "ratios_ten", "noniid_nc1")
QUICK = ["logger=csv", "pictures=false", "calibration.cache=null", "model=mlp"]


class Processed:
    """Counts the samples whose loss is computed for a gradient."""

    def __init__(self, monkeypatch):
        self.samples, self.plain = 0, torch.nn.functional.cross_entropy
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", self)

    def __call__(self, logits, y, **options):
        self.samples += y.numel() if torch.is_grad_enabled() else 0
        return self.plain(logits, y, **options)


def test_the_central_twin_processes_as_many_samples_by_gradient_steps(run_in, monkeypatch):
    """At one client a cohort, without vmap, the loss sees every batch as it is."""
    found, counted = {}, {}
    for name, option in (*((option, option) for option in DIGITS), ("central", "iid")):
        experiment = "fedland_digits_central" if name == "central" else "fedland_digits"
        with monkeypatch.context() as patch:
            processed = Processed(patch)
            options = [f"experiment={experiment}", f"partition={option}", "federation.cohort=1", *QUICK]
            summary, _ = run_in(name, *options, fast=False)
        found[name], counted[name] = summary, processed.samples
    trial = counted["central"] - 2200 * 32  # the run's own trial of the model before round 1
    assert 0 <= trial <= 64
    assert {name: samples - trial for name, samples in counted.items()} == dict.fromkeys(found, 2200 * 32)
    assert {name: summary["client_steps"] for name, summary in found.items()} == dict.fromkeys(found, 2200)
    assert {summary["rounds"] for summary in found.values()} == {25}  # and after each as many
    assert all(summary["test/acc"] > 0.85 for summary in found.values())


@pytest.mark.parametrize("model", ["mlp", "vit_digits"])
@pytest.mark.parametrize("option", DIGITS)
def test_every_step_of_both_has_a_whole_batch_and_every_round_as_many(tmp_path, monkeypatch, model, option):
    monkeypatch.chdir(tmp_path)
    found = {}
    for experiment in ("fedland_digits", "fedland_digits_central"):
        typed = [f"partition={option}"] if experiment == "fedland_digits" else []
        cfg, _ = composed(f"experiment={experiment}", f"model={model}", *typed)
        assembly = assemble(cfg)
        least = min(len(part) for part in assembly.problem.parts)
        assert least >= cfg.data.batch_size  # so that the head's batches are whole as well
        head = len(assembly.course.sample(0, Purpose.HEAD)) * cfg.calibration.head_steps * cfg.data.batch_size
        plan = assembly.course.phased
        rounds = [sum(sum(map(sum, c.count)) for c in plan.cohorts(r)) for r in range(assembly.course.phases.total)]
        found[experiment] = [head, *rounds]
    assert found["fedland_digits"] == found["fedland_digits_central"] == [200 * 32, *[80 * 32] * 25]


def test_the_three_settings_differ_as_they_say():
    gini = {}
    for option in DIGITS:
        problem = assemble(composed("experiment=fedland_digits", f"partition={option}")[0]).problem
        counts = Balance.of(problem.parts, problem.dataset.train.y.numpy(), 10).counts
        gini[option] = [float(Balance(counts).cells(client)[0]) for client in range(10)]
        assert (counts.sum(0) > 0).all()  # every class has a holder
        sizes = counts.sum(1)
        assert (max(sizes) > 3 * min(sizes)) == (option == "ratios_ten")
    assert max(gini["iid"]) < 0.3
    assert all(0.5 < value < 0.8 for value in gini["ratios_ten"])
    assert gini["noniid_nc1"] == pytest.approx([0.9] * 10)


def test_another_number_of_steps_keeps_the_budget():
    for experiment, steps, rounds in (
        ("fedland_digits", 4, 50), ("fedland_digits", 20, 10), ("fedland_digits_central", 40, 50),
    ):  # fmt: skip
        cfg, _ = composed(f"experiment={experiment}", f"federation.local_steps={steps}")
        assert cfg.federation.rounds == rounds
