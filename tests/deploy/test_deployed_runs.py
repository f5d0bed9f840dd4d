"""A deployed run equals the simulator's, in bits and bytes; what nodes do wrong is named, and ends nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fuzzing import attempts
from nodes import LocalLink
from safetensors.torch import load_file

from fedsparse import run
from fedsparse.deploy.messages import Answer, Reply, Request
from fedsparse.deploy.serve import serve
from fedsparse.deploy.worker import Worker
from fedsparse.federation.diverged import Diverged
from fedsparse.job.deployed import Deployed, compose

BASE = [
    "model=mlp",
    "logger=csv",
    "pictures=false",
    "federation.num_clients=4",
    "federation.clients_per_round=1.0",
    "federation.rounds=3",
    "calibration.head_steps=2",
    "calibration.cache=null",
]
FEEDBACK = ["exchange.feedback=1.0", "aggregation=coordinate_mean", "aggregation.denominator=participants"]
TOPK = ["mask_rule=dense", "exchange=topk", "exchange.fraction=0.1"]
SLOW = {
    "masked": [],
    "dense": ["mask_rule=dense"],
    "half": ["federation.clients_per_round=0.5", "mask_rule=random"],
    "values": [*TOPK, "exchange.payload=value"],
    "int8": [*TOPK, *FEEDBACK, "exchange.precision=int8"],
    "closed_form": ["head.init=closed_form", "mask_rule=snip"],
    "frozen_head": ["head.frozen=true"],
    "scaffold": ["objective=scaffold", "head.init=random"],
    "pruned": ["sparsity.mode=prune", "mask_rule=highest_magnitude"],
    "thinned": ["mask_rule=snip", "calibration.rounds=2"],
    "median": ["aggregation=median", "server=fedadam", "schedule=cosine"],
    "departments": ["topology=departments", "topology.of=2", "mask_rule=dense", "head.init=random"],
    "patience": ["federation.local_steps=null", "federation.local_epochs=2", "federation.weight=processed"],
}
TIMES = ("seconds", "memory", "folder", "created")


def simulated(folder, *options):
    return run([*BASE, *options, f"hydra.run.dir={folder}", "federation.cohort=1"])


def deployed(folder, link, *options, resume=False):
    folder.mkdir(exist_ok=True)
    return serve(link, compose([*BASE, *options]), folder, resume)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(folder, other):
    one, two = weights(folder), weights(other)
    assert all(torch.equal(one[name], two[name]) for name in two)


def same_figures(got, want):
    plain = {key: value for key, value in want.items() if not any(word in key for word in TIMES)}
    return {key: got.get(key) for key in plain} == plain


def carried(link, *kinds):
    """Bytes of the payloads of these kinds, down and up."""
    return tuple(sum(sizes[way] for kind, *sizes in link.payloads if kind in kinds) for way in (0, 1))


def check_row(tmp_path, monkeypatch, options, kept):
    monkeypatch.chdir(tmp_path)
    link = LocalLink(tmp_path / "nodes", 4, kept=kept)
    got = deployed(tmp_path / "deployed", link, *options)
    want = simulated(tmp_path / "simulated", *options)
    assert_equal(tmp_path / "deployed", tmp_path / "simulated")
    assert same_figures(got, want)
    counted = want["bytes_down"] + want["bytes_setup_down"], want["bytes_up"] + want["bytes_setup_up"]
    assert carried(link, "prepare", "train") == counted
    metrics = [(tmp_path / name / "traffic.csv").read_text() for name in ("deployed", "simulated")]
    assert metrics[0] == metrics[1]


def test_what_clients_keep_stays_at_nodes_that_start_anew(tmp_path, monkeypatch):
    """Residuals, and the head: each message meets a new worker, which goes on from its folder."""
    check_row(tmp_path, monkeypatch, [*TOPK, *FEEDBACK, "model.local=[head.*]"], kept=False)


OFTEN = ("masked", "closed_form", "scaffold", "departments", "frozen_head")  # one of each kind; the others: make soak


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.soak) for n in SLOW])
def test_a_deployed_run_is_the_simulators(tmp_path, monkeypatch, name):
    check_row(tmp_path, monkeypatch, SLOW[name], kept=name not in ("masked", "closed_form"))


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("method", ["fedsa", "local"])
def test_adapters_of_which_a_part_stays(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    options = ["experiment=departments_docs", f"method={method}", "federation.rounds=1"]
    folders = [tmp_path / "deployed", tmp_path / "simulated"]
    folders[0].mkdir()
    typed = [*options, "logger=csv", "pictures=false"]
    cfg = Deployed.read(compose(typed)).config
    link = LocalLink(tmp_path / "nodes", cfg["federation"]["num_clients"])
    got = serve(link, compose(typed), folders[0])
    want = run([*typed, f"hydra.run.dir={folders[1]}", "federation.cohort=1"])
    assert_equal(*folders)
    assert same_figures(got, want)
    assert "personal/acc_mean" in got


@pytest.mark.slow
def test_own_data_make_the_folder_the_client(tmp_path, monkeypatch):
    """Four folders of arrays are four clients; in the simulator they are the users of one folder."""
    monkeypatch.chdir(tmp_path)
    rng, parts = np.random.default_rng(0), (40, 25, 60, 33)
    held = {name: (rng.normal(size=(n, 1, 6, 6)).astype("float32"), rng.integers(0, 3, n)) for name, n in
            [*((str(k), n) for k, n in enumerate(parts)), ("val", 30), ("test", 30)]}  # fmt: skip

    def write(folder, names):
        folder.mkdir()
        whole = {split: [held[n] for n in chosen] for split, chosen in
                 (("train", names), ("val", ["val"]), ("test", ["test"]))}  # fmt: skip
        for split, several in whole.items():
            np.save(folder / f"{split}_x.npy", np.concatenate([x for x, _ in several]))
            np.save(folder / f"{split}_y.npy", np.concatenate([y for _, y in several]))

    write(tmp_path / "server", ["0"])
    for client in range(4):
        write(tmp_path / f"mine{client}", [str(client)])
    options = [
        f"data=arrays data.root={tmp_path / 'server'} mask_rule=dense federation.local_epochs=1"
        " federation.local_steps=null data.batch_size=16"
    ][0].split()
    own = {client: [f"data.root={tmp_path / f'mine{client}'}"] for client in range(4)}
    link = LocalLink(tmp_path / "nodes", 4, own)
    got = deployed(tmp_path / "deployed", link, *options)
    assert json.loads((tmp_path / "deployed" / "nodes.json").read_text())["samples"] == {
        str(client): n for client, n in enumerate(parts)
    }
    write(tmp_path / "all", ["0", "1", "2", "3"])
    np.save(tmp_path / "all" / "train_users.npy", np.repeat(range(4), parts))
    options[1] = f"data.root={tmp_path / 'all'}"
    want = simulated(tmp_path / "simulated", *options, "partition=natural")
    assert_equal(tmp_path / "deployed", tmp_path / "simulated")
    assert got["bytes_total"] == want["bytes_total"]


@pytest.mark.slow
def test_a_node_that_says_nothing_is_named_and_the_round_is_that_of_the_others(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    seen = Counter()

    def silent(reply):
        seen[reply.node] += 1
        return [] if reply.node == 102 and seen[102] > 1 else [reply]

    options = ["federation.rounds=2", "head.init=random", "mask_rule=dense"]
    link = LocalLink(tmp_path / "nodes", 4, tamper=silent)
    got = deployed(tmp_path / "deployed", link, *options, "deploy.timeout=0.3")
    assert "client 2 is left out: no answer in 0.3 s" in caplog.text
    assert got["dropped_updates"] == 2
    others = LocalLink(tmp_path / "three", 4)
    del others.workers[102]
    deployed(tmp_path / "others", others, *options, "deploy.min_clients=3")
    assert_equal(tmp_path / "deployed", tmp_path / "others")
    seen.clear()
    link = LocalLink(tmp_path / "again", 4, tamper=silent)
    with pytest.raises(ValueError, match=r"no answer of client 2 in 0.3 s, and deploy.on_missing=stop"):
        deployed(tmp_path / "stopped", link, *options, "deploy.timeout=0.3", "deploy.on_missing=stop")


@pytest.mark.slow
def test_a_round_that_nobody_answers_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = Counter()

    def silent(reply):
        seen[reply.node] += 1
        return [reply] if seen[reply.node] <= 2 else []  # the join and the first round

    link = LocalLink(tmp_path / "nodes", 4, tamper=silent)
    with pytest.raises(Diverged, match=r"round 2: no update counts, so the run stops; client \d: no answer in 0.2 s"):
        deployed(tmp_path / "run", link, "head.init=random", "mask_rule=dense", "deploy.timeout=0.2")


@pytest.mark.slow
def test_no_client_weighs_more_than_its_share(tmp_path, monkeypatch):
    """At a quarter for each of four all weigh the same, whatever they hold."""
    monkeypatch.chdir(tmp_path)
    options = ["head.init=random", "mask_rule=dense", "partition=dirichlet01"]
    got = deployed(tmp_path / "deployed", LocalLink(tmp_path / "nodes", 4), *options, "deploy.max_share=0.25")
    want = simulated(tmp_path / "simulated", *options, "federation.weight=equal")
    assert got["dropped_updates"] == 0
    one, two = weights(tmp_path / "deployed"), weights(tmp_path / "simulated")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in two)
    other = deployed(tmp_path / "other", LocalLink(tmp_path / "free", 4), *options)
    assert abs(other["test/loss"] - want["test/loss"]) > 1e-4 > abs(got["test/loss"] - want["test/loss"])


@pytest.mark.slow
def test_what_is_late_doubled_or_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["head.init=random", *TOPK, *FEEDBACK]
    early: dict[int, Reply] = {}

    def tamper(reply):
        before = early.get(reply.node)
        early[reply.node] = reply
        meta = json.loads(reply.meta)
        other = reply._replace(meta=json.dumps(meta | {"run": "0" * 16}))
        return [*([before] if before else []), other, reply, reply]

    deployed(tmp_path / "deployed", LocalLink(tmp_path / "nodes", 4, tamper=tamper), *options)
    simulated(tmp_path / "simulated", *options)
    assert_equal(tmp_path / "deployed", tmp_path / "simulated")


@pytest.mark.slow
def test_a_client_that_raises_or_lies_is_named_and_dropped(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    wrong = {
        101: lambda reply, meta: reply._replace(meta="", payload=b"", error="<class 'OSError'>:<'disk full'>"),
        102: lambda reply, meta: reply._replace(meta=json.dumps(meta | {"samples": 10**6})),
        103: lambda reply, meta: reply._replace(payload=bytes(random.Random(0).randbytes(900))),
    }
    seen = Counter()

    def tamper(reply):
        seen[reply.node] += 1
        if seen[reply.node] == 1 or reply.node not in wrong:
            return [reply]
        return [wrong[reply.node](reply, json.loads(reply.meta))]

    link = LocalLink(tmp_path / "nodes", 4, tamper=tamper)
    got = deployed(tmp_path / "deployed", link, "head.init=random", "mask_rule=dense", "federation.rounds=1")
    assert got["dropped_updates"] == 3
    assert "client 1 is left out: it failed: <class 'OSError'>:<'disk full'>" in caplog.text
    assert "client 2 is left out: it says that it holds 1000000 samples, and declared 292" in caplog.text
    assert "client 3 is left out: payload" in caplog.text


@pytest.mark.slow
def test_a_wiped_node_gets_the_model_again_and_lost_residuals_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    import shutil

    for name, options in (("dense", ["mask_rule=dense"]), ("feedback", [*TOPK, *FEEDBACK])):
        seen = Counter()

        def wipe(reply, name=name, seen=seen):
            seen[reply.node] += 1
            if reply.node == 101 and seen[101] == 2:  # after its first round: a new disk, and a new process
                shutil.rmtree(tmp_path / f"{name}_nodes" / "1" / json.loads(reply.meta)["run"] / "rounds")
            return [reply]

        link = LocalLink(tmp_path / f"{name}_nodes", 4, tamper=wipe, kept=False)
        got = deployed(tmp_path / name, link, "head.init=random", *options)
        if name == "dense":
            simulated(tmp_path / "simulated", "head.init=random", *options)
            assert_equal(tmp_path / name, tmp_path / "simulated")
            assert got["bytes_total"] > json.loads((tmp_path / "simulated/summary.json").read_text())["bytes_total"]
        else:
            assert "client 1 is left out: it has lost what it keeps since round 1" in caplog.text


class Killed(BaseException):
    """The server is gone."""


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_to_the_same_row(tmp_path, monkeypatch):
    """At twenty random moments between two messages; nodes stay, or start anew."""
    monkeypatch.chdir(tmp_path)
    options = ["head.init=random", "federation.rounds=7", *TOPK, *FEEDBACK]
    whole = LocalLink(tmp_path / "whole_nodes", 4)
    deployed(tmp_path / "whole", whole, *options)
    messages, dice = len(whole.payloads), random.Random(3)
    for trial, moment in enumerate(sorted(dice.sample(range(5, messages), attempts(20) or 2))):
        seen = Counter()

        def kill(reply, moment=moment, seen=seen):
            seen["all"] += 1
            if seen["all"] == moment:
                raise Killed
            return [reply]

        link = LocalLink(tmp_path / f"nodes{trial}", 4, tamper=kill, kept=trial % 2 == 0)
        folder = tmp_path / f"run{trial}"
        with pytest.raises(Killed):
            deployed(folder, link, *options)
        link.tamper = lambda reply: [reply]
        deployed(folder, link, *options, resume=True)
        assert_equal(folder, tmp_path / "whole")


@pytest.mark.fuzz
@pytest.mark.slow
def test_no_mutated_payload_counts_and_none_ends_the_server(tmp_path, monkeypatch):
    """20,000 answers with flipped, cut, doubled and inserted bytes; a tenth in CI."""
    monkeypatch.chdir(tmp_path)
    from fedsparse.deploy import remote

    number, ends, dice = attempts(20_000), Counter(), random.Random(7)
    done = remote.take_in

    def with_mutants(round, cohort, said):
        for _ in range(number // 8):
            mutant = replace(said, payload=mutated(said.payload, dice))
            if mutant.payload == said.payload:
                continue
            before = len(round.reports)
            done(round, cohort, mutant)
            (report,) = round.reports[before:]
            ends["accepted" if not report.dropped else "refused"] += 1
            round.reports.pop()
        done(round, cohort, said)

    monkeypatch.setattr(remote, "take_in", with_mutants)
    options = ["head.init=random", "federation.rounds=2", *TOPK]
    deployed(tmp_path / "deployed", LocalLink(tmp_path / "nodes", 4), *options)
    assert set(ends) == {"refused"}
    assert ends["refused"] > 0.9 * number
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    simulated(tmp_path / "simulated", *options)
    assert_equal(tmp_path / "deployed", tmp_path / "simulated")


def mutated(payload: bytes, dice: random.Random) -> bytes:
    """Change bytes of a payload: flip, cut, insert, double, or replace by noise."""
    at, kind = dice.randrange(len(payload)), dice.randrange(5)
    if kind == 0:
        return payload[:at] + bytes([payload[at] ^ 1 << dice.randrange(8)]) + payload[at + 1 :]
    if kind == 1:
        return payload[:at]
    if kind == 2:
        return payload[:at] + dice.randbytes(dice.randrange(1, 9)) + payload[at:]
    return payload + payload if kind == 3 else dice.randbytes(len(payload))


def test_a_node_refuses_what_is_not_its_run(tmp_path):
    text = compose(BASE)
    right = Deployed.read(text).hash
    worker = Worker(tmp_path, 1)
    join = Request(1, "ab12", "join", 0, 0, right, {"text": text})
    refusals = {
        "run ab12 is unknown at this node": replace(join, kind="train", client=1),
        "the request is for client 3, and this is client 1": replace(join, kind="train", client=3),
        "the configuration's hash is": replace(join, config="0" * 16),
        "'../x' is no id of a run": replace(join, run="../x"),
        "this is no configuration of a deployed run": replace(join, fields={"text": "a: 1"}),
    }
    for words, request in refusals.items():
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            worker.answer(*request.write())
    answer = Answer.read(*worker.answer(*join.write()))
    assert (answer.client, answer.samples, dict(answer.fields)) == (
        1,
        292,
        {"alone": False, "classes": 10, "shape": [1, 8, 8]},
    )
    with pytest.raises(ValueError, match="run ab12 has the configuration"):
        worker.answer(*replace(join, kind="train", client=1, config="0" * 16).write())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["mask.owner=client"], "mask.owner=client is not deployed: each client's mask stays with it"),
        (["mask_rule=autoflip"], "an exploration is not deployed: run python -m fedsparse.calibrate"),
        (["sparsity.renew_every=1"], "a mask that changes is not deployed: set sparsity.schedule"),
        (["evaluation=per_client"], "evaluation=per_client is not deployed: set evaluation=global"),
    ],
)
def test_what_is_not_deployed_is_refused_before_anything_is_sent(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    link = LocalLink(tmp_path / "nodes", 4)
    with pytest.raises(ValueError, match=words):
        deployed(tmp_path / "run", link, *options)
    assert not link.payloads
