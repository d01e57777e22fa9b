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

from server.memory import give_back_freed, map_large_blocks_apart

def own_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

if sys.argv[1] == "apart":
    map_large_blocks_apart()
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
    assert kept_mb("apart") < 5
    assert kept_mb("as glibc does") > 25, "glibc no longer keeps them: map_large_blocks_apart can go"
