"""Which pins of an answer have scores. Under overload, servers score the first candidates only and answer the rest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from impressions.dataset import flat, row_splits

#: The columns with scores of each pin, and the column of names that says how many each pin has; one without a name.
_SCORES = {"probabilities": "heads", "party_utilities": "parties", "utilities": None}
#: The columns with one or more values of each pin.
_OF_PINS = ("pin_ids", "places", *_SCORES, "attribute_values", "propensities", "seen")


def scored_pins(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Find the pins of answers that have scores, all of them finite: those up to the first pin without.

    Args:
        table: r rows of the log, whose lists fit their pins.

    Returns:
        int64[r], how many pins those are; and bool[r], whether the answer can be used: it cannot if a pin with scores
        follows one without, because the order then has no reason that the log could tell, or if no pin has scores.
    """
    splits = row_splits(table["pin_ids"])
    pins = np.diff(splits)
    scored, unscored = pins.copy(), np.empty(0, np.int64)
    for name, names in _SCORES.items():
        wrong = np.flatnonzero(~np.isfinite(flat(table[name])))
        if len(wrong):
            widths = np.ones(len(pins), np.int64) if names is None else np.diff(row_splits(table[names]))
            unscored = np.union1d(unscored, np.searchsorted(np.cumsum(np.repeat(widths, pins)), wrong, side="right"))
    rows = np.searchsorted(splits, unscored, side="right") - 1
    np.minimum.at(scored, rows, unscored - splits[rows])
    last = scored + np.bincount(rows, minlength=len(pins)) == pins
    return scored, last & ((scored > 0) | (pins == 0))


def without_unscored(table: pa.Table, scored: np.ndarray) -> pa.Table:
    """Return the rows of a dataset with the first int64[r] pins of each."""
    pins = np.diff(row_splits(table["pin_ids"]))
    if (pins == scored).all():
        return table
    for name in _OF_PINS:
        lengths = np.diff(row_splits(table[name]))
        kept = lengths // np.maximum(pins, 1) * scored
        places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        column = table[name].combine_chunks()
        values = column.flatten().filter(pa.array(places < np.repeat(kept, lengths)))
        splits = pa.array(np.concatenate([[0], np.cumsum(kept)]), pa.int32())
        lists = pa.ListArray.from_arrays(splits, values, type=column.type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), lists)
    return table
