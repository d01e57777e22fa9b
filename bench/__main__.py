"""`python -m bench [NAME...]` runs benchmarks and writes results; `python -m bench claims` shows which claims hold."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from bench.harness import RESULTS, BenchmarkError, claims_table, read_claims, run
from server.cli.console import console, fail

_BY_ROOM = {
    "serving": (
        "faults",
        "isolation",
        "load_tools",
        "overload",
        "recording",
        "serving",
        "swap_kills",
        "swaps",
        "swaps_broken",
    ),
    "features": ("actions", "bulk_load", "feature_reads", "near_cache"),
    "engines": ("encoder", "gpu_compiled", "gpu_design", "half", "lift"),
    "fuzz": ("fuzz_atomic", "fuzz_parquet", "fuzz_stream"),
}
#: Each module has a function `measure(*, quick: bool) -> Measurement`.
BENCHMARKS = {name: f"bench.{room}.{name}" for room, names in _BY_ROOM.items() for name in names}
#: These run only on request: `gpu_design` needs NVIDIA's compiler, and `lift` trains on additional data for an hour.
ON_REQUEST = ("gpu_design", "lift")

app = typer.Typer(pretty_exceptions_show_locals=False)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(BENCHMARKS)} (default: all but {' and '.join(ON_REQUEST)}), or claims."),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Folder for the results (default: bench/results).")] = None,
    quick: Annotated[
        bool, typer.Option(help="Try a script in seconds. Its numbers mean nothing; only --results writes them.")
    ] = False,
) -> None:
    """Run benchmarks and write their results, or print the claims of all committed results.

    An unmet claim is not an error. Example: python -m bench serving overload
    """
    try:
        if names == ["claims"]:
            console().print(claims_table(read_claims(results or RESULTS)))
            return
        for name in _chosen(names):
            measure = partial(import_module(BENCHMARKS[name]).measure, quick=quick)
            run(name, measure, results or (None if quick else RESULTS))
    except BenchmarkError as error:
        fail(str(error), error)


def _chosen(names: list[str] | None) -> list[str]:
    """Check the names and return the benchmarks to run, before the first one starts."""
    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        raise BenchmarkError(f"no benchmark {unknown[0]!r}; use {', '.join(BENCHMARKS)}, or claims")
    return names or [name for name in BENCHMARKS if name not in ON_REQUEST]


if __name__ == "__main__":
    app(prog_name="python -m bench")
