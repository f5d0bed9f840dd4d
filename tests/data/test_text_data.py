"""Texts as tokens: against files made by hand, a word-piece loop, and transformers' own tokenizer."""

from __future__ import annotations

import ast
import csv
import hashlib
import sys

import numpy as np
import pytest
import torch
from text_files import news, write_bert, write_csvs

from fedsparse.data import docs, tokens
from fedsparse.data.text import ag_news, stdlib_docs

LIBRARY = {
    "os.py": '''"""Talk to the operating system, please. Short one!

    >>> this is a session that nobody should read
    """
import no_such_module_anywhere
raise SystemExit("imported")
def f():
    """Return the name of
    the file here"""
''',
    "json/__init__.py": '"""Encode Python objects as text. Decode Python objects from text."""\n',
    "json/decoder.py": """class D:
    '''Decode Python objects from text.'''
    def g(self):
        r'''Match \\d of one number here.'''
""",
    "json/tests/test_it.py": '"""Nobody should read what tests say."""\n',
    "socket.py": '"""Open a socket to some host. Talk to the operating system, please."""\n',
    "pdb.py": '"""Step through a program line by line."""\n',
    "ast.py": "def broken(:\n",
    "argparse.py": '"""Parse what was typed by someone. Step through a program line by line."""\n',
    "unlisted.py": '"""This module is not on any list."""\n',
}
SENTENCES = [
    ("Encode Python objects as text.", "json", 1),
    ("Decode Python objects from text.", "json", 1),
    ("Match \\d of one number here.", "json", 1),
    ("Talk to the operating system, please.", "os", 2),
    ("Return the name of the file here", "os", 2),
    ("Step through a program line by line.", "pdb", 3),
    ("Open a socket to some host.", "socket", 0),
]


@pytest.fixture
def library(tmp_path):
    for name, text in LIBRARY.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "lib"


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def test_sentences_of_a_library_are_read_and_nothing_is_imported(library):
    found = [(s.text, s.module, s.topic) for s in docs.held_by_clients(library)]
    assert found == SENTENCES
    assert docs.held_out(library) == ["Parse what was typed by someone."]


def test_words_of_a_sentence_are_counted(library):
    for words, there in ((4, False), (5, True), (60, True), (61, False)):
        (library / "pdb.py").write_text(f'"""Z{" z" * (words - 1)}"""')
        (library / "bdb.py").write_text('"""There is always one sentence."""')
        assert any(s.module == "pdb" for s in docs.held_by_clients(library)) == there


def test_a_library_without_source_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no sentence on network") as caught:
        docs.held_by_clients(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_running_python_has_a_thousand_sentences_a_topic():
    found = docs.held_by_clients()
    assert np.bincount([s.topic for s in found]).min() > 1000
    assert len({s.text for s in found}) == len(found)
    assert not set(docs.HELD_OUT.split()) & {s.module for s in found}
    json = docs.library() / "json"
    trees = [ast.parse(p.read_text()) for p in sorted(json.glob("*.py"))]
    nodes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, docs.DEFINITIONS)]
    held = [" ".join((ast.get_docstring(n) or "").split()) for n in nodes]
    mine = [s.text for s in found if s.module == "json"]
    assert len(mine) > 20
    assert all(any(text in docstring for docstring in held) for text in mine)


def word_pieces(text, words):
    """The longest piece that fits, again and again."""
    ids = []
    for word in text.lower().replace(",", " , ").replace('"', ' " ').split():
        pieces, rest = [], word
        while rest:
            mark = "##" if pieces else ""
            size = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in words), 0)
            pieces.append(words.index(mark + rest[:size]) if size else None)
            rest = rest[size:] if size else ""
        ids += [words.index("[UNK]")] if None in pieces else pieces
    return [words.index("[CLS]"), *ids, words.index("[SEP]")]


def test_tokens_are_cut_and_padded_word_pieces(bert_folder):
    words = (bert_folder / "vocab.txt").read_text().split("\n")
    texts = ["Goal, goal!", 'The "minister" of 7 chips', "election"]
    x = tokens.tokens(texts, tokens.load_tokenizer(str(bert_folder)), 12)
    wanted = [word_pieces(text, words) for text in ("goal, goal ~", texts[1], texts[2])]
    wanted = [row if len(row) <= 12 else [*row[:11], words.index("[SEP]")] for row in wanted]
    assert x.dtype == torch.int32
    assert x.tolist() == [row + [0] * (12 - len(row)) for row in wanted]


