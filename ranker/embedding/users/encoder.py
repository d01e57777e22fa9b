"""A network of users as part of a ranker: users' vectors as of any time, for training, evaluation and stores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_client.groups import EmbeddingSpace
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.users.model import UserModel
from ranker.embedding.users.network_file import encode_network
from ranker.embedding.users.user_vectors import user_vectors_at
from ranker.embedding.vector_file import refuse_after
from ranker.errors import DatasetError


@dataclass(frozen=True, slots=True)
class ModelEncoder:
    """`ranker.data.users.rows.UserEncoder` of a trained network."""

    model: UserModel

    @property
    def space(self) -> EmbeddingSpace:
        return self.model.space

    @property
    def content(self) -> bytes:
        return encode_network(self.model)

    def check(self, pins: EmbeddingSpace, until_ms: int) -> None:
        """Do what `UserEncoder.check` says."""
        refuse_after("networks of users", self.model.until_ms, until_ms)
        own = self.model.pin_space
        if own is not None and own != pins:
            raise DatasetError(
                f"the network of users reads pins' vectors of {own.ref}, and the ranker's are of {pins.ref}; train the "
                "ranker with the same vectors (--pin-vectors), or the network without --pins"
            )

    def vectors_at(self, log: ActionLog, pins: np.ndarray, users: np.ndarray, before_ms: int) -> np.ndarray:
        """Do what `UserEncoder.vectors_at` says."""
        own = self.model.pin_space
        given = None if own is None else PinEmbeddings(log.pin_ids, pins, own)
        return user_vectors_at(self.model, log, given, users, np.full(len(users), before_ms))
