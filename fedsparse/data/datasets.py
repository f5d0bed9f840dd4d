"""Named data sets as tensors: a training, a validation and a test split.

Shapes: ``N`` samples, ``C`` channels, ``H`` x ``W`` pixels, ``L`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.targets import IGNORED, count
from fedsparse.data.checks import checked_positive
from fedsparse.data.files import checked_file, checked_root, reason_of
from fedsparse.data.samples import Mapped, Samples, as_tensor, read_npy

# Mean and standard deviation of all pixels of scikit-learn's digits (values 0 to 16). Constants, so that neither
# split nor seed changes the inputs; the glyphs of pre-training are scaled by them too.
DIGITS_MEAN = 4.8842
DIGITS_STD = 6.0168
DIGITS_SPLIT = (0.15, 0.2, 0)  # validation, test, seed: the split that is kept in digits_split.npy

PARTS = ("train", "val", "test")
MOST_CLASSES = 1_000_000  # a head has an output for each


@dataclass(frozen=True)
class Split:
    """Samples and their labels.

    Attributes:
        x: images (N, C, H, W), float as the model takes them, or uint8 pixels of 0 to 255, which ``Inputs`` prepares; a
            tensor, or samples on the disk that give tensors when indexed. Or texts: int32 (N, L), token ids, padded
            with the tokenizer's id of padding.
        y: int64 (N,), labels from 0 on. Or, of texts, int64 (N, L): the token that is to follow each place, and
            ``core.targets.IGNORED`` where none counts.
        users: (N,), author or owner of each sample; None if unknown.

    """

    x: Tensor | Samples
    y: Tensor
    users: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Class of each sample (N,); 0 of all where targets are sequences, which have no class."""
        return self.y.cpu().numpy() if self.y.ndim == 1 else np.zeros(len(self.y), dtype=np.int64)

    @property
    def held(self) -> Tensor:
        """``x`` as one tensor in memory."""
        return self.x if isinstance(self.x, Tensor) else self.x[torch.arange(len(self.x))]


@dataclass(frozen=True)
class Dataset:
    """The three splits of a data set, checked on construction.

    Attributes:
        train: the training split, partitioned over the clients.
        val: the server's validation split.
        test: the test split.
        classes: number of classes, or of words that may follow; labels are 0 to classes - 1.
        name: of the data set, for messages.
        mean: of each channel, of pixels scaled to [0, 1]; used if the model defines none.
        std: standard deviations, likewise.
        fingerprint: identifies the loaded data, if it depends on more than the name; the run records it.
        own: number of clients' own samples at the end of the test split, taken from the training split; figures of the
            test split exclude them.
        vocabulary: number of characters, of texts as characters; 0: tokens are of the model's tokenizer.
        departments: department of each user of the training split, by the users' sorted names, as
            ``partition=natural`` numbers its clients; empty if there are none.
        department_names: names of the departments.
        truth: cluster of each department, where it is known which of them are alike; empty if it is not.
        template: form of the questions that a model answers (``sequences.prompts``); empty if there are none.

    Raises:
        ValueError: there are less than two classes or more than ``MOST_CLASSES``, a split is empty or not of such
            tensors, its x, y and users differ in length, a label is out of range, a sequence has no target, a pixel is
            NaN or infinite, the splits' images differ in shape or type, or not every user has a department.

    """

    train: Split
    val: Split
    test: Split
    classes: int
    name: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    fingerprint: str = ""
    own: int = 0
    vocabulary: int = 0
    departments: tuple[int, ...] = ()
    department_names: tuple[str, ...] = ()
    truth: tuple[int, ...] = ()
    template: str = ""

    @property
    def common_test(self) -> Split:
        """The test split without clients' own samples."""
        test, common = self.test, len(self.test.y) - self.own
        if not self.own:
            return test
        return Split(test.held[:common], test.y[:common], None if test.users is None else test.users[:common])

    @property
    def tokens(self) -> bool:
        """Whether the samples are texts, as sequences of tokens, and not images."""
        return len(self.train.x.shape) == 2

    @property
    def sequences(self) -> bool:
        """Whether the targets are sequences, one for each place of a text, and not one class for each sample."""
        return self.train.y.ndim == 2

    def departments_of(self, parts: Sequence[np.ndarray]) -> tuple[int, ...]:
        """Look up the department of each client, of whose samples all are of one.

        Args:
            parts: sample indices of every client.

        Returns:
            Departments from 0 on; empty if there are none, or a client holds samples of several, or none at all.

        """
        if not self.departments:
            return ()
        assert self.train.users is not None  # checked on construction
        of_sample = np.array(self.departments)[np.unique(self.train.users, return_inverse=True)[1]]
        found = [np.unique(of_sample[part]).tolist() for part in parts]
        return tuple(of[0] for of in found) if all(len(of) == 1 for of in found) else ()

    def __post_init__(self) -> None:
        for part in PARTS:
            check_tensors(getattr(self, part), f"the {part} split of {self.name}")
            check_split(getattr(self, part), self.classes, f"the {part} split of {self.name}")
        check_shapes({part: tuple(getattr(self, part).x.shape[1:]) for part in PARTS}, self.name)
        check_types({part: getattr(self, part).x.dtype for part in PARTS}, self.name)
        check_targets({part: getattr(self, part).y.ndim for part in PARTS}, self.name)
        check_departments(self)
        if not 2 <= self.classes <= MOST_CLASSES:
            wanted = f"it needs 2 to {MOST_CLASSES}, with labels numbered from 0 on"
            raise ValueError(f"{self.name} has {self.classes} {'class' if self.classes == 1 else 'classes'}; {wanted}")


