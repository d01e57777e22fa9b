"""Coverage: how many of the entities in a store have the values that a model reads, estimated from a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from feature_client.codec import RowState, decode_rows, decode_sequence
from feature_client.groups import FeatureGroup, FeatureNeeds, SequenceGroup
from feature_client.stores.store import Store

_SAMPLE = 2_000
#: A model should not be served if the coverage of a group is below this share.
ENOUGH = 0.99


@dataclass(frozen=True, slots=True)
class Coverage:
    """The coverage of one group.

    Attributes:
        ref: `name@version`.
        entities: how many ids were sampled, of those with a value of this group in any version.
        present: how many of them have a valid value of this version.
        foreign: how many have a value of this version that was written for another description.
    """

    ref: str
    entities: int
    present: int
    foreign: int

    @property
    def share(self) -> float:
        return self.present / self.entities if self.entities else 0.0

    @property
    def enough(self) -> bool:
        return self.share >= ENOUGH

    def __str__(self) -> str:
        if not self.entities:
            return f"{self.ref}: the store holds no values of this group"
        foreign = f", {self.foreign} have one written for another description" if self.foreign else ""
        return f"{self.ref}: {self.share:.1%} of {self.entities} sampled entities have it{foreign}"


async def coverage(store: Store, needs: FeatureNeeds, sample: int = _SAMPLE, seed: int = 0) -> list[Coverage]:
    """Sample the entities that have any version of each group, and count those with the version that is needed.

    Args:
        store: a started store.
        needs: the groups that a model reads.
        sample: how many entities to sample per group.
        seed: the seed of the sample.

    Cost: reads every key once.
    """
    groups: list[FeatureGroup | SequenceGroup] = [*needs.user_groups, *needs.pin_groups]
    if needs.sequence is not None:
        groups.append(needs.sequence)
    kept: dict[str, dict[bytes, int]] = {group.name: {} for group in groups}
    async for keys in store.scan():
        for key in keys:
            name, entity = key.partition(b"@")[0].decode(errors="replace"), key[-8:]
            if name not in kept or len(key) < 9 or key[-9:-8] != b":":
                continue
            held = kept[name]
            if (
                entity not in held
            ):  # the smallest hashes form the sample, which is uniform and the same for all versions
                held[entity] = crc32(entity, seed)
                if len(held) > 4 * sample:
                    kept[name] = dict(sorted(held.items(), key=lambda item: item[1])[: 2 * sample])
    found = []
    for group in groups:
        entities = [e for e, _ in sorted(kept[group.name].items(), key=lambda item: item[1])[:sample]]
        values = await store.multi_get([group.key(int.from_bytes(entity, "big")) for entity in entities])
        states = _states(group, values)
        found.append(Coverage(group.ref, len(states), states.count(RowState.PRESENT), states.count(RowState.FOREIGN)))
    return found


def _states(group: FeatureGroup | SequenceGroup, values: Sequence[bytes | None]) -> list[int]:
    if isinstance(group, SequenceGroup):
        return [int(decode_sequence(group, value)[1]) for value in values]
    return [int(state) for state in decode_rows(group, values).states]
