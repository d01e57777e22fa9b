"""A process that logs answers until it is killed: `python -m tests.impressions.killed_writer FOLDER FIRST [archive]`.

It prints the id of each answer right after it was offered, and how many were written by then. With `archive`, it
only makes Parquet files of what others left behind, and kills itself between the file and the end of its segment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from impressions.archive import Archive
from impressions.writing.log import ImpressionLog, LogSettings
from tests.impressions.answers import answered
from tests.impressions.log_files import archive_of, opened


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3:] == ["archive"]:
        real = Archive._put

        def put_and_die(self: Archive, *arguments: object) -> None:
            real(self, *arguments)  # type: ignore[arg-type]
            _kill()

        Archive._put = put_and_die  # type: ignore[method-assign,assignment]
        archive_of(opened(folder)).archive_all()
        return
    log = ImpressionLog(LogSettings(f"file://{folder}", flush_s=0.05, rotate_s=0.3))
    for work in (log.write, log.archive_segments):
        threading.Thread(target=work, daemon=True).start()
    request_id = first
    while True:
        log.offer_impression(answered(request_id))
        # In one piece, even if the process is killed.
        os.write(1, f"{request_id} {log.tables['impressions'].written}\n".encode())
        request_id += 1
        time.sleep(0.001)  # the pace of requests


if __name__ == "__main__":
    main()