def check_tensors(split: Any, where: str) -> None:
    """Refuse a split of anything but images or tokens with labels; ``where`` names it in the message.

    Raises:
        ValueError: one line with its type and the valid one.

    """
    if not isinstance(split, Split):
        raise ValueError(f"{where} is a {type(split).__name__}; it needs to be fedsparse.data.datasets.Split(x, y)")
    x, y = split.x, split.y
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.ndim not in (1, 2):
        raise ValueError(f"{where}: y is {_kind(y)}; it needs to be a tensor of labels, int64 (N,)")
    if not isinstance(x, Tensor | Mapped) and not callable(getattr(x, "stamp", None)):
        raise ValueError(f"{where}: x is {_kind(x)}; it needs to be a tensor, or what fedsparse.data.samples describes")
    images = len(x.shape) == 4 and (x.dtype.is_floating_point or x.dtype == torch.uint8) and 0 not in x.shape[1:]
    if not images and not (len(x.shape) == 2 and x.dtype in (torch.int32, torch.int64)):
        raise ValueError(f"{where}: x is {_kind(x)}; it needs images (N, C, H, W) of uint8 or floats, or tokens (N, L)")
    if y.ndim == 2 and tuple(y.shape[1:]) != tuple(x.shape[1:]):
        raise ValueError(
            f"{where}: y is {_kind(y)} and x is {_kind(x)}; it needs labels (N,), or a target for each token (N, L)"
        )


def _kind(held: Any) -> str:
    shape = f" {tuple(held.shape)}" if hasattr(held, "shape") else ""
    return f"{getattr(held, 'dtype', type(held).__name__)}{shape}"


