"""The inputs of a network as a table with one line per row, plus the similarities that trees cannot derive."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from model_store.model.similarities import similarities_of_batch, similarity_names
from ranker.data.users.rows import INTEREST_IMPORTANCES, INTEREST_SIMILARITIES
from ranker.training.examples import Examples

#: Inputs of the network, by side. The sequence itself has no fixed columns; its similarities stand for it.
_OF_REQUEST = ("user_embedding", "user_scalars", "surface", "query", "recency")
_OF_ROW = ("pin_embedding", "pin_scalars")
#: Of networks that read interests. Their vectors are left out; the similarities stand for them.
_OPTIONAL = frozenset({INTEREST_IMPORTANCES, INTEREST_SIMILARITIES})


@dataclass(frozen=True, slots=True)
class TreeRows:
    """Rows as trees read them.

    Attributes:
        names: names of the F columns.
        table: float32[N, F].
        labels: float32[N, H].
        counts: int64[R], rows of each request.
    """

    names: tuple[str, ...]
    table: np.ndarray
    labels: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(examples: Examples, actions: tuple[str, ...]) -> TreeRows:
        """Return the rows of examples with all inputs; `actions` are the kinds of action of their sequences.

        Cost: memory for N * F numbers, with about 100 + 4 * A columns.
        """
        batch = examples.batch
        counts = np.diff(batch.row_splits).astype(np.int64)
        request = batch.row_request()
        names: list[str] = []
        parts: list[np.ndarray] = []
        for tensors, wanted, rows in ((batch.request, _OF_REQUEST, request), (batch.candidate, _OF_ROW, slice(None))):
            for name in (*wanted, *(own for own in tensors if own in _OPTIONAL)):
                tensor = tensors[name]
                columns = tensor.reshape(len(tensor), -1).astype(np.float32)
                parts.append(columns[rows])
                names += [name] if tensor.ndim == 1 else [f"{name}_{i}" for i in range(columns.shape[1])]
        parts.append(similarities_of_batch(batch, len(actions)))
        names += similarity_names(actions)
        return TreeRows(tuple(names), np.concatenate(parts, axis=1), examples.labels, counts)

    def digest(self) -> str:
        """Return a digest of all names and numbers. Cost: about a second per gigabyte."""
        digest = hashlib.blake2b("\n".join(self.names).encode(), digest_size=16)
        for array in (self.table, self.labels, self.counts):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        return digest.hexdigest()
