"""Where the input tensors of a network come from: stored rows, the request, or other tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from feature_client.groups import Frozen, Name


class Scalars(Frozen):
    """Scalar fields of one group, concatenated in the order of `fields`: float32[F]."""

    kind: Literal["scalars"] = "scalars"
    group: Name
    fields: Annotated[tuple[Name, ...], Field(min_length=1)]


class Category(Frozen):
    """The code of a categorical field: int64."""

    kind: Literal["category"] = "category"
    group: Name
    field: Name


class EmbeddingVector(Frozen):
    """An embedding field, multiplied by its scale: float32[D]."""

    kind: Literal["embedding"] = "embedding"
    group: Name
    field: Name


class EmbeddingSet(Frozen):
    """Embedding fields of one space, such as a user's interests: float32[K, D], each multiplied by its scale.

    A row that holds fewer than K has zeros in the fields that are left. Importances are scalars of the same group.
    """

    kind: Literal["embedding_set"] = "embedding_set"
    group: Name
    fields: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)]


class SequenceEmbeddings(Frozen):
    """Embeddings of the pins of the newest actions, newest first: float32[L, D], padded with zeros."""

    kind: Literal["sequence_embeddings"] = "sequence_embeddings"
    group: Name
    field: Name


class SequenceActions(Frozen):
    """The newest actions, newest first: int64[L], the code of each action plus one, padded with 0."""

    kind: Literal["sequence_actions"] = "sequence_actions"


class SurfaceIndex(Frozen):
    """The index of the request's surface in the manifest's `surfaces`: int64."""

    kind: Literal["surface"] = "surface"


class QueryVector(Frozen):
    """The embedding of the query, in the space of a pin group's embedding field: float32[D], zeros without a query."""

    kind: Literal["query"] = "query"
    group: Name
    field: Name


class Recency(Frozen):
    """How recently the user acted, of `model_store.model.recency`: float32[4]."""

    kind: Literal["recency"] = "recency"


class Similarities(Frozen):
    """What `model_store.model.similarities` computes of a candidate from other inputs, which it names: float32[K]."""

    kind: Literal["similarities"] = "similarities"
    user: Name
    query: Name
    pin: Name
    #: Both or none; without them, K is 2.
    sequence: Name | None = None
    actions: Name | None = None


class SetSimilarities(Frozen):
    """The cosines of a candidate with each vector of an embedding set, 0 for those that are left out: float32[K].

    It names the inputs that it compares.
    """

    kind: Literal["set_similarities"] = "set_similarities"
    set: Name
    pin: Name


#: Columns of the input `recency`: the age of the newest action, and how many lie in the last hour, day and week.
RECENCY_NAMES = ("newest_age", "last_hour", "last_day", "last_week")

Source = Annotated[
    Scalars
    | Category
    | EmbeddingVector
    | EmbeddingSet
    | SequenceEmbeddings
    | SequenceActions
    | SurfaceIndex
    | QueryVector
    | Recency
    | Similarities
    | SetSimilarities,
    Field(discriminator="kind"),
]


class TensorInput(Frozen):
    """One input tensor of the network. Its source determines its side, dtype and shape."""

    name: Name
    source: Source


def similarity_count(length: int, actions: int) -> int:
    """Return the number of similarities for a sequence of this length, and so many kinds of action."""
    return 6 + 2 * actions if length else 2


def compared_actions(similarities: int) -> int:
    """Return the number of kinds of action that give so many similarities, with a sequence."""
    return (similarities - 6) // 2
