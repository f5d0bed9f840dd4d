"""Rotation, mirror images and colour jitter against torchvision's own functions with the same numbers, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as v1

from fedsparse.data.augment import augment

ALMOST_1 = math.nextafter(1, 0)
NAMES = {"rotate": 15.0, "hflip": 0.5, "vflip": 0.25, "jitter": 0.5}


def pixels_of(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def uniforms_of(n, numbers, seed=1):
    return torch.rand(n, numbers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pil(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def as_tensor(image):
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 20)])
def test_rotation_is_torchvisions_at_the_drawn_angle(dtype, shape):
    x, uniforms = pixels_of(8, *shape).to(dtype), uniforms_of(8, 1)
    out = augment({"rotate": 40})(x, uniforms)
    assert out.dtype == dtype
    for image, turned, (u,) in zip(x, out, uniforms.tolist(), strict=True):
        assert torch.equal(turned, v1.rotate(image, -40 + 80 * u))
    assert torch.equal(augment({"rotate": 40})(x, torch.full((8, 1), 0.5, dtype=torch.float64)), x)


def test_a_quarter_turn_by_hand():
    x = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    assert augment({"rotate": 180})(x, torch.tensor([[0.75]])).tolist() == [[[[2, 4], [1, 3]]]]  # 90, counter-clockwise


@pytest.mark.parametrize(("name", "flip"), [("hflip", v1.hflip), ("vflip", v1.vflip)])
def test_mirror_images_below_the_probability(name, flip):
    x = pixels_of(5, 3, 6, 4)
    numbers = torch.tensor([[0.0], [0.29], [0.3], [0.8], [ALMOST_1]], dtype=torch.float64)
    out = augment({name: 0.3})(x, numbers)
    wanted = [flip(image) if i < 2 else image for i, image in enumerate(x)]
    assert torch.equal(out, torch.stack(wanted))
    assert torch.equal(augment({name: 1})(x, numbers), flip(x))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_jitter_is_torchvisions_at_the_drawn_factors(channels, strength):
    x, uniforms = pixels_of(12, channels, 9, 7), uniforms_of(12, 3)
    out = augment({"jitter": strength})(x, uniforms)
    low, high = max(0.0, 1 - strength), 1 + strength
    for image, changed, (a, b, first) in zip(x, out, uniforms.tolist(), strict=True):
        steps = [(v1.adjust_brightness, low + a * (high - low)), (v1.adjust_contrast, low + b * (high - low))]
        wanted, painted = image, pil(image)
        for adjust, factor in steps if first < 0.5 else steps[::-1]:
            wanted, painted = adjust(wanted, factor), adjust(painted, factor)
        # grey is rounded down in the one and not in the other, and PIL rounds at its own places
        assert (changed.int() - wanted.int()).abs().max() <= 1
        assert (changed.int() - as_tensor(painted).int()).abs().max() <= 3


def test_jitter_by_hand():
    x = torch.tensor([[[[100, 200]]]], dtype=torch.uint8)
    jitter = augment({"jitter": 0.5})  # factors of 0.5 to 1.5
    half = torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64)
    assert jitter(x, half).tolist() == [[[[50, 100]]]]
    flat = torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64)
    assert jitter(x, flat).tolist() == [[[[125, 175]]]]  # half of the way to the mean, 150
    both = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.9]], dtype=torch.float64)
    # brightness 1.5 first: 150, 255; their mean 202.5, half of the way. Contrast first: 125, 175, then 1.5
    assert jitter(x.expand(2, 1, 1, 2), both).tolist() == [[[[176, 228]]], [[[187, 255]]]]


def test_a_chain_is_one_after_the_other_whatever_the_cohort_and_the_order_typed():
    x, uniforms = pixels_of(10, 3, 12, 12), uniforms_of(10, 6)
    typed = dict(reversed(NAMES.items()))
    whole = augment(typed)
    assert whole.numbers == 6
    out = whole(x, uniforms)
    for i in range(10):
        image, row = x[i : i + 1], uniforms[i : i + 1]
        for name, part in zip(NAMES, row.split([1, 1, 1, 3], 1), strict=True):
            image = augment({name: NAMES[name]})(image, part)
        assert torch.equal(out[i], image[0])
    assert torch.equal(x, pixels_of(10, 3, 12, 12))
    assert whole(x[:0], uniforms[:0]).shape == (0, 3, 12, 12)


def test_what_is_null_is_not_done():
    assert augment({"rotate": None, "hflip": 0.5}).numbers == 1
    assert augment({}) is None
    assert augment({"jitter": None}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur": 1}, "data.augment has 'blur'; choose among rotate, hflip, vflip, jitter"),
        ({"rotate": 181}, "data.augment.rotate is 181; give degrees above 0 and at most 180"),
        ({"hflip": 1.5}, "data.augment.hflip is 1.5; give a probability"),
        ({"vflip": 0}, "data.augment.vflip is 0"),
        ({"vflip": True}, "data.augment.vflip is True"),
        ({"jitter": math.inf}, "data.augment.jitter is inf"),
        ({"jitter": "much"}, "data.augment.jitter is 'much'"),
        (["hflip"], r"data.augment is \['hflip'\]; choose one of none"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        augment(options)
    assert "\n" not in str(error.value)


def test_jitter_needs_pixels():
    for x in (torch.zeros(1, 3, 2, 2), pixels_of(1, 4, 2, 2)):
        with pytest.raises(ValueError, match=r"data\.augment\.jitter needs pixels"):
            augment({"jitter": 0.5})(x, uniforms_of(1, 3))


def test_a_run_with_a_list_of_changes_does_not_depend_on_the_cohort(run_in):
    options = ["data.augment={rotate: 15, hflip: 0.5, vflip: 0.5}", "federation.rounds=2"]
    one, five = (run_in(f"k{k}", *options, f"federation.cohort={k}")[0] for k in (1, 5))
    plain = run_in("plain", "federation.rounds=2", "federation.cohort=5")[0]
    assert one["test/loss"] == pytest.approx(five["test/loss"], rel=1e-4)
    assert abs(plain["test/loss"] - five["test/loss"]) > 1e-3
    with pytest.raises(ValueError, match=r"data\.augment\.jitter needs pixels"):
        run_in("jitter", "data.augment={jitter: 0.5}")
