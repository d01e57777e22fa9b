"""`pinrank model compile`: TensorRT plans into a bundle, before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kernels.engines import ENGINES, WITH_PLANS
from server.cli.console import console, fail
from server.cli.models import models


@models.command("compile")
def compile_plans(
    folder: Annotated[Path, typer.Argument(help="A bundle's folder, not published yet.")],
    architecture: Annotated[
        list[str] | None, typer.Option(help="Compute capability to build for, such as 8.9; may be repeated.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--library",
            metavar=f"[{'|'.join(WITH_PLANS)}]",
            help="tensorrt builds for the GPU it finds; tensorrt_rtx for any, without a GPU.",
        ),
    ] = "tensorrt_rtx",
    half: Annotated[Literal["bfloat16", "float16"], typer.Option(help="Of the operands of products.")] = "bfloat16",
    timings_of: Annotated[
        Path | None,
        typer.Option(help="Folder of a bundle compiled before, for tensorrt to learn from: a faster build."),
    ] = None,
) -> None:
    """Build a bundle's network ahead of time, so that no server has to: its plans then travel in the bundle.

    Servers use the plans of bundles that a trusted publisher signed (swap.trusted_keys), and build their own otherwise.

    Example: [bold]pinrank model compile out/ml1m-42 --architecture 8.9 --architecture 12.0[/]
    """
    from kernels.engine import EngineError  # noqa: PLC0415
    from kernels.gpu.cuda import Device  # noqa: PLC0415
    from kernels.gpu.tensorrt_build import Settings, load_library  # noqa: PLC0415
    from model_store.bundle.files import BundleError, read_bundle  # noqa: PLC0415
    from model_store.bundle.plans import add_plans  # noqa: PLC0415

    progress = console(stderr=True)
    library = ENGINES[engine].library if engine in ENGINES else None
    if library is None:
        fail(f"--library {engine!r} builds no plans; choose one of {', '.join(WITH_PLANS)}")
    try:
        version = str(load_library(library).__version__)
        if library == "tensorrt":
            if architecture:
                fail("tensorrt builds for the GPU that it finds; --architecture is for --library tensorrt_rtx")
            device = Device()
            device.close()
            architecture = [device.capability]
        if not architecture:
            fail("--architecture says which GPUs to build for: 8.0 (A100), 8.6 (A10), 8.9 (L4, L40S), 12.0 (Blackwell)")
        with progress.status(f"building with {library} {version}"):
            add_plans(
                folder,
                Settings(library, half),
                version,
                architecture,
                lambda name, size: typer.echo(f"{name}: {size / 1e6:.1f} MB"),
                read_bundle(timings_of).files if timings_of else None,
            )
    except (BundleError, EngineError) as error:
        fail(str(error))
