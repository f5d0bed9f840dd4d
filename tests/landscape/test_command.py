"""The command on a finished run, against plain loops over rows; what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from landscapes import FEW, by_hand, drawn, global_row, net_of, surface
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedsparse import run
from fedsparse.data.datasets import digits
from fedsparse.landscape import figures as figures_of
from fedsparse.landscape import points, scene
from fedsparse.landscape.__main__ import main
from fedsparse.landscape.drawing import landscape
from fedsparse.landscape.options import Options
from fedsparse.landscape.replay import load, local_row
from fedsparse.landscape.scene import Scene
from fedsparse.models.vision import mlp

pytestmark = pytest.mark.slow  # the file takes half a minute


def rows_of(folder):
    return [global_row(folder), *(local_row(load(folder), client) for client in (0, 1))]


def test_the_plane_through_three_models_has_their_losses(folder):
    figures = drawn(folder, "plane=models", "range=[0,1]", "data=[test]")
    test, (first, second, third) = digits().test, rows_of(folder)
    way, other = (second - first).double(), (third - first).double()
    across = other - way * (way @ other) / (way @ way)
    across *= way.norm() / across.norm()
    found = surface(folder)
    np.testing.assert_array_equal(found["a"], [0, 0.5, 1])
    for i, a in enumerate(found["a"]):
        for j, b in enumerate(found["b"]):
            loss, accuracy = by_hand((first + a * way + b * across).float(), test.x, test.y)
            assert found["loss"][i, j] == pytest.approx(loss, rel=1e-5)
            assert found["accuracy"][i, j] == pytest.approx(accuracy, abs=2 / len(test.y))
    assert found["coordinates"][:2] == pytest.approx(np.array([[0, 0], [1, 0]]), abs=1e-6)
    wanted = [float(way @ other / way.norm()), float(other @ across / across.norm())]
    assert (found["coordinates"][2] * float(way.norm())).tolist() == pytest.approx(wanted, rel=1e-4)
    figures_of_models = (found[name] for name in ("own_loss", "own_accuracy", "distance"))
    for row, loss, accuracy, far in zip(rows_of(folder), *figures_of_models, strict=True):
        assert (loss, accuracy) == pytest.approx(by_hand(row, test.x, test.y), rel=1e-5)
        assert far < 1e-4 * float(way.norm())
    model = figures["surface test"]["models"]["client 0"]
    assert model["loss"] == found["own_loss"][1]
    assert model["coordinates"] == found["coordinates"][1].tolist()


def test_the_middle_of_a_random_plane_is_the_global_model(made, folder):
    drawn(folder, "data=[test,client:1,train]")
    problem = load(folder).assembly.problem
    part = torch.from_numpy(problem.parts[1])
    train = problem.dataset.train
    dealt = torch.from_numpy(np.concatenate(problem.parts))
    assert surface(folder)["accuracy"][1, 1] == pytest.approx(made[1]["test/acc"])
    for data, x, y in (("client_1", train.x[part], train.y[part]), ("train", train.x[dealt], train.y[dealt])):
        found = surface(folder, data)
        assert (found["loss"][1, 1], found["accuracy"][1, 1]) == pytest.approx(
            by_hand(global_row(folder), x, y), rel=1e-5
        )
        assert found["a"].tolist() == found["b"].tolist() == [-1, 0, 1]
        assert len(np.unique(found["loss"])) == 9


def test_another_seed_draws_other_directions_and_samples(folder):
    def losses(*typed):
        drawn(folder, "data=[test]", *typed)
        return surface(folder)["loss"]

    first, again = losses(), losses("samples=50")
    assert not np.allclose(first, losses("seed=1"))
    assert first[1, 1] == pytest.approx(losses("seed=1")[1, 1])
    assert not np.allclose(again[1, 1], losses("samples=50", "seed=1")[1, 1])


@pytest.mark.parametrize("side", ["inside", "outside"])
@pytest.mark.parametrize("plane", ["random", "models", "pca"])
def test_coordinates_beyond_the_mask_do_not_move(folder, side, plane, monkeypatch):
    write_trajectory(folder)
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(scene, "local_row", lambda m, _: m.global_row + torch.randn(m.mask.shape, generator=noise))
    here = Scene.of(folder, Options.read([f"plane={plane}", f"mask={side}"]))
    still = ~here.models.mask if side == "inside" else here.models.mask
    assert 0 < int(still.sum()) < len(still)
    laid = here.plane()
    moved = laid.point(torch.tensor([0.7]), torch.tensor([-0.3]))[0] - laid.origin
    assert torch.equal(moved[still], torch.zeros(int(still.sum())))
    assert float(moved.norm()) > 0


def test_lines_and_their_barriers(folder):
    figures = drawn(folder, "data=[client:0]", f"reference={folder}")
    found, (first, second, third) = figures["lines client:0"]["lines"], rows_of(folder)
    problem = load(folder).assembly.problem
    part = torch.from_numpy(problem.parts[0])
    x, y = problem.dataset.train.x[part], problem.dataset.train.y[part]
    assert list(found) == ["global to client 0", "client 0 to client 1", "global to reference"]
    for (start, end), line in zip([(first, second), (second, third), (first, first)], found.values(), strict=True):
        losses, accuracies = zip(*(by_hand(start + t * (end - start), x, y) for t in (0, 0.5, 1)), strict=True)
        assert line["loss"] == pytest.approx(losses, rel=1e-5)
        assert line["accuracy"] == pytest.approx(accuracies, abs=1 / len(y))
        loss, chord = line["loss"], (line["loss"][0] + line["loss"][2]) / 2
        assert line["loss_barrier"]["above_chord"] == pytest.approx(max(0, loss[1] - chord), abs=1e-9)
        assert line["loss_barrier"]["above_worse_end"] == pytest.approx(max(loss) - max(loss[0], loss[2]), abs=1e-9)
        assert line["loss_barrier"]["worst"] == max(loss)
        assert line["accuracy_barrier"]["worst"] == min(line["accuracy"])


def test_curvature_is_that_of_256_training_samples_inside_the_mask(folder):
    figures = drawn(folder, "curvature=true", "mask=inside", "data=[test]", "models=[global]")
    here = Scene.of(folder, Options.read(["mask=inside"]))
    split, net, row = here.split("train", 256), mlp(64, 64, 10, seed=0), global_row(folder)
    names, moves = [n for n, _ in net.named_parameters()], here.models.mask
    shapes = [p.shape for p in net.parameters()]

    def loss(leaf):
        parts = torch.where(moves, leaf, row).split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return cross_entropy(functional_call(net, weights, (split.x,)), split.y)

    leaf = row.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)

    def product(vector):
        given = torch.from_numpy(vector.reshape(-1)).float()
        return torch.autograd.grad(gradient, leaf, given, retain_graph=True)[0].double().numpy()

    operator = LinearOperator((len(row), len(row)), matvec=product, dtype=np.float64)
    wanted = sorted(eigsh(operator, k=5, which="LM", return_eigenvectors=False, tol=1e-6), key=abs, reverse=True)
    found = figures["curvature"]
    assert found["samples"] == len(split.y) == 256
    assert found["coordinates"] == int(moves.sum())
    assert found["eigenvalues"] == pytest.approx(wanted, rel=1e-3)
    assert all(bound < 0.01 * abs(value) for bound, value in zip(found["bounds"], found["eigenvalues"], strict=True))


def test_sharpness_is_the_rise_at_the_step_along_the_gradient(folder):
    figures = drawn(folder, "sharpness=true", "data=[test]", "models=[global]")
    split, row = Scene.of(folder, Options()).split("train", 256), global_row(folder)
    net = net_of(row)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(cross_entropy(net(split.x), split.y), net.parameters())]
    )
    rise = by_hand(row + 0.05 * gradient / gradient.norm(), split.x, split.y)[0] - by_hand(row, split.x, split.y)[0]
    assert figures["sharpness"]["sam"]["rise"] == pytest.approx(rise, rel=1e-3)
    assert figures["sharpness"]["sam"]["first_order"] == pytest.approx(0.05 * float(gradient.norm()), rel=1e-4)


def trajectory_rows(row):
    noise = torch.randn(5, len(row), generator=torch.Generator().manual_seed(0))
    return torch.cat([row + torch.linspace(-1, -0.2, 5).unsqueeze(1) * row + 0.02 * noise, row.unsqueeze(0)])


def write_trajectory(folder):
    rows = trajectory_rows(global_row(folder))
    rounds = torch.tensor([0, 1, 2, 7, 8, -1])  # later ones than the run's two, and a place without a row, are left out
    save_file({"rounds": rounds, "rows": rows}, folder / "trajectory.safetensors")
    return rows[:3]


def test_principal_components_of_a_trajectory(folder):
    rows = write_trajectory(folder)
    drawn(folder, "plane=pca", "data=[test]")
    found, test = surface(folder), digits().test
    assert found["models"].tolist() == ["round 0", "round 1", "round 2"]
    centred = (rows - rows.mean(0)).double().numpy()
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    assert found["shares"] == pytest.approx(values[:2] ** 2 / (values**2).sum(), rel=1e-5)
    wanted = np.abs((rows - rows[-1]).double().numpy() @ right[:2].T)
    assert np.abs(found["coordinates"]) == pytest.approx(wanted, abs=1e-4)
    for row, loss in zip(rows, found["own_loss"], strict=True):
        assert loss == pytest.approx(by_hand(row, test.x, test.y)[0], rel=1e-5)
    for axis, at in zip("ab", found["coordinates"].T, strict=True):
        assert found[axis][0] < at.min()
        assert found[axis][-1] > at.max()


def test_an_earlier_round_is_that_of_the_trajectory(folder):
    with safe_open(folder / "trajectory.safetensors", "pt") as file:
        rows, test = file.get_tensor("rows"), digits().test
    models = drawn(folder, "round=1", "data=[test]")["surface test"]["models"]
    assert list(models) == ["global", "client 0", "client 1"]
    assert models["global"]["loss"] == pytest.approx(by_hand(rows[1], test.x, test.y)[0], rel=1e-5)
    assert models["client 0"]["distance"] > 0
    drawn(folder, "plane=pca", "data=[test]", "models=[global]")
    found = surface(folder)
    assert found["models"].tolist() == ["round 0", "round 1", "round 2"]
    assert found["own_loss"] == pytest.approx([by_hand(row, test.x, test.y)[0] for row in rows], rel=1e-5)
    assert found["distance"] == pytest.approx(np.zeros(3), abs=1e-4)  # three rows lie in a plane


def test_what_is_kept_is_not_computed_again(folder, monkeypatch):
    typed = ["curvature=true", "sharpness=true"]
    before = drawn(folder, *typed)

    def again(*_, **__):
        pytest.fail("computed again")

    monkeypatch.setattr(points, "evaluate_plane", again)
    monkeypatch.setattr(figures_of, "evaluate", again)
    monkeypatch.setattr(figures_of, "lanczos", again)
    monkeypatch.setattr(figures_of, "sam", again)
    monkeypatch.setattr(figures_of, "sigma", again)
    monkeypatch.setattr(scene, "local_row", again)
    assert drawn(folder, *typed) == before
    assert json.loads((folder / "landscape" / "landscape.json").read_text()) == before
    with pytest.raises(pytest.fail.Exception):
        drawn(folder, *typed, "seed=1")
    monkeypatch.undo()


def test_a_changed_model_or_split_is_computed_again(folder):
    first = drawn(folder, "data=[test]")["surface test"]
    assert drawn(folder, "data=[test]")["surface test"]["key"] == first["key"]
    assert drawn(folder, "data=[test]", "samples=100")["surface test"]["key"] != first["key"]
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    changed = drawn(folder, "data=[test]", "models=[global]")["surface test"]
    assert changed["models"]["global"]["loss"] == surface(folder)["loss"][1, 1] != first["models"]["global"]["loss"]


@pytest.mark.parametrize("torn", [b"", b"12345"])
def test_a_kill_loses_one_chunk(folder, monkeypatch, torn):
    typed = ["grid=5", "data=[test]", "models=[global]"]
    whole, count = points.evaluate_plane, []

    def killed(*args):
        yield next(iter(whole(*args)))
        raise KeyboardInterrupt

    def counted(task, plane, a, b, split):
        count.append(len(a))
        return whole(task, plane, a, b, split)

    wanted = (drawn(folder, *typed, "seed=3"), surface(folder)["loss"])[1]
    shutil.rmtree(folder / "landscape")
    monkeypatch.setattr(points, "evaluate_plane", killed)
    with pytest.raises(KeyboardInterrupt):
        drawn(folder, *typed, "seed=3")
    (part,) = (folder / "landscape").glob("*.part")
    assert part.stat().st_size == 16 * 16
    with part.open("ab") as file:
        file.write(torn)
    monkeypatch.setattr(points, "evaluate_plane", counted)
    drawn(folder, *typed, "seed=3")
    assert count == [25 - 16]
    assert surface(folder)["loss"] == pytest.approx(wanted, rel=1e-5)
    assert not list((folder / "landscape").glob("*.part"))


def test_points_that_are_not_finite_are_gaps(folder, capsys):
    figures = drawn(folder, "range=[-1.0e+38,1.0e+38]", "data=[test]")["surface test"]
    found = surface(folder)["loss"]
    assert figures["gaps"] == int(np.isnan(found).sum()) == 8
    assert np.isfinite(found[1, 1])
    assert figures["lowest_loss"] == found[1, 1]


def test_pictures_and_table_from_the_command_line(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made[0], tmp_path / "mask_rule=x,seed=0")  # as a sweep names its cells
    monkeypatch.setattr(sys, "argv", ["landscape", str(folder), "range=[-1.0e+38,1.0e+38]", *FEW.values()])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    main()
    said = capsys.readouterr().out
    for name in ("contour_test", "surface_test", "contour_client_0", "surface_client_0", "lines"):
        path = folder / "landscape" / f"{name}.png"
        assert str(path) in said
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert "9 points, 8 not finite" in said
    assert "client 0 to client 1: above the worse end" in said


def test_the_command_refuses_in_one_line(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["landscape", str(made[0]), "gird=11"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedsparse: gird=11 is no option of a landscape; its keys are plane, grid, ")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("grid=2", "grid is 2; it must be a whole number of 3 or more"),
        ("grid=3.5", "grid is 3.5; it must be a whole number"),
        ("plane=flat", "plane is 'flat'; it must be random, models or pca"),
        ("mask=both", "mask is 'both'; it must be all, inside or outside"),
        ("range=[1,-1]", "range is .*; it must be null or two numbers that rise"),
        ("samples=0", "samples is 0; it must be a whole number of 1 or more"),
        ("data=[val]", "data is .*; it must be a list of test, train and client:<number>, each once"),
        ("data=test", "data is 'test'; it must be a list"),
        ("models=[global,-1]", "models is .*; it must be a list of global, reference and numbers"),
        ("models=[global,true]", "models is .*; it must be a list"),
        ("models=[global,reference]", "models is .*; its reference needs reference=<run folder>"),
        ("data=[", "data=\\[ is no YAML"),
        ("seed", "seed is None; it must be a whole number"),
        ("round=0", "round=0 is the start, before any client has trained"),
        ("round=1", "keeps no global model after 1 rounds"),
        ("reference=3", "reference takes a run folder, not 3"),
        ("models=[global,99]", "client:99 is none of the 20 clients, 0 to 19"),
        ("data=[client:20]", "client:20 is none of the 20 clients, 0 to 19"),
        ("plane=pca", "plane=pca needs the trajectory.safetensors that trajectory=global writes"),
    ],
)
def test_what_cannot_be_meant(folder, typed, line):
    (folder / "trajectory.safetensors").unlink()
    with pytest.raises(ValueError, match=line):
        landscape(folder, Options.read([typed]))


def test_keys_are_given_once_and_planes_need_three_models():
    with pytest.raises(ValueError, match="grid is given twice"):
        Options.read(["grid=3", "grid=5"])
    with pytest.raises(ValueError, match="plane=models must have three"):
        Options.read(["plane=models", "models=[global,0]"])


def test_an_unfinished_run_is_refused(folder):
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="holds no finished run; python -m fedsparse.train resume="):
        drawn(folder)


def with_problem(models, **changes):
    problem = replace(models.assembly.problem, **changes)
    return replace(models, assembly=replace(models.assembly, problem=problem))


def test_an_empty_client_is_refused(folder, monkeypatch):
    def emptied(*args):
        models = load(*args)
        parts = list(models.assembly.problem.parts)
        return with_problem(models, parts=[*parts[:1], parts[1][:0], *parts[2:]])

    monkeypatch.setattr(scene, "load", emptied)
    for typed in ("models=[global,1]", "data=[client:1]"):
        with pytest.raises(ValueError, match="client:1 holds no data"):
            drawn(folder, typed)


def test_collinear_models_are_refused(folder, monkeypatch):
    monkeypatch.setattr(scene, "local_row", lambda models, client: (client + 2) * models.global_row)
    with pytest.raises(ValueError, match="the three models are collinear"):
        drawn(folder, "plane=models")


def test_a_reference_of_another_model_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    small = ["model=mlp", "model.hidden=8", "logger=csv", "pictures=false", "federation.rounds=1"]
    run([*small, "calibration.head_steps=1", f"hydra.run.dir={other}"])
    with pytest.raises(ValueError, match="reference=.*other is a run of another model; no line joins the two"):
        drawn(folder, f"reference={other}")


def test_the_wandb_run_gets_the_pictures(tmp_path, capsys):
    folder = tmp_path / "run"
    small = ["model=mlp", "model.hidden=8", "logger=wandb", "pictures=false", "federation.rounds=2"]
    run([*small, "calibration.head_steps=1", f"hydra.run.dir={folder}"])
    (before,) = folder.glob("wandb/offline-run-*")
    capsys.readouterr()
    landscape(folder, Options.read(["data=[test]", *FEW.values()]))
    (after,) = set(folder.glob("wandb/offline-run-*")) - {before}
    ids = {path.name.split("-")[3] for path in (before, after)}  # a second later the name has a number too
    assert ids == {(folder / ".run_id").read_text()}
    sent = {path.name.rsplit("_", 2)[0] for path in after.glob("files/media/images/landscape/*.png")}
    assert sent == {"contour_test", "surface_test", "lines"}
    assert f"wandb sync {folder}/wandb/offline-run-*-{ids.pop()}*" in capsys.readouterr().out


def test_a_line_to_a_reference_leaves_the_other_figures_as_they_were(folder, tmp_path, monkeypatch):
    """A reference is no part of the run: its line is computed, and the curvature is not again."""
    before = drawn(folder, "curvature=true", "data=[test]", "surface=false")
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    monkeypatch.setattr(figures_of, "lanczos", lambda *_, **__: pytest.fail("computed again"))
    after = drawn(folder, "curvature=true", "data=[test]", "surface=false", f"reference={other}")
    assert after["curvature"] == before["curvature"]
    line = after["lines test"]["lines"]["global to reference"]
    test, row = digits().test, global_row(folder)
    wanted = [by_hand(row * factor, test.x, test.y)[0] for factor in (1, 1.5, 2)]
    assert line["loss"] == pytest.approx(wanted, rel=1e-5)
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    again = drawn(folder, "curvature=true", "data=[test]", "surface=false", f"reference={other}")
    assert again["lines test"]["lines"]["global to reference"]["loss"][-1] == pytest.approx(
        by_hand(3 * row, test.x, test.y)[0], rel=1e-5
    )


def test_a_mask_of_another_model_is_refused(folder):
    tensors = load_file(folder / "mask.safetensors")
    save_file({name: tensor[:1].contiguous() for name, tensor in tensors.items()}, folder / "mask.safetensors")
    with pytest.raises(ValueError, match=r"the mask was made for another model: .*hidden.weight \(mask \(1, 64\)"):
        drawn(folder)
