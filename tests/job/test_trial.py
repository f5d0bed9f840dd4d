"""What could not be saved, or would stop a run in a later round, is refused before the first; shared ones are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn

from fedsparse import export, run
from fedsparse.core.weights import check_savable, distinct, load_weights, pack, save_weights
from fedsparse.job.finished import read_run

OPTIONS = ["model=mlp", "logger=csv", "pictures=false", "head.init=random", "calibration.cache=null"]


class Tied(nn.Module):
    """Two layers that share a weight, and a head; its buffers are views of one another, or empty."""

    def __init__(self, in_features=64, hidden=64, num_classes=10, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.flatten = nn.Flatten()
        self.one, self.two = nn.Linear(in_features, in_features), nn.Linear(in_features, in_features, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(in_features, num_classes)
        whole = torch.arange(8.0)
        self.register_buffer("whole", whole)
        self.register_buffer("again", whole)
        self.register_buffer("part", whole[4:])
        self.register_buffer("turned", whole.view(2, 4).t())
        self.register_buffer("number", torch.tensor(2.0))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(self.flatten(x))))))


def use(monkeypatch, net):
    monkeypatch.setattr("fedsparse.models.vision.mlp", net)


def test_shared_tensors_are_stored_once_and_read_under_all_names(tmp_path):
    net = Tied()
    save_weights(net, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"two.weight": "one.weight", "again": "whole"}
        assert "two.weight" not in set(file.keys())
    found = load_weights(tmp_path / "a")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_safetensors_own_reader_reads_it_too(tmp_path):
    nets = [nn.ModuleList([layer, layer]) for layer in (nn.Linear(3, 2), nn.Linear(3, 2))]
    save_weights(nets[0], tmp_path / "a")
    load_model(nets[1], tmp_path / "a")
    assert torch.equal(nets[1][1].weight, nets[0][0].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_buffers_of_any_kind_come_back(tmp_path, dtype):
    net = nn.Linear(2, 2)
    net.register_buffer("b", torch.tensor([0.0, 1.0, 0.5]).to(dtype))
    check_savable(net)
    save_weights(net, tmp_path / "a")
    found = load_weights(tmp_path / "a")["b"]
    assert found.dtype == dtype
    assert torch.equal(
        found.float() if dtype != torch.complex64 else found,
        torch.tensor([0.0, 1.0, 0.5]).to(dtype).to(torch.float32 if dtype != torch.complex64 else dtype),
    )


def test_what_lies_in_one_row_is_no_sharing():
    """A network that trains is views of one row: neighbours are not the same."""
    row = torch.arange(6.0)
    tensors, names = pack({"a": row[:2], "b": row[2:4], "c": row[4:]})
    assert (len(tensors), names) == (3, {})
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 3
    assert len(distinct({"a": row[:2], "b": row[:2], "c": row[2:4], "d": row[:3]})) == 3


def test_a_tied_model_trains_resumes_and_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, Tied)
    whole = run([*OPTIONS, "federation.rounds=3", "hydra.run.dir=whole"])
    run([*OPTIONS, "federation.rounds=2", "hydra.run.dir=a"])
    again = run(["resume=a", "federation.rounds=3"])
    assert again["global_sha256"] == whole["global_sha256"]
    net = read_run(tmp_path / "a").net
    assert net.two.weight is net.one.weight
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    assert again["num_parameters"] == parameters
    floats = parameters + 8 + 4 + 8 + 1  # a first model carries each tensor once, and the views of it
    first = run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=b", "mask_rule=dense", "sampling=everyone"])
    assert 0 <= first["bytes_setup_down"] - 20 * 4 * floats < 20 * 1000  # to twenty clients: headers, and the mask


def test_a_tied_model_is_exported(tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, Tied)
    run([*OPTIONS, "federation.rounds=1", "hydra.run.dir=a"])
    export.export(tmp_path / "a", ["safetensors"])
    small, net = export.load(tmp_path / "a/export"), read_run(tmp_path / "a").net
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(small(x), net(x), atol=1e-6)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"words": 3}

    def set_extra_state(self, state):
        pass


class Hooked(nn.Linear):
    """Its state has a tensor that it does not take back."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "more"] = torch.zeros(1)


