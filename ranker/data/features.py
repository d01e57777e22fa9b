"""The feature groups of atomic datasets, and their rows as of any time.

No function reads beyond the given time: a row "as of t" depends only on events strictly before t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from feature_client.action_times import clock_ms
from feature_client.bulk.columns import ColumnError, field_values
from feature_client.bulk.write import refuse_foreign, write_rows, write_sequences
from feature_client.codec import Rows, RowState
from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup, Scalar, SequenceGroup
from feature_client.stores.store import Store
from model_store.bundle.manifest import Manifest
from ranker.data.actions import ActionLog, ActionSchema
from ranker.data.atomic.described import FILE as FEATURES_FILE
from ranker.data.atomic.described import Described, Values, fields_of
from ranker.data.embeddings import PinVectors
from ranker.data.folding import folded_in, means_of
from ranker.data.problems import refuse_future
from ranker.data.users.rows import (
    InterestRows,
    UserEncoder,
    UserRows,
    VectorRows,
    interest_group,
    makers_of,
    rows_by_group,
    vector_group,
)
from ranker.errors import DatasetError

PIN_GROUP = "pin_core"
USER_GROUP = "user_core"
SURFACES = ("home", "related")
LENGTH_MAX = 256

_SHARE = "_share"
_PARTIES = frozenset({"creator_tail", "merchant", "ad"})

#: Weight of the overall average in each share, as a number of earlier actions.
PRIOR_ACTIONS = 20.0

#: Events of a dataset have no surface; all of them enter the sequence as home.
_HOME = np.uint8(0)


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a dataset's model.

    Attributes:
        pin: of pins.
        user: of users: what both have, and the data's own columns.
        sequence: None if the model reads no sequence.
        further: what makes the rows of further groups of users.
    """

    pin: FeatureGroup
    user: FeatureGroup
    sequence: SequenceGroup | None
    further: tuple[UserRows, ...] = ()

    @staticmethod
    def of(
        space: EmbeddingSpace,
        schema: ActionSchema,
        described: Described | None = None,
        interests: int = 0,
        users: EmbeddingSpace | None = None,
    ) -> Groups:
        """Return the groups of a schema's actions and of the data's own columns, with embeddings in `space`.

        With `interests`, users also have so many of these; with `users`, a vector of that space.
        """
        described = described or Described()
        counts = tuple(Scalar(name=name) for name in scalar_names(schema))
        embedding = Embedding(name="embedding", space=space)
        of_pins, of_users = (tuple(Scalar(name=n) for n in fields_of(own)) for own in (described.pins, described.users))
        parties = (Scalar(name="creator_tail", default=0.5), Scalar(name="merchant"), Scalar(name="ad"))
        return Groups(
            FeatureGroup(name=PIN_GROUP, version=2, entity="pin", fields=(embedding, *counts, *of_pins, *parties)),
            FeatureGroup(name=USER_GROUP, version=2, entity="user", fields=(embedding, *counts, *of_users)),
            SequenceGroup(name="actions", version=2, actions=schema.names, surfaces=SURFACES, length_max=LENGTH_MAX),
            (
                *((InterestRows(interest_group(space, interests)),) if interests else ()),
                *((VectorRows(vector_group(users), None),) if users else ()),
            ),
        )

    @staticmethod
    def served_by(manifest: Manifest, encoders: Sequence[UserEncoder] = ()) -> Groups:
        """Return the groups that a bundle trained here reads. Raises DatasetError for any other bundle.

        Networks of users are needed to make their rows, and not otherwise.
        """
        try:
            pin, user = manifest.group(PIN_GROUP), manifest.group(USER_GROUP)
        except KeyError as error:
            raise DatasetError(
                f"{manifest.ref} reads features that are not made from interactions ({error.args[0]}); load them with "
                "`pinrank features load`"
            ) from error
        return Groups(pin, user, manifest.sequence, makers_of(manifest.groups, encoders))

    @property
    def of_users(self) -> tuple[FeatureGroup, ...]:
        """All groups of users."""
        return self.user, *(one.group for one in self.further)

    @property
    def pin_scalars(self) -> tuple[str, ...]:
        """The scalars of pins that networks read. The parties of a pin serve the utility only."""
        return tuple(f.name for f in self.pin.fields if isinstance(f, Scalar) and f.name not in _PARTIES)

    @property
    def user_scalars(self) -> tuple[str, ...]:
        """The scalars of users that networks read."""
        return tuple(f.name for f in self.user.fields if isinstance(f, Scalar))


