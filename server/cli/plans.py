"""`pinrank model compile`: build TensorRT plans into a bundle before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kernels.engines import ENGINES, WITH_PLANS
from server.cli.console import console, fail
from server.cli.models import models


@models.command("compile")
def compile_plans(
    folder: Annotated[Path, typer.Argument(help="Folder of a bundle that is not published yet.")],
    architecture: Annotated[
        list[str] | None, typer.Option(help="GPU compute capability to build for, for example 8.9; may be repeated.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--library",
            metavar=f"[{'|'.join(WITH_PLANS)}]",
            help="tensorrt builds for the GPU of this machine; tensorrt_rtx builds for any GPU and needs none.",
        ),
    ] = "tensorrt_rtx",
    half: Annotated[
        Literal["bfloat16", "float16"], typer.Option(help="16-bit type of the operands of matrix products.")
    ] = "bfloat16",
    timings_of: Annotated[
        Path | None,
        typer.Option(help="Folder of a compiled bundle whose kernel timings tensorrt reuses, for a faster build."),
    ] = None,
) -> None:
    """Build a bundle's network into TensorRT plans, so that servers need not build it. The bundle carries the plans.

    A server uses the plans if a trusted publisher signed the bundle (swap.trusted_keys), and else builds its own.

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
                fail(
                    "tensorrt builds for the GPU of this machine; --architecture works only with --library tensorrt_rtx"
                )
            device = Device()
            device.close()
            architecture = [device.capability]
        if not architecture:
            fail(
                "pass --architecture for each GPU to build for: 8.0 (A100), 8.6 (A10), 8.9 (L4, L40S), 12.0 (Blackwell)"
            )
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
