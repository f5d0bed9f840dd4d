"""What a program may rely on: the names that fedsparse and its packages export, and two federations made of them."""

from __future__ import annotations

import ast
import copy
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from plain import plain_fedavg, replay

import fedsparse

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedsparse"
EXAMPLES = sorted((ROOT / "tests" / "examples").glob("*.py"))
HEAVY = {"torch", "lightning", "hydra", "omegaconf", "numpy", "scipy", "sklearn", "wandb", "transformers"}

FLOWERS = ("deploy.internals", "deploy.certificates", "deploy.server_app", "deploy.client_app")  # need its environment

# package -> module where it is defined -> names
EXPORTED = {
    "fedsparse": {
        "fedsparse": "run runs sweep weights",
        "fedsparse.core.space": "ParamSpace",
        "fedsparse.masks.mask": "Mask",
        "fedsparse.masks.rule": "MaskRule",
        "fedsparse.masks.sparsity": "Sparsity",
        "fedsparse.optim.sgdm": "SparseSGDM",
        "fedsparse.optim.adam": "SparseAdam",
        "fedsparse.federation.federation": "Federation",
        "fedsparse.federation.client.training": "Clients",
        "fedsparse.federation.exchange.exchange": "Exchange",
        "fedsparse.federation.server.aggregation": "Aggregation",
        "fedsparse.federation.server.server": "Server",
        "fedsparse.federation.server.topology": "Topology",
        "fedsparse.simulation.module": "ClientModule",
        "fedsparse.simulation.callback": "FederatedRounds",
        "fedsparse.data.datamodule": "FederatedDataModule",
        "fedsparse.job.outcome": "Outcome Outcomes",
    },
    "fedsparse.optim": {
        "fedsparse.optim.sgdm": "SparseSGDM",
        "fedsparse.optim.adam": "SparseAdam",
        "fedsparse.optim.fedopt": "FedAdam FedYogi FedAdagrad AveragedMomentum",
    },
    "fedsparse.masks": {
        "fedsparse.masks.topk": "top_fraction",
        "fedsparse.masks.quantiles": "above_quantile",
        "fedsparse.masks.scores": "fisher",
        "fedsparse.masks.deviations": "deviation normalise",
        "fedsparse.masks.mask": "Mask",
        "fedsparse.masks.rule": "MaskRule",
        "fedsparse.masks.evidence": "Evidence Batches Exploration Thinning Updates",
        "fedsparse.masks.choice": "choose",
        "fedsparse.masks.sparsity": "Sparsity",
        "fedsparse.masks.gradual": "Gradual",
        "fedsparse.masks.compare": "overlaps",
        "fedsparse.masks.select": "select",
    },
    "fedsparse.masks.rules": {
        "fedsparse.masks.rules.autoflip": "AutoFLIP",
        "fedsparse.masks.rules.dense": "Dense",
        "fedsparse.masks.rules.fisher": "Fisher",
        "fedsparse.masks.rules.from_file": "FromFile",
        "fedsparse.masks.rules.magnitude": "Magnitude",
        "fedsparse.masks.rule": "MaskRule",
        "fedsparse.masks.rules.movement": "Movement",
        "fedsparse.masks.rules.random": "Random",
        "fedsparse.masks.rules.snip": "Snip",
        "fedsparse.masks.rules.synflow": "SynFlow",
        "fedsparse.masks.rules.task_localized": "Talos talos",
    },
    "fedsparse.models": {"fedsparse.models.head": "closed_form"},
    "fedsparse.data": {
        "fedsparse.data.datamodule": "FederatedDataModule",
        "fedsparse.data.datasets": "Dataset Split",
        "fedsparse.data.rounds": "Cohort LocalWork RoundPlan",
        "fedsparse.data.torch_sets": "from_torch",
    },
    "fedsparse.data.partition": {
        "fedsparse.data.partition": "iid classes_per_client dirichlet dirichlet_client quantity ratios natural "
        "dirichlet_sampled client_tests"
    },
    "fedsparse.federation": {
        "fedsparse.federation.client.training": "Clients",
        "fedsparse.federation.federation": "Federation",
        "fedsparse.federation.round": "Round play",
        "fedsparse.federation.explore": "Explore",
        "fedsparse.federation.trajectory": "Trajectory",
        "fedsparse.federation.watcher": "Watcher",
        "fedsparse.federation.exchange.update": "Update Start",
        "fedsparse.federation.phases": "Phase Phases",
    },
    "fedsparse.federation.client": {
        "fedsparse.federation.client.drift": "DriftCorrection FedProx NoCorrection Scaffold"
    },
    "fedsparse.federation.exchange": {
        "fedsparse.federation.exchange.scores": "select",
        "fedsparse.federation.exchange.wire.message": "encode decode PayloadError",
        "fedsparse.federation.exchange.exchange": "Exchange Full",
        "fedsparse.federation.exchange.filters": "ErrorFeedback Quantize SignFlip",
        "fedsparse.federation.exchange.sparsifiers": "Layers Pattern RandomK Sparsifier Threshold TopK",
        "fedsparse.federation.exchange.update": "Update",
    },
    "fedsparse.federation.server": {
        "fedsparse.federation.server.robust": "coordinate_mean geometric_median krum",
        "fedsparse.federation.server.aggregation": "Aggregation WeightedMean",
        "fedsparse.federation.server.server": "Server",
        "fedsparse.federation.server.topology": "Topology Flat",
        "fedsparse.federation.server.sampling": "uniform everyone",
    },
    "fedsparse.simulation": {
        "fedsparse.simulation.module": "ClientModule",
        "fedsparse.simulation.callback": "FederatedRounds",
    },
    "fedsparse.landscape": {
        "fedsparse.landscape.directions": "Plane filter_normalise random_direction",
        "fedsparse.landscape.interpolation": "Barrier barrier between",
        "fedsparse.landscape.surface": "Evaluated chunk_size evaluate evaluate_plane evaluate_rows joined",
        "fedsparse.landscape.task": "MeanLoss Task",
        "fedsparse.landscape.curvature": "Sketch frobenius hutchpp hvp lanczos sketch",
        "fedsparse.landscape.sharpness": "Rise mean_rise pac_bayes sam sigma",
        "fedsparse.models.pathnorm": "path_norm",
        "fedsparse.landscape.refinement": "Refined refine",
    },
}
ROWS = [(at, home, name) for at, homes in EXPORTED.items() for home, names in homes.items() for name in names.split()]
# of these all names stand above
WHOLE = (
    "fedsparse",
    "fedsparse.masks",
    "fedsparse.models",
    "fedsparse.data",
    "fedsparse.federation",
    "fedsparse.landscape",
)


