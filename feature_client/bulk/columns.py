"""Exact conversion of a file's columns to the values of a group's fields; other values are refused with their row.

A whole number is stored exactly or refused. A fraction becomes the nearest number of the field's type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from feature_client.groups import Categorical, Embedding, Scalar

#: The kinds of NumPy types that are accepted (booleans, integers, floats) and their maximum size.
_KINDS, _BYTES_MAX = "biuf", 8


class ColumnError(ValueError):
    """A column holds a value that its field cannot hold. The message names the value, the fault and the fix.

    Attributes:
        row: the position of the first such value in the column; None if the whole column is wrong.
        value: that value; None if it is missing.
        reason: what is wrong with the value or the column.
    """

    def __init__(self, reason: str, row: int | None = None, value: object = None) -> None:
        what = "" if row is None else "the value " if value is None else f"{value!r} "
        super().__init__(what + reason)
        self.row, self.value, self.reason = row, value, reason


def entity_ids(column: Any) -> np.ndarray:
    """Return a column of ids as uint64[N]. Raises ColumnError.

    Args:
        column: a NumPy or an Arrow array.
    """
    values = _numbers(column)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ColumnError(
            f"holds {_described(values)}; ids are whole numbers from 0 to 2^64 - 1: write them as integers"
        )
    if values.dtype.kind == "i":
        _refuse(values, values < 0, "is negative; ids are whole numbers from 0 to 2^64 - 1")
    return values.astype(np.uint64)


def field_values(field: Scalar | Categorical | Embedding, column: Any) -> np.ndarray:
    """Return a column as valid values of a field, [N] or [N, D] of its stored dtype.

    Args:
        field: the field.
        column: a NumPy or an Arrow array of numbers. For an embedding, it holds rows or lists of `dim` numbers.

    Raises:
        ColumnError: a value is missing, not finite, not whole, too large, or not a code. The error names the first one.
    """
    if isinstance(field, Embedding):
        return _converted(_vectors(column, field.space.dim), np.dtype(field.space.dtype))
    values = _numbers(column)
    if values.ndim != 1:
        raise ColumnError(f"holds {_described(values)}; a {field.kind} needs one number per row")
    if isinstance(field, Categorical):
        _refuse_not_finite(values)
        codes = f"is not a code of the vocabulary, which has codes from 0 to {field.cardinality - 1}"
        compared = _comparable(values)
        _refuse(values, (compared < 0) | (compared >= field.cardinality), codes)
    return _converted(values, np.dtype(field.dtype))


def _converted(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind == "f":
        return _as_floats(values, dtype)
    if values.dtype.kind == "f":
        _refuse_not_finite(values)
        _refuse(values, values != np.floor(values), f"is not a whole number, and {dtype} holds only whole numbers")
        digits = np.finfo(values.dtype).nmant + 1
        lost = f"is beyond 2^{digits}, where {values.dtype} loses digits of whole numbers; write the column as integers"
        _refuse(values, np.abs(values) > 2.0**digits, lost)
    limits = np.iinfo(dtype)
    compared = _comparable(values)
    _refuse(values, (compared < limits.min) | (compared > limits.max), f"does not fit {dtype}")
    return values.astype(dtype)


def _as_floats(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if values.dtype.kind == "f":
        _refuse_not_finite(values)
    with np.errstate(over="ignore"):  # checked below
        found: np.ndarray = values.astype(dtype)
    _refuse(values, ~np.isfinite(found), f"is beyond the largest {dtype}")
    if values.dtype.kind in "iu":
        # The float nearest to the largest integer is one more than it, and casting that back would overflow.
        whole = found.astype(np.float64)
        inside = (whole >= -(2.0**63)) & (whole < (2.0**63 if values.dtype.kind == "i" else 2.0**64))
        back = np.where(inside, whole, 0).astype(values.dtype)
        _refuse(values, ~inside | (back != values), f"is a whole number that {dtype} cannot hold exactly")
    return found


def _comparable(values: np.ndarray) -> np.ndarray:
    """Return the numbers in a type that compares with any limit: float16 and booleans are converted."""
    wider = {"f": np.float64, "b": np.uint8}.get(values.dtype.kind)
    return values if wider is None else values.astype(wider)


def _refuse_not_finite(values: np.ndarray) -> None:
    if values.dtype.kind == "f":
        _refuse(values, ~np.isfinite(values), "is not finite")


def _refuse(values: np.ndarray, bad: np.ndarray, reason: str) -> None:
    if bad.any():
        place = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise ColumnError(reason, int(place[0]), values[place].item())


def _vectors(column: Any, dim: int) -> np.ndarray:
    """Return a column of vectors as [N, dim] numbers. Raises ColumnError."""
    if isinstance(column, np.ndarray):
        values = _numbers(column)
        if values.shape[1:] != (dim,):
            raise ColumnError(f"holds {_described(values)}; the field needs vectors of width {dim}")
        return values
    import pyarrow as pa  # noqa: PLC0415 - serving does not need it
    import pyarrow.compute as pc  # noqa: PLC0415

    lists = (pa.FixedSizeListArray, pa.ListArray, pa.LargeListArray)
    if not isinstance(column, lists) or isinstance(column, pa.MapArray):  # Arrow treats a map as a list of pairs
        raise ColumnError(f"holds {column.type}; the field needs lists of {dim} numbers")
    _refuse_nulls(column)
    widths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(widths != dim)
    if len(wrong):
        row = int(wrong[0])
        reason = f"has width {widths[row]}; the field needs vectors of width {dim}"
        raise ColumnError(reason, row, column[row].as_py())
    try:
        flat = _numbers(column.flatten())
    except ColumnError as error:
        raise ColumnError(error.reason, None if error.row is None else error.row // dim, error.value) from error
    return flat.reshape(len(column), dim)


def _numbers(column: Any) -> np.ndarray:
    """Return an array of numbers without missing values. Raises ColumnError."""
    if not isinstance(column, np.ndarray):
        import pyarrow as pa  # noqa: PLC0415

        if isinstance(column, pa.DictionaryArray):
            column = column.dictionary_decode()
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise ColumnError(f"holds {kind}; the field needs numbers: write the column as integers or floats")
        _refuse_nulls(column)
        column = column.to_numpy(zero_copy_only=False)
    if column.dtype.kind not in _KINDS or column.dtype.itemsize > _BYTES_MAX or column.ndim == 0:
        raise ColumnError(f"holds {_described(column)}; the field needs numbers: write it as integers or floats")
    found: np.ndarray = column
    return found


def _refuse_nulls(column: Any) -> None:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise ColumnError("is missing; write a value that means unknown, or omit the row", row, None)


def _described(values: np.ndarray) -> str:
    return f"{values.dtype} of shape {values.shape}" if values.ndim != 1 else str(values.dtype)
