"""The public image data sets and one's own folders, from files of their real layout; torchvision reads them beside."""

from __future__ import annotations

import collections
import gzip
import hashlib
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from composed import composed
from hydra.utils import instantiate
from image_files import CHANGED, idx, write_cifar10, write_cifar100, write_folder, write_mnist, write_pickle
from torchvision import datasets as tvd

from fedsparse.data import pixels
from fedsparse.data.datasets import hold_out
from fedsparse.job.keys import target_of

LOADERS = {
    "cifar10": (write_cifar10, tvd.CIFAR10),
    "cifar100": (lambda root: write_cifar100(root, 90, 30, classes=6), tvd.CIFAR100),
    "mnist": (write_mnist, tvd.MNIST),
    "fashion_mnist": (lambda root: write_mnist(root, "FashionMNIST", packed=False), tvd.FashionMNIST),
}
pytestmark = pytest.mark.filterwarnings(CHANGED)


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def one_line(error):
    return "\n" not in str(error.value)


def counted(x, y):
    """The images as bytes with their labels, in no order."""
    return collections.Counter((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))


def as_published(monkeypatch, published, folder):
    """Give torchvision's class the checksums of the files that the test made, so that it reads them."""
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(published, part, [[name, md5(folder / name)] for name, _ in getattr(published, part)])
    meta = published.meta | {"md5": md5(folder / published.meta["filename"])}
    monkeypatch.setattr(published, "meta", meta)


def read_by_torchvision(published, folder, root, train):
    """Images (N, C, H, W) and labels, as torchvision reads them."""
    if published in (tvd.MNIST, tvd.FashionMNIST):
        for path in folder.glob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        held = published(root, train=train)
        return held.data.numpy()[:, None], held.targets.numpy()
    held = published(root, train=train)
    return held.data.transpose(0, 3, 1, 2), np.array(held.targets)


# -------------------------------------------------------------------------------------------- the public data sets


@pytest.mark.parametrize("name", LOADERS)
def test_agrees_with_torchvision(tmp_path, monkeypatch, name):
    write, published = LOADERS[name]
    folder = write(tmp_path)
    dataset = getattr(pixels, name)(tmp_path, val_fraction=0.1)
    if hasattr(published, "train_list"):
        as_published(monkeypatch, published, folder)
    x, y = read_by_torchvision(published, folder, tmp_path, train=True)
    ours = [(split.x.numpy(), split.y.numpy()) for split in (dataset.train, dataset.val)]
    assert counted(*ours[0]) + counted(*ours[1]) == counted(x, y)
    x, y = read_by_torchvision(published, folder, tmp_path, train=False)
    assert np.array_equal(dataset.test.x.numpy(), x)
    assert np.array_equal(dataset.test.y.numpy(), y)
    assert dataset.test.x.dtype == torch.uint8
    assert dataset.classes == 1 + y.max()


