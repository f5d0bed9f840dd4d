"""LEAF's data sets against its own files' values, read by plain loops, and runs on them."""

from __future__ import annotations

import json
import re
from math import ceil

import leaf_json
import numpy as np
import pytest
import torch
from leaf_json import images, texts, write, write_both

from fedsparse.data import leaf
from fedsparse.data.datasets import Dataset
from fedsparse.data.leaf import choose_users, femnist, hold_back, letter_places, shakespeare
from fedsparse.job.command import one_line


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    return write_both(tmp_path_factory.mktemp("femnist"), images)


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    return write_both(tmp_path_factory.mktemp("shakespeare"), texts)


def stored(folder, part):
    """Every sample of a part: (user, x, y), by a plain loop."""
    for path in (folder / part).iterdir():
        for user, held in json.loads(path.read_text())["user_data"].items():
            yield from ((user, x, y) for x, y in zip(held["x"], held["y"], strict=True))


def rows(*splits):
    """Every sample of some splits, as something that can be counted."""
    for split in splits:
        for user, x, y in zip(split.users.tolist(), split.x, split.y.tolist(), strict=True):
            yield user, tuple(x.flatten().tolist()), y


def test_the_characters_are_leafs():
    assert leaf.LETTERS == leaf_json.LETTERS
    assert len(set(leaf.LETTERS)) == len(leaf.LETTERS) == 80
    text = leaf.LETTERS[::-1] + "é~|\x7f\U0001f600"
    assert letter_places(text).tolist() == [leaf_json.LETTERS.find(letter) for letter in text]


def test_femnist_is_what_the_files_hold(writers):
    data = femnist(writers)
    wanted = [(user, tuple(round(255 * v) for v in x), y) for user, x, y in stored(writers, "train")]
    assert sorted(rows(data.train, data.val)) == sorted(wanted)
    assert sorted(rows(data.test)) == sorted(
        (user, tuple(round(255 * v) for v in x), y) for user, x, y in stored(writers, "test")
    )
    assert data.train.x.dtype == torch.uint8
    assert data.train.x.shape[1:] == (1, 28, 28)
    assert (data.classes, data.mean, data.tokens, data.vocabulary) == (62, (), False, 0)
    image = np.reshape(next(x for u, x, y in stored(writers, "test")), (28, 28))
    first = data.test.x[data.test.users.tolist().index("eve"), 0]
    np.testing.assert_allclose(first.numpy() / 255, image, atol=1e-12)  # rows stay rows, and white stays 1


def test_shakespeare_is_what_the_files_hold(roles):
    data = shakespeare(roles)
    find = leaf_json.LETTERS.find

    def numbered(part):
        return sorted((user, tuple(find(c) for c in x), find(y)) for user, x, y in stored(roles, part))

    assert sorted(rows(data.train, data.val)) == numbered("train")
    assert sorted(rows(data.test)) == numbered("test")
    assert data.train.x.dtype == torch.int32
    assert (data.classes, data.tokens, data.vocabulary) == (80, True, 80)
    assert data.fingerprint == shakespeare(roles, val_fraction=0.3).fingerprint
    assert data.fingerprint != shakespeare(roles, users=0.5).fingerprint


def test_users_who_only_train_or_only_test_are_kept_apart(writers):
    data = femnist(writers)
    assert set(data.train.users) == {"ann", "bob", "eve"}  # dora has no sample at all
    assert set(data.test.users) == {"bob", "carl", "eve"}
    assert len(data.val.y) == ceil(0.1 * 37)


def test_validation_leaves_every_user_a_sample():
    users = np.array(["a"] + ["b"] * 2 + ["c"] * 7)
    for seed in range(20):
        rest, held = hold_back(users, 0.7, seed)
        assert sorted([*rest, *held]) == list(range(10))
        assert len(held) == 7
        assert set(users[rest]) == {"a", "b", "c"}
    assert not np.array_equal(hold_back(users, 0.5, 0)[1], hold_back(users, 0.5, 1)[1])
    with pytest.raises(ValueError, match="at most 0.700"):
        hold_back(users, 0.71, 0)