def scalar_names(schema: ActionSchema) -> tuple[str, ...]:
    """Return the scalars that both pins and users have: the counts of actions."""
    return ("log_actions", *(f"{name}{_SHARE}" for name in schema.names))


def pin_rows(
    log: ActionLog, group: FeatureGroup, vectors: np.ndarray, before_ms: int, folded: np.ndarray | None = None
) -> Rows:
    """Compute every pin's row as of a time.

    Args:
        log: the history.
        group: `Groups.pin`; its `<action>_share` fields determine which actions are counted.
        vectors: float16[P, D], the embeddings of the pins, zeros for pins that are newer than the producer's window.
        before_ms: only events strictly before this Unix time in milliseconds are read.
        folded: `folded_in` for the same arguments, if it is known already: it takes most of the time.

    Returns:
        P rows in the order of `log.pin_ids`. Pins without an event before that time have the defaults of the group and
        the features that the data's files have of them; if the files do not list them either, they are MISSING.

    Raises:
        DatasetError: the group counts an action, or has a feature, that the data does not have.
    """
    stop = log.before(before_ms)
    rows, counts = _counted_rows(group, log, log.pin[:stop], len(log.pin_ids))
    _fill_own(rows, group, fields_of(log.described.pins), log.pin_values.of(log.pin_ids))
    rows["embedding"] = _stored_vectors(group, folded_in(log, vectors, stop) if folded is None else folded)
    merchant, ad = made_up_parties(log.pin_ids)
    for name, values in {"creator_tail": 1 - _percentile(counts), "merchant": merchant, "ad": ad}.items():
        if name in (group.dtype.names or ()):
            rows[name] = values
    return _rows(group, rows, counts > 0, fields_of(log.described.pins), log.pin_values.lists(log.pin_ids))


def user_rows(
    log: ActionLog, group: FeatureGroup, vectors: np.ndarray, before_ms: int, folded: np.ndarray | None = None
) -> Rows:
    """Compute every user's row as of a time; the embedding is the mean of the user's pins, weighted by affinity.

    Arguments and result are those of `pin_rows`, with U rows in the order of `log.user_ids`.
    """
    stop = log.before(before_ms)
    user, pin = log.user[:stop], log.pin[:stop]
    rows, counts = _counted_rows(group, log, user, len(log.user_ids))
    _fill_own(rows, group, fields_of(log.described.users), log.user_values.of(log.user_ids))
    weight = log.schema.affinities[log.action[:stop]]
    folded = folded_in(log, vectors, stop) if folded is None else folded
    means = means_of(user, pin, weight, folded, len(log.user_ids))
    rows["embedding"] = _stored_vectors(group, means)
    return _rows(group, rows, counts > 0, fields_of(log.described.users), log.user_values.lists(log.user_ids))


