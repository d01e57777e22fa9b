"""Phases that hang, crash, print garbage or are killed, and a run that is killed: what was measured stays."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu.numbers import DRY_FILE, FILE, OUT_OF_TIME, WITHOUT, Numbers, file_of, read
from bench.gpu.plan import PlannedPhase
from bench.gpu.run import LOG, RunError, run
from bench.gpu.table import write
from tests.processes import ends_of

ROOT = Path(__file__).parents[3]
FAR_S = 1e9
#: What runs phases, without what they measure.
RUNNERS = ("run", "guard", "numbers", "plan")


def planned(out, *codes, limit_s=60.0):
    """Return phases that run Python code in which `numbers` is theirs; `limit_s` each."""
    before = (
        "import os, sys, time, subprocess\n"
        "from pathlib import Path\n"
        "from bench.gpu.numbers import Numbers\n"
        f"numbers = Numbers(Path({str(out)!r}), {{name!r}}, float(sys.argv[-1]), dry_run=False)\n"
    )
    names = ("facts", "parity", "ceilings", "encoder", "tuning")
    return [
        PlannedPhase(name, i * limit_s, limit_s, (sys.executable, "-c", before.format(name=name) + code))
        for i, (name, code) in enumerate(zip(names, codes, strict=False))
    ]


def lines(out, phase):
    return {line["what"]: line for line in read(file_of(out, dry_run=False)).lines if line["phase"] == phase}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "proto")]))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('no such card')", r"ended with 1: .*ValueError: no such card$"),
        ("os._exit(7)", r"ended with 7$"),
        ("os.kill(os.getpid(), 11)", r"ended by SIGSEGV$"),
        ("sys.stdout.buffer.write(bytes(range(256)) * 50000); sys.stdout.flush(); sys.exit(3)", r"ended with 3: "),
        ("os.close(1); os.close(2); os._exit(2)", r"ended with 2$"),
    ],
)
def test_a_phase_that_fails_leaves_its_numbers_and_the_next_one_runs(tmp_path, code, why):
    measured = "numbers.add('first', {'rows_s': 1.5})\n"
    phases = planned(tmp_path, measured + code, "numbers.add('after', {'rows_s': 2})")
    assert run(phases, tmp_path, time.monotonic(), dry_run=False) is False
    assert lines(tmp_path, "facts")["first"]["rows_s"] == 1.5
    assert re.search(why, lines(tmp_path, "facts")["the phase"]["ended"])
    assert re.search(why, lines(tmp_path, "facts")["card"]["not_measured"])
    assert lines(tmp_path, "parity")["after"]["rows_s"] == 2
    assert "ended" not in lines(tmp_path, "parity")["the phase"]
    assert lines(tmp_path, "parity")["as it is"]["not_measured"] == WITHOUT


def test_a_phase_that_hangs_is_killed_with_all_that_it_started_and_the_next_one_runs(tmp_path, monkeypatch):
    hangs = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "numbers.add('child', {'pid': child.pid})\n"
        "time.sleep(600)"
    )
    began_s = time.monotonic()

    class Clock:
        """A minute is gone as soon as the phase has written its number."""

        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic():
            return began_s + (60.5 if "child" in lines(tmp_path, "facts") else 0)

    monkeypatch.setattr("bench.gpu.run.time", Clock)
    phases = planned(tmp_path, hangs, "numbers.add('after', {'rows_s': 2})", limit_s=60)
    assert run(phases, tmp_path, began_s, dry_run=False) is False
    assert lines(tmp_path, "facts")["the phase"]["ended"].startswith("killed after 60 s")
    assert not alive(lines(tmp_path, "facts")["child"]["pid"])
    assert lines(tmp_path, "parity")["after"]["rows_s"] == 2


def test_what_a_phase_leaves_behind_is_gone_before_the_next_one(tmp_path):
    leaves = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "numbers.add('child', {'pid': child.pid})"
    )
    assert run(planned(tmp_path, leaves), tmp_path, time.monotonic(), dry_run=False) is True
    assert not alive(lines(tmp_path, "facts")["child"]["pid"])


def test_a_phase_whose_time_is_up_before_it_starts_says_so(tmp_path):
    phases = planned(tmp_path, "numbers.add('never', {})")
    assert run(phases, tmp_path, time.monotonic() - 61, dry_run=False) is False
    assert lines(tmp_path, "facts")["the phase"]["ended"] == "not started: the time was up"
    assert "never" not in lines(tmp_path, "facts")


def test_a_phase_that_ends_early_gives_its_time_to_the_next(tmp_path):
    phases = planned(tmp_path, "pass", "numbers.add('left', {'seconds': numbers.left_s()})")
    run(phases, tmp_path, time.monotonic(), dry_run=False)
    assert lines(tmp_path, "parity")["left"]["seconds"] > 60


def alive(pid):
    """Say whether a process runs: a zombie, whose parent has not looked yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


