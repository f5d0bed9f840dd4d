"""``python -m fedsparse.export`` on run folders: files, agreement with the pruned model, and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsparse import export, run
from fedsparse.models.convnets import resnet18_gn, two_cnn
from fedsparse.models.to_onnx import onnx_forward, write_onnx
from fedsparse.models.vision import mlp, vit_digits

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("torch_pruning")

SHORT = ["logger=csv", "pictures=false", "federation.rounds=1", "federation.local_steps=1", "calibration.head_steps=1"]


def finished(folder, *overrides):
    run([*SHORT, "mask_rule=random", f"hydra.run.dir={folder}", *overrides])
    return folder


def prune(folder, **units):
    """Zero output units of layers in a run's model, rows and bias -> the model as it then is."""
    tensors = load_file(folder / "model.safetensors")
    for layer, rows in units.items():
        for leaf in ("weight", "bias"):
            tensors[f"{layer.replace('__', '.')}.{leaf}"][rows] = 0
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the MLP on digits: 64 hidden units, of which 40 are pruned."""
    folder = finished(tmp_path_factory.mktemp("mlp") / "run", "model=mlp", "sparsity.unit=output")
    prune(folder, hidden=list(range(40)))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys):
    """Type arguments -> exit code, output, errors."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setitem(os.environ, "HYDRA_FULL_ERROR", "0")

    def typed(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedsparse.export", *map(str, arguments)])
        code = 0
        try:
            export.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return typed


def by_hand(tensors, x):
    """The pruned MLP in plain numpy."""
    w1, b1, w2, b2 = (tensors[f"{n}.{leaf}"].numpy() for n in ("hidden", "head") for leaf in ("weight", "bias"))
    return np.maximum(x.reshape(len(x), -1) @ w1.T + b1, 0) @ w2.T + b2


@pytest.mark.slow
def test_files_agree_with_the_pruned_model(folder, command):
    code, out, err = command(f"run={folder}", "format=safetensors,onnx")
    assert (code, err) == (0, "")
    assert {p.name for p in (folder / "export").iterdir()} == {
        "config.json",
        "figures.json",
        "model.onnx",
        "model.safetensors",
    }
    x = np.random.default_rng(0).normal(size=(6, 1, 8, 8)).astype("float32")
    wanted = by_hand(load_file(folder / "model.safetensors"), x)
    net = export.load(folder / "export")
    assert net.hidden.weight.shape == (24, 64)
    assert not net.training
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(x)).numpy(), wanted, atol=1e-5)
    session = onnxruntime.InferenceSession(str(folder / "export" / "model.onnx"))
    for n in (1, 4, 6):
        np.testing.assert_allclose(session.run(None, {"input": x[:n]})[0], wanted[:n], atol=1e-5)
    assert "time of a forward, ONNX Runtime" in out
    assert str(folder / "export") in out
    assert not [p for p in folder.iterdir() if p.name.startswith(".export")]


@pytest.mark.slow
def test_figures_by_hand(folder):
    figures = export.export(folder)
    assert figures == json.loads((folder / "export" / "figures.json").read_text())
    before, after = figures["before"], figures["after"]
    assert before["num_parameters"] == 64 * 64 + 64 + 10 * 64 + 10
    assert after["num_parameters"] == 24 * 64 + 24 + 10 * 24 + 10
    assert (before["flops"], after["flops"]) == (2 * 64 * 64 + 2 * 640, 2 * 24 * 64 + 2 * 240)
    assert before["flops_sparse"] == 2 * 24 * 64 + 2 * 640
    for name in ("model.safetensors", "model.onnx"):
        assert after["bytes"][name] == (folder / "export" / name).stat().st_size < before["bytes"][name]
    assert set(figures["time"]) == {"torch", "onnx"}
    assert [(c["layer"], c["before"], c["after"]) for c in figures["cuts"]] == [("hidden", 64, 24)]


@pytest.mark.parametrize(
    ("given", "files"),
    [("onnx", {"model.onnx"}), ("safetensors", {"model.safetensors", "config.json"})],
)
def test_one_format_and_over_an_older_export(folder, command, given, files):
    (folder / "export").mkdir()
    (folder / "export" / "old").touch()
    assert command(f"run={folder}", f"format={given}")[0] == 0
    assert {p.name for p in (folder / "export").iterdir()} == {*files, "figures.json"}


def test_scattered_zeros_are_written_all_the_same(tmp_path, command):
    folder = finished(tmp_path / "run", "model=mlp")
    code, out, _ = command(f"run={folder}", "format=safetensors")
    assert code == 0
    assert "nothing could be made smaller: no unit is zero; sparsity.unit=coordinate scatters the zeros" in out
    assert export.load(folder / "export").hidden.out_features == 64
    prune(folder, hidden=[3])
    code, out, _ = command(f"run={folder}", "format=safetensors")
    assert "nothing could be made smaller" not in out
    assert export.load(folder / "export").hidden.out_features == 63


