from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.cores import answer_at_once, compute_behind_others, cores, own_cores
from kernels.engines import default_streams

VISIBLE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1, id="one core"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, VISIBLE, id="no quota"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "30000 100000\n"}, 1, id="part of a core"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "170000 100000\n"}, 1, id="1.7 cores"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, VISIBLE, id="more than visible"),
        pytest.param(
            "0::/pod/server\n",
            {"sys/fs/cgroup/pod/cpu.max": "100000 100000", "sys/fs/cgroup/pod/server/cpu.max": "max 100000"},
            1,
            id="quota of a parent group",
        ),
        pytest.param("0::/docker/0123\n", {"sys/fs/cgroup/cpu.max": "50000 50000"}, 1, id="host's path in a container"),
        pytest.param(
            "4:memory:/\n1:cpu,cpuacct:/docker/0123\n0::/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            1,
            id="version 1, host's path",
        ),
        pytest.param(
            "1:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            VISIBLE,
            id="version 1, no quota",
        ),
        pytest.param("", {}, VISIBLE, id="no control groups"),
    ],
)
def test_a_quota_counts_like_the_cores_that_it_pays_for(tmp_path, groups, files, found):
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores(tmp_path) == found


V1, V1_OTHER = "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "quotas", "found"),
    [
        pytest.param("0::/a/b\n", {"sys/fs/cgroup/a": 6, "sys/fs/cgroup/a/b": 3}, 3, id="version 2, the inner group"),
        pytest.param("0::/a/b\n", {"sys/fs/cgroup/a": 2, "sys/fs/cgroup/a/b": 4}, 2, id="version 2, the outer group"),
        pytest.param("0::/a/b/c\n", {"sys/fs/cgroup/a/b": 5, "sys/fs/cgroup": 7}, 5, id="version 2, in between"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a": 2.9}, 2, id="version 2, a fraction"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a": 12}, 8, id="version 2, more than visible"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/b": 2}, 8, id="version 2, somebody else's group"),
        pytest.param("3:cpu,cpuacct:/a/b\n", {f"{V1}/a": 6, f"{V1}/a/b": 3}, 3, id="version 1, the inner group"),
        pytest.param(
            "3:cpu,cpuacct:/a/b\n", {f"{V1_OTHER}/a": 2, f"{V1_OTHER}/a/b": 4}, 2, id="version 1, the outer one"
        ),
        pytest.param("3:cpuset:/a\n", {f"{V1}/a": 2}, 8, id="version 1, another controller"),
        pytest.param("3:cpu:/a\n0::/b\n", {f"{V1}/a": 4, "sys/fs/cgroup/unified/b": 3}, 3, id="both versions"),
    ],
)
def test_the_smallest_quota_around_a_process_decides_how_many_streams_an_engine_has(
    tmp_path, monkeypatch, groups, quotas, found
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for group, quota in quotas.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        if group.startswith((V1, V1_OTHER)):
            (tmp_path / group / "cpu.cfs_quota_us").write_text(f"{int(quota * 100_000)}\n")
            (tmp_path / group / "cpu.cfs_period_us").write_text("100000\n")
        else:
            (tmp_path / group / "cpu.max").write_text(f"{int(quota * 100_000)} 100000\n")
    assert default_streams("openvino", cores(tmp_path)) == found


def test_where_the_system_tells_nothing_the_visible_cores_count(tmp_path):
    assert cores(tmp_path) == VISIBLE


def test_a_process_in_a_control_group_with_a_quota_sees_it():
    """With this machine's own control groups."""
    group = Path(f"/sys/fs/cgroup/cpu/pinrank-test-{os.getpid()}")
    quota = group / "cpu.cfs_quota_us"
    if not group.parent.is_dir():
        group = Path(f"/sys/fs/cgroup/pinrank-test-{os.getpid()}")
        quota = group / "cpu.max"
    try:
        group.mkdir()
        quota.write_text("100000")
    except OSError as error:
        pytest.skip(f"this user may not make control groups with a quota: {error}")
    script = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0'); from kernels.cores import cores; print(cores())"
    try:
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    finally:
        group.rmdir()
    assert told.stdout == "1\n", told.stderr


@pytest.mark.parametrize(
    ("threads", "visible", "quota", "own"),
    [
        pytest.param(2, {4, 7}, 2, (4, 7), id="as many threads as cores"),
        pytest.param(2, {4, 7, 9}, 3, (), id="an idle core can be found"),
        pytest.param(3, {4, 7}, 2, (), id="more threads than cores"),
        pytest.param(2, {4, 7}, 1, (), id="a quota below the cores that are visible"),
        pytest.param(1, {4}, 1, (), id="one thread has nothing to be kept from"),
    ],
)
def test_threads_get_cores_of_their_own_if_there_are_as_many(threads, visible, quota, own, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: visible)
    monkeypatch.setattr("kernels.cores.cores", lambda: quota)
    assert own_cores(threads) == own


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not know these priorities")
@pytest.mark.parametrize(("choose", "nicer"), [(compute_behind_others, 5), (answer_at_once, 0)])
def test_a_thread_that_computes_is_nicer_than_one_that_answers(choose, nicer):
    before = os.getpriority(os.PRIO_PROCESS, 0)

    def nice() -> tuple[bool, int]:
        return choose(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(nice).result() == (True, before + nicer)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
