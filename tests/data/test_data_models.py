"""Data sets, model builders, the packaged backbone and how it is made."""

from __future__ import annotations

import warnings
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import composed
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Dataset, Split, arrays, digits, read_digits, scale_pixels, stratified
from fedsparse.job.keys import target_of
from fedsparse.models.trainable import trainable_filter
from fedsparse.models.vision import conv, mlp, vit_digits
from fedsparse.studies import pretrain

WEIGHTS = Path(str(files("fedsparse.models"))) / "weights" / "vit_digits.safetensors"


@pytest.fixture(scope="module")
def data():
    return digits()


def split_of(n=6, classes=3, shape=(1, 4, 4)):
    return Split(torch.zeros(n, *shape), torch.arange(n) % classes)


def one_line(error):
    return "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_shapes_and_scale(data):
    assert [len(s.y) for s in (data.train, data.val, data.test)] == [1167, 270, 360]
    assert data.train.x.shape == (1167, 1, 8, 8)
    assert data.train.x.dtype == torch.float32
    assert data.train.y.dtype == torch.int64
    every = torch.cat([data.train.x, data.val.x, data.test.x])
    assert abs(every.mean().item()) < 1e-3
    assert abs(every.std().item() - 1) < 1e-3


def keys_of(split):
    """Each image as the bytes of its whole-number pixels, with its label."""
    pixels = np.rint(split.x.numpy() * 6.0168 + 4.8842).astype(np.int64)
    return [(image.tobytes(), int(label)) for image, label in zip(pixels, split.y, strict=True)]


def test_digits_are_split_once_and_whole(data):
    raw = load_digits()
    wanted = Counter((i.astype(np.int64).tobytes(), int(t)) for i, t in zip(raw.images, raw.target, strict=True))
    assert Counter(keys_of(data.train) + keys_of(data.val) + keys_of(data.test)) == wanted


@pytest.mark.parametrize("file", ["datasets/data/digits.csv.gz", "datasets/moved.csv.gz"])
def test_digits_are_those_of_scikit_learn_wherever_it_keeps_them(file):
    images, labels = read_digits(file)
    raw = load_digits()
    assert images.dtype == raw.images.dtype
    np.testing.assert_array_equal(images, raw.images)
    np.testing.assert_array_equal(labels, raw.target)


def test_the_kept_split_is_the_one_that_scikit_learn_makes(data):
    target = load_digits().target
    parts = stratified(target, 0.15, 0.2, 0)
    assert [len(part) for part in parts] == [1167, 270, 360]
    for split, indices in zip((data.train, data.val, data.test), parts, strict=True):
        np.testing.assert_array_equal(split.x, scale_pixels(load_digits().images[indices][:, None]))
        np.testing.assert_array_equal(split.y, target[indices])


def test_digits_are_stratified(data):
    share = np.bincount(load_digits().target) / 1797
    for split in (data.train, data.val, data.test):
        counts = np.bincount(split.y.numpy(), minlength=10)
        assert np.abs(counts - share * len(split.y)).max() <= 1.5


def test_digits_split_depends_on_its_seed_alone(data):
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(digits().test.x, data.test.x)
    assert not torch.equal(digits(split_seed=1).test.x, data.test.x)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.001, 0.2), (-0.1, 0.2), (0.9, 0.9)])
def test_digits_refuse_fractions(fractions):
    with pytest.raises(ValueError, match="fraction") as error:
        digits(*fractions)
    assert one_line(error)


# ------------------------------------------------------------------------------------------------ checks and arrays


def nan_split():
    split = split_of()
    split.x[2, 0, 1, 1] = float("nan")
    split.x[4, 0, 0, 0] = float("inf")
    split.x[4, 0, 0, 1] = float("inf")
    return split


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (Split(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)), "val split of toy is empty"),
        (Split(torch.zeros(5, 1, 4, 4), torch.zeros(6, dtype=torch.int64)), "5 images and 6 labels"),
        (Split(split_of().x, split_of().y, np.arange(5)), "5 users"),
        (Split(torch.zeros(3, 1, 4, 4), torch.tensor([0, 7, -1])), r"labels -1, 7; with 3 classes they are 0 to 2"),
        (nan_split(), "NaN or infinite pixels in 2 of 6 images"),
        (split_of(shape=(1, 5, 4)), r"differ in shape: train \(1, 4, 4\), val \(1, 5, 4\)"),
    ],
)
def test_dataset_refuses(split, text):
    with pytest.raises(ValueError, match=text) as error:
        Dataset(split_of(), split, split_of(), classes=3, name="toy")
    assert one_line(error)


