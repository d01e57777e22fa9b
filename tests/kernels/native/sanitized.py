"""What `test_sanitizers.py` runs in a process of its own: `python -m tests.kernels.native.sanitized LIBRARY TASK ...`.

A sanitizer must be the first library of its process, and it ends the process at the first fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest

from feature_client.cache_places import NativePlaces, PlaceArrays
from feature_client.codec import Rows
from kernels.encoder import EncoderShape, FusedEncoder, Numbers, instruction_sets
from kernels.native import library
from model_store.model.assembly import Assembler
from tests import tiny

_THREADS, _RUNS, _LENGTH = 3, 60, 20


def http2_library_beside(checked: Path) -> Path:
    """Return the path of the native edge's library that was built in the same way."""
    return checked.with_name("http2.so")


def run_tests(files: list[str]) -> int:
    return pytest.main(["-q", "-s", "-p", "no:cacheprovider", "--hypothesis-profile=sanitized", *files])


def run_threads() -> None:
    """Call from several threads what may be shared by them, and from each thread what it owns."""
    assembler, fetched = Assembler(tiny.manifest()), tiny.fetched([1, 2, 3], [4, 5])
    kinds: tuple[Numbers, ...] = ("float32", "bf16")
    encoders = [_encoder(isa, numbers) for numbers in kinds for isa in instruction_sets(numbers)]
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 4, (2, _LENGTH))
    embeddings, candidates = (rng.normal(size=size).astype(np.float32) for size in ((2, _LENGTH, 8), (40, 8)))

    def work() -> None:
        places = _places()
        for number in range(_RUNS):
            assembler.assemble(fetched, "home")
            _use(places)
            encoder = encoders[number % len(encoders)]
            encoder.run(actions, embeddings, candidates, np.array([0, 7, 40], np.int32))

    _on_threads([work] * _THREADS)


def run_race() -> None:
    """Share between threads what belongs to one of them, a near cache."""
    places = _places()

    def work() -> None:
        for _ in range(_RUNS):
            _use(places)

    _on_threads([work] * _THREADS)


def run_overflow() -> None:
    """Let the near cache read one id more than there is."""
    places, ids = _places(), np.arange(500, dtype=np.uint64)
    out = np.empty(1 << 16, np.uint8)
    places._look_up(places.struct_at, library.address(ids), len(ids) + 1, 0.0, 0, library.address(out))


def _places() -> NativePlaces:
    return NativePlaces(PlaceArrays(tiny.PINS.dtype, 1 << 16))


def _use(places: NativePlaces) -> None:
    ids = np.arange(500, dtype=np.uint64)
    places.put(ids, Rows(np.zeros(len(ids), tiny.PINS.dtype), np.zeros(len(ids), np.uint8)), 0.0, -1.0)
    places.look_up(ids, -1.0, noted=True)


def _encoder(isa: str, numbers: Numbers) -> FusedEncoder:
    action, pin, candidate, embedding, hidden = 4, 6, 6, 8, 10
    dim = action + pin + candidate
    shapes: dict[str, tuple[int, ...]] = {
        "action_table": (5, action),
        "acted": (pin, embedding),
        "acted_bias": (pin,),
        "candidate": (candidate, embedding),
        "candidate_bias": (candidate,),
    }
    for layer in (1, 2):
        for name, (out, into) in {
            "query_key": (dim, dim),
            "value_out": (dim, dim),
            "hidden": (hidden, dim),
            "feed_forward": (dim, hidden),
        }.items():
            shapes |= {f"layer{layer}_{name}": (out, into), f"layer{layer}_{name}_bias": (out,)}
        for name in ("norm_attention", "norm_out"):
            shapes |= {f"layer{layer}_{name}": (dim,), f"layer{layer}_{name}_bias": (dim,)}
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return FusedEncoder(weights, EncoderShape(_LENGTH, 3, 2), isa, numbers)


def _on_threads(work: list[Callable[[], None]]) -> None:
    start = Barrier(len(work))

    def begin(one: Callable[[], None]) -> None:
        start.wait()
        one()

    threads = [Thread(target=begin, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    vars(library)["LIBRARY"] = Path(sys.argv[1])
    vars(library)["HTTP2_LIBRARY"] = http2_library_beside(Path(sys.argv[1]))
    tasks = {"threads": run_threads, "race": run_race, "overflow": run_overflow}
    task, files = sys.argv[2], sys.argv[3:]
    sys.exit(run_tests(files) if task == "tests" else tasks[task]())