def test_a_share_of_the_users_is_the_same_in_both_parts(tmp_path):
    people = {f"f{i:03d}": images(2, i) for i in range(20)}
    write(tmp_path, "train", people)
    write(tmp_path, "test", people)
    data = femnist(tmp_path, users=0.25)
    assert len(set(data.train.users)) == 5
    assert set(data.train.users) == set(data.test.users)
    assert set(femnist(tmp_path, users=0.25, split_seed=1).train.users) != set(data.train.users)
    assert len(choose_users(list(map(str, range(100))), 0.07, 0)) == 7  # not 8, by the last bit of a float
    assert choose_users(["b", "a", "c"], 0.5, 0) == choose_users(["c", "b", "a", "a"], 0.5, 0)


def test_unknown_characters_are_refused_or_replaced(tmp_path):
    x, y = texts(3, 0)
    write(tmp_path, "train", {"r": ([x[0], "|" + x[1][1:], x[2]], y)})
    write(tmp_path, "test", {"r": (x, y)})
    with pytest.raises(ValueError, match=r"all_data_0.*user r: '\|' is not among LEAF's 80; set data.unknown"):
        shakespeare(tmp_path)
    data = shakespeare(tmp_path, unknown="}", val_fraction=0.4)
    held = torch.cat([data.train.x, data.val.x]).tolist()
    assert sorted(held)[-1] == [79, *[leaf_json.LETTERS.find(c) for c in x[1][1:]]]
    with pytest.raises(ValueError, match=r"data.unknown is '\|'"):
        shakespeare(tmp_path, unknown="|")


SMALL = ["logger=csv", "pictures=false", "partition=natural", "federation.num_clients=3", "federation.rounds=2"]
SMALL += ["federation.clients_per_round=1.0", "calibration.cache=null", "calibration.head_steps=2"]
LSTM = ["model=next_char_lstm", "model.hidden=12", "federation.local_steps=2", "data.batch_size=4"]


def test_every_client_tests_on_its_own_users_samples(run_in, writers):
    from hydra import compose, initialize_config_dir

    from fedsparse.job.assemble import assemble_problem
    from fedsparse.job.shipped import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", ["data=femnist", f"data.root={writers}", "model=mlp", "model.hidden=4", *SMALL])
    federation = assemble_problem(cfg)
    users = federation.dataset.train.users, federation.dataset.test.users
    for name, part, test in zip(["ann", "bob", "eve"], federation.parts, federation.tests, strict=True):
        assert set(users[0][part]) == {name}
        assert set(users[1][test]) == ({name} if name != "ann" else set())
        assert len(test) == (4 if name != "ann" else 0)


def test_a_run_on_femnist(run_in, writers):
    options = ["data=femnist", f"data.root={writers}", "model=femnist_cnn", "model.hidden=2", "data.batch_size=8"]
    options += ["mask_rule=random", "data.local_test=0.2", "data.augment=crop_flip"]
    summary, _ = run_in("femnist", *options, *SMALL, fast=False)
    assert np.isfinite(summary["test/loss"])