def check_split(split: Split, classes: int, where: str) -> None:
    """Refuse a split that cannot be trained on; ``where`` names it in the message.

    Raises:
        ValueError: it is empty, lengths differ, or a label or pixel is invalid; one line.

    """
    x, y, users = split.x, split.y, split.users
    if len(y) == 0:
        raise ValueError(f"{where} is empty; it needs at least one sample")
    if len(x) != len(y) or (users is not None and len(users) != len(y)):
        counts = f"{len(x)} images and {len(y)} labels" + ("" if users is None else f" and {len(users)} users")
        raise ValueError(f"{where} has {counts}; it needs as many of each")
    none = (y == IGNORED) & (y.ndim == 2)
    if strange := sorted(set(y[((y < 0) | (y >= classes)) & ~none].tolist())):
        raise ValueError(f"{where} has labels {_some(strange)}; with {classes} classes they are 0 to {classes - 1}")
    if empty := int((count(y) == 0).sum()) if y.ndim == 2 else 0:
        raise ValueError(f"{where} has {empty} of {len(y)} sequences without a target; leave them out")
    here = isinstance(x, Tensor) and x.is_floating_point()  # samples on the disk are checked when gathered
    bad = int((~torch.as_tensor(x).isfinite()).flatten(1).any(1).sum()) if here else 0
    if bad:
        raise ValueError(f"{where} has NaN or infinite pixels in {bad} of {len(x)} images; remove or repair them")


def check_shapes(shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """Refuse splits whose images (C, H, W) differ in shape.

    Raises:
        ValueError: lists the shapes.

    """
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise ValueError(f"the images of {name} differ in shape: {listed}; all splits need the same (C, H, W)")


def check_types(types: dict[str, torch.dtype], name: str) -> None:
    """Refuse splits whose samples differ in dtype.

    Raises:
        ValueError: lists the types.

    """
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{part} {dtype}" for part, dtype in types.items())
        raise ValueError(f"the images of {name} differ in type: {listed}; all splits need the same")


def check_targets(dimensions: dict[str, int], name: str) -> None:
    """Refuse splits of which some have classes and some sequences as targets.

    Raises:
        ValueError: one line.

    """
    if len(set(dimensions.values())) > 1:
        kinds = ", ".join(f"{part} {'classes' if n == 1 else 'sequences'}" for part, n in dimensions.items())
        raise ValueError(f"the targets of {name} differ in kind: {kinds}; all splits need the same")


def check_departments(dataset: Dataset) -> None:
    """Refuse departments that are not one for each user of the training split, or have no name or cluster.

    Raises:
        ValueError: one line with the numbers.

    """
    given, names, truth = dataset.departments, dataset.department_names, dataset.truth
    if not given and not names and not truth:
        return
    users = 0 if dataset.train.users is None else len(np.unique(dataset.train.users))
    if len(given) != users or set(given) != set(range(len(names))) or len(truth) not in (0, len(names)):
        raise ValueError(
            f"{dataset.name} has {len(given)} departments of {users} users, {len(names)} names and {len(truth)} "
            "clusters; it needs one department for each user, from 0 without a gap, and a name and a cluster for each"
        )


def digits(val_fraction: float = 0.15, test_fraction: float = 0.2, split_seed: int = 0) -> Dataset:
    """Load scikit-learn's handwritten digits: 1,797 images of 1 x 8 x 8, ten classes, standardised.

    The images are the test part of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998): 32 x 32
    bitmaps, black pixels counted in blocks of 4 x 4. The split is stratified and depends on ``split_seed`` only, not
    on the seed of a run: by default 1,167 samples for training, 270 for validation, 360 for testing.

    Args:
        val_fraction: share of the validation split.
        test_fraction: share of the test split.
        split_seed: seed of the split.

    Raises:
        ValueError: a fraction leaves a split without an image of every class.

    """
    images, labels = read_digits()
    x, y = scale_pixels(images[:, None]), torch.from_numpy(labels)
    usual = (val_fraction, test_fraction, split_seed) == DIGITS_SPLIT
    indices = _usual_split() if usual else stratified(labels, val_fraction, test_fraction, split_seed)
    train, val, test = (Split(x[part], y[part]) for part in indices)
    return Dataset(train, val, test, classes=10, name="digits")


def _usual_split() -> tuple[np.ndarray, ...]:
    """Read what ``stratified`` makes of the digits by default, which needs scikit-learn, and a second to import it."""
    with as_file(files("fedsparse.data") / "digits_split.npy") as path:
        part_of = np.load(path, allow_pickle=False)  # of each image: 0 train, 1 validation, 2 test
    return tuple(np.flatnonzero(part_of == part) for part in range(len(PARTS)))


def read_digits(file: str = "datasets/data/digits.csv.gz") -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's digits: pixels of 0 to 16, float64 (1797, 8, 8), and labels, int64 (1797,).

    Args:
        file: its place in scikit-learn. It is read there, since ``load_digits`` imports scipy and pandas, for most of a
            second; where a release has no such file, ``load_digits`` is called.

    """
    package = find_spec("sklearn")
    path = Path(package.origin).parent / file if package and package.origin else None
    if path is not None and path.is_file():
        rows = np.loadtxt(path, delimiter=",")
        return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    raw = load_digits()
    return raw.images, raw.target.astype(np.int64)


def scale_pixels(pixels: np.ndarray) -> Tensor:
    """Standardise pixels of 0 to 16 by the digits' fixed constants: (*,) -> float32 (*,)."""
    return torch.from_numpy(((pixels - DIGITS_MEAN) / DIGITS_STD).astype(np.float32))


def stratified(y: np.ndarray, val_fraction: float, test_fraction: float, seed: int) -> tuple[np.ndarray, ...]:
    """Split the indices of labels (N,) into sorted train, validation and test indices with the same class mix.

    Sizes are ``ceil(fraction * N)``; the rest is for training.

    Raises:
        ValueError: a fraction is not between 0 and 1, or a part would have fewer samples than classes.

    """
    sizes = [int(np.ceil(fraction * len(y))) for fraction in (val_fraction, test_fraction)]
    smallest = len(np.unique(y))
    if min(*sizes, len(y) - sum(sizes)) < smallest:
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} of {len(y)} samples leave a split with "
            f"fewer than {smallest}, one for each class; choose fractions of at least {smallest / len(y):.3f} that "
            "leave as much to train"
        )
    from sklearn.model_selection import train_test_split  # here, as above

    rest, test = train_test_split(np.arange(len(y)), test_size=sizes[1], random_state=seed, stratify=y)
    train, val = train_test_split(rest, test_size=sizes[0], random_state=seed, stratify=y[rest])
    return np.sort(train), np.sort(val), np.sort(test)