@pytest.mark.parametrize("length", [2, 0, 1.5, True, None])
def test_a_length_that_cannot_be_is_one_line(bert_folder, length):
    with pytest.raises(ValueError, match="data.max_length is"):
        tokens.tokens(["a"], tokens.load_tokenizer(str(bert_folder)), length)


def test_fingerprints_tell_lists_of_texts_apart():
    by_hand = hashlib.sha256(b"\x02\0\0\0\0\0\0\0ab" + b"\x01\0\0\0\0\0\0\0c").hexdigest()
    assert tokens.fingerprint(["ab", "c"]) == by_hand
    assert len({tokens.fingerprint(t) for t in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4


def test_stdlib_docs_is_a_data_set_with_its_modules_as_users(library, bert_folder):
    for topic, name in (("socket", "http"), ("json", "csv"), ("os", "io"), ("pdb", "bdb")):
        lines = ". ".join(f"Here is sentence {i} of {topic}" for i in range(12))
        (library / f"{name}.py").write_text(f'"""{lines}."""')
    data = stdlib_docs(None, str(bert_folder), root=library, val_fraction=0.2, test_fraction=0.2)
    found = docs.held_by_clients(library)
    sizes = [len(split.y) for split in (data.train, data.val, data.test)]
    assert sizes == [33, 11, 11]  # of 55; ceil(0.2 * 55) each
    assert (data.classes, data.tokens) == (4, True)
    rows = sorted(
        (x.tolist(), int(y), u)
        for s in (data.train, data.val, data.test)
        for x, y, u in zip(s.x, s.y, s.users, strict=True)
    )
    made = tokens.load_tokenizer(str(bert_folder))
    whole = tokens.tokens([s.text for s in found], made, 128).tolist()
    assert rows == sorted((x, s.topic, s.module) for x, s in zip(whole, found, strict=True))
    assert data.fingerprint == tokens.fingerprint([f"{s.topic} {s.text}" for s in found])


def saved(folder):
    import datasets

    label = datasets.ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    parts = {}
    for part, rows in (("train", news(96)), ("test", news(24, 1000))):
        held = {"text": [f"{t} {d}" for _, t, d in rows], "label": [c - 1 for c, _, _ in rows]}
        parts[part] = datasets.Dataset.from_dict(held, features=features)
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_ag_news_from_its_files_and_from_a_saved_data_set_is_the_same(tmp_path, bert_folder):
    data = ag_news(None, str(bert_folder), write_csvs(tmp_path / "csv"), val_fraction=0.25)
    other = ag_news(None, str(bert_folder), saved(tmp_path / "saved"), val_fraction=0.25)
    rows = news(24, 1000)
    assert '"1","The ""minister"", again 1000"' in (tmp_path / "csv" / "test.csv").read_text()
    made = tokens.load_tokenizer(str(bert_folder))
    for row, (_, title, text) in zip(data.test.x.tolist(), rows, strict=True):
        ids = made(f"{title} {text}")["input_ids"]
        assert row == ids + [0] * (len(row) - len(ids))
    assert data.test.y.tolist() == [label - 1 for label, _, _ in rows]
    assert [np.bincount(s.y).tolist() for s in (data.train, data.val)] == [[18] * 4, [6] * 4]
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(data, part).x, getattr(other, part).x)
        assert torch.equal(getattr(data, part).y, getattr(other, part).y)
    assert data.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["5", "a", "b"], "row 2 is not class 1 to 4"),
        (["1", "a"], "row 2 is not class"),
        (["class", "a", "b"], "row 2"),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path, bert_folder, row, message):
    folder = write_csvs(tmp_path)
    with (folder / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["1", "a", "b"], row])
    with pytest.raises(ValueError, match=message) as caught:
        ag_news(None, str(bert_folder), folder)
    assert "\n" not in str(caught.value)


def test_missing_files_are_one_line(tmp_path, bert_folder, monkeypatch):
    import datasets

    def fail(name):
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="fancyzhx/ag_news could not be downloaded.*data.root"):
        ag_news(None, str(bert_folder), None)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        ag_news(None, str(bert_folder), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no such data"):
        ag_news(None, str(bert_folder), tmp_path)
    (write_csvs(tmp_path) / "test.csv").unlink()
    with pytest.raises(ValueError, match="test.csv is missing"):
        ag_news(None, str(bert_folder), tmp_path)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'fedsparse\[text\]'"):
        tokens.load_tokenizer("bert_tiny")


def test_a_model_of_images_is_refused():
    with pytest.raises(ValueError, match="choose model=bert_tiny"):
        tokens.load_tokenizer(None)
