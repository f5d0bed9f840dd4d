"""A run folder that somebody sends: nothing that its files name is called, unless its reader trusts it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sent import SHORT, change

from fedsparse import export, repeat, report, run
from fedsparse.federation.stores.store import FileStore
from fedsparse.job import trust
from fedsparse.job.resume import read_job
from fedsparse.simulation.checkpoint import RoundCheckpoint


@pytest.fixture
def folder(sent_folder):
    return sent_folder


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


class Touch:
    """Pickles to a program that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def shell(tmp_path, canary):
    return {"_target_": "torch.utils.collect_env.run", "command": f"id > {canary}"}


def unpickled(tmp_path, canary):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Touch(canary)))
    return {"_target_": "torch.load", "f": str(tmp_path / "evil.pt"), "weights_only": False}


def hub(tmp_path, canary):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(f"def entry():\n    open({str(canary)!r}, 'w')\n")
    return {"_target_": "torch.hub.load", "repo_or_dir": str(tmp_path / "hub"), "model": "entry", "source": "local"}


def overwrite(tmp_path, canary):
    path = {"_target_": "pathlib.Path", "_args_": [str(canary)]}
    return {"_target_": "fedsparse.core.files.write", "path": path, "content": "x"}


def beside_a_shipped_target(tmp_path, canary):
    return {"_target_": "fedsparse.data.datasets.digits", "_args_": [shell(tmp_path, canary)]}


def by_a_reference(tmp_path, canary):
    return {"_target_": "${name_of_it}", "command": f"id > {canary}"}


def of_the_library(tmp_path, canary):
    return {"_target_": "hydra.utils.instantiate", "config": shell(tmp_path, canary)}


PLANTED = [
    shell, unpickled, hub, overwrite, beside_a_shipped_target, by_a_reference, of_the_library,
]  # fmt: skip
NAMED = r"collect_env\.run|torch\.load|hub\.load|fedsparse\.core\.files\.write|hydra\.utils\.instantiate|data\._args_"


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a command -> its exit code and its lines of errors."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def go(command, folder, *names):
        monkeypatch.setitem(os.environ, "HYDRA_FULL_ERROR", "0")  # which a command sets
        main, arguments = COMMANDS[command](folder, names)
        monkeypatch.setattr(sys, "argv", ["fedsparse", *arguments])
        capsys.readouterr()
        code, last = 0, ""
        try:
            main()
        except SystemExit as stopped:
            code, last = (1, stopped.code) if isinstance(stopped.code, str) else (stopped.code or 0, "")
        return code, [*capsys.readouterr().err.splitlines(), *last.splitlines()]

    return go


def trusting(names):
    return [f"trust=[{','.join(names)}]"] if names else []


def resuming(folder, names):
    from fedsparse import train

    return train.main, [f"resume={folder}", "federation.rounds=2", *trusting(names)]


def exporting(folder, names):
    return export.main, [f"run={folder}", "format=safetensors", *trusting(names)]


def scaling(folder, names):
    return report.main, [str(folder.parent), "--scale", *(["--trust", *names] if names else [])]


def repeating(folder, names):
    return repeat.main, [str(folder.parent), "--seeds", "1", *(["--trust", *names] if names else [])]


COMMANDS = {"resume": resuming, "export": exporting, "report": scaling, "repeat": repeating}


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_sent_folder_names_is_not_run(folder, typed, tmp_path, canary, plant, command):
    change(folder, name_of_it="torch.utils.collect_env.run", data=plant(tmp_path, canary))
    code, lines = typed(command, folder)
    assert code != 0
    assert not canary.exists()
    assert len([line for line in lines if re.search(NAMED, line)]) == 1, lines
    assert len(lines) == (1 if command in ("resume", "export") else 2)  # and how many folders were left out


def test_one_refused_folder_leaves_the_others_to_the_report(folder, finished_run, typed, tmp_path, canary):
    shutil.copytree(finished_run, folder.parent / "good")
    change(folder, data=shell(tmp_path, canary))
    code, lines = typed("report", folder)
    assert code == 1
    assert len(lines) == 2
    assert (folder.parent / "good" / "scale.json").is_file()
    assert not (folder / "scale.json").exists()