def hold_out(y: np.ndarray, fraction: float, seed: int, key: str = "data.val_fraction") -> tuple[np.ndarray, ...]:
    """Split the indices of labels (N,) in two, sorted, with the same class mix: ``ceil(fraction * N)`` are held out.

    Args:
        y: labels.
        fraction: share that is held out.
        seed: of the split.
        key: of the fraction, for messages.

    Returns:
        The rest, and those held out.

    Raises:
        ValueError: the fraction is not between 0 and 1, or a part would have fewer samples than classes, or a class
            has only one sample.

    """
    checked_positive(key, fraction)
    counts = np.unique(y, return_counts=True)[1]
    if min(counts, default=0) < 2:
        raise ValueError(f"{key}={fraction} of {len(y)} samples: a class has only one; it needs two, one for each part")
    if not len(counts) <= fraction * len(y) <= len(y) - len(counts):
        least = len(counts) / len(y)
        raise ValueError(
            f"{key}={fraction} of {len(y)} samples leaves a part with fewer than {len(counts)}, one for each class; "
            f"choose a fraction of {least:.3f} to {1 - least:.3f}"
        )
    from sklearn.model_selection import train_test_split  # here, as above

    rest, held = train_test_split(np.arange(len(y)), test_size=fraction, random_state=seed, stratify=y)
    return np.sort(rest), np.sort(held)


