"""The log itself: real files, real processes that are killed, disks and buckets that fail."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from impressions import archive as archive_module
from impressions.archive import Archive
from impressions.errors import LogError
from impressions.log import ImpressionLog, LogSettings
from impressions.places import file_of, new_stem, open_place
from impressions.reading import log_files, read_tables
from impressions.rows import RecordedAction, RecordedActions, SeenReport
from impressions.schema import FINGERPRINT_KEY, IMPRESSIONS, TABLES
from impressions.segments import DamagedSegmentError, Segment, read_segment, segments
from tests.impressions import logs
from tests.impressions.answers import answered

ROOT = Path(__file__).parents[2]


def opened(folder: Path | str, **settings) -> ImpressionLog:
    where = folder if isinstance(folder, str) else f"file://{folder}"
    return ImpressionLog(LogSettings(where, **settings))


def finish(log: ImpressionLog) -> None:
    """Write and archive all, on this thread."""
    log.close()
    log.write()
    log.archive_segments()


def ids(folder: Path | str, table: str = "impressions") -> list[int]:
    return [one for part in read_tables(str(folder), table) for one in part["request_id"].to_pylist()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def parquet(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.parquet"))


def write_segment(folder: Path, count: int = 4, first: int = 1, per_batch: int = 1) -> Path:
    """Write a segment as a process leaves it that is killed between two batches."""
    spool = folder / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    segment = Segment(spool, new_stem("impressions", first), IMPRESSIONS)
    for start in range(first, first + count, per_batch):
        rows = [logs.impression(i, 1_000 + i, 7, [1, 2, 3]) for i in range(start, start + per_batch)]
        segment.append(logs.table("impressions", rows).combine_chunks().to_batches()[0])
    segment.close()
    return segment.path


def test_rows_of_all_tables_come_back_as_they_were_offered(tmp_path):
    log = opened(tmp_path)
    row = answered(1, degradation={"missing_pins": 2}, query_pin_id=9, query_vector=np.array([1, 2], np.float32))
    assert log.offer_impression(row)
    assert log.offer_seen(SeenReport(1, 5, np.array([0, 2], np.uint32)))
    action = RecordedAction(3, 4, 5, "save", "home", 6, 7, None, None)
    assert log.offer_actions(RecordedActions(1, lambda: [action]))
    log.flush()
    before = {table: [part.to_pylist() for part in read_tables(str(tmp_path), table)] for table in TABLES}
    finish(log)
    assert not segments(tmp_path / "spool")
    after = {table: [part.to_pylist() for part in read_tables(str(tmp_path), table)] for table in TABLES}
    assert before == after
    ((found,),) = after["impressions"]
    order = row.scores.order
    assert found["pin_ids"] == row.pin_ids[order].tolist()
    assert found["probabilities"] == row.scores.probabilities[order].ravel().tolist()
    assert found["attribute_values"] == row.attribute_values.T[order].ravel().tolist()
    assert (found["degradation"], found["query_vector"]) == ([("missing_pins", 2)], [1.0, 2.0])
    assert after["seen"] == [[{"request_id": 1, "received_ms": 5, "positions": [0, 2]}]]
    assert after["actions"][0][0]["request_id"] is None


def test_names_say_table_day_time_host_and_process(tmp_path):
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    finish(log)
    (path,) = parquet(tmp_path)
    day = datetime.now(UTC)
    assert path.parent.parent.name == "impressions"
    assert path.parent.name in {f"{day:%Y-%m-%d}", f"{day - timedelta(hours=1):%Y-%m-%d}"}
    assert str(os.getpid()) in path.name
    assert path.name == path.name.lower()


def test_a_full_queue_drops_and_counts_and_takes_rows_again(tmp_path):
    log = opened(tmp_path, queue_bytes_max=20_000)
    taken = [log.offer_impression(answered(i)) for i in range(1, 41)]
    counts = log.tables["impressions"]
    assert 0 < sum(taken) < 40
    assert taken == sorted(taken, reverse=True)
    assert (counts.accepted, counts.dropped) == (sum(taken), 40 - sum(taken))
    log.flush()
    assert log.queued_bytes == 0
    assert log.offer_impression(answered(41))
    finish(log)
    assert ids(tmp_path) == [i for i, kept in enumerate(taken, 1) if kept] + [41]
    assert counts.written == counts.accepted


def test_a_row_that_cannot_be_converted_is_counted_and_holds_up_no_other(tmp_path):
    log = opened(tmp_path)
    for i in range(1, 6):
        log.offer_impression(answered(i, party_weights=None) if i == 3 else answered(i))
    finish(log)
    counts = log.tables["impressions"]
    assert (counts.written, counts.unfit) == (4, 1)
    assert ids(tmp_path) == [1, 2, 4, 5]


def test_size_and_age_end_a_segment(tmp_path):
    log = opened(tmp_path, rotate_bytes=30_000)
    for i in range(1, 200):
        log.offer_impression(answered(i))
        log.flush()
    found = [file for file in log_files(str(tmp_path), "impressions") if file.segment]
    assert len(found) > 3
    assert max(file.bytes for file in found) < 60_000
    old = opened(tmp_path / "old", rotate_s=0.0)
    for i in range(1, 4):
        old.offer_impression(answered(i))
        old.flush()
    assert len(segments(tmp_path / "old" / "spool")) == 3
    finish(old)
    assert ids(tmp_path / "old") == [1, 2, 3]


@pytest.mark.parametrize("failing", ["new", "append"])
def test_rows_wait_while_the_disk_is_full_and_none_is_lost(tmp_path, monkeypatch, failing):
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    if failing == "append":
        log.flush()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "append" if failing == "append" else "__init__", full)
        for i in range(2, 5):
            log.offer_impression(answered(i))
            with pytest.raises(OSError, match="No space left"):
                log.flush()
        assert log.queued_bytes
    log.offer_impression(answered(5))
    finish(log)
    assert ids(tmp_path) == [1, 2, 3, 4, 5]
    assert log.archive.damaged == 0


def test_a_disk_that_is_full_in_the_middle_of_a_batch_loses_nothing(tmp_path):
    """A child may write files of 64 KiB only; then it may write larger ones, as after somebody made room."""
    child = """
