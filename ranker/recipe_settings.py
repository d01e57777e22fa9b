"""The settings of a recipe, and how they are checked against the data before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from feature_client.groups import EmbeddingSpace
from model_store.bundle.files import USERS
from model_store.bundle.manifest import Manifest
from model_store.bundle.tensor_sources import RECENCY_NAMES, Scalars, similarity_count
from model_store.exploration.table import ExplorationError, load_exploration
from model_store.model.utility import UtilityError, UtilityTable, load_utility
from ranker.data.actions import ActionLog
from ranker.data.atomic.described import FILE as FEATURES_FILE
from ranker.data.atomic.described import fields_of
from ranker.data.embeddings import space_of
from ranker.data.features import SURFACES, scalar_names
from ranker.data.requests import Split
from ranker.errors import DatasetError, SettingError
from ranker.export.manifest import draft_manifest
from ranker.network.model import NetworkConfig
from ranker.network.variants import network_overrides, sequence_length
from ranker.training.examples import Sampling
from ranker.training.parent import Parent
from ranker.training.settings import TrainingConfig

#: The manifest's rule for names; the embedding space `NAME-svd` may have at most 60 characters.
_NAME = re.compile(r"[a-z][a-z0-9-]{0,55}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything but the data that determines the resulting model."""

    name: str
    version: int
    #: Name of the embedding space; models that read the same feature store share it.
    dataset: str
    command: str
    utility_toml: bytes
    #: Empty for a bundle without exploration.
    explore_toml: bytes = b""
    #: One of `ranker.network.variants`.
    variant: str = "late"
    #: How many of the user's last actions the network reads; None means as many as the variant does.
    sequence_length: int | None = None
    #: How many of a user's interests the network reads.
    interests: int = 0
    #: Fields of `NetworkConfig` that override the variant's.
    sizes: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    split: Split = field(default_factory=Split)
    sampling: Sampling = field(default_factory=Sampling)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    #: Requests for early stopping, the newest epochs and calibration; and those for the metrics in the lineage.
    validation_requests_max: int = 2_000
    test_requests_max: int = 2_000

    def __post_init__(self) -> None:
        for name in (self.name, self.dataset):
            if not _NAME.fullmatch(name):
                raise SettingError(
                    f"{name!r} is not a valid model name; use at most 56 lower-case letters, digits and hyphens, and "
                    "start with a letter"
                )

    @property
    def newest_requests_max(self) -> int:
        """Approximate number of validation requests, of which every other one is learned from; 0 if none is."""
        return self.validation_requests_max if self.training.newest_epochs else 0

    def network_config(self, log: ActionLog, heads: Sequence[str], dim: int, user_vector: int = 0) -> NetworkConfig:
        """Return the network's sizes for vectors of `dim` numbers, and of `user_vector` numbers for users.

        Raises:
            SettingError: the variant is unknown, or a size is invalid.
        """
        schema = log.schema
        sizes = {**network_overrides(self.variant), **self.sizes}
        length = self.length()
        if length and sizes.get("readout_rows", 0) > length:
            raise SettingError(f"readout_rows can be at most {length}, the length of a sequence")
        return NetworkConfig(
            dim=dim,
            similarities=similarity_count(length, len(schema.actions)) if length else 0,
            recency=len(RECENCY_NAMES) if length else 0,
            interests=self.interests,
            user_vector=user_vector,
            heads=len(heads),
            actions=len(schema.actions),
            surfaces=len(SURFACES),
            scalars=len(scalar_names(schema)),
            pin_features=len(fields_of(log.described.pins)),
            user_features=len(fields_of(log.described.users)),
            **sizes,
        )

    def length(self) -> int:
        """Return how many of the user's last actions the network reads. Raises SettingError for an unknown variant."""
        own = sequence_length(self.variant)
        if self.sequence_length is None or not own:
            return own
        return self.sequence_length

    def described(self) -> dict[str, str]:
        """Return the settings that distinguish one training from another, as text by name."""
        sizes = {f"size_{name}": str(value) for name, value in self.sizes.items()}
        settings = {name: str(value) for name, value in asdict(self.training).items()}
        reads = {"sequence_length": str(self.length()), "interests": str(self.interests)}
        return {"version": str(self.version), "variant": self.variant, **reads, **sizes, **settings}


