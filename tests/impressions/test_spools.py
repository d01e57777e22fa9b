"""`pinrank impressions stat`, `check` and `join` read the spool folders that they are told of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from impressions.errors import LogError
from impressions.inspection.check import check_log
from impressions.inspection.summary import summarize
from impressions.reading import read_tables
from server.cli.main import app
from tests.impressions.answers import answered
from tests.impressions.log_files import finish, opened


@pytest.fixture
def spools(tmp_path: Path) -> list[Path]:
    """Return the spool folders of two servers, each with two answers on their way; the log has two others."""
    log = opened(tmp_path / "log", spool_folder=tmp_path / "first")
    for number in (1, 2):
        log.offer_impression(answered(number))
    finish(log)
    folders = [tmp_path / name for name in ("first", "second")]
    for number, folder in enumerate(folders, 1):
        log = opened(tmp_path / "log", spool_folder=folder)
        for request_id in (10 * number, 10 * number + 1):
            log.offer_impression(answered(request_id))
        log.close()
        log.write()
    return folders


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["impressions", *map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, " ".join(result.output.split())


def test_stat_and_join_have_the_rows_of_the_spool_folders_that_they_are_told_of(tmp_path, spools):
    log, out, told = tmp_path / "log", tmp_path / "joined", ["--spool", spools[0], "--spool", spools[1]]
    for options, requests in ([], 2), (told[:2], 4), (told, 6):
        assert f"requests {requests} of" in run("stat", log, *options)[1]
        code, output = run("join", log, "--window", "30m", "--out", out, *options)
        assert code == 0, output
        assert f"requests {requests} " in output


def test_check_reads_the_spool_folders_that_it_is_told_of(tmp_path, spools):
    log, (first, second) = tmp_path / "log", spools
    damaged = second / "damaged" / next(second.glob("impressions-*")).name
    damaged.parent.mkdir()
    damaged.write_bytes(b"?")
    (segment,) = first.glob("impressions-*")
    segment.write_bytes(b"no stream")
    assert list(check_log(str(log), 1 << 60)) == []
    assert [one.where for one in check_log(str(log), 1 << 60, spools=spools)] == [str(segment), str(damaged)]
    assert run("check", log)[0] == 0
    assert run("check", log, "--spool", second)[0] == 1


def test_rows_count_once_if_a_spool_folder_is_named_twice_linked_or_copied(tmp_path, spools):
    (tmp_path / "link").symlink_to(spools[0])
    shutil.copytree(spools[0], tmp_path / "copy")
    folders = [spools[0], spools[0], tmp_path / "link", tmp_path / "copy"]
    assert summarize(str(tmp_path / "log"), folders).requests == 4
    own = opened(tmp_path / "log")
    own.offer_impression(answered(50))
    own.close()
    own.write()
    assert summarize(str(tmp_path / "log"), [tmp_path / "log" / "spool"]).requests == 3


def test_a_log_may_have_all_its_rows_in_a_spool_folder(tmp_path):
    log = opened(tmp_path / "log", spool_folder=tmp_path / "spool")
    log.offer_impression(answered(1))
    log.close()
    log.write()
    (tmp_path / "log").mkdir(exist_ok=True)
    with pytest.raises(LogError, match="there is no impression log"):
        list(read_tables(str(tmp_path / "log"), "impressions"))
    assert [rows.num_rows for rows in read_tables(str(tmp_path / "log"), "impressions", [tmp_path / "spool"])] == [1]


def test_an_empty_spool_folder_is_one(tmp_path, spools):
    finish(opened(tmp_path / "log", spool_folder=spools[0]))
    assert list(spools[0].iterdir()) == []
    assert summarize(str(tmp_path / "log"), spools[:1]).requests == 4


@pytest.mark.parametrize("command", ["stat", "check", "join"])
def test_a_folder_that_is_no_spool_is_refused_with_what_to_name(tmp_path, spools, command):
    log, nowhere = tmp_path / "log", tmp_path / "nowhere"
    options = ("--window", "30m", "--out", tmp_path / "joined") if command == "join" else ()
    code, output = run(command, log, *options, "--spool", log)
    assert code == 1
    assert output == (
        f"error: --spool {log}: it holds impressions and no segments (*.arrows), so it is no spool; name the folder of "
        "the servers' setting impressions.spool_folder"
    )
    code, output = run(command, log, *options, "--spool", spools[0], "--spool", nowhere)
    assert code == 1
    assert output == (
        f"error: --spool {nowhere}: there is no such folder; name the folder of the servers' setting "
        "impressions.spool_folder"
    )