def call(code, *arguments):
    """Run code in a Python of its own -> what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("package", "home", "name"), ROWS)
def test_what_a_package_exports_is_what_its_home_defines(package, home, name):
    found = getattr(import_module(package), name)
    assert found is vars(import_module(home))[name]
    assert found.__module__ == home
    assert len(found.__doc__.split()) > 2
    assert name in import_module(package).__all__
    assert name in dir(import_module(package))


RENAMED = {  # name of earlier versions -> name of today
    "fedsparse.federation.client": {"Objective": "DriftCorrection", "Plain": "NoCorrection"},
    "fedsparse.federation.exchange": {"Feedback": "ErrorFeedback", "Precision": "Quantize"},
}


@pytest.mark.parametrize("package", RENAMED)
def test_a_renamed_class_keeps_its_exported_name(package):
    module = import_module(package)
    for earlier, name in RENAMED[package].items():
        assert getattr(module, earlier) is getattr(module, name)
        assert {earlier, name} <= set(module.__all__)


@pytest.mark.parametrize("package", WHOLE)
def test_nothing_else_is_exported(package):
    exported = import_module(package).__all__
    assert sorted(exported) == sorted(name for where, _, name in ROWS if where == package)


@pytest.mark.parametrize("package", ["fedsparse", "fedsparse.models", "fedsparse.data", "fedsparse.federation"])
def test_a_name_that_there_is_not_is_an_attribute_error(package):
    module = import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nonsense'"):
        module.Nonsense  # noqa: B018
    assert not hasattr(module, "Nonsense")


def test_importing_fedsparse_costs_nothing():
    code = "import sys; before = set(sys.modules); import {}; print(*(set(sys.modules) - before))"
    bare = call(code.format("typing, collections.abc, importlib"))
    found = set(call(code.format("fedsparse"))) - set(bare)
    assert found == {"fedsparse", "fedsparse.core", "fedsparse.core.lazy"}


@pytest.mark.parametrize("package", ["models", "data", "federation", "landscape"])
def test_importing_a_part_does_not_import_the_whole(package):
    found = call(f"import sys, fedsparse.{package}; print(*sys.modules)")
    assert not HEAVY & set(found)
    assert [name for name in found if name.startswith(f"fedsparse.{package}.")] == []


def submodules(package):
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    return {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}


INITS = sorted(PACKAGE.rglob("__init__.py"))
PACKAGES = [".".join(path.parent.relative_to(ROOT).parts) for path in INITS]


@pytest.mark.parametrize("package", [name for name in PACKAGES if "peers" not in name])
def test_no_exported_name_is_a_submodule(package):
    """It would take the place of what is exported when it is imported, if that comes later."""
    names = set(getattr(import_module(package), "__all__", []))
    bound_after = {"fedsparse.masks": {"select"}}  # the package itself imports the submodule, and then the function
    assert names & submodules(package) == bound_after.get(package, set())


AGAIN = """
import sys
from importlib import import_module
names = ["fedsparse.masks." + name for name in sys.argv[1:]]
for first in names:
    for other in [other for other in sys.modules if other.startswith("fedsparse.masks")]:
        del sys.modules[other]
    for name in [first, *names]:
        masks = import_module(name) and import_module("fedsparse.masks")
        print(masks.fisher.__module__, masks.select.__module__)
