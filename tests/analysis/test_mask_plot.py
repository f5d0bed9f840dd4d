"""What the pictures of masks say, read back from their artists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fedsparse.analysis.mask_plot import mask_figure, overlap_figure
from fedsparse.masks import Mask


def marks(shape, number):
    flat = torch.zeros(shape, dtype=torch.bool).flatten()
    flat[:number] = True
    return flat.view(shape)


VIT = Mask(
    {
        "cls_token": marks((1, 4), 0),
        "blocks.0.attn.qkv.weight": marks((10, 20), 1),
        "blocks.0.mlp.fc1.bias": marks((10,), 10),
        "blocks.10.attn.qkv.weight": marks((10, 20), 100),
        "blocks.2.attn.qkv.weight": marks((10, 20), 199),
        "head.weight": marks((3, 4), 12),
    }
)


def panels(figure):
    """Labels and numbers of every heat map: (rows, columns, {(row, column): text})."""
    for axes in figure.axes[:-1]:
        texts = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
        yield [t.get_text() for t in axes.get_yticklabels()], [t.get_text() for t in axes.get_xticklabels()], texts


def test_kinds_by_blocks_and_the_tensors_outside_by_hand():
    blocks, others = panels(mask_figure(VIT, "a title"))
    assert blocks[:2] == (["attn.qkv.weight", "mlp.fc1.bias"], ["0", "2", "10", "all"])
    # all blocks: 300 of 600 and 10 of 10; a block without the tensor has no number
    assert blocks[2] == {(0, 0): "<1", (0, 1): ">99", (0, 2): "50", (0, 3): "50", (1, 0): "100", (1, 3): "100"}
    assert others == (["cls_token", "head.weight"], [""], {(0, 0): "0", (1, 0): "100"})


def test_the_cells_hold_the_densities():
    mesh = mask_figure(VIT).axes[0].collections[0]
    expected = [[1 / 200, 199 / 200, 1 / 2, 1 / 2], [1, np.nan, np.nan, 1]]
    np.testing.assert_allclose(np.ma.filled(mesh.get_array(), np.nan), expected)


def test_a_model_without_blocks_and_one_of_several_stages():
    (alone,) = panels(mask_figure(Mask({"hidden.weight": marks((2, 2), 1), "hidden.bias": marks((2,), 2)})))
    assert alone == (["hidden.weight", "hidden.bias"], [""], {(0, 0): "25", (1, 0): "100"})
    stages = {f"layer{i}.0.conv.weight": marks((4,), i) for i in (1, 2)}
    (staged,) = panels(mask_figure(Mask(stages)))
    assert staged[0] == ["layer1.*.conv.weight", "layer2.*.conv.weight"]
    (numbered,) = panels(mask_figure(Mask({"0.weight": marks((4,), 1), "2.weight": marks((4,), 2)})))
    assert numbered[:2] == (["weight"], ["0", "2", "all"])


def fits(figure):
    """Whether all words lie inside the canvas."""
    FigureCanvasAgg(figure).draw()
    canvas = figure.bbox
    words = [t for axes in figure.axes for t in (*axes.get_yticklabels(), *axes.get_xticklabels(), axes.yaxis.label)]
    words += [figure._suptitle] if figure._suptitle else []
    boxes = [t.get_window_extent() for t in words if t.get_text()]
    return all(canvas.x0 <= b.x0 and b.x1 <= canvas.x1 and canvas.y0 <= b.y0 and b.y1 <= canvas.y1 for b in boxes)


@pytest.mark.parametrize("depth", [0, 4, 12, 24])
def test_every_word_lies_inside_the_picture(depth, tmp_path):
    kinds = ["norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "mlp.fc1.weight"]
    tensors = {f"blocks.{i}.{kind}": marks((10,), i % 10) for i in range(depth) for kind in kinds}
    mask = Mask({"patch_embed.proj.weight": marks((10,), 1), **tensors, "head.bias": marks((3,), 3)})
    figure = mask_figure(mask, "mask rule lowest_magnitude, 20.3% of the weights train")
    assert fits(figure)
    figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


def test_an_empty_mask_gives_an_empty_picture():
    assert list(panels(mask_figure(Mask({}))))[0][2] == {}


@pytest.mark.parametrize("number", [1, 3, 16, 17, 40])
def test_overlaps_are_drawn_with_their_numbers_while_they_are_few(number):
    matrix = torch.from_numpy(np.random.default_rng([number]).random((number, number)))
    names = [f"highest_magnitude {i}" for i in range(number)]
    for given in (matrix, matrix.numpy()):
        figure = overlap_figure(names, given)
        axes = figure.axes[0]
        assert [t.get_text() for t in axes.get_yticklabels()] == names
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix)
        assert [t.get_text() for t in axes.texts] == ([f"{v:.2f}" for v in matrix.flatten()] if number <= 16 else [])
    assert fits(figure)