OWN = """
from torch import nn

from fedsparse.simulation import ClientModule
from fedsparse.masks.rules import Random
from os import system

CALLS = []


class Client(ClientModule):
    def losses(self, forward, x, y):
        CALLS.append("losses")
        return super().losses(forward, x, y)


class Rule(Random):
    pass


def net(in_features, num_classes):
    CALLS.append("net")
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of one's own, and a run with its client, mask rule and net."""
    (tmp_path / "code" / "mypackage").mkdir(parents=True)
    (tmp_path / "code" / "mypackage" / "__init__.py").write_text("import os\n")
    (tmp_path / "code" / "mypackage" / "parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "run"
    parts = ["client._target_=mypackage.parts.Client", "mask_rule._target_=mypackage.parts.Rule", "model.head=3.*"]
    net = ["model._target_=mypackage.parts.net", "~model.hidden", "~model.seed"]
    run([*SHORT, *parts, *net, f"hydra.run.dir={folder}"])
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_ones_own_goes_on_where_it_is_trusted(own, typed, command):
    pytest.importorskip("torch_pruning")
    code, lines = typed(command, own)
    assert code != 0
    assert any("mypackage.parts" in line and "trust=[mypackage" in line for line in lines)
    code, lines = typed(command, own, "my")
    assert code != 0
    code, lines = typed(command, own, "mypackage")
    assert code == 0, lines
    usual = ("round ", "fedsparse: digits, mlp, ", "fedsparse: resumes digits, mlp, ")
    assert [line for line in lines if not line.startswith(usual)] == []
    made = {"resume": "summary.json", "export": "export/model.safetensors", "report": "scale.json"}
    if command == "repeat":
        assert len(list(own.parent.glob("*/summary.json"))) == 2
    else:
        assert (own / made[command]).is_file()
    if command == "export":
        with pytest.raises(ValueError, match=r"trust=\[mypackage.parts\]"):
            export.load(own / "export")
        assert export.load(own / "export", ["mypackage"])(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_resume_by_name_from_python(own):
    assert run([f"resume={own}", "federation.rounds=2", "trust=mypackage"])["rounds"] == 2


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mypackage.os.system", "is of posix, which"),
        ("mypackage.parts.system", "is of posix, which"),
        ("mypackage.parts.nn.Linear", "is of torch.nn.modules.linear, which"),
        ("mypackage.parts.CALLS.append", "is of builtins, which"),
        ("mypackage.parts.Client.load_from_checkpoint", "is of lightning.pytorch.core.module, which"),
        ("mypackage.parts.Other", "cannot be imported here"),
        ("mypackage_of_another.f", "is named by no file"),
        ("mypackage", "nothing that can be called"),
        ("mypackage.parts.nn", "nothing that can be called"),
        (["mypackage.parts.net"], "no dotted name"),
        ("mypackage.parts.net ", "no dotted name"),
        (None, "no dotted name"),
    ],
)
def test_trust_in_a_package_is_not_trust_in_what_it_imports(own, target, said):
    with pytest.raises(ValueError, match=said):
        trust.admitted({"a": [{"_target_": target}]}, ["mypackage"])


@pytest.mark.parametrize(
    ("names", "target", "admits"),
    [
        (["my"], "mypackage.f", False),
        (["mypackage"], "mypackage.sub.f", True),
        (["mypackage.sub"], "mypackage.sub.f", True),
        (["mypackage.sub.f"], "mypackage.sub.f", True),
        (["mypackage.sub"], "mypackage.submarine.f", False),
        (["mypackage.sub.f"], "mypackage.sub", False),
        ([], "mypackage.f", False),
    ],
)
def test_a_name_admits_itself_and_what_lies_below(names, target, admits):
    assert trust.covers(names, target) is admits


