"""One's own folder of images: which files are read, as what; torchvision reads them beside."""

from __future__ import annotations

import shutil

import pytest
import torch
from image_files import write_folder
from torchvision import datasets as tvd
from torchvision.transforms import v2

from fedsparse.data.folder import imagefolder


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_images_are_those_of_torchvision(tmp_path, suffix):
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        write_folder(tmp_path / part, {"cat": count, "ant": count}, suffix)
    dataset = imagefolder(tmp_path, size=12)
    bicubic = v2.InterpolationMode.BICUBIC
    steps = v2.Compose([v2.Resize(12, bicubic), v2.CenterCrop(12), v2.PILToTensor()])
    for part, split in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        oracle = tvd.ImageFolder(tmp_path / part, transform=steps)
        assert torch.equal(split.x, torch.stack([x for x, _ in oracle]))
        assert split.y.tolist() == oracle.targets
    assert dataset.train.x.dtype == torch.uint8
    assert dataset.classes == 2


def test_missing_parts_are_held_out(tmp_path):
    write_folder(tmp_path / "all", {"a": 20, "b": 20})
    sizes = [len(s.y) for s in (lambda d: (d.train, d.val, d.test))(imagefolder(tmp_path / "all", 8))]
    assert sizes == [28, 4, 8]
    shutil.copytree(tmp_path / "all", tmp_path / "two" / "train")
    write_folder(tmp_path / "two" / "val", {"b": 3}, seed=1)
    two = imagefolder(tmp_path / "two", 8)
    assert [len(s.y) for s in (two.train, two.val, two.test)] == [32, 3, 8]
    assert two.val.y.tolist() == [1, 1, 1]  # though "b" is the first folder there
    every = imagefolder(tmp_path / "all", 8)
    oracle = tvd.ImageFolder(tmp_path / "all", transform=v2.Compose([v2.Resize(8, v2.InterpolationMode.BICUBIC)]))
    pieces = torch.cat([every.train.y, every.val.y, every.test.y])
    assert sorted(pieces.tolist()) == oracle.targets


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, {"bus": 20, "train": 20})
    assert imagefolder(tmp_path, 8).classes == 2


def test_folder_errors_name_the_file_or_the_key(tmp_path):
    def refused(text, **options):
        with pytest.raises(ValueError, match=text) as error:
            imagefolder(tmp_path / "mine", **{"size": 8} | options)
        assert one_line(error)

    refused(r"data\.root=.*mine is no folder")
    (tmp_path / "mine").mkdir()
    refused(r"data\.root: .*mine has no folder in it")
    write_folder(tmp_path / "mine", {"a": 20, "b": 20})
    refused(r"data\.size is 0", size=0)
    refused(r"data\.test_fraction=1.5", test_fraction=1.5)
    refused(r"data\.val_fraction=0\.01", val_fraction=0.01)
    (tmp_path / "mine" / "c").mkdir()
    refused(r"mine/c has no image in it")
    (tmp_path / "mine" / "c").rmdir()
    whole = (tmp_path / "mine" / "a" / "03.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "mine" / "a" / "03.png").write_bytes(content)
        refused(r"a/03\.png cannot be read as an image .*repair or remove it")
    (tmp_path / "mine" / "a" / "03.png").write_bytes(whole)
    shutil.move(tmp_path / "mine", tmp_path / "train")
    shutil.move(tmp_path / "train", tmp_path / "mine" / "train")
    write_folder(tmp_path / "mine" / "test", {"b": 2, "z": 2})
    refused(r"mine/test has the class z")
    with pytest.raises(ValueError, match=r"data\.root=null"):
        imagefolder(None)


# ----------------------------------------------------------------------------------------- what people mean by a folder


def parts_of(root):
    dataset = imagefolder(root, 8)
    return [len(split.y) for split in (dataset.train, dataset.val, dataset.test)], dataset.classes


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("training", "validation", "testing"),
        ("TRAINING", "dev", "eval"),
        ("train/train", "val/val", "evaluation/test"),
    ],
)
def test_parts_are_found_by_the_words_that_people_use(tmp_path, caplog, train, val, test):
    for part, count in ((train, 6), (val, 2), (test, 3)):
        write_folder(tmp_path / part, {"cat": count, "ant": count})
    caplog.set_level("INFO", "fedsparse")
    assert parts_of(tmp_path) == ([12, 4, 6], 2)
    assert caplog.messages == [
        f"images: train 12 from {tmp_path / train}, val 4 from {tmp_path / val}, test 6 from {tmp_path / test}; "
        "2 classes: ant, cat"
    ]


