"""Parts of one's own, from outside the package: ``--config-dir`` and a package beside it, held against sums by hand."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import pages
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedsparse import calibrate, export, repeat, report, run, train
from fedsparse.data import datasets, partition
from fedsparse.job.resume import read_job
from fedsparse.models.vision import mlp

pytestmark = pytest.mark.slow

OUTSIDE = Path(__file__).parent / "outside"
CLIENTS, EPOCHS, LR = 4, 2, 0.1
BASE = {  # one round of whole passes by plain gradient descent, in float64: what a few lines by hand can follow
    "data": "digits",
    "data.batch_size": 2000,
    "model": "mlp",
    "head.init": "random",
    "mask_rule": "dense",
    "federation.num_clients": CLIENTS,
    "federation.clients_per_round": "1.0",
    "federation.rounds": 1,
    "federation.local_steps": "null",
    "federation.local_epochs": EPOCHS,
    "federation.cohort": 1,
    "optimizer.lr": LR,
    "optimizer.momentum": 0,
    "optimizer.clip_norm": "null",
    "trainer.precision": "64-true",
    "calibration.cache": "null",
    "logger": "csv",
    "pictures": "false",
}

OPTIONS = [f"{key}={value}" for key, value in BASE.items()]
EXPERIMENT = """# @package _global_
defaults:
  - override /aggregation: midrange
  - override /partition: blocks
"""


def start(data):
    """The reference net as every run begins with it, in float64."""
    return mlp(data.train.x[0].numel(), 64, data.classes, seed=0).double()


def rows_of(net, data, parts, loss=F.cross_entropy, mask=1.0):
    """What each client changes by gradient descent on all that it holds: (K, P)."""
    x, y, first = data.train.x.double(), data.train.y, parameters_to_vector(net.parameters()).detach()
    rows = []
    for part in parts:
        local = copy.deepcopy(net)
        for _ in range(EPOCHS):
            gradient = torch.autograd.grad(loss(local(x[part]), y[part]), list(local.parameters()))
            row = parameters_to_vector(local.parameters()).detach() - LR * mask * parameters_to_vector(gradient)
            vector_to_parameters(row, local.parameters())
        rows.append(row - first)
    return torch.stack(rows)


def held(parts):
    """What each client weighs: (K, 1)."""
    return torch.tensor([len(part) for part in parts], dtype=torch.float64).unsqueeze(1)


def mean(rows, parts):
    """Average by what each client holds: (P,)."""
    return (rows * held(parts)).sum(0) / held(parts).sum()


def printed():
    """The three steps of the page: the class and the YAML by their files, and the command."""
    page = pages()["docs/how-to/own-parts.md"].split("\n## ")[0]
    blocks = re.findall(r"`([\w/.]+)`:\n\n```\w+\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)\n```", page)
    assert [name for name, _ in blocks] == ["mine/rules.py", "conf/mask_rule/heaviest.yaml"]
    return dict(blocks), command.split()


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A folder with ``mine`` and ``conf``: the rule of the page, and a part of each other kind."""
    folder = shutil.copytree(OUTSIDE, tmp_path_factory.mktemp("own"), dirs_exist_ok=True)
    write(folder, printed()[0])
    return folder


