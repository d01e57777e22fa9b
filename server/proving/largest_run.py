"""Refuses a network whose largest run takes too much: time, or memory beyond what the network's file tells."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from kernels.cost import tiled
from kernels.engine import FeatureBatch, UnavailableError
from model_store.bundle.files import GOLDEN, Bundle, BundleError
from model_store.bundle.golden import decode_golden
from model_store.model.loaded import LoadedModel
from model_store.network.check import RunLimits

#: The first run of a size may cost more than later ones, but not so many times as much.
_FIRST_RUN = 2.0
#: Address space that a run may reserve beside its memory, such as for threads.
_RESERVED_BYTES = 256 << 20


def check_largest_run(
    model: LoadedModel, bundle: Bundle, limits: RunLimits, requests: int, seconds_max: float, *, on_gpu: bool = False
) -> None:
    """Score the most candidates with a model in this process, of one request and of many, within the limits of a run.

    The network's file bounds a run's tensors in the order of the file (`model_store.network.sizes`). A runtime may
    compute in another order, or hold more; here it does. Processor time is measured, so that other processes and pauses
    of this one do not count. A GPU's time and memory are not in it.

    Args:
        model: the model.
        bundle: its bundle, with golden requests.
        limits: the largest run.
        requests: how many requests a run may join.
        seconds_max: limit on the time of a run of one request.
        on_gpu: whether the engine computes on a GPU.

    Raises:
        BundleError: says how long it took, or that it did not get by with the memory, and the limit.
    """
    golden = decode_golden(bundle.files[GOLDEN])[0]
    sample = model.assembler.assemble(golden.fetched, golden.surface)

    def run_s(batch: FeatureBatch) -> float:
        start_s = time.process_time()
        try:
            model.engine.run(batch)
        except UnavailableError:  # a GPU without memory left is not the bundle's fault
            raise
        except Exception as error:
            most = "" if on_gpu else f" with {limits.bytes_max:,} bytes (swap.run_bytes_max)"
            raise BundleError(
                f"{model.manifest.ref}: a run of {limits.rows:,} candidates (candidates_max) of {batch.requests} "
                f"requests fails{most}: {type(error).__name__}"
            ) from error
        return time.process_time() - start_s

    with _at_most(None if on_gpu else limits.bytes_max):
        _check_time(model, limits, seconds_max, partial(run_s, tiled(sample, 1, limits.rows)))
        run_s(tiled(sample, min(requests, limits.rows), limits.rows))


def _check_time(model: LoadedModel, limits: RunLimits, seconds_max: float, run_s: Callable[[], float]) -> None:
    taken_s = run_s()
    if seconds_max < taken_s <= _FIRST_RUN * seconds_max:
        taken_s = min(taken_s, run_s())
    if taken_s > seconds_max:
        raise BundleError(
            f"{model.manifest.ref}: a run of {limits.rows:,} candidates (candidates_max) takes {taken_s:.3g} s of "
            f"processor time here, the limit is {seconds_max:g} s (swap.run_s_max)"
        )


@contextmanager
def _at_most(bytes_max: int | None) -> Iterator[None]:
    """Let this process take so much more memory for a while."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    if bytes_max is not None:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            now = int(file.read().split()[0]) * resource.getpagesize()
        limit = now + bytes_max + _RESERVED_BYTES
        resource.setrlimit(
            resource.RLIMIT_AS, (limit if before == resource.RLIM_INFINITY else min(before, limit), most)
        )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
