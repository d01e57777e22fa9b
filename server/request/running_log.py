"""Runs the impression log of a server: its two threads, its metrics, and its end. Imports pyarrow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from impressions.writing.log import ImpressionLog, LogSettings
from server.config_sections import ImpressionsConfig
from server.request.answer_log import AnswerLog
from server.runtime.supervisor import Supervisor

_log = structlog.get_logger(__name__)

#: How long a stopping server waits for its last rows; what is then not in a Parquet file stays in the spool folder.
_CLOSE_S = 5.0


class RunningLog:
    """An impression log whose threads run.

    Attributes:
        answers: takes the rows.
    """

    def __init__(self, config: ImpressionsConfig, to: str, supervisor: Supervisor) -> None:
        """Open the log and start its threads.

        Raises:
            LogError: its place cannot be used.
        """
        self._log = ImpressionLog(
            LogSettings(
                to=to,
                spool_folder=config.spool_folder,
                spool_bytes_max=config.spool_bytes_max,
                flush_s=config.flush_s,
                rotate_bytes=config.rotate_bytes,
                rotate_s=config.rotate_s,
                queue_bytes_max=config.queue_bytes_max,
                retention_days=config.retention_days,
            )
        )
        self.answers = AnswerLog(self._log, config.share, config.features_share)
        self.collector = LogCollector(self._log)
        self._threads = [
            supervisor.thread("impressions", self._log.write),
            supervisor.thread("impressions-archive", self._log.archive_segments),
        ]
        for thread in self._threads:
            thread.start()

    async def close(self) -> None:
        """Write all rows, and make Parquet files of them if that takes a few seconds at most."""
        self._log.close()
        loop = asyncio.get_running_loop()
        until_s, (writer, archive) = loop.time() + _CLOSE_S, self._threads
        await asyncio.to_thread(writer.join, _CLOSE_S)
        if self._log.queued_bytes and not writer.is_alive():
            # It had failed, and was waiting for its next try when the server began to stop: now is the time for it.
            try:
                await asyncio.to_thread(self._log.write)
            except OSError as error:
                _log.error("impressions_not_written", reason=str(error))
        await asyncio.to_thread(archive.join, max(0.0, until_s - loop.time()))
        if self._log.queued_bytes:
            lost = {name: counts.accepted - counts.written - counts.unfit for name, counts in self._log.tables.items()}
            _log.error("impressions_lost", rows=lost)
        elif archive.is_alive():
            _log.warning("impressions_left_in_spool_folder")


class LogCollector(Collector):
    """Exports the counts of an impression log."""

    def __init__(self, log: ImpressionLog) -> None:
        self._log = log

    def collect(self) -> Iterator[Metric]:
        rows = CounterMetricFamily(
            "pinrank_impression_log_rows",
            "Rows of the impression log by table and outcome: written, dropped because the queue was full, or unfit "
            "because they could not be converted, which is a bug",
            labels=["table", "outcome"],
        )
        for table, counts in self._log.tables.items():
            for outcome in ("written", "dropped", "unfit"):
                rows.add_metric([table, outcome], getattr(counts, outcome))
        yield rows
        yield GaugeMetricFamily(
            "pinrank_impression_log_queue_bytes",
            "Estimated memory of the rows that wait to be written to the spool folder",
            self._log.queued_bytes,
        )
        archive = self._log.archive
        yield CounterMetricFamily("pinrank_impression_log_files", "Parquet files of the impression log", archive.files)
        yield CounterMetricFamily(
            "pinrank_impression_log_file_bytes", "Size of the Parquet files of the impression log", archive.bytes
        )
        yield CounterMetricFamily(
            "pinrank_impression_log_damaged_segments",
            "Segments in the spool folder that could not be understood and were moved to its folder `damaged`",
            archive.damaged,
        )
