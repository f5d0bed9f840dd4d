"""What a reader meets: functions and files that a round runs through, and rules of the house, read from the code."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from small import Small, small_data, small_net, uneven_parts

from fedsparse import run
from fedsparse.core.space import ParamSpace
from fedsparse.federation.client.training import Clients
from fedsparse.federation.exchange.exchange import Exchange
from fedsparse.federation.federation import Federation
from fedsparse.federation.round import play
from fedsparse.federation.server.aggregation import WeightedMean
from fedsparse.federation.server.topology import Flat
from fedsparse.optim import SparseSGDM
from fedsparse.simulation.callback import FederatedRounds

PACKAGE = Path(__file__).parent.parent / "fedsparse"
PLAY, TRAINER = (72, 24), (134, 44)  # functions and files


class Counted:
    """Notes which functions of fedsparse run while it is on; comprehensions and lambdas belong to their function."""

    def __init__(self):
        self.seen = set()

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            self.seen.add((code.co_filename, code.co_firstlineno, code.co_qualname))

    @property
    def functions(self):
        return len(self.seen)

    @property
    def files(self):
        return len({file for file, _, _ in self.seen})

    def listed(self):
        return "\n".join(f"{Path(file).relative_to(PACKAGE)}:{line} {name}" for file, line, name in sorted(self.seen))


def of_play():
    """The second round of a small federation, played without Trainer and data module."""
    net = small_net(torch.float32)
    space, small = ParamSpace.of(net), Small(net, small_data(dtype=torch.float32), uneven_parts())
    mask = torch.rand(space.size, generator=torch.Generator().manual_seed(0)) < 0.5
    split = small.dataset.train

    def losses(forward, x, y):
        return torch.nn.functional.cross_entropy(forward(x), y, reduction="none")

    def fetch(cohort):
        return split.x[cohort.samples], split.y[cohort.samples]

    clients = Clients(net, space, mask, partial(SparseSGDM, lr=0.1, momentum=0.9), losses, fetch)
    federation = Federation(clients, Exchange(mask, space.local), WeightedMean(), Flat(), count_bytes=False)
    play(federation, clients, small.plan.cohorts(0), 0)
    cohorts, counted = small.plan.cohorts(1), Counted()
    sys.setprofile(counted)
    play(federation, clients, cohorts, 1)
    sys.setprofile(None)
    return counted


def of_trainer(folder, monkeypatch):
    """The second round of the default run with an MLP and a random mask: from its opening to its closing hook."""
    counted, start, end = Counted(), FederatedRounds.on_train_epoch_start, FederatedRounds.on_train_batch_end

    def on(self, trainer, module):
        sys.setprofile(counted if trainer.current_epoch == 1 else None)
        return start(self, trainer, module)

    def off(self, trainer, *args):
        end(self, trainer, *args)
        if trainer.is_last_batch:
            sys.setprofile(None)

    monkeypatch.setattr(FederatedRounds, "on_train_epoch_start", on)
    monkeypatch.setattr(FederatedRounds, "on_train_batch_end", off)
    options = ("model=mlp", "mask_rule=random", "logger=csv", "pictures=false", "calibration.cache=null")
    run([*options, "federation.rounds=3", f"hydra.run.dir={folder}"])
    return counted


def test_a_round_is_few_functions_in_few_files():
    """The aim is 50 in 14; optimizer and index alone are 13."""
    counted = of_play()
    assert counted.functions <= PLAY[0], counted.listed()
    assert counted.files <= PLAY[1], counted.listed()


def test_a_round_under_the_trainer_is_few_functions_in_few_files(tmp_path, monkeypatch):
    """With the watchers, the table of clients and the data module; the aim is 90 in 24."""
    counted = of_trainer(tmp_path / "run", monkeypatch)
    assert counted.functions <= TRAINER[0], counted.listed()
    assert counted.files <= TRAINER[1], counted.listed()
    assert longest_body(counted.seen) <= 40


def longest_body(seen):
    """Lines of the longest body among some functions, without signature and docstring."""
    longest = 0
    for file, first, _ in seen:
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and first in (node.lineno, *(d.lineno for d in node.decorator_list)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                longest = max(longest, body[-1].end_lineno - body[0].lineno + 1 if body else 0)
    return longest


def test_play_is_the_sentence_of_the_paper():
    node = next(
        n for n in ast.parse((PACKAGE / "federation" / "round.py").read_text()).body if getattr(n, "name", "") == "play"
    )
    assert node.end_lineno - node.lineno + 1 <= 25


FEDERATION = sorted((PACKAGE / "federation").rglob("*.py"))
TENSORS_OWN = {"grad", "data"}  # of torch's tensors, which its optimizers and autograd read


def targets(node):
    """Attributes that a statement assigns: (object, name)."""
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [t for target in found for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [(ast.unparse(t.value), t.attr) for t in flat if isinstance(t, ast.Attribute)]


def constructed(cls):
    """Names that an object has when its constructor returns: fields, and what __init__ itself sets."""
    methods = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
    names = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and n.value is not None}
    names |= {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)} if dataclass(cls) else set()
    for node in ast.walk(methods["__init__"]) if "__init__" in methods else ():
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names |= {attribute for owner, attribute in targets(node) if owner == "self"}
    return names


def dataclass(cls):
    return any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list)


def late(tree):
    """Attributes that are first set outside a constructor, or are another object's."""
    classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for cls in classes.values():
        bases = [classes[b.id] for b in cls.bases if isinstance(b, ast.Name) and b.id in classes]
        known = constructed(cls).union(*map(constructed, bases))
        for node in ast.walk(cls):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for owner, name in targets(node):
                    if (owner == "self" and name not in known) or (owner != "self" and name not in TENSORS_OWN):
                        yield f"{cls.name}: {owner}.{name}"