def write_arrays(root, **changes):
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 5), ("test", 4)):
        held = {"x": rng.normal(size=(n, 3, 6, 5)), "y": np.arange(n) % 4} | changes
        np.savez(root / f"{part}.npz", **held)


def test_arrays_round_trip(tmp_path):
    write_arrays(tmp_path)
    dataset = arrays(tmp_path)
    assert dataset.classes == 4
    assert dataset.train.x.dtype == torch.float32
    assert dataset.train.users is None
    stored = np.load(tmp_path / "val.npz")
    assert np.array_equal(dataset.val.x.numpy(), stored["x"].astype(np.float32))
    assert dataset.val.y.tolist() == stored["y"].tolist()


def test_arrays_take_gray_images_and_users(tmp_path):
    write_arrays(tmp_path, x=np.ones((2, 6, 5), np.uint8), y=np.array([0, 1]), users=np.array(["ann", "bo"]))
    dataset = arrays(str(tmp_path))
    assert dataset.test.x.shape == (2, 1, 6, 5)
    assert dataset.train.users.tolist() == ["ann", "bo"]


def test_arrays_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root=null is no folder"):
        arrays(None)
    with pytest.raises(ValueError, match=r"nowhere is no folder; set data\.root"):
        arrays(tmp_path / "nowhere")
    write_arrays(tmp_path)
    (tmp_path / "val.npz").unlink()
    with pytest.raises(ValueError, match=r"val\.npz is missing; put an npz file there with x"):
        arrays(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"y": np.array([0.5, 1.0])}, "y is float64"),
        ({"y": np.array([[0], [1]])}, r"y is int64 \(2, 1\)"),
        ({"x": np.zeros((2, 9))}, r"x is float64 \(2, 9\)"),
        ({"x": np.array(["a", "b"])}, "x is <U1"),
        ({"y": np.array([0, None])}, "cannot be read as an npz file of plain arrays"),
        ({"y": np.array([0, 1, 2])}, "2 images and 3 labels"),
        ({"y": np.array([0, -1])}, "labels -1"),
        ({"x": np.zeros((0, 1, 2, 2)), "y": np.zeros(0, np.int64)}, "is empty"),
    ],
)
def test_arrays_refuse(tmp_path, changes, text):
    write_arrays(tmp_path, **({"x": np.zeros((2, 1, 4, 4)), "y": np.array([0, 1])} | changes))
    with pytest.raises(ValueError, match=text) as error:
        arrays(tmp_path)
    assert one_line(error)


