"""Data that a language model continues: against loops over the tokenizer's own ids, and files made by hand."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from languages import write_jsonl

from fedsparse.core.targets import IGNORED
from fedsparse.data import docs
from fedsparse.data.answers import deal_modules, docs_answers
from fedsparse.data.datasets import Dataset, Split
from fedsparse.data.instructions import instructions
from fedsparse.data.partition import dirichlet, iid, natural, quantity
from fedsparse.data.plain_texts import plain_texts
from fedsparse.data.sequences import Example, answered, padded, split_users
from fedsparse.data.tokens import load_tokenizer
from fedsparse.job.shards import deal_shards

pytest.importorskip("transformers", reason="transformers is in the extra text")

LINES = {
    "sales": {"ann": ("How are prices?", "High, and rising."), "bob": ("Who buys?", "All.")},
    "legal": {"eve": ("May we?", "No.")},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("qwen_tiny")


@pytest.fixture
def root(tmp_path):
    """Three clients of two departments, with six records each."""
    for department, clients in LINES.items():
        for client, (text, response) in clients.items():
            rows = [{"text": f"{i}. {text}", "response": response} for i in range(6)]
            write_jsonl(tmp_path / f"{department}_personal_clients" / f"{client}.jsonl", rows)
    (tmp_path / "notes_personal_clients").mkdir()
    return tmp_path


def rows_of(data):
    """Every sample's user, ids and targets, without padding or places that have no target."""
    for split in (data.train, data.val, data.test):
        for x, y, user in zip(split.x.tolist(), split.y.tolist(), split.users.tolist(), strict=True):
            yield user, x, [(place, target) for place, target in enumerate(y) if target != IGNORED]


def test_instructions_are_prompts_whose_answers_and_ends_are_targets(root, tokenizer):
    data = instructions("qwen_tiny", root)
    assert (data.classes, data.sequences, data.tokens) == (2048, True, True)
    assert data.department_names == ("legal", "sales")
    assert sorted(set(data.train.users)) == ["legal/eve", "sales/ann", "sales/bob"]
    assert data.departments == (0, 1, 1)
    assert [len(split.y) for split in (data.train, data.val, data.test)] == [12, 3, 3]
    seen = set()
    for user, x, targets in rows_of(data):
        department, client = user.split("/")
        text, response = LINES[department][client]
        decoded = tokenizer.decode([i for i in x if i != 0])
        number = decoded.removeprefix("<user>").split(".")[0]
        prompt = tokenizer(f"<user>{number}. {text}</user>\n<assistant>")["input_ids"]
        answer = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        assert x == [*prompt, *answer[:-1], *[0] * (len(x) - len(prompt) - len(answer) + 1)]
        assert targets == [(len(prompt) - 1 + i, token) for i, token in enumerate(answer)]
        seen.add((user, number))
    assert len(seen) == 18


def test_padding_is_at_the_right_whatever_side_a_tokenizer_prefers(root, tokenizer):
    tokenizer = load_tokenizer("qwen_tiny")
    tokenizer.padding_side = "left"
    made = [e for e in answered(["a", "a longer one"], ["b", "c"], tokenizer, 30) if e]
    x, y = padded(made, pad=0)
    assert bool((x[:, 0] != 0).all())
    assert y.shape == x.shape


def test_only_the_first_records_are_read_and_keys_are_what_was_typed(root):
    data = instructions("qwen_tiny", root, max_records=3)
    assert [len(split.y) for split in (data.train, data.val, data.test)] == [3, 3, 3]
    with pytest.raises(ValueError, match="eve.jsonl, line 1 has no text under question; set data.text and data.resp"):
        instructions("qwen_tiny", root, text="question")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a", "response": ', r"zoe.jsonl, line 2 is no JSON \(.*; each line needs an object"),
        ('["a", "b"]', "zoe.jsonl, line 2 has no text under text"),
        ('{"text": "a", "response": 3}', "zoe.jsonl, line 2 has no text under response"),
        ("[" * 100_000, "zoe.jsonl, line 2 is no JSON"),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_number(root, line, says):
    write_jsonl(root / "legal_personal_clients" / "zoe.jsonl", [{"text": "a", "response": "b"}, line])
    with pytest.raises(ValueError, match=says) as caught:
        instructions("qwen_tiny", root)
    assert "\n" not in str(caught.value)


def test_empty_answers_and_those_cut_off_whole_are_left_out_and_named(root, caplog):
    rows = [{"text": "word " * n, "response": r} for n, r in ((1, "yes"), (1, " "), (90, "yes"), (2, "yes"), (3, "no"))]
    write_jsonl(root / "legal_personal_clients" / "zoe.jsonl", rows)
    with caplog.at_level(logging.WARNING, "fedsparse"):
        data = instructions("qwen_tiny", root, max_length=64)
    assert sum(user == "legal/zoe" for user, _, _ in rows_of(data)) == 3
    (line,) = caplog.messages
    assert line.startswith("2 of 23 answers are empty or cut off whole, and left out: ")
    assert "zoe.jsonl, line 2, " in line
    assert line.endswith("zoe.jsonl, line 3")


def test_an_answer_that_is_cut_has_the_targets_that_are_left(tokenizer):
    whole, cut, without = (answered(["Who?"], ["All of them"], tokenizer, n)[0] for n in (60, 9, 6))
    assert whole.ids[:9] == cut.ids
    assert cut.given == whole.given < 9
    assert whole.ids[-1] == tokenizer.eos_token_id
    assert without is None


def test_a_chat_template_is_the_tokenizers_own(tokenizer):
    tokenizer = load_tokenizer("qwen_tiny")
    with pytest.raises(ValueError, match="data.template=chat: this model's tokenizer has no chat template"):
        answered(["a"], ["b"], tokenizer, 60, "chat")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}=>"
    (made,) = answered(["How?"], ["So."], tokenizer, 60, "chat")
    assert tokenizer.decode(made.ids) == "[user] How?\n=>So.</assistant>"
    assert tokenizer.decode(made.ids[made.given :]) == "So.</assistant>"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: root / "nowhere", "is no folder; set data.root to a folder of folders <department>"),
        (lambda root: root / "notes_personal_clients", "holds no client; set data.root to a folder of folders"),
    ],
)
def test_a_root_without_clients_is_refused(root, change, says):
    with pytest.raises(ValueError, match=says):
        instructions("qwen_tiny", change(root))


