"""Landscapes of many runs: which are asked for, what is written, and what a run that fails does to the others."""

from __future__ import annotations

import json

import pytest

from fedsparse import run
from fedsparse.landscape.options import Options
from fedsparse.studies import landscapes

pytestmark = pytest.mark.slow

SMALL = [
    "model=mlp", "logger=csv", "pictures=false", "mask_rule=dense", "head.init=random", "federation.rounds=3",
    "federation.local_steps=2", "model.hidden=8",
]  # fmt: skip
THREE = [*SMALL, "federation.num_clients=3", "federation.clients_per_round=1.0"]
ONE = [*SMALL, "federation.num_clients=1", "federation.clients_per_round=1"]
QUICK = ["--grid", "3", "--samples", "20"]


def made(folder, *options):
    run([*options, f"hydra.run.dir={folder}"])
    return folder


def figures(folder, name="landscape"):
    return json.loads((folder / name / "landscape.json").read_text())


def test_every_round_of_every_run_is_drawn_and_surfaces_after_the_last(tmp_path, capsys):
    federated = made(tmp_path / "runs" / "iid", *THREE, "trajectory=global")
    central = made(tmp_path / "runs" / "central", *ONE, "trajectory=global")
    capsys.readouterr()
    landscapes.main([str(tmp_path / "runs"), "--rounds", "3", "1", *QUICK])
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["rounds 1 3"] * 2
    for folder, models in ((federated, {"global", "client 0", "client 1"}), (central, {"global"})):
        for number, name in ((1, "landscape/round_1"), (3, "landscape")):
            found = figures(folder, name)
            assert found["round"] == number
            assert set(found["models"]["models"]) == models
            assert {"curvature", "sharpness"} <= set(found)
            assert ("lines test" in found) == (folder == federated)
            assert ("surface test" in found) == (number == 3)
            assert len(list((folder / name).glob("surface_*.npz"))) == 2 * (number == 3)
        first = json.loads((folder / "summary.json").read_text())
        assert figures(folder)["models"]["models"]["global"]["test"]["accuracy"] == pytest.approx(
            first["test/acc"],
            abs=0.35,  # on 20 of the samples
        )


def test_a_run_that_fails_is_a_line_and_the_others_go_on(tmp_path, capsys):
    """Without its trajectory a run has its last round alone."""
    bare = made(tmp_path / "runs" / "a", *THREE)
    kept = made(tmp_path / "runs" / "b", *THREE, "trajectory=global")
    (tmp_path / "runs" / "c" / ".hydra").mkdir(parents=True)
    (tmp_path / "runs" / "c" / ".hydra" / "config.yaml").write_text("federation: {rounds: 3}")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1 landscapes failed, see above") as end:
        landscapes.main([str(tmp_path / "runs"), "--rounds", "1", "3", *QUICK])
    assert isinstance(end.value.code, str)  # which Python prints, with exit code 1
    out, errors = capsys.readouterr()
    (line,) = [line for line in errors.splitlines() if line.startswith("fedsparse: ")]
    assert "a, round 1: " in line
    assert "trajectory=global" in line
    assert [line.split(": ")[1] for line in out.splitlines()] == ["rounds 3", "rounds 1 3", "c"]
    assert "left out: c: " in out
    assert not (bare / "landscape" / "round_1" / "landscape.json").exists()
    assert figures(bare)["round"] == figures(kept)["round"] == 3


def test_what_is_asked_of_a_run(tmp_path):
    class Run:
        summary, config = {"rounds": 25}, {"federation.num_clients": "10"}

    both = Options(grid=11, models=["global", 0, 1], sharpness=True, surface=False)
    found = {each.round: each for each in landscapes.asked(Run, [25, 1, 0, 25])}
    assert list(found) == [0, 1, 25]
    assert found[0].models == ["global"]  # nobody has trained
    assert vars(found[1]) == {**vars(both), "round": 1}
    assert vars(found[25]) == {**vars(both), "round": 25, "surface": True}
    (alone,) = landscapes.asked(Run, None, grid=5, samples=9)
    assert (alone.round, alone.surface, alone.grid, alone.samples) == (25, True, 5, 9)


@pytest.mark.soak
@pytest.mark.slow  # it starts processes
def test_several_at_the_same_time_draw_the_same(tmp_path):
    for name in ("one", "two"):
        for seed in (0, 1):
            made(tmp_path / name / str(seed), *THREE, f"seed={seed}")
    landscapes.main([str(tmp_path / "one"), *QUICK])
    landscapes.main([str(tmp_path / "two"), *QUICK, "--jobs", "2"])
    for seed in "01":
        one, two = (figures(tmp_path / name / seed) for name in ("one", "two"))
        assert one["curvature"] == two["curvature"]
        assert one["models"]["models"] == two["models"]["models"]


@pytest.mark.parametrize(
    ("typed", "line"), [(["--grid", "2"], "grid is 2"), (["--rounds", "-1"], "round is -1"), ([], "no finished run")]
)
def test_bad_input_is_one_line(tmp_path, typed, line):
    folder = made(tmp_path / "runs", *ONE) if typed else tmp_path
    with pytest.raises(SystemExit, match=f"fedsparse: .*{line}"):
        landscapes.main([str(folder), *typed])