def _check_features(parent: Parent, draft: Manifest) -> None:
    """Raise SettingError if the data has other features than those that the parent reads."""
    ours, theirs = (
        [t.source for t in m.inputs if isinstance(t.source, Scalars)] for m in (draft, parent.bundle.manifest)
    )
    for new, old in zip(ours, theirs, strict=True):
        if new != old:
            raise SettingError(
                f"{parent.bundle.manifest.ref} reads the fields {', '.join(old.fields)} of {old.group}, but the data "
                f"has {', '.join(new.fields)}; use the {FEATURES_FILE} and actions.toml that it was trained with"
            )


@dataclass(frozen=True, slots=True)
class Target:
    """A recipe applied to a dataset: the sizes of the network, a manifest without files, and the utility table."""

    sizes: NetworkConfig
    draft: Manifest
    utility: UtilityTable

    @property
    def parties(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(party for surface in self.utility.surfaces.values() for party in surface.parties))


def target_of(
    recipe: Recipe,
    log: ActionLog,
    parent: Parent | None,
    heads: tuple[str, ...] | None = None,
    space: EmbeddingSpace | None = None,
    users: EmbeddingSpace | None = None,
) -> Target:
    """Check a recipe against the data before any work, so that no model is made that a server would reject.

    Args:
        recipe: the recipe.
        log: the data.
        parent: the version to continue from.
        heads: the heads to predict; None means all that occur in the data.
        space: of the pins' vectors; None for those of the parent, or of the SVD that the recipe will fit.
        users: of the users' vectors; None if the network reads none.

    Raises:
        SettingError: a head weight, the utility table or the variant names something unknown, or the parent has other
            heads, or reads another number of interests than the recipe asks for, or other vectors of users.
        DatasetError: the data has no action to predict.
    """
    heads = log.heads if heads is None else heads
    if not heads:
        raise DatasetError(f"no interaction is one of the actions to predict: {', '.join(log.schema.heads)}")
    recipe.training.weights_of(heads)
    space = space or (parent.embeddings.space if parent else space_of(recipe.dataset))
    dim = 0 if users is None else users.dim
    sizes = parent.config if parent else recipe.network_config(log, heads, space.dim, dim)
    if parent and recipe.interests not in (0, sizes.interests):
        raise SettingError(
            f"{parent.bundle.manifest.ref} reads {sizes.interests} interests, and its successor reads as many; leave "
            "out --interests, or train a first version without --parent"
        )
    if parent and sizes.user_vector != dim:
        raise SettingError(
            f"{parent.bundle.manifest.ref} reads vectors of users of {sizes.user_vector} numbers, and the network that "
            f"makes them is not in its bundle; publish it with its {USERS}, or train a first version without --parent"
        )
    if parent and [head.name for head in parent.bundle.manifest.heads] != list(heads):
        known = ", ".join(head.name for head in parent.bundle.manifest.heads)
        raise SettingError(f"{parent.bundle.manifest.ref} has the heads {known}, but the data has {', '.join(heads)}")
    draft = draft_manifest(
        recipe.name,
        space,
        log.schema,
        heads,
        sequence_length=parent.bundle.manifest.sequence_length if parent else recipe.length(),
        similarities=sizes.similarities > 0,
        recency=sizes.recency > 0,
        interests=sizes.interests,
        users=users,
        described=log.described,
    )
    if parent:
        _check_features(parent, draft)
    try:
        utility = load_utility(recipe.utility_toml, draft)
    except UtilityError as error:
        raise SettingError(
            f"servers would reject a model with this utility table: {error}; the heads of this data are "
            f"{', '.join(heads)}, and the surfaces are {', '.join(SURFACES)}"
        ) from error
    if recipe.explore_toml:
        try:
            load_exploration(recipe.explore_toml, draft, utility)
        except ExplorationError as error:
            raise SettingError(
                f"servers would reject a model with this exploration table: {error}; correct it, or pass "
                "--explore with an empty file for a model that does not explore"
            ) from error
    return Target(sizes, draft, utility)