@pytest.mark.parametrize("changes", [["mask_rule=dense"], ["sparsity=s50", "head.init=closed_form"]], ids=str)
def test_a_run_on_shakespeare(run_in, roles, changes):
    options = ["data=shakespeare", f"data.root={roles}", *LSTM]
    summary, folder = run_in("play", *options, *SMALL, *changes, fast=False)
    again, _ = run_in("again", *options, *SMALL, *changes, "data.stream=true", fast=False)
    assert np.isfinite(summary["test/loss"])
    assert again["global_sha256"] == summary["global_sha256"]
    assert summary["data_fingerprint"] == shakespeare(roles).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data=shakespeare", *LSTM, "federation.cohort=2"], "set federation.cohort=1"),
        (["data=shakespeare", "model=mlp"], "takes images; choose model=next_char_lstm"),
        (
            ["data=shakespeare", "model=bert_tiny"],
            "80 characters and the model takes words.*choose model=next_char_lstm",
        ),
        (["data=shakespeare", *LSTM, "model.vocabulary=90"], "is 80 characters and the model takes 90 characters"),
        (["data=shakespeare", *LSTM, "data.augment=crop_flip"], "set data.augment=none"),
        (["data=femnist", *LSTM], "images and the model takes text; choose data=shakespeare"),
        (["data=stdlib_docs", *LSTM], "the model has no tokenizer; choose model=bert_tiny"),
        (["data=shakespeare", *LSTM, "federation.num_clients=20"], "partition=natural needs federation.num_clients=3"),
        (["data=shakespeare", *LSTM, "model.dropout=1"], "model.dropout is 1"),
        (["data=shakespeare", *LSTM, "model.layers=0"], "model.layers is 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(run_in, writers, roles, options, message):
    root = writers if options[0] == "data=femnist" else roles
    where = [] if options[0] == "data=stdlib_docs" else [f"data.root={root}"]
    with pytest.raises(Exception) as error:  # noqa: PT011  (Hydra's and our own)
        run_in("bad", *SMALL, *options, *where, fast=False)
    line = one_line(error.value)
    assert "\n" not in line
    assert re.search(message, line), line


def damage(path, **changes):
    """Change fields of a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ONE = {"r": images(2, 0)}
PICTURE = images(1, 0)[0]
WRONG_FILES = {
    "no JSON": (lambda path: path.write_text(path.read_text()[:-9]), "cannot be read as JSON"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "a list": (lambda path: path.write_text("[1]"), "has no list users"),
    "no data": (lambda path: damage(path, user_data=None), "has no dict user_data"),
    "no user's data": (lambda path: damage(path, user_data={}), "user r has no x and y"),
    "more users": (lambda path: damage(path, users=["r", "s"]), "one for each of num_samples"),
    "same users": (lambda path: damage(path, users=["r", "r"], num_samples=[2, 2]), "not 2 different names"),
    "counts": (lambda path: damage(path, num_samples=[3]), "has 2 x and 2 y and num_samples says 3"),
    "short": (lambda path: write(path.parents[1], "train", {"r": ([[0.5] * 783], [1])}), "lists of 784 numbers"),
    "ragged": (lambda path: write(path.parents[1], "train", {"r": ([*PICTURE, [1]], [1, 1])}), "lists of 784 numbers"),
    "range": (lambda path: write(path.parents[1], "train", {"r": ([[255.0] * 784], [1])}), "from 0 to 1"),
    "nan": (lambda path: write(path.parents[1], "train", {"r": ([[float("nan")] * 784], [1])}), "from 0 to 1"),
    "class": (lambda path: write(path.parents[1], "train", {"r": (PICTURE, [62])}), "whole numbers from 0 to 61"),
    "label": (lambda path: write(path.parents[1], "train", {"r": (PICTURE, ["a"])}), "whole numbers from 0 to 61"),
    "twice": (lambda path: write(path.parents[1], "train", ONE, number=1), "user r is in all_data_0"),
    "empty": (lambda path: write(path.parents[1], "train", {"r": ([], [])}), "holds no sample"),
    "gone": (lambda path: path.unlink(), "has no .json file; run ./preprocess.sh"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_damaged_files_are_one_clear_line(tmp_path, change, message):
    path = write(tmp_path, "train", ONE)
    write(tmp_path, "test", ONE)
    assert isinstance(femnist(tmp_path, 0.5), Dataset)
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        femnist(tmp_path, 0.5)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "train") in str(error.value)


def test_missing_folders_and_wrong_shares_are_one_clear_line(tmp_path):
    how = r"run ./preprocess.sh -s niid --sf 0.05 -k 0 -t sample in LEAF's data/shakespeare"
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"has no folder train; {how}"):
            shakespeare(root)
    write(tmp_path, "train", {"r": texts(4, 0)})
    with pytest.raises(ValueError, match="has no folder test"):
        shakespeare(tmp_path)
    write(tmp_path, "test", {"s": texts(4, 0)})
    for share in (0, 1.5, "all", True):
        with pytest.raises(ValueError, match="data.users is"):
            shakespeare(tmp_path, users=share)
    for fraction in (0.0, 1, None, 0.9):
        with pytest.raises(ValueError, match="data.val_fraction is"):
            shakespeare(tmp_path, fraction)
    with pytest.raises(ValueError, match=r"data.users=0.5: the (train|test) part has no user; raise data.users"):
        shakespeare(tmp_path, users=0.5)  # one of two users, of whom each is in one part


@pytest.mark.parametrize(("x", "y"), [(["a" * 79], ["b"]), ([7], ["b"]), (["a" * 80], ["bc"]), (["a" * 80], [3])])
def test_texts_of_another_form_are_refused(tmp_path, x, y):
    write(tmp_path, "train", {"r": (x, y)})
    write(tmp_path, "test", {"r": texts(2, 0)})
    with pytest.raises(ValueError, match="user r: [xy] is not strings of"):
        shakespeare(tmp_path)