def test_a_part_without_a_folder_is_cut_from_train_and_the_log_says_so(tmp_path, caplog):
    write_folder(tmp_path / "Train", {"cat": 20, "ant": 20})
    write_folder(tmp_path / "Test", {"cat": 3, "ant": 3})
    caplog.set_level("INFO", "fedsparse")
    assert parts_of(tmp_path) == ([36, 4, 6], 2)
    assert "val 4 from those to train" in caplog.text


def test_what_programs_leave_behind_is_no_class_and_no_image(tmp_path):
    """A notebook's checkpoints, and what a Mac, Windows and a NAS put beside images."""
    write_folder(tmp_path / "train", {"cat": 20, "ant": 20})
    write_folder(tmp_path / "train" / "cat", {".ipynb_checkpoints": 2, "@eaDir": 2})
    write_folder(tmp_path, {".ipynb_checkpoints": 2, "__MACOSX": 2})
    write_folder(tmp_path / "train", {".ipynb_checkpoints": 2, "__MACOSX": 2})
    for name in (".DS_Store", "Thumbs.db", "._00.png", "notes.txt"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"no image")
    assert parts_of(tmp_path) == ([28, 4, 8], 2)
    shutil.move(tmp_path / "train" / "cat", tmp_path / "cat")
    shutil.move(tmp_path / "train" / "ant", tmp_path / "ant")
    shutil.rmtree(tmp_path / "train")
    assert parts_of(tmp_path) == ([28, 4, 8], 2)


def test_images_at_any_depth_count_once_in_torchvisions_order(tmp_path):
    write_folder(tmp_path / "all" / "a", {"x": 8, "x-1": 8, ".": 4})
    write_folder(tmp_path / "all", {"b": 20})
    whole = imagefolder(tmp_path / "all", 8, val_fraction=0.2, test_fraction=0.2, stream=True)
    oracle = [path for path, _ in tvd.ImageFolder(tmp_path / "all").samples]
    found = [whole.train.x.paths, whole.val.x.paths, whole.test.x.paths]
    assert sorted(sum(found, []), key=oracle.index) == oracle
    assert all(paths == sorted(paths, key=oracle.index) for paths in found)
    (tmp_path / "all" / "a" / "back").symlink_to("..", target_is_directory=True)
    with pytest.raises(ValueError, match=r"a/back.* is a link to a folder whose images count already"):
        imagefolder(tmp_path / "all", 8)


def test_what_can_be_read_in_two_ways_is_refused(tmp_path):
    def refused(text):
        with pytest.raises(ValueError, match=text) as error:
            imagefolder(tmp_path, 8)
        assert one_line(error)

    write_folder(tmp_path / "train", {"cat": 20, "ant": 20})
    for other, says in (
        ("Training", "has both Training and train; leave one of them"),
        ("bird", "has bird with images beside train"),
        ("archive/test", "has archive with images beside train"),
    ):
        write_folder(tmp_path / other, {"cat": 2})
        refused(says)
        shutil.rmtree(tmp_path / other.split("/")[0])
    for name in ("val", "valid"):
        write_folder(tmp_path / name, {"cat": 2})
    refused("has both val and valid")
    shutil.rmtree(tmp_path / "valid")
    write_folder(tmp_path, {"test": 2})  # images without classes, as competitions hand them out
    refused("has test with images beside train")
    shutil.rmtree(tmp_path / "test")
    write_folder(tmp_path / "test", {"cat": 2, "bird": 2})
    refused("test has the class bird, which has no folder among those to train")
    shutil.rmtree(tmp_path / "train")
    refused("has test but no train")


def test_other_folders_without_images_are_let_be(tmp_path):
    write_folder(tmp_path / "train", {"cat": 20, "ant": 20})
    (tmp_path / "labels" / "old").mkdir(parents=True)
    (tmp_path / "labels" / "a.txt").write_text("cat")
    assert parts_of(tmp_path)[1] == 2