@pytest.fixture
def typed(own, tmp_path, monkeypatch):
    """Type a command in an empty folder, in this process: ``typed("mask_rule=heaviest")`` -> the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(own)
    monkeypatch.setattr("warnings.formatwarning", None)

    def go(*overrides, of=train):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        flags = ["--config-dir", str(own / "conf"), "hydra.run.dir=run"]
        monkeypatch.setattr(sys, "argv", ["fedsparse", *flags, *OPTIONS, *overrides])
        of.main()
        return tmp_path / "run"

    return go


def change_of(folder, net):
    """What a run has changed of the model that it began with: (P,)."""
    after = load_file(folder / "model.safetensors")
    return torch.cat([(after[name] - value.detach()).flatten() for name, value in net.named_parameters()])


def mask_rule(typed, data, net, parts):
    """The largest fifth of the weights, by a sort; the head always trains."""
    row, head = parameters_to_vector(net.parameters()).detach().numpy(), parameters_to_vector(net.head.parameters())
    body = len(row) - len(head)
    mask = np.arange(len(row)) >= body
    mask[np.argsort(-np.abs(row[:body]))[: int(0.2 * body + 0.5)]] = True
    folder = typed("mask_rule=heaviest", "sparsity.ratio=0.8")
    chosen = load_file(folder / "mask.safetensors")
    assert np.array_equal(np.concatenate([chosen[name].flatten() for name, _ in net.named_parameters()]), mask)
    return folder, mean(rows_of(net, data, parts, mask=torch.from_numpy(mask).double()), parts)


def sparsifier(typed, data, net, parts):
    """Each coordinate is averaged over the clients where it has grown."""
    rows = rows_of(net, data, parts)
    weight = (rows > 0) * held(parts)
    return typed("exchange=growing"), (rows * weight).sum(0) / weight.sum(0).clamp(min=1)


def exchange(typed, data, net, parts):
    return typed("exchange=halved"), mean(rows_of(net, data, parts), parts) / 2


def deal(typed, data, net, parts):
    assert len(data.train.y) == 1167
    blocks = [range(292), range(292, 584), range(584, 876), range(876, 1167)]
    return typed("partition=blocks"), mean(rows_of(net, data, blocks), blocks)


def aggregation(typed, data, net, parts):
    rows = rows_of(net, data, parts)
    return typed("aggregation=midrange"), (rows.min(0).values + rows.max(0).values) / 2


def model(typed, data, net, parts):
    torch.manual_seed(0)
    layers = [("hidden", nn.Linear(64, 8)), ("act", nn.Tanh()), ("head", nn.Linear(8, 10))]
    own = nn.Sequential(OrderedDict([("flat", nn.Flatten()), *layers])).double()
    return typed("model=tanh"), mean(rows_of(own, data, parts), parts), own


def data_set(typed, data, net, parts):
    x = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([int(np.argmax([image[0, row].sum() for row in range(4)])) for image in x])
    own = datasets.Dataset(*[datasets.Split(x[part], y[part]) for part in [slice(200)] * 3], classes=4, name="rows")
    parts, net = partition.iid(y[:200], CLIENTS, seed=0), start(own)
    return typed("data=bright_rows"), mean(rows_of(net, own, parts), parts), net


def loss(typed, data, net, parts):
    """Nine tenths of the label's log-likelihood, and a tenth of the mean over all classes."""

    def smoothed(logits, y):
        likely = logits.log_softmax(1)
        return -(0.9 * likely[torch.arange(len(y)), y] + 0.1 * likely.mean(1)).mean()

    return typed("client=smoothed"), mean(rows_of(net, data, parts, smoothed), parts)


def topology(typed, data, net, parts):
    """Clients 0 and 2 share a model, the first, which the run folder holds; 1 and 3 another."""
    rows, folder = rows_of(net, data, parts), typed("topology=even_odd")
    groups = [mean(rows[[k, k + 2]], [parts[k], parts[k + 2]]) for k in (0, 1)]
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    (second,) = checkpoint["callbacks"]["FederatedRounds"]["server"]["rows"] - parameters_to_vector(net.parameters())
    torch.testing.assert_close(second, groups[1], rtol=1e-9, atol=1e-12)
    return folder, groups[0]


def sampling(typed, data, net, parts):
    folder = typed("sampling=first", "federation.clients_per_round=3")
    return folder, mean(rows_of(net, data, parts[:3]), parts[:3])


KINDS = [mask_rule, sparsifier, exchange, deal, aggregation, model, data_set, loss, topology, sampling]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_part_of_ones_own_does_what_a_few_lines_by_hand_do(typed, kind):
    data = datasets.digits()
    net, parts = start(data), partition.iid(data.train.y, CLIENTS, seed=0)
    folder, expected, *other = kind(typed, data, net, parts)
    torch.testing.assert_close(change_of(folder, *(other or [net])), expected, rtol=1e-9, atol=1e-12)
    if not other:  # of the reference's own model and data
        assert not torch.allclose(expected, mean(rows_of(net, data, parts), parts), rtol=1e-2)
    with pytest.raises(ValueError, match=r"_target_: mine\.\w+\.\w+ is named by no file .* trust=\[mine\.\w+\]"):
        read_job(folder)
    assert read_job(folder, trusted=["mine"]).resumed


