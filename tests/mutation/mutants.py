"""One-token mutants of Python source: a comparison, an operator, a constant, a flag, a name, a statement left out."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

COMPARISONS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
}
OPERATORS = {
    "+": ("-",),
    "-": ("+",),
    "*": ("/",),
    "/": ("*",),
    "//": ("*",),
    "%": ("*",),
    "**": ("*",),
    "&": ("|",),
    "|": ("&",),
    "^": ("|",),
    "<<": (">>",),
    ">>": ("<<",),
    "and": ("or",),
    "or": ("and",),
}
_PAIRS = (
    ("min", "max"),
    ("minimum", "maximum"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("sum", "mean"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("floor", "ceil"),
    ("float32", "float64"),
    ("add_", "sub_"),
    ("mul_", "div_"),
    ("add", "sub"),
    ("mul", "div"),
)
NAMES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        file: path from the root.
        function: qualified name of the function or class around it; empty at a module's top.
        line: where it starts.
        before: the line, or the statement, in one line.
        after: what it becomes.
        start: byte where the change starts.
        stop: byte where it ends.
        text: what stands there instead.
        statement: the lines of the statement, or of its head, that it is in.
        number: which of several with the same words in the same function, from 1.

    """

    file: str
    function: str
    line: int
    before: str
    after: str
    start: int
    stop: int
    text: str
    statement: range
    number: int = 1

    @property
    def key(self) -> str:
        """Name that survives edits elsewhere in the file."""
        again = f" #{self.number}" if self.number > 1 else ""
        return f"{self.file} {self.function or 'module'}: {self.before} -> {self.after}{again}"

    def apply(self, source: str) -> str:
        """Source with the change."""
        raw = source.encode()
        return (raw[: self.start] + self.text.encode() + raw[self.stop :]).decode()


def mutants(file: str, source: str) -> list[Mutant]:
    """List every mutant of a file, in order."""
    seen: Counter[str] = Counter()
    found = []
    for mutant in sorted(_Finder(file, source).all(), key=lambda m: (m.start, m.stop, m.text)):
        seen[mutant.key] += 1
        found.append(replace(mutant, number=seen[mutant.key]))
    return found


def sample(all_of_them: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Draw mutants by the hash of their names: an edit changes few of them, and fewer are a part of more."""
    return sorted(all_of_them, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest())[:number]


class _Finder(ast.NodeVisitor):
    """Visits what runs: no annotation, decorator, message or docstring."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.raw, self.tree = file, source.encode(), ast.parse(source)
        starts = [0]
        for line in self.raw.split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        self.starts = starts
        self.scope: list[str] = []
        self.statement = range(0)
        self.found: list[Mutant] = []

    def all(self) -> list[Mutant]:
        self.visit(self.tree)
        return self.found

    def visit(self, node: ast.AST) -> None:
        around = self.statement
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            self.statement = range(node.lineno, max(node.lineno + 1, body[0].lineno if body else node.end_lineno + 1))
        super().visit(node)
        self.statement = around

    def _at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _change(self, start: int, stop: int, text: str) -> None:
        """Note a change, with the lines it is in before and after."""
        first, last = self.raw.rfind(b"\n", 0, start) + 1, self.raw.find(b"\n", stop)
        around = self.raw[first : last if last >= 0 else len(self.raw)]
        changed = around[: start - first] + text.encode() + around[stop - first :]
        before, after = (" ".join(part.decode().split()) for part in (around, changed))
        line = self.raw.count(b"\n", 0, start) + 1
        function = ".".join(self.scope)
        self.found.append(Mutant(self.file, function, line, before, after, start, stop, text, self.statement))

    def _between(self, left: ast.AST, right: ast.AST, table: dict[str, tuple[str, ...]]) -> None:
        """Swap the operator between two operands."""
        start, stop = self._span(left)[1], self._span(right)[0]
        words = "|".join(sorted((re.escape(word).replace(r"\ ", r"\s+") for word in table), key=len, reverse=True))
        gap = re.sub(rb"#[^\n]*", lambda m: b" " * len(m[0]), self.raw[start:stop]).decode()
        if match := re.search(words, gap):
            for text in table.get(" ".join(match[0].split()), ()):
                self._change(start + match.start(), start + match.end(), text)

    def _scoped(self, node: ast.AST, *parts: list) -> None:
        self.scope.append(node.name)
        for part in parts:
            for child in part:
                self.visit(child)
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scoped(node, node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
        self._scoped(node, defaults, node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave messages."""

    def visit_Raise(self, node: ast.Raise) -> None:
        self._change(*self._span(node), "pass")

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self._negate(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        if isinstance(test, (ast.Name, ast.Attribute, ast.Call)):
            start = self._span(test)[0]
            self._change(start, start, "not ")

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            self._between(left, right, COMPARISONS)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, OPERATORS)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._between(node.left, node.right, OPERATORS)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start = self._span(node)[0]
        self._change(start, start + (3 if isinstance(node.op, ast.Not) else 1), "")
        if not isinstance(node.operand, ast.Constant):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._leave_out(node)
        self._between(node.target, node.value, {f"{sign}=": (f"{swap[0]}=",) for sign, swap in OPERATORS.items()})
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self._leave_out(node)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._leave_out(node)
        self.generic_visit(node)

    def _leave_out(self, node: ast.stmt) -> None:
        self._change(*self._span(node), "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self._change(*self._span(node), "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._change(*self._span(node), "break")

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES and isinstance(node.ctx, ast.Load):
            self._change(*self._span(node), NAMES[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in NAMES and isinstance(node.ctx, ast.Load):
            stop = self._span(node)[1]
            self._change(stop - len(node.attr), stop, NAMES[node.attr])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        for text in _other_values(node.value):
            self._change(*self._span(node), text)


def _other_values(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
        if value > 0:
            yield str(value - 1)
    elif isinstance(value, float):
        yield repr(2 * value if value else 1.0)
        if value == 1.0:
            yield "0.0"