@pytest.mark.parametrize("text", ["", "[]", "a b", "[a,b;c]", ".os", "os.", "*", "[../x]", "${oc.env:X}"])
def test_what_is_no_name_of_a_package_admits_nothing(text):
    if text in ("", "[]"):
        assert trust.split([f"trust={text}", "x=1"]) == ((), ["x=1"])
    else:
        with pytest.raises(ValueError, match="takes packages"):
            trust.split([f"trust={text}"])


def test_arguments_that_conf_does_not_name_are_asked_about(folder, tmp_path):
    change(folder, trainer__default_root_dir=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"trainer.default_root_dir, an argument of lightning.Trainer.*trust="):
        read_job(folder)
    assert read_job(folder, trusted=["lightning.Trainer"]).cfg.trainer.default_root_dir == str(tmp_path / "elsewhere")
    assert read_job(folder, ["trainer.default_root_dir=here"]).cfg.trainer.default_root_dir == "here"


@pytest.mark.parametrize(
    "part",
    [
        {"evaluation": {"_target_": "fedsparse.simulation.Personal", "path": "out.csv"}},
        {"model": {"_target_": "fedsparse.models.pretrained.timm_model", "checkpoint_path": "evil.pth"}},
        {"model": {"_target_": "fedsparse.models.pretrained.timm_model", "pretrained_cfg": {"file": "evil.pth"}}},
        {"logger": {"a": {"_target_": "fedsparse.simulation.wandb_logger", "settings": {"base_url": "x"}}}},
        {"logger": {"a": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "sub_dir": "../../x"}}},
        {"trainer__plugins": [{"_target_": "lightning.pytorch.plugins.io.TorchCheckpointIO"}]},
        {"callbacks": {"a": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "/x"}}},
        {"server": {"_target_": "torch.optim.SGD", "_args_": [1]}},
    ],
    ids=lambda part: str(part)[:60],
)
def test_parts_that_write_or_load_elsewhere_are_refused(folder, part):
    change(folder, **part)
    with pytest.raises(ValueError, match=r"is named by no file of conf/"):
        read_job(folder)


