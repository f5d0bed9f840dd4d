"""The link over a grid and the kept node, with a Flower of a few lines: what is sent, counted and refused."""

from __future__ import annotations

import sys
from itertools import count
from types import ModuleType, SimpleNamespace

import pytest

from fedsparse.deploy.link import NOT_PUSHED, GridLink
from fedsparse.deploy.messages import Reply
from fedsparse.deploy.node import keep, pause
from fedsparse.deploy.place import Place
from fedsparse.deploy.records import unpack

NONE = "a message does not hold the record"


class Message:
    """A message as Flower's: with content or an error, to a node or in answer to another message."""

    def __init__(self, content=None, dst_node_id=0, message_type="", group_id="", reply_to="", error=None):
        self.content, self.error = content, error
        self.sent_as = (dst_node_id, message_type, group_id)
        self.metadata = SimpleNamespace(reply_to_message_id=reply_to, run_id=7)

    def has_content(self):
        return self.content is not None

    def has_error(self):
        return self.error is not None


@pytest.fixture(autouse=True)
def flower(monkeypatch):
    module = ModuleType("flwr.app")
    vars(module).update(Message=Message, ConfigRecord=dict, RecordDict=dict)
    monkeypatch.setitem(sys.modules, "flwr", ModuleType("flwr"))
    monkeypatch.setitem(sys.modules, "flwr.app", module)


class Grid:
    """Three nodes; messages get ids from 0, but none to node 30."""

    def __init__(self):
        self.pushed, self.answers, self.asked, self.ids = [], [], [], map(str, count())

    def get_node_ids(self):
        return [30, 10, 20]

    def push_messages(self, messages):
        self.pushed += messages
        return [None if message.sent_as[0] == 30 else next(self.ids) for message in messages]

    def pull_messages(self, ids):
        self.asked.append(list(ids))
        answers, self.answers = self.answers, []
        return answers


def answer(id, meta="m", payload=b"p"):
    return Message({"fedsparse": {"meta": meta, "payload": payload}}, reply_to=id)


def test_a_message_is_one_record_of_two_values():
    grid = Grid()
    GridLink(grid).push({10: ("a", b"\x00\xff"), 20: ("b", b"")}, 4)
    assert [message.sent_as for message in grid.pushed] == [(10, "train", "4"), (20, "train", "4")]
    assert [message.content for message in grid.pushed] == [
        {"fedsparse": {"meta": "a", "payload": b"\x00\xff"}},
        {"fedsparse": {"meta": "b", "payload": b""}},
    ]
    assert unpack(grid.pushed[0]) == ("a", b"\x00\xff")


def test_answers_go_to_the_nodes_that_were_asked_and_count_once():
    grid = Grid()
    link = GridLink(grid)
    assert link.nodes() == [10, 20, 30]
    assert link.pull() == []
    assert grid.asked == []  # nothing was sent, so nothing is asked for
    link.push({10: ("a", b"1"), 20: ("b", b"2")}, 0)
    grid.answers = [answer("1", "from 20"), answer("5", "of another run"), answer("1", "doubled")]
    assert link.pull() == [Reply(20, "from 20", b"p", None)]
    assert link.pull() == []
    grid.answers = [answer("0", "from 10")]
    assert link.pull() == [Reply(10, "from 10", b"p", None)]
    assert link.pull() == []
    assert grid.asked == [["0", "1"], ["0"], ["0"]]


