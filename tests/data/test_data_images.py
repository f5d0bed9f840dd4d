"""What a network takes, and augmentation: against torchvision and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from fedsparse.data.augment import OPERATIONS, CropFlip, RandAugment, augment
from fedsparse.data.datasets import Dataset, Split, arrays
from fedsparse.data.images import Inputs, inputs_for

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO = {"input_size": (3, 224, 224), "mean": MEAN, "std": STD, "interpolation": "bicubic", "fixed_input_size": True}


def pixels_of(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def floats_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def dataset_of(x, **constants):
    split = Split(x, torch.zeros(len(x), dtype=torch.int64))
    return Dataset(split, split, split, classes=2, name="toy", **constants)


def one_line(error):
    return "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [48, 20])
def test_pixels_agree_with_torchvision_one_image_at_a_time(lead, mode, size):
    x = pixels_of(*lead, 3, 32, 32)
    out = Inputs(size, 3, MEAN, STD, mode)(x)
    steps = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((size, size), InterpolationMode(mode), antialias=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    wanted = torch.stack([steps(image) for image in x.reshape(-1, 3, 32, 32)]).reshape(*lead, 3, size, size)
    assert out.shape == wanted.shape
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_resize_is_that_of_pillow_but_for_its_rounding():
    x = pixels_of(1, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3) // 2 + 64
    out = Inputs(size=56)(x)[0] * 255
    pillow = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((56, 56), Image.Resampling.BICUBIC)
    # pillow rounds along each side: 0.5 after the second, and 0.5 before it, times the sizes of its weights (1.25)
    assert np.abs(out.permute(1, 2, 0).numpy() - np.asarray(pillow)).max() < 1.13


def test_grey_is_repeated_and_normalised_channel_by_channel():
    x = pixels_of(2, 1, 6, 6)
    out = Inputs(channels=3, mean=MEAN, std=STD)(x)
    assert out.shape == (2, 3, 6, 6)
    for c in range(3):
        torch.testing.assert_close(out[:, c], (x[:, 0].double() / 255 - MEAN[c]).div(STD[c]).float())
    own = Inputs(channels=3, mean=(0.25,), std=(0.5,))(x)
    assert torch.equal(own[:, 0], own[:, 2])
    torch.testing.assert_close(own[:, 1], (x[:, 0].float() / 255 - 0.25) / 0.5)


def test_one_channel_takes_the_average_of_three_constants():
    out = Inputs(mean=(0.1, 0.2, 0.6), std=(0.2, 0.2, 0.5))(pixels_of(2, 1, 6, 6))
    assert out.shape == (2, 1, 6, 6)
    torch.testing.assert_close(out, (pixels_of(2, 1, 6, 6).float() / 255 - 0.3) / 0.3)


@pytest.mark.parametrize("x", [floats_of(2, 3, 5, 4), pixels_of(2, 3, 5, 4)], ids=["floats", "pixels"])
def test_the_channels_of_a_batch_lie_last_and_those_of_stacked_clients_do_not(x):
    plain, last = Inputs()(x), Inputs(channels_last=True)(x)
    assert last.stride() == (60, 1, 12, 3)
    assert torch.equal(plain, last)
    assert Inputs(channels_last=True)(x[None]).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_left_alone(dtype):
    x = floats_of(2, 1, 5, 4).to(dtype)
    assert Inputs()(x) is x
    assert Inputs(mean=(0.5,), std=(0.1,))(x) is x
    assert Inputs(channels=1)(x) is x
    square = floats_of(2, 1, 5, 5)
    assert Inputs(size=5)(square) is square
    assert torch.equal(Inputs(channels=3)(x)[:, 2:], x)
    assert Inputs(size=9)(x).shape == (2, 1, 9, 9)


def test_pixels_are_not_written_to():
    x = pixels_of(2, 3, 8, 8)
    before = x.clone()
    Inputs(16, 3, MEAN, STD)(x)
    assert torch.equal(x, before)
    assert torch.equal(Inputs()(x), x / 255)


def test_inputs_refuse():
    with pytest.raises(
        ValueError, match="interpolation is 'lanczos'; it must be bicubic, bilinear or nearest"
    ) as error:
        Inputs(interpolation="lanczos")
    assert one_line(error)
    with pytest.raises(ValueError, match="mean has 3 numbers and std 0"):
        Inputs(mean=MEAN)
    with pytest.raises(ValueError, match="model takes images of 1 channels and data has 3") as error:
        Inputs(channels=1)(pixels_of(2, 3, 4, 4))
    assert one_line(error)


@pytest.mark.parametrize(
    ("x", "wanted", "expected"),
    [
        (pixels_of(2, 3, 32, 32), DINO, Inputs(224, 3, MEAN, STD)),
        (pixels_of(2, 1, 28, 28), DINO, Inputs(224, 3, MEAN, STD)),
        (pixels_of(2, 3, 32, 32), None, Inputs(None, None, (0.5,), (0.25,))),
        (pixels_of(2, 3, 32, 32), {"input_size": (3, 40, 40)}, Inputs(40, 3, (0.5,), (0.25,))),
        (pixels_of(2, 3, 32, 32), {**DINO, "interpolation": "bilinear"}, Inputs(224, 3, MEAN, STD, "bilinear")),
        (floats_of(2, 1, 8, 8), DINO, Inputs(224, 3)),
        (floats_of(2, 1, 8, 8), None, Inputs()),
        (floats_of(2, 1, 8, 8), {}, Inputs()),
    ],
)
def test_inputs_for(x, wanted, expected):
    assert inputs_for(dataset_of(x, mean=(0.5,), std=(0.25,)), wanted) == expected


def test_inputs_for_refuses():
    with pytest.raises(ValueError, match="model takes images of 1 channels and data has 3"):
        inputs_for(dataset_of(pixels_of(2, 3, 8, 8)), {**DINO, "input_size": (1, 28, 28)})
    with pytest.raises(ValueError, match="224 x 112; only square"):
        inputs_for(dataset_of(pixels_of(2, 3, 8, 8)), {**DINO, "input_size": (3, 224, 112)})


def test_arrays_of_bytes_stay_pixels(tmp_path):
    x = pixels_of(4, 3, 5, 5).numpy()
    for part, kind in (("train", np.uint8), ("val", np.uint8), ("test", np.uint8)):
        np.savez(tmp_path / f"{part}.npz", x=x.astype(kind), y=np.array([0, 1, 0, 1]))
    dataset = arrays(tmp_path)
    assert dataset.train.x.dtype == torch.uint8
    assert np.array_equal(dataset.train.x.numpy(), x)
    assert inputs_for(dataset, None)(dataset.val.x).max() <= 1
    np.savez(tmp_path / "val.npz", x=x.astype(np.float32), y=np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"differ in type: train torch.uint8, val torch.float32") as error:
        arrays(tmp_path)
    assert one_line(error)


# ------------------------------------------------------------------------------------------------------- crop and flip


def crop_flip_by_loops(x, uniforms):
    """Every pixel on its own: where it comes from, and black outside."""
    n, channels, height, width = x.shape
    pad, out = max(1, round(height / 8)), torch.zeros_like(x)
    for i in range(n):
        top, left = (math.floor(u * (2 * pad + 1)) - pad for u in uniforms[i, :2].tolist())
        for row in range(height):
            for column in range(width):
                r, c = row + top, (width - 1 - column if uniforms[i, 2] < 0.5 else column) + left
                if 0 <= r < height and 0 <= c < width:
                    out[i, :, row, column] = x[i, :, r, c]
    return out


ALMOST_1 = math.nextafter(1, 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 4),
    st.sampled_from([1, 3]),
    st.integers(1, 17),
    st.integers(1, 12),
    st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.bfloat16]),
    st.data(),
)
def test_crop_flip_is_the_loop(n, channels, height, width, dtype, data):
    x = pixels_of(n, channels, height, width).to(dtype)
    numbers = st.one_of(st.sampled_from([0.0, 0.5, ALMOST_1]), st.floats(0, 1, exclude_max=True))
    drawn = data.draw(st.lists(numbers, min_size=3 * n, max_size=3 * n))
    uniforms = torch.tensor(drawn, dtype=torch.float64).reshape(n, 3)
    out = CropFlip()(x, uniforms)
    assert out.dtype == dtype
    assert torch.equal(out, crop_flip_by_loops(x, uniforms))


def test_crop_flip_on_images_of_32_pads_by_4_and_reaches_every_place():
    x = pixels_of(1, 3, 32, 32).expand(81 * 2, 3, 32, 32)
    places = [((i + 0.5) / 9, (j + 0.5) / 9, f) for i in range(9) for j in range(9) for f in (0.2, 0.7)]
    out = CropFlip()(x, torch.tensor(places, dtype=torch.float64))
    padded = v2.functional.pad(x[0], [4, 4, 4, 4])
    crops = [v2.functional.crop(padded, i, j, 32, 32) for i in range(9) for j in range(9)]
    wanted = [image for crop in crops for image in (v2.functional.horizontal_flip(crop), crop)]
    assert torch.equal(out, torch.stack(wanted))


# -------------------------------------------------------------------------------------------------------- randaugment


SPACE = v2.RandAugment._AUGMENTATION_SPACE


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [32, 28, 50])
@pytest.mark.parametrize("number", range(14))
def test_operations_are_those_of_torchvision_on_one_image(number, side, channels):
    x = pixels_of(3, channels, side, side)
    x[0] //= 2  # room for autocontrast
    name, (magnitudes, signed) = list(SPACE.items())[number]
    magnitude = magnitudes(31, side, side)
    magnitude = 0.0 if magnitude is None else float(magnitude[9])
    oracle = v2.RandAugment(num_ops=2, magnitude=9)
    for sign in (1, -1):
        wanted = [
            oracle._apply_image_or_video_transform(
                image, name, magnitude * (sign if signed else 1), InterpolationMode.NEAREST, {}
            )
            for image in x
        ]
        assert torch.equal(OPERATIONS[number](x, sign), torch.stack(wanted))


def test_there_are_as_many_operations():
    assert len(OPERATIONS) == len(SPACE) == 14


def test_randaugment_is_one_sample_at_a_time_whatever_the_cohort():
    x = pixels_of(60, 3, 32, 32)
    uniforms = torch.rand(60, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = RandAugment()(x, uniforms)
    assert whole.dtype == torch.uint8
    for i in range(60):
        image = CropFlip()(x[i : i + 1], uniforms[i : i + 1])
        for choice, sign in uniforms[i, 3:].reshape(2, 2).tolist():
            image = OPERATIONS[int(choice * 14)](image, -1 if sign < 0.5 else 1)
        assert torch.equal(whole[i], image[0])
    assert torch.equal(x, pixels_of(60, 3, 32, 32))


def test_randaugment_extremes_and_no_samples():
    x = pixels_of(2, 1, 28, 28)
    for value in (0.0, ALMOST_1):
        assert RandAugment()(x, torch.full((2, 7), value, dtype=torch.float64)).shape == x.shape
    assert RandAugment()(x[:0], torch.zeros(0, 7, dtype=torch.float64)).shape == (0, 1, 28, 28)


def test_randaugment_needs_pixels():
    for x in (floats_of(2, 3, 8, 8), pixels_of(2, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"data\.augment=randaugment needs pixels") as error:
            RandAugment()(x, torch.zeros(2, 7, dtype=torch.float64))
        assert one_line(error)


def test_augment_by_name():
    assert augment("none") is None
    assert augment("crop_flip").numbers == 3
    assert augment("randaugment").numbers == 7
    with pytest.raises(ValueError, match=r"data\.augment is 'mixup'; choose one of none, crop_flip, randaugment"):
        augment("mixup")