def arrays(root: str | Path | None, stream: bool = False) -> Dataset:
    """Load a user's images: a folder with ``train.npz``, ``val.npz`` and ``test.npz``.

    Each file holds ``x`` (N, C, H, W), or (N, H, W) for one channel, ``y`` (N,) of whole numbers from 0 on, and
    optionally ``users`` (N,) for ``partition=natural``. An ``x`` of uint8 is kept as pixels of 0 to 255, which are
    scaled, resized and normalised for the model. Other values are not changed: standardise them beforehand. The number
    of classes is the highest label of all splits plus one. Instead of ``train.npz`` there may be ``train_x.npy``,
    ``train_y.npy`` and ``train_users.npy``, one array each; likewise for ``val`` and ``test``.

    Args:
        root: the folder.
        stream: whether the images of ``.npy`` files stay on the disk, memory-mapped; ``.npz`` files cannot be mapped
            and are read into memory.

    Raises:
        ValueError: the folder, a file or an array is missing or invalid; one line with the expected files.

    """
    place = checked_root(root, "a folder with train.npz, val.npz and test.npz")
    train, val, test = (load_split(place / f"{part}.npz", stream=stream) for part in PARTS)
    classes = 1 + max(int(split.y.max()) if len(split.y) else 0 for split in (train, val, test))
    return Dataset(train, val, test, classes=classes, name=str(root))


def load_split(path: Path, *, stream: bool = False) -> Split:
    """Read an npz file of ``x``, ``y`` and optionally ``users``, or the npy files beside it; pickles are refused.

    Raises:
        ValueError: the file is missing, unreadable, lacks an array, or holds one of a wrong shape or type.

    """
    files = npy_files(path)
    arrays = {key: read_npy(file, mapped=stream and key == "x") for key, file in files.items()} or _read(path)
    if lacking := [key for key in ("x", "y") if key not in arrays]:
        raise ValueError(f"{path} lacks {' and '.join(lacking)}; it needs x (N, C, H, W) and y (N,)")
    x, y = arrays["x"], arrays["y"]
    if x.ndim not in (3, 4) or x.dtype.kind not in "fiub":
        raise ValueError(f"{path}: x is {x.dtype} {x.shape}; it needs to be numbers of shape (N, C, H, W) or (N, H, W)")
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(f"{path}: y is {y.dtype} {y.shape}; it needs to be whole numbers of shape (N,)")
    if (y >= MOST_CLASSES).any():
        raise ValueError(f"{path}: y goes up to {y.max()}; it needs the numbers of the classes, from 0 on")
    images = Mapped(files["x"]) if isinstance(x, np.memmap) else as_tensor(x if x.ndim == 4 else x[:, None])
    return Split(images, torch.from_numpy(y.astype(np.int64)), arrays.get("users"))


def npy_files(path: Path) -> dict[str, Path]:
    """Find the files ``train_x.npy``, ``train_y.npy`` and ``train_users.npy`` that replace ``train.npz``, if any.

    Raises:
        ValueError: both forms exist, neither, or one is incomplete.

    """
    places = {key: path.with_name(f"{path.stem}_{key}.npy") for key in ("x", "y", "users")}
    found = {key: file for key, file in places.items() if file.exists()}
    if found and path.exists():
        raise ValueError(
            f"{path} and {min(found.values())} are both there; remove one, so that it is clear what counts"
        )
    if found and (lacking := [str(places[key]) for key in ("x", "y") if key not in found]):
        raise ValueError(f"{' and '.join(lacking)} is missing beside {min(found.values()).name}")
    if not found and not path.exists():
        raise ValueError(
            f"{path} is missing; put an npz file there with x (N, C, H, W) and y (N,), or {places['x'].name} and "
            f"{places['y'].name} beside it"
        )
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        # opened here, because np.load leaves a damaged file open
        with checked_file(path).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array without a name")
            return {key: arrays[key] for key in ("x", "y", "users") if key in arrays}
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{path} cannot be read as an npz file of plain arrays ({reason_of(error)})") from error


def _some(labels: list[int], limit: int = 5) -> str:
    return ", ".join(map(str, labels[:limit])) + (" and more" if len(labels) > limit else "")
