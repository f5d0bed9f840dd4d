"""Tests look at what is returned and pass arguments: none replaces a private name or a constant of the package."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SETTERS, ITEMS = {"setattr", "delattr", "patch", "object"}, {"setitem", "delitem"}  # of monkeypatch and unittest.mock
INSIDE = re.compile(r"_[^_]|__\w+__$|[A-Z][A-Z0-9_]*$")
# where a name cannot be read from the source: how often, and why that is nothing of the package's
EXPLAINED = {
    ("test_data_pixels.py", "?"): (1, "lists of files of torchvision's data sets, by a variable"),
    ("test_endings.py", "?"): (1, "functions of wandb, one for each case"),
    ("test_endings.py", "__init__"): (1, "of a logger that the test itself defines"),
}


def is_outside(module):
    return bool(module) and module.partition(".")[0] not in ("fedsparse", "")


def outside_names(tree):
    """Names that a module imports from elsewhere than the package and the tests beside it."""
    own, found = {path.stem for path in TESTS.rglob("*.py")}, {"self", "cls"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {(alias.asname or alias.name).partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {alias.asname or alias.name: node.module for alias in node.names}
        else:
            continue
        found |= {
            name for name, module in modules.items() if is_outside(module) and module.partition(".")[0] not in own
        }
    return found


def root(node):
    """The name that an expression such as ``a.b(c)[d].e`` begins with; None if it begins otherwise."""
    while not isinstance(node, ast.Name):
        if not isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            return None
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id


def given(call):
    """Object and name that a call of a setter replaces: (expression or dotted text, name), a name ``?`` if unread."""
    first, second = (*call.args, None, None)[:2]
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        home, _, name = first.value.rpartition(".")
        return home, name
    return first, second.value if isinstance(second, ast.Constant) and isinstance(second.value, str) else "?"


def replaced(tree):
    """Everything that a module replaces: (object, name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in SETTERS and node.args:
                yield given(node)
            elif called in ITEMS and isinstance(node.args[0], ast.Attribute):
                yield node.args[0].value, node.args[0].attr
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for part in ast.walk(target) if target is not None else ():
                changed = part.value if isinstance(part, ast.Subscript) else part
                if isinstance(changed, ast.Attribute) and isinstance(part.ctx, ast.Store | ast.Del):
                    yield changed.value, changed.attr


def inside(source):
    """Private names and constants that a test replaces, unless they are of another package."""
    tree = ast.parse(source)
    outside = outside_names(tree)
    return [
        name
        for home, name in replaced(tree)
        if (name == "?" or INSIDE.match(name))
        and not (is_outside(home) if isinstance(home, str) else root(home) in outside)
    ]


def test_no_test_replaces_a_private_name_or_a_constant_of_the_package():
    found = Counter()
    for path in sorted(TESTS.rglob("*.py")):
        found.update((path.name, name) for name in inside(path.read_text(encoding="utf-8")))
    assert found == {place: number for place, (number, _) in EXPLAINED.items()}


IMPORTS = """
import os
import torch.nn
from fedsparse.masks import topk
from fedsparse.masks.topk import Mask
from PIL import Image
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('monkeypatch.setattr(topk, "SAMPLE", 3)', "SAMPLE"),
        ('patch.setattr(topk, "_kth", f)', "_kth"),
        ('monkeypatch.setattr(Mask, "_check", f)', "_check"),
        ('monkeypatch.setattr(Mask, "__init__", f)', "__init__"),
        ('monkeypatch.delattr(topk, "_kth")', "_kth"),
        ('monkeypatch.setattr("fedsparse.masks.topk._kth", f)', "_kth"),
        ('mock.patch("fedsparse.masks.topk._kth")', "_kth"),
        ('mock.patch.object(topk, "_kth")', "_kth"),
        ('setattr(small.module, "_fetch", f)', "_fetch"),
        ("monkeypatch.setattr(topk, name, 3)", "?"),
        ("topk.SAMPLE = 3", "SAMPLE"),
        ("topk.SAMPLE += 3", "SAMPLE"),
        ("topk.HOW['new'] = f", "HOW"),
        ('monkeypatch.setitem(topk.HOW, "new", f)', "HOW"),
        ("a, small.module._fetch = 1, f", "_fetch"),
        ("for topk.SAMPLE in (3, 4): pass", "SAMPLE"),
        ("del topk._kth", "_kth"),
    ],
)
def test_such_a_replacement_is_found(line, name):
    assert inside(IMPORTS + line) == [name]


@pytest.mark.parametrize(
    "line",
    [
        'monkeypatch.setattr(topk, "smallest", f)',
        'monkeypatch.setattr("fedsparse.masks.topk.smallest", f)',
        'monkeypatch.setattr(topk, "Mask", f)',
        'monkeypatch.setattr(os, "_exit", f)',
        'monkeypatch.setattr(torch.Tensor, "__matmul__", f)',
        'monkeypatch.setattr("timm.models._builder.load", f)',
        'monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)',
        "os._exit = f",
        'monkeypatch.setitem(os.environ, "A", "b")',
        "HOW['new'] = dict(a=1)",
        "self._seen = []",
        "small.module.losses = f",
        "SAMPLE = topk.SAMPLE",
    ],
)
def test_nothing_else_is(line):
    assert not inside(IMPORTS + line)
