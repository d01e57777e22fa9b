"""The manifest of a bundle: the features, inputs, heads and surfaces of a model, and the digests of its files."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from feature_client.groups import (
    Categorical,
    Embedding,
    EmbeddingSpace,
    FeatureGroup,
    FeatureNeeds,
    Frozen,
    Name,
    Scalar,
    SequenceGroup,
)
from kernels.engine import Side, TensorSpec
from model_store.bundle.tensor_sources import (
    RECENCY_NAMES,
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
    Source,
    SurfaceIndex,
    TensorInput,
    similarity_count,
)

_Source = TypeVar("_Source", bound=Source)


class Calibration(Frozen):
    """Logistic calibration of one head: probability = sigmoid(slope * logit + intercept)."""

    slope: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    intercept: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class Head(Frozen):
    """One predicted action. Heads are in the order of the network's output columns."""

    name: Name
    meaning: str
    calibration: Calibration = Calibration()


class Surface(Frozen):
    """A place where rankings are shown. If `query` is set, every request must include a query."""

    name: Name
    query: bool = False


class Tuning(Frozen):
    """How the weights of a surface were found: what `pinrank tune` states in the utility table."""

    #: The party that got the most that the thetas of the others allow.
    maximised: Name
    #: The version whose probabilities they were tuned on.
    model: str
    data: str
    #: The requests lie in [since_ms, until_ms), Unix time in milliseconds.
    since_ms: int
    until_ms: int
    requests: Annotated[int, Field(ge=1)]
    users: Annotated[int, Field(ge=1)]
    #: The duality gap, as a share of the optimum.
    gap: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    #: By party, the least mean value of an answer.
    thetas: dict[Name, float] = Field(default_factory=dict)


class TrainingRows(Frozen):
    """Which rows a version learned from."""

    #: Negatives per request.
    negatives: Annotated[int, Field(ge=0)]
    #: Approximate number of requests, sampled evenly; None means all.
    requests_max: Annotated[int, Field(ge=1)] | None = None
    #: Approximate number of validation requests, of which every other one was learned from, too.
    newest_requests_max: Annotated[int, Field(ge=0)] = Field(default=0, exclude_if=lambda requests: requests == 0)


class Lineage(Frozen):
    """Where the model comes from: enough to reproduce it."""

    data: str
    data_sha256: str
    command: str
    code: str
    seed: int
    parent: str | None = None
    #: Unix time in milliseconds of the first event after the training data.
    learned_until_ms: int | None = None
    #: Metrics of the training run, with free-form names; people and publishing gates read them.
    metrics: dict[str, float] = Field(default_factory=dict)
    #: The fields below are left out if empty, so that servers that do not know them read the manifest too.
    #: None: all requests of its data, with 24 negatives each.
    training_rows: TrainingRows | None = Field(default=None, exclude_if=lambda rows: rows is None)
    #: Where the version was not at least as good as a baseline when it was trained.
    shortfalls: tuple[str, ...] = Field(default=(), exclude_if=lambda shortfalls: not shortfalls)
    #: By surface.
    tuning: dict[Name, Tuning] = Field(default_factory=dict, exclude_if=lambda tuning: not tuning)


class FileEntry(Frozen):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]


#: A file in the bundle's folder, or in its subfolder `plans/`.
FileName = Annotated[str, Field(pattern=r"^(plans/)?[a-z0-9][a-z0-9_-]*(\.[a-z0-9]+)+$", max_length=80)]