import resource, signal, sys
from pathlib import Path
from impressions.log import ImpressionLog, LogSettings
from tests.impressions.answers import answered
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
log = ImpressionLog(LogSettings(f"file://{sys.argv[1]}"))
failures = 0
for i in range(1, 401):
    log.offer_impression(answered(i, pins=20))
    if i % 50 == 0:
        try:
            log.flush()
        except OSError:
            failures += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.close()
log.write()
log.archive_segments()
print(failures, log.archive.damaged)
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    failures, damaged = map(int, done.stdout.split()[-2:])
    assert failures > 1
    assert damaged == 0
    assert ids(tmp_path) == list(range(1, 401))


def test_an_archive_that_fails_is_tried_again_and_nothing_is_lost(tmp_path, monkeypatch):
    log = opened(tmp_path)
    real, calls = archive_module.write_parquet, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(*arguments)

    monkeypatch.setattr(archive_module, "write_parquet", failing)
    log.offer_impression(answered(1))
    log.close()
    log.write()
    for _ in range(2):
        with pytest.raises(OSError, match="Permission denied"):
            log.archive_segments()
        assert len(segments(tmp_path / "spool")) == 1
        assert ids(tmp_path) == [1]
    log.archive_segments()
    assert ids(tmp_path) == [1]
    assert not segments(tmp_path / "spool")


def torn_ends(folder: Path, table: str, rows: list[logs.Row], step: int) -> list[int]:
    """Return how many rows each beginning of a segment gives, from the shortest that has a name."""
    segment = Segment(folder, new_stem(table, 1), TABLES[table])
    shortest = segment.bytes
    for row in rows:
        segment.append(logs.table(table, [row]).combine_chunks().to_batches()[0])
    segment.close()
    whole, torn, counts = segment.path.read_bytes(), folder / "torn.arrows", []
    for end in [*range(shortest, len(whole), step), len(whole)]:
        torn.write_bytes(whole[:end])
        found, _ = read_segment(torn)
        counts.append(found.num_rows)
        assert found["request_id"].to_pylist() == [row["request_id"] for row in rows[: found.num_rows]]
    return counts


def test_every_torn_end_gives_the_whole_batches_before_it(tmp_path):
    every = torn_ends(tmp_path, "seen", [logs.seen(i, 0, 2) for i in range(1, 4)], 1)
    assert every == sorted(every)
    assert set(every) == {0, 1, 2, 3}
    some = torn_ends(tmp_path, "impressions", [logs.impression(i, 1, 7, [1, 2]) for i in range(1, 4)], 61)
    assert some == sorted(some)
    assert set(some) == {0, 1, 2, 3}


def test_a_torn_segment_becomes_a_file_of_its_whole_batches(tmp_path):
    path = write_segment(tmp_path, count=4)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    log = opened(tmp_path)
    log.archive.archive_all()
    assert ids(tmp_path) == [1, 2, 3]
    assert not segments(tmp_path / "spool")
    assert log.archive.damaged == 0