class Wide(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("wide", torch.zeros(1, dtype=torch.complex128))


class Spread(nn.Linear):
    """One number seen as several: nothing can be written to it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1).expand(3))


@pytest.mark.parametrize(
    ("layer", "said"),
    [(Spread, "single memory location"), (Extra, "_extra_state"), (Hooked, "more"), (Wide, "complex128")],
)
def test_what_cannot_be_saved_is_refused_before_the_first_round(tmp_path, monkeypatch, layer, said):
    monkeypatch.chdir(tmp_path)

    def build(in_features, hidden, num_classes, seed):
        return nn.Sequential(nn.Flatten(), layer(in_features, 8), nn.ReLU(), nn.Linear(8, num_classes))

    use(monkeypatch, build)
    with pytest.raises(ValueError, match=rf"^the model cannot be saved.*{said}"):
        run([*OPTIONS, "model.head=3.*", "hydra.run.dir=a"])
    assert list(tmp_path.iterdir()) == []


def normed(norm):
    def build(in_features, hidden, num_classes, seed):
        torch.manual_seed(seed)
        inner = nn.Linear(in_features, 8) if norm is nn.BatchNorm1d else nn.Conv2d(1, 8, 3)
        first = [nn.Flatten(), inner] if norm is nn.BatchNorm1d else [inner]
        width = 8 if norm is nn.BatchNorm1d else 8 * 36
        return nn.Sequential(*first, norm(8), nn.Flatten(), nn.Linear(width, num_classes))

    return build


ONE_LEFT = [*OPTIONS, "model.cohort=1", "model.head=[]", "federation.local_steps=null", "federation.local_epochs=1"]


def sizes_of(parts, batch):
    """Samples of the last step of each client, by hand."""
    return [len(part) % batch or batch for part in parts]


@pytest.mark.parametrize(("norm", "refused"), [(nn.BatchNorm1d, True), (nn.BatchNorm2d, False)])
def test_a_step_of_one_sample_is_refused_where_the_model_cannot_take_it(tmp_path, monkeypatch, norm, refused):
    """Of 1080 training images each of 20 clients holds 54: steps of 53 leave one; with pixels there is a variance."""
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, normed(norm))
    options = [*ONE_LEFT, "federation.num_clients=20", "federation.rounds=1", "mask_rule=dense"]
    held = {len(part) for part in _parts(options)}
    size = max(held) - 1
    options += [f"data.batch_size={size}", "federation.cohort=1", "hydra.run.dir=a"]
    if refused:
        with pytest.raises(
            ValueError, match=rf"^client \d+ has a step of one sample.*holds {size + 1}.*data\.batch_size"
        ):
            run(options)
        assert list(tmp_path.iterdir()) == []
        assert run([*options, "federation.buffers=frozen"])["rounds"] == 1
    else:
        assert run(options)["rounds"] == 1


def _parts(options):
    from hydra import compose, initialize_config_dir

    from fedsparse.job.assemble import assemble_problem
    from fedsparse.job.shipped import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return assemble_problem(compose("train", overrides=[*options, "federation.cohort=1"])).parts


def test_the_smallest_step_is_that_of_the_dealt_batches():
    from fedsparse.data.rounds import LocalWork

    for held in range(1, 12):
        for size in range(1, 6):
            for work in (LocalWork(size, 3, None), LocalWork(size, None, 2)):
                dealt = work.batches(np.arange(held), np.random.default_rng(0))[1]
                assert work.least(held) == min(dealt)


def test_batches_of_one_are_refused_by_their_own_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, normed(nn.BatchNorm1d))
    with pytest.raises(ValueError, match=r"set data\.batch_size above 1"):
        run([*OPTIONS, "model.head=[]", "federation.cohort=1", "data.batch_size=1", "hydra.run.dir=a"])


class Counting(nn.Module):
    """An integer buffer that changes, in training alone."""

    def __init__(self, in_features, hidden, num_classes, seed):
        super().__init__()
        self.head = nn.Linear(in_features, num_classes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.head(x.flatten(1))


def test_an_integer_buffer_that_changes_is_refused_before_the_first_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, Counting)
    with pytest.raises(ValueError, match="the integer buffers seen change in training"):
        run([*OPTIONS, "mask_rule=dense", "federation.cohort=1", "hydra.run.dir=a"])
    assert list(tmp_path.iterdir()) == []


def test_trying_changes_no_bit(tmp_path, monkeypatch):
    """The trial draws dropout and moves statistics, of a copy."""
    monkeypatch.chdir(tmp_path)

    def build(in_features, hidden, num_classes, seed):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)
        )
        net.register_buffer("fixed", torch.arange(3))
        return net

    use(monkeypatch, build)
    options = [*OPTIONS, "model.head=[]", "federation.cohort=1", "federation.rounds=2"]
    tried = run([*options, "hydra.run.dir=a"])
    monkeypatch.setattr("fedsparse.job.execute.check_trainable", lambda *_: None)
    assert run([*options, "hydra.run.dir=b"])["global_sha256"] == tried["global_sha256"]