def test_arrays_refuse_other_files(tmp_path):
    write_arrays(tmp_path)
    whole = (tmp_path / "train.npz").read_bytes()
    np.savez(tmp_path / "only_x.npz", x=np.zeros((2, 1, 4, 4)))
    for damaged in (whole[: len(whole) // 2], b"not an archive", b"", whole.replace(b"NUMPY", b"NUMPX")):
        (tmp_path / "train.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train\.npz cannot be read") as error:
            arrays(tmp_path)
        assert one_line(error)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    for other, text in (("only_x.npz", "lacks y"), ("plain.npy", "a single array without a name")):
        (tmp_path / "train.npz").write_bytes((tmp_path / other).read_bytes())
        with pytest.raises(ValueError, match=text):
            arrays(tmp_path)


# ---------------------------------------------------------------------------------------------------------- models


BUILDERS = {
    "vit": lambda seed: vit_digits(seed=seed),
    "random vit": lambda seed: vit_digits(pretrained=False, seed=seed),
    "mlp": lambda seed: mlp(64, 32, 10, seed),
    "conv": lambda seed: conv(10, 1, seed),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_are_pure(name):
    before = torch.get_rng_state()
    first = BUILDERS[name](0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = BUILDERS[name](0).state_dict(), BUILDERS[name](1).state_dict()
    torch.set_rng_state(before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", BUILDERS)
def test_models_take_a_batch_and_learn_everywhere(name):
    net = BUILDERS[name](0)
    out = net(torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (5, 10)
    F.cross_entropy(out, torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", BUILDERS)
def test_models_stack_without_a_warning(name):
    net = BUILDERS[name](0).double()
    space = ParamSpace.of(net)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 1, 8, 8, generator=g, dtype=torch.float64)
    rows = space.read(net) + 0.01 * torch.randn(2, space.size, generator=g, dtype=torch.float64)

    def outputs(row, images):
        return torch.func.functional_call(net, space.unflatten(row), (images,)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacked = torch.vmap(torch.func.grad(outputs))(rows, x)
    for k in range(2):
        torch.testing.assert_close(stacked[k], torch.func.grad(outputs)(rows[k], x[k]))


def test_vit_size_and_head():
    net = vit_digits()
    assert 200_000 < sum(p.numel() for p in net.parameters()) < 210_000
    weights = torch.cat([vit_digits(seed=s).head.weight.flatten() for s in range(20)])
    # a normal cut at two standard deviations has 0.8796 of its spread
    assert weights.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)
    assert abs(weights.mean().item()) < 0.001
    assert weights.abs().max() <= 0.04
    assert not net.head.bias.any()
    assert vit_digits(head_std=0.5).head.weight.std() > 0.3


def test_packaged_weights():
    assert WEIGHTS.stat().st_size < 1_000_000
    held = load_file(WEIGHTS)
    assert not any(name.startswith("head") for name in held)
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    state = vit_digits(seed=3).state_dict()
    assert set(state) - set(held) == {"head.weight", "head.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in held.items())
    with safe_open(WEIGHTS, "pt") as file:
        notes = file.metadata()
    assert {"command", "seed", "epochs", "glyph_accuracy"} <= notes.keys()


def probe(net, data):
    """Logistic regression on the class token, computed layer by layer."""

    def tokens(x):
        with torch.no_grad():
            patches = net.patch_embed(x)
            t = torch.cat([net.cls_token.expand(len(x), -1, -1), patches], 1) + net.pos_embed
            for block in net.blocks:
                t = block(t)
            return net.norm(t)[:, 0].numpy()

    model = LogisticRegression(max_iter=5000).fit(tokens(data.train.x), data.train.y.numpy())
    return model.score(tokens(data.test.x), data.test.y.numpy())


def test_pretrained_backbone_knows_shapes(data):
    pretrained, random = vit_digits().eval(), vit_digits(pretrained=False).eval()
    assert probe(pretrained, data) >= 0.95
    assert probe(random, data) < 0.8
    assert pretrain.linear_probe(pretrained, data.train, data.test) == pytest.approx(probe(pretrained, data))


def test_checkpoint_is_used_and_its_head_is_not(tmp_path):
    other = vit_digits(pretrained=False, seed=5)
    save_file(other.state_dict(), tmp_path / "m.safetensors")
    net = vit_digits(checkpoint=str(tmp_path / "m.safetensors"), seed=0)
    assert torch.equal(net.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)
    assert torch.equal(net.head.weight, vit_digits(seed=0).head.weight)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("norm.bias"), r"missing norm\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 32)}), r"another shape cls_token \(1x1x32, not 1x1x64\)"),
        (lambda s: s["norm.bias"].fill_(float("nan")), r"not finite norm\.bias"),
        (lambda s: s.clear(), r"missing cls_token, pos_embed, .* and \d+ more"),
    ],
)
def test_foreign_checkpoint_is_refused(tmp_path, change, text):
    state = load_file(WEIGHTS)
    change(state)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=text) as error:
        vit_digits(checkpoint=str(tmp_path / "m.safetensors"))
    assert one_line(error)


def test_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    for content in (WEIGHTS.read_bytes()[:5000], b"", b"\x80\x04pickled"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or is no safetensors file") as error:
            vit_digits(checkpoint=str(path))
        assert one_line(error)
    with pytest.raises(ValueError, match="there is no model checkpoint"):
        vit_digits(checkpoint=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"another shape patch_embed\.proj\.weight"):
        vit_digits(in_chans=3)


# ------------------------------------------------------------------------------------------------------- trainable


NAMES = [name for name, _ in vit_digits(pretrained=False).named_parameters()]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("all", lambda n: True),
        ("head", lambda n: n in ("head.weight", "head.bias")),
        ("last_blocks:1", lambda n: n.startswith(("blocks.3.", "norm.", "head."))),
        ("last_blocks:4", lambda n: n.startswith(("blocks.", "norm.", "head."))),
        ("*.bias", lambda n: n.endswith(".bias")),
        (["blocks.0.*", "head.*"], lambda n: n.startswith(("blocks.0.", "head."))),
    ],
)
def test_trainable(spec, wanted):
    chosen = trainable_filter(spec, "head.*", NAMES)
    assert {name for name in NAMES if chosen(name)} == {name for name in NAMES if wanted(name)}


def test_last_blocks_counts_numbers_not_letters():
    names = [f"encoder.blocks.{i}.w" for i in range(12)] + ["norm.w"]
    chosen = trainable_filter("last_blocks:2", "head.*", names)
    assert [n for n in names if chosen(n)] == ["encoder.blocks.10.w", "encoder.blocks.11.w", "norm.w"]


@pytest.mark.parametrize(
    "spec",
    ["blocks.9.*", "last_blocks:0", "last_blocks:5", "last_blocks:x", "last_blocks:-1", "", [], ["head.*", "haed.*"]],
)
def test_trainable_refuses(spec):
    with pytest.raises(ValueError, match=r"model\.trainable") as error:
        trainable_filter(spec, "head.*", NAMES)
    assert one_line(error)


def test_trainable_refuses_what_the_model_lacks():
    with pytest.raises(ValueError, match=r"no blocks"):
        trainable_filter("last_blocks:1", "head.*", ["head.weight"])
    with pytest.raises(ValueError, match=r"model\.head=classifier\.\* matches no parameter"):
        trainable_filter("head", "classifier.*", NAMES)


# ---------------------------------------------------------------------------------------------------- conf, pretrain


@pytest.mark.parametrize("name", ["vit_digits", "mlp", "conv"])
def test_model_yaml_builds(name):
    cfg = composed(f"model={name}", "seed=2")
    found = {"num_classes": 10, "in_chans": 1, "in_features": 64}  # null: as the data has
    assert [key for key in found if key in cfg.model] == [key for key in found if cfg.model.get(key, 0) is None]
    cfg.model.update({key: value for key, value in found.items() if key in cfg.model})
    net = instantiate(target_of("model", cfg.model))
    assert cfg.model.name == name
    trainable_filter(cfg.model.trainable, cfg.model.head, [n for n, _ in net.named_parameters()])
    assert trainable_filter("head", cfg.model.head, [n for n, _ in net.named_parameters()])("head.weight")
    assert torch.equal(instantiate(target_of("model", cfg.model)).head.weight, net.head.weight)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_data_yaml_builds(tmp_path):
    cfg = composed("data=digits")
    assert cfg.data.batch_size == 32
    assert instantiate(target_of("data", cfg.data)).name == "digits"
    write_arrays(tmp_path)
    cfg = composed("data=arrays", f"data.root={tmp_path}")
    assert len(instantiate(target_of("data", cfg.data)).train.y) == 12


def test_glyphs_are_letters_and_repeatable():
    assert len(set(pretrain.CLASSES)) == 36
    assert not set(pretrain.CLASSES) & set("0123456789OoIl")
    first = pretrain.make_glyphs(72, np.random.default_rng(3))
    again = pretrain.make_glyphs(72, np.random.default_rng(3))
    assert torch.equal(first.x, again.x)
    assert np.bincount(first.y.numpy()).tolist() == [2] * 36
    pixels = first.x.numpy() * 6.0168 + 4.8842
    assert np.allclose(pixels, np.rint(pixels), atol=1e-4)
    assert pixels.min() > -0.01
    assert pixels.max() < 16.01
    assert (np.rint(pixels).sum((1, 2, 3)) > 50).all()


def test_glyphs_stand_upright_and_unmirrored():
    canvas = pretrain.RendererAgg(32, 32, 72)
    path = pretrain.outline("DejaVuSans", "L")
    drawn = np.asarray(path.codes) != path.CLOSEPOLY
    placed = pretrain.fit(np.asarray(path.vertices), drawn, 28, 24) + 16
    ink = pretrain.render(pretrain.Outline(placed, path.codes), 1.0, canvas)
    assert ink[:, :4].sum() > 2 * ink[:, 4:].sum()  # L: the stem is left, the foot is at the bottom
    assert ink[4:].sum() > 1.2 * ink[:4].sum()


def test_fit_scales_and_centres():
    square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0], [50.0, 50.0]])
    drawn = np.array([True] * 4 + [False])
    placed = pretrain.fit(square, drawn, height=10, width=12)[:4]
    assert placed.min(0).tolist() == [-6, -5]
    assert placed.max(0).tolist() == [6, 5]


def test_pretrain_writes_a_backbone_that_loads(tmp_path, capsys):
    out = tmp_path / "deep" / "b.safetensors"
    pretrain.main(["--out", str(out), "--epochs", "1", "--glyphs", "300", "--seed", "1"])
    assert "linear probe on digits, validation" in capsys.readouterr().out
    vit_digits(checkpoint=str(out))
    with safe_open(out, "pt") as file:
        assert file.metadata()["command"].endswith("--epochs 1 --glyphs 300 --seed 1")
