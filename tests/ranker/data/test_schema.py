from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ranker.data.atomic.recbole import read_atomic
from ranker.data.schema import CLOSEUPS, RATINGS, ActionSchema, read_schema, write_schema
from ranker.errors import DatasetError, SettingError

LISTENING = """
[[actions]]
name = "playlist_add"
meaning = "added to a playlist"
column = "events"
any_of = ["playlist add", "queue"]
affinity = 1.0

[[actions]]
name = "skip"
meaning = "skipped within ten seconds"
column = "seconds"
at_most = 10.0
affinity = 0.0

[[actions]]
name = "listen"
meaning = "was played"
affinity = 0.4
head = false
"""


def schema_at(folder: Path, content: str = LISTENING) -> ActionSchema:
    (folder / "actions.toml").write_text(content)
    return read_schema(folder / "actions.toml")


def data_at(folder: Path, header: str, *rows: str) -> Path:
    (folder / "toy.inter").write_text("\n".join([f"user_id:token\titem_id:token\ttimestamp:float\t{header}", *rows]))
    return folder


def test_actions_stand_in_the_files_order_and_say_which_are_heads(tmp_path: Path) -> None:
    schema = schema_at(tmp_path)
    assert schema.names == ("playlist_add", "skip", "listen")
    assert schema.heads == ("playlist_add", "skip")
    assert schema.columns == ("events", "seconds")
    assert schema.affinities.tolist() == [1.0, 0.0, np.float32(0.4)]


def test_a_folders_own_actions_label_its_interactions(tmp_path: Path) -> None:
    schema_at(tmp_path)
    data = data_at(tmp_path, "events:token\tseconds:float", "u\tp\t2\tqueue\t5", "u\tq\t1\tplaylist add\t60")
    dataset = read_atomic(data)
    assert dataset.labels.tolist() == [[True, False, True], [True, True, True]]  # in order of time
    # A schema that is given goes before the folder's.
    assert read_atomic(data, CLOSEUPS).labels.tolist() == [[True], [True]]


def test_a_token_is_one_value_and_a_token_seq_several(tmp_path: Path) -> None:
    schema_at(tmp_path, LISTENING.replace('["playlist add", "queue"]', '["add"]'))
    rows = ("u\tp\t1\tplaylist add\t60", "u\tq\t2\tadd\t60")
    for kind, added in (("token", [False, True]), ("token_seq", [True, True])):
        dataset = read_atomic(data_at(tmp_path, f"events:{kind}\tseconds:float", *rows))
        assert dataset.labels[:, 0].tolist() == added


def test_bounds_hold_for_values_that_equal_them() -> None:
    rule = RATINGS.rule("like").model_copy(update={"at_least": 0.1})
    assert rule.applies({"rating": np.array([0.1, 0.0999])}, 2).tolist() == [True, False]
    # Also beyond 2**24, where float32 knows even numbers only.
    rule = RATINGS.rule("like").model_copy(update={"at_least": 16_777_217})
    assert rule.applies({"rating": np.array([16_777_217.0, 16_777_216.0])}, 2).tolist() == [True, False]


