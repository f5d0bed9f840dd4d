"""Every client's own figures, against scikit-learn on models that plain loops train."""

from __future__ import annotations

import copy
import csv
import warnings

import numpy as np
import pytest
import torch
from pair import fit, in_processes
from plain import replay
from sklearn import metrics as sk
from small import Small, uneven_parts
from torch import nn
from torch.nn import functional as F

from fedsparse import run
from fedsparse.core import parallel
from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Dataset, Split
from fedsparse.federation.figures import METRICS, Row, columns, metrics_of, over_clients
from fedsparse.simulation.checkpoint import AtomicCheckpointIO
from fedsparse.simulation.csv_logger import read_rows
from fedsparse.simulation.personal import Personal

CLASSES, N, TESTS = 6, 150, 60
ON = ["evaluation=per_client", "pictures=false"]


def data():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N + 2 * TESTS, 1, 3, 4, generator=g, dtype=torch.float64)
    y = (x.flatten(1)[:, :CLASSES] + 0.5 * torch.randn(len(x), CLASSES, generator=g, dtype=torch.float64)).argmax(1)
    cut = [Split(x[a:b], y[a:b]) for a, b in ((0, N), (N, N + TESTS), (N + TESTS, len(x)))]
    return Dataset(*cut, classes=CLASSES, name="six")


def held():
    """Test parts of seven clients: of several sizes, one longer than a batch, one empty, some samples shared."""
    rng = np.random.default_rng(3)
    return [np.sort(rng.choice(TESTS, size, replace=False)) for size in (9, 4, 1, 0, 25, 12, 6)]


def net(*between):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), *copy.deepcopy(between), nn.Tanh(), nn.Linear(16, CLASSES)
    ).double()


def small(path=None, between=(), **options):
    """A federation that is evaluated per client, or, without a path, one that is not."""
    own = {key: options.pop(key) for key in ("every", "who", "fraction", "average", "metrics") if key in options}
    built = Small(net(*between), data(), uneven_parts(N), data={"tests": held(), "eval_batch_size": 10}, **options)
    if path is not None:
        built.personal = Personal(**own, path=path)
        built.callbacks = [built.personal]
    return built


