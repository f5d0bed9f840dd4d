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

from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.federation.reports import Diverged
from fedsparse.job.shipped import conf_dir
from fedsparse.masks import Sparsity
from fedsparse.masks.bitmaps import masks_of
from fedsparse.masks.rules import Fisher, Random
from fedsparse.preparation.cache import Cache, fingerprint, source_of
from fedsparse.preparation.calibration import Calibration, Work, calibrate, calibrate_clients, observe
from fedsparse.preparation.head import Head, prepare_head, probe
from fedsparse.preparation.setting import Setting

HEAD = "3.*"
SAMPLED = {0: [3, 5], 1: [6, 3]}  # by round: three different clients


@pytest.fixture
def setting():
    """Batches of whole shards, so that the order in which they are dealt does not matter."""
    small = Small(small_net(), small_data(), uneven_parts())
    return Setting(
        net=small.net, space=small.space, dataset=small.dataset, parts=small.parts,
        sample=lambda round, purpose: SAMPLED[round], losses=small.module.losses, batch_size=1000, seed=0,
        ledger=Ledger(), model_length=777,
    )  # fmt: skip


def work(rule, **calibration):
    return Work(rule, Sparsity(0.6, always_train=HEAD), Calibration(**calibration), HEAD)


def test_defaults_are_those_of_the_command_line():
    stored = OmegaConf.to_container(OmegaConf.load(conf_dir() / "calibration/default.yaml"))
    assert asdict(Calibration(cache=stored["cache"])) == stored


def samples(setting, round):
    index = torch.cat([torch.from_numpy(setting.parts[client]) for client in SAMPLED[round]])
    return setting.dataset.train.x[index], setting.dataset.train.y[index]


def test_head_steps_are_sgd_on_the_union_of_the_sampled_shards(setting):
    plain = copy.deepcopy(setting.net)
    sgd = torch.optim.SGD(plain[3].parameters(), lr=0.3)
    for round in (0, 1):
        x, y = samples(setting, round)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        sgd.step()
    before = setting.space.read(setting.net)
    probe(setting, HEAD, steps=2, lr=0.3)
    after, head = setting.space.read(setting.net), setting.space.where(HEAD)
    torch.testing.assert_close(after, setting.space.read(plain), rtol=0, atol=1e-12)
    assert torch.equal(after[~head], before[~head])
    assert not torch.equal(after[head], before[head])


def test_bytes_of_the_head_steps_by_hand(setting):
    probe(setting, HEAD, steps=2, lr=0.3)
    message = HEADER.size + 8 * (16 * 3 + 3)  # float64
    assert setting.ledger.bytes_setup_up == 2 * 2 * message
    assert setting.ledger.bytes_setup_down == 2 * 2 * message + 3 * 777  # three clients got the first model
    assert setting.ledger.bytes_up == setting.ledger.bytes_down == 0


