"""The rules of a device without a card: every kind of run trains where its tensors may not meet the CPU's."""

from __future__ import annotations

import shutil

import lightning
import pytest
import torch
from pretend import DEVICE, TAG, Mixed, Pretended, pretended
from safetensors.torch import load_file

from fedsparse import run
from fedsparse.core.folder import LAST
from fedsparse.simulation.checkpoint import AtomicCheckpointIO

FAST = ["model=mlp", "logger=csv", "pictures=false", "calibration.cache=null", "calibration.head_steps=2"]
FAST += ["federation.num_clients=6", "federation.rounds=2", "federation.local_steps=2", "mask_rule=random"]
FAST += ["trainer.accelerator=cpu"]
SENDERS = "aggregation=coordinate_mean"
CARRIED = ["exchange=topk", "exchange.feedback=0.9", SENDERS, "aggregation.denominator=participants"]
OWN = ["mask.owner=client", SENDERS]
GRADUAL = ["sparsity=gradual80", "sparsity.schedule.steps=3", "sparsity.renew_every=1", "federation.rounds=4"]
NAMES = "exchange.names=[*weight]"

# what raised on a GPU
NAMED = {
    "prune": ["sparsity.mode=prune"],
    "explored, pruned": ["mask_rule=autoflip", "sparsity.mode=prune", "explore.steps=2"],
    "layers": ["exchange=layers", SENDERS],
    "own masks, topk": ["exchange=topk", *OWN, "mask_rule=least_sensitive"],
    "compat=original": ["exchange=topk", "exchange.compat=original", "exchange.payload=value", SENDERS],
}
OTHERS = {
    "masked": [],
    "full": ["exchange=full"],
    "pattern": ["exchange=pattern", NAMES, SENDERS],
    "randomk": ["exchange=randomk", SENDERS],
    "threshold": ["exchange=threshold", SENDERS],
    "topk of tensors, int8": [*CARRIED, "exchange.scope=tensor", "exchange.precision=int8"],
    "values of two at once": ["exchange=topk", "exchange.payload=value", SENDERS, "federation.cohort=2"],
    "layers by threshold": ["exchange=layers", "exchange.threshold=0", "exchange.percentage=null", SENDERS],
    "own masks": OWN,
    "own masks of two, layers": ["exchange=layers", *OWN, "federation.cohort=2"],
    "own masks, randomk": ["exchange=randomk", *OWN],
    "own masks, pattern": ["exchange=pattern", NAMES, *OWN],
    "own masks, original": ["exchange=topk", "exchange.compat=original", "exchange.payload=value", *OWN],
    "float16": ["exchange.precision=float16"],
    "median": ["aggregation=median"],
    "trimmed": ["aggregation=trimmed_mean"],
    "geometric median": ["aggregation=geometric_median", "exchange=topk"],
    "krum": ["aggregation=krum", "exchange.attackers=1", "federation.clients_per_round=6"],
    "multi-krum": ["aggregation=multi_krum", "federation.clients_per_round=6"],
    "fednova": ["aggregation=fednova"],
    "fedprox": ["objective=fedprox"],
    "fedprox of two": ["objective=fedprox", "federation.cohort=2"],
    "scaffold": ["objective=scaffold"],
    "scaffold of two": ["objective=scaffold", "federation.cohort=2"],
    "head start": ["mask_rule=autoflip", "explore.keep_model=true", "explore.steps=2"],
    "patience": ["mask_rule=autoflip", "explore.steps=null", "explore.epochs=2", "explore.patience=1"],
    "fine tune": ["phases=fine_tune"],
    "gradual, pruned": ["mask_rule=highest_magnitude", *GRADUAL, "sparsity.mode=prune"],
    "movement": ["mask_rule=movement", *GRADUAL, "server=fedadam"],
    "renewed, local head": ["sparsity.renew_every=1", "model.local=[head.*]", "federation.rounds=3"],
    "renewed, carried": ["sparsity.renew_every=1", *CARRIED, "federation.rounds=3"],
    "per client": ["evaluation=per_client"],
    "per client, two at once, local head": ["evaluation=per_client", "federation.cohort=2", "model.local=[head.*]"],
    "per client, own tests": ["evaluation=per_client", "data.local_test=0.2"],
    "least_sensitive": ["mask_rule=least_sensitive", "sparsity.unit=output"],
    "most_sensitive": ["mask_rule=most_sensitive", "calibration.fisher=batch"],
    "lowest_magnitude": ["mask_rule=lowest_magnitude", "sparsity.scope=tensor", "calibration.where=server"],
    "talos": ["mask_rule=talos", "calibration.rounds=2"],
    "snip": ["mask_rule=snip"],
    "synflow": ["mask_rule=synflow"],
    "shira": ["sparsity=shira"],
    "solved head": ["head.init=closed_form"],
    "batch norm": ["model=fednet", "federation.cohort=1", "federation.clients_per_round=2", "head.init=random"],
    "batch norm, local": ["model=fednet", "federation.cohort=1", "federation.clients_per_round=2"]
    + ["federation.buffers=local", "sparsity.mode=prune"],
    "convolutions": ["model=conv", "federation.cohort=2", "federation.clients_per_round=2"],
    "adam, yogi": ["optimizer=adam", "server=fedyogi", "server.untouched=freeze", "exchange=topk", SENDERS],
    "adamw of two": ["optimizer=adamw", "server=fedadagrad", "federation.cohort=2"],
    "streamed": ["data.stream=true", "data.workers=0"],
    "stored in files": [*CARRIED, "federation.store=file"],
    "vision transformer": ["model=vit_digits", "head.init=random", "federation.clients_per_round=2"],
}


