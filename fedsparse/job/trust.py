"""Restricts a stored configuration to targets of ``conf/`` and of packages that its reader trusts.

A run folder may come from a stranger, and Hydra calls every ``_target_`` with the arguments beside it. So every command
reads stored configurations by this file: they are resolved once, with resolvers that read neither files nor the
environment, and each target and argument is looked up in the YAML files of ``conf/``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer

from fedsparse.analysis.files import BYTES, plain_yaml, yaml_of, yaml_text
from fedsparse.core.folder import OVERRIDES
from fedsparse.job import earlier
from fedsparse.job.keys import JOBS
from fedsparse.job.shipped import WHOLE, conf_dir
from fedsparse.job.targets import imported

NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
REFERENCE = re.compile(r"\$\{\s*(?:oc\.select\s*:\s*)?(\.*)([\w-]+(?:\.[\w-]+|\[[\w-]+\])*)\s*([:,}])")
LEADS_OUT = re.compile(r"^[/\\~]|^\w:|(^|[/\\])\.\.([/\\]|$)|\$")  # a root, a way up, a variable
LEAF = 32  # characters added to the length of each value
WIDEST = 2**64

Place = tuple[str, ...]


@dataclass(frozen=True)
class Shipped:
    """The targets, arguments and resolvers of the YAML files of ``conf/``.

    Attributes:
        arguments: by ``_target_``, the keys beside it in any option of its group.
        resolvers: names used as ``${name:arguments}``.

    """

    arguments: Mapping[str, frozenset[str]]
    resolvers: frozenset[str]


@cache
def shipped() -> Shipped:
    """Collect targets, arguments and resolvers of ``conf/``, without the node ``hydra``."""
    keys: dict[Place, set[str]] = defaultdict(set)
    targets: dict[Place, set[str]] = defaultdict(set)
    resolvers: set[str] = set()
    for path in sorted(conf_dir().rglob("*.yaml")):
        group = path.relative_to(conf_dir()).parts[0]
        top = () if group in ("train.yaml", *WHOLE) else (group,)
        for place, node in nodes(yaml_of(path), top):
            if place[:1] == ("hydra",):
                continue
            if isinstance(node, str):
                resolvers.update(RESOLVER.findall(node))
            if isinstance(node, Mapping):
                keys[place].update(map(str, node))
                targets[place].update([node["_target_"]] if "_target_" in node else [])
    named = {target for here in targets.values() for target in here}
    beside = {target: [keys[place] for place in targets if target in targets[place]] for target in named}
    return Shipped({target: frozenset().union(*beside[target]) for target in named}, frozenset(resolvers))


def nodes(node: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Iterate over the nodes of nested mappings and lists, each with its place."""
    yield place, node
    inner = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield from nodes(value, (*place, str(key)))


def split(arguments: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Split arguments into the names of ``trust=[mypackage]`` and the rest.

    >>> split(["trust=[mypackage,other.nets]", "federation.rounds=3"])
    (('mypackage', 'other.nets'), ['federation.rounds=3'])
    """
    lists = [argument.removeprefix("trust=") for argument in arguments if argument.startswith("trust=")]
    names = [name.strip() for text in lists for name in text.strip("[]").split(",") if name.strip()]
    return checked(names), [argument for argument in arguments if not argument.startswith("trust=")]


def checked(names: Sequence[str]) -> tuple[str, ...]:
    """Check that names are dotted Python names.

    Raises:
        ValueError: one is not.

    """
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"trust={name} is no name; it takes packages whose code you know, as in trust=[mypackage]")
    return tuple(names)


def covers(trusted: Sequence[str], name: str) -> bool:
    """Whether a dotted name is one of the trusted names, or lies below one.

    >>> covers(["my"], "mypackage.Net"), covers(["mypackage"], "mypackage.nets.Net")
    (False, True)
    """
    return any(name == one or name.startswith(f"{one}.") for one in trusted)


def read(path: Path) -> dict[str, Any]:
    """Read a stored configuration as plain data, unresolved, and migrate it to the present names and keys.

    Raises:
        ValueError: the file is missing, too large, or damaged.

    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(yaml_text(path)))
    except Exception as error:  # an invalid file may raise any exception
        raise ValueError(f"{path} cannot be read: {one_line_of(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds no keys")
    return earlier.renewed(content)


