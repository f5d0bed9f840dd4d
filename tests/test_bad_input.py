"""Bad input gets one line that says what is wrong and what would be right; nothing is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedsparse import run
from fedsparse.train import one_line

BASE = ["model=mlp", "logger=csv", "federation.rounds=1", "calibration.head_steps=1"]
BAD = [
    ("mask_rule=lest_sensitive", "Could not find 'mask_rule/lest_sensitive'.*least_sensitive"),
    ("federation.round=3", "there is no key 'federation.round'; --cfg job lists all keys"),
    ("+federation.round=3", "there is no key federation.round; --cfg job"),
    ("+sede=3", "there is no key sede"),
    ("+calibration.batchs=3", "batchs"),
    ("sparsity.ratio=1.0", "sparsity.ratio"),
    ("sparsity.ratio=-0.1", "sparsity.ratio"),
    ("sparsity.ratio=much", "sparsity.ratio"),
    ("sparsity.ratio=nan", "sparsity.ratio"),
    ("sparsity.mode=prune", "sparsity.mode"),
    ("sparsity.scope=layer", "sparsity.scope"),
    ("federation.num_clients=0", "federation.num_clients is 0; it must be a whole number of 1 or more"),
    ("federation.num_clients=2.5", "federation.num_clients is 2.5"),
    ("federation.num_clients=5000", "5000"),
    ("federation.rounds=0", "federation.rounds is 0"),
    ("federation.local_steps=0", "federation.local_steps is 0"),
    ("federation.local_epochs=2", "local_steps or federation.local_epochs"),
    ("federation.compile=maybe", "federation.compile is 'maybe'; it must be true or false"),
    ("trainer.devices=two", "trainer.devices=two, trainer.num_nodes=1 cannot be had here"),
    ("trainer.num_nodes=2", "trainer.num_nodes=2 needs torchrun or srun"),
    ("federation.cohort=some", "federation.cohort is 'some'; it must be a whole number of 1 or more, or auto"),
    ("federation.cohort=0", "federation.cohort is 0"),
    ("federation.clients_per_round=0", "clients_per_round is 0; it must be a count from 1 to 20"),
    ("federation.clients_per_round=0.0", "clients_per_round is 0.0"),
    ("federation.clients_per_round=21", "clients_per_round is 21"),
    ("federation.clients_per_round=1.5", "clients_per_round is 1.5"),
    ("federation.weight=heavy", "federation.weight is 'heavy'"),
    ("federation.buffers=drop", "federation.buffers is 'drop'"),
    ("data.batch_size=0", "data.batch_size is 0"),
    ("data.workers=-1", "data.workers is -1; give an integer of at least 0"),
    ("data.workers=1.5 data.stream=true", "data.workers is 1.5"),
    ("data.stream=disk", "data.stream is 'disk'; it must be true or false"),
    ("optimizer.lr=0", "optimizer.lr is 0; it must be a finite number above 0"),
    ("optimizer.lr=-1", "optimizer.lr is -1"),
    ("optimizer.lr=inf", "optimizer.lr is inf"),
    ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
    ("optimizer.momentum=1.5", "optimizer.momentum"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm is 0"),
    ("partition=noniid_nc50", "50.*10"),
    ("partition.nc=11 partition=noniid_nc1", "11.*10"),
    ("partition=natural", "user"),
    ("partition=dirichlet partition.beta=0", "beta"),
    ("calibration.where=moon", "calibration.where is 'moon'"),
    ("calibration.head_steps=-1", "calibration.head_steps is -1"),
    ("calibration.fisher=exact", "calibration.fisher"),
    ("model.trainable=last_blocks:9 model=vit_digits", "last_blocks"),
    ("model.trainable=nothing.*", "nothing"),
    ("mask_rule=from_file", "mask_rule.path"),
    ("mask_rule=from_file mask_rule.path=absent.safetensors", "absent.safetensors"),
    ("data=arrays data.root=absent", "absent"),
    ("trainer.precision=bf16-true", "bf16-mixed"),
    ("seed=-1", "seed is -1"),
    ("data.augment=randaugment", "data.augment=randaugment needs pixels"),
    ("data.augment=blur", "data.augment is 'blur'"),
    ("head.init=warm", "head.init is 'warm'"),
    ("head.ridge=-1", "head.ridge is -1"),
    ("+head.rigde=1", "there is no key head.rigde"),
    ("head.frozen=true mask_rule=random sparsity.unit=output sparsity.ratio=0.999", "lets no weight train"),
    ("federation.store=disk", "federation.store is 'disk'; it must be memory or file"),
    ("mask.owner=everyone", "mask.owner is 'everyone'"),
    ("mask.owner=client exchange=full", "mask.owner=client needs exchange=masked"),
    ("mask_rule=talos mask_rule.score=loss", "mask_rule.score"),
    ("model=timm model.name=resnet_18 model.net.pretrained=false", "close to it are"),
    ("model.checkpoint=absent.safetensors model=vit_digits", "absent.safetensors"),
]


@pytest.mark.parametrize(("options", "says"), BAD, ids=[options for options, _ in BAD])
def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011  (Hydra's and our own)
        run([*BASE, *options.split()])
    line = one_line(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    assert "HYDRA_FULL_ERROR" not in line, line
    import re

    assert re.search(says, line), line


def command(*options, **env):
    return subprocess.run(
        [sys.executable, "-m", "fedsparse.train", *BASE, *options],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_the_command_line_prints_it_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("federation.rounds=0")
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == "fedsparse: federation.rounds is 0; it must be a whole number of 1 or more"
    assert len(lines) <= 2
    assert "Traceback" in command("federation.rounds=0", HYDRA_FULL_ERROR="1").stderr


def test_a_used_run_folder_is_not_written(tmp_path):
    folder = tmp_path / "used"
    run([*BASE, f"hydra.run.dir={folder}"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run; continue it with resume="):
        run([*BASE, f"hydra.run.dir={folder}", "seed=1"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file") as caught:
        run([*BASE, f"hydra.run.dir={tmp_path / 'file' / 'run'}"])
    assert one_line(caught.value).endswith("Not a directory")


LIMITED = """
import resource, signal, sys
from fedsparse.train import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.argv[0] = "train"
main()
"""


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands in for a full disk: the mask cannot be written."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *BASE, f"hydra.run.dir={folder}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("fedsparse: ")
    assert not (folder / "summary.json").exists()


def write_arrays(folder, **changes):
    """A data set of the user's own, with something wrong in it."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, n in (("train", 80), ("val", 20), ("test", 20)):
        split = {"x": rng.normal(size=(n, 1, 8, 8)).astype("float32"), "y": np.arange(n) % 10}
        if name == "train":
            split |= {key: change(split[key].copy()) for key, change in changes.items()}
        np.savez(folder / f"{name}.npz", **split)
    return ["data=arrays", f"data.root={folder}", "federation.num_clients=4", "mask_rule=random"]


