"""Exports against PEFT, which loads them beside the builder's own network, and against rows read by hand."""

from __future__ import annotations

import hashlib
import json
import shutil

import peft
import pytest
import torch
from adapter_runs import DEPARTMENTS, trained
from safetensors.torch import load_file
from torch import nn

from fedsparse.adapters import Kept, export
from fedsparse.adapters.base import Base
from fedsparse.adapters.packing import configuration, divide, write
from fedsparse.core.space import ParamSpace
from fedsparse.federation.stores.store import FileStore, stored_rows
from fedsparse.models.lora import adapters, lora, settings
from fedsparse.models.vision import vit_digits

pytestmark = pytest.mark.slow  # the file takes half a minute

PER_LAYER = 4 * (4 * 64 + 192 * 4)  # bytes of A and B in float32, rank 4


def inputs(count=5):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def base():
    return vit_digits(10, 1, seed=0)


def loaded(folder, net=None):
    return peft.PeftModel.from_pretrained(base() if net is None else net, folder).eval()


def by_hand(*args, **options):
    """Logits of ``network_by_hand``."""
    with torch.no_grad():
        return network_by_hand(*args, **options)(inputs())


def network_by_hand(folder, department, client=None, checkpoint="last.ckpt", rslora=False):
    """The run's own network with a model of a checkpoint, whose values are placed name by name."""
    net = lora(base(), r=4, dropout=0.0, targets=["qkv"], head="head.*", seed=0, rslora=rslora).eval()
    state = torch.load(folder / "checkpoints" / checkpoint, weights_only=True)
    own = {name[4:]: tensor for name, tensor in state["state_dict"].items() if name.startswith("net.")}
    net.load_state_dict(load_file(folder / "model.safetensors"))  # a checkpoint may hold what trains alone
    assert not net.load_state_dict(own, strict=False).unexpected_keys
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    federation = state["callbacks"]["FederatedRounds"]
    values = {}
    if department > 0:
        sizes = [own[name].numel() for name in names]
        values |= dict(zip(names, federation["server"]["rows"][department - 1].split(sizes), strict=True))
    if client is not None:
        local = [name for name in names if "lora_B" in name or name.startswith("head.")]
        sizes = [own[name].numel() for name in local]
        values |= dict(zip(local, federation["stores"]["clients"]["rows"][client].split(sizes), strict=True))
    with torch.no_grad():
        for name, value in values.items():
            net.get_parameter(name).copy_(value.view(own[name].shape))
    return net


def keepers(folder, checkpoint="last.ckpt"):
    state = torch.load(folder / "checkpoints" / checkpoint, weights_only=True)
    return sorted(state["callbacks"]["FederatedRounds"]["stores"]["clients"]["rows"])


@pytest.fixture(scope="module")
def exported(departments, tmp_path_factory):
    folder = shutil.copytree(departments[0], tmp_path_factory.mktemp("exported") / "run")
    export(Kept.of(folder), rounds=[1, 2])
    return folder


