"""AutoFLIP's published commands: each composes to what its source says, and runs on files of the real formats."""

from __future__ import annotations

import image_files
import leaf_json
import pytest
from safetensors.torch import load_file
from test_experiments import composed

from fedsparse import run
from fedsparse.job.config import check
from fedsparse.masks import Mask

PUBLISHED = {  # data, model, partition, hidden, K, C, evaluation, explorers, their epochs, pruned, seed
    "cifar10": ("two_cnn", "patho", 32, 20, 0.25, 10, 1.0, 150, 0.3, 0),
    "mnist": ("two_cnn", "patho", 32, 20, 0.25, 10, 1.0, 150, 0.3, 0),
    "cifar100": ("two_cnn", "diri", 128, 20, 0.05, 10, 1.0, 150, 0.3, 0),
    "femnist": ("femnist_cnn", "natural", 64, 100, 0.25, 20, 1.0, 150, 0.3, 0),
    "shakespeare": ("next_char_lstm", "natural", 256, 1129, 0.016, 10, 0.03, 100, 0.5, 42),
}
IMAGES = ("cifar10", "mnist", "cifar100")


@pytest.mark.parametrize(("data", "expected"), PUBLISHED.items())
def test_what_differs_between_its_commands(data, expected):
    cfg, choices = composed(f"experiment=autoflip_{data}")
    check(cfg)
    federation = cfg.federation
    assert choices["data"] == data
    assert expected == (
        choices["model"], choices["partition"], cfg.model.hidden, federation.num_clients,
        federation.clients_per_round, federation.eval_every, cfg.explore.clients, cfg.explore.epochs,
        cfg.sparsity.ratio, cfg.seed,
    )  # fmt: skip


@pytest.mark.parametrize("data", PUBLISHED)
def test_what_all_its_commands_have(data):
    cfg, choices = composed(f"experiment=autoflip_{data}")
    assert [choices[group] for group in ("mask_rule", "optimizer", "server", "schedule", "evaluation")] == [
        "autoflip", "adam", "fedavgm_ema", "step", "per_client",
    ]  # fmt: skip
    assert (cfg.federation.rounds, cfg.federation.local_epochs, cfg.federation.local_steps) == (200, 5, None)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.clip_norm) == (3e-4, 0, None)
    assert (cfg.schedule.gamma, cfg.schedule.every, cfg.server.beta, cfg.server.lr) == (0.99, 1, 0.9, 1.0)
    assert (cfg.data.batch_size, cfg.explore.patience, cfg.explore.steps) == (350, 40, None)
    assert (cfg.mask_rule.normalise, cfg.sparsity.mode, cfg.head.init) == ("minmax", "prune", "random")
    assert cfg.data.augment == ("none" if data == "shakespeare" else {"hflip": 0.5, "jitter": 0.5})
    assert cfg.data.local_test == (0.2 if data in IMAGES else None)


@pytest.mark.parametrize("data", PUBLISHED)
def test_exploration_gives_no_head_start_unless_asked(data):
    assert composed(f"experiment=autoflip_{data}")[0].phases.explore.updates_model is False
    asked, _ = composed(f"experiment=autoflip_{data}", "explore.keep_model=true")
    assert asked.phases.explore.updates_model is True


def test_the_two_class_and_the_dirichlet_split():
    assert composed("experiment=autoflip_mnist")[0].partition.nc == 2
    assert composed("experiment=autoflip_cifar100")[0].partition.concentration == 1.0
    assert composed("experiment=autoflip_femnist")[0].data.users == 0.0282


@pytest.fixture
def files(tmp_path):
    """Write a few samples in each data set's own format; returns the overrides that read them."""
    writers = {
        "cifar10": lambda root: image_files.write_cifar10(root, per_batch=40),
        "mnist": lambda root: image_files.write_mnist(root, train=200),
        "cifar100": lambda root: image_files.write_cifar100(root, train=200, test=40, classes=10),
        "femnist": lambda root: leaf_json.write_both(root, leaf_json.images),
        "shakespeare": lambda root: leaf_json.write_both(root, leaf_json.texts),
    }
    leaf = ["federation.num_clients=3", "data.users=1.0", "explore.clients=1.0"]

    def write(data):
        root = tmp_path / "files"
        if not root.exists():
            writers[data](root)
        return [f"data.root={root}", *(["federation.num_clients=5"] if data in IMAGES else leaf)]

    return write