def overrides(folder: Path) -> list[str]:
    """Read the stored overrides of a run; empty if there is no such file.

    Raises:
        ValueError: the file is no list of overrides.

    """
    path = folder / OVERRIDES
    if not path.is_file():
        return []
    listed = plain_yaml(path) or []
    if not isinstance(listed, list) or not all(isinstance(override, str) for override in listed):
        raise ValueError(f"{path} is damaged: it is no list of key=value")
    return listed


def admitted(stored: Mapping[str, Any], trusted: Sequence[str] = (), typed: Sequence[str] = ()) -> DictConfig:
    """Resolve a stored configuration and refuse untrusted targets; the only way from a stored file to instantiation.

    Args:
        stored: as read, unresolved.
        trusted: names whose code and arguments the reader trusts.
        typed: keys that the reader set; they and keys below them are not checked.

    Returns:
        The configuration without interpolations, so that what was checked is what is built.

    Raises:
        ValueError: one line with the key, its value and the argument that admits it.

    """
    cfg = resolved(stored, trusted)
    for place, node in nodes(OmegaConf.to_container(cfg)):
        key = ".".join(place)
        if covers(typed, key):
            continue
        if isinstance(node, Mapping) and "_target_" in node:
            _check_part(key, node, trusted, typed)
        if place[:1] == ("logger",) and isinstance(node, str) and LEADS_OUT.search(node):
            raise ValueError(f"{_shown(key)}: {_shown(node)} leads out of the run folder, where logs belong")
    return cfg


def resolved(stored: Mapping[str, Any], trusted: Sequence[str] = ()) -> DictConfig:
    """Resolve all interpolations of a stored configuration, with the resolvers of ``conf/`` and those trusted.

    Raises:
        ValueError: it uses another resolver, refers to a missing key, or grows beyond the largest stored file.

    """
    try:
        _check_growth(stored)
        with resolvers(trusted):
            plain = OmegaConf.to_container(OmegaConf.create(dict(stored)), resolve=True)
        for place, value in nodes(plain):
            _check_value(".".join(place), value)
    except Exception as error:  # a resolver may raise any exception
        raise ValueError(f"the stored configuration cannot be used: {one_line_of(error)}") from error
    return OmegaConf.create(plain)  # type: ignore[return-value]


def _check_part(key: str, node: Mapping[str, Any], trusted: Sequence[str], typed: Sequence[str]) -> None:
    """Check a node with a ``_target_``, which Hydra would call.

    Raises:
        ValueError: its target, or an argument of a shipped target, is not in ``conf/``.

    """
    target, at = node["_target_"], _shown(f"{key}.").lstrip(".")
    if not isinstance(target, str) or not NAME.fullmatch(target):
        raise ValueError(f"{at}_target_ is {_shown(target)}, which is no dotted name")
    if covers(trusted, target):
        return _check_home(f"{at}_target_", target, trusted)
    if target not in shipped().arguments:
        package = target.rpartition(".")[0] or target
        raise ValueError(f"{at}_target_: {_shown(target)} {_ask(package)}")
    known = shipped().arguments[target] | set(JOBS.get(key, ()))
    other = [str(name) for name in node if name not in known and not covers(typed, f"{key}.{name}")]
    if other:
        raise ValueError(f"{at}{_shown(other[0])}, an argument of {target}, {_ask(target)}")
    return None


def _check_home(key: str, target: str, trusted: Sequence[str]) -> None:
    """Refuse objects that a trusted package only imports, such as ``mypackage.os.system``.

    Raises:
        ValueError: it is defined in another package, or cannot be imported.

    """
    found, what = imported(key, target), f"{key}: {target}"
    if not callable(found):
        raise ValueError(f"{what} is nothing that can be called")
    home = str(getattr(found, "__module__", None) or type(found).__module__)
    same_package = home.split(".")[0] == target.split(".")[0]
    if not same_package and not covers(trusted, home) and target not in shipped().arguments:
        raise ValueError(f"{what} is of {home}, which {_ask(home)}")


