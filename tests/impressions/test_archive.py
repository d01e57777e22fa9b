"""The files of a log: retention, other versions, damage, and buckets that fail."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from impressions.errors import LogError
from impressions.places import file_of, new_stem, open_place
from impressions.reading import log_files, read_tables
from impressions.schema import FINGERPRINT_KEY
from impressions.segments import segments
from tests.impressions import logs
from tests.impressions.answers import answered
from tests.impressions.log_files import archive_of, ids, opened, parquet, write_segment
from tests.s3_server import s3_server

ROOT = Path(__file__).parents[2]


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
    archive_of(log).archive_all()
    archive_of(log)._delete_old()
    assert not old.exists()
    assert new.exists()
    assert all(path.exists() for path in (*others, elsewhere))
    assert segments(tmp_path / "spool")


def test_without_retention_nothing_is_deleted(tmp_path):
    old = aged(tmp_path, 4_000)
    archive_of(opened(tmp_path))._delete_old()
    assert old.exists()


def test_a_file_of_another_version_is_refused_by_name_with_both_fingerprints(tmp_path):
    path = tmp_path / file_of(new_stem("impressions", 1))
    path.parent.mkdir(parents=True)
    other = logs.table("impressions", [logs.impression(1, 1, 1, [1])]).drop_columns(["arm"])
    pq.write_table(other.replace_schema_metadata({FINGERPRINT_KEY: b"0123456789abcdef"}), path)
    with pytest.raises(LogError, match=f"{path}: written by another version.*0123456789abcdef.*fingerprint 9cf62575"):
        ids(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_segment(tmp_path)
    archive_of(opened(tmp_path)).archive_all()
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
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patched:
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
        ):
            patched.setenv(name, value)
        yield


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


def test_rows_on_their_way_to_a_bucket_are_read_from_its_spool_folder(s3, tmp_path):
    import boto3

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="waiting")
    for number, archive in ((1, True), (2, False)):
        log = opened("s3://waiting/log", spool_folder=tmp_path / "spool")
        log.offer_impression(answered(number))
        log.close()
        log.write()
        if archive:
            log.archive_segments()
    assert ids("s3://waiting/log") == [1]
    both = read_tables("s3://waiting/log", "impressions", [tmp_path / "spool"])
    assert [rows["request_id"].to_pylist() for rows in both] == [[1], [2]]


def test_retention_deletes_old_objects(s3, tmp_path):
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="aging")
    day = f"{datetime.now(UTC) - timedelta(days=9):%Y-%m-%d}"
    keys = [f"log/impressions/{day}/120000-host-1-000000-1.parquet", f"log/impressions/{day}/notes.txt"]
    for key in keys:
        client.put_object(Bucket="aging", Key=key, Body=b"x")
    archive_of(opened("s3://aging/log", spool_folder=tmp_path, retention_days=7.0))._delete_old()
    left = [one["Key"] for one in client.list_objects_v2(Bucket="aging")["Contents"] if not one["Key"].endswith("/")]
    assert left == keys[1:]
