"""Build input tensors from fetched features, as the manifest says. Training and serving share this code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from feature_client.features import FetchedFeatures
from feature_client.groups import EmbeddingSpace, FloatBlock, SequenceGroup
from kernels.engine import FeatureBatch
from kernels.native.library import library_if_built
from model_store.bundle.manifest import Manifest
from model_store.bundle.tensor_sources import (
    Category,
    EmbeddingSet,
    EmbeddingVector,
    QueryVector,
    Recency,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    SetSimilarities,
    Similarities,
    SurfaceIndex,
    TensorInput,
)
from model_store.model.recency import recency
from model_store.model.similarities import set_similarities_in_numpy, similarities_in_numpy
from model_store.model.tensor_plan import TensorPlan


class Assembler:
    """Builds the tensors of one model. Stateless after construction; safe to share between threads."""

    def __init__(self, manifest: Manifest, *, native: bool = True) -> None:
        """Prepare the assembly.

        Args:
            manifest: the model's manifest.
            native: whether to use the native library if it is built; otherwise NumPy gives the same tensors.
        """
        native = native and library_if_built() is not None
        self._tensors = TensorPlan(manifest) if native else NumpyAssembly(manifest)
        #: What to fetch for a request.
        self.needs = needs = manifest.needs
        self._users = tuple((group.name, group.dtype) for group in needs.user_groups)
        self._pins = tuple((group.name, group.dtype) for group in needs.pin_groups)
        reads = any(
            isinstance(tensor.source, SequenceActions | SequenceEmbeddings | Recency) for tensor in manifest.inputs
        )
        # A model that does not read the sequence may be given one of any length.
        self._events_max = needs.sequence_length if reads else sys.maxsize

    def assemble(self, fetched: FetchedFeatures, surface: str, query: np.ndarray | None = None) -> FeatureBatch:
        """Build the batch of one request.

        Args:
            fetched: the request's features; missing rows hold the defaults of their group.
            surface: a surface of the manifest.
            query: float32[D], the caller's query vector. None means the fetched query pin, if any.

        Returns:
            A batch of one request with N rows, in the order of the candidates.

        Raises:
            ValueError: the features are not those of one request, laid out as the manifest says.
            KeyError: a group is missing, or the manifest does not have the surface.
        """
        packed = fetched.packed
        if packed is not None and packed.fetch.needs is self.needs and isinstance(self._tensors, TensorPlan):
            return self._tensors.packed_batch(packed, surface, query)
        events = len(fetched.events)
        if fetched.events.dtype != SequenceGroup.dtype or fetched.events.ndim != 1 or events > self._events_max:
            raise _misfit("the sequence", f"up to {self._events_max}", SequenceGroup.dtype, fetched.events)
        for name, dtype in self._users:
            rows = fetched.user[name].rows
            if rows.dtype != dtype or rows.shape != (1,):
                raise _misfit(f"group {name!r}", "1", dtype, rows)
        pins = fetched.candidates + events + fetched.has_query_pin
        for name, dtype in self._pins:
            rows = fetched.pins[name].rows
            if rows.dtype != dtype or rows.shape != (pins,):
                raise _misfit(f"group {name!r}", str(pins), dtype, rows)
        return self._tensors.batch(fetched, surface, query)


def _misfit(what: str, count: str, dtype: np.dtype[np.void], found: np.ndarray) -> ValueError:
    return ValueError(f"{what}: expected {count} rows of {dtype}, got shape {found.shape} of {found.dtype}")


class NumpyAssembly:
    """The reference: several NumPy calls per tensor."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._surface_index = {surface.name: i for i, surface in enumerate(manifest.surfaces)}
        self._specs = {spec.name: spec for spec in manifest.specs}
        groups = {group.name: group for group in manifest.groups}
        self._similarities: dict[str, Similarities] = {}
        self._set_similarities: dict[str, SetSimilarities] = {}
        self._blocks: dict[str, tuple[FloatBlock, ...]] = {}
        self._spaces: dict[str, EmbeddingSpace] = {}
        for tensor in manifest.inputs:
            match tensor.source:
                case Scalars(group=name, fields=fields):
                    self._blocks[tensor.name] = groups[name].blocks_of(fields)
                case EmbeddingVector(group=name, field=field) | SequenceEmbeddings(group=name, field=field):
                    self._spaces[tensor.name] = manifest.embedding_field(name, field).space
                case EmbeddingSet(group=name, fields=fields):
                    self._spaces[tensor.name] = manifest.embedding_field(name, fields[0]).space
                case QueryVector(group=name, field=field):
                    self._spaces[tensor.name] = manifest.embedding_field(name, field).space
                case Similarities() as source:
                    self._similarities[tensor.name] = source
                case SetSimilarities() as own:
                    self._set_similarities[tensor.name] = own

    def batch(self, fetched: FetchedFeatures, surface: str, query: np.ndarray | None) -> FeatureBatch:
        """Build the batch of one request, as `Assembler.assemble` describes."""
        request: dict[str, np.ndarray] = {}
        candidate: dict[str, np.ndarray] = {}
        for tensor in self._manifest.inputs:
            spec = self._specs[tensor.name]
            if isinstance(tensor.source, Similarities | SetSimilarities):
                candidate[tensor.name] = np.empty(0, np.float32)  # keeps its place; what it compares may come later
                continue
            if isinstance(tensor.source, Recency):
                request[tensor.name] = np.array([recency(fetched.events["time_ms"], fetched.read_ms)], np.float32)
                continue
            value = self._build(tensor, fetched, surface, query)
            if spec.side == "request":
                request[tensor.name] = value[None]
            else:
                candidate[tensor.name] = value
        for name, source in self._similarities.items():
            candidate[name] = self._compared(source, request, candidate)
        for name, own in self._set_similarities.items():
            candidate[name] = set_similarities_in_numpy(candidate[own.pin], request[own.set][0])
        return FeatureBatch(request, candidate, np.array([0, fetched.candidates], np.int32))

    def _compared(
        self, source: Similarities, request: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Return float32[N, K] of tensors, which have a leading dimension of 1 on the request's side."""
        sequence, actions, kinds = np.zeros((0, 1), np.float32), np.zeros(0, np.int64), 0
        if source.sequence is not None and source.actions is not None and self._manifest.sequence is not None:
            sequence, actions = request[source.sequence][0], request[source.actions][0]
            kinds = len(self._manifest.sequence.actions)
        user, query = request[source.user][0], request[source.query][0]
        return similarities_in_numpy(candidate[source.pin], user, query, sequence, actions, kinds)

    def _build(
        self, tensor: TensorInput, fetched: FetchedFeatures, surface: str, query: np.ndarray | None
    ) -> np.ndarray:
        """Build a tensor of stored rows, or of the request's own fields."""
        source = tensor.source
        match source:
            case Scalars(group=group, fields=fields):
                values = self._scalars(tensor.name, self._rows(fetched, group), fields)
                return values[0] if group in fetched.user else values
            case Category(group=group, field=field):
                return np.asarray(self._column(fetched, group, field), np.int64)
            case EmbeddingVector(group=group, field=field):
                return _real_values(self._column(fetched, group, field), self._spaces[tensor.name])
            case EmbeddingSet(group=group, fields=fields):
                columns = [self._column(fetched, group, field) for field in fields]
                return _real_values(np.stack(columns, axis=-2), self._spaces[tensor.name])
            case SequenceEmbeddings(group=group, field=field):
                found = _real_values(fetched.event_rows(group)[field], self._spaces[tensor.name])
                return _padded(found, self._manifest.sequence_length)
            case SequenceActions():
                return _padded(fetched.events["action"].astype(np.int64) + 1, self._manifest.sequence_length)
            case SurfaceIndex():
                return np.asarray(self._surface_index[surface], np.int64)
            case QueryVector(group=group, field=field):
                row = fetched.query_row(group) if query is None else None
                return _query_vector(query, None if row is None else row[field], self._spaces[tensor.name])
            case Recency() | Similarities() | SetSimilarities():
                raise TypeError(f"{tensor.name} is not made of stored rows")

    def _scalars(self, tensor: str, rows: np.ndarray, fields: Sequence[str]) -> np.ndarray:
        """Return float32[N, F]. Adjacent fields are converted at once."""
        blocks = self._blocks[tensor]
        if len(blocks) == 1:
            return blocks[0].of(rows).astype(np.float32)
        values = np.empty((len(rows), len(fields)), np.float32)
        for i, field in enumerate(fields):
            values[:, i] = rows[field]
        return values

    def _column(self, fetched: FetchedFeatures, group: str, field: str) -> np.ndarray:
        """Return a field of the user, shape [...], or of the candidates, shape [N, ...]."""
        column = self._rows(fetched, group)[field]
        return np.asarray(column[0] if group in fetched.user else column)

    def _rows(self, fetched: FetchedFeatures, group: str) -> np.ndarray:
        return fetched.user[group].rows if group in fetched.user else fetched.candidate_rows(group)


def _query_vector(given: np.ndarray | None, stored: np.ndarray | None, space: EmbeddingSpace) -> np.ndarray:
    """Return float32[D]: the vector that was given, or that of the query's pin, or zeros without either."""
    if given is not None:
        return np.asarray(given, np.float32)
    return np.zeros(space.dim, np.float32) if stored is None else _real_values(stored, space)


def _real_values(stored: np.ndarray, space: EmbeddingSpace) -> np.ndarray:
    values: np.ndarray = stored.astype(np.float32)
    return values if space.scale == 1.0 else np.multiply(values, space.scale, dtype=np.float32)


def _padded(found: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros((length, *found.shape[1:]), found.dtype)
    padded[: len(found)] = found
    return padded