@pytest.mark.parametrize("name", LOADERS)
def test_validation_is_a_stratified_tenth_by_its_own_seed(tmp_path, name):
    LOADERS[name][0](tmp_path)
    load = getattr(pixels, name)
    dataset = load(tmp_path)
    classes, held = dataset.classes, len(dataset.train.y) + len(dataset.val.y)
    assert len(dataset.val.y) == -(-held // 10)
    assert np.ptp(np.bincount(dataset.val.y.numpy(), minlength=classes)) <= 1
    np.random.seed(7)  # noqa: NPY002
    assert torch.equal(load(tmp_path).val.x, dataset.val.x)
    assert not torch.equal(load(tmp_path, split_seed=1).val.x, dataset.val.x)
    assert len(load(tmp_path, val_fraction=0.3).val.y) == round(0.3 * held)


@pytest.mark.parametrize("name", [*LOADERS, "imagefolder"])
def test_yaml_names_root_split_and_augmentation(tmp_path, name):
    cfg = composed(f"data={name}", "model=conv")  # which takes images of any size
    if name == "imagefolder":
        write_folder(tmp_path, {"cat": 20, "dog": 20})
    else:
        assert cfg.data.root == "data"
        LOADERS[name][0](tmp_path)
    cfg.data.root = str(tmp_path)
    cfg.data.val_fraction = 0.25
    dataset = instantiate(target_of("data", cfg.data))
    assert len(dataset.val.y) / (len(dataset.val.y) + len(dataset.train.y)) == pytest.approx(0.25, abs=0.02)
    assert len(dataset.mean) == len(dataset.std) == dataset.train.x.shape[1]
    assert cfg.data.augment == "none"


# of the published training images, by anyone who averages them (three or four digits)
@pytest.mark.parametrize(
    ("published", "mean", "std"),
    [
        (tvd.CIFAR10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        (tvd.CIFAR100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
        (tvd.MNIST, (33.3,), (78.6,)),
        (tvd.FashionMNIST, (72.9,), (90.0,)),
    ],
)
def test_constants(published, mean, std):
    for ours, known in zip(pixels.MOMENTS[published], (mean, std), strict=True):
        assert np.allclose(np.array(ours) * 255, known, atol=0.06)


def test_a_class_too_small_to_hold_out_is_an_error():
    y = np.array([0] * 20 + [1] * 20)
    for fraction in (0.0, -0.1, 1.0, 0.99, 0.01, float("nan")):
        with pytest.raises(ValueError, match=r"data\.val_fraction") as error:
            hold_out(y, fraction, 0)
        assert one_line(error)
    with pytest.raises(ValueError, match="a class has only one"):
        hold_out(np.array([0, 0, 0, 1]), 0.5, 0)
    rest, held = hold_out(y, 0.1, 0)
    assert sorted([*rest, *held]) == list(range(40))
    assert (np.diff(rest) > 0).all()
    assert np.bincount(y[held]).tolist() == [2, 2]


# ------------------------------------------------------------------------------------------ missing, changed, foreign


def offline(monkeypatch, published, folder):
    """Addresses that are none: the download fails as it does without a network."""
    nowhere = folder.as_uri() + "/nowhere/"
    if hasattr(published, "url"):
        monkeypatch.setattr(published, "url", nowhere + published.filename)
    monkeypatch.setattr(published, "mirrors", [nowhere, nowhere + "else/"], raising=False)


@pytest.mark.parametrize(
    ("name", "published", "text"),
    [
        ("cifar10", tvd.CIFAR10, r"put cifar-10-python\.tar\.gz from file://.*/nowhere/ into"),
        ("cifar100", tvd.CIFAR100, r"put cifar-100-python\.tar\.gz from .*nowhere/ into .*data\.root"),
        (
            "mnist",
            tvd.MNIST,
            r"MNIST/raw lacks .* put train-images-.*, t10k-labels-.* from .*nowhere/ into",
        ),
        ("fashion_mnist", tvd.FashionMNIST, r"FashionMNIST/raw lacks .* put train-images-idx3-ubyte\.gz, "),
    ],
)
def test_without_a_network_says_what_to_put_where(tmp_path, monkeypatch, name, published, text):
    offline(monkeypatch, published, tmp_path)
    with pytest.raises(ValueError, match=text) as error:
        getattr(pixels, name)(tmp_path / "data")
    assert one_line(error)
    assert str(tmp_path / "data") in str(error.value)


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Address under which this machine serves the folder of the test, to itself."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_downloads_only_what_is_missing(tmp_path, monkeypatch, address):
    """The archive comes by torchvision's downloader, its checksum is held to, and present files need no network."""
    folder = write_cifar100(tmp_path / "made", 90, 30, classes=6)
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(tvd.CIFAR100, "url", f"{address}/{archive.name}")
    with pytest.raises(ValueError, match="downloading failed"):
        pixels.cifar100(tmp_path / "new")
    monkeypatch.setattr(tvd.CIFAR100, "tgz_md5", md5(archive))
    assert torch.equal(pixels.cifar100(tmp_path / "new").train.x, pixels.cifar100(tmp_path / "made").train.x)
    archive.unlink()
    assert len(pixels.cifar100(tmp_path / "new").test.y) == 30
    (tmp_path / "new" / "cifar-100-python" / "train").unlink()
    assert len(pixels.cifar100(tmp_path / "new").test.y) == 30  # the archive lies beside, as where a person put it


def test_mnist_downloads_from_the_first_mirror_that_has_it(tmp_path, monkeypatch, address):
    made = write_mnist(tmp_path / "made")
    resources = [(name, md5(made / name)) for name, _ in tvd.MNIST.resources]
    monkeypatch.setattr(tvd.MNIST, "resources", resources)
    monkeypatch.setattr(tvd.MNIST, "mirrors", [f"{address}/none/", f"{address}/made/MNIST/raw/"])
    assert torch.equal(pixels.mnist(tmp_path / "new").train.x, pixels.mnist(tmp_path / "made").train.x)


@pytest.mark.filterwarnings("error")
def test_changed_files_warn_in_one_line_and_load(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path)
    with pytest.warns(UserWarning, match="not the published checksum: .*data_batch_1, .*test_batch") as caught:
        assert len(pixels.cifar10(tmp_path).test.y) == 30
    assert len(caught) == 1
    as_published(monkeypatch, tvd.CIFAR10, folder)
    pixels.cifar10(tmp_path)  # no warning, or it would be an error here
    write_mnist(tmp_path)
    with pytest.warns(UserWarning, match=r"train-images-idx3-ubyte\.gz"):
        pixels.mnist(tmp_path)


@pytest.mark.parametrize("text", [str, bytes])
def test_keys_of_text_and_of_bytes_read_alike(tmp_path, text):
    write_cifar100(tmp_path, 90, 30, classes=6, text=text)
    assert np.bincount(pixels.cifar100(tmp_path).test.y).tolist() == [5] * 6


class Command:
    """What a malicious file would hold: to load it is to run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_file_runs_nothing(tmp_path):
    ran = tmp_path / "ran"
    folder = write_cifar100(tmp_path, 90, 30, classes=6)
    write_pickle(folder / "train", {"data": Command(ran)})
    with pytest.raises(ValueError, match=r"train cannot be read .* wants to load \w+\.system") as error:
        pixels.cifar100(tmp_path)
    assert one_line(error)
    assert not ran.exists()
    pickle.loads((folder / "train").read_bytes())  # noqa: S301
    assert ran.exists()  # the file was malicious indeed


def test_damaged_files_are_named(tmp_path):
    folder = write_cifar10(tmp_path)
    whole = (folder / "test_batch").read_bytes()
    for content in (b"", whole[:1000], b"no pickle at all\n\n", b"\x80\x02]q\x00."):
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match="test_batch") as error:
            pixels.cifar10(tmp_path)
        assert one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        gzip.compress(idx(np.zeros((2, 3, 3))))[:20],
        gzip.compress(idx(np.zeros((2, 3, 3)))[:-1]),
        gzip.compress(idx(np.zeros((2, 3)))),
        gzip.compress(b"\0\0\x0d" + idx(np.zeros((2, 3, 3)))[3:]),
    ],
    ids=["empty", "short", "cut", "one less", "flat", "floats"],  # packed content holds the time, which no name may
)
def test_damaged_idx_files_are_named(tmp_path, content):
    folder = write_mnist(tmp_path)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged or no IDX file") as error:
        pixels.mnist(tmp_path)
    assert one_line(error)


def test_halves_of_cifar10_share_no_image_and_are_all_of_it(tmp_path):
    write_cifar10(tmp_path, per_batch=40)

    def images(**options):
        data = pixels.cifar10(tmp_path, **options)
        both = torch.cat([data.train.x, data.val.x]), torch.cat([data.train.y, data.val.y])
        return collections.Counter((x.numpy().tobytes(), int(y)) for x, y in zip(*both, strict=True)), data

    (a, first), (b, _), (every, whole) = (images(part=part, val_fraction=0.2) for part in ("a", "b", "all"))
    assert len(a) == len(b) == 100
    assert a + b == every
    assert torch.equal(first.test.x, whole.test.x)
    classes = [collections.Counter(y for _, y in half) for half in (a, b)]
    assert all(abs(classes[0][y] - classes[1][y]) <= 1 for y in range(10))
    with pytest.raises(ValueError, match=r"data\.part is 'c'; it must be a, b or all"):
        pixels.cifar10(tmp_path, part="c")
