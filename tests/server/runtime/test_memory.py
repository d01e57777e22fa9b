"""What a version took goes back to the system when it is gone."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Blocks of a near cache's size, made on a thread of its own and dropped on another, as when versions come and go.
STORY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from server.runtime.memory import give_back_freed, set_up_allocator

def own_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

if sys.argv[1] == "ours":
    set_up_allocator()
loader, left = ThreadPoolExecutor(1), []
for _ in range(4):
    block = loader.submit(np.full, 30 << 20, 1, np.uint8).result()
    assert own_mb() > 30
    del block
    loader.submit(give_back_freed).result()
    left.append(own_mb())
print(left[-1] - left[0])
"""


def kept_mb(how):
    done = subprocess.run([sys.executable, "-c", STORY, how], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_blocks_go_back_however_often_versions_come_and_go():
    assert kept_mb("ours") < 5
    assert kept_mb("as glibc does") > 25, "glibc no longer keeps them: set_up_allocator can go"


#: Threads that allocate at the same time, each of which glibc would give a heap; malloc_stats tells how many there are.
CROWD = """
import ctypes, sys, threading

from server.runtime.memory import set_up_allocator

if sys.argv[1] == "ours":
    set_up_allocator()
together = threading.Barrier(6)

def allocate():
    together.wait()
    held = [ctypes.create_string_buffer(5_000) for _ in range(100)]
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ctypes.CDLL(None).malloc_stats()
"""


def heaps(how):
    done = subprocess.run([sys.executable, "-c", CROWD, how], capture_output=True, text=True, check=True)
    return done.stderr.count("Arena ")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_threads_share_few_heaps():
    assert heaps("ours") <= 2
    assert heaps("as glibc does") > 2
