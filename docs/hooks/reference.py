"""Pages that are written from ``conf/``, the commands and the packages' public names, and so are never out of date."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from fedsparse.job import shipped
from fedsparse.job.keys import parameters

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "calibrate", "repeat", "report", "export", "landscape", "adapters", "deploy", "new")
VERBS = {"adapters": ("export", "merge", "evaluate", "answer")}
PACKAGES = (
    *("fedsparse", "fedsparse.core.space", "fedsparse.optim", "fedsparse.masks", "fedsparse.masks.rules"),
    *("fedsparse.data", "fedsparse.data.partition", "fedsparse.models", "fedsparse.federation"),
    *("fedsparse.federation.client", "fedsparse.federation.exchange", "fedsparse.federation.server"),
    *("fedsparse.federation.stores", "fedsparse.simulation", "fedsparse.landscape", "fedsparse.adapters"),
)
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w]+):(?P<rest>.*)$")


def comments(path: Path) -> dict[str, str]:
    """Read the comment of each key of a YAML file, by dotted key; the comment stands behind the value.

    >>> sorted(comments(shipped.conf_dir() / "optimizer/parts/base.yaml"))[:1]
    ['clip_norm']
    """
    found, parents = dict[str, str](), list[tuple[int, str]]()
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _KEY.match(line):
            indent = len(match["indent"])
            parents = [(at, name) for at, name in parents if at < indent] + [(indent, match["key"])]
            comment = re.search(r"(?:^|\s)# (.*)$", match["rest"])
            if comment:
                found[".".join(name for _, name in parents)] = comment[1]
    return found


def head(path: Path) -> str:
    """Read the comment at the head of a YAML file, as one paragraph."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[:1] == ["# @package _global_"] else lines
    taken = []
    for line in lines:
        if not line.startswith("#"):
            break
        taken.append(line.lstrip("# "))
    return " ".join(taken)


def option_comments(group: str, option: str) -> dict[str, str]:
    """Read the comments of an option's keys, also of those that it includes."""
    path = shipped.conf_dir() / group / f"{option}.yaml"
    includes = re.findall(r"^  - ([\w/]+)@_here_", path.read_text(encoding="utf-8"), re.M)
    folder = option.rpartition("/")[0]
    found = dict[str, str]()
    for part in includes:
        found |= option_comments(group, f"{folder}/{part}".lstrip("/"))
    return found | comments(path)


def arguments(target: str) -> dict[str, str]:
    """Read what the docstring of a target says of its arguments, by name.

    >>> arguments("fedsparse.optim.SparseSGDM")["momentum"]
    'in [0, 1)'
    """
    documented = inspect.getdoc(get_object(target)) or ""
    listed = re.split(r"^(?:Args|Attributes):\n", documented, flags=re.M)[1:]
    found = dict[str, str]()
    for section in listed:
        body = re.split(r"^\S", section, maxsplit=1, flags=re.M)[0]
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n      .*)*)", body, re.M):
            found |= dict.fromkeys(re.split(r", ", names), " ".join(text.split()).removesuffix("."))
    return found


def kind(value: Any, annotation: Any = inspect.Parameter.empty) -> str:
    """Say the type of a key: the annotation of the argument that it is, else that of its default.

    >>> kind(0.1), kind(None), kind(3, "int | None"), kind(True)
    ('number', 'null, or as described', 'int | None', 'true or false')
    """
    if annotation is not inspect.Parameter.empty:
        return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    if isinstance(value, str) and value.startswith("${"):
        return "as the key that it names"
    return WORDS.get(type(value), "null, or as described")


def rows(group: str, option: str) -> Iterator[tuple[str, str, str, str]]:
    """List an option's keys: dotted key, type, default, description."""
    held = shipped.keys(group, option)
    target = held.get("_target_")
    taken = parameters(target) or {} if target else {}
    said = (arguments(target) if target else {}) | option_comments(group, option)
    for key, value in held.items():
        if any(part.startswith("_") for part in key.split(".")) or (isinstance(value, dict) and value):
            continue
        annotation = taken[key].annotation if key in taken else inspect.Parameter.empty
        yield f"{group}.{key}", kind(value, annotation), _yaml(value), said.get(key, "")


def configuration() -> str:
    """Write the page of all keys: sections of ``train.yaml``, then each group with its options."""
    said = comments(shipped.conf_dir() / "train.yaml")
    parts = [
        "# Configuration",
        "This page is written from the files of `conf/`. A group and an option choose a part (`mask_rule=random`), a "
        "key and a value set a number (`optimizer.lr=0.1`). A default in `${...}` follows another key; `???` must be "
        "given. A key that there is not, and a value out of range, is one line that says what would be right.",
        "## Keys without a group",
        *_table(
            (key, kind(value), _yaml(value), said.get(key, ""))
            for key, value in shipped.main().items()
            if _plain(key, value)
        ),
    ]
    for section, held in shipped.sections().items():
        if section not in shipped.groups():
            leaves = {key: value for key, value in held.items() if not key.startswith("_")}
            listed = (
                (f"{section}.{key}", kind(v), _yaml(v), said.get(f"{section}.{key}", "")) for key, v in leaves.items()
            )
            parts += [f"## {section}", *_table(listed)]
    parts += [part for group in shipped.groups() for part in _group(group)]
    return "\n\n".join(parts) + "\n"