@pytest.mark.slow
def test_a_transformer_loses_heads_and_hidden_units(tmp_path):
    folder = finished(tmp_path / "run", "model=vit_digits", "sparsity.unit=output")
    values = list(range(128 + 32, 128 + 48))  # head 2
    tensors = prune(folder, blocks__1__attn__qkv=values, blocks__2__mlp__fc1=list(range(100)))
    figures = export.export(folder)
    net, full = export.load(folder / "export"), vit_digits().eval()
    assert (net.blocks[1].attn.num_heads, net.blocks[2].mlp.fc1.out_features) == (3, 156)
    full.load_state_dict(tensors)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    forward = onnx_forward(folder / "export" / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(net(x), full(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(forward(x), full(x), atol=1e-5, rtol=1e-5)
    assert figures["after"]["flops"] < figures["before"]["flops"]


@pytest.mark.slow
def test_a_text_model(tmp_path):
    pytest.importorskip("transformers")
    text = ["data=stdlib_docs", "model=bert_tiny", "data.max_length=12", "data.batch_size=4"]
    folder = finished(tmp_path / "run", *text, "sparsity.unit=output", "federation.clients_per_round=1")
    layer = "net__bert__encoder__layer__0"
    prune(folder, **{f"{layer}__intermediate__dense": [*range(60)], f"{layer}__attention__self__value": [*range(64)]})
    export.export(folder)
    net = export.load(folder / "export")
    block = net.net.bert.encoder.layer[0]
    assert block.intermediate.dense.out_features == 512 - 60
    assert (block.attention.self.num_attention_heads, block.attention.self.query.out_features) == (
        2,
        64,
    )  # of 4, of 128


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: mlp(12, 5, 3), (1, 3, 4)),
        (lambda: two_cnn(3, 1, 4), (1, 14, 14)),
        pytest.param(lambda: resnet18_gn(3), (3, 16, 16), marks=pytest.mark.slow),
    ],
    ids=["mlp", "two_cnn", "resnet18_gn"],
)
def test_onnx_runtime_agrees_for_any_batch(net, shape, tmp_path):
    net = net().eval()
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    write_onnx(net, x[:2], tmp_path / "net.onnx")
    forward = onnx_forward(tmp_path / "net.onnx")
    with torch.no_grad():
        for n in (1, 3, 7):
            torch.testing.assert_close(forward(x[:n]), net(x[:n]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run={}/absent"], "there is no run folder .*absent; run= takes the folder that a run printed"),
        (["run={}", "format=pickle"], "format=pickle is unknown; give one or both of safetensors, onnx"),
        (["run={}", "format="], "format= is unknown"),
        (["run={}", "fromat=onnx"], "fromat=onnx: give run=<run folder>"),
        ([], "run= is missing: give run=<run folder>"),
        (["{}"], "give run=<run folder>"),
    ],
)
def test_bad_input_is_one_line(folder, command, arguments, said):
    code, _, err = command(*(argument.format(folder) for argument in arguments))
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("fedsparse: ")
    assert re.search(said, err)
    assert not (folder / "export").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "summary.json").unlink(), "holds no finished run; .*resume="),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "model.safetensors is damaged or of another model"),
        (lambda f: prune_to(f, 63), "model.safetensors is damaged or of another model"),
    ],
)
def test_unfinished_and_damaged_runs(folder, command, damage, said):
    damage(folder)
    code, _, err = command(f"run={folder}")
    assert (code, err.count("\n")) == (1, 1)
    assert re.search(said, err)
    assert not (folder / "export").exists()


def prune_to(folder, rows):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "hidden.weight": tensors["hidden.weight"][:rows].clone()}, folder / "model.safetensors")


def test_a_model_that_differs_is_not_written(folder, command, monkeypatch):
    def wrong(net, x):
        with torch.no_grad():
            net.head.bias += 2e-5
        other = mlp(64, 64, 10).eval()
        other.load_state_dict({k: t.clone() for k, t in net.state_dict().items()})
        with torch.no_grad():
            net.head.bias -= 2e-5
        return other, []

    monkeypatch.setattr("fedsparse.job.exporting.shrink", wrong)
    (folder / "export").mkdir()
    (folder / "export" / "old").touch()
    code, _, err = command(f"run={folder}", "format=safetensors")
    assert (code, err.count("\n")) == (1, 1)
    assert "the smaller model (torch) differs by" in err
    assert [p.name for p in (folder / "export").iterdir()] == ["old"]


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no exported model"):
        export.load(tmp_path)
    export.export(folder, ["safetensors"])
    stored = json.loads((folder / "export" / "config.json").read_text())
    stored["net"]["_target_"] = "os.system"
    (folder / "export" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="_target_: os.system"):
        export.load(folder / "export")
