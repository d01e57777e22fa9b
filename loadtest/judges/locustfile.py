"""Load-test a server with Locust: `locust -f loadtest/judges/locustfile.py --host 127.0.0.1:50051`.

It sends the workload of `pinrank load`, and needs the extra `load`.

A Locust user is a closed loop: it sends nothing while it waits for an answer. So only one request per user sees a stall
of the server, not all requests that were due (coordinated omission); `pinrank load` measures from the due time. Use
many users with a low rate each (`--rate-per-user`, 1 by default): a stall of 100 ms delays every tenth of 200 users at
1/s, but all of 10 users at 20/s.

To distribute the load, run `locust -f loadtest/judges/locustfile.py --master`, and on other machines the same file with
`--worker --master-host ...`; each worker draws different requests. For steps, a ramp or a spike instead of `--users`
and `--run-time`, add the shapes:
`locust -f loadtest/judges/locustfile.py,loadtest/judges/locust_shapes.py --load-shape spike`.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.experimental.gevent
from locust import User, events, task
from locust.env import Environment
from locust.exception import StopTest

from loadtest.errors import LoadError
from loadtest.open_loop import RANK
from loadtest.workload import Workload, parse_candidates, read_ids
from pinrank.channels import AddressError, open_channel
from pinrank.tls import ClientTls, TlsOptionError, client_tls

# Make gRPC's waits let other greenlets run.
grpc.experimental.gevent.init_gevent()

_REQUESTS = 5_000


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("pinrank")
    group.add_argument("--user-ids", default="1-1000", help="User ids: FIRST-LAST, a JSON list, .npy or .npz.")
    group.add_argument("--pin-ids", default="1-5000", help="Pin ids, most popular first, in the formats of --user-ids.")
    group.add_argument("--candidates", default="128", help="Candidate pins per request: 128, or COUNT:WEIGHT,...")
    group.add_argument("--surface", default="home", help="Surface of every request.")
    group.add_argument("--deadline-ms", type=float, default=1000, help="gRPC deadline of each call, in milliseconds.")
    group.add_argument(
        "--rate-per-user", type=float, default=1.0, help="Target rate of each user, in requests per second."
    )
    # Locust's own --tls-cert and --tls-key are for its web page. The variables are those of `pinrank rank`.
    for part, meaning in (
        ("ca", "Call the server with TLS: PEM file of its authority, or `system`."),
        ("cert", "Client certificate, if the server wants one (PEM file)."),
        ("key", "Key of the client certificate (PEM file)."),
        ("name", "Name in the server's certificate, if not the host's."),
    ):
        given = os.environ.get(f"PINRANK_TLS_{part.upper()}")
        group.add_argument(f"--grpc-tls-{part}", default=given, help=meaning)
    group.add_argument("--request-seed", type=int, default=0, help="Random seed; equal seeds draw equal requests.")


class Ranker(User):
    """A Locust user that sends one Rank call after another at a steady pace."""

    _contents: Iterator[bytes] | None = None
    _channel: grpc.Channel | None = None
    #: When the next request is due, and the interval between requests, in seconds.
    _due_s = 0.0
    _period_s = 1.0

    def wait_time(self) -> float:
        """Return the seconds until the next request is due; a late answer delays all later requests.

        Locust's `constant_throughput` does not fit: its first wait makes up for the time since the user was created, so
        users that started at random times would send at the same time again.
        """
        now_s = time.perf_counter()
        self._due_s = max(now_s, self._due_s + self._period_s)
        return self._due_s - now_s

    def __init__(self, environment: Environment) -> None:
        """Open one channel and draw one sequence of requests for all users of a process.

        This is not done in `on_start`, because only an error raised here ends the test; there, each user would fail
        alone and the test would continue.
        """
        super().__init__(environment)
        options: Any = environment.parsed_options
        cls = type(self)
        try:
            if cls._channel is None:
                cls._contents = _contents(environment)
                cls._channel = open_channel(_address(self.host), tls=_tls(options))
        except (AddressError, TlsOptionError, LoadError) as error:
            environment.process_exit_code = 1  # Locust exits with 0 if nothing was sent
            raise StopTest(f"error: {error}") from None
        self._rank: grpc.UnaryUnaryMultiCallable[bytes, bytes] = cls._channel.unary_unary(RANK)
        self._deadline_s = options.deadline_ms / 1e3
        self._period_s = 1 / options.rate_per_user

    def on_start(self) -> None:
        """Start at a random time, so that the users do not all send at once in every period."""
        time.sleep(random.uniform(0, self._period_s))
        self._due_s = time.perf_counter()

    @classmethod
    def reset(cls) -> None:
        """Close the channel; the next user opens a new one and draws new requests."""
        if cls._channel is not None:
            cls._channel.close()
        cls._channel = cls._contents = None

    @task
    def rank(self) -> None:
        assert self._contents is not None, "the first user drew them"  # noqa: S101
        start_s, name, failure, size = time.perf_counter(), "Rank", None, 0
        try:
            size = len(self._rank(next(self._contents), timeout=self._deadline_s))
        except grpc.RpcError as error:
            # Use only the status code, because Locust counts failures by their text. Give failures a name of their own,
            # because refusals are quick and would lower the percentiles of successful calls.
            failure = RankFailedError(error.code().name)
            name = f"Rank {failure}"
        self.environment.events.request.fire(
            request_type="gRPC",
            name=name,
            response_time=(time.perf_counter() - start_s) * 1e3,
            response_length=size,
            exception=failure,
            context={},
        )


class RankFailedError(Exception):
    """A call ended with a status other than OK."""


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _begin(**_: Any) -> None:
    """Reset the channel and requests, because the web page can change the host and options between two tests."""
    Ranker.reset()


def _address(host: str | None) -> str:
    """Return host:port, without the scheme that Locust's web page suggests."""
    if not host:
        raise LoadError("no server: add --host 127.0.0.1:50051")
    return host.removeprefix("http://").rstrip("/")


def _tls(options: Any) -> ClientTls | None:
    certificate, key = (path and Path(path) for path in (options.grpc_tls_cert, options.grpc_tls_key))
    return client_tls(options.grpc_tls_ca, certificate, key, options.grpc_tls_name)


def _contents(environment: Environment) -> Iterator[bytes]:
    """Draw requests, different ones in each worker."""
    options: Any = environment.parsed_options
    for option, value in (("--rate-per-user", options.rate_per_user), ("--deadline-ms", options.deadline_ms)):
        if not 0 < value < math.inf:
            raise LoadError(f"{option} must be a finite number above 0, but is {value:g}")
    worker = getattr(environment.runner, "worker_index", 0)
    ids = read_ids(options.user_ids, "user_ids"), read_ids(options.pin_ids, "pin_ids")
    candidates, seed = parse_candidates(options.candidates), options.request_seed + 1_000_003 * worker
    workload = Workload(*ids, candidates, surface=options.surface, seed=seed)
    return itertools.cycle(list(workload.requests(_REQUESTS)))
