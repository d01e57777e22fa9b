"""Load-test a server with MLPerf's loadgen, to check `pinrank load`: `python -m loadtest.judges.mlperf`.

Loadgen's Server scenario is an open loop with its own Poisson arrivals, clock and percentiles; only the calls are ours.
So it tells whether `pinrank load` measures correctly. It needs the extra `load`.
"""

from __future__ import annotations

import json as json_format
import re
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.text import Text

from loadtest.errors import LoadError
from loadtest.open_loop import OK, RANK
from loadtest.settings import check_address, check_bounds, check_target
from loadtest.workload import Workload, parse_candidates, read_ids
from pinrank.channels import open_channel, parse_address
from pinrank.tls import ClientTls, with_tls_options

try:
    import mlperf_loadgen as loadgen
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("MLPerf's loadgen is not installed: pip install 'pinrank[load]'") from missing

#: Seconds to wait for the server.
_CONNECT_S = 3.0
#: Number of prepared requests that loadgen draws from.
_SAMPLES = 1_024
_SUMMARY = {
    "scheduled_per_s": r"Scheduled samples per second\s*:\s*([\d.]+)",
    "completed_per_s": r"Completed samples per second\s*:\s*([\d.]+)",
    "p50_ms": r"50\.00 percentile latency \(ns\)\s*:\s*(\d+)",
    "p90_ms": r"90\.00 percentile latency \(ns\)\s*:\s*(\d+)",
    "p99_ms": r"99\.00 percentile latency \(ns\)\s*:\s*(\d+)",
    "p999_ms": r"99\.90 percentile latency \(ns\)\s*:\s*(\d+)",
    "max_ms": r"Max latency \(ns\)\s*:\s*(\d+)",
}


class Judge:
    """Answers loadgen's queries with Rank calls over one channel; gRPC's threads report the results."""

    def __init__(self, channel: grpc.Channel, requests: list[bytes], deadline_s: float) -> None:
        self._rank: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(RANK)
        self._requests = requests
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self.statuses: Counter[str] = Counter()

    def issue(self, samples: list[Any]) -> None:
        """Send requests; loadgen calls this when samples are due."""
        for sample in samples:
            call = self._rank.future(self._requests[sample.index], timeout=self._deadline_s)
            call.add_done_callback(lambda done, number=sample.id: self._complete(number, done))  # type: ignore[misc]

    def _complete(self, number: int, call: Any) -> None:
        with self._lock:
            self.statuses[call.code().name] += 1
        # This must come last: after the last sample loadgen returns, and `judge` reads the statuses.
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(number, 0, 0)])


def judge(
    address: str,
    requests: list[bytes],
    rate_per_s: float,
    duration_s: float,
    target_ms: float,
    deadline_s: float,
    tls: ClientTls | None = None,
) -> dict[str, Any]:
    """Run the Server scenario; return loadgen's summary and the statuses of the calls.

    Args:
        address: host:port of the server.
        requests: serialised RankRequests, at least one.
        rate_per_s: mean rate of the Poisson arrivals.
        duration_s: minimum duration of the run.
        target_ms: latency that 99% of the calls must meet for loadgen's verdict to be VALID.
        deadline_s: gRPC deadline of each call.
        tls: how to speak TLS; without it, in plain text.

    Returns:
        The result of `parse_summary`, `statuses` (the number of calls by status), and `valid`: whether loadgen's
        verdict is VALID and all calls were OK. Loadgen itself counts every call that ended, even a quick refusal.

    Raises:
        LoadError: no server answers, or the server rejects the first request.
    """
    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Server
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = rate_per_s
    settings.server_target_latency_ns = round(target_ms * 1e6)
    settings.server_target_latency_percentile = 0.99
    settings.min_duration_ms = round(duration_s * 1e3)
    settings.min_query_count = settings.max_query_count = max(1, round(rate_per_s * duration_s))
    with tempfile.TemporaryDirectory(prefix="pinrank-loadgen-") as folder, open_channel(address, tls=tls) as channel:
        _probe(channel, address, requests[0], tls)
        answering = Judge(channel, requests, deadline_s)
        output = loadgen.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = folder, False
        logs = loadgen.LogSettings()
        logs.log_output = output
        system = loadgen.ConstructSUT(answering.issue, lambda: None)
        library = loadgen.ConstructQSL(len(requests), len(requests), lambda _: None, lambda _: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, logs)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    found, statuses = parse_summary(summary), dict(answering.statuses)
    valid = found["loadgen_verdict"] == "VALID" and set(statuses) == {OK}
    return {"valid": valid, **found, "statuses": statuses}


