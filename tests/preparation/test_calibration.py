"""What happens before the first round, against plain loops and bytes counted by hand."""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from omegaconf import OmegaConf
from sklearn.linear_model import Ridge
from small import Small, small_data, small_net, uneven_parts

from fedsparse.federation.diverged import Diverged
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.job.shipped import conf_dir
from fedsparse.masks import Sparsity
from fedsparse.masks.bitmaps import masks_of
from fedsparse.masks.rules import Fisher, Random, Talos
from fedsparse.preparation.cache import Cache, fingerprint, source_of
from fedsparse.preparation.calibration import (
    Calibration,
    CalibrationJob,
    _rounds,
    calibrate,
    calibrate_clients,
    observe,
)
from fedsparse.preparation.head import Head, prepare_head, probe
from fedsparse.preparation.preparation import Preparation

HEAD = "3.*"
SAMPLED = {0: [3, 5], 1: [6, 3]}  # by round: three different clients


@pytest.fixture
def preparation():
    """Batches of whole shards, so that the order in which they are dealt does not matter."""
    small = Small(small_net(), small_data(), uneven_parts())
    return Preparation(
        net=small.net, space=small.space, dataset=small.dataset, parts=small.parts,
        sample=lambda round, purpose: SAMPLED[round], losses=small.module.losses, batch_size=1000, seed=0,
        ledger=Ledger(), model_length=777,
    )  # fmt: skip


def job(rule, **calibration):
    return CalibrationJob(rule, Sparsity(0.6, always_train=HEAD), Calibration(**calibration), HEAD)


def test_defaults_are_those_of_the_command_line():
    stored = OmegaConf.to_container(OmegaConf.load(conf_dir() / "train.yaml").calibration)
    assert asdict(Calibration(cache=stored["cache"])) == stored


def samples(preparation, round):
    index = torch.cat([torch.from_numpy(preparation.parts[client]) for client in SAMPLED[round]])
    return preparation.dataset.train.x[index], preparation.dataset.train.y[index]


def test_head_steps_are_sgd_on_the_union_of_the_sampled_shards(preparation):
    plain = copy.deepcopy(preparation.net)
    sgd = torch.optim.SGD(plain[3].parameters(), lr=0.3)
    for round in (0, 1):
        x, y = samples(preparation, round)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        sgd.step()
    before = preparation.space.read(preparation.net)
    probe(preparation, HEAD, steps=2, lr=0.3)
    after, head = preparation.space.read(preparation.net), preparation.space.where(HEAD)
    torch.testing.assert_close(after, preparation.space.read(plain), rtol=0, atol=1e-12)
    assert torch.equal(after[~head], before[~head])
    assert not torch.equal(after[head], before[head])


def test_bytes_of_the_head_steps_by_hand(preparation):
    probe(preparation, HEAD, steps=2, lr=0.3)
    message = HEADER.size + 8 * (16 * 3 + 3)  # float64
    assert preparation.ledger.bytes_setup_up == 2 * 2 * message
    assert preparation.ledger.bytes_setup_down == 2 * 2 * message + 3 * 777  # three clients got the first model
    assert preparation.ledger.bytes_up == preparation.ledger.bytes_down == 0


