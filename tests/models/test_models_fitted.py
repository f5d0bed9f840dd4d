"""Checkpoints of another image size or other channels arrive as timm itself fits them."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_models_pretrained import DINO, TINY, dino_state, full_checkpoint

from fedsparse.core.space import matches
from fedsparse.models.pretrained import head_pattern, timm_model

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
FEW = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}


@pytest.mark.parametrize(
    ("name", "saved", "asked"),
    [
        (VIT, SMALL, SMALL | {"in_chans": 1}),
        (VIT, SMALL, SMALL | {"in_chans": 4}),
        (VIT, SMALL, SMALL | {"img_size": 96}),
        (VIT, SMALL, SMALL | {"img_size": 96, "in_chans": 1}),
        ("resnet18", {}, {"in_chans": 1}),
        ("resnet18d", {}, {"in_chans": 2}),
        (SWIN, FEW, FEW | {"img_size": 112, "in_chans": 1}),
    ],
    ids=str,
)
def test_a_backbone_arrives_as_timm_fits_it(tmp_path, name, saved, asked):
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=1000, **saved).state_dict(), path)
    net = timm_model(name, 5, checkpoint=str(path), **asked)
    oracle = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=5, **asked
    ).state_dict()
    assert set(net.state_dict()) == set(oracle)
    for key, tensor in net.state_dict().items():
        assert matches(key, head_pattern(name)) or torch.equal(tensor, oracle[key]), key
    side = asked.get("img_size", net.pretrained_cfg["input_size"][-1])
    assert net.pretrained_cfg["input_size"] == (asked.get("in_chans", 3), side, side)
    assert net.eval()(torch.zeros(1, asked.get("in_chans", 3), side, side)).shape == (1, 5)


def test_dinos_full_checkpoint_at_another_size_by_hand(tmp_path):
    """Grey: the sum of the colours' weights; positions of 2 x 2 patches to 3 x 3: the corners stay nearest."""
    state = dino_state()
    torch.save(full_checkpoint(state), tmp_path / "full.pth")
    net = timm_model(DINO, 5, checkpoint=str(tmp_path / "full.pth"), **TINY | {"img_size": 48, "in_chans": 1})
    torch.testing.assert_close(net.patch_embed.proj.weight, state["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert net.pos_embed.shape == (1, 10, 24)
    assert torch.equal(net.pos_embed[:, 0], state["pos_embed"][:, 0])
    middle = net.pos_embed[0, 5]
    torch.testing.assert_close(middle, state["pos_embed"][0, 1:].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 48}, "another shape cls_token"),
        ("resnet18", {}, "missing"),
        ("resnet18", {"in_chans": 1}, "missing"),
        ("vit_tiny_patch16_224", {**SMALL, "depth": 3, "in_chans": 1}, "missing blocks.2"),
    ],
)
def test_another_net_is_still_named(tmp_path, name, asked, says):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(VIT, num_classes=3, **SMALL).state_dict(), path)
    with pytest.raises(ValueError, match=f"does not fit the model: .*{says}") as error:
        timm_model(name, 5, checkpoint=str(path), **asked)
    assert "\n" not in str(error.value)


def test_grey_weights_are_not_spread_over_colours(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(VIT, in_chans=1, num_classes=3, **SMALL).state_dict(), path)
    with pytest.raises(ValueError, match=r"another shape patch_embed\.proj\.weight \(24x1x16x16, not 24x3x16x16\)"):
        timm_model(VIT, 5, checkpoint=str(path), **SMALL)