ALL = [
    *("mask_rule=heaviest", "sparsity.ratio=0.5", "exchange=growing", "partition=blocks", "model=tanh"),
    *("data=bright_rows", "client=smoothed", "sampling=first", "federation.clients_per_round=2"),
]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_of_ones_own_parts_goes_on_to_the_same_bits_without_config_dir(typed, tmp_path, monkeypatch):
    whole = summary_of(typed(*ALL, "federation.rounds=2", "hydra.run.dir=whole").with_name("whole"))
    typed(*ALL)
    monkeypatch.setattr(sys, "argv", ["fedsparse", "resume=run", "federation.rounds=2", "trust=[mine]"])
    train.main()
    assert summary_of(tmp_path / "run")["global_sha256"] == whole["global_sha256"]


def test_a_run_whose_package_is_elsewhere_is_refused_in_one_line(typed, own, monkeypatch):
    folder = typed("mask_rule=heaviest")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(own)])
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="mask_rule._target_ is mine.rules.Heaviest, which cannot be imported") as said:
        read_job(folder, trusted=["mine"])
    assert str(said.value).endswith(
        ": there is no package mine in the folder of the command, on PYTHONPATH, or installed"
    )


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("mine.rulez.Heaviest", "mine has no rulez"),
        ("mine.rules.Heavyest", "mine.rules has no Heavyest"),
        ("mine.broken.Heaviest", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("mine.rules.Heaviest.weigh", "AttributeError: type object 'Heaviest' has no attribute 'weigh'"),
    ],
)
def test_a_target_that_is_not_there_is_one_line(typed, tmp_path, monkeypatch, capfd, target, why):
    write(tmp_path, {"mine/broken.py": "import nothing_of_this_name\n"})
    monkeypatch.syspath_prepend(tmp_path)  # the package has its modules in both folders
    with pytest.raises(SystemExit):
        typed(f"mask_rule._target_={target}")
    said = f"fedsparse: mask_rule._target_ is {target}, which cannot be imported here: {why}"
    announced, *rest = capfd.readouterr().err.splitlines()
    assert announced.startswith("fedsparse: digits, ")
    assert rest == [said]
    assert not (tmp_path / "run").exists()


def test_an_option_that_a_shipped_one_hides_is_refused(typed, tmp_path, capfd):
    """Hydra takes the first of a name that it finds, which is the shipped one."""
    write(tmp_path, {"more/mask_rule/random.yaml": "_target_: mine.rules.Heaviest\n"})
    typed("hydra.searchpath=['file://more']", "hydra.run.dir=other")
    with pytest.raises(SystemExit):
        typed("hydra.searchpath=['file://more']", "mask_rule=random")
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == "fedsparse: mask_rule=random is shipped and cannot be replaced; rename more/mask_rule/random.yaml"


def test_from_python_the_folder_is_a_search_path(own, typed, tmp_path):
    summary = run([*OPTIONS, f"hydra.searchpath=['file://{own / 'conf'}']", "mask_rule=heaviest"])
    assert summary["mask_rule"] == "heaviest"
    assert summary["global_sha256"] == summary_of(typed("mask_rule=heaviest"))["global_sha256"]


def test_an_experiment_of_ones_own_chooses_ones_own_parts(own, typed):
    """It lies beside the parts, in a folder named experiment, as the shipped ones do."""
    write(own, {"conf/experiment/ours.yaml": EXPERIMENT})
    summary = summary_of(typed("experiment=ours"))
    assert (summary["aggregation"], summary["partition"], summary["experiment"]) == ("midrange", "blocks", "ours")