def lines(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def judged(model, split, part):
    """All metrics of one model on one part, by scikit-learn."""
    x, y = split.x[part], split.y[part].numpy()
    with torch.no_grad():
        logits = model(x)
    guess, options = logits.argmax(1).numpy(), {"average": "weighted", "zero_division": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top5 = sk.top_k_accuracy_score(y, logits.numpy(), k=5, labels=np.arange(CLASSES))
    return {
        "loss": F.cross_entropy(logits, torch.from_numpy(y)).item(),
        "top1": sk.accuracy_score(y, guess),
        "top5": top5,
        "f1": sk.f1_score(y, guess, **options),
        "precision": sk.precision_score(y, guess, **options),
        "recall": sk.recall_score(y, guess, **options),
    }


def trained(start, split, batches, lr, momentum):
    """One client's training, as torch does it."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(split.x[batch]), split.y[batch]).backward()
        optimizer.step()
    return model


def plain(built, rounds):
    """(round, client, group, model) -> metrics, from loops over clients."""
    model, found, parts = copy.deepcopy(built.net), {}, held()
    train, test = built.dataset.train, built.dataset.test
    for r, clients in enumerate(replay(built.plan, rounds)):
        ids = built.plan.sample(r)
        outside = [k for k in range(len(parts)) if k not in ids]
        own = {k: trained(model, train, steps, 0.2, 0.9) for k, (steps, _) in zip(ids, clients, strict=True)}
        total = sum(weight for _, weight in clients)
        new = copy.deepcopy(model)
        for name, value in new.state_dict().items():
            rows = [own[k].state_dict()[name] * weight / total for k, (_, weight) in zip(ids, clients, strict=True)]
            value.copy_(torch.stack(rows).sum(0))
        seen = [(k, "participants", "start", model) for k in ids] + [(k, "participants", "local", own[k]) for k in ids]
        seen += [(k, "participants", "global", new) for k in ids]
        seen += [(k, "non_participants", name, m) for k in outside for name, m in (("start", model), ("global", new))]
        found |= {(r + 1, k, g, name): judged(m, test, parts[k]) for k, g, name, m in seen if len(parts[k])}
        model = new
    return found


@pytest.mark.parametrize("cohort", [1, 3])
def test_figures_equal_scikit_learn_on_models_of_plain_loops(tmp_path, cohort):
    path, figures = tmp_path / "clients.csv", []
    built = small(path, cohort=cohort, count=4)
    expected = plain(built, 3)
    built.personal.on_train_epoch_end = lambda *_: figures.append(dict(built.personal.figures))
    built.fit(3, tmp_path)
    rows = lines(path)
    order = ("start", "local", "global")
    found = [(int(row["round"]), int(row["client"]), row["group"], row["model"]) for row in rows]
    assert found == sorted(expected, key=lambda key: (key[0], key[1], order.index(key[3])))
    for key, row in zip(found, rows, strict=True):
        assert int(row["n"]) == len(held()[key[1]])
        assert {name: float(row[name]) for name in METRICS} == pytest.approx(expected[key], abs=1e-6), key
    for r in range(3):
        assert figures[r] == pytest.approx(by_hand(expected, r + 1), abs=1e-6)


def by_hand(expected, r):
    """The columns of one round."""
    found, sizes = {}, [len(part) for part in held()]
    for pair in {key[2:] for key in expected}:
        chosen = {key[1]: value for key, value in expected.items() if (key[0], key[2:]) == (r, pair)}
        n = [sizes[k] for k in chosen]
        for name in METRICS if chosen else ():
            values = np.array([value[name] for value in chosen.values()])
            own = "/".join(pair) + f"/{name}_"
            found[own + "mean"], found[own + "std"] = values.mean(), values.std()
            found[own + "weighted"] = (values * n).sum() / sum(n)
            found[own + "worst10"] = values.max() if name == "loss" else values.min()  # a tenth of few is one
    for gap, one, other in (
        ("generalisation", "non_participants/global", "participants/local"),
        ("local_start", "participants/local", "participants/start"),
        ("local_global", "participants/local", "participants/global"),
    ):
        for what in [f"{name}_{mean}" for name in METRICS for mean in ("mean", "weighted")]:
            if f"{one}/{what}" in found:
                found[f"gap/{gap}/{what}"] = found[f"{one}/{what}"] - found[f"{other}/{what}"]
    return found


@pytest.mark.parametrize("average", ["weighted", "macro", "micro"])
@pytest.mark.parametrize(("classes", "n"), [(3, 1), (3, 17), (7, 4), (12, 40)])
def test_metrics_equal_scikit_learn(average, classes, n):
    """Parts of few samples lack classes, and models predict classes that are not there."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        logits, y = torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)
        found, guess = metrics_of(logits, y, torch.arange(n), average=average), logits.argmax(1)
        options = {"average": average, "zero_division": 0}
        assert found["loss"] == pytest.approx((n - 1) / 2)
        assert found["top1"] == pytest.approx(sk.accuracy_score(y, guess))
        for name in ("f1", "precision", "recall"):
            assert found[name] == pytest.approx(getattr(sk, f"{name}_score")(y, guess, **options), abs=1e-6), name
        if classes < 5:
            assert "top5" not in found
        else:
            best = logits.argsort(1, descending=True)[:, :5]
            assert found["top5"] == pytest.approx(np.mean([y[i] in best[i] for i in range(n)]))


def test_over_clients_by_hand():
    values = [k / 20 for k in range(20)]
    found = over_clients(values, [1] * 10 + [3] * 10)
    assert found["mean"] == pytest.approx(0.475)
    assert found["weighted"] == pytest.approx((sum(values[:10]) + 3 * sum(values[10:])) / 40)
    assert found["worst10"] == pytest.approx((0 + 0.05) / 2)
    assert found["std"] == pytest.approx((sum((v - 0.475) ** 2 for v in values) / 20) ** 0.5)
    assert over_clients(values, [1] * 20, highest_is_worst=True)["worst10"] == pytest.approx((0.95 + 0.9) / 2)


def test_the_generalisation_gap_is_out_minus_in():
    rows = [
        Row(0, "participants", "local", 1, {"top1": 0.9}),
        Row(1, "participants", "local", 3, {"top1": 0.5}),
        Row(2, "non_participants", "global", 5, {"top1": 0.6}),
    ]
    found = columns(rows, ["top1"])
    assert found["gap/generalisation/top1_mean"] == pytest.approx(0.6 - 0.7)
    assert found["gap/generalisation/top1_weighted"] == pytest.approx(0.6 - 0.6)
    assert "gap/local_start/top1_mean" not in found


QUIET = {
    "one": {}, "stacked": {"cohort": 3}, "dropout": {"between": (nn.Dropout(0.5),)},
    "dropout, stacked": {"between": (nn.Dropout(0.5),), "cohort": 3},
    "batchnorm": {"between": (nn.BatchNorm1d(16, dtype=torch.float64),)},
    "batchnorm, local": {"between": (nn.BatchNorm1d(16, dtype=torch.float64),), "buffers": "local"},
    "batchnorm, frozen": {"between": (nn.BatchNorm1d(16, dtype=torch.float64),), "buffers": "frozen"},
}  # fmt: skip


@pytest.mark.parametrize("options", QUIET.values(), ids=QUIET)
def test_training_does_not_notice(tmp_path, options):
    """Same bits of the network, same losses, same streams, same modes."""
    left = []
    for path in (None, tmp_path / "clients.csv"):
        torch.manual_seed(5)
        built = small(path, count=4, **options).fit(3, tmp_path)
        left.append((built, torch.get_rng_state(), [m.training for m in built.net.modules()]))
    (without, stream, modes), (with_it, *also) = left
    for name, value in without.net.state_dict().items():
        assert torch.equal(with_it.net.state_dict()[name], value), name
    assert torch.equal(also[0], stream)
    assert also[1] == modes
    assert with_it.rounds.loss == without.rounds.loss
    assert len(lines(tmp_path / "clients.csv")) > 30


def test_a_stacked_cohort_finds_what_single_clients_find(tmp_path):
    found = []
    for cohort in (1, 2, 4):
        small(tmp_path / str(cohort), cohort=cohort, count=4).fit(3, tmp_path)
        found.append(lines(tmp_path / str(cohort)))
    for other in found[1:]:
        for row, same in zip(other, found[0], strict=True):
            assert [row[key] for key in ("round", "client", "group", "model", "n")] == list(same.values())[:5]
            assert [float(row[m]) for m in METRICS] == pytest.approx([float(same[m]) for m in METRICS], abs=1e-6)


def test_a_batchnorm_client_is_judged_with_its_own_statistics(tmp_path):
    """The local model of the only participant is the new global model, statistics included, if its update is all."""
    batchnorm = nn.BatchNorm1d(16, dtype=torch.float64)
    small(tmp_path / "clients.csv", between=(batchnorm,), count=1, who=("participants",)).fit(4, tmp_path)
    rows = [[float(row[m]) for m in METRICS] for row in lines(tmp_path / "clients.csv")]
    starts, locals_, globals_ = rows[::3], rows[1::3], rows[2::3]
    assert len(locals_) >= 3
    for start, own, new in zip(starts, locals_, globals_, strict=True):
        assert own == pytest.approx(new, abs=1e-6)
        assert own[0] != start[0]


@pytest.mark.parametrize("cohort", [1, 2])
def test_what_never_leaves_a_client_is_its_own_where_it_trains(tmp_path, cohort):
    """If nothing is sent, a client starts where it stopped, and the global model stays."""
    space = ParamSpace.of(net(), local="*")
    small(tmp_path / "clients.csv", count=4, cohort=cohort, space=space).fit(4, tmp_path)
    kept, globals_, rows = {}, {}, lines(tmp_path / "clients.csv")
    for row in rows:
        figures, client = [row[m] for m in METRICS], row["client"]
        if row["model"] == "start" and row["group"] == "participants":
            assert figures == kept.get(client, figures)
        elif row["model"] == "local":
            kept[client] = figures
        else:
            assert figures == globals_.setdefault(client, figures)
    assert len(rows) > 40


def test_every_round_that_is_due_and_the_last(tmp_path):
    built = small(tmp_path / "clients.csv", every=3)
    built.fit(5, tmp_path)
    assert {int(row["round"]) for row in lines(tmp_path / "clients.csv")} == {3, 5}


def test_a_round_that_is_not_due_has_no_figures(tmp_path):
    built, seen = small(tmp_path / "clients.csv", every=2), []
    built.personal.on_train_epoch_end = lambda *_: seen.append(bool(built.personal.figures))
    built.fit(3, tmp_path)
    assert seen == [False, True, True]


@pytest.mark.parametrize("group", ["participants", "non_participants"])
def test_who_may_be_one_group_alone(tmp_path, group):
    built = small(tmp_path / "clients.csv", who=(group,), count=4, metrics=("top1",))
    built.fit(2, tmp_path)
    rows = lines(tmp_path / "clients.csv")
    assert {row["group"] for row in rows} == {group}
    assert list(rows[0]) == ["round", "client", "group", "model", "n", "top1"]
    assert not [name for name in built.personal.figures if name.startswith("gap/generalisation")]


def test_a_fraction_of_the_others_is_drawn_by_seed_and_round(tmp_path):
    drawn = []
    for name in "ab":
        small(tmp_path / name, fraction=0.5, count=2, who=("non_participants",)).fit(6, tmp_path)
        drawn.append([{int(r["client"]) for r in lines(tmp_path / name) if int(r["round"]) == k} for k in range(1, 7)])
    assert drawn[0] == drawn[1]
    assert {len(clients) for clients in drawn[0]} <= {2, 3}  # of 4 or 5 that have a test part
    assert len({frozenset(clients) for clients in drawn[0]}) > 1


def test_if_everyone_takes_part_there_is_no_generalisation_gap(tmp_path):
    built = small(tmp_path / "clients.csv", count=7)
    built.fit(1, tmp_path)
    assert {name.split("/")[0] for name in built.personal.figures} == {"participants", "gap"}
    assert {name.split("/")[1] for name in built.personal.figures if name[0] == "g"} == {"local_start", "local_global"}


def test_a_local_model_that_is_not_finite_is_left_out(tmp_path):
    built = small(tmp_path / "clients.csv", count=4)
    built.dataset.train.x[built.parts[6]] = torch.nan
    built.fit(4, tmp_path)
    rounds = {drop.round + 1 for drop in built.federation.dropped}
    assert rounds
    rows = [row for row in lines(tmp_path / "clients.csv") if row["client"] == "6" and int(row["round"]) in rounds]
    assert {row["model"] for row in rows} == {"start", "global"}
    assert all(np.isfinite(value) for value in built.personal.figures.values())


def test_two_processes_find_what_one_finds(tmp_path):
    def work():
        place = {"processes": parallel.processes(), "process": parallel.process()}
        built = small(tmp_path / f"of{parallel.process()}", count=4, **place)
        fit(built, 3, tmp_path / str(parallel.process()))
        return built.personal.figures

    both = in_processes(work, 2, tmp_path)
    single = small(tmp_path / "one", count=4)
    single.fit(3, tmp_path)
    for process, figures in enumerate(both):
        assert figures == pytest.approx(single.personal.figures, abs=1e-6)
        for row, same in zip(lines(tmp_path / f"of{process}"), lines(tmp_path / "one"), strict=True):
            assert list(row.values())[:5] == list(same.values())[:5]
            assert [float(row[m]) for m in METRICS] == pytest.approx([float(same[m]) for m in METRICS], abs=1e-6)


def test_a_run_with_it_trains_to_the_same_bits_and_writes_it_down(run_in, capsys):
    off, bare = run_in("off", "pictures=false")
    on, folder = run_in("on", *ON)
    assert on["global_sha256"] == off["global_sha256"]
    assert not (bare / "clients.csv").exists()
    assert not [name for name in off if name.startswith(("participants/", "gap/"))]
    last, rows = read_rows(folder / "metrics.csv")[-1], lines(folder / "clients.csv")
    mean = np.mean(
        [float(r["top1"]) for r in rows if (r["round"], r["group"], r["model"]) == ("3", "participants", "local")]
    )
    assert last["participants/local/top1_mean"] == pytest.approx(mean, abs=1e-6)
    assert on["participants/local/top1_mean"] == last["participants/local/top1_mean"]
    assert "generalisation gap" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["federation.eval_every=2", "evaluation.fraction=0.5"]])