def test_a_client_with_too_few_records_is_named(root):
    write_jsonl(root / "legal_personal_clients" / "zoe.jsonl", [{"text": "a", "response": "b"}] * 2)
    with pytest.raises(ValueError, match="legal/zoe has 2 samples.*it needs 3 or more"):
        instructions("qwen_tiny", root)


def test_users_are_split_each_by_itself():
    users = ["b"] * 10 + ["a"] * 25
    train, val, test = split_users(users, 0.1, 0.2, seed=0)
    assert sorted([*train, *val, *test]) == list(range(35))
    assert [[int((part < 10).sum()), int((part >= 10).sum())] for part in (train, val, test)] == [
        [7, 18],
        [1, 2],
        [2, 5],
    ]
    assert not np.array_equal(train, split_users(users, 0.1, 0.2, seed=1)[0])


def test_plain_texts_are_windows_whose_tokens_are_all_targets_once(tmp_path, tokenizer, caplog):
    said = "To be, or not to be, that is the question. " * 8
    (tmp_path / "one.txt").write_text(said, encoding="utf-8")
    (tmp_path / "two.txt").write_text(said[::-1], encoding="utf-8")
    (tmp_path / "three.txt").write_text("Short.", encoding="utf-8")
    data = plain_texts("qwen_tiny", tmp_path, max_length=16)
    assert sorted(set(data.train.users)) == ["one", "two"]
    assert "1 of 3 texts are shorter than 3 windows, and left out: three" in caplog.messages[0]
    for name, text in (("one", said), ("two", said[::-1])):
        ids, targets = tokenizer(text)["input_ids"], []
        for user, x, marks in rows_of(data):
            if user == name:
                assert [target for _, target in marks][:-1] == x[1 : len(marks)]
                targets += [target for _, target in marks]
        assert sorted(targets) == sorted(ids[1:])