def with_nan(x):
    x[3, 0, 2, 2] = np.nan
    return x


def test_good_arrays_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([*BASE, *write_arrays(tmp_path / "data")])["rounds"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": with_nan}, "(?i)nan"),
        ({"y": lambda y: y - 1}, "label"),
        ({"y": lambda y: y[:-1]}, "79"),
        ({"x": lambda x: x[:0], "y": lambda y: y[:0]}, "empty|no samples"),
    ],
)
def test_bad_arrays(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=says) as caught:  # noqa: PT011
        run([*BASE, *write_arrays(tmp_path / "data", **changes)])
    assert "HYDRA_FULL_ERROR" not in one_line(caught.value)


def test_a_head_that_is_told_to_be_too_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"10 outputs and the data 15 classes; set model.net.num_classes=15"):
        run([*BASE, *write_arrays(tmp_path / "data", y=lambda y: y + 5), "model.net.num_classes=10"])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b"not a mask"), "damaged|not a"),
        (lambda path: save_file({"other.weight": torch.ones(3, dtype=torch.bool)}, path), "other.weight"),
    ],
)
def test_a_bad_mask_file(tmp_path, monkeypatch, write, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match=says):
        run([*BASE, "mask_rule=from_file", f"mask_rule.path={tmp_path / 'mask.safetensors'}"])


def test_a_loss_that_explodes_everywhere_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["optimizer.lr=1e30", "optimizer.clip_norm=null", "mask_rule=random", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(RuntimeError, match="round 1: .* every client became NaN"):
        run([*BASE, *options])
    assert not (tmp_path / "run" / "summary.json").exists()