def events_of(log: ActionLog, numbers: np.ndarray, group: SequenceGroup) -> np.ndarray:
    """Return structured[K] of `SequenceGroup.dtype`, the events with the given numbers, in the order given.

    Raises:
        DatasetError: an event is an action that the group's vocabulary lacks.
    """
    action = log.action[numbers]
    code = np.array([group.actions.index(name) if name in group.actions else -1 for name in log.schema.names])[action]
    if (code < 0).any():
        lacking = log.schema.names[int(action[code < 0][0])]
        raise DatasetError(
            f"sequence group {group.ref} has no action {lacking!r}; its actions are {', '.join(group.actions)}. "
            "Pass the actions.toml that the version was trained with (--actions FILE)"
        )
    events = np.zeros(len(numbers), SequenceGroup.dtype)
    events["pin_id"] = log.pin_ids[log.pin[numbers]]
    events["time_ms"] = log.time_ms[numbers]
    events["action"] = code
    events["surface"] = _HOME
    return events


def made_up_parties(pin_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32[N] of 0 and 1: whether the pin is a merchant's (1 in 5) and an advertisement (1 in 10).

    Datasets of ratings contain neither, so both derive from a fixed hash of the pin's id. They are arbitrary and
    constant, and serve only to show how a utility with several parties behaves.
    """
    mixed = pin_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    merchant = (mixed & np.uint64(0xFFFFFFFF)) % np.uint64(5) == 0
    ad = (mixed >> np.uint64(32)) % np.uint64(10) == 0
    return merchant.astype(np.float32), ad.astype(np.float32)


async def fill_store(
    store: Store,
    log: ActionLog,
    vectors: PinVectors,
    groups: Groups,
    progress: Callable[[str, int], None] = lambda _what, _count: None,
    before_ms: int | None = None,
    *,
    replace: bool = False,
) -> dict[str, int]:
    """Write every pin, user and sequence as of a time; return the number written of each.

    Pins and users without an event before that time are written if the data's own files list them, with the features
    that these have of them. Users have a row in every further group. Sequences are not written if `groups` has none.

    Args:
        store: a started store.
        log: the whole history.
        vectors: of pins, in the space of `groups`.
        groups: groups to write; those of a bundle are `Groups.served_by`, with the networks of users that it carries.
        progress: called after each kind with its name and count.
        before_ms: only events strictly before this Unix time in milliseconds are read; None reads all.
        replace: whether values of other descriptions under the same names and versions may be replaced.

    Raises:
        ForeignValuesError: there are such values, and they may not. Nothing was written.
        DatasetError: the groups and the data have different actions, or the data has actions in the future, which
            every server would ignore. Nothing was written.
    """
    refuse_future(log.time_ms, clock_ms())
    end_ms = int(log.time_ms[-1]) + 1 if before_ms is None else before_ms
    if not replace:
        for group, ids in (
            (groups.pin, log.pin_ids),
            *((group, log.user_ids) for group in groups.of_users),
            (groups.sequence, log.user_ids),
        ):
            if group is not None:
                await refuse_foreign(store, group, ids)
    numbers = vectors.as_of(log, end_ms)
    written = {}
    pins, users = pin_rows(log, groups.pin, numbers, end_ms), user_rows(log, groups.user, numbers, end_ms)
    further = rows_by_group(groups.further, log, pins.rows["embedding"], end_ms)
    # Every user gets a row in each further group, so that a row that is missing means that the store has lost it.
    listed_users = Values(log.user_values.ids, log.user_values.numbers[:, :0])
    for what, group, ids, rows, own, values in (
        ("pins", groups.pin, log.pin_ids, pins, fields_of(log.described.pins), log.pin_values),
        ("users", groups.user, log.user_ids, users, fields_of(log.described.users), log.user_values),
        *(
            (one.group.name, one.group, log.user_ids, Rows(further[one.group.name], users.states), (), listed_users)
            for one in groups.further
        ),
    ):
        present = rows.states == RowState.PRESENT
        others, listed = _listed_only(group, ids, own, values)
        ids_written, rows_written = np.concatenate([ids[present], others]), np.concatenate([rows.rows[present], listed])
        written[what] = await write_rows(store, group, ids_written, rows_written)
        progress(what, written[what])
    if groups.sequence is not None:
        earlier = log.by_user[log.time_ms[log.by_user] < end_ms]
        counts = np.bincount(log.user[earlier], minlength=len(log.user_ids))
        acted = counts > 0
        splits = np.concatenate([[0], np.cumsum(counts[acted])])
        events = events_of(log, earlier, groups.sequence)
        written["sequences"] = await write_sequences(store, groups.sequence, log.user_ids[acted], events, splits)
        progress("sequences", written["sequences"])
    return written


def _counted_rows(
    group: FeatureGroup, log: ActionLog, entity: np.ndarray, entities: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows with their count fields filled from the first K events, and float64[entities] counts.

    `entity` is int64[K], the pin or user of each of these events.
    """
    rows = np.zeros(entities, group.dtype)
    counts = np.bincount(entity, minlength=entities).astype(np.float64)
    rows["log_actions"] = np.log1p(counts)
    for field in group.fields:
        if not field.name.endswith(_SHARE):
            continue
        labelled = log.label(field.name.removesuffix(_SHARE))[: len(entity)]
        overall = labelled.mean() if len(labelled) else 0.0
        own = np.bincount(entity, labelled, entities)
        rows[field.name] = (own + PRIOR_ACTIONS * overall) / (counts + PRIOR_ACTIONS)
    return rows, counts


def _fill_own(rows: np.ndarray, group: FeatureGroup, names: tuple[str, ...], values: np.ndarray) -> None:
    """Fill the fields that `features.toml` names, from float32[N, F]."""
    made = {"embedding", "log_actions", *_PARTIES}
    for field in group.fields:
        if field.name in made or field.name.endswith(_SHARE):
            continue
        if field.name not in names:
            raise DatasetError(
                f"group {group.ref} has the field {field.name!r}, which is no feature of this data: it has "
                f"{', '.join(names) or 'none'}; use the {FEATURES_FILE} that the version was trained with"
            )
        rows[field.name] = values[:, names.index(field.name)]


def _stored_vectors(group: FeatureGroup, vectors: np.ndarray) -> np.ndarray:
    """Return vectors as the group stores them.

    Raises:
        DatasetError: the group's space has another width, or integers that would truncate the vectors.
    """
    field = group.field("embedding")
    try:
        return field_values(field, vectors)
    except ColumnError as error:
        raise DatasetError(f"group {group.ref}: field embedding: {error}") from error


def _rows(group: FeatureGroup, rows: np.ndarray, acted: np.ndarray, own: tuple[str, ...], listed: np.ndarray) -> Rows:
    """Return structured[N] rows with their states.

    Args:
        group: the group of the rows.
        rows: rows with all fields; they are changed.
        acted: bool[N], which entities have an event.
        own: names of the features of the data's own files.
        listed: bool[N], which entities these files list.
    """
    new = listed & ~acted
    kept = {name: rows[name][new] for name in own if name in (group.dtype.names or ())}
    rows[~acted] = group.default_row
    for name, values in kept.items():
        rows[name][new] = values
    return Rows(rows, np.where(acted | listed, RowState.PRESENT, RowState.MISSING).astype(np.uint8))


def _listed_only(
    group: FeatureGroup, ids: np.ndarray, own: tuple[str, ...], values: Values
) -> tuple[np.ndarray, np.ndarray]:
    """Return uint64[K] ids that no event names but the data's own files list, and structured[K] their rows."""
    others = np.setdiff1d(values.ids, ids)
    rows = np.full(len(others), group.default_row, group.dtype)
    for name, column in zip(own, values.of(others).T, strict=True):
        if name in (group.dtype.names or ()):
            rows[name] = column
    return others, rows


def _percentile(counts: np.ndarray) -> np.ndarray:
    """Return float64[N] in [0, 1], the share of entities with a smaller count; equal counts share their mean rank."""
    ordered = np.sort(counts)
    middle = np.searchsorted(ordered, counts) + np.searchsorted(ordered, counts, side="right") - 1
    return middle / 2 / max(1, len(counts) - 1)
