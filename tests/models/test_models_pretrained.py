"""Nets of timm and of other experiments: weights from files of the public layouts, heads, sizes, and plain refusals."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from composed import composed
from hydra.utils import instantiate
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn import functional as F

from fedsparse.core.space import ParamSpace, matches
from fedsparse.job.keys import target_of
from fedsparse.models.convnets import fednet, fednet_mlp, femnist_cnn, resnet18_gn, resnet_small, two_cnn
from fedsparse.models.pretrained import head_pattern, timm_model
from fedsparse.models.trainable import trainable_filter

DINO = "vit_small_patch16_224.dino"
TINY = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def dino_state(width=24, depth=2, side=32, seed=0):
    """A state dict as DINO publishes it: its names and shapes written down by hand, its numbers random."""
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, (side // 16) ** 2 + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def projection_head():
    return {"head.mlp.0.weight": torch.ones(8, 24), "head.last_layer.weight_g": torch.ones(3, 1)}


def full_checkpoint(state):
    """DINO's training checkpoint: both nets with their wrappers and projection heads, and the options of the run."""
    other = {name: tensor + 1 for name, tensor in state.items()} | projection_head()
    wrapped = {f"backbone.{n}" if n in state else n: t for n, t in other.items()}
    teacher = {f"backbone.{n}": t for n, t in state.items()} | projection_head()
    return {
        "student": {f"module.{n}": t for n, t in wrapped.items()},
        "teacher": teacher,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 800,
        "args": argparse.Namespace(arch="deit_small", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


LAYOUTS = {
    "bare.pth": lambda state: state,
    "full.pth": full_checkpoint,
    "student.pt": lambda state: {"student": {f"module.backbone.{n}": t for n, t in state.items()}},
    "wrapped.bin": lambda state: {f"module.{n}": t for n, t in state.items()},
    "half.pth": lambda state: {"state_dict": {n: t.half() for n, t in state.items()}},
    "with_head.safetensors": lambda state: state | {"head.weight": torch.ones(7, 24), "head.bias": torch.ones(7)},
}


def saved(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return str(path)


def one_line(error):
    return "\n" not in str(error.value)


def tiny(**options):
    return timm_model(DINO, 5, **{**TINY, **options})


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_but_the_head_arrives(tmp_path, name):
    state = dino_state()
    net = tiny(checkpoint=saved(tmp_path / name, LAYOUTS[name](state)))
    arrived = net.state_dict()
    assert set(arrived) - set(state) == {"head.weight", "head.bias"}
    for key, tensor in state.items():
        assert torch.equal(arrived[key], tensor.half().float() if name == "half.pth" else tensor)
    assert torch.equal(arrived["head.weight"], tiny(pretrained=False).head.weight)


def test_the_published_size(tmp_path):
    state = dino_state(width=384, depth=12, side=224)
    # 38 tensors of a block times 12, by hand: 12 x 1,774,464 + 295,296 (patches) + 384 + 75,648 + 768
    assert sum(t.numel() for t in state.values()) == 21_665_664
    net = timm_model(DINO, 100, checkpoint=saved(tmp_path / "dino.pth", state))
    for key, tensor in net.state_dict().items():
        assert key.startswith("head.") or torch.equal(tensor, state[key])
    assert net.head.weight.shape == (100, 384)
    assert net.pretrained_cfg["input_size"] == (3, 224, 224)


def test_a_run_folders_model_is_a_checkpoint(tmp_path):
    for name, options in ((DINO, TINY), ("resnet18", {})):
        trained = timm_model(name, 3, pretrained=False, seed=4, **options)
        save_model(trained, tmp_path / "model.safetensors")
        net = timm_model(name, 5, checkpoint=str(tmp_path / "model.safetensors"), **options)
        head = head_pattern(name)
        kept = [key for key in trained.state_dict() if not matches(key, head)]
        assert len(kept) == len(net.state_dict()) - 2
        assert all(torch.equal(trained.state_dict()[key], net.state_dict()[key]) for key in kept)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("norm.bias"), r"missing norm\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 5, 25)), r"another shape pos_embed \(1x5x25, not 1x5x24\)"),
        (lambda s: s["norm.bias"].fill_(float("nan")), r"not finite norm\.bias"),
        (lambda s: s.clear(), r"missing cls_token, pos_embed, .* and \d+ more"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, text):
    state = dino_state()
    change(state)
    with pytest.raises(ValueError, match=text) as error:
        tiny(checkpoint=saved(tmp_path / "m.pth", state))
    assert one_line(error)
    assert "m.pth" in str(error.value)


class Bomb:
    """Leaves a file behind wherever it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_runs(tmp_path):
    with pytest.raises(ValueError, match="damaged or holds more than weights") as error:
        tiny(checkpoint=saved(tmp_path / "m.pth", dino_state() | {"bomb": Bomb(tmp_path / "exploded")}))
    assert one_line(error)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    whole = Path(saved(tmp_path / "m.pth", dino_state())).read_bytes()
    for content in (whole[:5000], b"", b"\x80\x04pickled", b"<html>not found</html>"):
        (tmp_path / "m.pth").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or holds more than weights") as error:
            tiny(checkpoint=str(tmp_path / "m.pth"))
        assert one_line(error)
    for name, text in (("none.pth", "there is no model checkpoint"), ("m.npz", "has to end in")):
        (tmp_path / "m.npz").touch()
        with pytest.raises(ValueError, match=text) as error:
            tiny(checkpoint=str(tmp_path / name))
        assert one_line(error)
    with pytest.raises(ValueError, match="missing cls_token"):
        tiny(checkpoint=saved(tmp_path / "list.pth", [torch.zeros(1)]))


# ------------------------------------------------------------------------------------------------------- downloads


def test_without_a_network_a_line_says_what_to_fetch(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded") as error:
        timm_model(DINO, 10)
    assert one_line(error)
    for part in (
        "https://huggingface.co/timm/vit_small_patch16_224.dino/resolve/main/model.safetensors",
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        "model.checkpoint=",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", [DINO, "test_resnet.r160_in1k", "test_convnext.r160_in1k"])
def test_downloaded_weights_arrive_and_the_head_starts_anew(monkeypatch, name):
    options = TINY if name == DINO else {}
    theirs = timm.create_model(name, num_classes=0 if name == DINO else 1000, **options).state_dict()
    offered = {key: torch.full_like(tensor, 0.5) for key, tensor in theirs.items()}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(offered))
    for classes in (5, 1000):  # a head of the very size of the pre-training is started anew as well
        net = timm_model(name, classes, **options)
        head = head_pattern(name)
        for key, tensor in net.state_dict().items():
            if matches(key, head):
                assert tensor.shape[0] == classes
                assert tensor.abs().max() <= 0.04
            else:
                assert torch.equal(tensor, offered[key])


def test_names_that_timm_does_not_know():
    for name, close in (
        ("resnet_18", "resnet18"),
        ("vit_small_patch16_224.dinoo", DINO),
        ("resnet18.none", "resnet18"),
    ):
        with pytest.raises(ValueError, match=rf"model\.name={name} is no net of timm .*{close}") as error:
            timm_model(name, 10)
        assert one_line(error)
        assert head_pattern(name) == "head.*"
    with pytest.raises(ValueError, match=r"model\.name=None is no net .* timm\.list_models"):
        timm_model(None, 10)


def test_other_refusals():
    for options, text in (
        ({"name": "resnet18", "img_size": 32}, r"model\.name=resnet18 takes no such option .*img_size"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "has no head of its own, or several"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes is .*; it must be a whole number of 1 or more"),
        ({"name": "resnet18", "num_classes": None}, "num_classes is .*; it must be a whole number of 1 or more"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            timm_model(**{"num_classes": 10, "pretrained": False, **options})
        assert one_line(error)
    without = next(n for n in timm.list_models() if not (c := timm.get_pretrained_cfg(n)).url and not c.hf_hub_id)
    with pytest.raises(ValueError, match=f"timm has no weights for {without}"):
        timm_model(without, 10)


# ---------------------------------------------------------------------------------------------------- timm's nets


SMALL = ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_nfnet", "test_mambaout"]


@pytest.mark.parametrize("name", SMALL)
def test_the_head_pattern_names_the_classifier(name):
    net = timm_model(name, 7, pretrained=False)
    classifier = {id(p) for p in net.get_classifier().parameters()}
    named = {id(p) for key, p in net.named_parameters() if matches(key, head_pattern(name))}
    assert named == classifier
    assert len(named) == 2
    assert net(torch.zeros(2, *net.pretrained_cfg["input_size"])).shape == (2, 7)


def test_the_net_says_what_it_is_to_be_fed():
    net = tiny(pretrained=False)
    assert net.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert net.pretrained_cfg["std"] == (0.229, 0.224, 0.225)
    assert net.pretrained_cfg["interpolation"] == "bicubic"
    assert net.pretrained_cfg["input_size"] == (3, 32, 32)
    grey = timm_model("test_resnet", 5, in_chans=1, pretrained=False)
    assert grey.pretrained_cfg["input_size"] == (1, 160, 160)
    assert grey(torch.zeros(2, 1, 64, 64)).shape == (2, 5)
    assert timm.create_model("test_resnet").pretrained_cfg["input_size"] == (3, 160, 160)  # timm's own is untouched


def test_dropout_is_an_option():
    assert tiny(pretrained=False).head_drop.p == 0
    assert tiny(pretrained=False, drop_rate=0.3).head_drop.p == 0.3
    assert (
        tiny(pretrained=False).blocks[0].attn.fused_attn == timm.create_model(DINO, depth=1).blocks[0].attn.fused_attn
    )


# -------------------------------------------------------------------------------------------- nets of other papers


BUILDERS = {
    "timm": (lambda seed: tiny(pretrained=False, seed=seed), (3, 32, 32)),
    "resnet18_gn": (lambda seed: resnet18_gn(5, 3, seed=seed), (3, 32, 32)),
    "resnet18_gn, imagenet": (lambda seed: resnet18_gn(5, 1, stem="imagenet", seed=seed), (1, 64, 64)),
    "two_cnn": (lambda seed: two_cnn(5, 1, hidden=8, seed=seed), (1, 28, 28)),
    "two_cnn, digits": (lambda seed: two_cnn(5, 1, seed=seed), (1, 8, 8)),
    "femnist_cnn": (lambda seed: femnist_cnn(5, 1, hidden=8, seed=seed), (1, 28, 28)),
    "fednet": (lambda seed: fednet(5, 3, 32, seed=seed), (3, 32, 32)),
    "fednet, digits": (lambda seed: fednet(5, 1, 8, dropout=0, seed=seed), (1, 8, 8)),
    "fednet_mlp": (lambda seed: fednet_mlp(5, 64, seed=seed), (1, 8, 8)),
    "resnet_small": (lambda seed: resnet_small(5, 3, seed=seed), (3, 32, 32)),
}


def head_weight(net):
    return next(p for key, p in net.named_parameters() if key in ("head.weight", "fc.weight"))


@pytest.mark.parametrize(
    "name", ["timm", "resnet18_gn", "two_cnn", "femnist_cnn", "fednet", "fednet_mlp", "resnet_small"]
)
def test_builders_are_pure(name):
    build, _ = BUILDERS[name]
    before = torch.get_rng_state()
    first = build(0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = build(0), build(1)
    torch.set_rng_state(before)
    assert all(torch.equal(first[key], tensor) for key, tensor in again.state_dict().items())
    for key, parameter in again.named_parameters():
        # what is constant at the start (biases, norms) is equal under any seed; everything else differs
        assert torch.equal(parameter, other.get_parameter(key)) == (parameter.unique().numel() == 1), key


@pytest.mark.parametrize("name", BUILDERS)
def test_heads_start_small_and_every_weight_has_a_gradient(name):
    build, shape = BUILDERS[name]
    net = build(0)
    assert 0.02 < head_weight(net).abs().max() <= 0.04
    assert head_weight(net).std().item() == pytest.approx(0.02 * 0.8796, rel=0.2)
    out = net(torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (5, 5)
    F.cross_entropy(out, torch.arange(5)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["resnet18_gn", "two_cnn, digits"])
def test_nets_without_batch_norm_stack(name):
    build, shape = BUILDERS[name]
    net = build(0).double()
    space = ParamSpace.of(net)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, shape[0], 8, 8, generator=g, dtype=torch.float64)
    rows = space.read(net) + 0.01 * torch.randn(2, space.size, generator=g, dtype=torch.float64)

    def outputs(row, images):
        return torch.func.functional_call(net, space.unflatten(row), (images,)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacked = torch.vmap(torch.func.grad(outputs))(rows, x)
    for k in range(2):
        torch.testing.assert_close(stacked[k], torch.func.grad(outputs)(rows[k], x[k]))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_resnet18_gn_is_torchvisions_with_group_norm(stem):
    net = resnet18_gn(10, 3, stem=stem)
    theirs = torchvision.models.resnet18(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(net.state_dict())  # the very same names
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), theirs(x))
    assert getattr(net, "pretrained_cfg", None) is None
    # torchvision's ResNet-18 has 11,181,642 with a head of 10; the small stem saves (49 - 9) x 3 x 64
    assert sum(p.numel() for p in net.parameters()) == 11_181_642 - (7680 if stem == "cifar" else 0)


def test_two_cnn_is_the_published_size():
    net = two_cnn(10, 1)
    # 832 + 51,264 + 1,606,144 + 5,130
    assert sum(p.numel() for p in net.parameters()) == 1_663_370
    sizes = []
    net.mean.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1:]))
    for side in (28, 32, 8):
        assert net(torch.zeros(2, 1, side, side)).shape == (2, 10)
    assert sizes == [(64, 7, 7), (64, 8, 8), (64, 2, 2)]
    assert getattr(net, "pretrained_cfg", None) is None


def test_femnist_cnn_is_the_published_size():
    net = femnist_cnn(62, 1, hidden=64)
    # 64 x 26, 128 x (1,600 + 1), (128 x 49 + 1) x 2,048, 2,049 x 62
    assert sum(p.numel() for p in net.parameters()) == 1664 + 204_928 + 12_847_104 + 127_038 == 13_180_734
    # as the framework that AutoFLIP is built on writes it
    layers = [nn.Conv2d(1, 64, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2, padding=1)]
    layers += [nn.Conv2d(64, 128, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2, padding=1), nn.AdaptiveAvgPool2d((7, 7))]
    theirs = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6272, 2048), nn.ReLU(), nn.Linear(2048, 62))
    for mine, other in zip(net.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine)
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(x), theirs(x))


def test_fednet_is_the_published_size():
    net = fednet(10, 3, 32)
    # convolutions 896 + 18,496 + 36,928, norms 2 x 160, layers 524,800 + 5,130
    assert sum(p.numel() for p in net.parameters()) == 586_570
    assert net.hidden.in_features == 64 * 4 * 4
    assert net.dropout.p == 0.5
    assert fednet(10, 1, 28)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert getattr(net, "pretrained_cfg", None) is None


def test_refusals_of_the_reference_nets():
    for build, text in (
        (lambda: resnet18_gn(10, 3, stem="small"), r"model\.stem is 'small'; it must be cifar or imagenet"),
        (lambda: fednet(10, 3, 4), r"model\.img_size is 4"),
        (lambda: two_cnn(0, 3), "num_classes is .*; it must be a whole number of 1 or more"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            build()
        assert one_line(error)


# ------------------------------------------------------------------------------------------------------------ conf


@pytest.mark.parametrize(
    "name",
    ["resnet18_gn", "two_cnn", "femnist_cnn", "fednet", "fednet_mlp", "resnet_small", "dino_vits16", "timm"],
)
def test_model_yaml_builds(name):
    cfg = composed(f"model={name}", "seed=2")
    found = {"num_classes": 4, "in_chans": 1, "img_size": 8, "in_features": 64}
    for key in [key for key, value in cfg.model.items() if value is None and key != "checkpoint"]:
        cfg.model[key] = found[key]
    if name in ("dino_vits16", "timm"):
        cfg.model.pretrained = False
    if name == "timm":
        cfg.model.name = "test_resnet.r160_in1k"
    net = instantiate(target_of("model", cfg.model))
    names = [n for n, _ in net.named_parameters()]
    head = trainable_filter("head", cfg.model.head, names)
    assert [n.rpartition(".")[2] for n in names if head(n)] == ["weight", "bias"]
    assert torch.equal(head_weight(instantiate(target_of("model", cfg.model))), head_weight(net))
    side = {"dino_vits16": 224, "timm": 160}.get(name, 8)
    assert net(torch.zeros(2, cfg.model.get("in_chans", 1), side, side)).shape == (2, 4)