def test_peft_computes_what_the_run_computed(exported):
    """Departments and clients differ from each other, so that none can stand for another."""
    found = {}
    for department in (0, 1):
        place = exported / "peft" / "adapters" / f"department_{department}"
        found[place] = by_hand(exported, department)
    for checkpoint, number in (("last.previous.ckpt", 1), ("last.ckpt", 2)):
        for client in keepers(exported, checkpoint):
            place = exported / "peft" / "clients" / str(client) / f"round_{number}"
            found[place] = by_hand(exported, client // 2, client, checkpoint)
    assert len(found) >= 2 + 3 + 3
    with torch.no_grad():
        for place, wanted in found.items():
            assert torch.equal(loaded(place)(inputs()), wanted)
            torch.testing.assert_close(loaded(place).merge_and_unload()(inputs()), wanted, rtol=0, atol=1e-5)
        own = [logits for place, logits in found.items() if "clients" in place.parts]
        assert not any(torch.equal(a, b) for i, a in enumerate(own) for b in own[:i])
        assert all(float((logits - base().eval()(inputs())).abs().max()) > 1e-3 for logits in own)


def test_an_adapter_has_the_rank_of_its_department(tmp_path):
    """What is left out of rank 4 adds nothing, to the bit; logits differ by the order in which products are summed."""
    folder = tmp_path / "run"
    trained(folder, *DEPARTMENTS, "exchange=masked", "lora.ranks=[1,4]", "lora.rslora=true")
    export(Kept.of(folder))
    places = {folder / "peft" / "adapters" / f"department_{d}": (d, None) for d in (0, 1)}
    places |= {folder / "peft" / "clients" / str(c) / "round_2": (c // 2, c) for c in keepers(folder)}
    assert len({department for department, client in places.values() if client is not None}) == 2
    for place, (department, client) in places.items():
        rank = (1, 4)[department]
        tensors = load_file(place / "adapter_model.safetensors")
        assert json.loads((place / "adapter_config.json").read_text())["r"] == rank
        assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {rank}
        assert {t.shape[1] for name, t in tensors.items() if "lora_B" in name} == {rank}
        wanted, found = network_by_hand(folder, department, client, rslora=True), loaded(place)
        for layer, setting in settings(wanted).items():
            ours, peft_layer = wanted.get_submodule(layer), found.base_model.model.get_submodule(layer)
            assert peft_layer.scaling["default"] == ours.scaling["default"]
            assert setting.rank == 4
            down, up = ours.lora_A["default"].weight, ours.lora_B["default"].weight
            assert torch.equal(peft_layer.lora_A["default"].weight, down[:rank])
            assert torch.equal(peft_layer.lora_B["default"].weight, up[:, :rank])
            assert not bool(up[:, rank:].any())
            assert bool(up[:, :rank].any()) is (client is not None)  # B stays with the clients
        with torch.no_grad():
            torch.testing.assert_close(found(inputs()), wanted(inputs()), rtol=0, atol=2e-6)


def test_the_inventory_says_what_is_where(exported):
    out = exported / "peft"
    found = json.loads((out / "adapters.json").read_text())
    assert (found["method"], found["rounds"], found["base"]["class"]) == ("fedsa", 2, "VisionTransformer")
    assert len(found["base"]["fingerprint"]) == 64
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(found["files"]) == written - {"adapters.json"}
    for name, digest in found["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    places = {entry["folder"]: (entry["department"], entry["client"], entry["round"]) for entry in found["adapters"]}
    wanted = {f"adapters/department_{d}": (f"department_{d}", None, 2) for d in (0, 1)}
    for checkpoint, number in (("last.previous.ckpt", 1), ("last.ckpt", 2)):
        for client in keepers(exported, checkpoint):
            wanted[f"clients/{client}/round_{number}"] = (f"department_{client // 2}", client, number)
    assert places == wanted
    assert [entry["clients"] for entry in found["adapters"][:1]] == [[0, 1]]
    assert found["stays_with_clients"][-2:] == ["head.weight", "head.bias"]


def accuracy(logits, y):
    return float((logits.argmax(1) == y).double().mean())


def test_the_four_maps_by_plain_loops(exported, departments):
    summary, out = departments[1], exported / "peft"
    found = json.loads((out / "evaluation.json").read_text())
    kept = Kept.of(exported)
    problem = kept.assembly.problem
    test, tests = problem.dataset.test, problem.tests
    assert found["dept_lora_federated"] == {f"department_{d}": f"adapters/department_{d}" for d in (0, 1)}
    assert set(found["client_lora_federated"]) == {"1", "2"}
    own = found["client_lora_federated"]["2"]
    assert own == {str(client): f"clients/{client}/round_2" for client in keepers(exported)}
    personal = []
    with torch.no_grad():
        for client, part in enumerate(tests):
            x, y = test.x[torch.as_tensor(part)], test.y[torch.as_tensor(part)]
            row = found["client_eval_all_rounds"]["2"][str(client)]
            shared = loaded(out / "adapters" / f"department_{client // 2}")(x)
            assert row["of"] == f"department_{client // 2}"
            assert row["department"]["accuracy"] == pytest.approx(accuracy(shared, y))
            assert row["department"]["loss"] == pytest.approx(float(nn.functional.cross_entropy(shared, y)), rel=1e-5)
            assert row["department"]["samples"] == len(part)
            logits = loaded(out / own[str(client)])(x) if str(client) in own else shared
            assert ("own" in row) is (str(client) in own)
            personal.append(accuracy(logits, y))
            if "own" in row:
                assert row["own"]["accuracy"] == pytest.approx(personal[-1])
        for department, row in found["federated_eval"].items():
            index = torch.cat([torch.as_tensor(tests[c]) for c in ((0, 1) if department[-1] == "0" else (2, 3))])
            after = accuracy(loaded(out / "adapters" / department)(test.x[index]), test.y[index])
            before = accuracy(base().eval()(test.x[index]), test.y[index])
            assert (row["before"]["accuracy"], row["after"]["accuracy"]) == (
                pytest.approx(before),
                pytest.approx(after),
            )
            assert row["gain"] == pytest.approx(after - before)
    assert summary["personal/acc_mean"] == pytest.approx(sum(personal) / len(personal))


def test_an_equal_export_stays_and_another_is_refused(folder, command):
    assert command(folder, "export")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "peft").rglob("*")}
    assert command(folder, "export")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "peft").rglob("*")} == before
    code, out, err = command(folder, "export", "--rounds", "1")
    assert (code, out) == (1, "")
    assert err.startswith(f"fedsparse: {folder / 'peft'} exists and holds other content (")
    assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in (folder / "peft").rglob("*")} == before
    assert command(folder, "export", "--rounds", "1", "--out", folder.parent / "other" / "one")[0] == 0
    assert (folder.parent / "other" / "one" / "adapters.json").is_file()
    assert not list(folder.glob(".peft*"))


