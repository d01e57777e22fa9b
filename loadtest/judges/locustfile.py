"""The same workload for Locust: `locust -f loadtest/judges/locustfile.py --host 127.0.0.1:50051`.

Needs the extra `load`.

A Locust user is a closed loop: while it waits for an answer it sends nothing, so a stall of the server is seen by one
request per user and not by all that were due (coordinated omission); `pinrank load` counts from when a request was due.
Take many users with a low rate each (`--rate-per-user`, 1 by default): with 200 users at 1/s, a stall of 100 ms keeps
every tenth user from sending in time, with 10 users at 20/s all of them.

Distributed: `locust -f loadtest/judges/locustfile.py --master` and on other machines `--worker --master-host ...`;
every worker draws other requests. For steps, a ramp or spike instead of `--users` and `--run-time`, name the shapes'
file too: `locust -f loadtest/judges/locustfile.py,loadtest/judges/locust_shapes.py --load-shape spike`.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from argparse import ArgumentParser
from collections.abc import Iterator
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

# gRPC's waits must let other greenlets run.
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
    group.add_argument("--request-seed", type=int, default=0, help="Random seed; equal seeds draw equal requests.")


class Ranker(User):
    """A frontend: one Rank call after the other, at a steady pace."""

    _contents: Iterator[bytes] | None = None
    _channel: grpc.Channel | None = None
    #: When the next request is due, and how far requests lie apart.
    _due_s = 0.0
    _period_s = 1.0

    def wait_time(self) -> float:
        """Keep a steady pace; what a late answer cost is not caught up.

        Not Locust's `constant_throughput`: its first wait makes up for the time since the user was made, which brings
        users that began at random times back into step.
        """
        now_s = time.perf_counter()
        self._due_s = max(now_s, self._due_s + self._period_s)
        return self._due_s - now_s

    def __init__(self, environment: Environment) -> None:
        """Share one channel and one sequence of requests among the users of a process.

        Not in `on_start`: only what is raised here ends a test; from there every user would fail alone, and
        the test go on.
        """
        super().__init__(environment)
        options: Any = environment.parsed_options
        cls = type(self)
        try:
            if cls._channel is None:
                cls._contents = _contents(environment)
                cls._channel = open_channel(_address(self.host))
        except (AddressError, LoadError) as error:
            environment.process_exit_code = 1  # Locust's own is 0 where nothing was sent
            raise StopTest(f"error: {error}") from None
        self._rank: grpc.UnaryUnaryMultiCallable[bytes, bytes] = cls._channel.unary_unary(RANK)
        self._deadline_s = options.deadline_ms / 1e3
        self._period_s = 1 / options.rate_per_user

    def on_start(self) -> None:
        """Begin at any time: users that begin together would go on together, one stampede a period."""
        time.sleep(random.uniform(0, self._period_s))
        self._due_s = time.perf_counter()

    @classmethod
    def forget(cls) -> None:
        """Let the next user open a channel and draw requests again."""
        if cls._channel is not None:
            cls._channel.close()
        cls._channel = cls._contents = None

    @task
    def rank(self) -> None:
        assert self._contents is not None, "the first user made them"  # noqa: S101
        start_s, name, failure, size = time.perf_counter(), "Rank", None, 0
        try:
            size = len(self._rank(next(self._contents), timeout=self._deadline_s))
        except grpc.RpcError as error:
            # The code alone: Locust counts failures by their text. Under their own name, because a refusal is quick and
            # Locust's percentiles take in whatever has the name.
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
    """A call that ended with another status than OK."""


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _begin(**_: Any) -> None:
    """Start afresh: between two tests, the web page may have changed the host or any of the options."""
    Ranker.forget()


def _address(host: str | None) -> str:
    """Return host:port; Locust's web page suggests to write a scheme before it."""
    if not host:
        raise LoadError("no server: add --host 127.0.0.1:50051")
    return host.removeprefix("http://").rstrip("/")


def _contents(environment: Environment) -> Iterator[bytes]:
    """Draw requests, in every worker others."""
    options: Any = environment.parsed_options
    for option, value in (("--rate-per-user", options.rate_per_user), ("--deadline-ms", options.deadline_ms)):
        if not 0 < value < math.inf:
            raise LoadError(f"{option} must be a finite number above 0, but is {value:g}")
    worker = getattr(environment.runner, "worker_index", 0)
    ids = read_ids(options.user_ids, "user_ids"), read_ids(options.pin_ids, "pin_ids")
    candidates, seed = parse_candidates(options.candidates), options.request_seed + 1_000_003 * worker
    workload = Workload(*ids, candidates, surface=options.surface, seed=seed)
    return itertools.cycle(list(workload.requests(_REQUESTS)))