def test_a_resume_keeps_the_table_whole(tmp_path, monkeypatch, options):
    """A kill after a round's rows are in clients.csv, before the checkpoint is."""
    few = ["model=mlp", "logger=csv", "pictures=false", "calibration.head_steps=4"]
    few += ["federation.rounds=4", *ON, *options]
    run([*few, f"hydra.run.dir={tmp_path / 'whole'}"])
    save = AtomicCheckpointIO.save_checkpoint

    def killed(self, state, path, *rest, **more):
        if state["epoch"] == 1:
            raise KeyboardInterrupt
        save(self, state, path, *rest, **more)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run([*few, f"hydra.run.dir={tmp_path / 'killed'}"])
    monkeypatch.undo()
    assert {row["round"] for row in lines(tmp_path / "killed" / "clients.csv")} >= {"2"}
    with (tmp_path / "killed" / "clients.csv").open("a") as file:
        file.write("2,7,partic")  # and a line that the kill tore
    run([f"resume={tmp_path / 'killed'}"])
    whole, resumed = (tmp_path / name for name in ("whole", "killed"))
    assert (resumed / "clients.csv").read_text() == (whole / "clients.csv").read_text()
    for row, same in zip(*(read_rows(folder / "metrics.csv") for folder in (resumed, whole)), strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in same.items() if k != "seconds"}


@pytest.mark.slow
def test_a_run_in_two_processes_writes_the_same_table(run_in):
    options = [*ON, "trainer.accelerator=cpu", "federation.cohort=1", "evaluation.fraction=0.5"]
    (one, alone), (two, both) = (run_in(f"of{n}", *options, f"trainer.devices={n}") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    for row, same in zip(*(lines(folder / "clients.csv") for folder in (both, alone)), strict=True):
        assert list(row.values())[:5] == list(same.values())[:5]
        assert [float(row[m]) for m in METRICS] == pytest.approx([float(same[m]) for m in METRICS], abs=1e-5)
    for name in [name for name in one if name.startswith(("participants/", "non_participants/", "gap/"))]:
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
