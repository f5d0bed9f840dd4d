"""Losses and hits of sequences: against plain loops over logarithms, Hugging Face's loss, and its greedy decoding."""

from __future__ import annotations

import math

import pytest
import torch
from languages import qwen2, sequences

from fedsparse.core.targets import IGNORED, count, cross_entropy, hits

pytest.importorskip("transformers", reason="transformers is in the extra text")


def by_hand(logits, y):
    """Mean negative logarithm of the softmax at the targets of each row, by plain loops."""
    found = []
    for row, targets in zip(logits.double().tolist(), y.tolist(), strict=True):
        each = [
            math.log(sum(math.exp(v) for v in place)) - place[target]
            for place, target in zip(row, targets, strict=True)
            if target != IGNORED
        ]
        found.append(sum(each) / len(each))
    return found


def test_a_sequences_loss_is_the_mean_over_its_targets():
    x, y = sequences(5)
    logits = qwen2()(input_ids=x.long()).logits.detach()
    assert cross_entropy(logits, y).tolist() == pytest.approx(by_hand(logits, y), rel=1e-5)
    assert count(y).tolist() == [sum(target != IGNORED for target in row) for row in y.tolist()]


def test_a_row_without_targets_has_loss_0_and_a_gradient_of_0():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([[IGNORED] * 3, [1, 2, IGNORED]]))
    assert losses[0].item() == 0
    losses.sum().backward()
    assert not bool(logits.grad[0].any())
    assert bool(logits.grad.isfinite().all())


def test_of_classes_the_loss_is_torchs_to_the_bit():
    logits, y = torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    assert torch.equal(cross_entropy(logits, y), torch.nn.functional.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(hits(logits, y), logits.argmax(1) == y)
    assert count(y).tolist() == [1] * 6


def test_weighted_by_targets_the_mean_is_hugging_faces_loss_and_the_plain_mean_is_not():
    """Their labels stand where the ids do, and their model shifts them."""
    (x, y), net = sequences(6, seed=3), qwen2()
    ids = torch.cat([x.long(), torch.zeros(6, 1, dtype=torch.long)], 1)
    labels = torch.cat([torch.full((6, 1), IGNORED), y], 1)
    ids[:, 1:] = torch.where(y != IGNORED, y, ids[:, 1:])  # the last token is no input of ours
    theirs = net(input_ids=ids, labels=labels).loss.item()
    losses, weights = cross_entropy(net(input_ids=x.long()).logits.detach(), y), count(y)
    assert float((losses * weights).sum() / weights.sum()) == pytest.approx(theirs, rel=1e-6)
    assert float(losses.mean()) != pytest.approx(theirs, rel=1e-3)


def test_hits_are_what_greedy_decoding_answers():
    """Prompts of four ids, and as answers what ``generate`` says: of some rows with one token replaced."""
    net, g = qwen2(seed=1, eos_token_id=None), torch.Generator().manual_seed(0)
    prompt = torch.randint(2, 40, (8, 4), generator=g)
    said = net.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, pad_token_id=0
    )
    wanted = said.clone()
    wanted[1, 4], wanted[2, 5], wanted[3, 6] = (said[1, 4] + 1) % 40, (said[2, 5] + 1) % 40, (said[3, 6] + 1) % 40
    y = wanted[:, 1:].clone()
    y[:, :3] = IGNORED
    found = hits(net(input_ids=wanted[:, :-1]).logits, y)
    assert found.tolist() == (said == wanted).all(1).tolist() == [True, False, False, False, *[True] * 4]