@contextmanager
def resolvers(trusted: Sequence[str]) -> Iterator[None]:
    """Restrict OmegaConf to the resolvers of ``conf/`` and those trusted; the others raise a ValueError."""
    admitted = {name for name in BaseContainer._resolvers if name in shipped().resolvers or covers(trusted, name)}

    def refusal(name: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> None:
            raise ValueError(f"the resolver ${{{name}:}} {_ask(name)}")

        return refuse

    before = BaseContainer._resolvers
    BaseContainer._resolvers = {name: call if name in admitted else refusal(name) for name, call in before.items()}
    try:
        yield
    finally:
        BaseContainer._resolvers = before


def _check_growth(tree: Any) -> None:
    """Refuse interpolations that grow exponentially: thirty lines that double each other fill the memory.

    Raises:
        ValueError: a reference is computed or circular, or the result exceeds the largest stored file.

    """
    sizes: dict[Place, int] = {}

    def size(place: Place) -> int:
        """Bound the resolved length of a place in characters; a place in progress counts as too large."""
        if place not in sizes:
            sizes[place] = BYTES + 1
            at, node = _at(tree, place)
            inner = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ()
            below = [(*at, str(key)) for key in inner]
            sizes[place] = LEAF + sum(map(size, [*below, *_references(at, node)]))
            sizes[place] += len(node) if isinstance(node, str) else 0
        return sizes[place]

    if size(()) > BYTES:
        raise ValueError(f"its interpolations refer to themselves, or grow beyond {BYTES} characters")


def _at(tree: Any, place: Place) -> tuple[Place, Any]:
    """Find the node of a place, or the interpolation on the way to it, whose size bounds that of the place."""
    for depth, key in enumerate(place):
        if isinstance(tree, Mapping):
            tree = next((value for name, value in tree.items() if str(name) == key), None)
        elif isinstance(tree, list):
            index = int(key) if re.fullmatch(r"-?[0-9]{1,9}", key) else len(tree)
            tree = tree[index] if -len(tree) <= index < len(tree) else None
        else:
            return place[:depth], tree
    return place, tree


def _references(place: Place, text: Any) -> Iterator[Place]:
    """Iterate over the places that a value refers to.

    Raises:
        ValueError: a reference is computed by another.

    """
    for start in re.finditer(r"\$\{", text if isinstance(text, str) else ""):
        found = REFERENCE.match(text, start.start())
        if found is None or found[2] == "oc.select":  # its key is not a literal
            raise ValueError(f"{_shown('.'.join(place))}: {_shown(text)} is no plain reference to another key")
        dots, key, end = found.groups()
        if end != ":":
            above = place[: max(0, len(place) - len(dots))] if dots else ()
            yield (*above, *re.findall(r"[^.\[\]]+", key))


def _check_value(key: str, value: Any) -> None:
    """Refuse interpolations that remain after resolving, and numbers of more than 64 bits.

    Raises:
        ValueError: one line with the key.

    """
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{_shown(key)} still is an interpolation when it is resolved: {_shown(value)}")
    if isinstance(value, int) and abs(value) >= WIDEST:
        raise ValueError(f"{_shown(key)} is a number of more than 64 bits")


def _ask(name: str) -> str:
    """Write the reason of a refusal, and the argument that admits the name."""
    name = _shown(name)
    return (
        "is named by no file of conf/ and is not of a package that you trust; if you know its code, add "
        f"trust=[{name}] (report, repeat: --trust {name})"
    )


def _shown(value: Any, longest: int = 100) -> str:
    """Format an untrusted value in one short line, without control characters."""
    text = str(value)
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line_of(error: BaseException) -> str:
    """Write an error of another library in one line."""
    text = (str(getattr(error, "problem", error)).splitlines() or [type(error).__name__])[0]  # without YAML's position
    key = getattr(error, "full_key", None)
    said = text.partition("raised while resolving interpolation: ")[2] or text
    return _shown(f"{key}: {said}" if key else said, 300)