def plain_fisher(setting, x, y):
    """Sum of squared gradients, one sample at a time."""
    total = torch.zeros(setting.space.size, dtype=torch.float64)
    for i in range(len(y)):
        loss = torch.nn.functional.cross_entropy(setting.net(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(setting.net.parameters()))
        total += torch.cat([g.flatten() for g in gradients]) ** 2
    return total


def test_scores_are_summed_over_clients_and_calibration_rounds(setting):
    expected = sum(plain_fisher(setting, *samples(setting, round)) for round in (0, 1))
    got = observe(setting, work(Fisher(largest=False), rounds=2))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert setting.ledger.bytes_setup_up == 4 * (HEADER.size + 8 * setting.space.size)  # in the net's own float64


def test_the_server_scores_on_its_validation_split_and_sends_nothing(setting):
    split = setting.dataset.val
    got = observe(setting, work(Fisher(largest=False), where="server"))
    torch.testing.assert_close(got, plain_fisher(setting, split.x, split.y), rtol=1e-9, atol=1e-12)
    assert setting.ledger.bytes_total == 0


def test_a_rule_without_data_costs_nothing(setting):
    assert observe(setting, work(Random())) is None
    assert setting.ledger.bytes_total == 0


# --- the head in closed form


def test_the_closed_form_head_is_ridge_regression_on_everybodys_features_whoever_holds_what(setting):
    split = setting.dataset.train
    with torch.no_grad():
        features = setting.net[:3](split.x)  # what the head is given
    oracle = Ridge(alpha=2.5).fit(features.numpy(), torch.eye(3)[split.y].double().numpy())
    prepare_head(setting, Head("closed_form", ridge=2.5), HEAD, steps=0, lr=0.1)
    weight, bias = setting.net[3].weight.detach(), setting.net[3].bias.detach()
    heat = float(torch.from_numpy(oracle.coef_).flatten()[0] / weight.flatten()[0])
    assert 0 < heat < 1  # ridge aims at 0 and 1: as logits far too flat
    torch.testing.assert_close(weight * heat, torch.from_numpy(oracle.coef_), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias * heat, torch.from_numpy(oracle.intercept_), rtol=1e-9, atol=1e-12)


def test_its_temperature_has_the_smallest_cross_entropy_on_validation(setting):
    prepare_head(setting, Head("closed_form", ridge=1.0), HEAD, steps=0, lr=0.1)
    split = setting.dataset.val
    with torch.no_grad():
        logits = setting.net(split.x)
    heats = [0.8, 0.95, 1.0, 1.05, 1.25]
    losses = [float(torch.nn.functional.cross_entropy(logits / heat, split.y)) for heat in heats]
    assert losses.index(min(losses)) == 2


def test_bytes_of_the_closed_form_by_hand(setting):
    prepare_head(setting, Head("closed_form"), HEAD, steps=0, lr=0.1)
    d, c, clients = 16, 3, sum(len(part) > 0 for part in setting.parts)
    up = HEADER.size + 8 * (1 + d + c + d * (d + 1) // 2 + d * c)
    assert setting.ledger.bytes_setup_up == clients * up
    assert setting.ledger.bytes_setup_down == clients * (777 + HEADER.size + 8 * (d * c + c))


def test_a_random_head_stays_as_built_and_costs_nothing(setting):
    before = setting.space.read(setting.net)
    prepare_head(setting, Head("random"), HEAD, steps=5, lr=0.1)
    assert torch.equal(setting.space.read(setting.net), before)
    assert setting.ledger.bytes_total == 0


@pytest.mark.parametrize("options", [{"init": "warm"}, {"ridge": -1.0}, {"ridge": float("nan")}, {"frozen": "yes"}])
def test_a_head_that_cannot_be_meant_is_refused(options):
    (key,) = options
    with pytest.raises(ValueError, match=f"head.{key} is"):
        Head(**options)


# --- masks of each client


def test_each_client_calibrates_on_its_own_shard_alone(setting):
    found = calibrate_clients(setting, work(Fisher(largest=True), batches=1000))
    head, union = setting.space.where(HEAD), torch.zeros(setting.space.size, dtype=torch.bool)
    for client, mask in enumerate(masks_of(found.bitmaps, setting.space)):
        part = torch.from_numpy(setting.parts[client])
        scores = plain_fisher(setting, setting.dataset.train.x[part], setting.dataset.train.y[part])
        body = (~head).nonzero().squeeze(1)
        k = math.floor(0.4 * len(body) + 0.5)
        best = body[scores[body].argsort(descending=True)[:k]]
        expected = head.clone()
        expected[best] = True
        assert torch.equal(mask.row(setting.space), expected)
        union |= expected
    assert torch.equal(found.mask.row(setting.space), union)


def test_bytes_of_the_clients_bitmaps_by_hand(setting):
    calibrate_clients(setting, work(Random()))
    clients, bitmap = len(setting.parts), HEADER.size + math.ceil(setting.space.size / 8)
    assert setting.ledger.bytes_setup_up == clients * bitmap
    assert setting.ledger.bytes_setup_down == clients * (777 + bitmap)


def test_random_clients_differ_and_own_masks_need_clients_data(setting):
    masks = masks_of(calibrate_clients(setting, work(Random())).bitmaps, setting.space)
    assert masks[0].overlap(masks[1]) < 0.9
    with pytest.raises(ValueError, match=r"calibration.where=clients"):
        calibrate_clients(setting, work(Random(), where="server"))


def test_the_masks_of_earlier_calibration_rounds_are_compared_with_the_last(setting):
    found = calibrate(setting, work(Fisher(largest=False), rounds=2))
    first = calibrate(setting, work(Fisher(largest=False), rounds=1)).mask
    a, b = (set(mask.row(setting.space).nonzero().flatten().tolist()) for mask in (first, found.mask))
    assert found.overlap == (pytest.approx(len(a & b) / len(a | b)),)
    assert 0 < found.overlap[0] < 1


# --- the cache of masks


def test_a_kept_mask_is_used_again_with_the_bytes_of_its_calibration(setting, tmp_path):
    first = Cache(tmp_path).calibrated(
        setting, {"a": 1}, lambda: calibrate(setting, work(Fisher(largest=False), rounds=2))
    )
    counted = setting.ledger.state_dict()
    fresh = replace(setting, ledger=Ledger())
    second = Cache(tmp_path).calibrated(fresh, {"a": 1}, lambda: pytest.fail("calibrated again"))
    assert first.mask.to_bytes() == second.mask.to_bytes()
    assert (second.mask.metadata, second.overlap) == (first.mask.metadata, first.overlap)
    assert fresh.ledger.state_dict() == counted


def test_the_folder_of_kept_masks_is_made_with_those_above_it(setting, tmp_path):
    folder = tmp_path / "not" / "there"
    for number in (1, 2):  # at the second it is there
        Cache(folder).calibrated(setting, {"number": number}, lambda: calibrate(setting, work(Random())))
    assert len(list(folder.iterdir())) == 2


def test_what_a_killed_job_left_there_is_removed_once_it_is_an_hour_old(setting, tmp_path):
    for name, age in (("old.part", 3660), ("new.part", 3540)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Cache(tmp_path).calibrated(setting, {}, lambda: calibrate(setting, work(Random())))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == ["new.part"]


def test_own_masks_are_kept_too_and_a_damaged_file_is_made_again(setting, tmp_path):
    def make():
        return calibrate_clients(setting, work(Random()))

    first = Cache(tmp_path).calibrated(setting, {}, make)
    fresh = replace(setting, ledger=Ledger())
    assert torch.equal(Cache(tmp_path).calibrated(fresh, {}, pytest.fail).bitmaps, first.bitmaps)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"torn")
    again = Cache(tmp_path).calibrated(replace(setting, ledger=Ledger()), {}, make)
    assert torch.equal(again.bitmaps, first.bitmaps)


def test_whatever_calibration_reads_is_in_the_fingerprint(setting):
    def other_start():
        net = copy.deepcopy(setting.net)
        with torch.no_grad():
            net[1].weight[0, 0] += 1e-9
        return replace(setting, net=net)

    def other_data():
        data = setting.dataset
        y = data.train.y.clone()
        y[0] = (y[0] + 1) % 3
        return replace(setting, dataset=replace(data, train=replace(data.train, y=y)))

    plain = fingerprint(setting, {"rule": "a"})
    assert fingerprint(setting, {"rule": "a"}) == plain
    changed = [
        fingerprint(setting, {"rule": "b"}),
        fingerprint(replace(setting, seed=1), {"rule": "a"}),
        fingerprint(replace(setting, batch_size=7), {"rule": "a"}),
        fingerprint(replace(setting, parts=setting.parts[::-1]), {"rule": "a"}),
        fingerprint(other_start(), {"rule": "a"}),
        fingerprint(other_data(), {"rule": "a"}),
    ]
    assert len({plain, *changed}) == 7


def test_a_kept_head_is_the_head_that_was_made(setting, tmp_path):
    start = copy.deepcopy(setting.net)
    Cache(tmp_path).head(setting, {}, HEAD, lambda: probe(setting, HEAD, steps=2, lr=0.3))
    fresh = replace(setting, net=start, ledger=Ledger())
    Cache(tmp_path).head(fresh, {}, HEAD, lambda: pytest.fail("made again"))
    assert torch.equal(fresh.space.read(start), setting.space.read(setting.net))
    assert fresh.ledger.state_dict() == setting.ledger.state_dict()


def test_a_clients_own_losses_are_in_the_fingerprint_by_the_file_that_defines_them(setting, tmp_path, monkeypatch):
    def client_of(text):
        (tmp_path / "own_client.py").write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop("own_client", None)
        return importlib.import_module("own_client").Client()

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "class Client:\n    def losses(self, forward, x, y):\n        return forward(x).sum(1)"
    first, again, other = (client_of(t).losses for t in (text, text, text + " * 2\n"))
    assert fingerprint(replace(setting, losses=first), {}) != fingerprint(setting, {})
    (tmp_path / "own_client.py").write_text(text)
    same = fingerprint(replace(setting, losses=again), {})
    assert fingerprint(replace(setting, losses=first), {}) == same
    (tmp_path / "own_client.py").write_text(text + " * 2\n")
    assert fingerprint(replace(setting, losses=other), {}) != same


def test_what_has_no_source_is_never_found_again():
    made = type("Made", (), {"__module__": "nowhere"})()
    assert source_of(made) != source_of(made)
    assert source_of(Random()) == source_of(Random())


# --- one client whose numbers overflow


def spoilt(setting, client, value=float("inf")):
    """The client's data is such that its loss, and all that is measured on it, is not finite."""
    setting.dataset.train.x[setting.parts[client]] = value
    return setting


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fedsparse"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_client_whose_head_gradient_is_not_finite_is_left_out_and_named(setting, caplog, value):
    plain = copy.deepcopy(setting.net)
    sgd = torch.optim.SGD(plain[3].parameters(), lr=0.3)
    for round in (0, 1):
        (client,) = (c for c in SAMPLED[round] if c != 3)
        index = torch.from_numpy(setting.parts[client])
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(
            plain(setting.dataset.train.x[index]), setting.dataset.train.y[index]
        ).backward()
        sgd.step()
    probe(spoilt(setting, 3, value), HEAD, steps=2, lr=0.3)
    torch.testing.assert_close(setting.space.read(setting.net), setting.space.read(plain), rtol=0, atol=1e-12)
    assert lines(caplog) == ["head: client 3 is left out: NaN or infinity in loss or gradient"]


def test_if_every_head_gradient_is_lost_the_line_names_the_heads_own_keys(setting):
    for client in (3, 5):
        spoilt(setting, client, float("nan"))
    before = setting.space.read(setting.net)
    with pytest.raises(Diverged, match="head step 1: .* every client .* smaller calibration.head_lr, or head.init=cl"):
        probe(setting, HEAD, steps=2, lr=0.3)
    assert torch.equal(setting.space.read(setting.net), before)


def test_a_head_that_overflows_in_its_last_step_is_not_handed_on(setting):
    with pytest.raises(Diverged, match="^the head became NaN or infinite, .* smaller calibration.head_lr"):
        probe(setting, HEAD, steps=1, lr=1e309)


def test_a_client_whose_features_are_not_finite_is_left_out_of_the_closed_form_and_named(setting, caplog):
    rest = replace(
        setting,
        parts=[part for client, part in enumerate(setting.parts) if client != 3],
        net=copy.deepcopy(setting.net),
    )
    for given in (rest, spoilt(setting, 3, float("nan"))):
        prepare_head(given, Head("closed_form", ridge=2.5), HEAD, 0, 0.1)
    got, wanted = (given.space.read(given.net) for given in (setting, rest))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    assert lines(caplog) == ["head: client 3 is left out: NaN or infinity in the features"]
    for client in range(7):
        spoilt(setting, client, float("nan"))
    with pytest.raises(Diverged, match="the features of every client are NaN"):
        prepare_head(setting, Head("closed_form"), HEAD, 0, 0.1)


def test_a_client_whose_scores_are_not_finite_is_left_out_and_named(setting, caplog):
    index = [torch.from_numpy(setting.parts[client]) for client in (5, 6)]
    x, y = (torch.cat([part[i] for i in index]) for part in (setting.dataset.train.x, setting.dataset.train.y))
    expected = plain_fisher(setting, x, y)
    got = observe(spoilt(setting, 3, float("nan")), work(Fisher(largest=False), rounds=2))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert lines(caplog) == ["calibration: client 3 is left out: NaN or infinity in what is observed"] * 2
    for client in (5, 6):
        spoilt(setting, client, float("nan"))
    with pytest.raises(Diverged, match="calibration: what is observed is NaN or infinite everywhere"):
        observe(setting, work(Fisher(largest=False), rounds=1))


def test_a_client_whose_own_scores_are_not_finite_trains_nothing_and_is_named(setting, caplog):
    clean = calibrate_clients(setting, work(Fisher(largest=False)))
    found = calibrate_clients(spoilt(setting, 3, float("nan")), work(Fisher(largest=False)))
    assert not found.bitmaps[3].any()
    others = [client for client in range(7) if client != 3]
    assert torch.equal(found.bitmaps[others], clean.bitmaps[others])
    assert lines(caplog) == ["calibration: client 3 is left out: NaN or infinity in what is observed"]