@pytest.mark.parametrize("path", FEDERATION, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_an_object_is_whole_when_its_constructor_returns(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(late(tree)) == []
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"setattr", "vars"}
    assert not any("__dict__" in ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))


def test_what_is_set_late_is_found():
    lines = (
        "class A:",
        "  def __init__(self): self.a = self._b()",
        "  def _b(self): self.b = 1",
        "  def go(self, o): self.c = o.d = 2",
    )
    assert list(late(ast.parse("\n".join(lines)))) == ["A: self.b", "A: self.c", "A: o.d"]


def edges():
    """Modules that each module imports when it is imported, itself, of the package."""
    modules = {
        ".".join(("fedsparse", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
    }
    found = defaultdict(set)
    for name, path in modules.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top: not under TYPE_CHECKING
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedsparse"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[name].add(full if full in modules else node.module)
    return modules, found


def test_no_import_goes_in_a_circle():
    modules, found = edges()
    state = {}

    def visit(name, way):
        assert state.get(name) != "open", " -> ".join([*way, name])
        if name in state or name not in modules:
            return
        state[name] = "open"
        for other in sorted(found[name]):
            visit(other, [*way, name])
        state[name] = "done"

    for name in sorted(modules):
        visit(name, [])


WORDINGS = ("; it must be ", "must be one of ", "; give one of ")
BY_HAND = {  # what begins a refusal that is worded by hand, and why no function of core/checks words it
    "calibration.cache": "a folder",
    "data.unknown": "one of 80 characters, which a line has no room for",
    "evaluation.{key}": "a list of words",
    "exchange.attackers": "a count, or a list of ids",
    "exchange.fraction": "a number, a list of them, or a mapping from a round on",
    "exchange.names": "glob patterns",
    "head.ridge": "a larger one, which equations that were tried ask for",
    "lora.ranks": "a list of ranks",
    "lora.targets": "ends of layers' names",
    "masks[{index}]": "a tensor",
    "mixing.fixed": "a list of clusters",
    "mixing.k_range": "two numbers that rise",
    "phases.{name}": "a node of options",
    "range": "two numbers that rise",
    "sparsity.always_train": "glob patterns",
    "sparsity.schedule": "a node of options",
    "topology.of": "a number, or a list of departments",
    "trainer.max_time": "a time, or a mapping",
    "trajectory.clients": "a list of ids",
    "{key}": "clients of a round: a count if an integer, a fraction if a float",
    "{option}": "a list of models, or of splits",
}


def worded_by_hand(tree):
    """Keys, before `` is `` or ``=``, of the strings that say what a value must be; docstrings are none."""
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    pieces = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values]
            text = "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | pieces:
            text = node.value
        else:
            continue
        if any(wording in text for wording in WORDINGS):
            yield re.split(" is |=", text)[0]


def test_one_place_words_the_refusals_of_words_flags_and_numbers():
    """A hand-written one is added to the list above only if no checker could say it; one that has gone leaves it."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "core" / "checks.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    assert sorted(found for tree in trees for found in worded_by_hand(tree)) == sorted(BY_HAND)


def test_a_refusal_that_is_worded_by_hand_is_found():
    lines = (
        '"""A flag; it must be true or false."""',
        "def check(key, flag, word):",
        '    """A word; it must be a or b."""',
        '    if flag: raise ValueError(f"server.{key} is {flag!r}; it must be "',
        '        "true or false")',
        '    said = "mode is off; it must be on"',
        '    raise ValueError(said if word else f"by is {word!r}; it must be one of {key}")',
        "raise ValueError(f'{key} is {word}, and nothing else will do')",
    )
    assert sorted(worded_by_hand(ast.parse("\n".join(lines)))) == ["by", "mode", "server.{key}"]
