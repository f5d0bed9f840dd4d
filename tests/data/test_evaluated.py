"""A share of validation and test split is evaluated: the same samples in every round, and training is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsparse.data.datasets import Dataset, Split, digits
from fedsparse.data.evaluated import evaluated
from fedsparse.job.budget import evaluation_line


def numbered(sizes=(5, 10, 100)):
    """Samples that are their own numbers, with users of the same."""
    splits = [Split(torch.arange(n).float().view(n, 1, 1, 1), torch.arange(n) % 2, users=np.arange(n)) for n in sizes]
    return Dataset(*splits, classes=2, name="numbered")


def test_a_share_is_rounded_up_and_its_rows_stay_together():
    kept = evaluated(numbered(), 0.29)
    assert [len(split.y) for split in (kept.train, kept.val, kept.test)] == [5, 3, 29]
    for split in (kept.val, kept.test):
        rows = split.x.flatten().long()
        assert rows.tolist() == sorted(set(rows.tolist())) == split.users.tolist()
        assert torch.equal(split.y, rows % 2)
    assert torch.equal(evaluated(numbered(), 0.29).test.x, kept.test.x)
    assert kept.test.x.flatten().tolist() != list(range(29))


def test_all_of_it_is_the_data_set_itself():
    data = numbered()
    assert evaluated(data, 1.0) is data
    assert [len(split.y) for split in (evaluated(data, 1e-9).val, evaluated(data, 1e-9).test)] == [1, 1]


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), None, "half", True])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"federation\.eval_share is .*; give a share above 0 and at most 1"):
        evaluated(numbered(), share)


def test_a_run_trains_the_same_and_tests_on_the_share(run_in, fast_run):
    summary, folder = run_in("a", "federation.eval_share=0.1")
    assert summary["global_sha256"] == fast_run["global_sha256"]
    kept, weights = evaluated(digits(), 0.1), load_file(folder / "model.safetensors")
    assert len(kept.test.y) == 36
    linear = torch.nn.functional.linear  # the mlp of one hidden layer, by hand
    hidden = linear(kept.test.x.flatten(1), weights["hidden.weight"], weights["hidden.bias"]).relu()
    right = linear(hidden, weights["head.weight"], weights["head.bias"]).argmax(1) == kept.test.y
    assert summary["test/acc"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_a_run_says_it_in_its_log(run_in, tmp_path):
    """5,100 samples of validation and test, beside the steps of one client."""
    rng = np.random.default_rng(0)
    for name, size in (("train", 40), ("val", 3_000), ("test", 2_100)):
        x = rng.normal(size=(size, 1, 2, 2)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(size) % 2)
    small = ["data=arrays", f"data.root={tmp_path}", "federation.num_clients=2", "federation.clients_per_round=1"]
    small += ["federation.local_steps=16", "federation.rounds=1", "mask_rule=dense"]
    # a tenth of them are 510: trained on 32 x 16 = 512 samples, or on 31 x 16 = 496
    for name, batch, every, said in (("a", 31, 1, 1), ("b", 31, 2, 0), ("c", 32, 1, 0)):
        _, folder = run_in(name, *small, f"data.batch_size={batch}", f"federation.eval_every={every}")
        line = "an evaluation takes a forward over 5,100 samples, where a round trains on 496:"
        assert (folder / "run.log").read_text().count(line) == said


def test_what_an_evaluation_costs_is_said_where_it_is_the_most():
    said = evaluation_line(50_000, 1_000)
    assert "50,000 samples" in said
    assert "1,000" in said
    assert [evaluation_line(*given) for given in ((50_000, 1_000, 10), (4_000, 10), (9_999, 1_000))] == ["", "", ""]
