"""The adapters on invented rows in the exact format of what was published."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest

from ranker.data.actions import action_log
from ranker.data.adapters.conversion import SITTING_S, convert
from ranker.data.adapters.deskdrop import DESKDROP
from ranker.data.adapters.grocery import GROCERY
from ranker.data.adapters.kuairand import KUAIRAND
from ranker.data.atomic.identifiers import token_id
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.errors import DatasetError

DESKDROP_HEADER = "timestamp,eventType,contentId,personId,sessionId,userAgent,userRegion,userCountry\n"
KUAIRAND_HEADER = (
    "user_id\tvideo_id\tdate\thourmin\ttime_ms\tis_click\tis_follow\tis_comment\tis_forward\tlong_view\t"
    "play_time_ms\tduration_ms\tcomment_stay_time\tis_profile_enter\tlabel\ttimestamp\n"
)


def deskdrop_at(folder: Path, *events: tuple[int, str, int, int]) -> AtomicDataset:
    """Convert (time in seconds, type, pin, user) rows from a zip archive."""
    rows = [f'{time},{kind},{pin},{user},77,"Mozilla/5.0 (X11, Linux)",SP,BR\n' for time, kind, pin, user in events]
    with zipfile.ZipFile(folder / "users_interactions.csv.zip", "w") as archive:
        archive.writestr("users_interactions.csv", DESKDROP_HEADER + "".join(rows))
    convert(DESKDROP, folder / "users_interactions.csv.zip", folder / "out")
    return read_atomic(folder / "out")


def labelled(dataset: AtomicDataset) -> list[tuple[int, int, set[str]]]:
    """Return (time in seconds, pin, labels) per interaction."""
    return [
        (int(time) // 1000, int(pin), {name for name, on in zip(dataset.schema.names, row.tolist(), strict=True) if on})
        for time, pin, row in zip(dataset.time_ms, dataset.pins, dataset.labels, strict=True)
    ]


def test_what_happens_in_one_sitting_is_one_interaction_at_the_time_of_its_last_sign(tmp_path: Path) -> None:
    start = 1_465_413_032
    apart = SITTING_S + 1
    dataset = deskdrop_at(
        tmp_path,
        (start + 40, "BOOKMARK", 11, -8845298781299428018),
        (start, "VIEW", 11, -8845298781299428018),
        (start, "VIEW", 11, -8845298781299428018),
        (start + 5, "VIEW", 12, -8845298781299428018),
        (start + 10, "VIEW", 11, 5),
        # The chain goes on while each sign follows within the limit, then a new sitting starts.
        (start + 40 + SITTING_S, "COMMENT CREATED", 11, -8845298781299428018),
        (start + 40 + SITTING_S + apart, "LIKE", 11, -8845298781299428018),
        (start + 40 + SITTING_S + apart, "FOLLOW", 12, -8845298781299428018),
    )
    assert labelled(dataset) == [
        (start + 5, 12, {"closeup"}),
        (start + 10, 11, {"closeup"}),
        (start + 40 + SITTING_S, 11, {"save", "comment", "closeup"}),
        (start + 40 + SITTING_S + apart, 11, {"like", "closeup"}),
        (start + 40 + SITTING_S + apart, 12, {"follow", "closeup"}),
    ]
    # Negative identifiers are hashed, like every token that is no plain number.
    assert set(dataset.users.tolist()) == {5, token_id("-8845298781299428018")}
    log = action_log(dataset)
    assert [log.schema.names[a] for a in log.action] == ["closeup", "closeup", "save", "like", "follow"]


def kuairand_at(folder: Path, *rows: str) -> AtomicDataset:
    """Convert rows of (user, video, time_ms, click, follow, comment, forward, long_view, profile, label)."""
    lines = []
    for row in rows:
        user, video, time_ms, click, follow, comment, forward, long_view, profile, label = row.split()
        lines.append(
            f"{user}\t{video}\t20220410\t1700\t{time_ms}\t{click}\t{follow}\t{comment}\t{forward}\t{long_view}\t"
            f"46186\t45916\t7639\t{profile}\t{label}\t2022-04-10 08:59:09\n"
        )
    (folder / "extract.tsv.gz").write_bytes(gzip.compress((KUAIRAND_HEADER + "".join(lines)).encode()))
    convert(KUAIRAND, folder / "extract.tsv.gz", folder / "out")
    return read_atomic(folder / "out")


def test_a_label_of_one_is_a_like_and_of_zero_a_hide(tmp_path: Path) -> None:
    dataset = kuairand_at(
        tmp_path,
        "111 3892024 1649581149287 0 0 0 0 1 0 1",
        "111 2629583 1649664552983 1 1 1 1 0 1 0",
        "112 2629583 1649664552984 0 0 0 0 0 0 0",
    )
    assert dataset.time_ms.tolist() == [1649581149287, 1649664552983, 1649664552984]
    assert [labels for _, _, labels in labelled(dataset)] == [
        {"like", "long_view"},
        {"hide", "follow", "forward", "comment", "profile_visit", "closeup"},
        {"hide"},
    ]
    log = action_log(dataset)
    assert [log.schema.names[a] for a in log.action] == ["like", "hide", "hide"]
    # What users do for an author is predicted, so that a creator's utility can be made of it.
    assert {"follow", "forward", "profile_visit"} <= set(log.heads)


def test_a_video_shown_again_soon_is_one_interaction(tmp_path: Path) -> None:
    dataset = kuairand_at(
        tmp_path,
        "1 2 1649581149287 1 0 0 0 0 0 1",
        "1 2 1649581149287 0 0 0 0 1 0 1",
        "1 2 1659581149287 0 0 0 0 0 0 1",
    )
    assert [labels for _, _, labels in labelled(dataset)] == [{"like", "closeup", "long_view"}, {"like"}]


def test_what_is_not_the_known_log_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"not the deskdrop log .*: line 2: column 'eventType' holds 'SHARE': it must be one of VIEW"
    ):
        deskdrop_at(tmp_path, (1, "SHARE", 2, 3))
    with pytest.raises(DatasetError, match=r"not the kuairand log .*: line 2: column 'label' holds '2': it must be 0"):
        kuairand_at(tmp_path, "1 2 1649581149287 0 0 0 0 0 0 2")
    with pytest.raises(DatasetError, match=r"not the kuairand log .* no column 'user_id'"):
        convert(KUAIRAND, tmp_path / "users_interactions.csv.zip", tmp_path / "out")
    (tmp_path / "broken.zip").write_text("no archive")
    with pytest.raises(DatasetError, match=r"broken.zip is not the deskdrop log"):
        convert(DESKDROP, tmp_path / "broken.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(DatasetError, match="already exists; choose a new folder"):
        convert(DESKDROP, tmp_path / "broken.zip", tmp_path / "out")


GOOD = "1465413032,VIEW,11,5,77,agent,SP,BR\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column 'timestamp'"),
        (DESKDROP_HEADER, "it has no lines after the header"),
        (DESKDROP_HEADER.replace("sessionId", "personId") + GOOD, "more than one column 'personId'"),
        (DESKDROP_HEADER + GOOD + "\n1465413032,VIEW,11\n", "line 4: 3 fields, but the header names 8 columns"),
        (DESKDROP_HEADER + GOOD.replace("BR", "BR,1"), "line 2: 9 fields, but the header names 8 columns"),
        (DESKDROP_HEADER + GOOD.replace("1465413032", "soon"), "line 2: column 'timestamp' holds 'soon': it is not a"),
        (
            DESKDROP_HEADER + GOOD.replace("1465413032", "1465413032000"),
            "line 2: .* not a Unix time between 1970 and 2200",
        ),
        (DESKDROP_HEADER + GOOD.replace("1465413032", "9" * 5000), "line 2: .* not a Unix time between 1970 and 2200"),
        (DESKDROP_HEADER + GOOD.replace("1465413032", "-5"), "line 2: .* not a Unix time between 1970 and 2200"),
        (DESKDROP_HEADER + GOOD.replace(",5,", ",,"), "line 2: column 'personId' holds '': the identifier is empty"),
        (
            DESKDROP_HEADER + GOOD.replace(",5,", ",5.0,"),
            "line 2: column 'personId' holds '5.0': .* decimal; write 5",
        ),
        (DESKDROP_HEADER + GOOD.replace(",5,", ',"a\tb",'), "line 2: .* contains unprintable characters"),
        (DESKDROP_HEADER + GOOD + '1465413032,VIEW,11,"5,77', "unexpected end of data"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named_and_nothing_is_left(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(DatasetError, match=r"log.csv is not the deskdrop log that this command reads: " + message):
        convert(DESKDROP, tmp_path / "log.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress((DESKDROP_HEADER + 1000 * GOOD).encode())
    damaged = whole[:30] + bytes(len(whole) - 38) + whole[-8:]
    for number, content in enumerate((whole[:-12], damaged, b"no archive")):
        (tmp_path / f"{number}.csv.gz").write_bytes(content)
        with pytest.raises(DatasetError, match=f"{number}.csv.gz is not the deskdrop log"):
            convert(DESKDROP, tmp_path / f"{number}.csv.gz", tmp_path / "out")


def test_a_byte_order_mark_is_no_part_of_the_first_columns_name(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("\ufeff" + DESKDROP_HEADER + GOOD)
    assert convert(DESKDROP, tmp_path / "log.csv", tmp_path / "out") == 1


GROCERY_EVENTS = "user_id\titem_id\ttime\n2177\t3\t965779200\n4161\t18\t1068249600\n2177\t18\t1068249600\n"
GROCERY_ITEMS = "item_id\ti_category\tr_complement\tr_substitute\n3\t21\t[18, 4]\t[]\n18\t0\t[]\t[3]\n"


def grocery_folder(folder: Path, events: str = GROCERY_EVENTS, items: str = GROCERY_ITEMS) -> Path:
    folder.mkdir()
    (folder / "train.csv").write_text(events)
    (folder / "item_meta.csv").write_text(items)
    return folder


def test_every_grocery_review_is_an_interaction_and_items_keep_what_is_known_of_them(tmp_path: Path) -> None:
    assert convert(GROCERY, grocery_folder(tmp_path / "source"), tmp_path / "out") == 3
    dataset = read_atomic(tmp_path / "out")
    assert dataset.schema.heads == ("review",)
    assert sorted(zip(dataset.users.tolist(), dataset.pins.tolist(), dataset.time_ms.tolist(), strict=True)) == [
        (2177, 3, 965_779_200_000),
        (2177, 18, 1_068_249_600_000),
        (4161, 18, 1_068_249_600_000),
    ]
    assert (tmp_path / "out" / "grocery.item").read_text().splitlines() == [
        "item_id:token\tcategory:token\tcomplements:token_seq\tsubstitutes:token_seq",
        "3\t21\t18 4\t",
        "18\t0\t\t3",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": GROCERY_ITEMS.replace("[18, 4]", "18, 4")}, "line 2: column 'r_complement' holds '18, 4': .* list"),
        ({"items": GROCERY_ITEMS.replace("[3]", "[three]")}, r"line 3: column 'r_substitute' holds '\[three\]'"),
        ({"events": GROCERY_EVENTS.replace("965779200", "now")}, "line 2: column 'time' holds 'now'"),
        ({"events": GROCERY_EVENTS.replace("\t", ",")}, "no column 'user_id'"),
    ],
)
def test_a_grocery_table_that_cannot_be_understood_is_refused(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(DatasetError, match="source is not the grocery log that this command reads: " + message):
        convert(GROCERY, grocery_folder(tmp_path / "source", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grocery_source_without_its_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="must be a folder with train.csv and item_meta.csv"):
        convert(GROCERY, tmp_path / "train.csv", tmp_path / "out")
    (grocery_folder(tmp_path / "source") / "item_meta.csv").unlink()
    with pytest.raises(DatasetError, match=r"it has no file item_meta.csv"):
        convert(GROCERY, tmp_path / "source", tmp_path / "out")