def test_a_message_that_was_not_taken_is_an_error_of_its_node():
    link = GridLink(Grid())
    link.push({30: ("a", b""), 10: ("b", b"")}, 0)
    assert link.pull() == [Reply(30, "", b"", NOT_PUSHED)]
    assert link.pull() == []


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Message(reply_to="0", error=SimpleNamespace(code=2, reason="it raised")), "it raised"),
        (Message(reply_to="0", error=SimpleNamespace(code=5, reason="")), "error 5 of Flower"),
        (Message({}, reply_to="0"), NONE),
        (Message({"other": {}}, reply_to="0"), NONE),
        (Message({"fedsparse": {"meta": "m"}}, reply_to="0"), NONE),
        (Message({"fedsparse": {"meta": b"m", "payload": b""}}, reply_to="0"), NONE),
        (Message({"fedsparse": {"meta": "m", "payload": "p"}}, reply_to="0"), NONE),
        (
            Message({"fedsparse": {"meta": "m", "payload": b"", "x": 1}}, reply_to="0"),
            NONE,
        ),
        (
            Message({"fedsparse": {"meta": "m", "payload": b""}, "x": {}}, reply_to="0"),
            NONE,
        ),
        (Message(reply_to="0"), NONE),
    ],
)
def test_what_is_no_answer_is_an_error_of_its_node_and_is_not_raised(message, said):
    grid = Grid()
    link = GridLink(grid)
    link.push({10: ("a", b"")}, 0)
    grid.answers = [message]
    (reply,) = link.pull()
    assert (reply.node, reply.meta, reply.payload) == (10, "", b"")
    assert reply.error.startswith(said)


def test_a_function_that_pulls_may_say_why_an_answer_cannot_be_had():
    link = GridLink(Grid(), lambda ids: [(id, f"{id} is lost") for id in ids])
    link.push({10: ("a", b"")}, 0)
    assert link.pull() == [Reply(10, "", b"", "0 is lost")]


class Ended(Exception):
    """The connection ends, so that the loop does."""


class Connection:
    """Hands out messages, None for no message, and keeps what is said."""

    def __init__(self, *messages, over=()):
        self.messages, self.over, self.said = list(messages), over, []

    def receive(self):
        if not self.messages:
            raise Ended
        return self.messages.pop(0)

    def answer(self, message, answer, seconds):
        self.said.append((message, answer))

    def fail(self, message, error, seconds):
        self.said.append((message, str(error)))

    def runs(self, run):
        return run not in self.over


def message(run, meta):
    made = Message({"fedsparse": {"meta": meta, "payload": b""}})
    made.metadata.run_id = run
    return made


class Worker:
    """Counts what it is asked; raises for ``raise``."""

    def __init__(self, *given):
        self.given, self.asked = given, 0

    def answer(self, meta, payload):
        self.asked += 1
        if meta == "raise":
            raise ValueError("told to")
        return meta, str(self.asked).encode()


def kept(monkeypatch, tmp_path, connection):
    """Run a node until its connection ends -> what it said, and how long it slept each time."""
    module, slept = ModuleType("fedsparse.deploy.worker"), []
    vars(module).update(Worker=Worker)
    monkeypatch.setitem(sys.modules, "fedsparse.deploy.worker", module)
    with pytest.raises(Ended):
        keep(connection, Place(tmp_path, 0, ()), slept.append)
    return [answer for _, answer in connection.said], slept


def test_a_node_keeps_one_worker_a_run(monkeypatch, tmp_path):
    connection = Connection(message(1, "a"), None, message(2, "b"), message(1, "c"))
    said, slept = kept(monkeypatch, tmp_path, connection)
    assert said == [("a", b"1"), ("b", b"1"), ("c", b"2")]
    assert slept == [0.05]


def test_a_run_that_is_over_is_forgotten_when_another_begins(monkeypatch, tmp_path):
    connection = Connection(message(1, "a"), message(2, "b"), message(1, "c"), over=[1])
    assert kept(monkeypatch, tmp_path, connection)[0] == [("a", b"1"), ("b", b"1"), ("c", b"1")]


def test_after_an_error_a_worker_is_made_anew(monkeypatch, tmp_path):
    connection = Connection(message(1, "a"), message(1, "raise"), message(1, "c"), Message({}))
    said, _ = kept(monkeypatch, tmp_path, connection)
    assert said == [
        ("a", b"1"),
        "told to",
        ("c", b"1"),
        f"{NONE} fedsparse of meta and payload alone",
    ]


@pytest.mark.parametrize(
    ("idle", "took", "seconds"),
    [(0, 0, 0.05), (1, 0.01, 0.05), (4, 0.01, 0.2), (60, 0.01, 1.0), (0, 0.05, 0.2), (0, 5, 1.0)],
)
def test_a_node_asks_less_often_the_longer_it_is_idle_and_the_busier_the_server(idle, took, seconds):
    assert pause(idle, took) == pytest.approx(seconds)
