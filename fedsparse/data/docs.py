"""Sentences of the documentation of Python's standard library, in four topics: text data without a download.

The source files are read with ``ast``; no module is imported. The sentences depend on the version of Python, so the
data set has a fingerprint of them.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOPICS = ("network", "data", "system", "tools")
FEWEST, MOST = 5, 60  # words of a sentence

# The modules of each topic; those that a Python version lacks are left out.
MODULES = {
    "network": """asyncio asyncore asynchat cgi email ftplib http imaplib ipaddress mailbox netrc nntplib poplib
        selectors smtpd smtplib socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc""",
    "data": """_collections_abc _pydecimal _pydatetime _strptime base64 bisect bz2 calendar codecs collections
        configparser copy csv datetime difflib encodings enum fractions gzip heapq html json lzma numbers pickle
        pickletools plistlib quopri random re shelve sqlite3 statistics string stringprep tarfile textwrap
        tomllib uuid xml zipfile zoneinfo""",
    "system": """_pyio _threading_local concurrent contextvars crypt ctypes curses fileinput filecmp fnmatch genericpath
        getpass glob io logging multiprocessing ntpath os pathlib pipes platform posixpath pty queue sched
        shutil signal site stat subprocess sysconfig tempfile threading tty _osx_support _aix_support""",
    "tools": """ast bdb cProfile code codeop compileall dataclasses dis distutils doctest ensurepip imp importlib
        inspect lib2to3 modulefinder opcode pdb pkgutil profile pstats py_compile pyclbr pydoc rlcompleter runpy
        symtable tabnanny timeit token tokenize trace traceback tracemalloc typing unittest venv warnings zipapp
        zipimport""",
}
# Modules in no topic: ``fedsparse.studies.pretrain_text`` trains on them.
HELD_OUT = """abc argparse aifc cmd cmath colorsys contextlib copyreg functools getopt gettext graphlib hashlib hmac
        idlelib keyword linecache locale mailcap mimetypes operator optparse pprint reprlib secrets shlex sndhdr
        sunau test tkinter turtle turtledemo types wave weakref"""

COPIES = {"test", "tests", "testing", "_bundled", "_vendor", "externals"}  # folders that are left out
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'`(]?[A-Z])")
CODE = re.compile(r"^\s*(>>>|\.\.\.)")


@dataclass(frozen=True)
class Sentence:
    """A sentence, the module that it documents, and the index of the module's topic in ``TOPICS``."""

    text: str
    module: str
    topic: int


def held_by_clients(root: Path | None = None) -> list[Sentence]:
    """Read the sentences of all topics, sorted by file and position; of equal ones only the first.

    Args:
        root: folder of the library; None: of the running Python.

    Raises:
        ValueError: there are no source files, or a topic has no sentence.

    """
    topics = {module: i for i, topic in enumerate(TOPICS) for module in MODULES[topic].split()}
    found: dict[str, Sentence] = {}
    for module, text in library_sentences(library() if root is None else root, set(topics)):
        found.setdefault(text, Sentence(text, module, topics[module]))
    if lacking := set(range(len(TOPICS))) - {sentence.topic for sentence in found.values()}:
        where = library() if root is None else root
        raise ValueError(
            f"data=stdlib_docs found no sentence on {TOPICS[min(lacking)]} in {where}; "
            "it needs a Python whose standard library lies there as .py files"
        )
    return list(found.values())


def held_out(root: Path | None = None) -> list[str]:
    """Read the sentences of the modules in no topic, without those that also occur in a topic."""
    folder = library() if root is None else root
    taken = {sentence.text for sentence in held_by_clients(folder)}
    found = dict.fromkeys(text for _, text in library_sentences(folder, set(HELD_OUT.split())))
    return [text for text in found if text not in taken]


def library() -> Path:
    """Find the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def library_sentences(root: Path, modules: set[str]) -> Iterator[tuple[str, str]]:
    """Read the sentences of modules in a folder, without tests and vendored packages: (module, sentence)."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        module, *inner = path.relative_to(root).with_suffix("").parts
        if module in modules and not COPIES & set(inner) and path.is_file():
            yield from ((module, text) for docstring in docstrings(path) for text in sentences(docstring))


def docstrings(path: Path) -> list[str]:
    """List the docstrings of a file, the module's first, then by line; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old code; as errors they would exclude the file
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 and the tests have broken files on purpose
        return []
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, DEFINITIONS)), key=lambda n: getattr(n, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def sentences(docstring: str) -> list[str]:
    r"""Split a docstring into sentences of 5 to 60 words, without the lines of interpreter sessions.

    >>> sentences("Open a file for reading. Close it!\n\n>>> f = open('a b c d e f')\n\nThat is all there is to it")
    ['Open a file for reading.', 'That is all there is to it']
    """
    lines = ["" if CODE.match(line) else line for line in docstring.splitlines()]
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", "\n".join(lines))]
    found = [text for paragraph in paragraphs for text in SENTENCE_END.split(paragraph)]
    return [text for text in found if FEWEST <= len(text.split()) <= MOST]
