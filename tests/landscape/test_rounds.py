"""Landscapes of earlier rounds, and the pictures of all rounds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from landscapes import FEW, by_hand, drawn
from PIL import Image
from safetensors import safe_open

from fedsparse.data.datasets import digits
from fedsparse.landscape.drawing import landscape
from fedsparse.landscape.film import film
from fedsparse.landscape.options import Options
from fedsparse.landscape.points import Here
from fedsparse.landscape.scene import Scene
from fedsparse.landscape.store import Store


def frames(folder, *typed):
    scene = Scene.of(folder, Options.read(["gif=true", "grid=5", *typed]))
    return film(scene, Store(folder), Here(scene))


def test_an_earlier_round_has_a_folder_of_its_own(folder):
    drawn(folder, "round=1", "data=[test]")
    (name,) = [path.name for path in (folder / "landscape").iterdir()]
    assert name == "round_1"
    figures = json.loads((folder / "landscape" / name / "landscape.json").read_text())
    assert figures["round"] == 1
    drawn(folder, "round=2", "data=[test]")
    assert json.loads((folder / "landscape" / "landscape.json").read_text())["round"] == 2


def test_each_frame_is_the_landscape_of_its_round(folder):
    found = frames(folder, "data=[test]")["test"]
    assert [frame.round for frame in found] == [1, 2]
    for frame in found:
        drawn(folder, f"round={frame.round}", "grid=5", "data=[test]")
        place = folder / "landscape" / ("round_1" if frame.round == 1 else ".")
        with np.load(place / "surface_test.npz") as file:
            for name in ("a", "b", "loss", "accuracy", "coordinates", "own_loss"):
                np.testing.assert_array_equal(vars(frame.surface)[name], file[name])


def test_without_clients_the_start_is_a_frame_too(folder):
    found = frames(folder, "data=[test]", "models=[global]")["test"]
    with safe_open(folder / "trajectory.safetensors", "pt") as file:
        rows = file.get_tensor("rows")
    test = digits().test
    assert [frame.round for frame in found] == [0, 1, 2]
    for frame, row in zip(found, rows, strict=True):
        assert frame.surface.loss[2, 2] == pytest.approx(by_hand(row, test.x, test.y)[0], rel=1e-5)


def test_frames_through_models_have_one_pair_of_axes_around_all(folder):
    found = frames(folder, "plane=models", "data=[test]")["test"]
    axes = [(frame.surface.a.tolist(), frame.surface.b.tolist()) for frame in found]
    assert axes[0] == axes[1]
    assert axes[0][0] == axes[0][1]
    for frame in found:
        assert frame.surface.coordinates.min() > axes[0][0][0]
        assert frame.surface.coordinates.max() < axes[0][0][-1]


def test_the_path_of_a_trajectory_grows(folder):
    found = frames(folder, "plane=pca", "data=[test]")["test"]
    assert [len(frame.surface.models) for frame in found] == [1, 2, 3]
    assert all(np.array_equal(frame.surface.loss, found[0].surface.loss) for frame in found)


def test_the_animation_has_a_picture_a_round(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "run")
    _, written = landscape(folder, Options.read(["gif=true", "data=[test]", *FEW.values()]))
    path = folder / "landscape" / "rounds_test.gif"
    assert path in written
    with Image.open(path) as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 2)
        sizes = []
        for place in range(2):
            picture.seek(place)
            sizes.append(np.asarray(picture.convert("RGB")))
    assert sizes[0].shape == sizes[1].shape
    assert not np.array_equal(*sizes)


def test_rounds_that_were_not_kept_cannot_be_drawn(folder):
    with pytest.raises(ValueError, match="gif=true draws surfaces; it does not go with surface=false"):
        Options.read(["gif=true", "surface=false"])
    (folder / "trajectory.safetensors").unlink()
    with pytest.raises(
        ValueError, match="gif=true draws the rounds that trajectory=global keeps, two or more; .* has 0"
    ):
        drawn(folder, "gif=true")
