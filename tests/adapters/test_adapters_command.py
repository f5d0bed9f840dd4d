"""The command on run folders: what it prints, the matrix against plain loops, answers of a toy, and refusals."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil

import numpy as np
import peft
import pytest
import torch
from adapter_runs import DEPARTMENTS, trained
from pages import pages
from torch import nn

from fedsparse import run
from fedsparse.adapters import Kept, export, greedy, matrix
from fedsparse.adapters.__main__ import parser
from fedsparse.adapters.answers import answers
from fedsparse.adapters.matrix_plot import matrix_figure
from fedsparse.data.tokens import load_tokenizer
from fedsparse.models.vision import vit_digits

pytestmark = pytest.mark.slow  # the file takes half a minute


def test_the_listing_by_hand(folder, command):
    code, out, err = command(folder, "list", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    row = {"in": 64, "out": 192, "rank": 4, "alpha": 16, "scale": 4.0, "bytes": 4 * 4 * (64 + 192)}
    assert found["layers"] == [{"layer": f"blocks.{block}.attn.qkv", **row} for block in range(4)]
    assert (found["targets"], found["beside"], found["method"]) == (["qkv"], ["head.weight", "head.bias"], "fedsa")
    assert found["rounds"] == [1, 2]
    assert {name: row["clients"] for name, row in found["departments"].items()} == {
        "department_0": [0, 1],
        "department_1": [2, 3],
    }
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["FederatedRounds"]
    own = [client for row in found["departments"].values() for client in row["own"]]
    assert own == sorted(state["stores"]["clients"]["rows"])
    base = sum(p.numel() for p in vit_digits(10, 1, seed=0).parameters())
    assert found["bytes"] == {"an adapter": 4 * row["bytes"], "what trains beside it": 4 * 650, "the base": 4 * base}
    code, out, _ = command(folder, "list")
    assert code == 0
    assert "blocks.3.attn.qkv" in out
    assert "16,384" in out


def test_every_adapter_on_every_part(folder, command):
    code, out, err = command(folder, "evaluate", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found == json.loads((folder / "adapters_matrix.json").read_text())
    kept = Kept.of(folder)
    test, tests = kept.assembly.problem.dataset.test, kept.assembly.problem.tests
    parts = {"test": np.arange(len(test.y))}
    parts |= {f"department_{d}": np.concatenate([tests[2 * d], tests[2 * d + 1]]) for d in (0, 1)}
    parts |= {f"client_{client}": part for client, part in enumerate(tests)}
    assert found["parts"] == list(parts)
    assert found["samples"] == list(map(len, parts.values()))
    place, _ = export(kept, folder / "written")
    names = {f"department_{d}": f"adapters/department_{d}" for d in (0, 1)}
    names |= {f"client_{path.name}": f"clients/{path.name}/round_2" for path in sorted((place / "clients").iterdir())}
    assert found["models"] == list(names)
    assert found["own"] == [["client_0", "client_1"], ["client_2", "client_3"], *([name] for name in list(names)[2:])]
    for name, accuracies, losses in zip(found["models"], found["accuracy"], found["loss"], strict=True):
        net = peft.PeftModel.from_pretrained(vit_digits(10, 1, seed=0), place / names[name]).eval()
        with torch.no_grad():
            whole = net(test.x)
        for part, accuracy, loss in zip(parts.values(), accuracies, losses, strict=True):
            logits, y = whole[torch.as_tensor(part)], test.y[torch.as_tensor(part)]
            assert accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
            assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    own = [tuple(row) for row in found["loss"][2:]]
    assert len(set(own)) == len(own) == len(names) - 2
    assert (folder / "adapters_matrix.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["mask_rule=random", "exchange=masked"], ["lora.r=2", "model.local=[head.*]"]])
def test_own_models_have_the_figures_that_the_run_printed(tmp_path, options):
    """Where half of the coordinates are masked out, and where the head alone stays: as the callback computed them."""
    summary = trained(tmp_path, *DEPARTMENTS, *options, "sparsity.ratio=0.5")
    kept = Kept.of(tmp_path)
    found = matrix(kept, kept.at(), kept.at().models)
    mine = [f"client_{c}" if f"client_{c}" in found["models"] else f"department_{c // 2}" for c in range(4)]
    places = [(found["models"].index(name), found["parts"].index(f"client_{c}")) for c, name in enumerate(mine)]
    for key, wanted in (("accuracy", "personal/acc_mean"), ("loss", "personal/loss")):
        assert np.mean([found[key][row][column] for row, column in places]) == pytest.approx(summary[wanted], rel=1e-6)
    assert len(set(mine)) >= 3


def test_the_matrix_as_a_table_of_some_models_elsewhere(folder, command):
    out = folder.parent / "figures"
    code, text, err = command(folder, "evaluate", "--departments", "department_1", "--round", "1", "--out", out)
    assert (code, err) == (0, "")
    assert "after round 1" in text
    assert "department_1" in text
    assert json.loads((out / "adapters_matrix.json").read_text())["models"] == ["department_1"]
    assert not (folder / "adapters_matrix.json").exists()


@pytest.mark.parametrize("count", [3, 30])
def test_the_heat_map_has_a_cell_for_each_pair(count):
    values = np.random.default_rng(0).random((2, count))
    names = [f"client_{index}" for index in range(count)]
    figure = matrix_figure({"round": 4, "models": ["a", "b"], "parts": names, "accuracy": values.tolist()})
    axes, (image,) = figure.axes[0], figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), 100 * values)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == names
    assert [text.get_text() for text in axes.texts] == ([] if count > 14 else [f"{v:.0f}" for v in (100 * values).flat])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["export", "--rounds", "7"], "{folder} keeps no models after round 7; it keeps those after 1, 2"),
        (["merge", "--round", "3"], "{folder} keeps no models after round 3; it keeps those after 1, 2"),
        (["merge"], "merge writes one model: choose one of department_0, department_1"),
        (
            ["export", "--departments", "sales"],
            "there is no department sales; the run has department_0, department_1",
        ),
        (["evaluate", "--clients", "9"], "client 9 keeps no model of its own; after round 2 these do: "),
        (["answer", "--prompt", "who?"], "answer needs a language model, such as model=qwen_tiny, and {folder}"),
        (["answer"], "the following arguments are required: --prompt; python -m fedsparse.adapters --help"),
        (["paint"], "argument list|export|merge|evaluate|answer: invalid choice: 'paint'"),
        ([], "the following arguments are required: list|export|merge|evaluate|answer"),
        (["list", "--trust", "a b"], "trust=a b is no name"),
    ],
)
def test_refusals_are_one_line(folder, command, typed, line):
    code, out, err = command(folder, *typed)
    assert (code, out) == (1, "")
    assert err.startswith("fedsparse: " + line.format(folder=folder))
    assert err.count("\n") == 1
    assert not (folder / "peft").exists()


def test_the_commands_of_the_page_are_understood():
    text = pages()["docs/how-to/export.md"]
    typed = [
        shlex.split(line, comments=True) for line in re.findall(r"^python -m fedsparse\.adapters (.*)", text, re.M)
    ]
    read = [parser().parse_args(words) for words in typed]
    assert [options.verb for options in read] == ["list", "export", "evaluate", "merge", "answer"]


def test_folders_without_adapters_are_refused(tmp_path, command):
    code, _, err = command(tmp_path / "none", "list")
    assert (code, err) == (
        1,
        f"fedsparse: there is no run folder {tmp_path / 'none'}; give the folder that a run printed\n",
    )
    (tmp_path / "empty").mkdir()
    code, _, err = command(tmp_path / "empty", "export")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path / 'empty'} holds no finished run" in err
    run(["model=mlp", "logger=csv", "pictures=false", "federation.rounds=1", f"hydra.run.dir={tmp_path / 'mlp'}"])
    code, _, err = command(tmp_path / "mlp", "list")
    text = err.splitlines()[-1]
    assert (code, text) == (
        1,
        f"fedsparse: the run {tmp_path / 'mlp'} has no adapters; train with lora=r8 or a method, such as method=fedit",
    )


def test_without_peft_the_extra_is_named(folder, command, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("fedsparse.adapters.__main__.find_spec", lambda name: None if name == "peft" else there(name))
    assert command(folder, "list") == (1, "", "fedsparse: adapters need PEFT: pip install 'fedsparse[lora]'\n")


def test_models_that_only_a_checkpoint_holds(folder, command):
    shutil.rmtree(folder / "checkpoints")
    code, _, err = command(folder, "export")
    assert code == 1
    assert f"{folder} keeps no models after round 2; it keeps those after none; checkpoints alone hold those of" in err


@pytest.mark.slow
def test_one_global_model_needs_no_checkpoint_and_a_trajectory_keeps_rounds(tmp_path):
    """Of three rounds the trajectory holds the first, which no checkpoint has any more."""
    folder = tmp_path / "run"
    trained(folder, "method=fedit", "federation.rounds=3", "trajectory=global")
    whole, _ = export(Kept.of(folder), tmp_path / "whole")
    shutil.rmtree(folder / "checkpoints")
    kept = Kept.of(folder)
    assert list(kept.rounds) == [1, 2, 3]
    again, _ = export(kept, tmp_path / "again")
    name = "adapters/global/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (again / name).read_bytes()
    first, _ = export(kept, tmp_path / "first", rounds=[1])
    trained(tmp_path / "one", "method=fedit", "federation.rounds=1")
    alone, _ = export(Kept.of(tmp_path / "one"), tmp_path / "alone")
    assert (first / name).read_bytes() == (alone / name).read_bytes()
    assert (first / name).read_bytes() != (again / name).read_bytes()


def count_on(step):
    """A toy that says the number ``step`` places after the last one; the end, 26, follows 25."""

    def logits(x):
        following = torch.where(x + step > 25, 26, x + step)
        return nn.functional.one_hot(following, 27).float()

    return logits


def test_greedy_answers_end_where_they_should():
    assert greedy(count_on(1), [0], end=26, longest=6, most=3) == [1, 2, 3]
    assert greedy(count_on(1), [0], end=26, longest=6, most=30) == [1, 2, 3, 4, 5]
    assert greedy(count_on(10), [1], end=26, longest=6) == [11, 21]  # then the end, which is left out
    for wrong in ([], [0] * 6):
        with pytest.raises(ValueError, match=f"the prompt has {len(wrong)} tokens; it must leave room for an answer"):
            greedy(count_on(1), wrong, end=26, longest=6)
    with pytest.raises(ValueError, match="--tokens is 0"):
        greedy(count_on(1), [0], end=26, longest=6, most=0)


@pytest.mark.slow
def test_departments_answer_side_by_side_as_transformers_does(tmp_path):
    """Each in the words of its own adapters, which transformers' own ``generate`` says too."""
    options = ["experiment=departments_docs", "method=fedit", "topology=departments", "data.max_records=30"]
    run([*options, "federation.rounds=1", "logger=csv", "pictures=false", f"hydra.run.dir={tmp_path / 'run'}"])
    kept = Kept.of(tmp_path / "run")
    moment = kept.at()
    prompt = "Open a socket and send bytes to a server."
    found = dict(answers(kept, moment, moment.departments, prompt, 8))
    assert list(found) == [f"department_{number}" for number in range(4)]
    tokenizer = load_tokenizer("qwen_tiny")
    ids = tokenizer(f"<user>{prompt}</user>\n<assistant>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    for model in moment.departments:
        net = kept.load(moment, model).net
        said = net.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert found[model.name] == tokenizer.decode(said, skip_special_tokens=True)