def test_roles_of_a_play_are_clients(tmp_path):
    lines = (
        "First Citizen:\nSpeak, speak: or hold your peace for ever.\n\nAll:\nResolved. resolved, all of us here.\n\n"
    )
    (tmp_path / "play.txt").write_text(lines * 6, encoding="utf-8")
    data = plain_texts("qwen_tiny", tmp_path, by="role", max_length=12)
    assert sorted(set(data.train.users)) == ["All", "First Citizen"]
    assert not data.departments
    with pytest.raises(ValueError, match="no text of .* has 3 windows of data.max_length"):
        plain_texts("qwen_tiny", tmp_path, max_length=5000)
    (tmp_path / "play.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="play.txt is not UTF-8"):
        plain_texts("qwen_tiny", tmp_path)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Four modules of each topic, of unequal sizes."""
    folder = tmp_path_factory.mktemp("library")
    for topic, modules in docs.MODULES.items():
        for i, module in enumerate(modules.split()[:4]):
            lines = ". ".join(f"Here is sentence {n} of {module} on {topic}" for n in range(6 + i))
            (folder / f"{module}.py").write_text(f'"""{lines}."""')
    return folder


def test_departments_answer_topics_in_codes_of_which_two_are_one(library, tokenizer):
    data = docs_answers("qwen_tiny", departments=4, clients_per_department=1, root=library)
    assert data.truth == (0, 0, 1, 2)
    assert data.departments == (0, 1, 2, 3)
    told = {}
    for user, x, targets in rows_of(data):
        topic = tokenizer.decode(x).split(" on ")[1].split("<")[0].rstrip(".")
        answer = tokenizer.decode([target for _, target in targets])
        told.setdefault((user[: len("department_0")], topic), set()).add(answer)
    assert len(told) == 16
    assert all(len(answers) == 1 for answers in told.values())
    code = {pair: answers.pop().removesuffix("</assistant>") for pair, answers in told.items()}
    by = [[code[f"department_{d}", topic] for topic in docs.TOPICS] for d in range(4)]
    assert by[0] == by[1] == list(docs.TOPICS)
    for one, other in ((0, 2), (0, 3), (2, 3)):
        assert not any(a == b for a, b in zip(by[one], by[other], strict=True))
        assert set(by[one]) == set(by[other])


def test_a_shared_code_is_one_for_all_and_the_rest_is_as_before(library):
    own, shared = (
        docs_answers("qwen_tiny", code=code, clients_per_department=1, root=library) for code in ("own", "shared")
    )
    assert shared.truth == (0, 0, 0, 0)
    assert torch.equal(own.train.x[:, :4], shared.train.x[:, :4])
    assert own.train.users.tolist() == shared.train.users.tolist()
    assert not torch.equal(own.train.y, shared.train.y)
    assert own.fingerprint != shared.fingerprint


@pytest.mark.slow
def test_a_modules_sentences_lie_with_one_client_and_all_clients_hold_each_topic():
    found = docs.held_by_clients()
    dealt = deal_modules(found, 4, 3)
    held = {(dealt[s.module], s.topic) for s in found}
    assert len(held) == 12 * 4
    sizes = [sum(dealt[s.module] == (d, c) for s in found) for d in range(4) for c in range(3)]
    assert min(sizes) > 600
    assert sum(sizes) == len(found)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"departments": 1}, "data.departments is 1; it must be a whole number from 2 to 5"),
        ({"departments": 6}, "data.departments is 6"),
        ({"code": "mine"}, "data.code is 'mine'; it must be own or shared"),
        ({"clients_per_department": 0}, "data.clients_per_department is 0"),
        ({"max_records": 2}, "data.max_records is 2"),
        ({"max_length": 1}, "data.max_length is 1"),
    ],
)
def test_options_of_answers_out_of_range_are_one_line(library, options, says):
    with pytest.raises(ValueError, match=says):
        docs_answers("qwen_tiny", root=library, **options)


def split(y, users=None):
    return Split(torch.ones(y.shape, dtype=torch.int32), y, users)


def sequences(n=4, users=None):
    y = torch.tensor([[IGNORED, 1, 2]] * n)
    return Dataset(split(y, users), split(y), split(y), 3, "some")


BAD = {
    "a sequence without a target": (
        lambda: {"train": split(torch.full((2, 3), IGNORED))},
        "train.* has 2 of 2 sequences without a target",
    ),
    "another length": (
        lambda: {"val": Split(torch.ones(2, 4, dtype=torch.int32), torch.ones(2, 3).long())},
        r"a target for each token",
    ),
    "a target out of range": (lambda: {"test": split(torch.tensor([[3, 1, IGNORED]]))}, "labels 3; with 3 classes"),
    "another negative number": (lambda: {"test": split(torch.tensor([[-1, 1, IGNORED]]))}, "labels -1"),
    "classes in one split": (
        lambda: {"test": Split(torch.ones(2, 3, dtype=torch.int32), torch.ones(2).long())},
        "differ in kind: train sequences, val sequences, test classes",
    ),
    "departments without users": (
        lambda: {"departments": (0, 1), "department_names": ("a", "b")},
        "2 departments of 0 users",
    ),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_sequences_are_one_line(changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        replace(sequences(), **changes())
    assert "\n" not in str(caught.value)


def test_departments_are_one_for_each_user_with_a_name_and_a_cluster():
    data = sequences(users=np.array(["x", "y", "y", "z"]))
    good = {"departments": (0, 1, 0), "department_names": ("a", "b"), "truth": (0, 0)}
    assert replace(data, **good).departments == (0, 1, 0)
    for bad in ({"departments": (0, 1)}, {"departments": (0, 2, 0)}, {"truth": (0,)}, {"department_names": ("a",)}):
        with pytest.raises(ValueError, match="it needs one department for each user"):
            replace(data, **good | bad)


def test_partitions_without_classes_deal_sequences_and_others_refuse():
    data = sequences(n=8, users=np.array([*"aabbccdd"]))
    for deal in (iid, lambda **given: quantity(**given, beta=1.0)):
        _, parts, tests = deal_shards(data, deal, 4, 0)
        assert sorted(np.concatenate(parts).tolist()) == list(range(8))
        assert len(tests) == 4
    _, parts, _ = deal_shards(data, natural, 4, 0, users=True)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="the targets are sequences.*: set partition=natural or iid"):
        deal_shards(data, lambda **given: dirichlet(**given, beta=1.0), 4, 0)


def test_windows_and_examples_of_one_token_have_no_place():
    x, y = padded([Example([4, 5], 1)], pad=9)
    assert (x.tolist(), y.tolist()) == ([[4]], [[5]])
