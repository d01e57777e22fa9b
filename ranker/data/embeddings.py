"""Pin embeddings: their file format, and a truncated SVD that produces them.

Loading requires only NumPy; producing requires scikit-learn.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from feature_client.groups import Embedding, EmbeddingSpace
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import EMBEDDINGS, Bundle, BundleError
from ranker.data.actions import ActionLog
from ranker.errors import DatasetError

DIM = 32

#: Version of the producer. Raise it when the same data would give other vectors.
#: 2: dimensions are weighted by the square root of their singular values.
PRODUCER_VERSION = 2


class PinVectors(Protocol):
    """Vectors of pins as of any time, in one embedding space."""

    @property
    def space(self) -> EmbeddingSpace:
        """The space of the vectors."""
        ...

    def as_of(self, log: ActionLog, before_ms: int) -> np.ndarray:
        """Return the vectors of a log's pins as of a time.

        Args:
            log: the history; only events strictly before `before_ms` are read.
            before_ms: Unix time in milliseconds.

        Returns:
            float16[P, D], in the order of `log.pin_ids`; zeros for pins without a vector.
        """
        ...


@dataclass(frozen=True, slots=True)
class PinEmbeddings:
    """Vectors of one embedding space.

    Attributes:
        pin_ids: uint64[K], ascending.
        vectors: float16[K, D], rows of length one; zeros for a pin that received only actions without affinity.
        space: the space of the vectors.
    """

    pin_ids: np.ndarray
    vectors: np.ndarray
    space: EmbeddingSpace

    def of(self, pin_ids: np.ndarray) -> np.ndarray:
        """Return float16[N, D], zeros for pins without a vector."""
        return rows_of(self.pin_ids, self.vectors, pin_ids)

    def as_of(self, log: ActionLog, before_ms: int) -> np.ndarray:  # noqa: ARG002 - they stay the same
        """Do what `PinVectors.as_of` says."""
        return self.of(log.pin_ids)


def rows_of(ids: np.ndarray, vectors: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return float16[N, D], the vectors of uint64[N] wanted ids; zeros for those that are not among the ids.

    Args:
        ids: uint64[K], ascending.
        vectors: float16[K, D].
        wanted: uint64[N].
    """
    if not len(ids):
        return np.zeros((len(wanted), vectors.shape[1]), np.float16)
    index = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    found = ids[index] == wanted
    return np.where(found[:, None], vectors[index], np.float16(0))


def embeddings_of(bundle: Bundle) -> PinEmbeddings:
    """Return the vectors that a bundle carries. Raises BundleError if they are missing or unreadable."""
    if EMBEDDINGS not in bundle.files:
        raise BundleError(
            f"{bundle.manifest.ref} carries no {EMBEDDINGS}, so its features cannot be built from interactions; load "
            "them with `pinrank features load` from the source of its vectors"
        )
    try:
        return decode_embeddings(bundle.files[EMBEDDINGS], _space_in(bundle))
    except ValueError as error:
        raise BundleError(f"{bundle.manifest.ref}: {EMBEDDINGS}: {error}") from error


def _space_in(bundle: Bundle) -> EmbeddingSpace:
    spaces = {
        field.space: None
        for group in bundle.manifest.groups
        for field in group.fields
        if group.entity == "pin" and isinstance(field, Embedding)
    }
    if len(spaces) != 1:
        raise ValueError(f"its pins have vectors of {len(spaces)} spaces, and the file says nothing of theirs")
    return next(iter(spaces))


def space_of(name: str, content: str = "", dim: int = DIM) -> EmbeddingSpace:
    """Return the embedding space that the SVD producer creates from a dataset.

    Args:
        name: name of the dataset.
        content: digest of what produced it; empty before anything has.
        dim: numbers of a vector.
    """
    return EmbeddingSpace(name=f"{name}-svd", version=PRODUCER_VERSION, dim=dim, dtype="float16", content=content)


def content_digest(*parts: object) -> str:
    """Return the digest by which an embedding space, or what goes into one, is known.

    Args:
        parts: settings, of which the representation counts, and arrays; their order counts, too.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(f"{part!r};".encode())
    return digest.hexdigest()[:16]


def svd_embeddings(log: ActionLog, before_ms: int, seed: int, name: str, dim: int = DIM) -> PinEmbeddings:
    """Factorise the matrix of users' actions on pins, so that pins of similar users are close to each other.

    Args:
        log: the history; only events strictly before `before_ms` are read.
        before_ms: end of the producer's window, Unix time in milliseconds.
        seed: seed of the randomised solver.
        name: name of the dataset, after which the space is named.
        dim: numbers of a vector; those beyond the rank of the matrix are zero.

    Raises:
        DatasetError: the window has too few interactions.
    """
    from scipy.sparse import csr_matrix  # noqa: PLC0415 - scikit-learn and SciPy come with the train extra
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415

    stop = log.before(before_ms)
    weight = log.schema.affinities[log.action[:stop]]
    users, user = np.unique(log.user[:stop], return_inverse=True)
    pins, pin = np.unique(log.pin[:stop], return_inverse=True)
    if min(len(users), len(pins)) < 2 or not weight.any():
        raise DatasetError(
            f"the {stop} interactions before the end of the producer window are too few to fit embeddings"
        )
    # The square root of the counts prevents a few popular pins from dominating every dimension.
    popularity = np.sqrt(np.bincount(pin, weights=weight, minlength=len(pins)) + 1.0)
    matrix = csr_matrix((weight / popularity[pin], (user, pin)), shape=(len(users), len(pins)), dtype=np.float32)
    rank = min(dim, min(matrix.shape) - 1)
    fitted = TruncatedSVD(rank, n_iter=7, random_state=seed).fit(matrix)
    # A compromise: equal weights give noise as much influence as taste, full weights leave little but popularity.
    components = fitted.components_.T * np.sqrt(fitted.singular_values_)
    vectors = np.zeros((len(pins), dim), np.float32)
    vectors[:, :rank] = components * (np.sign(components.sum(axis=0)) + (components.sum(axis=0) == 0))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    given = log.user_ids[users][user], log.pin_ids[pins][pin], weight
    content = content_digest("svd", PRODUCER_VERSION, dim, seed, *given)
    return PinEmbeddings(log.pin_ids[pins], vectors.astype(np.float16), space_of(name, content, dim))


def encode_embeddings(embeddings: PinEmbeddings) -> bytes:
    """Encode as an npz archive of two plain arrays; equal embeddings give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, pin_ids=embeddings.pin_ids, vectors=embeddings.vectors)
    return buffer.getvalue()


def decode_embeddings(content: bytes, space: EmbeddingSpace) -> PinEmbeddings:
    """Decode the result of `encode_embeddings`. Raises ValueError for anything else, including pickles."""
    try:
        arrays = decode_arrays(content)
        return PinEmbeddings(arrays["pin_ids"], arrays["vectors"], space)
    except KeyError as error:
        raise ValueError(f"not an archive of embeddings: {error}") from error
