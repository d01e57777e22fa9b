from __future__ import annotations

import subprocess
import sys

import pytest

RAISE = """
import resource
from server.runtime.descriptors import raise_descriptor_limit
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "told"),
    [(64, 200, "200 200 200"), (200, 200, "200 200 200")],
    ids=["below what it may have", "all it may have"],
)
def test_a_process_takes_as_many_descriptors_as_it_may(soft, hard, told):
    command = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"'
    ran = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-c", RAISE], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == told