"""


@pytest.mark.slow
def test_functions_of_masks_stay_functions_whichever_submodule_is_imported_first():
    names = sorted(submodules("fedsparse.masks") - {"__init__"})
    assert {"select", "scores", "rules"} <= set(names)
    found = call(AGAIN, *names)
    assert found == ["fedsparse.masks.scores", "fedsparse.masks.select"] * len(names) * (len(names) + 1)


def test_run_stays_a_function_when_it_is_called_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["model=mlp", "logger=csv", "pictures=false", "federation.rounds=1", "calibration.head_steps=1"]
    for name in ("first", "second"):
        summary = fedsparse.run([*options, "mask_rule=random", f"hydra.run.dir={tmp_path / name}"])
        assert summary["rounds"] == 1
        assert not any(isinstance(getattr(fedsparse, exported), ModuleType) for exported in fedsparse.__all__)
    assert fedsparse.run.__module__ == "fedsparse"


LAZY = [path for path in INITS if "lazily(__name__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.parent.name)
def test_what_a_type_checker_reads_is_what_is_imported(path):
    branch = next(node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    assert ast.unparse(branch.test) == "TYPE_CHECKING"
    read = {alias.name: node.module for node in branch.body for alias in node.names}
    tables = [ast.literal_eval(node) for node in ast.walk(branch) if isinstance(node, ast.Dict)]
    package = ".".join(path.parent.relative_to(ROOT).parts)
    assert tables == [read]
    assert set(read) == set(import_module(package).__all__) - {"run", "runs", "sweep", "weights"}


@pytest.mark.slow
def test_mypy_knows_every_name_and_no_other(tmp_path):
    rows = sorted({(package, name) for package, _, name in ROWS if package in WHOLE})
    lines = [*(f"import {package}" for package in WHOLE), *(f"reveal_type({package}.{name})" for package, name in rows)]
    (tmp_path / "asks.py").write_text("\n".join([*lines, "fedsparse.Nonsense"]) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "asks.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(rows), done.stdout
    assert all("def (" in line and '"Any"' not in line for line in revealed), done.stdout
    assert done.stdout.count(": error: ") == 1
    assert 'Module has no attribute "Nonsense"' in done.stdout


FIRST = """
import importlib, sys
for name in sys.argv[1:]:
    for other in [other for other in sys.modules if other.split(".")[0] == "fedsparse"]:
        del sys.modules[other]
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""


@pytest.mark.slow
def test_every_module_can_be_the_first_to_be_imported():
    """No circle, those through a package's __init__ included."""
    paths = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))]
    names = [".".join(parts).removesuffix(".__init__") for parts in paths if "peers" not in parts]
    names = [name for name in names if not name.endswith(("__main__", *FLOWERS))]
    assert len(names) > 200
    assert call(FIRST, *names) == []


def script(name, folder, monkeypatch):
    """What a script has at its end."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    ran = runpy.run_path(str(ROOT / "tests" / "examples" / f"{name}_federation.py"), run_name="__main__")
    assert list(folder.iterdir()) == []
    return ran


def test_two_federations_learn_to_the_same_bits_and_as_a_plain_loop_does(tmp_path, monkeypatch, capsys):
    plain = script("plain", tmp_path / "plain", monkeypatch)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"accuracy {plain['accuracy']:.3f}")
    trainer = script("trainer", tmp_path / "trainer", monkeypatch)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"accuracy {trainer['accuracy']:.3f}")
    space, data, mask = plain["space"], plain["data"], plain["mask"]
    rows = [ran["space"].read(ran["net"]) for ran in (plain, trainer)]
    assert torch.equal(*rows)
    assert plain["accuracy"] == trainer["accuracy"] >= 0.6

    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    weights = space.read(start)
    assert torch.equal(mask, weights.abs() >= weights.abs().sort().values[len(mask) // 2])
    assert torch.equal(rows[0][~mask], weights[~mask])
    masks = space.unflatten(mask)
    expected, losses = plain_fedavg(
        copy.deepcopy(start), data.train.x, data.train.y, replay(plain["plan"], 5), lr=0.1, momentum=0.9, masks=masks
    )
    torch.testing.assert_close(rows[0], space.read(expected), rtol=0, atol=1e-4)
    assert (rows[0] - weights).abs().max() > 0.1
    assert [plain["loss"], trainer["rounds"].loss] == pytest.approx([losses[-1]] * 2, abs=1e-4)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_public_names_alone(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    (guard,) = [node for node in tree.body if isinstance(node, ast.If)]
    lines = [line for line in text.splitlines()[guard.lineno :] if line.strip()]
    assert len(lines) <= 20
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(guard))
    modules = {"fedsparse.data.datasets", "fedsparse.data.partition", "fedsparse.federation.server"}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fedsparse"):
            assert node.module in PACKAGES
            exported = import_module(node.module).__all__
            assert all(a.name in exported or f"{node.module}.{a.name}" in modules for a in node.names)