def _probe(channel: grpc.Channel, address: str, content: bytes, tls: ClientTls | None) -> None:
    """Check that the server answers and accepts the requests, before loadgen starts its clock."""
    rank: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(RANK)
    try:
        grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        rank(content, timeout=_CONNECT_S)
    except grpc.FutureTimeoutError as error:
        raise LoadError(parse_address(address).unanswered(tls=tls)) from error
    except grpc.RpcError as error:
        raise LoadError(f"the server rejected the first request: {error.code().name}: {error.details()}") from error


def parse_summary(text: str) -> dict[str, Any]:
    """Read loadgen's summary. Raises LoadError if a number is missing, as other versions may use other words."""
    verdict = re.search(r"Result is\s*:\s*(VALID|INVALID)", text)
    if verdict is None:
        raise LoadError(f"loadgen's summary has no verdict:\n{text}")
    # One possible reason is "Early stopping": there were too few requests for a P99.
    unmet = re.findall(r"^\s*(.+?) satisfied\s*:\s*NO", text, re.MULTILINE | re.IGNORECASE)
    found: dict[str, Any] = {"loadgen_verdict": verdict[1], "unmet": unmet}
    for name, pattern in _SUMMARY.items():
        match = re.search(pattern, text)
        if match is None:
            raise LoadError(f"loadgen's summary has no {name}:\n{text}")
        found[name] = float(match[1]) / (1e6 if name.endswith("_ms") else 1)
    return found


@with_tls_options
def main(
    address: Annotated[str, typer.Option(help="Server address as host:port.")] = "127.0.0.1:50051",
    rate: Annotated[float, typer.Option(help="Offered requests per second.")] = 100,
    duration: Annotated[float, typer.Option(help="Duration of the run in seconds.")] = 10,
    candidates: Annotated[str, typer.Option(help="Candidate pins per request: 128, or COUNT:WEIGHT,...")] = "128",
    users: Annotated[str, typer.Option(help="User ids: FIRST-LAST, a JSON list, .npy or .npz.")] = "1-1000",
    pins: Annotated[str, typer.Option(help="Pin ids, most popular first, in the formats of --users.")] = "1-5000",
    surface: Annotated[str, typer.Option(help="Surface of every request.")] = "home",
    deadline_ms: Annotated[float, typer.Option(help="gRPC deadline of each call, in milliseconds.")] = 1000,
    target_ms: Annotated[float, typer.Option(help="Latency target for 99% of the answers, in milliseconds.")] = 10,
    seed: Annotated[int, typer.Option(help="Random seed of the requests; loadgen draws the arrivals itself.")] = 0,
    allow_remote: Annotated[bool, typer.Option(help="Allow a server on another machine.")] = False,
    *,
    tls: ClientTls | None = None,
) -> None:
    """Test a running server with the Server scenario of MLPerf's loadgen, and print the results as JSON."""
    try:
        check_address(address, allow_remote=allow_remote)
        check_bounds(rate, duration, 0, 0, deadline_ms)
        check_target(target_ms)
        ids = read_ids(users, "user_ids"), read_ids(pins, "pin_ids")
        workload = Workload(*ids, parse_candidates(candidates), surface=surface, seed=seed)
        requests = list(workload.requests(_SAMPLES))
        verdict = judge(address, requests, rate, duration, target_ms, deadline_ms / 1e3, tls)
    except LoadError as error:
        _fail(str(error), error)
    typer.echo(json_format.dumps(verdict, indent=2))


def _fail(message: str, cause: Exception) -> None:
    Console(markup=False, emoji=False, stderr=True).print(
        Text.assemble(("error: ", "bold red"), message), soft_wrap=True
    )
    raise typer.Exit(1) from cause


if __name__ == "__main__":
    typer.run(main)