def test_a_rule_of_ones_own_calibrates_alone(typed, tmp_path):
    folder = typed("mask_rule=heaviest", "hydra.run.dir=trained")
    alone = typed("mask_rule=heaviest", of=calibrate)
    masks = [load_file(place / "mask.safetensors") for place in (folder.with_name("trained"), alone)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_run_of_ones_own_parts_is_exported_and_reported(typed, capsys):
    folder = typed(*ALL, "trainer.precision=32-true")
    with pytest.raises(ValueError, match=r"trust=\[mine\.\w+\]"):
        export.export(folder, ["safetensors"])
    export.export(folder, ["safetensors"], ["mine"])
    with pytest.raises(ValueError, match=r"^_target_: mine\.models\.tanh is named by no file"):
        export.load(folder / "export")
    x = datasets.digits().test.x[:3, :, :4, :4]
    again = export.load(folder / "export", ["mine"])(x)
    after = load_file(folder / "model.safetensors")
    hidden = torch.tanh(x.flatten(1) @ after["hidden.weight"].T + after["hidden.bias"])
    torch.testing.assert_close(again, hidden @ after["head.weight"].T + after["head.bias"])
    capsys.readouterr()
    report.main([str(folder)])
    assert "| heaviest, growing | blocks | 50% |" in re.sub(" +", " ", capsys.readouterr().out)


def test_a_sweep_over_ones_own_option_is_repeated_with_another_seed(typed, own, tmp_path):
    """The stored overrides are names of options: they need the folder of these, and trust in what they name."""
    typed("-m", "mask_rule=heaviest,random", "hydra.sweep.dir=grid")
    with pytest.raises(SystemExit, match="1 cells failed"):
        repeat.main(["grid", "--seeds", "1", "--trust", "mine"])
    repeat.main(["grid", "--seeds", "1", "--trust", "mine", "--config-dir", str(own / "conf")])
    repeated = [summary_of(path.parent) for path in tmp_path.glob("grid/*/summary.json")]
    assert sorted((one["mask_rule"], one["seed"]) for one in repeated) == [
        *(("heaviest", 0), ("heaviest", 1), ("random", 0), ("random", 1)),
    ]


@pytest.fixture
def elsewhere(venv, tmp_path, monkeypatch):
    """Type ``python ...`` in an empty folder with the installed wheel -> standard output."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def go(command, *more, fails=False):
        assert command[0] == "python"
        done = subprocess.run([venv, *command[1:], *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert bool(done.returncode) is fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return go


@pytest.mark.soak
@pytest.mark.slow
def test_the_three_steps_as_printed_with_an_installed_wheel(elsewhere, venv, tmp_path):
    where = elsewhere(["python", "-c", "import fedsparse.job.shipped as s; print(s.__file__, s.conf_dir())"]).split()
    assert all(Path(place).is_relative_to(venv.parents[1]) for place in where)
    installed = {path: path.stat().st_mtime_ns for path in Path(where[0]).parent.rglob("*.py")}
    texts, command = printed()
    write(tmp_path, texts)
    short = ("model=mlp", "logger=csv", "federation.rounds=1", "calibration.head_steps=2")
    assert "iid, heaviest" in elsewhere(command, *short, "hydra.run.dir=runs/one")
    summary = summary_of(tmp_path / "runs/one")
    assert (summary["mask_rule"], summary["rounds"]) == ("heaviest", 1)
    assert installed == {path: path.stat().st_mtime_ns for path in Path(where[0]).parent.rglob("*.py")}

    config = elsewhere(command, "--cfg", "job")
    assert "mask_rule:\n  _target_: mine.rules.Heaviest\n" in config
    resume = ["python", "-m", "fedsparse.train", "resume=runs/one", "federation.rounds=2"]
    assert "trust=[mine.rules]" in elsewhere(resume, fails=True)
    elsewhere(resume, "trust=[mine]")
    assert summary_of(tmp_path / "runs/one")["rounds"] == 2
    several = ("-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=runs/grid")
    elsewhere(command, *short, *several)
    assert len(list(tmp_path.glob("runs/grid/*/summary.json"))) == 2
