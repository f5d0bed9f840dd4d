"""BERT as a client's network: against transformers' own forward, and in whole runs on small files."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from pretend import DEVICE, pretended
from safetensors.torch import load_file, safe_open
from text_files import WORDS, write_bert, write_csvs

from fedsparse.core.space import matches
from fedsparse.data.text import ag_news
from fedsparse.data.tokens import PACKAGED, load_tokenizer, tokens
from fedsparse.models.text import bert
from fedsparse.studies import pretrain_text, text_baselines
from fedsparse.train import run

HEAD = "net.classifier.*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_csvs(tmp_path_factory.mktemp("news"))


def ids(pads=0):
    """Three texts of 7, 4 and 2 tokens, and columns that are padding everywhere."""
    x = torch.zeros(3, 7 + pads, dtype=torch.int32)
    for row, length in zip(x, (7, 4, 2), strict=True):
        row[:length] = torch.arange(5, 5 + length)
    return x


@pytest.mark.parametrize("pads", [0, 9])
def test_logits_are_those_of_transformers_with_its_attention_mask(folder, pads):
    from transformers import BertConfig, BertForSequenceClassification

    net = bert("bert_tiny", 5, str(folder), seed=1).double().eval()
    own = BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=5)).double().eval()
    head = {f"classifier.{name}": tensor for name, tensor in net.net.classifier.state_dict().items()}
    own.load_state_dict(load_file(folder / "model.safetensors") | head)
    x = ids(pads)
    with torch.no_grad():
        logits = net(x)
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
        wanted = own(input_ids=x[:, :7].long(), attention_mask=mask).logits
        alone = torch.cat([own(input_ids=row[row != 0][None].long()).logits for row in x])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pads", [0, 9])
def test_a_gpu_gives_the_same_without_a_wait(folder, pads):
    net = bert("bert_tiny", 5, str(folder), seed=1).double().eval()
    with torch.no_grad():
        wanted = net(ids(pads))
        with pretended() as counts:
            there, x = copy.deepcopy(net).to(DEVICE), ids(pads).to(DEVICE)
            counts.clear()
            logits = there(x)
            assert not counts.waits
            assert counts.launches
        torch.testing.assert_close(logits.held, wanted, rtol=0, atol=1e-12)


def test_the_packaged_weights_load_whole_and_are_small():
    file = load_file(PACKAGED / "model.safetensors")
    net = bert("bert_tiny", 4)
    held = {name.removeprefix("net."): tensor for name, tensor in net.state_dict().items()}
    assert set(held) - set(file) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in file.items())
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 2_000_000
    assert len(load_tokenizer("bert_tiny")) == len(file["bert.embeddings.word_embeddings.weight"])
    with safe_open(PACKAGED / "model.safetensors", "pt") as opened:
        assert opened.metadata()["command"].startswith("python -m fedsparse.pretrain_text")  # of then


def test_the_head_starts_anew_by_the_seed_and_the_rest_does_not(folder):
    a, b, again = (bert("bert_tiny", 4, str(folder), seed=seed) for seed in (0, 1, 0))
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, z)
        assert torch.equal(x, y) != (name == "net.classifier.weight")
    assert [name for name, _ in a.named_parameters() if matches(name, HEAD)] == [
        "net.classifier.weight",
        "net.classifier.bias",
    ]


def test_at_random_the_seed_decides_everything(folder):
    state = torch.get_rng_state()
    a, b, again = (bert("bert_tiny", 4, str(folder), pretrained=False, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    words = [net.net.bert.embeddings.word_embeddings.weight for net in (a, b, again)]
    assert torch.equal(words[0], words[2])
    assert not torch.equal(words[0], words[1])


def test_a_checkpoint_without_pooler_starts_it_at_random(tmp_path, caplog):
    folder = write_bert(tmp_path, "BertForMaskedLM")
    file, net = load_file(folder / "model.safetensors"), bert("bert_tiny", 4, str(folder))
    held = {name.removeprefix("net."): tensor for name, tensor in net.state_dict().items()}
    shared = {name for name in file if not name.startswith("cls.")}
    assert set(held) - shared == {f"{n}.{k}" for n in ("classifier", "bert.pooler.dense") for k in ("weight", "bias")}
    assert all(torch.equal(held[name], file[name]) for name in shared)
    assert "has no pooler" in caplog.text


def test_dropout_is_asked_for(folder):
    net = bert("bert_tiny", 4, str(folder), dropout=0.25)
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_weights_that_cannot_be_had_are_one_line(tmp_path, folder, monkeypatch):
    import transformers

    with pytest.raises(ValueError, match="there is no such folder"):
        bert("bert_tiny", 4, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="it needs config.json, model.safetensors"):
        bert("bert_tiny", 4, str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it needs config.json, model.safetensors"):
        bert("bert_tiny", 4, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match="does not fit BERT: bert.encoder.layer.0.* of another shape"):
        bert("bert_tiny", 4, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    with pytest.raises(ValueError, match="is a roberta"):
        bert("bert_tiny", 4, str(tmp_path))

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(
        ValueError, match=r"google-bert/bert-base-cased could not.*model\.checkpoint=<folder>"
    ) as caught:
        bert("google-bert/bert-base-cased", 4)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'fedsparse\[text\]'"):
        bert("bert_tiny", 4)


def options(folder, files):
    return ["data=ag_news", f"data.root={files}", "model=bert_tiny", f"model.checkpoint={folder}"]


SMALL = [
    "federation.num_clients=4",
    "federation.rounds=2",
    "data.batch_size=8",
    "calibration.batches=2",
    "calibration.head_steps=3",
    "logger=csv",
    "pictures=false",
    "calibration.cache=null",
]


@pytest.mark.parametrize("head", ["probe", "closed_form"])
def test_a_masked_run_trains_what_is_least_sensitive_and_nothing_else(run_in, folder, files, head):
    summary, out = run_in("run", *options(folder, files), *SMALL, f"head.init={head}", "sparsity=s80", fast=False)
    mask, after = load_file(out / "mask.safetensors"), load_file(out / "model.safetensors")
    before = {name: p.detach() for name, p in bert("bert_tiny", 4, str(folder)).named_parameters()}
    assert set(mask) == set(before)
    counted = [name for name in mask if not matches(name, HEAD)]
    sizes = [int(mask[name].sum()) for name in counted], [mask[name].numel() for name in counted]
    assert sum(sizes[0]) == int(0.2 * sum(sizes[1]) + 0.5)
    moved = 0
    for name in counted:
        frozen = ~mask[name].bool()
        assert torch.equal(after[name][frozen], before[name][frozen])
        moved += int((after[name] != before[name]).sum())
    assert moved > 100
    assert summary["data_fingerprint"] == ag_news(None, str(folder), files).fingerprint
    assert json.loads((out / "summary.json").read_text())["data_fingerprint"] == summary["data_fingerprint"]


def test_a_run_does_not_go_on_with_other_texts(run_in, folder, tmp_path):
    files = write_csvs(tmp_path / "news")
    _, out = run_in("run", *options(folder, files), *SMALL, "mask_rule=dense", fast=False)
    (out / "summary.json").unlink()
    first = next(path for path in Path(files).rglob("*.csv") if "train" in path.name)
    first.write_text(first.read_text().replace("e", "a", 1))
    with pytest.raises(ValueError, match="the data is not what this run began with"):
        run([f"resume={out}", "federation.rounds=9"])


def test_embeddings_can_be_left_out_and_clients_can_sample_their_texts(run_in, folder, files):
    names = "model.trainable=[net.bert.encoder.*,net.bert.pooler.*,net.classifier.*]"
    changed = ["partition=dirichlet_sampled", "sparsity=s80", names]
    summary, out = run_in("run", *options(folder, files), *SMALL, *changed, fast=False)
    before = bert("bert_tiny", 4, str(folder)).state_dict()
    after = load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("encoder" in name for name in moved)
    assert not any("embeddings" in name for name in moved)
    assert summary["client/acc_mean"] is not None


def test_scores_are_squared_gradients_of_single_texts(folder):
    from fedsparse.core.space import ParamSpace
    from fedsparse.masks.gradients import add_squares

    net = bert("bert_tiny", 4, str(folder)).double().eval()
    space, y = ParamSpace.of(net), torch.tensor([0, 3, 1])
    found = torch.zeros(space.size, dtype=torch.float64)
    loss = torch.nn.functional.cross_entropy
    add_squares(found, net, space, ids(4), y, loss=lambda f, x, y: loss(f(x), y, reduction="none"))
    wanted = torch.zeros_like(found)
    for x, label in zip(ids(), y, strict=True):
        net.zero_grad()
        loss(net.net(input_ids=x[x != 0][None].long()).logits, label[None]).backward()
        wanted += torch.cat([p.grad.flatten() for p in net.parameters()]) ** 2
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["federation.cohort=4"], "set federation.cohort=1"),
        (["data.augment=crop_flip"], "set data.augment=none"),
        (["model=mlp"], "choose model=bert_tiny"),
        (["data=digits"], "choose data=stdlib_docs"),
    ],
)
def test_what_does_not_go_together_is_one_line(run_in, folder, files, changed, message):
    kept = [o for o in options(folder, files) if o.split("=")[0] not in {c.split("=")[0] for c in changed}]
    if changed == ["model=mlp"]:  # a tokenizer alone does not make it a model of texts
        kept = [o for o in kept if "checkpoint" not in o] + [f"data.checkpoint={folder}"]
    if changed == ["data=digits"]:
        kept = [o for o in kept if "data.root" not in o]
    with pytest.raises(ValueError, match=message) as caught:
        run_in("run", *kept, *SMALL, *changed, fast=False)
    assert "\n" not in str(caught.value)


def test_texts_longer_than_the_model_are_one_line(run_in, tmp_path, files):
    folder = write_bert(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(ValueError, match="the model takes at most 8 tokens"):
        run_in("run", *options(folder, files), *SMALL, fast=False)


def test_words_are_masked_as_bert_does_and_never_the_special_ones():
    x = torch.randint(0, 50, (400, 50), generator=torch.Generator().manual_seed(0))
    given, wanted = pretrain_text.mask_words(x, 50, torch.Generator().manual_seed(1))
    chosen = wanted != -100
    assert torch.equal(wanted[chosen], x[chosen])
    assert torch.equal(given[~chosen], x[~chosen])
    assert int(x[chosen].min()) >= 5
    assert abs(float(chosen.sum() / (x >= 5).sum()) - 0.15) < 0.01
    masked, kept = (float((given[chosen] == v).float().mean()) for v in (4, x[chosen]))
    assert abs(masked - 0.8) < 0.03
    assert abs(kept - 0.1 - 0.1 / 45) < 0.02


def test_pretraining_writes_what_transformers_loads_whole(tmp_path, monkeypatch, capsys):
    texts = [f"The {a} of the {b}." for words in WORDS.values() for a in words.split() for b in words.split()]
    monkeypatch.setattr(pretrain_text, "held_out", lambda: texts[:7])
    monkeypatch.setattr(pretrain_text, "package_sentences", lambda: texts[5:])
    pretrain_text.main(["--out", str(tmp_path), "--epochs", "2", "--words", "80"])
    assert "from 36 sentences" in capsys.readouterr().out
    file, net = load_file(tmp_path / "model.safetensors"), bert("bert_tiny", 4, str(tmp_path))
    assert all(torch.equal(net.get_parameter(f"net.{name}"), tensor.float()) for name, tensor in file.items())
    assert len(file) == len(list(net.parameters())) - 2
    made = load_tokenizer(str(tmp_path))
    x = tokens(texts, made, 128)
    assert made.decode(x[0]).startswith("[CLS] the minister of the minister. [SEP]")
    assert net(x).shape == (36, 4)


def test_baselines_are_scikit_learns_and_two_runs(monkeypatch, capsys):
    from fedsparse.data.docs import Sentence

    found = [Sentence(f"{word} {i}", "m", t) for t, words in WORDS.items() for word in words.split() for i in range(7)]
    found += [Sentence(f"minister {i}", "m", 0) for i in range(7, 36)]  # 50 of 113 are of topic 0
    typed = []
    monkeypatch.setattr(text_baselines, "held_by_clients", lambda: found)
    monkeypatch.setattr(text_baselines, "run", lambda overrides: typed.append(overrides) or {"test/acc": 0.5})
    figures = text_baselines.baselines(["seed=3"])
    assert figures == {"majority class": 10 / 23, "bag of words": 1.0, "head alone": 0.5, "fine-tuned": 0.5}
    assert [overrides[-1] for overrides in typed] == ["seed=3"] * 2
    assert ["model.trainable=head" in overrides for overrides in typed] == [True, False]


def test_the_bag_of_words_of_ag_news_reads_its_files_alone(tmp_path, monkeypatch, capsys):
    """40 texts to train, of which 36 are fitted on, and 8 to test, half of whose words say the class."""
    for name, number, known in (("train", 10, 10), ("test", 2, 1)):
        words = {c: ["abcd"[c - 1] * 3] * known + ["none"] * (number - known) for c in range(1, 5)}
        lines = [f'"{c}","{word}","{i}"' for c, listed in words.items() for i, word in enumerate(listed)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    figures = text_baselines.of_ag_news(tmp_path)
    assert figures["majority class"] == 0.25
    assert 0.5 <= figures["bag of words"] <= 0.75  # a text without a known word is one class or another
    monkeypatch.setattr("sys.argv", ["text_baselines", "--ag-news", str(tmp_path)])
    text_baselines.main()
    assert "ag_news, test accuracy" in capsys.readouterr().out
