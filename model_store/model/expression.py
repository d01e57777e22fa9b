"""Expressions of a utility table: arithmetic over named columns, checked and then compiled by numexpr."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

import numexpr
import numpy as np

#: Elementwise functions of numexpr, with their number of arguments.
FUNCTIONS = {
    "where": 3, "exp": 1, "expm1": 1, "log": 1, "log1p": 1, "log10": 1, "sqrt": 1, "abs": 1, "tanh": 1,
    "sin": 1, "cos": 1, "floor": 1, "ceil": 1, "arctan2": 2, "maximum": 2, "minimum": 2,
}  # fmt: skip

CHARACTERS_MAX = 2_000
#: Limit on the operators and calls of an expression. An own ranker's has about ten; numexpr's time to compile one grows
#: with the square of their number, 0.1 s for so many.
OPERATIONS_MAX = 100
#: Limit on the heads and attributes of an expression; numexpr's own limit is 64.
NAMES_MAX = 32

# Servers evaluate expressions on the event loop's thread. Threads of numexpr would take cores from the engine.
numexpr.set_num_threads(1)

_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Constant, ast.Name, ast.Attribute, ast.Call, ast.Load,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.Mod, ast.USub, ast.UAdd, ast.BitAnd, ast.BitOr, ast.Invert,
    ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq,
)  # fmt: skip


class ExpressionError(Exception):
    """An expression cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression over float64 columns.

    Attributes:
        names: its columns, in order.
        program: None if the expression is constant.
        constant: its value if it has no program.
    """

    names: tuple[str, ...]
    program: numexpr.NumExpr | None
    constant: float

    def __call__(self, columns: Sequence[np.ndarray]) -> np.ndarray | float:
        if self.program is None:
            return self.constant
        value: np.ndarray = self.program(*columns)
        return value


def compile_expression(source: str, names: set[str]) -> Expression:
    """Check and compile an expression.

    Args:
        source: the text.
        names: the columns that it may use: heads, and attributes such as `pin.price`.

    Raises:
        ExpressionError: it is not arithmetic over these names, or not a number.
    """
    if len(source) > CHARACTERS_MAX:
        raise ExpressionError(f"the expression has {len(source)} characters, the limit is {CHARACTERS_MAX}")
    try:
        used: dict[str, str] = {}
        tree = ast.parse(source.strip(), mode="eval")
        operations = sum(isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call) for node in ast.walk(tree))
        if operations > OPERATIONS_MAX:
            raise ExpressionError(f"the expression has {operations} operations, the limit is {OPERATIONS_MAX}")
        checked = ast.unparse(_Checker(names, used).visit(tree))
    except SyntaxError as error:
        raise ExpressionError(f"{error.msg} in {source!r}") from error
    except UnicodeError as error:
        raise ExpressionError(f"{source!r} is not text: {error}") from error
    except (MemoryError, RecursionError) as error:  # of Python's parser, or of the walk over what it gave
        raise ExpressionError("the expression is nested too deeply") from error
    if len(used) > NAMES_MAX:
        raise ExpressionError(f"the expression reads {len(used)} heads and attributes, the limit is {NAMES_MAX}")
    try:
        with np.errstate(all="ignore"):  # numexpr computes constant parts with NumPy; the result is checked below
            if not used:
                value = numexpr.evaluate(checked, local_dict={}, global_dict={})
                return Expression((), None, float(_number(np.asarray(value))))
            program = numexpr.NumExpr(checked, signature=[(alias, np.float64) for alias in used.values()])
        _number(np.asarray(program(*[np.full(2, 0.5)] * len(used))))
    except (ArithmeticError, KeyError, NotImplementedError, RecursionError, TypeError, ValueError) as error:
        raise ExpressionError(f"cannot compile {source!r}: {error}") from error
    return Expression(tuple(used), program, 0.0)


def _number(value: np.ndarray) -> np.ndarray:
    if value.dtype.kind not in "fi":
        raise ExpressionError(f"the expression is {value.dtype}, not a number; use where(condition, 1, 0)")
    if value.ndim == 0 and not np.isfinite(value):
        raise ExpressionError(f"the expression is constant and not finite: {value}")
    return value


class _Checker(ast.NodeTransformer):
    """Allows only arithmetic over known names, and replaces each name by an alias that numexpr accepts."""

    def __init__(self, names: set[str], used: dict[str, str]) -> None:
        self._names = names
        self._used = used

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, _ALLOWED):
            raise ExpressionError(f"{type(node).__name__} is not allowed in a utility expression")
        return super().generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise ExpressionError(f"{node.value!r} is not a number")
        try:
            return ast.Constant(float(node.value))
        except OverflowError as error:
            raise ExpressionError(f"{str(node.value)[:20]}... is too large") from error

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._alias(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._alias(ast.unparse(node))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = ast.unparse(node.func)
        if name not in FUNCTIONS:
            raise ExpressionError(f"unknown function {name!r}; use one of {', '.join(sorted(FUNCTIONS))}")
        if node.keywords or len(node.args) != FUNCTIONS[name]:
            raise ExpressionError(f"{name} takes {FUNCTIONS[name]} arguments")
        return ast.Call(node.func, [self.visit(argument) for argument in node.args], [])

    def _alias(self, name: str) -> ast.Name:
        if name not in self._names:
            raise ExpressionError(f"unknown name {name!r}; use one of {', '.join(sorted(self._names))}")
        return ast.Name(self._used.setdefault(name, f"x{len(self._used)}"), ast.Load())