@pytest.mark.parametrize("at", ["start", "middle"])
def test_a_damaged_segment_is_set_aside_whole_after_what_can_be_read_was_kept(tmp_path, at):
    path = write_segment(tmp_path, count=4)
    content = bytearray(path.read_bytes())
    place = 0 if at == "start" else content.rindex(b"\xff\xff\xff\xff", 0, len(content) - 3_000)
    content[place : place + 64] = b"\x07" * 64
    path.write_bytes(content)
    with pytest.raises(DamagedSegmentError):
        read_segment(path)
    with pytest.raises(LogError, match=f"{path}: the segment is damaged"):
        ids(tmp_path)
    log = opened(tmp_path)
    log.archive.archive_all()
    assert (tmp_path / "spool" / "damaged" / path.name).read_bytes() == content
    assert log.archive.damaged == 1
    kept = parquet(tmp_path)
    assert bool(kept) == (at == "middle")
    if kept:
        found = ids(tmp_path)
        assert 0 < len(found) < 4
        assert found == [1, 2, 3, 4][: len(found)]


def test_a_segment_that_a_living_process_writes_is_left_alone(tmp_path):
    living = opened(tmp_path)
    living.offer_impression(answered(1))
    living.flush()
    (path,) = segments(tmp_path / "spool")
    content = path.read_bytes()
    opened(tmp_path).archive.archive_all()
    assert path.read_bytes() == content
    assert not parquet(tmp_path)
    assert ids(tmp_path) == [1]
    finish(living)
    assert ids(tmp_path) == [1]


def test_a_row_stands_once_while_its_file_is_there_and_its_segment_too(tmp_path):
    """As after a kill between the file and the end of the segment."""
    path = write_segment(tmp_path, count=3)
    content = path.read_bytes()
    log = opened(tmp_path)
    log.archive.archive_all()
    before = [file.read_bytes() for file in parquet(tmp_path)]
    path.write_bytes(content)
    assert ids(tmp_path) == [1, 2, 3]
    log.archive.archive_all()
    assert [file.read_bytes() for file in parquet(tmp_path)] == before
    assert ids(tmp_path) == [1, 2, 3]
    assert not segments(tmp_path / "spool")


def test_a_segment_that_becomes_a_file_while_the_log_is_read_is_read_once(tmp_path):
    write_segment(tmp_path, count=3)
    found = list(log_files(str(tmp_path), "impressions"))
    assert [file.segment for file in found] == [True]
    opened(tmp_path).archive.archive_all()
    assert found[0].rows()["request_id"].to_pylist() == [1, 2, 3]