def test_without_actions_ratings_decide_and_without_ratings_everything_is_a_closeup(tmp_path: Path) -> None:
    assert read_atomic(data_at(tmp_path, "rating:float", "u\tp\t1\t4")).schema == RATINGS
    bare = read_atomic(data_at(tmp_path, "year:float", "u\tp\t1\t4"))
    assert (bare.schema, bare.labels.tolist()) == (CLOSEUPS, [[True]])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    named = RATINGS.rule("like").model_copy(update={"meaning": 'said "yes", \\o/ \n\x7f\x01é', "head": False})
    for schema in (RATINGS, schema_at(tmp_path), ActionSchema(actions=(named, *CLOSEUPS.actions))):
        write_schema(tmp_path / "again.toml", schema)
        assert read_schema(tmp_path / "again.toml") == schema


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("affinity = 1.0", "affinity = 1.5", r"actions.toml: actions\[0\].affinity: .* less than or equal to 1"),
        ("at_most = 10.0", "at_most = true", r"actions\[1\].at_most: Input should be a valid number"),
        ("at_most = 10.0", 'at_most = "10"', r"actions\[1\].at_most: Input should be a valid number"),
        ("at_most = 10.0", "at_most = nan", r"actions\[1\].at_most: Input should be a finite number"),
        ("head = false", 'head = "no"', r"actions\[2\].head: Input should be a valid boolean"),
        (
            "affinity = 1.0",
            "affinity = 1.0\naffinity = 0.5",
            r"actions.toml is not valid TOML: Cannot overwrite a value",
        ),
        (
            "at_most = 10.0",
            "",
            r"actions\[1\]: a column requires exactly one of at_least, at_most and any_of, but has none",
        ),
        ("at_most = 10.0", "at_most = 1\nat_least = 1", r"exactly one of .* but has \['at_least', 'at_most'\]"),
        ('column = "seconds"', "", r"actions\[1\]: at_most requires a column"),
        ('"skip"', '"Skip it"', r"actions\[1\].name: .*match pattern"),
        ('"skip"', '"not"', r"'not' is a reserved word in utility expressions"),
        ('"skip"', '"listen"', r"action names must be unique, but are playlist_add, listen, listen"),
        ("at_most", "atmost", r"actions\[1\].atmost: Extra inputs are not permitted"),
        ("[[actions]]", "[[action]]", r"actions: Field required"),
        ("[[actions]]", "[[actions", r"actions.toml is not valid TOML"),
        ("[[actions]]", "a = " + 50_000 * "[", r"actions.toml is not valid TOML"),
    ],
)
def test_mistakes_in_the_file_are_named_with_their_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        schema_at(tmp_path, LISTENING.replace(old, new))


def test_actions_saved_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    assert schema_at(tmp_path, "\ufeff" + LISTENING).names == ("playlist_add", "skip", "listen")


def test_a_schema_must_leave_something_to_predict_and_to_embed() -> None:
    (closeup,) = CLOSEUPS.actions
    for changes, message in (({"head": False}, "there is nothing to predict"), ({"affinity": 0}, "which pins belong")):
        with pytest.raises(ValueError, match=message):
            ActionSchema(actions=(closeup.model_copy(update=changes),))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot read the actions: .*lost.toml"):
        read_schema(tmp_path / "lost.toml")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            "seconds:float",
            "1",
            r"the actions need column 'events', but the columns are user_id, item_id, timestamp, seconds",
        ),
        (
            "events:float\tseconds:float",
            "1\t1",
            r"'playlist_add' looks for tokens in .*, but it is a float;",
        ),
        ("events:token\tseconds:token", "a\t1", r"'skip' compares column 'seconds' with a number, .* seconds:float"),
        ("events:float_seq\tseconds:float", "a\t1", r"'playlist_add' looks for tokens in .*, but it is a float_seq"),
        (
            "events:token\tseconds:float",
            "queue \t1",
            r"line 2: column 'events' holds 'queue ': it starts or ends with a blank",
        ),
        ("events:token\tseconds:float", "a\t", r"line 2: column 'seconds' holds '': it is not a number"),
    ],
)
def test_columns_that_do_not_fit_the_actions_are_refused(tmp_path: Path, header: str, row: str, message: str) -> None:
    schema_at(tmp_path)
    with pytest.raises(DatasetError, match=message):
        read_atomic(data_at(tmp_path, header, f"u\tp\t1\t{row}"))


def test_an_interaction_that_is_no_action_needs_a_name(tmp_path: Path) -> None:
    schema_at(tmp_path, LISTENING.rpartition("[[actions]]")[0])
    data = data_at(tmp_path, "events:token\tseconds:float", "u\tp\t1\tnone\t60", "u\tq\t2\tqueue\t60")
    with pytest.raises(DatasetError, match=r'line 2: this interaction and 0 others of 2 match none of the .* "shown"'):
        read_atomic(data)


def test_a_word_that_no_line_has_is_named(tmp_path: Path) -> None:
    schema_at(tmp_path, LISTENING.replace('"queue"', '"queued"'))
    data = data_at(tmp_path, "events:token\tseconds:float", "u\tp\t2\tqueue\t5", "u\tq\t1\tplaylist add\t60")
    (problem,) = read_atomic(data).problems
    assert problem.what == "action 'playlist_add': no line has 'queued' in column 'events'"
    assert problem.fix == "check the spelling; the column contains playlist add, queue"
