"""Run one phase in its own process: `python -m bench.gpu.phase NAME --out DIR --until SECONDS [--dry-run]`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from bench.gpu.numbers import Numbers
from bench.gpu.plan import PHASES

#: The function of each phase, which is imported when it runs and called with the folder and `Numbers`.
MEASURED_BY = {
    "facts": "measurements.facts:facts",
    "parity": "measurements.encoder:parity",
    "ceilings": "measurements.encoder:ceilings",
    "encoder": "measurements.encoder:encoder",
    "tuning": "measurements.encoder:tuning",
    "ncu": "measurements.tools:ncu",
    "sanitizer": "measurements.tools:sanitizer",
    "engine": "measurements.engine:engine",
    "two-engines": "measurements.engine:two_engines",
    "served": "measurements.served:served",
    "public": "measurements.public:public",
    "table": "table:table",
}
#: Phases whose kernels run in Triton's interpreter if there is no GPU. In other phases it would take minutes.
_INTERPRETED = ("parity", "encoder", "tuning", "ncu", "sanitizer", "public")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PHASES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="on the monotonic clock")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run and options.name in _INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
    module, _, function = MEASURED_BY[options.name].partition(":")
    measured = getattr(import_module(f"bench.gpu.{module}"), function)
    measured(options.out, Numbers(options.out, options.name, options.until, dry_run=options.dry_run))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