class Manifest(Frozen):
    """The contract between a model and its servers (its ABI), validated as a whole."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=60)]
    version: Annotated[int, Field(ge=1, lt=1 << 63)]
    groups: tuple[FeatureGroup, ...]
    sequence: SequenceGroup | None
    sequence_length: Annotated[int, Field(ge=0)]
    inputs: tuple[TensorInput, ...]
    heads: Annotated[tuple[Head, ...], Field(min_length=1, max_length=256)]
    surfaces: Annotated[tuple[Surface, ...], Field(min_length=1, max_length=256)]
    #: Largest allowed difference between an engine's probabilities and the expected ones of the golden requests.
    golden_tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    lineage: Lineage
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _coherent(self) -> Manifest:
        for what, names in (
            ("group", [g.name for g in self.groups]),
            ("input", [i.name for i in self.inputs]),
            ("head", [h.name for h in self.heads]),
            ("surface", [s.name for s in self.surfaces]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} names must be unique: {names}")
        for tensor in self.inputs:
            try:
                self.spec(tensor)
            except KeyError as error:
                raise ValueError(f"input {tensor.name!r}: {error.args[0]}") from error
        if any(surface.query for surface in self.surfaces) and self.query_space is None:
            raise ValueError("a surface needs a query, but no input reads one")
        return self

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @cached_property
    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and intercepts, float32[H] each."""
        calibrations = [head.calibration for head in self.heads]
        slopes = np.array([c.slope for c in calibrations], np.float32)
        return slopes, np.array([c.intercept for c in calibrations], np.float32)

    def group(self, name: str) -> FeatureGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no feature group {name!r}; the manifest has {[g.name for g in self.groups]}")

    def embedding_field(self, group: str, field: str) -> Embedding:
        found = self.group(group).field(field)
        if not isinstance(found, Embedding):
            raise KeyError(f"{group}.{field} is not an embedding")
        return found

    @property
    def query_space(self) -> EmbeddingSpace | None:
        """The embedding space of the query vector, or None when the model reads no query."""
        for tensor in self.inputs:
            if isinstance(tensor.source, QueryVector):
                return self.embedding_field(tensor.source.group, tensor.source.field).space
        return None

    @cached_property
    def request_bytes(self) -> int:
        """Bytes of a request's own features and tensors, including the pins of its sequence."""
        needs = self.needs
        rows = sum(g.dtype.itemsize for g in needs.user_groups)
        rows += self.sequence_length * sum(g.dtype.itemsize for g in needs.pin_groups)
        return rows + self._tensor_bytes("request")

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one candidate: its id, stored rows, tensors, logits and utilities."""
        rows = sum(g.dtype.itemsize for g in self.needs.pin_groups)
        return 8 + rows + self._tensor_bytes("candidate") + 16 * len(self.heads) + 16

    def _tensor_bytes(self, side: str) -> int:
        found = (s for s in self.specs if s.side == side)
        return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in found)

    @property
    def needs(self) -> FeatureNeeds:
        """The features to fetch for a request."""
        return FeatureNeeds(
            user_groups=tuple(g for g in self.groups if g.entity == "user"),
            pin_groups=tuple(g for g in self.groups if g.entity == "pin"),
            sequence=self.sequence,
            sequence_length=self.sequence_length,
        )

    def spec(self, tensor: TensorInput) -> TensorSpec:
        """Return the side, dtype and trailing shape of an input. Raises KeyError if the manifest lacks its source."""
        side: Side = "request"
        dtype = "float32"
        shape: tuple[int, ...] = ()
        match tensor.source:
            case Similarities() | SetSimilarities() as source:
                side, shape = "candidate", (self._compared(source),)
            case Recency():
                self._sequence_length()  # there must be one
                shape = (len(RECENCY_NAMES),)
            case Scalars(group=group, fields=fields):
                self._check_scalars(group, fields)
                side, shape = _side(self.group(group)), (len(fields),)
            case Category(group=group, field=field):
                self._check_categorical(group, field)
                side, dtype = _side(self.group(group)), "int64"
            case EmbeddingVector(group=group) | EmbeddingSet(group=group) as source:
                side, shape = _side(self.group(group)), self._vectors(source)
            case SequenceEmbeddings(group=group, field=field):
                shape = (self._sequence_length(), self.embedding_field(group, field).space.dim)
            case SequenceActions():
                dtype, shape = "int64", (self._sequence_length(),)
            case SurfaceIndex():
                dtype = "int64"
            case QueryVector(group=group, field=field):
                shape = (self.embedding_field(group, field).space.dim,)
        return TensorSpec(tensor.name, side, np.dtype(dtype).name, shape)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.spec(tensor) for tensor in self.inputs)

    def _check_scalars(self, group: str, fields: tuple[str, ...]) -> None:
        wrong = [f for f in fields if not isinstance(self.group(group).field(f), Scalar)]
        if wrong:
            raise KeyError(f"fields {wrong} of group {group!r} are not scalars")

    def _check_categorical(self, group: str, field: str) -> None:
        if not isinstance(self.group(group).field(field), Categorical):
            raise KeyError(f"{group}.{field} is not categorical")

    def _vectors(self, source: EmbeddingVector | EmbeddingSet) -> tuple[int, ...]:
        """Return the shape of stored vectors."""
        if isinstance(source, EmbeddingVector):
            return (self.embedding_field(source.group, source.field).space.dim,)
        fields = source.fields
        spaces = {self.embedding_field(source.group, field).space for field in fields}
        if len(spaces) > 1 or len(set(fields)) < len(fields):
            raise KeyError(f"fields {list(fields)} of group {source.group!r} are not distinct vectors of one space")
        return len(fields), spaces.pop().dim

    def _compared(self, source: Similarities | SetSimilarities) -> int:
        """Return the number of columns of similarities."""
        return self._similarity_count(source) if isinstance(source, Similarities) else self._set_size(source)

    def _set_size(self, source: SetSimilarities) -> int:
        held, pin = self._source(source.set, EmbeddingSet), self._source(source.pin, EmbeddingVector)
        if (self.group(held.group).entity, self.group(pin.group).entity) != ("user", "pin"):
            raise KeyError("similarities compare a user's embedding set with a pin's embedding")
        theirs = self.embedding_field(held.group, held.fields[0]).space
        own = self.embedding_field(pin.group, pin.field).space
        if theirs != own:
            raise KeyError(f"similarities compare vectors of different spaces: {theirs.ref}, {own.ref}")
        return len(held.fields)

    def _source(self, name: str, kind: type[_Source]) -> _Source:
        """Return the source of an input that similarities compare. Raises KeyError if there is none of this kind."""
        source = next((one.source for one in self.inputs if one.name == name), None)
        if not isinstance(source, kind):
            raise KeyError(f"similarities compare an input {name!r} of the kind {kind.__name__}, and there is none")
        return source

    def _similarity_count(self, source: Similarities) -> int:
        if (source.sequence is None) != (source.actions is None):
            raise KeyError("similarities to a sequence need both `sequence` and `actions`")
        wanted: list[tuple[str | None, type[Source]]] = [
            (source.user, EmbeddingVector),
            (source.query, QueryVector),
            (source.pin, EmbeddingVector),
            (source.sequence, SequenceEmbeddings),
            (source.actions, SequenceActions),
        ]
        specs = {
            name: self.spec(TensorInput(name=name, source=self._source(name, kind)))
            for name, kind in wanted
            if name is not None
        }
        if (specs[source.user].side, specs[source.pin].side) != ("request", "candidate"):
            raise KeyError("similarities compare a user's embedding with a pin's")
        dims = {name: spec.shape[-1] for name, spec in specs.items() if name != source.actions}
        if len(set(dims.values())) > 1:
            raise KeyError(f"similarities compare vectors of different dimensions: {dims}")
        length = self.sequence_length if source.sequence is not None else 0
        return similarity_count(length, 0 if self.sequence is None else len(self.sequence.actions))

    def _sequence_length(self) -> int:
        if self.sequence is None or self.sequence_length < 1:
            raise KeyError("the manifest declares no sequence")
        return self.sequence_length


def _side(group: FeatureGroup) -> Side:
    return "request" if group.entity == "user" else "candidate"
