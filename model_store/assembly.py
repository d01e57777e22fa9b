"""Fetched features to input tensors, as the manifest says. Training and serving both come through here."""

from __future__ import annotations

import numpy as np

from feature_client.codec import State
from feature_client.fetcher import Fetched
from feature_client.groups import EmbeddingSpace
from kernels.engine import FeatureBatch
from model_store.manifest import (
    Category,
    EmbeddingVector,
    Manifest,
    QueryVector,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    SurfaceIndex,
    TensorInput,
)


class Assembler:
    """Builds the tensors of one model. Stateless after construction; safe to share between threads."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._surface_index = {surface.name: i for i, surface in enumerate(manifest.surfaces)}
        self._specs = {spec.name: spec for spec in manifest.specs}

    def assemble(self, fetched: Fetched, surface: str, query: np.ndarray | None = None) -> FeatureBatch:
        """Build the batch of one request.

        Args:
            fetched: the request's features; missing rows already hold their group's defaults.
            surface: a surface of the manifest.
            query: float32[D], the caller's query vector; None takes the fetched query pin, or no query.

        Returns:
            One request, N rows in the order of `fetched.candidate_index`.
        """
        request: dict[str, np.ndarray] = {}
        candidate: dict[str, np.ndarray] = {}
        for tensor in self._manifest.inputs:
            spec = self._specs[tensor.name]
            value = self._build(tensor, fetched, surface, query)
            if spec.side == "request":
                request[tensor.name] = value[None]
            else:
                candidate[tensor.name] = value
        return FeatureBatch(request, candidate, np.array([0, len(fetched.candidate_index)], np.int32))

    def _build(self, tensor: TensorInput, fetched: Fetched, surface: str, query: np.ndarray | None) -> np.ndarray:
        source = tensor.source
        match source:
            case Scalars(group=group, fields=fields):
                return np.stack([self._column(fetched, group, f).astype(np.float32) for f in fields], axis=-1)
            case Category(group=group, field=field):
                return np.asarray(self._column(fetched, group, field), np.int64)
            case EmbeddingVector(group=group, field=field):
                space = self._manifest.embedding_field(group, field).space
                return _real_values(self._column(fetched, group, field), space)
            case SequenceEmbeddings(group=group, field=field):
                space = self._manifest.embedding_field(group, field).space
                found = _real_values(fetched.pins[group].rows[field][fetched.event_index], space)
                return _padded(found, self._manifest.sequence_length)
            case SequenceActions():
                return _padded(fetched.events["action"].astype(np.int64) + 1, self._manifest.sequence_length)
            case SurfaceIndex():
                return np.asarray(self._surface_index[surface], np.int64)
            case QueryVector(group=group, field=field):
                space = self._manifest.embedding_field(group, field).space
                if query is not None:
                    return np.asarray(query, np.float32)
                if fetched.query_index is None or fetched.pins[group].states[fetched.query_index] != State.PRESENT:
                    return np.zeros(space.dim, np.float32)
                return _real_values(fetched.pins[group].rows[field][fetched.query_index], space)

    def _column(self, fetched: Fetched, group: str, field: str) -> np.ndarray:
        """Return a field of the user ([...]) or of the candidates ([N, ...])."""
        if group in fetched.user:
            return np.asarray(fetched.user[group].rows[field][0])
        # The field first: gathering whole rows to read one field of them costs three times as much.
        return np.asarray(fetched.pins[group].rows[field][fetched.candidate_index])


def _real_values(stored: np.ndarray, space: EmbeddingSpace) -> np.ndarray:
    values: np.ndarray = stored.astype(np.float32)
    return values if space.scale == 1.0 else np.multiply(values, space.scale, dtype=np.float32)


def _padded(found: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros((length, *found.shape[1:]), found.dtype)
    padded[: len(found)] = found
    return padded
