"""Runs the expressions of a utility table in C++, without the interpreter lock and without NumPy.

numexpr compiles an expression to a program for a small register machine: an operation, a register for its result, and
registers of operands. `kernels/native/answer.cpp` has a machine for such programs. This file translates them once, when
a table is loaded, then runs both machines on awkward numbers and keeps the translation only if every bit agrees.
Results are therefore numexpr's on every platform; where they would not be, numexpr stays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numexpr
import numpy as np

from kernels.native.library import library
from model_store.model.expression import Expression
from model_store.model.logistic import Logistic

_AWKWARD = (0.0, -0.0, 0.5, 1.0, -1.0, 2.5, -3.7, 1e-310, 1e308, -1e200, np.inf, -np.inf, np.nan)
_AWKWARD_ROWS = 257
_NOOP = bytes([numexpr.interpreter.opcodes[b"noop"]])


class UnknownOperationError(Exception):
    """An expression uses an operation that the native machine does not have. The message names it."""


class _Surface(ctypes.Structure):
    """`PinrankSurface` of answer.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("heads", "inputs", "constants", "parties", "registers", "steps")),
        *((name, ctypes.c_void_p) for name in ("sources", "values", "program", "weights", "slopes", "intercepts")),
        ("pattern", ctypes.c_int64),
    )


class NativeUtility:
    """One surface's expressions, weights and calibration, for the native library. For any number of threads.

    Attributes:
        attributes: names of the columns that are read besides the heads, in the order in which they are passed.
        address: of the `PinrankSurface`.
    """

    def __init__(
        self,
        heads: Sequence[str],
        attributes: Sequence[str],
        expressions: Sequence[Expression],
        weights: np.ndarray,
        logistic: Logistic,
    ) -> None:
        """Translate the expressions.

        Args:
            heads: the model's heads, in order.
            attributes: the other columns that expressions may read.
            expressions: one for each party.
            weights: float64[P].
            logistic: the calibration of the heads.

        Raises:
            NativeLibraryError: the library cannot be loaded.
            UnknownOperationError: an expression cannot be translated.
        """
        inputs = list(dict.fromkeys(name for expression in expressions for name in expression.names))
        self.attributes = tuple(name for name in attributes if name in inputs)
        sources = [heads.index(n) if n in heads else -1 - self.attributes.index(n) for n in inputs]
        constants = [_constants(expression) for expression in expressions]
        values = [value for own in constants for value in own]
        first_result = len(inputs) + len(values)
        temporary = first_result + len(expressions)
        registers, first_constant = temporary, len(inputs)
        steps: list[tuple[int, ...]] = []
        for result, (expression, own) in enumerate(zip(expressions, constants, strict=True), first_result):
            if expression.program is None:
                steps.append((_operations()["copy"], result, first_constant, 0, 0))
            else:
                # numexpr's registers: the result, the inputs, the constants, and what is left between operations.
                mapped = [result, *map(inputs.index, expression.names)]
                mapped += range(first_constant, first_constant + len(own))
                mapped += range(temporary, temporary + len(expression.program.fullsig) - len(mapped))
                registers = max(registers, mapped[-1] + 1)
                steps += _translated(expression.program.program, mapped)
            first_constant += len(own)
        self._arrays = (
            np.array(sources, np.int32),
            np.array(values, np.float64),
            np.array(steps, np.int32),
            np.array(weights, np.float64),
            logistic.slopes,
            logistic.intercepts,
        )
        sizes = (len(heads), len(inputs), len(values), len(expressions), registers, len(steps))
        self._surface = _Surface(*sizes, *(array.ctypes.data for array in self._arrays), len(logistic.slopes))
        self.address = ctypes.addressof(self._surface)
        self._run = library().pinrank_party_utilities
        self._run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_void_p]

    def party_utilities(self, probabilities: np.ndarray, attributes: Sequence[np.ndarray]) -> np.ndarray:
        """Evaluate all expressions.

        Args:
            probabilities: float32[N, H].
            attributes: for each of `self.attributes` numbers of shape [N].

        Returns:
            float64[N, P].

        Raises:
            ValueError: the shapes do not fit each other.
        """
        probabilities = np.ascontiguousarray(probabilities, np.float32)
        rows = len(probabilities)
        if probabilities.shape != (rows, self._surface.heads):
            raise ValueError(f"expected probabilities of {self._surface.heads} heads, got {probabilities.shape}")
        columns = [a if a.dtype.isnative and a.dtype.name in types() else a.astype(np.float64) for a in attributes]
        if any(column.shape != (rows,) for column in columns):
            raise ValueError(f"{rows} rows of probabilities, but attributes of {[c.shape for c in columns]}")
        records = [number for c in columns for number in (c.ctypes.data, c.strides[0], types()[c.dtype.name])]
        parties = np.empty((rows, self._surface.parties))
        failed = self._run(
            self.address,
            probabilities.ctypes.data,
            (ctypes.c_int64 * len(records))(*records),
            rows,
            parties.ctypes.data,
        )
        if failed:
            raise MemoryError(f"no memory for the utilities of {rows} rows")
        return parties