def killed_writer(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.impressions.killed_writer", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_killed_writers_lose_nothing_that_they_have_written_and_no_file(tmp_path):
    """Two processes at a time share the log; each is killed while it writes, rotates and archives."""
    for number in range(2):
        firsts = (number * 200_000 + 1, number * 200_000 + 100_001)
        running = {first: killed_writer(tmp_path, first) for first in firsts}
        written = dict.fromkeys(running, 0)

        def read(first, process, written=written):
            for line in process.stdout:
                written[first] = int(line.split()[1])

        readers = [threading.Thread(target=read, args=one) for one in running.items()]
        for reader in readers:
            reader.start()
        for first in running:
            wait_until(lambda first=first, written=written: written[first] > 500)
        for process in running.values():
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        for reader, process in zip(readers, running.values(), strict=True):
            reader.join()
            process.stdout.close()
        logged = set(ids(tmp_path))
        for first, count in written.items():
            assert set(range(first, first + count)) <= logged
    write_segment(tmp_path, first=900_000)  # the last kills may have left none
    before = sorted(ids(tmp_path))
    assert len(before) == len(set(before))
    for _ in range(2):  # a recovery that is killed between a file and the end of its segment, again and again
        with killed_writer(tmp_path, 0, "archive") as recovery:
            assert recovery.wait(30) == -signal.SIGKILL
        assert sorted(ids(tmp_path)) == before
    finish(opened(tmp_path))
    assert sorted(ids(tmp_path)) == before
    assert not segments(tmp_path / "spool")
    assert not list((tmp_path / "spool").glob("damaged/*"))


def test_what_was_created_before_a_kill_without_rows_is_cleared(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    left = spool / "impressions-2026-01-01-000000-host-1-000000-1.new"
    left.write_bytes(b"half a schema")
    opened(tmp_path).archive.archive_all()
    assert not left.exists()


def aged(folder: Path, days: float, name: str = "120000-host-1-000000-1.parquet") -> Path:
    day = datetime.now(UTC) - timedelta(days=days)
    path = folder / "impressions" / f"{day:%Y-%m-%d}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_retention_deletes_old_files_of_the_log_and_nothing_else(tmp_path):
    old, new = aged(tmp_path, 9), aged(tmp_path, 2)
    others = [aged(tmp_path, 9, "notes.txt"), aged(tmp_path, 9, "Mine.parquet"), tmp_path / "impressions" / "x.parquet"]
    elsewhere = tmp_path / "joined" / "2020-01-01" / old.name
    elsewhere.parent.mkdir(parents=True)
    for path in (others[-1], elsewhere):
        path.write_bytes(b"")
    log = opened(tmp_path, retention_days=7.0)
    log.offer_impression(answered(1))
    log.flush()
    log.archive.archive_all()
    log.archive._delete_old()
    assert not old.exists()
    assert new.exists()
    assert all(path.exists() for path in (*others, elsewhere))
    assert segments(tmp_path / "spool")


def test_without_retention_nothing_is_deleted(tmp_path):
    old = aged(tmp_path, 4_000)
    opened(tmp_path).archive._delete_old()
    assert old.exists()


def test_a_file_of_another_version_is_refused_by_name_with_both_fingerprints(tmp_path):
    path = tmp_path / file_of(new_stem("impressions", 1))
    path.parent.mkdir(parents=True)
    other = logs.table("impressions", [logs.impression(1, 1, 1, [1])]).drop_columns(["arm"])
    pq.write_table(other.replace_schema_metadata({FINGERPRINT_KEY: b"0123456789abcdef"}), path)
    with pytest.raises(LogError, match=f"{path}: written by another version.*0123456789abcdef.*fingerprint 5ee810c3"):
        ids(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_segment(tmp_path)
    opened(tmp_path).archive.archive_all()
    (path,) = parquet(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LogError, match=f"{path}: the file is damaged"):
        ids(tmp_path)


def test_a_spool_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LogError, match=f"{tmp_path}/file/spool: cannot create the spool folder: Not a directory"):
        opened(tmp_path / "file")


def test_a_log_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LogError, match="there is no such folder"):
        ids(tmp_path / "nowhere")
    with pytest.raises(LogError, match="there is no impression log"):
        ids(tmp_path)


def test_a_table_without_rows_has_no_parts(tmp_path):
    write_segment(tmp_path)
    assert list(read_tables(str(tmp_path), "seen")) == []


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patched:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
        ):
            patched.setenv(name, value)
        yield server
    server.stop()


def test_a_bucket_that_comes_late_gets_every_row(s3, tmp_path):
    log = opened("s3://late/logs/a", spool_folder=tmp_path / "spool")
    for i in range(1, 4):
        log.offer_impression(answered(i))
    log.close()
    log.write()
    with pytest.raises(OSError, match="(?i)bucket"):
        log.archive_segments()
    assert len(segments(tmp_path / "spool")) == 1
    place = open_place("s3://late/logs/a")
    import boto3

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="late")
    log.archive_segments()
    assert ids("s3://late/logs/a") == [1, 2, 3]
    assert not segments(tmp_path / "spool")
    (file,) = log_files("s3://late/logs/a", "impressions")
    assert file.where.startswith(f"{place.root}/impressions/")


def test_retention_deletes_old_objects(s3, tmp_path):
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="aging")
    day = f"{datetime.now(UTC) - timedelta(days=9):%Y-%m-%d}"
    keys = [f"log/impressions/{day}/120000-host-1-000000-1.parquet", f"log/impressions/{day}/notes.txt"]
    for key in keys:
        client.put_object(Bucket="aging", Key=key, Body=b"x")
    Archive(open_place("s3://aging/log"), tmp_path, 7.0)._delete_old()
    left = [one["Key"] for one in client.list_objects_v2(Bucket="aging")["Contents"] if not one["Key"].endswith("/")]
    assert left == keys[1:]


def test_batches_with_new_names_extend_a_segment(tmp_path):
    """Each batch brings names that the batches before it lack."""
    log = opened(tmp_path)
    for i in range(1, 20):
        log.offer_impression(answered(i, label=f"label-{i}"))
        log.flush()
    finish(log)
    rows = pa.concat_tables(read_tables(str(tmp_path), "impressions"))
    assert rows["label"].to_pylist() == [f"label-{i}" for i in range(1, 20)]