SMALL = [
    "model.hidden=8", "data.batch_size=16", "federation.rounds=2", "federation.clients_per_round=2",
    "federation.local_epochs=1", "federation.eval_every=1", "explore.epochs=2", "explore.patience=1", "logger=csv",
    "pictures=false", "calibration.cache=null",
]  # fmt: skip
HEADER, FLOAT = 48, 4  # bytes


def small_run(run_in, files, data, *overrides):
    return run_in(f"runs/{data}", *small(data, files), *overrides, fast=False)


def small(data, files):
    return [f"experiment=autoflip_{data}", *files(data), *SMALL]


@pytest.mark.parametrize("data", PUBLISHED)
@pytest.mark.filterwarnings(image_files.CHANGED, "ignore:.*tie at the threshold.*")
def test_each_runs_on_files_of_the_real_format(run_in, files, data):
    summary, folder = small_run(run_in, files, data)
    weights, mask = load_file(folder / "model.safetensors"), Mask.load(folder / "mask.safetensors")
    assert set(mask.tensors) == set(weights)
    for name, trains in mask.tensors.items():
        assert not weights[name][~trains].any()  # what is pruned is exactly zero
        assert trains.any()  # no dead layer
    size, trained = (sum(int(t.numel()) for t in weights.values()), sum(int(t.sum()) for t in mask.tensors.values()))
    head = sum(t.numel() for name, t in weights.items() if name.startswith("head."))
    ratio = PUBLISHED[data][8]
    assert trained == head + int((1 - ratio) * (size - head) + 0.5)
    assert summary["bytes_up"] == 2 * 2 * (HEADER + FLOAT * trained)  # rounds x clients, and no position
    explorers = 5 if data in IMAGES else 3
    assert summary["bytes_setup_up"] == explorers * (HEADER + FLOAT * size)  # a deviation for every weight
    assert summary["dropped_updates"] == 0
    rows = (folder / "clients.csv").read_text().splitlines()
    assert len(rows) > 2 * explorers
    assert "participants/local/top1_mean" in summary


@pytest.mark.filterwarnings(image_files.CHANGED, "ignore:.*tie at the threshold.*")
def test_the_originals_head_start_and_its_mask_run_as_the_comment_says(run_in, files):
    compat = [
        "explore.keep_model=true",
        "mask_rule.compat=original",
        "sparsity.always_train=[]",
        "sparsity.min_density=0",
    ]
    summary, _ = small_run(run_in, files, "cifar10", *compat)
    assert summary["compression"] == pytest.approx(1 / 0.7, rel=0.01)  # total / (total - zeros), as it reports


@pytest.mark.slow
@pytest.mark.filterwarnings(image_files.CHANGED, "ignore:.*tie at the threshold.*")
@pytest.mark.parametrize("rounds", [1, 2])
def test_more_rounds_after_a_finished_run_end_at_the_same_bits(run_in, files, rounds):
    """The exploration is a round of its own: it counts neither as asked for nor as done."""
    whole, _ = small_run(run_in, files, "mnist", "federation.rounds=3")
    _, folder = run_in("runs/part", *small("mnist", files), f"federation.rounds={rounds}", fast=False)
    again = run([f"resume={folder}", "federation.rounds=3"])
    assert (again["rounds"], again["global_sha256"]) == (1 + 3, whole["global_sha256"])
    assert again["client_steps"] == whole["client_steps"]


def test_a_head_start_without_an_exploration_is_refused(run_in):
    with pytest.raises(ValueError, match="explore.keep_model=true needs an exploration.*set phases=explore"):
        run_in("none", "mask_rule=random", "explore.keep_model=true")
