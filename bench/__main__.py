"""`python -m bench [NAME...]` measures and writes results; `python -m bench claims` says which claims hold."""

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
#: Each module measures with `measure(*, quick: bool) -> Measured`.
BENCHMARKS = {name: f"bench.{room}.{name}" for room, names in _BY_ROOM.items() for name in names}
#: Run only when they are named: one needs NVIDIA's compiler, the other trains for most of an hour on data of its own.
ON_REQUEST = ("gpu_design", "lift")

app = typer.Typer(pretty_exceptions_show_locals=False)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(BENCHMARKS)}; without any, all but {' and '.join(ON_REQUEST)}. Or claims."),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of the results (default: bench/results).")] = None,
    quick: Annotated[
        bool, typer.Option(help="Try the script in seconds; its numbers mean nothing and are kept only in --results.")
    ] = False,
) -> None:
    """Run benchmarks, or print the claims of all committed results (`claims`; unmet ones do not fail)."""
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
    """Return the benchmarks to run, known before the first of them starts."""
    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        raise BenchmarkError(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}, and `claims`")
    return names or [name for name in BENCHMARKS if name not in ON_REQUEST]


if __name__ == "__main__":
    app(prog_name="python -m bench")