#: Numbers until the kill: the first ones, and some that fall into any of the phases.
KILLED_AFTER = (1, 2, *random.Random(0).sample(range(3, 400), 5))


@pytest.mark.parametrize("count", KILLED_AFTER)
def test_a_run_that_is_killed_keeps_every_finished_number_and_can_go_on(tmp_path, count):
    """Each number is told through a pipe after it was appended; so many are waited for, then SIGKILL."""
    out, told = tmp_path / "out", tmp_path / "told"
    os.mkfifo(told)
    writes = (
        f"pipe = os.open({str(told)!r}, os.O_WRONLY)\n"
        "for number in range(100):\n"
        "    numbers.add(str(number), {'rows_s': number})\n"
        "    os.write(pipe, f'{os.getpid()} {sys.argv[-1]} {number:04}\\n'.encode())\n"
    )
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bench.gpu.run import run\n"
        "from tests.bench.gpu.test_gpu_run import planned\n"
        f"out = Path({str(out)!r})\n"
        f"run(planned(out, *[{writes!r}] * 5), out, time.monotonic(), dry_run=False)"
    )
    # Opened for both, so that no end is read between two phases.
    with os.fdopen(os.open(told, os.O_RDWR), "rb", buffering=0) as pipe:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        received = b""
        while received.count(b"\n") < count:
            received += pipe.read(1 << 16)
        process.kill()
        process.wait()
    finished = received.decode().splitlines()
    writer = int(finished[-1].split()[0])
    while alive(writer):  # it dies with the one that started it
        os.sched_yield()
    found = read(out / FILE)
    assert found.unreadable <= 1
    numbers = [line["rows_s"] for line in found.lines if "rows_s" in line]
    assert numbers[: len(finished)] == [int(line.split()[2]) for line in finished]
    page = write(out, dry_run=False).read_text()
    assert "not measured: the phase did not run to its end" in page
    assert json.loads((out / "gpu.json").read_text())["raw"]["lines"]
    assert run(planned(out, "numbers.add('again', {'rows_s': 3})"), out, time.monotonic(), dry_run=False) is True
    assert lines(out, "facts")["again"]["rows_s"] == 3


def test_a_line_that_a_kill_cut_off_costs_itself_alone(tmp_path):
    numbers = Numbers(tmp_path, "encoder", FAR_S, dry_run=False)
    for number in range(3):
        numbers.add(str(number), {"rows_s": number})
    whole = (tmp_path / FILE).read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(whole)):
        (tmp_path / FILE).write_bytes(whole[:cut])
        Numbers(tmp_path, "encoder", FAR_S, dry_run=False).add("later", {"rows_s": 9})
        found = read(tmp_path / FILE)
        kept = [line["what"] for line in found.lines]
        assert kept == ["0", "1", *(["2"] if cut == len(whole) - 1 else []), "later"]
        assert found.unreadable == (cut < len(whole) - 1)


def test_one_number_that_fails_says_why_and_the_others_are_measured(tmp_path):
    class OutOfResources(Exception):  # noqa: N818 - as Triton's, which is no RuntimeError
        pass

    def fails():
        raise OutOfResources("shared memory, Required: 489, Hardware limit: 227")

    numbers = Numbers(tmp_path, "tuning", FAR_S, dry_run=False)
    numbers.measure("too large", fails)
    numbers.measure("fits", lambda: {"rows_s": float("inf")})
    numbers.measure("no number", lambda: {"rows_s": object()})
    found = lines(tmp_path, "tuning")
    assert found["too large"]["not_measured"] == "OutOfResources: shared memory, Required: 489, Hardware limit: 227"
    assert found["fits"]["rows_s"] == "inf"
    assert found["no number"]["not_measured"].startswith("TypeError: ")


def test_nothing_begins_after_the_phases_end(tmp_path):
    numbers = Numbers(tmp_path, "tuning", time.monotonic() + 5, dry_run=False)
    numbers.measure("too long", lambda: pytest.fail("must not begin"), needs_s=6)
    numbers.measure("short", lambda: {"rows_s": 1}, needs_s=0)
    assert lines(tmp_path, "tuning")["too long"]["not_measured"] == OUT_OF_TIME
    assert lines(tmp_path, "tuning")["short"]["rows_s"] == 1


def test_the_results_are_few_small_files_with_plain_names(tmp_path):
    shouts = "for _ in range(300): os.write(1, os.urandom(1 << 16))"
    for _ in range(2):
        run(planned(tmp_path, *[shouts] * 5), tmp_path, time.monotonic(), dry_run=False)
    write(tmp_path, dry_run=False)
    made = list(tmp_path.rglob("*"))
    assert {file.name for file in made} == {FILE, LOG, "gpu.json", "gpu.md"}  # ncu and memcheck: two more
    assert all(file.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in made)
    assert sum(file.stat().st_size for file in made) < 8 << 20


