"""The size of images follows from the model, and a model's builder gets what it requires without a line in its YAML."""

from __future__ import annotations

import pytest
import torch
from composed import composed
from image_files import write_folder
from torch import nn

from fedsparse.data.folder import imagefolder
from fedsparse.job.assemble import assemble_problem
from fedsparse.job.keys import JOBS, required

SIZES = [("model=mlp", 32), ("model=vit_digits", None)]
MORE = [
    ("model=fednet_mlp", 28),
    ("model=conv", 224),
    ("model=conv model.image_side=48", 48),
    ("model=mlp data.size=64", 64),
    ("model=timm model.name=test_vit", 160),  # timm's own
    ("model=timm model.name=test_vit +model.img_size=96", 96),
    ("model=timm model.name=no_net_of_timm", 224),  # the builder refuses it
]


@pytest.mark.parametrize(("typed", "size"), [*SIZES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)])
def test_images_are_brought_to_the_size_of_the_model(typed, size):
    assert composed("data=imagefolder", *typed.split()).data.size == size


def test_a_model_without_a_size_takes_no_folder_and_no_image_is_read(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "damaged.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^data\.size is null.* choose model=timm model\.name=.*, or model=conv data"):
        imagefolder(tmp_path, None)


def least(in_features, num_classes, seed, width=5):
    """Build a network; what has no default is required."""
    drawn = torch.Generator().manual_seed(0 if seed is None else seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(in_features, width), nn.Tanh())
    net.add_module("head", nn.Linear(width, num_classes))
    nn.init.normal_(net.head.weight, generator=drawn)
    return net


def test_what_has_no_default_is_required():
    assert required(f"{__name__}.least") == {"in_features", "num_classes", "seed"}
    assert required("torch.nn.Sequential") == set()  # *args
    assert required("no.such.thing") == set()


def test_what_a_builder_requires_follows_from_data_and_seed(tmp_path):
    write_yaml(tmp_path, f"_target_: {__name__}.least")
    cfg = composed(f"hydra.searchpath=['file://{tmp_path}']", "model=least", "seed=7", "logger=csv")
    assert (cfg.model.trainable, cfg.model.head, cfg.model.local, cfg.model.cohort) == ("all", "head.*", [], 1)
    problem = assemble_problem(cfg)
    target = {"_target_": f"{__name__}.least"}
    assert problem.arguments == target | {"in_features": 64, "num_classes": 10, "seed": 7}
    assert torch.equal(problem.net.head.weight, least(64, 10, 7).head.weight)


def test_what_the_yaml_says_stays(tmp_path):
    write_yaml(tmp_path, f"_target_: {__name__}.least\nnum_classes: 12\nseed: null\nin_features: null\nlocal: ['1.*']")
    cfg = composed(f"hydra.searchpath=['file://{tmp_path}']", "model=least", "logger=csv")
    problem = assemble_problem(cfg)
    assert {key: problem.arguments[key] for key in ("in_features", "num_classes", "seed")} == {
        "in_features": 64,
        "num_classes": 12,
        "seed": None,
    }
    assert problem.space.local.sum() == 5 * 64 + 5


def test_a_size_that_a_builder_asks_for_by_its_usual_names_is_no_key_of_the_job():
    """As torchvision's ``vit_b_16(image_size=...)`` and timm's ``img_size`` do."""
    assert not {"image_size", "img_size", "size"} & set(JOBS["model"])


def write_yaml(folder, text):
    (folder / "model").mkdir()
    (folder / "model" / "least.yaml").write_text(text)
