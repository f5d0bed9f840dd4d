"""Files of the public image data sets' real layout, of a few images that a model can learn."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CHANGED = "ignore:not the published checksum:UserWarning"  # what loading such files warns of


def images_of(labels, shape, rng):
    """Pixels of a class's own pattern, in blocks of a quarter of the side, under noise: uint8 (N, *shape)."""
    channels, height, width = shape
    patterns = rng.integers(40, 216, (1 + max(labels), channels, 4, 4))
    blocks = patterns.repeat(-(-height // 4), 2).repeat(-(-width // 4), 3)[:, :, :height, :width]
    return np.clip(blocks[labels] + rng.normal(0, 20, (len(labels), *shape)), 0, 255).astype(np.uint8)


def labels_of(n, classes, rng):
    return rng.permutation(np.arange(n) % classes).tolist()


def cut(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


def write_pickle(path, held, text=str):
    """As Python 2 wrote them (text=str: keys as text under latin-1), or with keys of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {key if text is str else key.encode(): value for key, value in held.items()}
    path.write_bytes(pickle.dumps(named, protocol=2))


def write_cifar100(root, train=1000, test=200, classes=100, seed=0, text=str):
    """Write ``cifar-100-python`` with so many images: train, test and meta; returns its folder."""
    rng, folder = np.random.default_rng(seed), Path(root) / "cifar-100-python"
    fine = [*labels_of(train, classes, rng), *labels_of(test, classes, rng)]
    pixels = images_of(fine, (3, 32, 32), rng).reshape(len(fine), -1)
    for name, part in (("train", slice(0, train)), ("test", slice(train, None))):
        held = {
            "filenames": [f"image_s_{i:06}.png" for i in range(len(fine[part]))],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": fine[part],
            "coarse_labels": [label // 5 for label in fine[part]],
            "data": pixels[part],
        }
        write_pickle(folder / name, held, text)
    names = {"fine_label_names": [f"kind_{i}" for i in range(classes)], "coarse_label_names": ["all"]}
    write_pickle(folder / "meta", names, text)
    return folder


def write_cifar10(root, per_batch=20, test=30, seed=0):
    """Write ``cifar-10-batches-py``: five batches to train, one to test, and batches.meta; returns its folder."""
    rng, folder = np.random.default_rng(seed), Path(root) / "cifar-10-batches-py"
    sizes = {**{f"data_batch_{i}": per_batch for i in range(1, 6)}, "test_batch": test}
    labels = [label for n in sizes.values() for label in labels_of(n, 10, rng)]
    pixels = images_of(labels, (3, 32, 32), rng).reshape(len(labels), -1)
    parts = zip(sizes, cut(pixels, list(sizes.values())), cut(np.array(labels), list(sizes.values())), strict=True)
    for name, data, y in parts:
        held = {"batch_label": name, "labels": y.tolist(), "data": data, "filenames": [f"{name}_{i}" for i in y]}
        write_pickle(folder / name, held)
    write_pickle(folder / "batches.meta", {"label_names": list("abcdefghij"), "num_vis": 3072})
    return folder


def idx(array):
    """The bytes of MNIST's format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(root, name="MNIST", train=100, test=30, packed=True, seed=0):
    """Write ``<name>/raw``: images and labels, to train and to test; returns its folder."""
    rng, folder = np.random.default_rng(seed), Path(root) / name / "raw"
    folder.mkdir(parents=True)
    labels = np.array([*labels_of(train, 10, rng), *labels_of(test, 10, rng)])
    pixels = images_of(labels, (1, 28, 28), rng)[:, 0]
    for part, where in (("train", slice(0, train)), ("t10k", slice(train, None))):
        for kind, array in (("images-idx3", pixels[where]), ("labels-idx1", labels[where])):
            content, path = idx(array), folder / f"{part}-{kind}-ubyte"
            path.with_name(path.name + ".gz" if packed else path.name).write_bytes(
                gzip.compress(content) if packed else content
            )
    return folder


def write_folder(root, counts, suffix=".png", seed=0):
    """Write images of several sizes and modes, so many in each class folder."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (int(rng.integers(9, 30)), int(rng.integers(9, 30)))
            image = rng.integers(0, 256, shape if i % 3 == 1 else (*shape, 3 + i % 2), dtype=np.uint8)
            if image.ndim == 3:
                image[:, :, 3:] = 255  # opaque: what is transparent, torchvision makes black
            Image.fromarray(image).convert("RGB" if suffix == ".jpg" else None).save(root / name / f"{i:02}{suffix}")