def agrees(native: NativeUtility, heads: int, reference: Callable[[np.ndarray, list[np.ndarray]], np.ndarray]) -> bool:
    """Return whether native utilities of awkward numbers are the reference's to the bit; all NaNs are equal.

    Args:
        native: a translation.
        heads: H.
        reference: returns float64[N, P] of probabilities, float32[N, H], and of a column for each attribute.
    """
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):  # some become infinite
        awkward = np.array(_AWKWARD).astype(np.float32)
    probabilities = rng.uniform(size=(_AWKWARD_ROWS, heads)).astype(np.float32)
    probabilities[1::2] = rng.choice(awkward, probabilities[1::2].shape)
    attributes = [rng.choice(np.array(_AWKWARD), _AWKWARD_ROWS) for _ in native.attributes]
    for column in attributes:
        column[::3] = rng.uniform(-9, 9, len(column[::3]))
    found, expected = native.party_utilities(probabilities, attributes), reference(probabilities, attributes)
    same = found.view(np.uint64) == expected.view(np.uint64)
    return bool(np.all(same | (np.isnan(found) & np.isnan(expected))))


@cache
def types() -> dict[str, int]:
    """Return the dtypes of attributes that the native library reads, with their numbers."""
    return _numbered("pinrank_type_name")


@cache
def _operations() -> dict[str, int]:
    return _numbered("pinrank_operation_name")


def _numbered(function: str) -> dict[str, int]:
    name_of = library()[function]
    name_of.restype = ctypes.c_char_p
    numbers: dict[str, int] = {}
    while name := name_of(len(numbers)):
        numbers[name.decode()] = len(numbers)
    return numbers


def _constants(expression: Expression) -> list[float]:
    if expression.program is None:
        return [expression.constant]
    kinds = expression.program.fullsig.decode()
    if not set(kinds) <= set("dbi"):
        raise UnknownOperationError(f"registers of the kinds {kinds}")
    return [float(value) for value in expression.program.constants]


def _translated(program: bytes, registers: Sequence[int]) -> list[tuple[int, ...]]:
    """Translate a program of numexpr.

    Args:
        program: four bytes an instruction: an operation, the register of its result, two operands. If there are more
            operands, a no-op follows that holds them.
        registers: for each register of the program its number in the native machine.
    """
    names = {code: name.decode() for name, code in numexpr.interpreter.opcodes.items()}
    steps = []
    for start in range(0, len(program), 4):
        if names[program[start]] == "noop":
            continue
        more = program[start + 5 : start + 8] if program[start + 4 : start + 5] == _NOOP else b""
        operands = program[start + 2 : start + 4] + more
        name, kinds = names[program[start]].rsplit("_", 1)
        if name == "func":
            name, kinds = _function(kinds.rstrip("n"), operands[len(kinds) - 2])
        elif (name, kinds) in {("cast", "ib"), ("cast", "di")}:  # the only integers are truth values
            name, kinds = "copy", "dd"
        if name not in _operations() or not set(kinds) <= set("db"):
            raise UnknownOperationError(f"the operation {name}_{kinds}")
        used = [registers[operand] for operand in operands[: len(kinds) - 1]]
        steps.append((_operations()[name], registers[program[start + 1]], *used, *[0] * (3 - len(used))))
    return steps


def _function(kinds: str, number: int) -> tuple[str, str]:
    """Return the name of a function of numexpr, and the kinds of its result and arguments."""
    for name, code in numexpr.interpreter.funccodes.items():
        found, found_kinds = name.decode().rsplit("_", 1)
        if (found_kinds, code) == (kinds, number):
            return found, kinds
    raise UnknownOperationError(f"the function {number} of {kinds}")