def test_only_some_models(folder):
    keeps = keepers(folder)[0]
    out, inventory = export(Kept.of(folder), folder / "some", departments=["department_1"], clients=[keeps])
    assert [entry["name"] for entry in inventory["adapters"]] == ["department_1", f"client_{keeps}"]
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "adapters.json", "clients", "evaluation.json"]


@pytest.mark.slow
def test_a_round_is_that_of_a_run_that_ended_with_it(tmp_path, departments):
    """Two rounds' department adapters of round 1, against a run of one round."""
    trained(tmp_path / "run", *DEPARTMENTS, "federation.rounds=1")
    ended, _ = export(Kept.of(tmp_path / "run"), tmp_path / "ended", departments=["department_1"])
    early, _ = export(Kept.of(departments[0]), tmp_path / "early", rounds=[1], departments=["department_1"])
    name = "adapters/department_1/adapter_model.safetensors"
    assert (ended / name).read_bytes() == (early / name).read_bytes()


@pytest.mark.parametrize("method", ["flora", pytest.param("fedex", marks=pytest.mark.slow)])
def test_what_was_merged_into_the_base_lies_beside_the_adapter(tmp_path, method):
    """The line that the inventory gives, typed: the base gets the changes, and PEFT the adapter."""
    trained(tmp_path / "run", f"method={method}", "federation.rounds=1", "federation.local_steps=8")
    out, inventory = export(Kept.of(tmp_path / "run"))
    (entry,) = inventory["adapters"]
    assert (entry["name"], entry["folder"]) == ("global", "adapters/global")
    assert "base_changes.safetensors" in entry["load"]
    net, place = base(), out / entry["folder"]
    found = load_file(place / "base_changes.safetensors")
    assert sorted(found) == [f"blocks.{block}.attn.qkv.weight" for block in range(4)]
    assert not net.load_state_dict(found, strict=False).unexpected_keys
    with torch.no_grad():
        wanted = by_hand(tmp_path / "run", 0)
        assert torch.equal(loaded(place, net)(inputs()), wanted)
        assert not torch.equal(loaded(place)(inputs()), wanted)  # without the changes it is another model


@pytest.mark.slow
def test_each_round_has_its_own_changes_of_the_base(tmp_path):
    """Of the first of two rounds those of a run that ended with it; and the network as built comes back."""
    for rounds in (1, 2):
        trained(tmp_path / f"{rounds}", "method=flora", f"federation.rounds={rounds}")
    kept = Kept.of(tmp_path / "2")
    export(kept, tmp_path / "last")
    export(kept, tmp_path / "first", rounds=[1])
    export(Kept.of(tmp_path / "1"), tmp_path / "ended")
    last, first, ended = (tmp_path / name / "adapters" / "global" for name in ("last", "first", "ended"))
    for name in ("adapter_model.safetensors", "base_changes.safetensors"):
        assert (first / name).read_bytes() == (ended / name).read_bytes() != (last / name).read_bytes()
    start = kept.at(0)
    with torch.no_grad():
        assert torch.equal(kept.load(start, start.models[0])(inputs()), base().eval()(inputs()))


