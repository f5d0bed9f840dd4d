"""Data sets larger than memory: streamed or not, the results are the same bits, and nothing is gathered in vain."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import images_of
from PIL import Image
from plain import plain_fedavg, replay
from small import Small, small_data, small_net, uneven_parts

from fedsparse import run
from fedsparse.data import folder as folders
from fedsparse.data import stream as streams
from fedsparse.data.datasets import Split, arrays
from fedsparse.data.folder import ImageFiles, imagefolder, read_image
from fedsparse.data.rounds import LocalWork
from fedsparse.data.samples import Mapped, stamp
from fedsparse.data.stream import CohortStream, gathered
from fedsparse.federation.exchange.ledger import Ledger
from fedsparse.job.assemble import assemble
from fedsparse.job.prepare import build_preparation
from fedsparse.job.resume import read_job
from fedsparse.preparation.cache import fingerprint
from fedsparse.simulation import tracking
from fedsparse.simulation.csv_logger import read_rows
from fedsparse.train import main

ROUNDS = 3
WORK = {"steps": LocalWork(8, 3, None), "epochs": LocalWork(8, None, 2)}


class Diary:
    """Lines that this process and its workers write down."""

    def __init__(self, path):
        self.path = path

    def __call__(self, *words):
        with self.path.open("a") as file:  # appended whole, whoever else writes
            file.write(" ".join(map(str, words)) + "\n")

    @property
    def lines(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


class OnDisk:
    """A tensor that looks like samples on the disk, and writes down what is gathered of it."""

    def __init__(self, x, diary):
        self.tensor, self.diary, self.shape, self.dtype = x, diary, x.shape, x.dtype

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        self.diary(os.getpid(), *index.flatten().tolist())
        return self.tensor[index]

    def stamp(self):
        return b""


def on_disk(dataset, tmp_path):
    """The same data set, and for train, val and test what was gathered."""
    diaries = {part: Diary(tmp_path / part) for part in ("train", "val", "test")}
    splits = {part: getattr(dataset, part) for part in diaries}
    return replace(dataset, **{p: Split(OnDisk(s.x, diaries[p]), s.y) for p, s in splits.items()}), diaries


@pytest.fixture(autouse=True)
def no_worker_stays():
    yield
    assert multiprocessing.active_children() == []


# ------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("work", list(WORK))
def test_three_streamed_rounds_equal_a_plain_loop(tmp_path, work, cohort, workers):
    """The contract of the federation; each sample of each cohort is gathered once, and each validation's once."""
    data = small_data()
    small = Small(small_net(), data, uneven_parts(), work=WORK[work], cohort=cohort, clip=0.5)
    small.dataset, diaries = on_disk(data, tmp_path)
    small.data = {"workers": workers, "eval_batch_size": 16}
    plan, start = small.plan, copy.deepcopy(small.net)
    plain, losses = plain_fedavg(
        start, data.train.x, data.train.y, replay(plan, ROUNDS), lr=small.lr, momentum=0.9, clip=0.5
    )
    small.fit(ROUNDS, tmp_path)
    torch.testing.assert_close(small.row, small.space.read(plain), rtol=0, atol=1e-9)
    assert small.rounds.loss == pytest.approx(losses[-1], abs=1e-9)
    seen = [[int(word) for word in line.split()] for line in diaries["train"].lines]
    wanted = [c.samples.flatten().tolist() for r in range(ROUNDS) for c in plan.cohorts(r)]
    assert sorted(line[1:] for line in seen) == sorted(wanted)
    assert len({pid for pid, *_ in seen} - {os.getpid()}) == workers
    for part in ("val", "test"):
        assert (str(os.getpid()) in {line.split()[0] for line in diaries[part].lines}) == (workers == 0)
        lines = sorted(line.split(maxsplit=1)[1] for line in diaries[part].lines)
        batches = [" ".join(map(str, range(a, min(a + 16, 30)))) for a in (0, 16)]
        assert lines == sorted(batches * ROUNDS)


