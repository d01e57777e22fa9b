"""Generates small faults in Python source, such as a changed comparison or constant, or a dropped statement. Pure."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
_SHOWN_MAX = 80
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A source file with one fault.

    Attributes:
        name: the function, the statement and its change. It is unique within the file, and has no line number, so that
            it stays the same when other parts of the file change.
        line: line number of the fault.
        source: source of the whole file.
    """

    name: str
    line: int
    source: str


@dataclass(frozen=True, slots=True)
class _Place:
    """The position of a node in the tree: `field` of `parent`, or its element `index`.

    `rebound` are the names that the enclosing function binds more than once.
    """

    owner: str
    rebound: frozenset[str]
    statement: ast.AST
    parent: ast.AST
    field: str
    index: int | None

    @property
    def node(self) -> ast.AST:
        value = getattr(self.parent, self.field)
        node: ast.AST = value if self.index is None else value[self.index]
        return node

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants(source: str) -> list[Mutant]:
    """Return every fault that can be planted in a file, in the file's order."""
    tree = ast.parse(source)
    found: list[Mutant] = []
    names = Counter[str]()
    for place in tuple(_places(tree, "", frozenset(), tree)):
        node, before = place.node, _shown(place.statement)
        for other in _alternatives(place):
            place.put(other)
            name = _named(place, node, before, other)
            names[name] += 1
            distinct = name if names[name] == 1 else f"{name} ({names[name]})"
            found.append(Mutant(distinct, getattr(node, "lineno", 0), ast.unparse(tree)))
            place.put(node)
    return found


def _named(place: _Place, node: ast.AST, before: str, other: ast.AST) -> str:
    """Return the name of a fault; if its statement is long, show the changed part first."""
    owner = place.owner or "module"
    if isinstance(other, ast.Pass):
        return f"{owner}: {before} -> dropped"
    if len(before) > _SHOWN_MAX:
        return f"{owner}: {_shown(node)} -> {_shown(other)} in {before[:_SHOWN_MAX]}..."
    return f"{owner}: {before} -> {_shown(other if node is place.statement else place.statement)}"


def _shown(statement: ast.AST) -> str:
    return ast.unparse(statement).splitlines()[0]


def _places(node: ast.AST, owner: str, rebound: frozenset[str], statement: ast.AST) -> Iterator[_Place]:
    """Yield all replaceable nodes: all but annotations, docstrings, decorators, texts, and the `strict` of `zip`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        owner = f"{owner}.{node.name}" if owner else node.name
        rebound = frozenset() if isinstance(node, ast.ClassDef) else _bound_again(node)
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list"} or isinstance(value, ast.JoinedStr):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not (isinstance(child, ast.keyword) and child.arg == "strict"):
                inner = child if isinstance(child, ast.stmt) else statement
                yield _Place(owner, rebound, inner, node, field, index)
                yield from _places(child, owner, rebound, inner)


def _alternatives(place: _Place) -> Iterator[ast.AST]:
    """Yield the nodes that may replace a node."""
    node = place.node
    match node:
        case ast.Compare(left, operators, comparators):
            for i, operator in enumerate(operators):
                for other in _COMPARISONS[type(operator)]:
                    yield ast.Compare(left, [*operators[:i], other(), *operators[i + 1 :]], comparators)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float())):
            pass  # the number itself is changed instead
        case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
            yield ast.BinOp(left, _ARITHMETIC[type(operator)](), right)
        case ast.AugAssign(target, operator, value):
            yield ast.Pass()
            if type(operator) in _ARITHMETIC:
                yield ast.AugAssign(target, _ARITHMETIC[type(operator)](), value)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Call(ast.Name(name), arguments, keywords) if name in _CALLS:
            yield ast.Call(ast.Name(_CALLS[name], ast.Load()), arguments, keywords)
        case ast.Call(ast.Attribute(owner, name), arguments, keywords) if name in _CALLS:
            yield ast.Call(ast.Attribute(owner, _CALLS[name], ast.Load()), arguments, keywords)
        case ast.Expr(value) if place.owner and not isinstance(value, ast.Constant | ast.Yield | ast.Await):
            yield ast.Pass()
        case ast.Raise() | ast.Break() | ast.Continue():
            yield ast.Pass()
        case ast.Assign(targets) if place.owner and any(_may_be_dropped(target, place.rebound) for target in targets):
            yield ast.Pass()
    if place.field == "test" and isinstance(node, ast.Name | ast.Attribute | ast.Call):
        yield ast.UnaryOp(ast.Not(), node)


def _may_be_dropped(target: ast.AST, rebound: frozenset[str]) -> bool:
    """Return whether a program runs without this binding: if nothing else binds the name, every test would fail."""
    return not isinstance(target, ast.Name | ast.Tuple) or (isinstance(target, ast.Name) and target.id in rebound)


def _bound_again(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    bound = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound += [node.arg for node in ast.walk(function) if isinstance(node, ast.arg)]
    return frozenset(name for name, times in Counter(bound).items() if times > 1)