def test_the_pretended_device_refuses_what_a_device_refuses_and_computes_what_it_computes():
    with pretended():
        there, here = torch.arange(3.0, device=DEVICE), torch.arange(3.0)
        for mixed in (
            lambda: there + here,
            lambda: here.index_add_(0, torch.arange(3, device=DEVICE), here),
            lambda: here[there > 1],
            lambda: here.add_(there.sum()),
            lambda: there.numpy(),
            lambda: torch.where(here > 1, there, 0.0),
        ):
            with pytest.raises(Mixed):
                mixed()
        assert isinstance(there[torch.tensor([0, 2])] * torch.tensor(2.0), Pretended)  # as CUDA allows
        assert (2 * there).cpu().tolist() == [0.0, 2.0, 4.0]
        assert there.to("cpu").device.type == "cpu"
        assert here.to(DEVICE).requires_grad_().square().sum().backward() is None


@pytest.mark.parametrize("name", NAMED)
def test_what_raised_on_a_gpu_ends_there_as_on_the_cpu(name, tmp_path):
    options = [*FAST, *NAMED[name]]
    with pretended():
        there = run([*options, f"hydra.run.dir={tmp_path / 'there'}"])
    here = run([*options, f"hydra.run.dir={tmp_path / 'here'}"])
    assert there["bytes_total"] == here["bytes_total"]
    same_models(tmp_path / "there", tmp_path / "here", exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_run_keeps_the_rules_of_a_device(name, tmp_path):
    with pretended():
        assert "test/acc" in run([*FAST, *OTHERS[name], f"hydra.run.dir={tmp_path / 'run'}"])


RESUMED = {
    "masked": (["server=fedadam"], 0),
    "explores twice": (["mask_rule=autoflip", "phases.explore.rounds=2", "explore.steps=2", "federation.rounds=1"], 1),
    "movement": (["mask_rule=movement", *GRADUAL], 1),
}
MORE_RESUMED = {
    "scaffold, carried, renewed": (["objective=scaffold", "sparsity.renew_every=1", "federation.rounds=4"], 1),
    "carried, renewed": ([*CARRIED, "sparsity.renew_every=1", "federation.rounds=4"], 1),
    "local head, refined": (["mask_rule=autoflip", *GRADUAL, "mask_rule.refine=true", "explore.steps=2"], 2),
    "local buffers": ([*OTHERS["batch norm, local"], "federation.rounds=3"], 1),
    "own masks": ([*OWN, "exchange=topk", "federation.rounds=3"], 1),
}


@pytest.mark.parametrize("name", [*RESUMED, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_RESUMED)])
def test_a_run_of_a_device_goes_on_there_and_without_one_to_the_same_bits(name, tmp_path, monkeypatch):
    options, epoch = (RESUMED | MORE_RESUMED)[name]
    folder, copy = tmp_path / "killed", tmp_path / "copy"
    with pretended():
        stop_before(monkeypatch, epoch, [*FAST, *options, f"hydra.run.dir={folder}"])
    shutil.copytree(folder, copy)
    tags = tags_of(folder / "checkpoints" / LAST)
    assert TAG in tags  # it lay on a GPU
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(folder / "checkpoints" / LAST, weights_only=True)
    with pretended():
        there = run([f"resume={folder}"])
    here = run([f"resume={copy}"])
    assert there["bytes_total"] == here["bytes_total"]
    same_models(folder, copy, exact=name == "masked")


def stop_before(monkeypatch, epoch, options):
    """Run until the checkpoint of the round after this one is to be written, and end there as a kill would."""
    save = AtomicCheckpointIO.save_checkpoint

    def killed(self, state, path, *rest, **more):
        if state["epoch"] > epoch:
            raise KeyboardInterrupt
        save(self, state, path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(options)


def tags_of(path):
    """Where the tensors of a checkpoint say they lay."""
    tags = set()
    torch.load(path, map_location=lambda storage, tag: tags.add(tag) or storage, weights_only=True)
    return tags


def same_models(one, two, exact):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)


@pytest.fixture
def on_an_apple(monkeypatch):
    """Let Lightning find an Apple GPU, and no other."""
    for kind in (lightning.fabric.accelerators.MPSAccelerator, lightning.pytorch.accelerators.MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(lightning.fabric.utilities.device_parser, "_get_all_available_mps_gpus", lambda: [0], False)
    monkeypatch.setattr(lightning.fabric.accelerators.mps, "_get_all_available_mps_gpus", lambda: [0])
    assert lightning.Fabric(accelerator="auto", devices=1).device.type == "mps"


def test_auto_takes_the_cpu_of_an_apple_and_says_so(on_an_apple, run_in):
    with pytest.warns(UserWarning, match="an Apple GPU has no float64.*auto trains on the CPU") as said:
        summary, _ = run_in("auto", "trainer.accelerator=auto", "mask_rule=random", "federation.cohort=auto")
    assert summary["rounds"] == 3
    assert len({str(w.message) for w in said}) == 1


@pytest.mark.parametrize("asked", ["mps", "gpu"])
def test_an_apple_gpu_that_is_asked_for_is_refused_in_one_line(on_an_apple, run_in, asked):
    with pytest.raises(ValueError, match=f"^trainer.accelerator={asked}: an Apple GPU has no float64.*=cpu$"):
        run_in("asked", f"trainer.accelerator={asked}")
