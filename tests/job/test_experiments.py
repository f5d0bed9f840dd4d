"""The published configurations: each composes to what its source says, and runs on files of the real layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from image_files import CHANGED, write_cifar100
from omegaconf import open_dict
from safetensors.torch import load_file

from fedsparse import report
from fedsparse.job.config import check, register_resolvers
from fedsparse.job.shipped import conf_dir

M8 = {  # name: (partition, rule) of the document
    "m8_sparse_iid_least_sensitive": ("iid", "least_sensitive"),
    "m8_sparse_noniid_nc1_least_sensitive": ("noniid_nc1", "least_sensitive"),
    "m8_sparse_noniid_nc1_random": ("noniid_nc1", "random"),
    "m8_sparse_noniid_nc1_highest_magnitude": ("noniid_nc1", "highest_magnitude"),
}
OTHERS = {
    "autoflip_digits": ("digits", "mlp"),
    "byzantine_digits": ("digits", "mlp"),
    "sparse_exchange_digits": ("digits", "vit_digits"),
    "sparse_exchange_docs": ("stdlib_docs", "bert_tiny"),
    "sparse_exchange_ag_news": ("ag_news", "bert_base"),
    **{f"autoflip_{data}": (data, "two_cnn") for data in ("cifar10", "cifar100", "mnist")},
    "autoflip_femnist": ("femnist", "femnist_cnn"),
    "autoflip_shakespeare": ("shakespeare", "next_char_lstm"),
    "fedland_digits": ("digits", "mlp"),
    "fedland_digits_central": ("digits", "mlp"),
    "fedland_mnist": ("mnist", "fednet_mlp"),
    **{f"fedland_cifar10{what}": ("cifar10", "fednet") for what in ("", "_fedopt", "_imbalanced", "_noniid")},
    "fedland_cifar10_noniid_imbalanced": ("cifar10", "fednet"),
    "departments": ("instructions", "qwen"),
    "departments_docs": ("docs_answers", "qwen_tiny"),
    **{f"fedland_cifar10_{n}": ("cifar10", "resnet_small") for n in ("two", "two_noniid_imbalanced", "three")},
}
NAMES = sorted(path.stem for path in Path(conf_dir(), "experiment").glob("*.yaml"))


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_composes_and_says_where_it_comes_from(name):
    cfg, choices = composed(f"experiment={name}")
    check(cfg)
    assert (choices["data"], choices["model"]) == OTHERS.get(name, ("cifar100", "dino_vits16"))
    head = Path(conf_dir(), "experiment", f"{name}.yaml").read_text().split("defaults:")[0]
    assert head.count("#") >= 3
    assert "report" in head  # the figure that its source reports, or that it reports none


@pytest.mark.parametrize(("name", "asked"), M8.items())
def test_the_four_configurations_of_the_m8_document(name, asked):
    cfg, choices = composed(f"experiment={name}")
    assert (choices["partition"], choices["mask_rule"]) == asked
    federation = cfg.federation
    assert (federation.num_clients, federation.clients_per_round, federation.rounds) == (20, 0.5, 10)
    assert (federation.local_steps, cfg.data.batch_size, cfg.data.val_fraction) == (4, 32, 0.2)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay, cfg.seed) == (0.01, 0.9, 1e-4, 42)
    assert cfg.sparsity.ratio == pytest.approx(1 - 0.8)  # there the fraction that trains
    assert cfg.calibration.batches == 10


def test_ag_news_trains_with_adamw_as_its_source_does():
    cfg, choices = composed("experiment=sparse_exchange_ag_news")
    assert choices["optimizer"] == "adamw"
    assert (cfg.optimizer.decoupled, cfg.optimizer.weight_decay, cfg.optimizer.clip_norm) == (True, 0.001, None)


@pytest.mark.parametrize(("steps", "rounds"), [(4, 200), (8, 100), (16, 50)])
def test_the_course_scales_its_rounds_inversely(steps, rounds):
    cfg, _ = composed("experiment=course", f"federation.local_steps={steps}")
    assert cfg.federation.rounds == rounds
    assert (cfg.federation.num_clients, cfg.federation.clients_per_round) == (100, 0.1)


def test_rounds_that_do_not_divide_are_rounded_to_the_nearest():
    cfg, _ = composed("experiment=course", "federation.local_steps=3")
    assert cfg.federation.rounds == 267  # 800 / 3 = 266.7


SMALL = [
    "model=two_cnn", "data.batch_size=8", "federation.num_clients=5", "federation.rounds=2", "logger=csv",
    "trainer.precision=32-true",
]  # fmt: skip


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path / "cifar", train=600, test=100, classes=10)
    return f"data.root={tmp_path / 'cifar'}"


@pytest.mark.slow
@pytest.mark.filterwarnings(CHANGED, "ignore:.*tie at the threshold.*")
def test_files_of_cifar_100s_layout_go_all_the_way(run_in, cifar, tmp_path, capsys):
    for rule, seed in (("dense", 0), ("least_sensitive", 0), ("random", 0)):
        summary, folder = run_in(
            f"runs/{rule}", "data=cifar100", cifar, f"mask_rule={rule}", "partition=noniid_nc2", f"seed={seed}",
            "data.augment=randaugment", *SMALL, fast=False,
        )  # fmt: skip
        assert summary["dropped_updates"] == 0
        assert (folder / "mask.png").is_file()
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "least_sensitive" in page
    assert "noniid_nc2" in page


@pytest.mark.slow
@pytest.mark.filterwarnings(CHANGED, "ignore:.*unused.*", "ignore:.*tie at the threshold.*")
def test_an_m8_configuration_on_a_real_sized_vit_with_a_state_dict_of_the_public_layout(run_in, cifar, tmp_path):
    import timm

    net = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    summary, folder = run_in(
        "m8", "experiment=m8_sparse_iid_least_sensitive", cifar, f"model.checkpoint={tmp_path / 'dino.pth'}",
        "federation.num_clients=2", "federation.rounds=1", "federation.local_steps=1", "data.batch_size=2",
        "calibration.batches=1", "logger=csv", fast=False,
    )  # fmt: skip
    saved = load_file(folder / "model.safetensors")
    for name, tensor in net.state_dict().items():
        assert torch.equal(saved[name], tensor)  # all but the head is as it came
    assert summary["sparsity"] == pytest.approx(0.2)
    head = 384 * 10 + 10
    assert summary["trainable_fraction"] * summary["num_parameters"] == pytest.approx(int(0.8 * head + 0.5))