def plain_fisher(preparation, x, y):
    """Sum of squared gradients, one sample at a time."""
    total = torch.zeros(preparation.space.size, dtype=torch.float64)
    for i in range(len(y)):
        loss = torch.nn.functional.cross_entropy(preparation.net(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(preparation.net.parameters()))
        total += torch.cat([g.flatten() for g in gradients]) ** 2
    return total


def test_scores_are_summed_over_clients_and_calibration_rounds(preparation):
    expected = sum(plain_fisher(preparation, *samples(preparation, round)) for round in (0, 1))
    got = observe(preparation, job(Fisher(largest=False), rounds=2))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert preparation.ledger.bytes_setup_up == 4 * (
        HEADER.size + 8 * preparation.space.size
    )  # in the net's own float64


def test_a_calibration_round_adds_to_the_sum_of_the_last_one_in_place(preparation):
    """A second row in float64 is twice the model's size."""
    first, second = _rounds(preparation, job(Fisher(largest=False), rounds=2))
    assert first is second
    assert first.dtype == torch.float64


def test_the_server_scores_on_its_validation_split_and_sends_nothing(preparation):
    split = preparation.dataset.val
    got = observe(preparation, job(Fisher(largest=False), where="server"))
    torch.testing.assert_close(got, plain_fisher(preparation, split.x, split.y), rtol=1e-9, atol=1e-12)
    assert preparation.ledger.bytes_total == 0


def test_a_rule_without_data_costs_nothing(preparation):
    assert observe(preparation, job(Random())) is None
    assert preparation.ledger.bytes_total == 0


# --- the head in closed form


def test_the_closed_form_head_is_ridge_regression_on_everybodys_features_whoever_holds_what(preparation):
    split = preparation.dataset.train
    with torch.no_grad():
        features = preparation.net[:3](split.x)  # what the head is given
    oracle = Ridge(alpha=2.5).fit(features.numpy(), torch.eye(3)[split.y].double().numpy())
    prepare_head(preparation, Head("closed_form", ridge=2.5), HEAD, steps=0, lr=0.1)
    weight, bias = preparation.net[3].weight.detach(), preparation.net[3].bias.detach()
    heat = float(torch.from_numpy(oracle.coef_).flatten()[0] / weight.flatten()[0])
    assert 0 < heat < 1  # ridge aims at 0 and 1: as logits far too flat
    torch.testing.assert_close(weight * heat, torch.from_numpy(oracle.coef_), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias * heat, torch.from_numpy(oracle.intercept_), rtol=1e-9, atol=1e-12)


def test_its_temperature_has_the_smallest_cross_entropy_on_validation(preparation):
    prepare_head(preparation, Head("closed_form", ridge=1.0), HEAD, steps=0, lr=0.1)
    split = preparation.dataset.val
    with torch.no_grad():
        logits = preparation.net(split.x)
    heats = [0.8, 0.95, 1.0, 1.05, 1.25]
    losses = [float(torch.nn.functional.cross_entropy(logits / heat, split.y)) for heat in heats]
    assert losses.index(min(losses)) == 2


def test_bytes_of_the_closed_form_by_hand(preparation):
    prepare_head(preparation, Head("closed_form"), HEAD, steps=0, lr=0.1)
    d, c, clients = 16, 3, sum(len(part) > 0 for part in preparation.parts)
    up = HEADER.size + 8 * (1 + d + c + d * (d + 1) // 2 + d * c)
    assert preparation.ledger.bytes_setup_up == clients * up
    assert preparation.ledger.bytes_setup_down == clients * (777 + HEADER.size + 8 * (d * c + c))


def test_a_random_head_stays_as_built_and_costs_nothing(preparation):
    before = preparation.space.read(preparation.net)
    prepare_head(preparation, Head("random"), HEAD, steps=5, lr=0.1)
    assert torch.equal(preparation.space.read(preparation.net), before)
    assert preparation.ledger.bytes_total == 0


@pytest.mark.parametrize("options", [{"init": "warm"}, {"ridge": -1.0}, {"ridge": float("nan")}, {"frozen": "yes"}])
def test_a_head_that_cannot_be_meant_is_refused(options):
    (key,) = options
    with pytest.raises(ValueError, match=f"head.{key} is"):
        Head(**options)


# --- masks of each client


def test_each_client_calibrates_on_its_own_shard_alone(preparation):
    found = calibrate_clients(preparation, job(Fisher(largest=True), batches=1000))
    head, union = preparation.space.where(HEAD), torch.zeros(preparation.space.size, dtype=torch.bool)
    for client, mask in enumerate(masks_of(found.bitmaps, preparation.space)):
        part = torch.from_numpy(preparation.parts[client])
        scores = plain_fisher(preparation, preparation.dataset.train.x[part], preparation.dataset.train.y[part])
        body = (~head).nonzero().squeeze(1)
        k = math.floor(0.4 * len(body) + 0.5)
        best = body[scores[body].argsort(descending=True)[:k]]
        expected = head.clone()
        expected[best] = True
        assert torch.equal(mask.row(preparation.space), expected)
        union |= expected
    assert torch.equal(found.mask.row(preparation.space), union)


def test_bytes_of_the_clients_bitmaps_by_hand(preparation):
    calibrate_clients(preparation, job(Random()))
    clients, bitmap = len(preparation.parts), HEADER.size + math.ceil(preparation.space.size / 8)
    assert preparation.ledger.bytes_setup_up == clients * bitmap
    assert preparation.ledger.bytes_setup_down == clients * (777 + bitmap)


def test_random_clients_differ_and_own_masks_need_clients_data(preparation):
    masks = masks_of(calibrate_clients(preparation, job(Random())).bitmaps, preparation.space)
    assert masks[0].overlap(masks[1]) < 0.9
    with pytest.raises(ValueError, match=r"calibration.where=clients"):
        calibrate_clients(preparation, job(Random(), where="server"))


def test_the_masks_of_earlier_calibration_rounds_are_compared_with_the_last(preparation):
    found = calibrate(preparation, job(Fisher(largest=False), rounds=2))
    first = calibrate(preparation, job(Fisher(largest=False), rounds=1)).mask
    a, b = (set(mask.row(preparation.space).nonzero().flatten().tolist()) for mask in (first, found.mask))
    assert found.overlap == (pytest.approx(len(a & b) / len(a | b)),)
    assert 0 < found.overlap[0] < 1


# --- the cache of masks


def test_a_kept_mask_is_used_again_with_the_bytes_of_its_calibration(preparation, tmp_path):
    first = Cache(tmp_path).calibrated(
        preparation, {"a": 1}, lambda: calibrate(preparation, job(Fisher(largest=False), rounds=2))
    )
    counted = preparation.ledger.state_dict()
    fresh = replace(preparation, ledger=Ledger())
    second = Cache(tmp_path).calibrated(fresh, {"a": 1}, lambda: pytest.fail("calibrated again"))
    assert first.mask.to_bytes() == second.mask.to_bytes()
    assert (second.mask.metadata, second.overlap) == (first.mask.metadata, first.overlap)
    assert fresh.ledger.state_dict() == counted


def test_the_folder_of_kept_masks_is_made_with_those_above_it(preparation, tmp_path):
    folder = tmp_path / "not" / "there"
    for number in (1, 2):  # at the second it is there
        Cache(folder).calibrated(preparation, {"number": number}, lambda: calibrate(preparation, job(Random())))
    assert len(list(folder.iterdir())) == 2


def test_what_a_killed_job_left_there_is_removed_once_it_is_an_hour_old(preparation, tmp_path):
    for name, age in (("old.part", 3660), ("new.part", 3540)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Cache(tmp_path).calibrated(preparation, {}, lambda: calibrate(preparation, job(Random())))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == ["new.part"]


def test_own_masks_are_kept_too_and_a_damaged_file_is_made_again(preparation, tmp_path):
    def make():
        return calibrate_clients(preparation, job(Random()))

    first = Cache(tmp_path).calibrated(preparation, {}, make)
    fresh = replace(preparation, ledger=Ledger())
    assert torch.equal(Cache(tmp_path).calibrated(fresh, {}, pytest.fail).bitmaps, first.bitmaps)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"torn")
    again = Cache(tmp_path).calibrated(replace(preparation, ledger=Ledger()), {}, make)
    assert torch.equal(again.bitmaps, first.bitmaps)


def test_whatever_calibration_reads_is_in_the_fingerprint(preparation):
    def other_start():
        net = copy.deepcopy(preparation.net)
        with torch.no_grad():
            net[1].weight[0, 0] += 1e-9
        return replace(preparation, net=net)

    def other_data():
        data = preparation.dataset
        y = data.train.y.clone()
        y[0] = (y[0] + 1) % 3
        return replace(preparation, dataset=replace(data, train=replace(data.train, y=y)))

    plain = fingerprint(preparation, {"rule": "a"})
    assert fingerprint(preparation, {"rule": "a"}) == plain
    changed = [
        fingerprint(preparation, {"rule": "b"}),
        fingerprint(replace(preparation, seed=1), {"rule": "a"}),
        fingerprint(replace(preparation, batch_size=7), {"rule": "a"}),
        fingerprint(replace(preparation, parts=preparation.parts[::-1]), {"rule": "a"}),
        fingerprint(other_start(), {"rule": "a"}),
        fingerprint(other_data(), {"rule": "a"}),
    ]
    assert len({plain, *changed}) == 7


def test_a_kept_head_is_the_head_that_was_made(preparation, tmp_path):
    start = copy.deepcopy(preparation.net)
    Cache(tmp_path).head(preparation, {}, HEAD, lambda: probe(preparation, HEAD, steps=2, lr=0.3))
    fresh = replace(preparation, net=start, ledger=Ledger())
    Cache(tmp_path).head(fresh, {}, HEAD, lambda: pytest.fail("made again"))
    assert torch.equal(fresh.space.read(start), preparation.space.read(preparation.net))
    assert fresh.ledger.state_dict() == preparation.ledger.state_dict()


def test_a_clients_own_losses_are_in_the_fingerprint_by_the_file_that_defines_them(preparation, tmp_path, monkeypatch):
    def client_of(text):
        (tmp_path / "own_client.py").write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop("own_client", None)
        return importlib.import_module("own_client").Client()

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "class Client:\n    def losses(self, forward, x, y):\n        return forward(x).sum(1)"
    first, again, other = (client_of(t).losses for t in (text, text, text + " * 2\n"))
    assert fingerprint(replace(preparation, losses=first), {}) != fingerprint(preparation, {})
    (tmp_path / "own_client.py").write_text(text)
    same = fingerprint(replace(preparation, losses=again), {})
    assert fingerprint(replace(preparation, losses=first), {}) == same
    (tmp_path / "own_client.py").write_text(text + " * 2\n")
    assert fingerprint(replace(preparation, losses=other), {}) != same


def test_what_has_no_source_is_never_found_again():
    made = type("Made", (), {"__module__": "nowhere"})()
    assert source_of(made) != source_of(made)
    assert source_of(Random()) == source_of(Random())


# --- one client whose numbers overflow


def spoilt(preparation, client, value=float("inf")):
    """The client's data is such that its loss, and all that is measured on it, is not finite."""
    preparation.dataset.train.x[preparation.parts[client]] = value
    return preparation


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fedsparse"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_client_whose_head_gradient_is_not_finite_is_left_out_and_named(preparation, caplog, value):
    plain = copy.deepcopy(preparation.net)
    sgd = torch.optim.SGD(plain[3].parameters(), lr=0.3)
    for round in (0, 1):
        (client,) = (c for c in SAMPLED[round] if c != 3)
        index = torch.from_numpy(preparation.parts[client])
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(
            plain(preparation.dataset.train.x[index]), preparation.dataset.train.y[index]
        ).backward()
        sgd.step()
    probe(spoilt(preparation, 3, value), HEAD, steps=2, lr=0.3)
    torch.testing.assert_close(
        preparation.space.read(preparation.net), preparation.space.read(plain), rtol=0, atol=1e-12
    )
    assert lines(caplog) == ["head: client 3 is left out: NaN or infinity in loss or gradient"]


def test_if_every_head_gradient_is_lost_the_line_names_the_heads_own_keys(preparation):
    for client in (3, 5):
        spoilt(preparation, client, float("nan"))
    before = preparation.space.read(preparation.net)
    with pytest.raises(Diverged, match="head step 1: .* every client .* smaller calibration.head_lr, or head.init=cl"):
        probe(preparation, HEAD, steps=2, lr=0.3)
    assert torch.equal(preparation.space.read(preparation.net), before)


def test_a_head_that_overflows_in_its_last_step_is_not_handed_on(preparation):
    with pytest.raises(Diverged, match="^the head became NaN or infinite, .* smaller calibration.head_lr"):
        probe(preparation, HEAD, steps=1, lr=1e309)


def test_a_client_whose_features_are_not_finite_is_left_out_of_the_closed_form_and_named(preparation, caplog):
    rest = replace(
        preparation,
        parts=[part for client, part in enumerate(preparation.parts) if client != 3],
        net=copy.deepcopy(preparation.net),
    )
    for given in (rest, spoilt(preparation, 3, float("nan"))):
        prepare_head(given, Head("closed_form", ridge=2.5), HEAD, 0, 0.1)
    got, wanted = (given.space.read(given.net) for given in (preparation, rest))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    assert lines(caplog) == ["head: client 3 is left out: NaN or infinity in the features"]
    for client in range(7):
        spoilt(preparation, client, float("nan"))
    with pytest.raises(Diverged, match="the features of every client are NaN"):
        prepare_head(preparation, Head("closed_form"), HEAD, 0, 0.1)


def test_a_client_whose_scores_are_not_finite_is_left_out_and_named(preparation, caplog):
    index = [torch.from_numpy(preparation.parts[client]) for client in (5, 6)]
    x, y = (torch.cat([part[i] for i in index]) for part in (preparation.dataset.train.x, preparation.dataset.train.y))
    expected = plain_fisher(preparation, x, y)
    got = observe(spoilt(preparation, 3, float("nan")), job(Fisher(largest=False), rounds=2))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert lines(caplog) == ["calibration: client 3 is left out: NaN or infinity in what is observed"] * 2
    for client in (5, 6):
        spoilt(preparation, client, float("nan"))
    with pytest.raises(Diverged, match="calibration: what is observed is NaN or infinite everywhere"):
        observe(preparation, job(Fisher(largest=False), rounds=1))


def test_a_client_lost_in_a_later_round_of_thinning_leaves_the_network_as_it_was(preparation):
    """What the others score is the network, not the one that this client's round has shrunk."""
    clean, before = calibrate_clients(preparation, job(Talos(), rounds=2)), preparation.space.read(preparation.net)

    class Late(Talos):
        """Not finite for the third client in its second round, of two for each client; a shard is one batch."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def observe(self, net, space, x, y, *, into, **options):
            self.calls += 1
            found = super().observe(net, space, x, y, into=into, **options)
            return into.fill_(float("nan")) if self.calls == 6 else found

    found = calibrate_clients(preparation, job(Late(), rounds=2))
    assert torch.equal(preparation.space.read(preparation.net), before)
    assert not found.bitmaps[2].any()
    others = [client for client in range(7) if client != 2]
    assert torch.equal(found.bitmaps[others], clean.bitmaps[others])


def test_a_client_whose_own_scores_are_not_finite_trains_nothing_and_is_named(preparation, caplog):
    clean = calibrate_clients(preparation, job(Fisher(largest=False)))
    found = calibrate_clients(spoilt(preparation, 3, float("nan")), job(Fisher(largest=False)))
    assert not found.bitmaps[3].any()
    others = [client for client in range(7) if client != 3]
    assert torch.equal(found.bitmaps[others], clean.bitmaps[others])
    assert lines(caplog) == ["calibration: client 3 is left out: NaN or infinity in what is observed"]
