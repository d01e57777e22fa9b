"""Segments: torn, damaged, and of real processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from impressions.errors import LogError
from impressions.places import new_stem
from impressions.reading import log_files
from impressions.schema import TABLES
from impressions.segments import DamagedSegmentError, Segment, read_segment, segments
from tests.impressions import logs
from tests.impressions.answers import answered
from tests.impressions.log_files import archive_of, finish, ids, opened, parquet, wait_until, write_segment

ROOT = Path(__file__).parents[2]


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
    archive = archive_of(opened(tmp_path))
    archive.archive_all()
    assert ids(tmp_path) == [1, 2, 3]
    assert not segments(tmp_path / "spool")
    assert archive.damaged == 0


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
    archive = archive_of(opened(tmp_path))
    archive.archive_all()
    assert (tmp_path / "spool" / "damaged" / path.name).read_bytes() == content
    assert archive.damaged == 1
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
    archive_of(opened(tmp_path)).archive_all()
    assert path.read_bytes() == content
    assert not parquet(tmp_path)
    assert ids(tmp_path) == [1]
    finish(living)
    assert ids(tmp_path) == [1]


def test_a_row_stands_once_while_its_file_is_there_and_its_segment_too(tmp_path):
    """As after a kill between the file and the end of the segment."""
    path = write_segment(tmp_path, count=3)
    content = path.read_bytes()
    archive = archive_of(opened(tmp_path))
    archive.archive_all()
    before = [file.read_bytes() for file in parquet(tmp_path)]
    path.write_bytes(content)
    assert ids(tmp_path) == [1, 2, 3]
    archive.archive_all()
    assert [file.read_bytes() for file in parquet(tmp_path)] == before
    assert ids(tmp_path) == [1, 2, 3]
    assert not segments(tmp_path / "spool")


def test_a_segment_that_becomes_a_file_while_the_log_is_read_is_read_once(tmp_path):
    write_segment(tmp_path, count=3)
    found = list(log_files(str(tmp_path), "impressions"))
    assert [file.segment for file in found] == [True]
    archive_of(opened(tmp_path)).archive_all()
    assert found[0].rows()["request_id"].to_pylist() == [1, 2, 3]


def killed_writer(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.impressions.killed_writer", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


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
            os.killpg(process.pid, signal.SIGKILL)  # its archive, too: as when a container is killed
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
    archive_of(opened(tmp_path)).archive_all()
    assert not left.exists()
