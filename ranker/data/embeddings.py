"""Pin embeddings: their file format, and a truncated SVD that produces them.

Loading requires only NumPy; producing requires scikit-learn.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from feature_client.groups import EmbeddingSpace
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import EMBEDDINGS, Bundle, BundleError
from ranker.data.actions import ActionLog
from ranker.errors import DatasetError

DIM = 32

#: Version of the producer. Vectors of different versions must not be compared.
#: 2: dimensions are weighted by the square root of their singular values.
PRODUCER_VERSION = 2


@dataclass(frozen=True, slots=True)
class PinEmbeddings:
    """Vectors of one embedding space.

    Attributes:
        pin_ids: uint64[K], ascending.
        vectors: float16[K, D], rows of length one; zeros for a pin that received only actions without affinity.
    """

    pin_ids: np.ndarray
    vectors: np.ndarray

    def of(self, pin_ids: np.ndarray) -> np.ndarray:
        """Return float16[N, D], zeros for pins without a vector."""
        if not len(self.pin_ids):
            return np.zeros((len(pin_ids), self.vectors.shape[1]), np.float16)
        index = np.searchsorted(self.pin_ids, pin_ids).clip(max=len(self.pin_ids) - 1)
        found = self.pin_ids[index] == pin_ids
        return np.where(found[:, None], self.vectors[index], np.float16(0))


def embeddings_of(bundle: Bundle) -> PinEmbeddings:
    """Return the vectors that a bundle carries. Raises BundleError if they are missing or unreadable."""
    if EMBEDDINGS not in bundle.files:
        raise BundleError(
            f"{bundle.manifest.ref} carries no {EMBEDDINGS}, so its features cannot be built from interactions; load "
            "them with `pinrank features load` from the source of its vectors"
        )
    try:
        return decode_embeddings(bundle.files[EMBEDDINGS])
    except ValueError as error:
        raise BundleError(f"{bundle.manifest.ref}: {EMBEDDINGS}: {error}") from error


def space_of(name: str) -> EmbeddingSpace:
    """Return the embedding space that the SVD producer creates from a dataset."""
    return EmbeddingSpace(name=f"{name}-svd", version=PRODUCER_VERSION, dim=DIM, dtype="float16")


def svd_embeddings(log: ActionLog, before_ms: int, seed: int) -> PinEmbeddings:
    """Factorise the matrix of users' actions on pins, so that pins of similar users are close to each other.

    Args:
        log: the history; only events strictly before `before_ms` are read.
        before_ms: end of the producer's window, Unix time in milliseconds.
        seed: seed of the randomised solver.

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
    dim = min(DIM, min(matrix.shape) - 1)
    fitted = TruncatedSVD(dim, n_iter=7, random_state=seed).fit(matrix)
    # A compromise: equal weights give noise as much influence as taste, full weights leave little but popularity.
    components = fitted.components_.T * np.sqrt(fitted.singular_values_)
    vectors = np.zeros((len(pins), DIM), np.float32)
    vectors[:, :dim] = components * (np.sign(components.sum(axis=0)) + (components.sum(axis=0) == 0))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return PinEmbeddings(log.pin_ids[pins], vectors.astype(np.float16))


def encode_embeddings(embeddings: PinEmbeddings) -> bytes:
    """Encode as an npz archive of two plain arrays; equal embeddings give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, pin_ids=embeddings.pin_ids, vectors=embeddings.vectors)
    return buffer.getvalue()


def decode_embeddings(content: bytes) -> PinEmbeddings:
    """Decode the result of `encode_embeddings`. Raises ValueError for anything else, including pickles."""
    try:
        arrays = decode_arrays(content)
        return PinEmbeddings(arrays["pin_ids"], arrays["vectors"])
    except KeyError as error:
        raise ValueError(f"not an archive of embeddings: {error}") from error
