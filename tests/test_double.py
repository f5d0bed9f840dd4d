"""Double precision: what the machinery does is then a plain loop in float64, to the last digits."""

from __future__ import annotations

import pytest
import torch
from plain import plain_fedavg, replay
from safetensors.torch import load_file

from fedsparse import run, weights
from fedsparse.core.folder import LAST
from fedsparse.federation.exchange.wire.message import HEADER
from fedsparse.job.assemble import assemble
from fedsparse.job.resume import read_job
from fedsparse.masks import Mask

DOUBLE = ["trainer.precision=64-true", "trainer.accelerator=cpu", "pictures=false", "calibration.cache=null"]
SMALL = ["federation.num_clients=5", "federation.clients_per_round=3", "federation.local_steps=3", "data.batch_size=8"]


@pytest.mark.parametrize("options", [[], ["federation.cohort=3"], ["mask_rule=random", "exchange=full"]], ids=str)
def test_a_run_is_a_plain_loop_in_float64(run_in, options):
    _, folder = run_in(
        "run", *DOUBLE, *SMALL, "mask_rule=dense", "head.init=random", "optimizer.momentum=0.9", *options
    )
    cfg = read_job(folder, []).cfg
    assembly = assemble(cfg)
    problem = assembly.problem
    masks = Mask.load(folder / "mask.safetensors").tensors
    data, start = problem.dataset.train, {name: p.clone() for name, p in problem.net.named_parameters()}
    x, dealt = data.x.double(), replay(assembly.course.plan, 3)
    options = {"lr": cfg.optimizer.lr, "weight_decay": cfg.optimizer.weight_decay, "clip": cfg.optimizer.clip_norm}
    expected, _ = plain_fedavg(problem.net, x, data.y, dealt, momentum=0.9, masks=masks, **options)
    found = load_file(folder / "model.safetensors")
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-12)
        assert not torch.equal(found[name], found[name].float().double())  # no digit was lost on the way
        assert torch.equal(start[name], start[name].float().double())  # it starts where the float32 run starts


def test_every_value_counts_eight_bytes_also_in_the_preparation(run_in):
    options = [*SMALL, "mask_rule=least_sensitive", "pictures=false", "calibration.cache=null"]
    double, _ = run_in("double", *DOUBLE, *options)
    single, _ = run_in("single", *options)
    assert double["bytes_dense"] == 9 * (HEADER.size + 8 * 4810)  # three clients in each of three rounds
    for key, messages in (("bytes_up", 9), ("bytes_setup_up", 4 * 3 + 3)):  # four head steps and a calibration
        assert double[key] - messages * HEADER.size == 2 * (single[key] - messages * HEADER.size)
    assert abs(double["test/loss"] - single["test/loss"]) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        ["exchange=topk", "aggregation=coordinate_mean", "exchange.precision=float16"],
        ["objective=scaffold", "federation.store=file", "server=fedadam", "federation.cohort=3"],
    ],
    ids=["topk", "scaffold"],
)
def test_it_goes_on_to_the_same_bits(run_in, options):
    options = [*DOUBLE, *SMALL, "mask_rule=random", *options]
    whole, folder = run_in("whole", *options, "federation.rounds=4")
    _, short = run_in("short", *options, "federation.rounds=2")
    state = weights(short)
    stored = torch.load(short / "checkpoints" / LAST, weights_only=True)["left_out"]["values"]
    assert stored.dtype == torch.float64
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float64}
    again = run([f"resume={short}", "federation.rounds=4"])
    assert again["global_sha256"] == whole["global_sha256"]
    first, second = (load_file(f / "model.safetensors") for f in (folder, short))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {t.dtype for t in first.values()} == {torch.float64}


def test_a_wire_of_doubles_loses_nothing(run_in):
    """Values that are sent as they are, one by one, give what changes in place give."""
    options = [*DOUBLE, *SMALL, "mask_rule=random", "federation.cohort=1"]
    plain, _ = run_in("plain", *options)
    sent, _ = run_in("sent", *options, "exchange=topk", "exchange.fraction=1.0", "aggregation=coordinate_mean")
    assert sent["test/loss"] == pytest.approx(plain["test/loss"], abs=1e-12)


def test_each_clients_figures_and_what_pruning_leaves_are_in_float64(run_in):
    options = ["evaluation=per_client", "sparsity.mode=prune", "mask_rule=random", "head.init=closed_form"]
    summary, _ = run_in("run", *DOUBLE, *SMALL, *options)
    loss = summary["participants/global/loss_mean"]
    assert loss != float(torch.tensor(loss, dtype=torch.float32))
    assert summary["num_nonzero"] < summary["num_parameters"]


REFUSED = {
    **dict.fromkeys(
        ("16-true", "bf16-true", "transformer-engine", "null"), "must be 32-true, 64-true, bf16-mixed or 16-mixed"
    ),
    **{short: f"write trainer.precision={whole}" for short, whole in (("64", "64-true"), ("16", "16-mixed"))},
}


@pytest.mark.parametrize("given", REFUSED)
def test_another_precision_is_refused_with_those_that_there_are(run_in, given):
    with pytest.raises(ValueError, match=rf"^trainer\.precision is .*{REFUSED[given]}$"):
        run_in("run", f"trainer.precision={given}")