def _plain(key: str, value: Any) -> bool:
    return key not in ("defaults", "hydra") and not isinstance(value, dict)


def _group(group: str) -> Iterator[str]:
    """Write a group: a list of its options, the keys that all have, and those of each."""
    chosen = shipped.defaults().get(group)
    yield f"## {group}"
    yield f"Default: `{group}={chosen}`." if chosen else "None is chosen by default."
    options = shipped.options(group)
    yield "\n".join(
        f"- `{group}={option}`: {head(shipped.conf_dir() / group / f'{option}.yaml')}" for option in options
    )
    if group in shipped.WHOLE:
        yield "Its options set keys of all groups; those keys are described there."
        return
    tables = {option: list(rows(group, option)) for option in options}
    shared = (
        [row for row in tables[options[0]] if all(row in table for table in tables.values())]
        if len(options) > 1
        else []
    )
    if shared:
        yield f"### Keys of every `{group}=`"
        yield from _table(iter(shared))
    for option, table in tables.items():
        own = [row for row in table if row not in shared]
        if own:
            yield f"### Keys of `{group}={option}`"
            yield from _table(iter(own))


def _table(listed: Iterator[tuple[str, str, str, str]]) -> Iterator[str]:
    lines = ["| key | type | default | description {.prose} |", "| --- | --- | --- | --- |"]
    for key, typed, value, said in listed:
        cells = (f"`{key}`", _escaped(typed), f"`{value}`", _escaped(said))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    yield "\n".join(lines)


def _escaped(text: str) -> str:
    """Escape what Markdown would read: a YAML comment is plain text."""
    return re.sub(r"([*_])", r"\\\1", text).replace("<", "&lt;")


def _yaml(value: Any) -> str:
    """Write a value as one types it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value) if value != "" else '""'


def commands() -> str:
    """Write the page of command lines: what each prints for ``--help``."""
    parts = ["# Command lines", "Written from each command's `--help`."]
    for name in COMMANDS:
        parts += [f"## {name}", "```text\n" + _help(name).strip() + "\n```"]
        parts += [
            f"### {name} {verb}\n\n```text\n{_help(name, 'run', verb).strip()}\n```" for verb in VERBS.get(name, ())
        ]
    lines = [f"| `{name}` | {_first_line(name)} |" for name in others()]
    parts += ["## Measurements and studies", "\n".join(["| command | what it does |", "| --- | --- |", *lines])]
    return "\n\n".join(parts) + "\n"


def _help(name: str, *words: str) -> str:
    command = [sys.executable, "-m", f"fedsparse.{name}", *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def runnable() -> set[str]:
    """List the modules that are commands: those that call themselves when they are run."""
    found = set()
    for path in (ROOT / "fedsparse").rglob("*.py"):
        called = 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
        if (called or path.stem == "__main__") and not {"renamed", "peers"} & set(path.parts):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(part for part in parts if part != "__main__"))
    return found


def others() -> list[str]:
    """List the commands that measure or study, which only a line describes."""
    main = {f"fedsparse.{name}" for name in COMMANDS}
    return [f"python -m {name}" for name in sorted(runnable() - main)]


def _first_line(command: str) -> str:
    found = import_module(command.removeprefix("python -m ")).__doc__ or ""
    return found.strip().splitlines()[0].replace("``", "`").replace("|", "\\|")


def api() -> dict[str, str]:
    """Write a page for each package: its public names, for mkdocstrings.

    Raises:
        ValueError: a public name has no docstring.

    """
    return {f"reference/api/{package}.md": _package(package) for package in PACKAGES}


@cache
def exported(package: str) -> dict[str, Any]:
    """Read the public names of a package: its ``__all__``, or a module's own classes and functions."""
    module = import_module(package)
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == package]
    names = getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]
    return {name: getattr(module, name) for name in sorted(names)}


def _package(package: str) -> str:
    module = import_module(package)
    summary = (module.__doc__ or "").strip().replace("``", "`")
    title = package.replace(".", ".<wbr>")  # a narrow screen breaks it there
    parts, elsewhere = [f"# {title}", summary], []
    for name, thing in exported(package).items():
        if not thing.__doc__:  # getdoc would take that of a base class
            raise ValueError(f"{package}.{name} is public and has no docstring")
        if name != getattr(thing, "__name__", name).rpartition(".")[2]:
            elsewhere.append(f"- `{name}` is an earlier name of `{thing.__name__}`")
        elif (home := _home(thing, package)) == package:
            parts.append(f"::: {thing.__module__}.{thing.__qualname__}")
        else:
            elsewhere.append(f"- [`{name}`]({home}.md)")
    parts[2:2] = ["Described elsewhere:\n\n" + "\n".join(elsewhere)] if elsewhere else []
    return "\n\n".join(parts) + "\n"


def _home(thing: Any, package: str) -> str:
    """Find the page that describes a public name: of the packages that export it, that nearest to its definition."""
    if inspect.ismodule(thing):
        return thing.__name__
    exporting = [name for name in PACKAGES if thing in exported(name).values()]
    near = [name for name in exporting if thing.__module__.startswith(name)]
    return max(near, key=len) if near else (exporting or [package])[0]
