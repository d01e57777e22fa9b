"""Load shapes (users over time) for Locust. A file of its own, as Locust ignores `--users` when it finds a shape."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from locust import LoadTestShape, events

from loadtest.shapes import users_at


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("pinrank's shapes")
    group.add_argument(
        "--load-shape", choices=("steps", "ramp", "spike"), default="steps", help="Number of users over time."
    )
    group.add_argument("--shape-users", type=int, default=200, help="Maximum number of users.")
    group.add_argument("--shape-s", type=float, default=60, help="Duration of the shape in seconds.")


class Shape(LoadTestShape):
    """Four steps, a ramp, or a spike from a tenth of the users to all of them and back."""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None, "Locust sets it before the first tick"  # noqa: S101
        options: Any = self.runner.environment.parsed_options
        since_s: float = self.get_run_time()  # type: ignore[no-untyped-call]
        users = users_at(options.load_shape, since_s / options.shape_s, options.shape_users)
        return None if users is None else (users, float(options.shape_users))