@pytest.mark.parametrize("method", ["ffa", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fedit", "local"))])
def test_other_methods(tmp_path, method):
    trained(tmp_path / "run", f"method={method}", "federation.rounds=1")
    out, inventory = export(Kept.of(tmp_path / "run"))
    with torch.no_grad():
        assert torch.equal(loaded(out / "adapters" / "global")(inputs()), by_hand(tmp_path / "run", 0))
    own = [entry["client"] for entry in inventory["adapters"][1:]]
    assert own == (keepers(tmp_path / "run") if method == "local" else [])
    assert (out / "adapters" / "global" / "adapter_model.safetensors").stat().st_size > 4 * PER_LAYER


def test_rows_in_a_file_that_has_grown_since(tmp_path):
    """Rows of two checkpoints: the later one made a file of 16 rows one of 32, and left those of the earlier alone."""
    store = FileStore(tmp_path / "clients.bin")
    rows = torch.arange(80.0).view(20, 4)
    store.write(range(10), rows[:10])
    early = store.state_dict()
    store.saved()
    store.write(range(20), rows + 100)
    late = store.state_dict()
    before = store.path.read_bytes()
    for state, count, shift in ((early, 10, 0), (late, 20, 100)):
        found = stored_rows(state, store.path)
        assert sorted(found) == list(range(count))
        assert all(torch.equal(found[client], rows[client] + shift) for client in found)
    assert store.path.read_bytes() == before
    with pytest.raises(ValueError, match="is missing or cut off: it holds what the clients keep between rounds"):
        stored_rows(late, tmp_path / "none.bin")
    with pytest.raises(ValueError, match="is of type 'object', not of"):
        stored_rows({**late, "dtype": "object"}, store.path)


@pytest.mark.slow
def test_rows_in_a_file_are_read_and_left_alone(tmp_path, folder):
    other = tmp_path / "file"
    trained(other, *DEPARTMENTS, "federation.store=file")
    before = (other / "clients.bin").read_bytes()
    export(Kept.of(other), rounds=[1, 2])
    assert (other / "clients.bin").read_bytes() == before
    export(Kept.of(folder), rounds=[1, 2])
    names = sorted(path.relative_to(folder / "peft") for path in (folder / "peft").rglob("*.safetensors"))
    assert len(names) >= 8
    for name in names:
        assert (other / "peft" / name).read_bytes() == (folder / "peft" / name).read_bytes()


def different_ranks():
    """A network whose layers have adapters of several ranks and scales, made by PEFT, with random factors."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["qkv", "fc1"],
        rank_pattern={"blocks.1.attn.qkv": 2, "blocks.3.mlp.fc1": 6},
        alpha_pattern={"blocks.1.attn.qkv": 3},
    )
    net = peft.inject_adapter_in_model(config, base()).eval()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return net


def test_different_ranks_stand_in_patterns(tmp_path):
    net = different_ranks()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
    found = adapters(net)
    space, described = ParamSpace.of(net, lambda name: "lora_" in name), Base.of(net, found)
    parts = divide(net, described, found, space, [])
    write(tmp_path, configuration(net, described, settings(net), parts.saved), parts)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["rank_pattern"] == {"blocks.1.attn.qkv": 2, "blocks.3.mlp.fc1": 6}
    assert stored["alpha_pattern"] == {"blocks.1.attn.qkv": 3}
    assert (stored["r"], stored["lora_alpha"], stored["target_modules"]) == (4, 8, ["fc1", "qkv"])
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path)(inputs()), net(inputs()))
        assert not torch.equal(net(inputs()), base().eval()(inputs()))


@pytest.mark.parametrize("options", [{"targets": ["blocks.1.attn.qkv"]}, {"rslora": True, "r": 3, "alpha": 5}])
def test_one_of_equal_names_and_another_scale(tmp_path, options):
    net = lora(base(), **{"targets": ["qkv"], "head": "head.*", **options}).eval()
    nn.init.normal_(net.blocks[1].attn.qkv.lora_B.default.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(1))
    found = adapters(net)
    space = ParamSpace.of(net, lambda name: "lora_" in name or name.startswith("head."))
    described = Base.of(net, found)
    parts = divide(net, described, found, space, [])
    assert (parts.saved, dict(parts.changes)) == (["head"], {})
    write(tmp_path, configuration(net, described, settings(net), parts.saved), parts)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path)(inputs()), net(inputs()))


def test_what_peft_has_no_place_for_is_a_change_of_the_base(tmp_path):
    """A parameter of the network itself belongs to no module that could be saved."""
    net = lora(base(), targets=["qkv"], head="pos_embed").eval()
    nn.init.normal_(net.pos_embed, generator=torch.Generator().manual_seed(0))
    found = adapters(net)
    space = ParamSpace.of(net, lambda name: "lora_" in name or name == "pos_embed")
    described = Base.of(base(), found)
    parts = divide(net, described, found, space, [])
    assert (list(parts.saved), list(parts.changes)) == ([], ["pos_embed"])
    write(tmp_path, configuration(net, described, settings(net), parts.saved), parts)
    plain = base()
    plain.load_state_dict(load_file(tmp_path / "base_changes.safetensors"), strict=False)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path, plain)(inputs()), net(inputs()))


def test_the_fingerprint_is_of_the_base_alone(tmp_path):
    """Adapters of another seed leave it, one changed weight does not."""
    prints = []
    for seed, change in ((0, 0.0), (1, 0.0), (0, 1e-6)):
        net = base()
        with torch.no_grad():
            net.blocks[0].attn.qkv.weight[0, 0] += change
        net = lora(net, targets=["qkv"], seed=seed)
        prints.append(Base.of(net, adapters(net)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


class Wrapped(nn.Module):
    """A model of transformers in a network of one's own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(input_ids=x).logits


def tiny_qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_key_value_heads=2, tie_word_embeddings=True, **sizes)).eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT's call of transformers
def test_a_language_model_is_written_as_peft_itself_writes_it(tmp_path):
    """Names, shapes and configuration of PEFT's own save_pretrained, of the model without our wrapper."""
    net = lora(Wrapped(tiny_qwen()), r=2, alpha=4, dropout=0.1).eval()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    found, described = adapters(net), Base.of(net, adapters(net))
    parts = divide(net, described, found, ParamSpace.of(net, lambda name: "lora_" in name), [])
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", configuration(net, described, settings(net), parts.saved), parts)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", bias="none"
    )
    theirs = peft.get_peft_model(tiny_qwen(), config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {name: t.shape for name, t in tensors[0].items()} == {name: t.shape for name, t in tensors[1].items()}
    stored = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for one in stored:
        one["target_modules"].sort()
    different = {key for key in stored[1] if stored[0][key] != stored[1][key]}
    assert different <= {"base_model_name_or_path", "auto_mapping"}
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "ours", tiny_qwen())(input_ids=ids).logits, net(ids))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT's call of transformers
def test_a_model_of_transformers_is_its_own_base(tmp_path, command):
    """The adapter's names are those of transformers' model, so that its own class loads export and merged model."""
    transformers = pytest.importorskip("transformers")
    options = ["model=bert_tiny", "data=stdlib_docs", "data.max_length=16", "method=fedit", "federation.rounds=1"]
    trained(tmp_path / "run", *options, "federation.num_clients=4", "optimizer.lr=0.1")
    kept = Kept.of(tmp_path / "run")
    out, inventory = export(kept)
    code, _, err = command(tmp_path / "run", "merge")
    assert (code, err.count("\n")) == (0, 2)  # what the run said: what it is, and its round
    assert inventory["base"]["class"] == "BertForSequenceClassification"
    moment = kept.at()
    own = kept.load(moment, moment.models[0])
    x = kept.assembly.problem.dataset.test.x[:6].long()
    from fedsparse.models.text import bert

    classes = kept.assembly.problem.dataset.classes
    plain = bert("bert_tiny", classes).net.eval()
    adapted = peft.PeftModel.from_pretrained(plain, out / "adapters" / "global").eval()
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "run" / "merged" / "global").eval()
    with torch.no_grad():
        wanted, mask = own(x), (x != 0).long()
        got = adapted(input_ids=x, attention_mask=mask).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # the run's network cuts columns of padding off
        full = bert("bert_tiny", classes).eval()
        full.net = adapted
        assert torch.equal(full(x), wanted)
        merged = again(input_ids=x, attention_mask=mask).logits
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chosen", [["--departments", "department_1"], ["--clients"]])
def test_a_merged_model_is_the_plain_one(folder, command, chosen):
    client = keepers(folder)[-1] if chosen == ["--clients"] else None
    name = "department_1" if client is None else f"client_{client}"
    code, out, err = command(folder, "merge", *chosen, *([] if client is None else [client]))
    assert (code, err, out.strip()) == (0, "", str(folder / "merged" / name))
    net = base().eval()
    net.load_state_dict(load_file(folder / "merged" / name / "model.safetensors"))
    wanted = by_hand(folder, 1 if client is None else client // 2, client)
    with torch.no_grad():
        torch.testing.assert_close(net(inputs()), wanted, rtol=0, atol=1e-5)
