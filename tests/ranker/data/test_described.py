"""Features of the data's own columns: what `features.toml` names, what becomes of it, and what is proposed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_client.codec import RowState
from feature_client.fetch import fetch
from feature_client.groups import FeatureNeeds
from feature_client.stores.memory_store import MemoryStore
from model_store.bundle.files import Bundle
from model_store.bundle.tensor_sources import Scalars
from ranker.data.actions import RATINGS, action_log
from ranker.data.atomic.described import Column, Described, fields_of, read_described
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.proposals import proposals
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import PinEmbeddings, space_of
from ranker.data.features import Groups, fill_store, pin_rows, user_rows
from ranker.data.requests import Split, part_slices
from ranker.errors import DatasetError, SettingError
from ranker.recipe import make_bundle
from ranker.training.examples import FeatureSnapshot
from ranker.training.parent import Parent
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic
from tests.ranker.test_recipe import RECIPE, Notes

FEATURES = """
[[pins]]
column = "price"
[[pins]]
column = "tags"
words = ["new", "red hat", "sale"]
[[users]]
column = "plan"
words = ["paid"]
"""
ITEMS = (
    "item_id:token\ttitle:token\tprice:float\ttags:token_seq\n"
    "p0\tNull\t4\tnew sale\np1\tOne\t\tsale\np2\tTwo\t8.5\t\np2\tTwo again\t99\tnew\nunseen\tNever\t7\tnew\n"
)
USERS = "user_id:token\tplan:token\tage:float\nu0\tpaid\t30\nu1\tfree\t40\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_atomic(tmp_path / "data", per_user=12)
    (folder / "tiny-taste.item").write_text(ITEMS)
    (folder / "tiny-taste.user").write_text(USERS)
    (folder / "features.toml").write_text(FEATURES)
    return folder


def of_token(ids: np.ndarray, token: str) -> int:
    return int(np.flatnonzero(ids == np.uint64(token_id(token)))[0])


def test_columns_become_fields_of_the_rows(folder: Path) -> None:
    dataset = read_atomic(folder)
    log = action_log(dataset)
    groups = Groups.of(space_of("toy"), log.schema, log.described)
    names = ("price", "tags_new", "tags_red_hat", "tags_sale")
    assert groups.pin_scalars[-4:] == names
    assert groups.user_scalars[-1] == "plan_paid"
    vectors = np.zeros((len(log.pin_ids), 32), np.float16)
    end_ms = int(log.time_ms[-1]) + 1
    rows = pin_rows(log, groups.pin, vectors, end_ms)

    def of_pin(token: str) -> list[float]:
        row = rows.rows[of_token(log.pin_ids, token)]
        return [float(row[name]) for name in names]

    assert of_pin("p0") == [4, 1, 0, 1]
    assert of_pin("p1") == [7.75, 0, 0, 1]  # no price: the median of 4, 8.5, 99 and 7
    assert of_pin("p2") == [8.5, 0, 0, 0]  # its first line counts
    assert of_pin("p3") == [0, 0, 0, 0]  # not listed
    of_users = user_rows(log, groups.user, vectors, end_ms)
    paid = {token: float(of_users.rows[of_token(log.user_ids, token)]["plan_paid"]) for token in ("u0", "u1", "u2")}
    assert paid == {"u0": 1, "u1": 0, "u2": 0}
    before = pin_rows(log, groups.pin, vectors, int(log.time_ms[0]))
    assert not before.rows["log_actions"].any()
    for token, state, price in (
        ("p0", RowState.PRESENT, 4),
        ("p1", RowState.PRESENT, 7.75),
        ("p3", RowState.MISSING, 0),
    ):
        place = of_token(log.pin_ids, token)
        assert (before.states[place], before.rows["price"][place]) == (state, price)
    assert before.rows["creator_tail"][of_token(log.pin_ids, "p0")] == 0.5  # the default of the group
    assert dataset.unread == {"tiny-taste.inter": (), "tiny-taste.item": (), "tiny-taste.user": ("age",)}


async def test_a_store_holds_the_pins_and_users_that_no_event_names(folder: Path) -> None:
    (folder / "tiny-taste.user").write_text(USERS + "newcomer\tpaid\t20\n")
    log = action_log(read_atomic(folder))
    groups = Groups.of(space_of("toy"), log.schema, log.described)
    embeddings = PinEmbeddings(log.pin_ids, np.zeros((len(log.pin_ids), 32), np.float16), space_of("toy"))
    store = MemoryStore()
    written = await fill_store(store, log, embeddings, groups)
    assert (written["pins"], written["users"]) == (len(log.pin_ids) + 1, len(log.user_ids) + 1)
    needs = FeatureNeeds((groups.user,), (groups.pin,), groups.sequence, 5)
    pins = np.array([token_id("unseen"), token_id("p0"), token_id("nowhere")], np.uint64)
    found = await fetch(store, needs, token_id("newcomer"), pins)
    assert found.pins[groups.pin.name].states.tolist() == [RowState.PRESENT, RowState.PRESENT, RowState.MISSING]
    assert found.pins[groups.pin.name].rows["price"].tolist() == [7, 4, 0]
    assert found.pins[groups.pin.name].rows["log_actions"][0] == 0
    assert (found.user[groups.user.name].states[0], found.user[groups.user.name].rows["plan_paid"][0]) == (0, 1)
    assert found.sequence_state == RowState.MISSING


def test_new_pins_are_drawn_as_before_although_they_have_rows(folder: Path) -> None:
    log = action_log(read_atomic(folder))
    groups = Groups.of(space_of("toy"), log.schema, log.described)
    span = part_slices(log, Split(), "train")[0]
    vectors = np.zeros((len(log.pin_ids), 32), np.float16)
    snapshot = FeatureSnapshot.at(span, log, groups, vectors, [0])
    acted = np.isin(np.arange(len(log.pin_ids)), log.pin[: log.before(span.start_ms)])
    assert snapshot.known.tolist() == acted.tolist()
    assert not acted[snapshot.new_pins].any()


def test_without_features_the_groups_are_what_they_were() -> None:
    plain, empty = Groups.of(space_of("toy"), RATINGS), Groups.of(space_of("toy"), RATINGS, Described())
    assert plain == empty
    assert plain.pin_scalars == plain.user_scalars


def test_a_version_reads_its_features_and_refuses_data_that_has_others(folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", read_atomic(folder), RECIPE, Notes())
    assert _fields(bundle, "pin_scalars")[-4:] == ("price", "tags_new", "tags_red_hat", "tags_sale")
    assert _fields(bundle, "user_scalars")[-1] == "plan_paid"
    (folder / "features.toml").unlink()
    log = action_log(read_atomic(folder))
    groups = Groups.served_by(bundle.manifest)
    with pytest.raises(
        DatasetError, match="group pin_core@2 has the field 'price', which is no feature of this data: it"
    ):
        pin_rows(log, groups.pin, np.zeros((len(log.pin_ids), 32), np.float16), int(log.time_ms[-1]))
    older = replace(Parent.of(bundle), learned_until_ms=int(log.time_ms[0]))
    with pytest.raises(
        SettingError, match="toy@3 reads the fields log_actions, .*, plan_paid of user_core, but the data"
    ):
        make_bundle(tmp_path / "next", read_atomic(folder), replace(RECIPE, version=4), Notes(), parent=older)


def _fields(bundle: Bundle, name: str) -> tuple[str, ...]:
    (source,) = (tensor.source for tensor in bundle.manifest.inputs if tensor.name == name)
    assert isinstance(source, Scalars)
    return source.fields


def test_every_field_has_a_name_of_its_own() -> None:
    columns = (
        Column(column="Price ($)"),
        Column(column="price"),
        Column(column="ad"),
        Column(column="7 days"),
        Column(column="save_share"),
        Column(column="tag", words=("a b", "a-b", "ä", "x" * 60, "x" * 61)),
    )
    names = fields_of(columns)
    assert len(set(names)) == len(names) == 10
    assert names[:4] == ("price", "price_0_of_1", "own_ad", "own_7_days")
    assert all(len(name) <= 40 for name in names)
    assert not any(name.endswith("_share") for name in names)
    groups = Groups.of(space_of("toy"), RATINGS, Described(pins=columns))  # names that groups accept
    assert len(groups.pin_scalars) == 5 + 10


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            '[[pins]]\ncolumn = "weight"\n',
            "features.toml reads column 'weight', but the columns are item_id, title, price",
        ),
        (
            '[[pins]]\ncolumn = "tags"\n',
            "column 'tags' is a token_seq, which features.toml cannot read so; name its words",
        ),
        ('[[pins]]\ncolumn = "price"\nwords = ["4"]\n', "column 'price' is a float, .*; leave out its words"),
        ('[[pins]]\ncolumn = "title"\nwords = ["a", "a"]\n', "column 'title' names a word twice"),
        ('[[pins]]\ncolumn = "price"\n[[pins]]\ncolumn = "price"\n', "pins: a column is named twice"),
        ('[[items]]\ncolumn = "price"\n', "items"),
        ("[[pins]\n", "features.toml is not valid TOML"),
    ],
)
def test_what_features_toml_cannot_mean_is_refused(folder: Path, features: str, message: str) -> None:
    (folder / "features.toml").write_text(features)
    with pytest.raises((DatasetError, SettingError), match=message):
        read_atomic(folder)


def test_features_of_a_file_that_is_not_there_are_refused(folder: Path) -> None:
    (folder / "tiny-taste.user").unlink()
    with pytest.raises(
        SettingError, match=r"features.toml reads column 'plan' of tiny-taste.user, which does not exist"
    ):
        read_atomic(folder)


def test_users_listed_twice_and_users_of_another_spelling_are_told(folder: Path) -> None:
    users = folder / "tiny-taste.user"
    users.write_text(USERS + "u0\tfree\t31\n")
    told = " ".join(str(problem) for problem in read_atomic(folder).problems)
    assert "tiny-taste.user: 1 users are listed more than once, such as 'u0' on lines 2 and 4; the first line" in told
    users.write_text(USERS.replace("\nu", "\nuser-"))
    assert "tiny-taste.user has no user of the interactions: it has 'user-0', they have 'u0'" in str(
        read_atomic(folder).problems
    )


def test_a_number_that_is_none_is_named_with_its_line(folder: Path) -> None:
    (folder / "tiny-taste.item").write_text(ITEMS.replace("8.5", "cheap"))
    with pytest.raises(DatasetError, match="line 4: column 'price' holds 'cheap': it is not a number"):
        read_atomic(folder)


def test_check_proposes_features_that_it_can_read_itself(folder: Path) -> None:
    (folder / "features.toml").unlink()
    code, output = run("data", "check", folder)
    assert code == 0
    assert f"`pinrank data check {folder} --propose` writes this features.toml" in output
    assert not (folder / "features.toml").exists()
    code, output = run("data", "check", folder, "--propose")
    assert code == 0
    assert f"wrote {folder / 'features.toml'}; read and edit it" in output
    proposed = read_described(folder / "features.toml")
    assert proposed.pins == (Column(column="tags", words=("new", "sale")),)  # prices are missing in places
    assert proposed.users == (Column(column="plan", words=("paid", "free")), Column(column="age"))
    assert "# tiny-taste.item, price: " in (folder / "features.toml").read_text()
    assert proposals(folder) == []


def test_check_proposes_actions_from_the_words_of_a_column(tmp_path: Path) -> None:
    words = ["view"] * 60 + ["buy"] * 5 + ["hide it"] * 10
    lines = [f"u{i % 7}\tp{i % 11}\t{1_700_000_000 + i}\t{word}" for i, word in enumerate(words)]
    header = "user_id:token\titem_id:token\ttimestamp:float\tevent:token\n"
    (tmp_path / "shop.inter").write_text(header + "\n".join(lines) + "\n")
    run("data", "check", tmp_path, "--propose")
    schema = read_atomic(tmp_path).schema
    assert [(rule.name, rule.any_of, rule.affinity) for rule in schema.actions] == [
        ("buy", ("buy",), 1.0),
        ("hide_it", ("hide it",), 0.0),
        ("view", ("view",), 0.3),
    ]
