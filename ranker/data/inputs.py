"""The input tensors of rankers whose features are made from interactions."""

from __future__ import annotations

from model_store.bundle.manifest import Manifest
from model_store.bundle.tensor_sources import (
    EmbeddingVector,
    QueryVector,
    Recency,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    Similarities,
    SurfaceIndex,
    TensorInput,
)
from ranker.data.features import PIN_GROUP, USER_GROUP, Groups
from ranker.data.schema import ActionSchema

#: As published for TransAct.
SEQUENCE_LENGTH = 100

#: Additional inputs of networks that read the sequence.
_SEQUENCE_INPUTS = (
    TensorInput(name="sequence_actions", source=SequenceActions()),
    TensorInput(name="sequence_embeddings", source=SequenceEmbeddings(group=PIN_GROUP, field="embedding")),
)
#: Input of networks that know how recently the user acted.
RECENCY = TensorInput(name="recency", source=Recency())
#: Input of networks that compare candidates with the user, the query and the sequence.
SIMILARITIES = TensorInput(
    name="similarities",
    source=Similarities(
        user="user_embedding",
        query="query",
        pin="pin_embedding",
        sequence="sequence_embeddings",
        actions="sequence_actions",
    ),
)


def network_inputs(groups: Groups, *, sequence: bool, similarities: bool, recency: bool) -> tuple[TensorInput, ...]:
    """Return the inputs of a network that reads the vectors and scalars of these groups, and the sequence or not.

    Similarities to the sequence and its recency need the sequence. Further groups of users have inputs of their own.
    """
    return (
        TensorInput(name="user_embedding", source=EmbeddingVector(group=USER_GROUP, field="embedding")),
        TensorInput(name="user_scalars", source=Scalars(group=USER_GROUP, fields=groups.user_scalars)),
        TensorInput(name="surface", source=SurfaceIndex()),
        TensorInput(name="query", source=QueryVector(group=PIN_GROUP, field="embedding")),
        TensorInput(name="pin_embedding", source=EmbeddingVector(group=PIN_GROUP, field="embedding")),
        TensorInput(name="pin_scalars", source=Scalars(group=PIN_GROUP, fields=groups.pin_scalars)),
        *(_SEQUENCE_INPUTS if sequence else ()),
        *((RECENCY,) if recency else ()),
        *((SIMILARITIES,) if similarities else ()),
        *(tensor for one in groups.further for tensor in one.inputs),
    )


def full_manifest(manifest: Manifest, schema: ActionSchema) -> Manifest:
    """Return the manifest with every input that a network on its features can read, besides its own.

    A version without a sequence gets that of the data's actions.

    Raises:
        DatasetError: the manifest reads features that are not made from interactions.
    """
    groups = Groups.served_by(manifest)
    space = manifest.embedding_field(PIN_GROUP, "embedding").space
    own = {tensor.name for tensor in manifest.inputs}
    every = network_inputs(groups, sequence=True, similarities=True, recency=True)
    missing = (tensor for tensor in every if tensor.name not in own)
    changed = {
        "sequence": groups.sequence or Groups.of(space, schema).sequence,
        "sequence_length": manifest.sequence_length or SEQUENCE_LENGTH,
        "inputs": (*manifest.inputs, *missing),
    }
    return manifest.model_copy(update=changed)
