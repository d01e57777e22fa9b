"""The networks of users that bundles carry. PyTorch is imported only where there is one."""

from __future__ import annotations

from collections.abc import Iterable

from model_store.bundle.files import USERS, Bundle, BundleError
from ranker.data.users.rows import UserEncoder


def encoders_in(bundles: Iterable[Bundle]) -> list[UserEncoder]:
    """Return the networks of users that bundles carry. Raises BundleError if one cannot be read."""
    carrying = [bundle for bundle in bundles if USERS in bundle.files]
    if not carrying:
        return []
    from ranker.embedding.users.encoder import ModelEncoder  # noqa: PLC0415
    from ranker.embedding.users.network_file import decode_network  # noqa: PLC0415

    found: list[UserEncoder] = []
    for bundle in carrying:
        try:
            found.append(ModelEncoder(decode_network(bundle.files[USERS])))
        except ValueError as error:
            raise BundleError(f"{bundle.manifest.ref}: {USERS}: {error}") from error
    return found
