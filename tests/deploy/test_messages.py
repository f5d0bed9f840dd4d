"""Lines and payloads: what is written is read again, and what is not a message is refused in one line."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from fuzzing import attempts

from fedsparse.deploy.messages import Answer, Malformed, Reply, Request
from fedsparse.deploy.post import Errand, Member, Post, checked
from fedsparse.deploy.remote import capped
from fedsparse.job.deployed import Deployed, Options, compose, deployed

REQUEST = Request(7, "ab12", "train", 3, 2, "cafe", {"holds": 1, "weight": 0.5}, {"model": b"abc", "row": b"defgh"})
ANSWER = Answer(7, "ab12", 3, 40, {"local_steps": 4}, b"payload")


def test_a_request_is_read_as_it_was_written():
    meta, payload = REQUEST.write()
    assert payload == b"abcdefgh"
    assert Request.read(meta, payload) == REQUEST
    assert Request.read(*replace(REQUEST, parts={"row": b"", "mask": b"m"}).write()).parts == {"mask": b"m"}


def test_an_answer_is_read_as_it_was_written():
    assert Answer.read(*ANSWER.write()) == ANSWER


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "run"}, "kind is 'run'"),
        ({"format": 2}, "no object of format 1"),
        ({"round": -1}, "round is no whole number"),
        ({"client": True}, "client is no whole number"),
        ({"run": 5}, "run is no text"),
        ({"fields": []}, "fields is no object"),
        ({"parts": [["model", 3]]}, "the payload has 8 bytes, where its parts have 3"),
        ({"parts": [["row", 4], ["row", 4]]}, "no name with a length"),
        ({"parts": [["row", -8]]}, "no name with a length"),
        ({"parts": [["x", 0]] * 17}, "no short list"),
    ],
)
def test_a_line_that_is_no_request_is_refused(change, words):
    meta, payload = REQUEST.write()
    with pytest.raises(ValueError, match=words):
        Request.read(json.dumps(json.loads(meta) | change), payload)


@pytest.mark.parametrize("meta", ["", "[]", "{", "null", "[" * 100_000, '{"format": 1}'])
def test_a_line_that_is_no_object_is_refused(meta):
    with pytest.raises(Malformed):
        Answer.read(meta, b"")


def said(**change):
    meta, payload = ANSWER.write()
    return checked(Reply(100, json.dumps(json.loads(meta) | change), payload), 7, "ab12", 3, 40)


def test_a_reply_is_checked_against_its_request():
    assert said() == ANSWER
    assert said(number=6) is None
    assert said(run="ab13") is None
    assert said(client=2) == "its answer is client 2's"
    assert said(samples=41) == "it says that it holds 41 samples, and declared 40"
    error = Reply(100, "", b"", "<class 'ValueError'>:<'no\n  room'>")
    assert checked(error, 7, "ab12", 3, 40) == "it failed: <class 'ValueError'>:<'no room'>"


class SlowLink:
    """One node, whose answer is there after so many looks; all that was sent is kept."""

    def __init__(self, looks):
        self.looks, self.sent = looks, []

    def nodes(self):
        return [100]

    def push(self, messages, round):
        self.sent += [Request.read(*message) for message in messages.values()]

    def pull(self):
        self.looks -= 1
        request = self.sent[-1]
        return [Reply(100, *Answer(request.number, "ab12", 3, 40, {}, b"late").write())] if self.looks == 0 else []


@pytest.mark.parametrize("on_missing", ["drop", "wait", "stop"])
def test_what_happens_when_time_is_up(on_missing):
    """The answer is there after ten looks, of which the first few take all the time that there is."""
    link = SlowLink(looks=10)
    post = Post(link, "ab12", "cafe", Options(timeout=0.05, on_missing=on_missing))
    ask = partial(post.ask, {3: Errand("train", 2, {"holds": 1}, {"row": b"abc"})}, {3: Member(100, 40)})
    if on_missing == "stop":
        with pytest.raises(ValueError, match="no answer of client 3 in 0.05 s, and deploy.on_missing=stop"):
            ask()
        return
    (found,) = ask().values()
    assert found == "no answer in 0.05 s" if on_missing == "drop" else found.payload == b"late"
    assert (post.down, post.up) == (3, 0 if on_missing == "drop" else 4)
    (request,) = link.sent
    assert (request.kind, request.client, request.round, request.config) == ("train", 3, 2, "cafe")


@pytest.mark.fuzz
def test_no_mutated_line_counts_as_another_answer():
    meta, payload = ANSWER.write()
    dice, ends = random.Random(5), Counter()
    for _ in range(attempts(20_000)):
        at = dice.randrange(len(meta))
        mutant = meta[:at] + dice.choice([chr(dice.randrange(32, 127)), "", meta[at:][:9] * 2]) + meta[at + 1 :]
        found = checked(Reply(100, mutant, payload), 7, "ab12", 3, 40)
        if isinstance(found, Answer):  # of the fields alone, which are no part of the training
            assert replace(found, fields={}) == replace(ANSWER, fields={})
        ends[type(found).__name__] += 1
    assert ends["str"] > 100
    assert ends["NoneType"] > 10  # another number or run


def shares(weights):
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.9])
def test_no_weight_has_more_than_its_share(share):
    dice = random.Random(1)
    for _ in range(200):
        weights = [dice.uniform(0.1, 10) ** 2 for _ in range(dice.randrange(4, 9))]
        limited = capped(weights, share)
        assert max(shares(limited)) <= share * (1 + 1e-9)
        cut = [two for one, two in zip(weights, limited, strict=True) if one != two]
        assert bool(cut) == (max(shares(weights)) > share)
        assert cut == [max(limited)] * len(cut)  # and the others stay
    assert capped([1.0, 2.0], 1.0) == [1.0, 2.0]
    assert capped([1.0, 2.0], 0.4) == [1.0, 1.0]


def test_the_configuration_is_one_text_with_one_hash():
    text = compose(["model=mlp", "seed=3", "deploy.timeout=5"])
    read = Deployed.read(text)
    assert (read.config["seed"], read.options.timeout, read.choices["model"]) == (3, 5, "mlp")
    assert read.text() == text
    of = {name: deployed(["model=mlp", *typed]).hash for name, typed in {
        "plain": [], "seed": ["seed=3"], "own": ["trainer.accelerator=cpu", "federation.store=file"],
        "precision": ["trainer.precision=bf16-mixed"], "options": ["deploy.timeout=5"]}.items()}  # fmt: skip
    assert of["plain"] == of["own"] == of["options"]
    assert len({of["plain"], of["seed"], of["precision"]}) == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("deploy.tiemout=5", "deploy.tiemout is no key; there are deploy.timeout"),
        ("deploy.timeout=0", "deploy.timeout is 0; it must be a finite number above 0"),
        ("deploy.on_missing=drp", "deploy.on_missing"),
        ("deploy.max_share=1.5", "deploy.max_share"),
        ("sede=1", "there is no key sede"),
    ],
)
def test_an_invalid_option_is_one_line(override, words):
    with pytest.raises(ValueError, match=words) as error:
        compose([override])
    assert "\n" not in str(error.value)


def test_a_node_changes_only_its_own_keys():
    run = deployed(["model=mlp"])
    with pytest.raises(ValueError, match="seed=1: a node sets data.root, trainer, federation.store, trust"):
        run.at_node(["seed=1"], 0, alone=False)
    with pytest.raises(ValueError, match="trainer.precision"):
        run.at_node(["trainer.precision=64-true"], 0, alone=False)
    foreign = replace(run, config={**run.config, "mask_rule": {"_target_": "os.system", "command": "true"}})
    with pytest.raises(ValueError, match=r"mask_rule.*os\.system"):
        foreign.at_node([], 0, alone=False)
