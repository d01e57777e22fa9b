"""`python -m bench [NAME...]` runs benchmarks and writes results; `python -m bench claims` shows which claims hold.

`python -m bench conclude NAME...` draws the conclusions again from raw results that are already there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bench.benchmarks import BENCHMARKS
from bench.harness import RESULTS, BenchmarkError, claims_table, conclude_kept, read_results, run
from bench.provenance import provenance_table
from server.cli.console import console, fail

#: What runs only when it is named.
ON_REQUEST = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.on_request)

app = typer.Typer(pretty_exceptions_show_locals=False)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{', '.join(BENCHMARKS)} (default: all but {', '.join(ON_REQUEST)}), claims, or conclude NAME."
        ),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Folder for the results (default: bench/results).")] = None,
    quick: Annotated[
        bool, typer.Option(help="Try a script in seconds. Its numbers mean nothing; only --results writes them.")
    ] = False,
) -> None:
    """Run benchmarks and write their results, or print the claims of all committed results.

    An unmet claim is not an error. `conclude` draws the conclusions again from raw results: those that a failed run has
    kept, or those of the last result. Example: python -m bench serving overload
    """
    try:
        if names == ["claims"]:
            _show_claims(results or RESULTS)
        elif names and names[0] == "conclude":
            if not names[1:]:
                raise BenchmarkError("conclude which benchmark? For example: python -m bench conclude serving")
            for name in _chosen(names[1:]):
                conclude_kept(name, BENCHMARKS[name].module().conclude, results or RESULTS)
        else:
            for name in _chosen(names):
                module = BENCHMARKS[name].module()
                run(
                    name, partial(module.measure, quick=quick), module.conclude, results or (None if quick else RESULTS)
                )
    except BenchmarkError as error:
        fail(str(error), error)


def _show_claims(results: Path) -> None:
    found = read_results(results)
    parts = {name: BENCHMARKS[name].sources if name in BENCHMARKS else () for name in found}
    console().print(provenance_table(found, parts))
    console().print(claims_table({name: content["claims"] for name, content in found.items()}))


def _chosen(names: list[str] | None) -> list[str]:
    """Check the names and return the benchmarks to run, before the first one starts."""
    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        raise BenchmarkError(f"no benchmark {unknown[0]!r}; use {', '.join(BENCHMARKS)}, claims, or conclude NAME")
    return names or [name for name in BENCHMARKS if name not in ON_REQUEST]


if __name__ == "__main__":
    app(prog_name="python -m bench")