@pytest.mark.parametrize(("there", "arguments"), [(DRY_FILE, []), (FILE, ["--dry-run"])])
def test_a_dry_run_and_a_real_one_share_no_folder(tmp_path, there, arguments):
    (tmp_path / there).write_text("{}\n")
    command = [sys.executable, "-m", "bench.gpu.run", "--out", str(tmp_path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "choose another folder" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == [there]


def test_a_run_that_is_asked_to_end_takes_its_phase_along(tmp_path):
    told = tmp_path / "told"
    os.mkfifo(told)
    phase = f"pipe = os.open({str(told)!r}, os.O_WRONLY); os.write(pipe, str(os.getpid()).encode()); time.sleep(600)"
    code = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom bench.gpu.run import end_when_asked, run\n"
        "from tests.bench.gpu.test_gpu_run import planned\n"
        f"out = Path({str(tmp_path)!r})\nend_when_asked(out)\n"
        f"run(planned(out, {phase!r}), out, time.monotonic(), dry_run=False)"
    )
    with os.fdopen(os.open(told, os.O_RDWR), "rb", buffering=0) as pipe:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        pid = int(pipe.read(32))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert not alive(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_script_that_is_ended_leaves_no_process_and_no_temporary_files(tmp_path, number):
    """In a copy of the sources whose first phase starts a process, puts both into its temporary folder, and hangs."""
    copy, out, temporary = tmp_path / "a copy", tmp_path / "the results", tmp_path / "temporary"
    (copy / "bench/gpu").mkdir(parents=True)
    temporary.mkdir()
    for name in ("gpu-ten-minutes.sh", "__init__.py", "gpu/__init__.py", *(f"gpu/{name}.py" for name in RUNNERS)):
        shutil.copy(ROOT / "bench" / name, copy / "bench" / name)
    told = tmp_path / "told"
    os.mkfifo(told)
    (copy / "bench/gpu/phase.py").write_text(
        "import os, subprocess, sys, tempfile, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "made = tempfile.mkdtemp()\n"
        f"pipe = os.open({str(told)!r}, os.O_WRONLY)\n"
        "os.write(pipe, f'{os.getpid()} {child.pid} {made}'.encode())\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"GPU_PYTHON": sys.executable, "TMPDIR": str(temporary)}
    command = [copy / "bench/gpu-ten-minutes.sh", "--dry-run", "--out", out, "facts"]
    with os.fdopen(os.open(told, os.O_RDWR), "rb", buffering=0) as pipe:
        script = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert select.select([pipe], [], [], 60)[0], "the phase did not start"
        phase, child, made = pipe.read(4096).decode().split()
        assert Path(made).is_relative_to(temporary)
        with ends_of([int(phase), int(child)]):
            script.send_signal(number)
            _, said = script.communicate()
    assert script.returncode == (-9 if number is signal.SIGKILL else 128 + number)
    assert number is signal.SIGKILL or f"ended by {number.name}; what was measured is in {out}" in said
    assert "Traceback" not in said
    until_s = time.monotonic() + 30
    while list(temporary.iterdir()):  # after a SIGKILL, somebody else removes it
        assert time.monotonic() < until_s
        os.sched_yield()


def test_two_runs_at_once_into_one_folder_are_refused(tmp_path):
    phases = planned(tmp_path, "numbers.add('first', {'rows_s': 1})")
    with (tmp_path / LOG).open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another run writes to"):
            run(phases, tmp_path, time.monotonic(), dry_run=False)
    assert run(phases, tmp_path, time.monotonic(), dry_run=False) is True


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--out", "/dev/null"], {}, r"cannot go on: .*'/dev/null'; what was measured is in /dev/null"),
        (["--out", "/proc/here"], {}, r"cannot go on: .*'/proc/here'"),
        (["fact"], {}, r"there is no phase 'fact'"),
        ([], {"GPU_PYTHON": "/no/python"}, r"there is no Python '/no/python': set GPU_PYTHON"),
        ([], {"TMPDIR": "/proc/here"}, r"there is no folder for temporary files: set TMPDIR"),
    ],
)
def test_a_run_that_cannot_be_says_why_in_a_sentence(tmp_path, arguments, environment, said):
    environment = {"GPU_PYTHON": sys.executable, "TMPDIR": str(tmp_path)} | environment
    command = [ROOT / "bench/gpu-ten-minutes.sh", "--dry-run", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_a_part_of_a_line_costs_that_line_alone(tmp_path, monkeypatch):
    numbers = Numbers(tmp_path, "encoder", FAR_S, dry_run=False)
    write_all, full = os.write, iter([True])

    def takes_a_part(file, content):
        if next(full, False):
            return write_all(file, content[:10])
        if "part" in content.decode():
            raise OSError(28, "No space left on device")
        return write_all(file, content)

    monkeypatch.setattr("bench.gpu.numbers.os.write", takes_a_part)
    with pytest.raises(OSError, match="No space left"):
        numbers.add("a part", {"rows_s": 1})
    numbers.add("later", {"rows_s": 2})
    found = read(tmp_path / FILE)
    assert ([line["what"] for line in found.lines], found.unreadable) == (["later"], 1)