@pytest.mark.parametrize("cohort", [1, 3])
def test_what_fits_in_memory_streams_from_there(tmp_path, cohort):
    memory, streamed = (
        Small(small_net(), small_data(), uneven_parts(), work=WORK["epochs"], cohort=cohort, data=data)
        for data in ({}, {"stream": True, "workers": 2})
    )
    fetched, fetch = [], streams.gathered
    patch = pytest.MonkeyPatch()
    patch.setattr(streams, "gathered", lambda *options: fetched.append(options) or fetch(*options))
    rows = [small.fit(ROUNDS, tmp_path).row for small in (memory, streamed)]
    patch.undo()
    assert torch.equal(*rows)
    assert len(fetched) == 1  # one stream for all rounds of one run, and none for the other


def write_photos(root, classes=3, each=16):
    """Class folders of small images."""
    labels = np.repeat(np.arange(classes), each).tolist()
    for i, (x, y) in enumerate(zip(images_of(labels, (3, 10, 13), np.random.default_rng(0)), labels, strict=True)):
        path = root / f"kind_{y}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.transpose(1, 2, 0)).save(path)
    return root


def write_arrays(root, dtype=np.float32, n=40):
    """Each split as train_x.npy, train_y.npy and so on."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for part in ("train", "val", "test"):
        y = rng.permutation(np.arange(n) % 3)
        np.save(
            root / f"{part}_x.npy", (images_of(y, (2, 6, 5), rng) / (1 if dtype == np.uint8 else 255)).astype(dtype)
        )
        np.save(root / f"{part}_y.npy", y)
    return root


QUICK = ["head.init=random", "mask_rule=random", "pictures=false", "data.batch_size=4"]
RAGGED = ["federation.num_clients=6", "federation.local_steps=null", "federation.local_epochs=1"]
RAGGED += ["partition=dirichlet", "federation.clients_per_round=5"]  # parts of many sizes
KINDS = {
    "imagefolder": ["data=imagefolder", "data.root=photos", "data.size=8", "data.augment=randaugment"],
    "arrays": ["data=arrays", "data.root=arrays", "data.augment=crop_flip"],
    "digits": ["data.augment=crop_flip"],
}


def sha(summary):
    return summary["global_sha256"]


@pytest.mark.parametrize(
    ("kind", "cohort", "workers"),
    [("imagefolder", 1, 2), ("imagefolder", 3, 0), ("arrays", 1, 0), ("arrays", 3, 2), ("digits", 1, 2)],
)
def test_a_streamed_run_ends_at_the_same_bits(tmp_path, run_in, kind, cohort, workers):
    write_photos(tmp_path / "photos")
    write_arrays(tmp_path / "arrays")
    options = [*KINDS[kind], *QUICK, *RAGGED, "federation.rounds=2", f"federation.cohort={cohort}"]
    memory, _ = run_in("memory", *options)
    streamed, _ = run_in("streamed", *options, "data.stream=true", f"data.workers={workers}")
    assert sha(streamed) == sha(memory)
    assert streamed["test/loss"] == memory["test/loss"]


def test_a_resumed_stream_goes_on_to_the_same_bits_and_decodes_what_it_needs(tmp_path, run_in, monkeypatch):
    """Also what comes before the first round: head and mask are prepared on streamed data."""
    write_photos(tmp_path / "photos")
    options = [*KINDS["imagefolder"], *RAGGED, "data.batch_size=4", "pictures=false", "calibration.batches=1"]
    options += ["federation.cohort=3"]  # so that some rows and steps are filled by nobody
    whole, _ = run_in("whole", *options, "federation.rounds=4")
    _, folder = run_in("stopped", *options, "federation.rounds=2", "data.stream=true")
    assembly, diary = assemble(read_job(folder, []).cfg), Diary(tmp_path / "decoded")
    monkeypatch.setattr(folders, "read_image", lambda path, size: diary(path) or read_image(path, size))
    assert sha(run([f"resume={folder}", "federation.rounds=4"])) == sha(whole)
    data, plan = assembly.problem.dataset, assembly.course.plan
    wanted = [path for split in (data.val, data.test) for path in split.x.paths] * 2
    for cohort in (*plan.cohorts(2), *plan.cohorts(3)):
        real = {
            i
            for row, _ in cohort.members
            for s, n in enumerate(cohort.count)
            for i in cohort.samples[row, s, : n[row]].tolist()
        }
        wanted += [data.train.x.paths[i] for i in real]
    first = [data.train.x.paths[0]]  # on which augmentation is tried
    assert sorted(diary.lines) == sorted(first + wanted)


# ---------------------------------------------------------------------------------------------- no more, and not sooner


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("cohort", [1, 5])
def test_so_many_cohorts_are_ahead_as_there_are_workers_over_the_end_of_a_round(cohort, workers):
    small = Small(small_net(), small_data(), uneven_parts(), cohort=cohort)
    stream = CohortStream(small.dataset.train.x, small.plan, ROUNDS, workers)
    every = [(c.round, c.clients) for r in range(ROUNDS) for c in small.plan.cohorts(r)]
    handed = []
    for number in range(ROUNDS):
        stream.round(number), stream.round(number + 1)  # iterators that nobody uses
        for item in stream.round(number):
            handed.append((item.round, item.clients))
            ahead = [(c.round, c.clients) for c in stream.waiting]
            assert ahead == every[len(handed) : len(handed) + workers]
            assert torch.equal(item.x, small.dataset.train.x[item.samples])
    assert handed == every
    stream.close()


def test_an_iterator_that_nobody_uses_starts_no_worker():
    small = Small(small_net(), small_data(), uneven_parts())
    stream = CohortStream(small.dataset.train.x, small.plan, ROUNDS, 2)
    stream.round(0)
    assert not stream.waiting
    assert multiprocessing.active_children() == []


def test_a_round_may_be_left_and_another_begun():
    small = Small(small_net(), small_data(), uneven_parts())
    stream = CohortStream(small.dataset.train.x, small.plan, ROUNDS, 1)
    next(stream.round(0))
    for number in (2, 0):
        cohorts = list(stream.round(number))
        assert [c.clients for c in cohorts] == [c.clients for c in small.plan.cohorts(number)]
        assert all(torch.equal(c.x, small.dataset.train.x[c.samples]) for c in cohorts)
    stream.close()


def test_the_training_set_is_not_moved(tmp_path):
    small = Small(small_net(), small_data(), uneven_parts(), data={"stream": True})
    data = small.fit(1, tmp_path).trainer.datamodule
    assert data.to("meta").x.device.type == "cpu"
    assert data.y.device.type == "meta"
    cohort = next(data.train_dataloader().stream.round(0)).to("meta")
    assert cohort.x.device.type == cohort.samples.device.type == "meta"


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(gathered(torch.arange(9), [np.arange(2)], workers=1))
    assert torch.equal(torch.rand(3), expected)


def test_a_mapped_file_is_read_where_it_is_asked_for(tmp_path):
    """Bytes allocated: opening 48 MB and gathering 6 of 4,000 images takes less than 1 MB; reading it all takes 48."""
    shape, rng = (4000, 3, 32, 32), np.random.default_rng(0)
    for part in ("train", "val", "test"):
        np.save(
            tmp_path / f"{part}_x.npy", np.zeros(shape, np.float32) if part == "train" else np.ones((5, *shape[1:]))
        )
        np.save(tmp_path / f"{part}_y.npy", np.arange(shape[0] if part == "train" else 5) % 3)
    index = torch.from_numpy(rng.integers(0, 4000, (1, 2, 3)))
    for stream, least, most in ((True, 0, 1e6), (False, 48e6, 1e9)):
        tracemalloc.start()
        x = arrays(tmp_path, stream=stream).train.x
        gathering = x[index]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert least < peak < most
        assert gathering.shape == (1, 2, 3, 3, 32, 32)


def test_an_image_is_decoded_once_however_often_an_index_names_it(tmp_path, monkeypatch):
    paths = sorted(map(str, write_photos(tmp_path).rglob("*.png")))
    read = []
    monkeypatch.setattr(folders, "read_image", lambda path, size: read.append(path) or read_image(path, size))
    index = torch.tensor([[[3, 0], [3, 7]], [[0, 3], [1, 1]]])
    x = ImageFiles(paths, 8)[index]
    assert read == [paths[i] for i in (3, 0, 7, 1)]
    assert torch.equal(x, torch.stack([read_image(path, 8) for path in paths])[index])


# ---------------------------------------------------------------------------------------------------- what is on disk


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, ">f4", np.int16])
@pytest.mark.parametrize("gray", [False, True])
def test_mapped_arrays_are_those_in_memory(tmp_path, dtype, gray):
    root = write_arrays(tmp_path / "a", np.dtype(dtype))
    np.save(root / "train_users.npy", np.arange(40) % 4)
    for part in ("train", "val", "test") if gray else ():
        np.save(root / f"{part}_x.npy", np.load(root / f"{part}_x.npy")[:, 0])
    memory, mapped = arrays(root), arrays(root, stream=True)
    index = torch.tensor([[5, 5, 0], [39, 1, 2]])
    for split, other in ((memory.train, mapped.train), (memory.test, mapped.test)):
        assert isinstance(other.x, Mapped)
        assert (tuple(other.x.shape), other.x.dtype, len(other.x)) == (tuple(split.x.shape), split.x.dtype, 40)
        for x in (other.x, pickle.loads(pickle.dumps(other.x))):  # noqa: S301
            assert torch.equal(x[index], split.x[index])
        assert torch.equal(other.y, split.y)
        assert torch.equal(other.held, split.x)
    assert mapped.train.users.tolist() == memory.train.users.tolist()
    assert len(pickle.dumps(mapped.train.x)) < 500


def damaged(path):
    path.write_bytes(path.read_bytes()[:300])


BAD = {
    "pixels that are not finite": (
        lambda root: np.save(root / "train_x.npy", np.full((40, 1, 2, 2), np.nan)),
        r"train_x\.npy has NaN or infinite pixels in image 3; remove or repair it",
    ),
    "half a file": (lambda root: damaged(root / "val_x.npy"), r"val_x\.npy cannot be read as an npy file"),
    "half the labels": (lambda root: damaged(root / "val_y.npy"), r"val_y\.npy cannot be read as an npy file"),
    "objects": (lambda root: np.save(root / "test_x.npy", np.array([None])), r"test_x\.npy cannot be read as an npy"),
    "no labels": (lambda root: (root / "val_y.npy").unlink(), r"val_y\.npy is missing beside val_x\.npy"),
    "nothing": (
        lambda root: [p.unlink() for p in root.glob("val_*")],
        r"val\.npz is missing; .*val_x\.npy and val_y\.npy",
    ),
    "both": (lambda root: np.savez(root / "val.npz", x=1), r"val\.npz and .*val_x\.npy are both there; remove one"),
    "other lengths": (lambda root: np.save(root / "val_y.npy", np.zeros(7, int)), "40 images and 7 labels"),
    "other shapes": (lambda root: np.save(root / "val_x.npy", np.zeros((40, 1, 2, 2))), "differ in shape"),
    "words": (lambda root: np.save(root / "val_x.npy", np.full((40, 1, 2), "a")), "needs to be numbers of shape"),
}


@pytest.mark.parametrize(("spoil", "says"), BAD.values(), ids=list(BAD))
def test_arrays_on_the_disk_that_are_refused(tmp_path, spoil, says):
    root = write_arrays(tmp_path / "a")
    for part in ("train", "val", "test"):
        np.save(root / f"{part}_x.npy", np.zeros((40, 1, 2, 2) if says.startswith("train") else (40, 2, 6, 5)))
    spoil(root)
    with pytest.raises(ValueError, match=says) as caught:
        list(gathered(arrays(root, stream=True).train.x, [np.array([7, 3])], workers=1))
    assert "\n" not in str(caught.value)


def test_a_stamp_tells_files_that_changed_and_not_where_they_lie(tmp_path):
    paths = sorted(write_photos(tmp_path / "here").rglob("*.png"))
    first = stamp(paths)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = sorted((tmp_path / "there").rglob("*.png"))
    assert stamp(moved) == first
    assert stamp(moved[1:]) != first
    assert stamp(moved[::-1]) != first
    moved[3].write_bytes(moved[3].read_bytes())
    assert stamp(moved) != first


def test_what_is_prepared_is_kept_for_the_files_it_was_prepared_on(tmp_path, run_in):
    photos = write_photos(tmp_path / "photos")
    _, folder = run_in("a", *KINDS["imagefolder"], *QUICK, "federation.rounds=1", "data.stream=true")
    cfg = read_job(folder, []).cfg

    def found():
        assembly = assemble(cfg)
        return fingerprint(build_preparation(assembly, assembly.module(), Ledger()), {})

    first = found()
    assert found() == first
    os.utime(next(photos.rglob("*.png")), ns=(1, 1))
    assert found() != first


# ---------------------------------------------------------------------------------------------------- workers that end


def test_a_damaged_image_ends_the_run_in_one_line_that_names_it(tmp_path, monkeypatch, capsys):
    """The command line, in this process."""
    photos = write_photos(tmp_path / "photos")
    options = [*KINDS["imagefolder"], *QUICK, "model=mlp", "logger=csv", "federation.rounds=4", "data.stream=true"]
    options[1] = f"data.root={photos}"
    folder = tmp_path / "a"
    run([*options, "federation.rounds=1", f"hydra.run.dir={folder}"])
    plan = assemble(read_job(folder, []).cfg).course.plan
    first, second = ({i for c in plan.cohorts(r) for i in c.samples.flatten().tolist()} for r in (0, 1))
    path = imagefolder(photos, 8, stream=True).train.x.paths[min(second - first - {0})]
    with open(path, "r+b") as file:
        file.truncate(60)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    capsys.readouterr()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["fedsparse.train", *options, f"hydra.run.dir={tmp_path / 'b'}"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"fedsparse: {path} cannot be read as an image (")
    assert said[-1].endswith("; repair or remove it")
    assert said[0].startswith("fedsparse: imagefolder, ")
    assert [line for line in said if not line.startswith("Error executing job")][1:-1] == [
        line for line in said if line.startswith("round 1/4")
    ]
    assert [row["round"] for row in read_rows(tmp_path / "b" / "metrics.csv")] == [1]


class Damaged(OnDisk):
    """Sample 5 cannot be read."""

    def __getitem__(self, index):
        if 5 in index:
            raise ValueError("sample 5 is damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_its_own_line_and_ends_the_workers(tmp_path, part, workers):
    small = Small(small_net(), small_data(), uneven_parts(), work=WORK["epochs"], count=7)
    small.data = {"workers": workers, "eval_batch_size": 16}
    split = getattr(small.dataset, part)
    bad = Split(Damaged(split.x, Diary(tmp_path / "x")), split.y)
    small.dataset = replace(small.dataset, **{part: bad})
    with pytest.raises(ValueError, match=r"^sample 5 is damaged$"):
        small.fit(1, tmp_path)
    assert multiprocessing.active_children() == []


def test_another_error_ends_the_workers_too(tmp_path):
    small = Small(small_net(), small_data(), uneven_parts(), data={"stream": True, "workers": 2})
    small.rounds.on_train_batch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        small.fit(1, tmp_path)
    assert multiprocessing.active_children() == []


def test_workers_outlive_the_signals_that_close_a_round_but_not_their_parent():
    assert set(streams.SIGNALS) == set(tracking.SIGNALS)
    x = torch.arange(10)
    items = gathered(x, [np.array([i]) for i in range(6)], workers=1)
    assert next(items) == 0
    (worker,) = multiprocessing.active_children()
    for number in streams.SIGNALS:
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {int(number)})"], check=True)
        assert next(items) > 0
    assert next(items) == 4
    assert worker.is_alive()
    worker.terminate()  # as DataLoader does with one that does not end by itself
    worker.join(30)
    assert not worker.is_alive()
    items.close()


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_streamed_run_closes_the_round(tmp_path):
    photos = write_photos(tmp_path / "photos")
    options = [*KINDS["imagefolder"], *QUICK, "model=mlp", "logger=csv", "federation.rounds=40"]
    options[1] = f"data.root={photos}"
    whole = run([*options, f"hydra.run.dir={tmp_path / 'whole'}"])
    command = [sys.executable, "-m", "fedsparse.train", *options, "data.stream=true"]
    process = subprocess.Popen(
        [*command, f"hydra.run.dir={tmp_path / 'a'}"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert any(line.startswith("round 2/") for line in process.stderr)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert 2 <= len(read_rows(tmp_path / "a" / "metrics.csv")) < 40
    assert sha(run([f"resume={tmp_path / 'a'}"])) == sha(whole)