@pytest.mark.parametrize("name", ["/elsewhere", "../elsewhere", "a/../../b", "~/x", "$HOME", "C:\\x", "..\\x"])
def test_a_loggers_files_stay_in_the_run_folder(folder, name):
    change(folder, logger={"tensorboard": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": name}})
    with pytest.raises(ValueError, match=r"logger.tensorboard.name: .* leads out of the run folder"):
        read_job(folder)
    assert read_job(folder, ["logger=tensorboard"]).cfg.logger.tensorboard.name == "tensorboard"


def test_a_stored_cache_is_not_written_to(folder, tmp_path):
    change(folder, calibration__cache=str(tmp_path / "elsewhere"))
    assert read_job(folder).cfg.calibration.cache is None
    assert read_job(folder, ["calibration.cache=mine"]).cfg.calibration.cache == "mine"
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "checkpoints" / "last.previous.ckpt").unlink(missing_ok=True)
    run([f"resume={folder}", "federation.rounds=2"])
    assert not (tmp_path / "elsewhere").exists()


def test_links_within_the_folder_and_a_folder_by_a_link_may_stay(folder, tmp_path):
    (folder / "wandb").mkdir()
    (folder / "wandb" / "latest-run").symlink_to("run-1", target_is_directory=True)
    (tmp_path / "link").symlink_to(folder)
    assert run([f"resume={tmp_path / 'link'}", "federation.rounds=2"])["rounds"] == 2
    os.mkfifo(folder / "metrics.csv.part")
    with pytest.raises(ValueError, match="neither file nor folder"):
        run([f"resume={folder}", "federation.rounds=3"])


@pytest.mark.parametrize("name", ["wandb", "other"])
def test_nothing_is_sent_to_an_entity_that_a_folder_names(folder, caplog, name):
    target = {"_target_": "fedsparse.simulation.wandb_logger", "_partial_": True}
    change(folder, logger={name: target | {"offline": False, "entity": "stranger"}})
    assert read_job(folder).cfg.logger[name].entity is None
    assert f"the stored logger.{name}.entity=stranger is not used" in caplog.text
    if name == "wandb":
        assert read_job(folder, ["logger.wandb.entity=mine"]).cfg.logger.wandb.entity == "mine"
    else:
        with pytest.raises(ValueError, match="has no logger=wandb"):
            read_job(folder, ["logger.wandb.entity=mine"])


def test_rows_of_a_file_are_numbers(tmp_path):
    (tmp_path / "own.bin").write_bytes(b"A" * 512)
    store = FileStore(tmp_path / "own.bin")
    state = {"slots": {0: 0}, "shape": (16, 2), "dtype": "O", "before": []}
    with pytest.raises(ValueError, match="of type 'O'"):
        store.load_state_dict(state)  # a row of it would be read at the address 0x4141414141414141
    store.load_state_dict(state | {"dtype": "float32"})
    assert np.isfinite(store.get(0, torch.zeros(2)).numpy()).all()


def test_a_sent_checkpoint_names_nothing_that_a_better_one_would_remove(tmp_path):
    callback = RoundCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val/acc", mode="max", filename="best")
    sent = {"best_model_path": "/x/..", "kth_best_model_path": "/x/.", "last_model_path": "/x/summary.json"}
    models = {"/x/..": torch.tensor(0.1), "/y/best.ckpt": torch.tensor(0.2)}
    callback.load_state_dict(callback.state_dict() | sent | {"best_k_models": models})
    assert {getattr(callback, name) for name in sent} == {""}
    assert list(callback.best_k_models) == [str(tmp_path / "checkpoints" / "best.ckpt")]


@pytest.mark.parametrize(
    "override",
    [
        "hydra.launcher._target_=os.system",
        "+hydra.callbacks.evil._target_=os.system",
        "hydra/launcher=joblib",
        "hydra.searchpath=[file:///tmp]",
        "~hydra.callbacks",
        "+callbacks@hydra.callbacks=early_stopping",
        "hydra.run.dir=/elsewhere",
        "--config-dir=/elsewhere",
        "nonsense",
        "optimizer.lr=0.1,0.2",
    ],
)
def test_stored_overrides_of_hydra_itself_are_refused(folder, typed, override):
    path = folder / ".hydra" / "overrides.yaml"
    path.write_text(yaml.safe_dump([*yaml.safe_load(path.read_text()), override]))
    code, lines = typed("repeat", folder)
    assert code != 0
    assert len(lines) == 2, lines
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("text", ["a: 1", "- [seed=1]", "- 1", "- &a x\n- *a", "[" * 1000, "\x00"])
def test_overrides_that_are_none_are_one_line(folder, typed, text):
    (folder / ".hydra" / "overrides.yaml").write_text(text)
    code, lines = typed("repeat", folder)
    assert code != 0
    assert len(lines) == 1
    assert "overrides.yaml is damaged" in lines[0]


def test_a_cell_of_a_sweep_is_compared_without_its_secrets(folder, monkeypatch, capsys):
    """A cell may ask for what was typed for it now, as it did when it began."""
    monkeypatch.setenv("GATE_SECRET", "change")
    typed = [*SHORT, "seed=1", "exchange.payload=${oc.env:GATE_SECRET}"]
    cell = folder.parent / "grid" / "cell"
    assert repeat.run(typed, cell, trusted=["oc.env"])
    assert repeat.run([*typed, "federation.rounds=2"], cell, trusted=["oc.env"])
    assert json.loads((cell / "summary.json").read_text())["rounds"] == 2
    change(cell, model__name="${oc.env:PATH}")
    assert not repeat.run([*SHORT, "seed=1", "exchange.payload=change"], cell)
    assert os.environ["PATH"] not in capsys.readouterr().err


def test_a_sent_tokenizer_brings_no_code(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from fedsparse.data.tokens import load_tokenizer

    module = "def f():\n    pass\nopen('canary', 'w')\n"
    (tmp_path / "evil.py").write_text(module)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    words = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="cannot be had"):
        load_tokenizer(str(tmp_path))
    assert not Path("canary").exists()
