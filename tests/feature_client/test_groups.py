from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from feature_client.codec import RowState, decode_rows, encode_rows
from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar, SequenceGroup
from tests import tiny

SPACE = EmbeddingSpace(name="pinsage", version=5, dim=3, dtype="int8", scale=0.01)


def group(**changes):
    fields = {
        "name": "pin_core",
        "version": 1,
        "entity": "pin",
        "fields": (
            Embedding(name="e", space=SPACE),
            Scalar(name="count", default=-1),
            Categorical(name="c", cardinality=300),
        ),
    }  # fmt: skip
    return FeatureGroup(**fields | changes)


def test_row_is_packed_and_little_endian():
    assert group().dtype == np.dtype([("e", "i1", (3,)), ("count", "<f4"), ("c", "<u2")])
    assert group().dtype.itemsize == 3 + 4 + 2


def test_default_row_holds_the_fields_defaults():
    e, count, category = group().default_row
    assert (e.tolist(), count, category) == ([0, 0, 0], -1.0, 0)


def test_fingerprint_is_the_same_on_every_machine():
    assert len(group().fingerprint) == 8
    actions = SequenceGroup(name="actions", version=1, actions=("save",), surfaces=("home",), length_max=10)
    assert actions.fingerprint.hex() == "43d5b6cf25293f2c"


@pytest.mark.parametrize(
    "changed",
    [
        group(version=2),
        group(name="pin_other"),
        group(entity="user"),
        group(fields=group().fields[::-1]),
        group(fields=(Embedding(name="e", space=SPACE.model_copy(update={"version": 6})), *group().fields[1:])),
        group(fields=(Embedding(name="e", space=SPACE.model_copy(update={"scale": 0.02})), *group().fields[1:])),
    ],
)
def test_anything_that_changes_a_rows_meaning_changes_the_fingerprint(changed):
    assert changed.fingerprint != group().fingerprint


def test_a_space_without_content_has_the_description_that_it_had_before_there_was_one():
    assert SPACE.model_dump() == {"name": "pinsage", "version": 5, "dim": 3, "dtype": "int8", "scale": 0.01}
    assert EmbeddingSpace.model_validate_json(SPACE.model_dump_json()) == SPACE
    assert (SPACE.ref, group().fingerprint.hex()) == ("pinsage@5", "2e30fa39bf2eef34")


def test_what_produced_a_space_is_part_of_it():
    ours, theirs = (SPACE.model_copy(update={"content": digit * 16}) for digit in "0a")
    assert (ours.ref, theirs.ref) == ("pinsage@5+0000000000000000", "pinsage@5+aaaaaaaaaaaaaaaa")
    assert EmbeddingSpace.model_validate_json(ours.model_dump_json()) == ours
    groups = [group(fields=(Embedding(name="e", space=space), *group().fields[1:])) for space in (SPACE, ours, theirs)]
    assert len({one.fingerprint for one in groups}) == 3
    row = np.zeros(1, groups[1].dtype)
    (stored,) = encode_rows(groups[1], row)
    read = [decode_rows(one, [stored]).states.tolist() for one in groups]
    assert read == [[RowState.FOREIGN], [RowState.PRESENT], [RowState.FOREIGN]]
    with pytest.raises(ValidationError, match="content"):
        EmbeddingSpace(name="pinsage", version=5, dim=3, content="of today")


def test_action_vocabulary_is_part_of_a_sequences_fingerprint():
    def sequence(*actions):
        return SequenceGroup(name="actions", version=1, actions=actions, surfaces=("home",), length_max=10)

    assert sequence("save", "hide").fingerprint != sequence("hide", "save").fingerprint


def test_keys_are_the_group_and_the_big_endian_id():
    ids = np.array([0, 1, 0xFFFF_FFFF_FFFF_FFFF], np.uint64)
    assert group().keys(ids) == [b"pin_core@1:" + int(i).to_bytes(8, "big") for i in ids]
    assert group().keys(np.empty(0, np.uint64)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": ()}, "at least 1 item"),
        ({"fields": (Scalar(name="a"), Scalar(name="a"))}, "field names must be unique"),
        ({"name": "Pin-Core"}, "pattern"),
        ({"entity": "board"}, "'pin' or 'user'"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_bad_group_is_refused_by_name(changes, message):
    with pytest.raises(ValidationError) as raised:
        group(**changes)
    assert message in str(raised.value)


def test_unknown_field_names_those_there_are():
    with pytest.raises(KeyError, match=r"has no field 'x'; it has \['e', 'count', 'c'\]"):
        group().field("x")


@pytest.mark.parametrize(("dtype", "default"), [("int32", 10.7), ("int32", 1e10), ("int64", 1e19), ("float32", 1e39)])
def test_a_default_that_its_type_cannot_hold_is_refused(dtype, default):
    with pytest.raises(ValidationError, match=f"is not a valid {dtype}"):
        Scalar(name="count", dtype=dtype, default=default)


def test_a_copy_with_other_fields_has_a_layout_and_a_fingerprint_of_its_own():
    before = tiny.PINS.fingerprint, tiny.PINS.dtype
    copied = tiny.PINS.model_copy(update={"fields": tiny.PINS.fields[:1]})
    assert copied.dtype.names == (tiny.PINS.fields[0].name,)
    assert copied.fingerprint != tiny.PINS.fingerprint
    assert (tiny.PINS.fingerprint, tiny.PINS.dtype) == before
