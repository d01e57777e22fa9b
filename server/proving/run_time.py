"""Refuses a network whose largest run takes too long: it would keep an engine stream from everybody else."""

from __future__ import annotations

import time

from kernels.cost import tiled
from model_store.bundle.files import GOLDEN, Bundle, BundleError
from model_store.bundle.golden import decode_golden
from model_store.model.loaded import LoadedModel

#: The first run of a size may cost more than later ones, but not so many times as much.
_FIRST_RUN = 2.0


def check_run_time(model: LoadedModel, bundle: Bundle, rows: int, seconds_max: float) -> None:
    """Score so many candidates with a model in this process, and refuse it if that takes too long.

    Processor time is measured, so that other processes and pauses of this one do not count. A GPU's time is not in it.

    Raises:
        BundleError: says how long it took, and the limit.
    """
    golden = decode_golden(bundle.files[GOLDEN])[0]
    batch = tiled(model.assembler.assemble(golden.fetched, golden.surface), 1, rows)

    def run_s() -> float:
        start_s = time.process_time()
        model.engine.run(batch)
        return time.process_time() - start_s

    taken_s = run_s()
    if seconds_max < taken_s <= _FIRST_RUN * seconds_max:
        taken_s = min(taken_s, run_s())
    if taken_s > seconds_max:
        raise BundleError(
            f"{model.manifest.ref}: a run of {rows:,} candidates (candidates_max) takes {taken_s:.3g} s of processor "
            f"time here, the limit is {seconds_max:g} s (swap.run_s_max)"
        )
